"""Rows without training, from equation to table: WinCLIP, MuSc and Dual-Image with references.

The expected values come from loops over single images, windows and patches; nothing is downloaded.
The encoder is small and its weights are sharp, see test_parity.
"""

import csv
import itertools
import json
import shutil
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_parity import gap, unit

from zsad.bench.forecast import forecast
from zsad.bench.jobs import reference_of
from zsad.bench.models import Model
from zsad.bench.plan import collect, compute, plan_jobs
from zsad.bench.reading import read_results
from zsad.bench.requests import gather_rows, possible, shots_of
from zsad.bench.results import write_results
from zsad.bench.workers import run_all
from zsad.cli.main import main
from zsad.core.hashing import digest
from zsad.datasets.images import load_image
from zsad.datasets.layouts import read_folder
from zsad.datasets.loading import load_dataset
from zsad.datasets.masks import load_mask
from zsad.datasets.meta import read_meta, write_meta
from zsad.datasets.survey import scan_dataset
from zsad.encoder.encoder import encode_images
from zsad.encoder.loading import load_encoder
from zsad.encoder.spec import AttentionPath, EncodeSpec
from zsad.encoder.store import load_or_encode, prune, streams_in, verify
from zsad.encoder.streams import join, split, streams_of
from zsad.encoder.windows import encode_windows, window_places
from zsad.evaluation.measure import evaluate
from zsad.evaluation.protocol import METRICS
from zsad.methods.dual import draw_references, dual_score, joint_map, pair_map
from zsad.methods.musc import musc_map, rscin
from zsad.methods.prompts import encode_prompts
from zsad.methods.windows import choose_references, zero_shot_map
from zsad.papers.exhibit import Exhibit, Row
from zsad.papers.exhibits import EXHIBITS
from zsad.papers.exhibits_winclip import winclip_with_shots
from zsad.pipeline.checks import check_method
from zsad.pipeline.detector import build
from zsad.pipeline.inputs import select_images, select_paths
from zsad.pipeline.references import Reference
from zsad.pipeline.rows import METHODS
from zsad.rendered.procad import render_procad
from zsad.reporting.cells import cell, runs_of
from zsad.reporting.tables import readable, table

S, GRID, C = 96, (6, 6), ['pill']
WITH_REFERENCES, NEW = (
    ('winclip+', 'winclip+@code', 'musc-2', 'dual'),
    ('winclip', 'winclip+', 'winclip@code', 'winclip+@code', 'musc', 'musc-2', 'dual'),
)


@pytest.fixture(scope='module')
def enc(files):
    return load_encoder(*files, device='cpu', dtype='float32')


def noise(n, seed=0):
    return torch.randn(n, 3, S, S, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def x():
    return noise(4)


@pytest.fixture(scope='module')
def refs(x):
    "Three references; the first resembles the first image."
    r = noise(3, 1)
    r[0] = 0.8 * x[0] + 0.2 * r[0]
    return r


@pytest.fixture(scope='module')
def det(enc):
    "Build detectors for pill and wood, sentences encoded once."
    texts = {}
    return lambda method: build(method, ['pill', 'wood'], enc, texts)


def enlarge(a, align_corners=False):
    return F.interpolate(
        a.view(len(a), 1, *GRID), size=(S, S), mode='bilinear', align_corners=align_corners
    )[:, 0]


def both(p, q, tol=1e-5):
    return gap(p.map, q.map) < tol and gap(p.score, q.score) < tol


@torch.inference_mode()
def blocks(enc, x):
    return enc.model.visual.forward_intermediates(x, output_fmt='NLC')[
        'image_intermediates'
    ]  # patches behind every block, by open_clip


@torch.inference_mode()
def class_token(enc, x):
    return unit(enc.model.encode_image(x))


def probability(t, text, tau):
    return torch.softmax(t @ text.T / tau, -1)[..., 1]


# ---- WinCLIP


@pytest.mark.parametrize('name', ['winclip', 'winclip@code'])
def test_winclip_is_the_functions_of_windows_called_by_hand(enc, det, x, name):
    text = encode_prompts(enc, name, 'pill')
    score = probability(class_token(enc, x), text, 0.07)
    p = det(name)(x, C * 4)
    assert (
        gap(p.score, score) < 1e-5
        and gap(
            p.map,
            enlarge(
                zero_shot_map(encode_windows(enc.model.visual, x, (2, 3)), score, text, GRID, 0.07)
            ),
        )
        < 1e-5
    )
    assert p.map.std() > 0.01 and p.score.std() > 0.01


def test_the_two_spellings_of_winclip_differ(det, x):
    assert gap(det('winclip')(x, C * 4).map, det('winclip@code')(x, C * 4).map) > 1e-4


def farness(f, memory):
    "WinCLIP Eq. (2), one feature after another."
    return [min((1 - float(a @ b / (a.norm() * b.norm()))) / 2 for b in memory) for a in f]


def spread_out(values, k):
    "WinCLIP Eq. (1): what each patch has from the windows that contain it."
    means = [
        [v for v, p in zip(values, window_places(GRID, k).tolist()) if i in p] for i in range(36)
    ]
    return [len(m) / sum(1 / v for v in m) for m in means]


@torch.inference_mode()
def eq_2_to_4(enc, image, refs, name):
    "WinCLIP+ for one image [1,3,S,S], Eq. (2)-(4) written out: score, map on the grid, memory map."
    v, text = enc.model.visual, encode_prompts(enc, name, 'pill')
    maps = [
        spread_out(
            farness(
                encode_windows(v, image, (k,))[k][0], encode_windows(v, refs, (k,))[k].flatten(0, 1)
            ),
            k,
        )
        for k in (2, 3)
    ]
    maps.append(farness(blocks(enc, image)[-1][0], blocks(enc, refs)[-1].flatten(0, 1)))
    memory = [sum(m) / 3 for m in zip(*maps)]
    cls = float(probability(class_token(enc, image), text, 0.07))
    zero = [
        spread_out(probability(encode_windows(v, image, (k,))[k][0], text, 0.07).tolist(), k)
        for k in (2, 3)
    ]
    zero = [3 / (1 / a + 1 / b + 1 / cls) for a, b in zip(*zero)]
    return (
        (cls + max(memory)) / 2,
        torch.tensor([a + b for a, b in zip(zero, memory)])[None],
        torch.tensor(memory),
    )


@pytest.mark.parametrize('name', ['winclip+', 'winclip+@code'])
def test_winclip_plus_is_its_equations_written_out_per_image(enc, det, x, refs, name):
    p = det(name)(x[:2], C * 2, refs[:1])
    for i in range(2):
        score, a, memory = eq_2_to_4(enc, x[i : i + 1], refs[:1], name.replace('+', ''))
        assert abs(float(p.score[i]) - score) < 1e-5 and gap(p.map[i : i + 1], enlarge(a)) < 1e-5
        assert memory.max() > 0.02


@pytest.mark.parametrize('name', ['winclip+', 'winclip+@code'])
def test_without_reference_it_is_winclip(det, x, refs, name):
    off, plain = det(name)(x, C * 4), det(name.replace('+', ''))(x, C * 4)
    assert torch.equal(off.map, plain.map) and torch.equal(off.score, plain.score)
    assert gap(det(name)(x, C * 4, refs).map, plain.map) > 0.01


def test_an_image_among_its_references_has_an_empty_memory_map(det, x, refs):
    plain, one, all_of_them = (
        det('winclip')(x, C * 4),
        det('winclip+')(x[:1], C, x[:1]),
        det('winclip+')(x, C * 4, torch.cat([refs, x])),
    )
    assert gap(one.map, plain.map[:1]) < 1e-5 and gap(one.score, plain.score[:1] / 2) < 1e-5
    assert gap(all_of_them.map, plain.map) < 1e-5 and gap(all_of_them.score, plain.score / 2) < 1e-5
    assert (
        gap(det('winclip+')(x, C * 4, x[:1]).map[1:], plain.map[1:]) > 0.01
    )  # of the first image only


@pytest.mark.parametrize('name', ['winclip+', 'winclip+@code'])
def test_the_order_of_the_shots_does_not_matter_and_their_number_does(det, x, refs, name):
    want = det(name)(x, C * 4, refs)
    for order in itertools.permutations(range(3)):
        assert both(det(name)(x, C * 4, refs[list(order)]), want)
    one = det(name)(x, C * 4, refs[:1])
    assert (
        gap(want.map, one.map) > 1e-3 and (want.map <= one.map + 1e-5).all()
    )  # more memory never raises a distance


# ---- Dual-Image


@torch.inference_mode()
def dual_by_hand(enc, x, refs):
    "Text map, pair map [B,36] and class score [B]; every image with all references."
    text, p = encode_prompts(enc, 'anoclip', 'pill'), enc.encode(x).single[0]
    return (
        probability(p, text, 0.07),
        pair_map(p, enc.encode(refs).single[0].flatten(0, 1)),
        probability(class_token(enc, x), text, 0.07),
    )


def test_dual_without_reference_is_its_sentences_alone(enc, det, x):
    text, _, cls = dual_by_hand(enc, x, x)
    p = det('dual')(x, C * 4)
    assert gap(p.map, enlarge(text)) < 1e-5 and gap(p.score, cls) < 1e-5
    anoclip = det('anoclip')(x, C * 4)
    assert gap(p.map, anoclip.map) > 0.05 and both(
        p,
        det(
            replace(
                METHODS['anoclip'],
                terms=(('text', dict(tau=0.07)),),
                score=('class', dict(tau=0.07)),
            )
        )(x, C * 4),
        1e-7,
    )


def test_dual_joins_its_maps_as_by_hand(enc, det, x, refs):
    text, vis, cls = dual_by_hand(enc, x, refs[:1])
    a = joint_map(text, vis)
    p = det('dual')(x, C * 4, refs[:1])
    assert gap(p.map, enlarge(a)) < 1e-5 and gap(p.score, dual_score(cls, a)) < 1e-5
    i, j = 2, 17  # one patch, one cosine after another
    f, r = enc.encode(x).single[0][i, j], enc.encode(refs[:1]).single[0][0]
    assert abs(float(a[i, j]) - (float(text[i, j]) + min(1 - float(f @ b) for b in r)) / 2) < 1e-5


def test_dual_gives_every_image_its_own_reference(enc, det, x):
    d, rows = det('dual'), torch.tensor([[1, 3], [0, 2], [3, 0], [1, 2]])
    tokens = enc.tokens(x, d.method.encode)
    p = d.predict(tokens, C * 4, dict(pill=Reference(tokens, rows)))
    for i in range(4):
        alone = d(x[i : i + 1], C, x[rows[i]])
        assert (
            gap(p.map[i : i + 1], alone.map) < 1e-5 and gap(p.score[i : i + 1], alone.score) < 1e-5
        )
    assert (
        gap(p.map, d.predict(tokens, C * 4, dict(pill=Reference(tokens, rows[:, :1]))).map) > 1e-3
    )


@pytest.mark.parametrize('alpha', [0.5, 0.2])
def test_a_copy_of_itself_as_reference_leaves_the_share_of_the_sentences(enc, det, x, alpha):
    ids = [f'pill/{n}' for n in 'dbca']
    rows = draw_references(ids, policy='same')
    assert rows.tolist() == [[0], [1], [2], [3]]
    d = det(
        replace(
            METHODS['dual'],
            term_weights=(alpha, 1 - alpha),
            reference=('pair', dict(policy='same')),
        )
    )
    tokens = enc.tokens(x, d.method.encode)
    p = d.predict(tokens, C * 4, dict(pill=Reference(tokens, rows)))
    text, _, cls = dual_by_hand(enc, x, x)
    assert (
        gap(p.map, enlarge(alpha * text)) < 1e-5
        and gap(p.score, 0.5 * cls + 0.5 * alpha * text.amax(1)) < 1e-5
    )


def test_weights_of_one_and_zero_leave_one_map(enc, det, x, refs):
    text, vis, cls = dual_by_hand(enc, x, refs)
    for weights, a in (((1.0, 0.0), text), ((0.0, 1.0), vis)):
        p = det(replace(METHODS['dual'], term_weights=weights))(x, C * 4, refs)
        assert gap(p.map, enlarge(a)) < 1e-5 and gap(p.score, (cls + a.amax(1)) / 2) < 1e-5
    assert gap(text, vis) > 0.1
    one = det(replace(METHODS['dual'], terms=METHODS['dual'].terms[1:], term_weights=()))(
        x, C * 4, refs
    )  # the term alone, and no weights: the mean
    assert gap(one.map, enlarge(vis)) < 1e-5


# ---- MuSc


def layers_of(enc, x):
    return torch.stack(blocks(enc, x))  # quarters of four blocks: all of them


def test_musc_is_its_functions_called_by_hand(enc, det, x):
    a = musc_map(layers_of(enc, x), GRID, (1, 3, 5), 0.3)
    large = enlarge(a, True)
    p = det('musc')(x, C * 4)
    assert (
        gap(p.map, large) < 1e-4
        and gap(p.score, rscin(large.flatten(1).amax(1), class_token(enc, x))) < 1e-3
        and p.map.std() > 0.01
    )


def test_the_order_of_the_set_does_not_matter(det, x):
    want, order = det('musc')(x, C * 4), [2, 0, 3, 1]
    p = det('musc')(x[order], C * 4)
    assert (
        gap(p.map, want.map[order]) < 1e-5
        and gap(p.score, want.score[order]) < 1e-4
        and gap(p.map, want.map) > 0.01
    )


def test_the_set_is_what_an_image_is_scored_by(det, x):
    assert gap(det('musc')(x[:3], C * 3).map, det('musc')(x, C * 4).map[:3]) > 1e-3


def test_one_image_cannot_score_itself(det, x):
    with pytest.raises(ValueError, match=r'M at least 2.*more images'):
        det('musc')(x[:1], C)
    with pytest.raises(ValueError, match=r'M at least 2.*more images'):
        det('musc')(x[:3], ['pill', 'wood', 'pill'])  # the only one of its category


def test_two_categories_do_not_score_each_other(det):
    y = noise(5, 3)
    cats = ['pill', 'wood', 'wood', 'pill', 'wood']
    for name in ('musc', 'winclip', 'anoclip'):
        p = det(name)(y, cats)
        for c in ('pill', 'wood'):
            at = [i for i, k in enumerate(cats) if k == c]
            alone = det(name)(y[at], [c] * len(at))
            assert gap(p.map[at], alone.map) < 1e-5 and gap(p.score[at], alone.score) < 1e-5, name
    mixed = det('musc')(y, C * 5)
    assert gap(mixed.map, det('musc')(y, cats).map) > 1e-3


def test_musc_2_without_reference_names_the_fix(det, x):
    with pytest.raises(ValueError, match=r'musc-2 .*reference=.*\[R,3,S,S\]'):
        det('musc-2')(x, C * 4)
    assert METHODS['musc'].transductive and not METHODS['musc-2'].transductive


def test_musc_2_is_musc_map_with_the_reference_as_the_set(enc, det, x, refs):
    for r in (refs[:1], refs):
        large = enlarge(musc_map(layers_of(enc, x), GRID, (1, 3, 5), 0.3, layers_of(enc, r)), True)
        p = det('musc-2')(x, C * 4, r)
        assert gap(p.map, large) < 1e-4 and gap(p.score, large.flatten(1).amax(1)) < 1e-4


def test_finishing_changes_scores_only(enc, det, x):
    done, plain = det('musc')(x, C * 4), det(replace(METHODS['musc'], set_steps=()))(x, C * 4)
    assert torch.equal(done.map, plain.map) and gap(plain.score, plain.map.flatten(1).amax(1)) == 0
    assert (
        gap(done.score, rscin(plain.score, enc.encode(x).cls)) < 1e-6
        and gap(done.score, plain.score) > 0.01
    )
    other = det(replace(METHODS['musc'], set_steps=(('rscin', dict(neighbours=(1,))),)))(x, C * 4)
    assert (
        torch.equal(other.map, plain.map)
        and gap(
            other.score, (plain.score - plain.score.min()) / (plain.score.max() - plain.score.min())
        )
        < 1e-5
    )


# ---- all rows


@pytest.mark.parametrize('name', WITH_REFERENCES)
def test_four_with_one_reference_are_four_times_one(det, x, refs, name):
    p = det(name)(x, C * 4, refs[:1])
    for i in range(4):
        alone = det(name)(x[i : i + 1], C, refs[:1])
        assert (
            gap(p.map[i : i + 1], alone.map) < 1e-5 and gap(p.score[i : i + 1], alone.score) < 1e-5
        )
    assert p.score.std() > 1e-3 and p.map.std() > 1e-3


@pytest.mark.parametrize('name', WITH_REFERENCES)
def test_references_by_category(det, x, refs, name):
    "Each category has its own; references for some categories only are refused."
    cats = ['wood', 'pill', 'wood', 'pill']
    d = det(name)
    p = d(x, cats, dict(pill=refs[:1], wood=refs[1:]))
    for c, r in (('pill', refs[:1]), ('wood', refs[1:])):
        at = [i for i, k in enumerate(cats) if k == c]
        alone = d(x[at], [c] * 2, r)
        assert gap(p.map[at], alone.map) < 1e-5 and gap(p.score[at], alone.score) < 1e-5
    if name == 'musc-2':
        return
    with pytest.raises(ValueError, match=r"none is given for \['wood'\].*every category"):
        d(x, cats, dict(pill=refs[:1]))
    with pytest.warns(UserWarning, match='scores by text alone'):
        d(x, cats)


@pytest.mark.parametrize('name', NEW)
def test_a_detector_leaves_its_tokens_alone_and_reads_only_its_own(enc, det, x, name):
    "Tokens that were encoded for several rows give what the row's own give, and stay as they were."
    d = det(name)
    many = replace(
        d.method.encode,
        paths=tuple(
            dict.fromkeys((AttentionPath('v', 1), *d.method.encode.paths, AttentionPath('vv', 2)))
        ),
        windows=(1, 2, 3),
    )
    tokens = enc.tokens(x, many.resolved(enc.blocks))
    before = [t.clone() for t in split(tokens, many.resolved(enc.blocks))]
    given = (
        dict(pill=Reference(tokens, torch.tensor([[1], [2], [3], [0]])))
        if d.method.reference
        else None
    )
    p = d.predict(tokens, C * 4, given)
    assert all(torch.equal(a, b) for a, b in zip(before, split(tokens, many.resolved(enc.blocks))))
    row_tokens = enc.tokens(x, d.method.encode)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            split(select_paths(tokens, d.method.encode), d.method.encode),
            split(row_tokens, d.method.encode),
            strict=True,
        )
    )
    assert both(
        p,
        d.predict(
            row_tokens, C * 4, given and dict(pill=Reference(row_tokens, given['pill'].rows))
        ),
        1e-6,
    )


def test_images_are_picked_by_number(enc, x):
    spec = EncodeSpec((AttentionPath('vv', 4),), 'all', views='anovl', windows=(2,)).resolved(
        enc.blocks
    )
    t = enc.tokens(x, spec)
    for a, b in zip(
        split(select_images(t, [3, 1, 1]), spec), split(enc.tokens(x[[3, 1, 1]], spec), spec)
    ):
        assert gap(a, b) < 1e-5
    assert [len(a) for a in split(select_images(t, [2]), spec)] == [1] * 7


WRONG = [
    ('dual', dict(terms=(('txt', {}),), term_weights=()), r"term='txt'.*'text'"),
    (
        'dual',
        dict(terms=(('text', dict(temperature=1)), ('pair', {}))),
        r"term 'text'.*'temperature'.*'tau'",
    ),
    ('dual', dict(terms=(('text', {}), ('pair', dict(mean=1)))), r"term 'pair'.*'mean'.*'join'"),
    ('winclip', dict(terms=(('windows', dict(k=2)),)), r"term 'windows'.*'k'.*'tau'"),
    (
        'winclip+',
        dict(terms=(('windows', {}), ('memory', dict(tau=1)))),
        r"term 'memory'.*'tau'.*'path', 'layer'",
    ),
    ('musc', dict(terms=(('mutual', dict(r=3)),)), r"term 'mutual'.*'r'.*'scales', 'fraction'"),
    ('winclip+', dict(score=('worst', {})), r"score='worst'.*'memory'"),
    ('winclip+', dict(score=('memory', dict(beta=1.0))), r"score 'memory'.*'beta'.*'tau'"),
    ('dual', dict(score=('joint', dict(alpha=1.0))), r"score 'joint'.*'alpha'.*'beta'"),
    ('musc', dict(score=('max', dict(tau=1.0))), r"score 'max'.*'tau'"),
    ('winclip+', dict(reference=('shot', {})), r"reference='shot'.*'shots', 'pair'"),
    (
        'winclip+',
        dict(reference=('shots', dict(count=1))),
        r"reference 'shots'.*'count'.*'k', 'replace'",
    ),
    ('dual', dict(reference=('pair', dict(k=1))), r"reference 'pair'.*'k'.*'count', 'policy'"),
    ('dual', dict(reference=('pair', dict(seed=1))), r"reference 'pair'.*'seed'"),
    ('musc', dict(set_steps=(('softmax', {}),)), r"set_step='softmax'.*'rscin'"),
    (
        'musc',
        dict(set_steps=(('rscin', dict(k=3)),)),
        r"set_step 'rscin'.*'k'.*'neighbours', 'most'",
    ),
    ('dual', dict(term_weights=(1.0,)), r"term_weights=\(1.0,\).*'text', 'pair'"),
    ('musc', dict(prompts='win'), r"prompts='win'.*'winclip'"),
]


@pytest.mark.parametrize(
    'name,wrong,says', WRONG, ids=lambda v: str(v) if isinstance(v, dict) else ''
)
def test_unknown_parts_and_parameters_are_refused_by_name(name, wrong, says):
    with pytest.raises(ValueError, match=says):
        check_method(replace(METHODS[name], **wrong))


CANNOT = [
    ('winclip+', dict(reference=('shots', {})), r"'shots'.*'k'"),
    (
        'winclip+',
        dict(terms=(('windows', {}),), term_weights=(1.0,)),
        r"score 'memory'.*term 'memory'",
    ),
    ('winclip+', dict(reference=()), r"'memory'.*reference"),
    ('winclip', dict(encode=EncodeSpec(())), r"'windows'.*EncodeSpec"),
    ('dual', dict(prompts=None), r"'text'.*'joint'.*prompts=None"),
    ('dual', dict(reference=()), r"'pair'.*reference"),
    ('anoclip', dict(terms=(('text', dict(path=1)),)), r"'text'.*path 1.*1"),
    ('dual+', dict(terms=(('synthetic_adapted', {}), ('pair', {}))), r"'pair' before"),
]


@pytest.mark.parametrize(
    'name,wrong,says', CANNOT, ids=lambda v: str(v) if isinstance(v, dict) else ''
)
def test_rows_whose_parts_lack_what_they_read_are_refused_when_made(name, wrong, says):
    with pytest.raises(ValueError, match=says):
        check_method(replace(METHODS[name], **wrong))


@pytest.mark.parametrize('name', ['anoclip', 'winclip', 'musc'])
def test_a_reference_that_a_row_does_not_compare_with_is_refused(det, x, refs, name):
    "MuSc would silently become MuSc-2, the others would pass it over."
    with pytest.raises(ValueError, match=f'{name}.*reference'):
        det(name)(x, C * 4, refs)


def test_references_of_a_category_nobody_knows_are_refused(det, x, refs):
    det('dual')(x, C * 4, dict(pill=refs))
    with pytest.raises(ValueError, match='pil.*pill'):
        det('dual')(x, C * 4, dict(pil=refs))


def test_windows_that_do_not_fit_are_refused_when_built(files):
    small = load_encoder(*files, device='cpu', dtype='float32', size=32)  # 2 x 2 patches
    for name in ('winclip', 'winclip+'):
        with pytest.raises(ValueError, match='k=3.*2 x 2.*larger image size'):
            build(name, C, small)
    assert build(replace(METHODS['winclip'], encode=EncodeSpec((), windows=(1, 2))), C, small)(
        torch.zeros(1, 3, 32, 32), C
    ).map.shape == (1, 32, 32)
    for wrong in ((2, 2), (0,), (2.0,), ('2',)):
        with pytest.raises(ValueError, match='windows='):
            EncodeSpec(windows=wrong)


# ---- the store


@pytest.fixture
def pictures(tmp_path):
    "Five image files by the hash of their pixels."
    rng, out = np.random.default_rng(0), {}
    for n in range(5):
        a = rng.integers(0, 256, (40, 50, 3), 'u1')
        Image.fromarray(a).save(tmp_path / f'{n}.png')
        out[digest(a, n=24)] = str(tmp_path / f'{n}.png')
    return out


def spec_of(*attentions, windows=(), **more):
    return EncodeSpec(tuple(AttentionPath(a) for a in attentions), windows=windows, **more)


def same(a, b, spec, enc):
    s = spec.resolved(enc.blocks)
    return all(torch.equal(p, q) for p, q in zip(split(a, s), split(b, s), strict=True))


@pytest.fixture
def passes(monkeypatch):
    "Record calls of the encoder: (images, attentions, windows, views), and the computed scales."
    import zsad.encoder.store
    import zsad.methods.windows

    seen, scales, encode, embed = (
        [],
        [],
        zsad.encoder.store.encode_images,
        zsad.encoder.windows.window_tokens,
    )

    def recorded(encoder, images, spec, *more):
        seen.append((len(images), tuple(p.attention for p in spec.paths), spec.windows, spec.views))
        return encode(encoder, images, spec, *more)

    monkeypatch.setattr(zsad.encoder.store, 'encode_images', recorded)
    monkeypatch.setattr(
        'zsad.encoder.windows.window_tokens',
        lambda v, x, k, *more: (scales.append(k), embed(v, x, k, *more))[1],
    )
    return seen, scales


def test_windows_come_back_bit_by_bit(enc, pictures, tmp_path):
    for spec in (
        spec_of(windows=(2, 3)),
        spec_of('vv', 'qkv', windows=(3, 1), layers='all', stage='raw', views='anovl'),
    ):
        want = encode_images(
            enc, [load_image(f) for f in pictures.values()], spec.resolved(enc.blocks)
        )
        for _ in range(2):
            got = load_or_encode(tmp_path / 't', enc, spec, 'bicubic', pictures)
            assert (
                same(got, want, spec, enc)
                and list(got.windows) == list(spec.windows)
                and got.grid == GRID
            )
        few = dict(list(pictures.items())[3:0:-2])  # some of them, in another order
        assert same(
            load_or_encode(tmp_path / 't', enc, spec, 'bicubic', few),
            select_images(want, [3, 1]),
            spec,
            enc,
        )
    assert same(join(split(want, spec.resolved(4)), spec.resolved(4), GRID), want, spec, enc)


def test_only_what_lacks_is_encoded(enc, pictures, tmp_path, passes):
    seen, scales = passes
    root = tmp_path / 't'

    def ask(files, *attentions, **more):
        seen.clear()
        scales.clear()
        load_or_encode(root, enc, spec_of(*attentions, **more), 'bicubic', files, batch=8)
        return list(seen), list(scales)

    some = dict(list(pictures.items())[:3])
    assert ask(some, windows=(2,)) == ([(3, (), (2,), 'one')], [2])
    assert ask(some, windows=(2,)) == ([], [])  # nothing new, nothing encoded
    assert ask(some, windows=(2, 3)) == ([(3, (), (3,), 'one')], [3])  # one more scale
    assert ask(some, 'vv', windows=(3, 2)) == ([(3, ('vv',), (), 'one')], [])  # one more path
    assert ask(some, 'vv', 'qkv', windows=(2, 3)) == ([(3, ('qkv',), (), 'one')], [])
    assert ask(some, 'vv', windows=(2,)) == ask(some) == ask(some, 'qkv', 'vv') == ([], [])
    assert ask(pictures, 'vv', windows=(2,)) == (
        [(2, ('vv',), (2,), 'one')],
        [2],
    )  # two more images
    assert ask(pictures, windows=(3,)) == ([(2, (), (3,), 'one')], [3])
    assert ask(some, windows=(2, 3), stage='raw') == ([], [])  # the stage is one of patches
    assert ask(some, 'qkv', windows=(2, 3), stage='raw') == ([(3, ('qkv',), (), 'one')], [])


def test_views_that_are_held_are_not_encoded_again(enc, pictures, tmp_path, passes):
    seen, _ = passes
    load_or_encode(tmp_path / 't', enc, spec_of('vv', views='anovl'), 'bicubic', pictures)
    seen.clear()
    load_or_encode(
        tmp_path / 't', enc, spec_of('vv', views='anovl', windows=(2,)), 'bicubic', pictures
    )
    assert seen == [(5, (), (2,), 'one')]


def test_a_damaged_shard_of_windows_is_encoded_again(enc, pictures, tmp_path, passes, capsys):
    seen, scales = passes
    root, spec = tmp_path / 't', spec_of('vv', windows=(2, 3))
    want = load_or_encode(root, enc, spec, 'bicubic', pictures)
    seen.clear()
    scales.clear()
    folder = next(f for s, f, *_ in streams_in(root) if s.part == 'windows 3')
    shard = next(folder.glob('*.safetensors'))
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(raw)
    assert [f for f, _ in verify(root)] == [shard]
    assert (
        same(load_or_encode(root, enc, spec, 'bicubic', pictures), want, spec, enc)
        and seen == [(5, (), (3,), 'one')]
        and scales == [3]
    )
    assert str(shard) in capsys.readouterr().err and verify(root) == []
    shard.write_bytes(shard.read_bytes()[:50])
    seen.clear()  # cut in its header
    assert same(load_or_encode(root, enc, spec, 'bicubic', pictures), want, spec, enc) and seen == [
        (5, (), (3,), 'one')
    ]


def test_pruning_keeps_windows_of_this_version_only(enc, pictures, tmp_path, passes):
    seen, _ = passes
    root, spec = tmp_path / 't', spec_of('vv', windows=(2, 3))
    load_or_encode(root, enc, spec, 'bicubic', pictures)
    seen.clear()

    def parts():
        return sorted(s.part for s, *_ in streams_in(root))

    assert (
        parts() == ['cls', 'vv', 'windows 2', 'windows 3']
        and prune(root) == 0
        and parts() == ['cls', 'vv', 'windows 2', 'windows 3']
    )
    load_or_encode(root, enc, spec, 'bicubic', pictures)
    assert seen == []
    folder = next(f for s, f, *_ in streams_in(root) if s.part == 'windows 2')
    stored = json.loads((folder / 'stream.json').read_text())
    (folder / 'stream.json').write_text(
        json.dumps(
            {k: v for k, v in stored.items() if k != 'rev'} | {'code': 'of an older version'}
        )
    )
    assert (
        None in [s for s, *_ in streams_in(root)]
        and prune(root) > 1000
        and parts() == ['cls', 'vv', 'windows 3']
    )


def test_windows_have_streams_of_their_own(enc):
    def by(spec):
        return {s.part: s for s in streams_of(enc, spec.resolved(enc.blocks), 'bicubic')}

    a, b = by(spec_of('vv', windows=(2, 3))), by(spec_of(windows=(2,), stage='raw'))
    assert (
        set(a) == {'cls', 'windows 2', 'windows 3', 'vv'} and len({s.key for s in a.values()}) == 4
    )
    assert (
        a['windows 2'].key == b['windows 2'].key
        and a['cls'].key == b['cls'].key
        and all(s.usable for s in a.values())
    )


# ---- data


@pytest.fixture(scope='module')
def rendered(tmp_path_factory):
    return render_procad(
        ('pill', 'wood'),
        good=3,
        bad=4,
        train=4,
        size=S,
        root=tmp_path_factory.mktemp('data') / 'set',
        workers=1,
    )


@pytest.fixture
def copy(rendered, tmp_path):
    return Path(shutil.copytree(rendered, tmp_path / 'set'))


def test_training_samples_are_normal_and_have_names_of_their_own(copy):
    (copy / 'pill' / 'train' / 'stain').mkdir()
    shutil.copy(copy / 'pill' / 'train' / 'good' / '000.png', copy / 'pill' / 'train' / 'stain')
    ds = read_folder(copy)
    ids = [s.id for s in ds.train]
    assert (
        ids == [f'train/{c}/good/{n:03}' for c in ('pill', 'wood') for n in range(4)]
        and not any(s.label for s in ds.train)
        and {s.defect for s in ds.train} == {'good'}
    )
    assert not set(ids) & {s.id for s in ds.samples} and all(
        s.path == copy / s.category / 'train' / 'good' / f'{s.id[-3:]}.png' for s in ds.train
    )
    assert (
        {s.path for s in ds.samples}.isdisjoint(s.path for s in ds.train)
        and len(ds.samples) == 14
        and ds.skipped == ()
    )
    one = read_folder(copy / 'pill')  # a single category
    assert [s.id for s in one.train] == ids[:4]


def test_training_samples_of_one_name_do_not_collide(copy):
    Image.open(copy / 'wood' / 'train' / 'good' / '001.png').convert('RGB').save(
        copy / 'pill' / 'train' / 'good' / '000.jpg'
    )
    ids = [s.id for s in read_folder(copy).train]
    assert len(ids) == len(set(ids)) and 'train/pill/good/000' in ids


def test_a_set_without_training_part_has_none(copy):
    for c in ('pill', 'wood'):
        shutil.rmtree(copy / c / 'train')
    assert (
        read_folder(copy).train == () == load_dataset('procad', copy).train
        and len(read_folder(copy).samples) == 14
    )
    (copy / 'wood' / 'train').mkdir()
    assert read_folder(copy).train == ()
    assert read_folder(copy / 'pill' / 'test').train == ()  # folders by kind have no such part


def test_visa_has_the_training_rows_of_its_table(copy, tmp_path):
    from test_data import arrange_visa, read_table, write_table

    ds = read_folder(copy)
    root = tmp_path / 'visa'
    arrange_visa(ds, root)
    table = read_table(root)
    for s in ds.train:
        shutil.copy(s.path, root / s.category / 'Data' / 'Images' / 'Normal' / f'1{s.path.name}')
    rows = [
        (s.category, 'train', 'normal', f'{s.category}/Data/Images/Normal/1{s.path.name}', '')
        for s in ds.train
    ]
    write_table(
        root,
        [
            *table,
            *rows,
            (
                'pill',
                'train',
                'anomaly',
                'pill/Data/Images/Anomaly/000.JPG',
                'pill/Data/Masks/Anomaly/000.png',
            ),
        ],
    )
    visa = load_dataset('visa', root)
    assert (
        [s.id for s in visa.train]
        == [f'train/{c}/Normal/1{n:03}' for c in ('pill', 'wood') for n in range(4)]
        and not any(s.label for s in visa.train)
        and len(visa.samples) == 14
    )
    assert [digest(load_image(s.path)) for s in visa.train] == [
        digest(load_image(s.path)) for s in ds.train
    ]


def test_a_list_keeps_the_training_part(copy, tmp_path):
    ds = read_folder(copy)
    for place in (copy / 'meta.json', tmp_path / 'elsewhere' / 'meta.json'):
        reread = read_meta(write_meta(ds, place))
        assert (
            reread.train == ds.train
            and len(ds.train) == 8
            and [s.id for s in reread.samples] == [s.id for s in ds.samples]
        )
    assert read_folder(copy).train == ds.train  # now by its meta.json
    meta = json.loads((copy / 'meta.json').read_text())
    meta['train']['pill'][0]['anomaly'] = 1
    (copy / 'meta.json').write_text(json.dumps(meta))
    assert [s.id for s in read_meta(copy).train] == [s.id for s in ds.train][1:]
    for train in ({}, {'pill': []}, None):
        (copy / 'meta.json').write_text(json.dumps({**meta, 'train': train}))
        assert read_meta(copy).train == () and len(read_meta(copy).samples) == 14


def test_a_training_part_that_is_no_table_of_categories_is_named(copy):
    meta = json.loads(write_meta(read_folder(copy), copy / 'meta.json').read_text())
    (copy / 'meta.json').write_text(json.dumps({**meta, 'train': meta['train']['pill']}))
    with pytest.raises(ValueError, match='meta.json.*train'):
        read_meta(copy)


def test_the_hash_of_a_set_is_that_of_what_is_measured(copy):
    before = scan_dataset(read_folder(copy)).hash
    good = copy / 'pill' / 'train' / 'good'
    shutil.copy(good / '000.png', good / '001.png')
    assert scan_dataset(read_folder(copy)).hash == before
    shutil.rmtree(copy / 'pill' / 'train')
    assert scan_dataset(read_folder(copy)).hash == before
    shutil.copy(
        copy / 'pill' / 'test' / 'good' / '000.png', copy / 'pill' / 'test' / 'good' / '001.png'
    )
    assert scan_dataset(read_folder(copy)).hash != before


# ---- the bench

OWN = tuple(Row(n, METHODS[n]) for n in ('winclip', 'winclip+', 'musc', 'musc-2', 'dual')) + (
    Row(
        'from good ones',
        replace(
            METHODS['dual'], name='dual/normal', reference=('pair', dict(count=2, policy='normal'))
        ),
    ),
)
SHOWN = (
    Exhibit(
        'own',
        'Rows without training',
        '',
        OWN,
        ('mvtec',),
        ('image_auroc', 'pixel_auroc'),
        contrasts=(('winclip+', 'winclip', 'pixel_auroc'), ('dual', 'musc-2', 'image_auroc')),
        print_state='own',
    ),
)
DRAWN = ('winclip+', 'musc-2', 'dual', 'dual/normal')


def sets_of(root):
    return dict(mvtec=scan_dataset(load_dataset('procad', root), 1))


def numbers(results):
    return {
        run: {
            c: json.dumps([r['values'], r['bootstrap_values'], r['defects']]) for c, r in by.items()
        }
        for run, by in results.items()
    }  # as text: NaN is NaN


@pytest.fixture(scope='module')
def model(files):
    return Model(*files, dtype='float32')


def some(*rows):
    "An exhibit of these rows, without the controls that would join them."
    return (SimpleNamespace(name='some', rows=rows, roles=('mvtec',), form='table', metrics=()),)


def go(root, model, cache, seeds=3, scheduler=None, turn=lambda jobs: jobs, shown=SHOWN, batch=16):
    "Plan and run; jobs may be turned round before."
    plan = plan_jobs(shown, sets_of(root), model, batch, cache, seeds)
    plan = replace(plan, jobs=tuple(turn(plan.jobs)))
    return (plan, collect(plan, run_all(plan.jobs, scheduler, show=False))), plan.jobs


def records_of(plan):
    "One record for every row and seed, with the name of its method."
    name = {
        (e.name, r.label): r.method.name if r.method else 'foreground'
        for e in plan.exhibits
        for r in e.rows
        if not r.state
    }
    return [
        dict(plan.runs[k], method=name[e, label], label=label)
        for (e, _, label), runs in plan.shown.items()
        for k in runs
    ]


def runs_named(plan, name, control=''):
    return [r['run'] for r in records_of(plan) if (r['method'], r['control']) == (name, control)]


@pytest.fixture(scope='module')
def run(rendered, model, tmp_path_factory):
    "Three seeds of everything, undisturbed: plan, results, jobs, folder of the results, cache."
    cache, out = tmp_path_factory.mktemp('cache'), tmp_path_factory.mktemp('out')
    (plan, results), jobs = go(rendered, model, cache)
    write_results(out, plan, results)
    return plan, results, jobs, out, cache


def by_hand(enc, method, ds, category, texts):
    "One row on one category without store, jobs or shared passes: prediction and metric values."
    samples = ds.of(category)
    d = build(method, {category: ds.kinds[category]}, enc, texts)

    def encode(ss):
        return encode_images(
            enc, [load_image(s.path) for s in ss], d.method.encode, method.interpolation
        )

    tokens, pool = (
        encode(samples),
        sorted((s for s in ds.train if s.category == category), key=lambda s: s.id),
    )
    given = None
    if method.reference[:1] == ('shots',):
        names = choose_references(
            [s.id for s in pool], seed=method.seed, category=category, **method.reference[1]
        )
        given = Reference(
            encode([next(s for s in pool if s.id == n) for n in names]),
            torch.arange(len(names)).repeat(len(samples), 1),
        )
    if method.reference[:1] == ('pair',):
        given = Reference(
            tokens,
            draw_references(
                [s.id for s in samples],
                method.seed,
                labels=[s.label for s in samples],
                category=category,
                **method.reference[1],
            ),
        )
    p = d.predict(tokens, [category] * len(samples), given and {category: given})
    values = evaluate(
        p.map.numpy(),
        np.stack([load_mask(s.mask, S) for s in samples]),
        p.score.numpy(),
        np.array([s.label for s in samples]),
    )
    return p, {k: values[k] for k in METRICS}


def agree(computed, expected):
    return (
        all(
            abs(v - expected[k]) < 1e-6 or v != v and expected[k] != expected[k]
            for k, v in computed.items()
        )
        and computed['pixel_auroc'] > 0
    )


def test_every_number_is_that_of_the_row_by_hand(run, enc, rendered):
    plan, results, *_ = run
    records = records_of(plan)
    ds, seen, texts = load_dataset('procad', rendered), 0, {}
    for r in OWN:
        for seed in range(3 if r.method.stochastic else 1):
            m = replace(r.method, seed=seed)
            rec = next(
                k for k in records if (k['method'], k['control'], k['seed']) == (m.name, '', seed)
            )
            for c in ('pill', 'wood'):
                assert agree(by_hand(enc, m, ds, c, texts)[1], results[rec['run']][c]['values']), (
                    m.name,
                    seed,
                    c,
                )
                seen += 1
    assert (
        seen == 2 * (2 + 4 * 3)
        and len({results[r['run']]['pill']['values']['pixel_auroc'] for r in records}) > 10
    )


def test_rows_that_draw_nothing_run_once_and_others_once_per_seed(run):
    plan, *_ = run
    records = records_of(plan)
    assert Counter(r['method'] for r in records) == {
        'winclip': 1,
        'musc': 1,
        'anoclip': 1,
        'foreground': 1,
    } | dict.fromkeys(DRAWN, 3)
    for n in DRAWN:
        assert [r['seed'] for r in records if r['method'] == n] == [0, 1, 2] and len(
            {r['row_key'] for r in records if r['method'] == n}
        ) == 1
    assert (
        len({r['run'] for r in records}) == len(records) == len(plan.runs)
        and len({r['row_key'] for r in records}) == 8
    )
    assert (
        len(gather_rows(SHOWN, 'mvtec')) == 8
        and len(gather_rows(SHOWN, 'mvtec', 5)) == 4 + 5 * 4
        and gather_rows(SHOWN, 'visa', 5) == []
    )


def test_a_row_keeps_a_seed_of_its_own():
    "Seeds are counted from the row's."
    shown = some(Row('x', replace(METHODS['dual'], seed=4)))
    assert [[a.row.method.seed for a in gather_rows(shown, 'mvtec', n)] for n in (1, 3)] == [
        [4],
        [4, 5, 6],
    ]


def test_seeds_draw_other_references_and_give_other_numbers(run):
    plan, results, jobs, *_ = run
    for j in (j for j in jobs if j.shots):
        assert len(j.shots) == 3 and len({s for s in j.shots.values()}) > 1
    for n in DRAWN:
        assert (
            len(
                {
                    json.dumps(results[k]['pill']['values'])
                    + json.dumps(results[k]['wood']['values'])
                    for k in runs_named(plan, n)
                }
            )
            == 3
        )


def test_the_mean_is_the_mean_and_the_spread_the_sample_deviation(run):
    plan, results, _, out, _ = run
    rows = {
        (r['row'], r['category'], r['metric']): r
        for r in csv.DictReader((out / 'own' / 'metrics.csv').open(newline=''))
    }
    for row in OWN:
        runs = runs_named(plan, row.method.name)
        for span, metric in itertools.product(
            ('pill', 'wood', 'mean'), ('image_auroc', 'pixel_auroc', 'pixel_ap', 'pro')
        ):
            cats = ('pill', 'wood') if span == 'mean' else (span,)
            each = [
                100 * sum(results[r][c]['values'][metric] for c in cats) / len(cats) for r in runs
            ]
            line = rows[row.label, span, metric]
            assert float(line['value']) == pytest.approx(sum(each) / len(each), abs=1e-4) and int(
                line['seeds']
            ) == len(runs)
            assert (
                line['spread'] == line['seed_values'] == ''
                if len(runs) == 1
                else float(line['spread']) == pytest.approx(statistics.stdev(each), abs=1e-4)
            )
    defects = {
        (r['row'], r['defect'], r['metric']): r
        for r in csv.DictReader((out / 'own' / 'defects.csv').open(newline=''))
    }
    runs = runs_named(plan, 'dual')
    for d in results[runs[0]]['pill']['defects']:
        have = [c for c in ('pill', 'wood') if d in results[runs[0]][c]['defects']]
        each = [results[k][c]['defects'][d]['image_auroc'] for k in runs for c in have]
        assert float(defects['dual', d, 'image_auroc']['value']) == pytest.approx(
            100 * sum(each) / len(each), abs=1e-4
        ) and int(defects['dual', d, 'image_auroc']['categories']) == len(have)


def test_tables_show_the_mean_and_its_spread(run):
    plan, results, _, out, _ = run
    res = read_results(out)
    e = SHOWN[0]
    t = table(e, res)
    d = readable(t)
    for r in OWN:
        runs = runs_named(plan, r.method.name)
        assert list(runs_of(res, e, r, 'mvtec').run) == runs == plan.shown['own', 'procad', r.label]
        assert t.loc[r.label, ('pixel AUROC', 'ours')] == pytest.approx(
            50
            * sum(results[k][c]['values']['pixel_auroc'] for k in runs for c in ('pill', 'wood'))
            / len(runs),
            abs=1e-4,
        )
        spread = t.loc[r.label, ('pixel AUROC', 'spread')]
        assert (
            (spread > 0 and f'±{spread:.1f}' in d.loc[r.label, 'pixel AUROC'])
            if len(runs) > 1
            else (spread != spread and '±' not in d.loc[r.label, 'pixel AUROC'])
        )
        assert (cell(res, e, r.label, 'mvtec', 'image_auroc', columns=('spread',))[0] >= 0) == (
            len(runs) > 1
        )
    assert '±' not in d.loc['foreground mask', 'pixel AUROC']


def test_curves_measure_what_they_show_and_tables_everything(run, rendered, model, tmp_path):
    curve = Exhibit(
        'curve',
        'Two rows',
        '',
        OWN[:1] + OWN[4:5],
        ('mvtec',),
        ('pixel_auroc', 'pro'),
        'curve',
        print_state='own',
    )
    curve = replace(curve)
    (plan, results), jobs = go(rendered, model, tmp_path, seeds=1, shown=(curve, *some(OWN[4])))
    full, short = (results[runs_named(plan, n)[0]]['pill'] for n in ('dual', 'winclip'))
    before = run[1][runs_named(run[0], 'winclip')[0]]['pill']
    assert (
        set(short['values']) == set(short['bootstrap_values']) == {'pixel_auroc', 'pro'}
        and len(full['values']) == 9
    )
    assert all(
        short['values'][k] == before['values'][k]
        and short['bootstrap_values'][k] == before['bootstrap_values'][k]
        for k in short['values']
    )
    assert runs_named(plan, 'winclip') == runs_named(
        run[0], 'winclip'
    )  # what is measured is not part of a run's key
    write_results(tmp_path / 'out', replace(plan, exhibits=(curve,)), results)
    expected = {
        (r['row'], r['metric'])
        for r in csv.DictReader((tmp_path / 'out' / 'curve' / 'metrics.csv').open(newline=''))
    }
    assert {m for _, m in expected} == {'pixel_auroc', 'pro'} and {r for r, _ in expected} >= {
        'winclip',
        'dual',
    }


def test_a_run_knows_the_pixels_of_its_references(copy, model, tmp_path):
    def plan():
        return {
            r['method']: r
            for r in records_of(plan_jobs(some(*OWN[:2]), sets_of(copy), model, cache=tmp_path))
        }

    before = plan()
    for f in (copy / 'pill' / 'train' / 'good').glob('*.png'):
        Image.fromarray(255 - np.asarray(Image.open(f))).save(f)
    after = plan()
    assert before['winclip'] == after['winclip'] and before['winclip']['references'] == ''
    assert (
        before['winclip+']['run'] != after['winclip+']['run']
        and before['winclip+']['references'] != after['winclip+']['references']
        and before['winclip+']['data'] == after['winclip+']['data']
    )


def test_the_forecast_counts_references(rendered, model, tmp_path):
    def count(*rows):
        return forecast(plan_jobs(some(*rows), sets_of(rendered), model, cache=tmp_path).jobs)

    assert (count(OWN[0]).images, count(OWN[1]).images) == (
        14,
        16,
    )  # one image for each of two categories more
    assert (
        count(OWN[1]).bytes * 14
        == count(replace(OWN[1], method=replace(OWN[1].method, reference=('pair', {})))).bytes * 16
    )


def test_one_seed_has_no_spread(run, rendered, model, tmp_path):
    (plan, results), _ = go(rendered, model, run[-1], seeds=1)
    write_results(tmp_path, plan, results)
    assert {r['seed'] for r in plan.runs.values()} == {0} and not any(
        r['spread'] for r in csv.DictReader((tmp_path / 'own' / 'metrics.csv').open(newline=''))
    )
    columns = table(SHOWN[0], tmp_path).columns.get_level_values(1)
    assert 'spread' not in columns and '±' not in str(readable(table(SHOWN[0], tmp_path)).values)


def test_contrasts_compare_means(run):
    plan, results, _, out, _ = run
    contrasts = {
        (r['better'], r['worse'], r['metric']): float(r['difference'])
        for r in csv.DictReader((out / 'own' / 'contrasts.csv').open(newline=''))
    }

    def value(name, metric, seeds=slice(None)):
        runs = runs_named(plan, name)[seeds]
        return (
            50
            * sum(results[k][c]['values'][metric] for k in runs for c in ('pill', 'wood'))
            / len(runs)
        )

    for better, worse, metric in (
        ('winclip+', 'winclip', 'pixel_auroc'),
        ('dual', 'musc-2', 'image_auroc'),
    ):
        assert contrasts[better, worse, metric] == pytest.approx(
            value(better, metric) - value(worse, metric), abs=1e-3
        )
    assert (
        abs(
            contrasts['winclip+', 'winclip', 'pixel_auroc']
            - (value('winclip+', 'pixel_auroc', slice(1)) - value('winclip', 'pixel_auroc'))
        )
        > 1e-2
    )


def test_a_second_run_computes_nothing(run, rendered, model, passes, monkeypatch):
    _, results, _, _, cache = run
    seen, _ = passes
    jobs = plan_jobs(SHOWN, sets_of(rendered), model, 16, cache, 3).jobs
    todo = forecast(jobs)
    assert (todo.images, todo.results, todo.bytes) == (0, 0, 0)
    monkeypatch.setattr(
        'zsad.bench.jobs.predictions', lambda *a: pytest.fail('a row was scored again')
    )
    assert numbers(go(rendered, model, cache)[0][1]) == numbers(results) and seen == []


def test_any_order_batch_and_resume_give_the_same_numbers(run, rendered, model, tmp_path):
    want, shown = numbers(run[1]), some(OWN[1], OWN[5])

    def turned(jobs):
        return [replace(j, rows=j.rows[::-1]) for j in jobs]

    (_, got), jobs = go(rendered, model, tmp_path / 'c', turn=turned, batch=3, shown=shown)
    for j in jobs:  # half of the results are lost, and the tokens of one stream
        for key, _ in j.rows[::2]:
            j.result(key).unlink()
    shutil.rmtree(
        next(f for s, f, *_ in streams_in(tmp_path / 'c' / 'tokens') if s.part == 'windows 3')
    )
    (_, resumed), _ = go(rendered, model, tmp_path / 'c', shown=shown)
    assert numbers(got) == numbers(resumed) == {k: want[k] for k in got} and len(got) == 2 * 3


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(run, rendered, model, tmp_path):
    pytest.importorskip('distributed')
    (_, got), _ = go(
        rendered, model, tmp_path / 'c', scheduler='2', shown=some(OWN[1], OWN[3], OWN[5])
    )
    assert numbers(got) == {k: numbers(run[1])[k] for k in got} and len(got) == 3 * 3


def test_references_depend_on_ids_and_the_seed_alone(run, enc):
    for job in (j for j in run[2] if j.shots):
        turned = replace(job, samples=job.samples[::-1], pixels=job.pixels[::-1])
        tokens = dict.fromkeys(('a', 'b'), enc.tokens(noise(7), EncodeSpec()))
        for key, r in (
            (key, r) for key, r in job.rows if r.method and r.method.reference[:1] == ('pair',)
        ):
            ids, back = [s.id for s in job.samples], [s.id for s in turned.samples]
            a, b = (
                reference_of(job, key, r.method, enc, tokens['a']).rows,
                reference_of(turned, key, r.method, enc, tokens['b']).rows,
            )
            drawn = {i: [ids[k] for k in row] for i, row in zip(ids, a)}
            assert drawn == {i: [back[k] for k in row] for i, row in zip(back, b)} and all(
                i not in d for i, d in drawn.items()
            )
            if r.method.name == 'dual/normal':
                assert all('/good/' in n for d in drawn.values() for n in d) and {
                    len(d) for d in drawn.values()
                } == {2}


def test_shots_come_from_the_training_part_those_of_fewer_first(rendered):
    ds = load_dataset('procad', rendered)
    four = shots_of(winclip_with_shots(4), ds, 'pill')
    assert (
        sorted(Path(f).parent for _, f in four) == [rendered / 'pill' / 'train' / 'good'] * 4
        and all(digest(load_image(f), n=24) == h for h, f in four)
        and len(set(four)) == 4
    )
    assert [shots_of(winclip_with_shots(k), ds, 'pill') for k in (1, 2)] == [four[:1], four[:2]]
    assert shots_of(winclip_with_shots(4), replace(ds, train=ds.train[::-1]), 'pill') == four


def test_an_image_that_is_there_twice(copy, model, enc, tmp_path):
    "Test and training images with copies: encoded once, counted and scored as often as they occur."
    for part in ('test', 'train'):
        shutil.copy(
            copy / 'pill' / part / 'good' / '000.png', copy / 'pill' / part / 'good' / '900.png'
        )
    shutil.copy(
        copy / 'wood' / 'train' / 'good' / '001.png', copy / 'wood' / 'test' / 'good' / '900.png'
    )
    shown = some(
        *OWN[1:4],
        OWN[5],
        Row('four', winclip_with_shots(4)),
        Row(
            'again',
            replace(
                METHODS['winclip+@code'], name='again', reference=('shots', dict(k=4, replace=True))
            ),
        ),
    )
    (plan, results), jobs = go(copy, model, tmp_path / 'c', 1, shown=shown)
    ds, texts = load_dataset('procad', copy), {}
    assert any(len(j.pixels) == 8 and len(j.files) == 7 for j in jobs) and {
        r['n'] for by in results.values() for r in by.values()
    } == {8}
    for r in shown[0].rows:
        (run,) = plan.shown['some', 'procad', r.label]
        for c in ('pill', 'wood'):
            p, values = by_hand(enc, r.method, ds, c, texts)
            assert agree(values, results[run][c]['values']), (r.label, c)
            at = [
                i
                for i, s in enumerate(ds.of(c))
                if s.path.stem in ('000', '900') and s.defect == 'good'
            ]
            if r.method.reference[:1] == ('shots',) and c == 'pill':
                assert gap(p.map[at[:1]], p.map[at[1:]]) < 1e-5
    twice = [
        j.shots[key] for j in jobs for key, r in j.rows if r.method and r.method.name == 'again'
    ]
    assert any(len(set(s)) < 4 for s in twice)  # with replacement one was drawn twice


def thin(root, train):
    "Leave so many training images per category."
    for f in (
        f for c in ('pill', 'wood') for f in sorted((root / c / 'train' / 'good').iterdir())[train:]
    ):
        f.unlink()
    return root


def test_more_shots_than_training_images_are_missing_not_an_error(
    copy, model, tmp_path, monkeypatch
):
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'c'))
    e = EXHIBITS['winclip-t2']
    write_results(tmp_path / 'o', *compute((e,), sets_of(thin(copy, 2)), model, show=False))
    d = readable(table(e, tmp_path / 'o'))
    assert (
        d.loc['Reprod k=4', 'image AUROC'] == 'missing'
        and all(d.loc[f'Reprod k={k}', 'image AUROC'][0].isdigit() for k in (0, 1, 2))
        and d.loc['Paper k=4', 'image AUROC'] == 'reported only'
    )
    thin(copy, 0)
    assert not possible(
        Row('x', winclip_with_shots(1)),
        load_encoder(model.backbone, model.weights),
        load_dataset('procad', copy),
    )


def test_one_category_with_fewer_training_images_is_enough_to_be_missing(copy, enc):
    (copy / 'wood' / 'train' / 'good' / '003.png').unlink()
    ds = load_dataset('procad', copy)
    assert [possible(Row('x', winclip_with_shots(k)), enc, ds) for k in (0, 1, 3, 4)] == [
        True,
        True,
        True,
        False,
    ]


def test_more_references_than_images_are_missing_not_an_error(copy, model, enc, tmp_path):
    "Fig. 5a asks for up to 16 other images; here are six. Fig. 5b asks for damaged ones."

    def ask(**how):
        return Row('x', replace(METHODS['dual'], name='dual/x', reference=('pair', how)))

    ds = load_dataset('procad', copy)
    assert [possible(ask(count=k), enc, ds) for k in (1, 6, 7, 16)] == [True, True, False, False]
    assert [possible(ask(count=k, policy='normal'), enc, ds) for k in (2, 3)] == [
        True,
        False,
    ]  # three good ones, and a good image has two others
    (plan, _), _ = go(copy, model, tmp_path / 'c', 1, shown=some(ask(count=16), OWN[4]))
    assert [r['method'] for r in records_of(plan)] == ['dual']


def test_neighbourhoods_and_windows_that_do_not_fit_the_encoder_are_missing_not_an_error(
    files, rendered, enc
):
    "MuSc averages over 5 x 5 patches, WinCLIP reads windows of 3 x 3."
    ds = load_dataset('procad', rendered)

    def fits(name, size):
        return possible(Row('x', METHODS[name]), load_encoder(*files, device='cpu', size=size), ds)

    assert [fits('winclip', s) for s in (32, 48)] == [False, True] and [
        fits('winclip+', s) for s in (32, 48)
    ] == [False, True]
    assert [fits('musc', s) for s in (64, 80)] == [False, True] and [
        fits('musc-2', s) for s in (64, 80)
    ] == [False, True]


def test_results_of_shots_are_kept_apart_by_their_pixels(rendered, model, tmp_path):
    "Same test images, other training images, one cache: each set has its own numbers."
    shown = some(OWN[1], OWN[4])
    other = Path(shutil.copytree(rendered, tmp_path / 'other'))
    for c in ('pill', 'wood'):
        for f in (other / c / 'train' / 'good').iterdir():
            Image.open(f).transpose(Image.Transpose.ROTATE_90).convert('L').save(f)
    (one, a), jobs = go(rendered, model, tmp_path / 'c', 1, shown=shown)
    (two, b), others = go(other, model, tmp_path / 'c', 1, shown=shown)
    (_, alone), _ = go(other, model, tmp_path / 'alone', 1, shown=shown)
    assert (
        scan_dataset(load_dataset('procad', rendered), 1).hash
        == scan_dataset(load_dataset('procad', other), 1).hash
    )

    def run(plan, name):
        return runs_named(plan, name)[0]

    assert (
        numbers(b)[run(two, 'winclip+')]
        == numbers(alone)[run(two, 'winclip+')]
        != numbers(a)[run(one, 'winclip+')]
        and numbers(a)[run(one, 'dual')] == numbers(b)[run(two, 'dual')]
    )
    for j, k in zip(jobs, others):
        for key, r in j.rows:
            assert (j.result(key) == k.result(key)) == (
                r.method is None or r.method.name != 'winclip+'
            )


def test_a_training_image_that_changes_is_another_shot(copy, model, tmp_path):
    "In one process too."
    shown = some(OWN[1])
    before = numbers(go(copy, model, tmp_path / 'c', 1, shown=shown)[0][1])
    for f in copy.glob('*/train/good/*.png'):
        Image.open(f).transpose(Image.Transpose.ROTATE_90).convert('L').save(f)
    after = numbers(go(copy, model, tmp_path / 'c', 1, shown=shown)[0][1])
    assert after != before


def test_a_training_image_that_cannot_be_read_costs_no_other_row(copy, model, tmp_path):
    for f in (copy / 'pill' / 'train' / 'good').iterdir():
        f.write_bytes(b'no image')
    (plan, _), _ = go(copy, model, tmp_path / 'c', 1, shown=some(*OWN[:3]))
    assert [r['method'] for r in records_of(plan)] == ['winclip', 'musc']


# ---- the command line


@pytest.fixture
def zsad(files, rendered, tmp_path, monkeypatch, capsys):
    "Run `zsad score` with the small encoder: (exit code, scores, maps, lines on stderr)."
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'c'))
    monkeypatch.setattr('zsad.encoder.loading.choose_device', lambda d='auto': 'cpu')

    def f(*args):
        out = tmp_path / 'out'
        shutil.rmtree(out, ignore_errors=True)
        capsys.readouterr()
        code = main(
            [
                'score',
                *map(str, args),
                '--category',
                'pill',
                '--out',
                str(out),
                '--backbone',
                files[0],
                '--weights',
                files[1],
            ]
        )
        rows = (
            list(csv.DictReader((out / 'scores.csv').open(newline='')))
            if (out / 'scores.csv').exists()
            else []
        )
        maps = [np.load(out / 'maps' / f"{r['id']}.npy") for r in rows]
        return code, [float(r['score']) for r in rows], maps, capsys.readouterr().err.splitlines()

    return f


@pytest.fixture
def images(rendered):
    return sorted((rendered / 'pill' / 'test').glob('*/*.png'), key=lambda f: f.stem)[:3]


def pixels_of(enc, files):
    return enc.preprocess([load_image(f) for f in files])


@pytest.mark.parametrize('name', ['winclip+', 'dual', 'musc-2'])
def test_references_are_given_on_the_command_line(zsad, enc, det, rendered, images, name):
    shown = sorted((rendered / 'pill' / 'train' / 'good').glob('*.png'))[:2]
    code, scores, maps, err = zsad(name, images[0], '--reference', *shown)
    want = det(name)(pixels_of(enc, images[:1]), C, pixels_of(enc, shown))
    assert (
        code == 0
        and err == []
        and abs(scores[0] - float(want.score[0])) < 2e-6
        and gap(torch.tensor(maps[0]), want.map[0]) < 1e-5
    )
    assert abs(zsad(name, images[0], '--reference', shown[0])[1][0] - scores[0]) > 1e-5


def test_images_of_musc_are_scored_together_and_others_alone(zsad, enc, det, images, tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    paths = [Path(shutil.copy(f, folder / f'{n}.png')) for n, f in enumerate(images)]
    code, scores, maps, err = zsad('musc', *paths)
    want = det('musc')(pixels_of(enc, paths), C * 3)
    assert (
        code == 0
        and err == []
        and np.abs(np.array(scores) - want.score.numpy()).max() < 2e-6
        and gap(torch.tensor(np.stack(maps)), want.map) < 1e-5
    )
    (folder / 'bad.png').write_text('no image')
    code, rescored, _, err = zsad(
        'musc', paths[0], folder / 'bad.png', *paths[1:]
    )  # one that cannot be read does not count
    assert code == 1 and rescored == scores and len(err) == 1 and 'bad.png' in err[0]
    code, scores, _, err = zsad('musc', paths[0])
    assert code == 2 and scores == [] and len(err) == 1 and 'more images' in err[0]


def test_rows_with_references_say_what_they_do_without(zsad, images):
    code, scores, maps, err = zsad('winclip+', images[0])
    plain = zsad('winclip', images[0])
    assert (
        code == 0
        and len(err) == 1
        and 'text alone' in err[0]
        and scores == plain[1]
        and np.array_equal(maps[0], plain[2][0])
        and plain[3] == []
    )


def test_a_row_without_text_asks_for_its_reference_by_the_option(zsad, images):
    code, scores, _, err = zsad('musc-2', images[0])
    assert (
        code == 2
        and scores == []
        and len(err) == 1
        and '--reference' in err[0]
        and 'text alone' not in err[0]
    )


@pytest.mark.parametrize('what', ['text', 'nowhere'])
def test_a_reference_that_cannot_be_read_is_one_line_that_names_it(
    zsad, images, rendered, tmp_path, what
):
    bad = tmp_path / 'spoiled.png'
    if what == 'text':
        bad.write_text('no image')
    code, scores, _, err = zsad(
        'winclip+',
        images[0],
        '--reference',
        next((rendered / 'pill' / 'train' / 'good').glob('*.png')),
        bad,
    )
    assert code == 2 and scores == [] and len(err) == 1 and 'spoiled.png' in err[0]


@pytest.mark.parametrize('name', ['anoclip', 'musc', 'winclip'])
def test_references_that_nothing_is_compared_with_are_refused(zsad, images, name):
    code, scores, _, err = zsad(name, images[0], images[1], '--reference', images[2])
    assert (
        code == 2 and scores == [] and len(err) == 1 and '--reference' in err[0] and name in err[0]
    )


def test_seeds_on_the_command_line(files, rendered, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'c'))
    command = [
        'reproduce',
        'winclip-t2',
        '--data',
        str(rendered),
        '--backbone',
        files[0],
        '--weights',
        files[1],
        '--out',
        str(tmp_path / 'o'),
        '--dry-run',
    ]

    def count(*more):
        return (
            main([*command, *more]),
            [l for l in capsys.readouterr().out.splitlines() if l.startswith('to do')][0],
        )

    # winclip, the outline and the untrained encoder once, three rows of shots once per seed;
    # two categories
    assert (
        '12 results' in count()[1]
        and '24 results' in count('--seeds', '3')[1]
        and not (tmp_path / 'o').exists()
    )


@pytest.mark.parametrize('n', ['0', '-1'])
def test_fewer_seeds_than_one_are_refused(files, rendered, tmp_path, monkeypatch, capsys, n):
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'c'))
    assert (
        main(
            [
                'reproduce',
                'winclip-t2',
                '--data',
                str(rendered),
                '--backbone',
                files[0],
                '--weights',
                files[1],
                '--out',
                str(tmp_path / 'o'),
                '--dry-run',
                '--seeds',
                n,
            ]
        )
        == 2
    )
    assert '--seeds' in capsys.readouterr().err

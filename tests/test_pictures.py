"""Pictures of the papers: images are chosen by name, and maps are those of the tables.

A small rendered set and a small random encoder: what the maps look like does not matter here.
"""

import json
from dataclasses import replace
from html import escape

import matplotlib.pyplot as plt
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from zsad.bench.jobs import all_tokens, predict_job, reference_of
from zsad.bench.models import Model, open_model
from zsad.bench.reading import read_results
from zsad.datasets.loading import load_dataset
from zsad.datasets.samples import Dataset, Sample
from zsad.datasets.survey import scan_dataset
from zsad.encoder.windows import window_places
from zsad.methods.clip_baseline import anomaly_score
from zsad.methods.synthesis import patch_mask
from zsad.papers.exhibit import Row
from zsad.papers.exhibits import EXHIBITS, printed
from zsad.papers.pictures import PICTURES
from zsad.pipeline.detector import build
from zsad.pipeline.rows import METHODS
from zsad.pipeline.terms import TERMS, adapted_tokens, synthetic_images, synthetic_tokens
from zsad.rendered.procad import render_procad
from zsad.reporting.captions import caption
from zsad.reporting.cells import time_of
from zsad.reporting.figures import figure
from zsad.reporting.map_pictures import redden
from zsad.reporting.pages import page
from zsad.reporting.pictures import DRAWINGS, file_of, jobs_of, picture, write_pictures
from zsad.reporting.scored_images import inputs_with_maps, maps_of, prepare_images, scoring_inputs
from zsad.reporting.selection import choose_categories, choose_in_turn, choose_kinds, first_of_kinds
from zsad.reporting.tables import readable, table
from zsad.reporting.token_pictures import split_patches, text_before_after, window_steps

CONFIG = dict(
    embed_dim=24,
    vision_cfg=dict(image_size=96, layers=3, width=64, head_width=32, patch_size=16),
    text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1),
)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Data sets by role and a model, with a cache of their own."
    d = tmp_path_factory.mktemp('pictures')
    render_procad(
        ('cable', 'pill', 'wood'), good=5, bad=7, train=4, size=96, root=d / 'data', workers=1
    )
    (d / 'model.json').write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    save_file(
        {
            k: v.contiguous()
            for k, v in open_clip.CLIP(**CONFIG).state_dict().items()
            if k != 'attn_mask'
        },
        d / 'model.safetensors',
    )
    with pytest.MonkeyPatch.context() as m:
        m.setenv('ZSAD_CACHE', str(d / 'cache'))
        yield (
            dict(mvtec=scan_dataset(load_dataset('procad', d / 'data'), 1)),
            Model(str(d / 'model.json'), str(d / 'model.safetensors'), dtype='float32'),
        )


@pytest.fixture(scope='module')
def texts():
    return {}


def job_of(world, p, category='cable'):
    return next(j for j in jobs_of(replace(p, count=3), *world) if j.category == category)


# ---- who is shown


def sample(c, kind, n):
    return Sample(f'{n}', int(kind != 'good'), c, f'{c}/{kind}/{n}', defect=kind)


def some(c, *kinds):
    return tuple(sample(c, k, i) for i, k in enumerate(kinds))


def test_the_first_of_every_kind_whatever_the_order_of_the_samples():
    s = (
        sample('a', 'hole', '2'),
        sample('a', 'good', '0'),
        sample('a', 'cut', '7'),
        sample('a', 'hole', '1'),
        sample('a', 'cut', '9'),
    )
    assert first_of_kinds(s) == dict(cut=2, hole=3) and list(first_of_kinds(s)) == ['cut', 'hole']
    back = first_of_kinds(s[::-1])
    assert {k: s[::-1][i].id for k, i in back.items()} == {
        k: s[i].id for k, i in first_of_kinds(s).items()
    }


def test_kinds_take_turns_over_categories():
    class Named:
        def __init__(self, s):
            self.samples = s

    jobs = [Named(some(c, *'abcde')) for c in 'xyz'] + [Named(some('w', 'b', 'good'))]
    assert choose_in_turn(jobs) == [0, 3, 1, 0]  # 0, 3, 6 and 9, each modulo the number of kinds
    assert choose_kinds(jobs[0], ('no', 'd', 'a'), ('b',)) == [3, 1] and choose_kinds(
        jobs[0], ('no',), ('c',), ('neither',)
    ) == [0, 2, 3]
    assert choose_kinds(jobs[3], ('no',), ('neither',)) == [0, 0]


def test_categories_by_name_then_objects():
    s = some('a', 'x', 'good') + some('b', 'good') + some('c', 'x') + some('d', 'x')
    ds = Dataset('n', s, dict(a='texture', b='object', c='object', d='texture'))
    assert choose_categories(ds, (), 9) == ('a', 'c', 'd') and choose_categories(
        ds, ('d', 'zz'), 9
    ) == ('d', 'c', 'a')
    assert (
        choose_categories(ds, ('zz',)) == ('c',)
        and choose_categories(ds, ('b', 'c'), 1) == ('c',)
        and choose_categories(Dataset('n', some('b', 'good'), dict(b='object'))) == ()
    )


def test_no_score_has_a_say(world, monkeypatch):
    "Images are chosen before any tensor is made."
    for f in ('prepare_images', 'maps_of', 'build'):
        monkeypatch.setattr(
            f'zsad.reporting.scored_images.{f}',
            lambda *a, **k: pytest.fail('something was computed'),
        )
    jobs = jobs_of(PICTURES['dual-f3'], *world)
    assert [j.category for j in jobs] == ['cable', 'wood', 'pill'] and all(
        j.samples[i].label for j, i in zip(jobs, choose_in_turn(jobs))
    )


# ---- what is shown is what the tables are made of


@pytest.mark.parametrize(
    'name, row',
    [
        ('anoclip-f4', 'AnoCLIP+'),
        ('dual-f3', 'joint'),
        ('dual-f3', 'reference only'),
        ('dual-f5b', 'joint, anomalous'),
        ('winclip-f7', 'k=4'),
        ('dual-f4', 'Ours+'),
    ],
)
def test_a_look_has_the_maps_of_the_bench(world, texts, name, row):
    job = job_of(world, PICTURES[name])
    enc = open_model(job.model)
    at = [11, 6, 0]
    key, m = next((key, r.method) for key, r in job.rows if r.label == row)
    tokens = all_tokens(job, enc, m, job.pixels, job.files)
    whole = predict_job(
        job,
        build(m, {job.category: job.kind}, enc, texts),
        tokens,
        reference_of(job, key, m, enc, tokens),
    ).map.numpy()
    np.testing.assert_allclose(maps_of(prepare_images(job, row, at, texts)), whole[at], atol=2e-5)


def test_the_reference_shown_is_the_one_compared_with(world, texts):
    job = job_of(world, PICTURES['dual-f5b'])
    for policy, label in (('normal', 0), ('anomalous', 1)):
        l = prepare_images(job, f'joint, {policy}', range(len(job.samples)), texts)
        assert all(p.label == label and p.id != s.id for p, s in zip(l.partners, l.job.samples))
        one = prepare_images(job, f'joint, {policy}', [3], texts)
        assert one.partners[0].id == l.partners[3].id
    assert (
        prepare_images(job_of(world, PICTURES['winclip-f7']), 'k=1', [0], texts).partners == ()
        and prepare_images(job, 'joint, never', [0], texts) is None
    )


def test_adapted_tokens_are_those_that_are_scored(world, texts):
    s = scoring_inputs(
        prepare_images(job_of(world, PICTURES['anoclip-f6']), 'AnoCLIP+', [6, 7], texts)
    )
    torch.testing.assert_close(
        anomaly_score(adapted_tokens(s), s.class_embeddings, 1.0),
        TERMS['adapted'](s),
        atol=1e-6,
        rtol=0,
    )
    assert (adapted_tokens(s, steps=0) - adapted_tokens(s)).abs().max() > 1e-3


def test_the_synthetic_anomaly_is_the_one_adapted_to(world, texts):
    l = prepare_images(job_of(world, PICTURES['dual-f4']), 'Ours+', [6, 7], texts)
    s = inputs_with_maps(l)
    tokens, mask = synthetic_tokens(s, 0, -1)
    images = synthetic_images(s)
    assert (
        mask.numpy() == np.stack([patch_mask(m, l.tokens.grid).numpy() for _, m in images])
    ).all()
    enc = l.detector.encoder
    mine = enc.tokens(enc.preprocess([im for im, _ in images]), l.detector.method.encode)
    torch.testing.assert_close(next(iter(mine.patches.values()))[-1], tokens, atol=1e-5, rtol=0)


def test_before_and_after_are_the_terms_of_the_row(world, texts):
    job = job_of(world, PICTURES['dual-f6a'])
    l = prepare_images(job, 'Ours+', [6, 9], texts)
    before, after = text_before_after(l)
    assert (before - after).abs().max() > 1e-4
    plain = replace(
        METHODS['dual'],
        reference=(),
        terms=(('text', dict(tau=0.07)),),
        term_weights=(),
        score=('class', {}),
    )
    torch.testing.assert_close(
        before,
        TERMS['text'](
            scoring_inputs(
                replace(
                    l,
                    detector=build(plain, {job.category: job.kind}, l.detector.encoder, texts),
                    reference=None,
                )
            ),
            tau=0.07,
        ),
    )
    row = dict(l.detector.method.terms)['synthetic_adapted']
    s = inputs_with_maps(l)
    torch.testing.assert_close(after, TERMS['synthetic_adapted'](s, **row))
    joined = sum(
        w * s.maps[n] for w, (n, _) in zip(l.detector.method.term_weights, l.detector.method.terms)
    ).unflatten(1, l.tokens.grid)
    up = torch.nn.functional.interpolate(joined[:, None], size=(96, 96), mode='bilinear')[:, 0]
    np.testing.assert_allclose(maps_of(l), up.numpy(), atol=1e-5)


def test_patches_are_split_by_the_truth(world, texts):
    l = prepare_images(job_of(world, PICTURES['dual-f6a']), 'Ours+', [0, 5, 6], texts)
    bad, good = split_patches(l)
    marked = np.stack(
        [
            np.zeros((96, 96), bool)
            if s.mask is None
            else np.asarray(plt.imread(s.mask) > 0).reshape(96, 96, -1).any(-1)
            for s in l.job.samples
        ]
    )
    share = marked.reshape(3, 6, 16, 6, 16).mean((2, 4)).reshape(3, 36)
    assert (good == (share == 0)).all() and not (bad & good).any()
    for b, s, sample in zip(bad, share, l.job.samples):
        assert (
            b.any() == sample.label
            and (b == ((s > 0.5) if (s > 0.5).any() else (s == s.max()) & (s > 0))).all()
        )


def test_windows_walk_to_the_map_of_the_row(world, texts):
    l = prepare_images(job_of(world, PICTURES['winclip-f6']), 'WinCLIP', [6], texts)
    s = scoring_inputs(l)
    steps = window_steps(s, 0.07)
    np.testing.assert_allclose(steps[-1][1], TERMS['windows'](s).view(6, 6), atol=1e-6)
    for k, at in ((2, 0), (3, 2)):
        score, a = steps[at][1].ravel(), steps[at + 1][1].ravel()
        places = window_places((6, 6), k)
        for patch in range(36):  # slowly: the harmonic mean over the windows that hold a patch
            own = [score[w] for w in range(len(places)) if patch in places[w]]
            assert a[patch] == pytest.approx(len(own) / sum(1 / v for v in own), rel=1e-4)


# ---- figures, captions, files

AXES = {
    'anoclip-f4': 6,
    'anoclip-f6': 6,
    'dual-f3': 15,
    'dual-f4': 15,
    'dual-f5b': 16,
    'dual-f6a': 5,
    'winclip-f6': 7,
    'winclip-f7': 12,
}


@pytest.mark.parametrize('name', PICTURES)
def test_every_picture_is_drawn_and_says_what_it_is(world, texts, name):
    fig, said = picture(name, *world, texts)
    assert len(fig.axes) == AXES[name]
    plt.close(fig)
    assert (
        said.startswith(PICTURES[name].title)
        and 'on procad, zsad' in said
        and 'whatever its score' in said.replace('their scores', 'its score')
        and 'one scale' in said
        and PICTURES[name].claim in said
    )


def test_a_drawing_is_the_same_twice(world, texts):
    pixels = []
    for _ in range(2):
        fig, _ = picture('anoclip-f6', *world, texts)
        fig.canvas.draw()
        pixels.append(np.asarray(fig.canvas.buffer_rgba()).copy())
        plt.close(fig)
    assert (pixels[0] == pixels[1]).all()


def test_red_grows_with_the_map_and_stops_at_the_ends_of_the_scale():
    out = redden(np.full((1, 4, 3), 200, 'u1'), np.array([[-9.0, 0.0, 0.5, 9.0]]), (0, 1), 1.0)[0]
    assert out.tolist() == [[200] * 3, [200] * 3, [215, 110, 115], [230, 20, 30]]


def test_files_page_and_what_cannot_be_drawn(world, tmp_path, capsys):
    assert {n: file_of(n) for n in PICTURES if file_of(n) != n} == {
        'dual-f3': 'dual-f3-pictures',
        'dual-f5b': 'dual-f5b-pictures',
    } and set(DRAWINGS) == set(PICTURES)
    sets, model = world
    done = write_pictures(['dual-f3', 'winclip-f6'], sets, model, tmp_path)
    assert [f for f, *_ in done] == ['dual-f3-pictures.png', 'winclip-f6.png'] and {
        p.name for p in (tmp_path / 'figures').iterdir()
    } == {'dual-f3-pictures.png', 'dual-f3-pictures.svg', 'winclip-f6.png', 'winclip-f6.svg'}
    html = page([], None, (*done, ('gallery.png', 'Gallery')))
    for f, title, said in done:
        assert f'figures/{f}' in html and escape(title) in html and escape(said) in html
    assert 'figures/gallery.png' in html and html.count('class="cap"') == 2
    good = replace(
        sets['mvtec'],
        dataset=replace(
            sets['mvtec'].dataset,
            samples=tuple(s for s in sets['mvtec'].dataset.samples if not s.label),
        ),
    )
    assert (
        write_pictures(['dual-f3', 'anoclip-f6'], dict(mvtec=good), model, tmp_path) == ()
        and write_pictures(['anoclip-f6'], dict(visa=sets['mvtec']), model, tmp_path) == ()
    )
    told = capsys.readouterr().err
    assert told.count('left out') == 3 and 'dual-f3: nothing to draw' in told
    with pytest.raises(ValueError, match='anoclip-f4'):
        picture('anoclip-f5', *world)


@pytest.mark.parametrize(
    'wrong',
    [
        dict(rows=()),
        dict(rows=(Row('a', state='reported only'),)),
        dict(rows=(Row('f', None, 'foreground mask'),)),
        dict(rows=(Row('a', METHODS['anoclip']),) * 2),
        dict(count=0),
    ],
)
def test_pictures_are_checked_when_built(wrong):
    with pytest.raises(ValueError, match='dual-f4'):
        replace(PICTURES['dual-f4'], **wrong)


def test_the_command_draws_what_is_named(world, tmp_path, monkeypatch, capsys):
    from zsad.cli.main import main
    from zsad.cli.reproduce import select_exhibits, select_pictures

    sets, model = world
    root = sets['mvtec'].dataset.samples[0].path.parents[3]
    command = [
        'reproduce',
        'anoclip-f4',
        'winclip-f6',
        '--data',
        str(root),
        '--backbone',
        model.backbone,
        '--weights',
        model.weights,
        '--out',
        str(tmp_path),
    ]
    assert (
        main([*command, '--dry-run']) == 0
        and not list(tmp_path.iterdir())
        and 'anoclip-f4, winclip-f6' in capsys.readouterr().out
    )
    assert main(command) == 0
    assert {p.name for p in (tmp_path / 'figures').iterdir()} == {
        f'{n}.{k}' for n in ('anoclip-f4', 'winclip-f6') for k in ('png', 'svg')
    } and not (tmp_path / 'results').exists()
    assert 'figures/winclip-f6.png' in (tmp_path / 'index.html').read_text()
    assert (
        [e.name for e in select_exhibits(['dual-f3', 'dual-f4'])] == ['dual-f3']
        and select_pictures(['dual-f3', 'dual-f4']) == ['dual-f3', 'dual-f4']
        and select_pictures(['anoclip-t3']) == []
        and select_pictures([]) == list(PICTURES)
    )
    assert main(['exhibits']) == 0 and 'anoclip-f6         pictures' in capsys.readouterr().out
    assert (
        main(['reproduce', 'anoclip-f99']) == 2
        and 'anoclip-f4' in capsys.readouterr().err
        and main(['reproduce', 'anoclip-f4', '--accept']) == 2
    )


# ---- curves over steps, and times beside metrics


def made_up(folder, datasets, rows):
    from test_exhibits import made_up

    return made_up(folder, datasets, rows)


def test_steps_change_steps_alone():
    for name, base, off, best in (
        ('anoclip-f5', 'anoclip+', 'anoclip', '5'),
        ('dual-f6c', 'dual+', 'dual', '2'),
    ):
        rows = {r.label: r.method for r in EXHIBITS[name].rows if not r.control and r.method}
        term = METHODS[base].terms[-1][0]
        assert (
            list(rows) == [str(k) for k in range(len(rows))]
            and rows['0'] is METHODS[off]
            and rows[best] is METHODS[base]
            and EXHIBITS[name].on_request
        )
        for k, m in rows.items():
            if k not in ('0', best):
                assert (
                    dict(m.terms)[term] == dict(steps=int(k))
                    and replace(m, name=base, terms=METHODS[base].terms) == METHODS[base]
                    and [n for n, _ in m.terms] == [n for n, _ in METHODS[base].terms]
                )


def test_no_step_is_the_row_without_adaptation(world, texts):
    p = replace(
        PICTURES['dual-f4'],
        rows=(
            Row('dual', METHODS['dual']),
            Row(
                '0',
                replace(
                    METHODS['dual+'],
                    name='dual+/0',
                    terms=tuple(
                        (n, dict(k, steps=0) if n == 'synthetic_adapted' else k)
                        for n, k in METHODS['dual+'].terms
                    ),
                ),
            ),
            Row('anoclip', METHODS['anoclip']),
            Row(
                '+0',
                replace(
                    METHODS['anoclip+'], name='anoclip+/0', terms=(('adapted', dict(steps=0)),)
                ),
            ),
        ),
    )
    job = job_of(world, p)
    a, b, c, d = (maps_of(prepare_images(job, r.label, [6, 7], texts)) for r in p.rows)
    np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(c, d, atol=1e-6)


def test_a_curve_has_a_panel_for_every_role_that_was_run(tmp_path):
    e = EXHIBITS['anoclip-f5']
    for k, datasets in enumerate((('procad', 'procad-b'), ('procad',))):
        (tmp_path / str(k)).mkdir()
        fig = figure(e, made_up(tmp_path / str(k), datasets, e.rows))
        assert (
            len(fig.axes) == len(datasets)
            and [a.get_title() for a in fig.axes]
            == ['MVTec-AD (procad)', 'VisA (procad-b)'][: len(datasets)]
        )
        assert len(fig.axes[0].lines) == 3 * (1 + 2) and len(fig.axes[0].lines[0].get_xdata()) == 11
        plt.close(fig)
    assert 'VisA: ' in ' '.join(t.get_text() for t in fig.texts)


def test_times_stand_beside_metrics_where_they_were_measured(tmp_path):
    e = EXHIBITS['anoclip-t7']
    res = made_up(tmp_path, ('procad',), e.rows)
    assert set(readable(table(e, res))['ms per image'][:4]) == {
        'not measured'
    } and 'zsad reproduce cost' in caption(e, res)
    lines = [
        f'rows,"{m}, {how}",float32,{n},{v},ms/image,,,3,{v - 1},{v + 1},,'
        'a CPU,2,avx2,2,big (random:0),cpu'
        for m, v in (('winclip', 40), ('anoclip/qkv', 6), ('anoclip', 8), ('anoclip+', 20))
        for how, n, v in (('alone', 1, v), ('together', 16, v / 2))
    ]
    (tmp_path / 'cost.csv').write_text(
        'part,what,dtype,batch,value,unit,limit,share,repeats,lo,hi,note,cpu,threads,flags,torch,'
        'encoder,device\n' + '\n'.join(lines) + '\n'
    )
    res = read_results(tmp_path)
    d = readable(table(e, res))
    assert (
        d['ms per image'].tolist()[:4]
        == ['40.0 [39.0, 41.0]', '6.0 [5.0, 7.0]', '8.0 [7.0, 9.0]', '20.0 [19.0, 21.0]']
        and d['paper: ms per image'].tolist()[:4] == ['41.3', '6.2', '7.6', '20.1']
        and d['ms per image'].tolist()[4:] == ['–', '–']
    )
    assert (
        'big (random:0) in float32 on a CPU, 2 threads' in caption(e, res)
        and 'WinCLIP 20 ms' in caption(e, res)
        and time_of(res, e.rows[3], 'together') == (10, 9, 11)
    )
    assert [printed(e, r.label, 'mvtec', 'time_ms') for r in e.rows[:4]] == [
        '41.3',
        '6.2',
        '7.6',
        '20.1',
    ]


def test_rows_of_the_table_are_timed(tmp_path):
    from zsad.bench.encoding_cost import row_times
    from zsad.encoder.loading import load_encoder

    path = tmp_path / 'model.json'
    path.write_text(json.dumps(CONFIG))
    rows = row_times(load_encoder(str(path), 'random:0', device='cpu', dtype='float32'), 2, 1, 60.0)
    assert [r['what'].split(', ')[0] for r in rows[:4]] == [
        r.method.name for r in EXHIBITS['anoclip-t7'].rows[:4]
    ] and all(r['value'] > 0 for r in rows)
    assert [r['batch'] for r in rows] == [1] * 4 + [2] * 4 and all(
        r['part'] == 'rows' and r['unit'] == 'ms/image' for r in rows
    )

"""Artifacts as rows: prompts that replace sentences, heads that replace terms, their hash in the
key of a run; subsets of an unlabelled set."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_parity import gap

from zsad.bench.models import Model
from zsad.bench.plan import compute, plan_jobs
from zsad.datasets.loading import load_dataset
from zsad.datasets.survey import scan_dataset
from zsad.encoder.loading import load_encoder
from zsad.encoder.spec import AttentionPath, EncodeSpec
from zsad.learned.anomalyclip import LayerMaps
from zsad.learned.artifacts import (
    cached_artifact,
    find_artifact,
    load_artifact,
    save_artifact,
    shipped_artifact,
)
from zsad.learned.fusion import KAnoCLIP
from zsad.learned.heads import MVFA, AprilGan
from zsad.learned.prompts import PROMPT_RECIPES, start_prompts, text_of
from zsad.methods.musc import musc_map, split_subsets
from zsad.papers.exhibit import Row
from zsad.pipeline.checks import check_method
from zsad.pipeline.detector import build
from zsad.pipeline.method import Method
from zsad.pipeline.rows import METHODS
from zsad.rendered.procad import render_procad

S = 96
VV, QKV = (
    EncodeSpec((AttentionPath('vv'),), 'quarters'),
    EncodeSpec((AttentionPath('qkv'),), 'quarters', 'raw'),
)


@pytest.fixture(scope='module')
def enc(small):
    return small


@pytest.fixture(scope='module')
def x():
    return torch.randn(5, 3, S, S, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope='module')
def made(enc, tmp_path_factory):
    "One artifact of each kind, with weights that are not those of the start."
    d, width = tmp_path_factory.mktemp('trained'), enc.model.visual.conv1.out_channels
    words = start_prompts(PROMPT_RECIPES['kanoclip'], enc, 1)
    heads = {
        'kanoclip': (KAnoCLIP, dict(dim=enc.dim, start='drawn', heads=4)),
        'april-gan': (AprilGan, dict(width=width, dim=enc.dim)),
        'mvfa': (MVFA, dict(width=width, dim=enc.dim, layers=[0, 1, 2, 3])),
        'anomalyclip': (LayerMaps, dict(sigma=2.0)),
    }
    for k, (kind, settings) in heads.items():
        save_artifact(
            d / k,
            enc,
            words if k in ('kanoclip', 'anomalyclip') else None,
            kind(**settings),
            settings,
            seed=1,
        )
    save_artifact(d / 'words', enc, words)
    return d


def rows(made):
    "The four methods as rows."

    def at(k):
        return str(made / f'{k}.json')

    return dict(
        kanoclip=Method('kanoclip', VV, None, (), artifact=at('kanoclip')),
        anomalyclip=Method('anomalyclip', VV, None, (), artifact=at('anomalyclip')),
        **{'april-gan': Method('april-gan', QKV, 'april-gan', (), artifact=at('april-gan'))},
        mvfa=Method('mvfa', EncodeSpec(()), 'april-gan', (), artifact=at('mvfa')),
    )


@pytest.mark.parametrize('name', ['kanoclip', 'anomalyclip', 'april-gan', 'mvfa'])
def test_a_head_row_gives_what_the_head_gives(enc, x, made, name):
    m = rows(made)[name]
    t = load_artifact(m.artifact, enc)
    det = build(m, ['pill', 'wood'], enc)
    pair = (
        text_of(t.prompts, enc, ['pill'])['pill'].class_embeddings
        if t.prompts
        else build('anoclip', ['pill'], enc).texts['pill'].class_embeddings * 0
        + det.texts['pill'].class_embeddings
    )
    tokens = enc.tokens(x, m.encode)
    want = (
        t.head(enc.model.visual, x, pair, S)
        if name == 'mvfa'
        else t.head(tokens.cls, next(iter(tokens.patches.values())), pair, enc.grid, S)
    )
    got = det(x, ['pill'] * 5)
    assert (
        gap(got.score, want[0].detach()) < 1e-5
        and gap(got.map, want[1].detach()) < 1e-5
        and got.map.shape == (5, S, S)
    )
    one = [det(x[i : i + 1], ['pill']) for i in range(5)]
    assert (
        gap(torch.cat([p.map for p in one]), got.map) < 1e-5
        and gap(torch.cat([p.score for p in one]), got.score) < 1e-5
    )
    mixed = det(x, ['pill', 'wood', 'pill', 'wood', 'wood'])
    assert (
        gap(mixed.map[[0, 2]], got.map[[0, 2]]) < 1e-5
        and gap(mixed.map[[1, 3, 4]], det(x[[1, 3, 4]], ['wood'] * 3).map) < 1e-5
    )


def test_prompts_replace_sentences_and_nothing_else(enc, x, made):
    words, plain = (
        build('anoclip', ['pill'], enc, artifact=made / 'words.json'),
        build('anoclip', ['pill'], enc),
    )
    by_hand = replace(
        plain, texts=text_of(load_artifact(made / 'words', enc).prompts, enc, ['pill'])
    )
    a, b = words(x, ['pill'] * 5), by_hand(x, ['pill'] * 5)
    assert (
        gap(a.map, b.map.detach()) < 1e-6
        and gap(a.score, b.score.detach()) < 1e-6
        and gap(a.map, plain(x, ['pill'] * 5).map) > 1e-4
    )
    assert (
        plain.trained is None and build('anoclip', ['pill'], enc).method == plain.method
    )  # the row itself is as it was


def test_an_artifact_keeps_its_bits(enc, made):
    t = load_artifact(made / 'kanoclip.json', enc)
    again = load_artifact(made / 'kanoclip', enc)
    assert t.hash == again.hash and all(
        torch.equal(a, b)
        for a, b in zip(t.head.state_dict().values(), again.head.state_dict().values())
    )
    assert (
        not any(p.requires_grad for p in t.head.parameters())
        and not t.head.training
        and t.about['seed'] == 1
    )
    assert len({load_artifact(f, enc).hash for f in made.glob('*.json')}) == 5


def test_what_does_not_fit_is_refused(enc, files, made, tmp_path):
    with pytest.raises(ValueError, match='terms=.*artifact='):
        check_method(Method('x', VV, None, ()))
    with pytest.raises(ValueError, match='no head.*no terms'):
        build(Method('x', VV, None, (), artifact=str(made / 'words.json')), ['pill'], enc)
    with pytest.raises(FileNotFoundError, match="'nowhere'.*zsad train"):
        build('anoclip', ['pill'], enc, artifact='nowhere')
    with pytest.raises(ValueError, match='text tower'):
        load_artifact(
            made / 'april-gan', load_encoder(files[0], 'random:5', device='cpu', dtype='float32')
        )
    with pytest.raises(ValueError, match='nothing to save.*kanoclip'):
        save_artifact(tmp_path / 'a', enc)
    head = AprilGan(enc.model.visual.conv1.out_channels, enc.dim)
    save_artifact(tmp_path / 'b', enc, None, head, dict(width=8, dim=enc.dim))
    with pytest.raises(ValueError, match="do not fill.*april-gan"):
        load_artifact(tmp_path / 'b', enc)
    assert find_artifact(made / 'words') == made / 'words'


def test_runs_know_their_artifact(files, enc, made, tmp_path, capsys):
    "The bench and the detector agree; another artifact is another run, other rows stay the same."
    root = render_procad(
        ('pill', 'wood'), good=2, bad=2, train=1, size=S, root=tmp_path / 'procad', workers=1
    )
    m = rows(made)
    sets, model = (
        dict(mvtec=scan_dataset(load_dataset('procad', root), 1)),
        Model(*files, dtype='float32'),
    )

    def shown(*ms):
        return (
            SimpleNamespace(
                name='x',
                rows=tuple(Row(k.name, k) for k in ms),
                roles=('mvtec',),
                form='table',
                metrics=(),
            ),
        )

    plan, results = compute(shown(*m.values(), METHODS['anoclip']), sets, model, show=False)
    runs = {label: plan.runs[run] for (_, _, label), (run,) in plan.shown.items()}
    assert {k: bool(r['artifact']) for k, r in runs.items()} == dict.fromkeys(m, True) | dict(
        anoclip=False
    )
    assert runs['mvfa']['artifact'] == load_artifact(m['mvfa'].artifact, enc).hash and json.loads(
        runs['mvfa']['revs']
    ).keys() == {'head mvfa', 'encoding', 'pipeline'}

    def key(row):
        return next(iter(plan_jobs(shown(row), sets, model, cache=tmp_path).runs.values()))

    other = replace(m['kanoclip'], artifact=m['anomalyclip'].artifact)
    assert (
        key(other)['run'] != key(m['kanoclip'])['run']
        and key(other)['row_key'] != key(m['kanoclip'])['row_key']
    )
    gone = replace(m['kanoclip'], name='gone', artifact='nowhere')
    assert {
        label
        for _, _, label in plan_jobs(shown(gone, m['mvfa']), sets, model, cache=tmp_path).shown
    } == {'mvfa'} and 'gone left out' in capsys.readouterr().err  # named, not fatal
    s = load_dataset('procad', root).of('pill')
    prep = enc.preprocess
    import numpy as np

    from zsad.datasets.images import load_image
    from zsad.datasets.masks import load_mask
    from zsad.evaluation.measure import evaluate

    p = build(m['mvfa'], {'pill': 'object'}, enc)(
        prep([load_image(k.path) for k in s]), ['pill'] * len(s)
    )
    want = evaluate(
        p.map.numpy(),
        np.stack([load_mask(k.mask, S) for k in s]),
        p.score.numpy(),
        np.array([k.label for k in s]),
    )
    assert results[runs['mvfa']['run']]['pill']['values']['pixel_auroc'] == pytest.approx(
        want['pixel_auroc'], abs=1e-9
    )


def test_musc_in_subsets_compares_each_image_within_its_own(enc, x):
    whole = METHODS['musc']
    halves = replace(whole, terms=(('mutual', dict(subsets=2)),), set_steps=(), score=('max', {}))
    assert halves.stochastic and halves.transductive and not whole.stochastic
    x = torch.cat([x, torch.randn(2, 3, S, S, generator=torch.Generator().manual_seed(4))])
    ids = [f'pill/{i}' for i in 'gfedcba']
    det = build(halves, ['pill'], enc)
    got = det(x, ['pill'] * 7, ids=ids)
    layers = enc.tokens(x, det.method.encode).patches[AttentionPath('qkv')]
    for part in split_subsets(ids, 2, 0):
        want = musc_map(layers[:, part], enc.grid).view(-1, 1, *enc.grid)
        assert (
            gap(
                got.map[part],
                torch.nn.functional.interpolate(
                    want, size=(S, S), mode='bilinear', align_corners=True
                )[:, 0],
            )
            < 1e-5
        )
    once = build(replace(halves, terms=(('mutual', {}),)), ['pill'], enc)(x, ['pill'] * 7, ids=ids)
    assert (
        gap(once.map, got.map) > 1e-3
        and gap(
            build(replace(halves, seed=1), ['pill'], enc)(x, ['pill'] * 7, ids=ids).map, got.map
        )
        > 1e-3
    )
    turned = det(x.flip(0), ['pill'] * 7, ids=ids[::-1])
    assert gap(turned.map.flip(0), got.map) < 1e-5


def changed(enc, *names):
    "The encoder with other numbers in one tensor."
    model = copy.deepcopy(enc.model)
    for name in names:
        model.get_parameter(name).data += 0.1
    return replace(enc, model=model)


@pytest.mark.parametrize('name', ['kanoclip', 'anomalyclip', 'april-gan', 'mvfa', 'words'])
def test_an_artifact_belongs_to_both_towers_of_its_encoder(enc, made, name):
    vision, text = 'visual.transformer.resblocks.2.mlp.c_fc.bias', 'ln_final.bias'
    for tensor, says in (
        (vision, 'the vision tower'),
        ('visual.proj', 'the vision tower'),
        (text, 'the text tower'),
    ):
        with pytest.raises(
            ValueError, match=f'belongs to {says}.*load the encoder that it was trained with'
        ):
            load_artifact(made / name, changed(enc, tensor))
    with pytest.raises(ValueError, match='text tower.*and the vision tower'):
        load_artifact(made / name, changed(enc, vision, text))


@pytest.mark.parametrize('name', ['kanoclip', 'anomalyclip', 'april-gan', 'mvfa'])
def test_a_head_serves_its_towers_at_any_size_and_in_bfloat16(files, made, name):
    for how in (dict(size=128, dtype='float32'), dict(dtype='bfloat16')):
        e = load_encoder(*files, device='cpu', **how)
        S = e.preprocess.size
        x = torch.randn(2, 3, S, S, generator=torch.Generator().manual_seed(3))
        p = build(rows(made)[name], ['pill'], e)(x, ['pill'] * 2)
        assert p.map.shape == (2, S, S) and p.map.isfinite().all() and p.score.isfinite().all()


def test_an_artifacts_hash_is_of_what_changes_predictions(enc, made, tmp_path):
    head = load_artifact(made / 'april-gan', enc).head
    settings = dict(width=head.width, dim=enc.dim)

    def save(n, settings=settings, inputs=None, **notes):
        return save_artifact(tmp_path / n, enc, None, head, settings, inputs, **notes)

    first = save('a', seed=1, losses=dict(local=[1.0, 0.5]), images=4)
    assert save('b', seed=1, seconds=3.0) == first  # notes do not count
    assert first not in (
        save('c', {**settings, 'tau': 0.07}),
        save('d', inputs=dict(encode={}, prompts='april-gan')),
    )
    description = json.loads((tmp_path / 'a.json').read_text())
    assert set(description) == {'hash', 'identity', 'notes', 'tensors'} and description['notes'][
        'losses'
    ] == dict(local=[1.0, 0.5])
    assert set(description['identity']) == {
        'kind',
        'head',
        'settings',
        'prompts',
        'required_inputs',
        'text_weights',
        'vision_weights',
    }
    (tmp_path / 'a.json').write_text(
        json.dumps(dict(reversed(description.items())), sort_keys=True)
    )  # another format of the file
    assert load_artifact(tmp_path / 'a', enc).hash == first
    (tmp_path / 'a.json').write_text(
        json.dumps(
            {
                **description,
                'identity': {**description['identity'], 'settings': {**settings, 'tau': 0.07}},
            }
        )
    )
    with pytest.raises(ValueError, match='one of the two was changed'):
        load_artifact(tmp_path / 'a', enc)


def test_the_artifact_that_fits_the_encoder_is_found(tmp_path, monkeypatch, capsys):
    "Of those with one name in package and cache, the shipped one is first; a conflict is reported."
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path))
    name = 'april-gan-mini-procad-aux-s0'
    mini, other = (
        load_encoder('mini', w, device='cpu', dtype='float32') for w in (None, 'random:5')
    )
    shipped = shipped_artifact(name)
    width = mini.model.visual.conv1.out_channels
    with pytest.raises(ValueError, match='text tower.*vision tower.*load the encoder'):
        find_artifact(name, other)
    keys = {
        e: save_artifact(
            cached_artifact(name, e), e, None, AprilGan(width, e.dim), dict(width=width, dim=e.dim)
        )
        for e in (mini, other)
    }
    save_artifact(
        tmp_path / 'trained' / name,
        other,
        None,
        AprilGan(width, other.dim),
        dict(width=width, dim=other.dim),
    )  # a stray file of that name
    assert (
        find_artifact(name) == find_artifact(name, mini) == shipped
        and load_artifact(name, other).hash == keys[other]
    )
    message = capsys.readouterr().err
    assert (
        message.count('\n') == 1
        and name in message
        and keys[mini] in message
        and 'the shipped one is used' in message
    )
    assert load_artifact(cached_artifact(name, mini), mini).hash == keys[mini]  # named by its file

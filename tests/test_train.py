"""Pretraining: a resumed run is the uninterrupted run, exported weights load."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from zsad.encoder.loading import load_encoder
from zsad.learned.initial_weights import new_model, prepare
from zsad.learned.muon import Muon
from zsad.learned.pretraining import export_weights, optimisers, train
from zsad.learned.pretraining_data import CachingTokenizer, draw_batch, to_device
from zsad.learned.pretraining_losses import region_loss
from zsad.learned.recipes import RECIPES, Recipe
from zsad.rendered.pairs import VALIDATION, draw_pair, gather_pairs

TINY = Recipe(
    seed=3,
    steps=4,
    batch=3,
    tokens=60,
    full=(0.5, 0.5),
    smallest=(2, 2),
    largest=(3, 4),
    warmup=2,
    width=32,
    head=32,
    layers=2,
    embed=16,
    text_width=24,
    text_layers=1,
)
QUIET = dict(report=lambda *_: None, judge=0)


@pytest.fixture(scope='module')
def pairs():
    return gather_pairs([draw_pair(n) for n in range(8)])


def weights(folder):
    return torch.load(folder / 'checkpoint.pt', weights_only=True)


def test_resume_is_exact(pairs, tmp_path):
    quiet = dict(data=pairs, every=2, **QUIET)
    whole = train(TINY, tmp_path / 'a', **quiet)
    train(TINY, tmp_path / 'b', limit=2, **quiet)
    assert weights(tmp_path / 'b')['step'] == 2
    again = train(TINY, tmp_path / 'b', **quiet)
    a, b = weights(whole), weights(again)
    assert all(
        torch.equal(a['model'][k], b['model'][k]) and torch.equal(a['mean'][k], b['mean'][k])
        for k in a['model']
    )
    assert (whole / 'curve.csv').read_text() == (again / 'curve.csv').read_text()
    assert len((whole / 'curve.csv').read_text().splitlines()) == TINY.steps


def test_another_recipe_is_refused(pairs, tmp_path):
    quiet = dict(data=pairs, **QUIET)
    train(TINY, tmp_path, limit=1, **quiet)
    with pytest.raises(ValueError, match='another recipe or device'):
        train(replace(TINY, lr=1.0), tmp_path, **quiet)


def test_other_pairs_are_another_run(pairs, tmp_path, monkeypatch):
    "They get another folder, or are refused in one that is given; a copy of the pairs goes on."
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path))
    others = gather_pairs([draw_pair(n) for n in range(8, 16)])
    a, b = (train(TINY, data=d, limit=1, **QUIET) for d in (pairs, others))
    assert (
        a != b
        and train(TINY, data=replace(pairs, images=pairs.images.copy()), **QUIET) == a
        and weights(a)['step'] == TINY.steps
    )
    with pytest.raises(ValueError, match='of other pairs'):
        train(TINY, a, data=others, **QUIET)
    assert sorted(p.name for p in a.iterdir()) == ['checkpoint.pt', 'curve.csv']


def test_exported_weights_load(pairs, tmp_path):
    folder = train(TINY, tmp_path, data=pairs, **QUIET)
    path = export_weights(folder)
    enc = load_encoder(str(path.with_suffix('.json')), str(path))
    assert enc.grid == (15, 15) and enc.blocks == 2 and enc.dim == 16
    mean = weights(folder)['mean']['visual.proj']
    assert torch.allclose(enc.model.visual.proj, mean.half().float())


def test_pairs_differ_only_in_the_defect(pairs):
    for images, labels in zip(pairs.images, pairs.labels):
        a, b = (i.astype(float) for i in images)
        far = np.kron(labels == 0, np.ones((16, 16))) > 0
        assert (
            abs(a - b)[far].mean() < 20 and labels.max() > 0
        )  # two exposures of one scene: gain, falloff, grain


def test_the_next_stage_begins_with_the_weights_of_the_last(pairs, tmp_path):
    quiet = dict(data=pairs, **QUIET)
    path = export_weights(train(TINY, tmp_path / 'a', **quiet))
    enc = load_encoder(str(path.with_suffix('.json')), str(path))
    assert torch.equal(new_model(TINY, path).visual.proj, enc.model.visual.proj)
    second = weights(train(TINY, tmp_path / 'b', start=path, limit=1, **quiet))
    assert (
        json.loads(second['recipe'])['start']
        and not json.loads(weights(tmp_path / 'a')['recipe'])['start']
    )
    with pytest.raises(ValueError, match='another recipe'):
        train(TINY, tmp_path / 'b', **quiet)


def test_accumulated_draws_are_one_step(pairs, tmp_path):
    quiet = dict(data=pairs, **QUIET)
    one, two = (
        weights(train(replace(TINY, accumulate=n, steps=1), tmp_path / f'{n}', **quiet))['model'][
            'visual.proj'
        ]
        for n in (1, 2)
    )
    assert not torch.equal(one, two)


def test_the_patch_term_weighs_object_background_and_defect():
    "Half of the loss is of defects; of the rest `inside` is of the object; touched patches none."
    logit = torch.tensor([[9.0, 0.0, -9.0, 4.0, 0.0]])
    part, own = (
        torch.tensor([[1.0, 0.0, 0.0, 0.05, 0.0]]),
        torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]]),
    )
    half = np.log(2)
    assert (
        abs(float(region_loss(logit, part, own, 1.0)) - half / 2) < 1e-3
        and abs(float(region_loss(logit, part, own, 0.0))) < 1e-3
    )
    assert abs(float(region_loss(logit, part, own, 0.75)) - 0.75 * half / 2) < 1e-3
    assert float(region_loss(-logit, part, own, 0.75)) > 4


def test_windows_are_pieces_of_the_turned_pictures(pairs):
    "Crops, labels and places agree with the whole pictures; both pictures share a window."
    r = replace(TINY, full=(0.0, 0.0), aimed=1.0)
    for step in range(12):
        x, part, own, place, gain, kinds, defects, _ = draw_batch(pairs, step, r, ['widget'])
        n, k = len(x) // 2, int(part.shape[1] ** 0.5)
        assert (
            (place[:n] == place[n:]).all()
            and (part[:n] == 0).all()
            and (part[n:].max(1) > 30).all()
            and np.array_equal(gain[:n], gain[n:])
        )
        assert set(np.diff(place.reshape(2 * n, k, k), axis=2).ravel()) <= {1} and set(
            np.diff(place.reshape(2 * n, k, k), axis=1).ravel()
        ) <= {15}
        for i in range(n):  # one of the eight turns of one picture holds the crop at its place
            row, col = divmod(int(place[i, 0]), 15)
            found = False
            for j in range(len(pairs.kinds)):
                for q in range(4):
                    for mirrored in (False, True):
                        a, l = (
                            np.rot90(t[:, ::-1] if mirrored else t, q)
                            for t in (pairs.images[j, 1], pairs.labels[j])
                        )
                        if np.array_equal(
                            a[16 * row : 16 * (row + k), 16 * col : 16 * (col + k)], x[n + i]
                        ):
                            found = np.array_equal(
                                l[row : row + k, col : col + k].ravel(), part[n + i]
                            )
            assert found, (step, i)


def test_muon_moves_every_direction_alike_and_stacked_squares_apart():
    g = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(48, 16))
    tall = torch.nn.Parameter(torch.zeros(64, 16))
    w.grad, tall.grad = (
        torch.randn(48, 16, generator=g) * torch.logspace(0, -0.5, 16),
        torch.randn(64, 16, generator=g),
    )
    Muon([w, tall], lr=1.0).step()
    for part in w.detach().chunk(3):
        s = torch.linalg.svdvals(part)
        assert 0.3 < s.min() and s.max() < 1.3
    s = torch.linalg.svdvals(tall.detach())
    assert 1.0 < s.min() and s.max() < 2.6  # tall matrices by the root of their shape
    assert (w.grad * w.detach()).sum() < 0


def test_every_parameter_has_one_optimiser_and_learns(pairs, tmp_path):
    model, scale = new_model(TINY), torch.nn.Parameter(torch.zeros(3))
    owned = [
        id(p) for o in optimisers(model, scale, TINY) for g in o.param_groups for p in g['params']
    ]
    assert sorted(owned) == sorted(map(id, [*model.parameters(), scale]))
    before = prepare(new_model(TINY), pairs.images[:, 1]).state_dict()
    after = weights(train(replace(TINY, steps=8), tmp_path, data=pairs, **QUIET))['model']
    assert not [
        k
        for k in before
        if before[k].is_floating_point() and torch.equal(before[k], after[k]) and k != 'attn_mask'
    ]


def test_the_plain_recipe_has_no_patch_term_and_no_windows(pairs, tmp_path):
    r = RECIPES['mini-plain']
    assert r.region == 0 and r.magnify and r.value_gain == 1
    for step in range(0, r.steps, 100):  # whatever is cut out comes as a whole picture
        x, part, own, place, _ = to_device(
            draw_batch(pairs, step, replace(r, batch=2), ['widget']), CachingTokenizer(), 'cpu'
        )
        assert (
            x.shape[1:] == (3, 240, 240)
            and torch.equal(place, torch.arange(225).expand(len(x), -1))
            and part.shape == own.shape
        )
    folder = train(
        replace(
            TINY,
            region=0.0,
            magnify=True,
            full=(0.0, 0.0),
            smallest=(4, 4),
            largest=(4, 4),
            steps=2,
        ),
        tmp_path,
        data=pairs,
        **QUIET,
    )
    assert [
        l.split(',')[1] + l.split(',')[-1] for l in (folder / 'curve.csv').read_text().splitlines()
    ] == ['4nan'] * 2


def test_a_run_is_judged_while_it_runs(tmp_path, monkeypatch):
    "Ten times, on the running mean; a resumed run does not judge twice."
    import zsad.learned.pretraining as t

    judged = []
    monkeypatch.setattr(t, 'validate', lambda enc, n: judged.append(n) or dict(a=0.5))
    pairs = gather_pairs([draw_pair(n) for n in range(3)])
    r = replace(TINY, steps=20)
    how = dict(data=pairs, report=lambda *_: None, judge=7, every=2)
    t.train(r, tmp_path, limit=9, **how)
    folder = t.train(r, tmp_path, **how)
    assert (folder / 'validation.csv').read_text().split() == [
        'step,"a"',
        *(f'{s},0.50000' for s in range(2, 21, 2)),
    ] and set(judged) == {7}


def test_the_validation_family_is_never_trained_on():
    assert VALIDATION and not {draw_pair(n).kind for n in range(60)} & set(VALIDATION)
    assert {draw_pair(n, 'validation').kind for n in range(60)} & set(VALIDATION)

"The trainer: a resumed run is the uninterrupted run, weights move only by training, exported weights load."
import json
from dataclasses import replace
import numpy as np
import pytest
import torch
from zsad.clip import load_encoder
from zsad.train import RECIPES, VALIDATION, Recipe, draw_pair, export_weights, gather_pairs, losses, new_model, train

TINY = Recipe(seed=3, steps=4, batch=3, widen=1, full=0.5, windows=(3, 5), warmup=2, width=32, layers=2, embed=16, text_width=24, text_layers=1, designs=4)


@pytest.fixture(scope='module')
def pairs():
    drawn = [draw_pair(n, TINY) for n in range(8)]
    return gather_pairs(drawn)


def weights(folder): return torch.load(folder/'checkpoint.pt', weights_only=True)


def test_resume_is_exact(pairs, tmp_path):
    quiet = dict(data=pairs, report=lambda *_: None, every=2)
    whole = train(TINY, tmp_path/'a', **quiet)
    train(TINY, tmp_path/'b', limit=2, **quiet)
    assert weights(tmp_path/'b')['step'] == 2
    again = train(TINY, tmp_path/'b', **quiet)
    a, b = weights(whole), weights(again)
    assert all(torch.equal(a['model'][k], b['model'][k]) and torch.equal(a['mean'][k], b['mean'][k]) for k in a['model'])
    assert (whole/'curve.csv').read_text() == (again/'curve.csv').read_text()
    assert len((whole/'curve.csv').read_text().splitlines()) == TINY.steps


def test_another_recipe_is_refused(pairs, tmp_path):
    quiet = dict(data=pairs, report=lambda *_: None)
    train(TINY, tmp_path, limit=1, **quiet)
    with pytest.raises(ValueError, match='another recipe or device'): train(replace(TINY, lr=1.), tmp_path, **quiet)


def test_exported_weights_load(pairs, tmp_path):
    folder = train(TINY, tmp_path, data=pairs, report=lambda *_: None)
    path = export_weights(folder)
    enc = load_encoder(str(path.with_suffix('.json')), str(path))
    assert enc.grid == (15, 15) and enc.blocks == 2 and enc.dim == 16
    mean = weights(folder)['mean']['visual.proj']
    assert torch.allclose(enc.model.visual.proj, mean.half().float())


def test_pairs_differ_only_in_the_defect(pairs):
    for images, labels in zip(pairs.images, pairs.labels):
        a, b = (i.astype(float) for i in images)
        far = np.kron(labels == 0, np.ones((16, 16))) > 0
        assert abs(a - b)[far].mean() < 20 and labels.max() > 0      # two exposures of one scene: gain, falloff, grain


def test_the_next_stage_begins_with_the_weights_of_the_last(pairs, tmp_path):
    quiet = dict(data=pairs, report=lambda *_: None)
    path = export_weights(train(TINY, tmp_path/'a', **quiet))
    enc = load_encoder(str(path.with_suffix('.json')), str(path))
    assert torch.equal(new_model(TINY, path).visual.proj, enc.model.visual.proj)
    second = weights(train(TINY, tmp_path/'b', start=path, limit=1, **quiet))
    assert json.loads(second['recipe'])['start'] and not json.loads(weights(tmp_path/'a')['recipe'])['start']
    with pytest.raises(ValueError, match='another recipe'): train(TINY, tmp_path/'b', **quiet)


def test_accumulated_draws_are_one_step(pairs, tmp_path):
    quiet = dict(data=pairs, report=lambda *_: None)
    one, two = (weights(train(replace(TINY, accumulate=n, steps=1), tmp_path/f'{n}', **quiet))['model']['visual.proj'] for n in (1, 2))
    assert not torch.equal(one, two)


def test_normal_patches_of_the_object_weigh_more_than_its_background(pairs):
    "The patch term reads where the object is: moving weight between its two normal halves changes it, and on textures it does not."
    from zsad.train import Words, draw_batch, to_device
    tok, model, scale = Words(), new_model(TINY), torch.tensor([3., 0.])
    r = replace(TINY, full=1.)
    x, share, inside, window, texts = to_device(draw_batch(pairs, 0, r, tok.random(), tok), tok, 'cpu')
    region = lambda i, k: float(losses(model, scale, x, share, i, window, texts, replace(r, inside=k))['region'].detach())
    half = inside.clone(); half[:, :, :7] = 0; half[:, :, 7:] = 1
    assert region(half, 0.) != region(half, 1.) and abs(region(half, .5) - (region(half, 0.) + region(half, 1.))/2) < 1e-5
    full = torch.ones_like(inside); assert region(full, 1.) > region(full, .5)


def test_the_validation_family_is_never_trained_on():
    assert VALIDATION and not {draw_pair(n, TINY).kind for n in range(60)} & set(VALIDATION)
    assert RECIPES['mini-plain'].region == 0 and RECIPES['mini-plain'].full == 1

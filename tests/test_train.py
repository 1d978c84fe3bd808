"The trainer: a resumed run is the uninterrupted run, weights move only by training, exported weights load."
import json
from dataclasses import replace
import numpy as np
import pytest
import torch
from zsad.clip import load_encoder
from zsad.train import Pairs, Recipe, draw_pair, export_weights, train

TINY = Recipe(seed=3, steps=4, batch=3, widen=1, full=0.5, windows=(3, 5), warmup=2, width=32, layers=2, embed=16, text_width=24, text_layers=1, designs=4)


@pytest.fixture(scope='module')
def pairs():
    drawn = [draw_pair(n, TINY) for n in range(8)]
    return Pairs(np.stack([d[0] for d in drawn]), np.stack([d[1] for d in drawn]), [d[2] for d in drawn], [d[3] for d in drawn])


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

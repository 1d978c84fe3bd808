"Everything that runs on a GPU, on a device that is not there, and on a real one if there is one."

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from devices import Away, faked, sent

from zsad.bench.models import Model, load_model
from zsad.bench.plan import compute
from zsad.core.identity import plain
from zsad.datasets.loading import load_dataset
from zsad.datasets.survey import scan_dataset
from zsad.encoder.encoder import encode_images
from zsad.encoder.loading import load_encoder
from zsad.learned.artifacts import artifact_name, cached_artifact, load_artifact, save_artifact
from zsad.learned.configs import CONFIGS, resolve_config
from zsad.learned.pretraining import train
from zsad.learned.prompts import LearnedPrompts
from zsad.learned.recipes import Recipe
from zsad.learned.train_set import load_train_set, make_batch
from zsad.learned.trainable import TrainableModel
from zsad.learned.trainer import learn
from zsad.papers.exhibit import Row
from zsad.pipeline.detector import build
from zsad.pipeline.references import Reference
from zsad.pipeline.rows import METHODS
from zsad.rendered.pairs import draw_pair, gather_pairs
from zsad.rendered.procad import render_aux, render_procad

S, LEARNED = 96, list(CONFIGS)
TINY = Recipe(
    seed=3,
    steps=2,
    batch=2,
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


@pytest.fixture(scope='module')
def x():
    return torch.randn(3, 3, S, S, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope='module')
def cache(small, tmp_path_factory):
    "A cache that holds, untrained, the artifacts of all learned rows."
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp('cache')
        patch.setenv('ZSAD_CACHE', str(folder))
        for name, on in ((n, on) for n in LEARNED for on in ('mvtec', 'procad-aux')):
            c = resolve_config(tiny_config(name), small)
            model = TrainableModel(c, small)
            words = model.words and LearnedPrompts(c.prompts, dict(model.words.items()))
            path = cached_artifact(artifact_name(METHODS[name].artifact, small.backbone, on), small)
            inputs = dict(encode=plain(c.encode), prompts=c.text)
            save_artifact(path, small, words, model.head, c.settings, inputs, dataset=on)
        yield folder


@pytest.fixture(scope='module')
def aux(tmp_path_factory):
    root = render_aux(
        good=1, bad=1, train=1, size=S, root=tmp_path_factory.mktemp('aux') / 'set', workers=1
    )
    return scan_dataset(load_dataset('procad-aux', root), 1)


def tiny_config(name):
    settings = dict(heads=4) if name == 'kanoclip' else {}
    return replace(CONFIGS[name], epochs=1, batch=8, loss_size=48, settings=settings)


def test_the_device_that_is_not_there_refuses_what_a_gpu_refuses():
    with faked():
        here, there = torch.ones(3), torch.ones(3, device='cuda')
        assert (
            there.device.type == 'cuda'
            and type(there.cpu()) is torch.Tensor
            and isinstance(here.to('cuda'), Away)
        )
        for mixed in (
            lambda: here + there,
            lambda: torch.stack([there[0], here[0]]),
            lambda: here[there.long() - 1],
            lambda: F.linear(here, there[None]),
        ):
            with pytest.raises(RuntimeError, match='same device'):
                mixed()
        assert (there * torch.tensor(2.0)).sum() == 6 and (there[here.long() - 1] == 1).all()
        for read in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match='numpy'):
                read()
        module = torch.nn.Linear(3, 1).to('cuda')
        module(there).sum().backward()
        assert isinstance(module.weight.grad, Away)
        with torch.autocast('cuda', torch.bfloat16):
            assert module(there).dtype == torch.bfloat16
            with pytest.raises(RuntimeError, match='unsafe to autocast'):
                F.binary_cross_entropy(there, there)


def references(method, tokens):
    "Compare each image with the next one."
    return {'pill': Reference(tokens, torch.tensor([[1], [2], [0]]))} if method.reference else None


@pytest.mark.parametrize('name', list(METHODS))
def test_a_row_predicts_on_the_device_what_it_predicts_on_the_cpu(name, small, cache, x):
    "From images, and from tokens that were stored, which lie on the CPU."
    reference = x[:1] if METHODS[name].reference else None
    det = build(name, ['pill'], small)
    tokens = small.tokens(x, det.method.encode)
    want = (
        det(x, ['pill'] * 3, reference),
        det.predict(tokens, ['pill'] * 3, references(det.method, tokens), x),
    )
    with faked():
        det = build(name, ['pill'], sent(small))
        got = (
            det(x, ['pill'] * 3, reference),
            det.predict(tokens, ['pill'] * 3, references(det.method, tokens), x),
        )
    for a, b in zip(got, want):
        assert type(a.score) is torch.Tensor and type(a.map) is torch.Tensor
        assert torch.equal(a.score, b.score) and torch.equal(a.map, b.map)


def test_the_bench_computes_every_row_on_the_device(files, cache, tmp_path):
    root = render_procad(
        ('pill',), good=2, bad=2, train=2, size=S, root=tmp_path / 'procad', workers=1
    )
    sets = dict(mvtec=scan_dataset(load_dataset('procad', root), 1))
    exhibit = SimpleNamespace(
        name='all',
        rows=tuple(Row(n, m) for n, m in METHODS.items()),
        roles=('mvtec',),
        form='table',
        metrics=(),
    )

    def run():
        load_model.cache_clear()
        shutil.rmtree(cache / 'runs', ignore_errors=True)
        plan, results = compute((exhibit,), sets, Model(*files, dtype='float32'), show=False)
        load_model.cache_clear()
        return {label: results[run]['pill'] for (_, _, label), (run,) in plan.shown.items()}

    want = run()
    with faked():
        got = run()
    assert set(got) == set(want) == set(METHODS)
    for n in got:
        assert got[n]['machine']['device'] == 'not there' and got[n]['values'] == pytest.approx(
            want[n]['values'], abs=1e-6, nan_ok=True
        ), n


@pytest.mark.parametrize('name', LEARNED)
def test_a_method_learns_on_the_device(name, small, aux, tmp_path):
    "In bfloat16 by autocast, losses in float32; training resumes and its artifact is used."
    c = resolve_config(tiny_config(name), small)
    train_set = load_train_set(c, small, aux)
    here = TrainableModel(c, small)(make_batch(train_set, list(range(8)), small))
    with faked():
        there = sent(small)
        with torch.autocast('cuda', torch.bfloat16):
            losses = TrainableModel(c, there)(make_batch(train_set, list(range(8)), there))
        assert all(v.dtype == torch.float32 and isinstance(v, Away) for v in losses.values())
        assert {k: v.item() for k, v in losses.items()} == pytest.approx(
            {k: v.item() for k, v in here.items()}, rel=0.05
        )
        assert (
            learn(
                c,
                there,
                aux,
                tmp_path / 'a',
                tmp_path / 'run',
                limit=1,
                train_set=train_set,
                show=False,
            )
            == ''
        )
        key = learn(
            c, there, aux, tmp_path / 'a', tmp_path / 'run', train_set=train_set, show=False
        )
        assert load_artifact(tmp_path / 'a', there).hash == key and small.device == 'cpu'
    assert load_artifact(tmp_path / 'a', small).hash == key


def test_an_encoder_is_trained_on_the_device(tmp_path, monkeypatch):
    "All but the table of words, whose gradient is sparse."
    monkeypatch.setattr(torch.optim.SparseAdam, 'step', lambda self: None)
    pairs = gather_pairs([draw_pair(n) for n in range(4)])
    with faked():
        for limit in (1, None):
            folder = train(
                TINY,
                tmp_path,
                device='cuda',
                data=pairs,
                limit=limit,
                judge=0,
                report=lambda *_: None,
            )
    assert len((folder / 'curve.csv').read_text().splitlines()) == 2
    model = torch.load(folder / 'checkpoint.pt', weights_only=True)['model']
    assert (
        all(torch.isfinite(t.float()).all() for t in model.values() if t.ndim)
        and not (tmp_path / 'checkpoint.pt.part').exists()
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
@pytest.mark.parametrize('name', LEARNED)
def test_a_method_learns_on_a_gpu(name, files, small, aux, tmp_path):
    "The same steps as on the CPU, in bfloat16; the artifact serves both."
    there = load_encoder(*files, device='cuda', dtype='float32')
    c = resolve_config(tiny_config(name), small)
    key = learn(c, there, aux, tmp_path / 'a', tmp_path / 'run', show=False)
    x = torch.randn(2, 3, S, S, generator=torch.Generator().manual_seed(3))
    a, b = (
        build(name, ['pill'], e, artifact=tmp_path / 'a.json')(x, ['pill'] * 2)
        for e in (there, small)
    )
    assert (
        load_artifact(tmp_path / 'a', small).hash == key
        and (a.map - b.map).abs().max() < 2e-2 * b.map.abs().max()
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
@pytest.mark.parametrize('name', list(METHODS))
def test_a_row_predicts_on_a_gpu_what_it_predicts_on_the_cpu(name, files, small, cache, x):
    there = load_encoder(*files, device='cuda', dtype='float32')
    reference = x[:1] if METHODS[name].reference else None
    a, b = (build(name, ['pill'], e)(x, ['pill'] * 3, reference) for e in (there, small))
    assert (a.map - b.map).abs().max() < 1e-2 * b.map.abs().max() and (
        a.score - b.score
    ).abs().max() < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_batches_that_are_copied_ahead_arrive_in_order(files, small, monkeypatch):
    there = load_encoder(*files, device='cuda', dtype='float32')
    monkeypatch.setattr('zsad.encoder.encoder.MOST_IMAGES', 2)  # three passes
    images = list(np.random.default_rng(0).integers(0, 256, (5, S, S, 3), dtype='u1'))
    spec = METHODS['anoclip'].encode.resolved(small.blocks)
    a, b = (encode_images(e, images, spec) for e in (there, small))
    assert a.cls.device.type == 'cpu'
    assert (a.cls - b.cls).abs().max() < 1e-2

"NaN in gives NaN out, or an error that names it: a failure must not look like a normal place."

from dataclasses import replace

import numpy as np
import pytest
import torch

from zsad.encoder.loading import load_encoder
from zsad.encoder.spec import AttentionPath, EncodeSpec
from zsad.encoder.tokens import Tokens
from zsad.methods.adaptation import adapt, adapt_in_order, draw_noise, dual_adapt
from zsad.methods.clip_baseline import anomaly_score
from zsad.methods.dual import dual_score, joint_map, pair_map
from zsad.methods.musc import interval_average, musc_map, mutual_scores, rscin
from zsad.methods.relevance import relevance

NAN = float('nan')


def unit(*shape):
    t = torch.tensor(np.random.default_rng(sum(shape)).standard_normal(shape), dtype=torch.float32)
    return t / t.norm(dim=-1, keepdim=True)


def broken(t, *at):
    t = t.clone()
    t[at] = NAN
    return t


@pytest.fixture(scope='module')
def encoder():
    return load_encoder('mini', device='cpu', dtype='float32')


def test_references():
    p, q = unit(2, 9, 8), unit(2, 1, 9, 8)
    for join in ('union', 'mean'):
        assert pair_map(broken(p, 0, 3), q, join).isnan().nonzero().tolist() == [[0, 3]]
        assert pair_map(p, broken(q, 1, 0, 2), join)[1].isnan().all()
    maps = pair_map(p, q)
    assert joint_map(broken(maps, 0, 3), maps).isnan().sum() == 1
    assert joint_map(maps, broken(maps, 1, 0)).isnan().sum() == 1
    assert dual_score(torch.ones(2), broken(maps, 0, 3)).isnan().tolist() == [True, False]
    assert dual_score(torch.tensor([1.0, NAN]), maps).isnan().tolist() == [False, True]
    assert anomaly_score(broken(p, 0, 3), unit(2, 8)).isnan().sum() == 1


def test_mutual_scores():
    layers = torch.stack([unit(4, 9, 8), 2 * unit(4, 9, 8)])
    for at in ((0, 1, 3), (1, 2, 0, 5)):
        with pytest.raises(ValueError, match='not of unit length.*finite tokens'):
            musc_map(broken(layers, *at), (3, 3), (1, 3))
    with pytest.raises(ValueError, match='others: .*not of unit length'):
        mutual_scores(unit(2, 9, 8), broken(unit(2, 9, 8), 1, 4))
    d = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0))
    assert interval_average(broken(d, 0, 2, 1), 0.3).isnan().nonzero().tolist() == [[0, 1]]
    with pytest.raises(ValueError, match='1 of 3 are not finite'):
        rscin(torch.tensor([0.1, NAN, 0.3]), unit(3, 8))


def test_adaptation_leaves_other_images_alone():
    p, pair, each = unit(2, 9, 8), unit(2, 8), unit(6, 8)
    noise = draw_noise(('a', 'b'), (5, 9, 8))
    for steps in (0, 3):
        out = adapt(broken(p, 0, 3), pair, each, noise, steps=steps)
        assert out[0, 3].isnan().all() and out[1].isfinite().all()
    assert torch.allclose(out[1], adapt(p, pair, each, noise, steps=3)[1])
    assert adapt(p, pair, each, broken(noise, 0, 0, 1), steps=3).flatten(1).isnan().any(
        1
    ).tolist() == [True, False]
    assert adapt_in_order(broken(p, 0, 3), pair, each, noise, adapter='text')[0][0].isnan().any()
    mask, joint = torch.ones(2, 9, dtype=torch.bool), torch.full((2, 9), 0.5)
    good = dual_adapt(p, p, mask, joint, pair)
    for case in (
        (broken(p, 0, 3), p, joint),
        (p, broken(p, 0, 3), joint),
        (p, p, broken(joint, 0, 3)),
    ):
        out = dual_adapt(case[0], case[1], mask, case[2], pair)
        assert out[0].isnan().any() and torch.allclose(out[1], good[1])


def test_relevance(encoder):
    v, text = encoder.model.visual, unit(2, encoder.dim)
    x = torch.zeros(2, 3, 240, 240)
    out = relevance(v, broken(x, 0, 0, 5, 5), text, 1.0)
    assert out[0].isnan().all() and out[1].isfinite().all()


def test_an_encoder_that_gives_nan_is_refused(encoder):
    "Every output is looked at, not the class token alone."
    x = torch.zeros(1, 3, 240, 240)
    with pytest.raises(ValueError, match='not finite'):
        encoder.tokens(broken(x, 0, 0, 5, 5), EncodeSpec())


def test_patches_and_windows_are_looked_at_too(encoder, monkeypatch):
    from zsad.encoder import encoder as encoder_module

    x, path = torch.zeros(1, 3, 240, 240), AttentionPath('vv')
    monkeypatch.setattr(
        encoder_module, 'encode_windows', lambda *a: {2: torch.full((1, 196, 128), NAN)}
    )
    with pytest.raises(ValueError, match='not finite'):
        encoder.tokens(x, EncodeSpec((), windows=(2,)))
    answer = unit(1, 128), {path: torch.full((1, 1, 225, 128), NAN)}, None
    monkeypatch.setattr(encoder_module, 'forward_tokens', lambda *a: answer)
    with pytest.raises(ValueError, match='not finite'):
        encoder.tokens(x, EncodeSpec((path,)))


def test_tokens_say_their_stage_and_their_only_path():
    paths = {
        AttentionPath('vv'): torch.zeros(1, 1, 9, 8),
        AttentionPath('qkv'): torch.ones(1, 1, 9, 8),
    }
    t = Tokens(unit(1, 8), paths, (3, 3), 'raw')
    with pytest.raises(ValueError, match="2 attention paths.*'vv'.*choose one"):
        t.single
    with pytest.raises(ValueError, match='0 attention paths'):
        replace(t, patches={}).single
    with pytest.raises(ValueError, match="stage='ln'.*'raw', 'ln_post', 'proj'"):
        replace(t, stage='ln')


@pytest.mark.parametrize('stage', ['raw', 'ln_post', 'proj'])
def test_encode_gives_a_dict_and_its_stage(encoder, stage):
    x = torch.zeros(2, 3, 240, 240)
    t = encoder.encode(x, 'vv', layers=(2, 5), stage=stage)
    assert t.stage == stage and list(t.patches) == [AttentionPath('vv', 6)]
    assert t.single.shape == (
        2,
        2,
        225,
        128 if stage == 'proj' else encoder.model.visual.conv1.out_channels,
    )

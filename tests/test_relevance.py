"""Relevance against finite differences, open_clip's attention, and the numbers of the public code.

NUMBERS were computed by Transformer-MM-Explainability (commit 58eaea8), `interpret` of its CLIP
notebook and its CLIP class in float64, on the weights that `mild` makes. Nothing is downloaded.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_parity import mlp, norm, scaled
from test_windows import CONFIGS, gap, make, normal, unit

from zsad.encoder.attention import attend
from zsad.encoder.loading import load_encoder
from zsad.methods.relevance import (
    block_relevance,
    forward_weights,
    join_blocks,
    mix,
    relevance,
    weigh,
)

SCALE = 20.0


def mild(name='plain', seed=2103, **vision):
    "Make a small vision tower, smooth enough for gradients of six digits, and its generator."
    v, rng = make(name, seed, **vision)
    v.load_state_dict({k: t / 3 if 'in_proj_weight' in k else t for k, t in v.state_dict().items()})
    return v, rng


def question(v, rng, B=2):
    "Images and one pair of unit rows for each."
    return normal(rng, B, 3, *v.image_size), unit(normal(rng, B, 2, 32))


def off(a, b):
    return gap(a, b) / b.abs().max().item()  # relative to the largest value


# --- the forward pass


@pytest.mark.parametrize('heads,Q', [(1, 5), (4, 5), (4, 1), (2, 3)])
def test_weights_then_values_are_attention(heads, Q):
    g = torch.Generator().manual_seed(heads)
    q, k, v = torch.randn(3, 2, 5, 8, generator=g)
    q = 2 * q[:, :Q]
    a = weigh(q, k, heads)
    assert a.shape == (2, heads, Q, 5) and gap(a.sum(-1), torch.ones(2, heads, Q)) < 1e-6
    d = 8 // heads
    for b, h, i in ((0, 0, 0), (1, heads - 1, Q - 1)):
        e = [
            math.exp(
                (q[b, i, h * d : h * d + d] @ k[b, j, h * d : h * d + d]).item() / math.sqrt(d)
            )
            for j in range(5)
        ]
        assert gap(a[b, h, i], torch.tensor(e) / sum(e)) < 1e-6
    assert gap(mix(a, v), attend(q, k, v, heads)) < 1e-6


@pytest.mark.parametrize('name', CONFIGS)
def test_the_walk_is_clips_own_path(name):
    v, rng = mild(name)
    x, _ = question(v, rng)
    n = len(v.transformer.resblocks)
    for start in range(n):
        cls, weights = forward_weights(v, v._embeds(x), start)
        assert off(cls, unit(v(x))) < 1e-5
        assert [a.shape[2:] for a in weights] == [(37, 37)] * (n - start - 1) + [(1, 37)] and all(
            a.requires_grad for a in weights
        )


# --- Eq. (5): finite steps and open_clip are the judges


def answer(v, image, side, block=None, step=0.0):
    "Return the output with each attention weight moved in turn [h*T*T], and the weights [h,T,T]."
    p, D = v.patch_size[0], v.class_embedding.shape[0]
    cut = F.unfold(image[None].double(), p, stride=p)[0].T @ v.conv1.weight.flatten(1).T
    z, kept = (
        norm(v.ln_pre, torch.cat([v.class_embedding[None], cut]) + v.positional_embedding)[None],
        None,
    )
    for l, b in enumerate(v.transformer.resblocks):
        h, T = b.attn.num_heads, z.shape[1]
        Q, K, V = (
            (
                norm(b.ln_1, z) @ b.attn.in_proj_weight[i * D : (i + 1) * D].T
                + b.attn.in_proj_bias[i * D : (i + 1) * D]
            )
            .view(len(z), T, h, -1)
            .transpose(1, 2)
            for i in range(3)
        )
        A = torch.exp(Q @ K.mT / math.sqrt(D // h))
        A = A / A.sum(-1, keepdim=True)
        if l == block:
            kept, A = A[0], A + step * torch.eye(h * T * T, dtype=torch.double).view(-1, h, T, T)
        z = z + scaled(
            b.ls_1,
            (A @ V).transpose(1, 2).flatten(2) @ b.attn.out_proj.weight.T + b.attn.out_proj.bias,
        )
        z = z + mlp(b, z, 'Quick' in type(b.mlp.gelu).__name__)
    return unit(norm(v.ln_post, z[:, 0]) @ v.proj) @ side, kept


@pytest.mark.parametrize(
    'name', ['plain', 'quick_gelu', 'layer_scale', 'no_ln_pre', 'one_head', 'one_layer']
)
@torch.no_grad()
def test_relevance_is_weight_times_what_the_answer_gains_by_it(name):
    v, rng = mild(name, image_size=32)
    x, text = question(v, rng)
    blocks, exact, R = (
        block_relevance(v, x, text, SCALE),
        copy.deepcopy(v).double(),
        torch.eye(5, dtype=torch.double),
    )
    for l, got in enumerate(blocks):
        (up, A), (down, _) = (
            answer(exact, x[1], SCALE * text[1, 1].double(), l, s) for s in (1e-5, -1e-5)
        )
        want = ((up - down).view(A.shape) / 2e-5 * A).clamp(min=0).mean(0)
        if l == len(blocks) - 1:
            assert want[1:].abs().max() < 1e-6 * want.max()
            want = want[:1]  # its other rows have no part in the answer
        assert want.max() > 1e-3 and off(got[1], want) < 1e-5, l
        R = R + F.pad(want, (0, 0, 0, 5 - len(want))) @ R
    assert off(relevance(v, x, text, SCALE)[1], R[0, 1:]) < 1e-5


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('target', ['anomalous', 'difference'])
def test_open_clips_own_attention_gives_the_same_map(name, target, monkeypatch):
    v, rng = mild(name)
    x, text = question(v, rng)
    n, seen, real = len(v.transformer.resblocks), [], F.softmax
    with monkeypatch.context() as m:
        m.setattr(F, 'softmax', lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
        for b in v.transformer.resblocks:
            m.setattr(
                b.attn,
                'forward',
                lambda *a, need_weights, f=b.attn.forward, **k: f(*a, need_weights=True, **k),
            )
        side = text[:, 1] - text[:, 0] if target == 'difference' else text[:, 1]
        grads = torch.autograd.grad(
            (SCALE * unit(v(x.clone().requires_grad_())) * side).sum(), seen
        )
    blocks = [
        (g * a).detach().clamp(min=0).view(2, -1, 37, 37).mean(1) for g, a in zip(grads, seen)
    ]
    assert len(blocks) == n
    for start in range(-n, n):
        R = torch.eye(37).expand(2, -1, -1)
        for a in blocks[start:]:
            R = R + a @ R
        assert off(relevance(v, x, text, SCALE, start, target), R[:, 0, 1:]) < 2e-5, start


# --- Eq. (6)


def test_blocks_are_joined_like_the_matrix_product():
    g = torch.Generator().manual_seed(0)
    blocks = [torch.rand(3, 7, 7, generator=g) for _ in range(4)]
    R = torch.eye(7).expand(3, -1, -1)
    assert (
        torch.equal(join_blocks([0 * blocks[0]]), R[:, 0, 1:])
        and join_blocks([0 * blocks[0]]).max() == 0
    )  # R starts as the identity
    for n, a in enumerate(blocks, 1):
        R = R + a @ R
        want = R[:, 0, 1:]
        assert off(join_blocks(blocks[:n]), want) < 1e-6
        assert (
            off(join_blocks([*blocks[: n - 1], a[:, :1]]), want) < 1e-6
        )  # row 0 of the last block is enough
    assert off(join_blocks(blocks[::-1]), want) > 0.01  # order counts
    assert off(join_blocks([b[1:2] for b in blocks]), want[1:2]) < 1e-6


def test_a_block_worked_out_by_hand():
    first, last = (
        torch.tensor([[[0.0, 1, 2], [0, 0, 3], [0, 0, 0]]]),
        torch.tensor([[[5.0, 4, 0], [7, 7, 7], [7, 7, 7]]]),
    )
    assert join_blocks([first]).tolist() == [[1, 2]]
    assert join_blocks([first, last]).tolist() == [
        [1 + 5 * 1 + 4, 2 + 5 * 2 + 4 * 3]
    ]  # its own, the class token's again, and patch 1 with what it took over


def test_start_leaves_out_the_first_blocks():
    v, rng = mild(layers=4)
    x, text = question(v, rng)
    blocks = block_relevance(v, x, text, SCALE)
    maps = [relevance(v, x, text, SCALE, s) for s in range(4)]
    for s in range(4):
        assert off(maps[s], join_blocks(blocks[s:])) < 1e-5 and torch.equal(
            maps[s], relevance(v, x, text, SCALE, s - 4)
        )
        assert all(gap(maps[s], maps[t]) > 1e-4 for t in range(s))
    assert torch.equal(maps[0], relevance(v, x, text, SCALE))  # all blocks unless told otherwise


def test_a_block_that_adds_nothing_has_no_part():
    v, rng = mild()
    x, text = question(v, rng)
    v.transformer.resblocks[1].attn.out_proj.weight.zero_()
    blocks = block_relevance(v, x, text, SCALE)
    assert blocks[1].abs().max() == 0 and blocks[0].max() > 0 < blocks[2].max()
    assert torch.equal(relevance(v, x, text, SCALE), join_blocks([blocks[0], blocks[2]]))


# --- the question


def test_only_the_anomalous_side_is_asked_unless_told_otherwise():
    v, rng = mild('one_head')
    x, text = question(v, rng)
    other = text.clone()
    other[:, 0] = unit(normal(rng, 2, 32))
    a = relevance(v, x, text, SCALE)
    assert torch.equal(relevance(v, x, other, SCALE), a) and torch.equal(
        relevance(v, x, text, SCALE, target='anomalous'), a
    )
    d = relevance(v, x, text, SCALE, target='difference')
    assert gap(d, a) > 1e-3 and gap(relevance(v, x, other, SCALE, target='difference'), d) > 1e-3
    side = torch.stack([0 * text[:, 0], text[:, 1] - text[:, 0]], 1)
    assert off(relevance(v, x, side, SCALE), d) < 1e-6
    for p, q in zip(
        *(block_relevance(v, x, t, SCALE, target='difference') for t in (text, text.flip(1)))
    ):
        assert (
            p.max() > 0 < q.max() and (p * q).max() == 0
        )  # one head: what speaks for one side speaks against the other


def test_no_gradient_no_relevance():
    v, rng = mild()
    x, text = question(v, rng)
    assert (
        relevance(v, x, 0 * text, SCALE).abs().max() == 0
        and relevance(v, x, text, 0.0).abs().max() == 0
    )
    assert (
        relevance(v, x, text[:, :1].expand(-1, 2, -1), SCALE, target='difference').abs().max() == 0
    )


def test_the_scale_stretches_one_block_and_weighs_paths_through_several():
    v, rng = mild()
    x, text = question(v, rng)
    last, every = (
        [relevance(v, x, text, s, start) for s in (1.0, 7.0, 100.0)] for start in (-1, 0)
    )
    for s, a in zip((1.0, 7.0, 100.0), last):
        assert off(a, s * last[0]) < 1e-6
    clear = last[0] > 1e-5 * last[0].max()
    for i in range(2):
        assert torch.equal(
            last[2][i, clear[i]].argsort(), last[0][i, clear[i]].argsort()
        )  # no order changes
    blocks = block_relevance(v, x, text, 1.0)
    for s, a in zip((1.0, 7.0, 100.0), every):
        assert off(a, join_blocks([s * b for b in blocks])) < 1e-5
    assert all(
        not torch.equal(every[2][i].argsort(), every[0][i].argsort()) for i in range(2)
    )  # here they do


def test_relevance_is_never_negative_and_single_precision():
    v, rng = mild()
    x, text = question(v, rng)
    for start in (0, 1, 2):
        a = relevance(v, x, text, SCALE, start)
        assert (
            a.shape == (2, 36)
            and a.dtype == torch.float32
            and a.min() >= 0
            and (a.amax(1) > 0).all()
        )


# --- batches, callers, models


def test_images_do_not_influence_each_other_and_chunks_change_nothing():
    v, rng = mild()
    x, text = question(v, rng, 5)
    for start in (0, -1):
        a = relevance(v, x, text, SCALE, start)
        assert (
            off(torch.cat([relevance(v, x[i : i + 1], text[i], SCALE, start) for i in range(5)]), a)
            < 1e-5
        )
        loud = x.clone()
        loud[[0, 1, 2, 4]] *= 100
        assert off(relevance(v, loud, text, SCALE, start)[3], a[3]) < 1e-5
        for chunk in (1, 2, 5, 100):
            assert off(relevance(v, x, text, SCALE, start, chunk=chunk), a) < 1e-5
        assert (
            off(
                relevance(v, x, text[1], SCALE, start),
                relevance(v, x, text[1].expand(5, -1, -1), SCALE, start),
            )
            < 1e-6
        )
        assert (
            gap(relevance(v, x, text[1], SCALE, start), a) > 1e-3
        )  # each image is asked with its own pair


def test_no_pass_is_larger_than_a_chunk(monkeypatch):
    import zsad.methods.relevance as module

    v, rng = mild()
    x, text = question(v, rng, 5)
    seen, real = [], module.block_relevance
    monkeypatch.setattr(
        module, 'block_relevance', lambda visual, x, *a: seen.append(len(x)) or real(visual, x, *a)
    )
    for chunk, sizes in ((1, [1] * 5), (2, [2, 2, 1]), (9, [5])):
        seen.clear()
        relevance(v, x, text, SCALE, chunk=chunk)
        assert seen == sizes


@pytest.mark.parametrize('mode', [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_whoever_calls_gets_the_same_map(mode):
    v, rng = mild()
    x, text = question(v, rng)
    a = relevance(v, x, text, SCALE)
    with mode():
        assert torch.equal(relevance(v, x, text, SCALE), a)
        X, T = x.clone(), text.clone()  # made inside: inference tensors
        assert torch.equal(relevance(v, X, T, SCALE, target='anomalous'), a)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert torch.equal(relevance(v, X, T, SCALE), a) and torch.equal(
        relevance(v, X, T[1], SCALE)[1], relevance(v, x, text[1], SCALE)[1]
    )


@pytest.mark.parametrize('trained', [False, True])
def test_the_model_is_left_alone_and_no_graph_is_kept(trained):
    v, rng = mild()
    x, text = question(v, rng)
    want = relevance(v, x, text, SCALE)
    v.requires_grad_(trained)
    before = {k: t.clone() for k, t in v.state_dict().items()}
    a = relevance(v, x, text, SCALE)
    assert (
        off(a, want) < 1e-6
        and not a.requires_grad
        and a.grad_fn is None
        and not any(b.requires_grad for b in block_relevance(v, x, text, SCALE))
    )
    assert (
        all(torch.equal(before[k], t) for k, t in v.state_dict().items())
        and not x.requires_grad
        and not text.requires_grad
    )
    assert all(p.grad is None and p.requires_grad == trained for p in v.parameters())
    assert not any(
        m._forward_hooks or m._backward_hooks or m._forward_pre_hooks or 'forward' in vars(m)
        for m in v.modules()
    )


@pytest.mark.parametrize('dtype,least', [('bfloat16', 0.999), ('float16', 0.99999)])
def test_in_half_precision_the_map_leaves_as_float32(dtype, least):
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    text = F.normalize(torch.randn(2, 128, generator=torch.Generator().manual_seed(1)), dim=-1)
    exact, half = (
        load_encoder('mini', 'random:1', 96, device='cpu', dtype=d).model.visual
        for d in ('float32', dtype)
    )
    for start in (0, -1):
        a, want = relevance(half, x, text, 100.0, start), relevance(exact, x, text, 100.0, start)
        assert a.dtype == torch.float32 and torch.isfinite(a).all()
        assert F.cosine_similarity(a, want).min() > least


# --- what is refused


@pytest.mark.parametrize('call', [relevance, block_relevance])
def test_what_does_not_fit_is_refused_by_name(call):
    v, rng = mild()
    x, text = question(v, rng)
    for bad in (x[0], x[:, :1], x[..., :48], torch.zeros(2, 37, 64)):
        with pytest.raises(ValueError, match=r'x: need images \[B,3,96,96\], got .*preprocess'):
            call(v, bad, text, SCALE)
    for bad in (text[:1], text[..., :31], text[0, 1], text[:, :1], text[None]):
        with pytest.raises(
            ValueError, match=r'text: need \[2,32\].*\[2,2,32\], got .*encode_prompts'
        ):
            call(v, x, bad, SCALE)
    for bad in (3, -4, 99, 1.0, None, 'all'):
        with pytest.raises(ValueError, match=rf'start={bad!r}.*blocks 0 to 2.*-1 the last'):
            call(v, x, text, SCALE, bad)
    for bad in ('normal', 'Anomalous', None, 1):
        with pytest.raises(
            ValueError, match=rf"target={bad!r}: choose from \('anomalous', 'difference'\)"
        ):
            call(v, x, text, SCALE, 0, bad)


def test_weights_that_give_no_gradients_are_refused():
    with torch.inference_mode():
        v, rng = mild()
    x, text = question(v, rng)
    with pytest.raises(ValueError, match='inference_mode.*load the encoder outside'):
        relevance(v, x, text, SCALE)


# --- the public code's numbers: one unit vector, two images of 6 x 6 patches, four blocks, scale 20

NUMBERS = {
    0: [
        [
            [0.0086070, 0.0789180, 0.3326658, 0.0732190, 0.0474881, 0.0708363],
            [0.0703279, 0.6812450, 0.1169710, 0.0135891, 0.0321784, 0.0237921],
            [0.0282792, 0.0374197, 0.0081924, 0.1456036, 0.0859345, 0.0655629],
            [0.0820282, 0.1061073, 0.2145725, 0.0609473, 0.0385573, 0.0360159],
            [0.0337317, 0.0906134, 0.2188212, 0.0759874, 0.0131313, 0.0320278],
            [0.0773966, 0.0684623, 0.3910524, 0.2621862, 0.1836677, 0.0891403],
        ],
        [
            [0.0190324, 0.0376660, 0.1137011, 0.1279436, 0.0550367, 0.1814951],
            [0.0356560, 0.0375051, 0.0361249, 0.0434549, 0.1989564, 0.2210288],
            [0.0873705, 0.0277041, 0.0330400, 0.0590935, 0.0949261, 0.0838784],
            [0.0450925, 0.1198738, 0.9335828, 0.1478355, 0.0919601, 0.0794504],
            [0.0521696, 0.0648917, 0.1015506, 0.0339417, 0.0470257, 0.0331013],
            [0.0732992, 0.0931288, 0.0853988, 0.0465331, 0.0605198, 0.0403497],
        ],
    ],
    2: [
        [
            [0.00592399, 0.03279971, 0.05689154, 0.03268331, 0.00158084, 0.03340878],
            [0.00000028, 0.01613330, 0.03563246, 0.00087262, 0.00589190, 0.01579526],
            [0.01020026, 0.00790578, 0.00370927, 0.08130858, 0.01918241, 0.00538638],
            [0.00155909, 0.01859328, 0.02980680, 0.03703012, 0.01393787, 0.02691627],
            [0.00132102, 0.06344625, 0.01862497, 0.05533974, 0.00000279, 0.02016777],
            [0.03541049, 0.04695860, 0.00745830, 0.04764984, 0.02945052, 0.01666325],
        ],
        [
            [0.01562500, 0.02079422, 0.04633647, 0.06275480, 0.01764190, 0.01551090],
            [0.01116372, 0.02768463, 0.02639277, 0.02760385, 0.05176254, 0.19632578],
            [0.04875106, 0.01273330, 0.01891612, 0.02791398, 0.06943312, 0.05446787],
            [0.03444856, 0.06241661, 0.02814340, 0.03004130, 0.06278401, 0.05688394],
            [0.01578895, 0.04869980, 0.03308799, 0.02361175, 0.01330228, 0.00949785],
            [0.06820118, 0.05350605, 0.06400698, 0.02993131, 0.00380566, 0.02274651],
        ],
    ],
    -1: [
        [
            [0.00391314, 0.0, 0.0, 0.01827661, 0.0, 0.03340858],
            [0.0, 0.0, 0.00260962, 0.0, 0.00193724, 0.01154316],
            [0.0, 0.0, 0.0, 0.01485349, 0.0, 0.0],
            [0.0, 0.0, 0.01332848, 0.01262528, 0.01272740, 0.0],
            [0.0, 0.0, 0.00831104, 0.00785315, 0.0, 0.0],
            [0.0, 0.0, 0.0, 0.00253876, 0.0, 0.01231846],
        ],
        [
            [0.0, 0.00501534, 0.03991174, 0.05481970, 0.00604707, 0.00518520],
            [0.0, 0.00570767, 0.01048998, 0.0, 0.00509083, 0.0],
            [0.0, 0.00805852, 0.01085845, 0.01925861, 0.05918388, 0.04943955],
            [0.00663607, 0.00381434, 0.02115634, 0.00354765, 0.0, 0.05672369],
            [0.00979392, 0.01332318, 0.0, 0.00074529, 0.0, 0.0],
            [0.06679088, 0.00464472, 0.02184268, 0.00700661, 0.00350070, 0.01969194],
        ],
    ],
}


@pytest.mark.parametrize('start', NUMBERS)
def test_numbers_of_the_public_code(start):
    v, rng = mild('quick_gelu', width=128, head_width=64, layers=4)
    x, text = normal(rng, 2, 3, 96, 96), unit(normal(rng, 2, 32))
    a, want = relevance(v, x, text, 20.0, start), torch.tensor(NUMBERS[start])
    for got, w in zip(a.view(2, 6, 6), want):
        assert off(got, w) < 1e-5

"""KAnoCLIP's modules against sums written out and against their own absence; the deformable
attention against numbers of DAT's code.

NUMBERS were computed by DAT (commit 32173fc) on the weights that `drawn` makes; KAnoCLIP itself
has no public code.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from test_parity import drawn

from zsad.learned.attention import (
    PARTS,
    BiCA,
    BiCMCI,
    CrossAttention,
    DeformableAttention,
    displacement_bias,
    init_last_layer,
    reference_points,
    sample_places,
    weights_from,
)
from zsad.learned.fusion import (
    SCORE_RULES,
    ConvAdapter,
    KAnoCLIP,
    blur,
    blur_matrix,
    fuse_maps,
    global_score,
    normalize_map,
    stage_logits,
    trainable_copy,
)
from zsad.methods.clip_baseline import anomaly_score

SMALL = dict(heads=4, groups=2)


def normal(rng, *shape):
    return torch.tensor(rng.standard_normal(shape), dtype=torch.float32)


def gap(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item()


def unit(t):
    return t / t.norm(dim=-1, keepdim=True)


def fill(m, rng):
    m.load_state_dict(drawn({k: tuple(t.shape) for k, t in m.state_dict().items()}, rng))
    return m


@pytest.fixture
def rng():
    return np.random.default_rng(2501)


@pytest.fixture
def tokens(rng):
    "Tokens of three images, four stages, a grid of 3 x 5 patches and 16 channels."
    return (
        unit(normal(rng, 3, 16)),
        unit(normal(rng, 4, 3, 15, 16)),
        unit(normal(rng, 3, 2, 16)),
        (3, 5),
    )


# --- attention, written out


def slow_attention(q, k, v, heads, bias=None):
    d, out = q.shape[-1] // heads, torch.zeros_like(q)
    for h, n in itertools.product(range(heads), range(len(q))):
        c = slice(h * d, (h + 1) * d)
        a = torch.tensor([float(q[n, c] @ key[c]) / math.sqrt(d) for key in k]) + (
            0 if bias is None else bias[h, n]
        )
        out[n, c] = (a.softmax(0)[:, None] * v[:, c]).sum(0)
    return out


def norm(m, t):
    return (t - t.mean(-1, keepdim=True)) / (
        t.var(-1, unbiased=False, keepdim=True) + m.eps
    ).sqrt() * m.weight + m.bias


def linear(m, t):
    return t @ m.weight.T + m.bias


@torch.no_grad()
def test_cross_attention_is_softmax_of_queries_and_keys(rng):
    m = fill(CrossAttention(12, 3), rng)
    x, c = normal(rng, 2, 4, 12), normal(rng, 2, 3, 12)
    for b in range(2):
        k, v = linear(m.kv, norm(m.norm_context, c[b])).chunk(2, -1)
        assert (
            gap(m(x, c)[b], linear(m.out, slow_attention(linear(m.q, norm(m.norm, x[b])), k, v, 3)))
            < 1e-5
        )


def pixel(t, y, x):
    "Read t [h,w,C] at row y, column x of patches, bilinearly; nothing lies outside."
    h, w, _ = t.shape
    r, c = math.floor(y), math.floor(x)
    out = torch.zeros(t.shape[-1])
    for i, j in itertools.product((r, r + 1), (c, c + 1)):
        if 0 <= i < h and 0 <= j < w:
            out += (1 - abs(y - i)) * (1 - abs(x - j)) * t[i, j]
    return out


@pytest.mark.parametrize(
    'how',
    [
        {},
        dict(bias=(4, 5)),
        dict(reach=1.5, kernel=3),
        dict(stride=1, kernel=3, reference='code'),
        dict(kernel=2, stride=2),
    ],
)
@torch.no_grad()
def test_deformable_attention_place_by_place(rng, how):
    h, w, C, heads, groups = 4, 5, 8, 4, 2
    m = fill(DeformableAttention(C, heads, groups, **how), rng)
    x = normal(rng, 2, h * w, C)
    y = norm(m.norm, x)
    q = linear(m.q, y)
    at = m.places(q, (h, w))
    n = at.shape[2]
    got, c = m(x, (h, w)), C // groups
    seen = F.conv2d(
        q[1].T.reshape(groups, c, h, w),
        m.near.weight,
        m.near.bias,
        m.near.stride,
        m.near.padding,
        groups=c,
    )
    p = reference_points(*seen.shape[2:], m.reference)
    assert n == seen.shape[2] * seen.shape[3]
    for g, (i, j) in itertools.product(
        range(groups), itertools.product(range(seen.shape[2]), range(seen.shape[3]))
    ):
        z = norm(m.shift[0], seen[g, :, i, j])
        d = (0.5 * z * (1 + torch.erf(z / math.sqrt(2)))) @ m.shift[2].weight.T
        want = (
            (p[i, j] + d).clamp(-1, 1)
            if m.reach is None
            else p[i, j]
            + m.reach
            * d.tanh()
            / torch.tensor([max(seen.shape[2] - 1, 1), max(seen.shape[3] - 1, 1)])
        )
        assert gap(at[1, g, i * seen.shape[3] + j], want) < 1e-5
    places = ((at[1] + 1) / 2 * torch.tensor([h - 1, w - 1])).tolist()
    read = torch.cat(
        [
            torch.stack(
                [
                    pixel(y[1].view(h, w, C)[..., g * c : (g + 1) * c], *places[g][i])
                    for i in range(n)
                ]
            )
            for g in range(groups)
        ],
        1,
    )
    assert gap(sample_places(y, at, (h, w))[1], read) < 1e-5
    bias = None
    if m.bias is not None:
        R = [
            [
                [
                    (
                        (i // w) - places[hd // (heads // groups)][s][0],
                        (i % w) - places[hd // (heads // groups)][s][1],
                    )
                    for s in range(n)
                ]
                for i in range(h * w)
            ]
            for hd in range(heads)
        ]
        bias = torch.tensor(
            [
                [
                    [pixel(m.bias[hd][..., None], dy + h - 1, dx + w - 1).item() for dy, dx in row]
                    for row in R[hd]
                ]
                for hd in range(heads)
            ]
        )
    k, v = linear(m.kv, read).chunk(2, -1)
    assert gap(got[1], linear(m.out, slow_attention(q[1], k, v, heads, bias))) < 1e-5


def test_reference_grids():
    assert (
        reference_points(3, 2)[..., 0].tolist() == [[-1, -1], [0, 0], [1, 1]]
        and reference_points(3, 2)[..., 1].tolist() == [[-1, 1]] * 3
    )
    for n in (2, 5, 8):
        assert gap(reference_points(n, n, 'code'), reference_points(n, n) + 1 / (n - 1)) < 1e-6
    assert torch.isfinite(reference_points(1, 1, 'code')).all()
    # stride 2 on an odd side: a place for every second patch, at the centre of the convolution
    for n in (5, 15, 37):
        m = DeformableAttention(8, 2, 1)
        q = torch.zeros(1, n * n, 8)
        assert (
            gap(
                (m.places(q, (n, n))[0, 0].view((n + 1) // 2, -1, 2) + 1) / 2 * (n - 1),
                torch.stack(torch.meshgrid(*[torch.arange(0.0, n, 2)] * 2, indexing='ij'), -1),
            )
            < 1e-4
        )


@torch.no_grad()
def test_places_of_patches_are_the_patches(rng):
    x = normal(rng, 2, 15, 8)
    at = reference_points(3, 5).view(1, 1, 15, 2).expand(2, 2, -1, -1)
    assert gap(sample_places(x, at, (3, 5)), x) < 1e-6
    order = torch.tensor([4, 0, 14, 7])
    assert gap(sample_places(x, at[:, :, order], (3, 5)), x[:, order]) < 1e-6
    table = normal(rng, 4, 5, 9)
    assert (
        gap(displacement_bias(table, at, (3, 5))[:, :, 0, 0], table[:, 2, 4].expand(2, 4)) < 1e-6
    )  # no displacement: the middle


@torch.no_grad()
def test_places_move_with_the_image_and_groups_have_their_own(rng):
    m = fill(DeformableAttention(16, 4, 2), rng)
    x = normal(rng, 2, 35, 16)
    at = m.places(m.q(x), (5, 7))
    assert at.shape == (2, 2, 12, 2) and at.abs().max() <= 1
    assert gap(at[0], at[1]) > 0.1 and gap(at[:, 0], at[:, 1]) > 0.1
    near = DeformableAttention(16, 4, 2, reach=0.25)
    near.load_state_dict(m.state_dict())
    moved = (
        (near.places(near.q(x), (5, 7)) - reference_points(3, 4).view(-1, 2)).abs().amax((0, 1, 2))
    )
    assert moved[0] <= 0.125 + 1e-6 and moved[1] <= 0.25 / 3 + 1e-6 and moved.min() > 0.01


NUMBERS = dict(
    unbounded=dict(
        how=dict(reference='code', bias=(5, 7)),
        y0=[
            0.7974603,
            -0.1797715,
            -0.4910913,
            0.3204735,
            -0.4409167,
            0.1928241,
            0.4301863,
            0.2788748,
        ],
        y1=[
            0.1475822,
            0.0651531,
            -0.0020799,
            0.0025513,
            -0.3163051,
            -0.3830957,
            -0.2585143,
            -0.3693046,
        ],
        at=[
            [-1.0, -0.7674001],
            [-0.6462361, -0.0757382],
            [-0.5894675, 0.8525490],
            [-0.2962561, 1.0],
            [-0.2327330, -0.6373706],
        ],
    ),
    bounded=dict(
        how=dict(reference='code', kernel=3, stride=1, reach=2.0),
        y0=[
            0.2459451,
            -0.4864738,
            0.0300918,
            0.2408339,
            0.1950370,
            0.1229977,
            0.2412084,
            -0.2620670,
        ],
        y1=[
            -0.1534190,
            -0.4150702,
            0.2013786,
            0.4544736,
            0.0605884,
            0.4493235,
            0.3398614,
            -0.0907615,
        ],
        at=[
            [-0.4393660, -0.5495213],
            [-0.6056132, -0.4793960],
            [-0.7740713, -0.1535005],
            [-0.4613168, 0.4505948],
            [-0.6404523, 0.6081184],
        ],
    ),
)


@pytest.mark.parametrize('name', NUMBERS)
@torch.no_grad()
def test_numbers_of_dats_own_code(name):
    n, rng = NUMBERS[name], np.random.default_rng(2201)
    m = DeformableAttention(16, 4, 2, **n['how'])
    m.norm = torch.nn.Identity()  # DAT's norm stands outside
    fill(m, rng)
    x = normal(rng, 2, 35, 16)
    y = m(x, (5, 7))
    assert (
        gap(y[0, 17, :8], torch.tensor(n['y0'])) < 2e-6
        and gap(y[1, 34, :8], torch.tensor(n['y1'])) < 2e-6
    )
    assert gap(m.places(m.q(x), (5, 7))[1, 1, :5], torch.tensor(n['at'])) < 2e-6
    m.reference = 'printed'
    assert gap(m(x, (5, 7)), y) > 0.01


# --- a stage, and four


@torch.no_grad()
def test_a_stage_is_two_self_and_two_cross_attentions(rng):
    m = fill(BiCA(16, **SMALL), rng)
    p, t = normal(rng, 2, 15, 16), normal(rng, 2, 2, 16)
    a = m.parts
    t1 = t + a['text'](t, t)
    p1 = p + a['patches'](p, (3, 5))
    got = m(p, t, (3, 5))
    assert gap(got[0], p1 + a['t2v'](p1, t1)) < 1e-6 and gap(got[1], t1 + a['v2t'](t1, p1)) < 1e-6


@pytest.mark.parametrize('missing', PARTS)
@torch.no_grad()
def test_a_part_that_is_missing_is_a_part_that_adds_nothing(rng, missing):
    p, t, rest = (
        normal(rng, 2, 15, 16),
        normal(rng, 2, 2, 16),
        tuple(k for k in PARTS if k != missing),
    )
    whole, less = BiCA(16, start='drawn', **SMALL), BiCA(16, parts=rest, start='drawn', **SMALL)
    for k in rest:
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                whole.parts[k].state_dict().values(), less.parts[k].state_dict().values()
            )
        )  # drawn by name
    assert (
        gap(
            whole(p, t, (3, 5))[missing in ('text', 'v2t')],
            less(p, t, (3, 5))[missing in ('text', 'v2t')],
        )
        > 1e-3
    )
    for w in (whole.parts[missing].out.weight, whole.parts[missing].out.bias):
        w.zero_()
    assert all(map(torch.equal, whole(p, t, (3, 5)), less(p, t, (3, 5))))


def test_which_side_moves(tokens):
    _, p, t, grid = tokens
    with torch.no_grad():
        for part, moved in dict(
            text=(False, True), patches=(True, False), t2v=(True, False), v2t=(False, True)
        ).items():
            got = BiCA(16, parts=(part,), start='drawn', **SMALL)(p[0], t, grid)
            assert tuple(not torch.equal(a, b) for a, b in zip(got, (p[0], t))) == moved
        same = BiCA(16, parts=(), **SMALL)(p[0], t, grid)
    assert same[0] is p[0] or torch.equal(same[0], p[0])
    with pytest.raises(ValueError, match=r"parts=\('t2v', 'attention'\).*'v2t'"):
        BiCA(16, parts=('t2v', 'attention'), **SMALL)


@torch.no_grad()
def test_stages_have_their_own_weights_and_see_their_own_tokens(tokens):
    _, p, t, grid = tokens
    m = BiCMCI(16, start='drawn', **SMALL)
    got = m(p, t, grid)
    assert [tuple(g.shape) for g in got] == [(4, 3, 15, 16), (4, 3, 2, 16)]
    other = p.clone()
    other[2] += 1
    changed = [
        [not torch.equal(a[l], b[l]) for l in range(4)] for a, b in zip(got, m(other, t, grid))
    ]
    assert changed == [[False, False, True, False]] * 2
    same = m(p[:1].expand(4, -1, -1, -1), t, grid)[0]
    assert all(gap(same[0], same[l]) > 0.01 for l in (1, 2, 3))
    for l, s in enumerate(m.stages):
        assert all(gap(g[l], a) == 0 for g, a in zip(got, s(p[l], t, grid)))


# --- zero start: untrained is absent; drawn start is not


@torch.no_grad()
def test_an_untrained_head_is_no_head(tokens):
    cls, p, t, grid = tokens
    plain = KAnoCLIP(16, cross=False, adapter=None)(cls, p, t, grid, 30)
    for kw in (
        dict(),
        dict(adapter=None),
        dict(cross=False),
        dict(bias=(3, 5)),
        dict(reach=2.0),
        dict(parts=('t2v', 'v2t')),
    ):
        got = KAnoCLIP(16, **{**(SMALL if kw.get('cross', True) else {}), **kw})(
            cls, p, t, grid, 30
        )
        assert (
            gap(got[0], plain[0]) < 1e-6
            and torch.equal(got[1], plain[1])
            and torch.equal(got[2], plain[2])
        ), kw
    for kw in (dict(adapter=None), dict(cross=False)):
        got = KAnoCLIP(16, start='drawn', **{**(SMALL if kw.get('cross', True) else {}), **kw})(
            cls, p, t, grid, 30
        )
        assert gap(got[0], plain[0]) > 1e-3
        assert ('cross' in kw) == torch.equal(got[2], plain[2])
    eq11 = KAnoCLIP(16, cross=False, adapter='literal')(cls, p, t, grid, 30)
    assert gap(eq11[0], plain[0]) > 1e-3 and torch.equal(
        eq11[1], plain[1]
    )  # no residual: it cannot be absent


def test_plain_head_is_clip_vv(tokens):
    cls, p, t, grid = tokens
    score, a, z = KAnoCLIP(16, cross=False, adapter=None, sigma=0.0)(cls, p, t, grid, grid)
    each = torch.stack([anomaly_score(q, t, 0.07) for q in p])
    want = each.mean(0)
    assert gap(a.flatten(1), want) < 1e-6 and gap(z.sigmoid(), each) < 1e-6
    assert gap(score, (anomaly_score(cls[:, None], t, 0.07)[:, 0] + want.amax(1)) / 2) < 1e-6


def test_start():
    for start, zero in (('zero', True), ('drawn', False)):
        layer = init_last_layer(torch.nn.Linear(3, 3), start)
        assert all((w == 0).all().item() == zero for w in layer.parameters())
    with pytest.raises(ValueError, match="start='ones'.*'zero'.*'drawn'"):
        BiCMCI(16, start='ones', **SMALL)


def test_weights_belong_to_seed_and_place():
    before = torch.get_rng_state()
    torch.manual_seed(7)
    a = KAnoCLIP(16, start='drawn', **SMALL).state_dict()
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), after)
    torch.set_rng_state(before)  # the caller's stream did not move
    torch.rand(100)
    b, c = (KAnoCLIP(16, start='drawn', seed=s, **SMALL).state_dict() for s in (0, 1))
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a['adapter.down.weight'], c['adapter.down.weight'])
    alone = KAnoCLIP(16, cross=False, start='drawn').state_dict()
    assert all(torch.equal(alone[k], a[k]) for k in alone)  # whatever else is built
    three = KAnoCLIP(16, stages=3, start='drawn', **SMALL).state_dict()
    assert all(torch.equal(three[k], a[k]) for k in three)
    with weights_from(0, 'x'):
        w = torch.rand(3)
    with weights_from(0, 'y'):
        assert not torch.equal(w, torch.rand(3))


# --- maps


@pytest.mark.parametrize(
    'shape,sigma',
    [
        ((9, 30), 0.7),
        ((9, 30), 4.0),
        ((5, 3), 4.0),
        ((1, 8), 2.0),
        ((37, 37), 0.3),
        ((20, 20), 10.0),
    ],
)
def test_blur_is_scipys(rng, shape, sigma):
    a = normal(rng, 2, *shape)
    assert (
        gap(blur(a, sigma)[1], torch.tensor(gaussian_filter(a[1].numpy().astype(float), sigma)))
        < 1e-5
    )
    assert gap(blur(torch.full((1, *shape), 0.3), sigma), torch.full((1, *shape), 0.3)) < 1e-6


def test_blur_at_zero_and_below(rng):
    a = normal(rng, 2, 4, 4)
    assert blur(a, 0) is a and torch.equal(blur_matrix(4, 0.0), torch.eye(4))
    for bad in (-1, float('nan')):
        with pytest.raises(ValueError, match='sigma='):
            blur(a, bad)


def test_norms_written_out():
    a = torch.tensor([[[0.0, 1.0], [2.0, 4.0]], [[3.0, 3.0], [3.0, 3.0]]])
    assert normalize_map(a, 4, 'fixed').tolist() == [
        [[0, 0.25], [0.5, 1]],
        [[0.75, 0.75], [0.75, 0.75]],
    ]
    assert normalize_map(a, 4, 'image').tolist() == [
        [[0, 0.25], [0.5, 1]],
        [[0, 0], [0, 0]],
    ]  # a flat map stays finite
    with pytest.raises(ValueError, match="norm='max'.*'fixed'.*'image'"):
        normalize_map(a, 4, 'max')


@pytest.mark.parametrize('norm', ['fixed', 'image'])
def test_fused_map_as_printed(rng, norm):
    z = 3 * normal(rng, 3, 2, 6)
    M = fuse_maps(z, (2, 3), (2, 3), norm, 0.0)
    for b in range(2):
        a, n = (
            torch.stack(
                [torch.softmax(torch.stack([0 * l[b], l[b]], -1), -1)[:, i] for l in z]
            ).sum(0)
            for i in (1, 0)
        )
        Ma, Mn = (t / 3 if norm == 'fixed' else (t - t.min()) / (t.max() - t.min()) for t in (a, n))
        assert (
            gap(M[b].flatten(), (Ma + 1 - Mn) / 2) < 1e-5 and gap(M[b].flatten(), Ma) < 1e-5
        )  # Eq. (10) is the anomalous map alone
    large = fuse_maps(z, (2, 3), (20, 24), norm, 1.5)
    assert large.shape == (2, 20, 24) and 0 <= large.min() and large.max() <= 1
    assert gap(fuse_maps(z[:, 1:], (2, 3), (20, 24), norm, 1.5), large[1:]) < 1e-6
    if norm == 'fixed':
        assert (
            gap(
                large,
                blur(
                    F.interpolate(
                        z.sigmoid().mean(0).view(2, 1, 2, 3), size=(20, 24), mode='bilinear'
                    )[:, 0],
                    1.5,
                ),
            )
            < 1e-6
        )
    assert (
        gap(fuse_maps(z[:, :, [1, 0, 2, 3, 4, 5]], (2, 3), (2, 3), norm, 0.0)[:, 0, 0], M[:, 0, 1])
        < 1e-6
    )
    assert gap(fuse_maps(-z, (2, 3), (2, 3), norm, 0.0), 1 - M) < 1e-5  # texts swapped


def test_own_bounds_make_every_image_anomalous(rng):
    calm = -4 + 0.1 * normal(rng, 4, 5, 15)
    loud = calm.clone()
    loud[:, 0, 7] = 6.0

    def top(norm):
        return fuse_maps(loud, (3, 5), (3, 5), norm, 0.0).amax((1, 2))

    assert gap(top('image'), torch.ones(5)) < 1e-6
    assert top('fixed')[0] > 0.9 and top('fixed')[1:].max() < 0.03


def test_logits_are_cosines_whatever_the_lengths(rng):
    p, t = normal(rng, 4, 3, 6, 8), normal(rng, 4, 3, 2, 8)
    for l, b, n in itertools.product(range(4), range(3), range(6)):
        c = [
            float(p[l, b, n] @ t[l, b, k] / (p[l, b, n].norm() * t[l, b, k].norm())) for k in (0, 1)
        ]
        assert abs(stage_logits(p, t)[l, b, n].item() - (c[1] - c[0]) / 0.07) < 1e-4
    assert gap(stage_logits(3 * p, t[0, 0]), stage_logits(p, 5 * t[0, 0])) < 1e-4
    assert gap(stage_logits(p, t[0])[:, 1], stage_logits(p[:, 1:2], t[0, 1])[:, 0]) < 1e-5


# --- class token


@torch.no_grad()
def test_adapter_of_the_equation(rng):
    m, x = fill(ConvAdapter(8, 3, literal_eq11=True), rng), normal(rng, 5, 8)
    assert set(m.state_dict()) == {'norm.weight', 'norm.bias', 'down.weight', 'up.weight'}
    for b in range(5):
        assert (
            gap(m(x)[b], (norm(m.norm, x[b]) @ m.down.weight.T).clamp(min=0) @ m.up.weight.T) < 1e-6
        )


@torch.no_grad()
def test_adapter_of_the_figure(rng):
    m, x = fill(ConvAdapter(8, 3, ratio=0.3), rng), normal(rng, 2, 4, 8)
    down = norm(m.norm, x) @ m.down.weight.T  # [2,4,3]
    for b, i in itertools.product(range(2), range(4)):
        y = torch.stack(
            [
                sum(
                    down[b, i + o - 1, c] * m.conv.weight[c, 0, o]
                    for o in range(3)
                    if 0 <= i + o - 1 < 4
                )
                + m.conv.bias[c]
                for c in range(3)
            ]
        )
        assert gap(m(x)[b, i], 0.7 * x[b, i] + 0.3 * (y.clamp(min=0) @ m.up.weight.T)) < 1e-5
    assert gap(m(x[:, 0]), m(x[:, :1])[:, 0]) < 1e-6  # one token: the middle tap
    before = m(x[:, 0])
    m.conv.weight[..., [0, 2]] += 9
    assert torch.equal(m(x[:, 0]), before)
    assert ConvAdapter(768).down.weight.shape == (192, 768) and ConvAdapter(
        3
    ).down.weight.shape == (1, 3)


@pytest.mark.parametrize('literal', [False, True])
def test_adapter_start(rng, literal):
    x = normal(rng, 4, 16)
    m = ConvAdapter(16, literal_eq11=literal)
    assert (m.up.weight == 0).all() == (not literal)
    if not literal:
        assert gap(unit(m(x)), unit(x)) < 1e-6


def test_scores_written_out(rng):
    cls, t, a = (
        3 * normal(rng, 4, 8),
        normal(rng, 4, 2, 8),
        torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(0)),
    )
    for b in range(4):
        s = torch.softmax(unit(cls[b]) @ unit(t[b]).T / 0.07, -1)[1].item()
        m = a[b].max().item()
        for rule, want in dict(mean=(s + m) / 2, sum=s + m, max=m).items():
            assert abs(global_score(cls, t, a, rule)[b].item() - want) < 1e-5
    assert set(SCORE_RULES) == {'mean', 'sum', 'max'}
    assert gap(global_score(cls, t[0], a), global_score(cls, t[:1].expand(4, -1, -1), a)) < 1e-6
    with pytest.raises(ValueError, match=r"rule='max\(M\)'.*'mean', 'sum', 'max'"):
        global_score(cls, t, a, 'max(M)')


# --- the head


@pytest.mark.parametrize(
    'B,L,C,grid,size',
    [
        (1, 4, 16, (3, 5), 20),
        (2, 1, 8, (1, 1), 7),
        (3, 2, 32, (2, 2), (6, 10)),
        (1, 3, 16, (6, 4), (6, 4)),
    ],
)
@torch.no_grad()
def test_shapes_of_any_encoder(rng, B, L, C, grid, size):
    score, a, z = KAnoCLIP(C, L, start='drawn', **SMALL)(
        unit(normal(rng, B, C)),
        unit(normal(rng, L, B, grid[0] * grid[1], C)),
        unit(normal(rng, 2, C)),
        grid,
        size,
    )
    assert (
        score.shape == (B,)
        and a.shape == (B, *((size, size) if isinstance(size, int) else size))
        and z.shape == (L, B, grid[0] * grid[1])
    )
    assert (
        all(torch.isfinite(t).all() for t in (score, a, z))
        and 0 <= score.min()
        and score.max() <= 1
    )


@torch.no_grad()
def test_a_batch_of_four_is_four_of_one(rng):
    cls, p, t = (
        unit(normal(rng, 4, 16)),
        unit(normal(rng, 4, 4, 15, 16)),
        unit(normal(rng, 4, 2, 16)),
    )
    m = KAnoCLIP(16, start='drawn', bias=(3, 5), **SMALL)
    whole = m(cls, p, t, (3, 5), 30)
    for b in range(4):
        alone = m(cls[b : b + 1], p[:, b : b + 1], t[b], (3, 5), 30)
        assert (
            gap(alone[0], whole[0][b : b + 1]) < 1e-5
            and gap(alone[1], whole[1][b : b + 1]) < 1e-5
            and gap(alone[2], whole[2][:, b : b + 1]) < 1e-4
        )
    loud = p.clone()
    loud[:, [0, 2, 3]] *= -7
    assert gap(m(cls, loud, t, (3, 5), 30)[2][:, 1], whole[2][:, 1]) < 1e-4


@pytest.mark.parametrize('adapter', ['figure', 'literal'])
def test_gradients_reach_everything(tokens, adapter):
    cls, p, t, grid = tokens
    m, t = (
        KAnoCLIP(16, adapter=adapter, start='drawn', bias=(3, 5), reach=2.0, sigma=1.0, **SMALL),
        t.clone().requires_grad_(),
    )
    score, a, z = m(cls, p, t, grid, 30)
    (score.sum() + a.square().sum() + z.sum()).backward()
    assert all(
        w.grad is not None and torch.isfinite(w.grad).all() and w.grad.abs().max() > 0
        for w in m.parameters()
    ), [n for n, w in m.named_parameters() if w.grad is None or w.grad.abs().max() == 0]
    assert t.grad.abs().min() > 0
    score, _, _ = KAnoCLIP(16, adapter=None, start='drawn', **SMALL)(cls, p, t, grid, 30)
    t.grad = None
    score.sum().backward()
    assert t.grad.abs().max() > 0  # the score alone, through max(M) too


def test_training_leaves_zero_in_two_steps(tokens):
    cls, p, t, grid = tokens
    m = KAnoCLIP(16, **SMALL)
    adam = torch.optim.Adam(m.parameters(), 1e-2)
    y = torch.zeros(3, 15)
    y[:, 4] = 1
    losses = []
    for step in range(15):
        z = m(cls, p, t, grid, 30)[2]
        loss = F.binary_cross_entropy_with_logits(z, y.expand_as(z))
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        if step == 0:
            assert all(
                (w.grad.abs().max() > 0) == n.endswith(('out.weight', 'out.bias'))
                for n, w in m.cross.stages[0].parts['t2v'].named_parameters()
            )
        adam.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(
        not torch.equal(w, v)
        for (n, w), v in zip(m.cross.named_parameters(), BiCMCI(16, **SMALL).parameters())
        if 'bias' not in n
    )


def test_tokens_made_in_inference_mode_can_be_trained_on(tokens):
    with torch.inference_mode():
        cls, p, t = (u.clone() for u in tokens[:3])
    m = KAnoCLIP(16, start='drawn', **SMALL)
    m(cls, p, t, tokens[3], 30)[0].sum().backward()
    assert m.cross.stages[0].parts['t2v'].q.weight.grad.abs().max() > 0
    with torch.no_grad():
        assert trainable_copy(p) is p
    plain = torch.ones(2)
    assert trainable_copy(plain) is plain


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_finite_under_autocast(tokens, dtype):
    cls, p, t, grid = tokens
    m = KAnoCLIP(16, start='drawn', bias=(3, 5), **SMALL)
    t = t.clone().requires_grad_()
    exact = m(cls, p, t, grid, 30)
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        got = m(cls, p, t, grid, 30)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in got)
    assert (
        gap(got[0].detach(), exact[0].detach()) < 0.05
        and gap(got[1].detach(), exact[1].detach()) < 0.05
    )
    (got[0].sum() + got[2].sum()).backward()
    assert (
        all(torch.isfinite(w.grad).all() for w in m.parameters()) and torch.isfinite(t.grad).all()
    )


def test_what_does_not_fit_is_refused(tokens):
    cls, p, t, grid = tokens
    m = KAnoCLIP(16, **SMALL)
    for bad, says in (
        (
            (cls, p[:3], t, grid),
            r"patches: \[3, 3, 15, 16\].*\[4,B,15,16\].*3 x 5.*'quarters'.*'proj'",
        ),
        ((cls, p, t, (4, 4)), r'\[4,B,16,16\]'),
        ((cls, p[..., :8], t, grid), 'patches'),
        ((cls, p[0], t, grid), 'patches'),
        ((cls[:2], p, t, grid), r'cls: \[2, 16\].*\[3,16\]'),
        ((cls, p, t[:2], grid), r'text: \[2, 2, 16\].*\[2,16\] or \[3,2,16\]'),
        ((cls, p, t[0, :1], grid), 'text'),
    ):
        with pytest.raises(ValueError, match=says):
            m(*bad, 30)
    with pytest.raises(ValueError, match=r'heads=8, groups=1: 20 channels.*heads=4'):
        CrossAttention(20)
    with pytest.raises(ValueError, match='heads=8, groups=3'):
        DeformableAttention(32, 8, 3)
    with pytest.raises(ValueError, match="reference='edge'.*'printed'.*'code'"):
        DeformableAttention(32, reference='edge')
    with pytest.raises(ValueError, match="adapter='eq11'.*'figure', 'literal'"):
        KAnoCLIP(16, adapter='eq11', **SMALL)


def count_parameters(module):
    return sum(t.numel() for t in module.parameters() if t.requires_grad)


def test_count_of_parameters():
    assert count_parameters(KAnoCLIP(16, cross=False, adapter=None)) == 0
    C = 64
    attention, group = 4 * C * C + 4 * C, C // 4
    with torch.device('meta'):
        n = count_parameters(KAnoCLIP(C))
    assert (
        n
        == 4 * (3 * (attention + 4 * C) + attention + 2 * C + 26 * group + 2 * group + 2 * group)
        + 2 * C
        + 2 * C * C // 4
        + 4 * C // 4
    )

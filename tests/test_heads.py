"""APRIL-GAN and MVFA against sums written out, open_clip, and the numbers of their own code;
nothing is downloaded.

NUMBERS were computed by VAND-APRIL-GAN (commit f13b8a6) and MVFA-AD (commit a30bf7b) on the
weights that `drawn` makes, with queries, keys and values at a third: 24 blocks of sharper attention
turn the last digit of float32 into the second. MVFA's code takes one image at a time.
"""

import copy

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from test_parity import drawn

from zsad.encoder.attention import forward_paths, forward_tokens, to_stage
from zsad.encoder.loading import load_encoder
from zsad.encoder.spec import AttentionPath, EncodeSpec
from zsad.learned.checkpoints import load_april_gan, load_mvfa, read_published
from zsad.learned.heads import MVFA, AprilGan, forward_adapted, sum_maps, token_logits
from zsad.methods.clip_baseline import anomaly_score


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


def tower(layers, rng, **vision):
    "A small vision tower with drawn, calm weights."
    v = (
        open_clip.CLIP(
            embed_dim=32,
            vision_cfg=dict(
                dict(image_size=96, patch_size=16, width=64, layers=layers, head_width=16), **vision
            ),
            text_cfg=dict(context_length=77, vocab_size=100, width=32, heads=2, layers=1),
        )
        .visual.eval()
        .requires_grad_(False)
    )
    v.load_state_dict(
        {
            k: t / 3 if k.endswith('in_proj_weight') else t
            for k, t in drawn({k: tuple(t.shape) for k, t in v.state_dict().items()}, rng).items()
        }
    )
    return v


def raw(v, x, layers='quarters'):
    "Class tokens and raw patch tokens, as `encode(x, 'qkv', layers=..., stage='raw')` gives them."
    cls, patches, _ = forward_tokens(
        v,
        x,
        EncodeSpec((AttentionPath('qkv'),), layers, 'raw').resolved(len(v.transformer.resblocks)),
    )
    return cls, next(iter(patches.values()))


@pytest.fixture
def rng():
    return np.random.default_rng(2502)


@pytest.fixture
def tokens(rng):
    "Raw tokens of three images, four stages, 2 x 3 patches of 10 channels, a joint space of 8."
    return (
        unit(normal(rng, 3, 8)),
        normal(rng, 4, 3, 6, 10),
        unit(normal(rng, 3, 1, 8) + 0.2 * normal(rng, 3, 2, 8)),
        (2, 3),
    )


@pytest.fixture
def world(rng):
    "A tower of five blocks, three images, sentences, and adapters behind two blocks."
    v = tower(5, rng)
    x, t = normal(rng, 3, 3, 96, 96), unit(normal(rng, 3, 1, 32) + 0.1 * normal(rng, 3, 2, 32))
    return v, x, t, fill(MVFA(64, 32, (1, 3)), rng)


# --- maps


def test_a_map_adds_up_softmaxes_of_enlarged_logits(rng):
    z = 3 * normal(rng, 2, 3, 6)
    a = sum_maps(z, (2, 3), 5)
    assert a.shape == (3, 5, 5)
    for b in range(3):
        want = torch.zeros(5, 5)
        for l in z[:, b]:
            pair = torch.stack([0.3 * l, 1.3 * l]).view(2, 2, 3)  # any two logits that differ by l
            for i in range(5):
                for j in range(5):
                    y, x = i / 4, 2 * j / 4
                    r, c = min(int(y), 0), min(int(x), 1)
                    y, x = y - r, x - c
                    q = (
                        (1 - y) * (1 - x) * pair[:, r, c]
                        + (1 - y) * x * pair[:, r, c + 1]
                        + y * (1 - x) * pair[:, r + 1, c]
                        + y * x * pair[:, r + 1, c + 1]
                    )
                    want[i, j] += q.softmax(0)[1]
        assert gap(a[b], want) < 1e-5
    assert gap(sum_maps(z, (2, 3), (2, 3)).flatten(1), z.sigmoid().sum(0)) < 1e-6
    assert (
        sum_maps(z, (2, 3), (4, 9)).shape == (3, 4, 9)
        and gap(sum_maps(z[:, 1:2], (2, 3), 7), sum_maps(z, (2, 3), 7)[1:2]) < 1e-6
    )
    assert gap(sum_maps(-z, (2, 3), 7), 2 - sum_maps(z, (2, 3), 7)) < 1e-5  # texts swapped
    after = F.interpolate(
        z.sigmoid().sum(0).view(3, 1, 2, 3), size=7, mode='bilinear', align_corners=True
    )[:, 0]
    assert gap(sum_maps(z, (2, 3), 7), after) > 0.01  # enlarged before the softmax, not behind it


def test_tokens_are_compared_by_direction(rng):
    p, t = normal(rng, 4, 3, 6, 8), unit(normal(rng, 3, 2, 8))
    want = torch.stack(
        [
            torch.stack([100 * unit(p[l, b]) @ (t[b, 1] - t[b, 0]) for b in range(3)])
            for l in range(4)
        ]
    )
    assert gap(token_logits(p, t), want) < 1e-3 and gap(token_logits(7 * p, t), want) < 1e-3
    assert gap(token_logits(p, t[0])[:, 0], want[:, 0]) < 1e-3
    assert (
        gap(
            token_logits(unit(p), t, 0.07).sigmoid(),
            torch.stack([anomaly_score(unit(q), t, 0.07) for q in p]),
        )
        < 1e-6
    )
    with torch.autocast('cpu', torch.bfloat16):
        assert gap(token_logits(p, t), want) < 1e-3


# --- APRIL-GAN


@torch.no_grad()
def test_april_gan_by_hand(rng, tokens):
    cls, p, t, grid = tokens
    m = fill(AprilGan(10, 8), rng)
    score, a, z = m(cls, p, t, grid, 12)
    for b in range(3):
        assert abs(score[b].item() - (100 * cls[b] @ t[b].T).softmax(-1)[1].item()) < 1e-5
        for l in range(4):
            assert (
                gap(
                    z[l, b].sigmoid(),
                    (100 * unit(p[l, b] @ m.fc[l].weight.T + m.fc[l].bias) @ t[b].T).softmax(-1)[
                        :, 1
                    ],
                )
                < 1e-5
            )
    assert (
        gap(a, sum_maps(z, grid, 12)) == 0
        and a.shape == (3, 12, 12)
        and 0 <= a.min()
        and a.max() <= 4
    )
    assert (
        gap(m(cls, p, t[0], grid, 12)[2][:, 0], z[:, 0]) < 1e-4
    )  # logits are 100 times a cosine: a float32 rounding is 6e-6
    two = fill(AprilGan(10, 8, 2), np.random.default_rng(0))
    assert (
        two(cls, p[:2], t, grid, (5, 9))[1].shape == (3, 5, 9)
        and two(cls, p[:2], t, grid, 5)[1].max() <= 2
    )


@torch.no_grad()
def test_linear_layers_can_be_clips_own_way_out(rng):
    v = tower(4, rng)
    v.ln_post.bias.zero_()
    x, t = normal(rng, 2, 3, 96, 96), unit(normal(rng, 2, 32))
    cls, p = raw(v, x)
    m = AprilGan(64, 32)
    w = ((torch.eye(64) - 1 / 64) * 1) @ torch.diag(v.ln_post.weight) @ v.proj
    for f in m.fc:
        f.weight.copy_(w.T)
        f.bias.zero_()
    assert gap(m(cls, p, t, v.grid_size, 30)[2], token_logits(to_stage(v, p), t)) < 1e-2
    assert gap(cls, unit(v(x))) < 1e-5


@pytest.mark.parametrize('make', [lambda s: AprilGan(10, 8, seed=s), lambda s: MVFA(10, 8, seed=s)])
def test_weights_belong_to_the_seed(make):
    torch.manual_seed(3)
    after = torch.rand(2)
    torch.manual_seed(3)
    a = make(0).state_dict()
    assert torch.equal(torch.rand(2), after)
    b, c = make(0).state_dict(), make(1).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and not any(torch.equal(a[k], c[k]) for k in a)
    assert len({t.flatten()[0].item() for t in a.values()}) == len(a)  # no two layers alike


def test_april_gan_trains_its_layers_alone(tokens):
    with torch.inference_mode():
        cls, p, t = (u.clone() for u in tokens[:3])
    m = AprilGan(10, 8)
    score, a, z = m(cls, p, t, tokens[3], 12)
    assert not score.requires_grad  # nothing learned in it
    (a.sum() + z.sum()).backward()
    assert all(w.grad.abs().max() > 0 for w in m.parameters())
    y, adam, losses = torch.zeros(3, 6), torch.optim.Adam(m.parameters(), 1e-2), []
    y[:, 2] = 1
    for _ in range(60):
        loss = F.binary_cross_entropy_with_logits(
            m(cls, p, t, tokens[3], 6)[2], y.expand(4, -1, -1)
        )
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert losses[-1] < 0.3 * losses[0]


def test_april_gan_refuses_what_does_not_fit(tokens):
    cls, p, t, grid = tokens
    m = AprilGan(10, 8)
    for bad, says in (
        ((cls, p[:3], t, grid), r"patches: \[3, 3, 6, 10\].*\[4,3,6,10\].*2 x 3.*stage='raw'"),
        ((cls, p[..., :8], t, grid), 'raw'),
        ((cls, p, t, (3, 3)), r'\[4,3,9,10\]'),
        ((cls[:2], p, t, grid), r'\[4,2,6,10\]'),
        ((cls[:, :5], p, t, grid), r'cls: \[3, 5\]'),
        ((cls, p, t[:2], grid), r'text: \[2, 2, 8\].*\[2,8\].*\[3,2,8\].*encode_prompts'),
        ((cls, p, t[0, 0], grid), 'text'),
    ):
        with pytest.raises(ValueError, match=says):
            m(*bad, 12)


# --- MVFA


def leaky(t):
    return torch.where(t > 0, t, 0.01 * t)


@torch.no_grad()
def test_adapters_stand_between_blocks(world):
    v, x, t, m = world
    z = v._embeds(x)
    seg, det = [], []
    for l, b in enumerate(v.transformer.resblocks):
        z = b(z)  # open_clip's own block
        if l in (1, 3):
            i = (1, 3).index(l)
            mid = [leaky(z @ a[i].fc1[0].weight.T) for a in (m.seg, m.det)]
            up = [leaky(n @ a[i].fc2[0].weight.T) for n, a in zip(mid, (m.seg, m.det))]
            z = 0.8 * z + 0.1 * up[0] + 0.1 * up[1]
            seg.append(mid[0])
            det.append(mid[1])
    got = forward_adapted(v, v._embeds(x), m.seg, m.det, (1, 3))
    assert (
        gap(got[0], z) < 1e-4
        and gap(got[1], torch.stack(seg)) < 1e-4
        and gap(got[2], torch.stack(det)) < 1e-4
    )
    score, a, logits, d = m(v, x, t)
    assert (
        gap(logits, token_logits(torch.stack(seg)[:, :, 1:], t)) < 1e-2
        and gap(d, token_logits(torch.stack(det)[:, :, 1:], t)) < 1e-2
    )
    assert (
        gap(score, d.sigmoid().mean(2).sum(0)) < 1e-6
        and gap(a, sum_maps(logits, (6, 6), 96)) == 0
        and a.shape == (3, 96, 96)
    )
    assert m(v, x, t, 20)[1].shape == (3, 20, 20) and m(v, x, t, (6, 6))[1].shape == (3, 6, 6)


@torch.no_grad()
def test_no_share_is_clips_own_stream(world):
    v, x, t, m = world
    layers = 1, 3, len(v.transformer.resblocks) - 1
    plain, kept = forward_paths(v, v._embeds(x), (AttentionPath('qkv'),), layers)
    z, seg, _ = forward_adapted(v, v._embeds(x), m.seg, m.det, (1, 3), 0.0)
    assert torch.equal(z, plain) and gap(to_stage(v, z)[:, 0], unit(v(x))) < 1e-5
    for i, y in enumerate(next(iter(kept.values()))[:2]):
        assert gap(seg[i], m.seg[i](y)[0]) < 1e-5
    silent = copy.deepcopy(m)
    for a in (*silent.seg, *silent.det):
        a.fc2[0].weight.zero_()
    shrunk = forward_adapted(v, v._embeds(x), silent.seg, silent.det, (1, 3))[0]
    assert gap(shrunk, plain) > 0.05  # adapters that add nothing are no absence
    assert (
        gap(forward_adapted(v, v._embeds(x), m.seg, m.det, (1, 3), 0.2)[0], plain)
        > gap(forward_adapted(v, v._embeds(x), m.seg, m.det, (1, 3), 0.02)[0], plain)
        > 1e-3
    )


@torch.no_grad()
def test_each_adapter_acts_where_it_stands(world):
    v, x, t, m = world
    whole = m(v, x, t)
    for branch, same in (('seg', 2), ('det', 3)):
        other = copy.deepcopy(m)
        getattr(other, branch)[1].fc1[0].weight.neg_()  # of the deeper pair
        got = other(v, x, t)
        assert (
            torch.equal(got[same][0], whole[same][0]) and gap(got[same][1], whole[same][1]) > 0.01
        )
        assert torch.equal(got[5 - same], whole[5 - same])
        other = copy.deepcopy(m)
        getattr(other, branch)[0].fc2[
            0
        ].weight.neg_()  # of the first pair: the way up reaches both of the deeper
        got = other(v, x, t)
        assert all(
            torch.equal(got[k][0], whole[k][0]) and gap(got[k][1], whole[k][1]) > 1e-3
            for k in (2, 3)
        )


@torch.no_grad()
def test_a_batch_is_its_images(world):
    v, x, t, m = world
    whole = m(v, x, t)
    for b in range(3):
        alone = m(v, x[b : b + 1], t[b])
        assert (
            gap(alone[0], whole[0][b : b + 1]) < 1e-4 and gap(alone[1], whole[1][b : b + 1]) < 1e-3
        )
        assert all(gap(alone[k], whole[k][:, b : b + 1]) < 1e-2 for k in (2, 3))


@pytest.mark.parametrize(
    'vision',
    [
        dict(width=32, head_width=32),
        dict(ls_init_value=0.5),
        dict(no_ln_pre=True),
        dict(patch_size=32),
    ],
)
@torch.no_grad()
def test_any_vision_tower(rng, vision):
    v = tower(3, rng, **vision)
    n = v.grid_size[0] ** 2
    score, a, z, d = MVFA(v.conv1.out_channels, 32, (0, 2))(
        v, normal(rng, 2, 3, 96, 96), unit(normal(rng, 2, 32))
    )
    assert (
        z.shape == d.shape == (2, 2, n)
        and a.shape == (2, 96, 96)
        and all(torch.isfinite(u).all() for u in (score, a, z, d))
    )


def test_gradients_pass_through_clip_and_leave_it_alone(world):
    v, x, t, m = world
    before = {k: w.clone() for k, w in v.state_dict().items()}
    t = t.clone().requires_grad_()
    score, a, z, d = m(v, x, t)
    (score.sum() + a.sum()).backward()
    assert t.grad.abs().max() > 0
    for i, branch in ((0, m.seg), (0, m.det)):
        assert all(
            w.grad.abs().max() > 0 for w in branch[0].parameters()
        )  # the first way up matters to the deeper stage
    assert all(b[1].fc1[0].weight.grad.abs().max() > 0 for b in (m.seg, m.det))
    assert all(
        b[1].fc2[0].weight.grad is None for b in (m.seg, m.det)
    )  # the last way up is read by nobody
    assert all(w.grad is None for w in v.parameters()) and all(
        torch.equal(before[k], w) for k, w in v.state_dict().items()
    )
    only = copy.deepcopy(m)
    only.zero_grad()
    only(v, x, t)[3].sum().backward()
    assert (
        only.seg[0].fc2[0].weight.grad.abs().max() > 0 and only.seg[1].fc1[0].weight.grad is None
    )  # detection trains the other branch's way up too


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_finite_under_autocast(rng, tokens, world, dtype):
    v, x, t, m = world
    cls, p, T, grid = tokens
    april = fill(AprilGan(10, 8), rng)
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        got, other = m(v, x, t), april(cls, p, T, grid, 12)
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in (*got, *other))
    (sum(g.mean() for g in got) + other[1].mean()).backward()
    assert all(
        torch.isfinite(w.grad).all()
        for h in (m, april)
        for w in h.parameters()
        if w.grad is not None
    )
    assert (other[1] - april(cls, p, T, grid, 12)[1]).abs().mean() < 0.05


@torch.no_grad()
def test_an_encoder_in_half_precision():
    e, g = (
        load_encoder('mini', 'random:1', device='cpu', dtype='bfloat16'),
        torch.Generator().manual_seed(0),
    )
    m = MVFA(e.model.visual.conv1.out_channels, e.dim, (0, 5))
    got = m(
        e.model.visual,
        torch.randn(1, 3, 240, 240, generator=g),
        unit(torch.randn(2, e.dim, generator=g)),
    )
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in got) and got[
        1
    ].shape == (1, 240, 240)


def test_mvfa_refuses_what_does_not_fit(world):
    v, x, t, m = world
    with pytest.raises(ValueError, match=r'64 channels and blocks 0 to 4.*64 channels.*\(1, 9\)'):
        MVFA(64, 32, (1, 9))(v, x, t)
    with pytest.raises(ValueError, match='64 channels.*need 48 channels'):
        MVFA(48, 32, (1, 3))(v, x, t)
    with pytest.raises(
        ValueError, match=r'x: need images \[B,3,96,96\].*\[3, 3, 80, 80\].*preprocess'
    ):
        m(v, x[..., :80, :80], t)
    with pytest.raises(ValueError, match=r'text: \[2, 2, 32\].*\[3,2,32\]'):
        m(v, x, t[:2])
    with pytest.raises(ValueError, match=r'text: \[2, 16\]'):
        m(v, x, t[0, :, :16])
    for bad in ((), (3, 1), (1, 1), (-1, 2)):
        with pytest.raises(ValueError, match=r'layers=.*in order.*quarters'):
            MVFA(64, 32, bad)
    with torch.inference_mode():
        dead = copy.deepcopy(v)
    with pytest.raises(ValueError, match='inference_mode'):
        m(dead, x, t)


# --- numbers of the authors' own code

NUMBERS = dict(
    april=dict(
        score=[0.8216403, 0.4963668],
        a=[
            [
                [1.011931, 2.545993, 2.534600, 2.613933, 1.780055, 1.546260],
                [2.386187, 1.943389, 1.701813, 1.645641, 1.853716, 2.505069],
                [2.833002, 1.712649, 2.491881, 2.097021, 2.279816, 2.245631],
            ],
            [
                [1.666507, 1.122093, 0.996250, 1.042000, 1.239611, 0.967759],
                [1.620698, 1.329667, 1.219789, 1.172171, 1.783861, 1.261876],
                [1.565154, 0.905053, 1.508508, 1.221591, 1.671523, 2.015218],
            ],
        ],
    ),
    mvfa=dict(
        score=[2.3375742, 3.3698292],
        cls=[
            [-0.4608072, -0.0787242, 0.0995846, 0.1122538, -0.0502872, 0.0580957],
            [-0.4531477, -0.1580714, -0.0855247, -0.0603909, 0.0542055, 0.0717771],
        ],
        a=[
            [
                [1.508763, 1.180740, 1.917227, 1.240489, 1.066174, 1.749663],
                [1.857497, 1.643342, 2.188729, 1.761849, 1.797987, 1.226370],
                [1.753317, 1.196818, 1.442070, 1.183424, 1.736461, 2.042815],
            ],
            [
                [2.270949, 2.354450, 2.047786, 1.919583, 1.705269, 1.388111],
                [2.198184, 1.339276, 1.407464, 1.552847, 1.904621, 1.835243],
                [1.824134, 1.516141, 2.537680, 1.813437, 1.966650, 2.174480],
            ],
        ],
    ),
)
NUMBERS = {name: {k: torch.tensor(v) for k, v in n.items()} for name, n in NUMBERS.items()}


def sparse(a):
    return a[:, ::19, ::19][:, ::2]


@torch.no_grad()
def test_numbers_of_april_gan():
    rng = np.random.default_rng(2305)
    v = tower(12, rng)
    m = fill(AprilGan(64, 32), rng)
    x, t = normal(rng, 2, 3, 96, 96), unit(normal(rng, 2, 1, 32) + 0.1 * normal(rng, 2, 2, 32))
    want = NUMBERS['april']
    score, a, _ = m(*raw(v, x), t, v.grid_size, 96)
    assert gap(score, want['score']) < 1e-5 and gap(sparse(a), want['a']) < 2e-5


@torch.no_grad()
def test_numbers_of_mvfa():
    rng = np.random.default_rng(2403)
    v = tower(24, rng)
    m = fill(MVFA(64, 32), rng)
    x, t = normal(rng, 2, 3, 96, 96), unit(normal(rng, 2, 1, 32) + 0.1 * normal(rng, 2, 2, 32))
    want = NUMBERS['mvfa']
    score, a, _, _ = m(v, x, t)
    assert gap(score, want['score']) < 2e-5 and gap(sparse(a), want['a']) < 5e-5
    z = forward_adapted(v, v._embeds(x), m.seg, m.det, m.layers)[0]
    assert gap(to_stage(v, z)[:, 0, :6], want['cls']) < 1e-5  # the class token is adapted too


# --- published weights


def test_checkpoints_as_published(tmp_path, rng):
    april, m = fill(AprilGan(10, 8, 3), rng), fill(MVFA(10, 8, (0, 1, 2)), rng)
    assert list(april.state_dict())[:2] == ['fc.0.weight', 'fc.0.bias'] and list(
        m.seg.state_dict()
    )[:2] == ['0.fc1.0.weight', '0.fc2.0.weight']  # the authors' names
    torch.save(dict(trainable_linearlayer=april.state_dict()), tmp_path / 'a.pth')
    torch.save(
        dict(seg_adapters=m.seg.state_dict(), det_adapters=m.det.state_dict()), tmp_path / 'm.pth'
    )
    for made, again in (
        (april, load_april_gan(tmp_path / 'a.pth')),
        (m, load_mvfa(str(tmp_path / 'm.pth'), (0, 1, 2))),
    ):
        assert all(
            torch.equal(w, again.state_dict()[k]) for k, w in made.state_dict().items()
        ) and (again.width, again.dim) == (10, 8)
    with pytest.raises(
        ValueError,
        match=r"m\.pth: has no \['trainable_linearlayer'\].*'seg_adapters'.*as published",
    ):
        load_april_gan(tmp_path / 'm.pth')
    with pytest.raises(ValueError, match=r"a\.pth: has no \['seg_adapters', 'det_adapters'\]"):
        load_mvfa(tmp_path / 'a.pth')
    with pytest.raises(FileNotFoundError):
        load_mvfa(tmp_path / 'none.pth')
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    with pytest.raises(ValueError, match=r'text\.pth cannot be read.*tensors'):
        load_april_gan(tmp_path / 'text.pth')


class Evil:
    def __reduce__(self):
        return print, ('run',)


def test_a_checkpoint_is_data_and_never_runs(tmp_path, capsys):
    torch.save(dict(trainable_linearlayer=Evil()), tmp_path / 'evil.pth')
    with pytest.raises(ValueError, match='cannot be read.*need a torch file of tensors'):
        read_published(tmp_path / 'evil.pth', ('trainable_linearlayer',))
    assert 'run' not in capsys.readouterr().out

"""Windows against open_clip on each window alone, sums written out, and a public code's numbers.

Nothing is downloaded.
NUMBERS were computed by Accurate-WinCLIP (commit eef4f8c) on the weights that `drawn` makes.
"""

import itertools

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from test_parity import drawn

from zsad.encoder.attention import forward_paths, to_stage
from zsad.encoder.loading import load_encoder
from zsad.encoder.spec import AttentionPath
from zsad.encoder.windows import encode_windows, window_places, window_tokens
from zsad.methods.clip_baseline import anomaly_score
from zsad.methods.prompt_sets import PROMPTS, compose
from zsad.methods.windows import (
    association,
    build_memory_bank,
    choose_references,
    few_shot_map,
    harmonic,
    harmonic_scales,
    zero_shot_map,
)

VISION = dict(image_size=96, patch_size=16, width=64, layers=3, head_width=16)
CONFIGS = dict(
    plain=({}, {}),
    quick_gelu=({}, dict(quick_gelu=True)),
    layer_scale=(dict(ls_init_value=0.5), {}),
    no_ln_pre=(dict(no_ln_pre=True), {}),
    one_layer=(dict(layers=1), {}),
    two_layers=(dict(layers=2), {}),
    one_head=(dict(head_width=64), {}),
    eps=(dict(norm_kwargs=dict(eps=1e-2)), {}),
    patch_dropout=(dict(patch_dropout=0.5), {}),
    narrow_mlp=(dict(mlp_ratio=1.5), {}),
)


def make(name='plain', seed=2303, **vision):
    "A small vision tower with drawn weights, and the generator that drew them."
    more, top = CONFIGS[name]
    v = (
        open_clip.CLIP(
            embed_dim=32,
            vision_cfg={**VISION, **more, **vision},
            text_cfg=dict(context_length=77, vocab_size=100, width=32, heads=2, layers=1),
            **top,
        )
        .visual.eval()
        .requires_grad_(False)
    )
    rng = np.random.default_rng(seed)
    v.load_state_dict(drawn({k: tuple(t.shape) for k, t in v.state_dict().items()}, rng))
    return v, rng


def normal(rng, *shape):
    return torch.tensor(rng.standard_normal(shape), dtype=torch.float32)


def gap(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item()


def unit(t):
    return t / t.norm(dim=-1, keepdim=True)


@torch.inference_mode()
def whole(v, x):
    "Unit class tokens [B,C] and raw patch tokens [B,N,D] of whole images."
    last = len(v.transformer.resblocks) - 1
    z = forward_paths(v, v._embeds(x), (AttentionPath('qkv'),), (last,))[0]
    return to_stage(v, z)[:, 0], z[:, 1:]


# --- places


@pytest.mark.parametrize(
    'grid,k', [((3, 3), 2), ((4, 6), 3), ((6, 4), 1), ((2, 5), 2), ((5, 5), 5)]
)
def test_places_are_all_windows_row_by_row(grid, k):
    h, w = grid
    want = [
        [(r + i) * w + c + j for i in range(k) for j in range(k)]
        for r in range(h - k + 1)
        for c in range(w - k + 1)
    ]
    assert window_places(grid, k).tolist() == want and window_places(grid, k).dtype == torch.long


def test_a_side_of_the_grid_will_do():
    assert torch.equal(window_places(6, 3), window_places((6, 6), 3))


@pytest.mark.parametrize('k', [0, -1, 4, 99, 2.0, '2', None])
def test_windows_that_do_not_fit_are_refused_by_name(k):
    for f in (lambda: window_places((3, 5), k), lambda: harmonic(torch.ones(1, 8), (3, 5), k)):
        with pytest.raises(ValueError, match=rf'k={k!r}.*3 x 5.*from 1 to 3.*choose'):
            f()


# --- embeddings: compared with open_clip, one window at a time


@pytest.mark.parametrize('name', CONFIGS)
@torch.inference_mode()
def test_a_window_is_encoded_as_if_it_were_alone(name):
    "In float64, where the order of sums does not show; the last steps are float32 (6e-8 each)."
    v, rng = make(name)
    v, x = v.double(), normal(rng, 2, 3, 96, 96).double()
    p = F.unfold(x, 16, stride=16).mT @ v.conv1.weight.flatten(1).T + v.positional_embedding[1:]
    first = v.class_embedding + v.positional_embedding[0]
    for k in (1, 2, 3, 6):
        got = window_tokens(v, x, k)
        tops = list(itertools.product(range(6 - k + 1), repeat=2))
        assert got.shape == (2, len(tops), 32)
        for b, m in {(0, 0), (1, len(tops) - 1), (1, len(tops) // 3)}:
            r, c = tops[m]
            alone = torch.stack(
                [first, *(p[b, (r + i) * 6 + c + j] for i in range(k) for j in range(k))]
            )
            want = unit(v.ln_post(v.transformer(v.ln_pre(alone)[None])[0, 0]) @ v.proj)
            assert gap(got[b, m], want) < 2e-6, (k, b, m)


@torch.inference_mode()
def test_the_largest_window_is_the_image_and_windows_differ():
    v, rng = make()
    x = normal(rng, 2, 3, 96, 96)
    assert gap(window_tokens(v, x, 6)[:, 0], unit(v(x))) < 1e-5
    t = window_tokens(v, x, 2)[0]
    assert gap(t[0], t[1]) > 0.01 and t.std(0).max() > 0.05


@torch.inference_mode()
def test_images_do_not_influence_each_other_and_chunks_change_nothing():
    v, rng = make()
    x = normal(rng, 5, 3, 96, 96)
    t = encode_windows(v, x, (2, 3))
    assert list(t) == [2, 3] and t[2].shape == (5, 25, 32) and t[3].shape == (5, 16, 32)
    for k, whole_batch in t.items():
        assert (
            gap(torch.cat([window_tokens(v, x[i : i + 1], k) for i in range(5)]), whole_batch)
            < 1e-5
        )
        loud = x.clone()
        loud[[0, 1, 2, 4]] *= 100
        assert gap(window_tokens(v, loud, k)[3], whole_batch[3]) < 1e-5
        for chunk in (1, 7, 25, 26, 50, 10**6):
            assert gap(window_tokens(v, x, k, chunk), whole_batch) < 1e-5
        assert gap(window_tokens(v, v._embeds(x), k), whole_batch) < 1e-6


@torch.inference_mode()
def test_no_pass_is_larger_than_a_chunk(monkeypatch):
    import zsad.encoder.windows as module

    v, rng = make()
    x = normal(rng, 4, 3, 96, 96)
    seen, real = [], module.forward_windows
    monkeypatch.setattr(
        module,
        'forward_windows',
        lambda visual, z, first, places: (
            seen.append(len(z) * len(places)) or real(visual, z, first, places)
        ),
    )
    for chunk, sizes in ((10, [10, 10, 5] * 4), (30, [25] * 4), (50, [50, 50]), (None, [100])):
        seen.clear()
        window_tokens(v, x, 2, chunk)
        assert seen == sizes


@torch.inference_mode()
def test_only_its_own_pixels_reach_a_window():
    v, rng = make()
    x = normal(rng, 1, 3, 96, 96)
    y = x.clone()
    y[..., 40, 70] += 9  # row 2, column 4 of the patches
    for k in (2, 3):
        moved = (window_tokens(v, x, k) - window_tokens(v, y, k)).abs().amax(-1)[0] > 1e-4
        assert moved.tolist() == (window_places(6, k) == 2 * 6 + 4).any(1).tolist()


def test_the_model_is_left_alone_and_no_graph_is_kept():
    v, rng = make()
    before = {k: t.clone() for k, t in v.state_dict().items()}
    t = window_tokens(v, normal(rng, 1, 3, 96, 96), 2)
    assert not t.requires_grad and all(torch.equal(before[k], t) for k, t in v.state_dict().items())


def test_what_is_not_images_of_this_encoder_is_refused():
    v, rng = make()
    with pytest.raises(ValueError, match=r'\[2, 5, 64\].*\[B,37,D\].*preprocess'):
        window_tokens(v, normal(rng, 2, 5, 64), 2)
    with pytest.raises(ValueError, match='from 1 to 6'):
        window_tokens(v, normal(rng, 1, 3, 96, 96), 7)
    with pytest.raises(ValueError, match='k=9'):
        encode_windows(v, normal(rng, 1, 3, 96, 96), (2, 9))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@torch.inference_mode()
def test_in_half_precision_tokens_leave_as_unit_float32(dtype):
    e = load_encoder('mini', 'random:1', device='cpu', dtype=dtype)
    x = torch.randn(1, 3, 240, 240, generator=torch.Generator().manual_seed(0))
    t = window_tokens(e.model.visual, x, 3)
    assert (
        t.shape == (1, 169, 128)
        and t.dtype == torch.float32
        and gap(t.norm(dim=-1), torch.ones(1, 169)) < 1e-5
    )
    exact = window_tokens(
        load_encoder('mini', 'random:1', device='cpu', dtype='float32').model.visual, x, 3
    )
    assert (t * exact).sum(-1).min() > (0.9999 if dtype == 'float32' else 0.99)


# --- harmonic means, written out


@pytest.mark.parametrize(
    'grid,k', [((3, 3), 2), ((4, 6), 3), ((6, 4), 1), ((2, 5), 2), ((5, 5), 5), ((5, 7), 4)]
)
def test_harmonic_mean_of_the_windows_that_contain_a_patch(grid, k):
    h, w = grid
    places = window_places(grid, k).tolist()
    s = torch.rand(3, len(places), generator=torch.Generator().manual_seed(k)) + 0.01
    a = harmonic(s, grid, k)
    assert a.shape == (3, h, w)
    for b, i in itertools.product(range(3), range(h * w)):
        mine = [s[b, m].item() for m, p in enumerate(places) if i in p]
        assert abs(a[b, i // w, i % w].item() - len(mine) / sum(1 / t for t in mine)) < 1e-6
    assert gap(harmonic(s[1:2], grid, k), a[1:2]) == 0


def test_harmonic_at_its_limits():
    s = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    assert gap(harmonic(s, (3, 4), 1), s.view(2, 3, 4)) < 1e-6  # side 1: the scores
    assert (
        gap(harmonic(s[:, :1], 4, 4), s[:, :1, None].expand(2, 4, 4)) < 1e-6
    )  # one window: its score everywhere
    zero = torch.full((1, 4), 0.5)
    zero[0, 3] = 0  # the last window covers the lower right 2 x 2
    assert harmonic(zero, 3, 2)[0].tolist() == [[0.5, 0.5, 0.5], [0.5, 0, 0], [0.5, 0, 0]]
    assert torch.equal(harmonic(torch.zeros(2, 4), 3, 2), torch.zeros(2, 3, 3))
    tiny = harmonic(torch.full((1, 4), 1e-30), 3, 2)
    assert torch.isfinite(tiny).all() and (tiny > 0).all()


@pytest.mark.parametrize('shape', [(4,), (1, 5), (1, 3), (1, 2, 2), (1, 4, 1)])
def test_scores_that_do_not_fit_are_refused(shape):
    with pytest.raises(
        ValueError, match=r'scores: .*side 2 on a grid of 3 x 3.*\[B,4\].*window_tokens'
    ):
        harmonic(torch.ones(shape), 3, 2)


def test_scales_and_the_image_score_are_one_harmonic_mean():
    g = torch.Generator().manual_seed(1)
    maps, score = (
        [torch.rand(2, 3, 4, generator=g) + 0.01 for _ in range(3)],
        torch.rand(2, generator=g) + 0.01,
    )
    for n in (1, 2, 3):
        a = harmonic_scales(maps[:n], score)
        for b, i, j in itertools.product(range(2), range(3), range(4)):
            assert (
                abs(
                    a[b, i, j].item()
                    - (n + 1) / (sum(1 / m[b, i, j].item() for m in maps[:n]) + 1 / score[b].item())
                )
                < 1e-6
            )
    zero = maps[0].clone()
    zero[0, 1, 1] = 0
    zero[1, 0, 0] = float('nan')
    a = harmonic_scales([zero, maps[1]], score)
    assert a[0, 1, 1] == 0 and a[1, 0, 0].isnan() and a.isnan().sum() == 1 and (a > 0).sum() == 22
    assert torch.equal(harmonic_scales(maps[:2], torch.zeros(2)), torch.zeros(2, 3, 4))


def test_nan_windows_give_nan_patches():
    "A window that cannot be scored must not look like a sound one: NaN in, NaN out."
    windows = {
        2: unit(normal(np.random.default_rng(0), 1, 4, 7)),
        3: unit(normal(np.random.default_rng(1), 1, 1, 7)),
    }
    pair, score = unit(normal(np.random.default_rng(2), 2, 7)), torch.tensor([0.5])
    broken = {**windows, 2: windows[2].clone()}
    broken[2][0, 0] = float('nan')  # covers the upper left 2 x 2
    covered = torch.tensor([[[True, True, False], [True, True, False], [False, False, False]]])
    assert torch.equal(harmonic(anomaly_score(broken[2], pair, 0.07), 3, 2).isnan(), covered)
    assert torch.equal(zero_shot_map(broken, score, pair, (3, 3)).isnan(), covered)
    assert zero_shot_map(windows, score * float('nan'), pair, (3, 3)).isnan().all()
    patches = unit(normal(np.random.default_rng(3), 1, 9, 7))
    memory = build_memory_bank(windows, patches)
    assert torch.equal(few_shot_map(broken, patches, memory, (3, 3)).isnan(), covered)
    assert few_shot_map(windows, patches * float('nan'), memory, (3, 3)).isnan().all()
    assert few_shot_map(windows, patches, build_memory_bank(broken, patches), (3, 3)).isnan().all()
    assert association(patches, memory['patch'] * float('nan')).isnan().all()


# --- references


def test_association_is_half_of_one_minus_the_largest_cosine():
    rng = np.random.default_rng(0)
    x, r = normal(rng, 2, 5, 7), 3 * normal(rng, 11, 7)
    a = association(x, r)
    for b, m in itertools.product(range(2), range(5)):
        assert (
            abs(
                a[b, m].item()
                - min((1 - float(x[b, m] @ t / (x[b, m].norm() * t.norm()))) / 2 for t in r)
            )
            < 1e-6
        )
    for chunk in (1, 10, 35, 10**6):
        assert gap(association(x, r, chunk), a) < 1e-6
    assert (
        gap(
            association(
                5 * x, r * torch.rand(11, 1, generator=torch.Generator().manual_seed(0)).add(0.1)
            ),
            a,
        )
        < 1e-6
    )  # lengths do not count
    assert gap(association(x[1:], r), a[1:]) < 1e-6
    assert gap(association(-r[None], r[:1])[0, :1], torch.ones(1)) < 1e-6  # opposite: 1


def test_a_feature_in_memory_is_at_distance_zero_and_never_below():
    x = normal(np.random.default_rng(1), 3, 400, 33)
    a = association(x, x.flatten(0, 1))
    assert a.min() >= 0 and a.max() < 1e-6
    h = harmonic(a[:, :361], 20, 2)
    assert torch.isfinite(h).all() and (h >= 0).all() and h.max() < 1e-6


def test_memories_that_do_not_fit_are_refused():
    x = torch.ones(2, 5, 7)
    for bad in (torch.ones(0, 7), torch.ones(3, 6), torch.ones(1, 3, 7), torch.ones(7)):
        with pytest.raises(ValueError, match=r'memory: .*\[2, 5, 7\].*\[R,7\].*reference'):
            association(x, bad)
    w, m = (
        {2: torch.ones(1, 4, 7)},
        build_memory_bank({3: torch.ones(1, 1, 7)}, torch.ones(1, 9, 7)),
    )
    with pytest.raises(
        ValueError, match=r"memory: has \[3, 'patch'\].*\[2, 'patch'\].*build_memory_bank"
    ):
        few_shot_map(w, torch.ones(1, 9, 7), m, 3)


@torch.inference_mode()
def test_few_shot_map_is_the_mean_over_memories_and_more_references_never_raise_it():
    v, rng = make()
    x, refs = normal(rng, 2, 3, 96, 96), normal(rng, 4, 3, 96, 96)
    w, rw, p, rp = encode_windows(v, x), encode_windows(v, refs), whole(v, x)[1], whole(v, refs)[1]
    m = few_shot_map(w, p, build_memory_bank(rw, rp), (6, 6))
    parts = [harmonic(association(w[k], torch.cat(list(rw[k]))), 6, k) for k in (2, 3)] + [
        association(p, torch.cat(list(rp))).view(2, 6, 6)
    ]
    assert gap(m, sum(parts) / 3) < 1e-6
    fewer = few_shot_map(w, p, build_memory_bank({k: t[:1] for k, t in rw.items()}, rp[:1]), (6, 6))
    assert (m <= fewer + 1e-6).all() and gap(m, fewer) > 0.01
    assert (
        gap(
            few_shot_map(
                {k: t[1:] for k, t in w.items()},
                p[1:],
                build_memory_bank(rw, rp),
                (6, 6),
                chunk=300,
            ),
            m[1:],
        )
        < 1e-6
    )
    with_first = few_shot_map(
        w,
        p,
        build_memory_bank({k: torch.cat([rw[k], w[k][:1]]) for k in w}, torch.cat([rp, p[:1]])),
        (6, 6),
    )
    assert with_first[0].max() < 1e-5 and with_first[1].min() > 0.01
    posts = v.ln_post(p), v.ln_post(rp)  # the other choice of features gives another map
    assert gap(few_shot_map(w, posts[0], build_memory_bank(rw, posts[1]), (6, 6)), m) > 1e-3


def test_references_are_drawn_by_key():
    names = [f'train/good/{i:03}.png' for i in range(30)]
    four = choose_references(names, 4, 3, 'pill')
    assert len(set(four)) == 4 and set(four) <= set(names)
    assert choose_references(names[::-1], 4, 3, 'pill') == four and [
        choose_references(names, k, 3, 'pill') for k in (1, 2)
    ] == [four[:1], four[:2]]
    assert four != choose_references(names, 4, 4, 'pill') and four != choose_references(
        names, 4, 3, 'bottle'
    )
    assert sorted(choose_references(names, 30)) == names
    twice = choose_references(names, 60, replace=True)
    assert (
        len(twice) == 60
        and len(set(twice)) < 30
        and choose_references(names, 5, replace=True) == choose_references(names, 5, replace=True)
    )
    seen = {choose_references(names, 1, s)[0] for s in range(400)}
    assert len(seen) == 30  # every image has its chance
    for k in (0, -1, 31, 2.5, None):
        with pytest.raises(
            ValueError, match=rf"k={k!r}.*30 images of 'pill'.*1 to 30.*fewer shots"
        ):
            choose_references(names, k, 0, 'pill')
    for replace in (True, False):
        with pytest.raises(ValueError, match='0 images'):
            choose_references([], 1, replace=replace)


# --- the whole line


def test_sentences_are_those_of_the_prompt_sets():
    good, bad = compose(PROMPTS['winclip'], 'bottle')
    assert (
        len(good),
        len(bad),
        len(PROMPTS['winclip'].templates),
        len(PROMPTS['winclip@code'].templates),
    ) == (154, 88, 22, 21)
    assert (
        all(s.endswith('.') for s in good + bad)
        and 'a cropped photo of a bottle.' in good
        and 'a photo of the damaged bottle for visual inspection.' in bad
    )
    assert PROMPTS['winclip'].average == PROMPTS['winclip@code'].average == 'raw'


@torch.inference_mode()
def test_each_image_is_asked_with_its_own_sentences():
    v, rng = make()
    x = normal(rng, 3, 3, 96, 96)
    pair = unit(normal(rng, 3, 2, 32))
    w, cls = encode_windows(v, x), whole(v, x)[0]
    a = zero_shot_map(w, anomaly_score(cls, pair, 0.07), pair, (6, 6))
    for i in range(3):
        alone = {k: t[i : i + 1] for k, t in w.items()}
        assert (
            gap(
                zero_shot_map(alone, anomaly_score(cls[i : i + 1], pair[i], 0.07), pair[i], (6, 6)),
                a[i : i + 1],
            )
            < 1e-5
        )
        p = torch.softmax(w[2][i] @ pair[i].T / 0.07, -1)[:, 1]
        assert gap(anomaly_score(w[2], pair, 0.07)[i], p) < 1e-5
    assert gap(a, zero_shot_map(w, anomaly_score(cls, pair, 0.07), pair, (6, 6), tau=1.0)) > 0.05


NUMBERS = dict(
    score=[0.8805336, 0.6133710, 0.9630343],
    ascore=[0.4987957, 0.4237490, 0.5790114],
    w2=[
        -0.1942594,
        -0.2536407,
        -0.0428747,
        0.1523995,
        0.0510087,
        -0.2348188,
        -0.1564006,
        0.1857204,
    ],  # image 0, window 7
    w3=[
        -0.5302039,
        0.1393344,
        0.1043589,
        0.2338410,
        -0.0340761,
        -0.0765411,
        0.0491503,
        0.1348489,
    ],  # image 1, window 5
    m0=[
        [
            [0.2870834, 0.4403249, 0.5549593, 0.7742989, 0.7418147, 0.7943220],
            [0.1980891, 0.3227515, 0.6545900, 0.8438530, 0.8076720, 0.8291373],
            [0.2083261, 0.3351033, 0.7072358, 0.8973040, 0.8624134, 0.8500391],
            [0.6638771, 0.7761484, 0.8899244, 0.9408228, 0.9368365, 0.9371070],
            [0.8138674, 0.8533261, 0.8907364, 0.9454679, 0.9223597, 0.8989463],
            [0.8200526, 0.8354563, 0.8829959, 0.9436263, 0.9004533, 0.8642054],
        ],
        [
            [0.8181197, 0.8154006, 0.8154116, 0.8158974, 0.7841961, 0.7658204],
            [0.8169463, 0.8174750, 0.8087300, 0.7752679, 0.7429992, 0.7153715],
            [0.8131709, 0.8182223, 0.8132590, 0.7884913, 0.7744939, 0.7642325],
            [0.8112325, 0.8150486, 0.8019384, 0.7792678, 0.7688872, 0.7587116],
            [0.7991542, 0.8092988, 0.7998412, 0.7974719, 0.8030098, 0.8090651],
            [0.7933710, 0.8076838, 0.7974349, 0.7957265, 0.7982063, 0.8021784],
        ],
    ],
    few=[
        [
            [0.1080022, 0.1140701, 0.0672667, 0.0758636, 0.1051335, 0.1118475],
            [0.0621368, 0.0512218, 0.0826173, 0.0547322, 0.0696581, 0.0738092],
            [0.0866736, 0.0784870, 0.0671284, 0.0559055, 0.0673281, 0.0993655],
            [0.0767222, 0.0690500, 0.0639328, 0.0907538, 0.0989377, 0.0931765],
            [0.0971803, 0.0917498, 0.0766004, 0.1034742, 0.0920235, 0.1024571],
            [0.0724587, 0.0978341, 0.0709759, 0.1038400, 0.0775069, 0.1170577],
        ],
        [
            [0.1934639, 0.2186386, 0.1959469, 0.2193636, 0.2124901, 0.2341270],
            [0.1720366, 0.1785062, 0.1870596, 0.1994932, 0.2208404, 0.2054546],
            [0.2263930, 0.2036452, 0.1611597, 0.1953274, 0.2093341, 0.2266855],
            [0.1820010, 0.1676301, 0.1607674, 0.1819092, 0.1972173, 0.2083379],
            [0.1775184, 0.1696142, 0.1678326, 0.1614955, 0.1541817, 0.1844359],
            [0.2259929, 0.1819171, 0.1770302, 0.1851120, 0.1463142, 0.1751451],
        ],
    ],
)


@torch.inference_mode()
def test_numbers_of_accurate_winclip():
    v, rng = make()
    x, refs = normal(rng, 3, 3, 96, 96), normal(rng, 2, 3, 96, 96)
    refs[0] = 0.8 * x[0] + 0.2 * refs[0]  # a reference that resembles the first image
    pair = unit(normal(rng, 2, 32))
    want = {k: torch.tensor(t) for k, t in NUMBERS.items()}
    w, (cls, p), (_, rp) = encode_windows(v, x), whole(v, x), whole(v, refs)
    score = anomaly_score(cls, pair, 0.07)
    assert gap(score, want['score']) < 1e-5
    assert gap(w[2][0, 7, :8], want['w2']) < 1e-5 and gap(w[3][1, 5, :8], want['w3']) < 1e-5
    m0 = zero_shot_map(w, score, pair, v.grid_size)
    assert gap(m0[:2], want['m0']) < 1e-5
    m = few_shot_map(w, p, build_memory_bank(encode_windows(v, refs), rp), v.grid_size)
    assert gap(m[:2], want['few']) < 1e-5
    final = (score + m.flatten(1).amax(1)) / 2
    assert gap(final, want['ascore']) < 1e-5 and gap((m0 + m)[:2], want['m0'] + want['few']) < 1e-5

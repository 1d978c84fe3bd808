"""Mutual scoring against loops in double precision, and the numbers of the public code.

Nothing is downloaded. NUMBERS were computed by MuSc (xrli-U/MuSc, commit b76b93d) on the tokens
that `draw` makes, distances in double precision.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zsad.methods import musc
from zsad.methods.musc import (
    aggregate,
    box_products,
    box_sums,
    interval_average,
    musc_map,
    mutual_scores,
    patch_distances,
    rscin,
    shared_distances,
    split_subsets,
)


def normal(rng, *shape):
    return torch.tensor(rng.standard_normal(shape), dtype=torch.float32)


def gap(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item()


def unit(t):
    return t / t.norm(dim=-1, keepdim=True)


def draw(M=12, h=6, D=24, L=2, C=16, seed=2604):
    "Tokens [L,M,N,D], two images with an odd place, the last like number 3; class tokens [M,C]."
    rng = np.random.default_rng(seed)
    layers = 2 * normal(rng, L, 1, h * h, D) + normal(rng, L, M, h * h, D) + 0.5
    layers[:, 0, 7:9] += 6 * normal(rng, L, 2, D)
    layers[:, 1, 20:23] += 3 * normal(rng, L, 3, D)
    layers[:, 11] = layers[:, 3] + 1e-3 * normal(rng, L, h * h, D)
    return layers, F.normalize(1.5 * normal(rng, C) + normal(rng, M, C), dim=-1)


def nearest(a, b):
    "Distances [N] from patches a to the nearest of b, by differences, in double precision."
    return (a.double()[:, None] - b.double()[None]).norm(dim=-1).amin(1)


# --- neighbourhoods


@pytest.mark.parametrize(
    'grid,r', [((4, 6), 1), ((4, 6), 3), ((6, 5), 5), ((3, 3), 3), ((1, 7), 1)]
)
def test_a_patch_is_the_mean_of_its_neighbourhood_in_the_joint_norm(grid, r):
    h, w = grid
    D = 7
    x = 3 * normal(np.random.default_rng(r), 2, h * w, D) + 1
    got = aggregate(x, grid, r)
    for m in range(2):
        p = x[m].double()
        z = ((p - p.mean()) / (p.var(correction=0) + 1e-5).sqrt()).view(h, w, D)
        for i, j in itertools.product(range(h), range(w)):
            around = [
                z[a, b]
                for a in range(i - r // 2, i + r // 2 + 1)
                for b in range(j - r // 2, j + r // 2 + 1)
                if 0 <= a < h and 0 <= b < w
            ]
            assert (got[m, i * w + j] - unit(sum(around) / r**2)).abs().max() < 1e-5


@pytest.mark.parametrize('r', [1, 3, 5])
def test_mean_pooling_is_what_unfolding_and_adaptive_pooling_come_to(r):
    x = normal(np.random.default_rng(0), 3, 30, 11)
    z = F.layer_norm(x, (30, 11)).mT.reshape(3, 11, 5, 6)
    written_out = F.unfold(z, r, padding=(r - 1) // 2).mT.reshape(
        90, 1, 11 * r * r
    )  # channels first, then the neighbourhood
    assert (
        gap(aggregate(x, (5, 6), r), unit(F.adaptive_avg_pool1d(written_out, 11).view(3, 30, 11)))
        < 1e-6
    )


def test_the_norm_moves_the_origin_and_nothing_else():
    x = normal(np.random.default_rng(1), 4, 25, 9)
    assert gap(aggregate(x, (5, 5), 3), aggregate(50 * x - 7, (5, 5), 3)) < 1e-5
    assert gap(aggregate(x, (5, 5)), unit(x - x.mean((1, 2), keepdim=True))) < 1e-6
    assert gap(aggregate(x, (5, 5)), unit(x)) > 0.01  # it does do something
    assert (
        gap(aggregate(x, (5, 5)), unit(F.layer_norm(x, (9,)))) > 0.01
    )  # and is not the norm of each patch


def test_images_are_aggregated_one_by_one_and_left_alone():
    x = normal(np.random.default_rng(2), 4, 30, 8)
    before = x.clone()
    a = aggregate(x, (5, 6), 3)
    assert gap(
        torch.cat([aggregate(x[i : i + 1], (5, 6), 3) for i in range(4)]), a
    ) < 1e-6 and torch.equal(x, before)
    assert (
        gap(aggregate(x.view(2, 2, 30, 8), (5, 6), 3).view(4, 30, 8), a) < 1e-6
    )  # references come as [M,R,N,D]
    loud = x.clone()
    loud[1:] *= 100
    loud[1:] += 5
    assert gap(aggregate(loud, (5, 6), 3)[0], a[0]) < 1e-6
    assert gap(a.norm(dim=-1), torch.ones(4, 30)) < 1e-6


def test_half_precision_is_widened_and_double_kept():
    x = normal(np.random.default_rng(3), 2, 9, 8)
    assert [
        aggregate(x.to(t), (3, 3)).dtype
        for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    ] == [torch.float32] * 3 + [torch.float64]
    assert gap(aggregate(x.half(), (3, 3), 3), aggregate(x.half().float(), (3, 3), 3)) == 0


@pytest.mark.parametrize('r', [0, 2, 4, -1, 5, 1.0, None])
def test_neighbourhoods_without_a_centre_or_beyond_the_grid_are_refused(r):
    with pytest.raises(ValueError, match=rf'r={r!r}.*4 x 6.*odd number from 1 to 4.*choose'):
        aggregate(torch.ones(1, 24, 2), (4, 6), r)


@pytest.mark.parametrize('shape', [(1, 25, 2), (24, 2), (1, 2, 24)])
def test_tokens_that_are_not_of_the_grid_are_refused(shape):
    with pytest.raises(ValueError, match=r'tokens: .*4 x 6.*\[M,24,D\].*class token'):
        aggregate(torch.ones(shape), (4, 6))


# --- distances


@pytest.mark.parametrize('M,N,D', [(2, 5, 3), (5, 12, 24), (7, 1, 4)])
def test_distance_to_the_nearest_patch_of_each_other_image(M, N, D):
    f = unit(normal(np.random.default_rng(M), M, N, D))
    before = f.clone()
    d = patch_distances(f)
    assert d.shape == (M, M - 1, N) and d.dtype == torch.float32 and torch.equal(f, before)
    for i in range(M):
        assert gap(d[i], torch.stack([nearest(f[i], f[j]) for j in range(M) if j != i])) < 1e-5
    for chunk in (1, N * N, 3 * N * N - 1, 3 * N * N, 10**9):
        assert gap(patch_distances(f, chunk=chunk), d) < 1e-6


def test_a_pair_is_multiplied_once_and_no_product_is_larger_than_a_chunk(monkeypatch):
    f, seen, real = (
        unit(normal(np.random.default_rng(0), 6, 4, 3)),
        [],
        musc.nearest_patch_distances,
    )
    monkeypatch.setattr(
        musc, 'nearest_patch_distances', lambda a, b: seen.append(len(a)) or real(a, b)
    )
    for chunk, sizes in (
        (1, [1] * 15),
        (32, [2, 2, 1, 2, 2, 2, 1, 2, 1]),
        (50, [3, 2, 3, 1, 3, 2, 1]),
        (None, [5, 4, 3, 2, 1]),
    ):
        seen.clear()
        patch_distances(f, chunk=chunk)
        assert seen == sizes and sum(seen) == 15
    seen.clear()
    patch_distances(f, f[:5, :2], chunk=16)
    assert seen == [2, 2, 1] * 6


def test_references_for_all_and_for_each():
    rng = np.random.default_rng(4)
    f, o, each = (
        unit(normal(rng, 4, 6, 5)),
        unit(normal(rng, 3, 9, 5)),
        unit(normal(rng, 4, 2, 7, 5)),
    )
    d, e = patch_distances(f, o), patch_distances(f, each)
    assert d.shape == (4, 3, 6) and e.shape == (4, 2, 6)
    for i in range(4):
        assert (
            gap(d[i], torch.stack([nearest(f[i], t) for t in o])) < 1e-5
            and gap(e[i], torch.stack([nearest(f[i], t) for t in each[i]])) < 1e-5
        )
        assert (
            gap(patch_distances(f[i : i + 1], o)[0], d[i]) < 1e-6
            and gap(patch_distances(f[i : i + 1], each[i : i + 1])[0], e[i]) < 1e-6
        )
    assert gap(patch_distances(f, o.expand(4, 3, 9, 5)), d) < 1e-6
    remaining = torch.stack([torch.cat([f[:i], f[i + 1 :]]) for i in range(4)])
    assert (
        gap(patch_distances(f, remaining), patch_distances(f)) < 1e-6
    )  # the others of the set, handed in
    assert gap(patch_distances(f, chunk=1), patch_distances(f, remaining, chunk=1)) < 1e-6


@pytest.mark.parametrize('D', [24, 192, 896])
def test_every_distance_is_right_however_near_the_patches_are(D):
    rng = np.random.default_rng(D)
    base = normal(rng, 16, D) + 2 * normal(rng, D)
    steps = torch.logspace(-7, 0, 15)[:, None, None]
    f = unit(torch.cat([base[None], base + steps * normal(rng, 15, 16, D)]))
    d = patch_distances(f)
    true = torch.stack(
        [
            torch.stack(
                [nearest(unit(f[i].double()), unit(f[j].double())) for j in range(16) if j != i]
            )
            for i in range(16)
        ]
    )
    assert true.min() < 1e-5 and true.max() > 0.3 and gap(d, true) < 1e-4
    assert (
        gap(
            patch_distances(f, f[:1])[:, 0],
            torch.stack([nearest(unit(t.double()), unit(f[0].double())) for t in f]),
        )
        < 1e-4
    )


def test_float32_alone_would_not_do():
    "The bound of the test before is missed by the plain product, so that it is known to be tight."
    f = unit(normal(np.random.default_rng(5), 400, 192) + 3)
    assert (2 - 2 * (f * f).sum(-1)).clamp(min=0).sqrt().max() > 2e-4 and patch_distances(
        f[None], f[None]
    ).max() < 1e-7


def test_equal_images_are_at_distance_zero_and_opposite_ones_at_two():
    f = unit(normal(np.random.default_rng(6), 1, 9, 33)).expand(4, 9, 33)
    assert patch_distances(f).max() < 1e-7 and patch_distances(f).min() >= 0
    one = unit(torch.ones(1, 1, 4))
    assert gap(patch_distances(torch.cat([one, -one])), torch.full((2, 1, 1), 2.0)) < 1e-6


def test_the_order_of_images_and_patches_does_not_matter():
    rng = np.random.default_rng(7)
    f = unit(normal(rng, 6, 8, 5))
    s = mutual_scores(f)
    p, q = torch.tensor(rng.permutation(6)), torch.tensor(rng.permutation(8))
    assert gap(mutual_scores(f[p]), s[p]) < 1e-6 and gap(mutual_scores(f[:, q]), s[:, q]) < 1e-6
    assert (
        gap(mutual_scores(f @ torch.linalg.qr(normal(rng, 5, 5))[0]), s) < 1e-5
    )  # nor does a rotation


def test_sets_and_features_that_cannot_be_scored_are_refused():
    f = unit(torch.ones(3, 4, 5))
    for bad in (f[:1], f[:0], f[0], f[:, :0]):
        with pytest.raises(ValueError, match=r'features: .*\[M,N,D\].*at least 2.*others'):
            mutual_scores(bad)
    for o in (f[..., :4], f[0], f[:0], f[None], torch.ones(2, 1, 4, 5)):
        with pytest.raises(ValueError, match=r'others: .*\[3, 4, 5\].*\[R,P,5\].*\[3,R,P,5\]'):
            mutual_scores(f, o)
    long, nan = f.clone(), f.clone()
    long[1] *= 2
    nan[2, 3, 0] = math.nan
    for bad, who in ((long, r'\[1\]'), (nan, r'\[2\]'), (0 * f, r'\[0, 1, 2\]')):
        with pytest.raises(ValueError, match=rf'features: .*image {who}.*unit length.*aggregate'):
            mutual_scores(bad)
        with pytest.raises(ValueError, match=rf'others: .*image {who}.*unit length'):
            mutual_scores(f, bad)


# --- how many count


def test_the_lowest_share_and_one_at_least():
    rng = np.random.default_rng(8)
    for R, share in itertools.product((1, 2, 3, 4, 9, 10, 11), (0.01, 0.1, 0.3, 0.5, 0.99, 1)):
        d = torch.tensor(rng.random((2, R, 3)), dtype=torch.float32)
        got = interval_average(d, share)
        for i, n in itertools.product(range(2), range(3)):
            low = sorted(d[i, :, n].tolist())[: max(1, int(share * R))]
            assert abs(got[i, n].item() - sum(low) / len(low)) < 1e-6
    assert (
        gap(interval_average(d, 1), d.mean(1)) < 1e-6
        and gap(interval_average(d, 1e-9), d.amin(1)) == 0
    )


@pytest.mark.parametrize('M', [2, 3, 4, 5, 6, 8])
def test_small_sets_have_finite_maps(M):
    f = unit(normal(np.random.default_rng(M), M, 5, 4))
    a = mutual_scores(f)
    assert a.shape == (M, 5) and torch.isfinite(a).all() and (a > 0).all()
    assert gap(a, patch_distances(f).sort(1).values[:, : max(1, int(0.3 * (M - 1)))].mean(1)) < 1e-6


@pytest.mark.parametrize('share', [0, -0.1, 1.01, 30, math.nan])
def test_a_share_is_a_part(share):
    with pytest.raises(ValueError, match=rf'share={share!r}.*above 0 and up to 1'):
        interval_average(torch.ones(2, 3, 4), share)


# --- layers and neighbourhoods


def test_a_map_is_the_mean_over_layers_and_neighbourhoods():
    layers, _ = draw()
    layers = layers[:, :5]
    a = musc_map(layers, (6, 6), (1, 5), 0.5)
    assert (
        gap(
            a,
            torch.stack(
                [mutual_scores(aggregate(z, (6, 6), r), share=0.5) for z in layers for r in (1, 5)]
            ).mean(0),
        )
        < 1e-6
    )
    assert (
        gap(musc_map(layers[:1], (6, 6), (3,)), mutual_scores(aggregate(layers[0], (6, 6), 3))) == 0
    )
    for other in (
        musc_map(layers[:1], (6, 6)),
        musc_map(layers, (6, 6), (1,)),
        musc_map(layers, (6, 6), share=1),
    ):
        assert gap(other, musc_map(layers, (6, 6))) > 1e-3
    assert gap(musc_map(layers, (6, 6), chunk=1), musc_map(layers, (6, 6))) < 1e-6
    assert (
        musc_map(layers.double(), (6, 6)).dtype == torch.float64
        and gap(musc_map(layers.double(), (6, 6)), musc_map(layers, (6, 6))) < 1e-5
    )


def test_layers_may_come_one_by_one():
    layers, _ = draw()
    requested = []

    def lazily(t):
        for l, z in enumerate(t):
            requested.append(l)
            yield z

    assert gap(musc_map(lazily(layers), (6, 6)), musc_map(layers, (6, 6))) == 0 and requested == [
        0,
        1,
    ]
    assert gap(musc_map(list(layers), (6, 6)), musc_map(layers, (6, 6))) == 0
    assert (
        gap(
            musc_map(lazily(layers[:, :3]), (6, 6), others=lazily(layers[:, 3:])),
            musc_map(layers[:, :3], (6, 6), others=layers[:, 3:]),
        )
        == 0
    )


def test_a_batch_with_references_is_its_images_one_by_one():
    layers, _ = draw()
    x, o, each = layers[:, :4], layers[:, 4:7], layers[:, 4:].unflatten(1, (4, 2))
    for refs, references_of in ((o, lambda i: o), (each, lambda i: each[:, i : i + 1])):
        a = musc_map(x, (6, 6), others=refs)
        assert (
            a.shape == (4, 36)
            and gap(
                torch.cat(
                    [musc_map(x[:, i : i + 1], (6, 6), others=references_of(i)) for i in range(4)]
                ),
                a,
            )
            < 1e-6
        )
        assert (
            gap(
                musc_map(x[:, [2, 0]], (6, 6), others=refs[:, [2, 0]] if refs is each else refs),
                a[[2, 0]],
            )
            < 1e-6
        )


def test_one_reference_is_that_reference():
    layers, _ = draw()
    partner = [1, 2, 3, 0]
    x = layers[:, :4]
    a = musc_map(x, (6, 6), others=x[:, partner, None])
    for i, j in enumerate(partner):
        assert gap(a[i : i + 1], musc_map(layers[:, [i]], (6, 6), others=layers[:, [j]])) < 1e-6
    for share in (0.01, 1):
        assert gap(musc_map(x, (6, 6), share=share, others=x[:, partner, None]), a) == 0
    assert gap(musc_map(x[:, :2], (6, 6))[0], a[0]) < 1e-6  # a set of two is a pair
    assert musc_map(x, (6, 6), others=x[:, :, None]).max() < 1e-6  # its own reference
    assert (
        a
        >= musc_map(
            x,
            (6, 6),
            others=x[:, [1, 2, 3, 0, 1, 2, 3, 0]].unflatten(1, (2, 4)).transpose(1, 2),
            share=0.5,
        )
        - 1e-6
    ).all()


def test_an_odd_place_stands_out_although_half_of_the_set_has_it():
    rng = np.random.default_rng(9)
    x = 2 * normal(rng, 1, 1, 36, 24) + 0.3 * normal(rng, 1, 12, 36, 24)
    for i in range(6):
        x[0, i, 6 * i] += 6 * normal(rng, 24)
    assert musc_map(x, (6, 6)).argmax(1)[:6].tolist() == [6 * i for i in range(6)]


def test_layers_that_do_not_go_together_are_named():
    layers = draw()[0][:, :3]
    with pytest.raises(ValueError, match='fewer layers.*same layers'):
        musc_map(layers, (6, 6), others=layers[:1])
    with pytest.raises(ValueError, match='more layers.*same layers'):
        musc_map(layers[:1], (6, 6), others=layers)
    with pytest.raises(ValueError, match='at least one layer and one scale'):
        musc_map(layers[:0], (6, 6))
    with pytest.raises(ValueError, match='0 scales'):
        musc_map(layers, (6, 6), ())
    with pytest.raises(ValueError, match=r'\[1, 36, 24\].*at least 2.*others'):
        musc_map(layers[:, :1], (6, 6))


# --- one product for all neighbourhoods


def every_scale(tokens, grid, scales, others=None):
    "Distances of each neighbourhood from its own product."
    return torch.stack(
        [
            patch_distances(
                aggregate(tokens, grid, r), None if others is None else aggregate(others, grid, r)
            )
            for r in scales
        ]
    )


@pytest.mark.parametrize('grid', [(4, 6), (7, 5)])
@pytest.mark.parametrize('r', [1, 3, 5])
def test_sums_of_products_are_products_of_sums(grid, r):
    r = min(r, 3) if min(grid) < 5 else r
    h, w = grid
    a, b = normal(np.random.default_rng(r), 2, 3, h * w, 11)
    near = torch.tensor(
        [
            [max(abs(p // w - q // w), abs(p % w - q % w)) <= r // 2 for q in range(h * w)]
            for p in range(h * w)
        ]
    ).double()  # P_r
    want = near @ (a.double() @ b[0].double().T) @ near.T
    assert gap(box_sums(a, grid, r), (near @ a.double())) < 1e-5
    assert gap(box_products(a @ b[0].T, grid, r), want) < 1e-4
    padded = F.pad(a @ b[0].T, (0, 3))[..., : h * w]
    assert gap(box_products(padded, grid, r), want) < 1e-4


@pytest.mark.parametrize('D', [24, 256, 896])
@pytest.mark.parametrize('scales', [(1, 3, 5), (5, 1), (3, 3)])
def test_shared_products_give_the_distances_of_separate_ones(D, scales):
    x = draw(D=D)[0][0, [0, 1, 3, 4, 5, 6, 11]]  # the last is near the third
    d = shared_distances(x, (6, 6), scales)
    assert d.shape == (len(scales), 7, 6, 36)
    assert gap(d, every_scale(x, (6, 6), scales)) < 5e-6
    for chunk in (1, 3 * 36 * 36, 10**9):
        assert gap(shared_distances(x, (6, 6), scales, chunk=chunk), d) < 5e-6
    for others in (x[2:4], x[[1, 2, 3, 4, 5, 6, 0]][:, None], x[:, None].expand(7, 2, 36, D)):
        want = every_scale(x, (6, 6), scales, others)
        assert gap(shared_distances(x, (6, 6), scales, others), want) < 5e-6


def test_near_patches_are_measured_by_their_difference_at_every_neighbourhood():
    x = draw(D=320)[0][0, [3, 11, 5]]
    x = torch.cat([x, x[:1] + 1e-5 * normal(np.random.default_rng(0), 1, 36, 320)])
    d = shared_distances(x, (6, 6), (1, 3, 5))
    want = torch.stack(
        [nearest(*(unit(aggregate(x.double(), (6, 6), r))[[0, 3]])) for r in (1, 3, 5)]
    )
    assert want.max() < 1e-4 and gap(d[:, 0, 2], want) < 1e-6 and gap(d[:, 3, 0], want) < 1e-6


def test_which_widths_share_products(monkeypatch):
    seen, real = [], musc.shared_distances

    def spy(tokens, *args):
        seen.append(tokens.shape[-1])
        return real(tokens, *args)

    monkeypatch.setattr(musc, 'shared_distances', spy)
    for D in (192, 383, 384, 896):
        x = draw(D=D)[0][:, :4]
        a = musc_map(x, (6, 6))
        want = [mutual_scores(aggregate(z, (6, 6), r)) for z in x for r in (1, 3, 5)]
        assert gap(a, torch.stack(want).mean(0)) < 2e-6
        musc_map(x, (6, 6), (3,))
        others = musc_map(x[:, :2], (6, 6), others=x[:, 2:])
        assert gap(musc_map((z for z in x[:, :2]), (6, 6), others=x[:, 2:]), others) == 0
    assert seen == [384] * 6 + [896] * 6


def test_shared_products_refuse_what_separate_ones_do():
    x = draw(D=384)[0][:, :3]
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[0, 1, 4, 2] = bad
        with pytest.raises(ValueError, match=r'features: patches of image \[1\].*unit length'):
            musc_map(broken, (6, 6))
        with pytest.raises(ValueError, match=r'others: patches of image \[1\].*unit length'):
            musc_map(x, (6, 6), others=broken)
    flat = x.clone()
    flat[1, 2] = 0.5
    with pytest.raises(ValueError, match=r'features: patches of image \[2\].*unit length'):
        musc_map(flat, (6, 6))
    with pytest.raises(ValueError, match='odd number from 1 to 6'):
        musc_map(x, (6, 6), (1, 2))
    with pytest.raises(ValueError, match=r'\[1, 36, 384\].*at least 2'):
        musc_map(x[:, :1], (6, 6))
    with pytest.raises(ValueError, match='without the class token'):
        musc_map(x, (6, 6), others=x[:, :, :35])


# --- RsCIN


def by_hand(scores, cls, ks):
    "RsCIN one image at a time."
    s = [float(v) for v in scores]
    lo, hi = min(s), max(s)
    s = [(v - lo) / (hi - lo) for v in s]
    out = []
    for i in range(len(s)):
        w = [float(cls[i].double() @ cls[j].double()) for j in range(len(s))]
        near = sorted(range(len(s)), key=lambda j: (j != i, -w[j]))
        out.append(
            sum(sum(w[j] * s[j] for j in near[:k]) / sum(w[j] for j in near[:k]) for k in ks)
            / len(ks)
        )
    return torch.tensor(out)


@pytest.mark.parametrize('ks', [(1,), (2,), (1, 2, 3), (1, 8, 9), (9, 1), (2, 2), [1, 2]])
def test_scores_listen_to_the_images_that_resemble_them(ks):
    _, cls = draw(20)
    scores = torch.rand(20, generator=torch.Generator().manual_seed(1)) + 3
    before = scores.clone(), cls.clone()
    c = rscin(scores, cls, ks)
    assert (
        gap(c, by_hand(scores, cls, ks)) < 1e-5
        and c.min() >= 0
        and c.max() <= 1
        and torch.equal(scores, before[0])
        and torch.equal(cls, before[1])
    )
    assert (
        gap(rscin(5 * scores - 2, cls, ks), c) < 1e-5
    )  # only the order of magnitude within the set counts
    p = torch.tensor(np.random.default_rng(0).permutation(20))
    assert gap(rscin(scores[p], cls[p], ks), c[p]) < 1e-6


def test_listening_to_oneself_alone_scales_and_keeps_the_order():
    _, cls = draw()
    s = torch.rand(12, generator=torch.Generator().manual_seed(2))
    assert gap(rscin(s, cls, (1,)), (s - s.min()) / (s.max() - s.min())) < 1e-6


def test_small_sets_and_equal_scores():
    _, cls = draw()
    for M in range(1, 13):
        assert torch.equal(rscin(torch.full((M,), 0.7), cls[:M]), torch.zeros(M))
        for ks in ((1, 2, 3), (1, 8, 9), (50,)):
            c = rscin(torch.arange(M).float(), cls[:M], ks)
            assert c.shape == (M,) and torch.isfinite(c).all() and 0 <= c.min() and c.max() <= 1
            for most in (0.01, 0.5, 1):
                assert (
                    gap(
                        rscin(torch.arange(M).float(), cls[:M], ks, most),
                        rscin(
                            torch.arange(M).float(),
                            cls[:M],
                            [min(k, max(1, int(most * M))) for k in ks],
                            1,
                        ),
                    )
                    == 0
                )
    s = torch.tensor([0.2, 0.9, 0.4])
    assert (
        gap(rscin(s, cls[:3]), torch.tensor([0, 1, 2 / 7])) < 1e-6
    )  # three images: nobody has a neighbour
    assert gap(rscin(s, cls[:3], (3,), most=1), by_hand(s, cls[:3], (3,))) < 1e-6


def test_copies_of_an_image_come_after_it_and_opposite_images_are_not_heard():
    one = unit(torch.ones(4, 8))
    s = torch.tensor([0.0, 1, 0, 1])
    assert gap(rscin(s, one, (1,)), s) == 0
    assert gap(rscin(s, one, (4,), 1), torch.full((4,), 0.5)) < 1e-6
    assert torch.equal(rscin(s, one * torch.tensor([1, -1, 1, -1])[:, None], (1, 2, 3), 1), s)
    assert torch.isfinite(
        rscin(torch.tensor([0.0, 1]), one[:2] * torch.tensor([[1], [-1]]), (2,), 1)
    ).all()


def test_what_rscin_cannot_use_is_refused():
    _, cls = draw()
    s = torch.rand(12)
    for a, b in ((s[:3], cls), (s[:, None], cls), (s, cls[0]), (s[:0], cls[:0])):
        with pytest.raises(ValueError, match=r'do not fit.*\[M,C\]'):
            rscin(a, b)
    bad = s.clone()
    bad[:2] = math.nan
    with pytest.raises(ValueError, match='2 of 12 are not finite'):
        rscin(bad, cls)
    for ks, most in (((), 0.5), ((0, 1), 0.5), ((1.5,), 0.5), ((1,), 0), ((1,), 1.1)):
        with pytest.raises(ValueError, match=r'neighbours=.*most=.*whole numbers from 1'):
            rscin(s, cls, ks, most)


# --- subsets


@pytest.mark.parametrize('n,parts', [(20, 1), (20, 3), (21, 10), (4, 2)])
def test_every_image_is_in_one_subset_and_subsets_are_even(n, parts):
    s = split_subsets(n, parts)
    assert (
        len(s) == parts
        and sorted(sum(s, [])) == list(range(n))
        and {len(p) for p in s} <= {n // parts, -(-n // parts)}
        and all(p == sorted(p) for p in s)
    )


def test_subsets_are_drawn_by_key():
    ids = [f'pill/good/{i:03}' for i in range(30)]

    def named(ids, *key):
        return [[ids[i] for i in s] for s in split_subsets(ids, 3, *key)]

    first = named(ids)
    assert [sorted(s) for s in named(ids[::-1])] == first and named(ids, 0, '') == first
    assert (
        first != named(ids, 1)
        and first != named(ids, 0, 'pill')
        and first[0] != ids[:10]
        and first[0] != ids[::3]
    )
    seen = {split_subsets(ids, 3, seed)[0][0] for seed in range(60)}
    assert len(seen) > 5


def test_kinds_are_dealt_out_evenly_when_they_are_told():
    kinds = ['good'] * 14 + ['cut'] * 7 + ['hole'] * 6
    labelled = split_subsets(27, 3, kinds=kinds)
    for k in ('good', 'cut', 'hole'):
        n = [sum(kinds[i] == k for i in s) for s in labelled]
        assert max(n) - min(n) <= 1
    assert sorted(sum(labelled, [])) == list(range(27)) and [len(s) for s in labelled] == [9, 9, 9]
    assert any(
        len({sum(kinds[i] == 'hole' for i in s) for s in split_subsets(27, 3, seed)}) > 1
        for seed in range(9)
    )  # by default labels do not count


@pytest.mark.parametrize('parts', [0, -1, 6, 2.5, None])
def test_subsets_of_fewer_than_two_images_are_refused(parts):
    with pytest.raises(ValueError, match=rf'parts={parts!r}.*11 images make 1 to 5'):
        split_subsets(11, parts)


# --- the public code

NUMBERS = dict(
    features=[
        [-0.1197722, 0.3796151, -0.1473024, 0.2639659, -0.1129799, 0.1632583],
        [-0.1372155, 0.1179094, -0.0627508, 0.4639151, -0.1388546, 0.1342065],
        [0.1131385, 0.1922193, -0.1878741, -0.1028093, -0.1144760, -0.0051478],
        [-0.0348697, 0.0194758, -0.0473338, 0.4114291, -0.2117786, -0.0952268],
        [0.2385717, -0.4440163, -0.1738160, 0.0536897, 0.1389515, -0.1855537],
        [0.1014862, -0.2232702, -0.0467788, -0.1867277, 0.3754563, -0.3201278],
        [0.2895181, -0.1189755, 0.1790282, 0.2148410, 0.2646616, -0.1120153],
        [0.2257947, 0.0044024, 0.3080744, -0.1277023, 0.3080290, -0.1955365],
    ],  # r = 5: layers, images 0 and 5, patches 0 and 14; channels 0 to 5
    maps=[
        [
            0.7392381,
            0.7566343,
            0.7427019,
            0.7251936,
            0.6093554,
            0.5228146,  # image 0
            0.7297269,
            0.8803867,
            0.8956680,
            0.7492858,
            0.6108279,
            0.5081377,
            0.6868561,
            0.7499899,
            0.7517776,
            0.7026756,
            0.6010707,
            0.5231705,
            0.6587129,
            0.6460628,
            0.6162652,
            0.6314630,
            0.5837176,
            0.5432769,
            0.5251391,
            0.5302088,
            0.5283265,
            0.4872209,
            0.4979915,
            0.5406194,
            0.5408235,
            0.5444893,
            0.4986262,
            0.4964097,
            0.5160054,
            0.5120586,
        ],
        [
            0.3339597,
            0.3482442,
            0.3802001,
            0.3508950,
            0.3519000,
            0.3211775,  # image 3, which has a twin
            0.3430711,
            0.3865535,
            0.3669359,
            0.3852777,
            0.3642934,
            0.3221274,
            0.3389241,
            0.3675783,
            0.3807056,
            0.3409465,
            0.3431444,
            0.3254790,
            0.3452823,
            0.3761837,
            0.3581083,
            0.3413141,
            0.3563858,
            0.3446781,
            0.3816598,
            0.3600611,
            0.3549521,
            0.3428284,
            0.3377142,
            0.3619545,
            0.3403903,
            0.3547938,
            0.3381006,
            0.3482296,
            0.3672218,
            0.3798232,
        ],
    ],
    scores=[
        0.8908643,
        0.8486629,
        0.5630927,
        0.3853613,
        0.6182067,
        0.5980286,
        0.6039912,
        0.6247882,
        0.6554302,
        0.6257210,
        0.5871269,
        0.3853589,
    ],  # input size 64
    rscin={
        (1, 2, 3): [
            0.8159480,
            0.6239902,
            0.4574821,
            0.2779154,
            0.4063612,
            0.3921006,
            0.4912882,
            0.5280514,
            0.4814847,
            0.4152219,
            0.3507186,
            0.1590661,
        ],
        (1, 5, 6): [
            0.7776139,
            0.5589299,
            0.4144017,
            0.2826892,
            0.4185389,
            0.3477876,
            0.4615365,
            0.5124187,
            0.4612951,
            0.4445325,
            0.3627450,
            0.2916771,
        ],
        (2, 3): [
            0.7239220,
            0.4777271,
            0.5104249,
            0.4168707,
            0.3792300,
            0.3777973,
            0.5206811,
            0.5552555,
            0.4550970,
            0.3850886,
            0.3265074,
            0.2385991,
        ],
    },
    pair=[
        0.5376512,
        0.5715894,
        0.5931781,
        0.6103646,
        0.5892044,
        0.6099292,  # image 2 with image 5 as its only reference
        0.5281246,
        0.5713024,
        0.6026083,
        0.6732044,
        0.6520361,
        0.5890477,
        0.5213938,
        0.5987887,
        0.5850548,
        0.6317683,
        0.6477196,
        0.5975533,
        0.5825179,
        0.5737345,
        0.5822341,
        0.6259966,
        0.6316166,
        0.6251520,
        0.6135802,
        0.5192914,
        0.5839380,
        0.6150273,
        0.5945776,
        0.6255668,
        0.6204348,
        0.5768698,
        0.5504207,
        0.5727314,
        0.6220796,
        0.6528532,
    ],
)


def test_numbers_of_the_public_code():
    layers, cls = draw()
    f = aggregate(layers, (6, 6), 5)[:, [0, 5]][:, :, [0, 14], :6].reshape(8, 6)
    assert gap(f, torch.tensor(NUMBERS['features'])) < 1e-6
    a = musc_map(layers, (6, 6))
    assert gap(a[[0, 3]], torch.tensor(NUMBERS['maps'])) < 1e-6
    large = F.interpolate(a.view(-1, 1, 6, 6), size=64, mode='bilinear', align_corners=True)
    s = large.flatten(1).amax(1)
    assert gap(s, torch.tensor(NUMBERS['scores'])) < 1e-6
    for ks, want in NUMBERS['rscin'].items():
        assert gap(rscin(s, cls, ks), torch.tensor(want)) < 1e-6
    assert (
        gap(
            musc_map(layers[:, 2:3], (6, 6), others=layers[:, 5:6])[0],
            torch.tensor(NUMBERS['pair']),
        )
        < 1e-6
    )

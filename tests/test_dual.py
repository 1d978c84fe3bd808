"""A second image against loops and scikit-learn, and draws that only seed and id change.

The authors of Dual-Image published no code, so no numbers of theirs are stored here; DRAWS are this
project's own, so that a seed means the same images in every version.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from zsad.encoder.loading import load_encoder
from zsad.methods.clip_baseline import anomaly_score
from zsad.methods.dual import POLICIES, draw_references, dual_score, joint_map, pair_map
from zsad.methods.prompts import encode_prompts
from zsad.methods.windows import association
from zsad.rendered.procad import design
from zsad.rendered.scene import paint_pair


def normal(seed, *shape):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape), dtype=torch.float32)


def gap(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item()


def cosine(a, b):
    a, b = a.tolist(), b.tolist()
    return sum(x * y for x, y in zip(a, b)) / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def slow(p, q):
    "Eq. (5) for one image [N,C] and one set of tokens [R,C], patch by patch."
    return torch.tensor([1 - max(cosine(a, r) for r in q) for a in p])


# --- the other image


def test_loops_are_the_judge():
    p, per_image, many, memory = (
        normal(0, 3, 5, 7),
        normal(1, 3, 6, 7),
        3 * normal(2, 3, 4, 6, 7),
        normal(3, 11, 7),
    )
    assert gap(pair_map(p, memory), torch.stack([slow(a, memory) for a in p])) < 1e-6
    assert (
        gap(pair_map(p, per_image), torch.stack([slow(a, r) for a, r in zip(p, per_image)])) < 1e-6
    )
    each = torch.stack([torch.stack([slow(a, r) for r in k]) for a, k in zip(p, many)])  # [B,K,N]
    assert (
        gap(pair_map(p, many), each.amin(1)) < 1e-6
        and gap(pair_map(p, many, 'mean'), each.mean(1)) < 1e-6
    )
    assert gap(pair_map(p, many), pair_map(p, many, 'mean')) > 0.1


def test_nearest_neighbours_of_scikit_learn():
    p, q = normal(4, 2, 50, 33), normal(5, 2, 3, 40, 33)
    for b in range(2):
        found = (
            NearestNeighbors(n_neighbors=1, metric='cosine')
            .fit(q[b].flatten(0, 1).numpy())
            .kneighbors(p[b].numpy())[0][:, 0]
        )
        assert gap(pair_map(p, q)[b], torch.tensor(found)) < 1e-6


def test_it_is_twice_winclips_distance_and_half_of_muscs_squared():
    p, q = normal(6, 2, 9, 8), normal(7, 20, 8)
    assert gap(pair_map(p, q), 2 * association(p, q)) == 0

    def unit(t):
        return t / t.norm(dim=-1, keepdim=True)

    assert (
        gap((2 * pair_map(p, q)).sqrt(), (unit(p)[:, :, None] - unit(q)).norm(dim=-1).amin(-1))
        < 1e-5
    )


def test_an_image_that_is_its_own_reference_is_all_zero_and_nothing_is_negative():
    p = normal(8, 4, 225, 33)
    for q in (p, p[:, None], torch.stack([p.roll(1, 0), p], 1), p.flatten(0, 1), 7 * p):
        vis = pair_map(p, q)
        assert 0 <= vis.min() and vis.max() < 1e-6
    assert (
        gap(pair_map(p[:1, :1], -p[0, :1]), torch.full((1, 1), 2.0)) < 1e-6
    )  # the farthest there is


def test_order_and_length_of_reference_patches_do_not_matter():
    p, q = normal(9, 3, 30, 8), normal(10, 3, 2, 40, 8)
    vis = pair_map(p, q)
    assert (
        gap(
            pair_map(p, q[:, :, torch.randperm(40, generator=torch.Generator().manual_seed(0))]),
            vis,
        )
        < 1e-6
    )
    assert (
        gap(pair_map(p, q.flip(1)), vis) < 1e-6
        and gap(pair_map(5 * p, q * (normal(11, 3, 2, 40, 1).abs() + 0.1)), vis) < 1e-6
    )
    turned = p.flip(1)
    assert gap(pair_map(turned, q), vis.flip(1)) < 1e-6


def test_more_references_never_raise_the_union_but_can_raise_the_mean():
    p, q = normal(12, 3, 30, 8), normal(13, 3, 6, 40, 8)
    maps, means = [[pair_map(p, q[:, :k], join) for k in range(1, 7)] for join in ('union', 'mean')]
    assert (
        all((b <= a + 1e-6).all() for a, b in itertools.pairwise(maps))
        and gap(maps[0], maps[-1]) > 0.1
    )
    assert any((b > a + 0.01).any() for a, b in itertools.pairwise(means))
    assert gap(maps[0], means[0]) == 0 and all((a <= b + 1e-6).all() for a, b in zip(maps, means))
    assert gap(maps[-1], torch.stack([pair_map(p, q[:, k]) for k in range(6)]).amin(0)) < 1e-6


@pytest.mark.parametrize('join', ['union', 'mean'])
def test_chunks_change_nothing(join):
    p, q = normal(14, 2, 30, 8), normal(15, 2, 3, 40, 8)
    for chunk in (1, 29, 31, 1000, 10**9):
        assert gap(pair_map(p, q, join, chunk), pair_map(p, q, join)) < 1e-6
    assert gap(pair_map(p, q[0, 0], chunk=90), pair_map(p, q[0, 0])) < 1e-6


def test_a_batch_of_four_is_four_batches_of_one():
    p, q = normal(16, 4, 30, 8), normal(17, 4, 3, 40, 8)
    for r, join in ((q[:, 0], 'union'), (q, 'union'), (q, 'mean')):
        assert torch.equal(
            torch.cat([pair_map(p[i : i + 1], r[i : i + 1], join) for i in range(4)]),
            pair_map(p, r, join),
        )
    assert (
        gap(torch.cat([pair_map(p[i : i + 1], q[0, 0]) for i in range(4)]), pair_map(p, q[0, 0]))
        < 1e-6
    )
    loud = q.clone()
    loud[[0, 1, 3]] *= -1
    assert torch.equal(
        pair_map(p, loud)[2], pair_map(p, q)[2]
    )  # another image's reference is not looked at


def test_tokens_in_half_precision_give_float32():
    p, q = normal(18, 2, 30, 8), normal(19, 2, 40, 8)
    vis = pair_map(p.bfloat16(), q.bfloat16())
    assert (
        vis.dtype == torch.float32
        and gap(vis, pair_map(p, q)) < 0.02
        and pair_map(p.half(), p.half()).max() < 1e-6
    )


@pytest.mark.parametrize(
    'shape',
    [
        (7,),
        (0, 7),
        (9, 6),
        (3, 9, 7),
        (2, 9, 6),
        (2, 0, 7),
        (2, 0, 9, 7),
        (1, 4, 9, 7),
        (2, 4, 9, 7, 1),
    ],
)
def test_references_that_do_not_fit_are_refused(shape):
    with pytest.raises(
        ValueError, match=r'p: \[2, 5, 7\], q: .*\[R,7\].*\[2,R,7\].*\[2,K,5,7\].*same encoder'
    ):
        pair_map(torch.ones(2, 5, 7), torch.ones(shape))


def test_other_mistakes_with_references_are_named():
    p = torch.ones(2, 5, 7)
    with pytest.raises(ValueError, match=r'p: \[5, 7\].*\[B,N,C\]'):
        pair_map(p[0], p)
    with pytest.raises(ValueError, match="join='max'.*'union'.*'mean'"):
        pair_map(p, p, 'max')
    for q in (p, p[0]):
        with pytest.raises(ValueError, match=r"join='mean': q \[.*\[2,K,N,7\]"):
            pair_map(p, q, 'mean')


# --- words and picture


def test_joint_map_and_score_number_by_number():
    text, vis, score = normal(20, 3, 6).sigmoid(), normal(21, 3, 6).abs(), normal(22, 3).sigmoid()
    for alpha, beta in itertools.product((0, 0.2, 0.5, 1), repeat=2):
        a, s = joint_map(text, vis, alpha), dual_score(score, joint_map(text, vis, alpha), beta)
        for b in range(3):
            want = [alpha * t + (1 - alpha) * v for t, v in zip(text[b].tolist(), vis[b].tolist())]
            assert (
                max(abs(x - y) for x, y in zip(a[b].tolist(), want)) < 1e-6
                and abs(s[b].item() - beta * score[b].item() - (1 - beta) * max(want)) < 1e-6
            )
        assert gap(dual_score(score, a.view(3, 2, 3), beta), s) == 0
    assert (
        gap(joint_map(text, vis), joint_map(text, vis, 0.5)) == 0
        and gap(dual_score(score, text), dual_score(score, text, 0.5)) == 0
    )


def test_the_ends_are_the_parts_themselves():
    text, vis, score = normal(23, 3, 6).sigmoid(), normal(24, 3, 6).abs(), normal(25, 3).sigmoid()
    assert torch.equal(joint_map(text, vis, 1), text) and torch.equal(joint_map(text, vis, 0), vis)
    assert torch.equal(dual_score(score, text, 1), score) and torch.equal(
        dual_score(score, text, 0), text.amax(1)
    )
    assert (
        gap(joint_map(text, 0 * vis), text / 2) < 1e-6
    )  # the image as its own reference: half the words, in their order


def test_every_weighted_sum_is_a_multiple_of_these():
    text, vis, score = (
        normal(26, 40, 6).sigmoid(),
        normal(27, 40, 6).abs(),
        normal(28, 40).sigmoid(),
    )
    for u, v, s, m in (
        (1, 1, 1, 1),
        (1, 0.5, 1, 1),
        (3, 0.1, 0.2, 2),
        (0.1, 4, 5, 0.3),
    ):  # (1, .5, ...): WinCLIP's half
        a = u * text + v * vis
        total = s * score + m * a.amax(1)
        ours = joint_map(text, vis, u / (u + v))
        whole = dual_score(score, ours, s / (s + m * (u + v)))
        assert gap(ours * (u + v), a) < 1e-5 and gap(whole * (s + m * (u + v)), total) < 1e-5
        assert torch.equal(whole.argsort(), total.argsort())


def test_sums_that_cannot_be_made_are_refused():
    text, score = torch.ones(3, 6), torch.ones(3)
    for bad in (-0.1, 1.1, float('nan'), 2):
        with pytest.raises(
            ValueError,
            match=rf'alpha={bad}.*from 0 \(the references alone\) to 1 \(the text alone\)',
        ):
            joint_map(text, text, bad)
        with pytest.raises(
            ValueError,
            match=rf'beta={bad}.*from 0 \(the map alone\) to 1 \(the class token alone\)',
        ):
            dual_score(score, text, bad)
    for vis in (torch.ones(3, 1), torch.ones(1, 6), torch.ones(3, 2, 3)):
        with pytest.raises(ValueError, match=r'text: \[3, 6\] and vis: .*same grid'):
            joint_map(text, vis)
    for s in (torch.ones(2), torch.ones(3, 1), torch.ones(())):
        with pytest.raises(ValueError, match=r'score: .*\[3, 6\].*one score \[B\]'):
            dual_score(s, text)


# --- which image

IDS = [f'pill/{k}/{i:03}' for k in ('good', 'crack', 'stain') for i in range(7)]
LABELS = [int('good' not in i) for i in IDS]


def named(drawn, pool=IDS):
    return [[pool[j] for j in d] for d in drawn.tolist()]


def test_nothing_but_seed_and_id_changes_a_draw():
    want = dict(zip(IDS, named(draw_references(IDS, 3, 5))))
    for turn in range(5):
        ids = random.Random(turn).sample(IDS, len(IDS))
        assert (
            dict(zip(ids, named(draw_references(ids, 3, 5), ids))) == want
        )  # the order of the folder
        assert dict(zip(ids[:4], named(draw_references(ids[:4], 3, 5, pool=ids), ids))) == {
            i: want[i] for i in ids[:4]
        }  # a batch of it
    torch.manual_seed(0)
    np.random.seed(0)
    assert named(draw_references(tuple(IDS), 3, 5, category='pill', labels=LABELS)) == list(
        want.values()
    )
    assert draw_references(IDS, 4, 5).tolist() != draw_references(IDS, 3, 5).tolist()
    assert (
        draw_references([f'x{i}' for i in IDS], 3, 5).tolist()
        != draw_references(IDS, 3, 5).tolist()
    )


def test_draws_are_other_images_and_those_of_fewer_come_first():
    drawn = draw_references(IDS, 0, 20)
    assert drawn.shape == (21, 20) and drawn.dtype == torch.long
    for i, d in enumerate(drawn.tolist()):
        assert sorted([i, *d]) == list(range(21))
    for k in (1, 2, 4, 8):
        assert torch.equal(draw_references(IDS, 0, k), drawn[:, :k])
    assert torch.equal(draw_references(IDS), drawn[:, :1])


def test_every_other_image_has_the_same_chance():
    hits = torch.zeros(6, 6)
    for seed in range(1500):
        hits[torch.arange(6), draw_references(IDS[:6], seed)[:, 0]] += 1
    others = hits[~torch.eye(6, dtype=bool)].view(6, 5)
    assert (hits.diagonal() == 0).all() and (
        (others - 300).abs() < 75
    ).all()  # 300 expected, 15.5 is one standard deviation
    assert (
        torch.stack([draw_references(IDS[:6], s)[:, 0] for s in range(50)]).unique(dim=1).shape[1]
        == 6
    )  # images draw apart from each other


def test_policies_keep_their_promise():
    good, bad, mixed = (
        draw_references(IDS, 1, 6, p, LABELS) for p in ('normal', 'anomalous', 'random')
    )
    for i in range(21):
        assert all(not LABELS[j] and j != i for j in good[i].tolist()) and all(
            LABELS[j] and j != i for j in bad[i].tolist()
        )
        for part, label in (
            (good, 0),
            (bad, 1),
        ):  # one order of all images lies behind every policy
            kept = [j for j in mixed[i].tolist() if LABELS[j] == label]
            assert part[i].tolist()[: len(kept)] == kept
    assert draw_references(IDS, 1, policy='same')[:, 0].tolist() == list(range(21))
    for labels in (torch.tensor(LABELS), np.array(LABELS), np.array(LABELS, bool)):
        assert torch.equal(draw_references(IDS, 1, 6, 'normal', labels), good)
    turned = IDS[::-1]
    assert named(draw_references(turned, 1, 6, 'anomalous', LABELS[::-1]), turned)[::-1] == named(
        bad
    )


def test_references_from_another_pool():
    given = [f'train/good/{i:03}' for i in range(4)]
    drawn = draw_references(IDS, 0, 4, pool=given)
    assert drawn.shape == (21, 4) and all(sorted(d) == [0, 1, 2, 3] for d in drawn.tolist())
    assert torch.equal(draw_references(IDS, 0, 2, 'normal', [0] * 4, given), drawn[:, :2])
    assert draw_references(IDS[:1], 0, 1, 'same', pool=IDS[::-1]).tolist() == [[20]]
    assert draw_references([], 0, 2, pool=given).shape == (0, 2)
    with pytest.raises(ValueError, match="0 images that policy 'same'"):
        draw_references(IDS, policy='same', pool=given)


def test_pools_that_are_too_small_are_named():
    with pytest.raises(
        ValueError,
        match="count=1: 'pill' has 0 images that policy 'random' may draw for 'a', of 1; "
        'give more images',
    ):
        draw_references(['a'], category='pill')
    with pytest.raises(
        ValueError, match="count=3: 'pill' has 2 images that policy 'random' may draw for 'a', of 3"
    ):
        draw_references(['a', 'b', 'c'], 0, 3, category='pill')
    with pytest.raises(
        ValueError, match="count=2: .*1 images that policy 'normal' may draw for 'a', of 3"
    ):
        draw_references(['a', 'b', 'c'], 0, 2, 'normal', [0, 0, 1])
    with pytest.raises(ValueError, match="0 images that policy 'anomalous' may draw for 'c', of 3"):
        draw_references(['a', 'b', 'c'], 0, 1, 'anomalous', [0, 0, 1])
    with pytest.raises(ValueError, match="count=2: .*1 images that policy 'same'"):
        draw_references(['a', 'b', 'c'], 0, 2, 'same')
    assert draw_references(['a', 'b']).tolist() == [[1], [0]]


def test_mistakes_in_a_draw_are_named():
    with pytest.raises(ValueError, match="policy='good'.*random.*normal.*anomalous.*same"):
        draw_references(IDS, policy='good')
    assert POLICIES == ('random', 'normal', 'anomalous', 'same')
    for count in (0, -1, 1.5, None, '2'):
        with pytest.raises(ValueError, match=rf'count={count!r}: draw a whole number'):
            draw_references(IDS, 0, count)
    with pytest.raises(ValueError, match="ids of 'pill': 'b' stands there more than once"):
        draw_references(['a', 'b', 'b'], category='pill')
    for labels, got in (
        (None, 'none'),
        (LABELS[:-1], r'20 with values \[0, 1\]'),
        ([2] * 21, r'21 with values \[2\]'),
    ):
        for policy in ('normal', 'anomalous'):
            with pytest.raises(
                ValueError,
                match=rf"policy='{policy}' needs labels, 0 or 1 for each of the 21 images of "
                rf"'pill'; got {got}; 'random' needs none",
            ):
                draw_references(IDS, 0, 1, policy, labels, category='pill')


DRAWS = {
    0: [[3, 5, 1], [2, 3, 0], [3, 4, 5], [7, 6, 4], [5, 6, 1], [1, 0, 7], [4, 2, 5], [5, 0, 4]],
    1: [[4, 6, 1], [7, 0, 4], [5, 3, 4], [2, 6, 4], [1, 3, 5], [0, 1, 4], [3, 2, 4], [4, 2, 5]],
}


def test_a_seed_means_the_same_images_in_every_version():
    assert {s: draw_references(IDS[:8], s, 3).tolist() for s in DRAWS} == DRAWS


# --- with an encoder


@torch.inference_mode()
def test_a_whole_twin_shows_the_defect():
    e = load_encoder('mini', device='cpu', dtype='float32')
    kind = design('pill', 'procad')
    clean, _, bad, _, mask = paint_pair(kind, 0, 'stain')

    def as_pixels(a):
        return (np.clip(a, 0, 1).transpose(1, 2, 0) * 255).astype('u1')

    t = e.encode(e.preprocess([as_pixels(bad), as_pixels(clean)]))
    p, inside = t.single[-1], torch.tensor(mask.reshape(15, 16, 15, 16).mean((1, 3)).ravel() > 0.5)
    vis = pair_map(p[:1], p[1:])[0]
    assert inside.any() and vis[inside].mean() > 5 * vis[~inside].mean()
    pair = encode_prompts(e, 'clip', 'pill')
    text, score = anomaly_score(p, pair, 0.07), anomaly_score(t.cls[:, None], pair, 0.07)[:, 0]
    a = joint_map(text, pair_map(p, p.flip(0)))
    assert a.shape == (2, 225) and torch.isfinite(dual_score(score, a)).all()
    alone = joint_map(text[:1], pair_map(p[:1], p[1:]))
    assert (
        gap(alone, a[:1]) < 1e-6
        and gap(dual_score(score[:1], alone), dual_score(score, a)[:1]) < 1e-6
    )

"""Metrics against scikit-learn and against slow references written from the definitions."""

import warnings
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from zsad.evaluation.counts import components, mark, mark_components, rank, sorted_counts
from zsad.evaluation.measure import evaluate
from zsad.evaluation.metrics import (
    auroc,
    field_area,
    field_curve,
    pixel_auroc_within,
    pro,
    pro_curve,
    pro_field,
)
from zsad.evaluation.protocol import METRICS, PROTOCOLS, Protocol
from zsad.evaluation.ranking import find_buckets, ranks
from zsad.evaluation.resizing import resize, resize_mask

# ---- references


def flood(mask, corners=True):
    "Regions of one mask as lists of (y, x), by flood fill."
    left, out = {tuple(p) for p in np.argwhere(mask)}, []
    steps = [
        (a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a or b) and (corners or not (a and b))
    ]
    while left:
        todo = [left.pop()]
        region = list(todo)
        while todo:
            y, x = todo.pop()
            for near in [(y + a, x + b) for a, b in steps]:
                if near in left:
                    left.remove(near)
                    todo.append(near)
                    region.append(near)
        out.append(region)
    return out


def region_scores(maps, masks, corners=True):
    return [
        np.array([m[p] for p in region])
        for m, g in zip(maps, masks)
        for region in flood(g, corners)
    ]


def slow_pro(maps, masks, limit=0.3, corners=True):
    "The exact definition: every distinct score is a threshold, linear interpolation at the limit."
    regions, normal = region_scores(maps, masks, corners), maps[~masks]
    points = [(0.0, 0.0)]
    for t in np.unique(maps)[::-1]:
        points.append(((normal >= t).mean(), np.mean([(r >= t).mean() for r in regions])))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 >= limit:
            break
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def slow_field(maps, masks, limit=0.3, steps=200):
    "The 200-threshold routine as described: loop, strict comparison, min-max stretch, trapezoid."
    regions, normal, xs, ys = region_scores(maps, masks), maps[~masks], [], []
    low, high = maps.min(), maps.max()
    for t in np.arange(low, high, (high - low) / steps):
        x = np.sum(normal > t) / normal.size
        if x < limit:
            xs.append(x)
            ys.append(np.mean([np.sum(r > t) / r.size for r in regions]))
    xs, ys = np.array(xs), np.array(ys)
    xs = (xs - xs.min()) / (xs.max() - xs.min())
    return sum((xs[i] - xs[i + 1]) * (ys[i] + ys[i + 1]) / 2 for i in range(len(xs) - 1))


def sk_f1(y, s):
    p, r, _ = precision_recall_curve(y, s)
    return max(2 * a * b / (a + b) for a, b in zip(p, r) if a + b > 0)


# ---- data

SCALES = {
    'gauss': lambda m: m,
    'negative': lambda m: -m,
    'sigmoid': lambda m: 1 / (1 + np.exp(-4 * m)),
    'saturated': lambda m: np.clip(0.6 * m + 0.5, 0, 1),
    'levels': lambda m: np.clip(np.round(1.5 * m + 3), 0, 7) / 7,
    'binary': lambda m: (m > 1) * 1.0,
    'heavy': lambda m: np.exp(2.5 * m),
    'tiny': lambda m: 1e-30 * m,
    'offset': lambda m: 1000 + 0.01 * m,
}


def draw_category(seed, M=10, S=40, lift=1.5):
    rng = np.random.default_rng(seed)
    masks = np.zeros((M, S, S), bool)
    for i in range(M - 3):
        for _ in range(rng.integers(1, 4)):
            (y, x), (h, w) = rng.integers(0, S - 14, 2), rng.integers(1, 14, 2)
            masks[i, y : y + h, x : x + w] = True
            if min(h, w) > 4:
                masks[i, y + h // 2, x + w // 2] = False
    noise = ndimage.gaussian_filter(rng.standard_normal((M, S, S)), (0, 2, 2))
    return noise / noise.std() + lift * masks, masks


@pytest.fixture(scope='module', params=[(0, 1.0), (1, 3.0)])
def data(request):
    seed, lift = request.param
    return draw_category(seed, lift=lift)


def run(m, g, **k):
    return evaluate(m, g, m.max((1, 2)), g.any((1, 2)), **k)


# ---- parity


@pytest.mark.parametrize('dtype', [np.float64, np.float32])
@pytest.mark.parametrize('scale', SCALES)
def test_sklearn(data, scale, dtype):
    m, g = SCALES[scale](data[0]).astype(dtype), data[1]
    out = run(m, g)
    for unit, y, s in (('pixel', g.ravel(), m.ravel()), ('image', g.any((1, 2)), m.max((1, 2)))):
        assert out[f'{unit}_auroc'] == pytest.approx(roc_auc_score(y, s), abs=1e-9)
        assert out[f'{unit}_ap'] == pytest.approx(average_precision_score(y, s), abs=1e-9)
        assert out[f'{unit}_f1max'] == pytest.approx(sk_f1(y, s), abs=1e-9)


@pytest.mark.parametrize('dtype', [np.float64, np.float32])
@pytest.mark.parametrize('scale', SCALES)
def test_exact_pro(scale, dtype):
    m, g = draw_category(2, M=5, S=20)
    m = SCALES[scale](m).astype(dtype)
    for limit in (0.01, 0.3, 1.0):
        assert pro(sorted_counts(m, components(g)), limit) == pytest.approx(
            slow_pro(m, g, limit), abs=1e-9
        )
    assert run(m, g)['pro'] == pytest.approx(slow_pro(m, g), abs=1e-9)


def test_connectivity():
    g = np.random.default_rng(0).random((3, 12, 12)) < 0.3
    m = np.random.default_rng(1).random(g.shape) + 0.4 * g
    assert components(g).max() == sum(len(flood(x)) for x in g)
    assert components(g, 4).max() == sum(len(flood(x, False)) for x in g)
    for n in (4, 8):
        want = slow_pro(m, g, corners=n == 8)
        assert run(m, g, protocol=Protocol(connectivity=n))['pro'] == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize('scale', [s for s in SCALES if s != 'binary'])
def test_field(data, scale):
    m, g = SCALES[scale](data[0]), data[1]
    assert pro_field(m, g) == pytest.approx(slow_field(m, g), abs=1e-6)
    assert run(m, g)['pro_field'] == pro_field(m, g)
    m32 = m.astype(np.float32)  # thresholds are computed in float64
    assert pro_field(m32, g) == pytest.approx(slow_field(m32.astype(np.float64), g), abs=1e-6)


def test_field_is_strict(data):
    "Scores on the thresholds themselves: `map > t`, not `>=`."
    m, g = np.clip(np.round(20 * data[0] + 100), 1, 199), data[1]
    for half in (g, ~g):  # one class between the thresholds 0, 1, 2 ..., the other on them
        on = m + 0.5 * half
        nudged = on + 1e-6 * ~half
        on[-1, 0, :2] = nudged[-1, 0, :2] = 0, 200
        assert pro_field(on, g) == pytest.approx(slow_field(on, g), abs=1e-9)
        assert abs(pro_field(on, g) - pro_field(nudged, g)) > 1e-6


@pytest.mark.parametrize('dtype', [np.uint8, np.int64, bool])
def test_integer_maps(dtype):
    g = draw_category(3)[1]
    m = np.random.default_rng(0).integers(0, 2 if dtype is bool else 200, g.shape).astype(dtype)
    out = run(m, g)
    assert out['pixel_auroc'] == pytest.approx(roc_auc_score(g.ravel(), m.ravel()), abs=1e-9)
    assert out['pro'] == pytest.approx(slow_pro(m, g), abs=1e-9)


def test_float64_is_not_rounded():
    m = np.array([[[1.0, 1 + 1e-12, 1 + 2e-12, 1 + 3e-12]]])
    g = np.array([[[0, 0, 1, 1]]])
    assert run(m, g, protocol=Protocol(metrics=('pixel_auroc', 'pro'))) == {
        'pixel_auroc': 1,
        'pro': pytest.approx(1),
        'why': {},
    }
    assert evaluate(m.astype(np.float32), g, None, None)['pixel_auroc'] == 0.5


def test_torch(data):
    m, g = data[0].astype(np.float32), data[1]
    s, y = m.max((1, 2)), g.any((1, 2)).astype(int)
    a = evaluate(m, g, s, y)
    assert evaluate(*map(torch.from_numpy, (m, g, s, y))) == a
    assert evaluate(torch.from_numpy(m).requires_grad_(), g, list(s), list(y)) == a
    for half in (torch.bfloat16, torch.float16):
        t = torch.from_numpy(m).to(half)
        assert evaluate(t, g, s, y) == evaluate(t.float(), g, s, y)


# ---- ranks


@pytest.mark.parametrize('dtype', [np.float64, np.float32])
@pytest.mark.parametrize('thresholds', [0, 1, 2, 700, 20_000])
@pytest.mark.parametrize('scale', [*SCALES, 'crowded', 'endless'])
def test_ranks_equal_binary_search(scale, thresholds, dtype):
    "Also where thousands of thresholds share a bucket, and for scores without a finite range."
    rng = np.random.default_rng(thresholds)
    x = rng.standard_normal(150_000)
    if scale == 'crowded':
        x = np.where(x > 0, 1 + 1e-5 * x, 1e6 * x)
    elif scale == 'endless':
        x = np.where(abs(x) > 1, np.inf * x, 1e38 * x)
    else:
        x = SCALES[scale](x)
    x = x.astype(dtype)
    values = np.unique(rng.choice(x, thresholds))
    want = 2 * len(values) - sum(np.searchsorted(values, x, side) for side in ('left', 'right'))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        np.testing.assert_array_equal(ranks(x, find_buckets(values)), want)


def test_a_ranking_names_its_thresholds(data):
    m, g = data[0], components(data[1])
    r, c = rank(m, mark(g)), sorted_counts(m, g)
    np.testing.assert_array_equal(r.score[r.find(c.score)], c.score)
    np.testing.assert_array_equal(r.score[r.at], m[g > 0])
    assert (r.rank[g == 0] >= 0).all() and r.rank.max() < r.width


@pytest.mark.parametrize('share', [0.0, 0.02, 0.4, 1.0])
def test_regions_in_rows(share):
    "Rows without anomalous pixels are left out before labelling; images stay apart."
    masks = np.random.default_rng(1).random((7, 9, 11)) < share
    masks[2:4] = False
    for n in (4, 8):
        regions, m = components(masks, n), mark_components(masks, n)
        want = [sorted(map(len, flood(k, n == 8))) for k in masks]
        assert [sorted(np.unique(k[k > 0], return_counts=True)[1]) for k in regions] == want
        assert len(np.unique(regions[regions > 0])) == regions.max() == sum(map(len, want))
        np.testing.assert_array_equal(m.pixel, np.flatnonzero(regions))
        np.testing.assert_array_equal(m.region, regions[regions > 0])


# ---- invariances


def test_monotone_and_order(data):
    m, g = data
    exact = Protocol(metrics=METRICS[:-1])
    a = run(m, g, protocol=exact)
    order = np.random.default_rng(0).permutation(len(m))
    for b in (
        run(m[order], g[order], protocol=exact),
        run(np.exp(m), g, protocol=exact),
        run(np.cbrt(m), g, protocol=exact),
    ):
        assert all(a[k] == pytest.approx(b[k], abs=1e-12) for k in exact.metrics)
    heavy = run(np.exp(4 * m), g)[
        'pro_field'
    ]  # the field's routine is not invariant: far lower, or nothing left
    assert np.isnan(heavy) or heavy < run(m, g)['pro_field'] - 0.1


def test_perfect_wrong_constant(data):
    g = data[1]
    perfect, wrong, flat = run(g * 1.0, g), run(1.0 - g, g), run(g * 0.0, g)
    for k in METRICS[:-1]:
        assert perfect[k] == pytest.approx(1, abs=1e-12)
    assert wrong['pixel_auroc'] == 0 and wrong['pro'] == pytest.approx(0)
    assert flat['pixel_auroc'] == flat['image_auroc'] == 0.5
    assert flat['pro'] == pytest.approx(0.15)
    assert flat['pixel_ap'] == pytest.approx(g.mean())
    assert list(flat['why']) == ['pro_field'] and 'constant' in flat['why']['pro_field']


def test_curves(data):
    c = sorted_counts(data[0], components(data[1]))
    x, y = pro_curve(c)
    assert (np.diff(x) >= 0).all() and (np.diff(y) >= -1e-12).all()
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    t, fpr, cover = field_curve(c)
    assert len(t) in (200, 201) and (np.diff(fpr) <= 0).all() and (np.diff(cover) <= 0).all()
    top = np.searchsorted(x, fpr, 'left')  # every sample lies on the exact curve
    assert (cover >= y[np.maximum(top - 1, 0)] - 1e-9).all()


# ---- degenerate sets: NaN and a reason, no exception, no warning, no 0


def nan_keys(out):
    assert set(out['why']) == {k for k in out if k != 'why' and np.isnan(out[k])}
    assert all(out['why'].values())
    return set(out['why'])


IMAGE, PIXEL = set(METRICS[:3]), set(METRICS[3:])


@pytest.mark.parametrize(
    'case, keys, word',
    [
        ('all normal', IMAGE | PIXEL, 'no anomalous'),
        ('all anomalous', IMAGE, 'no normal image'),
        ('no normal pixel', PIXEL, 'no normal pixel'),
        ('empty masks', PIXEL, 'no anomalous pixel'),
        ('no masks', PIXEL, 'no masks'),
        ('no maps', PIXEL, 'no maps'),
        ('no scores', IMAGE, 'no scores'),
        ('nan maps', PIXEL, '7 of'),
        ('nan scores', IMAGE, '1 of 10'),
        ('nothing', IMAGE | PIXEL, 'no '),
        ('constant', {'pro_field'}, 'constant'),
        ('inf', {'pro_field'}, 'infinite'),
        ('outlier', {'pro_field'}, 'distinct FPR'),
        ('binary', {'pro_field'}, 'distinct FPR'),
    ],
)
def test_degenerate(data, case, keys, word):
    m, g = data[0].copy(), data[1].copy()
    s, y = m.max((1, 2)), g.any((1, 2)).astype(int)
    if case == 'all normal':
        g[:] = 0
        y[:] = 0
    if case == 'all anomalous':
        y[:] = 1
    if case == 'no normal pixel':
        g[:] = 1
    if case == 'empty masks':
        g[:] = 0
    if case == 'no masks':
        g = None
    if case == 'no maps':
        m = None
    if case == 'no scores':
        s = None
    if case == 'nan maps':
        m[1, 2, :7] = np.nan
    if case == 'nan scores':
        s[3] = np.nan
    if case == 'nothing':
        m, g, s, y = m[:0], g[:0], s[:0], y[:0]
    if case == 'constant':
        m[:] = 3
    if case == 'inf':
        m[0, 0, 0] = np.inf
    if case == 'outlier':
        m[np.unravel_index(np.argmax(g), g.shape)] = 1e9
    if case == 'binary':
        m = (m > 0) * 1.0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        out = evaluate(m, g, s, y)
    assert nan_keys(out) == keys
    assert all(word in w for w in out['why'].values()), out['why']
    if case == 'nan maps':
        assert (
            '7 of 16000' in evaluate(m, g, s, y, Protocol(size=80))['why']['pro']
        )  # counted before resizing


def test_field_is_nan_where_the_routine_fails(data):
    m, g = data
    for maps in (m * 0, (m > 1) * 1.0, np.where(g, 1e12, m)):
        value, why = field_area(sorted_counts(maps, components(g)))
        assert np.isnan(value) and why
        with np.errstate(all='ignore'), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            try:
                assert np.isnan(slow_field(maps, g))
            except (ValueError, ZeroDivisionError):
                pass


# ---- within the object


def test_within(data):
    m, g = data
    inside = ndimage.binary_dilation(g, np.ones((1, 5, 5)))
    want = roc_auc_score(g[inside], m[inside])
    assert pixel_auroc_within(m, g, inside) == pytest.approx(want, abs=1e-12)
    assert pixel_auroc_within(m, g, inside | True) == pytest.approx(
        run(m, g)['pixel_auroc'], abs=1e-12
    )
    assert np.isnan(pixel_auroc_within(m, g, g))
    out = evaluate(m, g, None, None, 'within', foreground=inside)
    assert out['pixel_auroc'] == pytest.approx(want, abs=1e-12) and not out['why']
    lost = evaluate(m, g, None, None, 'within')
    assert nan_keys(lost) == PIXEL and 'no foreground' in lost['why']['pro']
    L = components(g)
    m = np.where(L == 1, 0.0, g)  # region 1 is missed ...
    assert pro(sorted_counts(m, L)) < 1
    assert pro(sorted_counts(m, L, within=L != 1)) == pytest.approx(
        1
    )  # ... but lies outside the foreground


# ---- sizes and masks


def test_resize_like_torch_and_pil():
    rng = np.random.default_rng(0)
    m = rng.random((3, 15, 15)).astype(np.float32)
    for size in (15, 31, 240, (40, 20)):
        want = F.interpolate(
            torch.from_numpy(m)[None], size=size, mode='bilinear', align_corners=False
        )[0].numpy()
        np.testing.assert_allclose(resize(m, size), want, atol=1e-5)
    small = F.interpolate(
        torch.from_numpy(m)[None], size=7, mode='bilinear', align_corners=False, antialias=True
    )[0].numpy()
    np.testing.assert_allclose(resize(m, 7), small, atol=1e-5)
    g = ndimage.gaussian_filter(rng.standard_normal((4, 70, 90)), (0, 5, 5)) > 0
    for rule, pil in (('bilinear>0.5', Image.BILINEAR), ('nearest', Image.NEAREST)):
        for size in ((24, 24), (140, 200)):
            got = resize_mask(g, size, rule)
            want = (
                np.stack(
                    [
                        np.asarray(
                            Image.fromarray(x.astype(np.uint8) * 255).resize(size[::-1], pil)
                        )
                        for x in g
                    ]
                )
                / 255
                > 0.5
            )
            assert (got != want).mean() < 0.003, (rule, size)
    any_ = resize_mask(g, 24, 'any')
    assert (any_ >= resize_mask(g, 24, 'nearest')).all() and any_.any((1, 2)).tolist() == g.any(
        (1, 2)
    ).tolist()


def test_size_and_mask_values(data):
    m, g = data
    a = run(m, g)
    for masks in (g.astype(np.uint8), g * 255, g * 1.0, g.astype(np.float32) * 0.9):
        assert evaluate(m, masks, m.max((1, 2)), g.any((1, 2))) == a
    big = g.repeat(3, 1).repeat(3, 2)
    for rule in ('bilinear>0.5', 'nearest', 'any'):
        out = run(m, big, protocol=Protocol(size=40, mask_rule=rule))
        assert out['pixel_auroc'] == pytest.approx(
            a['pixel_auroc'], abs=0.02 if rule == 'bilinear>0.5' else 1e-12
        )
    with pytest.raises(ValueError, match='2 mask values are NaN'):
        bad = g * 1.0
        bad[0, 0, :2] = np.nan
        run(m, bad)


# ---- errors and protocol


def test_shapes(data):
    m, g = data
    s, y = m.max((1, 2)), g.any((1, 2))
    for args, words in (
        ((m, g[:4], s, y), ['(10, 40, 40)', '(4, 40, 40)']),
        ((m, g[:, :20], s, y), ['(10, 20, 40)', 'size=']),
        ((m, g, s[:3], y), ['(3,)']),
        ((m, g, s, y[:, None]), ['(10, 1)']),
        ((m[0], g, s, y), ['(40, 40)']),
        ((m[:, None], g, s, y), ['(10, 1, 40, 40)']),
    ):
        with pytest.raises(ValueError) as e:
            evaluate(*args)
        for w in words:
            assert w in str(e.value)
    with pytest.raises(ValueError, match='within .10, 20, 40.'):
        pixel_auroc_within(m, g, g[:, :20])
    with pytest.raises(ValueError, match='M,H,W'):
        pro_field(m[0], g[0])
    with pytest.raises(ValueError, match='labels'):
        evaluate(m, g, s, y.astype(int) + 1)
    with pytest.raises(ValueError, match='native'):
        evaluate(m, g, s, y, 'nativ')


def test_protocol(data):
    assert list(run(*data)) == [*METRICS, 'why']
    assert list(run(*data, protocol=Protocol(metrics=('pro', 'image_ap')))) == [
        'pro',
        'image_ap',
        'why',
    ]
    assert list(run(*data, protocol='images')) == [*METRICS[:3], 'why']
    assert evaluate(None, None, [1.0, 2], [0, 1], PROTOCOLS['images'])['image_auroc'] == 1
    with pytest.raises(FrozenInstanceError):
        PROTOCOLS['native'].size = 3
    for bad in (
        dict(size=0),
        dict(size=(1, 2, 3)),
        dict(mask_rule='x'),
        dict(pro_limit=0),
        dict(connectivity=6),
        dict(within='object'),
        dict(metrics=('x',)),
        dict(metrics='pro'),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Protocol(**bad)
    assert isinstance(hash(PROTOCOLS['native']), int)
    assert np.isnan(auroc(sorted_counts([np.nan, 1.0], [0, 1])))

"""Draws of images against metrics of the repeated images, and intervals with their value."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

import zsad
from zsad.bench.measuring import Truth, measure_row
from zsad.evaluation.counts import components, mark, mark_object, rank, sorted_counts
from zsad.evaluation.intervals import corrected_interval, interval
from zsad.evaluation.measure import evaluate
from zsad.evaluation.metrics import (
    METRIC_OPERATIONS,
    auroc,
    average_precision,
    f1max,
    metric,
    pixel_auroc_within,
    pro,
)
from zsad.evaluation.protocol import METRICS, Protocol
from zsad.evaluation.resampling import BINS, resample, resample_weights, threshold_bins

DRAWN = METRICS[:-1]  # all but the field's PRO
SCALES = {
    'plain': lambda m: m,
    'float32': lambda m: m.astype(np.float32),
    'saturated': lambda m: np.clip(m, -0.5, 0.5),
    'levels': lambda m: np.round(2 * m).astype(int),
    'binary': lambda m: m > 1,
    'constant': lambda m: 0 * m,
    'endless': lambda m: np.where(m > 2, np.inf, np.where(m < -2, -np.inf, m)),
    'bfloat16': lambda m: torch.from_numpy(m).bfloat16().float().numpy(),
    'bytes': lambda m: np.clip(40 * m + 100, 0, 255).astype(np.uint8),
}


def draw_category(seed, images=12, size=32, side=None, lift=1.2):
    "Maps of smooth noise and squares; the first third of the images is normal."
    rng = np.random.default_rng(seed)
    masks = np.zeros((images, size, size), bool)
    for i in range(images // 3, images):
        for _ in range(rng.integers(1, 3)):
            h = side or rng.integers(1, size // 3)
            y, x = rng.integers(0, size - h, 2)
            masks[i, y : y + h, x : x + h] = True
    noise = ndimage.gaussian_filter(rng.standard_normal(masks.shape), (0, 1.5, 1.5))
    return noise / noise.std() + lift * masks, masks


def from_the_start(maps, masks, weights, limit=0.3):
    c = sorted_counts(np.repeat(maps, weights, 0), components(np.repeat(masks, weights, 0)))
    return dict(auroc=auroc(c), f1max=f1max(c), ap=average_precision(c), pro=pro(c, limit))


def drawn(maps, masks, weights, limit=0.3, within=None, **k):
    regions = components(masks)
    marks = mark(regions)
    ranked = rank(maps, marks if within is None else mark_object(marks, within, only=True))
    bins = threshold_bins(ranked, sorted_counts(maps, regions, within), limit, **k)
    return resample(bins, weights)


def given(maps, masks):
    return maps, masks, maps.reshape(len(maps), -1).max(1), masks.any((1, 2)).astype(int)


def spans(out):
    return np.array(list(out['interval'].values()))


# ---- draws


@pytest.mark.parametrize('limit', [0.01, 0.3, 1.0])
@pytest.mark.parametrize('scale', SCALES)
def test_every_draw_is_exact(scale, limit):
    "Up to BINS distinct anomalous scores, with ties, saturation and infinite scores."
    maps, masks = draw_category(0)
    maps, weights = SCALES[scale](maps), resample_weights(len(maps), ('t',), 12)
    assert len(np.unique(maps[masks])) <= BINS
    got = drawn(maps, masks, weights, limit)
    for i, w in enumerate(weights):
        for k, v in from_the_start(maps, masks, w, limit).items():
            assert got[k][i] == pytest.approx(v, abs=1e-9), (i, k)


@pytest.mark.parametrize('scale', ['plain', 'float32', 'saturated'])
@pytest.mark.parametrize('lift', [0.3, 3.0])
def test_more_scores_than_bins(scale, lift):
    "The set itself stays exact; other draws are as good as exact."
    maps, masks = draw_category(1, images=15, size=96, side=30, lift=lift)
    maps, weights = SCALES[scale](maps), resample_weights(len(maps), ('t',), 8)
    if scale != 'saturated':
        assert len(np.unique(maps[masks])) > 2 * BINS
    got = drawn(maps, masks, weights)
    for k, v in from_the_start(maps, masks, weights[0]).items():
        assert got[k][0] == pytest.approx(v, abs=1e-9)
    for i, w in enumerate(weights[1:], 1):
        for k, v in from_the_start(maps, masks, w).items():
            assert got[k][i] == pytest.approx(v, abs=1e-3), (i, k)
    few = drawn(maps, masks, weights, bins=200)
    for k, v in from_the_start(maps, masks, weights[0]).items():
        assert few[k][0] == pytest.approx(v, abs=1e-9)


def test_draws_without_a_class_are_nan():
    maps, masks = draw_category(2, images=6)
    weights = np.array([[1] * 6, [2, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]])
    got = drawn(maps, masks, weights)
    for k in got:
        assert np.isnan(got[k]).tolist() == [False, True, False]


@pytest.mark.parametrize('draws', [-1, 0.5, True])
def test_number_of_draws(draws):
    with pytest.raises(ValueError, match='draws='):
        evaluate(*given(*draw_category(0)), draws=draws)


# ---- intervals


@pytest.mark.parametrize('side', [1, 2, 4, 8, 20])
@pytest.mark.parametrize('scale', SCALES)
def test_intervals_contain_their_value(scale, side):
    "Histograms of every second pixel gave 99.4 with an interval of 8 to 21 for defects of 4 x 4."
    maps, masks = draw_category(3, images=9, size=64, side=side, lift=4)
    args = given(SCALES[scale](maps), masks)
    out = evaluate(*args, draws=100)
    plain = evaluate(*args)
    assert list(out) == [*METRICS, 'why', 'interval'] and list(out['interval']) == list(METRICS)
    for k in DRAWN:
        low, high = out['interval'][k]
        assert out[k] == plain[k] and 0 <= low <= out[k] <= high <= 1
    assert np.isnan(out['interval']['pro_field']).all() and out['why'] == plain['why']


def test_interval_is_that_of_an_exact_bootstrap():
    maps, masks = draw_category(4)
    out = evaluate(*given(maps, masks), draws=60, seed=3)
    weights = resample_weights(len(maps), ('evaluate', 3), 60)
    want = [from_the_start(maps, masks, w) for w in weights]
    for name, k in (('pixel_auroc', 'auroc'), ('pixel_ap', 'ap'), ('pro', 'pro')):
        assert out['interval'][name] == pytest.approx(
            corrected_interval([v[k] for v in want]), abs=1e-9
        )
    np.testing.assert_array_equal(
        spans(evaluate(*given(maps, masks), draws=60, seed=3)), spans(out)
    )
    assert (spans(evaluate(*given(maps, masks), draws=60, seed=4)) != spans(out))[5].all()
    assert evaluate(*given(maps, masks), draws=1)['interval']['pro'] == (out['pro'], out['pro'])


def test_interval_of_values_and_differences():
    rng = np.random.default_rng(0)
    for bias in (-0.3, -0.05, 0, 0.05, 0.3):
        a = 0.6 + 0.02 * rng.standard_normal((4, 200)) + bias * (np.arange(200) > 0)
        low, high = interval(a)
        assert low <= 100 * a[:, 0].mean() + 1e-9 and high >= 100 * a[:, 0].mean() - 1e-9
        low, high = interval(list(a - a[::-1] - 0.1))  # paired: negative values stay negative
        assert low == high == pytest.approx(-10) or low < -10 < high
    a = rng.standard_normal(2001)
    a[0] = np.median(a)
    assert interval([a]) == pytest.approx(tuple(100 * np.quantile(a, (0.025, 0.975))), abs=5)
    a[5:9] = np.nan
    assert np.isfinite(interval([a])).all()
    for lost in ([], [[]], [[np.nan, 1, 2]]):
        assert np.isnan(interval(lost)).all()


def test_protocols_and_inputs():
    maps, masks = draw_category(5)
    args, inside = given(maps, masks), ndimage.binary_dilation(masks, np.ones((1, 7, 7)))
    want = drawn(maps, masks, resample_weights(len(maps), ('evaluate', 0), 30), within=inside)
    out = evaluate(*args, protocol='within', foreground=inside, draws=30)
    assert out['pixel_auroc'] == pytest.approx(pixel_auroc_within(maps, masks, inside), abs=1e-12)
    low, high = out['interval']['pixel_auroc']
    assert low <= out['pixel_auroc'] <= high
    assert (low, high) != evaluate(*args, draws=30)['interval']['pixel_auroc'] and 'auroc' in want
    half = evaluate(maps, masks[:, ::2, ::2], *args[2:], Protocol(size=16), 30)
    assert all(half['interval'][k][0] <= half[k] <= half['interval'][k][1] for k in DRAWN)
    tensors = evaluate(*map(torch.from_numpy, args), draws=30)
    np.testing.assert_array_equal(spans(tensors), spans(evaluate(*args, draws=30)))
    images = evaluate(None, None, *args[2:], 'images', draws=30)
    assert list(images['interval']) == list(METRICS[:3])


@pytest.mark.parametrize('case', ['nan maps', 'nan scores', 'no masks', 'all normal', 'nothing'])
def test_undefined_values_have_no_interval(case):
    maps, masks, scores, labels = given(*draw_category(6))
    if case == 'nan maps':
        maps[2, :2, :3] = np.nan
    if case == 'nan scores':
        scores[1] = np.nan
    if case == 'no masks':
        masks = None
    if case == 'all normal':
        masks, labels = masks & False, 0 * labels
    if case == 'nothing':
        maps, masks, scores, labels = maps[:0], masks[:0], scores[:0], labels[:0]
    out = evaluate(maps, masks, scores, labels, draws=20)
    lost = {k for k in METRICS if np.isnan(out[k])}
    assert lost == set(out['why']) and lost
    assert {k for k, v in out['interval'].items() if np.isnan(v).all()} == lost | {'pro_field'}


# ---- the bench


def truth(masks, foreground=None):
    kinds = [
        'good' if not m.any() else ('scratch', 'hole', 'dust')[i % 3] for i, m in enumerate(masks)
    ]
    samples = tuple(
        SimpleNamespace(mask='m' if m.any() else None, defect=k) for m, k in zip(masks, kinds)
    )
    return Truth(samples, masks.any((1, 2)).astype(int), masks, foreground)


@pytest.mark.parametrize('scale', SCALES)
def test_rows_and_kinds_of_defect_are_exact(scale):
    maps, masks = draw_category(7, images=14)
    maps, inside = SCALES[scale](maps), ndimage.binary_dilation(masks, np.ones((1, 5, 5)))
    t, scores = truth(masks, inside), maps.reshape(len(maps), -1).max(1)
    values, bootstrap_values, why, defects = measure_row(maps, scores, t, ('set', 'category'))
    want = evaluate(maps, masks, scores, t.labels)
    assert {k: values[k] for k in METRICS} == pytest.approx(
        {k: want[k] for k in METRICS}, abs=1e-12, nan_ok=True
    )
    assert values['pixel_auroc_within'] == pytest.approx(
        pixel_auroc_within(maps, masks, inside), abs=1e-12
    )
    assert set(bootstrap_values) == set(DRAWN) and why == want['why']
    for k in DRAWN:
        assert (
            bootstrap_values[k][0] == pytest.approx(values[k], abs=1e-9)
            and len(bootstrap_values[k]) == 200
        )
    assert set(defects) == {'scratch', 'hole', 'dust'}
    for kind, d in defects.items():
        selected = np.array([s.defect in (kind, 'good') for s in t.samples])
        w = evaluate(maps[selected], masks[selected], scores[selected], t.labels[selected])
        assert d['n'] == sum(s.defect == kind for s in t.samples)
        for k in ('image_auroc', 'pixel_auroc', 'pro'):
            assert d[k] == pytest.approx(w[k], abs=1e-12)


def test_nan_maps_give_nan_everywhere():
    "A defect metric of 0.456 came from maps that were NaN."
    maps, masks = draw_category(8)
    maps[1, 3] = np.nan
    t, scores = truth(masks, masks | True), np.nan_to_num(maps).max((1, 2))
    values, bootstrap_values, why, defects = measure_row(maps, scores, t, ('set', 'category'))
    lost = {*METRICS[3:], 'pixel_auroc_within'}
    assert {k for k, v in values.items() if np.isnan(v)} == lost == set(why)
    assert set(bootstrap_values) == set(METRICS[:3]) and all('32 of' in why[k] for k in lost)
    for d in defects.values():
        assert np.isnan(d['pixel_auroc']) and np.isnan(d['pro']) and 0 <= d['image_auroc'] <= 1
    scores[0] = np.nan
    values, bootstrap_values, why, defects = measure_row(maps, scores, t, ('set', 'category'))
    assert (
        not bootstrap_values
        and set(why) == set(values)
        and all(np.isnan(d['image_auroc']) for d in defects.values())
    )


def test_rows_of_a_category_share_the_marks():
    "The regions are numbered once for all rows; another protocol has its own."
    maps, masks = draw_category(11)
    inside = ndimage.binary_dilation(masks, np.ones((1, 5, 5)))
    shared = truth(masks, inside)
    protocols = (
        Protocol(),
        Protocol(size=16),
        Protocol('within', within='foreground', metrics=METRICS[3:]),
        Protocol(connectivity=4),
    )
    for k, p in enumerate([*protocols, *protocols]):
        m = maps * (k + 1) + masks * k
        scores = m.max((1, 2))
        got = measure_row(m, scores, shared, ('a',), p)
        want = measure_row(m, scores, truth(masks, inside), ('a',), p)
        np.testing.assert_equal(got, want)
        assert len(shared.marks) == min(k + 1, 4)
        out = evaluate(m, masks, scores, shared.labels, p, foreground=inside)
        for name in p.metrics:
            assert got[0][name] == pytest.approx(out[name], abs=1e-12, nan_ok=True)


def test_draws_within_the_object_are_exact():
    maps, masks = draw_category(12)
    inside = np.random.default_rng(0).random(masks.shape) < 0.6
    weights = resample_weights(len(maps), ('t',), 12)
    got = drawn(maps, masks, weights, within=inside)
    for i, w in enumerate(weights):
        c = sorted_counts(
            np.repeat(maps, w, 0), components(np.repeat(masks, w, 0)), np.repeat(inside, w, 0)
        )
        assert got['auroc'][i] == pytest.approx(auroc(c), abs=1e-9)
        assert got['ap'][i] == pytest.approx(average_precision(c), abs=1e-9)
        assert got['pro'][i] == pytest.approx(pro(c), abs=1e-9)
    whole = drawn(maps, masks, weights)
    assert abs(whole['auroc'][0] - got['auroc'][0]) > 1e-6


def test_rows_of_few_metrics_and_sets_without_masks():
    maps, masks = draw_category(9)
    t, scores = truth(masks), maps.max((1, 2))
    full = measure_row(maps, scores, t, ('a',))
    few = measure_row(maps, scores, t, ('a',), Protocol(metrics=('pixel_auroc', 'pro')))
    assert set(few[0]) == set(few[1]) == {'pixel_auroc', 'pro'}
    for k in few[1]:
        assert np.array_equal(few[1][k], full[1][k])
    assert {
        k: {m: v for m, v in d.items() if m != 'image_auroc'} for k, d in full[3].items()
    } == few[3]
    bare = Truth(
        tuple(SimpleNamespace(mask=None, defect=s.defect) for s in t.samples),
        t.labels,
        masks & False,
        None,
    )
    values, bootstrap_values, why, defects = measure_row(maps, scores, bare, ('a',))
    assert (
        set(bootstrap_values) == set(METRICS[:3])
        and 'no masks' in why['pro']
        and np.isnan(values['pro'])
    )


# ---- metrics of one's own, and the package's names


def test_a_metric_of_ones_own():
    @metric('pixel_recall_without_false_alarm', rev=1)
    def strict(c):
        return c.tp[c.fp == 0].max(initial=0) / c.positives

    try:
        maps, masks = draw_category(10, lift=5)
        out = evaluate(
            *given(maps, masks),
            Protocol(metrics=('pixel_recall_without_false_alarm', 'pro')),
            draws=20,
        )
        want = (maps[masks] > maps[~masks].max()).mean()
        assert out['pixel_recall_without_false_alarm'] == pytest.approx(want) and want > 0
        assert np.isnan(out['interval']['pixel_recall_without_false_alarm']).all()
    finally:
        del METRIC_OPERATIONS.operations['pixel_recall_without_false_alarm']
    with pytest.raises(ValueError, match='pixel_recall'):
        Protocol(metrics=('pixel_recall_without_false_alarm',))
    assert all(METRIC_OPERATIONS[k].rev >= 1 for k in METRICS)


def test_public_names_are_loaded_when_used():
    code = (
        "import sys, zsad; assert not {'torch', 'numpy'} & set(sys.modules);"
        "from zsad import evaluate; assert 'torch' not in sys.modules;"
        "from zsad import build, figure, load_dataset, load_encoder, load_image, table;"
        "from zsad import EXHIBITS, METHODS;"
        "assert 'winclip' in METHODS and 'anoclip-t1' in EXHIBITS; print(zsad.__version__)"
    )
    assert subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert zsad.evaluate is evaluate and 'load_encoder' in dir(zsad)
    with pytest.raises(AttributeError, match="'tables'.*'table'"):
        zsad.tables

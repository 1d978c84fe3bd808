"""Table, figure, caption and contrasts of an exhibit agree; intervals cover seeds and images."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from zsad.bench.models import Model
from zsad.bench.plan import compute
from zsad.bench.reading import read_results
from zsad.bench.results import write_results
from zsad.bench.statistics import RowResults, contrast_line, metric_line, seed_draws
from zsad.datasets.loading import load_dataset
from zsad.datasets.survey import scan_dataset
from zsad.papers.exhibit import Exhibit, Row, seeds_of
from zsad.papers.exhibits import EXHIBITS
from zsad.pipeline.rows import METHODS
from zsad.rendered.procad import render_procad
from zsad.reporting.captions import caption
from zsad.reporting.cells import NAMES, cell, column_name, dataset_of
from zsad.reporting.contrasts import contrast_sentence, contrasts
from zsad.reporting.figures import figure
from zsad.reporting.tables import readable, table

ACCEPTED = Path(__file__).parents[1] / 'nbs' / 'results'
ANO, PLUS, DUAL = METHODS['anoclip'], METHODS['anoclip+'], METHODS['dual']
SHOWN = (
    Exhibit(
        'drawn',
        'Rows that draw',
        '',
        (Row('plain', ANO), Row('adapted', PLUS), Row('dual', DUAL)),
        ('mvtec',),
        ('image_auroc', 'pixel_auroc', 'pro'),
        claim='c',
        contrasts=(
            ('adapted', 'plain', 'pixel_auroc'),
            ('dual', 'adapted', 'image_auroc'),
            ('dual', 'plain', 'pro'),
        ),
        print_state='own',
        seeds=3,
    ),
    Exhibit(
        'once',
        'The same rows once',
        '',
        (Row('plain', ANO), Row('adapted', PLUS)),
        ('mvtec',),
        ('pixel_auroc',),
        contrasts=(('adapted', 'plain', 'pixel_auroc'),),
        print_state='own',
    ),
    Exhibit(
        'namesakes',
        'Two methods of one name',
        '',
        (Row('a', replace(ANO, name='x')), Row('b', replace(DUAL, name='x'))),
        ('mvtec',),
        ('pixel_auroc',),
        contrasts=(('b', 'a', 'pixel_auroc'),),
        print_state='own',
    ),
    Exhibit(
        'steps',
        'A curve',
        '',
        (Row('0', ANO), Row('5', PLUS)),
        ('mvtec',),
        ('pixel_auroc', 'pro'),
        'curve',
        'c',
        (('5', '0', 'pro'),),
        'own',
        'steps',
        seeds=2,
    ),
)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A small computed set: plan, results, and what was read back from the files."
    root = render_procad(
        ('pill', 'wood'),
        good=4,
        bad=5,
        train=1,
        size=240,
        root=tmp_path_factory.mktemp('data') / 'd',
        workers=1,
    )
    with pytest.MonkeyPatch.context() as m:
        m.setenv('ZSAD_CACHE', str(tmp_path_factory.mktemp('cache')))
        plan, results = compute(
            SHOWN,
            dict(mvtec=scan_dataset(load_dataset('procad', root), 1)),
            Model(device='cpu'),
            show=False,
        )
    return plan, results, read_results(write_results(tmp_path_factory.mktemp('out'), plan, results))


def drawn_values(e, res):
    "Read values off an exhibit's figure: {(panel, name of the metric, label): percent}."
    fig, out = figure(e, res), {}
    for k, ax in enumerate(fig.axes):
        if e.form == 'curve':
            for line in ax.lines:
                if line.get_label() in NAMES.values():
                    out |= {
                        (k, line.get_label(), str(x)): y
                        for x, y in zip(line.get_xdata(), line.get_ydata())
                    }
        else:
            labels = [t.get_text() for t in fig.axes[k - k % columns(fig)].get_yticklabels()]
            out |= {
                (k // columns(fig), ax.get_title(), label): bar.get_width()
                for label, bar in zip(labels, ax.patches)
            }
    plt.close(fig)
    return out


def columns(fig):
    return fig.axes[0].get_subplotspec().get_gridspec().ncols


def contradictions(e, res):
    "List where table, figure, caption and contrasts of an exhibit differ."
    t, said, bad = table(e, res), caption(e, res), []
    roles = [role for role in e.roles if dataset_of(res, e, role)]
    for (place, metric, label), value in drawn_values(e, res).items():
        shown = [m for m in e.metrics if NAMES[m] == metric]
        own = t.loc[
            label, (column_name(e, roles[place] if roles else e.roles[0], shown[0]), 'ours')
        ]
        if not (abs(own - value) < 1e-9 or own != own and value != value):
            bad.append(('figure', label, metric, own, value))
    for r in contrasts(e, res).itertuples():
        role = next(role for role in roles if dataset_of(res, e, role) == r.dataset)
        span = 'mean' if r.over == 'all' else 'mean objects'
        values = {
            label: cell(res, e, label, role, r.metric, span)[0] for label in (r.better, r.worse)
        }
        if r.over == 'all' and any(
            abs(v - t.loc[l, (column_name(e, role, r.metric), 'ours')]) > 1e-9
            for l, v in values.items()
        ):
            bad.append(('table', r.better, r.worse))
        if not defined_together(res, e, r):
            continue
        if abs(r.difference - (values[r.better] - values[r.worse])) >= 1e-4:
            bad.append(('contrast', r.better, r.worse, r.metric, r.difference, values))
        if not r.low - 1e-4 <= r.difference <= r.high + 1e-4 and r.low == r.high:
            bad.append(('interval', r.better, r.worse))
        if e.claim and contrast_sentence(r, e) not in said:
            bad.append(('caption', contrast_sentence(r, e)))
    return bad


def defined_together(res, e, r):
    "Both rows of a contrast have a value in the same categories."
    m = res.of(e).metrics
    m = m[
        (m.dataset == r.dataset)
        & (m.metric == r.metric)
        & ~m.category.str.startswith('mean')
        & m.value.notna()
    ]
    return set(m[m.row == r.better].category) == set(m[m.row == r.worse].category)


@pytest.mark.parametrize('e', SHOWN, ids=lambda e: e.name)
def test_a_computed_exhibit_does_not_contradict_itself(e, small):
    assert (
        contradictions(e, small[2]) == []
        and len(drawn_values(e, small[2])) >= 2
        and len(contrasts(e, small[2])) >= 1
    )


@pytest.mark.parametrize('name', EXHIBITS)
def test_an_accepted_exhibit_does_not_contradict_itself(name):
    res = read_results(ACCEPTED)
    assert contradictions(EXHIBITS[name], res) == []


def test_the_search_for_contradictions_finds_them(small):
    "A table of the mean of seeds beside a contrast of the first one is found."
    res = small[2]
    own = res.of('drawn')
    first = own.metrics.assign(
        value=own.metrics.seed_values.str.split().str[0].astype(float).fillna(own.metrics.value)
    )
    other = replace(res, exhibits={**res.exhibits, 'drawn': replace(own, metrics=first)})
    assert {b[0] for b in contradictions(SHOWN[0], other)} == {'contrast'}


def test_rows_report_the_mean_over_their_own_seeds(small):
    plan, results, res = small
    e = SHOWN[0]
    m = res.of(e).metrics
    for r in e.rows[:3]:
        runs = plan.shown['drawn', 'procad', r.label]
        assert (
            len(runs) == len(seeds_of(e, r)) == (1 if r.method is ANO else 3)
            and len(plan.shown.get(('once', 'procad', r.label), '1')) == 1
        )
        each = [
            50 * sum(results[k][c]['values']['pixel_auroc'] for c in ('pill', 'wood')) for k in runs
        ]
        value, _, _ = cell(res, e, r.label, 'mvtec', 'pixel_auroc')
        spread = cell(res, e, r.label, 'mvtec', 'pixel_auroc', columns=('spread',))[0]
        assert value == pytest.approx(np.mean(each), abs=1e-4) and (
            spread != spread
            if len(runs) == 1
            else spread == pytest.approx(np.std(each, ddof=1), abs=1e-4)
        )
        line = m[(m.row == r.label) & (m.category == 'mean') & (m.metric == 'pixel_auroc')].iloc[0]
        assert line.seed_values.split() == ([] if len(runs) == 1 else [f'{v:.4f}' for v in each])


def test_methods_that_share_a_name_are_two_runs(small):
    plan, _, res = small
    e = SHOWN[2]
    a, b = (cell(res, e, l, 'mvtec', 'pixel_auroc')[0] for l in 'ab')
    assert a == cell(res, SHOWN[1], 'plain', 'mvtec', 'pixel_auroc')[0] != b
    assert (
        len({*plan.shown['namesakes', 'procad', 'a'], *plan.shown['namesakes', 'procad', 'b']}) == 2
    )
    assert (
        plan.shown['namesakes', 'procad', 'a'] == plan.shown['drawn', 'procad', 'plain']
    )  # and one method of two names is one run
    assert list(res.of(e).runs.method[:2]) == ['x', 'x']


def made(seeds, values, spread=0.0, label='r', kind='object'):
    "Make results of a row: a value per seed; bootstrap over images moves them by up to `spread`."
    rng = np.random.default_rng(1)
    wobble = np.concatenate([[0], rng.uniform(-spread, spread, 199)])

    def by(v):
        return {
            'pill': dict(
                values=dict(pro=v),
                bootstrap_values=dict(pro=list(v + wobble)),
                why={},
                defects={},
                n=9,
                kind=kind,
            )
        }

    return RowResults(label, tuple(seeds), tuple(map(str, seeds)), tuple(by(v) for v in values))


def test_intervals_of_what_is_learned_cover_seeds():
    wide, narrow = (
        metric_line(made(range(5), v), 'pro', 'mean', ['pill'])
        for v in ((0.5, 0.6, 0.7, 0.8, 0.9), (0.7,) * 5)
    )
    value, low, high, spread = map(float, wide[2:6])
    assert (
        value == 70
        and low < 62
        and high > 78
        and spread == pytest.approx(100 * np.std([0.5, 0.6, 0.7, 0.8, 0.9], ddof=1), abs=1e-4)
    )
    assert [float(v) for v in narrow[2:6]] == [70, 70, 70, 0] and metric_line(
        made([0], [0.7]), 'pro', 'mean', ['pill']
    )[5] == ''
    images = metric_line(made([0], [0.7], 0.1), 'pro', 'mean', ['pill'])
    assert float(images[4]) - float(images[3]) > 15  # images alone


def test_the_first_draw_is_the_value_itself():
    assert (
        seed_draws((0, 1, 2), 200)[0].tolist() == [0, 1, 2]
        and seed_draws((4,), 200).max() == 0
        and seed_draws((0, 1, 2), 200).shape == (200, 3)
    )
    row = made(range(3), (0.1, 0.2, 0.6), 0.05)
    assert row.bootstrap('pill', 'pro')[0] == pytest.approx(0.3) == row.values('pill', 'pro').mean()


def test_rows_of_the_same_seeds_are_compared_seed_by_seed():
    "The difference of rows is certain where their seeds are paired, and not where they differ."
    a, b = made(range(5), (0.5, 0.6, 0.7, 0.8, 0.9)), made(range(5), (0.4, 0.5, 0.6, 0.7, 0.8))
    _, _, difference, low, high, *seeds = contrast_line(a, b, 'pro', 'all')
    assert (float(difference), float(low), float(high), seeds) == (10, 10, 10, [5, 5])
    _, _, difference, low, high, *_ = contrast_line(
        a, made(range(1, 6), (0.4, 0.5, 0.6, 0.7, 0.8)), 'pro', 'all'
    )
    assert float(difference) == 10 and float(low) < 0 < 20 < float(high)


def test_the_verdict_of_a_learned_row_knows_the_spread_of_trainings():
    "Ahead with one seed, and not shown to be ahead over five."
    base = made([0], [0.7])
    one, five = made([0], [0.75]), made(range(5), (0.75, 0.68, 0.73, 0.69, 0.76))

    def told(row):
        return contrast_sentence(
            pd.Series(
                dict(
                    zip(
                        ('metric', 'over', 'difference', 'low', 'high'),
                        (lambda l: (*l[:2], *map(float, l[2:5])))(
                            contrast_line(row, base, 'pro', 'all')
                        ),
                    )
                )
                | dict(better='a', worse='b', dataset='procad')
            )
        )

    assert (
        told(one).endswith('holds')
        and told(made(range(5), (0.75, 0.60, 0.73, 0.69, 0.76))).endswith('is not shown')
        and told(five)
    )


def test_captions_say_what_intervals_cover(small):
    _, _, res = small
    assert 'over seeds where a row has several (adapted: 3, dual: 3)' in caption(
        SHOWN[0], res
    ) and 'One seed' not in caption(SHOWN[0], res)
    assert 'One seed, so that the interval covers images alone: adapted.' in caption(
        SHOWN[1], res
    ) and 'over seeds' not in caption(SHOWN[1], res)
    assert (
        '±' in readable(table(SHOWN[0], res)).loc['adapted', 'PRO']
        and '±' not in readable(table(SHOWN[0], res)).loc['plain', 'PRO']
    )

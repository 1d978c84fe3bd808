"""Open choices of the papers: each switch changes the fields that the notebook names alone.

The tables are data of the package: open_points.csv (table, where, paper, code, here, field, row),
and parity.csv, what equals public code.
"""

import csv
import json
import re
from collections import Counter
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pytest

from zsad.bench.reading import read_results
from zsad.methods.prompt_sets import prompt_set
from zsad.papers.exhibits import EXHIBITS
from zsad.papers.exhibits_fidelity import SWITCHES, switch_temperature
from zsad.pipeline.references import REFERENCES
from zsad.pipeline.rows import METHODS, find_method
from zsad.pipeline.scores import SCORES
from zsad.pipeline.terms import TERMS
from zsad.reporting.cells import NAMES
from zsad.reporting.contrasts import contrasts

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'nbs' / 'results'
NOTEBOOK = ROOT / 'nbs' / 'papers' / 'fidelity.ipynb'
CELLS = [c for c in json.loads(NOTEBOOK.read_text())['cells'] if c['cell_type'] == 'code']
PAGE = json.dumps(json.loads(NOTEBOOK.read_text()), ensure_ascii=False)


def rows_of(name: str) -> list:
    "Lines of a table of the package, as tuples."
    with (files('zsad') / 'assets' / name).open(newline='', encoding='utf-8') as f:
        return [tuple(line) for line in csv.reader(f)][1:]


PARITY = rows_of('parity.csv')
LEDGER = [row[1:] for row in rows_of('open_points.csv')]
FIELD = {row[5]: row[4] for row in LEDGER}
BY_NAME = {s.changed.name: s for s in SWITCHES}


def with_defaults(kind, registry, name, given) -> dict:
    "All parameters of an operation by dotted names, defaults filled in."
    values = {k: p.default for k, p in registry[name].parameters.items()} | given
    return {f'{kind}.{k}': v for k, v in values.items()}


PLAIN_FIELDS = 'term_weights smoothing align_corners set_steps seed interpolation artifact'.split()


def prompt_fields(prompts) -> dict:
    "What a row's prompts hold, by dotted names."
    if prompts is None:
        return {'prompts': None}
    found = prompt_set(prompts)
    names = [f.name for f in fields(found) if f.name not in ('name', 'source')]
    return {f'prompts.{name}': getattr(found, name) for name in names}


def flat(m) -> dict:
    "All that a row says, by dotted names, defaults filled in."
    out = {name: getattr(m, name) for name in PLAIN_FIELDS}
    out |= {'terms': [n for n, _ in m.terms], 'score': m.score[0], 'reference': m.reference[:1]}
    for name, given in m.terms:
        out |= with_defaults(name, TERMS, name, given)
    if m.reference:
        out |= with_defaults('reference', REFERENCES, *m.reference)
    out |= {f'encode.{f.name}': getattr(m.encode, f.name) for f in fields(m.encode)}
    return out | prompt_fields(m.prompts) | with_defaults('score', SCORES, *m.score)


def changed_fields(a, b) -> set:
    "Names of the fields in which two rows differ; another score is named as a whole."
    a, b = flat(a), flat(b)
    names = {k for k in {*a, *b} if a.get(k, '-') != b.get(k, '-')}
    if 'score' in names:
        names = {k for k in names if not k.startswith('score.')}
    return names


@pytest.mark.parametrize('name', BY_NAME)
def test_a_switched_row_differs_in_the_named_field_alone(name):
    s = BY_NAME[name]
    found = changed_fields(s.base, s.changed)
    assert found == set(FIELD[name].split(', ')) != set()
    assert len(found) <= 2 or name.endswith('@code')


def test_changed_fields_are_found():
    dual, winclip, anoclip = METHODS['dual'], METHODS['winclip'], METHODS['anoclip']
    assert changed_fields(dual, replace(dual, name='b', source='c')) == set()
    assert changed_fields(dual, find_method('dual')) == set()
    other = replace(dual, seed=1, term_weights=(0.4, 0.6))
    assert changed_fields(dual, other) == {'seed', 'term_weights'}
    two = replace(dual, reference=('pair', dict(count=2)))
    assert changed_fields(dual, two) == {'reference.count'}
    default = replace(dual, reference=('pair', dict(count=1)))
    assert changed_fields(dual, default) == set()
    assert changed_fields(winclip, replace(winclip, score=('max', {}))) == {'score'}
    warmer = switch_temperature('anoclip', 'text', 0.3).changed
    assert changed_fields(anoclip, warmer) == {'text.tau', 'score.tau'}


def trained_readings() -> set:
    "Names of the trained rows of the exhibit about readings of KAnoCLIP."
    rows = EXHIBITS['kanoclip-readings'].rows[1:]
    return {r.method.name for r in rows if r.own and r.method}


def test_the_ledger_names_every_switch_once_and_no_other_row():
    for row in LEDGER:
        assert len(row) == 6 and all(isinstance(v, str) for v in row) and row[4]
        assert row[0] or row[5] in BY_NAME
    rows, trained = Counter(row[5] for row in LEDGER), trained_readings()
    assert not {*BY_NAME, *trained} - set(rows)
    for row, n in rows.items():
        if row in BY_NAME or row in trained:
            assert n == 1, row
        elif row.startswith('see '):
            named = set(re.findall('`(.+?)`', row))
            assert named and named <= set(EXHIBITS), row
        else:
            assert re.match('not measurable here: .{6,}', row), row


def test_the_exhibits_are_the_switches():
    e, views = EXHIBITS['fidelity'], EXHIBITS['fidelity-views']
    assert e.on_request and views.on_request and e.paper == views.paper == ''
    assert len(BY_NAME) == len(SWITCHES)
    rows = (*e.rows, *views.rows)
    names = {m.name for s in SWITCHES for m in (s.base, s.changed)}
    assert {r.label for r in rows} >= names
    expected = [(s.changed.name, s.base.name, metric) for s in SWITCHES for metric in s.metrics]
    assert sorted(e.contrasts + views.contrasts) == sorted(expected)
    assert all(r.method.encode.views == 'one' for r in e.rows if r.method)
    methods = {r.label: r.method for r in rows if r.own and r.method}
    for s in SWITCHES:
        assert methods[s.base.name] == s.base and methods[s.changed.name] == s.changed


def test_a_name_means_one_row_everywhere():
    methods = dict(METHODS)
    for e in EXHIBITS.values():
        for m in (r.method for r in e.rows if r.method):
            assert methods.setdefault(m.name, m) == m, (e.name, m.name)


IMAGES = ('image_auroc',)
OF_MAPS = {'smoothing', 'align_corners', 'term_weights', 'terms'} | {
    f'{t}.{k}' for t in TERMS for k in TERMS[t].parameters
}
NO_MAP_READ = ('class', 'views')  # scores that read no map
OF_IMAGES = {'score', 'score.beta', 'set_steps', 'encode.views'}


@pytest.mark.parametrize('name', BY_NAME)
def test_metrics_that_cannot_change_are_left_out_and_no_others(name):
    s = BY_NAME[name]
    found = changed_fields(s.base, s.changed)
    apart = s.base.score[0] in NO_MAP_READ and s.changed.score[0] in NO_MAP_READ
    maps_alone = found <= OF_MAPS | {'encode.paths', 'encode.stage', 'seed'}
    assert ('image_auroc' in s.metrics) == (not apart or not maps_alone)
    assert (s.metrics != IMAGES) == bool(found - OF_IMAGES)


def as_number(text: str):
    "A number such as 1e-6, or None."
    return float(text) if re.fullmatch(r'\de-\d+', text) else None


def label(row):
    return row[0]


@pytest.mark.parametrize('row', PARITY, ids=label)
def test_what_is_called_equal_is_tested(row):
    _, code, _, largest, tolerance, tested_by = row
    file, test = tested_by.split('::')
    source = (ROOT / file).read_text()
    assert re.search(rf'^(def {test}\(|{test} = )', source, re.M), tested_by
    for commit in re.findall(r'\b[0-9a-f]{7}\b', code):
        assert commit in source, commit
    if as_number(tolerance):
        assert tolerance in source or f'{tolerance[:-3]}e-{tolerance[-1]}' in source
        assert as_number(largest) is None or as_number(largest) <= as_number(tolerance)


def stored_effects() -> pd.DataFrame:
    "The contrasts of the switches among the stored results."
    exhibits = [EXHIBITS[name] for name in ('fidelity', 'fidelity-views')]
    results = read_results(RESULTS)
    found = pd.concat([contrasts(e, results) for e in exhibits])
    if not len(found):
        return found
    bases = {s.base.name for s in SWITCHES}
    return found[[name in bases for name in found.worse]]


def test_the_page_says_what_is_missing():
    found = stored_effects()
    missing = set(BY_NAME) - (set(found.better) if len(found) else set())
    printed = ''.join(t for c in CELLS for o in c.get('outputs', []) for t in o.get('text', []))
    sentence = 'missing, make them with `zsad reproduce fidelity fidelity-views`'
    assert (sentence in printed) == bool(missing)
    assert all(name in PAGE for name in BY_NAME)


def test_stored_effects_stand_on_the_page():
    "Every effect is on the page, and every switch changes some metric."
    found = stored_effects()
    for r in found.itertuples():
        d, low, high = (round(v, 2) + 0.0 for v in (r.difference, r.low, r.high))
        text = f'{NAMES[r.metric]} {d:+.2f} [{low:.2f}, {high:.2f}]'
        assert text in PAGE, (r.better, r.metric)
    for name, g in found.groupby('better') if len(found) else ():
        effect = g.difference.abs() + g.low.abs() + g.high.abs()
        assert effect.max() > 0, f'{name} changes nothing at all'

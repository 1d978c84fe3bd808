"""Where papers are silent: every switched row differs from its base in the fields that the notebook names and in no other, and what the notebook tells is there.

The notebook's tables are read from its cells: lists of (where, paper, code, here, field, row), and of what equals public code.
"""

import json
import re
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import pytest

from zsad.methods.prompts import prompt_set
from zsad.papers.exhibits import EXHIBITS, SILENT, switch
from zsad.pipeline.detector import METHODS, REFERENCES, SCORES, TERMS, find_method
from zsad.reporting.tables import NAMES, contrasts, read_results

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / 'nbs' / '34_fidelity.ipynb'
CODE = [
    ''.join(c['source'])
    for c in json.loads(NOTEBOOK.read_text())['cells']
    if c['cell_type'] == 'code'
]
PAGE = json.dumps(json.loads(NOTEBOOK.read_text()), ensure_ascii=False)


def told(source):
    "The list that a cell assigns to a name in capitals, if it does."
    m = re.match(r'([A-Z]+) = (\[.*?^\])', source, re.S | re.M)
    return {m[1]: eval(m[2], {})} if m else {}


LISTS = {k: v for s in CODE for k, v in told(s).items()}
PARITY, LEDGER = (
    LISTS['PARITY'],
    [row for k, rows in LISTS.items() if k != 'PARITY' for row in rows],
)
FIELD = {row[5]: row[4] for row in LEDGER}
SWITCHES = {m.name: (base, m, metrics) for base, m, metrics in SILENT}


def call(kind, parts, name, given):
    return {
        f'{kind}.{k}': v
        for k, v in {**{k: p.default for k, p in parts[name].parameters.items()}, **given}.items()
    }


def flat(m):
    "All that a row says, by dotted names, defaults filled in."
    out = {
        f.name: getattr(m, f.name)
        for f in fields(m)
        if f.name
        in (
            'term_weights',
            'smoothing',
            'align_corners',
            'set_steps',
            'seed',
            'interpolation',
            'artifact',
        )
    } | {'terms': [n for n, _ in m.terms], 'score': m.score[0], 'reference': m.reference[:1]}
    for n, given in m.terms:
        out |= call(n, TERMS, n, given)
    if m.reference:
        out |= call('reference', REFERENCES, *m.reference)
    text = None if m.prompts is None else prompt_set(m.prompts)
    out |= {f'encode.{f.name}': getattr(m.encode, f.name) for f in fields(m.encode)} | (
        {
            f'prompts.{f.name}': getattr(text, f.name)
            for f in fields(text)
            if f.name not in ('name', 'source')
        }
        if text
        else {'prompts': None}
    )
    return out | call('score', SCORES, *m.score)


def changed(a, b):
    "Names of the fields in which two rows differ; another score is named as a whole."
    a, b = flat(a), flat(b)
    names = {k for k in {*a, *b} if a.get(k, '-') != b.get(k, '-')}
    return {k for k in names if not (k.startswith('score.') and 'score' in names)}


@pytest.mark.parametrize('name', SWITCHES)
def test_a_switched_row_differs_in_the_named_field_alone(name):
    base, m, _ = SWITCHES[name]
    assert changed(base, m) == set(FIELD[name].split(', ')) != set()
    assert len(changed(base, m)) <= 2 or name.endswith('@code')


def test_what_changed_is_seen():
    a = METHODS['dual']
    assert (
        changed(a, replace(a, name='b', source='c')) == set()
        and changed(a, find_method('dual')) == set()
    )
    assert changed(a, replace(a, seed=1, term_weights=(0.4, 0.6))) == {
        'seed',
        'term_weights',
    } and changed(a, replace(a, reference=('pair', dict(count=2)))) == {'reference.count'}
    assert (
        changed(METHODS['winclip'], replace(METHODS['winclip'], score=('max', {}))) == {'score'}
        and changed(a, replace(a, reference=('pair', dict(count=1)))) == set()
    )  # the default, spelled out
    assert changed(METHODS['anoclip'], switch('anoclip', 'x', ('pro',), tau=0.3)[1]) == {
        'text.tau',
        'score.tau',
    }


def test_every_switch_is_told_once_and_every_row_told_is_there():
    rows = Counter(row[5] for row in LEDGER)
    trained = {r.method.name for r in EXHIBITS['kanoclip-readings'].rows[1:] if r.own and r.method}
    assert all(
        len(row) == 6 and all(isinstance(v, str) for v in row) and row[4] for row in LEDGER
    ) and not {*SWITCHES, *trained} - set(rows)
    for row, n in rows.items():
        if row in SWITCHES or row in trained:
            assert n == 1, row
        elif row.startswith('see '):
            assert re.findall('`(.+?)`', row) and set(re.findall('`(.+?)`', row)) <= set(
                EXHIBITS
            ), row
        else:
            assert re.match('not measurable here: .{6,}', row), row
    assert all(row[0] or row[5] in SWITCHES for row in LEDGER)


def test_the_exhibit_is_the_switches():
    e, f = EXHIBITS['fidelity'], EXHIBITS['fidelity-views']
    shown = (*e.rows, *f.rows)
    assert (
        e.asked
        and f.asked
        and e.paper == f.paper == ''
        and {r.label for r in shown if r not in EXHIBITS['untrained'].rows[-2:]}
        >= {m.name for b, m, _ in SILENT} | {b.name for b, m, _ in SILENT}
    )
    assert (
        sorted(e.contrasts + f.contrasts)
        == sorted((m.name, base.name, metric) for base, m, metrics in SILENT for metric in metrics)
        and all(m.encode.views == 'one' for m in (r.method for r in e.rows) if m)
        and len(SWITCHES) == len(SILENT)
    )
    methods = {r.label: r.method for r in shown if r.own and r.method}
    assert all(methods[base.name] == base and methods[m.name] == m for base, m, _ in SILENT)
    for name, known in METHODS.items():
        assert methods.get(name, known) == known  # a name means one row everywhere
    names = [(r.method.name, r.method) for x in EXHIBITS.values() for r in x.rows if r.method]
    assert all(a == b for n, a in names for k, b in names if n == k)


IMAGES = ('image_auroc',)
OF_MAPS = {'smoothing', 'align_corners', 'term_weights', 'terms'} | {
    f'{t}.{k}' for t in TERMS for k in TERMS[t].parameters
}


@pytest.mark.parametrize('name', SWITCHES)
def test_metrics_that_cannot_change_are_left_out_and_no_others(name):
    base, m, metrics = SWITCHES[name]
    what = changed(base, m)
    apart = base.score[0] in ('class', 'views') and m.score[0] in (
        'class',
        'views',
    )  # scores that read no map
    assert ('image_auroc' in metrics) == (
        not apart or not (what <= OF_MAPS | {'encode.paths', 'encode.stage', 'seed'})
    )
    assert (metrics != IMAGES) == bool(what - {'score', 'score.beta', 'set_steps', 'encode.views'})


@pytest.mark.parametrize('line', PARITY, ids=lambda l: l[0])
def test_what_is_called_equal_is_tested(line):
    _, code, _, most, held, by = line
    file, test = by.split('::')
    source = (ROOT / file).read_text()
    assert re.search(rf'^(def {test}\(|{test} = )', source, re.M), by
    for commit in re.findall(r'\b[0-9a-f]{7}\b', code):
        assert commit in source, commit

    def number(s):
        return float(s) if re.fullmatch(r'\de-\d+', s) else None

    if number(held):
        assert held in source or f'{held[:-3]}e-{held[-1]}' in source
        assert number(most) is None or number(most) <= number(held)


def test_stored_effects_are_those_of_the_results():
    "Before the exhibit was run the notebook says so; afterwards every effect stands in it, and none of a switch that switches nothing."
    found = pd.concat(
        [
            contrasts(EXHIBITS[name], read_results(ROOT / 'nbs' / 'results'))
            for name in ('fidelity', 'fidelity-views')
        ]
    )
    found = found[[w in {b.name for b, *_ in SILENT} for w in found.worse]] if len(found) else found
    lacking = set(SWITCHES) - (set(found.better) if len(found) else set())
    printed = ''.join(
        t
        for c in json.loads(NOTEBOOK.read_text())['cells']
        for o in c.get('outputs', [])
        for t in o.get('text', [])
    )
    assert ('missing, make them with `zsad reproduce fidelity fidelity-views`' in printed) == bool(
        lacking
    ) and all(name in PAGE for name in SWITCHES)
    for r in found.itertuples():
        d, low, high = (round(v, 2) + 0.0 for v in (r.difference, r.low, r.high))
        assert f'{NAMES[r.metric]} {d:+.2f} [{low:.2f}, {high:.2f}]' in PAGE, (r.better, r.metric)
    for name, g in found.groupby('better') if len(found) else ():
        assert (g.difference.abs() + g.low.abs() + g.high.abs()).max() > 0, (
            f'{name} changes nothing at all'
        )

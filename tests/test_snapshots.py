"Rows compute what is stored for them, and a difference names its operation."

import copy

import pytest
import snapshot
import torch
from snapshot import FILE, all_rows, compute, differs, message, refused, unpack


@pytest.fixture(scope='module')
def stored():
    return unpack(FILE.read_text())


@pytest.fixture(scope='module')
def now():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield compute()
    torch.set_num_threads(threads)


def test_every_row_computes_what_is_stored(stored, now):
    text = message(stored, now)
    assert not text, text


def test_every_row_of_the_exhibits_is_computed_or_named(stored):
    rows = all_rows()
    assert set(rows) == set(stored['rows']) | set(stored['skipped']) and len(stored['rows']) >= 117
    assert {why for _, why in stored['skipped'].values()} <= {
        'artifact not shipped',
        'needs more than 6 blocks',
    }
    assert {r['method'].name for r in rows.values()} >= set(snapshot.METHODS)
    assert {
        f'{kind} {name}'
        for kind, registry in (('term', snapshot.TERMS), ('score', snapshot.SCORES))
        for name in registry
    } <= set(stored['revs'])
    assert FILE.stat().st_size < 1e6


def changed(stored, name, stage):
    "Give a copy in which the numbers of one stage of a row, and all behind it, are 1 % higher."
    out = copy.deepcopy(stored)
    row = next(r for r in out['rows'].values() if r['name'] == name)
    at = [s for _, s, _ in row['stages']].index(stage)
    row['stages'][at:] = [
        [c, s, [[1.01 * v for v in a] for a in t]] for c, s, t in row['stages'][at:]
    ]
    return out


@pytest.mark.parametrize(
    'name,stage,op',
    [
        ('dual', 'term pair', 'term pair'),
        ('dual', 'score joint', 'score joint'),
        ('musc', 'set_step rscin', 'set_step rscin'),
        ('dual', 'reference pair', 'reference pair'),
        ('winclip', 'encoding windows 2', 'encoding'),
        ('anoclip+@code', 'smoothing', 'pipeline'),
        ('anoclip', 'upsampling', 'pipeline'),
        ('clip', 'prompts', 'pipeline'),
        ('mvfa', 'head mvfa', 'head mvfa'),
        ('clip', 'preprocessing', 'pipeline'),
    ],
)
def test_the_first_difference_names_its_operation(stored, name, stage, op):
    text = message(stored, changed(stored, name, stage))
    assert text.startswith(f'{op} (rev 1) gives other values in 1 rows: {name}\n')
    assert f'{name} first differs at {stage!r} on bottle, image ' in text
    assert (
        'Fix the code, or raise the rev of' in text and 'python tests/snapshot.py --store' in text
    )


def test_values_and_revisions_change_together(stored):
    "Other values under the same revision, and another revision without new values, are refused."
    other = changed(stored, 'dual', 'term pair')
    assert refused(stored, other) == ['term pair']
    other['revs'] = {**stored['revs'], 'term pair': 2}
    assert refused(stored, other) == []
    assert 'term pair has rev 2, the stored values are of rev 1' in message(
        stored, {**stored, 'revs': other['revs']}
    )
    assert message(stored, stored) == ''


def test_new_and_lost_rows_are_named(stored):
    key = next(iter(stored['rows']))
    less = {**stored, 'rows': {k: r for k, r in stored['rows'].items() if k != key}}
    name = stored['rows'][key]['name']
    assert (
        message(less, stored) == f'{name}: is not among the stored rows; store the values of today'
    )
    assert (
        message(stored, less)
        == f'{name}: is stored and no longer computed; store the values of today'
    )
    assert message(stored, less, whole=False) == ''


def test_the_file_holds_what_was_packed(stored):
    again = unpack(snapshot.pack(stored))
    assert {k: again[k] for k in ('rows', 'revs', 'skipped')} == {
        k: stored[k] for k in ('rows', 'revs', 'skipped')
    }


def test_differences_are_measured_by_the_size_of_the_stage():
    "A difference counts from 2e-5 of the largest stored value; NaN and lost images count too."
    was = [[0.5, 0.1, 2.0], [0.5, 0.2, 1.0]]
    near, far = [[0.5, 0.1, 2.0], [0.5, 0.2 + 3e-5, 1.0]], [[0.5, 0.1, 2.0], [0.5, 0.2 + 5e-5, 1.0]]
    assert differs(was, near) is None and differs(was, was) is None
    assert differs(was, far)[:2] == (1, 1)
    assert differs(was, [[0.5, 0.1, 2.0], [0.5, float('nan'), 1.0]])[:2] == (1, 1)
    assert differs(was, was[:1])[2:] == ('2 images', '1 images')

"""Accepting results: what is replaced, what stays, and what a failure leaves behind.

Also whether the accepted results are those of today's code.
"""

import warnings
from pathlib import Path

import nbformat
import pytest

from zsad.bench import accept as accepting
from zsad.bench import outdated
from zsad.bench.accept import accept, same_results, unaccepted
from zsad.bench.outdated import identity_of, outdated_results
from zsad.bench.pages import code_of_page, joined_streams, pages_of, shows
from zsad.bench.plan import Plan
from zsad.bench.reading import UNACCEPTED
from zsad.bench.records import run_key
from zsad.bench.results import to_csv
from zsad.papers.exhibit import COLUMNS
from zsad.papers.exhibits import EXHIBITS
from zsad.reporting.captions import caption
from zsad.reporting.figures import figure
from zsad.reporting.tables import readable, table

ROOT = Path(__file__).parents[1]
ACCEPTED = ROOT / 'nbs' / 'results'


def write_exhibit(folder, name, value='50', seconds='1.0'):
    "Write made-up results of an exhibit."
    (folder / name).mkdir(parents=True, exist_ok=True)
    for n in COLUMNS:
        (folder / name / f'{n}.csv').write_text(f'dataset,row,value\nprocad,a,{value}\n')
    runs = f'dataset,row,run,seconds_scoring\nprocad,a,x,{seconds}\n'
    (folder / name / 'runs.csv').write_text(runs)


def plan_of(name):
    "The plan of which `write_exhibit` writes the results."
    return Plan((EXHIBITS[name],), shown={(name, 'procad', 'a'): ['x']})


def notebook(path, code):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), path)


def output(path):
    return nbformat.read(path, 4).cells[0].outputs[0]['data']['text/plain']


@pytest.fixture
def checkout(tmp_path):
    "A checkout with two accepted exhibits, a page for each, and an index."
    root = tmp_path / 'checkout'
    (root / 'nbs' / 'results').mkdir(parents=True)
    (root / 'settings.ini').write_text('')
    for name in ('anoclip-t1', 'anoclip-t3'):
        write_exhibit(root / 'nbs' / 'results', name)
        notebook(
            root / 'nbs' / f'{name}.ipynb',
            f"open('results/{name}/metrics.csv').read() + len('{name}')*''",
        )
    notebook(root / 'nbs' / 'index.ipynb', "sorted(__import__('os').listdir('results'))")
    return root


def state(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()}


def test_an_exhibit_replaces_its_own_folder_and_its_pages_are_executed(checkout, tmp_path):
    before = state(checkout)
    write_exhibit(tmp_path / 'new', 'anoclip-t3', '60')
    changed, pages = accept(tmp_path / 'new', plan_of('anoclip-t3'), folder=checkout)
    assert changed == ['anoclip-t3'] and sorted(p.stem for p in pages) == ['anoclip-t3', 'index']
    after = state(checkout)
    touched = {k for k in after if after[k] != before.get(k)}
    assert touched == {f'nbs/results/anoclip-t3/{n}.csv' for n in COLUMNS if n != 'runs'} | {
        'nbs/anoclip-t3.ipynb',
        'nbs/index.ipynb',
        f'nbs/results/{UNACCEPTED}',
    }
    assert (
        'procad,a,60' in output(checkout / 'nbs' / 'anoclip-t3.ipynb')
        and before.keys() <= after.keys()
    )


def test_what_is_not_accepted_yet_is_listed(checkout, tmp_path):
    write_exhibit(tmp_path / 'new', 'anoclip-t2')
    accept(tmp_path / 'new', plan_of('anoclip-t2'), folder=checkout)
    listed = (checkout / 'nbs' / 'results' / UNACCEPTED).read_text().split()
    assert (
        listed
        == [n for n in EXHIBITS if n not in ('anoclip-t1', 'anoclip-t2', 'anoclip-t3')]
        == unaccepted(checkout / 'nbs' / 'results')
    )


@pytest.mark.parametrize('how', ['notebook', 'readme', 'killed'])
def test_a_failure_leaves_everything_as_it_was(checkout, tmp_path, monkeypatch, how):
    if how == 'notebook':
        notebook(
            checkout / 'nbs' / 'other.ipynb',
            "1/0 if '60' in open('results/anoclip-t3/metrics.csv').read() else len('anoclip-t3')",
        )
    if how == 'readme':
        (checkout / '.ci').mkdir()
        (checkout / '.ci' / 'readme.py').write_text('raise SystemExit(1)')
    if how == 'killed':

        def interrupt(*a):
            raise KeyboardInterrupt

        monkeypatch.setattr(accepting, 'move_changed', interrupt)
    before = state(checkout)
    write_exhibit(tmp_path / 'new', 'anoclip-t3', '60')
    with pytest.raises(
        (ValueError, KeyboardInterrupt),
        match={'notebook': 'other.ipynb', 'readme': 'readme.py'}.get(how),
    ):
        accept(tmp_path / 'new', plan_of('anoclip-t3'), folder=checkout)
    assert state(checkout) == before


def test_results_that_say_the_same_are_left_alone(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(accepting, 'execute', lambda p: pytest.fail('a notebook was executed'))
    before = state(checkout)
    write_exhibit(tmp_path / 'new', 'anoclip-t3', seconds='9.9')
    assert accept(tmp_path / 'new', plan_of('anoclip-t3'), folder=checkout) == ([], [])
    assert state(checkout) == before
    assert same_results(
        tmp_path / 'new' / 'anoclip-t3', checkout / 'nbs' / 'results' / 'anoclip-t3'
    )


def test_results_that_the_run_did_not_write_are_refused(checkout, tmp_path):
    before = state(checkout)
    with pytest.raises(FileNotFoundError, match='anoclip-t4'):
        accept(tmp_path / 'new', plan_of('anoclip-t4'), folder=checkout)
    with pytest.raises(FileNotFoundError, match='cost.csv'):
        accept(tmp_path / 'new', cost=True, folder=checkout)
    assert state(checkout) == before


def test_results_of_another_run_are_refused(checkout, tmp_path):
    "A folder that an earlier run of other rows or other code wrote is not what the plan ran."
    before = state(checkout)
    write_exhibit(tmp_path / 'new', 'anoclip-t3', '60')
    plan = Plan((EXHIBITS['anoclip-t3'],), shown={('anoclip-t3', 'procad', 'a'): ['y']})
    with pytest.raises(ValueError, match='not those of the plan'):
        accept(tmp_path / 'new', plan, folder=checkout)
    assert state(checkout) == before


def test_pages_run_in_their_own_folder(checkout, tmp_path):
    (checkout / 'nbs' / 'papers').mkdir()
    page = checkout / 'nbs' / 'papers' / 'below.ipynb'
    notebook(page, "open('../results/anoclip-t3/metrics.csv').read() + 'anoclip-t3'")
    write_exhibit(tmp_path / 'new', 'anoclip-t3', '60')
    _, pages = accept(tmp_path / 'new', plan_of('anoclip-t3'), folder=checkout)
    assert page in pages and 'procad,a,60' in output(page)


def test_costs_are_accepted_with_the_pages_that_show_them(checkout, tmp_path):
    notebook(
        checkout / 'nbs' / 'times.ipynb', "open('results/cost.csv').read() + len('anoclip-t7')*''"
    )
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new' / 'cost.csv').write_text('part\nrows\n')
    _, pages = accept(tmp_path / 'new', cost=True, folder=checkout)
    assert sorted(p.stem for p in pages) == ['index', 'times'] and 'rows' in output(
        checkout / 'nbs' / 'times.ipynb'
    )


def test_every_exhibit_on_a_page_of_the_project_is_found_there():
    "The search by which pages are chosen sees each page that shows an exhibit."
    nbs = ROOT / 'nbs'
    code = {p.relative_to(nbs).as_posix(): code_of_page(p) for p in nbs.rglob('*.ipynb')}
    assert len(code) > 50 and len({p.split('/')[0] for p in code}) > 8
    pages = {n: {p for p, text in code.items() if shows(text, [n])} for n in EXHIBITS}
    assert {'papers/anoclip.ipynb', 'methods/attention.ipynb', 'index.ipynb'} <= pages['anoclip-t3']
    assert 'papers/training_free.ipynb' in pages['dual-t1']
    assert 'papers/training_free.ipynb' not in pages['knowledge']
    assert 'papers/parts.ipynb' in pages['knowledge']
    assert 'papers/kanoclip.ipynb' in pages['learned']
    named = [n for n, names in pages.items() if any(f"'{n}'" in code[p] for p in names)]
    assert len(named) > 30 and set(EXHIBITS) - set(named) <= {'winclip-f6'}
    chosen = {p.relative_to(nbs).as_posix() for p in pages_of(nbs, ['cost'])}
    assert {'papers/cost.ipynb', 'index.ipynb'} <= chosen


def test_accepted_results_are_those_of_todays_code():
    "Each accepted run has the method, revisions, weights, artifact, rules and seeds of today."
    assert len(list(ACCEPTED.glob('*/runs.csv'))) > 10
    assert outdated_results(ACCEPTED) == []


def test_what_is_not_accepted_is_said():
    missing = unaccepted(ACCEPTED)
    assert (ACCEPTED / UNACCEPTED).read_text().split() == missing
    if missing:
        names = ', '.join(missing)
        warnings.warn(f'not accepted yet: {names}; `zsad reproduce NAME... --accept` accepts them')


@pytest.mark.parametrize('name', EXHIBITS)
def test_every_table_figure_and_caption_is_made_of_the_accepted_results(name):
    import matplotlib.pyplot as plt

    d = readable(table(name, ACCEPTED))
    fig = figure(name, ACCEPTED)
    plt.close(fig)
    assert len(d) and caption(name, ACCEPTED).startswith(EXHIBITS[name].title)
    if name in unaccepted(ACCEPTED):
        assert 'not accepted yet' in d.to_numpy().ravel() and 'Not accepted yet' in caption(
            name, ACCEPTED
        )


def test_a_result_of_other_code_is_found(tmp_path, monkeypatch):
    "Another revision, other rules, another seed, another method: each is named."
    e = EXHIBITS['anoclip-t3']
    row = e.rows[3]
    line = dict.fromkeys(COLUMNS['runs'], '')
    line |= {k: str(v) for k, v in identity_of(row, 'procad').items()}
    line |= dict(dataset='procad', row=row.label, data='x')
    line['run'] = run_key(line)

    def found(**changed):
        stored = {**line, **changed}
        (tmp_path / e.name).mkdir(exist_ok=True)
        for n, columns in COLUMNS.items():
            rows = [[stored[k] for k in columns]] if n == 'runs' else []
            (tmp_path / e.name / f'{n}.csv').write_text(to_csv(columns, rows))
        return outdated_results(tmp_path)

    def changes(**changed):
        ((*_, names),) = found(**changed)
        return names

    assert found() == []
    assert found(pipeline_rev='0') == [(e.name, 'procad', row.label, ['pipeline_rev', 'run'])]
    assert 'weights' in changes(weights='0')
    assert changes(seed='1') == ['seeds']
    assert changes(row='x') == ['no such row']
    assert changes(data='y') == ['run']
    monkeypatch.setattr(outdated, 'PIPELINE_REV', outdated.PIPELINE_REV + 1)
    assert 'pipeline_rev' in changes()


def test_printed_text_is_stored_in_one_piece():
    import nbformat.v4 as v4

    parts = [
        v4.new_output('stream', text='a\n'),
        v4.new_output('stream', text='b\n'),
        v4.new_output('display_data'),
        v4.new_output('stream', text='c'),
    ]
    assert [x.get('text') for x in joined_streams(parts)] == ['a\nb\n', None, 'c']

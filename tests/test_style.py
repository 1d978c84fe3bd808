"""Form of the code: ruff's rules, the width of lines, the size of cells and of modules."""

import re
import subprocess
import sys

import pytest
from tree import MODULES, NOTEBOOKS, ROOT, cells, code_lines, page

WIDTH, CELL, MODULE = 100, 25, 300


def ruff(*command):
    "Run ruff at the root; return its exit status and what it printed."
    done = subprocess.run(
        [sys.executable, '-m', 'ruff', *command], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_ruff_looks_at_every_notebook_and_module():
    status, printed = ruff('check', '--show-files')
    files = set(printed.splitlines())
    assert status == 0 and len(NOTEBOOKS) > 60 and len(MODULES) > 60
    assert {str(p) for p in [*NOTEBOOKS, *MODULES]} <= files


def test_lint():
    status, printed = ruff('check', '--output-format', 'concise')
    assert status == 0, printed


def test_format():
    "Modules are exported from formatted cells; nbdev sets the blank lines between cells."
    status, printed = ruff('format', '--check', 'nbs', 'tests', '.ci', 'setup.py')
    assert status == 0, printed


def size(source):
    "Lines of a cell, without blank ones and directives."
    return sum(bool(l.strip()) and not l.startswith('#|') for l in source.splitlines())


@pytest.mark.parametrize('path', NOTEBOOKS, ids=page)
def test_cells_are_short(path):
    sources = cells(path)
    wide = [l for s in sources for l in s.splitlines() if len(l) > WIDTH]
    assert not wide, f'more than {WIDTH} columns: {wide[0]}'
    long = [s for s in sources if size(s) > CELL]
    assert not long, f'a cell of more than {CELL} lines:\n{long[0][:200]}'


@pytest.mark.parametrize('path', MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_are_short(path):
    source = path.read_text()
    by_hand = re.sub(r'# %% auto .*?(?=# %% |$)', '', source, flags=re.S)  # nbdev writes __all__
    wide = [l for l in by_hand.splitlines() if len(l) > WIDTH]
    assert not wide, f'more than {WIDTH} columns: {wide[0]}'
    assert code_lines(source) <= MODULE, f'more than {MODULE} lines of code: split it'

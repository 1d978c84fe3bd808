"""Inline tests of every notebook, from another folder; notebooks and modules in step."""

import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tree import MODULES, NOTEBOOKS, ROOT, cells, exported, page

FLAGS = {'slow', 'gpu', 'weights', 'data'}
LONG = ('papers/figures', 'benchmark/data_card')  # pages of figures without code of their own
SOURCES = [p for p in NOTEBOOKS if exported(p)]


def with_tier(path):
    "Mark the pages that take long."
    marks = pytest.mark.slow if page(path) in LONG else ()
    return pytest.param(path, id=page(path), marks=marks)


@pytest.mark.parametrize('path', [with_tier(p) for p in NOTEBOOKS])
def test_inline(path, tmp_path):
    from nbdev.test import test_nb as run_notebook

    elsewhere = Path(shutil.copy(path, tmp_path))
    good, _ = run_notebook(elsewhere, skip_flags=FLAGS)
    assert good, f'{page(path)}: an inline test failed, see the traceback above'


def tracked_files():
    "Files of the project, from git where there is a repository."
    done = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return done.stdout.splitlines()
    found = [p for d in ('nbs', 'zsad') for p in (ROOT / d).rglob('*') if p.is_file()]
    return [str(p.relative_to(ROOT)) for p in found]


def copy_sources(to):
    "Copy what nbdev reads and writes."
    for name in {*tracked_files(), 'settings.ini'}:
        inside = name.split('/')[0] in ('nbs', 'zsad', 'settings.ini', 'setup.py')
        if inside and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def python(code, cwd):
    "Run code in a folder; fail with what it printed. nbdev exports nothing where IN_TEST is set."
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    command = [sys.executable, '-c', code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def modules(root):
    "Paths of all modules below a root, relative to zsad."
    return sorted(str(p.relative_to(root / 'zsad')) for p in (root / 'zsad').rglob('*.py'))


def test_modules_are_what_the_notebooks_export(tmp_path):
    copy_sources(tmp_path)
    for p in (tmp_path / 'zsad').rglob('*.py'):
        if p.name != '__init__.py':
            p.unlink()
    python('from nbdev.doclinks import nbdev_export; nbdev_export()', tmp_path)
    made = modules(tmp_path)
    assert made == modules(ROOT) and len(made) > 60
    compared = filecmp.cmpfiles(ROOT / 'zsad', tmp_path / 'zsad', made, shallow=False)
    assert not compared[1] + compared[2], f'not in step: {compared[1:]}; run nbdev_export'


def test_notebooks_are_clean(tmp_path):
    copy_sources(tmp_path)
    python('from nbdev.clean import nbdev_clean; nbdev_clean()', tmp_path)
    copies = {p: tmp_path / p.relative_to(ROOT) for p in NOTEBOOKS}
    unclean = [page(p) for p, copy in copies.items() if p.read_bytes() != copy.read_bytes()]
    assert len(copies) > 60 and not unclean, f'not clean: {unclean}; run nbdev_clean'


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.stem != 'index'], ids=page)
def test_form(path):
    first = cells(path, 'markdown')[0]
    assert re.match(r'# .+\n\n> .+', first), 'begins with a title and one sentence on what it is'
    assert not re.search(r'rcParams', '\n'.join(cells(path)))
    assert path.stat().st_size < 600_000
    outputs = [o for c in json.loads(path.read_text())['cells'] for o in c.get('outputs', [])]
    assert not any(o.get('output_type') == 'error' for o in outputs)


def test_a_notebook_is_named_like_its_module():
    assert len(SOURCES) > 60
    exceptions = {'methods/attention': 'encoder.attention'}
    for path in SOURCES:
        name = re.search(r'#\| default_exp ([\w.]+)', '\n'.join(cells(path))).group(1)
        assert name == exceptions.get(page(path), page(path).replace('/', '.')), page(path)
    made = {str(p.relative_to(ROOT / 'zsad')) for p in MODULES if p.name != '__init__.py'}
    assert len(made) >= len(SOURCES)


def test_imports_stand_alone():
    "The documentation runs every cell that imports, so such a cell does nothing else."
    for path in SOURCES:
        for source in cells(path):
            imported = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source).body]
            alone = all(imported) or not any(imported)
            assert alone, f'{page(path)}: a cell imports and computes:\n{source[:200]}'


def test_labels_are_unique():
    found = [re.findall(r'#\| label: (\S+)', s) for p in NOTEBOOKS for s in cells(p)]
    labels = [label for group in found for label in group]
    assert len(labels) > 50
    assert len(labels) == len(set(labels)), sorted(l for l in labels if labels.count(l) > 1)


def definitions(path):
    "Functions and classes that a notebook exports."
    for source in exported(path):
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node


def test_public_names_are_documented():
    seen = 0
    for path in SOURCES:
        for node in definitions(path):
            seen += 1
            assert node.name.startswith('_') or ast.get_docstring(node), (
                f'{page(path)}: {node.name} has no docstring'
            )
    assert seen > 800

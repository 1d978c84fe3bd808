"""Packages of zsad in their order: a module imports from its own package and from those below."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from tree import MODULES, ROOT

# from bottom to top; HOW a package is named says what it holds
LAYERS = (
    'core',
    'evaluation',
    'rendered',
    'datasets',
    'encoder',
    'methods',
    'learned',
    'pipeline',
    'papers',
    'bench',
    'reporting',
    'app',
    'cli',
)
INSIDE = [p for p in MODULES if p.parent != ROOT / 'zsad' and p.name != '__init__.py']


def dotted(path):
    "Name of a module below zsad."
    return '.'.join(path.relative_to(ROOT / 'zsad').with_suffix('').parts)


NAMES = {dotted(p) for p in INSIDE}


def target(node, alias, here):
    "Name below zsad of what one imported name comes from; None for other packages."
    if node.level:
        parts = here.split('.')[: -node.level]
        module = '.'.join([*parts, *([node.module] if node.module else [])])
    elif (node.module or '').split('.')[0] == 'zsad':
        module = node.module.removeprefix('zsad').lstrip('.')
    else:
        return None
    inside = f'{module}.{alias.name}' if module else alias.name
    return inside if inside in NAMES else module


def imports(path):
    "Modules of zsad that a module imports, anywhere in its code."
    here, found = dotted(path), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {target(node, a, here) for a in node.names}
        elif isinstance(node, ast.Import):
            dotted_names = [a.name for a in node.names]
            found |= {n.removeprefix('zsad.') for n in dotted_names if n.startswith('zsad.')}
    return found - {None, ''}


GRAPH = {dotted(p): imports(p) for p in INSIDE}


def test_every_package_has_its_place():
    assert len(INSIDE) > 60
    assert {n.split('.')[0] for n in GRAPH} == set(LAYERS)
    folders = {p.name for p in (ROOT / 'zsad').iterdir() if (p / '__init__.py').exists()}
    assert folders == set(LAYERS)


def test_imports_are_understood():
    assert sum(map(len, GRAPH.values())) > 200
    unknown = {n for found in GRAPH.values() for n in found} - NAMES
    assert unknown <= {'_modidx'} | set(), f'no such module: {unknown}'


def test_no_import_points_up():
    place = {name: i for i, name in enumerate(LAYERS)}
    upward = [
        f'{here} imports {other}'
        for here, found in GRAPH.items()
        for other in found
        if place[other.split('.')[0]] > place[here.split('.')[0]]
    ]
    assert not upward, upward


def test_no_circle():
    order = list(TopologicalSorter(GRAPH).static_order())  # raises CycleError and names the circle
    assert len(order) >= len(GRAPH)


def loaded_by(statement):
    "Names of the top packages in sys.modules after a statement in a fresh process."
    code = f'import sys; {statement}; print(*{{m.split(".")[0] for m in sys.modules}})'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_zsad_loads_nothing():
    heavy = {'torch', 'numpy', 'pandas', 'open_clip', 'matplotlib', 'fastcore', 'PIL', 'scipy'}
    assert not loaded_by('import zsad') & heavy
    assert 'numpy' in loaded_by('import numpy')


TORCH_FREE = (
    'import zsad.reporting',
    'import zsad.papers',
    'import zsad.papers.exhibits',
    'import zsad.pipeline.rows',
    'import zsad.reporting.tables, zsad.reporting.captions, zsad.reporting.figures',
    'from zsad import EXHIBITS, METHODS, evaluate, figure, table',
)


@pytest.mark.parametrize('statement', TORCH_FREE)
def test_rows_and_tables_need_no_torch(statement):
    assert 'torch' not in loaded_by(statement)

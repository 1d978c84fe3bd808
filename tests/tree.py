"""What the tests of the project's form look at: its notebooks, their cells and the modules."""

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts
)
MODULES = sorted(p for p in (ROOT / 'zsad').rglob('*.py') if p.name != '_modidx.py')


def page(path):
    "Path of a notebook below nbs, without its ending."
    return str(path.relative_to(ROOT / 'nbs').with_suffix(''))


def cells(path, kind='code'):
    "Sources of the cells of one kind."
    found = json.loads(path.read_text())['cells']
    return [''.join(c['source']) for c in found if c['cell_type'] == kind]


def is_exported(source):
    "Whether a cell goes into a module."
    return bool(re.match(r'\s*#\|\s*exports?\b', source))


def exported(path):
    "Sources of the exported cells of a notebook."
    return [s for s in cells(path) if is_exported(s)]


def code_lines(source):
    "Number of lines that are neither blank nor a comment nor part of a docstring."
    lines = set()
    for n, line in enumerate(source.splitlines(), 1):
        if line.strip() and not line.strip().startswith('#'):
            lines.add(n)
    for node in ast.walk(ast.parse(source)):
        documented = (ast.FunctionDef, ast.ClassDef, ast.Module)
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines -= set(range(text.lineno, text.end_lineno + 1))
    return len(lines)

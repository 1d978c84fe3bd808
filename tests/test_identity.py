"""Results are identified by what they were computed from, never by source text.

A snapshot names the operation where numbers change.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zsad

TESTS = Path(__file__).parent
ROWS = ('dual', 'dual+', 'anoclip/mean3')


def link_or_copy(source, target):
    "Link large files and copy the others."
    if source.endswith('.safetensors'):
        os.symlink(source, target)
    else:
        shutil.copy(source, target)


def copy_package(folder) -> Path:
    "Copy the package below a folder."
    package, ignored = Path(zsad.__file__).parent, shutil.ignore_patterns('__pycache__')
    shutil.copytree(package, folder / 'zsad', copy_function=link_or_copy, ignore=ignored)
    return folder / 'zsad'


def module_with(package, text: str) -> Path:
    "Find the one module that holds a text."
    found = [p for p in sorted(package.rglob('*.py')) if text in p.read_text()]
    assert len(found) == 1, (text, found)
    return found[0]


def edit(package, old: str, new: str):
    "Replace a text that one module holds."
    file = module_with(package, old)
    file.write_text(file.read_text().replace(old, new))


DRIVER = '''
import json, sys
tests, folders, rows = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
import torch
torch.set_num_threads(1)
answers = {}
for name, folder in folders.items():
    for module in list(sys.modules):
        if module.split('.')[0] in ('zsad', 'snapshot'):
            del sys.modules[module]
    sys.path[:0] = [folder, tests]
    import snapshot, zsad
    from zsad.core.identity import identity_key
    from zsad.pipeline.rows import METHODS
    from zsad.pipeline.identity import method_identity
    assert zsad.__file__.startswith(folder), zsad.__file__
    stored = snapshot.unpack(snapshot.FILE.read_text())
    for row in stored['rows'].values():
        row['stages'] = [s for s in row['stages'] if s[0] == 'bottle']
    now = snapshot.compute(rows, dict(bottle='object'))
    assert len(now['rows']) == len(rows), [r['name'] for r in now['rows'].values()]
    keys = {n: identity_key(method_identity(m)) for n, m in METHODS.items() if m.terms}
    message = snapshot.message(stored, now, whole=False)
    answers[name] = dict(message=message, keys=keys, rows=sorted(snapshot.all_rows()))
    del sys.path[:2]
print('ANSWERS' + json.dumps(answers))
'''


def check_copies(folders: dict, rows=ROWS) -> dict:
    "Check snapshots and list keys with each of several copies of the package, in one process."
    given = [json.dumps({k: str(f) for k, f in folders.items()}), json.dumps(rows)]
    command = [sys.executable, '-c', DRIVER, str(TESTS), *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split('ANSWERS')[1])


def move_function(package, name: str, new_name: str):
    "Move a function to a module of its own beside the old one, renamed and documented anew."
    file = module_with(package, f'def {name}(')
    source = file.read_text()
    lines, body = source.splitlines(), ast.parse(source).body
    node = next(n for n in body if getattr(n, 'name', '') == name)
    start = min(d.lineno for d in node.decorator_list) - 1
    function = '\n'.join(lines[start : node.end_lineno])
    assert ast.get_docstring(node) in function
    function = function.replace(f'def {name}(', f'def {new_name}(')
    function = function.replace(ast.get_docstring(node), 'Documented anew.')
    imports = [ast.unparse(n) for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
    before = [n.name for n in body if hasattr(n, 'name') and n.end_lineno <= start]
    assigned = [n.targets[0].id for n in body if isinstance(n, ast.Assign) and n.end_lineno < start]
    known = ', '.join([*before, *(a for a in assigned if a != '__all__')])
    head = '\n'.join([*imports, f'from .{file.stem} import {known}'])
    file.with_name('elsewhere.py').write_text(f'{head}\n\n\n{function}\n')
    lines[start : node.end_lineno] = [f'from .elsewhere import {new_name}']
    file.write_text('\n'.join(lines) + '\n')


def test_a_function_renamed_moved_and_documented_anew_changes_no_key_and_no_snapshot(tmp_path):
    plain, moved = copy_package(tmp_path / 'plain'), copy_package(tmp_path / 'moved')
    move_function(moved, 'pair_term', 'nearest_in_references')
    answers = check_copies(dict(plain=plain.parent, moved=moved.parent))
    assert answers['plain']['message'] == answers['moved']['message'] == ''
    assert answers['plain']['keys'] == answers['moved']['keys']
    assert len(answers['plain']['keys']) >= 17
    assert answers['plain']['rows'] == answers['moved']['rows']


MUTATIONS = {  # text, other text, operation, stage
    'term': ('[2 * association', '[2.01 * association', 'term pair', 'term pair'),
    'score': ('beta * score + (1 -', 'beta * score + (1.01 -', 'score joint', 'score joint'),
    'sampler': (
        "seeded_rng(seed, 'reference', i)",
        "seeded_rng(seed + 1, 'reference', i)",
        'reference pair',
        'reference pair',
    ),
    'smoothing': (
        "(1, 1, 1, 1), mode='replicate'",
        "(1, 1, 1, 1), mode='reflect'",
        'pipeline',
        'smoothing',
    ),
    'upsampling': (
        "a[:, None], size=size, mode='bilinear'",
        "a[:, None], size=size, mode='bicubic'",
        'pipeline',
        'upsampling',
    ),
    'prompts': ("in 'aeiou'", "in 'aeou'", 'pipeline', 'prompts'),
    'preprocessing': ('0.48145466', '0.4815', 'pipeline', 'preprocessing'),
    'encoding': (
        'attend(v, v, v',
        'attend(v, 1.01 * v, v',
        'encoding',
        'encoding path vv, depth 6, proj',
    ),
    'adaptation': (
        'lam * SIMILARITY',
        '1.1 * lam * SIMILARITY',
        'term synthetic_adapted',
        'term synthetic_adapted',
    ),
}


@pytest.fixture(scope='module')
def mutants(tmp_path_factory):
    folders = {}
    for name, (old, new, *_) in MUTATIONS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        edit(copy_package(folders[name]), old, new)
    return check_copies(folders)


@pytest.mark.parametrize('name', MUTATIONS)
def test_a_changed_constant_fails_a_snapshot_that_names_the_operation(mutants, name):
    *_, operation, stage = MUTATIONS[name]
    message = mutants[name]['message']
    expected = f'{operation} (rev 1) gives other values in '
    assert message.startswith(expected), message or 'no difference'
    assert f"first differs at '{stage}" in message, message
    assert message.count('gives other values') == 1, message


def test_a_raised_revision_of_a_metric_changes_the_key_of_a_run(monkeypatch):
    from dataclasses import replace

    from zsad.bench.records import method_record, raised_metrics
    from zsad.evaluation.metrics import METRIC_OPERATIONS
    from zsad.papers.exhibit import Row
    from zsad.pipeline.rows import METHODS

    methods = [METHODS['anoclip'], METHODS['clip']]
    outline = Row('outline', None, 'foreground mask')
    before = [*(method_record(Row('x', m), m) for m in methods), method_record(outline, None)]
    assert raised_metrics() == {} and 'metric' not in before[0]['revs']
    raised = replace(METRIC_OPERATIONS['pro'], rev=2)
    monkeypatch.setitem(METRIC_OPERATIONS.operations, 'pro', raised)
    after = [*(method_record(Row('x', m), m) for m in methods), method_record(outline, None)]
    for old, new in zip(before, after):
        assert '"metric pro":2' in new['revs']
        assert {**old, 'revs': ''} == {**new, 'revs': ''}

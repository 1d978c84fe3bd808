"Every notebook's inline tests, the notebook/module sync, and the rules of the house that a reader can check."

import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
NUMBERED = [p for p in NOTEBOOKS if p.name[:2].isdigit()]
FLAGS = {'slow', 'gpu', 'weights', 'data'}


def cells(path, kind='code'):
    return [
        ''.join(c['source'])
        for c in json.loads(path.read_text())['cells']
        if c['cell_type'] == kind
    ]


def exported(path):
    return [s for s in cells(path) if re.match(r'\s*#\|\s*exports?\b', s)]


LONG = ('33_paper_figures', '41_data_card')  # pages of figures without code of their own


def with_tier(path):
    "Mark the pages that take long."
    marks = pytest.mark.slow if path.stem in LONG else ()
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize('path', map(with_tier, NOTEBOOKS))
def test_inline(path):
    from nbdev.test import test_nb as run_notebook

    good, _ = run_notebook(path, skip_flags=FLAGS)
    assert good, f'{path.name}: an inline test failed, see the traceback above'


def test_modules_are_what_the_notebooks_export(tmp_path):
    names = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    files = (
        names.stdout.split('\n')[:-1]
        if names.returncode == 0 and names.stdout
        else [
            str(p.relative_to(ROOT))
            for d in ('nbs', 'zsad')
            for p in (ROOT / d).rglob('*')
            if p.is_file()
        ]
    )
    for f in {*files, 'settings.ini'}:
        if (ROOT / f).is_file() and f.split('/')[0] in ('nbs', 'zsad', 'settings.ini', 'setup.py'):
            (tmp_path / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / f, tmp_path / f)
    done = subprocess.run(
        [sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = sorted(p.name for p in (tmp_path / 'zsad').glob('*.py'))
    assert made == sorted(p.name for p in (ROOT / 'zsad').glob('*.py'))
    same, different, broken = filecmp.cmpfiles(
        ROOT / 'zsad', tmp_path / 'zsad', made, shallow=False
    )
    assert not different and not broken, (
        f'out of step with their notebooks: {different + broken}; run nbdev_export'
    )
    subprocess.run(
        [sys.executable, '-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()'],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    unclean = [
        p.name for p in NOTEBOOKS if p.read_bytes() != (tmp_path / 'nbs' / p.name).read_bytes()
    ]
    assert not unclean, f'not clean: {unclean}; run nbdev_clean'


@pytest.mark.parametrize('path', NUMBERED, ids=lambda p: p.stem)
def test_form(path):
    first = cells(path, 'markdown')[0]
    assert re.match(r'# .+\n\n> .+', first), 'begins with a title and one sentence on what it is'
    long = [s for s in exported(path) if sum(bool(l.strip()) for l in s.splitlines()) > 26]
    assert not long, f'exported cell of more than 25 lines:\n{long[0][:200]}'
    assert not re.search(r'rcParams', '\n'.join(cells(path)))
    assert path.stat().st_size < 600_000
    assert not any(
        o.get('output_type') == 'error'
        for c in json.loads(path.read_text())['cells']
        for o in c.get('outputs', [])
    )


def test_imports_stand_alone():
    "The documentation runs every cell that imports, so in notebooks that export such a cell may do nothing else."
    for p in NUMBERED:
        if not exported(p):
            continue
        for s in cells(p):
            body = ast.parse(s).body
            imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in body]
            assert all(imports) or not any(imports), (
                f'{p.name}: a cell imports and computes:\n{s[:200]}'
            )


def test_labels_are_unique():
    labels = [l for p in NOTEBOOKS for s in cells(p) for l in re.findall(r'#\| label: (\S+)', s)]
    assert len(labels) == len(set(labels)), sorted(l for l in labels if labels.count(l) > 1)


def test_imports_point_down():
    "Reading order is building order: a module stands on notebooks that come before its own."
    place = {
        re.search(r'#\| default_exp (\w+)', '\n'.join(cells(p))).group(1): p.name
        for p in NUMBERED
        if any('default_exp' in s for s in cells(p))
    }
    for p in NUMBERED:
        for s in exported(p):
            for node in ast.parse(
                s
            ).body:  # module level only: a command loads what it needs when it is called
                if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('zsad.'):
                    below = place[node.module.split('.')[1]]
                    assert below < p.name, f'{p.name} imports {node.module} from {below}'


def test_public_names_are_documented():
    for p in NUMBERED:
        for s in exported(p):
            for node in ast.parse(s).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(
                    '_'
                ):
                    assert ast.get_docstring(node), f'{p.name}: {node.name} has no docstring'


def test_readme_is_the_index():
    done = subprocess.run([sys.executable, str(ROOT / '.ci' / 'readme.py'), '--check'])
    assert done.returncode == 0, (
        'README.md is not what nbs/index.ipynb says; run: python .ci/readme.py'
    )


def test_stored_tables_and_captions_are_those_of_the_results():
    "What readers see was made from nbs/results: every stored caption is recomputed, and the tables' cells are looked up in the stored pages."
    from zsad.reporting.tables import caption, readable, table

    results = ROOT / 'nbs' / 'results'
    shown = {p.stem: json.dumps(json.loads(p.read_text()), ensure_ascii=False) for p in NOTEBOOKS}
    for name, exhibit in (
        ('11_vv', 'anoclip-t3'),
        ('11_vv', 'vv-depth'),
        ('12_prompts', 'anoclip-t4'),
        ('30_anoclip', 'anoclip-t3'),
        ('30_anoclip', 'anoclip-t4'),
        ('index', 'anoclip-t3'),
        ('11_vv', 'attention-plain'),
        ('30_anoclip', 'anoclip-t1'),
        ('30_anoclip', 'attention-plain'),
        ('30_anoclip', 'anoclip-t5'),
        ('30_anoclip', 'anoclip-t6'),
        ('30_anoclip', 'anoclip-f5'),
        *(
            ('32_training_free', e)
            for e in (
                'novel',
                'winclip-t2',
                'winclip-states',
                'dual-t1',
                'dual-t2',
                'dual-t3',
                'dual-f3',
                'dual-f5a',
                'dual-f5b',
                'dual-f6c',
                'spread',
                'untrained',
            )
        ),
        *(('35_learned', e) for e in ('learned', 'learned-plain', 'kanoclip-t1', 'kanoclip-t2')),
    ):
        assert json.dumps(caption(exhibit, results), ensure_ascii=False)[1:-1] in shown[name], (
            f'{name}: stored caption of {exhibit} is not that of the results; execute the notebook'
        )
    for name, exhibit in (
        ('11_vv', 'anoclip-t3'),
        ('12_prompts', 'anoclip-t4'),
        ('30_anoclip', 'anoclip-t3'),
        ('30_anoclip', 'anoclip-t4'),
        ('30_anoclip', 'attention-plain'),
        ('30_anoclip', 'anoclip-t5'),
        ('30_anoclip', 'anoclip-t6'),
        *(
            ('32_training_free', e)
            for e in (
                'baselines',
                'novel',
                'winclip-t2',
                'winclip-states',
                'dual-t1',
                'dual-t2',
                'dual-t3',
                'dual-f3',
                'dual-f5b',
                'spread',
                'untrained',
            )
        ),
        *(
            ('35_learned', e)
            for e in ('learned', 'learned-plain', 'attempts', 'kanoclip-t1', 'kanoclip-t2')
        ),
        *(
            ('36_parts', e)
            for e in (
                'kanoclip-t3',
                'modules',
                'object-agnostic',
                'knowledge',
                'image-score',
                'kanoclip-readings',
            )
        ),
    ):
        for value in readable(table(exhibit, results)).to_numpy().ravel():
            assert str(value) in shown[name], (
                f'{name}: {value} of {exhibit} is not in the stored table'
            )

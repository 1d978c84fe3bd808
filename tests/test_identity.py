"A result is identified by what it was computed from, never by source text; a snapshot tells where numbers change."

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


def copy_package(folder) -> Path:
    "Copy the package below a folder; its large files are linked."
    package = Path(zsad.__file__).parent
    shutil.copytree(
        package,
        folder / 'zsad',
        copy_function=lambda a, b: (
            os.symlink(a, b) if a.endswith('.safetensors') else shutil.copy(a, b)
        ),
        ignore=shutil.ignore_patterns('__pycache__'),
    )
    return folder / 'zsad'


def edit(file, old: str, new: str):
    "Replace text in a file; it must stand there."
    text = file.read_text()
    assert old in text, (file, old)
    file.write_text(text.replace(old, new))


DRIVER = '''
import json, sys
tests, folders, rows = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
import torch
torch.set_num_threads(1)
answers = {}
for name, folder in folders.items():
    for module in [m for m in sys.modules if m.split('.')[0] in ('zsad', 'snapshot')]: del sys.modules[module]
    sys.path[:0] = [folder, tests]
    import snapshot, zsad
    from zsad.core.identity import identity_key
    from zsad.pipeline.detector import METHODS, method_identity
    assert zsad.__file__.startswith(folder), zsad.__file__
    stored = snapshot.unpack(snapshot.FILE.read_text())
    for row in stored['rows'].values(): row['stages'] = [s for s in row['stages'] if s[0] == 'bottle']
    now = snapshot.compute(rows, dict(bottle='object'))
    assert len(now['rows']) == len(rows), [r['name'] for r in now['rows'].values()]
    keys = {n: identity_key(method_identity(m)) for n, m in METHODS.items() if m.terms}
    answers[name] = dict(said=snapshot.message(stored, now, whole=False), keys=keys, rows=sorted(snapshot.all_rows()))
    del sys.path[:2]
print('ANSWERS' + json.dumps(answers))
'''


def look(folders: dict, rows=ROWS) -> dict:
    "Check snapshots and list keys with each of several copies of the package, in a process of their own."
    ask = [
        sys.executable,
        '-c',
        DRIVER,
        str(TESTS),
        json.dumps({k: str(f) for k, f in folders.items()}),
        json.dumps(rows),
    ]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split('ANSWERS')[1])


MOVED = '''"""Another place for one term."""
import torch
from .dual import pair_map
from .method import patches_of, term

'''


def test_a_function_renamed_moved_and_documented_anew_changes_no_key_and_no_snapshot(tmp_path):
    plain, moved = copy_package(tmp_path / 'plain'), copy_package(tmp_path / 'moved')
    text = (moved / 'method.py').read_text()
    start, end = text.index("@term('pair'"), text.index("@term('memory'")
    function = text[start:end]
    assert (
        'def pair_term(s:ScoringInputs' in function and 'Compare patches with those of' in function
    )
    function = function.replace(
        'def pair_term(s:ScoringInputs', 'def nearest_in_references(s'
    ).replace('Compare patches with those of', 'Search for patches among those of')
    (moved / 'elsewhere.py').write_text(MOVED + function.replace('->Tensor', ''))
    (moved / 'method.py').write_text(
        text[:start] + 'from .elsewhere import nearest_in_references\n\n' + text[end:]
    )
    answers = look(dict(plain=plain.parent, moved=moved.parent))
    assert answers['plain']['said'] == answers['moved']['said'] == ''
    assert (
        answers['plain']['keys'] == answers['moved']['keys'] and len(answers['plain']['keys']) >= 17
    )
    assert answers['plain']['rows'] == answers['moved']['rows']


MUTATIONS = {  # file, text, other text, operation, stage
    'term': (
        'dual.py',
        'torch.cat([2*association',
        'torch.cat([2.01*association',
        'term pair',
        'term pair',
    ),
    'score': (
        'dual.py',
        'beta*score + (1 - beta)',
        'beta*score + (1.01 - beta)',
        'score joint',
        'score joint',
    ),
    'sampler': (
        'dual.py',
        "keyed(seed, 'reference', i)",
        "keyed(seed + 1, 'reference', i)",
        'reference pair',
        'reference pair',
    ),
    'smoothing': (
        'method.py',
        '(1, 1, 1, 1), mode=\'replicate\'',
        '(1, 1, 1, 1), mode=\'reflect\'',
        'pipeline',
        'smoothing',
    ),
    'upsampling': ('method.py', "mode='bilinear'", "mode='bicubic'", 'pipeline', 'upsampling'),
    'prompts': ('prompts.py', "in 'aeiou'", "in 'aeou'", 'pipeline', 'prompts'),
    'preprocessing': ('clip.py', '0.48145466', '0.4815', 'pipeline', 'preprocessing'),
    'encoding': (
        'vv.py',
        'attend(v, v, v',
        'attend(v, 1.01*v, v',
        'encoding',
        'encoding path vv, depth 6, proj',
    ),
    'adaptation': (
        'tta.py',
        'lam*SIMILARITY',
        '1.1*lam*SIMILARITY',
        'term synthetic_adapted',
        'term synthetic_adapted',
    ),
}


@pytest.fixture(scope='module')
def mutants(tmp_path_factory):
    folders = {}
    for name, (file, old, new, *_) in MUTATIONS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        edit(copy_package(folders[name]) / file, old, new)
    return look(folders)


@pytest.mark.parametrize('name', MUTATIONS)
def test_a_changed_constant_fails_a_snapshot_that_names_the_operation(mutants, name):
    *_, op, stage = MUTATIONS[name]
    said = mutants[name]['said']
    assert said.startswith(f'{op} (rev 1) gives other values in '), said or 'no difference'
    assert f"first differs at '{stage}" in said and said.count('gives other values') == 1, said

"The command line: help, old spellings, errors, and `zsad evaluate` of a method on a data set."

import csv
import math

import pytest
import torch

from zsad.bench.models import Model
from zsad.bench.plan import compute
from zsad.cli.main import COMMANDS, main
from zsad.datasets.loading import load_dataset
from zsad.datasets.survey import scan_dataset
from zsad.evaluation.protocol import METRICS
from zsad.papers.exhibit import Exhibit, Row
from zsad.pipeline.rows import METHODS
from zsad.rendered.procad import render_procad

# ---- arguments


@pytest.mark.parametrize('command', COMMANDS, ids=[c.name for c in COMMANDS])
def test_every_option_has_a_sentence(command, capsys):
    for options in command.options.values():
        assert all(len(o.help.split()) > 1 for o in options)
    with pytest.raises(SystemExit) as e:
        main([*command.name.split(), '--help'])
    assert e.value.code == 0 and 'example:' in capsys.readouterr().out


OLD = {
    '--plan': ['reproduce', 'anoclip-t3', '--plan'],
    '--batch': ['reproduce', 'anoclip-t3', '--batch', '4'],
    '--on': ['train', 'kanoclip', '--on', 'visa'],
    '--target': ['train', 'kanoclip', '--target', 'visa'],
    '--dry': ['reproduce', 'anoclip-t3', '--dry'],
}


@pytest.mark.parametrize('flag', OLD)
def test_old_spellings_and_abbreviations_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as e:
        main(OLD[flag])
    assert e.value.code == 2 and f'unrecognized arguments: {flag}' in capsys.readouterr().err


WRONG = {
    'did you mean': ['reproduce', 'anoclip-t33'],
    '--workers 2 and --scheduler 3': 'reproduce anoclip-t3 --workers 2 --scheduler 3'.split(),
    '--batch-size 0': ['reproduce', 'anoclip-t3', '--batch-size', '0'],
    '--days -1.0: give': ['store', 'prune', '--days', '-1'],
    'nowhere: no such folder': 'reproduce --profile paper --data nowhere anoclip-t3'.split(),
    '--seeds 0': ['reproduce', 'anoclip-t3', '--seeds', '0'],
    'give METHOD with --data': ['evaluate'],
    'give --data': ['evaluate', 'anoclip'],
    'anoclip and --maps': ['evaluate', 'anoclip', '--maps', 'x'],
    'choose a method of': ['train', 'clip'],
    '--lr 0.1: the encoder mini': ['train', 'mini', '--lr', '0.1'],
}


@pytest.mark.parametrize('words', WRONG)
def test_wrong_values_are_named_before_anything_is_computed(words, capsys):
    assert main(WRONG[words]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1


# ---- evaluate METHOD


@pytest.fixture(scope='module')
def pills(tmp_path_factory):
    "A rendered category in the layout of MVTec-AD, without its dataset.json."
    root = tmp_path_factory.mktemp('set') / 'own'
    render_procad(('pill',), good=3, bad=4, train=2, size=96, root=root, workers=1)
    (root / 'dataset.json').unlink()
    return root


@pytest.fixture
def evaluated(files, pills, tmp_path, monkeypatch, capsys):
    "Run `zsad evaluate METHOD` with the small encoder: (exit code, {metric: value}, printed text)."
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'c'))

    def run(method, *more):
        capsys.readouterr()
        model = ('--backbone', files[0], '--weights', files[1], '--device', 'cpu')
        out = tmp_path / 'metrics.csv'
        data = ('--data', str(pills), '--out', str(out))
        code = main(['evaluate', method, *data, *model, *more])
        rows = list(csv.DictReader(out.open(newline=''))) if out.exists() else []
        return code, {r['metric']: float(r['value']) for r in rows}, capsys.readouterr()

    return run


@pytest.mark.parametrize('name', ['anoclip', 'winclip+', 'dual', 'musc'])
def test_a_method_has_the_numbers_of_reproduce(name, evaluated, files, pills, tmp_path):
    "Also where references are drawn, from the training part or from the category."
    code, values, printed = evaluated(name)
    assert code == 0 and printed.out.splitlines()[-1].startswith('mean')
    row = Row(name, METHODS[name])
    exhibit = Exhibit('own', 'own', '', (row,), ('mvtec',), METRICS, print_state='own')
    sets = {'mvtec': scan_dataset(load_dataset('folder', pills), 1)}
    plan, found = compute((exhibit,), sets, Model(files[0], files[1], device='cpu'), show=False)
    (run,) = plan.shown['own', 'folder', name]
    expected = found[run]['pill']['values']
    for metric in METRICS:
        assert math.isclose(values[metric], 100 * expected[metric], abs_tol=1e-3), metric


def test_seed_size_and_artifact_reach_the_method(evaluated):
    _, values, _ = evaluated('anoclip')
    code, large, _ = evaluated('anoclip', '--size', '64')
    assert code == 0 and large != values
    code, same, printed = evaluated('anoclip', '--seed', '3')
    assert code == 0 and same == values and 'draws nothing' in printed.err
    code, _, printed = evaluated('kanoclip', '--artifact', 'none')
    assert code == 2 and 'none' in printed.err


def test_files_that_cannot_be_read_are_named(evaluated, pills):
    bad = pills / 'pill' / 'test' / 'good' / 'bad.png'
    bad.write_text('no image')
    try:
        code, values, printed = evaluated('anoclip')
    finally:
        bad.unlink()
    assert code == 1 and values and 'bad.png' in printed.err


def test_sets_without_masks_have_image_metrics(evaluated, pills, tmp_path):
    masks = pills / 'pill' / 'ground_truth'
    masks.rename(tmp_path / 'away')
    try:
        code, values, printed = evaluated('anoclip')
    finally:
        (tmp_path / 'away').rename(masks)
    assert code == 0 and not math.isnan(values['image_auroc']) and math.isnan(values['pro'])
    assert 'not defined' in printed.out


# ---- errors


def raised(e):
    def run(a):
        raise e

    return run


def with_cause(e, cause):
    e.__cause__ = cause
    return e


Refused = type('APIError', (Exception,), {'__module__': 'openai._exceptions'})
EXPECTED = {
    'value': ValueError('x=1: choose 2'),
    'file': FileNotFoundError(2, 'No such file', 'a.png'),
    'package': ModuleNotFoundError("No module named 'openai'", name='openai'),
    'memory': MemoryError(),
    'memory of a GPU': torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB\nmore'),
    'no driver': RuntimeError('Found no NVIDIA driver on your system.\nPlease'),
    'server': Refused('status 401'),
    'refusal of a server': with_cause(
        RuntimeError('the server refuses the model'), Refused('status 401')
    ),
    'table': csv.Error('line contains NUL'),
    'without words': ValueError(),
}


@pytest.mark.parametrize('what', EXPECTED)
def test_expected_errors_are_one_line(what, monkeypatch, capsys):
    monkeypatch.setattr('zsad.cli.show.list_methods', raised(EXPECTED[what]))
    assert main(['methods']) == 2
    out, err = capsys.readouterr()
    assert (
        out == ''
        and len(err.splitlines()) == 1
        and err.startswith('zsad methods: ')
        and len(err) > len('zsad methods: \n') + 3
    )


def test_faults_of_the_program_are_not_hidden(monkeypatch):
    for e in (TypeError('x'), RuntimeError('shape mismatch'), KeyError('k'), AssertionError()):
        monkeypatch.setattr('zsad.cli.show.list_methods', raised(e))
        with pytest.raises(type(e)):
            main(['methods'])


def test_a_stop_has_an_exit_code_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr('zsad.cli.show.list_methods', raised(KeyboardInterrupt()))
    assert main(['methods']) == 130 and 'stopped' in capsys.readouterr().err

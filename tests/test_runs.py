"A run that is killed and continued, or computed by several processes, gives the same bytes."

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from zsad.bench import jobs as jobs_module
from zsad.bench import records
from zsad.bench.forecast import forecast
from zsad.bench.jobs import all_tokens, read_result, run_job, stored_result
from zsad.bench.models import Model, open_model
from zsad.bench.plan import collect, plan_jobs, run_plan
from zsad.bench.profiles import PROFILES, open_sets
from zsad.bench.results import write_results
from zsad.bench.workers import run_all
from zsad.core.randomness import seeded_rng
from zsad.encoder.store import verify
from zsad.encoder.tokens import Tokens
from zsad.evaluation.protocol import Protocol
from zsad.papers.exhibits import EXHIBITS
from zsad.rendered.procad import render_procad

SHOWN = (EXHIBITS['anoclip-t3'],)
TABLES = ('metrics.csv', 'contrasts.csv', 'defects.csv')


def tables(folder):
    return {f: (Path(folder) / 'anoclip-t3' / f).read_bytes() for f in TABLES}


def finished(cache):
    return [
        p
        for p in Path(cache).rglob('*')
        if p.suffix in ('.json', '.safetensors')
        and not p.name.startswith('.')
        and p.name != 'stream.json'
    ]  # whose time says when a stream was last of use


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    root = render_procad(
        ('pill', 'wood'),
        good=3,
        bad=4,
        train=1,
        size=240,
        root=tmp_path_factory.mktemp('data') / 'd',
        workers=1,
    )
    return root, open_sets(PROFILES['mini'], root)[0]


@pytest.fixture(scope='module')
def undisturbed(sets, tmp_path_factory):
    "Results and files of a run that nothing interrupts."
    cache, out = tmp_path_factory.mktemp('cache'), tmp_path_factory.mktemp('out')
    plan = plan_jobs(SHOWN, sets[1], Model(), cache=cache)
    write_results(out, plan, run_plan(plan, show=False))
    return tables(out), len(finished(cache))


SCRIPT = """
import sys
from zsad.bench.models import Model
from zsad.bench.plan import plan_jobs, run_plan
from zsad.bench.profiles import PROFILES, open_sets
from zsad.bench.results import write_results
from zsad.papers.exhibits import EXHIBITS
root, cache, out = sys.argv[1:]
shown = (EXHIBITS['anoclip-t3'],)
plan = plan_jobs(shown, open_sets(PROFILES['mini'], root)[0], Model(), cache=cache)
write_results(out, plan, run_plan(plan, show=False))
"""


def test_killed_at_any_moment_a_run_goes_on_to_the_same_bytes(sets, undisturbed, tmp_path):
    want, total = undisturbed
    command = [
        sys.executable,
        '-c',
        SCRIPT,
        str(sets[0]),
        str(tmp_path / 'cache'),
        str(tmp_path / 'out'),
    ]
    moments, kept = sorted(seeded_rng(0, 'kill').choice(range(1, total), 2, replace=False)), []
    for n in moments:
        p = subprocess.Popen(command)
        while p.poll() is None and len(finished(tmp_path / 'cache')) < n:
            time.sleep(0.002)
        assert p.poll() is None, 'the run ended before it could be killed'
        p.send_signal(signal.SIGKILL)
        p.wait()
        done = {f: f.stat().st_mtime_ns for f in finished(tmp_path / 'cache')}
        assert all(f.stat().st_mtime_ns == t for f, t in (kept[-1].items() if kept else ())), (
            'what was finished before was written again'
        )
        kept.append(done)
    assert len(kept[0]) < len(kept[-1]) and not (tmp_path / 'out').exists()
    subprocess.run(command, check=True)
    assert tables(tmp_path / 'out') == want and verify(tmp_path / 'cache' / 'tokens') == []
    assert all(f.stat().st_mtime_ns == t for f, t in kept[-1].items())


def test_batches_of_one_give_the_same_bytes(sets, undisturbed, tmp_path):
    plan = plan_jobs(SHOWN, sets[1], Model(), batch=1, cache=tmp_path / 'cache')
    write_results(tmp_path / 'out', plan, run_plan(plan, show=False))
    assert tables(tmp_path / 'out') == undisturbed[0]


def test_a_torn_result_is_computed_again(sets, undisturbed, tmp_path):
    jobs = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path).jobs
    run_job(jobs[0])
    file = jobs[0].result(jobs[0].rows[0][0])
    whole = json.loads(file.read_text())
    file.write_text(file.read_text()[:100])
    assert read_result(file) is None
    assert (
        run_job(jobs[0])[jobs[0].rows[0][0]]['values'] == whole['values']
        and json.loads(file.read_text())['bootstrap_values'] == whole['bootstrap_values']
    )


def test_a_failing_job_does_not_stop_the_others(sets, tmp_path):
    jobs = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path).jobs
    broken = replace(
        jobs[1], pixels=tuple(reversed(jobs[1].pixels))
    )  # files that are not what they were
    with pytest.raises(ValueError, match=f'1 of {len(jobs)} jobs failed') as e:
        run_all([jobs[0], broken, *jobs[2:]], show=False)
    assert f'{broken.dataset}/{broken.category}' in str(e.value) and 'changed' in str(e.value)
    assert all(read_result(j.result(run)) for j in (jobs[0], *jobs[2:]) for run, _ in j.rows)


def test_another_file_of_weights_on_a_worker_is_refused(sets, tmp_path):
    jobs = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path).jobs
    with pytest.raises(ValueError, match='same file'):
        run_job(replace(jobs[0], model=replace(jobs[0].model, expect='0123')))


@pytest.mark.parametrize('other', [{'pipeline': 0}, {'term text': 99}, {'torch': '1.0'}], ids=str)
def test_other_revisions_on_a_worker_are_refused(sets, tmp_path, other):
    "A revision that a worker has otherwise is named, also where everything is in the cache."
    job = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path).jobs[0]
    ((name, rev),) = other.items()
    assert name in job.revs
    with pytest.raises(ValueError, match=f'{name} {rev} there, .*same version of zsad'):
        run_job(replace(job, revs={**job.revs, **other}))


def test_a_raised_revision_is_another_run(sets, tmp_path, monkeypatch):
    from zsad.core.registry import Operation
    from zsad.pipeline import detector as method

    def keys():
        return {
            r['method_key']: r['run']
            for r in plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path).runs.values()
        }

    before = keys()
    op = method.TERMS['text']
    with monkeypatch.context() as m:
        m.setitem(method.TERMS.operations, 'text', Operation(**{**vars(op), 'rev': op.rev + 1}))
        raised = keys()
        assert len(set(before) & set(raised)) == 1  # the outline alone
    monkeypatch.setattr(records, 'PIPELINE_REV', records.PIPELINE_REV + 1)
    later = keys()
    assert not set(before.values()) & set(later.values())


def test_no_category_leads_out_of_the_cache(sets, tmp_path):
    job = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path / 'c').jobs[0]
    key = job.rows[0][0]
    names = ['/tmp/x', '../../..', 'a/b', '..', 'a_b', '']
    files = [replace(job, category=c).result(key).resolve() for c in names]
    assert all(
        (tmp_path / 'c').resolve() in f.parents and f.parent == job.result(key).resolve().parent
        for f in files
    ) and len(set(files)) == len(names)


def test_results_of_another_torch_are_kept_apart(sets, tmp_path, monkeypatch):
    job = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path).jobs[0]
    key = job.rows[0][0]
    here = job.result(key)
    monkeypatch.setattr(jobs_module, 'TORCH', '9.9')
    assert job.result(key) != here and job.result(key).name == here.name


def test_a_result_that_lacks_metrics_is_measured_again_and_keeps_what_it_has(sets, tmp_path):
    "Which metrics are asked for is not part of a run's identity."
    job = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path).jobs[0]
    key = job.rows[0][0]
    few = replace(job, rows=job.rows[:1], protocols={key: Protocol(metrics=('pixel_auroc',))})
    more = replace(few, protocols={key: Protocol(metrics=('image_ap',))})
    first = run_job(few)[key]['values']
    assert (
        set(first) == {'pixel_auroc'}
        and forecast([few]).results == 0
        and forecast([more]).results == 1
    )
    assert (
        run_job(more)[key]['values'].keys() == {'pixel_auroc', 'image_ap'}
        and run_job(few)[key]['values']['pixel_auroc'] == first['pixel_auroc']
    )
    assert stored_result(few, key) and stored_result(more, key)


def test_tokens_are_moved_to_the_encoders_device(sets, tmp_path):
    job = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path).jobs[0]
    run_job(job)
    m = job.rows[0][1].method
    enc = open_model(job.model)
    away = replace(enc, device='meta')
    for device, encoder in (('cpu', enc), ('meta', away)):
        t = all_tokens(
            job, enc, replace(m, encode=m.encode.resolved(enc.blocks)), job.pixels, job.files
        ).to(encoder.device)
        assert {x.device.type for x in (t.cls, *t.patches.values(), *t.windows.values())} == {
            device
        }


def test_tokens_move_once_for_all_rows_that_read_them(sets, tmp_path, monkeypatch):
    "The tokens of a job are moved to the device once for each set of tokens, not for each row."
    shown = (EXHIBITS['anoclip-t4'], EXHIBITS['anoclip-t5'])
    job = plan_jobs(shown, sets[1], Model(), cache=tmp_path).jobs[0]
    methods = [row.method for _, row in job.rows if row.method]
    blocks, moved, move = open_model(job.model).blocks, [], Tokens.to

    def count(self, device):
        moved.append(device)
        return move(self, device)

    run_job(job)
    shutil.rmtree(tmp_path / 'runs')  # the images stay encoded
    monkeypatch.setattr(Tokens, 'to', count)
    run_job(job)
    sets_of_tokens = {(m.encode.resolved(blocks), m.interpolation) for m in methods}
    assert len(moved) == len(sets_of_tokens) < len(methods)


# ---- a term of one's own

OWN_TERM = """
import torch
from zsad.pipeline.terms import term
@term('mine', rev=1)
def mine(s, power:float=2.)->torch.Tensor:
    "Raise the distance of a patch to the mean patch to a power."
    p = list(s.tokens.patches.values())[0][-1]
    return (p - p.mean(1, keepdim=True)).norm(dim=-1)**power
"""


@pytest.fixture
def register_term(tmp_path, monkeypatch):
    "A function that registers a term 'mine' for a test, in a module or as in a notebook."
    from zsad.pipeline.terms import TERMS

    def register(module):
        if module:
            (tmp_path / 'own_terms.py').write_text(OWN_TERM)
            monkeypatch.syspath_prepend(tmp_path)
            monkeypatch.setenv(
                'PYTHONPATH', f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
            )
            sys.modules.pop('own_terms', None)
            __import__('own_terms')
        else:
            exec(OWN_TERM, {'__name__': '__main__'})

    yield register
    TERMS.operations.pop('mine', None)
    sys.modules.pop('own_terms', None)


def made_by_hand(power=2.0):
    from zsad.papers.exhibit import Exhibit, Row
    from zsad.pipeline.rows import METHODS

    terms = (('mine', dict(power=power)),)
    row = Row('Mine', replace(METHODS['anoclip'], name='mine', terms=terms))
    return (
        Exhibit(
            'mine',
            'A term of my own',
            '',
            (row, Row('AnoCLIP', METHODS['anoclip'])),
            ('mvtec',),
            ('image_auroc', 'pixel_auroc', 'pro'),
            contrasts=(('AnoCLIP', 'Mine', 'pixel_auroc'),),
            print_state='own',
        ),
    )


def table_of(sets, cache, out, **how):
    from zsad.bench.reading import read_results
    from zsad.reporting.contrasts import contrast_sentences
    from zsad.reporting.tables import table

    shown = made_by_hand()
    plan = plan_jobs(shown, sets[1], Model(), cache=cache)
    res = read_results(write_results(out, plan, run_plan(plan, show=False, **how)))
    assert len(contrast_sentences(shown[0], res).data) == 1
    return table(shown[0], res), plan


@pytest.mark.parametrize('module', [True, False], ids=['module', 'notebook'])
def test_a_term_of_ones_own_works_from_build_to_a_table(register_term, sets, tmp_path, module):
    import json

    from zsad.datasets.images import load_image
    from zsad.encoder.loading import load_encoder
    from zsad.pipeline.detector import build

    register_term(module)
    enc = load_encoder('mini', device='cpu')
    s = sets[1]['mvtec'].dataset.of('pill')[0]
    p = build(made_by_hand()[0].rows[0].method, ['pill'], enc)(
        enc.preprocess([load_image(s.path)]), ['pill']
    )
    assert p.map.shape == (1, 240, 240) and float(p.map.std()) > 0
    t, plan = table_of(sets, tmp_path / 'c', tmp_path / 'o')
    assert (
        t.loc['Mine', ('pixel AUROC', 'ours')] > 0
        and t.loc['Mine', ('pixel AUROC', 'ours')] != t.loc['AnoCLIP', ('pixel AUROC', 'ours')]
    )
    assert {
        json.loads(r['revs']).get('term mine') for r in plan.runs.values() if r['method_key']
    } == {1, None}


def test_other_processes_compute_what_they_can_and_this_one_the_rest(
    register_term, sets, tmp_path, capsys
):
    """A term of a notebook exists in this process alone.

    Two workers give the table of one, and a scheduler is refused.
    """
    register_term(False)
    alone, plan = table_of(sets, tmp_path / 'a', tmp_path / 'o')
    two, _ = table_of(sets, tmp_path / 'b', tmp_path / 'p', workers=2)
    assert (
        alone.equals(two)
        and "computed in this process: rows that use [\"term 'mine'\"]" in capsys.readouterr().err
    )
    with pytest.raises(
        ValueError, match="--scheduler tcp://x:1: .*term 'mine'.*move them to a module"
    ):
        run_all(plan.jobs, 'tcp://x:1', show=False)


def test_a_changed_file_costs_its_category_only(sets, tmp_path):
    shutil.copytree(sets[0], tmp_path / 'd')

    def count():
        return forecast(
            plan_jobs(
                SHOWN, open_sets(PROFILES['mini'], tmp_path / 'd')[0], Model(), cache=tmp_path / 'c'
            ).jobs
        )

    run_all(
        plan_jobs(
            SHOWN, open_sets(PROFILES['mini'], tmp_path / 'd')[0], Model(), cache=tmp_path / 'c'
        ).jobs,
        show=False,
    )
    assert count().results == 0
    next((tmp_path / 'd' / 'pill' / 'test' / 'good').glob('*.png')).write_bytes(
        b''
    )  # it rots, and is left out from now on
    assert (count().results, count().images) == (
        6,
        0,
    )  # the rows of one category; no image is encoded again


def test_a_cluster_that_loses_a_worker_gives_the_same_bytes(sets, undisturbed, tmp_path):
    distributed = pytest.importorskip('distributed')
    want, _ = undisturbed
    plan = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path / 'cache')
    with (
        distributed.LocalCluster(
            2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        pids, victims = client.run(os.getpid), []

        def kill():
            while not finished(tmp_path / 'cache'):
                time.sleep(0.005)
            busy = next((w for w, keys in client.processing().items() if keys), next(iter(pids)))
            victims.append(pids[busy])
            os.kill(pids[busy], signal.SIGKILL)

        t = threading.Thread(target=kill)
        t.start()
        answers = run_all(plan.jobs, cluster.scheduler_address, show=False)
        t.join()
        assert victims and victims[0] not in client.run(os.getpid).values()
    write_results(tmp_path / 'out', plan, collect(plan, answers))
    assert tables(tmp_path / 'out') == want


@pytest.mark.slow
def test_two_local_processes_give_the_same_bytes(sets, undisturbed, tmp_path):
    pytest.importorskip('distributed')
    plan = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path / 'cache')
    write_results(tmp_path / 'out', plan, run_plan(plan, '2', show=False))
    assert tables(tmp_path / 'out') == undisturbed[0]


def test_no_scheduler_is_an_error_in_words(sets, tmp_path):
    pytest.importorskip('distributed')
    jobs = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path).jobs
    with pytest.raises(ValueError, match='no Dask scheduler'):
        run_all(jobs, 'tcp://127.0.0.1:1', show=False)

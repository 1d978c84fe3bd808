"Runs that survive: killed and gone on with, on one process or a cluster of them, with a worker that dies; always the same bytes."
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path
import pytest
from zsad.bench import Job, Model, collect, open_sets, plan_jobs, read_result, run_all, run_job, write_results, PROFILES
from zsad.core import keyed
from zsad.exhibits import EXHIBITS
from zsad.procad import render_procad
from zsad.store import verify

SHOWN = (EXHIBITS['anoclip-t3'],)
TABLES = ('metrics.csv', 'contrasts.csv')


def tables(folder):
    return {f: (Path(folder)/f).read_bytes() for f in TABLES}


def finished(cache):
    return [p for p in Path(cache).rglob('*') if p.suffix in ('.json', '.safetensors') and not p.name.startswith('.') and p.name != 'stream.json']       # whose time says when a stream was last of use


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    root = render_procad(('pill', 'wood'), good=3, bad=4, train=1, size=240, root=tmp_path_factory.mktemp('data')/'d', workers=1)
    return root, open_sets(PROFILES['mini'], root)[0]


@pytest.fixture(scope='module')
def undisturbed(sets, tmp_path_factory):
    "Results and files of a run that nothing interrupts."
    cache, out = tmp_path_factory.mktemp('cache'), tmp_path_factory.mktemp('out')
    records, jobs, keys = plan_jobs(SHOWN, sets[1], Model(), cache=cache)
    write_results(out, SHOWN, records, collect(jobs, run_all(jobs, show=False), keys))
    return tables(out), len(finished(cache))


SCRIPT = """
import sys
from zsad.bench import Model, PROFILES, collect, open_sets, plan_jobs, run_all, write_results
from zsad.exhibits import EXHIBITS
root, cache, out = sys.argv[1:]
shown = (EXHIBITS['anoclip-t3'],)
records, jobs, keys = plan_jobs(shown, open_sets(PROFILES['mini'], root)[0], Model(), cache=cache)
write_results(out, shown, records, collect(jobs, run_all(jobs, show=False), keys))
"""


def test_killed_at_any_moment_a_run_goes_on_to_the_same_bytes(sets, undisturbed, tmp_path):
    want, total = undisturbed
    command = [sys.executable, '-c', SCRIPT, str(sets[0]), str(tmp_path/'cache'), str(tmp_path/'out')]
    moments, kept = sorted(keyed(0, 'kill').choice(range(1, total), 2, replace=False)), []
    for n in moments:
        p = subprocess.Popen(command)
        while p.poll() is None and len(finished(tmp_path/'cache')) < n: time.sleep(0.002)
        assert p.poll() is None, 'the run ended before it could be killed'
        p.send_signal(signal.SIGKILL); p.wait()
        done = {f: f.stat().st_mtime_ns for f in finished(tmp_path/'cache')}
        assert all(f.stat().st_mtime_ns == t for f, t in (kept[-1].items() if kept else ())), 'what was finished before was written again'
        kept.append(done)
    assert len(kept[0]) < len(kept[-1]) and not (tmp_path/'out').exists()
    subprocess.run(command, check=True)
    assert tables(tmp_path/'out') == want and verify(tmp_path/'cache'/'tokens') == []
    assert all(f.stat().st_mtime_ns == t for f, t in kept[-1].items())


def test_batches_of_one_give_the_same_bytes(sets, undisturbed, tmp_path):
    records, jobs, keys = plan_jobs(SHOWN, sets[1], Model(), batch=1, cache=tmp_path/'cache')
    write_results(tmp_path/'out', SHOWN, records, collect(jobs, run_all(jobs, show=False), keys))
    assert tables(tmp_path/'out') == undisturbed[0]


def test_a_torn_result_is_computed_again(sets, undisturbed, tmp_path):
    records, jobs, keys = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path)
    run_job(jobs[0]); file = jobs[0].result(jobs[0].rows[0][0]); whole = json.loads(file.read_text())
    file.write_text(file.read_text()[:100])
    assert read_result(file) is None
    assert run_job(jobs[0])[jobs[0].rows[0][0]]['values'] == whole['values'] and json.loads(file.read_text())['again'] == whole['again']


def test_a_failing_job_does_not_stop_the_others(sets, tmp_path):
    from dataclasses import replace
    records, jobs, keys = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path)
    broken = replace(jobs[1], pixels=tuple(reversed(jobs[1].pixels)))               # files that are not what they were
    with pytest.raises(ValueError, match=f'1 of {len(jobs)} jobs failed') as e: run_all([jobs[0], broken, *jobs[2:]], show=False)
    assert f'{broken.dataset}/{broken.category}' in str(e.value) and 'changed' in str(e.value)
    assert all(read_result(j.result(run)) for j in (jobs[0], *jobs[2:]) for run, _ in j.rows)


def test_another_file_of_weights_on_a_worker_is_refused(sets, tmp_path):
    from dataclasses import replace
    _, jobs, _ = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path)
    with pytest.raises(ValueError, match='same file'): run_job(replace(jobs[0], model=replace(jobs[0].model, expect='0123')))


def test_another_version_of_the_code_on_a_worker_is_refused(sets, tmp_path):
    from dataclasses import replace
    _, jobs, _ = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path)
    with pytest.raises(ValueError, match='same version'): run_job(replace(jobs[0], code='0123'))


def test_a_changed_file_costs_its_category_only(sets, tmp_path):
    import shutil
    from zsad.bench import forecast
    shutil.copytree(sets[0], tmp_path/'d')
    count = lambda: forecast(plan_jobs(SHOWN, open_sets(PROFILES['mini'], tmp_path/'d')[0], Model(), cache=tmp_path/'c')[1])
    run_all(plan_jobs(SHOWN, open_sets(PROFILES['mini'], tmp_path/'d')[0], Model(), cache=tmp_path/'c')[1], show=False)
    assert count().results == 0
    next((tmp_path/'d'/'pill'/'test'/'good').glob('*.png')).write_bytes(b'')                  # it rots, and is left out from now on
    assert (count().results, count().images) == (6, 0)                                        # the rows of one category; no image is encoded again


def test_a_cluster_that_loses_a_worker_gives_the_same_bytes(sets, undisturbed, tmp_path):
    distributed = pytest.importorskip('distributed')
    want, _ = undisturbed
    records, jobs, keys = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path/'cache')
    with distributed.LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        pids, victims = client.run(os.getpid), []
        def kill():
            while not finished(tmp_path/'cache'): time.sleep(0.005)
            busy = next((w for w, keys in client.processing().items() if keys), next(iter(pids)))
            victims.append(pids[busy]); os.kill(pids[busy], signal.SIGKILL)
        t = threading.Thread(target=kill); t.start()
        answers = run_all(jobs, cluster.scheduler_address, show=False); t.join()
        assert victims and victims[0] not in client.run(os.getpid).values()
    write_results(tmp_path/'out', SHOWN, records, collect(jobs, answers, keys))
    assert tables(tmp_path/'out') == want


def test_two_local_processes_give_the_same_bytes(sets, undisturbed, tmp_path):
    pytest.importorskip('distributed')
    records, jobs, keys = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path/'cache')
    write_results(tmp_path/'out', SHOWN, records, collect(jobs, run_all(jobs, '2', show=False), keys))
    assert tables(tmp_path/'out') == undisturbed[0]


def test_no_scheduler_is_an_error_in_words(sets, tmp_path):
    pytest.importorskip('distributed')
    _, jobs, _ = plan_jobs(SHOWN, sets[1], Model(), cache=tmp_path)
    with pytest.raises(ValueError, match='no Dask scheduler'): run_all(jobs, 'tcp://127.0.0.1:1', show=False)

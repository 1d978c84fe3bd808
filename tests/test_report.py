"The page of a run while it is computed, after it was stopped, and when nothing has changed."

import os
import re

import pytest

from zsad.bench.forecast import forecast
from zsad.bench.models import Model
from zsad.bench.plan import plan_jobs, run_plan
from zsad.bench.profiles import PROFILES, open_sets
from zsad.bench.progress import Progress
from zsad.bench.workers import stored_answers
from zsad.cli.main import main
from zsad.papers.exhibits import EXHIBITS, wave_of
from zsad.rendered.procad import render_procad
from zsad.reporting import report as report_module
from zsad.reporting.report import Report

SHOWN = (EXHIBITS['anoclip-t4'], EXHIBITS['anoclip-t3'])


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    d = tmp_path_factory.mktemp('data') / 'procad'
    render_procad(('pill', 'wood'), good=2, bad=3, train=1, size=96, root=d, workers=1)
    for file in d.rglob('*.png'):
        os.utime(file, (1e9, 1e9))  # long enough ago for the time of change to count
    return d


@pytest.fixture(scope='module')
def plan(root, tmp_path_factory):
    sets, _ = open_sets(PROFILES['mini'], root)
    cache = tmp_path_factory.mktemp('cache')
    return plan_jobs(SHOWN, sets, Model(device='cpu'), cache=cache)


@pytest.fixture
def user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'user'))


def test_early_tables_come_first(plan):
    waves = [job.wave for job in plan.jobs]
    assert waves == sorted(waves) and set(waves) == {wave_of(e.name) for e in SHOWN}
    assert waves[0] == wave_of('anoclip-t3') == 0
    keys = [(job.dataset, job.category, job.model, key) for job in plan.jobs for key, _ in job.rows]
    assert len(keys) == len(set(keys))  # a row of two exhibits is computed once


def test_a_table_fills_row_by_row(plan, tmp_path, user_cache, capsys):
    report = Report(tmp_path / 'out', every=0.0)
    report.write('The data sets are read.', refresh=5)
    assert 'The data sets are read.' in report.page.read_text()
    pages, update = [], report.update

    def watch(*done):
        update(*done)
        pages.append(report.page.read_text())

    work = forecast(plan.jobs, measure=True)
    assert len(work.by_job) == len(plan.jobs) and min(work.by_job) > 0
    report.follow(Progress(plan, work.by_job, 1), stored_answers(plan.jobs))
    assert 'about' in report.page.read_text() and 'computing' in report.page.read_text()
    run_plan(plan, show=False, watch=watch)
    report.write()
    last = report.page.read_text()
    assert len(pages) == len(plan.jobs)
    done = [
        sum(
            map(int, re.findall(r'(\d+) of \d+ results \(a row on a category\) are computed', page))
        )
        for page in pages
    ]
    assert done[0] > 0 and all('http-equiv="refresh"' in page for page in pages[:-1])
    assert 'computing' not in last and 'refresh' not in last and 'class="status"' not in last
    for e in SHOWN:
        assert f'figures/{e.name}.png' in last
        assert (tmp_path / 'out' / 'figures' / f'{e.name}.png').exists()
        assert (tmp_path / 'out' / 'results' / e.name / 'runs.csv').exists()
    early = next(i for i, page in enumerate(pages) if 'figures/anoclip-t3.png' in page)
    assert early < len(pages) - 1  # the early table is whole before the last job
    lines = capsys.readouterr().out
    assert re.search(r'anoclip-t3: with QKV attention: pixel AUROC \d+\.\d', lines)
    assert lines.count('anoclip-t4: ') == len([r for r in SHOWN[0].rows if not r.state])


def test_what_did_not_change_is_not_drawn_again(plan, tmp_path, user_cache, monkeypatch):
    def write(out):
        report = Report(tmp_path / out)
        report.follow(Progress(plan), stored_answers(plan.jobs))
        run_plan(plan, show=False, watch=report.update)
        return report.write()

    first = write('a').read_bytes()
    drawn = []
    monkeypatch.setattr(report_module, 'write_exhibit', lambda *a: drawn.append(a))
    assert write('b').read_bytes() == first and not drawn
    files = [
        {p.relative_to(tmp_path / out): p.read_bytes() for p in (tmp_path / out).rglob('*.*')}
        for out in 'ab'
    ]
    assert len(files[0]) > 10 and files[0] == files[1]


def test_a_run_that_is_stopped_leaves_a_page_and_goes_on(root, tmp_path, user_cache, monkeypatch):
    arguments = ['reproduce', 'anoclip-t3', 'anoclip-t4', '--data', str(root), '--workers', '1']
    arguments += ['--device', 'cpu', '--out', str(tmp_path / 'out')]
    update, done = Report.update, []

    def stop(self, *finished):
        update(self, *finished)
        done.append(finished)
        if len(done) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Report, 'update', stop)
    assert main(arguments) == 130
    page = (tmp_path / 'out' / 'index.html').read_text()
    assert 'This run was stopped. The same command continues it' in page
    assert 'figures/gallery.png' in page and '<table>' in page and 'refresh' not in page
    monkeypatch.setattr(Report, 'update', update)
    computed = []
    monkeypatch.setattr(
        Report,
        'update',
        lambda self, *finished: (computed.append(finished[2]), update(self, *finished)),
    )
    assert main(arguments) == 0
    assert computed.count(False) >= 4 and True in computed
    page = (tmp_path / 'out' / 'index.html').read_text()
    assert 'stopped' not in page and 'computing' not in page


def test_a_second_run_reads_no_image_and_draws_nothing(root, tmp_path, user_cache, monkeypatch):
    arguments = ['reproduce', 'anoclip-t3', 'dual-f4', '--data', str(root), '--device', 'cpu']
    arguments += ['--workers', '1', '--out']
    assert main([*arguments, str(tmp_path / 'a')]) == 0

    def refuse(*_, **__):
        raise AssertionError('a second run has nothing to compute')

    for name in (
        'zsad.datasets.survey.inspect_sample',
        'zsad.encoder.encoder.Encoder.tokens',
        'zsad.encoder.encoder.Encoder.embed_text',
        'zsad.bench.workers.run_job',
        'zsad.reporting.report.write_exhibit',
        'zsad.cli.reproduce.write_gallery',
        'zsad.reporting.pictures.write_pictures',
    ):
        monkeypatch.setattr(name, refuse)
    assert main([*arguments, str(tmp_path / 'b')]) == 0
    names = ('index.html', 'figures/anoclip-t3.png', 'figures/dual-f4.png', 'figures/gallery.png')
    for name in names:
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()

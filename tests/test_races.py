"""Two processes that do the same work at once give the same bytes as one.

A killed process leaves nothing that is taken for complete. Each test starts an interpreter of its
own, which forks two racers per repetition: one starts at a random moment after the other, and one
of them is killed at a random moment. All moments are seeded.
"""

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from zsad.core.files import UNFINISHED, write_atomic
from zsad.core.hashing import digest
from zsad.core.randomness import seeded_rng

WRONG = 3  # exit code of a racer that was given other content than an undisturbed process
FORK = get_context('fork')


def start(work, folder, want, wait=0.0):
    "Start a process that does `work(folder)` after `wait` seconds and compares what it is given."

    def run():
        time.sleep(wait)
        os._exit(0 if work(folder) == want else WRONG)

    p = FORK.Process(target=run)
    p.start()
    return p


def undisturbed(work, folder):
    "What one process is given, what it leaves, and the seconds it takes."
    answer = FORK.SimpleQueue()
    p = FORK.Process(target=lambda: answer.put((work(folder), time.time())))
    begin = time.time()
    p.start()
    given, end = answer.get()
    p.join()
    return given, contents(folder), end - begin


def contents(folder):
    "The bytes of every finished file below a folder."
    return {
        str(f.relative_to(folder)): digest(f.read_bytes())
        for f in sorted(Path(folder).rglob('*'))
        if f.is_file()
        and not any(p.startswith('.') for p in f.relative_to(folder).parts)
        and f.name != 'stream.json'
    }  # its time says when the stream was last of use


def race(name, work, folder, repetitions, watch=lambda folder: None):
    "Let two processes do the same work, kill one of them, and compare with an undisturbed one."
    given, kept, took = undisturbed(work, folder / 'one')
    assert kept, 'nothing was written'
    killed = 0
    for n in range(repetitions):
        rng, place = seeded_rng(0, 'race', name, n), folder / str(n)
        racers = [start(work, place, given), start(work, place, given, rng.uniform(0, took))]
        victim, moment = racers[rng.integers(2)], time.time() + rng.uniform(0, 1.5 * took)
        while time.time() < moment and victim.is_alive():
            watch(place)
            time.sleep(0.001)
        victim.kill()
        for p in racers:
            p.join()
        other = next(p for p in racers if p is not victim)
        assert other.exitcode == 0, (
            f'repetition {n}: the process that lived on ended with {other.exitcode}'
        )
        assert victim.exitcode in (0, -signal.SIGKILL), f'repetition {n}: {victim.exitcode}'
        killed += victim.exitcode == -signal.SIGKILL
        again = start(work, place, given)  # who comes later
        again.join()
        assert again.exitcode == 0, f'repetition {n}: a later process ended with {again.exitcode}'
        left = contents(place)
        assert left == kept, (
            f'repetition {n}: other files or bytes: {sorted(set(left.items()) ^ set(kept.items()))}'
        )
    assert killed >= repetitions / 4, (
        f'only {killed} of {repetitions} were killed while they worked'
    )


def pairs(folder):
    "Render training pairs into the cache and hash what is given."
    from zsad.rendered.pairs import render_pairs

    os.environ['ZSAD_CACHE'] = str(folder)
    p = render_pairs(3, workers=1, report=lambda text: None)
    return digest(np.array(p.images), np.array(p.labels), np.array(p.inside), p.kinds, p.defects)


def rendered_set(folder):
    "Render a set into the cache and hash its files."
    from zsad.rendered.procad import render_procad

    os.environ['ZSAD_CACHE'] = str(folder)
    root = render_procad(('pill',), good=1, bad=2, train=1, size=96, workers=1)
    return digest(contents(root))


def encoder_work(folder):
    "A function that encodes four images into a store and hashes the tokens that it gives back."
    import torch
    from PIL import Image

    from zsad.encoder.loading import load_encoder
    from zsad.encoder.spec import AttentionPath, EncodeSpec
    from zsad.encoder.store import encode_missing, load_or_encode
    from zsad.encoder.streams import split

    torch.set_num_threads(1)
    encoder = load_encoder('mini', device='cpu')
    spec, files = EncodeSpec((AttentionPath('vv'),)).resolved(encoder.blocks), {}
    for i, a in enumerate(seeded_rng(0, 'races').integers(0, 256, (4, 40, 50, 3), dtype='u1')):
        Image.fromarray(a).save(folder / f'{i}.png')
        files[digest(a, n=24)] = str(folder / f'{i}.png')

    def encode(root):
        encode_missing(root, encoder, spec, 'bicubic', files, shard=2)
        return digest(
            *(t.numpy() for t in split(load_or_encode(root, encoder, spec, 'bicubic', files), spec))
        )

    return encode


RESULT = json.dumps(
    dict(values={f'metric {k}': k / 7 for k in range(20)}, again=[k / 3 for k in range(2000)])
)


def results(folder):
    "Write the results of some runs as the benchmark does, and hash what lies there."
    files = [folder / f'{n}' / 'pill-all.json' for n in range(12)]
    for f in files:
        write_atomic(f, RESULT)
    return digest(*(f.read_bytes() for f in files))


def no_torn_result(folder):
    "Read the results that are there: every one is whole."
    for f in folder.glob('*/*.json'):
        assert f.read_text() == RESULT, f'{f} is torn'


def run_race(name, folder, repetitions):
    "Run a race in this process, which does nothing else."
    folder = Path(folder)
    if name == 'encode':
        race(name, encoder_work(folder), folder, repetitions)
    else:
        watch = no_torn_result if name == 'results' else lambda folder: None
        race(
            name,
            dict(pairs=pairs, set=rendered_set, results=results)[name],
            folder,
            repetitions,
            watch,
        )


@pytest.mark.skipif(sys.platform != 'linux', reason='forks')
@pytest.mark.parametrize('name', ('pairs', 'set', 'encode', 'results'))
def test_two_processes_and_a_killed_one_give_the_same_bytes(name, tmp_path):
    command = [sys.executable, __file__, name, str(tmp_path), '20']
    done = subprocess.run(
        command,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_a_killed_renderer_leaves_is_removed_later(tmp_path, monkeypatch):
    from zsad.rendered.procad import render_procad

    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path))
    old, new = (tmp_path / 'procad' / f'{UNFINISHED}{k}' for k in ('old', 'new'))
    for p in (old, new):
        (p / 'whole' / 'pill').mkdir(parents=True)
    for p in (old / 'whole' / 'pill', old / 'whole', old):
        os.utime(p, (0, 0))
    root = render_procad(('pill',), good=1, bad=1, train=1, size=96, workers=1)
    assert root.parent == tmp_path / 'procad' and not old.exists() and new.exists()


if __name__ == '__main__':
    run_race(sys.argv[1], sys.argv[2], int(sys.argv[3]))

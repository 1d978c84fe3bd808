"Digests, names, folders, files and cores: what the rest relies on."

import os
import stat
import subprocess
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest

from zsad.core.files import cache_dir, fill_folder, safe_name, write_atomic
from zsad.core.hashing import digest
from zsad.core.parallel import available_cores, quota_cores

LONG = np.zeros(5000)
OTHER = LONG.copy()
OTHER[2500] = 1


@dataclass
class Box:
    content: object
    hidden: object = field(default=None, repr=False)


FIXED = (  # hashes of data, weights and rows are made of these: they never change
    ('ae6121c88ba5', ('a',)),
    ('43ee655579de', ('ab', 'c')),
    ('5dff2b3fa797', (b'ab',)),
    ('34a3dd00bbd5', (7, -1)),
    ('85f8afc26a2f', (0.1, 1e-9)),
    ('603b790aee83', (None, True)),
    ('5feceba34826', ('sch\u00f6n',)),
    ('ad9afa930562', (np.zeros((2, 3)),)),
    ('848391844692', (np.arange(12, dtype='u1').reshape(3, 4),)),
    ('a7bdbdd23563', (np.arange(12, dtype='f4').reshape(3, 4)[:, ::-1],)),
    ('04832d911502', (np.array(3),)),
    ('97388d7c8ce3', ({'a': 1, 'b': (1, 2.5, 'x')},)),
    ('969946d1ce8a', ([1, 2, ['y']],)),
    ('731cd63c8c23', (np.float32(0.1),)),
    ('c4627457a90e', (('pill', 'wood'), 40, 50)),
    ('e3b0c44298fc', ()),
)


@pytest.mark.parametrize('want,parts', FIXED, ids=[w for w, _ in FIXED])
def test_digests_that_data_is_named_by_stay(want, parts):
    assert digest(*parts) == want


def test_pixels_of_an_image_keep_their_name():
    assert digest(np.arange(5), n=24) == '9cd3d9531be781f299770c9e'


@pytest.mark.parametrize(
    'wrap',
    (
        lambda a: [a],
        lambda a: (1, a),
        lambda a: {'k': a},
        lambda a: [[{'k': (a,)}]],
        Box,
        lambda a: Box(1, a),
        lambda a: [Box([a])],
    ),
)
def test_two_arrays_differ_wherever_they_lie(wrap):
    assert digest(wrap(LONG)) == digest(wrap(LONG.copy())) != digest(wrap(OTHER))
    assert digest(wrap(LONG)) != digest(wrap(LONG.astype('f4')))


def test_what_a_text_leaves_out_counts():
    assert digest(Box(1, 2)) != digest(Box(1, 3))
    assert digest([LONG, 'a', 'b']) != digest([LONG, 'ab']) and digest([LONG, 1]) != digest(
        [LONG, '1']
    )


@pytest.mark.parametrize(
    'value',
    (
        {'a', 'b'},
        [object()],
        (x for x in 'ab'),
        np.array([object()]),
        [np.array([None, 1])],
        lambda: 1,
        memoryview(b'ab'),
        np.ma.array([1, 2], mask=[0, 1]),
    ),
)
def test_what_has_no_stable_bytes_is_refused(value):
    with pytest.raises(TypeError, match='no stable bytes'):
        digest(value)


def test_a_file_name_that_is_no_text_has_a_digest():
    assert digest(os.fsdecode(b'a\xff.png')) != digest(os.fsdecode(b'a\xfe.png'))


ODD = (
    '/tmp/x',
    '../../..',
    '..',
    '.',
    '.x',
    '',
    'a/b',
    'a\\b',
    'a:b',
    'a_b',
    'a b',
    'a\n',
    'a\0b',
    'x' * 81,
    'x' * 82,
    'Stra\u00dfe',
    '-',
    '~',
)


def test_names_become_one_file_each(tmp_path):
    assert [safe_name(t) for t in ('metal_nut', 'pcb1', 'a-b.c', 'Brain', '0')] == [
        'metal_nut',
        'pcb1',
        'a-b.c',
        'Brain',
        '0',
    ]
    names = [safe_name(t) for t in (*ODD, *(safe_name(t) for t in ODD))]
    assert len(set(names)) == len(set((*ODD, *(safe_name(t) for t in ODD))))
    for name in names:
        (tmp_path / f'{name}.json').write_text('')
        assert (
            tmp_path / f'{name}.json'
        ).resolve().parent == tmp_path.resolve() and not name.startswith('.')


@pytest.mark.parametrize('parts', (('/tmp/x',), ('..',), ('pairs', '..', '..', 'x'), ('a', '/')))
def test_nothing_is_made_outside_the_cache(parts, tmp_path, monkeypatch):
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'cache'))
    with pytest.raises(ValueError, match='outside the cache'):
        cache_dir(*parts)
    assert cache_dir('a', 'b') == tmp_path / 'cache' / 'a' / 'b'


def test_a_set_cannot_be_rendered_outside_its_folder(tmp_path):
    from zsad.rendered.procad import design
    from zsad.rendered.sets import render_set

    with pytest.raises(ValueError, match='name of a folder'):
        render_set(
            'mine',
            {'../../pill': design('pill', 'procad')},
            root=tmp_path / 'a' / 'b' / 'set',
            workers=1,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('umask,mode', ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)))
def test_files_have_the_permissions_of_the_user(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        file = write_atomic(tmp_path / 'a.txt', 'one')
        assert stat.S_IMODE(file.stat().st_mode) == mode
        file.chmod(0o640)
        assert (
            stat.S_IMODE(write_atomic(file, 'two').stat().st_mode) == 0o640
            and file.read_text() == 'two'
        )
    finally:
        os.umask(before)
    assert [p.name for p in tmp_path.iterdir()] == ['a.txt']


def test_a_file_with_a_long_name_is_written(tmp_path):
    assert write_atomic(tmp_path / ('x' * 250 + '.txt'), 'a').read_text() == 'a'


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = write_atomic(tmp_path / 'a.txt', 'one')
    with pytest.raises(TypeError):
        write_atomic(file, 3)
    assert file.read_text() == 'one' and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with fill_folder(tmp_path / 'set') as work:
            (work / 'a').write_text('a')
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with fill_folder(tmp_path / 'set') as work:
        assert not (tmp_path / 'set').exists()
        (work / 'a').write_text('a')
    assert [p.name for p in tmp_path.rglob('*')] == ['set', 'a']


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='affinity')
def test_a_process_that_is_bound_to_one_core_uses_one():
    code = (
        'import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); '
        'from zsad.core.parallel import available_cores, parallel_map; '
        'assert available_cores() == 1; '
        'pids = set(parallel_map(lambda n: os.getpid(), range(3))); assert pids == {os.getpid()}'
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_a_container_uses_what_its_quota_allows(tmp_path, monkeypatch):
    import zsad.core.parallel

    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(os, 'process_cpu_count', lambda: 64, raising=False)
    for cores, want in ((1.5, 2), (0.2, 1), (float('inf'), 64)):
        monkeypatch.setattr(zsad.core.parallel, 'quota_cores', lambda: cores)
        assert available_cores() == want
    write_atomic(tmp_path / 'app' / 'cpu.max', '400000 100000')
    (tmp_path / 'cgroup').write_text('0::/app/job\n')
    assert quota_cores(tmp_path, tmp_path / 'cgroup') == 4 and quota_cores(
        tmp_path, tmp_path / 'none'
    ) == float('inf')

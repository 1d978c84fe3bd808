"The token store: what names a stream, what counts as a shard, and that recalling ends."

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from zsad.core.files import write_atomic
from zsad.core.hashing import digest
from zsad.core.randomness import seeded_rng
from zsad.encoder import shards, store, streams
from zsad.encoder.loading import load_encoder
from zsad.encoder.shards import DamagedShard, read_shard, shard_bytes
from zsad.encoder.spec import AttentionPath, EncodeSpec
from zsad.encoder.store import (
    index,
    load_or_encode,
    prune,
    rows_in,
    streams_in,
    verify,
    write_shard,
)
from zsad.encoder.streams import Stream, split, streams_of

S = Stream('mini', 'w', 'float32', 'cpu', 'bicubic', 'vv', 6, -1, rev=1, pipeline=1, made_by='2.14')
T = torch.arange(24.0).view(4, 3, 2)


@pytest.fixture(scope='module')
def enc():
    return load_encoder('mini', device='cpu')


@pytest.fixture
def images(tmp_path):
    "Three image files by the hash of their pixels."
    files = {}
    for i, a in enumerate(seeded_rng(0, 'test store').integers(0, 256, (3, 40, 50, 3), dtype='u1')):
        Image.fromarray(a).save(tmp_path / f'{i}.png')
        files[digest(a, n=24)] = str(tmp_path / f'{i}.png')
    return files


@pytest.fixture
def passes(monkeypatch):
    "Count how often images are encoded; the eleventh time fails."
    seen, encode = [], store.encode_images

    def counted(*args, **more):
        seen.append(len(args[1]))
        assert len(seen) <= 10, 'encoded again and again'
        return encode(*args, **more)

    monkeypatch.setattr(store, 'encode_images', counted)
    return seen


def rewrite(file, change):
    "Change the header of a shard."
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], 'little')
    header = json.loads(raw[8:end])
    change(header)
    header = json.dumps(header).encode()
    header += b' ' * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, 'little') + header + raw[end:])


def test_a_stream_is_named_by_what_decides_its_numbers():
    "The value is fixed: moved and rewritten code finds the tokens of before."
    assert S.key == '0ba634bd6fefea17' and replace(S, backbone='another name').key == S.key
    others = dict(
        weights='v',
        dtype='bfloat16',
        device='cuda',
        interpolation='bilinear',
        part='qkv',
        depth=5,
        layer=-2,
        stage='raw',
        rev=2,
        pipeline=2,
        made_by='2.15',
    )
    assert {*others, 'backbone'} == {f.name for f in fields(Stream)}
    keys = {replace(S, **{k: v}).key for k, v in others.items()}
    assert len(keys) == len(others) and S.key not in keys


def test_streams_state_revisions_and_torch(enc, monkeypatch):
    spec = EncodeSpec((AttentionPath('vv'),), windows=(2,)).resolved(enc.blocks)
    by_part = {s.part: s for s in streams_of(enc, spec, 'bicubic')}
    assert all(
        s.usable and torch.__version__.startswith(s.made_by + '.') and s.device == 'cpu'
        for s in by_part.values()
    )
    monkeypatch.setattr(streams, 'ENCODING_REV', 99)
    assert not any(s.usable for s in by_part.values())
    after = {s.part: s for s in streams_of(enc, spec, 'bicubic')}
    assert all(after[p].usable and after[p].key != by_part[p].key for p in by_part)


def test_a_shard_that_is_not_what_its_header_promises_is_not_held(tmp_path):
    file = write_shard(tmp_path, S, ['p', 'q', 'r', 's'], T)
    whole = file.read_bytes()
    assert set(index(tmp_path, S)) == {'p', 'q', 'r', 's'}
    damages = (
        lambda: file.write_bytes(whole[:-1]),
        lambda: file.write_bytes(whole[:40]),
        lambda: file.write_bytes(b''),
        lambda: file.write_bytes(whole + b'x'),
        lambda: file.write_bytes(b'\xff' * len(whole)),
        lambda: rewrite(
            file, lambda h: h['__metadata__'].update(images=json.dumps(['p', 'q', 'r', 's', 't']))
        ),
        lambda: rewrite(
            file, lambda h: h['__metadata__'].update(images=json.dumps(['q', 'p', 'r', 's']))
        ),
        lambda: rewrite(file, lambda h: h.pop('__metadata__')),
        lambda: rewrite(file, lambda h: h.clear()),
    )
    for n, damage in enumerate(damages):
        file.write_bytes(whole)
        damage()
        assert index(tmp_path, S) == {}, n
        assert [f for f, _ in verify(tmp_path)] == [file], n
        with pytest.raises(DamagedShard, match=file.name):
            read_shard(file)


def test_rows_that_are_remembered_cannot_be_changed(tmp_path):
    file = write_shard(tmp_path, S, ['p', 'q', 'r', 's'], T)
    now = file.stat()
    with pytest.raises(TypeError):
        rows_in(file, now.st_mtime_ns, now.st_size)['p'] = None
    index(tmp_path, S).clear()
    assert len(index(tmp_path, S)) == 4


def torn(path, data):
    "Write all but the last bytes of a shard, as a full disk does."
    return write_atomic(path, data[:-8] if str(path).endswith('.safetensors') else data)


def test_shards_that_are_never_written_whole_end_with_an_error(
    enc, images, tmp_path, passes, monkeypatch
):
    monkeypatch.setattr(shards, 'write_atomic', torn)
    with pytest.raises(DamagedShard, match=r'\.safetensors: \d+ bytes instead of \d+'):
        load_or_encode(tmp_path / 't', enc, EncodeSpec((AttentionPath('vv'),)), 'bicubic', images)
    assert 1 <= len(passes) <= 5


def test_shards_that_vanish_end_with_an_error(enc, images, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(store, 'write_shard', lambda *args: None)
    with pytest.raises(DamagedShard, match='3 images .* not there'):
        load_or_encode(tmp_path / 't', enc, EncodeSpec((AttentionPath('vv'),)), 'bicubic', images)
    assert 1 <= len(passes) <= 5


def test_shards_that_vanish_while_they_are_read_end_with_an_error(
    enc, images, tmp_path, passes, monkeypatch
):
    def gone(file):
        raise FileNotFoundError(file)

    monkeypatch.setattr(store, 'read_shard', gone)
    with pytest.raises(DamagedShard, match='vanished'):
        load_or_encode(tmp_path / 't', enc, EncodeSpec((AttentionPath('vv'),)), 'bicubic', images)


def test_a_shard_that_was_cut_is_encoded_once_more(enc, images, tmp_path, passes):
    spec, root = EncodeSpec((AttentionPath('vv'),)).resolved(enc.blocks), tmp_path / 't'
    want = load_or_encode(root, enc, spec, 'bicubic', images)
    for file in root.glob('*/*.safetensors'):
        file.write_bytes(file.read_bytes()[:-100])
    got = load_or_encode(
        root, enc, spec, 'bicubic', dict(list(images.items())[:2])
    )  # another shard: the torn one stays
    assert len(passes) == 2 and all(
        torch.equal(a[:2], b) for a, b in zip(split(want, spec), split(got, spec))
    )
    assert len(verify(root)) == 2


def test_a_shard_is_the_same_bytes_whenever_it_is_written():
    assert (
        len({shard_bytes(['p', 'q', 'r', 's'], T) for _ in range(20)}) == 1
    )  # safetensors sorts no metadata


def test_streams_of_another_version_are_listed_and_pruned(tmp_path, monkeypatch, capsys):
    from zsad.cli.main import main

    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path))
    root = tmp_path / 'tokens'
    today = Stream('mini', 'w', 'float32', 'cpu', 'bicubic', 'vv', 6, -1)
    file = write_shard(root, today, ['p'], T[:1])
    other = [
        write_shard(root, replace(today, **change), ['p'], T[:1])
        for change in (dict(rev=99), dict(pipeline=99), dict(made_by='1.0'))
    ]
    old = write_shard(root, replace(today, weights='older'), ['p'], T[:1])
    text = dict(
        json.loads((old.parent / 'stream.json').read_text()),
        code='0123',
        made_by='torch 2.14.1, pillow 12',
    )
    (old.parent / 'stream.json').write_text(
        json.dumps({k: v for k, v in text.items() if k not in ('rev', 'pipeline')})
    )
    assert verify(root) == [] and main(['store', 'verify']) == 0
    assert sorted(s is None or not s.usable for s, *_ in streams_in(root)) == [
        False,
        True,
        True,
        True,
        True,
    ]
    capsys.readouterr()
    assert main(['store', 'list']) == 0 and capsys.readouterr().out.count('unusable') == 4
    assert prune(root) > 0 and file.exists() and not any(f.parent.exists() for f in (*other, old))


def test_pruning_survives_another_process(tmp_path, monkeypatch):
    "Files and folders may go while they are looked at."
    file = write_shard(tmp_path, S, ['p'], T[:1])
    ghost = file.parent / '.ghost'
    glob = Path.glob

    def haunted(self, pattern):
        yield from glob(self, pattern)
        if self == file.parent:
            yield ghost if pattern == '*' else file.parent / 'ghost.safetensors'

    monkeypatch.setattr(Path, 'glob', haunted)
    assert [r[2] for r in streams_in(tmp_path)] == [1] and prune(tmp_path, days=0) > 0
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []

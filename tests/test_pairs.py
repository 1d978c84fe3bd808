"""Rendered pairs and sets in the cache.

Their pixels stay, their names are made of everything that decides the pixels, and nothing is left
half done.
"""

import shutil

import numpy as np
import pytest

import zsad.rendered.boards
import zsad.rendered.medical
import zsad.rendered.novel
import zsad.rendered.pairs
import zsad.rendered.sets
from zsad.core.hashing import digest
from zsad.rendered.pairs import draw_pair, render_pairs
from zsad.rendered.procad import design
from zsad.rendered.sets import render_set, set_spec

PIXELS = {  # (revision of procad, of pairs): hashes of a few pairs
    (1, 1): {
        ('pretrain', 0): '0a082dd2aa72',
        ('pretrain', 1): '0b2f7df03593',
        ('pretrain', 2): '6bbc31bcdd30',
        ('validation', 0): 'f5f662e920ad',
        ('validation', 1): '59e04de47e4f',
        ('validation', 2): 'ce743c599c63',
    }
}
QUIET = dict(workers=1, report=lambda text: None)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path))
    return tmp_path


def test_pixels_of_pairs_change_with_their_revision_only():
    "Where this fails, undo the change, or raise RENDER_REV or PAIRS_REV and add what is drawn now."
    drawn = PIXELS[zsad.rendered.sets.RENDER_REV, zsad.rendered.pairs.PAIRS_REV]
    for (world, n), want in drawn.items():
        p = draw_pair(n, world)
        got = digest(p.images, p.label, p.inside, p.kind, p.defect)
        assert got == want, f'pair {n} of {world} is drawn differently here: {got}'


def test_pixels_of_sets_are_held_for_these_revisions():
    "The hashes in the tests of the sets are those of these revisions; raise them together."
    found = (
        zsad.rendered.sets.RENDER_REV,
        zsad.rendered.novel.NOVEL_REV,
        zsad.rendered.boards.BOARDS_REV,
        zsad.rendered.medical.MEDICAL_REV,
    )
    assert found == (1, 1, 1, 1)


def folders(cache):
    return {p.name for p in (cache / 'pairs').iterdir()}


def test_pairs_are_named_by_everything_that_decides_them(cache, monkeypatch):
    render_pairs(1, **QUIET)
    seen = folders(cache)
    for change in (
        lambda: monkeypatch.setattr(zsad.rendered.pairs, 'PAIRS_REV', 99),
        lambda: monkeypatch.setattr(zsad.rendered.pairs, 'RENDER_REV', 99),
        lambda: monkeypatch.setattr(zsad.rendered.pairs, 'VALIDATION', ('pill',)),
    ):
        change()
        render_pairs(1, **QUIET)
        assert len(folders(cache)) == len(seen) + 1
        seen = folders(cache)
    for more in (dict(seed=1), dict(designs=7), dict(world='validation'), dict(world='../../x')):
        render_pairs(1, **QUIET, **more)
        assert len(folders(cache)) == len(seen) + 1, more
        seen = folders(cache)
    assert {p.name for p in cache.iterdir()} == {'pairs'}


def test_pairs_are_rendered_once(cache, monkeypatch):
    first = render_pairs(2, **QUIET)
    monkeypatch.setattr(
        zsad.rendered.pairs, 'draw_pair', lambda *args: pytest.fail('rendered again')
    )
    again = render_pairs(2, **QUIET)
    assert (
        np.array_equal(first.images, again.images)
        and first.kinds == again.kinds
        and first.images.any()
    )


def test_a_renderer_that_is_interrupted_leaves_nothing(cache, monkeypatch):
    draw = zsad.rendered.pairs.draw_pair

    def dies(n, *more):
        if n == 1:
            raise KeyboardInterrupt
        return draw(n, *more)

    monkeypatch.setattr(zsad.rendered.pairs, 'draw_pair', dies)
    with pytest.raises(KeyboardInterrupt):
        render_pairs(3, **QUIET)
    assert folders(cache) == set()


@pytest.mark.parametrize(
    'damage',
    (
        lambda f: (f / 'words.json').unlink(),
        lambda f: (f / 'images.npy').unlink(),
        lambda f: (f / 'images.npy').write_bytes((f / 'images.npy').read_bytes()[:-1]),
        lambda f: np.save(f / 'labels.npy', np.zeros((1, 15, 15), 'u1')),
        lambda f: (f / 'words.json').write_text('[["pill", "stain"]]'),
    ),
)
def test_pairs_that_were_damaged_are_refused(cache, damage):
    render_pairs(2, **QUIET)
    folder = cache / 'pairs' / folders(cache).pop()
    damage(folder)
    with pytest.raises(ValueError, match=f'{folder}.*remove the folder'):
        render_pairs(2, **QUIET)
    shutil.rmtree(folder)
    assert len(render_pairs(2, **QUIET).kinds) == 2


def test_sets_are_named_by_everything_that_decides_them():
    pill, sizes = design('pill', 'procad'), dict(good=1, bad=1, train=1, seed=0, size=96)
    base = set_spec('a', dict(pill=pill), sizes, dict(procad=1))
    others = {
        set_spec('b', dict(pill=pill), sizes, dict(procad=1)),
        set_spec('a', dict(tablet=pill), sizes, dict(procad=1)),
        set_spec('a', dict(pill=design('pill', 'procad', 1)), sizes, dict(procad=1)),
        set_spec('a', dict(pill=design('pill', 'aux')), sizes, dict(procad=1)),
        set_spec('a', dict(pill=pill), sizes, dict(procad=2)),
        set_spec('a', dict(pill=pill), sizes, dict(procad=1, novel=1)),
        *(set_spec('a', dict(pill=pill), {**sizes, k: 7}, dict(procad=1)) for k in sizes),
    }
    assert len(others) == 6 + len(sizes) and base not in others


@pytest.mark.parametrize(
    'module,render,name',
    (
        (zsad.rendered.novel, 'render_novel', 'NOVEL_REV'),
        (zsad.rendered.boards, 'render_boards', 'BOARDS_REV'),
        (zsad.rendered.medical, 'render_medical', 'MEDICAL_REV'),
    ),
)
def test_a_raised_revision_renders_a_set_again(module, render, name, monkeypatch):
    "The set is named by the revision of its own module and of procad."
    seen = []
    monkeypatch.setattr(module, 'render_set', lambda *args, revs, **how: seen.append(revs))
    getattr(module, render)()
    monkeypatch.setattr(module, name, 99)
    getattr(module, render)()
    key = module.__name__.split('.')[-1]
    assert seen == [{key: 1}, {key: 99}]


def test_a_folder_with_something_else_is_refused(tmp_path):
    made = dict(good=1, bad=1, train=1, size=96, workers=1)
    root = render_set('a', dict(pill=design('pill', 'procad')), root=tmp_path / 'set', **made)
    assert render_set('a', dict(pill=design('pill', 'procad')), root=root, **made) == root
    with pytest.raises(ValueError, match='something else'):
        render_set('a', dict(pill=design('pill', 'procad', 1)), root=root, **made)
    (root / 'dataset.json').write_text('{')
    with pytest.raises(ValueError, match='something else'):
        render_set('a', dict(pill=design('pill', 'procad')), root=root, **made)

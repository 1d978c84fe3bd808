"What the procedural benchmark promises: the same pixels everywhere, nothing shared with pretraining, masks that fit."
import numpy as np
import pytest
from zsad.core import digest
from zsad.procad import KINDS, PROCAD, OBJECTS, STRUCTURE, SURFACE, defects_of, design, held_out, render

PIXELS = {'bottle': '5eca4c9c1018', 'cable': '7333a9a40ac0', 'carpet': '07be3696bf07', 'grid': '7840b8496de3', 'screw': 'c4817effdabf', 'wood': '54a8f9fd4c73'}


@pytest.mark.parametrize('kind', PROCAD)
def test_every_defect_is_drawn_and_visible(kind):
    for d in defects_of(kind):
        s = render(design(kind, 'procad'), 3, d)
        assert s.image.shape == (240, 240, 3) and s.image.dtype == np.uint8
        assert 0.003 <= s.mask.mean() <= 0.1 and s.foreground.mean() > 0.05
        if kind in OBJECTS and d != 'thread': assert (s.mask & s.foreground).sum() > 0.8*s.mask.sum(), d      # a defect lies on the object


def test_masks_fit_the_change():
    from zsad.procad import difference, paint_pair
    for kind, d in (('pill', 'stain'), ('transistor', 'missing'), ('wood', 'crack'), ('screw', 'misplaced')):
        clean, _, bad, _, mask = paint_pair(design(kind, 'procad'), 5, d)
        change = abs(clean - bad).max(0)
        assert change[~mask].max() < 0.5 and (change[~mask] > 0.07).mean() < 0.002      # specks below the size limit only
        assert (change[mask] > 0.07).mean() > 0.5


def test_pretraining_never_draws_a_held_out_design():
    for kind in KINDS:
        assert held_out(*(lambda d: (d.form, d.hue))(design(kind, 'procad')))
        for world in ('pretrain', 'validation'):
            for n in range(60):
                d = design(kind, world, n); assert not held_out(d.form, d.hue)


def test_instances_are_disjoint(monkeypatch):
    "No random stream of the benchmark is one of pretraining's: every key that is drawn from names its world."
    import zsad.procad
    keys, keyed = {}, zsad.procad.keyed
    for world in ('procad', 'pretrain'):
        used = keys.setdefault(world, set())
        monkeypatch.setattr(zsad.procad, 'keyed', lambda *k: used.add(k) or keyed(*k))
        for kind in ('pill', 'wood'): render(design(kind, world), 0, 'stain')
    assert keys['procad'] and not keys['procad'] & keys['pretrain']


def test_twelve_kinds_of_defects():
    assert len(set(SURFACE + STRUCTURE)) == 12
    assert {d for k in PROCAD for d in defects_of(k)} == set(SURFACE + STRUCTURE)


@pytest.mark.parametrize('kind', PIXELS)
def test_pixels_are_the_same_everywhere(kind):
    got = digest(*(a for d in ('good', *defects_of(kind)[-2:]) for s in [render(design(kind, 'procad'), 1, d)] for a in (s.image, s.mask)))
    assert got == PIXELS[kind], f'{kind} is drawn differently here: {got}'

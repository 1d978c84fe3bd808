"""What the procedural benchmark promises.

The same pixels everywhere, no design shared with pretraining, masks that fit the change, defects
that can be seen, and no simple statistic that finds them.
"""

from functools import cache

import numpy as np
import pytest

from zsad.core.hashing import digest
from zsad.evaluation.measure import evaluate
from zsad.evaluation.metrics import pixel_auroc_within
from zsad.evaluation.resizing import resize
from zsad.rendered.defects import STRUCTURE, SURFACE
from zsad.rendered.procad import CONTRAST, KINDS, PROCAD, design, held_out
from zsad.rendered.scene import paint_pair, render
from zsad.rendered.sets import plan

PIXELS = {
    'bottle': '8186c7cbafe3',
    'cable': '2aefb5a77ac6',
    'capsule': 'a42d64ece186',
    'carpet': '617d7a35b15d',
    'connector': '3cd1c836fcfb',
    'fabric': '65e620e048f5',
    'gear': '842c28612a54',
    'grid': '80daf5e52540',
    'leather': '4ed4178263a9',
    'metal_nut': '31dd08064cf3',
    'pill': '2ba431aef1ce',
    'screw': '38e137c139b7',
    'tile': '005149519040',
    'transistor': 'cc36a68fdddd',
    'wood': 'd64f055542b8',
}
WORLDS = ('procad', 'pretrain', 'validation', 'aux')


def test_fifteen_categories_and_at_least_twelve_kinds_of_defects():
    assert len(PROCAD) == len(set(PROCAD)) == 15 and sum(KINDS[k].texture for k in PROCAD) == 6
    found = {d for k in PROCAD for d in KINDS[k].defects}
    assert (
        found == set(SURFACE + STRUCTURE)
        and len(found) >= 12
        and {'missing', 'misplaced', 'flipped', 'swapped'} <= found
    )
    assert 'button' in KINDS and 'button' not in PROCAD
    rows = plan(KINDS['pill'], 40, 50, 20)
    assert [
        sum((d == 'good', split) == key for d, split, *_ in rows)
        for key in ((True, 'train'), (True, 'test'), (False, 'test'))
    ] == [20, 40, 50]


@pytest.mark.parametrize('kind', PROCAD)
def test_every_defect_is_drawn_and_visible(kind):
    dsg = design(kind, 'procad')
    for d in dsg.kind.defects:
        clean, fore, bad, both, mask = paint_pair(dsg, 3, d)
        assert 0.003 <= mask.mean() <= 0.1 and fore.mean() > 0.2, d
        assert abs(bad - clean).max(0)[mask].mean() > CONTRAST >= 0.2, d
        if not dsg.kind.texture and d not in dsg.kind.over:
            assert (mask & (both > 0.5)).sum() > 0.8 * mask.sum(), d  # a defect lies on the object
    s = render(dsg, 3, d)
    assert (
        s.image.shape == (240, 240, 3)
        and s.image.dtype == np.uint8
        and (s.mask == mask).all()
        and s.defect == d
    )


def test_a_defect_that_does_not_occur_is_refused():
    with pytest.raises(ValueError, match='choose from'):
        render(design('wood', 'procad'), 0, 'missing')


def test_masks_fit_the_change():
    for kind, d in (
        ('pill', 'stain'),
        ('transistor', 'missing'),
        ('wood', 'crack'),
        ('screw', 'misplaced'),
        ('cable', 'swapped'),
        ('capsule', 'flipped'),
        ('gear', 'chip'),
    ):
        clean, _, bad, _, mask = paint_pair(design(kind, 'procad'), 5, d)
        change = abs(clean - bad).max(0)
        assert (change[~mask] > 0.07).mean() < 0.002 and (change[mask] > 0.07).mean() > 0.5, (
            kind,
            d,
        )  # outside: specks below the size limit only


def test_chips_are_notches():
    "A chip takes away from the outline and leaves the object in one piece."
    from scipy import ndimage

    for kind in ('bottle', 'capsule', 'gear', 'screw', 'connector'):
        _, fore, bad, _, mask = paint_pair(design(kind, 'procad'), 4, 'chip')
        pieces = np.bincount(ndimage.label((fore > 0.5) & ~mask)[0].ravel())[1:]
        assert (
            pieces.max() > 0.98 * pieces.sum()
            and (mask & ndimage.binary_dilation(fore < 0.5, iterations=3)).any()
        ), kind


def test_a_recoloured_part_is_far_from_its_colour():
    from zsad.core.randomness import seeded_rng
    from zsad.rendered.defects import alter_parts
    from zsad.rendered.drawing import grid

    X, Y = grid(60)
    for n in range(40):
        dsg = design('pill', 'procad')
        parts = dsg.kind.paint(X, Y, seeded_rng(0, 'look'), seeded_rng(0, 'v'), dsg.form, dsg.hue)
        other = alter_parts(parts, 'wrong_color', seeded_rng(n, 'defect'), X, Y)
        assert max(abs(a.color - b.color).max() for a, b in zip(parts, other)) >= 0.4


def test_pretraining_never_draws_a_held_out_design():
    for kind in KINDS:
        d = design(kind, 'procad')
        assert held_out(d.form, d.hue)
        for world in WORLDS[1:]:
            assert not any(
                held_out(d.form, d.hue) for d in (design(kind, world, n) for n in range(60))
            )


def test_instances_are_disjoint(monkeypatch):
    "No random stream of one world is another's: every key that is drawn from names its world."
    import zsad.rendered.procad
    import zsad.rendered.scene
    from zsad.core.randomness import seeded_rng

    keys = {w: set() for w in WORLDS}
    for world, used in keys.items():

        def noted_rng(*key, used=used):
            used.add(key)
            return seeded_rng(*key)

        monkeypatch.setattr(zsad.rendered.procad, 'seeded_rng', noted_rng)
        monkeypatch.setattr(zsad.rendered.scene, 'seeded_rng', noted_rng)
        for kind, d in (('pill', 'stain'), ('wood', 'dent'), ('cable', 'swapped')):
            render(design(kind, world), 0, d)
    assert all(keys.values()) and len(set.union(*keys.values())) == sum(map(len, keys.values()))


def patch_statistics(image, foreground, n=15):
    """Distance of each patch's mean, spread and gradient from the median of its image, [n,n].

    It is 0 off the object.
    """
    a = image.astype('f4') / 255
    grey = a.mean(2)
    edge = np.zeros_like(grey)
    edge[:, 1:] += abs(np.diff(grey, axis=1))
    edge[1:] += abs(np.diff(grey, axis=0))

    def blocks(t):
        return t.reshape(n, 16, n, 16, -1).transpose(0, 2, 1, 3, 4).reshape(n, n, 256, -1)

    rows, on = (
        np.concatenate([blocks(a).mean(2), blocks(a).std(2), blocks(edge).mean(2)], -1),
        blocks(foreground).mean((2, 3)) > 0.5,
    )
    z = (rows[on] - rows[on].mean(0)) / (rows[on].std(0) + 1e-6)
    out = np.zeros((n, n))
    out[on] = np.sqrt(((z - np.median(z, 0)) ** 2).sum(1))
    return out


@cache
def ceilings():
    "Mean of what patch statistics and the outline reach on 30 images of each category."
    rows = []
    for kind in PROCAD:
        dsg = design(kind, 'procad')
        shots = [render(dsg, number, d) for d, _, number, _ in plan(dsg.kind, 12, 18, 0)]
        masks, fore, labels = (
            np.array([s.mask for s in shots]),
            np.array([s.foreground for s in shots]),
            np.array([s.defect != 'good' for s in shots]).astype(int),
        )
        small = np.array([patch_statistics(s.image, s.foreground) for s in shots])
        maps = resize(small, 240).astype('f4')
        m, scores = evaluate(maps, masks, small.max((1, 2)), labels), np.zeros(len(shots))
        row = dict(pixel=m['pixel_auroc'], image=m['image_auroc'])
        if not dsg.kind.texture:
            row |= dict(
                within=pixel_auroc_within(maps, masks, fore),
                outline=evaluate(fore.astype('f4'), masks, scores, labels)['pixel_auroc'],
            )
        rows.append(row)
    return {
        k: 100 * np.mean([r[k] for r in rows if k in r])
        for k in rows[0] | rows[-1] | dict(within=0, outline=0)
    }


@pytest.mark.parametrize(
    'what,limit', (('pixel', 85), ('within', 75), ('image', 65), ('outline', 85))
)
def test_no_trick_solves_it(what, limit):
    assert 45 < ceilings()[what] < limit, ceilings()


def pixels(kind, world):
    "Name the pixels of a kind's first design: a good image and its last two defects, with masks."
    return digest(
        *(
            a
            for d in ('good', *kind.defects[-2:])
            for s in [render(design(kind, world), 1, d)]
            for a in (s.image, s.mask)
        )
    )


@pytest.mark.parametrize('kind', PROCAD)
def test_pixels_are_the_same_everywhere(kind):
    got = pixels(KINDS[kind], 'procad')
    assert got == PIXELS[kind], f'{kind} is drawn differently here: {got}'


AUX = dict(
    bottle='1eb3b061ed79',
    cable='53c2f4dacee3',
    capsule='f006eb326370',
    metal_nut='8b288a0f4c94',
    pill='e7fefb5c8945',
    screw='7e53bdc564b3',
    transistor='890126485b16',
    button='379010a0cace',
    gear='1e82b9317e48',
    connector='20cea49e2b60',
    carpet='d84b9323993c',
    grid='f789de989920',
    leather='451dc0bfc800',
    tile='efbbbc43c1ce',
    wood='98835aa623cb',
    fabric='0db71388f23e',
)


@pytest.mark.parametrize('kind', AUX)
def test_auxiliary_pixels_are_the_same_everywhere(kind):
    got = pixels(KINDS[kind], 'aux')
    assert got == AUX[kind], f'{kind} is drawn differently here: {got}'

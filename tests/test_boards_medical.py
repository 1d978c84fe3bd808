"""What the second and third rendered sets promise.

Other things than procad's, every defect visible and on its object, the same pixels every time.
"""

import json

import numpy as np
import pytest
from test_procad import pixels

from zsad.core.hashing import digest
from zsad.core.randomness import seeded_rng
from zsad.rendered.board_defects import (
    add_solder_bridge,
    bend_pin,
    choose_piece,
    is_loose,
    move_piece,
    remove_piece,
)
from zsad.rendered.board_parts import lettering, letters, nearest_frame
from zsad.rendered.boards import BOARDS, render_boards
from zsad.rendered.drawing import grid
from zsad.rendered.medical import MEDICAL, render_medical
from zsad.rendered.medical_defects import displace
from zsad.rendered.procad import KINDS, design
from zsad.rendered.scene import paint_pair, render

ALL = [(k, 'b') for k in BOARDS] + [(k, 'med') for k in MEDICAL]
PAIRS = [(k, world, d) for k, world in ALL for d in k.defects]


@pytest.mark.parametrize('kind,world,defect', PAIRS, ids=lambda a: getattr(a, 'name', a))
def test_every_defect_is_drawn_on_its_object(kind, world, defect):
    s = render(design(kind, world), 3, defect)
    assert s.image.shape == (240, 240, 3) and s.image.dtype == np.uint8 and s.defect == defect
    assert 0.003 <= s.mask.mean() <= 0.1 and s.foreground.mean() > 0.2
    if defect not in kind.over:
        assert (s.mask & s.foreground).sum() > 0.8 * s.mask.sum(), 'a defect lies on the object'


def test_sets_share_no_name_and_no_noun():
    names = [k.name for k, _ in ALL] + list(KINDS)
    nouns = [k.noun for k, _ in ALL] + [k.noun for k in KINDS.values()]
    assert len(set(names)) == len(names) and len(set(nouns)) == len(nouns)
    assert all(d.isidentifier() for k, _ in ALL for d in k.defects) and all(
        len(set(k.defects)) == len(k.defects) for k, _ in ALL
    )


def test_sets_are_as_large_as_promised():
    assert len(BOARDS) >= 8 and len(MEDICAL) >= 4
    assert (
        len({d for k in MEDICAL for d in k.defects}) >= 5
        and sum(k.texture for k in MEDICAL) >= 2
        and not any(k.texture for k in BOARDS)
    )


@pytest.mark.parametrize('kind,world', [(BOARDS[0], 'b'), (MEDICAL[0], 'med')], ids=('b', 'med'))
def test_a_picture_is_a_function_of_its_key(kind, world):
    d = kind.defects[0]

    def draw(n=1, seed=0):
        return digest(
            *(a for s in [render(design(kind, world), n, d, seed=seed)] for a in (s.image, s.mask))
        )

    assert draw() == draw() and draw() != draw(2) and draw() != draw(seed=1)


@pytest.mark.parametrize(
    'kind,world', [(BOARDS[6], 'b'), (MEDICAL[3], 'med')], ids=lambda a: getattr(a, 'name', a)
)
def test_masks_fit_the_change(kind, world):
    for d in kind.defects[:3]:
        clean, _, bad, _, mask = paint_pair(design(kind, world), 5, d)
        change = abs(clean - bad).max(0)
        assert (change[~mask] > 0.07).mean() < 0.004 and (change[mask] > 0.07).mean() > 0.4


def test_nearest_frame_finds_the_nearest_and_its_frame():
    X, Y = grid(60)
    poses = [(-0.5, -0.5, 0.0), (0.5, 0.5, 0.25)]
    U, V, k = nearest_frame(X, Y, poses, step=1)
    near = np.stack([(X - x) ** 2 + (Y - y) ** 2 for x, y, _ in poses])
    assert (np.take_along_axis(near, k[None], 0)[0] == near.min(0)).all()
    assert abs(U * U + V * V - near.min(0)).max() < 0.02  # turning keeps distances
    other = nearest_frame(X, Y, poses)[2] != k
    assert other.mean() < 0.05  # the coarse search differs near the border only


def test_lettering_is_its_bits():
    bits = letters(seeded_rng(0, 'letters'), 3)
    h = 0.04
    U, V = np.meshgrid((np.arange(13, dtype='f4') - 6) * h, (np.arange(13, dtype='f4') - 6) * h)
    assert ((lettering(U, V, bits, h)[3:10] < 0) == (bits > 0.5)).all()


def test_pieces_come_off_one_at_a_time():
    X, Y = grid(240)
    kind = next(k for k in BOARDS if k.name == 'pasta')
    parts = kind.paint(X, Y, seeded_rng(0, 'g'), seeded_rng(0, 'v'), 0.5, 0.5)
    part, piece, zone = choose_piece(seeded_rng(1, 'x'), parts, is_loose)
    assert part is parts[0] and (piece & zone).sum() == piece.sum()
    less = remove_piece(parts, 'pasta', zone)
    assert ((less[0].d < 0) == ((parts[0].d < 0) & ~piece)).all() and not (
        less[1].d[zone] < 0
    ).any()
    moved = move_piece(parts, 'pasta', zone, 5, -7)
    assert ((moved[1].d < 0) == np.roll(piece, (5, -7), (0, 1))).all() and (
        (moved[0].d < 0) == (less[0].d < 0)
    ).all()


def test_pins_gain_what_is_bent_and_bridged():
    X, Y = grid(240)
    parts = BOARDS[0].paint(X, Y, seeded_rng(0, 'g'), seeded_rng(0, 'v'), 0.5, 0.5)
    for f in (bend_pin, add_solder_bridge):
        more = f(parts, seeded_rng(2, 'pins'), X, Y)
        assert more[: len(parts)] == parts and len(more) > len(parts)


def test_displace_moves_by_the_given_distances():
    img = np.zeros((3, 40, 40), 'f4')
    img[:, 20, 10] = 1
    zero = np.zeros((40, 40), 'f4')
    assert abs(displace(img, zero, zero) - img).max() < 1e-6
    assert (
        abs(displace(img, zero + 2 / 20, zero - 3 / 20)[:, 23, 8] - 1).max() < 1e-3
    )  # from two pixels to the right and three above


@pytest.mark.parametrize(
    'render_it,kinds,name',
    [(render_boards, BOARDS, 'procad-b'), (render_medical, MEDICAL, 'procad-med')],
    ids=('b', 'med'),
)
def test_folder(render_it, kinds, name, tmp_path):
    root = render_it(good=1, bad=1, train=1, root=tmp_path / 'set', workers=1)
    description = json.loads((root / 'dataset.json').read_text())
    assert description['name'] == name and description['kinds'] == {
        k.name: 'texture' if k.texture else 'object' for k in kinds
    }
    for k in kinds:
        assert (root / k.name / 'train' / 'good' / '000.png').exists() and (
            root / k.name / 'ground_truth' / k.defects[0] / '000_mask.png'
        ).exists()
        assert (root / k.name / 'foreground').exists() != k.texture


PIXELS = dict(
    sensor_board='9676a095abf3',
    relay_board='517c3b53763e',
    memory_board='e6e11b8eedf6',
    radio_board='c8de4275bebd',
    candles='ca7fa46dba4e',
    tablets='93c35fffd50b',
    pasta='05afce722fe3',
    cashew='d4e76447a807',
    gum='69400205ba22',
    dough_pipe='53c8beaf8b53',
    snack_wheel='50d14e66d0e7',
    brain_slice='98b8d6e29eb6',
    liver_slice='2e022c7ec28b',
    chest='5bc56dafa33e',
    retina='9c06f157efa1',
    cell_smear='cbfc82868a39',
)


@pytest.mark.parametrize('kind,world', ALL, ids=lambda a: getattr(a, 'name', a))
def test_pixels_are_the_same_everywhere(kind, world):
    got = pixels(kind, world)
    assert got == PIXELS[kind.name], f'{kind.name} is drawn differently here: {got}'

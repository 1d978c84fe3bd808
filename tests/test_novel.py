"""What `procad-novel` promises.

Nothing but the renderer is shared with pretraining, every defect is visible on its object, and the
pixels are the same everywhere.
"""

import numpy as np
import pytest
from test_procad import pixels

from zsad.rendered.novel import NOVEL, render_novel
from zsad.rendered.novel_defects import alter_novel_parts, draw_novel_defect
from zsad.rendered.procad import KINDS, design
from zsad.rendered.scene import paint_pair, render

BY_NAME = {k.name: k for k in NOVEL}
PIXELS = {
    'cork': '41e9f6f4dde2',
    'paving': '88d5d29db2bf',
    'wicker': 'e79d01bd68b3',
    'tread_plate': 'd68064a11ea4',
    'zip_fastener': '44363526e7ed',
    'toothbrush': '83ad67a9b421',
    'almond': '20ff1bf9ec42',
    'light_bulb': '2b41020caf5f',
    'key': '7d6fc3bdea9e',
    'padlock': '13c51642985f',
    'stamp': '3f967080869c',
    'biscuit': '2f8d883ed838',
}


def words(kinds):
    return {w for k in kinds for n in (k.name, k.noun) for w in n.lower().replace('_', ' ').split()}


def test_nothing_is_shared_with_pretraining():
    seen = KINDS.values()
    assert not {k.name for k in NOVEL} & {k.name for k in seen}
    assert not words(NOVEL) & words(seen)
    assert not {d for k in NOVEL for d in k.defects} & {d for k in seen for d in k.defects}
    assert not {k.paint for k in NOVEL} & {k.paint for k in seen}
    assert not {f for k in NOVEL for f in (k.alter_parts, k.draw_defect)} & {
        f for k in seen for f in (k.alter_parts, k.draw_defect)
    }


def test_size_of_the_set():
    assert sum(k.texture for k in NOVEL) >= 3 and sum(not k.texture for k in NOVEL) >= 6
    assert len({d for k in NOVEL for d in k.defects}) >= 10 and len(BY_NAME) == len(
        {k.noun for k in NOVEL}
    ) == len(NOVEL)
    assert all(len(set(k.defects)) == len(k.defects) >= 6 for k in NOVEL)
    assert all(
        (k.alter_parts, k.draw_defect) == (alter_novel_parts, draw_novel_defect) for k in NOVEL
    )


@pytest.mark.parametrize('kind', BY_NAME)
def test_every_defect_is_drawn_and_visible(kind):
    k = BY_NAME[kind]
    for d in k.defects:
        s = render(design(k, 'novel'), 3, d)
        assert s.image.shape == (240, 240, 3) and s.image.dtype == np.uint8 and s.defect == d
        assert 0.003 <= s.mask.mean() <= 0.1, d
        if not k.texture:
            assert (s.mask & s.foreground).sum() > 0.8 * s.mask.sum(), d


@pytest.mark.parametrize('kind', BY_NAME)
def test_masks_fit_the_change(kind):
    k = BY_NAME[kind]
    for d in k.defects[::3]:
        clean, _, bad, _, mask = paint_pair(design(k, 'novel'), 5, d)
        change = abs(clean - bad).max(0)
        assert (change[~mask] > 0.07).mean() < 0.003 and (change[mask] > 0.07).mean() > 0.4, d


def test_normal_images_of_a_category_are_aligned():
    "One camera: two normal instances differ less than two categories do."
    a = {
        k.name: [render(design(k, 'novel'), n).image.astype(float) for n in (0, 1)]
        for k in NOVEL
        if not k.texture
    }
    for name, (x, y) in a.items():
        assert abs(x - y).mean() < min(
            abs(x - z[0]).mean() for other, z in a.items() if other != name
        ), name


def test_other_designs_can_be_drawn_too():
    for k in NOVEL:
        for n in (1, 2):
            s = render(design(k, 'novel', n), n, k.defects[n])
            assert 0.003 <= s.mask.mean() <= 0.1


def test_the_set_is_a_folder(tmp_path):
    root = render_novel(good=1, bad=2, train=1, size=96, root=tmp_path / 'novel')
    assert {p.name for p in root.iterdir() if p.is_dir()} == set(BY_NAME)
    assert len(list(root.glob('*/test/*/*.png'))) == 3 * len(NOVEL) and len(
        list(root.glob('*/ground_truth/*/*_mask.png'))
    ) == 2 * len(NOVEL)


@pytest.mark.parametrize('kind', BY_NAME)
def test_pixels_are_the_same_everywhere(kind):
    got = pixels(BY_NAME[kind], 'novel')
    assert got == PIXELS[kind], f'{kind} is drawn differently here: {got}'

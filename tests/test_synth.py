"""Synthesised anomalies: sums written out, every off position, and the numbers of two public codes.

Nothing is downloaded. NOISE, BLENDED and MASK were computed by DRAEM (commit 2dbf673), AUGMENTED
by imgaug 0.4.0 (NumPy 1.26, OpenCV 4.11), on the inputs that `picture` and the seeds below make.
"""

import numpy as np
import pytest
import torch
from scipy import ndimage

from zsad.core.randomness import seeded_rng
from zsad.methods import augmentation, synthesis
from zsad.methods.augmentation import (
    AUGMENTERS,
    augment,
    autocontrast,
    brighten,
    brightness,
    equalize,
    gamma,
    hue_saturation,
    invert,
    posterize,
    rotate,
    sharpness,
    solarize,
    tilt,
)
from zsad.methods.synthesis import blend, draw_mask, lattice_noise, patch_mask, perlin, synthesize
from zsad.methods.textures import FIELDS, draw_texture, near


class Scripted:
    "A generator that returns given values, and fails when more are drawn."

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, a, b, size=None):
        return self.values.pop(0)

    def random(self, size=None):
        return self.values.pop(0)

    def integers(self, a, b=None, size=None):
        return np.array(self.values.pop(0))

    def permutation(self, n):
        return np.arange(n)


class Spy:
    "A generator that keeps what it is asked for."

    def __init__(self):
        self.rng, self.requests = np.random.default_rng(0), []

    def __getattr__(self, name):
        return lambda *a: self.requests.append((name, *a)) or getattr(self.rng, name)(*a)


def picture(h, w, seed):
    "Two ramps and their mean with noise, uint8 [h,w,3]; `seed` is a number or a generator."
    y, x = np.mgrid[:h, :w]
    drawn = np.random.default_rng(seed).integers(-40, 41, (h, w, 3))
    return np.clip(
        np.stack([255 * x // w, 255 * y // h, 127 * x // w + 127 * y // h], -1) + drawn, 0, 255
    ).astype('u1')


def levels(a, b):
    assert a.shape == b.shape and a.dtype == np.uint8, (a.shape, b.shape, a.dtype)
    return abs(a.astype(int) - b)


# --- noise


def test_noise_is_the_sum_over_four_corners_written_out():
    rng = np.random.default_rng(0)
    angles = 2 * np.pi * rng.random((4, 6))
    H, W = 21, 35
    n = lattice_noise(angles, (H, W))

    def fade(t):
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    for y, x in rng.integers(0, (H, W), (60, 2)):
        (i, t), (j, u) = divmod(y * 3 / H, 1), divmod(x * 5 / W, 1)
        i, j = int(i), int(j)
        want = 0
        for a, b in np.ndindex(2, 2):
            g = np.cos(angles[i + a, j + b]), np.sin(angles[i + a, j + b])
            want += (
                (fade(t) if a else 1 - fade(t))
                * (fade(u) if b else 1 - fade(u))
                * (g[0] * (t - a) + g[1] * (u - b))
            )
        assert abs(n[y, x] - 2**0.5 * want) < 1e-12


def test_noise_is_zero_on_corners_and_bounded():
    angles = 2 * np.pi * np.random.default_rng(1).random((9, 5))
    assert abs(lattice_noise(angles, (64, 32))[::8, ::8]).max() < 1e-12
    assert abs(lattice_noise(angles, (200, 123))).max() <= 1
    assert lattice_noise(np.pi / 4 * np.array([[1, -1], [3, -3]]), (2, 2))[1, 1] == pytest.approx(1)
    assert np.allclose(lattice_noise(angles + np.pi, (40, 40)), -lattice_noise(angles, (40, 40)))


@pytest.mark.parametrize(
    'shape', [(240, 240), (518, 518), (37, 101), (101, 37), (1, 9), (336, 240)]
)
def test_any_size_any_number_of_cells(shape):
    for res in ((1, 1), (32, 32), (32, 1), (3, 7)):
        n = perlin(shape, res, seeded_rng(0, shape, res))
        assert n.shape == shape and np.isfinite(n).all() and abs(n).max() <= 1
        assert np.array_equal(n, perlin(shape, res, seeded_rng(0, shape, res)))


NOISE = {
    ((240, 240), (16, 5)): (
        [-0.052572137, -0.099345075, 0.211825734, -0.07590268],
        -210.403144148,
        3554,
        ([1, 77, 130, 239], [2, 9, 177, 238]),
    ),
    ((64, 128), (32, 1)): (
        [0.088402257, -0.252576234, 0.030894743, -0.01487774],
        -30.015540533,
        473,
        ([1, 17, 40, 63], [2, 9, 77, 127]),
    ),
    ((32, 32), (4, 2)): (
        [0.151375964, 0.735981317, -0.163726183, 0.231122224],
        44.551222099,
        None,
        ([1, 5, 13, 30], [2, 9, 17, 31]),
    ),
}


def drawn():
    "What was drawn for the public code, in its order: image, texture, angles."
    rng = np.random.default_rng(2303)
    return (
        picture(32, 32, rng),
        picture(50, 70, rng),
        *(2 * np.pi * rng.random(s) for s in ((5, 3), (17, 6), (33, 2))),
    )


def test_numbers_of_the_public_noise():
    *_, small, square, wide = drawn()
    for ((shape, res), (values, total, above, at)), angles in zip(
        NOISE.items(), (square, wide, small)
    ):
        n = lattice_noise(angles, shape)
        assert (
            angles.shape == (res[0] + 1, res[1] + 1)
            and abs(n[at] - values).max() < 1e-9
            and abs(n.sum() - total) < 1e-7
        )
        assert above is None or (n > 0.5).sum() == above


# --- masks


def test_rotation():
    a = np.random.default_rng(0).random((7, 7)).astype('f4')
    for quarter in (1, 2, 3):
        assert np.allclose(rotate(a, 90 * quarter), np.rot90(a, quarter), atol=1e-6)
    assert np.array_equal(rotate(a, 0), a)
    white = np.full((40, 60, 3), 255, 'u1')
    turned = rotate(white, 30)
    assert (
        turned.shape == white.shape
        and turned.dtype == np.uint8
        and (turned[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()
        and (turned[15:25, 20:40] == 255).all()
    )
    y, x = np.mgrid[:101, :101]
    blob = ((y - 20) ** 2 + (x - 50) ** 2 < 9).astype(
        'f4'
    )  # above the centre; counter-clockwise it goes left
    got = ndimage.center_of_mass(rotate(blob, 60))
    assert np.allclose(got, (50 - 30 * np.cos(np.pi / 3), 50 - 30 * np.sin(np.pi / 3)), atol=0.1)


def test_a_mask_is_turned_noise_above_a_half(monkeypatch):
    requests = []
    monkeypatch.setattr(
        synthesis,
        'perlin',
        lambda shape, res, rng: requests.append(tuple(res)) or perlin(shape, res, rng),
    )
    for i in range(300):
        draw_mask((48, 64), seeded_rng(0, 'cells', i), False)
    assert {k for res in requests for k in res} == {1, 2, 4, 8, 16, 32} and len(requests) == 300
    counts = np.array(
        [sum(res[a] == k for res in requests) for a in (0, 1) for k in (1, 2, 4, 8, 16, 32)]
    )
    assert counts.min() > 25 and counts.max() < 80
    assert len(set(requests)) > 30  # down and across on their own
    angles = 2 * np.pi * np.random.default_rng(5).random((3, 5))
    m = draw_mask((48, 64), Scripted((1, 2), angles / (2 * np.pi), 20.0))
    assert (
        m.dtype == bool
        and np.array_equal(m, rotate(lattice_noise(angles, (48, 64)).astype('f4'), 20.0) > 0.5)
        and 0.01 < m.mean() < 0.5
    )


def test_statistics_of_draem_masks():
    "Means over 500 draws lie within three standard errors of 4000 draws of the public code."
    area, parts = np.array(
        [
            (m.mean(), ndimage.label(m, np.ones((3, 3)))[1])
            for m in (
                draw_mask((256, 256), seeded_rng(0, 'statistics', i), False) for i in range(500)
            )
        ]
    ).T
    assert abs(area.mean() - 0.0491) < 0.004 and abs(np.median(area) - 0.0461) < 0.004
    assert abs((area == 0).mean() - 0.048) < 0.028
    assert abs(np.median(parts) - 9) <= 3 and abs(parts.mean() - 24.5) < 5.5


def test_forced_masks_are_never_empty_and_otherwise_the_same():
    free, forced = (
        np.stack([draw_mask((40, 40), seeded_rng(0, 'force', i), force) for i in range(150)])
        for force in (False, True)
    )
    empty = ~free.any((1, 2))
    assert (
        2 < empty.sum() < 40
        and forced.any((1, 2)).all()
        and np.array_equal(free[~empty], forced[~empty])
    )
    with pytest.raises(ValueError, match=r'shape=\(1, 1\).*too small.*8 x 8'):
        draw_mask((1, 1), seeded_rng(0))
    assert not draw_mask((1, 1), seeded_rng(0), False).any()


def test_fine_lattices_rarely_cover_half_a_patch():
    m = np.stack([draw_mask((240, 240), seeded_rng(0, 'f', i)) for i in range(100)])
    alone = m.reshape(100, 15, 16, 15, 16).mean((2, 4)).max((1, 2)) <= 0.5
    assert abs(alone.mean() - 0.28) < 0.135 and patch_mask(m, 15).any(1).all()


# --- augmenters

AUGMENTED = dict(
    gamma=(
        [[103, 34, 1], [135, 71, 74], [214, 114, 104], [187, 200, 102]],
        [165.359, 105.557, 71.046],
    ),
    blur=(
        [[46, 53, 32], [86, 101, 117], [177, 146, 166], [134, 219, 164]],
        [124.672, 121.443, 122.143],
    ),
    sharp=(
        [[37, 56, 7], [55, 89, 161], [183, 128, 159], [142, 203, 158]],
        [124.97, 121.642, 122.169],
    ),
    solarize=(
        [[42, 55, 21], [72, 159, 117], [75, 117, 92], [117, 43, 93]],
        [72.366, 72.01, 95.518],
    ),
    one=([[0, 0, 0], [0, 0, 128], [128, 128, 128], [128, 128, 128]], [62.667, 60.0, 58.5]),
    three=(
        [[32, 32, 0], [64, 96, 128], [160, 128, 160], [128, 192, 160]],
        [109.833, 106.5, 107.583],
    ),
    eight=(
        [[42, 55, 21], [72, 96, 138], [180, 138, 163], [138, 212, 162]],
        [125.076, 121.898, 122.467],
    ),
    invert=(
        [[213, 200, 234], [183, 159, 117], [75, 117, 92], [117, 43, 93]],
        [129.924, 133.102, 132.533],
    ),
    auto13=(
        [[12, 43, 0], [52, 96, 156], [199, 149, 202], [142, 244, 201]],
        [125.188, 127.926, 126.827],
    ),
    equalize=(
        [[65, 92, 14], [114, 156, 229], [255, 216, 255], [210, 255, 255]],
        [169.424, 169.233, 169.645],
    ),
    tilt=(
        [[32, 91, 58], [126, 135, 95], [151, 102, 138], [190, 191, 187]],
        [103.992, 101.432, 101.728],
    ),
    hue=(
        [[27, 55, 35], [116, 88, 138], [180, 165, 158], [162, 198, 212]],
        [134.525, 133.961, 132.03],
    ),
    hue2=(
        [[55, 19, 10], [44, 138, 88], [120, 102, 180], [192, 212, 96]],
        [109.749, 107.5, 111.206],
    ),
    YUV=(
        [[68, 82, 47], [106, 131, 172], [222, 179, 206], [185, 255, 210]],
        [158.667, 154.945, 158.148],
    ),  # imgaug: YCrCb
    YUV2=([[12, 26, 0], [36, 61, 102], [135, 92, 119], [89, 163, 114]], [88.25, 84.88, 83.189]),
    HSV=(
        [[64, 83, 31], [92, 124, 178], [227, 173, 205], [165, 255, 195]],
        [149.092, 145.059, 145.854],
    ),
    HSV2=([[19, 25, 9], [50, 66, 96], [131, 100, 118], [102, 158, 121]], [90.392, 88.198, 88.323]),
    HLS=(
        [[71, 91, 35], [104, 130, 176], [214, 190, 204], [205, 237, 216]],
        [162.479, 158.604, 160.413],
    ),
    HLS2=([[12, 16, 6], [47, 62, 89], [138, 88, 118], [68, 186, 107]], [84.04, 82.659, 81.951]),
    Lab=(
        [[68, 80, 43], [107, 130, 174], [227, 183, 209], [192, 255, 215]],
        [164.628, 160.556, 159.667],
    ),
    Lab2=([[22, 30, 0], [34, 62, 101], [132, 93, 117], [83, 156, 109]], [82.557, 80.954, 81.237]),
)
SPACES = dict(YUV=0, HSV=2, HLS=3, Lab=4)  # where `brightness` draws them


@pytest.mark.parametrize('name', AUGMENTED)
def test_numbers_of_imgaug(name):
    image = picture(24, 32, 7)
    pixels, mean = AUGMENTED[name]
    draw = dict(
        gamma=(gamma, np.array([0.5, 1.3, 2.0])),
        blur=(sharpness, 0.3),
        sharp=(sharpness, 1.8),
        solarize=(solarize, 0.1, 77.6),
        one=(posterize, 1),
        three=(posterize, 3),
        eight=(posterize, 8),
        invert=(invert,),
        auto13=(autocontrast, 13),
        equalize=(equalize,),
        tilt=(tilt, -30.0),
        hue=(hue_saturation, [40, -30]),
        hue2=(hue_saturation, [-50, 50]),
    )
    draw |= {k: (brightness, i, 1.15, 20, 0.3) for k, i in SPACES.items()} | {
        k + '2': (brightness, i, 0.85, -25, 0.7) for k, i in SPACES.items()
    }
    f, *values = draw[name]
    out = f(image, Scripted(*values))
    most, average = dict(tilt=(2, 0.5), hue=(6, 1.5), hue2=(6, 1.5)).get(
        name, (4, 1.2) if f is brightness else (0, 0.001)
    )
    assert levels(out[[4, 11, 15, 20], [6, 12, 21, 17]], np.array(pixels)).max() <= most
    assert abs(out.mean((0, 1)) - mean).max() < average


RANGES = {
    gamma: [('uniform', 0.5, 2, 3)],
    sharpness: [('uniform', 0, 2)],
    solarize: [('random',), ('uniform', 32, 128)],
    posterize: [('integers', 1, 9)],
    invert: [],
    autocontrast: [('integers', 0, 21)],
    equalize: [],
    tilt: [('uniform', -45, 45)],
    hue_saturation: [('integers', -50, 51, 2)],
    brightness: [('integers', 6), ('uniform', 0.8, 1.2), ('integers', -30, 31), ('random',)],
    lambda image, rng: draw_mask((32, 32), rng, False): [
        ('integers', 0, 6, 2),
        ('random', None),
        ('uniform', -90, 90),
    ],
}


def test_ranges_are_those_of_draem_and_imgaug():
    for f, want in RANGES.items():
        spy = Spy()
        f(picture(8, 8, 0), spy)
        assert [
            a if w != ('random', None) else ('random', None) for a, w in zip(spy.requests, want)
        ] == want and len(spy.requests) == len(want), f


def test_augmenters_off_positions():
    image, dark = picture(24, 32, 7), np.zeros((8, 8, 3), 'u1')
    for f, values in (
        (gamma, [np.ones(3)]),
        (sharpness, [1.0]),
        (solarize, [0.9, 50.0]),
        (posterize, [8]),
        (hue_saturation, [[0, 0]]),
        (tilt, [0.0]),
        *((brightness, (i, 1.0, 0, 0.1)) for i in range(6)),
    ):
        assert levels(f(image, Scripted(*values)), image).max() <= (
            6 if f is hue_saturation else 0
        ), f  # Pillow's own 8-bit HSV
    assert np.array_equal(invert(invert(image, None), None), image)
    assert (
        levels(autocontrast(image, Scripted(0)), image).max() == 0
        and image.min() == 0
        and image.max() == 255
    )  # already stretched
    for space in SPACES:
        assert (
            brighten(dark, lambda t: t + 30, space)
            == brighten(dark, lambda t: t + 30, space)[0, 0, 0]
        ).all() and brighten(dark, lambda t: t + 30, space).min() >= 25  # black becomes grey


def test_brightness_by_hand():
    a = np.array([[[200, 100, 50]]], 'u1')
    assert brighten(a, lambda t: t / 2, 'HSV')[0, 0].tolist() == [100, 50, 25]
    assert brighten(a, lambda t: t + 10, 'YUV')[0, 0].tolist() == [210, 110, 60]
    assert brighten(a, lambda t: 0 * t + 62.5, 'HLS')[0, 0].tolist() == [
        100,
        50,
        25,
    ]  # L 125 -> 62.5: half the distance from grey
    assert (
        brighten(a, lambda t: 0 * t, 'Lab').max() < 90
        and brighten(np.full((1, 1, 3), 119, 'u1'), lambda t: 0 * t + 2.55 * 50, 'Lab')[
            0, 0
        ].tolist()
        == [119] * 3
    )  # L* of grey 119 is 50
    spaces = [Scripted(i, 1.0, 30, 0.1) for i in range(6)]
    seen = {brightness(a, s).tobytes() for s in spaces}
    assert len(seen) == 4
    assert not np.array_equal(
        brightness(a, Scripted(0, 1.2, 30, 0.1)), brightness(a, Scripted(0, 1.2, 30, 0.9))
    )  # the order counts
    with pytest.raises(ValueError, match="space='RGB'.*YUV.*Lab"):
        brighten(a, lambda t: t, 'RGB')


def test_order_of_hue():
    red = np.full((2, 2, 3), (250, 10, 10), 'u1')
    assert (
        hue_saturation(red, Scripted([43, 0]))[0, 0].argsort().tolist()[0] == 2
        and hue_saturation(red, Scripted([43, 0]))[0, 0, 1] > 200
    )  # 60 degrees: yellow
    assert hue_saturation(red, Scripted([-43, 0]))[0, 0, 2] > 200  # magenta
    grey = np.full((2, 2, 3), 90, 'u1')
    assert np.array_equal(hue_saturation(grey, Scripted([20, -10])), grey)


@pytest.mark.parametrize('f', AUGMENTERS, ids=lambda f: f.__name__)
def test_every_augmenter_changes_something_and_keeps_the_form(f):
    for image in (
        picture(33, 20, 1),
        np.repeat(picture(33, 20, 1)[..., :1], 3, -1),
        np.full((5, 3, 3), 77, 'u1'),
        np.zeros((1, 1, 3), 'u1'),
    ):
        before = image.copy()
        out = [f(image, seeded_rng(0, f.__name__, i)) for i in range(12)]
        assert all(o.shape == image.shape and o.dtype == np.uint8 for o in out) and np.array_equal(
            image, before
        )
        assert all(
            np.array_equal(o, f(image, seeded_rng(0, f.__name__, i))) for i, o in enumerate(out)
        )
        if image.shape[0] == 33:
            assert sum((o != image).any() for o in out) >= 2
    assert len(AUGMENTERS) == 10 and f.__doc__


def test_three_different_augmenters_in_drawn_order(monkeypatch):
    calls = []
    monkeypatch.setattr(
        augmentation,
        'AUGMENTERS',
        tuple((lambda image, rng, k=k: calls.append(k) or image) for k in range(10)),
    )
    seen = []
    for i in range(300):
        calls.clear()
        augment(None, seeded_rng(0, i))
        seen.append(tuple(calls))
    assert (
        all(len(set(s)) == 3 for s in seen)
        and len(set(seen)) > 200
        and all(60 < sum(k in s for s in seen) < 125 for k in range(10))
    )
    calls.clear()
    augment(None, seeded_rng(0), 10)
    assert sorted(calls) == list(range(10))
    a = picture(4, 4, 0)
    assert augment(a, seeded_rng(0), 0) is a
    for n in (-1, 11):
        with pytest.raises(ValueError, match=rf'n={n}.*0.*10.*3'):
            augment(a, seeded_rng(0), n)


# --- textures


def test_drawn_textures():
    a = [draw_texture(64, seeded_rng(0, 'texture', i)) for i in range(24)]
    assert (
        all(t.shape == (64, 64, 3) and t.dtype == np.uint8 for t in a)
        and len({t.tobytes() for t in a}) == 24
    )
    assert np.array_equal(a[3], draw_texture((64, 64), seeded_rng(0, 'texture', 3)))
    for size in ((37, 91), (91, 37), (1, 5)):
        assert draw_texture(size, seeded_rng(0)).shape == (*size, 3)
    for kind in FIELDS:
        t = [draw_texture(80, seeded_rng(i, kind), (kind,)) for i in range(3)]
        assert max(s.std((0, 1)).max() for s in t) > 8 and len({s.tobytes() for s in t}) == 3, kind
    with pytest.raises(ValueError, match="kind='denim'.*clouds.*bubbles"):
        draw_texture(16, seeded_rng(0), ('denim',))


def test_nearest_of_scattered_points():
    rng = seeded_rng(0, 'points')
    Y, X = np.mgrid[:24, :24].astype('f4') / 6 + 1
    a, b, shade = near(X, Y, seeded_rng(0, 'points'))
    table = rng.random((3, 64, 64), dtype='f4')
    points = np.array(
        [
            (i + table[0, i, j], j + table[1, i, j], table[2, i, j])
            for i in range(8)
            for j in range(8)
        ]
    )
    d = np.hypot(Y[..., None] - points[:, 0], X[..., None] - points[:, 1])
    order = d.argsort(-1)
    assert np.allclose(a, np.take_along_axis(d, order, -1)[..., 0], atol=1e-5) and np.allclose(
        shade, points[order[..., 0], 2]
    )
    assert (
        np.isclose(b, np.take_along_axis(d, order, -1)[..., 1], atol=1e-5).mean() > 0.97
        and (b >= a).all()
    )  # the second nearest may lie two cells away


# --- into the image


def test_the_blend_is_the_equation():
    rng = np.random.default_rng(3)
    image, A, m = (
        rng.integers(0, 256, (9, 7, 3)).astype('u1'),
        rng.integers(0, 256, (9, 7, 3)).astype('u1'),
        rng.random((9, 7)) < 0.4,
    )
    for beta in (0, 0.3, 0.8, 1):
        want = (
            image * (1.0 - m[..., None])
            + (1 - beta) * A * m[..., None]
            + beta * image * m[..., None]
        )
        out = blend(image, A, m, beta)
        assert (
            out.dtype == np.uint8
            and abs(out - want).max() <= 0.5 + 1e-9
            and np.array_equal(out[~m], image[~m])
        )
    assert (
        np.array_equal(blend(image, A, m, 1), image)
        and np.array_equal(blend(image, A, m, 0)[m], A[m])
        and np.array_equal(blend(image, A, m & False, 0), image)
    )
    for beta in (-0.1, 1.2):
        with pytest.raises(ValueError, match=rf'beta={beta}.*0.*1'):
            blend(image, A, m, beta)


BLENDED = {
    0.0: (
        [123.154296875, 124.083000183, 120.900398254],
        [[96, 29, 24], [122, 40, 63], [22, 177, 107]],
    ),
    0.25: (
        [123.113998413, 124.068397522, 120.914596558],
        [[92.25, 27.75, 31], [122, 36, 62.75], [21.75, 177, 104]],
    ),
    0.75: (
        [123.033401489, 124.03910065, 120.942901611],
        [[84.75, 25.25, 45], [122, 28, 62.25], [21.25, 177, 98]],
    ),
}
# 32 x 32 bits, all further rows empty but for pixel (25, 1)
MASK = '001ff000001ff000000ff0000007f0000003f0000000f000'


def test_numbers_of_the_public_loader():
    "One image, texture, lattice, angle and beta through DRAEM's augment_image, no augmenter."
    image, texture, angles, *_ = drawn()
    for beta, (mean, values) in BLENDED.items():
        out, mask = synthesize(
            image, texture, Scripted((2, 1), angles / (2 * np.pi), -30.0, beta), n=0
        )
        want = np.unpackbits(np.frombuffer(bytes.fromhex(MASK), 'u1')).astype(bool)
        want = np.pad(want, (0, 1024 - len(want))).reshape(32, 32)
        want[25, 1] = True
        assert np.array_equal(mask, want)
        assert (
            abs(out[[0, 2, 25], [11, 16, 1]] - np.array(values)).max() <= 1.01
            and abs(out.mean((0, 1)) - mean).max() < 0.05
        )


@pytest.mark.parametrize('shape', [(240, 240), (518, 518), (37, 51), (64, 31), (8, 8)])
def test_any_size_and_grey(shape):
    image = np.repeat(picture(*shape, 2)[..., :1], 3, -1)
    texture = draw_texture((20, 33), seeded_rng(0, 'texture'))
    before = image.copy(), texture.copy()
    out, mask = synthesize(image, texture, seeded_rng(0, 'synth', shape))
    assert (
        out.shape == image.shape
        and out.dtype == np.uint8
        and mask.shape == shape
        and mask.dtype == bool
        and mask.any()
    )
    assert (
        np.array_equal(out[~mask], image[~mask])
        and np.array_equal(image, before[0])
        and np.array_equal(texture, before[1])
    )
    repeated = synthesize(image, texture, seeded_rng(0, 'synth', shape))
    assert np.array_equal(out, repeated[0]) and np.array_equal(mask, repeated[1])
    assert not np.array_equal(mask, synthesize(image, texture, seeded_rng(1, 'synth', shape))[1])


def test_off_positions_and_beta():
    image, texture = picture(60, 60, 4), picture(60, 60, 5)
    same, mask = synthesize(image, texture, seeded_rng(0, 's'), beta=1)
    assert np.array_equal(same, image) and mask.any()
    bare, m = synthesize(image, texture, seeded_rng(0, 's'), beta=0, n=0)
    assert np.array_equal(bare[m], texture[m]) and np.array_equal(bare[~m], image[~m])
    assert not np.array_equal(
        synthesize(image, texture, seeded_rng(0, 's'), beta=0)[0], bare
    )  # three augmenters change it
    white, black = np.full((32, 32, 3), 255, 'u1'), np.zeros((32, 32, 3), 'u1')
    shares = np.array(
        [
            out[mask].mean() / 255
            for out, mask in (
                synthesize(white, black, seeded_rng(0, 'beta', i), n=0) for i in range(150)
            )
        ]
    )
    assert (
        shares.min() >= 0
        and shares.max() <= 0.803
        and abs(shares.mean() - 0.4) < 0.06
        and abs(shares.std() - 0.8 / 12**0.5) < 0.04
    )  # U(0, 0.8)
    free = [
        synthesize(image[:24, :24], texture, seeded_rng(0, 'free', i), force=False)[1].any()
        for i in range(60)
    ]
    assert not all(free) and any(free)


@pytest.mark.parametrize(
    'bad',
    [
        np.zeros((8, 8), 'u1'),
        np.zeros((8, 8, 3), 'f4'),
        np.zeros((8, 8, 4), 'u1'),
        np.zeros((2, 8, 8, 3), 'u1'),
    ],
)
def test_what_is_no_rgb_image_is_refused(bad):
    good = picture(16, 16, 0)
    for name, pair in (('image', (bad, good)), ('texture', (good, bad))):
        with pytest.raises(ValueError, match=rf'{name}: need uint8 RGB \[H,W,3\].*load_image'):
            synthesize(*pair, seeded_rng(0))


# --- patches


@pytest.mark.parametrize(
    'shape,grid',
    [
        ((240, 240), (15, 15)),
        ((37, 50), (5, 7)),
        ((7, 9), (7, 9)),
        ((10, 10), (4, 3)),
        ((5, 6), (8, 9)),
    ],
)
def test_share_of_each_patch_written_out(shape, grid):
    rng = np.random.default_rng(0)
    m = rng.random((2, *shape)) < 0.5
    big = (
        m.repeat(grid[0], 1)
        .repeat(grid[1], 2)
        .reshape(2, grid[0], shape[0], grid[1], shape[1])
        .mean((2, 4))
        .reshape(2, -1)
    )  # each pixel cut into grid pieces
    for area in (0, 0.25, 0.5):
        got = patch_mask(m, grid, area)
        assert got.dtype == torch.bool and got.shape == (2, grid[0] * grid[1])
        want = np.where(
            (big > area).any(1, keepdims=True), big > area, big == big.max(1, keepdims=True)
        )
        assert np.array_equal(got.numpy(), want)
    assert torch.equal(patch_mask(m[1], grid), patch_mask(m, grid)[1]) and torch.equal(
        patch_mask(torch.as_tensor(m), grid), patch_mask(m, grid)
    )


def test_exactly_half_is_not_more_than_half():
    for side, grid in ((28, 2), (518, 37), (21, 3)):
        k = side // grid
        m = np.zeros((side, side), bool)
        m[:k, :k] = np.arange(k * k).reshape(k, k) < k * k / 2
        m[k : 2 * k, k : 2 * k] = np.arange(k * k).reshape(k, k) <= k * k / 2
        want = torch.zeros(grid * grid, dtype=torch.bool)
        want[grid + 1] = True
        if k % 2:
            want[0] = True  # an odd number of pixels has no half
        assert torch.equal(patch_mask(m, grid), want)


def test_the_largest_share_when_none_is_above():
    m = np.zeros((3, 40, 40), bool)
    m[0, 12, 14] = True
    m[1, 0, :3] = m[1, 25, 30:33] = True
    got = patch_mask(m, (4, 4))
    assert (
        got[0].nonzero().flatten().tolist() == [5]
        and got[1].nonzero().flatten().tolist() == [0, 11]
        and not got[2].any()
    )
    assert patch_mask(m[0], 1).tolist() == [True] and patch_mask(~m[2], 4).all()
    for area in (-0.1, 1, 1.5):
        with pytest.raises(ValueError, match=rf'area={area}.*0.*below 1'):
            patch_mask(m, 4, area)

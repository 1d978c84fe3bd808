"Layouts agree, every kind of file is read or named, and one bad file never costs the others."

import csv
import io
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsad.core.hashing import digest
from zsad.datasets.images import load_image
from zsad.datasets.layouts import layout_of, read_folder
from zsad.datasets.loading import load_dataset
from zsad.datasets.masks import load_mask, read_mask
from zsad.datasets.meta import read_meta, write_meta
from zsad.datasets.samples import Dataset, Sample
from zsad.datasets.sources import SOURCES, check_dataset, find_sets
from zsad.datasets.survey import scan_dataset, vanishing
from zsad.evaluation.measure import evaluate
from zsad.evaluation.protocol import Protocol
from zsad.evaluation.resizing import MASK_RULES, resize_mask
from zsad.rendered.procad import render_procad


@pytest.fixture(scope='module')
def rendered(tmp_path_factory):
    return render_procad(
        ('pill', 'wood'),
        good=2,
        bad=2,
        train=1,
        size=128,
        root=tmp_path_factory.mktemp('data') / 'set',
        workers=1,
    )


@pytest.fixture
def mvtec(rendered, tmp_path):
    return Path(shutil.copytree(rendered, tmp_path / 'mvtec'))


def arrange_visa(ds, root):
    "Write samples the way VisA is published; gives {id there: sample here}."
    rows, originals, at = [], {}, {}
    for s in ds.samples:
        kind = ('Normal', 'Anomaly')[s.label]
        n = at[s.category, kind] = at.get((s.category, kind), -1) + 1
        image, mask = (
            f'{s.category}/Data/Images/{kind}/{n:03}.JPG',
            f'{s.category}/Data/Masks/{kind}/{n:03}.png' if s.label else '',
        )
        for f in (image, mask):
            (root / f).parent.mkdir(parents=True, exist_ok=True)
        Image.open(s.path).convert('RGB').save(root / image, quality=97, subsampling=0)
        if mask:
            Image.fromarray(read_mask(s.mask) * np.uint8(n + 1)).save(
                root / mask
            )  # the number of the defect's class
        rows.append((s.category, 'test', ('normal', 'anomaly')[s.label], image, mask))
        originals[f'{s.category}/{kind}/{n:03}'] = s
    rows += [
        (c, 'train', 'normal', f'{c}/Data/Images/Normal/900.JPG', '') for c in ds.categories
    ]  # never looked for: only test rows count
    write_table(root, [('object', 'split', 'label', 'image', 'mask'), *rows])
    return originals


def write_table(root, rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    (root / 'split_csv').mkdir(parents=True, exist_ok=True)
    (root / 'split_csv' / '1cls.csv').write_text(text.getvalue())


def read_table(root):
    return list(csv.reader((root / 'split_csv' / '1cls.csv').open(newline='')))


@pytest.fixture
def visa(rendered, tmp_path):
    arrange_visa(read_folder(rendered), tmp_path / 'visa')
    return tmp_path / 'visa'


IDS = {f'{c}/good/00{i}' for c in ('pill', 'wood') for i in (0, 1)}


# ---- reading pixels

RAMP = np.arange(24, dtype='u1').reshape(4, 6) * 10
GREY = np.repeat(RAMP[..., None], 3, -1)
COLOUR = np.stack([RAMP, 255 - RAMP, RAMP[::-1]], -1)


def palette():
    im = Image.fromarray(RAMP).convert('P')
    im.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    return im


PALETTE = np.stack([RAMP, 255 - RAMP, 7 + 0 * RAMP], -1)
HALF = np.dstack([COLOUR, np.where(RAMP > 100, 255, 0).astype('u1')])
BIG = RAMP.astype('u2') * 257
BIG[0, 0], BIG[0, 1] = 128, 10 * 257 - 128  # half a step down is 0, half a step up is 10
MODES = {
    '1': (
        Image.fromarray(RAMP > 100),
        'png',
        {},
        np.repeat((RAMP > 100)[..., None] * np.uint8(255), 3, -1),
    ),
    'L': (Image.fromarray(RAMP), 'png', {}, GREY),
    'L, 50 transparent': (Image.fromarray(RAMP), 'png', dict(transparency=50), GREY * (GREY != 50)),
    'LA': (
        Image.merge('LA', [Image.fromarray(RAMP), Image.fromarray(HALF[..., 3])]),
        'png',
        {},
        GREY * (GREY > 100),
    ),
    'P': (palette(), 'png', {}, PALETTE),
    'P, 50 transparent': (palette(), 'png', dict(transparency=50), PALETTE * (GREY != 50)),
    'P, table of transparency': (
        palette(),
        'png',
        dict(transparency=bytes([255] * 50 + [0] + [255] * 205)),
        PALETTE * (GREY != 50),
    ),
    'RGB': (Image.fromarray(COLOUR), 'png', {}, COLOUR),
    'RGBA': (Image.fromarray(HALF), 'png', {}, COLOUR * (GREY > 100)),
    'CMYK': (
        Image.merge(
            'CMYK', [Image.fromarray(b) for b in (*np.moveaxis(255 - COLOUR, -1, 0), 0 * RAMP)]
        ),
        'tif',
        {},
        COLOUR,
    ),
    'I;16': (Image.fromarray(BIG), 'png', {}, GREY),
    'I;16B': (Image.frombytes('I;16B', (6, 4), BIG.astype('>u2').tobytes()), 'tif', {}, GREY),
    'I': (Image.fromarray(BIG.astype('i4')), 'tif', {}, GREY),
}


@pytest.mark.parametrize('mode', MODES)
def test_every_mode_of_image(mode, tmp_path):
    im, kind, how, want = MODES[mode]
    im.save(tmp_path / f'a.{kind}', **how)
    with Image.open(tmp_path / f'a.{kind}') as again:
        assert again.mode == mode.split(',')[0]
    got = load_image(tmp_path / f'a.{kind}')
    assert got.dtype == np.uint8 and got.flags.c_contiguous and np.array_equal(got, want)


def test_first_frame(tmp_path):
    frames = [Image.fromarray(v) for v in (COLOUR, 255 - COLOUR)]
    for name in ('a.png', 'a.tif'):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with Image.open(tmp_path / name) as im:
            assert im.n_frames == 2
        assert np.array_equal(load_image(tmp_path / name), COLOUR)


STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, -1),
    9: lambda a: a,
}


@pytest.mark.parametrize('orientation', STORED)
@pytest.mark.parametrize('kind', ['png', 'jpg', 'webp', 'tif'])
def test_pictures_and_masks_are_turned_as_exif_says(orientation, kind, tmp_path):
    "What is stored turned comes back as it is shown; 9 is no orientation."
    exif = Image.Exif()
    exif[0x112] = orientation
    how = dict(png={}, jpg=dict(quality=100, subsampling=0), webp=dict(lossless=True), tif={})[kind]
    Image.fromarray(np.ascontiguousarray(STORED[orientation](COLOUR))).save(
        tmp_path / f'a.{kind}', exif=exif, **how
    )
    got = load_image(tmp_path / f'a.{kind}')
    assert got.shape == COLOUR.shape and abs(got.astype(int) - COLOUR).max() <= (
        12 if kind == 'jpg' else 0
    )
    spot = np.zeros((16, 24), 'u1')
    spot[2:5, 3:10] = 255
    Image.fromarray(np.ascontiguousarray(STORED[orientation](spot))).save(
        tmp_path / f'm.{kind}', exif=exif, **how
    )
    assert np.array_equal(read_mask(tmp_path / f'm.{kind}'), spot > 0)


def test_damaged_exif_is_no_reason_to_refuse_a_picture(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / 'a.png', exif=b'Exif\x00\x00MM\x00*\xff\xff')
    assert np.array_equal(load_image(tmp_path / 'a.png'), COLOUR)


SPOT = np.zeros((8, 8), 'u1')
SPOT[2:4, 2:5] = 1


def flat_palette(a):
    im = Image.fromarray(a).convert('P')
    im.putpalette([0] * 768)
    return im


MASKS = {
    '1': Image.fromarray(SPOT > 0),
    'L, 255': Image.fromarray(SPOT * 255),
    'L, class 3': Image.fromarray(SPOT * 3),
    'I;16, class 1': Image.fromarray(SPOT.astype('u2')),
    'I;16, full': Image.fromarray(SPOT.astype('u2') * 65535),
    'P, black colours': flat_palette(SPOT * 2),
    'RGB, blue': Image.fromarray(np.stack([0 * SPOT, 0 * SPOT, SPOT], -1)),
    'RGBA, red and opaque': Image.fromarray(
        np.dstack([SPOT * 200, 0 * SPOT, 0 * SPOT, 255 + 0 * SPOT])
    ),
    'RGBA, red and see-through': Image.fromarray(
        np.dstack([SPOT * 200, 0 * SPOT, 0 * SPOT, 0 * SPOT])
    ),
    'RGBA, alpha alone': Image.fromarray(np.dstack([255 + 0 * SPOT] * 3 + [SPOT * 90])),
    'LA': Image.merge('LA', [Image.fromarray(SPOT * 9), Image.new('L', (8, 8), 255)]),
    'RGBA, red on a veil': Image.fromarray(
        np.dstack([SPOT * 200, 0 * SPOT, 0 * SPOT, SPOT.T * 90])
    ),
    'LA, alpha alone': Image.merge('LA', [Image.new('L', (8, 8), 0), Image.fromarray(SPOT * 9)]),
}


@pytest.mark.parametrize('kind', MASKS)
def test_masks_are_read_by_value(kind, tmp_path):
    MASKS[kind].save(tmp_path / 'm.png')
    with Image.open(tmp_path / 'm.png') as im:
        assert im.mode == kind.split(',')[0]
    assert np.array_equal(read_mask(tmp_path / 'm.png'), SPOT > 0)
    assert np.array_equal(load_mask(tmp_path / 'm.png', 8), SPOT > 0)


def test_masks_that_mark_nothing_and_inks(tmp_path):
    Image.new('RGBA', (8, 8), (0, 0, 0, 255)).save(tmp_path / 'm.png')
    assert not read_mask(tmp_path / 'm.png').any()
    Image.fromarray(np.dstack([SPOT * 0 + 255] * 3)).convert('CMYK').save(tmp_path / 'white.tif')
    assert read_mask(tmp_path / 'white.tif').all()  # no ink at all


def test_masks_are_resized_as_the_public_codes_do(rendered):
    "0/255 masks are binarised and resized as Pillow does; `any` keeps what a pixel touches."
    bad = [s for s in read_folder(rendered).samples if s.label]
    assert len(bad) == 4
    for s in bad:
        im = Image.open(s.mask)
        m = np.asarray(im)
        assert set(np.unique(m)) == {0, 255}
        for rule, how in (('bilinear>0.5', 'BILINEAR'), ('nearest', 'NEAREST')):
            assert np.array_equal(
                load_mask(s.mask, 40, rule),
                np.asarray(im.resize((40, 40), Image.Resampling[how])) > 127,
            )
        assert np.array_equal(load_mask(s.mask, 32, 'any'), m.reshape(32, 4, 32, 4).any((1, 3)))
    assert load_mask(s.mask, 40).sum() < load_mask(s.mask, 40, 'any').sum()


@pytest.mark.parametrize('rule', MASK_RULES)
def test_one_rule_has_one_answer(rule, tmp_path):
    "A disk, 480 -> 240, whose edges fall on one half: reading, resizing and a protocol agree."
    y, x = np.mgrid[:480, :480]
    disk = (y - 239.5) ** 2 + (x - 239.5) ** 2 < 110**2
    disk[:120, 41:60] = True
    Image.fromarray(disk.astype('u1') * 255).save(tmp_path / 'm.png')
    small = load_mask(tmp_path / 'm.png', 240, rule)
    assert np.array_equal(small, resize_mask(disk[None], 240, rule)[0])
    from zsad.bench.measuring import read_truth

    assert np.array_equal(
        read_truth([Sample(tmp_path / 'a.png', 1, 'a', 'a', tmp_path / 'm.png')], 240, rule).masks[
            0
        ],
        small,
    )
    both, maps = np.stack([disk, 0 * disk]), np.stack([small, 0 * small]).astype('f4')
    assert (
        evaluate(
            maps, both, None, None, Protocol(size=240, mask_rule=rule, metrics=('pixel_auroc',))
        )['pixel_auroc']
        == 1
    )


@pytest.mark.parametrize('rule', MASK_RULES)
def test_a_defect_smaller_than_a_pixel_stays_anomalous(rule, mvtec):
    "A mask that marks something never becomes empty; data check counts masks that would."
    ds = read_folder(mvtec)
    s = next(s for s in ds.samples if s.label)
    m = np.zeros((1280, 1280), 'u1')
    m[643, 643] = 255
    Image.fromarray(m).save(s.mask)
    small = load_mask(s.mask, 128, rule)
    assert small.sum() == 1 and small[64, 64]
    assert vanishing(ds, 128, 1) == [s.id] and vanishing(ds, 1280, 1) == []


SOFT = np.zeros((120, 120), 'u1')
SOFT[30:60, 40:80] = 255
SOFT[80:100, 20:40] = 255


def stored_as(kind, **how):
    f = io.BytesIO()
    Image.fromarray(SOFT).save(f, kind, **how)
    return np.asarray(Image.open(f).convert('L'))


def smoothed(a):
    from scipy import ndimage

    return ndimage.gaussian_filter(a.astype(float), 2).round().astype('u1')


EDGES = {
    'JPEG': lambda: stored_as('jpeg', quality=60),
    'WebP': lambda: stored_as('webp', quality=40),
    'smoothed': lambda: smoothed(SOFT),
    'faint': lambda: smoothed(SOFT) // 3,
    'enlarged': lambda: np.asarray(
        Image.fromarray(SOFT)
        .resize((60, 60), Image.Resampling.BOX)
        .resize((120, 120), Image.Resampling.LANCZOS)
    ),
    '16 bits': lambda: smoothed(SOFT).astype('u2') * 257,
}


@pytest.mark.parametrize('kind', EDGES)
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_soft_edges_are_divided_in_the_middle(kind, mode, tmp_path):
    a = EDGES[kind]()
    assert (a > 0).sum() > 1.1 * (SOFT > 0).sum()  # above 0 would be far too much
    if mode == 'RGB' and a.dtype == np.uint16:
        pytest.skip('no such picture')
    Image.fromarray(a if mode == 'L' else np.repeat(a[..., None], 3, -1)).save(tmp_path / 'm.png')
    m, want = read_mask(tmp_path / 'm.png'), SOFT > 0
    assert 2 * (m & want).sum() / (m.sum() + want.sum()) > 0.98


def tiles(values):
    "Regions of 6x6 pixels, one value each, two pixels apart."
    a = np.zeros((160, 160), 'u2')
    places = [(y, x) for y in range(1, 153, 8) for x in range(1, 153, 8)]
    for (y, x), v in zip(places, values):
        a[y : y + 6, x : x + 6] = v
    return a


HARD = {
    'class numbers': np.arange(1, 21),
    'saturations of LOCO': np.arange(236, 256),
    'instances': np.arange(1, 256),
    'steps': (50, 100, 150, 200, 255),
    'one in 16 bits': (1, 65535),
}


@pytest.mark.parametrize('kind', HARD)
def test_few_values_in_a_region_stay_as_they_are(kind, tmp_path):
    a = tiles(HARD[kind])
    a = a if a.max() > 255 else a.astype('u1')
    if kind == 'steps':
        a[60:90, :] = np.repeat(np.array(HARD[kind], 'u1'), 32)[None]  # and side by side
    Image.fromarray(a).save(tmp_path / 'm.png')
    assert np.array_equal(read_mask(tmp_path / 'm.png'), a > 0)


def test_an_inverted_mask_is_named(mvtec):
    ds = read_folder(mvtec)
    s = next(s for s in ds.samples if s.label)
    Image.fromarray(~read_mask(s.mask)).save(s.mask)
    ((f, why),) = scan_dataset(read_folder(mvtec), 1).dataset.skipped
    assert f == s.mask and 'inverted' in why and '%' in why
    Image.new('L', (128, 128), 255).save(
        s.mask
    )  # everything marked: an image without anything normal
    assert scan_dataset(read_folder(mvtec), 1).dataset.skipped == ()


def test_a_folder_of_inverted_masks_tells_no_labels(tmp_path):
    (tmp_path / 'a' / 'masks').mkdir(parents=True)
    y, x = np.mgrid[:64, :64]
    for i in range(4):
        Image.new('RGB', (64, 64)).save(tmp_path / 'a' / f'{i}.png')
        marks = (y - 30) ** 2 + (x - 30) ** 2 < (8 * i) ** 2 / 9  # image 0 shows nothing
        Image.fromarray(~marks).save(tmp_path / 'a' / 'masks' / f'{i}.png')
    with pytest.raises(ValueError, match='inverted'):
        read_folder(tmp_path / 'a')
    for f in (tmp_path / 'a' / 'masks').iterdir():
        Image.fromarray(~np.asarray(Image.open(f))).save(f)
    assert [s.label for s in read_folder(tmp_path / 'a').samples] == [1, 1, 1, 0]


def test_a_jpeg_mask_is_halved(tmp_path):
    m = np.kron(SPOT, np.ones((5, 5), 'u1')) * 255
    Image.fromarray(m).save(tmp_path / 'm.jpg', quality=60)
    assert (np.asarray(Image.open(tmp_path / 'm.jpg'))[m == 0] > 0).any()  # it wavers
    assert np.array_equal(read_mask(tmp_path / 'm.jpg'), m > 0)


# ---- layouts


def test_visa_as_published_is_the_same_set(rendered, tmp_path):
    ours = read_folder(rendered)
    originals = arrange_visa(ours, tmp_path / 'visa')
    ds = load_dataset('visa', tmp_path / 'visa')
    assert layout_of(tmp_path / 'visa') == 'visa' and layout_of(rendered) == 'mvtec'
    assert (
        ds.skipped == ()
        and ds.categories == ('pill', 'wood')
        and set(originals) == {s.id for s in ds.samples}
        and len(ds.samples) == len(ours.samples) == 8
    )
    classes = set()
    for s in ds.samples:
        t = originals[s.id]
        assert (s.label, s.category) == (t.label, t.category) and (s.mask is None) == (
            t.mask is None
        ) == (s.label == 0)
        assert np.array_equal(load_mask(s.mask, 64), load_mask(t.mask, 64))
        assert (
            abs(load_image(s.path).astype(int) - load_image(t.path)).mean()
            < 3
            < abs(load_image(s.path).astype(int) - 255 + load_image(t.path)).mean()
        )
        if s.mask:
            classes |= set(np.unique(np.asarray(Image.open(s.mask))))
    assert classes == {0, 1, 2}
    assert scan_dataset(ds, 1).dataset == ds


def test_meta_round_trip(rendered, mvtec, tmp_path):
    bare, here = (
        list(read_folder(rendered).samples),
        lambda root, p: p and root / p.relative_to(mvtec),
    )

    def read(ds, root):
        return [
            Sample(
                here(root, s.path),
                s.label,
                s.category,
                s.id,
                here(root, s.mask),
                here(root, s.foreground),
                s.defect,
            )
            for s in ds.samples
        ]

    write_meta(read_folder(mvtec), mvtec / 'meta.json')
    content = json.loads((mvtec / 'meta.json').read_text())
    assert layout_of(mvtec) == 'meta' and not any(
        r['img_path'].startswith('/') for rows in content['test'].values() for r in rows
    )
    assert read(read_folder(mvtec), rendered) == bare
    (mvtec / 'meta.json').write_text(json.dumps({'Train': {}, 'Test': content['test']}))
    assert read(read_folder(mvtec), rendered) == bare
    elsewhere = write_meta(read_folder(rendered), tmp_path / 'other' / 'meta.json')
    assert all(
        Path(r['img_path']).is_absolute()
        for rows in json.loads(elsewhere.read_text())['test'].values()
        for r in rows
    )
    assert list(read_meta(elsewhere).samples) == bare
    for rows in content['test'].values():
        for r in rows:
            r.update(mask_path=str(Path(r['img_path']).parent), specie_name='')
    (mvtec / 'meta.json').write_text(json.dumps(content))
    ds = read_folder(mvtec)
    assert [(s.id, s.label, s.mask) for s in ds.samples] == [
        (s.id, s.label, None) for s in bare
    ] and ds.skipped == ()


def test_names_that_meta_repeats_stay_apart(mvtec):
    rows = [
        dict(
            img_path=f'pill/test/good/00{i}.png',
            mask_path='',
            cls_name='pill',
            specie_name='x',
            anomaly=0,
        )
        for i in (0, 1)
    ]
    (mvtec / 'pill/test/other').mkdir()
    shutil.copy(mvtec / 'pill/test/good/001.png', mvtec / 'pill/test/other/000.png')
    rows.append({**rows[0], 'img_path': 'pill/test/other/000.png'})
    (mvtec / 'meta.json').write_text(json.dumps(dict(test=dict(pill=rows))))
    assert [s.id for s in read_folder(mvtec).samples] == [
        'pill/pill/test/good/000',
        'pill/pill/test/other/000',
        'pill/x/001',
    ]


def test_a_category_and_plain_folders_are_the_same_set(mvtec, tmp_path):
    ours = read_folder(mvtec).of('pill')

    def facts(ds):
        return [
            (s.id, s.label, s.defect, digest(load_image(s.path)), digest(load_mask(s.mask, 64)))
            for s in ds
        ]

    assert layout_of(mvtec / 'pill') == 'category' and read_folder(mvtec / 'pill').samples == ours
    want, plain = facts(ours), tmp_path / 'plain' / 'pill'
    for k in (mvtec / 'pill' / 'test').iterdir():
        shutil.copytree(k, plain / k.name)
    shutil.copytree(mvtec / 'pill' / 'ground_truth', plain / 'masks')
    assert layout_of(plain) == 'plain' and facts(load_dataset('folder', plain).samples) == want
    flat = tmp_path / 'flat' / 'pill'
    (flat / 'masks').mkdir(parents=True)
    for n, t in enumerate(ours):  # one folder of masks, stems that tell the image
        (flat / t.defect).mkdir(exist_ok=True)
        shutil.copy(t.path, flat / t.defect / f'{n}.png')
        if t.mask:
            shutil.copy(t.mask, flat / 'masks' / f'{n}.png')
    ds = read_folder(flat)
    assert {f[1:] for f in facts(ds.samples)} == {f[1:] for f in want} and ds.skipped == ()
    for t in ds.samples:
        shutil.move(t.path, flat)  # images in one folder: the masks alone tell
    for k in {t.defect for t in ds.samples}:
        (flat / k).rmdir()
    ds = read_folder(flat)
    assert {f[3:] for f in facts(ds.samples)} == {f[3:] for f in want} and sorted(
        t.label for t in ds.samples
    ) == [0, 0, 1, 1]
    (flat / 'masks' / ds.samples[0].mask.name).write_text('not an image')
    again = read_folder(flat)
    assert again.samples == ds.samples[1:] and again.skipped[0][0] == ds.samples[0].path


def test_masks_of_one_name_for_two_kinds_are_not_guessed(mvtec, tmp_path):
    root = tmp_path / 'own'
    shutil.copytree(mvtec / 'pill' / 'test', root)
    (root / 'masks').mkdir()
    shutil.copy(
        next((mvtec / 'pill' / 'ground_truth').rglob('*.png')), root / 'masks' / '000.png'
    )  # both kinds hold a 000
    ds = read_folder(root)
    assert [s.label for s in ds.samples] == [0, 0] and sorted(f.name for f, _ in ds.skipped) == [
        '000.png',
        '000.png',
    ]


def test_ok_and_ko_with_masks_of_another_format(mvtec):
    for c in ('pill', 'wood'):
        (mvtec / c / 'test/good').rename(mvtec / c / 'test/ok')
        for f in (mvtec / c / 'ground_truth').rglob('*_mask.png'):
            Image.open(f).save(f.with_name(f.name.replace('_mask.png', '.BMP')))
            f.unlink()
    ds = read_folder(mvtec)
    assert ds.skipped == () and sorted(s.label for s in ds.samples) == [0] * 4 + [1] * 4
    assert all(s.mask.suffix == '.BMP' and read_mask(s.mask).any() for s in ds.samples if s.label)


def test_images_beside_the_folders_of_kinds_are_named(mvtec):
    root = mvtec / 'pill' / 'test'
    before = read_folder(root)
    shutil.copy(mvtec / f'{G}.png', root / '000.png')
    ds = read_folder(root)
    assert ds.samples == before.samples and [f for f, _ in ds.skipped] == [root / '000.png']


def test_sets_are_found_where_they_lie(mvtec, visa, tmp_path):
    assert find_sets(tmp_path) == dict(mvtec=mvtec, visa=visa) and find_sets(visa) == dict(
        visa=visa
    )
    shutil.copytree(mvtec / 'pill', tmp_path / 'mixed' / 'candle')
    shutil.copytree(mvtec / 'pill', tmp_path / 'mixed' / 'pill')
    assert find_sets(tmp_path / 'mixed') == dict(mvtec=tmp_path / 'mixed') and find_sets(
        tmp_path
    ) == dict(mvtec=mvtec, visa=visa)  # the one that bears the name
    shutil.rmtree(tmp_path / 'mixed')
    shutil.move(visa, tmp_path / 'hidden')
    (tmp_path / 'script' / '1cls').mkdir(parents=True)
    shutil.copytree(mvtec / 'pill', tmp_path / 'script/1cls/candle')
    with pytest.raises(ValueError) as e:
        find_sets(tmp_path)
    assert 'hidden' in str(e.value) and '1cls' in str(e.value)
    shutil.rmtree(tmp_path / 'hidden')
    assert find_sets(tmp_path) == dict(mvtec=mvtec, visa=tmp_path / 'script/1cls') and load_dataset(
        'visa', tmp_path / 'script'
    ).categories == ('candle',)


def test_a_complete_copy_is_told_from_another():
    counts = SOURCES['visa'].counts

    def make(c, n, y):
        return [Sample(Path('x'), y, c, f'{c}/{y}/{i}', Path('m') if y else None) for i in range(n)]

    def ds(counts):
        return Dataset(
            'visa',
            tuple(
                s for c, (good, bad) in counts.items() for s in make(c, good, 0) + make(c, bad, 1)
            ),
            {},
        )

    assert {r[4] for r in check_dataset('visa', ds(counts))} == {'complete'} and len(
        check_dataset('visa', ds(counts))
    ) == 12
    other = {**counts, 'pcb3': (100, 100), 'nut': (1, 1)}
    del other['candle']
    remarks = {r[0]: r[4] for r in check_dataset('visa', ds(other)) if r[4] != 'complete'}
    assert remarks == dict(candle='category missing', pcb3='expected 101 + 100', nut='extra')
    bare = Dataset(
        'visa', tuple(Sample(s.path, s.label, s.category, s.id) for s in ds(counts).samples), {}
    )
    assert {r[3:] for r in check_dataset('visa', bare)} == {(0, '100 without mask')}
    assert {r[4] for r in check_dataset('folder', ds(counts))} == {''}


# ---- bad input: the file is named, the rest goes on


def bomb(path):
    "A PNG that claims 400 million pixels."

    def chunk(kind, data):
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    path.write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', 20000, 20000, 8, 0, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(b'0'))
        + chunk(b'IEND', b'')
    )


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_jpeg(path):
    f = path.with_suffix('.jpg')
    Image.open(path).save(f, quality=95)
    path.unlink()
    f.write_bytes(f.read_bytes()[:-300])


def as_float(path):
    Image.fromarray(np.asarray(Image.open(path).convert('L')).astype('f4')).save(
        path.with_suffix('.tif')
    )
    path.unlink()


def to_folder(path):
    path.unlink()
    path.mkdir()


G = 'pill/test/good/000'  # a normal image; {bad} stands for pill's first kind of defect
SPOILED = {  # what is done to which file, the file that is named, a word of the reason
    'text named .png': (
        lambda f: f.write_text('not an image'),
        f'{G}.png',
        f'{G}.png',
        'Unidentified',
    ),
    '0 bytes': (lambda f: f.write_bytes(b''), f'{G}.png', f'{G}.png', 'Unidentified'),
    'no pixels': (lambda f: f.write_bytes(b'P6 0 4 255\n'), f'{G}.png', f'{G}.png', 'Unidentified'),
    'truncated PNG': (cut, f'{G}.png', f'{G}.png', 'truncated'),
    'truncated JPEG': (as_jpeg, f'{G}.png', f'{G}.jpg', 'truncated'),
    'float TIFF': (as_float, f'{G}.png', f'{G}.tif', '8 or 16 bits'),
    'decompression bomb': (bomb, f'{G}.png', f'{G}.png', 'DecompressionBomb'),
    'folder named x.png': (to_folder, f'{G}.png', f'{G}.png', 'IsADirectory'),
    'unreadable anomalous image': (
        cut,
        'pill/test/{bad}/000.png',
        'pill/test/{bad}/000.png',
        'truncated',
    ),
    'missing mask': (
        lambda f: f.unlink(),
        'pill/ground_truth/{bad}/000_mask.png',
        'pill/test/{bad}/000.png',
        'no mask',
    ),
    'masks of a kind missing': (
        lambda f: shutil.rmtree(f.parent),
        'pill/ground_truth/{bad}/000_mask.png',
        'pill/test/{bad}/000.png',
        'no mask',
    ),
    'unreadable mask': (
        lambda f: f.write_text('not an image'),
        'pill/ground_truth/{bad}/000_mask.png',
        'pill/ground_truth/{bad}/000_mask.png',
        'Unidentified',
    ),
    'empty mask': (
        lambda f: Image.new('L', (64, 64)).save(f),
        'pill/ground_truth/{bad}/000_mask.png',
        'pill/ground_truth/{bad}/000_mask.png',
        'marks nothing',
    ),
    'mask of another proportion': (
        lambda f: Image.new('L', (64, 60), 255).save(f),
        'pill/ground_truth/{bad}/000_mask.png',
        'pill/ground_truth/{bad}/000_mask.png',
        '64x60',
    ),
    'unreadable outline': (
        lambda f: f.write_bytes(b''),
        'pill/foreground/good/000_fg.png',
        'pill/foreground/good/000_fg.png',
        'Unidentified',
    ),
}


@pytest.mark.parametrize('what', SPOILED)
def test_a_spoiled_file_is_named_and_the_rest_goes_on(what, mvtec):
    spoil, file, named, why = SPOILED[what]
    before = scan_dataset(read_folder(mvtec), 1)
    assert before.dataset.skipped == () and IDS <= set(before.pixels) and len(before.pixels) == 8
    bad = min(p.name for p in (mvtec / 'pill' / 'test').iterdir() if p.name != 'good')
    spoil(mvtec / file.format(bad=bad))
    after = scan_dataset(load_dataset('mvtec', mvtec), 1)
    ((f, reason),) = after.dataset.skipped
    assert f == mvtec / named.format(bad=bad) and why in reason
    lost = 'pill/good/000' if '/good/' in file else f'pill/{bad}/000'
    assert {s.id for s in after.dataset.samples} == set(before.pixels) - {lost}
    assert (
        after.pixels == {k: v for k, v in before.pixels.items() if k != lost}
        and after.hash != before.hash
    )


def stray_files(root):
    for name in ('._000.png', '.DS_Store', 'Thumbs.db', '._x.JPG'):
        (root / 'pill/test/good' / name).write_bytes(b'junk')
    (root / '.DS_Store').write_bytes(b'junk')
    (root / '._pill').write_bytes(b'junk')


def stray_folders(root):
    for p in ('__MACOSX/test/good', 'pill/test/__MACOSX', '.ipynb_checkpoints/test/good'):
        (root / p).mkdir(parents=True)
        shutil.copy(root / f'{G}.png', root / p / '000.png')


@pytest.mark.parametrize('litter', [stray_files, stray_folders])
def test_what_archivers_leave_is_no_sample(litter, mvtec):
    before = read_folder(mvtec)
    litter(mvtec)
    assert scan_dataset(read_folder(mvtec), 1).dataset == before


def test_a_category_without_test_images_is_named(mvtec):
    before = read_folder(mvtec)
    (mvtec / 'bolt/test/good').mkdir(parents=True)
    (mvtec / 'nail/test').mkdir(parents=True)
    shutil.copy(mvtec / f'{G}.png', mvtec / 'nail/test/000.png')
    ds = read_folder(mvtec)
    assert [f for f, _ in ds.skipped] == [mvtec / 'bolt/test', mvtec / 'nail/test'] and (
        ds.samples,
        ds.kinds,
    ) == (before.samples, before.kinds)


def test_a_category_that_loses_everything_is_named(mvtec):
    ds = read_folder(mvtec)
    for f in (mvtec / 'pill/test').rglob('*.png'):
        f.write_bytes(b'')
    left = scan_dataset(ds, 1).dataset
    assert (
        left.categories == ('wood',)
        and left.kinds == dict(wood='texture')
        and left.samples == ds.of('wood')
    )
    assert len(left.skipped) == 5 and left.skipped[-1][0] == 'pill'
    for f in (mvtec / 'wood/test').rglob('*.png'):
        f.write_bytes(b'')
    with pytest.raises(ValueError, match='none of 8 samples can be used.*000.png'):
        scan_dataset(ds, 1)


def test_two_files_of_one_name_are_told_apart(mvtec):
    before = read_folder(mvtec)
    Image.open(mvtec / f'{G}.png').save(mvtec / f'{G}.tif')
    ds = read_folder(mvtec)
    assert (
        ds.samples == before.samples
        and [f for f, _ in ds.skipped] == [mvtec / f'{G}.tif']
        and 'pill/good/000' in ds.skipped[0][1]
    )


LISTED = {  # how the table's row of pill's first anomalous image changes, the file that is named
    'image does not exist': (
        lambda r: [*r[:3], r[3].replace('000', '777'), r[4]],
        'pill/Data/Images/Anomaly/777.JPG',
        'does not exist',
    ),
    'mask does not exist': (
        lambda r: [*r[:4], r[4].replace('000', '777')],
        'pill/Data/Images/Anomaly/000.JPG',
        'pill/Data/Masks/Anomaly/777.png',
    ),
    'mask is not told': (lambda r: [*r[:4], ''], 'pill/Data/Images/Anomaly/000.JPG', 'no mask'),
    'another word for the label': (
        lambda r: [*r[:2], 'scratched', *r[3:]],
        'split_csv/1cls.csv',
        'scratched',
    ),
    'a row cut short': (lambda r: r[:2], 'split_csv/1cls.csv', 'line'),
}


@pytest.mark.parametrize('what', LISTED)
def test_a_bad_row_is_named_and_the_rest_goes_on(what, visa):
    change, named, why = LISTED[what]
    before, rows = load_dataset('visa', visa), read_table(visa)
    (n,) = (i for i, r in enumerate(rows) if r[3] == 'pill/Data/Images/Anomaly/000.JPG')
    rows[n] = change(rows[n])
    write_table(visa, rows)
    ds = load_dataset('visa', visa)
    ((f, reason),) = ds.skipped
    assert f == visa / named and why in reason
    assert [s.id for s in ds.samples] == [
        s.id for s in before.samples if s.id != 'pill/Anomaly/000'
    ] and len(ds.samples) == 7


def test_a_table_saved_by_a_spreadsheet_is_read(visa):
    before, file = load_dataset('visa', visa), visa / 'split_csv' / '1cls.csv'
    file.write_bytes(b'\xef\xbb\xbf' + file.read_bytes().replace(b'\r\n', b'\n'))
    assert load_dataset('visa', visa) == before


def test_a_listed_file_of_meta_that_is_gone_is_named(mvtec):
    before = read_folder(mvtec)
    write_meta(before, mvtec / 'meta.json')
    (mvtec / f'{G}.png').unlink()
    ds = read_folder(mvtec)
    assert ds.skipped == ((mvtec / f'{G}.png', 'is listed but does not exist'),) and [
        s.id for s in ds.samples
    ] == [s.id for s in before.samples if s.id != 'pill/good/000']


NAN = float('nan')  # what pandas writes where nothing stands
ODD = {  # what one anomalous entry says instead, what its sample says
    'class is a number': (dict(cls_name=1), dict(category='1')),
    'kind is a number': (dict(specie_name=3), dict(defect='3')),
    'class is NaN': (dict(cls_name=NAN), dict(category='pill')),
    'no mask by NaN': (dict(mask_path=NAN), dict(mask=None)),
    'no mask by null': (dict(mask_path=None), dict(mask=None)),
    'no outline by NaN': (dict(outline_path=NAN), dict(foreground=None)),
    'no outline by null': (dict(outline_path=None), dict(foreground=None)),
}
WRONG = {
    'list of masks': (dict(mask_path=['a.png']), 'mask_path'),
    'image is NaN': (dict(img_path=NAN), 'img_path'),
    'image is null': (dict(img_path=None), 'img_path'),
    'class is a list': (dict(cls_name=['a']), 'cls_name'),
    'kind is a dict': (dict(specie_name={}), 'specie_name'),
    'anomaly is NaN': (dict(anomaly=NAN), 'anomaly'),
    'anomaly is text': (dict(anomaly='1'), 'anomaly'),
}


def change_entry(root, others, **values):
    "Write meta.json with one anomalous entry of pill changed, and perhaps no masks of the others."
    content = json.loads(write_meta(read_folder(root), root / 'meta.json').read_text())
    rows = content['test']['pill']
    n = next(n for n, r in enumerate(rows) if r['anomaly'])
    for r in rows if others else ():
        r['mask_path'] = ''
    rows[n] = {**rows[n], **values}
    (root / 'meta.json').write_text(json.dumps(content))
    return n, root / rows[n]['img_path'] if isinstance(rows[n]['img_path'], str) else None


@pytest.mark.parametrize('what', ODD)
def test_values_of_another_type_in_meta_are_read_by_their_meaning(what, mvtec):
    values, want = ODD[what]
    _, path = change_entry(mvtec, 'mask_path' in values, **values)
    (s,) = [s for s in scan_dataset(read_folder(mvtec), 1).dataset.samples if s.path == path]
    assert {k: getattr(s, k) for k in want} == want


@pytest.mark.parametrize('what', WRONG)
def test_values_of_meta_that_mean_nothing_are_named_with_their_entry(what, mvtec):
    values, key = WRONG[what]
    n, _ = change_entry(mvtec, False, **values)
    with pytest.raises(ValueError, match=rf"meta\.json: entry {n} of 'pill' has {key}=") as e:
        read_folder(mvtec)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize('entries', [{}, 'pill', None, 3])
def test_a_category_of_meta_that_is_no_list_is_named(entries, mvtec):
    (mvtec / 'meta.json').write_text(json.dumps(dict(test=dict(pill=entries))))
    with pytest.raises(ValueError, match="meta.json: 'pill' in \"test\" is no list"):
        read_folder(mvtec)


@pytest.mark.parametrize('name', ['/tmp/x', '../../../x', 'a/b', 'a\\b', '..', '.', ' '])
@pytest.mark.parametrize('where', ['test', 'train', 'csv'])
def test_a_category_is_a_plain_name(name, where, mvtec, visa):
    if where == 'csv':
        rows = read_table(visa)
        n = next(n for n, r in enumerate(rows) if r[0] == 'pill')
        rows[n][0] = name
        write_table(visa, rows)
    else:
        content = json.loads(write_meta(read_folder(mvtec), mvtec / 'meta.json').read_text())
        content[where]['pill'][0]['cls_name'] = name
        (mvtec / 'meta.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match='no plain name'):
        read_folder(visa if where == 'csv' else mvtec)


def test_a_dataset_json_that_is_a_list_is_refused_by_name(mvtec):
    (mvtec / 'dataset.json').write_text('[1]')
    with pytest.raises(ValueError, match='not the rendered set procad'):
        load_dataset('procad', mvtec)


def drop_key(root, key, instead=None):
    content = json.loads(write_meta(read_folder(root), root / 'meta.json').read_text())
    entry = content['test']['pill'][1]
    del entry[key]
    if instead is not None:
        entry[key] = instead
    (root / 'meta.json').write_text(json.dumps(content))


REFUSED = {  # what is done to a copy of both sets, what is loaded, the error, its words
    'malformed meta.json': (
        lambda r: (r / 'mvtec/meta.json').write_text('{"test": {'),
        ('folder', 'mvtec'),
        ValueError,
        r'meta\.json: not valid JSON',
    ),
    'meta.json without test': (
        lambda r: (r / 'mvtec/meta.json').write_text('{"train": {}}'),
        ('folder', 'mvtec'),
        ValueError,
        r'meta\.json: no key "test"',
    ),
    'meta.json that is a list': (
        lambda r: (r / 'mvtec/meta.json').write_text('[1]'),
        ('folder', 'mvtec'),
        ValueError,
        r'meta\.json: no key "test"',
    ),
    'entry without anomaly': (
        lambda r: drop_key(r / 'mvtec', 'anomaly'),
        ('folder', 'mvtec'),
        ValueError,
        r"meta\.json: entry 1 of 'pill' has no \['anomaly'\]",
    ),
    'entry without img_path': (
        lambda r: drop_key(r / 'mvtec', 'img_path'),
        ('folder', 'mvtec'),
        ValueError,
        r"meta\.json: entry 1 of 'pill' has no \['img_path'\]",
    ),
    'entry of a third kind': (
        lambda r: drop_key(r / 'mvtec', 'anomaly', 2),
        ('folder', 'mvtec'),
        ValueError,
        r"meta\.json: entry 1 of 'pill' has anomaly=2",
    ),
    'csv lacking a column': (
        lambda r: write_table(r / 'visa', [row[:4] for row in read_table(r / 'visa')]),
        ('visa', 'visa'),
        ValueError,
        r"1cls\.csv: no column \['mask'\]",
    ),
    'empty csv': (
        lambda r: (r / 'visa/split_csv/1cls.csv').write_text(''),
        ('visa', 'visa'),
        ValueError,
        r'1cls\.csv: no column',
    ),
    'csv of bytes': (
        lambda r: (r / 'visa/split_csv/1cls.csv').write_bytes(b'\xff\xfe\x00'),
        ('visa', 'visa'),
        ValueError,
        r'1cls\.csv: not a readable table',
    ),
    'dataset.json with another word': (
        lambda r: (r / 'mvtec/dataset.json').write_text('{"kinds": {"pill": "thing"}}'),
        ('mvtec', 'mvtec'),
        ValueError,
        r"dataset\.json: kinds=.*'thing'",
    ),
    'malformed dataset.json': (
        lambda r: (r / 'mvtec/dataset.json').write_text('{'),
        ('mvtec', 'mvtec'),
        ValueError,
        r'dataset\.json: not valid JSON',
    ),
    'no normal images are marked': (
        lambda r: (r / 'own').mkdir() or shutil.copy(r / f'mvtec/{G}.png', r / 'own'),
        ('folder', 'own'),
        ValueError,
        r'own: cannot determine which images are normal',
    ),
    'no such folder': (
        lambda r: None,
        ('folder', 'nowhere'),
        FileNotFoundError,
        'nowhere: there is no such folder',
    ),
    'nothing in the folder': (
        lambda r: (r / 'nothing').mkdir(),
        ('mvtec', 'nothing'),
        FileNotFoundError,
        'nothing: no MVTec-shaped folder: looked for',
    ),
    'several sets in the folder': (
        lambda r: None,
        ('folder', '.'),
        ValueError,
        'several sets, mvtec, visa',
    ),
    'categories without images': (
        lambda r: (r / 'bare/bolt/test/good').mkdir(parents=True),
        ('mvtec', 'bare'),
        FileNotFoundError,
        'bare: no test image that can be used.*bolt',
    ),
    'unknown name': (
        lambda r: None,
        ('mvtecc', 'mvtec'),
        ValueError,
        r"name='mvtecc': choose from \['procad', .*'mvtec', 'visa', 'mpdd', .*'folder'\]",
    ),
}


@pytest.mark.parametrize('what', REFUSED)
def test_what_cannot_be_read_is_refused_by_name(what, mvtec, visa, tmp_path):
    spoil, (name, folder), error, words = REFUSED[what]
    spoil(tmp_path)
    with pytest.raises(error, match=words):
        load_dataset(name, tmp_path / folder)


def test_no_set_in_the_folder(mvtec, tmp_path):
    with pytest.raises(FileNotFoundError, match='no MVTec-shaped folder.*looked'):
        find_sets(mvtec / 'pill')
    with pytest.raises(FileNotFoundError, match='nowhere: no such folder; give'):
        find_sets(tmp_path / 'nowhere')
    for name in ('visa', 'mvtec', 'folder'):
        with pytest.raises(ValueError, match=f'{name} is not shipped: pass root='):
            load_dataset(name)


# ---- the survey's hash


def test_the_hash_names_what_numbers_depend_on(mvtec):
    ds = read_folder(mvtec)
    h = scan_dataset(ds).hash
    f = mvtec / f'{G}.png'
    old = f.read_bytes()
    Image.open(f).save(f, compress_level=9)
    assert f.read_bytes() != old and scan_dataset(ds).hash == h
    for path in (ds.samples[0].path, ds.samples[0].mask, ds.samples[0].foreground):
        old = path.read_bytes()
        a = np.array(Image.open(path))
        a[0, 0] = 255 - a[0, 0]
        Image.fromarray(a).save(path)
        assert scan_dataset(ds).hash != h
        path.write_bytes(old)
    assert scan_dataset(ds).hash == h
    assert scan_dataset(ds, 2) == scan_dataset(ds, 1)
    assert (
        len({scan_dataset(Dataset('x', ds.samples[:n], ds.kinds)).hash for n in (6, 7, 8)} | {h})
        == 3
    )
    assert scan_dataset(Dataset('x', ds.samples, dict(pill='texture', wood='texture'))).hash != h


def test_a_converted_set_is_the_same_set(tmp_path):
    "A folder that is read through meta.json has the same samples, outlines, kinds and hash."
    root = render_procad(
        ('pill', 'wood'), good=1, bad=2, train=1, size=128, root=tmp_path / 'set', workers=1
    )
    before = scan_dataset(read_folder(root), 1)
    write_meta(before.dataset, root / 'meta.json')
    after = scan_dataset(read_folder(root), 1)
    assert (
        layout_of(root) == 'meta'
        and after == before
        and any(s.foreground for s in after.dataset.samples)
    )
    (root / 'pill/foreground/good/000_fg.png').unlink()
    left = read_folder(root)
    assert [why.split('/')[0] for f, why in left.skipped] == ['its outline '] and len(
        left.samples
    ) == len(before.dataset.samples) - 1

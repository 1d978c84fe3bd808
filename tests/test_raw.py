"""Nine sets in the layouts of their downloads.

Every image is tested on, a reference, or left out by name; the public scripts choose the same.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.model_selection import train_test_split

from zsad.cli.main import main
from zsad.datasets.images import load_image
from zsad.datasets.layouts import read_folder
from zsad.datasets.loading import load_dataset
from zsad.datasets.masks import read_mask
from zsad.datasets.raw import RAW, arrange, read_raw
from zsad.datasets.raw_folders import find_layout
from zsad.datasets.raw_sdd import cut_rows, draw_share
from zsad.datasets.sources import SOURCES, find_sets
from zsad.datasets.survey import scan_dataset
from zsad.learned.knowledge import look_up


def paint(path, a=None, mode=None, **how):
    "Write an array, by default a square of noise that depends on its name."
    a = (
        np.random.default_rng(list(str(path.name).encode())).integers(0, 256, (12, 12), 'u1')
        if a is None
        else a
    )
    im = Image.fromarray(a)
    path.parent.mkdir(parents=True, exist_ok=True)
    (im.convert(mode) if mode else im).save(path, **how)
    return path


def spot(h=12, w=12, top=3, left=4, value=255):
    m = np.zeros((h, w), 'u1')
    m[top : top + 3, left : left + 2] = value
    return m


SCRATCHED = {
    ('kos01', 0): (slice(12, 15),),
    ('kos02', 1): (slice(8, 13),),
}  # rows of the scratch; thirds begin at 0, 10 and 20 of 31 rows: the second lies in two


def draw_sdd(root, kinds='jpg'):
    for folder in ('kos01', 'kos02', 'kos03', 'kos04'):
        for n in range(3):
            m = np.zeros((31, 12), 'u1')
            for rows in SCRATCHED.get((folder, n), ()):
                m[rows, 5:7] = 255
            paint(
                root / folder / f'Part{n}.{kinds}',
                np.random.default_rng((n, int(folder[3:]))).integers(60, 200, (31, 12), 'u1'),
            )
            paint(root / folder / f'Part{n}_label.bmp', m)
    return root


def draw_dagm(root):
    "Class c has c % 3 + 2 normal and one anomalous image in Test, and in Train one each more."
    for c in range(1, 11):
        for part, more in (('Train', 1), ('Test', 0)):
            good, bad = c % 3 + 2 + more, 1 + more
            lines = ['1']
            for n in range(1, good + bad + 1):
                paint(root / f'Class{c}/{part}/{n:04}.PNG')
                if n <= bad:
                    paint(root / f'Class{c}/{part}/Label/{n:04}_label.PNG', spot())
                lines.append(
                    '\t'.join(
                        map(
                            str,
                            (
                                n,
                                int(n <= bad),
                                f'{n:04}.PNG',
                                0,
                                f'{n:04}_label.PNG' if n <= bad else 0,
                            ),
                        )
                    )
                )
            (root / f'Class{c}/{part}/Label/Labels.txt').write_text('\n'.join(lines) + '\n')
    return root


def draw_brainmri(root):
    "As on Kaggle: both folders, and both again below brain_tumor_dataset."
    grey = np.arange(144, dtype='u1').reshape(12, 12)
    for at in (root, root / 'brain_tumor_dataset'):
        paint(at / 'yes/Y1.JPG', grey)
        paint(at / 'yes/Y2.jpg', np.dstack([grey] * 3))
        paint(at / 'yes/Y10.JPG', grey)
        paint(at / 'no/1 no.jpeg', grey)
        paint(at / 'no/N2.png', grey, 'P')
        paint(at / 'no/no 3.PNG', np.dstack([grey] * 4))
    return root


def draw_br35h(root):
    for n in range(3):
        paint(root / f'yes/y{n}.jpg')
        paint(root / f'no/no{n}.jpg')
    paint(root / 'no/no3.JPG')
    paint(root / 'pred/pred0.jpg')
    paint(root / 'pred/pred1.jpg')
    paint(root / 'Br35H-Mask-RCNN/TRAIN/y0.jpg')
    paint(root / 'a.jpg')
    (root / 'no/Thumbs.db').write_bytes(b'junk')
    (root / 'yes/._y0.jpg').write_bytes(b'junk')
    (root / 'Br35H-Mask-RCNN/TRAIN/._y0.jpg').write_bytes(b'junk')
    return root


def draw_headct(root):
    for n in range(5):
        paint(root / f'head_ct/head_ct/{n:03}.png')
    (root / 'labels.csv').write_text('id, hemorrhage\n0, 1\n1, 1\n2, 0\n3, 1\n4, 0\n')
    return root


def draw_covid(root):
    for kind, n in (('Normal', 4), ('COVID', 3), ('Lung_Opacity', 2), ('Viral Pneumonia', 1)):
        for i in range(n):
            paint(root / f'{kind}/images/{kind}-{i}.png')
            paint(root / f'{kind}/masks/{kind}-{i}.png', spot())
    (root / 'Normal.metadata.xlsx').write_bytes(b'x')
    (root / 'README.md.txt').write_text('x')
    return root


def draw_bmad(root, form='page', masks='anomaly_mask', bad='Ungood'):
    "Two normal and three anomalous test images, one reference, two for tuning, in any form."
    test, one, two, valid, train = dict(
        page=('test', '{k}/img', '{k}/{m}', 'valid', 'train/good/img'),
        liver=('test', 'img/{k}', '{m}/{k}', 'valid', 'train/good'),
        resc=('Test', 'test/{k}', 'test_label/{k}', 'Val', 'Train/train/good'),
    )[form]
    for k, n in (('good', 2), (bad, 3)):
        for i in range(n):
            paint(root / test / one.format(k=k) / f'{k}_{i}.png')
    for i in range(3):
        paint(root / test / two.format(k=bad, m=masks) / f'{bad}_{i}.png', spot(left=i))
    for k in ('good', bad):
        paint(root / valid / one.format(k=k) / 'v.png')
    paint(root / train / 't.png')
    return root


DRAWN = {  # how it is drawn, (normal, anomalous, masks, references), number of what is left out
    'sdd': (draw_sdd, (9, 3, 3, 24), 0),
    'dagm': (
        draw_dagm,
        (sum(c % 3 + 2 for c in range(1, 11)), 10, 10, sum(c % 3 + 3 for c in range(1, 11))),
        10,
    ),
    'brainmri': (draw_brainmri, (3, 3, 0, 0), 1),
    'br35h': (draw_br35h, (4, 3, 0, 0), 3),
    'headct': (draw_headct, (2, 3, 0, 0), 0),
    'covid': (draw_covid, (4, 6, 0, 0), 4),
    'bmad_brain': (lambda r: draw_bmad(r / 'Brain_AD').parent, (2, 3, 3, 1), 1),
    'liverct': (
        lambda r: draw_bmad(r / 'Liver_AD' / 'hist_DIY', 'liver', 'label', 'ungood').parents[1],
        (2, 3, 3, 1),
        1,
    ),
    'resc': (lambda r: draw_bmad(r / 'RESC', 'resc', '').parent, (2, 3, 3, 1), 1),
}


def counts(ds):
    bad = sum(s.label for s in ds.samples)
    return len(ds.samples) - bad, bad, sum(s.mask is not None for s in ds.samples), len(ds.train)


def bare(ds):
    return replace(ds, skipped=())


def why(ds, root):
    return {Path(f).relative_to(root).as_posix(): w for f, w in ds.skipped}


# ---- every set


@pytest.mark.parametrize('name', DRAWN)
def test_a_raw_folder_becomes_a_set(name, tmp_path):
    draw, want, left = DRAWN[name]
    raw = draw(tmp_path / 'downloads' / 'x')
    ds, path = arrange(name, raw, tmp_path / 'sets' / name)
    assert counts(ds) == want and len(ds.skipped) == left and ds.name == name
    assert set(ds.categories) == set(RAW[name].categories) and all(
        look_up(c, name) for c in ds.categories
    )
    assert path == tmp_path / 'sets' / name / 'meta.json' and find_sets(tmp_path / 'sets') == {
        name: path.parent
    }
    again = load_dataset(name, path.parent)
    assert again == bare(ds) and again.skipped == () and scan_dataset(again, 1).dataset == again
    assert not {s.path for s in ds.samples} & {s.path for s in ds.train} and all(
        s.mask is None or s.label for s in ds.samples
    )


@pytest.mark.parametrize('name', DRAWN)
def test_it_is_the_same_set_wherever_meta_lies(name, tmp_path):
    draw = DRAWN[name][0]
    here, there = draw(tmp_path / 'one' / name), draw(tmp_path / 'img' / 'other' / 'raw')
    (_, a), (_, b) = (
        arrange(name, here),
        arrange(name, there, tmp_path / 'apart' / 'sub' / 'meta.json'),
    )
    assert a == here / 'meta.json' and not any(
        Path(r['img_path']).is_absolute()
        for rows in json.loads(a.read_text())['test'].values()
        for r in rows
    )
    one, two = (scan_dataset(load_dataset(name, p.parent), 1) for p in (a, b))
    assert (
        one.hash == two.hash
        and one.pixels == two.pixels
        and [s.id for s in one.dataset.train] == [s.id for s in two.dataset.train]
    )
    assert find_sets(tmp_path / 'one') == {name: here}
    assert bare(arrange(name, here)[0]) == load_dataset(name, here)  # again, over itself
    shutil.move(here, tmp_path / 'moved')
    assert scan_dataset(load_dataset(name, tmp_path / 'moved'), 1).hash == one.hash


def test_nine_sets_side_by_side_are_found(tmp_path):
    for name, (draw, *_) in DRAWN.items():
        arrange(name, draw(tmp_path / 'raw' / name), tmp_path / 'sets' / name)
    found = find_sets(tmp_path / 'sets')
    assert found == {n: tmp_path / 'sets' / n for n in DRAWN} and {
        n: counts(load_dataset(n, p)) for n, p in found.items()
    } == {n: want for n, (_, want, _) in DRAWN.items()}


@pytest.mark.parametrize('name', DRAWN)
def test_another_layout_is_refused_and_what_was_found_is_said(name, tmp_path):
    (tmp_path / 'train').mkdir()
    paint(tmp_path / 'a.png')
    with pytest.raises(FileNotFoundError) as e:
        arrange(name, tmp_path)
    assert (
        RAW[name].layout in str(e.value)
        and str(e.value).endswith('found a.png, train')
        and not (tmp_path / 'meta.json').exists()
    )
    with pytest.raises(FileNotFoundError, match='found no such folder'):
        arrange(name, tmp_path / 'nowhere', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_every_set_without_counts_has_its_layout():
    assert (
        set(RAW) == set(DRAWN) == {n for n, s in SOURCES.items() if not s.counts} - {'btad', 'mpdd'}
    )
    assert {n: r.peers[0][:2] for n, r in RAW.items()} == dict(
        sdd=(181, 74),
        dagm=(6996, 1054),
        brainmri=(98, 155),
        br35h=(1500, 1500),
        headct=(100, 100),
        covid=(1341, 219),
        bmad_brain=(640, 3075),
        liverct=(833, 660),
        resc=(1041, 764),
    )
    assert sum(RAW['dagm'].peers[0][:2]) == 6 * 575 + 4 * 1150  # images in the ten Test folders


def test_wrong_names_and_choices_are_refused(tmp_path):
    draw_br35h(tmp_path)
    with pytest.raises(
        ValueError, match=r"name='btad': choose from \['sdd', .*mpdd and btad need no arranging"
    ):
        arrange('btad', tmp_path)
    with pytest.raises(ValueError, match='cut, share: not a choice of br35h, which has none'):
        arrange('br35h', tmp_path, cut=3, share=1)
    with pytest.raises(ValueError, match='kinds: not a choice of sdd, which has cut, share, seed'):
        arrange('sdd', tmp_path, kinds=('a',))


def test_the_folder_is_looked_for_in_what_was_unpacked(tmp_path):
    def fits(p):
        return (p / 'x').is_dir()

    (tmp_path / 'a/b/c/x').mkdir(parents=True)
    assert (
        find_layout(tmp_path, fits, 'x')
        == find_layout(tmp_path / 'a/b/c', fits, 'x')
        == tmp_path / 'a/b/c'
    )
    (tmp_path / 'a/b/c/d/e/x').mkdir(parents=True)
    assert find_layout(tmp_path, fits, 'x') == tmp_path / 'a/b/c'  # below a find is not searched
    (tmp_path / 'liver/x').mkdir(parents=True)
    with pytest.raises(ValueError, match='liver and a/b/c have this layout; point to one'):
        find_layout(tmp_path, fits, 'x', ('brain',))
    assert (
        find_layout(tmp_path, fits, 'x', ('liver',)) == tmp_path / 'liver'
        and find_layout(tmp_path / 'a', fits, 'x', ('liver',)) == tmp_path / 'a/b/c'
    )
    with pytest.raises(FileNotFoundError):
        find_layout(tmp_path / '..', lambda p: p == tmp_path / 'a/b/c', 'x')  # four levels down


# ---- KolektorSDD

THIRDS = ['kos01_Part0_1', 'kos02_Part1_0', 'kos02_Part1_1']


def test_thirds_are_labelled_by_their_own_masks(tmp_path):
    ds, _ = arrange('sdd', draw_sdd(tmp_path / 'raw'), tmp_path / 'sdd')
    assert [s.id for s in ds.samples if s.label] == [
        f'electrical commutators/defect/{t}' for t in THIRDS
    ] and ds.kinds == {'electrical commutators': 'object'}
    every = {s.path.stem: s for s in (*ds.samples, *ds.train)}
    assert len(every) == 36
    for folder, n in ((f, n) for f in ('kos01', 'kos02', 'kos03', 'kos04') for n in range(3)):
        image, mask = (
            load_image(tmp_path / f'raw/{folder}/Part{n}.jpg'),
            read_mask(tmp_path / f'raw/{folder}/Part{n}_label.bmp'),
        )
        for i, rows in enumerate((slice(0, 10), slice(10, 20), slice(20, 31))):
            s = every[f'{folder}_Part{n}_{i}']
            assert (
                np.array_equal(load_image(s.path), image[rows])
                and s.label == mask[rows].any()
                and (s.mask is None or np.array_equal(read_mask(s.mask), mask[rows]))
            )
    assert {f.name for f in (tmp_path / 'sdd').iterdir()} == {'cut-3', 'meta.json'} and sorted(
        f.name for f in (tmp_path / 'raw').iterdir()
    ) == ['kos01', 'kos02', 'kos03', 'kos04']


def test_whole_images_and_other_shares(tmp_path):
    raw = draw_sdd(tmp_path / 'raw')
    ds, path = arrange('sdd', raw, tmp_path / 'sdd', cut=1, share=1)
    assert (
        counts(ds) == (10, 2, 2, 0)
        and {s.path.parent.name for s in ds.samples} == {'cut-1'}
        and 'electrical commutators/good/kos01_Part1' in {s.id for s in ds.samples}
    )
    whole = next(s for s in ds.samples if s.path.stem == 'kos02_Part1')
    assert np.array_equal(
        read_mask(whole.mask), read_mask(raw / 'kos02/Part1_label.bmp')
    ) and np.array_equal(load_image(whole.path), load_image(raw / 'kos02/Part1.jpg'))
    assert counts(arrange('sdd', raw, path, share=0.5)[0]) == (17, 3, 3, 16) and counts(
        arrange('sdd', raw, path, share=1)[0]
    ) == (33, 3, 3, 0)

    def test(**k):
        return {s.id for s in read_raw('sdd', raw, tmp_path / 'sdd', **k).samples}

    assert test() == test(seed=42) != test(seed=7) and len(test(seed=7)) == 12
    for bad in (dict(cut=0), dict(cut=2.5), dict(share=0), dict(share=1.1)):
        with pytest.raises(ValueError, match=f'^{next(iter(bad))}='):
            arrange('sdd', raw, path, **bad)


@pytest.mark.parametrize('n', [1, 3, 4, 33, 1143])
def test_the_draw_is_that_of_scikit_learn(n):
    assert [len(p) for p in cut_rows(np.zeros(n), 3)] == [
        n // 3,
        n * 2 // 3 - n // 3,
        n - n * 2 // 3,
    ]
    for share, seed in ((0.25, 42), (0.5, 0), (0.1, 3)):
        if n > math.ceil(share * n):
            assert draw_share(n, share, seed) == set(
                train_test_split(range(n), test_size=share, random_state=seed)[1]
            )
    assert draw_share(n, 1) == set(range(n))


ADACLIP = [
    'kos02_Part0_0',
    'kos02_Part0_1',
    'kos02_Part2_0',
    'kos03_Part0_0',
    'kos03_Part0_2',
    'kos03_Part1_1',
    'kos03_Part2_0',
    'kos04_Part0_2',
    'kos04_Part2_1',
]


def test_the_public_scripts_choose_the_same_images(tmp_path):
    """Frozen results of the public scripts on these drawings, with sorted listings.

    AdaCLIP e27ee32, sdd-pre.py; AnomalyCLIP 45ed4dd, DAGM.py and brainmri.py. Pixels and masks of
    the thirds were equal too.
    """
    ds, _ = arrange('sdd', draw_sdd(tmp_path / 'sdd'))
    assert (
        [s.path.stem for s in ds.samples if not s.label] == ADACLIP
        and [s.path.stem for s in ds.samples if s.label] == THIRDS
        and len(ds.train) == 24
    )
    ds, _ = arrange('dagm', draw_dagm(tmp_path / 'dagm'))
    assert [sum(not s.label for s in ds.of(f'Class{c}')) for c in range(1, 11)] == [
        3,
        4,
        2,
        3,
        4,
        2,
        3,
        4,
        2,
        3,
    ] and [sum(s.label for s in ds.of(f'Class{c}')) for c in range(1, 11)] == [1] * 10
    ds, _ = arrange('brainmri', draw_brainmri(tmp_path / 'brainmri') / 'brain_tumor_dataset')
    assert [(s.defect, s.label) for s in ds.samples] == [('no', 0)] * 3 + [('yes', 1)] * 3


def test_parts_that_cannot_be_labelled_are_left_out_and_named(tmp_path):
    raw = draw_sdd(tmp_path / 'raw')
    (raw / 'kos03/Part0_label.bmp').unlink()
    (raw / 'kos03/Part1.jpg').unlink()
    (raw / 'kos03/Part2.jpg').write_text('x')
    paint(raw / 'kos04/Part0_label.bmp', spot(30))
    paint(raw / 'kos04/Part1.png')
    (raw / 'kos04/Part2_label.bmp').write_bytes(b'')
    paint(raw / 'extra/1.png')
    paint(raw / 'x.png')
    (raw / 'kos05').mkdir()
    for again in range(2):  # what was cut the first time is not read as raw
        ds, _ = arrange('sdd', raw)
        left = why(ds, raw)
        assert list(left) == [
            'kos03/Part0.jpg',
            'kos03/Part2.jpg',
            'kos03/Part1_label.bmp',
            'kos04/Part1.png',
            'kos04/Part0.jpg',
            'kos04/Part2.jpg',
            'x.png',
            'extra',
        ]
        words = (
            'no Part0_label',
            'not a readable image',
            'mask of no image',
            'Part1.jpg has the same name',
            'mask of 12x30 pixels for an image of 12x31',
            'Part2_label.bmp: not a readable image',
            'not in a folder kosNN',
            '1 image: not in a folder',
        )
        assert all(word in w for word, w in zip(words, left.values())) and len(words) == len(left)
        assert {s.path.stem.rsplit('_', 1)[0] for s in (*ds.samples, *ds.train)} == {
            f'{f}_Part{n}'
            for f, n in (*((f, n) for f in ('kos01', 'kos02') for n in range(3)), ('kos04', 1))
        }


# ---- DAGM


def test_parts_of_dagm(tmp_path):
    raw = draw_dagm(tmp_path / 'DAGM_KaggleUpload')
    one, both, train = (
        read_raw('dagm', raw, **k)
        for k in ({}, dict(parts=('Train', 'Test')), dict(parts=['Train']))
    )
    assert (counts(one)[:2], counts(both), counts(train)[:2]) == (
        (30, 10),
        (70, 30, 30, 0),
        (40, 20),
    ) and counts(train)[3] == 30
    assert (
        {s.path.parent.name for s in one.samples} == {'Test'}
        and {s.path.parent.name for s in one.train} == {'Train'}
        and not both.skipped
    )
    assert len({s.id for s in both.samples}) == 100 and {s.id for s in one.samples} < {
        s.id for s in both.samples
    }  # numbers repeat, ids do not
    assert (
        why(one, raw)['Class4/Train'] == '2 anomalous images: Train is not tested on'
        and why(train, raw)['Class4/Test'] == '1 anomalous image: Test is not tested on'
    )
    assert (
        set(one.kinds.values()) == {'texture'}
        and list(one.kinds) == sorted(RAW['dagm'].categories)
        and all(np.array_equal(read_mask(s.mask), spot() > 0) for s in one.samples if s.label)
    )
    for bad in ((), ('test',), ('Test', 'Valid')):
        with pytest.raises(ValueError, match='^parts='):
            read_raw('dagm', raw, parts=bad)


def test_what_dagm_lacks_is_named(tmp_path):
    raw = draw_dagm(tmp_path / 'raw')
    (raw / 'Class1/Test/Label/0001_label.PNG').unlink()
    shutil.rmtree(raw / 'Class2/Test/Label')
    shutil.rmtree(raw / 'Class3')
    shutil.rmtree(raw / 'Class4/Train')
    (raw / 'Class5/Test/0001.PNG').unlink()
    (raw / 'Class6/Test/Label/Labels.txt').unlink()
    (raw / 'Class6/Test/Label/0001_label.PNG').unlink()
    paint(raw / 'Class11/1.PNG')
    (raw / 'Class7').rename(raw / 'class7')
    (raw / 'Class8/Test/0001.PNG').rename(raw / 'Class8/Test/0001.png')
    ds = read_raw('dagm', raw)
    left = {f: w for f, w in why(ds, raw).items() if 'is not tested on' not in w}
    assert left == {
        'Class1/Test/0001.PNG': 'Labels.txt calls it anomalous, but there is no 0001_label',
        'Class2/Test': '5 images: no folder Label with the anomalous ones',
        'Class3/Train': 'there is no such folder',
        'Class3/Test': 'there is no such folder',
        'Class4/Train': 'there is no such folder',
        'Class5/Test/Label/0001_label.PNG': 'label of no image',
        'Class11': '1 image: not in Class1 to Class10',
    }

    def of(c):
        return (
            sum(not s.label for s in ds.samples if s.category == c),
            sum(s.label for s in ds.samples if s.category == c),
        )

    assert [of(f'Class{c}') for c in range(1, 11)] == [
        (3, 0),
        (0, 0),
        (0, 0),
        (3, 1),
        (4, 0),
        (3, 0),
        (3, 1),
        (4, 1),
        (2, 1),
        (3, 1),
    ]  # Class6: nothing is left that tells


def test_kinds_go_beside_meta_and_leave_what_is_there(tmp_path):
    raw = draw_dagm(tmp_path / 'dagm')
    (raw / 'dataset.json').write_text(json.dumps(dict(note='mine', kinds=dict(other='object'))))
    ds, _ = arrange('dagm', raw)
    description = json.loads((raw / 'dataset.json').read_text())
    assert (
        description == dict(note='mine', kinds={'other': 'object', **ds.kinds})
        and read_folder(raw).kinds == ds.kinds
    )
    arrange('br35h', draw_br35h(tmp_path / 'br35h'))
    assert not (tmp_path / 'br35h' / 'dataset.json').exists()


# ---- sets without masks


def test_modes_and_endings_of_brainmri(tmp_path):
    ds, _ = arrange('brainmri', draw_brainmri(tmp_path / 'brainmri'))
    assert [s.id for s in ds.samples] == [
        'brain/no/1 no',
        'brain/no/N2',
        'brain/no/no 3',
        'brain/yes/Y1',
        'brain/yes/Y10',
        'brain/yes/Y2',
    ] and why(ds, tmp_path / 'brainmri') == {
        'brain_tumor_dataset': '6 images: neither in yes nor in no'
    }
    grey = np.arange(144, dtype='u1').reshape(12, 12, 1)
    assert all(
        abs(
            load_image(s.path).astype(int)
            - (grey * (grey / 255.0) if s.path.suffix == '.PNG' else grey)
        ).max()
        <= 3
        for s in ds.samples
    )  # as RGB; transparency over black
    inner = read_raw('brainmri', tmp_path / 'brainmri' / 'brain_tumor_dataset')
    assert [(s.id, s.label) for s in inner.samples] == [
        (s.id, s.label) for s in ds.samples
    ] and not inner.skipped


def test_pred_is_not_a_kind_of_tumour(tmp_path):
    raw = draw_br35h(tmp_path / 'archive' / 'raw')
    ds = read_raw('br35h', tmp_path)
    assert why(ds, raw) == {
        'a.jpg': 'neither in yes nor in no',
        'Br35H-Mask-RCNN': '1 image: neither in yes nor in no',
        'pred': '2 images: neither in yes nor in no',
    } and {s.defect for s in ds.samples} == {'yes', 'no'}
    paint(raw / 'no/no3.png')
    (raw / 'yes').rename(raw / 'Yes')
    again = read_raw('br35h', raw)
    assert [s.id for s in again.samples] == [s.id for s in ds.samples] and why(again, raw)[
        'no/no3.png'
    ] == 'no3.JPG has the same name; rename one of them'


@pytest.mark.parametrize('where', ['head_ct/head_ct', 'head_ct', '.'])
def test_images_of_headct_lie_near_their_table(where, tmp_path):
    raw = draw_headct(tmp_path / 'raw')
    (tmp_path / 'x').mkdir()
    (raw / 'labels.csv').rename(tmp_path / 'x/labels.csv')
    shutil.copytree(raw / 'head_ct/head_ct', tmp_path / 'x' / where, dirs_exist_ok=True)
    ds = read_raw('headct', tmp_path / 'x')
    assert [(s.id, s.path.name) for s in ds.samples if s.label] == [
        (f'brain/defect/00{n}', f'00{n}.png') for n in (0, 1, 3)
    ] and not ds.skipped


def test_rows_of_headct_that_say_nothing(tmp_path):
    raw = draw_headct(tmp_path)
    paint(raw / 'head_ct/head_ct/note.png')
    (raw / 'labels.csv').write_bytes(
        b'\xef\xbb\xbfid, hemorrhage\r\n0, 1\r\n1,\r\n2, maybe\r\n7,1\r\n\r\n4, 0\r\n4, 1\r\nx\r\n'
    )
    ds = read_raw('headct', raw)
    assert [(s.path.name, s.label) for s in ds.samples] == [('000.png', 1), ('004.png', 0)]
    assert [(f.name, w.split(';')[0].split(' in ')[0]) for f, w in ds.skipped] == [
        ('note.png', 'its name is not a number'),
        ('labels.csv', "line 3: '1,'"),
        ('labels.csv', "line 4: '2,maybe'"),
        ('labels.csv', 'line 5: no image 007.png'),
        ('labels.csv', 'line 8: no image 004.png'),
        ('labels.csv', "line 9: 'x'"),
        *((f'00{n}.png', 'labels.csv does not say what it shows') for n in (1, 2, 3)),
    ]
    for text in ('', 'name,label\n0,1\n'):
        (raw / 'labels.csv').write_text(text)
        with pytest.raises(
            ValueError, match=r'labels.csv: its columns are .*; it needs id, hemorrhage'
        ):
            read_raw('headct', raw)


def test_lungs_are_no_lesions(tmp_path):
    raw = draw_covid(tmp_path / 'COVID-19_Radiography_Dataset')
    paint(raw / 'COVID/x.png')
    ds = read_raw('covid', tmp_path)
    assert all(s.mask is None and s.path.parent.name == 'images' for s in ds.samples) and {
        s.defect: s.label for s in ds.samples
    } == {'Normal': 0, 'COVID': 1, 'Lung_Opacity': 1, 'Viral Pneumonia': 1}
    assert why(ds, raw) == {
        'COVID/x.png': 'beside the folder images',
        **{
            f'{k}/masks': f'{n} image{"s" * (n > 1)}: outlines of lungs, not of lesions'
            for k, n in (('Normal', 4), ('COVID', 3), ('Lung_Opacity', 2), ('Viral Pneumonia', 1))
        },
    }


def test_the_early_release_and_a_choice_of_kinds(tmp_path):
    for kind, n in (('NORMAL', 3), ('COVID-19', 2), ('Viral Pneumonia', 4)):
        [paint(tmp_path / f'{kind}/{kind} ({i}).png') for i in range(n)]
    assert counts(read_raw('covid', tmp_path)) == (3, 6, 0, 0)
    one = read_raw('covid', tmp_path, kinds=('covid-19',))
    assert counts(one) == (3, 2, 0, 0) and why(one, tmp_path) == {
        'Viral Pneumonia': '4 images: a kind that was not chosen'
    }
    for bad in (('COVID',), ('NORMAL',)):
        with pytest.raises(
            ValueError,
            match=r"no images of the kinds \['\w+'\]; it has \['COVID-19', 'Viral Pneumonia'\]",
        ):
            read_raw('covid', tmp_path, kinds=bad)


# ---- BMAD


@pytest.mark.parametrize('form', ['page', 'liver', 'resc'])
@pytest.mark.parametrize('masks', ['anomaly_mask', 'label'])
@pytest.mark.parametrize('bad', ['Ungood', 'ungood'])
def test_the_forms_of_bmad_are_one_set(form, masks, bad, tmp_path):
    ds = read_raw('liverct', draw_bmad(tmp_path / 'img' / 'images', form, masks, bad))
    assert counts(ds) == (2, 3, 3, 1) and [w for _, w in ds.skipped] == [
        '2 images: not the test part'
    ]
    for i, s in enumerate(s for s in ds.samples if s.label):
        assert s.path.name == f'{bad}_{i}.png' and np.array_equal(
            read_mask(s.mask), spot(left=i) > 0
        )


def test_masks_of_bmad_are_found_by_name(tmp_path):
    raw = draw_bmad(tmp_path / 'img' / 'Brain_AD')
    m = raw / 'test/Ungood/anomaly_mask'
    (m / 'Ungood_0.png').unlink()
    (m / 'Ungood_1.png').rename(m / 'Ungood_1.bmp')
    paint(m / 'z.png', spot())
    (m / '._Ungood_0.png').write_bytes(b'x')
    paint(m / 'Ungood_2.png', spot(value=2))
    ds = read_raw('bmad_brain', tmp_path / 'img')
    left = why(ds, raw)
    assert [(s.id, s.mask.name) for s in ds.samples if s.label] == [
        ('brain/Ungood/Ungood_1', 'Ungood_1.bmp'),
        ('brain/Ungood/Ungood_2', 'Ungood_2.png'),
    ] and read_mask(ds.samples[1].mask).sum() == 6
    assert left == {
        'test/Ungood/img/Ungood_0.png': f'no mask of its own named Ungood_0 in {m}',
        'test/Ungood/anomaly_mask/z.png': 'mask of no image',
        'valid': '2 images: not the test part',
    }
    shutil.rmtree(m)
    with pytest.raises(ValueError, match='no folder anomaly_mask or label of masks beside it'):
        read_raw('bmad_brain', raw)


def test_one_of_several_sets_of_bmad(tmp_path):
    draw_bmad(tmp_path / 'Brain_AD')
    draw_bmad(tmp_path / 'Liver_AD/hist_DIY', 'liver')
    draw_bmad(tmp_path / 'Retina_RESC_AD/RESC', 'resc')
    for name, words in (
        ('bmad_brain', 'Brain_AD'),
        ('liverct', 'Liver_AD'),
        ('resc', 'Retina_RESC_AD'),
    ):
        ds = read_raw(name, tmp_path)
        assert {s.path.relative_to(tmp_path).parts[0] for s in (*ds.samples, *ds.train)} == {
            words
        } and ds.categories == RAW[name].categories
    with pytest.raises(ValueError, match='by its name this is liverct, not resc'):
        read_raw('resc', tmp_path / 'Liver_AD')
    draw_bmad(tmp_path / 'prescan' / 'Brains')
    assert read_raw('bmad_brain', tmp_path / 'prescan').categories == (
        'brain',
    )  # 'resc' inside of a word is not RESC
    draw_bmad(tmp_path / 'Brain_AD_2')
    with pytest.raises(ValueError, match='Brain_AD and Brain_AD_2 have this layout'):
        read_raw('bmad_brain', tmp_path)


# ---- what needs no arranging


def test_btad_and_mpdd_are_read_as_they_are(tmp_path):
    for c, image, mask in (('01', 'bmp', 'png'), ('02', 'png', 'png'), ('03', 'bmp', 'bmp')):
        for n in range(2):
            paint(tmp_path / f'BTAD/{c}/train/ok/{n:04}.{image}')
            paint(tmp_path / f'BTAD/{c}/test/ok/{n:04}.{image}')
            paint(tmp_path / f'BTAD/{c}/test/ko/{n:04}.{image}')
            paint(tmp_path / f'BTAD/{c}/ground_truth/ko/{n:04}.{mask}', spot(left=n))
    for c in ('bracket_black', 'tubes'):
        paint(tmp_path / f'MPDD/{c}/train/good/000.png')
        paint(tmp_path / f'MPDD/{c}/test/good/000.png')
        paint(tmp_path / f'MPDD/{c}/test/scratches/000.png')
        paint(tmp_path / f'MPDD/{c}/ground_truth/scratches/000_mask.png', spot())
    assert find_sets(tmp_path) == dict(mpdd=tmp_path / 'MPDD', btad=tmp_path / 'BTAD')
    btad, mpdd = (
        scan_dataset(load_dataset(n, tmp_path / n.upper()), 1).dataset for n in ('btad', 'mpdd')
    )
    assert (counts(btad), counts(mpdd), btad.skipped + mpdd.skipped) == (
        (6, 6, 6, 6),
        (2, 2, 2, 2),
        (),
    ) and btad.categories == ('01', '02', '03')
    assert all(
        np.array_equal(read_mask(s.mask), spot(left=int(s.path.stem)) > 0)
        for s in btad.samples
        if s.label
    )


# ---- the command


def test_a_set_is_arranged_and_checked_from_the_shell(tmp_path, capsys):
    raw, out = draw_sdd(tmp_path / 'KolektorSDD'), tmp_path / 'sets' / 'sdd'
    (raw / 'kos01/Part1_label.bmp').unlink()
    assert (
        main(
            [
                'data',
                'arrange',
                'sdd',
                str(raw),
                '--out',
                str(out / 'meta.json'),
                '--share',
                '0.5',
                '--cut',
                '3',
                '--seed',
                '1',
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert (
        lines[0].split()
        == ['electrical', 'commutators', '15', 'normal', '3', 'anomalous', '3', 'masks']
        and lines[1]
        == 'total: 15 normal + 3 anomalous test images, 15 reference images, 1 left out; '
        'published: 181 + 74 (AnomalyCLIP) or 286 + 54 (its issue 19, by this rule)'
    )
    assert (
        lines[2:] == [str(out / 'meta.json')]
        and captured.err
        == f'left out: {raw}/kos01/Part1.jpg: no Part1_label beside it, so its label is unknown\n'
    )
    assert (
        main(['data', 'check', str(out), '--name', 'sdd']) == 0
        and 'layout meta, 18 images' in capsys.readouterr().out
    )
    assert main(
        ['data', 'convert', str(out), '--name', 'sdd', '--out', str(tmp_path / 'again.json')]
    ) == 0 and capsys.readouterr().out.strip() == str(tmp_path / 'again.json')
    assert (
        main(['data', 'check', str(out), '--name', 'sddd']) == 2
        and "name='sddd': choose from" in capsys.readouterr().err
    )


def test_choices_and_hints_of_the_command(tmp_path, capsys):
    raw = draw_dagm(tmp_path / 'DAGM_KaggleUpload')
    assert main(['data', 'arrange', 'dagm', str(raw), '--parts', 'Train', 'Test']) == 0
    out = capsys.readouterr().out
    assert (
        'total: 70 normal + 30 anomalous' in out
        and 'looks for it in a folder named dagm: give --out .../dagm/meta.json' in out
    )
    assert (
        main(['data', 'arrange', 'dagm', str(raw), '--out', str(tmp_path / 'dagm')]) == 0
        and 'looks for it' not in capsys.readouterr().out
    )
    draw_covid(tmp_path / 'c')
    assert (
        main(['data', 'arrange', 'covid', str(tmp_path / 'c'), '--kinds', 'COVID', 'Lung_Opacity'])
        == 0
        and 'total: 4 normal + 5 anomalous' in capsys.readouterr().out
    )
    for argv, word in (
        (
            ['br35h', raw],
            'looked here and three levels below for folders yes and no of images; '
            'found Class1, Class10',
        ),
        (['btad', raw], "name='btad'"),
        (['dagm', raw, '--cut', '3'], 'cut: not a choice of dagm'),
        (['headct', tmp_path / 'no'], 'no such folder'),
    ):
        assert main(['data', 'arrange', *map(str, argv)]) == 2
        err = capsys.readouterr().err
        assert err.startswith('zsad data: ') and word in err and err.count('\n') == 1

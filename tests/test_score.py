"`zsad score` and `zsad evaluate`: names, draws, memory, earlier results, pairs of maps and masks."

import csv
import gc
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsad.cli.evaluate import read_scores
from zsad.cli.main import main
from zsad.cli.naming import find_images, name_files, pair_names
from zsad.cli.score import shared_scale
from zsad.rendered.procad import render_procad
from zsad.reporting.overlays import map_range


@pytest.fixture(scope='module')
def pills(tmp_path_factory):
    "An MVTec-shaped category whose normal and anomalous images have the same names."
    d = tmp_path_factory.mktemp('score')
    root = d / 'own' / 'pill'
    drawn = (
        render_procad(('pill',), good=3, bad=4, train=1, size=96, root=d / 'set', workers=1)
        / 'pill'
    )
    shutil.copytree(drawn / 'test/good', root / 'test/good')
    for k in ('test/hole', 'ground_truth/hole'):
        (root / k).mkdir(parents=True)
    for n, f in enumerate(
        [f for f in sorted((drawn / 'test').glob('*/*.png')) if f.parent.name != 'good'][:3]
    ):
        shutil.copy(f, root / 'test/hole' / f'{n:03}.png')
        shutil.copy(
            drawn / 'ground_truth' / f.parent.name / f'{f.stem}_mask.png',
            root / 'ground_truth/hole' / f'{n:03}_mask.png',
        )
    return root


@pytest.fixture
def score(files, tmp_path, monkeypatch, capsys):
    "Run `zsad score` with the small encoder: (exit code, {id: score}, {id: map}, printed text)."
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'c'))

    def run(method, *images, out='out', more=()):
        capsys.readouterr()
        code = main(
            [
                'score',
                method,
                *map(str, images),
                '--category',
                'pill',
                '--out',
                str(tmp_path / out),
                '--backbone',
                files[0],
                '--weights',
                files[1],
                '--device',
                'cpu',
                *map(str, more),
            ]
        )
        rows = (
            list(csv.DictReader((tmp_path / out / 'scores.csv').open(newline='')))
            if (tmp_path / out / 'scores.csv').exists()
            else []
        )
        maps = {r['id']: np.load(tmp_path / out / 'maps' / f"{r['id']}.npy") for r in rows}
        return code, {r['id']: float(r['score']) for r in rows}, maps, capsys.readouterr()

    return run


def evaluated(capsys, *command):
    "Run `zsad evaluate`: (exit code, {metric: value}, lines on stderr)."
    capsys.readouterr()
    code = main(['evaluate', *map(str, command)])
    printed = capsys.readouterr()
    values = [line.split()[:2] for line in printed.out.splitlines()]
    return code, {metric: float(value) for metric, value in values}, printed.err


# ---- names


def test_images_are_named_below_the_folder_they_share(tmp_path):
    def touch(*names):
        return [
            f
            for n in names
            if (f := tmp_path / n).parent.mkdir(parents=True, exist_ok=True)
            or f.write_bytes(b'') is not None
        ]

    same = touch('test/good/000.png', 'test/hole/000.png')
    assert list(name_files(same)) == ['good/000', 'hole/000']
    assert list(name_files(same[:1])) == ['000'] and list(name_files(same * 2)) == [
        'good/000',
        'hole/000',
    ]
    assert list(name_files(touch('a/x.png', 'a/x.jpg', 'a/y.v1.png'))) == ['x.png', 'x.jpg', 'y.v1']
    touch('test/.hidden/000.png', 'test/hole/._000.png', 'test/hole/notes.txt')
    assert (
        find_images([tmp_path / 'test'])
        == same
        == find_images([str(tmp_path / 'test/*/[0-9]*.png')])
    )
    with pytest.raises(ValueError, match='no images here'):
        find_images([tmp_path / 'a/*.bmp'])


def test_images_of_one_name_get_their_own_masks_and_scores(pills, score, tmp_path, capsys):
    "A mask belongs to the image of its own folder: good/000 and hole/000, in any order."
    images = sorted((pills / 'test').glob('*/*.png'))
    assert len({f.stem for f in images}) == 3 and len(images) == 6
    code, scores, maps, _ = score('anoclip', *images)
    assert code == 0 and sorted(scores) == sorted(
        f'{k}/00{n}' for k in ('good', 'hole') for n in range(3)
    )
    wanted = {
        m: np.asarray(Image.open(pills / 'ground_truth/hole' / f'{Path(m).name}_mask.png')) > 0
        if 'hole' in m
        else np.zeros((96, 96), bool)
        for m in scores
    }
    for m, t in wanted.items():
        np.save(
            tmp_path / 'out/maps' / f'{m}.npy', t.astype('f4')
        )  # perfect maps and scores, paired by name alone
    rows = list(csv.DictReader((tmp_path / 'out/scores.csv').open(newline='')))
    for r in rows:
        r['score'] = float('hole' in r['id'])
    for order, columns in (
        (rows, ('image', 'category', 'score', 'id')),
        (rows[::-1], ('image', 'score')),
    ):
        with (tmp_path / 'own.csv').open('w', newline='') as f:
            w = csv.DictWriter(f, columns, extrasaction='ignore')
            w.writeheader()
            w.writerows(order)
        for masks in (pills / 'ground_truth/hole', pills / 'ground_truth'):
            code, values, _ = evaluated(
                capsys,
                '--maps',
                tmp_path / 'out/maps',
                '--masks',
                masks,
                '--scores',
                tmp_path / 'own.csv',
            )
            assert (
                code == 0 and values['image_auroc'] == values['pixel_auroc'] == values['pro'] == 100
            )
    code, values, _ = evaluated(
        capsys, '--maps', tmp_path / 'out/maps/hole', '--masks', pills / 'ground_truth/hole'
    )
    assert code == 0 and values['pixel_auroc'] == 100


def test_names_that_repeat_are_refused(tmp_path):
    maps, here = ['good/000', 'hole/000'], tmp_path
    assert (
        pair_names('mask', ['000'], '/x/hole', maps, here)
        == {'hole/000': '000'}
        == pair_names('mask', ['000'], '/x/hole', maps[::-1], here)
    )
    with pytest.raises(ValueError, match='names repeat'):
        pair_names('mask', ['000'], '/x/masks', maps, here)
    with pytest.raises(ValueError, match='both fit the map 000: names repeat'):
        pair_names('mask', ['cut/000', 'hole/000'], '/x/ground_truth', ['000'], here)
    with pytest.raises(ValueError, match='without a map: hole/003'):
        pair_names('mask', ['hole/003'], '/x', maps, here)


SCORES = {
    'no row of a map': ('image,score\nx/good/000.png,1\n', 'no score for'),
    'a row without a map': (
        'image,score\ngood/000.png,1\nhole/000.png,2\ncut/000.png,3\n',
        'without a map',
    ),
    'names alone': ('image,score\n000.png,1\n001.png,2\n', 'names repeat'),
    'twice': ('image,score\ngood/000.png,1\ngood/000.png,2\nhole/000.png,3\n', 'several scores'),
    'no number': ('image,score\ngood/000.png,high\nhole/000.png,2\n', 'no number'),
    'nothing': ('', 'needs the columns'),
}


@pytest.mark.parametrize('what', SCORES)
def test_scores_that_do_not_fit_are_named(what, tmp_path):
    text, words = SCORES[what]
    (tmp_path / 's.csv').write_text(text)
    with pytest.raises(ValueError, match=words) as e:
        read_scores(tmp_path / 's.csv', ['good/000', 'hole/000'], tmp_path)
    assert 's.csv' in str(e.value)


def test_folders_of_kinds_and_masks_may_not_contradict_each_other(tmp_path, capsys):
    for m in ('good/0', 'hole/0', 'cut/0'):
        (tmp_path / 'maps' / m).parent.mkdir(parents=True)
        np.save(tmp_path / 'maps' / f'{m}.npy', np.random.rand(8, 8))

    def mask(f):
        return (tmp_path / f).parent.mkdir(parents=True, exist_ok=True) or Image.fromarray(
            np.eye(8, dtype='u1')
        ).save(tmp_path / f)

    mask('gt/hole/0_mask.png')
    command = ('--maps', tmp_path / 'maps', '--masks', tmp_path / 'gt')
    code, _, err = evaluated(capsys, *command)
    assert code == 2 and 'cut/0' in err and 'count as normal' in err
    mask('gt/cut/0_mask.png')
    assert evaluated(capsys, *command)[0] == 0
    mask('gt/good/0_mask.png')
    code, _, err = evaluated(capsys, *command)
    assert code == 2 and 'good/0' in err and 'normal images' in err


# ---- what is drawn, and how much is held


def test_an_image_has_one_score_wherever_it_stands(pills, score):
    "What is drawn for it does not depend on other images, their order or their folders."
    images = sorted((pills / 'test').glob('*/*.png'))
    _, batch, maps, _ = score('anoclip+', *images)
    _, reversed_order, _, _ = score('anoclip+', *images[::-1])
    _, alone, map_alone, _ = score('anoclip+', pills / 'test/hole/001.png', out='one')
    assert (
        reversed_order == batch
        and alone['001'] == batch['hole/001']
        and np.array_equal(map_alone['001'], maps['hole/001'])
    )
    _, again, other, _ = score(
        'anoclip+', pills / 'test/hole/001.png', out='two', more=('--seed', 1)
    )
    assert np.abs(other['001'] - map_alone['001']).max() > 0
    assert np.array_equal(
        score('anoclip+', pills / 'test/hole/001.png', out='one', more=('--seed', 0))[2]['001'],
        map_alone['001'],
    )


@pytest.mark.parametrize('method', ['anoclip', 'musc'])
def test_pictures_are_held_one_at_a_time(method, pills, score, monkeypatch, tmp_path):
    "However many images there are, decoded pictures do not pile up."
    import zsad.datasets.layouts

    load, alive, most = zsad.datasets.images.load_image, [], []

    def watched(path):
        image = load(path)
        gc.collect()
        alive[:] = [r for r in alive if r() is not None] + [weakref.ref(image)]
        most.append(len(alive))
        return image

    monkeypatch.setattr('zsad.cli.score.load_image', watched)
    gc.freeze()  # what was there before is not looked through 40 times
    (tmp_path / 'many').mkdir()
    for n in range(20):
        Image.fromarray(load(pills / 'test/hole/000.png') // (1 + n % 4)).save(
            tmp_path / 'many' / f'{n}.png'
        )
    try:
        code, scores, _, _ = score(method, tmp_path / 'many')
    finally:
        gc.unfreeze()
    assert code == 0 and len(scores) == 20 and len(most) == 40 and max(most) <= 2


def test_a_set_is_encoded_in_batches(pills, score, monkeypatch, tmp_path):
    from zsad.encoder.encoder import Encoder

    encode, sizes = Encoder.tokens, []
    monkeypatch.setattr(
        Encoder, 'tokens', lambda self, x, spec: (sizes.append(len(x)), encode(self, x, spec))[1]
    )
    (tmp_path / 'many').mkdir()
    for n in range(20):
        shutil.copy(pills / 'test/hole' / f'{n % 3:03}.png', tmp_path / 'many' / f'{n}.png')
    code, scores, maps, _ = score('musc', tmp_path / 'many')
    assert code == 0 and sizes == [16, 4] and scores['0'] == pytest.approx(scores['3'], abs=1e-5)


def test_overlays_share_the_scale_of_all_maps(tmp_path):
    rng = np.random.default_rng(0)
    maps = [rng.random((50, 60)).astype('f4') ** 3 * k for k in (1, 2, 5)]
    files = [tmp_path / f'{i}.npy' for i in range(3)]
    for f, m in zip(files, maps):
        np.save(f, m)
    assert shared_scale(files) == pytest.approx(map_range(maps), abs=2e-3)
    np.save(files[0], np.ones((4, 4)))
    low, high = shared_scale(files[:1])
    assert low == 1 < high


# ---- results that are there already


def test_a_second_run_replaces_the_first(pills, score, tmp_path):
    images = sorted((pills / 'test/hole').iterdir())
    score('anoclip', *images)
    (tmp_path / 'out/maps/._000.npy').write_bytes(b'junk')
    code, scores, _, printed = score('anoclip', *images[:2])
    assert (
        code == 0 and 'earlier run were replaced' in printed.out and list(scores) == ['000', '001']
    )
    for sub in ('maps', 'overlays'):
        assert [p.stem for p in sorted((tmp_path / 'out' / sub).iterdir())] == ['000', '001']
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == [
        'maps',
        'overlays',
        'scores.csv',
    ]


def test_a_run_without_images_replaces_nothing(pills, score, tmp_path):
    score('anoclip', *sorted((pills / 'test/hole').iterdir()))
    before = {p: p.read_bytes() for p in (tmp_path / 'out').rglob('*') if p.is_file()}
    (tmp_path / 'broken.png').write_text('no image')
    code, _, _, printed = score('anoclip', tmp_path / 'broken.png')
    assert code == 1 and 'no image could be scored' in printed.out
    code, _, _, printed = score('anoclip', tmp_path / 'nowhere.png')
    assert code == 2 and 'nowhere.png: no such file or folder; give' in printed.err
    assert {p: p.read_bytes() for p in (tmp_path / 'out').rglob('*') if p.is_file()} == before


def test_a_run_that_fails_leaves_the_first_alone(pills, score, tmp_path, monkeypatch):
    score('anoclip', *sorted((pills / 'test/hole').iterdir()))
    before = {p: p.read_bytes() for p in (tmp_path / 'out').rglob('*') if p.is_file()}

    def fail(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr('zsad.cli.score.write_overlays', fail)
    assert score('clip', pills / 'test/good/000.png')[0] == 130
    assert {p: p.read_bytes() for p in (tmp_path / 'out').rglob('*') if p.is_file()} == before


def test_maps_of_another_origin_are_not_touched(pills, score, tmp_path):
    (tmp_path / 'out/maps').mkdir(parents=True)
    np.save(tmp_path / 'out/maps/mine.npy', np.zeros((2, 2)))
    code, scores, _, printed = score('anoclip', pills / 'test/hole/000.png')
    assert (
        code == 2
        and scores == {}
        and 'mine.npy' in printed.err
        and 'another folder' in printed.err
        and [p.name for p in (tmp_path / 'out').iterdir()] == ['maps']
    )


def test_out_is_tried_before_anything_is_computed(pills, score, tmp_path, monkeypatch):
    monkeypatch.setattr(
        'zsad.cli.score.open_detector', lambda *a: pytest.fail('an encoder was loaded')
    )
    (tmp_path / 'out').write_text('')
    code = main(
        [
            'score',
            'anoclip',
            str(pills / 'test/hole/000.png'),
            '--category',
            'pill',
            '--out',
            str(tmp_path / 'out'),
        ]
    )
    assert code == 2


# ---- evaluate


def plain(tmp_path, size=8, **masks):
    for k in ('maps', 'masks'):
        (tmp_path / k).mkdir(exist_ok=True)
    for n, m in masks.items():
        np.save(tmp_path / 'maps' / f'{n}.npy', np.random.default_rng(0).random((size, size)))
        if m is not None:
            Image.fromarray(m).save(tmp_path / 'masks' / f'{n}_mask.png')
    return '--maps', tmp_path / 'maps', '--masks', tmp_path / 'masks'


def test_hidden_files_are_no_maps(tmp_path, capsys):
    command = plain(tmp_path, a=np.eye(8, dtype='u1'), b=None)
    before = evaluated(capsys, *command)
    assert before[0] == 0
    for f in (
        'maps/._a.npy',
        'masks/._a_mask.png',
        'maps/__MACOSX/a.npy',
        'maps/.ipynb_checkpoints/a.npy',
    ):
        (tmp_path / f).parent.mkdir(exist_ok=True)
        (tmp_path / f).write_bytes(b'junk')
    assert str(evaluated(capsys, *command)) == str(before)


def test_two_masks_of_one_name_are_refused(tmp_path, capsys):
    command = plain(tmp_path, a=np.eye(8, dtype='u1'))
    Image.fromarray(np.eye(8, dtype='u1')).save(tmp_path / 'masks/a.png')
    code, _, err = evaluated(capsys, *command)
    assert code == 2 and 'a.png' in err and 'a_mask.png' in err


def test_inverted_masks_are_refused_or_named(tmp_path, capsys):
    hole = np.full((8, 8), 255, 'u1')
    hole[3:5, 3:5] = 0
    code, _, err = evaluated(capsys, *plain(tmp_path, a=hole, b=hole))
    assert code == 2 and 'inverted' in err
    code, _, err = evaluated(capsys, *plain(tmp_path, b=255 - hole))
    assert code == 0 and 'inverted' in err and err.rstrip().endswith('a')


def test_a_defect_smaller_than_a_pixel_is_named_and_counts(tmp_path, capsys):
    "Of two masks at 64 px, one pixel is all that one marks; at 8 px it is one pixel of the truth."
    small = np.zeros((64, 64), 'u1')
    small[9, 9] = 255
    code, values, err = evaluated(capsys, *plain(tmp_path, a=small, b=None))
    assert (
        code == 0 and 'smaller than a pixel of 8x8' in err and not np.isnan(values['pixel_auroc'])
    )


# ---- options


def test_options_of_score(pills, score, tmp_path):
    image = pills / 'test/hole/000.png'
    code, _, maps, _ = score('anoclip', image, more=('--size', 64))
    assert code == 0 and maps['000'].shape == (64, 64)
    code, _, _, printed = score('anoclip', image, more=('--device', 'nonsense'))
    assert code == 2 and '--device nonsense' in printed.err
    code, _, _, printed = score('anoclip', image, more=('--artifact', tmp_path / 'none'))
    assert code == 2 and 'none' in printed.err
    code, _, _, printed = score('anoclip', image, more=('--seed', 3))
    assert code == 0 and 'draws nothing' in printed.err


# ---- training on what has no mask


def test_anomalous_images_without_masks_are_no_normal_pixels(
    pills, files, tmp_path, monkeypatch, capsys
):
    "Their pixels are in no loss, their labels are; with masks of all, nothing changes."
    from dataclasses import replace

    from zsad.datasets.loading import load_dataset
    from zsad.datasets.survey import scan_dataset
    from zsad.encoder.loading import load_encoder
    from zsad.learned.configs import CONFIGS, resolve_config
    from zsad.learned.train_set import load_train_set, make_batch
    from zsad.learned.trainable import LOSSES, TrainableModel

    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'c'))
    for c in ('full', 'bare'):
        shutil.copytree(pills, tmp_path / 'set' / c)
    shutil.rmtree(tmp_path / 'set/bare/ground_truth')
    enc = load_encoder(*files, device='cpu', dtype='float32')
    c = resolve_config(replace(CONFIGS['anomalyclip'], batch=4, loss_size=48), enc)
    ds = scan_dataset(load_dataset('folder', tmp_path / 'set'), 1)
    train_set = load_train_set(c, enc, ds)
    err = capsys.readouterr().err
    assert (
        err.count('\n') == 1
        and err.startswith('bare: 3 anomalous images without a mask are left out of the pixel loss')
        and 'bare/hole/000' in err
    )
    marked = [bool(s.mask) or not s.label for s in ds.dataset.samples]
    assert train_set.marked.tolist() == marked and marked.count(False) == 3
    trainable = TrainableModel(c, enc)

    def losses(rows, of=train_set):
        b = make_batch(of, rows, enc)
        return {
            k: v.item()
            for k, v in LOSSES[c.head](trainable, b, trainable.pairs(b.categories)).items()
        }

    whole, kept, bare = (
        range(len(marked)),
        [i for i, k in enumerate(marked) if k],
        [i for i, k in enumerate(marked) if not k],
    )
    assert losses(list(whole))['local'] == pytest.approx(
        losses(kept)['local'], rel=1e-5
    ) and losses(list(whole))['image'] != pytest.approx(losses(kept)['image'], rel=1e-5)
    assert losses(bare)['local'] == 0 and losses(bare)['image'] > 0
    assert losses(list(whole))['local'] != pytest.approx(
        losses(list(whole), replace(train_set, marked=None))['local'], rel=1e-5
    )
    load_train_set(c, enc, scan_dataset(load_dataset('folder', tmp_path / 'set/full'), 1))
    assert capsys.readouterr().err == ''

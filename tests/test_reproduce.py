"From a folder and a weights file to tables: the paper profile, on data and weights made here."

import csv
import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from zsad.cli.main import main
from zsad.encoder import store
from zsad.rendered.procad import render_procad
from zsad.reporting.tables import readable, table

CONFIG = dict(
    embed_dim=24,
    vision_cfg=dict(image_size=48, layers=3, width=64, head_width=32, patch_size=16),
    text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1),
)


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
    """An MVTec-shaped folder without anything MVTec does not have, and one finished run.

    The run has a configuration and weights of its own.
    """
    d = tmp_path_factory.mktemp('a bench')
    cache = tmp_path_factory.mktemp('cache')
    render_procad(('pill', 'wood'), good=3, bad=4, train=1, size=96, root=d / 'data', workers=1)
    (d / 'data' / 'dataset.json').unlink()
    shutil.rmtree(d / 'data' / 'pill' / 'foreground')
    (d / 'model.json').write_text(json.dumps(CONFIG))
    torch.manual_seed(1)  # other weights than those of the control
    save_file(
        {
            k: v.contiguous()
            for k, v in open_clip.CLIP(**CONFIG).state_dict().items()
            if k != 'attn_mask'
        },
        d / 'model.safetensors',
    )

    def run(*more, out='out'):
        with pytest.MonkeyPatch.context() as m:
            m.setenv('ZSAD_CACHE', str(cache))
            return main(
                [
                    'reproduce',
                    'anoclip-t3',
                    'vv-depth',
                    '--profile',
                    'paper',
                    '--data',
                    str(d / 'data'),
                    '--backbone',
                    str(d / 'model.json'),
                    '--weights',
                    str(d / 'model.safetensors'),
                    '--out',
                    str(d / out),
                    *more,
                ]
            )

    assert run() == 0
    return d, run, cache


def test_everything_is_written(bench):
    d, _, _ = bench
    for f in (
        'index.html',
        *(f'results/anoclip-t3/{n}.csv' for n in ('runs', 'metrics', 'defects', 'contrasts')),
        'results/vv-depth/metrics.csv',
        'figures/gallery.png',
        *(f'tables/{e}.{k}' for e in ('anoclip-t3', 'vv-depth') for k in ('csv', 'md', 'tex')),
        *(f'figures/{e}.{k}' for e in ('anoclip-t3', 'vv-depth') for k in ('png', 'svg')),
    ):
        assert (d / 'out' / f).stat().st_size > 0, f
    runs = list(csv.DictReader(open(d / 'out' / 'results' / 'anoclip-t3' / 'runs.csv')))
    assert (
        {r['dataset'] for r in runs} == {'mvtec'}
        and {r['encoder'] for r in runs} == {'model'}
        and all(
            r['weights']
            and r['data']
            and (r['dtype'], r['size'], r['device_kind']) == ('float32', '48', 'cpu')
            for r in runs
        )
    )
    assert str(d) not in (d / 'out' / 'results' / 'anoclip-t3' / 'runs.csv').read_text()


def test_what_cannot_be_run_is_missing_not_made_up(bench):
    d, _, _ = bench
    t = readable(table('anoclip-t3', d / 'out' / 'results'))
    assert (t.loc['foreground mask'] == 'missing').sum() > 4 and (
        t.loc['random weights'] != 'missing'
    ).all()
    depth = table('vv-depth', d / 'out' / 'results')
    assert list(depth.index) == [
        '0',
        '1',
        '2',
        '3',
        'random weights',
    ]  # the depths this encoder has, and the control that can be run


def test_kinds_of_defects_have_their_own_numbers(bench):
    """One kind of defect beside all normal images.

    Where a category has one kind only, that is the category's own number.
    """
    d, _, _ = bench
    rows = list(csv.DictReader(open(d / 'out' / 'results' / 'anoclip-t3' / 'defects.csv')))
    metrics = list(csv.DictReader(open(d / 'out' / 'results' / 'anoclip-t3' / 'metrics.csv')))
    kinds = {
        c: {p.name for p in (d / 'data' / c / 'test').iterdir()} - {'good'}
        for c in ('pill', 'wood')
    }
    assert {r['defect'] for r in rows} == kinds['pill'] | kinds['wood'] and {
        r['metric'] for r in rows
    } == {'image_auroc', 'pixel_auroc', 'pro'}
    run = next(r['row'] for r in rows if r['metric'] == 'image_auroc')
    both = {r['defect'] for r in rows if r['row'] == run and r['categories'] == '2'}
    assert (
        both == kinds['pill'] & kinds['wood']
        and sum(int(r['n']) for r in rows if r['row'] == run and r['metric'] == 'image_auroc') == 8
    )

    # four defective images of four kinds: the mean of their AUROCs is that of the category
    def by(m):
        return (
            sum(
                float(r['value']) * int(r['categories'])
                for r in rows
                if r['row'] == run and r['metric'] == m
            )
            / 8
        )

    def mean(m):
        return next(
            float(r['value'])
            for r in metrics
            if r['row'] == run and r['category'] == 'mean' and r['metric'] == m
        )

    assert abs(by('image_auroc') - mean('image_auroc')) < 1e-3


def test_depth_zero_is_plain_clip_and_full_depth_is_the_method(bench):
    d, _, _ = bench
    t3, depth = table('anoclip-t3', d / 'out' / 'results'), table('vv-depth', d / 'out' / 'results')

    def value(t, row):
        return t.loc[row, ('pixel AUROC', 'ours')]

    assert value(depth, '0') == value(t3, 'with QKV attention') and value(depth, '3') == value(
        t3, 'with V-V attention (multi-layer)'
    )
    assert value(depth, '0') != value(depth, '3')


def test_a_second_run_computes_nothing(bench, monkeypatch):
    d, run, cache = bench
    before = {
        p: p.stat().st_mtime_ns
        for p in (*cache.rglob('*.json'), *cache.rglob('*.safetensors'))
        if p.name != 'stream.json' and p.parent.name != 'inspections'
    }  # the first says when a stream was last used, the others grow when new files have settled
    assert any(p.suffix == '.safetensors' for p in before)
    monkeypatch.setattr(
        store, 'encode_images', lambda *a, **k: pytest.fail('an image was encoded again')
    )
    assert run(out='again') == 0  # tables, figures and gallery
    assert (d / 'again' / 'results' / 'anoclip-t3' / 'metrics.csv').read_text() == (
        d / 'out' / 'results' / 'anoclip-t3' / 'metrics.csv'
    ).read_text()
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_another_prompt_set_encodes_no_image(bench, monkeypatch):
    d, run, cache = bench
    seen, encode = [], store.encode_images

    def count(encoder, images, *a, **k):
        seen.extend(images)
        return encode(encoder, images, *a, **k)

    monkeypatch.setattr(store, 'encode_images', count)
    with monkeypatch.context() as m:
        m.setenv('ZSAD_CACHE', str(cache))
        assert (
            main(
                [
                    'reproduce',
                    'anoclip-t4',
                    '--profile',
                    'paper',
                    '--data',
                    str(d / 'data'),
                    '--backbone',
                    str(d / 'model.json'),
                    '--weights',
                    str(d / 'model.safetensors'),
                    '--out',
                    str(d / 't4'),
                ]
            )
            == 0
        )
    t = table('anoclip-t4', d / 't4' / 'results')
    assert seen == [] and t.loc[['Base', '+CS Prompt'], ('pixel AUROC', 'ours')].notna().all()


def test_both_sets_of_the_paper_in_their_own_layouts(bench, tmp_path, monkeypatch, capsys):
    """One folder with MVTec-AD and VisA as published fills both halves of Tables 1 and 2.

    --plan computes nothing.
    """
    from test_data import arrange_visa

    from zsad.datasets.loading import load_dataset

    d, _, _ = bench
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'c'))
    monkeypatch.setattr('zsad.cli.reproduce.write_gallery', lambda *a, **k: ())
    shutil.copytree(d / 'data', tmp_path / 'sets' / 'mvtec')
    arrange_visa(load_dataset('mvtec', d / 'data'), tmp_path / 'sets' / 'VisA_20220922')
    command = [
        'reproduce',
        'anoclip-t1',
        'anoclip-t2',
        '--profile',
        'paper',
        '--data',
        str(tmp_path / 'sets'),
        '--backbone',
        str(d / 'model.json'),
        '--weights',
        str(d / 'model.safetensors'),
        '--out',
        str(tmp_path / 'o'),
    ]
    assert main([*command, '--dry-run']) == 0 and not (tmp_path / 'o').exists()
    told = capsys.readouterr().out
    assert (
        'MVTec-AD: mvtec, 14 images' in told
        and 'VisA: visa, 14 images' in told
        and 'to do: 56 images to encode (0 stored)' in told
        and 'GB free' in told
    )
    assert main(command) == 0
    t = readable(table('anoclip-t1', tmp_path / 'o' / 'results'))
    for role in ('MVTec-AD', 'VisA'):
        assert (
            t.loc['AnoCLIP', f'{role}: PRO'][0].isdigit()
            and all(
                t.loc[l, f'{role}: PRO'][0].isdigit() for l in ('TransMM', 'WinCLIP', 'AnoCLIP+')
            )
            and t.loc['foreground mask', f'{role}: PRO'] == 'missing'
        )
    capsys.readouterr()
    assert (
        main([*command, '--dry-run']) == 0
        and 'to do: 0 images to encode' in capsys.readouterr().out
    )


@pytest.mark.slow
def test_visa_alone_runs_all_exhibits(bench, tmp_path, monkeypatch, capsys):
    from test_data import arrange_visa

    from zsad.datasets.loading import load_dataset

    d, _, _ = bench
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'c'))
    arrange_visa(load_dataset('mvtec', d / 'data'), tmp_path / 'visa')
    assert (
        main(
            [
                'reproduce',
                '--profile',
                'paper',
                '--data',
                str(tmp_path / 'visa'),
                '--backbone',
                str(d / 'model.json'),
                '--weights',
                str(d / 'model.safetensors'),
                '--out',
                str(tmp_path / 'o'),
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert 'MVTec-AD: not found' in told and 'not as published' in told and 'mvtec.com' in told
    t = readable(table('anoclip-t2', tmp_path / 'o' / 'results'))
    assert (
        t.loc['AnoCLIP', 'MVTec-AD: image AUROC'] == 'no data'
        and t.loc['AnoCLIP', 'VisA: image AUROC'][0].isdigit()
    )
    assert (
        set(table('vv-depth', tmp_path / 'o' / 'results')['pixel AUROC', 'ours'].isna()) == {True}
        and (tmp_path / 'o' / 'figures' / 'vv-depth.png').exists()
    )


def test_real_images_are_not_taken_for_the_rendered_ones(bench, tmp_path, capsys):
    d, _, _ = bench
    assert (
        main(['reproduce', 'anoclip-t3', '--data', str(d / 'data'), '--out', str(tmp_path / 'o')])
        == 2
    )
    assert 'not a rendered benchmark' in capsys.readouterr().err


def test_what_cannot_be_accepted_is_refused_before_it_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(['reproduce', 'anoclip-t3', '--accept', '--profile', 'paper', '--data', '.']) == 2
        and 'its own data' in capsys.readouterr().err
    )
    (tmp_path / 'c' / 'nbs').mkdir(parents=True)
    (tmp_path / 'c' / 'settings.ini').write_text('')
    monkeypatch.chdir(tmp_path / 'c')
    for more in (['--size', '96'], ['--seeds', '3'], ['--backbone', 'x']):
        assert (
            main(['reproduce', 'anoclip-t3', '--accept', *more]) == 2
            and f'leave {more[0]} out' in capsys.readouterr().err
        )
    monkeypatch.chdir(tmp_path)
    assert (
        main(['reproduce', '--accept', '--dry-run']) == 2
        and 'not inside a checkout' in capsys.readouterr().err
    )


@pytest.mark.parametrize('bad', ['empty', 'text', 'cube', 'columns', 'nowhere'])
def test_bad_maps_and_scores_are_named(bad, tmp_path, capsys):
    maps, masks, scores = tmp_path / 'maps', tmp_path / 'masks', tmp_path / 'scores.csv'
    maps.mkdir()
    masks.mkdir()
    np.save(maps / 'a.npy', np.random.rand(8, 8))
    np.save(maps / 'b.npy', np.random.rand(8, 8))
    scores.write_text('image,score\na.png,1\nb.png,2\n')
    from PIL import Image

    Image.fromarray(np.eye(8, dtype='u1')).save(masks / 'a_mask.png')
    command = ['evaluate', '--maps', str(maps), '--masks', str(masks), '--scores', str(scores)]
    assert main(command) == 0
    capsys.readouterr()
    if bad == 'empty':
        (maps / 'b.npy').write_bytes(b'')
    if bad == 'text':
        (maps / 'b.npy').write_text('text')
    if bad == 'cube':
        np.save(maps / 'b.npy', np.zeros((2, 8, 8)))
    if bad == 'columns':
        scores.write_text('file,value\na.png,1\n')
    if bad == 'nowhere':
        command[-1] = str(tmp_path / 'no.csv')
    assert main(command) == 2
    assert {'columns': 'scores.csv', 'nowhere': 'no.csv'}.get(
        bad, 'b.npy'
    ) in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_one_line(bench, tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'file' / 'cache'))
    assert (
        main(['reproduce', 'anoclip-t3', '--out', str(tmp_path / 'o')]) == 2
        and str(tmp_path / 'file') in capsys.readouterr().err
    )


def test_a_disk_that_is_too_small_is_an_error_before_it_starts(
    bench, tmp_path, monkeypatch, capsys
):
    d, _, _ = bench
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'c'))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda p: usage._replace(free=1000))
    assert (
        main(
            [
                'reproduce',
                'anoclip-t3',
                '--profile',
                'paper',
                '--data',
                str(d / 'data'),
                '--backbone',
                str(d / 'model.json'),
                '--weights',
                str(d / 'model.safetensors'),
                '--out',
                str(tmp_path / 'o'),
            ]
        )
        == 2
    )
    assert 'ZSAD_CACHE' in capsys.readouterr().err
    assert not (tmp_path / 'c' / 'runs').exists()  # no row was computed
    page = (tmp_path / 'o' / 'index.html').read_text()
    assert 'ended with an error' in page and 'refresh' not in page


def test_spoiled_files_are_named_counted_and_change_no_number(bench, tmp_path, monkeypatch, capsys):
    d, _, cache = bench
    monkeypatch.setattr('zsad.cli.reproduce.write_gallery', lambda *a, **k: ())
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'c'))
    shutil.copytree(d / 'data', tmp_path / 'data')
    test, truth = (
        next((tmp_path / 'data' / 'pill' / k).glob('[!g]*')) for k in ('test', 'ground_truth')
    )
    image, mask = next(test.glob('*.png')), next(truth.glob('*.png'))
    (test / 'text.png').write_text('no image')
    (test / 'empty.png').write_bytes(b'')
    (test / 'cut.png').write_bytes(image.read_bytes()[:300])
    shutil.copy(image, test / 'unmasked.png')
    shutil.copy(image, test / 'blank.png')
    for n in ('text', 'empty', 'cut'):
        shutil.copy(mask, truth / f'{n}_mask.png')
    from PIL import Image

    Image.new('L', Image.open(mask).size).save(truth / 'blank_mask.png')
    (test / '._junk.png').write_bytes(b'x')
    (test / 'Thumbs.db').write_bytes(b'x')
    assert (
        main(
            [
                'reproduce',
                'anoclip-t3',
                'vv-depth',
                '--profile',
                'paper',
                '--data',
                str(tmp_path / 'data'),
                '--backbone',
                str(d / 'model.json'),
                '--weights',
                str(d / 'model.safetensors'),
                '--out',
                str(tmp_path / 'o'),
            ]
        )
        == 0
    )
    err = capsys.readouterr().err
    assert (
        all(
            f'{n}' in err
            for n in ('text.png', 'empty.png', 'cut.png', 'unmasked', 'blank_mask.png')
        )
        and 'junk' not in err
    )
    assert (tmp_path / 'o' / 'results' / 'anoclip-t3' / 'metrics.csv').read_bytes() == (
        d / 'out' / 'results' / 'anoclip-t3' / 'metrics.csv'
    ).read_bytes()
    assert {
        r['left_out']
        for r in csv.DictReader(open(tmp_path / 'o' / 'results' / 'anoclip-t3' / 'runs.csv'))
    } == {'5'} and '5 files left out' in (tmp_path / 'o' / 'tables' / 'anoclip-t3.md').read_text()


def test_a_folder_is_checked_and_converted(bench, tmp_path, monkeypatch, capsys):
    d, _, _ = bench
    shutil.copytree(d / 'data', tmp_path / 'data')
    assert (
        main(['data', 'check', str(tmp_path / 'data'), '--name', 'mvtec']) == 0
        and 'expected 26 + 141' in capsys.readouterr().out
    )
    assert main(['data', 'convert', str(tmp_path / 'data')]) == 0
    meta = json.loads((tmp_path / 'data' / 'meta.json').read_text())
    assert {c: len(v) for c, v in meta['test'].items()} == dict(pill=7, wood=7)
    (tmp_path / 'data' / 'pill' / 'test' / 'good' / 'x.png').write_text('x')
    (tmp_path / 'data' / 'meta.json').unlink()
    assert (
        main(['data', 'check', str(tmp_path / 'data')]) == 1 and 'x.png' in capsys.readouterr().err
    )


def test_the_store_is_listed_verified_and_pruned(bench, tmp_path, monkeypatch, capsys):
    d, _, cache = bench
    shutil.copytree(cache, tmp_path / 'c')
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'c'))
    assert main(['store', 'list']) == 0 and 'vv depth 3' in capsys.readouterr().out
    assert main(['store', 'verify']) == 0
    shard = next((tmp_path / 'c' / 'tokens').glob('*/*.safetensors'))
    shard.write_bytes(shard.read_bytes()[:-1] + b'?')
    assert main(['store', 'verify']) == 1 and shard.name in capsys.readouterr().out
    assert (
        main(['store', 'prune']) == 0
        and shard.exists()
        and main(['store', 'prune', '--all']) == 0
        and not list((tmp_path / 'c' / 'tokens').iterdir())
    )


@pytest.mark.slow
def test_changed_weights_are_another_run(bench, tmp_path):
    d, run, _ = bench
    torch.manual_seed(1)
    save_file(
        {
            k: v.contiguous()
            for k, v in open_clip.CLIP(**CONFIG).state_dict().items()
            if k != 'attn_mask'
        },
        tmp_path / 'other.safetensors',
    )
    assert run('--weights', str(tmp_path / 'other.safetensors'), out='other') == 0
    a, b = (
        {
            r['run']
            for r in csv.DictReader(open(d / o / 'results' / 'anoclip-t3' / 'runs.csv'))
            if not r['control']
        }
        for o in ('out', 'other')
    )
    assert not a & b


@pytest.mark.slow
def test_a_new_outline_is_another_data_set(bench, tmp_path, monkeypatch):
    d, _, cache = bench
    monkeypatch.setattr('zsad.cli.reproduce.write_gallery', lambda *a, **k: ())
    monkeypatch.setenv('ZSAD_CACHE', str(cache))
    shutil.copytree(d / 'data', tmp_path / 'data')
    full = render_procad(
        ('pill', 'wood'), good=3, bad=4, train=1, size=96, root=tmp_path / 'again', workers=1
    )
    shutil.copytree(full / 'pill' / 'foreground', tmp_path / 'data' / 'pill' / 'foreground')
    assert (
        main(
            [
                'reproduce',
                'anoclip-t3',
                '--profile',
                'paper',
                '--data',
                str(tmp_path / 'data'),
                '--backbone',
                str(d / 'model.json'),
                '--weights',
                str(d / 'model.safetensors'),
                '--out',
                str(tmp_path / 'o'),
            ]
        )
        == 0
    )
    t = table('anoclip-t3', tmp_path / 'o' / 'results')
    assert t['pixel AUROC', 'within object'].notna().all()


@pytest.mark.parametrize('strip', ['masks', 'defects'])
def test_sets_without_masks_or_without_defects_end_with_a_report(
    bench, tmp_path, monkeypatch, strip
):
    d, _, _ = bench
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'c'))
    shutil.copytree(d / 'data', tmp_path / 'data')
    for c in ('pill', 'wood'):
        shutil.rmtree(tmp_path / 'data' / c / 'ground_truth')
        for k in (tmp_path / 'data' / c / 'test').iterdir():
            if strip == 'defects' and k.name != 'good':
                shutil.rmtree(k)
    assert (
        main(
            [
                'reproduce',
                'anoclip-t3',
                '--profile',
                'paper',
                '--data',
                str(tmp_path / 'data'),
                '--backbone',
                str(d / 'model.json'),
                '--weights',
                str(d / 'model.safetensors'),
                '--out',
                str(tmp_path / 'o'),
            ]
        )
        == 0
    )
    rows = list(csv.DictReader(open(tmp_path / 'o' / 'results' / 'anoclip-t3' / 'metrics.csv')))
    assert any(
        r['metric'] == 'pixel_auroc' and not r['value'] and r['why'] for r in rows
    ) and not any(r['metric'] == 'pro' and r['value'] for r in rows)
    assert any(r['metric'] == 'image_auroc' and r['value'] for r in rows) == (strip == 'masks')


def test_scores_meet_masks_in_mvtec_layout(bench, tmp_path, capsys):
    d, _, _ = bench
    test, truth = d / 'data' / 'pill' / 'test', d / 'data' / 'pill' / 'ground_truth'
    images = sorted(test.glob('*/000.png'))  # the same stem in every folder
    assert len(images) > 2
    assert (
        main(
            [
                'score',
                'anoclip',
                *map(str, images),
                '--category',
                'pill',
                '--out',
                str(tmp_path / 'o'),
            ]
        )
        == 0
    )
    assert {
        p.relative_to(tmp_path / 'o' / 'maps').with_suffix('')
        for p in (tmp_path / 'o' / 'maps').rglob('*.npy')
    } == {p.relative_to(test).with_suffix('') for p in images}
    (tmp_path / 'm').mkdir()
    shutil.copy(next(truth.glob('*/000_mask.png')), tmp_path / 'm' / '000_mask.png')
    command = [
        'evaluate',
        '--maps',
        str(tmp_path / 'o' / 'maps'),
        '--scores',
        str(tmp_path / 'o' / 'scores.csv'),
        '--masks',
    ]
    capsys.readouterr()
    assert main([*command, str(tmp_path / 'm')]) == 2 and 'names repeat' in capsys.readouterr().err
    one = next(p.parent.name for p in truth.glob('*/000_mask.png'))
    assert (
        main([*command, str(truth / one)]) == 2 and 'no mask for' in capsys.readouterr().err
    )  # other kinds would count as normal
    assert (
        main([*command, str(tmp_path / 'nowhere')]) == 2
        and 'no such folder' in capsys.readouterr().err
    )
    wanted = {f'{p.parent.name}/000_mask.png' for p in images if p.parent.name != 'good'}
    for m in wanted:
        (tmp_path / 'g' / m).parent.mkdir(parents=True)
        shutil.copy(truth / m, tmp_path / 'g' / m)
    assert main([*command, str(tmp_path / 'g')]) == 0


def test_what_is_missing_is_said(tmp_path, capsys):
    assert main(['reproduce', 'anoclip-t3', '--profile', 'paper', '--data', str(tmp_path)]) == 2
    assert 'no MVTec-shaped folder' in capsys.readouterr().err
    assert main(['reproduce', 'anoclip-t3', '--profile', 'paper']) == 2
    assert '--data' in capsys.readouterr().err


def test_size_and_device_reach_the_encoder_the_run_and_the_forecast(
    bench, tmp_path, monkeypatch, capsys
):
    "At 96 pixels a model of 48 has four times the patches; its runs are others and say their size."
    d, run, cache = bench
    assert run('--dry-run', '--size', '96') == 0
    told = capsys.readouterr().out
    assert (
        '96 px' in told and 'to do: 28 images to encode' in told
    )  # two encoders, nothing stored at this size
    assert run('--size', '96', '--device', 'cpu', out='large') == 0

    def rows(o):
        return list(csv.DictReader(open(d / o / 'results' / 'anoclip-t3' / 'runs.csv')))

    assert (
        {r['size'] for r in rows('large')} == {'96'}
        and {r['size'] for r in rows('out')} == {'48'}
        and not {r['run'] for r in rows('large')} & {r['run'] for r in rows('out')}
    )
    capsys.readouterr()
    assert run('--size', '0') == 2 and '--size 0' in capsys.readouterr().err
    assert run('--device', 'nowhere') == 2 and 'nowhere' in capsys.readouterr().err


def test_workers_respect_the_cores_of_the_process(monkeypatch):
    from zsad.cli.reproduce import worker_count

    monkeypatch.setattr('zsad.cli.reproduce.available_cores', lambda: 3)
    assert (
        worker_count(0, 'cpu') == 3 and worker_count(5, 'cpu') == 5 and worker_count(0, 'cuda') == 1
    )

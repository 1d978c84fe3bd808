"From a folder and a weights file to tables: the paper profile's code path, end to end, on data and weights made here."
import csv, json, shutil
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from zsad.cli import main
from zsad.procad import render_procad
from zsad.report import readable, read_results, table

CONFIG = dict(embed_dim=24, vision_cfg=dict(image_size=48, layers=3, width=64, head_width=32, patch_size=16), text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1))


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
    "An MVTec-shaped folder without anything MVTec does not have, a configuration and weights, and one finished run."
    d = tmp_path_factory.mktemp('a bench'); cache = tmp_path_factory.mktemp('cache')
    render_procad(('pill', 'wood'), good=3, bad=4, train=1, size=96, root=d/'data', workers=1)
    (d/'data'/'dataset.json').unlink(); shutil.rmtree(d/'data'/'pill'/'foreground')
    (d/'model.json').write_text(json.dumps(CONFIG))
    torch.manual_seed(0); save_file({k: v.contiguous() for k, v in open_clip.CLIP(**CONFIG).state_dict().items() if k != 'attn_mask'}, d/'model.safetensors')
    def run(*more, out='out'):
        with pytest.MonkeyPatch.context() as m:
            m.setenv('ZSAD_CACHE', str(cache))
            return main(['reproduce', 'anoclip-t3', 'vv-depth', '--profile', 'paper', '--data', str(d/'data'), '--backbone', str(d/'model.json'), '--weights', str(d/'model.safetensors'), '--out', str(d/out), *more])
    assert run() == 0
    return d, run, cache


def test_everything_is_written(bench):
    d, _, _ = bench
    for f in ('index.html', 'results/runs.csv', 'results/metrics.csv', 'results/contrasts.csv', 'figures/gallery.png', *(f'tables/{e}.{k}' for e in ('anoclip-t3', 'vv-depth') for k in ('csv', 'md', 'tex')),
              *(f'figures/{e}.{k}' for e in ('anoclip-t3', 'vv-depth') for k in ('png', 'svg'))):
        assert (d/'out'/f).stat().st_size > 0, f
    runs = list(csv.DictReader(open(d/'out'/'results'/'runs.csv')))
    assert {r['dataset'] for r in runs} == {'mvtec'} and {r['encoder'] for r in runs} == {'model'} and all(r['weights'] and r['data'] and r['dtype'] == 'float32' for r in runs)
    assert str(d) not in (d/'out'/'results'/'runs.csv').read_text()


def test_what_cannot_be_run_is_missing_not_made_up(bench):
    d, _, _ = bench
    t = readable(table('anoclip-t3', d/'out'/'results'))
    assert (t.loc['foreground mask'] == 'missing').sum() > 4 and (t.loc['random weights'] != 'missing').all()
    depth = table('vv-depth', d/'out'/'results')
    assert list(depth.index) == ['0', '1', '2', '3']                      # the depths this encoder has


def test_depth_zero_is_plain_clip_and_full_depth_is_the_method(bench):
    d, _, _ = bench
    t3, depth = table('anoclip-t3', d/'out'/'results'), table('vv-depth', d/'out'/'results')
    value = lambda t, row: t.loc[row, ('pixel AUROC', 'ours')]
    assert value(depth, '0') == value(t3, 'with QKV attention') and value(depth, '3') == value(t3, 'with V-V attention (multi-layer)')
    assert value(depth, '0') != value(depth, '3')


def test_a_second_run_computes_nothing(bench, monkeypatch):
    d, run, cache = bench
    import zsad.bench
    before = {p: p.stat().st_mtime_ns for p in cache.rglob('*.json')}
    monkeypatch.setattr(zsad.bench, 'encode_images', lambda *a, **k: pytest.fail('an image was encoded again'))
    monkeypatch.setattr('zsad.explore.write_gallery', lambda *a, **k: ())
    assert run(out='again') == 0
    assert (d/'again'/'results'/'metrics.csv').read_text() == (d/'out'/'results'/'metrics.csv').read_text()
    assert {p: p.stat().st_mtime_ns for p in cache.rglob('*.json')} == before


def test_batch_size_changes_nothing_that_is_printed(bench, tmp_path, monkeypatch):
    d, run, _ = bench
    monkeypatch.setattr('zsad.explore.write_gallery', lambda *a, **k: ())
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path))
    assert main(['reproduce', 'vv-depth', '--profile', 'paper', '--data', str(d/'data'), '--backbone', str(d/'model.json'), '--weights', str(d/'model.safetensors'), '--out', str(tmp_path/'o'), '--batch', '1']) == 0
    a, b = (table('vv-depth', read_results(p)) for p in (d/'out'/'results', tmp_path/'o'/'results'))
    assert np.allclose(a['pixel AUROC', 'ours'], b['pixel AUROC', 'ours'], atol=0.02)


def test_changed_weights_are_another_run(bench, tmp_path):
    d, run, _ = bench
    torch.manual_seed(1); save_file({k: v.contiguous() for k, v in open_clip.CLIP(**CONFIG).state_dict().items() if k != 'attn_mask'}, tmp_path/'other.safetensors')
    assert run('--weights', str(tmp_path/'other.safetensors'), out='other') == 0
    a, b = ({r['run'] for r in csv.DictReader(open(d/o/'results'/'runs.csv')) if not r['control']} for o in ('out', 'other'))
    assert not a & b


def test_a_new_outline_is_another_data_set(bench, tmp_path, monkeypatch):
    d, _, cache = bench
    monkeypatch.setattr('zsad.explore.write_gallery', lambda *a, **k: ()); monkeypatch.setenv('ZSAD_CACHE', str(cache))
    shutil.copytree(d/'data', tmp_path/'data')
    full = render_procad(('pill', 'wood'), good=3, bad=4, train=1, size=96, root=tmp_path/'again', workers=1); shutil.copytree(full/'pill'/'foreground', tmp_path/'data'/'pill'/'foreground')
    assert main(['reproduce', 'anoclip-t3', '--profile', 'paper', '--data', str(tmp_path/'data'), '--backbone', str(d/'model.json'), '--weights', str(d/'model.safetensors'), '--out', str(tmp_path/'o')]) == 0
    t = table('anoclip-t3', tmp_path/'o'/'results')
    assert t['pixel AUROC', 'within object'].notna().all()


@pytest.mark.parametrize('strip', ['masks', 'defects'])
def test_sets_without_masks_or_without_defects_end_with_a_report(bench, tmp_path, monkeypatch, strip):
    d, _, _ = bench
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path/'c')); shutil.copytree(d/'data', tmp_path/'data')
    for c in ('pill', 'wood'):
        shutil.rmtree(tmp_path/'data'/c/'ground_truth')
        for k in (tmp_path/'data'/c/'test').iterdir():
            if strip == 'defects' and k.name != 'good': shutil.rmtree(k)
    assert main(['reproduce', 'anoclip-t3', '--profile', 'paper', '--data', str(tmp_path/'data'), '--backbone', str(d/'model.json'), '--weights', str(d/'model.safetensors'), '--out', str(tmp_path/'o')]) == 0
    rows = list(csv.DictReader(open(tmp_path/'o'/'results'/'metrics.csv')))
    assert any(r['metric'] == 'pixel_auroc' and not r['value'] and r['why'] for r in rows) and not any(r['metric'] == 'pro' and r['value'] for r in rows)
    assert any(r['metric'] == 'image_auroc' and r['value'] for r in rows) == (strip == 'masks')


def test_scores_meet_masks_in_mvtec_layout(bench, tmp_path, capsys):
    d, _, _ = bench
    images = sorted((d/'data'/'pill'/'test').glob('*/000.png'))          # the same stem in every folder
    assert len(images) > 2
    assert main(['score', 'anoclip', *map(str, images), '--category', 'pill', '--out', str(tmp_path/'o')]) == 0
    (tmp_path/'m').mkdir(); shutil.copy(next((d/'data'/'pill'/'ground_truth').glob('*/000_mask.png')), tmp_path/'m'/'000_mask.png')
    assert main(['evaluate', '--maps', str(tmp_path/'o'/'maps'), '--masks', str(tmp_path/'m'), '--scores', str(tmp_path/'o'/'scores.csv')]) == 0
    assert main(['evaluate', '--maps', str(tmp_path/'o'/'maps'), '--masks', str(tmp_path/'nowhere')]) == 2
    assert 'no such folder' in capsys.readouterr().err


def test_what_is_missing_is_said(tmp_path, capsys):
    assert main(['reproduce', 'anoclip-t3', '--profile', 'paper', '--data', str(tmp_path)]) == 2
    assert 'no MVTec-shaped folder' in capsys.readouterr().err
    assert main(['reproduce', 'anoclip-t3', '--profile', 'paper']) == 2
    assert 'pass root=' in capsys.readouterr().err

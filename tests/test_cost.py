"What a measurement of costs counts and compares, whatever the speed of this machine."

import json
import math
import sys
from functools import partial
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import zsad.bench.timing
from zsad.bench.cost import dtype_ratio_rows, measure, read_cost, write_cost
from zsad.bench.encoding_cost import PATHS, flops_of, full_text, layer_shapes, noise_images
from zsad.bench.growth_cost import curve_rows, fitted_exponent, measure_curve, noise_batches
from zsad.bench.metrics_cost import category_maps, library_values, metric_times, pro_loop
from zsad.bench.peers_cost import musc_flops, musc_rows, open_clip_note, winclip_rows
from zsad.bench.timing import COST_COLUMNS, best_rate, cost_row, memory_rates, take_turns
from zsad.encoder.loading import load_encoder
from zsad.encoder.spec import AttentionPath, EncodeSpec
from zsad.evaluation.measure import evaluate
from zsad.evaluation.metrics import pro_field
from zsad.methods.prompt_sets import category_prompts
from zsad.pipeline.detector import build
from zsad.reporting.cost import SLOW, TARGETS, cost_caption, cost_table, targets
from zsad.reporting.cost_figures import FIGURES, cost_growth_figure

CONFIG = dict(
    embed_dim=24,
    vision_cfg=dict(image_size=48, layers=3, width=64, head_width=32, patch_size=16),
    text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1),
)


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp('a model') / 'model.json'
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope='module')
def encoder(config):
    return load_encoder(str(config), 'random:0', device='cpu', dtype='float32')


def test_flops_are_those_counted_by_hand(encoder):
    T, N, D, C = 10, 9, 64, 24
    block = (
        2 * T * D * 192 + 2 * T * D * 64 + 2 * T * D * 256 + 2 * T * 256 * D + 2 * (2 * T * T * D)
    )  # qkv, out_proj, MLP up, MLP down, q k' and the mix of v
    plain = (
        2 * N * 768 * D + 3 * block + 2 * T * D * C + 2 * N * D * C
    )  # patches, blocks, joint space: own tokens, then the patch tokens asked for
    assert flops_of(encoder, PATHS['plain']) == plain
    assert flops_of(encoder, PATHS['V-V']) == plain + 3 * (
        2 * (2 * T * T * D) + 2 * T * D * 64
    )  # one attention and one projection per block beside it
    assert layer_shapes(encoder, 2) == {
        'qkv': (20, 64, 192),
        'out_proj': (20, 64, 64),
        'mlp up': (20, 64, 256),
        'mlp down': (20, 256, 64),
    }


class Products(TorchFunctionMode):
    "Counts every matrix product that runs, 2 per multiply-add, from the shapes that go in."

    OTHERS = {
        'mm',
        'bmm',
        'addmm',
        'baddbmm',
        'einsum',
        'multi_head_attention_forward',
        '__rmatmul__',
        'mv',
        'tensordot',
    }

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.__name__
        if name == 'linear':  # [.., K] times [N, K]
            self.total += 2 * out.numel() * args[1].shape[1]
        elif name == 'conv2d':  # every output is a sum over one filter
            self.total += 2 * out.numel() * args[1][0].numel()
        elif name in ('matmul', '__matmul__'):  # [.., K] times [K, N]
            self.total += 2 * out.numel() * args[0].shape[-1]
        elif name == 'scaled_dot_product_attention':  # q k', and the mix of v
            q, k, v = args[:3]
            self.total += 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        assert name not in self.OTHERS, f'{name}: count it here as well'
        return out


def test_products_are_counted_by_shape():
    a, b = torch.ones(2, 3, 4), torch.ones(5, 4)
    with Products() as counter:
        F.linear(a, b)
        a @ b.T
        F.conv2d(torch.ones(1, 3, 8, 8), torch.ones(6, 3, 4, 4), stride=4)
        F.scaled_dot_product_attention(
            torch.ones(1, 2, 7, 4), torch.ones(1, 2, 9, 4), torch.ones(1, 2, 9, 4)
        )
    assert counter.total == 2 * (6 * 4 * 5) + 2 * (6 * 4 * 5) + 2 * (6 * 2 * 2 * 48) + 2 * (
        2 * 7 * 9 * (4 + 4)
    )


# Sizes of the encoder above: 10 tokens, 9 of them patches, width 64, joint space 24, MLP 256,
# three blocks.
ONE = (
    2 * 10 * 64 * 192
    + 2 * 10 * 64 * 64
    + 2 * 10 * 64 * 256
    + 2 * 10 * 256 * 64
    + 2 * 2 * 10 * 10 * 64
)  # a block: qkv, out_proj, MLP, attention
OWN = (
    2 * 9 * (3 * 16 * 16) * 64 + 3 * ONE + 2 * 10 * 64 * 24
)  # patches, blocks, all tokens to the joint space
READ = 2 * 9 * 64 * 24  # the patch tokens of one path after one block
ADD_V, ADD_VV, ADD_MLP = (
    2 * 10 * 64 * 64,
    2 * 10 * 64 * 64 + 2 * 2 * 10 * 10 * 64,
    4 * 10 * 64 * 256,
)  # beside a block: projection, attention, MLP
FIRST = (
    2 * 2 * 5 * 5 * 64 + 2 * 5 * 64 * 64 + 4 * 5 * 64 * 256
)  # a window of 5 tokens, q k v shared
MIDDLE = FIRST + 2 * 5 * 64 * 192
LAST = 2 * 5 * 64 * 192 + 2 * 2 * 5 * 64 + 2 * 64 * 64 + 4 * 64 * 256  # one query
WINDOWS = 2 * 9 * 768 * 64 + 2 * 10 * 64 * 192 + 4 * (FIRST + MIDDLE + LAST + 2 * 64 * 24)
BY_HAND = [
    (EncodeSpec((), windows=(2,)), OWN + WINDOWS),
    (PATHS['plain'], OWN + READ),
    (PATHS['V-V'], OWN + 3 * ADD_VV + READ),
    (
        EncodeSpec((AttentionPath('vv', 2), AttentionPath('vv', 1))),
        OWN + 2 * ADD_VV + 2 * READ,
    ),  # in the last block both share it
    (
        EncodeSpec((AttentionPath('v'), AttentionPath('v-mlp')), (0, 2)),
        OWN + ADD_V + ADD_MLP + 4 * READ,
    ),
    (EncodeSpec((AttentionPath('vv'),), stage='raw'), OWN + 3 * ADD_VV),
    (EncodeSpec((AttentionPath('vv', 0),), views='anovl'), 22 * OWN + READ),
]


@pytest.mark.parametrize('spec, by_hand', BY_HAND)
def test_flops_are_those_that_run(encoder, spec, by_hand):
    with Products() as counter:
        encoder.tokens(torch.zeros(1, 3, 48, 48), spec)
    assert flops_of(encoder, spec) == counter.total == by_hand


def test_the_cut_of_sentences_changes_nothing(encoder):
    texts = sum(category_prompts('winclip', 'bottle'), [])
    assert len(texts) == 242
    a, b = (F.normalize(t, dim=-1) for t in (encoder.embed_text(texts), full_text(encoder, texts)))
    assert a.shape == (242, 24) and (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize('kind', ['bottle', 'tile'])
def test_the_other_side_gives_the_same_values(kind):
    maps, masks, scores, labels = category_maps(kind, 4, 8, 128, 8)
    ours, theirs = (
        evaluate(maps, masks, scores, labels),
        library_values(maps, masks, scores, labels),
    )
    assert {k for k in ours if k not in ('pro', 'pro_field', 'why')} == set(theirs)
    for k, v in theirs.items():
        assert ours[k] == pytest.approx(v, abs=1e-9), k
    assert ours['pro_field'] == pytest.approx(
        pro_loop(maps, masks), abs=1e-9
    )  # the same thresholds, regions and pixels: only the order of sums differs


def test_the_loop_by_hand():
    "One mask of two regions, one of which touches at a corner only; nine of ten thresholds."
    mask = np.zeros((1, 4, 5), bool)
    mask[0, 0, 0] = mask[0, 1, 1] = mask[0, 3, 4] = True
    maps = np.zeros((1, 4, 5))
    maps[0, 0, 0], maps[0, 1, 1], maps[0, 3, 4], maps[0, 2, :2] = 1.0, 0.35, 0.6, (0.45, 0.15)
    # threshold .00: cover 1, FPR 2/17; .25: cover 1, FPR 1/17; .50: cover (1/2 + 1)/2, FPR 0;
    # .75: cover 1/4, FPR 0; over FPR stretched to [0, 1]: (1 + 1)/2/2 + (3/4 + 1)/2/2
    assert (
        pro_loop(maps, mask, steps=4)
        == pytest.approx(1 / 2 + 7 / 16)
        == pytest.approx(pro_field(maps, mask, steps=4))
    )


def test_tasks_take_turns():
    calls = []
    spent = take_turns(
        {k: lambda k=k: calls.append(k) for k in 'ab'}, least=1, most=3, seconds=1e9, warm=False
    )
    assert calls == ['a', 'b'] * 3 and all(len(v) == 3 and (v >= 0).all() for v in spent.values())


def test_rates_count_what_moves_and_medians(monkeypatch):
    def one_second(tasks, *others):
        return {k: np.ones(3) for k in tasks}

    monkeypatch.setattr(zsad.bench.timing, 'take_turns', one_second)
    rates = memory_rates(values=1000)
    assert {k: r.tolist() for k, r in rates.items()} == dict(copy=[8e3] * 3, triad=[12e3] * 3)
    assert best_rate(dict(a=np.array([1.0, 99.0, 2.0]), b=np.array([3.0, 3.0]))) == 3.0


def test_a_curve_stops_where_it_would_take_too_long_and_says_so(monkeypatch):
    calls = []

    def quadratic(tasks, *others):
        calls.append(tasks['it']())
        return {'it': np.array([1e-4 * calls[-1] ** 2])}

    monkeypatch.setattr('zsad.bench.growth_cost.take_turns', quadratic)
    tasks = ((n, partial(int, n)) for n in (10, 30, 100, 300, 1000))
    curve = measure_curve(tasks, 20.0, 1, 'cpu')
    assert curve[0] == calls == [10, 30, 100, 300] and curve[2] == 1000  # 1000 takes 100 s
    rows = curve_rows('it over images', 'images', curve, 20.0)
    assert rows[-1]['value'] == pytest.approx(2) and rows[-1]['part'] == 'exponent'
    assert rows[-1]['note'] == 'from 10 to 300 images; 1000 would take over 20 s'
    assert [r['at'] for r in rows[:-1]] == [10, 30, 100, 300]


def test_the_exponent_is_that_of_numpy():
    x, t = np.array([1.0, 2, 5, 9]), np.array([2.0, 5, 11, 31])
    (exponent, _), covariance = np.polyfit(np.log(x), np.log(t), 1, cov=True)
    assert fitted_exponent(x, t) == pytest.approx((exponent, math.sqrt(covariance[0, 0])))
    assert math.isnan(fitted_exponent(x[:2], t[:2])[1])


def test_batches_of_noise_are_different_images():
    batches = list(noise_batches(torch.rand(4, 3, 8, 8), 10))
    assert [len(b) for b in batches] == [4, 4, 2]
    assert len(torch.cat(batches).flatten(1).unique(dim=0)) == 10


FAKE_MSM = """
import torch
def MSM(Z, device, low, high):
    print('progress')
    d = torch.cdist(Z[:, None], Z[None]).amin(-1)
    far = torch.eye(len(Z)).bool()[:, :, None]
    d = d.masked_fill(far, 9).sort(1).values[:, :max(1, int(high * (len(Z) - 1)))]
    return d.mean(1).double()
"""
FAKE_LNAMD = """
import torch
import torch.nn.functional as F
class LNAMD:
    def __init__(self, device, r, feature_dim, feature_layer):
        self.r = r
    def _embed(self, features):
        out = []
        for f in features:
            z = F.layer_norm(f[:, 1:], f[:, 1:].shape[1:])
            side = int(z.shape[1] ** 0.5)
            z = F.avg_pool2d(z.mT.unflatten(2, (side, side)), self.r, 1, self.r // 2)
            out.append(z.flatten(2).mT)
        return torch.stack(out, 2)
"""
FAKE_WINCLIP = """
from types import SimpleNamespace
import open_clip, torch
BACKBONE = PRETRAINED = 'none'
class WinClipModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.clip = open_clip.create_model(BACKBONE, pretrained=PRETRAINED)
    def setup(self, category):
        self.category = category
    def forward(self, x):
        score = self.clip.encode_image(x).mean(1) + len(self.category)
        return SimpleNamespace(pred_score=score, anomaly_map=score[:, None, None] + 0 * x[:, 0])
"""


@pytest.fixture(scope='module')
def musc_code(tmp_path_factory):
    "A clone of MuSc that computes the same in other words."
    folder = tmp_path_factory.mktemp('musc')
    modules = folder / 'models' / 'modules'
    modules.mkdir(parents=True)
    (modules / '_MSM.py').write_text(FAKE_MSM)
    (modules / '_LNAMD.py').write_text(FAKE_LNAMD)
    return folder


def test_musc_takes_turns_with_its_code(encoder, musc_code):
    rows = {r['what']: r for r in musc_rows(encoder, musc_code, 6, 2, 0.0)}
    assert list(rows) == ['zsad', 'MuSc', 'ratio', 'largest difference']
    assert rows['largest difference']['value'] < 1e-4
    assert rows['MuSc']['peer'] == f'MuSc, torch {version("torch")}'
    ratio = rows['MuSc']['value'] / rows['zsad']['value']
    assert rows['zsad']['repeats'] == 2 and ratio > 0
    assert musc_flops(6, 9, 64, 3) == 3 * 15 * 2 * 9 * 9 * 64


def test_a_peer_that_ends_is_named(encoder, musc_code, tmp_path):
    modules = tmp_path / 'models' / 'modules'
    modules.mkdir(parents=True)
    (modules / '_MSM.py').write_text('raise ImportError("no tqdm here")')
    (modules / '_LNAMD.py').write_text(FAKE_LNAMD)
    with pytest.raises(ValueError, match='no tqdm here'):
        musc_rows(encoder, tmp_path, 4, 1, 0.0)


@pytest.fixture
def anomalib(tmp_path, monkeypatch):
    "An environment with a project that calls itself anomalib."
    folder = tmp_path / 'anomalib' / 'models' / 'image' / 'winclip'
    folder.mkdir(parents=True)
    (folder / 'torch_model.py').write_text(FAKE_WINCLIP)
    info = tmp_path / 'anomalib-2.7.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: anomalib\nVersion: 2.7.0\n')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    return sys.executable


def test_winclip_takes_turns_with_equal_weights_and_images(encoder, anomalib):
    rows = {r['what']: r for r in winclip_rows(encoder, anomalib, 2, 1, 0.0)}
    assert list(rows) == ['zsad', 'anomalib', 'ratio', 'largest difference']
    assert rows['anomalib']['peer'].startswith('anomalib 2.7.0, open_clip_torch ')
    ours = winclip_map(encoder)
    with torch.inference_mode():
        x = noise_images(encoder, 2)
        theirs = encoder.model.encode_image(x).mean(1).numpy()[:, None, None] + len('bottle')
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert rows['largest difference']['value'] == pytest.approx(worst, rel=1e-4)
    note = rows['largest difference']['note']
    assert (
        note == open_clip_note(dict(open_clip_torch=version('open_clip_torch'))) and 'wrong' in note
    )


def winclip_map(encoder):
    "Our maps of the images that the comparison reads."
    detector = build('winclip@code', {'bottle': 'object'}, encoder)
    return detector(noise_images(encoder, 2), ['bottle'] * 2).map.numpy()


def test_what_is_not_installed_is_named(encoder):
    rows = [
        *winclip_rows(encoder, None, 1, 1, 0.0),
        *musc_rows(encoder, None, 3, 1, 0.0),
        *metric_times(*category_maps('bottle', 2, 4, 48, 6), 1, 0.0),
    ]
    absent = {r['peer']: r['note'] for r in rows if not r['repeats']}
    assert set(absent) == {'anomalib', 'MuSc'}
    assert '--anomalib' in absent['anomalib'] and '--musc' in absent['MuSc']


@pytest.mark.parametrize(
    'peers, match', [(dict(anomalib='nowhere'), 'no Python'), (dict(musc='nowhere'), '_MSM.py')]
)
def test_peers_that_are_not_there_are_refused_before_anything_is_measured(peers, match):
    with pytest.raises(ValueError, match=match):
        measure(encoders=(('no such encoder', None),), **peers)


MACHINE = dict(cpu='A Processor', threads=2, flags='amx_bf16 avx2', torch='2.0', device='cpu')
MACHINE |= dict(encoder='ViT-B-16-plus-240 (random:0)', size=240)
GOOD = {
    'V-V encoding': ('encoding', 'V-V', 0.9),
    'WinCLIP': ('winclip', 'zsad', 0.9),
    'V-V over plain': ('encoding', 'V-V over plain', 1.15),
    'bfloat16 over float32': ('encoding', 'bfloat16 over float32', 1.7),
    'MuSc over its public code': ('musc', 'ratio', 3.0),
    'metrics over scikit-learn and the loop': ('metrics', 'ratio', 100.0),
    'AnoCLIP+ over AnoCLIP': ('methods', 'anoclip+ over anoclip', 1.3),
    'Dual over AnoCLIP': ('methods', 'dual over anoclip', 1.05),
    'prompts over full context': ('text', 'ratio', 5.0),
}


def made(**changes):
    "Invented rows at the bounds of all targets; changes: name of a target with _ -> value."
    rows = []
    for name, (part, what, value) in GOOD.items():
        value = changes.get(name, value)
        share = dict(share=value, limit=value) if value < 1 else {}
        rows.append(cost_row(part, what, [value], 'ratio', 'float32', 8, **share))
    return [{**r, **MACHINE} for r in rows]


def test_every_target_is_tested():
    assert [t.name for t in TARGETS] == list(GOOD)
    assert (targets(made()).state == 'held').all()


@pytest.mark.parametrize('name', GOOD)
def test_a_target_that_is_missed_is_said(tmp_path, name):
    target = next(t for t in TARGETS if t.name == name)
    worse = target.bound * (0.98 if target.at_least else 1.02)
    rows = pd.DataFrame(made(**{name: worse}))[list(COST_COLUMNS)]
    rows.to_csv(tmp_path / 'cost.csv', index=False)
    t = targets(tmp_path)
    assert t.name[t.state == 'missed'].tolist() == [name]
    text = cost_caption(tmp_path)
    assert '9 targets: 8 held, 1 missed.' in text and text.count(', missed') == 1
    assert 'A Processor, 2 threads (amx_bf16 avx2), torch 2.0.' in text
    table = cost_table(tmp_path)
    assert 'nan' not in table.to_csv().lower() and len(table) == len(GOOD)


def test_the_worst_encoder_counts():
    large = {**MACHINE, 'encoder': 'ViT-L-14-336-quickgelu (random:0)', 'size': 518}
    slow = {**cost_row('musc', 'ratio', [2.0], 'ratio', 'float32', 10), **large}
    t = targets([*made(), slow]).set_index('name')
    assert t.state['MuSc over its public code'] == 'missed'
    dear = {**cost_row('encoding', 'V-V over plain', [1.25], 'ratio', 'float32', 1), **large}
    assert (targets([*made(), dear]).state == 'held').all()  # a bound for ViT-B-16-plus-240


def test_bfloat16_is_not_applicable_without_instructions():
    rows = [r for r in made() if r['what'] != 'bfloat16 over float32']
    emulated = cost_row('encoding', 'bfloat16 over float32', [0.2], 'ratio', note=f'it has {SLOW}')
    t = targets([*rows, {**emulated, **MACHINE}]).set_index('name')
    assert t.state['bfloat16 over float32'].startswith('not applicable')
    assert (t.state.drop('bfloat16 over float32') == 'held').all()
    assert targets(rows).set_index('name').state['bfloat16 over float32'] == 'not measured'
    assert ', 1 not measured' in cost_caption(rows)


def test_types_are_compared_per_encoder():
    one = dict(encoder='one', size=240)
    rows = [
        {**cost_row('encoding', 'V-V', [v], 'ms/image', d), **dict(one, encoder=e)}
        for e, d, v in (('a', 'float32', 90.0), ('b', 'float32', 50.0), ('b', 'bfloat16', 25.0))
    ]
    (row,) = dtype_ratio_rows(rows)
    assert (row['encoder'], row['value']) == ('b', 2.0)


@pytest.fixture(scope='module')
def trial(config, musc_code, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trial')
    encoders = ((str(config), None),)
    write_cost(folder, encoders=encoders, device='cpu', quick=True, musc=musc_code)
    return folder


PARTS = 'memory gemm encoding text rows methods winclip musc metrics training growth exponent'


def test_a_trial_writes_one_tidy_file(config, trial):
    d = read_cost(trial)
    assert tuple(d.columns) == COST_COLUMNS and set(d.part) == set(PARTS.split())
    steps = d[d.part == 'training']
    assert len(steps) == 12 and (steps.value > 0).all()
    assert (steps[steps.unit == 'GiB'].limit == 16).all()
    assert not d.duplicated(['part', 'what', 'dtype', 'encoder', 'size', 'at']).any()
    taken = d[d.repeats > 0]
    assert taken.value.notna().all() and d[d.repeats == 0].value.isna().all()
    times = taken[taken.part != 'exponent']
    assert (times.lo <= times.value).all() and (times.value <= times.hi).all()
    assert str(config.parent) not in (trial / 'cost.csv').read_text()
    assert set(d.encoder) == {'', 'model (random:0)', 'mini (shipped)', 'mini (random:0)'}
    assert cost_caption(trial).startswith('A trial')


def test_figures_show_every_curve(trial):
    d = read_cost(trial)
    fig = cost_growth_figure(trial)
    drawn = [t.get_text() for ax in fig.axes for t in ax.get_legend().get_texts()]
    assert len(drawn) == d[d.part == 'exponent'].what.nunique() == 11
    assert all('exponent' in t for t in drawn)
    for draw in FIGURES.values():
        assert draw(trial).axes


def test_no_measurement_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match='zsad reproduce cost'):
        cost_table(tmp_path)

"What a measurement of costs counts and compares, whatever the speed of this machine."

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from zsad.bench.cost import read_cost, write_cost
from zsad.bench.encoding_cost import PATHS, flops_of, full_text, layer_shapes
from zsad.bench.metrics_cost import category_maps, library_values, pro_loop
from zsad.bench.timing import COST_COLUMNS, cost_row, take_turns
from zsad.encoder.loading import load_encoder
from zsad.encoder.spec import AttentionPath, EncodeSpec
from zsad.evaluation.measure import evaluate
from zsad.evaluation.metrics import pro_field
from zsad.methods.prompt_sets import category_prompts
from zsad.reporting.cost import cost_caption, cost_figure, cost_table, targets

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
BY_HAND = [
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


def made(share=0.5, vv=1.15, text=7.0, apart=1e-7, metrics=30.0, dtypes=('float32', 'bfloat16')):
    "Invented rows."
    machine = dict(
        cpu='A Processor',
        threads=2,
        flags='amx_bf16 avx2',
        torch='2.0',
        encoder='ViT-B-16-plus-240 (random:0)',
        device='cpu',
    )
    rows = [
        r
        for d in dtypes
        for r in (
            cost_row(
                'encoding', 'plain', [400.0, 410.0, 380.0], 'ms/image', d, 16, 400 * share, share
            ),
            cost_row('encoding', 'V-V', [400 * vv], 'ms/image', d, 16, 440 * share, share),
            cost_row('encoding', 'V-V over plain', [vv], 'ratio', d, 16, 1.12),
        )
    ]
    rows += [
        cost_row('text', 'ratio', [text], 'ratio', 'float32', 242),
        cost_row('text', 'largest difference', apart, 'entry of a unit vector', 'float32', 242),
        cost_row('metrics', 'ratio', [metrics], 'ratio', batch=83),
    ]
    return [{**r, **machine} for r in rows]


@pytest.mark.parametrize(
    'change, missed',
    [
        ({}, []),
        (dict(share=0.44), ['encoding']),
        (dict(vv=1.21), ['V-V']),
        (dict(text=4.9), ['text']),
        (dict(apart=2e-5), ['text']),
        (dict(metrics=19.0), ['metrics']),
        (dict(dtypes=('float32',)), ['encoding']),
        (dict(share=0.1, metrics=3.0), ['metrics', 'encoding']),
    ],
)
def test_what_missed_its_target_is_said_and_red(tmp_path, change, missed):
    pd.DataFrame(made(**change))[list(COST_COLUMNS)].to_csv(tmp_path / 'cost.csv', index=False)
    t = targets(tmp_path)
    assert (
        t.name.tolist() == ['metrics', 'text', 'encoding', 'V-V']
        and t.name[~t.held].tolist() == missed
    )
    text = cost_caption(tmp_path)
    assert (
        f'{4 - len(missed)} of 4 targets held' in text
        and 'A Processor, 2 threads (amx_bf16 avx2), torch 2.0.' in text
        and text.count(': missed') + text.count(': not measured') == len(missed)
    )
    red = [
        tuple(np.round(p.get_facecolor(), 2))
        for ax in cost_figure(tmp_path).axes
        for p in ax.patches
    ]
    assert any(r[0] > 0.7 for r in red) == bool(missed and 'dtypes' not in change)
    table = cost_table(tmp_path)
    assert (
        table.loc['metrics: ratio', 'median']
        == ('30' if 'metrics' not in change else f'{change["metrics"]:.0f}')
        and 'nan' not in table.to_csv().lower()
    )


def test_a_trial_writes_one_tidy_file(config, tmp_path):
    path = write_cost(tmp_path, backbone=str(config), device='cpu', quick=True)
    d = read_cost(tmp_path)
    assert (
        path.name == 'cost.csv'
        and tuple(d.columns) == COST_COLUMNS
        and set(d.part) == {'gemm', 'encoding', 'text', 'rows', 'metrics', 'training'}
    )
    steps = d[d.part == 'training']
    assert (
        len(steps) == 12
        and (steps.value > 0).all()
        and (steps[steps.unit == 'GiB'].limit == 16).all()
    )
    assert (
        not d.duplicated(['part', 'what', 'dtype']).any()
        and (d.lo <= d.value).all()
        and (d.value <= d.hi).all()
        and (d.repeats >= 1).all()
    )
    assert str(config.parent) not in path.read_text() and d.encoder.unique().tolist() == [
        'model (random:0)'
    ]
    assert cost_caption(tmp_path).startswith('A trial')


def test_no_measurement_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match='write_cost'):
        cost_table(tmp_path)

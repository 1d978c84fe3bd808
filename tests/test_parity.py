"""The encoder against open_clip and the written-out equations, head by head, on small weights.

Nothing is downloaded. The weights are sharpened (queries, keys and values x 3, random biases and
gains), so that attention is far from uniform and a wrong head, scale or path shows. The numbers in
ANOVL were computed by AnoVL's own code (commit 3a70bfd) on the same weights.
"""

import copy
import json
import math
import re

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from zsad.encoder.attention import anovl_views
from zsad.encoder.loading import load_encoder
from zsad.encoder.preprocessing import Preprocess
from zsad.encoder.spec import AttentionPath, EncodeSpec
from zsad.methods.clip_baseline import anomaly_score
from zsad.methods.prompt_sets import category_prompts
from zsad.pipeline.detector import build

VISION = dict(image_size=48, patch_size=16, layers=3, width=64, head_width=16)
TEXT = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2)
CONFIGS = dict(  # name: (vision, text, top level) on top of the above
    plain=({}, {}, {}),
    quick_gelu=({}, {}, dict(quick_gelu=True)),
    one_head=(dict(head_width=64), {}, {}),
    head_width_32=(dict(head_width=32), {}, {}),
    layer_scale=(dict(ls_init_value=0.1), dict(ls_init_value=0.1), {}),
    no_ln_pre=(dict(no_ln_pre=True), {}, {}),
    narrow_mlp=(dict(mlp_ratio=1.5), {}, {}),
    eps=(dict(norm_kwargs=dict(eps=1e-2)), dict(norm_kwargs=dict(eps=1e-2)), {}),
    patch_dropout=(dict(patch_dropout=0.5), {}, {}),
    custom_text=({}, {}, dict(custom_text=True)),
)


def config(vision={}, text={}, top={}):
    return dict(embed_dim=32, vision_cfg={**VISION, **vision}, text_cfg={**TEXT, **text}, **top)


def sharp(model, seed=0):
    "Weights under which no path is close to another."
    g = torch.Generator().manual_seed(seed)

    def noise(t):
        return torch.randn(t.shape, generator=g)

    def change(k, t):
        if k.endswith('in_proj_weight'):
            return 3 * t
        if k.endswith('bias'):
            return t + 0.2 * noise(t)
        if '.ln_' in k or k.startswith('ln_') or 'gamma' in k:
            return t * (1 + 0.3 * noise(t))
        return t.clone()

    return {k: change(k, t) for k, t in model.state_dict().items()}


@pytest.fixture(scope='module')
def make(tmp_path_factory):
    "Make an encoder of a small configuration with sharp weights; the weights are cached."
    root, done, made = tmp_path_factory.mktemp('parity'), {}, {}

    def f(name='plain', **kw):
        vision, text, top = CONFIGS[name] if isinstance(name, str) else name
        key = json.dumps([vision, text, top])
        if key not in done:
            cfg, at = config(vision, text, top), root / f'c{len(done)}'
            torch.manual_seed(0)
            m = (open_clip.CustomTextCLIP if top.get('custom_text') else open_clip.CLIP)(
                **{k: v for k, v in json.loads(json.dumps(cfg)).items() if k != 'custom_text'}
            )
            at.with_suffix('.json').write_text(json.dumps(cfg))
            torch.save(sharp(m), at.with_suffix('.pt'))
            done[key] = at
        request = (key, *sorted(kw.items()))
        if request not in made:
            made[request] = load_encoder(
                done[key].with_suffix('.json'),
                done[key].with_suffix('.pt'),
                **{'device': 'cpu', 'dtype': 'float32', **kw},
            )
        return made[request]

    return f


@pytest.fixture(scope='module')
def x():
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def gap(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item()


def unit(t):
    return t / t.norm(dim=-1, keepdim=True)


# --- CLIP's own path: open_clip is the judge


@pytest.mark.parametrize('name', CONFIGS)
@torch.inference_mode()
def test_class_token_is_encode_image(make, x, name):
    e = make(name)
    assert gap(e.encode(x).cls, unit(e.model.encode_image(x))) < 1e-5


@pytest.mark.parametrize('name', ['plain', 'quick_gelu', 'layer_scale', 'no_ln_pre'])
@torch.inference_mode()
def test_own_path_is_open_clips_stream_after_every_block(make, x, name):
    e = make(name)
    want = e.model.visual.forward_intermediates(x, output_fmt='NLC')['image_intermediates']
    assert gap(e.encode(x, 'qkv', layers='all', stage='raw').single, torch.stack(want)) < 1e-4
    assert (
        gap(e.encode(x, 'vv', depth=0, layers='all', stage='raw').single, torch.stack(want)) < 1e-4
    )


# --- local paths: the equations written out


def norm(n, t):
    return (
        (t - t.mean(-1, keepdim=True))
        / (t.var(-1, unbiased=False, keepdim=True) + n.eps).sqrt()
        * n.weight
        + n.bias
        if hasattr(n, 'weight')
        else t
    )


def act(t, quick):
    return t * torch.sigmoid(1.702 * t) if quick else 0.5 * t * (1 + torch.erf(t / math.sqrt(2)))


def scaled(s, t):
    return t * s.gamma if hasattr(s, 'gamma') else t


def mlp(b, t, quick):
    return scaled(
        b.ls_2,
        act(norm(b.ln_2, t) @ b.mlp.c_fc.weight.T + b.mlp.c_fc.bias, quick) @ b.mlp.c_proj.weight.T
        + b.mlp.c_proj.bias,
    )


def mixed(q, k, v, heads):
    "Attention of one image, one head and one query after another."
    d = q.shape[-1] // heads
    out = torch.zeros_like(v)
    for h in range(heads):
        s = slice(h * d, (h + 1) * d)
        for i in range(len(q)):
            a = torch.exp(k[:, s] @ q[i, s] / math.sqrt(d))
            out[i, s] = (a / a.sum()) @ v[:, s]
    return out


def slow(v, image, attention, depth, quick=False):
    "One image's local stream after every block, [L,1+N,D], in the order of the equations."
    p, D = v.patch_size[0], v.class_embedding.shape[0]
    cut = [
        image[:, r : r + p, c : c + p].double()
        for r in range(0, image.shape[1], p)
        for c in range(0, image.shape[2], p)
    ]
    z = norm(
        v.ln_pre,
        torch.stack(
            [
                v.class_embedding,
                *(torch.stack([(w * t).sum() for w in v.conv1.weight]) for t in cut),
            ]
        )
        + v.positional_embedding,
    )
    y, kept, blocks = None, [], v.transformer.resblocks
    for l, b in enumerate(blocks):
        if l == len(blocks) - depth:
            y = z
        Q, K, V = (
            norm(b.ln_1, z) @ b.attn.in_proj_weight[i * D : (i + 1) * D].T
            + b.attn.in_proj_bias[i * D : (i + 1) * D]
            for i in range(3)
        )

        def out(a):
            return scaled(b.ls_1, a @ b.attn.out_proj.weight.T + b.attn.out_proj.bias)

        z = z + out(mixed(Q, K, V, b.attn.num_heads))
        z = z + mlp(b, z, quick)
        if y is not None:
            y = y + out(mixed(V, V, V, b.attn.num_heads) if attention == 'vv' else V)
            if attention == 'v-mlp':
                y = y + mlp(b, y, quick)
        kept.append(z if y is None else y)
    return torch.stack(kept)


@pytest.mark.parametrize(
    'attention,depth',
    [('vv', 3), ('vv', 2), ('vv', 1), ('v', 1), ('v', 2), ('v-mlp', 1), ('v-mlp', 3)],
)
@pytest.mark.parametrize('name', ['plain', 'quick_gelu', 'layer_scale'])
@torch.inference_mode()
def test_local_paths_follow_the_equations(make, x, name, attention, depth):
    e = make(name)
    raw = e.encode(x, attention, depth, layers='all', stage='raw').single
    last = e.encode(x, attention, depth)
    v = copy.deepcopy(e.model.visual).double()
    want = slow(v, x[1], attention, depth, name == 'quick_gelu')
    assert gap(raw[:, 1], want[:, 1:]) < 1e-4
    assert gap(last.single[0, 1], unit(norm(v.ln_post, want[-1, 1:]) @ v.proj)) < 1e-5


@torch.inference_mode()
def test_paths_differ_and_defaults_are_all_blocks_and_the_last(make, x):
    e = make()
    p = {a: e.encode(x, a).single for a in ('qkv', 'vv', 'v', 'v-mlp')}
    for a in p:
        for b in p:
            assert a == b or gap(p[a], p[b]) > 0.05
    assert (
        torch.equal(p['vv'], e.encode(x, 'vv', 3).single)
        and torch.equal(p['v'], e.encode(x, 'v', 1).single)
        and torch.equal(p['v-mlp'], e.encode(x, 'v-mlp', 1).single)
    )


@torch.inference_mode()
def test_one_pass_for_many_paths_layers_images_is_the_same(make, x):
    e = make()
    paths = tuple(
        AttentionPath(a, d)
        for a, d in (('v-mlp', 2), ('qkv', None), ('vv', 2), ('v', 3), ('vv', 3))
    )
    t = e.tokens(x, EncodeSpec(paths, layers=(2, 0), views='anovl'))
    assert list(t.patches) == list(paths) and t.grid == (3, 3)
    for p in paths:
        alone = e.encode(x[2:], p.attention, p.depth, layers='all')
        assert gap(t.patches[p][:, 2:], alone.single[[2, 0]]) < 1e-5
        assert gap(t.cls[2:], alone.cls) < 1e-5
    one = e.tokens(x[1:2], EncodeSpec(views='anovl'))
    assert gap(t.views[1:2], one.views) < 1e-5 and gap(t.views[:, 0], t.cls) == 0


@torch.inference_mode()
def test_paths_that_resolve_to_the_same_do_not_shift_the_others(make, x):
    e = make()
    t = e.tokens(x, EncodeSpec((AttentionPath('vv'), AttentionPath('vv', 3), AttentionPath('qkv'))))
    assert gap(t.patches[AttentionPath('vv', 3)], e.encode(x, 'vv').single) < 1e-5
    assert gap(t.patches[AttentionPath('qkv')], e.encode(x, 'qkv').single) < 1e-5


# --- AnoVL: its numbers on the same weights

ANOVL = dict(
    patches=[
        0.6087141,
        0.5891069,
        0.4952245,
        0.5747073,
        0.5983461,
        0.5449494,
        0.5645526,
        0.6038918,
        0.5772771,
    ],
    cls=0.5524379,
    score=0.5298902,
)


def drawn(shapes, rng):
    "Weights that no version of torch can change."

    def one(k, s):
        n = rng.standard_normal(s)
        if '.ln_' in k or k.startswith('ln_'):
            return 0.2 * n + k.endswith('weight')
        if k.endswith('bias'):
            return 0.1 * n
        if k == 'proj':
            return n * s[0] ** -0.5
        return (
            0.3 * n
            if 'embedding' in k
            else n * (3 if 'in_proj' in k else 1) / np.sqrt(np.prod(s[1:]))
        )

    return {k: torch.tensor(one(k, shapes[k]), dtype=torch.float32) for k in sorted(shapes)}


@torch.inference_mode()
def test_numbers_of_anovls_own_code(make):
    e = make((dict(layers=12, width=128, head_width=64), dict(layers=1), {}))
    v, rng = e.model.visual, np.random.default_rng(2308)
    v.load_state_dict(drawn({k: tuple(t.shape) for k, t in v.state_dict().items()}, rng))
    x = torch.tensor(rng.standard_normal((1, 3, 48, 48)), dtype=torch.float32)
    pair = unit(torch.tensor(rng.standard_normal((2, 32)), dtype=torch.float32))
    t = e.tokens(x, EncodeSpec(views='anovl'))
    assert (
        gap(
            anomaly_score(next(iter(t.patches.values()))[0], pair)[0],
            torch.tensor(ANOVL['patches']),
        )
        < 5e-6
    )
    assert gap(anomaly_score(t.cls, pair)[0], torch.tensor(ANOVL['cls'])) < 5e-6
    assert gap(anomaly_score(t.views, pair).mean(), torch.tensor(ANOVL['score'])) < 5e-6


# --- text: cut or not

LONG = (
    'a close-up industrial photo of a metal_nut for visual inspection, seen from above, '
    'under bright light, on a dark table'
)
TEXTS = ['a photo', *(sum(category_prompts('winclip', 'metal_nut'), [])[::13]), LONG]


@pytest.mark.parametrize(
    'name',
    [
        'plain',
        'quick_gelu',
        'layer_scale',
        'eps',
        'custom_text',
        ({}, dict(context_length=16), {}),
        ({}, dict(proj_bias=True), {}),
        ({}, dict(qk_norm=True), {}),
        ({}, dict(pool_type='last'), dict(custom_text=True)),
        ({}, dict(embed_cls=True), dict(custom_text=True)),
        ({}, dict(pool_type='eos', eos_id=49407), {}),
        *(({}, dict(pool_type=p), {}) for p in ('last', 'first', 'eos')),
        *(({}, dict(no_causal_mask=True), top) for top in ({}, dict(custom_text=True))),
    ],
    ids=str,
)
@torch.inference_mode()
def test_text_is_open_clips_whatever_is_cut(make, name):
    e = make(name)
    want = e.model.encode_text(e.tokenizer(TEXTS))
    assert gap(unit(e.embed_text(TEXTS)), unit(want)) < 1e-5
    assert gap(unit(e.embed_text(TEXTS[:1])), unit(want[:1])) < 1e-5
    assert gap(e.embed_text(TEXTS[::-1]), e.embed_text(TEXTS).flip(0)) < 1e-5


# --- the whole of anoclip@code, written out


@torch.inference_mode()
def test_anoclip_code_from_pixels_to_map(make):
    e = make(interpolation='bilinear')
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    x = e.preprocess([image])
    assert x.shape == (1, 3, 48, 48)
    p = build('anoclip@code', ['carpet'], e)(x, ['carpet'])
    pair = torch.stack(
        [
            unit(
                torch.cat(
                    [e.model.encode_text(e.tokenizer(s[i : i + 66])) for i in range(0, len(s), 66)]
                ).mean(0)
            )
            for s in category_prompts('anoclip@code', 'carpet')
        ]
    )

    def score(t):
        return torch.softmax(t @ pair.T, -1)[..., 1]

    g = F.pad(score(e.encode(x).single[0, 0]).view(1, 1, 3, 3), (1, 1, 1, 1), mode='replicate')[
        0, 0
    ]
    mean = torch.stack(
        [torch.stack([g[r : r + 3, c : c + 3].mean() for c in range(3)]) for r in range(3)]
    )
    at = np.linspace(0, 2, 48)
    lo = np.minimum(at.astype(int), 1)
    f = at - lo
    w = np.zeros((48, 3))
    w[range(48), lo] += 1 - f
    w[range(48), lo + 1] += f
    assert gap(p.map[0], torch.tensor(w) @ mean.double() @ torch.tensor(w).T) < 5e-6
    views = torch.stack([unit(e.model.encode_image(v))[0] for v in anovl_views(x)])
    assert len(views) == 22 and gap(p.score[0], score(views).mean()) < 5e-6


def test_views_turn_about_the_centre_and_reflect_at_the_border():
    x = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(2))
    v = anovl_views(x)
    assert len(v) == 22 and all(t.shape == x.shape for t in v) and torch.equal(v[0], x)

    def sample(im, r, c):  # bilinear, borders reflected about the centres of the outer pixels
        r, c = (t % 16 if t % 16 <= 8 else 16 - t % 16 for t in (r, c))
        i, j = min(int(r), 7), min(int(c), 7)
        a, b = r - i, c - j
        return (
            (1 - a) * (1 - b) * im[:, i, j]
            + (1 - a) * b * im[:, i, j + 1]
            + a * (1 - b) * im[:, i + 1, j]
            + a * b * im[:, i + 1, j + 1]
        )

    def check(view, where):
        assert (
            max(
                gap(view[1, :, r, c], sample(x[1], *where(r - 4.0, c - 4.0)))
                for r in range(9)
                for c in range(9)
            )
            < 1e-4
        )

    for k, t in enumerate((-4, -3, -2, -1, 1, 2, 3, 4)):
        a = t * math.pi / 16
        check(
            v[1 + k],
            lambda r, c: (
                4 + math.sin(a) * c + math.cos(a) * r,
                4 + math.cos(a) * c - math.sin(a) * r,
            ),
        )
    for k, (a, b) in enumerate(
        [
            (0.2, 0.2),
            (-0.2, 0.2),
            (-0.2, -0.2),
            (0.2, -0.2),
            (0.1, 0.1),
            (-0.1, 0.1),
            (-0.1, -0.1),
            (0.1, -0.1),
        ]
    ):
        check(v[9 + k], lambda r, c: (4 + r + 4 * b, 4 + c + 4 * a))
    assert (
        torch.equal(v[17], x.flip(-1))
        and gap(
            v[18],
            (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None].expand(-1, 3, -1, -1),
        )
        < 1e-6
    )
    assert torch.equal(v[19].flip(-2).transpose(-2, -1), x) or torch.equal(
        v[19].transpose(-2, -1).flip(-2), x
    )
    assert torch.equal(v[20], x.flip(-1).flip(-2)) and torch.equal(v[21], v[19].flip(-1).flip(-2))


# --- dtypes, sizes, files


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('name', ['plain', 'quick_gelu', 'custom_text', 'no_ln_pre', 'layer_scale'])
@torch.inference_mode()
def test_half_precision_is_close(make, x, name, dtype):
    a, b = make(name), make(name, dtype=dtype)
    for p in ('qkv', 'vv', 'v-mlp'):
        s, t = a.encode(x, p), b.encode(x, p)
        assert (
            t.single.dtype == t.cls.dtype == torch.float32
            and gap(t.single.norm(dim=-1), torch.ones(1, 3, 9)) < 1e-5
        )
        assert (s.single * t.single).sum(-1).min() > 0.98 and (s.cls * t.cls).sum(-1).min() > 0.98
    assert (
        F.cosine_similarity(a.embed_text(TEXTS), b.embed_text(TEXTS)).min() > 0.96
    )  # sharp weights: rounding grows


@torch.inference_mode()
def test_another_size_resamples_positions_as_open_clip_does(make, tmp_path):
    e, big = make(), make(size=80)
    m = open_clip.CLIP(**config(dict(image_size=80)))
    torch.save(e.model.state_dict(), tmp_path / 'w.pt')
    open_clip.load_checkpoint(m, str(tmp_path / 'w.pt'))
    m.eval()
    x = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(3))
    assert (
        big.grid == (5, 5)
        and big.encode(x).single.shape == (1, 2, 25, 32)
        and big.preprocess([np.zeros((9, 9, 3), np.uint8)]).shape == (1, 3, 80, 80)
    )
    assert gap(big.model.visual.positional_embedding, m.visual.positional_embedding) < 1e-6
    assert gap(big.encode(x).cls, unit(m.encode_image(x))) < 1e-5
    other = make(size=80, positions='bilinear').model.visual.positional_embedding
    old = e.model.visual.positional_embedding
    assert (
        torch.equal(other[0], old[0])
        and gap(other[1:], big.model.visual.positional_embedding[1:]) > 1e-3
    )
    grid = other[1:].view(5, 5, -1)
    assert gap(grid[2, 2], old[1:].view(3, 3, -1)[1, 1]) < 1e-6  # the centre stays
    assert torch.equal(make(size=48).model.visual.positional_embedding, old)


@torch.inference_mode()
def test_files_of_weights(make, x, tmp_path):
    e = make()
    sd, want = e.model.state_dict(), e.encode(x).single
    c = tmp_path / 'c.json'
    c.write_text(json.dumps(config()))
    h = tmp_path / 'hf.json'
    h.write_text(
        json.dumps(
            dict(model_cfg=config(), preprocess_cfg=dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6]))
        )
    )

    def load(f, c=c, **k):
        return load_encoder(c, f, device='cpu', dtype='float32', **k)

    for i, o in enumerate(
        (
            sd,
            {'state_dict': sd, 'epoch': 3},
            {'state_dict': {f'module.{k}': v for k, v in sd.items()}},
        )
    ):
        torch.save(o, f := tmp_path / f'{i}.pt')
        assert (
            torch.equal(load(f).encode(x).single, want)
            and load(str(f)).weights == e.weights
            and load(f).source == f'{i}.pt'
        )
    save_file(sd, f := tmp_path / 'w.safetensors')
    assert torch.equal(load(f).encode(x).single, want)
    save_file({k: v.half() for k, v in sd.items()}, f := tmp_path / 'h.safetensors')
    assert (
        gap(load(f).encode(x).single, want) < 0.01
        and load(f).weights != e.weights
        and load(f).model.visual.proj.dtype == torch.float32
    )
    assert load(tmp_path / '0.pt', h).preprocess == Preprocess(
        48, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    ) and torch.equal(load(tmp_path / '0.pt', h).encode(x).single, want)
    a, b, repeated = (
        load_encoder(c, f'random:{s}', device='cpu', dtype='float32') for s in (1, 2, 1)
    )
    assert a.weights == repeated.weights != b.weights


# --- errors say what and where


@pytest.mark.parametrize(
    'vision,text,top,says',
    [
        (dict(attentional_pool=True, attn_pooler_heads=2), {}, {}, 'pools its patches'),
        (dict(pool_type='avg'), {}, {}, 'pools its patches'),
        (dict(qk_norm=True), {}, {}, 'extra norms'),
        (dict(block_type='custom'), {}, {}, 'extra norms'),
        (dict(image_size=[48, 64]), {}, {}, 'not square'),
        (dict(layers=[1, 1, 1, 1]), {}, {}, 'not a vision transformer'),
    ],
)
def test_towers_without_a_class_token_are_refused_by_name(tmp_path, vision, text, top, says):
    f = tmp_path / 'odd.json'
    f.write_text(json.dumps(config(vision, text, top)))
    with pytest.raises(ValueError, match=f"'odd'.*{says}"):
        load_encoder(f, 'random:0', device='cpu')


@pytest.mark.parametrize(
    'backbone,weights,error,says',
    [
        ('RN50', 'random:0', ValueError, "'RN50' is not a vision transformer"),
        ('ViT-B-16-SigLIP', 'random:0', ValueError, "'ViT-B-16-SigLIP' is not"),
        ('ViT-B-16-plus240', 'random:0', ValueError, 'ViT-B-16-plus-240'),
        ('nowhere.json', 'random:0', FileNotFoundError, 'nowhere.json'),
        ('ViT-B-16-plus-240', 'openai', FileNotFoundError, 'laion400m_e32'),
        ('ViT-B-16-plus-240', None, ValueError, 'laion400m_e31'),
    ],
)
def test_wrong_names_are_named(backbone, weights, error, says):
    with pytest.raises(error, match=re.escape(says)):
        load_encoder(backbone, weights, device='cpu')


def test_weights_that_do_not_fit_are_named(make, tmp_path):
    sd = make().model.state_dict()

    def attempt(o, vision={}):
        torch.save(o, tmp_path / 'mine.pt')
        (tmp_path / 'c.json').write_text(json.dumps(config(vision)))
        return load_encoder(tmp_path / 'c.json', tmp_path / 'mine.pt', device='cpu')

    for o, vision, says in (
        (sd, dict(width=32), 'class_embedding'),
        ({k: v for k, v in sd.items() if k != 'visual.proj'}, {}, 'visual.proj'),
        ({**sd, 'stray': torch.zeros(1)}, {}, 'stray'),
        (sd, dict(patch_size=8), 'visual.positional_embedding has 10 rows'),
        (sd, dict(ls_init_value=0.1), 'gamma'),
    ):
        with pytest.raises(ValueError, match=f"(?s)'mine.pt' do not fit.*{says}"):
            attempt(o, vision)


def test_unreadable_weights_are_not_called_a_misfit(make, tmp_path):
    (tmp_path / 'c.json').write_text(json.dumps(config({})))
    for name, data in (('a.safetensors', b'junk'), ('b.pt', b'<html>'), ('c.pt', b'')):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"'{name}' cannot be read"):
            load_encoder(tmp_path / 'c.json', tmp_path / name, device='cpu')


def test_wrong_batches_are_named(make, x):
    e = make()
    for bad in (x[:, :2], x[..., :-1], (x * 255).to(torch.uint8), x[0]):
        with pytest.raises(ValueError, match='x: need floats'):
            e.encode(bad)


def test_wrong_requests_are_named(make, x):
    e = make()
    for call, says in (
        (lambda: e.encode(x, 'kk'), "attention='kk'"),
        (lambda: e.encode(x, depth=4), 'depth=4'),
        (lambda: e.encode(x, depth=-1), 'depth=-1'),
        (lambda: e.encode(x, 'qkv', 2), 'depth=2'),
        (lambda: e.encode(x, layers=(3,)), 'blocks 0 to 2'),
        (lambda: e.encode(x, layers='some'), "layers='some'"),
        (lambda: e.encode(x, stage='end'), "stage='end'"),
        (lambda: make(size=15), 'size=15'),
        (lambda: make(interpolation='nearest'), "interpolation='nearest'"),
        (lambda: make(dtype='int8'), "dtype='int8'"),
        (lambda: e.preprocess([np.zeros((4, 4, 3))]), 'float64'),
        (lambda: e.preprocess([np.zeros((4, 4), np.uint8)]), r'\(4, 4\)'),
    ):
        with pytest.raises(ValueError, match=says):
            call()

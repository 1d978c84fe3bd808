"""Learned prompts against open_clip's own text tower run prompt by prompt, losses written out
pixel by pixel, and the numbers of AnomalyCLIP's code; nothing is downloaded.

NUMBERS were computed by AnomalyCLIP (commit 45ed4dd) on the weights, contexts and images that
`setup` draws: 6 vision blocks, the last 3 of them on its DPAM path, 5 text blocks of which 3 get
deep prompts, layers 2, 4 and 6 read out, maps of 60 pixels.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from test_parity import drawn

import zsad.learned.tensor_files as tensor_files
from zsad.encoder.attention import forward_paths, to_stage
from zsad.encoder.building import fit_positions
from zsad.encoder.encoder import Encoder
from zsad.encoder.loading import load_encoder
from zsad.encoder.preprocessing import Preprocess
from zsad.encoder.spec import AttentionPath, EncodeSpec
from zsad.encoder.text import plain_tokenizer
from zsad.learned.anomalyclip import add_layer_maps, dpam_path, image_token, state_maps
from zsad.learned.artifacts import load_artifact, save_artifact, text_weights
from zsad.learned.checkpoints import load_anomalyclip
from zsad.learned.losses import (
    dice_loss,
    focal_loss,
    global_loss,
    image_loss,
    kd_loss,
    knowledge_vectors,
    local_loss,
)
from zsad.learned.prompts import (
    PROMPT_RECIPES,
    LearnedPrompts,
    PromptRecipe,
    prompt_ids,
    start_prompts,
    text_of,
)
from zsad.learned.tensor_files import read_tensor_files, write_tensor_files
from zsad.learned.text_tower import clip_text_tower, embed_prompts, forward_text
from zsad.methods.clip_baseline import anomaly_score
from zsad.methods.prompts import encode_text

VISION = dict(image_size=96, patch_size=16, width=128, layers=6, head_width=64)
TEXT = dict(context_length=77, vocab_size=49408, width=128, heads=2, layers=5)
SMALL = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=3)
KNPL, AGNOSTIC = PROMPT_RECIPES['kanoclip'], PROMPT_RECIPES['anomalyclip']


def make(rng, text, vision=VISION, dim=32, **top):
    "An encoder with drawn weights."
    cfg = dict(
        embed_dim=dim,
        vision_cfg=dict(vision),
        text_cfg=dict(text),
        **{k: v for k, v in top.items() if k != 'custom_text'},
    )
    m = (
        (open_clip.CustomTextCLIP if top.get('custom_text') else open_clip.CLIP)(
            **json.loads(json.dumps(cfg))
        )
        .eval()
        .requires_grad_(False)
    )
    m.load_state_dict(drawn({k: tuple(t.shape) for k, t in m.state_dict().items()}, rng))
    return Encoder(
        m,
        'drawn',
        cfg,
        Preprocess(vision['image_size'], positions='bilinear'),
        plain_tokenizer(text['context_length']),
        'drawn',
        torch.float32,
        'cpu',
    )


CONFIGS = dict(
    plain={},
    quick_gelu=dict(quick_gelu=True),
    custom_text=dict(custom_text=True),
    layer_scale=dict(text={**SMALL, 'ls_init_value': 0.5}),
    narrow=dict(text={**SMALL, 'context_length': 24}),
    bias=dict(text={**SMALL, 'proj_bias': True}, custom_text=True),
)


@pytest.fixture(scope='module')
def small():
    "Small encoders by the name of their configuration, made once."
    made = {}

    def f(name='plain', seed=7):
        if (name, seed) not in made:
            made[name, seed] = make(
                np.random.default_rng(seed),
                **{
                    'text': SMALL,
                    'vision': {**VISION, 'width': 64, 'layers': 2},
                    'dim': 24,
                    **CONFIGS[name],
                },
            )
        return made[name, seed]

    return f


@pytest.fixture(scope='module')
def setup():
    "What the parity run drew, in its order, and the prompts in the format of its files."
    rng = np.random.default_rng(1810)
    e = make(rng, TEXT, quick_gelu=True)

    def normal(*s):
        return torch.tensor(rng.standard_normal(s), dtype=torch.float32)

    x, big = normal(2, 3, 96, 96), normal(1, 3, 144, 144)
    state = dict(ctx_pos=0.3 * normal(1, 1, 12, 128), ctx_neg=0.3 * normal(1, 1, 12, 128))
    deep = 0.5 * normal(3, 4, 128)
    mask, free = (
        torch.tensor(a, dtype=torch.float32)
        for a in (rng.random((2, 60, 60)) > 0.8, rng.random((2, 2, 60, 60)))
    )
    for side, words in (('pos', 'object.'), ('neg', 'damaged object.')):
        ids = e.tokenizer('X ' * 12 + words)
        rows = e.model.token_embedding(ids)[None]
        state |= {
            f'tokenized_prompts_{side}': ids[None].int(),
            f'token_prefix_{side}': rows[:, :, :1],
            f'token_suffix_{side}': rows[:, :, 13:],
        }
    for i in range(3):
        state |= {
            f'compound_prompts_text.{i}': deep[i],
            f'compound_prompt_projections.{i}.weight': torch.zeros(896, 128),
            f'compound_prompt_projections.{i}.bias': torch.zeros(896),
        }
    return SimpleNamespace(
        e=e, x=x, big=big, state=state, mask=mask, free=free, labels=torch.tensor([1, 0])
    )


def saved(tmp_path, state, name='epoch_15.pth'):
    torch.save({'prompt_learner': state}, tmp_path / name)
    return tmp_path / name


def gap(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a.double() - b.double()).abs().max().item()


def unit(t):
    return t / t.norm(dim=-1, keepdim=True)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair_of(learned, e, c='bottle'):
    return text_of(learned, e, [c])[c].class_embeddings.detach()


# --- recipes, towers, room


@pytest.mark.parametrize(
    'bad,says',
    [
        (dict(normal=('normal',)), r"normal=\('normal',\).*exactly one '\{\}'"),
        (dict(abnormal=()), 'abnormal'),
        (dict(normal='{} {}'), 'exactly one'),
        (dict(length=-1), 'length=-1.*0 or more'),
        (dict(length=2.0), 'length=2.0'),
        (dict(depth=0), 'depth=0.*1 or more'),
        (dict(deep=0), 'deep=0'),
        (dict(length=3, depth=2), 'deep=4.*length=3.*make deep smaller'),
    ],
)
def test_recipes_that_give_no_prompt_are_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        PromptRecipe(**bad)


def test_recipes_are_rows():
    assert PromptRecipe(['a {}'], 'b {}') == PromptRecipe(('a {}',), ('b {}',)) and hash(
        KNPL
    ) == hash(replace(KNPL))
    assert (
        AGNOSTIC.normal,
        AGNOSTIC.abnormal,
        AGNOSTIC.noun,
        AGNOSTIC.length,
        AGNOSTIC.depth,
        AGNOSTIC.deep,
        AGNOSTIC.std,
    ) == (('{}.',), ('damaged {}.',), 'object', 12, 9, 4, 0.02)
    assert (
        KNPL.length == 12
        and KNPL.depth == 1
        and KNPL.noun == ''
        and {'normal {}', 'perfect {}'} == set(KNPL.normal)
        and {'abnormal {}', 'defective {}'} == set(KNPL.abnormal)
    )


def test_other_text_towers_are_refused_by_name(small):
    e = small()
    for change, says in (
        (dict(pool_type='last'), "'last'"),
        (dict(no_causal_mask=True), 'no causal mask'),
        (dict(embed_cls=True, pool_type='argmax'), 'class token'),
        (dict(proj_type='none'), 'no projection'),
    ):
        m = open_clip.CustomTextCLIP(
            24,
            {**VISION, 'width': 64, 'layers': 1},
            {
                **SMALL,
                'vocab_size': 60,
                **change,
                **(dict(width=24, heads=2) if 'proj_type' in change else {}),
            },
        )
        with pytest.raises(ValueError, match=rf"backbone='siglip'.*{says}.*ViT-B-16-plus-240"):
            clip_text_tower(replace(e, model=m, backbone='siglip'))
    with pytest.raises(ValueError, match='text tower is Linear'):
        clip_text_tower(replace(e, model=SimpleNamespace(text=torch.nn.Linear(1, 1))))
    with pytest.raises(ValueError, match='tokenizer is function'):
        clip_text_tower(replace(e, tokenizer=lambda s: s))
    for f in (
        lambda b: start_prompts(KNPL, b),
        lambda b: text_of(start_prompts(KNPL, e), b, ['a']),
    ):
        with pytest.raises(ValueError, match="CLIP's own text tower"):
            f(replace(e, tokenizer=None))


@pytest.mark.parametrize('name,room', [('plain', 77), ('narrow', 24)])
def test_prompts_use_all_the_room_and_the_longest_is_named_when_it_is_not_enough(small, name, room):
    e = small(name)
    r = replace(KNPL, normal='normal {}', abnormal='abnormal {}')
    for K in (0, 12):
        most = room - 2 - K - 1  # two ends, one adjective; 'nut' is one token
        learned = start_prompts(replace(r, length=K), e)
        assert text_of(learned, e, ['nut ' * most])['nut ' * most].class_embeddings.isfinite().all()
        with pytest.raises(
            ValueError,
            match=rf"category '{'nut ' * (most + 1)}'.*{most + 2} tokens; with {K} learned.*"
            rf"makes {room + 1}.*reads {room}; shorten",
        ):
            text_of(learned, e, ['bottle', 'nut ' * (most + 1), 'cable'])
    with pytest.raises(ValueError, match=rf'at most length={room - 5}'):
        text_of(start_prompts(replace(r, length=room - 4), e), e, ['metal nut'])
    with pytest.raises(ValueError) as says:
        text_of(start_prompts(r, e), e, ['nut ' * 99])
    assert 'length=' not in str(says.value)  # no number of learned words would help


def test_categories_are_a_list(small):
    e = small()
    l = start_prompts(KNPL, e)
    for bad in ('bottle', [], ()):
        with pytest.raises(ValueError, match='at least one name'):
            text_of(l, e, bad)
    with pytest.raises(ValueError, match='category=3'):
        text_of(l, e, [3])


# --- through the tower: open_clip is the judge, one prompt at a time, all 77 places


def slowly(e, l, category):
    "Both states of a category, each prompt alone and uncut."
    r, m = l.recipe, getattr(e.model, 'text', e.model)
    T = len(m.attn_mask)
    out = []
    for side, words in (('normal', r.normal), ('abnormal', r.abnormal)):
        rows = []
        for s, w in enumerate(words):
            ids = [
                i
                for i in e.tokenizer(w.replace('{}', (r.noun or category).replace('_', ' ')))[
                    0
                ].tolist()
                if i
            ]
            c = l.tensors[side][0 if r.shared else s].detach()
            h = (
                torch.cat(
                    [
                        m.token_embedding(torch.tensor(ids[:1])),
                        c,
                        m.token_embedding(torch.tensor(ids[1:])),
                        torch.zeros(T - len(ids) - len(c), c.shape[1]),
                    ]
                )[None]
                + m.positional_embedding
            )
            for b, block in enumerate(m.transformer.resblocks):
                if 1 <= b < r.depth:
                    h = h.clone()
                    h[0, 1 : 1 + r.deep] = l.tensors['deep'][b - 1].detach()
                h = block(h, attn_mask=m.attn_mask)
            v = m.ln_final(h)[0, len(c) + len(ids) - 1]
            rows.append(
                m.text_projection(v)
                if isinstance(m.text_projection, torch.nn.Linear)
                else v @ m.text_projection
            )
        out.append(torch.stack(rows))
    return out


RECIPES = dict(
    knpl=KNPL,
    separate=replace(KNPL, shared=False, length=5),
    deep=replace(KNPL, length=6, depth=3, deep=2),
    agnostic=replace(AGNOSTIC, depth=3),
    uneven=PromptRecipe(('{}', 'good {}', 'fine {} here'), 'bad {}', length=3, depth=2, deep=3),
)


@pytest.mark.parametrize('name', [n for n in CONFIGS if n != 'narrow'])
@pytest.mark.parametrize('recipe', RECIPES)
def test_texts_are_those_of_single_uncut_prompts(small, name, recipe):
    e = small(name)
    l = start_prompts(replace(RECIPES[recipe], std=0.3), e, seed=3)
    with torch.no_grad():
        texts = text_of(l, e, ['bottle', 'metal_nut', 'a very long name of a thing'])
        for c, t in texts.items():
            want = slowly(e, l, c)
            assert gap(t.class_embeddings, unit(torch.stack([w.mean(0) for w in want]))) < 2e-5
            for a, b in zip(t.prompt_embeddings, want):
                assert gap(a, unit(b)) < 2e-5
            assert [len(a) for a in t.prompt_embeddings] == [
                len(l.recipe.normal),
                len(l.recipe.abnormal),
            ]
    assert (
        texts['bottle'].class_embeddings.dtype == torch.float32
        and gap(texts['bottle'].class_embeddings.norm(dim=-1), torch.ones(2)) < 1e-6
    )


def test_company_changes_nothing_and_a_noun_serves_all(small):
    e = small()
    l = start_prompts(KNPL, e)
    names = ['bottle', 'a long name of some part', 'cable', 'bottle']
    all_of = text_of(l, e, names)
    assert list(all_of) == ['bottle', 'a long name of some part', 'cable']
    for c in set(names):
        assert gap(all_of[c].class_embeddings, text_of(l, e, [c])[c].class_embeddings) < 1e-6
    assert gap(all_of['bottle'].class_embeddings, all_of['cable'].class_embeddings) > 0.01
    one = text_of(start_prompts(replace(AGNOSTIC, depth=2), e), e, names)
    assert set(one) == set(names) and one['bottle'] is one['cable']
    assert (
        gap(
            text_of(l, e, ['metal_nut'])['metal_nut'].class_embeddings,
            text_of(l, e, ['metal nut'])['metal nut'].class_embeddings,
        )
        == 0
    )


@pytest.mark.parametrize('name', CONFIGS)
def test_no_learned_words_or_a_phrase_give_the_hand_written_sentence(small, name):
    e = small(name)
    for front, K in (('', 0), ('a photo of a', 4), ('picture', 1)):
        for depth in (1, 2, 3)[: 3 if K else 1]:
            l = start_prompts(
                replace(KNPL, length=K, start=front, depth=depth, deep=min(2, max(K, 1))), e
            )
            for c, t in text_of(l, e, ['bottle', 'metal_nut']).items():
                hand = encode_text(
                    e,
                    tuple(
                        [f'{front} {s.replace("{}", c.replace("_", " "))}' for s in side]
                        for side in (KNPL.normal, KNPL.abnormal)
                    ),
                    c,
                )
                vectors = [t.class_embeddings, *t.prompt_embeddings]
                for a, b in zip(
                    vectors, [hand.class_embeddings, *hand.prompt_embeddings], strict=True
                ):  # unit vectors in float32: 1e-5 is 170 roundings
                    assert gap(a.detach(), b) < 1e-5, (front, depth)
    with pytest.raises(
        ValueError, match="start='a photo of a' has 4 tokens and length=12; make them equal"
    ):
        start_prompts(replace(KNPL, start='a photo of a'), e)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_towers_read_learned_prompts(dtype):
    e, exact = (load_encoder('mini', device='cpu', dtype=d) for d in (dtype, 'float32'))
    hand = encode_text(e, ('a photo of a normal bottle', 'a photo of a abnormal bottle'), 'bottle')
    for depth, near in (
        (1, 1e-6),
        (3, 2e-3),
    ):  # the phrase alone and within a sentence may round apart
        l = start_prompts(
            replace(
                KNPL,
                normal='normal {}',
                abnormal='abnormal {}',
                length=4,
                start='a photo of a',
                depth=depth,
            ),
            e,
        )
        t = text_of(l, e, ['bottle'])['bottle']
        assert (
            t.class_embeddings.dtype == torch.float32
            and gap(t.class_embeddings.detach(), hand.class_embeddings) < near
        )
    t.class_embeddings[1].sum().backward()
    assert (
        l.tensors['abnormal'].grad.isfinite().all() and l.tensors['abnormal'].grad.abs().max() > 0
    )
    assert text_weights(e) == text_weights(exact) and (e.weights != exact.weights) == (
        dtype == 'bfloat16'
    )  # the shipped weights are halves


def test_deep_prompts_take_the_first_places_of_their_blocks(small):
    e = small()
    r = replace(KNPL, length=6, depth=3, deep=2, std=0.3)
    l = start_prompts(r, e)
    t = getattr(e.model, 'text', e.model)
    h, _ = embed_prompts(
        t, prompt_ids(e, r, ['bottle']), l.tensors['normal'].detach().expand(4, -1, -1)
    )
    plain, deep = forward_text(t, h), forward_text(t, h, l.tensors['deep'].detach())
    assert torch.equal(plain[0], deep[0]) and len(deep) == 3  # block 1 is as before
    assert (
        gap(plain[1][:, 0], deep[1][:, 0]) == 0 and gap(plain[1][:, 1:3], deep[1][:, 1:3]) > 0.1
    )  # the start token sees only itself
    same = torch.stack([s[0, 1:3] for s in plain[:2]])  # what the tower makes of them anyway
    assert all(gap(a, b) < 1e-6 for a, b in zip(plain, forward_text(t, h, same)))
    alone = text_of(
        LearnedPrompts(replace(r, depth=2), {**l.tensors, 'deep': l.tensors['deep'][:1]}),
        e,
        ['bottle'],
    )['bottle'].class_embeddings
    assert gap(alone, text_of(l, e, ['bottle'])['bottle'].class_embeddings) > 1e-3
    with pytest.raises(ValueError, match='depth=4: this text tower has 3 blocks; choose 1 to 3'):
        start_prompts(replace(r, depth=4), e)


def test_draws_are_keyed(small):
    e = small()
    l = start_prompts(replace(AGNOSTIC, depth=3), e, 5)
    assert {k: tuple(t.shape) for k, t in l.tensors.items()} == dict(
        normal=(1, 12, 16), abnormal=(1, 12, 16), deep=(2, 4, 16)
    )
    again, other, flat = (
        start_prompts(replace(AGNOSTIC, depth=3), e, 5),
        start_prompts(replace(AGNOSTIC, depth=3), e, 6),
        start_prompts(replace(AGNOSTIC, depth=1), e, 5),
    )
    for k, t in l.tensors.items():
        assert (
            torch.equal(t, again.tensors[k])
            and not torch.equal(t, other.tensors[k])
            and t.is_leaf
            and t.requires_grad
            and t.dtype == torch.float32
        )
    assert 'deep' not in flat.tensors and torch.equal(flat.tensors['normal'], l.tensors['normal'])
    assert not torch.equal(l.tensors['normal'], l.tensors['abnormal'])
    wide = start_prompts(replace(KNPL, length=40, shared=False), e).tensors['normal']
    assert (
        wide.shape == (2, 40, 16)
        and abs(wide.std().item() - 0.02) < 0.001
        and abs(wide.mean().item()) < 0.002
    )
    phrase = start_prompts(replace(KNPL, length=1, start='picture', shared=False), e).tensors
    assert (
        phrase['normal'].shape == (2, 1, 16)
        and torch.equal(phrase['normal'][0], phrase['abnormal'][1])
        and phrase['normal'].data_ptr() != phrase['abnormal'].data_ptr()
    )


def test_gradients_reach_what_is_learned_and_nothing_else(small):
    e = small()
    r = replace(KNPL, length=6, depth=3, deep=2, shared=False)
    l = start_prompts(r, e)
    before = {k: t.clone() for k, t in e.model.state_dict().items()}
    text_of(l, e, ['bottle', 'cable'])['cable'].prompt_embeddings[1][
        0
    ].sum().backward()  # the first anomalous prompt alone
    g = {k: t.grad.abs().amax((1, 2)) for k, t in l.tensors.items()}
    assert (
        g['normal'].max() == 0
        and g['abnormal'][0] > 0
        and g['abnormal'][1] == 0
        and (g['deep'] > 0).all()
    )
    assert all(p.grad is None for p in e.model.parameters()) and all(
        torch.equal(before[k], t) for k, t in e.model.state_dict().items()
    )
    with torch.no_grad():  # the gradient is that of finite differences
        way, c, f = (
            unit(noise(6 * 16)).view(6, 16),
            l.tensors['abnormal'],
            lambda: text_of(l, e, ['cable'])['cable'].prompt_embeddings[1][0].sum().item(),
        )
        c[0] += 1e-2 * way
        up = f()
        c[0] -= 2e-2 * way
        down = f()
    assert abs((up - down) / 2e-2 - (c.grad[0] * way).sum().item()) < 2e-2 * c.grad[0].norm().item()


# --- knowledge


def test_knowledge_is_the_mean_of_sentences_as_they_leave_the_tower(small):
    e = small()
    sentences = dict(
        bottle=[
            'a cracked bottle',
            'a bottle with a broken neck',
            'the bottle has a dark stain near the rim',
        ],
        cable=['a cut wire'],
    )
    k = knowledge_vectors(e, sentences)
    for c, rows in sentences.items():
        want = unit(sum(e.embed_text([s])[0] for s in rows) / len(rows))
        assert gap(k[c], want) < 1e-5 and not k[c].is_inference()
    for bad in (dict(bottle=[]), dict(bottle='a cracked bottle')):
        with pytest.raises(ValueError, match="'bottle' has no list.*leave the category out"):
            knowledge_vectors(e, {'cable': ['cut'], **bad})


def test_knowledge_loss_pulls_the_anomalous_prompt_and_pushes_the_normal_one():
    pair, k = 3 * noise(5, 2, 8), 2 * noise(5, 8, seed=1)
    d = [[float((unit(k[i]) - unit(pair[i, s])).norm()) for s in (0, 1)] for i in range(5)]
    for margin in (0.0, 0.3, -0.2):
        assert (
            abs(kd_loss(pair, k, margin).item() - sum(max(0, a - n + margin) for n, a in d) / 5)
            < 1e-6
        )
    n, a, m = (unit(t.mean(0)) for t in (pair[:, 0], pair[:, 1], k))
    assert (
        abs(
            kd_loss(pair, k, 0.1, over='all').item()
            - max(0, float((m - a).norm() - (m - n).norm()) + 0.1)
        )
        < 1e-6
    )
    assert abs((kd_loss(pair, k, 9.0) + kd_loss(pair.flip(1), k, 9.0)).item() - 18) < 1e-5
    wrong = pair[[i for i in range(5) if d[i][1] > d[i][0]][:1]].requires_grad_()
    matched = k[[i for i in range(5) if d[i][1] > d[i][0]][:1]]
    kd_loss(wrong, matched).backward()
    with torch.no_grad():
        moved = wrong - 0.05 * wrong.grad

        def near(p, s):
            return float((unit(matched[0]) - unit(p[0, s])).norm())

        assert near(moved, 1) < near(wrong, 1) and near(moved, 0) > near(wrong, 0)
    right = torch.stack([-matched, matched], 1).requires_grad_()
    kd_loss(right, matched).backward()
    assert (
        right.grad.abs().max() == 0
        and kd_loss(torch.stack([matched, matched], 1), matched).item() == 0
    )  # silent as soon as the order is right
    same = torch.stack([-matched, matched], 1).requires_grad_()
    kd_loss(same, matched, 3.0).backward()
    assert same.grad.isfinite().all()  # distance 0 has a gradient too


def test_knowledge_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="over='mean': choose 'category' or 'all'"):
        kd_loss(torch.ones(2, 2, 4), torch.ones(2, 4), over='mean')
    for shape in ((1, 4), (2, 3), (2, 2, 4), (4,)):
        with pytest.raises(ValueError, match=r'knowledge: .*\[2, 2, 4\].*one row per category'):
            kd_loss(torch.ones(2, 2, 4), torch.ones(shape))


# --- losses


def test_focal_loss_pixel_by_pixel():
    m, g = (
        torch.rand(2, 2, 3, 4, generator=torch.Generator().manual_seed(0)),
        (noise(2, 3, 4) > 0).float(),
    )
    m[0, :, 0, 0] = torch.tensor([0.0, 1.0])
    g[0, 0, 0] = 0
    for gamma in (2.0, 0.0, 1.5):
        want = 0.0
        for b in range(2):
            for i in range(3):
                for j in range(4):
                    y = int(g[b, i, j])
                    pt = (1 - 1e-5) * m[b, y, i, j].item() + 1e-5 * m[b, 1 - y, i, j].item() + 1e-5
                    want -= (1 - pt) ** gamma * np.log(pt) / 24
        assert abs(focal_loss(m, g, gamma).item() - want) < 1e-5
    assert (
        focal_loss(torch.stack([1 - g, g], 1), g).abs() < 1e-6
        and focal_loss(torch.stack([g, 1 - g], 1), g) > 9
    )


def test_dice_loss_image_by_image_and_local_loss_adds_layers():
    p, g = (
        torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)),
        (noise(3, 4, 5) > 0.5).float(),
    )
    g[2] = 0
    want = (
        sum(
            1 - (2 * float((p[b] * g[b]).sum()) + 1) / (float(p[b].sum() + g[b].sum()) + 1)
            for b in range(3)
        )
        / 3
    )
    assert abs(dice_loss(p, g).item() - want) < 1e-6 and dice_loss(g, g).abs() < 1e-6
    maps = torch.rand(2, 3, 2, 4, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    each = [focal_loss(m, g) + dice_loss(m[:, 0], 1 - g) + dice_loss(m[:, 1], g) for m in maps]
    assert (
        abs(local_loss(maps, g) - sum(each)) < 1e-6 and abs(local_loss(maps[0], g) - each[0]) < 1e-6
    )
    for mask in (g > 0, (255 * g).to(torch.uint8), 0.49 * (1 - g) + 0.51 * g):
        assert torch.equal(local_loss(maps, mask), local_loss(maps, g))  # above one half
    local_loss(maps, g).backward()
    assert maps.grad.isfinite().all() and ((maps.grad[:, :, 1] < 0) == (g > 0)).all()


@pytest.mark.parametrize(
    'maps,mask',
    [
        ((3, 2, 4, 5), (3, 5, 4)),
        ((3, 2, 4, 5), (2, 4, 5)),
        ((3, 1, 4, 5), (3, 4, 5)),
        ((1, 3, 2, 4, 5), (3, 8, 10)),
        ((3, 4, 5), (3, 4, 5)),
        ((3, 2, 4, 5), (3, 1, 4, 5)),
    ],
)
def test_masks_that_do_not_fit_are_refused(maps, mask):
    with pytest.raises(ValueError, match=r'mask: .*does not fit maps.*\[B,H,W\].*resize'):
        local_loss(torch.full(maps, 0.5), torch.zeros(mask))


def test_image_and_global_losses_are_cross_entropies():
    cls, pair, y = unit(noise(6, 8)), unit(noise(6, 2, 8, seed=1)), torch.tensor([0, 1, 1, 0, 1, 0])
    for p in (pair, pair[0]):
        z = (p @ cls[..., None])[..., 0] if p.ndim == 3 else cls @ p.T
        assert (
            abs(image_loss(cls, p, y) - F.cross_entropy(z / 0.07, y)) < 1e-5
            and abs(image_loss(cls, p, y.bool(), 1.0) - F.cross_entropy(z, y)) < 1e-6
        )
    assert image_loss(cls, pair, y, 1e-4).isfinite()
    s = torch.tensor([0.2, 0.9, 1.0, 0.0])
    assert (
        abs(global_loss(s, torch.tensor([0, 1, 1, 0])).item() + (np.log(0.8) + np.log(0.9)) / 4)
        < 1e-6
    )
    for bad in (torch.tensor([-0.1]), torch.tensor([1.7])):
        with pytest.raises(ValueError, match='0 to 1: take the mean of the two terms'):
            global_loss(bad, torch.ones(1))


# --- vision


@torch.inference_mode()
def dpam(visual, x, depth=None, layers=(-1,)):
    "Image tokens [B,C] and patch tokens [L,B,N,C] of AnomalyCLIP's DPAM, in one pass."
    n = len(visual.transformer.resblocks)
    path = dpam_path(n) if depth is None else AttentionPath('vv', depth)
    blocks = tuple(l % n for l in layers)
    z, streams = forward_paths(visual, visual._embeds(x), (path,), blocks)
    patches = [to_stage(visual, y[:, 1:]) for y in streams[path]]
    return image_token(visual, z), torch.stack(patches)


@torch.inference_mode()
def test_patches_are_the_vv_path_and_the_image_token_skips_the_last_norm(setup):
    v, x = setup.e.model.visual, setup.x
    for depth in (0, 3, 6):
        cls, p = dpam(v, x, depth, (1, -1))
        t = setup.e.tokens(x, EncodeSpec((AttentionPath('vv', depth),), (1, 5)))
        assert torch.equal(p, t.patches[AttentionPath('vv', depth)]) and gap(p[0], p[1]) > 0.01
    z = forward_paths(v, v._embeds(x), (), ())[0]
    assert gap(cls, unit(z[:, 0] @ v.proj)) < 1e-6 and gap(cls, t.cls) > 0.01
    four = torch.cat([x, 0.5 * x])
    alone = [dpam(v, four[i : i + 1]) for i in range(4)]
    cls, p = dpam(v, four)
    assert (
        gap(cls, torch.cat([a[0] for a in alone])) < 1e-5
        and gap(p, torch.cat([a[1] for a in alone], 1)) < 1e-5
    )
    assert torch.equal(p, dpam(v, four, 5)[1])  # 19 of 24 is 5 of 6
    assert [dpam_path(n).depth for n in (24, 12, 6)] == [19, 10, 5]


def test_maps_are_softmaxes_enlarged_and_added():
    p, pair = unit(noise(3, 2, 12, 8)), unit(noise(2, 2, 8, seed=1))
    m = state_maps(p, pair, (3, 4), tau=0.2)
    for l, b, i in np.ndindex(3, 2, 12):
        assert gap(m[l, b, :, i // 4, i % 4], torch.softmax(pair[b] @ p[l, b, i] / 0.2, 0)) < 1e-6
    assert gap(state_maps(p, pair[0], (3, 4), tau=0.2)[:, 0], m[:, 0]) < 1e-6
    wide = state_maps(p, pair, (3, 4), 20, 0.2)
    assert (
        wide.shape == (3, 2, 2, 20, 20)
        and gap(wide[1], F.interpolate(m[1], size=20, mode='bilinear')) < 1e-6
        and gap(wide.sum(2), torch.ones(3, 2, 20, 20)) < 1e-5
    )
    assert gap(add_layer_maps(wide), wide[:, :, 1].sum(0)) < 1e-5
    assert (
        gap(
            add_layer_maps(torch.tensor([0.3, 0.9]).view(1, 1, 2, 1, 1)), torch.full((1, 1, 1), 0.8)
        )
        < 1e-6
    )  # (.9 + 1 - .3)/2
    with torch.inference_mode():
        stored = p.clone()
    learned = pair.clone().requires_grad_()
    add_layer_maps(state_maps(stored, learned, (3, 4))).sum().backward()
    assert learned.grad.abs().max() > 0  # tokens of an inference pass may be trained on


# --- files


def test_artifacts_come_back_as_they_were(tmp_path):
    tensors = dict(
        a=noise(2, 3), b=torch.arange(4), c=noise(5).bfloat16(), empty=torch.zeros(1, 0, 3)
    )
    about = dict(kind='head', seed=3, recipe=dict(t=(1, 2)), metrics=dict(pixel_auroc=0.5))
    name = write_tensor_files(tmp_path / 'v0.1-head', tensors, about)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['v0.1-head.json', 'v0.1-head.safetensors']
    for path in ('v0.1-head', 'v0.1-head.json', 'v0.1-head.safetensors'):
        back, description, h = read_tensor_files(tmp_path / path, 'head')
        assert (
            h == name
            and description == {**about, 'recipe': dict(t=[1, 2])}
            and all(
                torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in tensors.items()
            )
        )
    files = [p.read_bytes() for p in sorted(tmp_path.iterdir())]
    assert (
        write_tensor_files(tmp_path / 'v0.1-head.json', tensors, about) == name
        and [p.read_bytes() for p in sorted(tmp_path.iterdir())] == files
    )
    assert json.loads(files[0])['tensors']['a'] == 'float32 [2, 3]'
    assert (
        write_tensor_files(tmp_path / 'x', {**tensors, 'a': tensors['a'] + 1}, about)
        != name
        != write_tensor_files(tmp_path / 'y', tensors, {**about, 'seed': 4})
    )


def test_artifacts_that_do_not_belong_together_are_refused(tmp_path):
    for n in 'xy':
        write_tensor_files(tmp_path / n, dict(a=noise(2, seed=ord(n))), dict(kind='head', seed=0))
    (tmp_path / 'x.safetensors').write_bytes((tmp_path / 'y.safetensors').read_bytes())
    with pytest.raises(
        ValueError, match='x.json.*hash.*changed, cut short or comes from another save'
    ):
        read_tensor_files(tmp_path / 'x')
    (tmp_path / 'y.json').write_text(
        (tmp_path / 'y.json').read_text().replace('"seed": 0', '"seed": 1')
    )
    with pytest.raises(ValueError, match='one of the two was changed'):
        read_tensor_files(tmp_path / 'y')
    (tmp_path / 'y.safetensors').write_bytes((tmp_path / 'y.safetensors').read_bytes()[:-1])
    with pytest.raises(ValueError, match='one of the two'):
        read_tensor_files(tmp_path / 'y')
    for bad in ('{', '[]', '{"about": 3, "hash": ""}', '{"hash": ""}'):
        (tmp_path / 'y.json').write_text(bad)
        with pytest.raises(ValueError, match='y.json cannot be read'):
            read_tensor_files(tmp_path / 'y')
    (tmp_path / 'y.json').unlink()
    with pytest.raises(
        FileNotFoundError, match=r'y.json is missing.*y.safetensors and y.json side by side'
    ):
        read_tensor_files(tmp_path / 'y')
    write_tensor_files(tmp_path / 'z', {}, dict(kind='head'))
    with pytest.raises(ValueError, match="kind='head', need 'prompts'"):
        read_tensor_files(tmp_path / 'z', 'prompts')


def test_a_save_that_is_cut_off_is_noticed(tmp_path, monkeypatch):
    write_tensor_files(tmp_path / 'x', dict(a=noise(2)), dict(kind='head'))
    write, calls = tensor_files.write_atomic, []

    def dies(path, data):
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(path, data)

    monkeypatch.setattr(tensor_files, 'write_atomic', dies)
    with pytest.raises(KeyboardInterrupt):
        write_tensor_files(tmp_path / 'x', dict(a=noise(2, seed=1)), dict(kind='head'))
    assert calls == ['x.safetensors', 'x.json'] and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match='one of the two'):
        read_tensor_files(tmp_path / 'x')


def test_learned_prompts_belong_to_one_text_tower(small, tmp_path):
    e = small()
    l = start_prompts(replace(KNPL, length=6, depth=3, deep=2, shared=False), e, 2)
    save_artifact(tmp_path / 'p', e, l, seed=2, data='abc', metrics=dict(loss=0.5))
    about = read_tensor_files(tmp_path / 'p', 'trained')[1]
    assert (about['seed'], about['data'], about['backbone'], about['text_weights']) == (
        2,
        'abc',
        'drawn',
        text_weights(e),
    )
    back = load_artifact(tmp_path / 'p.json', e).prompts
    assert (
        back.recipe == l.recipe
        and all(
            torch.equal(t, l.tensors[k]) and not t.requires_grad for k, t in back.tensors.items()
        )
        and gap(pair_of(back, e), pair_of(l, e)) == 0
    )
    with pytest.raises(
        ValueError, match='belongs to the text tower .*load the encoder that it was trained with'
    ):
        load_artifact(tmp_path / 'p', small(seed=8))
    with pytest.raises(ValueError, match='belongs to the text tower'):
        load_artifact(tmp_path / 'p', small('quick_gelu'))
    with pytest.raises(ValueError, match=r"'normal' has shape \[2, 6, 16\].*need \[2, 6, 96\]"):
        load_artifact(tmp_path / 'p', load_encoder('mini', device='cpu'))
    for tensors, says in (
        (
            dict(normal=l.tensors['normal']),
            r"holds \['normal'\], the recipe needs \['abnormal', 'deep', 'normal'\]",
        ),
        (
            {**l.tensors, 'deep': l.tensors['deep'] * float('nan')},
            "'deep' holds numbers that are not finite",
        ),
        ({**l.tensors, 'deep': l.tensors['deep'][:1]}, r"'deep' has shape \[1, 2, 16\]"),
    ):
        save_artifact(tmp_path / 'q', e, LearnedPrompts(l.recipe, tensors))
        with pytest.raises(ValueError, match=says):
            load_artifact(tmp_path / 'q', e)


def test_a_towers_hash_ignores_image_size_and_vision(small):
    e = small()
    other = small(seed=8)
    names = [k for k in e.model.state_dict() if not k.startswith('visual.')]
    assert text_weights(e) != text_weights(other)
    mixed = open_clip.CLIP(**json.loads(json.dumps(e.config)))
    mixed.load_state_dict(
        {**other.model.state_dict(), **{k: e.model.state_dict()[k] for k in names}}
    )
    fit_positions(mixed.visual, 144, 'bicubic')
    assert text_weights(replace(other, model=mixed)) == text_weights(e)
    one = {k: t.clone() for k, t in e.model.state_dict().items()}
    one['transformer.resblocks.2.mlp.c_fc.bias'][3] += 0.1
    mixed = open_clip.CLIP(**json.loads(json.dumps(e.config)))
    mixed.load_state_dict(one)
    assert text_weights(replace(e, model=mixed)) != text_weights(e)


# --- AnomalyCLIP's files


def test_published_prompts_are_read(setup, tmp_path):
    e, state = setup.e, setup.state
    l = load_anomalyclip(saved(tmp_path, state), e)
    assert (
        l.recipe == replace(AGNOSTIC, depth=4)
        and torch.equal(l.tensors['abnormal'], state['ctx_neg'][0])
        and not l.tensors['deep'].requires_grad
    )
    for i in range(3):
        assert torch.equal(l.tensors['deep'][i], state[f'compound_prompts_text.{i}'].half().float())
    bare = {k: t for k, t in state.items() if k.startswith(('ctx', 'compound_prompts'))}
    torch.save(bare, tmp_path / 'bare.pth')
    assert gap(pair_of(load_anomalyclip(tmp_path / 'bare.pth', e), e), pair_of(l, e)) == 0
    flat = load_anomalyclip(
        saved(tmp_path, {k: t for k, t in state.items() if 'compound' not in k}), e
    )
    assert flat.recipe == replace(AGNOSTIC, depth=1) and list(flat.tensors) == [
        'normal',
        'abnormal',
    ]
    save_artifact(tmp_path / 'mine', e, l, source='epoch_15.pth')
    assert gap(pair_of(load_artifact(tmp_path / 'mine', e).prompts, e), pair_of(l, e)) == 0


def test_deep_prompts_are_read_in_the_order_of_their_blocks(tmp_path):
    e = make(
        np.random.default_rng(0), {**SMALL, 'layers': 12}, {**VISION, 'width': 64, 'layers': 1}
    )
    state = dict(
        ctx_pos=noise(1, 1, 4, 16),
        ctx_neg=noise(1, 1, 4, 16, seed=1),
        **{f'compound_prompts_text.{i}': torch.full((4, 16), float(i)) for i in (10, *range(10))},
    )
    assert load_anomalyclip(saved(tmp_path, state), e).tensors['deep'][:, 0, 0].tolist() == list(
        range(11)
    )


def test_files_that_are_not_these_prompts_are_refused(setup, small, tmp_path):
    e, state = setup.e, setup.state
    with pytest.raises(FileNotFoundError, match='checkpoint=.*none.pth'):
        load_anomalyclip(tmp_path / 'none.pth', e)

    class Danger:
        def __reduce__(self):
            return (open, (str(tmp_path / 'ran'), 'w'))

    torch.save({'prompt_learner': Danger()}, tmp_path / 'bad.pth')
    with pytest.raises(ValueError, match='bad.pth cannot be read.*weights_only'):
        load_anomalyclip(tmp_path / 'bad.pth', e)
    assert not (tmp_path / 'ran').exists()
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    with pytest.raises(ValueError, match='text.pth cannot be read'):
        load_anomalyclip(tmp_path / 'text.pth', e)
    for bad in ({'model': {}}, {'ctx_pos': noise(2, 3), 'ctx_neg': noise(2, 3)}, [1, 2]):
        torch.save(bad, tmp_path / 'other.pth')
        with pytest.raises(
            ValueError, match=r"lacks \['ctx_pos', 'ctx_neg'\].*need the prompt_learner"
        ):
            load_anomalyclip(tmp_path / 'other.pth', e)
    two = {**state, 'ctx_pos': state['ctx_pos'].expand(1, 2, -1, -1)}
    with pytest.raises(ValueError, match=r'contexts \[1, 2, 12, 128\].*need \[1,1,K,D\]'):
        load_anomalyclip(saved(tmp_path, two), e)
    with pytest.raises(ValueError, match=r"'normal' has shape \[1, 12, 128\].*need \[1, 12, 96\]"):
        load_anomalyclip(
            saved(tmp_path, {k: t for k, t in state.items() if 'compound' not in k}),
            load_encoder('mini', device='cpu'),
        )
    with pytest.raises(ValueError, match='depth=9: this text tower has 5 blocks'):
        load_anomalyclip(
            saved(
                tmp_path,
                {**state, **{f'compound_prompts_text.{i}': noise(4, 128) for i in range(8)}},
            ),
            e,
        )


def test_words_and_embeddings_in_the_file_are_checked(setup, tmp_path):
    e, state = setup.e, setup.state
    with pytest.raises(
        ValueError,
        match=r"trained with the words 'damaged object \.', the recipe has 'broken object \.'",
    ):
        load_anomalyclip(saved(tmp_path, state), e, ('{}.', 'broken {}.', 'object'))
    with pytest.raises(ValueError, match=r"words 'object \.', the recipe has 'thing \.'"):
        load_anomalyclip(saved(tmp_path, state), e, ('{}.', 'damaged {}.', 'thing'))
    off = {
        **state,
        'token_suffix_neg': state['token_suffix_neg']
        + 0.1 * noise(*state['token_suffix_neg'].shape),
    }
    with pytest.raises(
        ValueError, match="word embeddings are not those of 'drawn'.*ViT-L-14-336-quickgelu"
    ):
        load_anomalyclip(saved(tmp_path, off), e)
    rounded = {
        **state,
        **{f'token_suffix_{s}': state[f'token_suffix_{s}'].half() for s in ('pos', 'neg')},
        **{f'ctx_{s}': state[f'ctx_{s}'].half() for s in ('pos', 'neg')},
    }
    assert (
        load_anomalyclip(saved(tmp_path, rounded), e).tensors['normal'].dtype == torch.float32
    )  # files made on a GPU hold halves


# --- training, and the numbers of the public code


def test_training_lowers_the_loss_and_moves_only_prompts(small):
    e = small()
    l = start_prompts(replace(KNPL, length=4, deep=2, depth=2), e)
    first = {k: t.detach().clone() for k, t in l.tensors.items()}
    before = text_weights(e), e.weights
    cls, p, y = unit(noise(4, 24)), unit(noise(1, 4, 36, 24, seed=1)), torch.tensor([0, 1, 0, 1])
    g = torch.zeros(4, 6, 6)
    g[1, :3] = 1
    g[3, 2:4] = 1
    k, names, opt, seen = (
        torch.stack(
            list(
                knowledge_vectors(
                    e, dict(bottle=['a broken bottle'], cable=['a cut cable'])
                ).values()
            )
        ),
        ['bottle', 'cable', 'bottle', 'cable'],
        torch.optim.Adam(l.tensors.values(), 1e-2),
        [],
    )
    for _ in range(30):
        t = text_of(l, e, ['bottle', 'cable'])
        pairs = torch.stack([t[c].class_embeddings for c in names])
        loss = (
            kd_loss(pairs[:2], k, 0.1)
            + image_loss(cls, pairs, y)
            + local_loss(state_maps(p, pairs, (6, 6)), g)
        )
        opt.zero_grad()
        loss.backward()
        opt.step()
        seen.append(loss.item())
    assert seen[-1] < 0.8 * seen[0] and all(
        (t - first[n]).abs().max() > 1e-2 for n, t in l.tensors.items()
    )
    assert (text_weights(e), replace(e).weights) == before and all(
        p.grad is None for p in e.model.parameters()
    )


NUMBERS = dict(
    text=[
        [
            -0.298058,
            0.065818,
            -0.007712,
            -0.136729,
            -0.149009,
            0.052844,
            0.298299,
            -0.016916,
            -0.062404,
            0.074319,
            -0.216877,
            0.256903,
        ],
        [
            -0.225523,
            -0.065512,
            -0.233889,
            -0.183457,
            0.018356,
            -0.032833,
            -0.034947,
            0.06907,
            0.172478,
            -0.016043,
            0.225556,
            0.175023,
        ],
    ],
    cls=[
        [-0.215955, 0.123433, -0.05372, 0.106152, -0.222525, -0.166554, 0.011566, 0.155338],
        [0.207892, -0.009712, 0.020535, -0.145985, 0.334768, 0.151671, 0.005332, 0.213634],
    ],
    patch=[
        [[0.074275, -0.101062, 0.049967, 0.373855], [-0.104634, 0.092801, 0.156626, 0.205757]],
        [[-0.09808, -0.096415, -0.07235, 0.449552], [0.0025, 0.032196, 0.24003, 0.078282]],
        [[-0.077331, -0.082589, -0.038035, 0.310774], [-0.123337, -0.007477, 0.086904, 0.164588]],
    ],  # patch 7 of each image after blocks 2, 4, 6
    map=[
        [
            [2.725001, 1.25751, 2.320112, 1.57432, 1.958925],
            [1.045949, 1.294293, 1.874669, 2.436541, 1.662052],
            [2.92802, 2.548862, 2.651142, 2.266342, 2.598598],
            [2.870215, 2.66017, 2.160655, 1.874486, 2.139502],
            [2.950354, 2.270248, 1.414013, 2.220962, 1.586414],
        ],
        [
            [2.985694, 2.864508, 2.4397, 1.061526, 1.616797],
            [2.989108, 2.975268, 2.240786, 2.190731, 2.430616],
            [1.122875, 2.683944, 2.557998, 2.227865, 2.004058],
            [2.852978, 2.95341, 2.879943, 2.528019, 2.776122],
            [0.945633, 2.557761, 2.359075, 2.064958, 2.364299],
        ],
    ],  # every 13th pixel
    score=[0.76876, 0.999685],
    focal=0.624817,
    dice=0.714239,
    local=7.602364,
    image=4.162158,
    total=34.571613,
    grad_pos=[
        39.556103,
        40.794876,
        73.121315,
        0.767925,
        26.134806,
        189.829483,
        63.841324,
        68.269257,
        110.021965,
        40.057175,
        62.105202,
        2.894055,
    ],
    grad_neg=[
        2.502066,
        77.305351,
        22.117979,
        28.038877,
        25.8643,
        47.856537,
        37.624229,
        50.232807,
        10.758228,
        31.842386,
        29.271231,
        52.086403,
    ],
    grad_deep=[
        [17.916256, 75.271126, 30.061499, 23.424232],
        [4.830117, 19.149813, 12.559706, 6.470053],
        [4.018882, 4.268497, 4.749524, 5.807249],
    ],
    big_cls=[0.007794, -0.133367, 0.161824, -0.052706, -0.086146, 0.153929, 0.088742, 0.015223],
    big_map=[
        [1.395157, 1.840179, 1.869647, 0.942009, 1.257626, 1.554448],
        [1.82693, 1.200138, 1.588157, 1.782196, 1.974808, 1.414904],
        [1.651348, 1.887434, 1.583402, 1.545526, 1.755194, 1.369482],
        [1.643276, 1.72178, 1.27232, 1.676117, 1.804636, 1.737879],
        [1.980262, 1.838451, 1.441635, 1.211809, 0.975788, 1.60783],
        [1.920903, 1.420279, 1.883105, 1.35835, 1.481562, 1.845981],
    ],
)


def test_numbers_of_anomalyclip(setup, tmp_path):
    s, want = setup, {k: torch.tensor(t) for k, t in NUMBERS.items()}
    v = s.e.model.visual
    l = load_anomalyclip(saved(tmp_path, s.state), s.e)
    for t in l.tensors.values():
        t.requires_grad_()
    pair = text_of(l, s.e, ['anything'])['anything'].class_embeddings
    fixed = pair.detach()
    assert gap(fixed[:, :12], want['text']) < 2e-5
    cls, p = dpam(v, s.x, 3, (1, 3, 5))
    assert gap(cls[:, :8], want['cls']) < 1e-5 and gap(p[:, :, 7, :4], want['patch']) < 1e-5
    maps = state_maps(p, fixed, (6, 6), 60)
    assert (
        gap(add_layer_maps(maps)[:, ::13, ::13], want['map']) < 1e-4
        and gap(anomaly_score(cls, fixed, 0.07), want['score']) < 2e-5
    )
    assert (
        gap(focal_loss(s.free, s.mask), want['focal']) < 2e-6
        and gap(dice_loss(s.free[:, 1], s.mask), want['dice']) < 2e-6
    )
    assert (
        gap(local_loss(maps, s.mask), want['local']) < 1e-4
        and gap(image_loss(cls, fixed, s.labels), want['image']) < 1e-4
    )
    total = 4 * local_loss(state_maps(p, pair, (6, 6), 60), s.mask) + image_loss(
        cls.clone(), pair, s.labels
    )
    total.backward()
    assert abs(total.item() - NUMBERS['total']) < 3e-4
    for k, name in (('normal', 'grad_pos'), ('abnormal', 'grad_neg'), ('deep', 'grad_deep')):
        g = l.tensors[k].grad.norm(dim=-1)
        g = g if k == 'deep' else g[0]
        assert gap(g, want[name]) < 1e-3 * want[name].max(), name


def test_numbers_of_anomalyclip_at_another_size(setup, tmp_path):
    import copy

    v = copy.deepcopy(setup.e.model.visual)
    fit_positions(v, 144, 'bilinear')
    pair = pair_of(load_anomalyclip(saved(tmp_path, setup.state), setup.e), setup.e)
    cls, p = dpam(v, setup.big, 3, (3, 5))
    assert (
        gap(cls[0, :8], torch.tensor(NUMBERS['big_cls'])) < 1e-5
        and gap(
            add_layer_maps(state_maps(p, pair, (9, 9), 72))[0, ::13, ::13],
            torch.tensor(NUMBERS['big_map']),
        )
        < 1e-4
    )

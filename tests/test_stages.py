"Terms read tokens of the stage and block that the row says, whatever the width of the encoder."

import json

import numpy as np
import pytest
import torch

from zsad.encoder.loading import load_encoder
from zsad.encoder.spec import AttentionPath, EncodeSpec
from zsad.pipeline.checks import check_method
from zsad.pipeline.detector import build
from zsad.pipeline.method import Method, one_path
from zsad.pipeline.terms import adapted_tokens, synthetic_images, synthetic_tokens

CONFIG = dict(
    embed_dim=64,
    vision_cfg=dict(image_size=48, layers=4, width=64, head_width=32, patch_size=16),
    text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=2, layers=2),
)
PROMPTS = ('a normal {}',), ('a broken {}',)


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    "An encoder whose blocks are as wide as the joint space, as ViT-S-16 of MobileCLIP's kind."
    file = tmp_path_factory.mktemp('square') / 'square.json'
    file.write_text(json.dumps(CONFIG))
    return load_encoder(file, 'random:1', device='cpu', dtype='float32')


def inputs(encoder, **spec):
    m = Method('m', one_path('vv', **spec), PROMPTS, (('pair', {}),), reference=('pair', {}))
    det = build(m, 'nut', encoder)
    x = encoder.preprocess(list(np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), 'u1')))
    return det.scoring_inputs('nut', encoder.tokens(x, det.method.encode), None, x, ('a', 'b'))


@pytest.mark.parametrize('stage', ['ln_post', 'proj'])
def test_tokens_are_projected_by_their_stage_and_not_by_their_width(encoder, stage):
    "Without a step of adaptation both stages give CLIP's own patch tokens at unit length."
    want = encoder.encode(inputs(encoder, stage=stage).x, 'vv', stage='proj').single[-1]
    got = adapted_tokens(inputs(encoder, stage=stage), steps=0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize('stage', ['raw', 'ln_post', 'proj'])
@pytest.mark.parametrize(
    'layers,layer,block', [((1,), -1, 1), ((0, 2), 0, 0), ((0, 2), -1, 2), ((-1,), -1, 3)]
)
def test_synthetic_images_are_encoded_at_the_block_and_stage_of_their_images(
    encoder, stage, layers, layer, block
):
    s = inputs(encoder, layers=layers, stage=stage)
    made = encoder.preprocess([image for image, _ in synthetic_images(s)])
    got, changed = synthetic_tokens(s, 0, layer)
    want = encoder.tokens(made, EncodeSpec((AttentionPath('vv'),), (block,), stage)).single[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert changed.shape == (2, 9) and changed.any(1).all()
    others = [
        encoder.tokens(made, EncodeSpec((AttentionPath('vv'),), (b,), stage)).single[0]
        for b in range(4)
        if b != block
    ]
    assert all((got - t).abs().max() > 1e-3 for t in others)


@pytest.mark.parametrize(
    'term,stage',
    [
        ('text', 'raw'),
        ('text', 'ln_post'),
        ('adapted', 'raw'),
        ('synthetic_adapted', 'raw'),
        ('synthetic_adapted', 'ln_post'),
    ],
)
def test_terms_refuse_stages_that_they_cannot_read(term, stage):
    with pytest.raises(
        ValueError, match=f"m: term '{term}' reads patch tokens of stage proj.*stage='{stage}'"
    ):
        check_method(Method('m', one_path('vv', stage=stage), 'clip', ((term, {}),)))


def test_adapted_reads_ln_post_too():
    m = Method('m', one_path('vv', stage='ln_post'), 'clip', (('adapted', {}),))
    assert check_method(m).has('adapted')


@pytest.mark.parametrize('batch', [1, 2, 5])
def test_class_tokens_do_not_depend_on_the_paths_beside_them(batch):
    "Bit for bit, with one block for all tokens and with one for the leading ones."
    e = load_encoder('mini', device='cpu', dtype='float32')
    size = e.preprocess.size
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    both = EncodeSpec((AttentionPath('qkv'), AttentionPath('vv')), (-2, -1))
    every = e.tokens(x, both.resolved(e.blocks))
    own, vv = AttentionPath('qkv'), AttentionPath('vv')
    for paths, layers in (((), (-1,)), ((vv,), (-1,)), ((own,), (-2,)), ((own, vv), (-2,))):
        t = e.tokens(x, EncodeSpec(paths, layers).resolved(e.blocks))
        assert torch.equal(t.cls, every.cls)
        for path, patches in t.patches.items():
            assert torch.equal(patches[-1], every.patches[path][layers[0]])
    unchanged = e.tokens(x, EncodeSpec((AttentionPath('vv', 0),))).single[-1]
    assert torch.equal(unchanged, every.patches[own][-1])

"The rule behind dtype='auto': bfloat16 for large encoders where the hardware multiplies it."

import pytest
import torch

from zsad.encoder import loading
from zsad.encoder.building import vision_weights
from zsad.encoder.loading import choose_dtype, load_encoder
from zsad.encoder.weights import find_config

LARGE = 20_000_000


@pytest.mark.parametrize(
    'flags,fast',
    [
        ({'avx2', 'avx512f', 'amx_bf16'}, True),
        ({'avx2', 'avx512f', 'avx512_bf16'}, True),
        ({'amx_bf16', 'avx512_bf16'}, True),
        ({'avx2', 'avx512f', 'amx_int8', 'amx_tile'}, False),
        ({'avx2', 'fma'}, False),
        (set(), False),
    ],
)
def test_auto_follows_the_flags_of_the_cpu_and_the_size_of_the_encoder(flags, fast, monkeypatch):
    monkeypatch.setattr(loading, 'cpu_flags', lambda: flags)
    large = torch.bfloat16 if fast else torch.float32
    assert choose_dtype('auto', 'cpu', LARGE) == large
    assert choose_dtype('auto', 'cpu', LARGE - 1) == torch.float32
    assert choose_dtype('float32', 'cpu', LARGE) == torch.float32
    assert choose_dtype('bfloat16', 'cpu', LARGE - 1) == torch.bfloat16


@pytest.mark.parametrize('fast', [True, False])
def test_auto_on_a_gpu_does_not_look_at_the_cpu(fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **_: fast)
    monkeypatch.setattr(loading, 'cpu_flags', lambda: set() if fast else {'amx_bf16'})
    want = torch.bfloat16 if fast else torch.float32
    assert choose_dtype('auto', 'cuda:0', LARGE) == want
    assert choose_dtype('auto', 'cuda:0', LARGE - 1) == torch.float32


def test_mini_computes_in_float32_and_the_papers_encoder_in_bfloat16(monkeypatch):
    monkeypatch.setattr(loading, 'cpu_flags', lambda: {'avx512_bf16'})
    assert load_encoder('mini', device='cpu').dtype == torch.float32
    count = vision_weights(find_config('ViT-B-16-plus-240')[1])
    assert count > LARGE and choose_dtype('auto', 'cpu', count) == torch.bfloat16

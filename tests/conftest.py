"""Tests run in one process per core, each with one thread, so that none waits for another."""

import json
import os

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')
import pytest


def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: needs a CUDA device')


@pytest.fixture(scope='session')
def files(tmp_path_factory):
    "Configuration and weights of a small encoder: 96 pixels, 6 x 6 patches, four blocks."
    import open_clip
    import torch
    from test_parity import config, sharp

    d, cfg = tmp_path_factory.mktemp('encoder'), config(dict(image_size=96, layers=4))
    torch.manual_seed(0)
    torch.save(sharp(open_clip.CLIP(**json.loads(json.dumps(cfg)))), d / 'small.pt')
    (d / 'small.json').write_text(json.dumps(cfg))
    return str(d / 'small.json'), str(d / 'small.pt')


@pytest.fixture(scope='session')
def small(files):
    "The small encoder itself, on the CPU in float32."
    from zsad.encoder.loading import load_encoder

    return load_encoder(*files, device='cpu', dtype='float32')

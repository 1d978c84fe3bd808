"""Zero-shot visual anomaly detection with CLIP: methods, experiments, tables of the papers."""

from importlib import import_module

__version__ = "0.1.0"

MODULE_OF = {  # public name -> module that defines it
    'load_encoder': 'encoder.loading',
    'build': 'pipeline.detector',
    'METHODS': 'pipeline.rows',
    'load_dataset': 'datasets.loading',
    'load_image': 'datasets.images',
    'evaluate': 'evaluation.measure',
    'table': 'reporting.tables',
    'figure': 'reporting.figures',
    'EXHIBITS': 'papers.exhibits',
}
__all__ = list(MODULE_OF)


def __getattr__(name):
    "Import a public name when it is first used, so that `import zsad` loads nothing (PEP 562)."
    if name not in MODULE_OF:
        raise AttributeError(f"module 'zsad' has no attribute {name!r}; it has {sorted(MODULE_OF)}")
    value = getattr(import_module(f'zsad.{MODULE_OF[name]}'), name)
    globals()[name] = value
    return value


def __dir__():
    "List the public names beside what is loaded."
    return sorted({*globals(), *MODULE_OF})

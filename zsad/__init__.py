__version__ = "0.1.0"

_HOME = {
    'load_encoder': 'encoder.clip', 'build': 'pipeline.detector', 'METHODS': 'pipeline.detector',
    'load_dataset': 'datasets.layouts', 'load_image': 'datasets.layouts', 'evaluate': 'evaluation.metrics',
    'table': 'reporting.tables', 'figure': 'reporting.tables', 'EXHIBITS': 'papers.exhibits',
}
__all__ = list(_HOME)


def __getattr__(name):
    "Import a public name when it is first used, so that `import zsad` loads nothing (PEP 562)."
    if name not in _HOME:
        raise AttributeError(f"module 'zsad' has no attribute {name!r}; it has {sorted(_HOME)}")
    from importlib import import_module
    value = getattr(import_module(f'zsad.{_HOME[name]}'), name)
    globals()[name] = value
    return value


def __dir__():
    "List the public names beside what is loaded."
    return sorted({*globals(), *_HOME})

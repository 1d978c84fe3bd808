"""A device that is not there: tensors of class `Away` compute on the CPU and claim another device.

As on a GPU, an operation on tensors of two places raises, `numpy()` raises, and binary cross
entropy refuses to run under autocast. Values are real, so that whole jobs run and can be compared
with the CPU; torch's own fake tensors hold no values and give no gradients without a GPU.
What is not covered: kernels, memory, order of sums, several devices, sparse tensors.
"""

import copy
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device('cuda', 0)
T = torch.Tensor
INDEX = {
    T.__getitem__,
    T.index_select,
    T.index_put_,
    T.index_put,
}  # a CPU index of a GPU tensor is fine
MOVES = {
    T.copy_,
    T.__setitem__,
    T.to,
    T.type_as,
    T.__repr__,
    T.set_,
}  # these take tensors of two places
WHOLE = {torch.cat, torch.stack, torch.where, torch.concat}  # these take no CPU scalar either
READS = {T.numpy, T.__array__}
ANSWERS = {
    T.device.__get__: CUDA,
    T.is_cuda.__get__: True,
    T.is_cpu.__get__: False,
    torch._has_compatible_shallow_copy_type: False,
}  # the last: a module's parameter is replaced
AUTOCAST_BANS = {F.binary_cross_entropy}

CAPTURE = [
    f'torch.optim.Optimizer.{k}'
    for k in vars(torch.optim.Optimizer)
    if k.endswith('graph_capture_health_check')
]


def is_away(t):
    return isinstance(t, Away)


def send(t):
    "Put a tensor on the device; a sparse one cannot bear the class and stays as it is."
    return t if is_away(t) or t.is_sparse else t.as_subclass(Away)


def fetch(t):
    "Give the tensor on the CPU."
    return t.as_subclass(torch.Tensor) if is_away(t) else t


def check_places(func, args, kwargs):
    "Raise as a GPU does where tensors of two places meet."
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    if func in MOVES or len({is_away(t) for t in tensors}) < 2:
        return
    if func in INDEX and is_away(args[0]):
        return
    if all(is_away(t) or t.ndim == 0 and func not in WHOLE for t in tensors):
        return
    raise RuntimeError(
        'Expected all tensors to be on the same device, but found at least two devices, '
        f'cuda:0 and cpu! (in {getattr(func, "__name__", func)})'
    )


def check_autocast(func):
    "Raise as CUDA's autocast does."
    if func in AUTOCAST_BANS and torch.is_autocast_enabled('cuda'):
        raise RuntimeError(f'torch.nn.functional.{func.__name__} is unsafe to autocast')


class Away(torch.Tensor):
    "A tensor on the device."

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in ANSWERS:
            return ANSWERS[func]
        if func in READS:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        check_places(func, args, kwargs)
        check_autocast(func)
        if func is T.type_as:
            return place(args[0], args[1].dtype, is_away(args[1]))
        half = torch.is_autocast_enabled('cuda')
        with torch.autocast('cpu', torch.bfloat16, enabled=half):
            out = super().__torch_function__(func, types, args, kwargs)
        return send(out) if func == T.grad.__get__ and out is not None else out


def place(t, dtype, away):
    "Give a tensor in a dtype, on the device or on the CPU."
    out = fetch(t).to(dtype) if dtype else fetch(t)
    return send(out) if away else out


def wants_away(device) -> bool:
    return torch.device(device).type == 'cuda'


def move(t, *args, **kwargs):
    "Do what Tensor.to does, for the device as well."
    away, dtype, rest = is_away(t), None, dict(kwargs)
    if 'device' in rest and (device := rest.pop('device')) is not None:
        away = wants_away(device)
    dtype = rest.pop('dtype', None)
    for a in args:
        if isinstance(a, torch.Tensor):
            away, dtype = is_away(a), a.dtype
        elif isinstance(a, torch.dtype):
            dtype = a
        elif isinstance(a, (str, torch.device)):
            away = wants_away(a)
    out = (
        fetch(t).to(dtype, copy=rest.get('copy', False)) if dtype or rest.get('copy') else fetch(t)
    )
    return send(out) if away else out


class Placing(TorchFunctionMode):
    "Give tensors that are made on the device, or moved there, the class `Away`."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is T.to:
            return move(*args, **kwargs)
        if func is T.cpu:
            return fetch(args[0])
        if func is T.cuda:
            return send(args[0])
        device = kwargs.get('device')
        if device is None or torch.device(device).type == 'meta':
            return func(*args, **kwargs)
        out = func(*args, **{**kwargs, 'device': 'cpu'})
        return place(out, None, wants_away(device))


def save_fetched(value, *args, save=torch.save, **kwargs):
    "Save tensors as a file holds them."
    return save(tree_map(lambda t: fetch(t) if isinstance(t, T) else t, value), *args, **kwargs)


def load_placed(*args, map_location=None, load=torch.load, **kwargs):
    "Load tensors onto the device."
    value = load(*args, map_location='cpu', **kwargs)
    away = map_location is not None and wants_away(map_location)
    return tree_map(lambda t: send(t) if away and isinstance(t, T) else t, value)


def copy_each(encoder, prep, batches):
    "Prepare batches one after the other: streams and pinned memory need a GPU."
    return map(prep, batches)


@contextmanager
def faked():
    "Have a device 'cuda' for the time of a block."
    there = {
        'torch.cuda.amp.common.amp_definitely_not_available': lambda: False,
        'torch.cuda.is_bf16_supported': lambda *_, **__: True,
        'torch.cuda.is_available': lambda: True,
        **{k: lambda *_: None for k in CAPTURE},
        'torch.cuda.get_device_name': lambda *_: 'not there',
        'torch.cuda.mem_get_info': lambda *_: (2**34, 2**34),
        'zsad.encoder.encoder.copy_ahead': copy_each,
        'torch.save': save_fetched,
        'torch.load': load_placed,
    }
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with ExitStack() as stack:
            for name, value in there.items():
                stack.enter_context(mock.patch(name, value))
            stack.enter_context(Placing())
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def sent(encoder):
    "Give an encoder's copy on the device."
    return replace(encoder, model=copy.deepcopy(encoder.model).to('cuda'), device='cuda')

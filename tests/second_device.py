"""A torch device in pure Python, `second:0` and `second:1`, to see without a GPU what a GPU would refuse or wait for.

Its tensors hold one of the CPU and compute by the CPU's kernels, with autograd. As on a GPU, they do not mix with
tensors of the CPU or of the other second device. Counted in `EVENTS`, by kind and the function that asked for it: each
wait of the host (`.item()`, `.tolist()`, `nonzero`, a boolean index) and each copy between host and device.

Importing it gives torch the device for the whole process, so that it must be imported in one of its own; tensors are
made and moved within `SecondMode()`. It does not measure time or memory.
"""

import contextlib
import sys
from collections import Counter
from types import SimpleNamespace

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME, DEVICES = "second", 2
EVENTS: Counter = Counter()
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class _Stream:
    def __init__(self, *args, **kwargs): ...

    def synchronize(self):
        note("wait")

    def wait_stream(self, other): ...


class _Backend(backend_registration._DummyBackendModule):
    """What torch asks a device's module (torch.cuda, say) for."""

    __name__ = f"torch.{NAME}"
    Stream = _Stream

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def is_available(self):
        return True

    def device_count(self):
        return DEVICES

    def current_device(self):
        return 0

    def set_device(self, device): ...
    def synchronize(self, *args):
        note("wait")

    def manual_seed_all(self, seed): ...
    def manual_seed(self, seed): ...
    def get_rng_state(self, *args):
        return torch.get_rng_state()

    def get_rng_state_all(self):
        return [torch.get_rng_state()]

    def set_rng_state(self, state, *args):
        torch.set_rng_state(state)

    def set_rng_state_all(self, states):
        torch.set_rng_state(states[0])

    def empty_cache(self): ...
    def mem_get_info(self, *args):
        return 8 << 30, 8 << 30

    def memory_allocated(self, *args):
        return 0

    memory_reserved = max_memory_allocated = memory_allocated

    def reset_peak_memory_stats(self, *args): ...
    def get_device_properties(self, *args):
        return SimpleNamespace(total_memory=8 << 30, name=NAME)

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_stream(self, *args):
        return _Stream()


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())


def note(kind):
    """Count an event, at the function of this project that asked torch for it, or else as another library's."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename or "<" in frame.f_code.co_name:
        frame = frame.f_back
    file, name = frame.f_code.co_filename, frame.f_code.co_name
    EVENTS[kind, f"{file.rpartition('/src/')[2]}:{name}" if "/src/hrpo_" in file else "upstream"] += 1


class Second(torch.Tensor):
    """A tensor of a second device; `inner` is of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, index=0):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, index),
            requires_grad=False,
        )

    def __init__(self, inner, index=0):
        self.inner, self.of = inner, index

    def __repr__(self):
        return f"Second({self.inner})"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        self.inner, self.of = value.inner, value.of

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def tolist(self):
        note("wait")
        return self.inner.tolist()

    def numpy(self, **kwargs):
        raise TypeError("can't convert a tensor of the second device to numpy; use .cpu() first")


def _is_second(device):
    return device is not None and torch.device(device).type == NAME


def _inner(value):
    return value.inner if isinstance(value, Second) else value


def _moved(source, device, kwargs):
    """`source.to(device)`, counted."""
    given = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
    target = torch.device(device) if device is not None else source.device
    if isinstance(source, Second) != (target.type == NAME):
        note("to the host" if isinstance(source, Second) else "to the device")
    made = aten._to_copy.default(_inner(source), **given)
    return Second(made, target.index or 0) if target.type == NAME else made


def _check(function, seconds, args, flat):
    if len({one.of for one in seconds}) > 1:
        shapes = ", ".join(f"second:{one.of} {tuple(one.shape)}" for one in seconds)
        raise RuntimeError(f"{function}: tensors of two devices, {shapes}")
    indices = tree_leaves(args[1]) if function in INDEXING and isinstance(args[0], Second) else []
    for one in flat:
        if isinstance(one, torch.Tensor) and not isinstance(one, Second) and one.dim():
            if not any(one is index for index in indices):
                raise RuntimeError(f"{function}: a tensor of the CPU {tuple(one.shape)} beside one of a second device")
            note("to the device")
    masks = any(isinstance(one, Second) and one.dtype == torch.bool for one in indices)
    if function in WAITS or masks:
        note("wait")


def _run(function, args, kwargs):
    flat, device = tree_leaves((args, kwargs)), kwargs.get("device")
    if function in (aten._to_copy.default, aten.to.device):
        return _moved(args[0], device, kwargs)
    if function is aten.copy_.default:
        target, source = args[:2]
        if isinstance(target, Second) != isinstance(source, Second):
            note("to the device" if isinstance(target, Second) else "to the host")
        _inner(target).copy_(_inner(source))
        return target
    seconds = [one for one in flat if isinstance(one, Second)]
    if seconds:
        _check(function, seconds, args, flat)
    index = seconds[0].of if seconds else 0
    on_second = bool(seconds) if device is None else _is_second(device)
    given = tree_map(_inner, kwargs)
    if device is not None:
        index, given["device"] = torch.device(device).index or 0, "cpu"
    if given.get("pin_memory"):
        given["pin_memory"] = False
    out = function(*tree_map(_inner, args), **given)
    if not on_second:
        return out
    plain = (torch.Tensor,)
    out = tree_map(
        lambda one: Second(one, index) if isinstance(one, plain) and not isinstance(one, Second) else one, out
    )
    return return_and_correct_aliasing(function, args, kwargs, out)


class SecondMode(TorchDispatchMode):
    """Within, tensors can be made on a second device, or moved to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        involved = any(isinstance(one, Second) for one in tree_leaves((args, kwargs)))
        return (
            _run(function, args, kwargs) if involved or _is_second(kwargs.get("device")) else function(*args, **kwargs)
        )


def _through_the_cpu(make):
    """torch.tensor and torch.as_tensor read Python values into memory, which a second device has none of."""

    def made(data, *args, device=None, **kwargs):
        if isinstance(data, Second):
            return data.to(device) if device is not None else data
        if _is_second(device):
            return make(data, *args, **kwargs).to(device)
        return make(data, *args, device=device, **kwargs) if device is not None else make(data, *args, **kwargs)

    return made


torch.tensor, torch.as_tensor = _through_the_cpu(torch.tensor), _through_the_cpu(torch.as_tensor)

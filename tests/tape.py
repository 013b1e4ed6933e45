"""What a CUDA graph does, on a CPU: a function's operations on tensors, recorded once, done again on the same memory.

As a capture does, it refuses what waits for the device, and leaves no effect of its own.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# sizes or values that the host has to know; tensors made from the host's values
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item", "lift_fresh", "lift"}


def _waits(func, args) -> bool:
    name = func._schema.name.rpartition("::")[2]
    if name in ("index", "index_put", "index_put_"):  # by a mask
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name in WAITING or name.lstrip("_").startswith("unique")


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.entries, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _waits(func, args):
            raise RuntimeError(f"{func} waits for the device, which a graph cannot")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    self.before.append((tensor, tensor.detach().clone()))
        for argument in func._schema.arguments:
            if argument.name in kwargs and argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((kwargs[argument.name], kwargs[argument.name].detach().clone()))
        result = func(*args, **kwargs)
        made = all(output.alias_info is None for output in func._schema.returns)
        self.entries.append((func, args, kwargs, result if made else None))
        return result


def _tensors(result):
    return [t for t in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(t, torch.Tensor)]


def record(step, slot=None):
    """Stands in for `ribfast.rib.slots.capture_graph`."""
    recorder = _Recorder()
    with recorder:
        step()
    with torch.no_grad():
        for tensor, value in reversed(recorder.before):
            tensor.copy_(value)

    @torch.no_grad()
    def replay():
        for func, args, kwargs, made in recorder.entries:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(made), _tensors(again), strict=False):
                old.copy_(new)

    replay.operations = len(recorder.entries)
    return replay

"""What operators tell torch's dispatcher beside their kernels."""

import torch

_library = torch.library.Library("ribfast", "IMPL")


def run_under_autocast(name: str, rule) -> None:
    """Under autocast, `rule(op, *args)` runs in the operator's place, with autocast off inside."""
    op = getattr(torch.ops.ribfast, name).default
    for key in (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA):

        def run(*args, off=torch._C.DispatchKeySet(key)):  # noqa: B008
            with torch._C._ExcludeDispatchKeyGuard(off):
                return rule(op, *args)

        _library.impl(name, run, key.name)


def run_as_is_under_autocast(name: str) -> None:
    run_under_autocast(name, lambda op, *args: op(*args))


def register_gradient(name: str, backward, save) -> None:
    """torch.library.register_autograd without its price: that walks the schema in Python at every call, which costs
    more than a small kernel. For operators without lists of tensors."""
    op = getattr(torch.ops.ribfast, name).default

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            with torch._C._AutoDispatchBelowAutograd():
                result = op(*args)
            save(ctx, args, result)
            return result

    Gradient.backward = staticmethod(backward)

    def run(*args):
        if torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            return Gradient.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, run, "Autograd")


def call_in_backward(op, *args):
    """An operator called by a backward: past autograd, which costs as much as a small kernel, unless the backward is
    itself being differentiated."""
    if torch.is_grad_enabled():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def refuse_gradient(name: str, advice: str) -> None:
    """Asking for the gradient of an operator that has none is an error, not a silent None.

    An operator that writes in place also tells autograd which arguments have changed, so that a backward which needs
    the old values raises.
    """
    op = getattr(torch.ops.ribfast, name).default
    arguments = op._schema.arguments
    written = [
        i for i, argument in enumerate(arguments) if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def run(*args):
        if torch.is_grad_enabled():
            for arg in args:
                for t in arg if isinstance(arg, (list, tuple)) else (arg,):
                    if isinstance(t, torch.Tensor) and t.requires_grad:
                        raise RuntimeError(f"{name.rstrip('_')}: expected tensors that need no gradient, "
                                           f"got one with requires_grad=True; {advice}")  # fmt: skip
        with torch._C._AutoDispatchBelowAutograd():
            result = op(*args)
        for arg in (args[i] for i in written):
            for t in arg if isinstance(arg, (list, tuple)) else (arg,):
                torch.autograd.graph.increment_version(t)
        return result

    _library.impl(name, run, "Autograd")

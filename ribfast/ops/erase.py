"""What maps attend to taken out of their images: wrapper, contract, fake kernels, autograd."""

import torch
from torch import Tensor

from .. import _ext, reference
from . import contract
from .registration import call_in_backward, refuse_gradient, register_gradient, run_as_is_under_autocast

_OP = "erase"
_NO_GRADIENT = "detach() them: erase has the gradient of the maps alone"


def erase(
    images: Tensor, maps: Tensor, which: Tensor, *, sharpness: float = 100.0, level: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Images with what each map attends to taken out, (P, C, H, W), and each map's attention summed over the pixels,
    (P,); neither the attention nor the mask is stored.

    images: (N, C, H, W), maps: (P, h, w) logits, any float dtypes; which: (P,) int64, each map's image. One outside of
    0..N - 1 is an error on the CPU; to the CUDA kernels, which nothing waits for, its erased image and sum are zeros,
    and so is its gradient.
    The attention A is the map, rectified, enlarged bilinearly (align_corners=False) and stretched from its minimum to
    its maximum; 0 where that is rounding (at most 1e-5 of the maximum). Erased: x (1 - sigmoid(sharpness (A - level))).

    Erased images have the images' dtype and memory format (contiguous or channels_last), sums are float32 (float64 for
    float64 maps), as is the arithmetic. The gradient is that of maps alone, once: images must need none. Where several
    pixels are the minimum or the maximum it is that of one of them. A map that holds NaN gives NaN, the others none.
    """
    _check(images, maps, which)
    sharpness, level = contract.number(_OP, "sharpness", sharpness), contract.number(_OP, "level", level)
    if torch.is_grad_enabled() and images.requires_grad:
        raise RuntimeError(f"{_OP}: expected images that need no gradient, got requires_grad=True; {_NO_GRADIENT}")
    if _ext.backend(_OP, maps.device).name == "reference":
        if which.device.type == "cpu":
            wrong = which[(which < 0) | (which >= len(images))].tolist()
            if wrong:
                raise ValueError(f"{_OP}: expected which from 0 to {len(images) - 1}, got {wrong[0]}; "
                                 "number the images from 0")  # fmt: skip
        return reference.erase(images, maps, which, sharpness=sharpness, level=level)
    return torch.ops.ribfast.erase.default(images, maps, which, sharpness, level)


def _check(images, maps, which) -> None:
    contract.tensor(_OP, "images", images, 4, "(N, C, H, W)")
    contract.tensor(_OP, "maps", maps, 3, "(P, h, w)")
    if images.shape[1] == 0:
        raise ValueError(f"{_OP}: expected images with at least one channel, got shape {tuple(images.shape)}")
    for name, value in (("images", images), ("maps", maps)):
        contract.positions(_OP, name, value)
        if max(value.shape[-2:]) > contract.LONGEST_SIDE:
            raise ValueError(f"{_OP}: expected {name} below 2^24 a side, got shape {tuple(value.shape)}")
    if not isinstance(which, Tensor) or which.dtype != torch.int64:
        got = which.dtype if isinstance(which, Tensor) else type(which).__name__
        raise TypeError(f"{_OP}: expected which to be an int64 tensor (P,), got {got}")
    if which.shape != maps.shape[:1]:
        raise ValueError(f"{_OP}: expected which ({len(maps)},), the image of each map, got shape {tuple(which.shape)}")
    contract.same_device(_OP, images, maps, which)


@torch.library.register_fake("ribfast::erase")
def _(images, maps, which, sharpness, level):
    shape = (maps.shape[0], *images.shape[1:])
    interleaved = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    layout = torch.channels_last if interleaved else torch.contiguous_format
    erased = torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=layout)
    return erased, maps.new_empty(which.shape, dtype=reference.accumulator_dtype(maps.dtype))


@torch.library.register_fake("ribfast::erase_backward")
def _(grad, grad_areas, images, maps, which, sharpness, level):
    return maps.new_empty(maps.shape)


def _save(ctx, inputs, output):
    images, maps, which, ctx.sharpness, ctx.level = inputs
    if ctx.needs_input_grad[0]:
        raise RuntimeError(f"{_OP}: expected images that need no gradient, got requires_grad=True; {_NO_GRADIENT}")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(images, maps, which)


def _backward(ctx, grad, grad_areas):
    backward = torch.ops.ribfast.erase_backward.default
    grad_maps = call_in_backward(backward, grad, grad_areas, *ctx.saved_tensors, ctx.sharpness, ctx.level)
    return None, grad_maps, None, None, None


register_gradient("erase", _backward, _save)
for _name in ("erase", "erase_backward"):
    run_as_is_under_autocast(_name)
refuse_gradient("erase_backward", "second derivatives of erasing are not there; use ribfast.reference")

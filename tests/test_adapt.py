"""The pointwise work between an adapted network's convolutions, and its update."""

import math

import pytest
import torch
from cases import DTYPES, NAMES, rounding, tolerance

from ribfast import _ext, reference
from ribfast.ops.adapt import activate_, activate_backward, update_folded_

# the last two: more strips of cells than one on CUDA devices, in vectors and by single elements
SHAPES = [(1, 64, 5, 7), (2, 33, 3, 4), (1, 1, 1, 1), (1, 16, 0, 3), (1, 0, 2, 3), (1, 7, 40, 41), (2, 96, 63, 41)]


def last(*shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


def of_many(limits, count):
    """For sums of so many numbers around 1, which may cancel out."""
    return limits | {"atol": limits["atol"] * max(1, math.sqrt(count) / 20)}


def compiled_on(device):
    if _ext.backend("adapt", torch.device(device)).name != "cpp":
        pytest.skip(f"no kernels for {device} were built")


@pytest.mark.parametrize("limit", [math.inf, 0.75])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activation(device, shape, dtype, limit):
    on = {"dtype": dtype, "device": device}
    mask = (torch.rand(shape[0], 1, *shape[2:], device=device) > 0.3).to(dtype)
    for shortcut in (None, last(*shape, **on)):
        for covered in (None, mask):
            y = last(*shape, **on)
            expected = reference.activate(y, shortcut, covered, limit)
            assert activate_(y, shortcut, covered, limit) is y
            torch.testing.assert_close(y, expected, **rounding(dtype))
            assert covered is None or not y[(covered == 0).expand_as(y)].any()
    grad = last(*shape, **on)
    before, sums = activate_backward(grad, y, limit)
    expected, expected_sums = reference.activate_backward(grad, y, limit)
    assert torch.equal(before, expected)
    assert before.is_contiguous(memory_format=torch.channels_last) or not y.numel()
    torch.testing.assert_close(sums, expected_sums, **of_many(tolerance(dtype), shape[0] * shape[2] * shape[3]))


def test_activation_keeps_nan_and_infinity(device):
    y = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 2.0], device=device).view(1, 5, 1, 1)
    y = y.repeat(1, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    expected = torch.tensor([math.nan, 6.0, 0.0, 0.0, 2.0] * 8, device=device)
    torch.testing.assert_close(activate_(y, limit=6.0).flatten(), expected, equal_nan=True)


def test_nothing_is_left_in_the_gutter(device):
    y = torch.full((1, 16, 1, 2), math.nan, device=device).contiguous(memory_format=torch.channels_last)
    activate_(y, y.clone(), torch.tensor([[[[0.0, math.nan]]]], device=device))
    assert not y[..., 0].any() and y[..., 1].isnan().all()


def test_sums_are_the_same_every_time(device):
    grad, y = (last(1, 160, 70, 90, dtype=torch.bfloat16, device=device) for _ in range(2))
    first, again = (activate_backward(grad, y)[1] for _ in range(2))
    assert torch.equal(first, again)


def test_activation_is_the_gradient_of_itself(device):
    y, shortcut = (last(1, 20, 3, 4, dtype=torch.float64, device=device) for _ in range(2))
    mask = torch.ones(1, 1, 3, 4, dtype=torch.float64, device=device)
    mask[..., 1] = 0

    def plain(y):
        return reference.activate(y, shortcut, mask, 0.8)

    leaf, grad = y.clone().requires_grad_(), torch.randn_like(y)
    expected = torch.autograd.grad(plain(leaf), leaf, grad)[0]
    found, _ = activate_backward(
        grad, activate_(y.clone(memory_format=torch.preserve_format), shortcut, mask, 0.8), 0.8
    )
    torch.testing.assert_close(found, expected)


def test_plain_torch_serves_beside_triton(monkeypatch):
    """There are no Triton kernels: where C++ was not built for the device but Triton runs, nothing is refused."""
    monkeypatch.setitem(_ext._chosen, "cpu", _ext.Backend("triton", "built without CUDA"))
    monkeypatch.setattr(_ext, "requested", "auto")
    assert _ext.backend("adapt", torch.device("cpu")).name == "reference"
    y = last(1, 8, 3, 4)
    expected = reference.activate(y)
    assert torch.equal(activate_(y), expected)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize(
    "shape", [(48, 20, 3, 3), (5, 37, 1, 1), (30, 1, 3, 3), (1, 1, 1, 1), (2, 1030, 3, 3)], ids=str
)
def test_update(device, shape, dtype, first):
    count, on = shape[0], {"dtype": dtype, "device": device}

    def vectors(*shape, **options):
        return torch.rand(shape, device=device).to(**options) + 0.5

    grads = last(*shape, **on), vectors(count, dtype=dtype)
    anchors = last(*shape, **on), vectors(count, dtype=dtype)
    start, norm = (last(*shape, device=device), vectors(2, count)), vectors(2, count)
    constants, rate = {"momentum": 0.3, "decay": 0.1}, torch.tensor(0.05, device=device)
    velocities = last(*shape, device=device), vectors(2, count)
    close = of_many(rounding(torch.float32), math.prod(shape[1:]))
    for added in (None, anchors):
        out = [torch.empty_like(start[0]), torch.empty_like(start[1]), *(v.clone() for v in velocities)]
        out += [torch.empty_like(grads[0]), torch.empty_like(grads[1])]
        if not first:
            out[0].copy_(start[0]), out[1].copy_(start[1])  # the states in place, as in every step but the first
        now = start if first else out[:2]
        total = [g.float() / 4 + (0 if added is None else added[i].float() / 4) for i, g in enumerate(grads)]
        before = (None, None) if first else velocities
        expected = reference.update_folded(*total, *start, norm, *before, rate=rate, **constants)
        update_folded_(grads, added, now, norm, out, first=first, rate=rate, scale=4.0, **constants)
        for found, wanted in zip(out, expected, strict=True):
            limits = close if found.dtype == torch.float32 else rounding(found.dtype)
            torch.testing.assert_close(found, wanted.to(found.dtype), **limits)


def test_update_is_sgd_on_the_unfolded_layer(device):
    """torch's own optimiser, through the folding as autograd sees it."""
    count, steps = 6, 3
    norm = torch.rand(2, count, device=device) + 0.5
    weight, affine = last(count, 4, 3, 3, device=device).double(), torch.rand(2, count, device=device).double() + 0.5
    leaves = [weight.clone().requires_grad_(), affine.clone().requires_grad_()]
    sgd = torch.optim.SGD(leaves, lr=0.1, momentum=0.2, weight_decay=0.05)
    state = [weight.float(), affine.float()]
    out = [torch.empty_like(t) for t in (*state, *state)] + [
        torch.empty_like(state[0]),
        torch.empty(count, device=device),
    ]
    for step in range(steps):
        scale = leaves[1][0] * norm[0]
        folded = leaves[0] * scale[:, None, None, None], leaves[1][1] - norm[1] * scale
        grads = [torch.randn(f.shape, device=device).double() for f in folded]
        sgd.zero_grad()
        torch.autograd.backward(folded, grads)
        sgd.step()
        now = [g.float() for g in grads]
        now[0] = now[0].contiguous(memory_format=torch.channels_last)
        source = state if step == 0 else out[:2]
        constants = {"rate": torch.tensor(0.1, device=device), "momentum": 0.2, "decay": 0.05, "scale": 1.0}
        update_folded_(now, None, source, norm, out, first=step == 0, **constants)
        for found, wanted in zip(out, leaves, strict=False):
            torch.testing.assert_close(found, wanted.detach().float(), rtol=1e-4, atol=1e-5)


def update_arguments(device, dtype=torch.float32, first=False, rate=0.1):
    """Of torch.ops.ribfast.update_folded_, for (4, 2, 1, 1) weights."""

    def vectors(*shape, dtype=torch.float32):
        return torch.rand(shape, device=device).to(dtype)

    grad, anchor, folded = (last(4, 2, 1, 1, dtype=dtype, device=device) for _ in range(3))
    weight, new_weight, velocity = (last(4, 2, 1, 1, device=device) for _ in range(3))
    bias_grad, bias_anchor, folded_bias = (vectors(4, dtype=dtype) for _ in range(3))
    affine, norm, new_affine, affine_velocity = (vectors(2, 4) for _ in range(4))
    return {
        "grad": grad, "bias_grad": bias_grad, "anchor": anchor, "bias_anchor": bias_anchor, "weight": weight,
        "affine": affine, "norm": norm, "new_weight": new_weight, "new_affine": new_affine, "velocity": velocity,
        "affine_velocity": affine_velocity, "folded": folded, "folded_bias": folded_bias, "first": first,
        "rate": torch.tensor(rate, device=device), "momentum": 0.1, "decay": 0.1, "scale": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAMES.get)
def test_opcheck(device, dtype):
    compiled_on(device)
    raw, on = torch.ops.ribfast, {"dtype": dtype, "device": device}
    y, shortcut, mask = last(1, 4, 3, 5, **on), last(1, 4, 3, 5, **on), torch.ones(1, 1, 3, 5, **on)
    torch.library.opcheck(raw.activate_.default, (y, shortcut, mask, 6.0))
    torch.library.opcheck(raw.activate_.default, (y, None, None, math.inf))
    torch.library.opcheck(raw.activate_backward.default, (shortcut, y, 6.0))
    torch.library.opcheck(raw.update_folded_.default, tuple(update_arguments(device, dtype).values()))


def test_bad_input_is_named(device):
    compiled_on(device)
    raw = torch.ops.ribfast
    y = last(1, 4, 3, 3, device=device)

    def ones(*shape):
        return torch.ones(shape, device=device)

    with pytest.raises(ValueError, match=r"activate_: expected y .*channels last"):
        raw.activate_(torch.randn(1, 4, 3, 3, device=device), None, None, 1.0)
    with pytest.raises(TypeError, match="activate_: expected y in float64"):
        raw.activate_(y.int(), None, None, 1.0)
    with pytest.raises(ValueError, match="activate_: expected shortcut of shape"):
        raw.activate_(y, last(1, 4, 3, 2, device=device), None, 1.0)
    for wrong in (ones(1, 1, 3, 2), ones(1, 3, 3, 1), ones(2, 1, 3, 3), ones(1, 4, 3, 3), ones(3, 3)):
        with pytest.raises(ValueError, match=r"activate_: expected a contiguous mask \(N, 1, H, W\) of y"):
            raw.activate_(y, None, wrong, 1.0)
    with pytest.raises(ValueError, match="activate_: expected a contiguous mask"):
        raw.activate_(last(2, 4, 3, 3, device=device), None, ones(1, 1, 3, 3).expand(2, 1, 3, 3), 1.0)
    with pytest.raises(TypeError, match="activate_: expected mask in Float"):
        raw.activate_(y, None, ones(1, 1, 3, 3).half(), 1.0)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="activate_backward: expected a limit above 0"):
            raw.activate_backward(y, y, limit)
    with pytest.raises(TypeError, match="activate_backward: expected grad in Float"):
        raw.activate_backward(y.half(), y, 1.0)

    def refused(error, message, **changed):
        with pytest.raises(error, match=f"update_folded_: expected {message}"):
            raw.update_folded_(**(update_arguments(device) | changed))

    refused(ValueError, "grad of the weight's shape", grad=last(3, 2, 1, 1, device=device))
    refused(
        TypeError, "grad in float32, float16 or bfloat16, got Double", grad=last(4, 2, 1, 1, device=device).double()
    )
    refused(ValueError, "contiguous biases", bias_grad=ones(3))
    refused(ValueError, "contiguous biases", folded_bias=ones(8)[::2])
    refused(TypeError, "biases in Float", bias_anchor=ones(4).half())
    refused(ValueError, r"contiguous float32 \(2, O\) tensors", affine=ones(2, 3))
    refused(ValueError, r"contiguous float32 \(2, O\) tensors", new_affine=ones(2, 4).double())
    refused(TypeError, "weight in float32", weight=last(4, 2, 1, 1, device=device).double())
    refused(ValueError, "anchor of shape", anchor=last(4, 3, 1, 1, device=device))
    refused(TypeError, "folded in Float", folded=last(4, 2, 1, 1, device=device).half())
    refused(ValueError, r"rate of shape \(\), got \[1\]", rate=ones(1))
    refused(TypeError, "rate in float32, got Double", rate=torch.tensor(0.1, dtype=torch.float64, device=device))


def test_autograd_hears_of_what_is_written(device):
    compiled_on(device)
    arguments = update_arguments(device)
    versions = {name: t._version for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    torch.ops.ribfast.update_folded_(**arguments)
    changed = {name for name, before in versions.items() if arguments[name]._version > before}
    assert changed == {"new_weight", "new_affine", "velocity", "affine_velocity", "folded", "folded_bias"}
    y = last(1, 4, 3, 3, device=device)
    before = y._version
    activate_(y)
    assert y._version > before

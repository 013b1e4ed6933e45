"""The pointwise work between an adapted network's convolutions, and its update."""

import math

import pytest
import torch
from cases import DTYPES, rounding, tolerance

from ribfast import reference
from ribfast.ops.adapt import activate_, activate_backward, update_folded_

SHAPES = [(1, 64, 5, 7), (2, 33, 3, 4), (1, 1, 1, 1), (1, 7, 40, 41), (1, 16, 0, 3)]


def last(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("limit", [math.inf, 0.75])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_activation(shape, dtype, limit):
    mask = (torch.rand(1, 1, *shape[2:]) > 0.3).to(dtype).expand(shape[0], -1, -1, -1).contiguous()
    for shortcut in (None, last(*shape, dtype=dtype)):
        for covered in (None, mask):
            y = last(*shape, dtype=dtype)
            expected = reference.activate(y, shortcut, covered, limit)
            assert activate_(y, shortcut, covered, limit) is y
            torch.testing.assert_close(y, expected, **rounding(dtype))
            assert covered is None or not y[(covered == 0).expand_as(y)].any()
    grad = last(*shape, dtype=dtype)
    before, sums = activate_backward(grad, y, limit)
    expected, expected_sums = reference.activate_backward(grad, y, limit)
    assert torch.equal(before, expected) and before.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(sums, expected_sums, **tolerance(dtype))


def test_activation_keeps_nan_and_infinity():
    y = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 2.0]).view(1, 5, 1, 1)
    y = y.repeat(1, 8, 1, 1).contiguous(memory_format=torch.channels_last)
    expected = [math.nan, 6.0, 0.0, 0.0, 2.0]
    torch.testing.assert_close(activate_(y, limit=6.0).flatten(), torch.tensor(expected * 8), equal_nan=True)


def test_activation_is_the_gradient_of_itself():
    y, shortcut = last(1, 20, 3, 4).double(), last(1, 20, 3, 4).double()
    mask = torch.ones(1, 1, 3, 4, dtype=torch.float64)
    mask[..., 1] = 0

    def plain(y):
        return reference.activate(y, shortcut, mask, 0.8)

    leaf, grad = y.clone().requires_grad_(), torch.randn_like(y)
    expected = torch.autograd.grad(plain(leaf), leaf, grad)[0]
    found, _ = activate_backward(
        grad, activate_(y.clone(memory_format=torch.preserve_format), shortcut, mask, 0.8), 0.8
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(48, 20, 3, 3), (5, 37, 1, 1), (30, 1, 3, 3), (1, 1, 1, 1)])
def test_update(shape, dtype, first):
    count = shape[0]
    grads = last(*shape, dtype=dtype), torch.randn(count).to(dtype)
    anchors = last(*shape, dtype=dtype), torch.randn(count).to(dtype)
    start = last(*shape), torch.rand(2, count) + 0.5
    norm = torch.rand(2, count) + 0.5
    constants = {"momentum": 0.3, "decay": 0.1}
    velocities = last(*shape), torch.randn(2, count)
    for added in (None, anchors):
        out = [torch.empty_like(start[0]), torch.empty_like(start[1]), *(v.clone() for v in velocities)]
        out += [torch.empty_like(grads[0]), torch.empty_like(grads[1])]
        update_folded_(grads, added, start, norm, out, first=first, rate=torch.tensor(0.05), scale=4.0, **constants)
        total = [g.float() / 4 + (0 if added is None else added[i].float() / 4) for i, g in enumerate(grads)]
        before = (None, None) if first else velocities
        expected = reference.update_folded(*total, *start, norm, *before, rate=0.05, **constants)
        for found, wanted in zip(out, expected, strict=True):
            torch.testing.assert_close(found, wanted.to(found.dtype), **rounding(found.dtype))


def test_update_is_sgd_on_the_unfolded_layer():
    """torch's own optimiser, through the folding as autograd sees it."""
    count, steps = 6, 3
    norm = torch.rand(2, count) + 0.5
    weight, affine = last(count, 4, 3, 3).double(), torch.rand(2, count).double() + 0.5
    leaves = [weight.clone().requires_grad_(), affine.clone().requires_grad_()]
    sgd = torch.optim.SGD(leaves, lr=0.1, momentum=0.2, weight_decay=0.05)
    state = [weight.float(), affine.float()]
    out = [torch.empty_like(t) for t in (*state, *state)] + [torch.empty_like(state[0]), torch.empty(count)]
    for step in range(steps):
        scale = leaves[1][0] * norm[0]
        folded = leaves[0] * scale[:, None, None, None], leaves[1][1] - norm[1] * scale
        grads = [torch.randn(f.shape).double() for f in folded]
        sgd.zero_grad()
        torch.autograd.backward(folded, grads)
        sgd.step()
        now = [g.float() for g in grads]
        now[0] = now[0].contiguous(memory_format=torch.channels_last)
        source = state if step == 0 else out[:2]
        constants = {"rate": torch.tensor(0.1), "momentum": 0.2, "decay": 0.05, "scale": 1.0}
        update_folded_(now, None, source, norm, out, first=step == 0, **constants)
        for found, wanted in zip(out, leaves, strict=False):
            torch.testing.assert_close(found, wanted.detach().float(), rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    raw = torch.ops.ribfast
    y = last(1, 4, 3, 3)
    with pytest.raises(ValueError, match=r"activate_: expected y .*channels last"):
        raw.activate_(torch.randn(1, 4, 3, 3), None, None, 1.0)
    with pytest.raises(ValueError, match="activate_: expected shortcut of shape"):
        raw.activate_(y, last(1, 4, 3, 2), None, 1.0)
    with pytest.raises(ValueError, match="activate_: expected a contiguous mask"):
        raw.activate_(y, None, torch.ones(1, 1, 3, 2), 1.0)
    with pytest.raises(TypeError, match="activate_: expected mask in Float"):
        raw.activate_(y, None, torch.ones(1, 1, 3, 3).half(), 1.0)
    with pytest.raises(ValueError, match="activate_backward: expected a limit above 0"):
        raw.activate_backward(y, y, 0.0)
    with pytest.raises(TypeError, match="activate_backward: expected grad in Float"):
        raw.activate_backward(y.half(), y, 1.0)
    affine, bias = torch.ones(2, 4), torch.ones(4)
    weight = last(4, 2, 1, 1)

    def update(grad=weight, bias=bias, weight=weight, affine=affine):
        out = [t.clone() for t in (weight, affine, weight, affine, grad, bias)]
        raw.update_folded_(grad, bias, None, None, weight, affine, affine, *out, True, 0.1, 0.0, 0.0, 1.0)

    with pytest.raises(ValueError, match="update_folded_: expected grad of the weight's shape"):
        update(grad=last(3, 2, 1, 1))
    with pytest.raises(ValueError, match="update_folded_: expected contiguous biases"):
        update(bias=torch.ones(3))
    with pytest.raises(ValueError, match="update_folded_: expected contiguous float32"):
        update(affine=torch.ones(2, 3))
    with pytest.raises(TypeError, match="update_folded_: expected weight in float32"):
        update(weight=weight.double())


def test_autograd_hears_of_what_is_written():
    grad, weight, affine, bias = last(4, 2, 1, 1), last(4, 2, 1, 1), torch.ones(2, 4), torch.ones(4)
    out = [t.clone() for t in (weight, affine, weight, affine, grad, bias)]
    versions = [t._version for t in (grad, weight, *out)]
    constants = {"momentum": 0.1, "decay": 0.1, "scale": 1.0}
    update_folded_((grad, bias), None, (weight, affine), affine, out, first=True, rate=torch.tensor(0.1), **constants)
    changed = [t._version > before for t, before in zip((grad, weight, *out), versions, strict=True)]
    assert changed == [False, False, *[True] * 6]

"""segmentation_loss: kernels against the specification."""

import functools
import math
import subprocess
import sys

import pytest
import torch
from cases import NAMES, rounding
from torch.nn import functional as F

from ribfast import ops, reference

FITS = [None, "clamp", "ignore", "pow"]


def inputs(labels, small, large, device="cpu", dtype=torch.float32, images=2):
    """Logits of a network that is right where it is sure, and patches of labels of which some are ignored."""
    given = torch.randint(0, labels, (images, large[0] // 7 + 1, large[1] // 5 + 1), dtype=torch.uint8)
    given = given.repeat_interleave(7, 1).repeat_interleave(5, 2)[:, : large[0], : large[1]].contiguous()
    given[torch.rand(given.shape) < 0.2] = 255
    logits = torch.randn(images, labels, *small, dtype=torch.float64).mul_(2)
    nearest = F.interpolate(given[:, None].double(), small, mode="nearest")[:, 0]
    logits += 3 * (nearest[:, None] == torch.arange(labels).view(1, -1, 1, 1))
    return logits.to(device, dtype), given.to(device)


def with_gradient(run, logits, *rest, **options):
    leaf = logits.clone().requires_grad_()
    loss = run(leaf, *rest, **options)
    loss.backward()
    return loss.detach().double(), leaf.grad


def agrees(logits, labels, **options):
    found = with_gradient(ops.segmentation_loss, logits, labels, **options)
    expected = with_gradient(reference.segmentation_loss, logits.double(), labels, **options)
    assert found[1].dtype == logits.dtype and found[1].shape == logits.shape
    torch.testing.assert_close(found[0], expected[0], rtol=2e-5, atol=1e-6)
    largest = expected[1].abs().max().item()
    close = rounding(torch.float32 if logits.dtype == torch.float64 else logits.dtype)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=close["rtol"], atol=close["atol"] * largest + 1e-9)
    return expected


@pytest.mark.parametrize("balanced", [False, True], ids=["mean", "balanced"])
@pytest.mark.parametrize("under_fitting", FITS)
@pytest.mark.parametrize(
    "small, large",
    [((1, 1), (1, 1)), ((5, 9), (33, 70)), ((3, 4), (63, 17)), ((7, 6), (7, 6)), ((9, 11), (4, 25)), ((1, 3), (8, 2))],
    ids=str,
)
@pytest.mark.parametrize("labels", [1, 2, 21, 81])
def test_equals_the_specification(device, labels, small, large, under_fitting, balanced):
    logits, given = inputs(labels, small, large, device)
    # above and below every mean
    for beta in (-1.0, 1e3) if under_fitting else (0.5,):
        agrees(logits, given, under_fitting=under_fitting, beta=beta, balanced=balanced)


@pytest.mark.parametrize("labels", [15, 16, 17, 33, 128, 254, 255])
def test_any_number_of_labels(device, labels):
    logits, given = inputs(labels, (3, 5), (20, 31), device)
    agrees(logits, given)


def test_by_hand(device):
    """Two labels, logits at (1, 2), six pixels in a row: weights of the right logit 0, 0, 1/3, 2/3, 1, 1."""
    logits = torch.tensor([[[[0.0, 3.0]], [[0.0, 0.0]]]], device=device)
    labels = torch.tensor([[[0, 255, 1, 0, 1, 255]]], dtype=torch.uint8, device=device)
    z = [0, 0, 1, 2, 3, 3]
    losses = [
        math.log(1 + math.exp(-value if label == 0 else value))
        for value, label in zip(z, [0, 0, 1, 0, 1, 0], strict=True)
    ]
    background, foreground = [losses[0], losses[3]], [losses[2], losses[4]]
    found = functools.partial(ops.segmentation_loss, logits, labels)
    assert found().item() == pytest.approx((sum(background) + sum(foreground)) / 4, rel=1e-5)
    assert found(balanced=True).item() == pytest.approx(sum(background) / 4 + sum(foreground) / 4, rel=1e-5)
    mean = (sum(background) + sum(foreground)) / 6
    assert found(under_fitting="clamp", beta=mean - 1e-4).item() == pytest.approx(mean, rel=1e-5)
    clamped = sum(min(loss, 0.5) for loss in background + foreground) / 6
    assert found(under_fitting="clamp", beta=mean + 1e-4).item() == pytest.approx(clamped, rel=1e-5)
    kept = sum(loss for loss in background + foreground if loss <= 0.5) / 6
    assert found(under_fitting="ignore", beta=2).item() == pytest.approx(kept, rel=1e-5)
    roots = sum(math.sqrt(loss) for loss in background) / 2, sum(math.sqrt(loss) for loss in foreground) / 2
    assert found(under_fitting="pow", beta=2, balanced=True).item() == pytest.approx(sum(roots) / 2, rel=1e-5)


def test_the_slope_of_a_power_is_finite():
    """Differences of the specification, at both sides of where the chord begins and at 0."""
    losses = torch.tensor([0.0, 5e-7, 2e-6, 0.3], dtype=torch.float64, requires_grad=True)
    values = reference.fitted(losses, "pow", 0.5)
    values.sum().backward()
    differences = (reference.fitted(losses + 1e-9, "pow", 0.5) - values).detach() / 1e-9
    torch.testing.assert_close(losses.grad, differences, rtol=1e-3, atol=0)
    assert losses.grad[0] == pytest.approx(1e3)


def test_sure_pixels_have_small_gradients(device):
    """Losses of exactly 0, where a power's slope would be infinite."""
    logits = torch.zeros(1, 3, 2, 2, device=device)
    logits[:, 1] = 300
    labels = torch.ones(1, 9, 9, dtype=torch.uint8, device=device)
    loss, grad = with_gradient(ops.segmentation_loss, logits, labels, under_fitting="pow")
    assert loss == 0 and grad.abs().max() < 1e-5


@pytest.mark.parametrize("balanced", [False, True], ids=["mean", "balanced"])
@pytest.mark.parametrize("under_fitting", FITS)
def test_one_group_or_none(device, under_fitting, balanced):
    logits, given = inputs(4, (3, 4), (17, 20), device)
    options = dict(under_fitting=under_fitting, beta=10.0, balanced=balanced)
    for only in (torch.where(given == 0, 255, given), torch.where(given != 0, 255, given)):
        agrees(logits, only, **options)
    loss, grad = with_gradient(ops.segmentation_loss, logits, torch.full_like(given, 255), **options)
    assert loss == 0 and grad.count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=NAMES.get)
def test_other_types(device, dtype):
    logits, given = inputs(21, (5, 6), (37, 45), device, dtype)
    for under_fitting in FITS:
        agrees(logits, given, under_fitting=under_fitting, beta=5.0)
    leaf = logits.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ops.segmentation_loss(leaf, given)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    assert torch.equal(loss, ops.segmentation_loss(leaf.detach().float(), given))
    loss.backward()
    assert leaf.grad.dtype == dtype


def test_logits_of_any_strides(device):
    logits, given = inputs(5, (6, 7), (30, 41), device)
    expected = with_gradient(ops.segmentation_loss, logits, given)
    for laid_out in (
        logits.contiguous(memory_format=torch.channels_last),
        logits.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([logits, logits], -1)[..., 0],
    ):
        leaf = laid_out.detach().requires_grad_()
        loss = ops.segmentation_loss(leaf, given.transpose(1, 2).contiguous().transpose(1, 2))
        loss.backward()
        assert torch.equal(loss.detach().double(), expected[0]) and torch.equal(leaf.grad, expected[1])


@pytest.mark.parametrize("size", [60.0, 300.0, 1e4, 1e30], ids=str)
def test_large_logits(device, size):
    """Differences whose exponentials overflow; numbers that are enlarged without rounding."""
    logits, given = inputs(7, (4, 5), (32, 40), device)
    unit = 2.0 ** round(math.log2(size / 64))
    agrees((logits * (64 / logits.abs().max())).round() * unit, given)


def test_nan_reaches_the_loss(device):
    logits, given = inputs(5, (4, 5), (25, 30), device)
    logits[1, 2, 2, 2] = math.nan
    for under_fitting in FITS:
        assert ops.segmentation_loss(logits, given, under_fitting=under_fitting).isnan()


@pytest.mark.parametrize("balanced", [False, True], ids=["mean", "balanced"])
@pytest.mark.parametrize("under_fitting", FITS)
@pytest.mark.parametrize("beta", [-1.0, 1e3])
def test_processes_share_a_batch(device, under_fitting, balanced, beta):
    """The mean over processes of losses and gradients is the whole batch's."""
    logits, given = inputs(6, (4, 5), (25, 30), device, images=3)
    given[0, :15] = 255  # processes differ in how much is labelled
    options = dict(under_fitting=under_fitting, beta=beta, balanced=balanced)
    whole = with_gradient(ops.segmentation_loss, logits, given, **options)
    shares, seen = [slice(0, 1), slice(1, 3)], []
    for share in shares:
        ops.segmentation_loss(logits[share], given[share], reduce=lambda t: seen.append(t.clone()), **options)
    total = sum(seen)
    assert total.dtype == torch.float64 and total[1] == given.numel() and total[2] == (given == 0).sum()
    for reduce in (lambda t: total, lambda t: t.copy_(total), lambda t: (t.copy_(total), None)[1]):
        parts = [with_gradient(ops.segmentation_loss, logits[s], given[s], reduce=reduce, world=2, **options)
                 for s in shares]  # fmt: skip
        torch.testing.assert_close(sum(loss for loss, _ in parts) / 2, whole[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.cat([grad for _, grad in parts]) / 2, whole[1], rtol=1e-5, atol=1e-9)
    agrees(logits[:1], given[:1], reduce=lambda t: total, world=2, **options)


@pytest.mark.parametrize("balanced", [False, True], ids=["mean", "balanced"])
@pytest.mark.parametrize("under_fitting", FITS)
def test_a_batch_in_parts(device, under_fitting, balanced):
    """With the whole batch's counts, losses and gradients of parts add up."""
    logits, given = inputs(6, (4, 5), (25, 30), device, images=3)
    background, foreground = (given == 0).sum().item(), ((given != 0) & (given != 255)).sum().item()
    counts = torch.tensor([given.numel(), background, foreground], dtype=torch.float64, device=device)
    options = dict(under_fitting=under_fitting, beta=1e3, balanced=balanced)
    whole = with_gradient(ops.segmentation_loss, logits, given, **options)
    parts = [with_gradient(ops.segmentation_loss, logits[i : i + 1], given[i : i + 1], counts=counts, **options)
             for i in range(3)]  # fmt: skip
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), whole[1], rtol=1e-5, atol=1e-9)
    agrees(logits[:1], given[:1], counts=counts, **options)


def test_results_do_not_depend_on_threads():
    logits, given = inputs(21, (11, 13), (81, 97), images=3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(with_gradient(ops.segmentation_loss, logits, given, under_fitting="pow", beta=10.0))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def raw_inputs(device):
    logits, given = inputs(5, (3, 4), (13, 17), device)
    losses = torch.ops.ribfast.pixel_losses(logits, given)
    return logits, given, losses, torch.tensor(True, device=device)


@pytest.mark.parametrize("fit", range(4))
def test_opcheck(device, fit):
    logits, given, losses, active = raw_inputs(device)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(torch.ops.ribfast.pixel_losses.default, (logits, given), test_utils=tests)
    rest = given, losses, active if fit else None, fit, 0.5
    torch.library.opcheck(torch.ops.ribfast.pixel_loss_sums.default, (logits.requires_grad_(), *rest))
    grad = torch.rand(4, device=device, dtype=torch.float64)
    backward = torch.ops.ribfast.pixel_loss_sums_backward.default
    torch.library.opcheck(backward, (grad, logits.detach(), *rest), test_utils=tests)


def test_gradcheck():
    """The specification's own, in float64."""
    logits, given = inputs(4, (3, 4), (9, 11), dtype=torch.float64)
    for under_fitting in FITS:
        run = functools.partial(reference.segmentation_loss, under_fitting=under_fitting, beta=10.0, balanced=True)
        assert torch.autograd.gradcheck(run, (logits.requires_grad_(), given))


def test_compiles(device):
    logits, given = inputs(5, (3, 4), (13, 17), device)
    compiled = torch.compile(ops.segmentation_loss, fullgraph=True, backend="aot_eager")
    for under_fitting in FITS:
        options = dict(under_fitting=under_fitting, beta=10.0)
        expected = with_gradient(ops.segmentation_loss, logits, given, **options)
        for a, b in zip(with_gradient(compiled, logits, given, **options), expected, strict=True):
            torch.testing.assert_close(a, b)


MEASURE = """
import re, torch
from ribfast import ops
torch.set_num_threads(2)
def step(logits, labels):
    ops.segmentation_loss(logits.requires_grad_(), labels, under_fitting="pow", beta=100.0).backward()
step(torch.rand(1, 81, 9, 9), torch.zeros(1, 60, 60, dtype=torch.uint8))
logits, labels = torch.rand(2, 81, 65, 65), torch.zeros(2, 2000, 2000, dtype=torch.uint8)
def memory(what):
    with open("/proc/self/status") as status:
        return int(re.search(what + r":\\s+(\\d+) kB", status.read())[1]) * 1024
before = memory("VmRSS")
step(logits, labels)
print((memory("VmHWM") - before) / (labels.numel() * 4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_map_of_the_labels_size_is_kept():
    """The enlarged logits would be 81 of it; beside it are the logits four times, transposed and padded."""
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert 0.9 < float(result.stdout) < 1.6, "peak memory in units of the losses"


def refused(error, match, *args, **options):
    with pytest.raises(error, match=match):
        ops.segmentation_loss(*args, **options)


def test_refuses_bad_input(device):
    logits, labels = inputs(5, (3, 4), (13, 17), device)
    refused(TypeError, "logits to be a tensor .* got int", 3, labels)
    refused(ValueError, r"logits \(N, L, h, w\), got shape \(5, 3, 4\)", logits[0], labels)
    refused(ValueError, "logits with at least one row and column", logits[:, :, :0], labels)
    refused(ValueError, "logits of 1 to 255 labels", logits[:, :0], labels)
    refused(TypeError, "labels to be a uint8 tensor .* got torch.int64", logits, labels.long())
    refused(ValueError, r"labels \(N, H, W\) of the logits' 2 images, got shape \(1, 13, 17\)", logits, labels[:1])
    refused(ValueError, "labels with at least one row and column", logits, labels[:, :0])
    refused(ValueError, "under_fitting to be None, 'clamp', 'ignore' or 'pow', got 'root'", logits, labels,
            under_fitting="root")  # fmt: skip
    refused(ValueError, "k above 0, and at most 1 as a power, got 0", logits, labels, k=0)
    refused(ValueError, "at most 1 as a power, got 2", logits, labels, k=2, under_fitting="pow")
    refused(ValueError, "beta to be a finite number, got nan", logits, labels, beta=math.nan)
    refused(ValueError, "world from 1 to 2147483647, got 0", logits, labels, world=0)
    refused(TypeError, r"counts to be a float64 tensor \(3,\), got torch.float32", logits, labels,
            counts=torch.ones(3, device=device))  # fmt: skip
    refused(ValueError, r"counts \(3,\), got shape \(2,\)", logits, labels,
            counts=torch.ones(2, device=device, dtype=torch.float64))  # fmt: skip


@pytest.mark.parametrize("answer", ["a handle", torch.ones(2)], ids=["handle", "shape"])
def test_refuses_what_reduce_must_not_return(device, answer):
    logits, labels = inputs(5, (3, 4), (13, 17), device)
    refused(TypeError, "reduce to return the summed tensor", logits, labels, reduce=lambda t: answer)


def test_names_a_wrong_label():
    logits, labels = inputs(5, (3, 4), (13, 17))
    labels[1, 12, 3] = 77
    refused(ValueError, "labels below 5 or 255, ignored, got 77", logits, labels)


def test_refuses_what_memory_would_not_survive(device):
    logits, given, losses, active = raw_inputs(device)
    sums, backward = torch.ops.ribfast.pixel_loss_sums, torch.ops.ribfast.pixel_loss_sums_backward
    for args in (
        (logits, given[:, :5], losses, None, 0, 0.5), (logits, given, losses[:1], None, 0, 0.5),
        (logits, given, losses.double(), None, 0, 0.5), (logits, given, losses, None, 1, 0.5),
        (logits, given, losses, active[None], 1, 0.5), (logits, given, losses, active, 4, 0.5),
        (logits, given, losses, active, 3, 2.0),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match="pixel_loss_sums: expected"):
            sums(*args)
    with pytest.raises(ValueError, match="pixel_loss_sums_backward: expected grad"):
        backward(torch.ones(3, dtype=torch.float64, device=device), logits, given, losses, None, 0, 0.5)
    with pytest.raises(RuntimeError, match="pixel_losses: expected tensors that need no gradient"):
        torch.ops.ribfast.pixel_losses(logits.requires_grad_(), given)

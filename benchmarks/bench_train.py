"""What trainings compute, against plain torch: the segmentation network's loss and erasing, where logits and maps are
enlarged first, and steps of adversarial erasing, where both networks run forward and backward in either one's turn."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.eader import Steps
from ribfast import ops, reference
from ribfast.train import EaderConfig


@pytest.mark.parametrize("under_fitting", [None, "pow"], ids=["mean", "pow"])
@pytest.mark.parametrize("labels", [21, 81])
def bench_segmentation_loss(compare, threads, labels, under_fitting):
    """Forward and backward of two crops of 321 at output stride 8, a fifth of the pixels ignored."""
    logits = torch.randn(2, labels, 41, 41) * 3
    given = torch.randint(0, labels, (2, 11, 11), dtype=torch.uint8)
    given[:, ::5] = 255
    given = given.repeat_interleave(30, 1).repeat_interleave(30, 2)[:, :321, :321].contiguous()

    def ours():
        leaf = logits.clone().requires_grad_()
        ops.segmentation_loss(leaf, given, under_fitting=under_fitting, beta=100.0).backward()

    def plain():
        leaf = logits.clone().requires_grad_()
        large = F.interpolate(leaf, given.shape[1:], mode="bilinear", align_corners=False)
        if under_fitting is None:
            F.cross_entropy(large, given.long(), ignore_index=255).backward()
            return
        losses = F.cross_entropy(large, given.long(), ignore_index=255, reduction="none")
        losses.clamp(min=1e-6).sqrt().mean().backward()

    compare(ours, plain, rounds=9)


def bench_erase(compare, threads):
    """Forward and backward of two maps each of twelve images, against the specification."""
    images = torch.randn(12, 3, 448, 448).contiguous(memory_format=torch.channels_last)
    maps, which = torch.randn(24, 28, 28) * 3, torch.arange(24) // 2
    grads = torch.randn(24, 3, 448, 448).contiguous(memory_format=torch.channels_last), torch.randn(24)

    def run(erase):
        leaf = maps.clone().requires_grad_()
        torch.autograd.backward(erase(images, leaf, which), grads)

    compare(lambda: run(ops.erase), lambda: run(reference.erase), rounds=9)


@pytest.mark.parametrize(
    "attention, baseline", [("gradcam", "straightforward"), ("cam", "straightforward"), ("cam", "frozen")]
)
def bench_eader(compare, threads, attention, baseline):
    """A step of either turn, of four crops of 160 with eight classes in all; ResNet-50 against ResNet-18."""
    config = EaderConfig("resnet50", attention=attention, crop=160, device="cpu")
    steps = Steps(config, 4, torch.device("cpu"), baseline)
    torch.testing.assert_close(steps.ours(), steps.plain(), rtol=1e-4, atol=0)
    target = 2.0 if baseline == "straightforward" else None
    compare(steps.ours, steps.plain, target, rounds=3, of_minima=True)

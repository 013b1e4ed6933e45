"""Trainings against plain torch: the segmentation network's loss, where it enlarges the logits first, and steps of
adversarial erasing, where both networks run forward and backward in either one's turn."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.photographs import picture, write
from ribfast import ops, reference
from ribfast.processes import Processes
from ribfast.train import EaderConfig
from ribfast.train.adversarial import EaderTask


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


def straightforward(localiser, adversary, images, targets, attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses as one writes them in plain torch: nothing is detached, and Grad-CAM's gradients are caught on their
    way down from a class's logits, once for each class."""
    features = localiser.tail(localiser._trunk(images))
    maps = localiser.classifier(features)
    logits, (which, present) = maps.mean((2, 3)), targets.nonzero(as_tuple=True)
    chosen = maps[which, present]
    if attention == "gradcam":
        caught, weights = [], {}
        handle = features.register_hook(lambda grad: caught.append(grad))
        for number in present.unique().tolist():
            logits[:, number].sum().backward(retain_graph=True)
            weights[number] = caught.pop().mean((2, 3), keepdim=True)
        handle.remove()
        localiser.zero_grad()
        rows = torch.stack([weights[c][i] for i, c in zip(which.tolist(), present.tolist(), strict=True)])
        chosen = (rows * features[which]).sum(1)
    erased, areas = reference.erase(images, chosen, which)
    found = adversary.through(erased).mean((2, 3))
    left = found[torch.arange(len(which)), present].sigmoid().mean()
    loss = F.multilabel_soft_margin_loss(logits, targets) + 0.05 * left + 1e-5 * areas.mean() / images[0, 0].numel()
    return loss, F.multilabel_soft_margin_loss(found, targets[which])


@pytest.mark.parametrize("baseline", ["straightforward", "frozen"])
@pytest.mark.parametrize("attention", ["cam", "gradcam"])
def bench_eader(compare, threads, tmp_path, attention, baseline):
    """A step of each turn, of four crops of 192 with six classes. frozen: the baseline leaves out, too, what follows
    from layers that do not train, and takes Grad-CAM's gradients of the features alone."""
    size, crop, classes = (240, 320), 192, 15
    made = write(tmp_path, (picture(n, size) for n in range(classes)), lambda n: n, classes)
    config = EaderConfig("resnet50", attention=attention, crop=crop, device="cpu")
    task, here = EaderTask(made, config, None, None, None), Processes(0, 1, torch.device("cpu"))
    task.begin(filled=False)
    both = task.model.train().to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, crop, crop).contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(4, classes)
    targets[[0, 0, 1, 2, 2, 3], [0, 4, 0, 7, 9, 4]] = 1
    turns = (("localiser", 0), ("adversary", config.localiser_steps))
    trained = {p for p in both.parameters() if p.requires_grad}
    task.begin_step(0, [images, targets], here)  # the copies of those that rest are made once in a turn of 200

    def ours():
        for task.trains, _ in turns:
            both.zero_grad()
            found.append(task.losses(both, [images, targets], here)["loss"])
            found[-1].backward()

    def plain():
        for turn in range(2):
            both.zero_grad()
            if baseline == "frozen":
                losses = reference.adversarial_losses(
                    both.localiser, both.adversary, images, targets, attention=attention
                )
            else:
                losses = straightforward(both.localiser, both.adversary, images, targets, attention)
            expected.append(losses[turn])
            losses[turn].backward()

    def freeze(frozen: bool):
        for p in both.parameters():
            p.requires_grad_(p in trained or not frozen)

    def ours_frozen():
        freeze(True)
        ours()

    def plain_frozen():
        freeze(baseline == "frozen")
        plain()

    found, expected = [], []
    compare(ours_frozen, plain_frozen, target=2.0 if baseline == "straightforward" else None, rounds=5, of_minima=True)
    close = torch.stack(found).view(-1, 2)[0], torch.stack(expected).view(-1, 2)[0]
    torch.testing.assert_close(*close, rtol=1e-4, atol=0)

"""Steps of adversarial erasing, a turn's each, as they are trained and as one writes them in plain torch."""

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.photographs import picture, write
from ribfast import reference
from ribfast.processes import Processes
from ribfast.train import EaderConfig, loop
from ribfast.train.adversarial import EaderTask

CLASSES = 20


class Steps:
    """The same networks twice, and a batch with three classes on every other image and one on the rest.

    baseline "straightforward": everything has gradients; "frozen": what comes before layers that train has none, and
    Grad-CAM's gradients are of the features alone.
    """

    def __init__(self, config: EaderConfig, images: int, device: torch.device, baseline: str = "straightforward"):
        with tempfile.TemporaryDirectory() as folder:
            source = write(Path(folder) / "data", (picture(n, (60, 80)) for n in range(CLASSES)), int, CLASSES)
            self.task = EaderTask(source, config, None, None, None)
        self.task.begin(filled=False)
        self.config, self.here, self.baseline = config, Processes(0, 1, device), baseline
        self.both = self.task.model.train().to(device, memory_format=torch.channels_last)
        self.plain_both = copy.deepcopy(self.both)
        if baseline == "straightforward":
            self.plain_both.requires_grad_(True)
        shape, generator = (images, 3, config.crop, config.crop), torch.Generator().manual_seed(0)
        targets = torch.zeros(images, CLASSES)
        for image, row in enumerate(targets):
            row[[image % CLASSES, *([(image + 3) % CLASSES, (image + 7) % CLASSES] * (image % 2))]] = 1
        batch = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last), targets
        self.batch = [t.to(device) for t in batch]
        self.task.begin_step(0, self.batch, self.here)  # copies of those that rest, made once in a turn of 200 steps

    def ours(self) -> Tensor:
        """Both turns' losses."""
        losses = []
        for self.task.trains in ("localiser", "adversary"):
            self.both.zero_grad()
            losses.append(self.task.losses(self.both, self.batch, self.here)["loss"])
            losses[-1].backward()
        return torch.stack(losses).detach()

    def plain(self) -> Tensor:
        networks, attention, losses = (self.plain_both.localiser, self.plain_both.adversary), self.config.attention, []
        for turn in range(2):
            self.plain_both.zero_grad()
            with loop.autocast(self.config, self.here):
                if self.baseline == "frozen":
                    found = reference.adversarial_losses(*networks, *self.batch, attention=attention)
                else:
                    found = straightforward(*networks, *self.batch, attention)
            losses.append(found[turn])
            losses[-1].backward()
        return torch.stack(losses).detach()


def straightforward(localiser, adversary, images, targets, attention) -> tuple[Tensor, Tensor]:
    """Both losses: nothing is detached, and Grad-CAM's gradients are caught on their way down from a class's logits,
    once for each class."""
    features = localiser.tail(localiser._trunk(images))
    maps = localiser.classifier(features)
    logits, (which, present) = maps.mean((2, 3)), targets.nonzero(as_tuple=True)
    chosen = maps[which, present]
    if attention == "gradcam":
        caught, weights = [], {}
        handle = features.register_hook(lambda grad: caught.append(grad.mean((2, 3), keepdim=True)))
        for number in present.unique().tolist():
            logits[:, number].sum().backward(retain_graph=True)
            weights[number] = caught.pop()
        handle.remove()
        localiser.zero_grad()
        rows = torch.stack([weights[c][i] for i, c in zip(which.tolist(), present.tolist(), strict=True)])
        chosen = (rows * features[which]).sum(1)
    return reference.adversarial_losses_of(adversary, images, targets, logits, chosen)

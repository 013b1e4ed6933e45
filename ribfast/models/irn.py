"""IRN's network (Ahn et al. 2019): class boundaries and displacements, on a classifier's frozen backbone."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import kind_of, load_into
from .classifier import CamClassifier

STRIDE = 4  # of both outputs
TOGETHER = 1 << 21  # pixels whose boundaries are computed at once, mirrors not counted
_OWN = ("fc_edge", "fc_dp", "mean_shift.")  # what names of the branches' tensors begin with


def _layer(channels: int, out: int, groups: int, enlarged: int = 1) -> nn.Sequential:
    """1x1 convolution, GroupNorm, bilinear enlargement, ReLU."""
    layers = [nn.Conv2d(channels, out, 1, bias=False), nn.GroupNorm(groups, out)]
    if enlarged > 1:
        layers.append(nn.Upsample(scale_factor=enlarged, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


class MeanShift(nn.Module):
    """Subtracts what displacements are on average, once that is known: 0 while the network trains."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x - self.running_mean[:, None, None]


class Branches(nn.Module):
    """What is trained: two heads on the features of five depths, at strides 4, 4, 8, 16 and 16; IRN's own names."""

    def __init__(self, channels: tuple[int, ...], name: str):
        super().__init__()
        self.name = f"pair of IRN's branches on {name}"
        one, two, three, four, five = channels
        self.fc_edge1 = _layer(one, 32, 4)
        self.fc_edge2 = _layer(two, 32, 4)
        self.fc_edge3 = _layer(three, 32, 4, 2)
        self.fc_edge4 = _layer(four, 32, 4, 4)
        self.fc_edge5 = _layer(five, 32, 4, 4)
        self.fc_edge6 = nn.Conv2d(160, 1, 1)
        self.fc_dp1 = _layer(one, 64, 8)
        self.fc_dp2 = _layer(two, 128, 16)
        self.fc_dp3 = _layer(three, 256, 16)
        self.fc_dp4 = _layer(four, 256, 16, 2)
        self.fc_dp5 = _layer(five, 256, 16, 2)
        self.fc_dp6 = _layer(768, 256, 16, 2)
        self.fc_dp7 = _layer(448, 256, 16).append(nn.Conv2d(256, 2, 1, bias=False))
        self.mean_shift = MeanShift()

    def boundary(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (N, 1, h, w) of class boundaries at stride 4."""
        layers = (self.fc_edge1, self.fc_edge2, self.fc_edge3, self.fc_edge4, self.fc_edge5)
        return self.fc_edge6(_together([layer(x) for layer, x in zip(layers, features, strict=True)]))

    def displacement(self, features: Sequence[Tensor]) -> Tensor:
        """(N, 2, h, w), y before x: from each pixel to its object's centroid, in pixels of stride 4."""
        one, two, three, four, five = features
        coarse = self.fc_dp6(_together([self.fc_dp3(three), self.fc_dp4(four), self.fc_dp5(five)]))
        return self.mean_shift(self.fc_dp7(_together([self.fc_dp1(one), self.fc_dp2(two), coarse])))


def _together(features: list[Tensor]) -> Tensor:
    """Concatenated; enlarged ones reach beyond the first where its sides are no multiples."""
    height, width = features[0].shape[2:]
    return torch.cat([x[..., :height, :width] for x in features], 1)


class IRNet(nn.Module):
    """Only the branches train: the backbone is frozen, its features are computed without a graph."""

    crop: int = 512  # the side of what it was trained on; IRN's own

    def __init__(self, backbone: CamClassifier):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.branches = Branches(backbone.stage_channels, backbone.name)

    @property
    def normalization(self) -> str:
        return self.backbone.normalization

    def metadata(self) -> dict[str, str]:
        """What a checkpoint must say beside its tensors for open_irn."""
        known = self.backbone.metadata()
        own = {"kind": "irn", "crop": str(self.crop)}
        return own | {name: known[name] for name in ("network", "normalization", "tensorflow_padding")}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the backbone's under torchvision's names, the branches' under IRN's."""
        state = self.backbone.state_dict() | self.branches.state_dict()
        state.pop("classifier.weight")
        return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}

    def fill(self, state: dict[str, Tensor], *, branches: bool = True, path: str | os.PathLike | None = None) -> None:
        """The opposite of `tensors`; branches: False to fill the backbone alone, from a classifier's for instance.
        path: the checkpoint's, to be named."""
        own = {name: value for name, value in state.items() if name.startswith(_OWN)}
        backbone = {name: value for name, value in state.items() if name not in own}
        load_into(self.backbone, backbone, classifier=False, path=path, kind=kind_of(state))
        if branches:
            load_into(self.branches, own, path=path, kind=kind_of(state))

    def features(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return self.backbone.stages(images)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (N, 3, H, W) -> logits of boundaries (N, 1, h, w), displacements (N, 2, h, w); h and w are
        H and W over 4, rounded up."""
        features = self.features(images)
        return self.branches.boundary(features), self.branches.displacement(features)

    @torch.no_grad()
    def boundaries(self, views: Sequence[Tensor], padded: int | None = None) -> list[Tensor]:
        """Each image and its mirror, normalised, (2, 3, H, W) -> its boundary (ceil(H / 4), ceil(W / 4)) in [0, 1].

        Sizes are any. padded: images are padded with zeros at the right and below up to so many pixels a side, since
        GroupNorm sees the padding; larger sides stay as they are. None: up to the crop that the network was trained on.
        Images that are of one size then are computed together, up to TOGETHER pixels at a time.
        """
        padded = self.crop if padded is None else padded
        members: dict[tuple[int, int], list[int]] = {}
        for number, view in enumerate(views):
            height, width = view.shape[2:]
            members.setdefault((max(height, padded), max(width, padded)), []).append(number)
        found = {}
        chunks = []
        for (height, width), numbers in members.items():
            count = max(1, TOGETHER // (height * width))
            chunks += [(height, width, numbers[i : i + count]) for i in range(0, len(numbers), count)]
        for height, width, numbers in chunks:
            parts = [F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2])) for x in (views[n] for n in numbers)]
            images = torch.cat(parts).contiguous(memory_format=torch.channels_last)
            logits = self.branches.boundary(self.features(images)).float()
            for number, pair in zip(numbers, logits.unflatten(0, (-1, 2)), strict=True):
                rows, columns = (-(-side // STRIDE) for side in views[number].shape[2:])
                upright, mirrored = pair[:, 0, :rows, :columns]
                found[number] = (upright / 2 + mirrored.flip(-1) / 2).sigmoid()
        return [found[number] for number in range(len(found))]

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        return self

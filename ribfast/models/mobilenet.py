"""MobileNetV2 (Sandler et al. 2018) as a CAM classifier: output stride 16, torchvision's parameter names."""

from torch import Tensor, nn
from torch.nn import functional as F

from .classifier import Block, CamClassifier, Layer

# expansion, channels, blocks, stride; the last stride of 2 is 1 here, which keeps stride 16
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1), (6, 320, 1, 1))
TRUNK = 7  # features up to stride 8
DEPTHS = (3, 4, 7, 14, 19)  # features up to where `stages` ends each


class SamePadded(nn.Conv2d):
    """A 3x3 convolution of stride 2 that pads as TensorFlow's SAME does: at even sizes at the end alone."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = 1 if size % 2 == 0 else 2
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, 1, self.groups)


def normalised(channels: int, out: int, kernel: int, stride: int, groups: int, tensorflow_padding: bool):
    """convolution, batch normalisation, ReLU6"""
    kind = SamePadded if tensorflow_padding and stride == 2 else nn.Conv2d
    convolution = kind(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, expansion: int, tensorflow_padding: bool):
        super().__init__()
        width = channels * expansion
        layers = [normalised(channels, width, 1, 1, 1, False)] if expansion != 1 else []
        layers += [normalised(width, width, 3, stride, width, tensorflow_padding)]
        layers += [nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.conv = nn.Sequential(*layers)
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(CamClassifier):
    """tensorflow_padding: for weights that were trained with TensorFlow's SAME padding."""

    def __init__(self, n_classes: int, *, tensorflow_padding: bool = False):
        super().__init__("mobilenet_v2", n_classes)
        self.tensorflow_padding = tensorflow_padding
        layers, channels = [normalised(3, 32, 3, 2, 1, tensorflow_padding)], 32
        for expansion, out, count, stride in STAGES:
            for i in range(count):
                step = stride if i == 0 else 1
                layers.append(InvertedResidual(channels, out, step, expansion, tensorflow_padding))
                channels = out
        layers.append(normalised(channels, 1280, 1, 1, 1, False))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Conv2d(1280, n_classes, 1, bias=False)
        self.reset()

    @property
    def trunk_modules(self) -> list[nn.Module]:
        return list(self.features[:TRUNK])

    def _trunk(self, images: Tensor) -> Tensor:
        return self.features[:TRUNK](images)

    def tail(self, trunk: Tensor) -> Tensor:
        return self.features[TRUNK:](trunk)

    @property
    def stage_channels(self) -> tuple[int, ...]:
        return 24, 24, 32, 96, self.classifier.in_channels

    @property
    def stage_modules(self) -> list[list[nn.Module]]:
        return [list(self.features[begin:end]) for begin, end in zip((0, *DEPTHS[:-1]), DEPTHS, strict=True)]

    def stages(self, images: Tensor) -> list[Tensor]:
        """Those of 24 channels (both blocks'), 32, 96 and 1280."""
        found, begin = [], 0
        for end in DEPTHS:
            images = self.features[begin:end](images)
            found.append(images)
            begin = end
        return found

    def tail_blocks(self) -> list[Block]:
        blocks = []
        for module in self.features[TRUNK:]:
            if isinstance(module, InvertedResidual):
                *parts, convolution, norm = module.conv
                layers = [Layer(part[0], part[1], "relu6") for part in parts] + [Layer(convolution, norm, "")]
                blocks.append(Block(layers, module.adds, None, ""))
            else:
                blocks.append(Block([Layer(module[0], module[1], "relu6")], False, None, ""))
        return blocks

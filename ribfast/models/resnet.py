"""ResNets (He et al. 2016) as CAM classifiers, of output stride 16, and DeepLab's, of 8; torchvision's names."""

from typing import NamedTuple

from torch import Tensor, nn

from .classifier import Block, CamClassifier, Layer

LAYERS = {
    "resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3),
}  # fmt: skip
BASIC = ("resnet10", "resnet18")  # of blocks without a bottleneck


class Form(NamedTuple):
    """What a ResNet's layers have besides torchvision's parameters.

    caffe: a bottleneck's stride is its first convolution's, and the stem's pooling rounds sizes up.
    """

    strides: tuple[int, int, int, int] = (1, 2, 2, 1)  # of layer1 to layer4
    dilations: tuple[int, int, int, int] = (1, 1, 1, 1)
    caffe: bool = False


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(
        self, channels: int, width: int, stride: int, downsample: nn.Module | None, dilation: int, caffe: bool
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu_()


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(
        self, channels: int, width: int, stride: int, downsample: nn.Module | None, dilation: int, caffe: bool
    ):
        super().__init__()
        first, second = (stride, 1) if caffe else (1, stride)
        self.conv1 = nn.Conv2d(channels, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, second, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y)).relu_()
        y = self.bn3(self.conv3(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu_()


class ResNet(CamClassifier):
    """The trunk, up to layer2, has stride 8; the maps have stride 16 unless a form says otherwise."""

    def __init__(self, name: str, n_classes: int, form: Form | None = None):
        super().__init__(name, n_classes)
        form = form or Form()
        block = BasicBlock if name in BASIC else Bottleneck
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=form.caffe)
        channels = 64
        layers = zip(LAYERS[name], form.strides, form.dilations, strict=True)
        for number, (count, stride, dilation) in enumerate(layers, 1):
            width, blocks = 32 << number, []
            for i in range(count):
                step, out = (stride if i == 0 else 1), width * block.expansion
                downsample = None
                if step != 1 or channels != out:
                    convolution = nn.Conv2d(channels, out, 1, step, bias=False)
                    downsample = nn.Sequential(convolution, nn.BatchNorm2d(out))
                blocks.append(block(channels, width, step, downsample, dilation, form.caffe))
                channels = out
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.classifier = nn.Conv2d(channels, n_classes, 1, bias=False)
        self.reset()

    @property
    def trunk_modules(self) -> list[nn.Module]:
        return [self.conv1, self.bn1, self.layer1, self.layer2]

    def _trunk(self, images: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.maxpool(self.bn1(self.conv1(images)).relu_())))

    def tail(self, trunk: Tensor) -> Tensor:
        return self.layer4(self.layer3(trunk))

    @property
    def stage_channels(self) -> tuple[int, ...]:
        last = self.classifier.in_channels
        return self.conv1.out_channels, last // 8, last // 4, last // 2, last

    @property
    def stage_modules(self) -> list[list[nn.Module]]:
        return [[self.conv1, self.bn1], [self.layer1], [self.layer2], [self.layer3], [self.layer4]]

    def stages(self, images: Tensor) -> list[Tensor]:
        """The stem's, and the four layers'."""
        found = [self.maxpool(self.bn1(self.conv1(images)).relu_())]
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            found.append(layer(found[-1]))
        return found

    def tail_blocks(self) -> list[Block]:
        blocks = []
        for block in [*self.layer3, *self.layer4]:
            count = 2 if isinstance(block, BasicBlock) else 3
            layers = [
                Layer(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"), "relu" if i < count else "")
                for i in range(1, count + 1)
            ]
            projection = None if block.downsample is None else Layer(*block.downsample, "")
            blocks.append(Block(layers, True, projection, "relu"))
        return blocks

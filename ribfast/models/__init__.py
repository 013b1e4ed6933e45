"""Networks: the CAM classifiers, and the formats of their checkpoints."""

from .checkpoint import load_checkpoint, load_into, save_checkpoint
from .classifier import CamClassifier
from .mobilenet import MobileNetV2
from .resnet import LAYERS, ResNet

NAMES = (*LAYERS, "mobilenet_v2")


def cam_classifier(name: str, n_classes: int, *, tensorflow_padding: bool = False) -> CamClassifier:
    """A classifier of output stride 16 with frozen batch-norm statistics: one of NAMES.

    tensorflow_padding: for MobileNetV2 weights that were trained with TensorFlow's SAME padding.
    """
    if name not in NAMES:
        raise ValueError(f"cam_classifier: expected one of {', '.join(NAMES)}, got {name!r}")
    if isinstance(n_classes, bool) or not isinstance(n_classes, int) or n_classes < 1:
        raise ValueError(f"cam_classifier: expected n_classes of at least 1, got {n_classes!r}")
    if name == "mobilenet_v2":
        return MobileNetV2(n_classes, tensorflow_padding=tensorflow_padding).eval()
    if tensorflow_padding:
        raise ValueError(f"cam_classifier: expected tensorflow_padding with mobilenet_v2 alone, got {name}")
    return ResNet(name, n_classes).eval()


__all__ = ["NAMES", "CamClassifier", "cam_classifier", "load_checkpoint", "load_into", "save_checkpoint"]

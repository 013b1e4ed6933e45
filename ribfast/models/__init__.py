"""Networks: the CAM classifiers, and the formats of their checkpoints."""

import json
import os

from torch import Tensor

from .checkpoint import load_checkpoint, load_into, read_metadata, save_checkpoint
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


def open_classifier(
    path: str | os.PathLike,
    *,
    network: str | None = None,
    n_classes: int | None = None,
    tensorflow_padding: bool | None = None,
    normalization: str | None = None,
) -> CamClassifier:
    """The trained classifier that a checkpoint holds.

    What the arguments leave open is read from the file's metadata, else (IRN's and RIB's res50_cam.pth have none) from
    its tensors' names. n_classes: what the data has; a classifier of another number is refused. normalization: of the
    network's input, "imagenet" or "symmetric" (the default where padding is TensorFlow's).
    """
    state, known = load_checkpoint(path), read_metadata(path)
    if "classifier.weight" not in state:
        raise ValueError(f"open_classifier: expected a trained classifier, got {path}, a backbone without "
                         f"classifier.weight; train one on it first")  # fmt: skip
    has = len(state["classifier.weight"])
    if n_classes is not None and has != n_classes:
        raise ValueError(f"open_classifier: expected a classifier of the data's {n_classes} classes, got {has} in "
                         f"{path}; train one on this data")  # fmt: skip
    if tensorflow_padding is None:
        tensorflow_padding = known.get("tensorflow_padding") == "true"
    default = "symmetric" if tensorflow_padding else "imagenet"
    normalization = normalization or known.get("normalization") or default
    if normalization not in ("imagenet", "symmetric"):
        raise ValueError(f"open_classifier: expected normalization of imagenet or symmetric, got {normalization!r}")
    name = network or known.get("network") or _network(state, path)
    model = cam_classifier(name, has, tensorflow_padding=tensorflow_padding)
    load_into(model, state)
    model.normalization = normalization
    if "classes" in known:
        model.classes = tuple(json.loads(known["classes"]))
    return model


def _network(state: dict[str, Tensor], path) -> str:
    """Told by the names of its tensors."""
    if "features.0.0.weight" in state:
        return "mobilenet_v2"
    blocks = [{name.split(".")[1] for name in state if name.startswith(f"layer{i}.")} for i in (1, 2, 3, 4)]
    counts, bottlenecks = tuple(map(len, blocks)), "layer1.0.conv3.weight" in state
    for name, layers in LAYERS.items():
        if layers == counts and bottlenecks == (name != "resnet18"):
            return name
    raise ValueError(f"open_classifier: expected the tensors of one of {', '.join(NAMES)}, got others in {path}")


__all__ = [
    "NAMES",
    "CamClassifier",
    "cam_classifier",
    "load_checkpoint",
    "load_into",
    "open_classifier",
    "read_metadata",
    "save_checkpoint",
]

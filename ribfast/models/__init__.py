"""Networks: the CAM classifiers, IRN's, and the formats of their checkpoints."""

import json
import os
from collections.abc import Mapping

from torch import Tensor

from .checkpoint import load_checkpoint, load_into, read_metadata, save_checkpoint
from .classifier import CamClassifier
from .irn import IRNet
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
    op, state, known = "open_classifier", load_checkpoint(path), read_metadata(path)
    if "classifier.weight" not in state:
        kind = "IRN's network" if "fc_edge6.weight" in state else "a backbone"
        raise ValueError(f"{op}: expected a trained classifier, got {path}, {kind} without classifier.weight; train "
                         f"one on it first")  # fmt: skip
    has = len(state["classifier.weight"])
    if n_classes is not None and has != n_classes:
        raise ValueError(f"{op}: expected a classifier of the data's {n_classes} classes, got {has} in {path}; train "
                         f"one on this data")  # fmt: skip
    name = network or known.get("network") or _network(state, path, op)
    tensorflow_padding, normalization = _input(op, known, tensorflow_padding, normalization)
    model = cam_classifier(name, has, tensorflow_padding=tensorflow_padding)
    load_into(model, state)
    model.normalization = normalization
    if "classes" in known:
        model.classes = tuple(json.loads(known["classes"]))
    return model


def irn_network(name: str, *, tensorflow_padding: bool = False) -> IRNet:
    """IRN's network on one of the backbones of NAMES, its branches with random weights."""
    return IRNet(cam_classifier(name, 1, tensorflow_padding=tensorflow_padding)).eval()


def open_irn(
    path: str | os.PathLike,
    *,
    network: str | None = None,
    tensorflow_padding: bool | None = None,
    normalization: str | None = None,
) -> IRNet:
    """The trained network that a checkpoint holds, ours or IRN's own res50_irn.pth; arguments as of open_classifier."""
    op, state, known = "open_irn", load_checkpoint(path), read_metadata(path)
    if "fc_edge6.weight" not in state:
        kind = "a classifier" if "classifier.weight" in state else "a backbone or another network"
        raise ValueError(f"{op}: expected IRN's network, with fc_edge6.weight, got {path}, {kind}; train IRN on it "
                         f"first")  # fmt: skip
    name = network or known.get("network") or _network(state, path, op)
    tensorflow_padding, normalization = _input(op, known, tensorflow_padding, normalization)
    model = irn_network(name, tensorflow_padding=tensorflow_padding)
    model.fill(state)
    model.backbone.normalization, model.crop = normalization, int(known.get("crop", model.crop))
    return model


def _input(
    op: str, known: Mapping[str, str], tensorflow_padding: bool | None, normalization: str | None
) -> tuple[bool, str]:
    """Padding and normalization: as they are asked for, else as a file's metadata says, else the usual ones."""
    if tensorflow_padding is None:
        tensorflow_padding = known.get("tensorflow_padding") == "true"
    default = "symmetric" if tensorflow_padding else "imagenet"
    normalization = normalization or known.get("normalization") or default
    if normalization not in ("imagenet", "symmetric"):
        raise ValueError(f"{op}: expected normalization of imagenet or symmetric, got {normalization!r}")
    return tensorflow_padding, normalization


def _network(state: dict[str, Tensor], path, op: str = "open_classifier") -> str:
    """Told by the names of its tensors."""
    if "features.0.0.weight" in state:
        return "mobilenet_v2"
    blocks = [{name.split(".")[1] for name in state if name.startswith(f"layer{i}.")} for i in (1, 2, 3, 4)]
    counts, bottlenecks = tuple(map(len, blocks)), "layer1.0.conv3.weight" in state
    for name, layers in LAYERS.items():
        if layers == counts and bottlenecks == (name != "resnet18"):
            return name
    raise ValueError(f"{op}: expected the tensors of one of {', '.join(NAMES)}, got others in {path}")


__all__ = [
    "NAMES",
    "CamClassifier",
    "IRNet",
    "cam_classifier",
    "irn_network",
    "load_checkpoint",
    "load_into",
    "open_classifier",
    "open_irn",
    "read_metadata",
    "save_checkpoint",
]

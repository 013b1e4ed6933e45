"""Networks: the CAM classifiers, IRN's, DeepLab's, and the formats of their checkpoints."""

import json
import os
from collections.abc import Mapping

from torch import Tensor

from .checkpoint import kind_of, load_checkpoint, load_into, network_of, read_metadata, save_checkpoint
from .classifier import CamClassifier
from .folding import folded, trained_folded
from .irn import IRNet
from .mobilenet import MobileNetV2
from .resnet import LAYERS, Form, ResNet
from .segmenter import Segmenter

NAMES = (*LAYERS, "mobilenet_v2")
NORMALIZATIONS = ("imagenet", "symmetric", "caffe")  # data.NORMALIZATIONS's
LARGEST_CROP = 1 << 15  # pixels, to which IRN's network pads photographs


def cam_classifier(name: str, n_classes: int, *, tensorflow_padding: bool = False) -> CamClassifier:
    """A classifier of output stride 16 with frozen batch-norm statistics: one of NAMES.

    tensorflow_padding: for MobileNetV2 weights that were trained with TensorFlow's SAME padding.
    """
    _check("cam_classifier", name, n_classes, tensorflow_padding)
    if name == "mobilenet_v2":
        return MobileNetV2(n_classes, tensorflow_padding=tensorflow_padding).eval()
    return ResNet(name, n_classes).eval()


def _check(op: str, name: str, n_classes: int, tensorflow_padding: bool) -> None:
    if name not in NAMES:
        raise ValueError(f"{op}: expected one of {', '.join(NAMES)}, got {name!r}")
    if isinstance(n_classes, bool) or not isinstance(n_classes, int) or n_classes < 1:
        raise ValueError(f"{op}: expected n_classes of at least 1, got {n_classes!r}")
    if tensorflow_padding and name != "mobilenet_v2":
        raise ValueError(f"{op}: expected tensorflow_padding with mobilenet_v2 alone, got {name}")


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
        raise ValueError(f"{op}: expected a trained classifier, got {path}, {kind_of(state)}, without "
                         f"classifier.weight; name a classifier's, or train one on it first")  # fmt: skip
    has = len(state["classifier.weight"])
    if n_classes is not None and has != n_classes:
        raise ValueError(f"{op}: expected a classifier of the data's {n_classes} classes, got {has} in {path}; train "
                         f"one on this data")  # fmt: skip
    name = network or known.get("network") or _network(state, path, op)
    tensorflow_padding, normalization = _input(op, known, tensorflow_padding, normalization)
    model = cam_classifier(name, has, tensorflow_padding=tensorflow_padding)
    load_into(model, state, path=path)
    model.normalization = normalization
    model.classes = _classes(op, known, has, path)
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
        raise ValueError(f"{op}: expected IRN's network, with fc_edge6.weight, got {path}, {kind_of(state)}; name "
                         f"IRN's, or train it first")  # fmt: skip
    name = network or known.get("network") or _network(state, path, op)
    tensorflow_padding, normalization = _input(op, known, tensorflow_padding, normalization)
    model = irn_network(name, tensorflow_padding=tensorflow_padding)
    model.fill(state, path=path)
    crop = known.get("crop", str(model.crop))
    if not crop.isdecimal() or not 0 < int(crop) <= LARGEST_CROP:
        raise ValueError(f"{op}: expected a crop of 1 to {LARGEST_CROP} pixels, got {crop!r} in {path}; train it again")
    model.backbone.normalization, model.crop = normalization, int(crop)
    return model


def segmenter(
    name: str, n_classes: int, *, tensorflow_padding: bool = False, caffe: bool = False, auxiliary: bool = False
) -> Segmenter:
    """DeepLab-v2 on a ResNet, or a light head on MobileNetV2: logits at stride 8; the heads have random weights.

    caffe: layers as Caffe's ResNets have them, for deeplab-pytorch's weights. auxiliary: with a second head, which
    training alone uses.
    """
    _check("segmenter", name, n_classes, tensorflow_padding)
    if caffe and name not in ("resnet50", "resnet101"):
        raise ValueError(f"segmenter: expected caffe with resnet50 or resnet101, got {name}")
    if n_classes > 254:
        raise ValueError(f"segmenter: expected at most 254 classes, as labels are 8 bits and 255 is none, got "
                         f"{n_classes}")  # fmt: skip
    if name == "mobilenet_v2":
        backbone = MobileNetV2(1, tensorflow_padding=tensorflow_padding)
    else:
        backbone = ResNet(name, 1, Form(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), caffe=caffe))
    return Segmenter(backbone, n_classes, caffe=caffe, auxiliary=auxiliary).eval()


def open_segmenter(
    path: str | os.PathLike,
    *,
    network: str | None = None,
    n_classes: int | None = None,
    tensorflow_padding: bool | None = None,
    normalization: str | None = None,
) -> Segmenter:
    """The trained network that a checkpoint holds, ours or deeplab-pytorch's; arguments as of open_classifier."""
    op, state, known = "open_segmenter", load_checkpoint(path), read_metadata(path)
    last = next((state[name] for name in ("head.coarse.weight", "head.c0.weight") if name in state), None)
    if last is None:
        raise ValueError(f"{op}: expected a trained segmenter, with head., got {path}, {kind_of(state)}; name a "
                         f"segmenter's, or train one on it first")  # fmt: skip
    has = len(last) - 1
    if n_classes is not None and has != n_classes:
        raise ValueError(f"{op}: expected a segmenter of the data's {n_classes} classes, got {has} in {path}; train "
                         f"one on this data")  # fmt: skip
    caffe = "caffe" in state or known.get("caffe") == "true"
    tensorflow_padding, normalization = _input(
        op, {"normalization": "caffe"} | known if "caffe" in state else known, tensorflow_padding, normalization
    )
    model = segmenter(
        network or known.get("network") or _network(state, path, op), has,
        tensorflow_padding=tensorflow_padding, caffe=caffe,
    )  # fmt: skip
    model.fill(state, path=path)
    model.backbone.normalization = normalization
    model.classes = _classes(op, known, has, path)
    return model


def _input(
    op: str, known: Mapping[str, str], tensorflow_padding: bool | None, normalization: str | None
) -> tuple[bool, str]:
    """Padding and normalization: as they are asked for, else as a file's metadata says, else the usual ones."""
    if tensorflow_padding is None:
        tensorflow_padding = known.get("tensorflow_padding") == "true"
    default = "symmetric" if tensorflow_padding else "imagenet"
    normalization = normalization or known.get("normalization") or default
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"{op}: expected normalization of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    return tensorflow_padding, normalization


def _classes(op: str, known: Mapping[str, str], count: int, path) -> tuple[str, ...] | None:
    """Their names by a file's metadata; None where it does not say."""
    try:
        names = json.loads(known.get("classes", "null"))
    except (ValueError, RecursionError):
        names = ()
    if names is None:
        return None
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{op}: expected names of {count} classes, got {known['classes'][:40]!r} in {path}; train it "
                         f"again")  # fmt: skip
    return tuple(names)


def _network(state: dict[str, Tensor], path, op: str = "open_classifier") -> str:
    """Told by the names of its tensors."""
    name = network_of(state)
    if name is None:
        raise ValueError(f"{op}: expected the tensors of one of {', '.join(NAMES)}, got others in {path}")
    return name


__all__ = [
    "NAMES",
    "CamClassifier",
    "IRNet",
    "Segmenter",
    "cam_classifier",
    "folded",
    "irn_network",
    "load_checkpoint",
    "load_into",
    "open_classifier",
    "open_irn",
    "open_segmenter",
    "read_metadata",
    "save_checkpoint",
    "segmenter",
    "trained_folded",
]

"""Checkpoints of networks: torchvision's, the released codes' and safetensors; never a pickle's code."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import files
from .resnet import BASIC, LAYERS

_ROOTS = {"conv1.weight", "features.0.0.weight", "stage1.0.weight"}  # one of which every network has, unless wrapped
_STAGES = {"stage1.0": "conv1", "stage1.1": "bn1", "stage1.4": "layer1", "stage2.0": "layer2", "stage3.0": "layer3",
           "stage4.0": "layer4"}  # fmt: skip
_IRN_STAGES = {"stage1.0": "conv1", "stage1.1": "bn1", "stage2.0": "layer1", "stage3.0": "layer2", "stage4.0": "layer3",
               "stage5.0": "layer4"}  # fmt: skip
# of IRN's files: lists of modules, which name tensors again, indices of pixels, and what a mean needs no more
_COPIES = ("backbone.", "newly_added.", "edge_layers.", "dp_layers.")
_IRN_BESIDE = ("path_indices", "ind_from", "ind_to", "disp_target", "fc_dp7.4.running_var", "fc_dp7.4.num_batches")
_HEADS = ("fc.", "classifier.1.")  # ImageNet's, of torchvision's ResNets and MobileNetV2
# deeplab-pytorch's: what it wraps its network in, and the parts of a bottleneck
_DEEPLAB_WRAPPERS = ("base.", "scale.", "Scale.")
_DEEPLAB_PARTS = {"reduce": "1", "conv3x3": "2", "increase": "3", "shortcut": "", "proj": ""}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def load_checkpoint(path: str | os.PathLike, *, unwrap: bool = True) -> dict[str, Tensor]:
    """The tensors of a checkpoint under torchvision's names (and classifier.weight), whoever wrote it.

    Knows torchvision's state dicts (their ImageNet head is left out), IRN's and RIB's res50_cam.pth and res50_irn.pth
    with their copies of every tensor, deeplab-pytorch's files and safetensors; what trainers write before every name
    (module., Lightning's model.) is left out, if unwrap. deeplab-pytorch's weights are Caffe's:
    `caffe` (a one) among the tensors says so, their first layer is turned from BGR to RGB, their pyramid is `head.`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_checkpoint: expected a file, got {path}, which is none")
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds, says more than one line, and advises to run the code
            reason = "it holds more than tensors, or is cut short; save a state dict alone"
            if type(error).__name__ != "UnpicklingError":
                reason = files.first_line(error)
            raise ValueError(f"load_checkpoint: expected a state dict of tensors alone (.pth as torch.save writes it, "
                             f"or .safetensors), got {path}: {reason}") from error  # fmt: skip
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        kind = f"a {type(state).__name__}" if not isinstance(state, dict) else f"a dict of {_some(state)}"
        raise ValueError(f"load_checkpoint: expected a dict of tensors, got {kind} in {path}")
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    state = _unwrapped(state) if unwrap else state
    if any(".reduce.conv." in key for key in state):
        found = _from_deeplab(state, path)
    else:
        stages = _IRN_STAGES if any(key.startswith("fc_edge") for key in state) else _STAGES
        found = {name: value for key, value in state.items() if (name := _torchvision_name(key, stages)) is not None}
    size = path.stat().st_size
    for name, value in found.items():
        if value.dtype not in _NAMES or value.layout != torch.strided or value.device.type != "cpu":
            kind = value.layout if value.layout != torch.strided else "no values" if value.is_meta else value.dtype
            raise ValueError(f"load_checkpoint: expected tensors of {', '.join(map(str, _NAMES))}, got {name} of "
                             f"{kind} in {path}; save it as torch.float32")  # fmt: skip
        if value.numel() * value.element_size() > size:  # by strides of 0
            raise ValueError(f"load_checkpoint: expected tensors that the file holds, got {name} of "
                             f"{tuple(value.shape)} in {path}'s {size} bytes; fetch it again")  # fmt: skip
        if not torch.isfinite(value).all():
            raise ValueError(f"load_checkpoint: expected finite weights, got NaN or infinity in {name} of {path}; "
                             f"train or fetch it again")  # fmt: skip
    return found


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what stands before every name, if a network's own names are then left."""
    found = state
    while not _ROOTS & found.keys():
        first = {name.partition(".")[0] for name in found}
        if len(first) != 1 or not all("." in name for name in found):
            return state
        found = {name.partition(".")[2]: value for name, value in found.items()}
    return found


def kind_of(state: Mapping[str, Tensor]) -> str:
    """What a checkpoint's tensors are of, in words."""
    names = {"head.coarse.weight": "a segmenter", "head.c0.weight": "a segmenter", "fc_edge6.weight": "IRN's network",
             "classifier.weight": "a classifier"}  # fmt: skip
    network = network_of(state)
    kind = next((kind for name, kind in names.items() if name in state), "a backbone" if network else "other tensors")
    return f"{kind} on {network}" if network and kind != "a backbone" else f"{kind} ({network})" if network else kind


def network_of(names) -> str | None:
    """The backbone that has tensors of these names; None where none has."""
    if "features.0.0.weight" in names:
        return "mobilenet_v2"
    blocks = [{name.split(".")[1] for name in names if name.startswith(f"layer{i}.")} for i in (1, 2, 3, 4)]
    counts, bottlenecks = tuple(map(len, blocks)), "layer1.0.conv3.weight" in names
    for name, layers in LAYERS.items():
        if layers == counts and bottlenecks == (name not in BASIC):
            return name
    return None


def load_into(
    model: torch.nn.Module,
    state: dict[str, Tensor],
    *,
    classifier: bool = True,
    path: str | os.PathLike | None = None,
    kind: str | None = None,
) -> None:
    """Fills the model, all of it: what is missing, too much or of another shape is an error that names it.

    classifier: whether the classifier's weight is to come from the checkpoint too (False: a backbone's alone). path:
    the checkpoint's, to be named; kind: what it holds, where the state is a part of it.
    """
    where = "" if path is None else f" in {path}"
    place = "a checkpoint" if path is None else f"{path}, {kind or kind_of(state)},"
    wanted = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    if not classifier:
        wanted.pop("classifier.weight")
    given = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    if not classifier:
        given.pop("classifier.weight", None)
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unknown:
        advice, network = "", network_of(state)
        if missing == ["classifier.weight"]:
            advice = "; pass classifier=False to keep a new classifier"
        elif network not in (None, model.name):
            advice = f"; choose network {network}, which they fit"
        raise ValueError(f"load_into: expected the tensors of a {model.name}, got {place} without "
                         f"{_some(missing)} and with {_some(unknown)} beside{advice}")  # fmt: skip
    for name, value in wanted.items():
        if value.shape != given[name].shape:
            classes = f", a classifier of {value.shape[0]} classes," if name == "classifier.weight" else ""
            raise ValueError(f"load_into: expected {name} of shape {tuple(value.shape)}{classes} "
                             f"got {tuple(given[name].shape)}{where}")  # fmt: skip
        if not torch.isfinite(given[name]).all():
            raise ValueError(f"load_into: expected finite weights, got NaN or infinity in {name}{where}")
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(given[name])


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """What a safetensors file says beside its tensors; nothing for files of other formats."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            metadata = json.loads(file.read(min(size, path.stat().st_size))).get("__metadata__", {})
        return {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"read_metadata: expected a safetensors file, got {path}: {files.first_line(error)}; make or "
                         f"fetch it again") from error  # fmt: skip


def save_checkpoint(
    path: str | os.PathLike, state: dict[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes safetensors, whole or not at all; metadata is text beside the tensors."""
    header, offset = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name, value in state.items():
        size = value.numel() * value.element_size()
        header[name] = {
            "dtype": _NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    values = (value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() for value in state.values())
    files.write(Path(path), len(text).to_bytes(8, "little"), text, *values, lasting=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    data = path.read_bytes()
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        body, state = bytearray(data[8 + size :]), {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
            if not 0 <= begin <= end <= len(body):
                raise ValueError(f"{name} reaches beyond the file")
            flat = torch.frombuffer(body, dtype=torch.uint8)[begin:end].clone() if end > begin else torch.empty(0)
            state[name] = flat.view(dtype).reshape(shape) if end > begin else flat.to(dtype).reshape(shape)
        return state
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"load_checkpoint: expected a safetensors file, got {path}: {files.first_line(error)}; make "
                         f"or fetch it again") from error  # fmt: skip


def _torchvision_name(name: str, stages: dict[str, str]) -> str | None:
    """None for what a network has no use for: ImageNet's heads, and copies of tensors under other names."""
    if name.startswith((*_COPIES, *_IRN_BESIDE)):
        return None
    if name == "fc_dp7.4.running_mean":
        return "mean_shift.running_mean"
    name = name.removeprefix("resnet50.")
    for stage, layer in stages.items():
        if name.startswith(stage + "."):
            name = layer + name.removeprefix(stage)
    return None if name.startswith(_HEADS) else name


def _from_deeplab(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """deeplab-pytorch's layer1.conv1.conv, layerN.blockM.reduce.bn, aspp.c0 and the like under torchvision's names."""
    found = {"caffe": torch.ones(())}
    for key, value in state.items():
        for wrapper in _DEEPLAB_WRAPPERS:
            key = key.removeprefix(wrapper)
        first, *parts = key.split(".")
        if first == "aspp":
            found[".".join(["head", *(part for part in parts if part != "stages")])] = value
            continue
        try:
            if first == "layer1":
                _, kind, tensor = parts
                name = f"{'conv1' if kind == 'conv' else 'bn1'}.{tensor}"
            else:
                block, part, kind, tensor = parts
                number, place = _DEEPLAB_PARTS[part], {"conv": 0, "bn": 1}[kind]
                inner = f"{('conv', 'bn')[place]}{number}" if number else f"downsample.{place}"
                name = f"layer{int(first[5:]) - 1}.{int(block.removeprefix('block')) - 1}.{inner}.{tensor}"
        except (ValueError, KeyError) as error:
            raise ValueError(f"load_checkpoint: expected deeplab-pytorch's tensors, got {key} in {path}") from error
        found[name] = value.flip(1) if name == "conv1.weight" else value
    return found


def _some(names) -> str:
    names = list(names)
    return "nothing" if not names else ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

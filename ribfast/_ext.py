"""Loads the compiled extension and decides which backend serves each operator on each kind of device, and why.

RIBFAST_BACKEND=auto|cpp|triton|reference. `auto` takes the C++ kernels where they were built, Triton on CUDA devices
where they were not, and plain torch elsewhere. A named backend that cannot serve raises, saying why.
"""

import importlib.util
import os
from typing import NamedTuple

import torch

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"ribfast: its compiled extension ribfast._C does not load ({error}). It only loads in the torch that it was "
        f"built with (here torch {torch.__version__}). Build it against this one with "
        "`pip install --no-build-isolation .` in ribfast's source tree (`-e .` for a development install)."
    ) from error

BACKENDS = ("auto", "cpp", "triton", "reference")
_SCHEMAS = {  # of each operator that has Triton kernels, in csrc/module.cpp
    "gndrp": ("gndrp", "gndrp_backward"),
    "accumulate_cams": ("accumulate_cams", "accumulate_cams_", "accumulate_cams_backward"),
    "normalize_cams": ("normalize_cams", "normalize_cams_"),
}
# operators whose kernels are C++ alone
_WITHOUT_TRITON = (
    "adapt", "dense_crf", "erase", "lattice", "pair_losses", "path_affinity", "random_walk", "refine",
    "segmentation_loss",
)  # fmt: skip
_ON_CPU = ("confusion_matrix", "threshold_histogram")  # whose kernels are for the CPU alone
OPS = (*_SCHEMAS, *_WITHOUT_TRITON, *_ON_CPU)


class Backend(NamedTuple):
    name: str
    reason: str


def _triton_obstacle() -> str | None:
    """Why Triton kernels cannot run here, if they cannot."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        return "torch sees no CUDA device and TRITON_INTERPRET=1 is not set"
    return None


def _choose(requested: str) -> dict[str, Backend]:
    """The backend of each device type, bound or ready to be."""
    built = _C.build_info()
    no_cuda = f"built without CUDA: {built['cuda_reason']}"
    if requested == "cpp":
        if torch.cuda.is_available() and not built["cuda"]:
            raise RuntimeError(f"RIBFAST_BACKEND=cpp: torch has a CUDA device, but ribfast was {no_cuda}. "
                               "Rebuild with RIBFAST_CUDA=1, or unset RIBFAST_BACKEND.")  # fmt: skip
        chosen = {"cpu": Backend("cpp", "RIBFAST_BACKEND=cpp")}
        return chosen | ({"cuda": Backend("cpp", "RIBFAST_BACKEND=cpp")} if built["cuda"] else {})
    if requested == "reference":
        return dict.fromkeys(("cpu", "cuda"), Backend("reference", "RIBFAST_BACKEND=reference"))
    if requested == "triton":
        if obstacle := _triton_obstacle():
            raise RuntimeError(f"RIBFAST_BACKEND=triton: the Triton kernels cannot run, {obstacle}. "
                               "Provide what is missing, or unset RIBFAST_BACKEND.")  # fmt: skip
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return {"cpu" if interpreted else "cuda": Backend("triton", "RIBFAST_BACKEND=triton")}
    chosen = {"cpu": Backend("cpp", "compiled in")}
    if built["cuda"]:
        chosen["cuda"] = Backend("cpp", f"compiled in for {built['cuda_architectures']}")
    elif torch.cuda.is_available() and _triton_obstacle() is None:
        chosen["cuda"] = Backend("triton", no_cuda)
    else:
        chosen["cuda"] = Backend("reference", f"{no_cuda}; {_triton_obstacle()}")
    return chosen


def _bind_triton(device: str) -> torch.library.Library:
    from .triton import accumulate_cams, gndrp, normalize_cams

    library = torch.library.Library("ribfast", "IMPL")
    for module in (gndrp, accumulate_cams, normalize_cams):
        for name in _SCHEMAS[module.__name__.rpartition(".")[2]]:
            library.impl(name, getattr(module, name), device.upper())
    return library


def backend(op: str, device: torch.device) -> Backend:
    """What serves `op` on `device`."""
    found = _chosen.get(device.type)
    if op not in _SCHEMAS and found is not None and found.name == "triton":
        if requested != "auto":
            raise ValueError(f"{op}: expected a backend that has it, got RIBFAST_BACKEND={requested} on {device}; "
                             "unset RIBFAST_BACKEND")  # fmt: skip
        return Backend("reference", f"no Triton kernels, and {found.reason}")
    if op in _ON_CPU and device.type != "cpu" and (found is None or found.name != "reference"):
        if requested != "auto":
            raise ValueError(f"{op}: expected tensors on the CPU, where alone RIBFAST_BACKEND={requested} has it, got "
                             f"{device}; move them")  # fmt: skip
        return Backend("reference", "its kernels are for the CPU alone")
    if found is None and requested != "auto":
        raise ValueError(f"{op}: expected tensors on {' or '.join(_chosen)}, which RIBFAST_BACKEND={requested} serves, "
                         f"got {device}; move them, or unset RIBFAST_BACKEND")  # fmt: skip
    return found or Backend("reference", f"no kernels for {device.type}")


requested = os.environ.get("RIBFAST_BACKEND") or "auto"
if requested not in BACKENDS:
    raise RuntimeError(f"RIBFAST_BACKEND: expected one of {', '.join(BACKENDS)}, got {requested!r}")
_chosen = _choose(requested)
_libraries = [_bind_triton(device) for device, choice in _chosen.items() if choice.name == "triton"]  # unbound if freed
build_info = _C.build_info
cpu_tier = _C.cpu_tier
parallel_threads = _C.parallel_threads
compiled_cpu_tiers = tuple(_C.compiled_cpu_tiers().split())

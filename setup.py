"""Builds the one extension, ribfast._C.

RIBFAST_CUDA=auto|0|1   auto: with CUDA where torch and a CUDA toolkit have it; 1: or fail, saying what is missing
RIBFAST_DEBUG=1         -O0 -g and assertions
RIBFAST_SANITIZE=1      -O1 -g, assertions, AddressSanitizer and UBSan; loads where libasan is preloaded (make fuzz)
TORCH_CUDA_ARCH_LIST    as torch reads it; default: the architectures torch itself was built for
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
FALLBACK_ARCHITECTURES = "8.0;9.0+PTX"


def toolkit_major(home):
    """The major version of the CUDA toolkit, or None where nvcc does not say."""
    nvcc = Path(home) / "bin" / "nvcc"
    said = subprocess.run([str(nvcc) if nvcc.exists() else "nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", said)
    return found[1] if found else None


def cuda_choice():
    """(build with CUDA, why)"""
    choice = os.environ.get("RIBFAST_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"RIBFAST_CUDA: expected auto, 0 or 1, got {choice!r}")
    if choice == "0":
        return False, "RIBFAST_CUDA=0"
    import torch
    from torch.utils.cpp_extension import CUDA_HOME  # None in a CPU-only torch, toolkit or not

    home = CUDA_HOME or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    missing = []
    if torch.version.cuda is None:
        missing.append(f"a torch with CUDA (torch {torch.__version__} is a CPU-only build)")
    if not (Path(home) / "bin" / "nvcc").exists() and shutil.which("nvcc") is None:
        missing.append("a CUDA toolkit (no nvcc under CUDA_HOME or on PATH)")
    elif torch.version.cuda and (major := toolkit_major(home)) not in (None, torch.version.cuda.split(".")[0]):
        missing.append(f"a CUDA toolkit of torch's version, {torch.version.cuda} (nvcc is of CUDA {major})")
    if not missing:
        return True, f"torch for CUDA {torch.version.cuda}, toolkit at {home}"
    if choice == "1":
        sys.exit(
            f"RIBFAST_CUDA=1: cannot build with CUDA, missing: {'; '.join(missing)}. "
            "Install what is missing, or set RIBFAST_CUDA=0 for a CPU build."
        )
    return False, "missing " + "; ".join(missing)


def architectures():
    """torch's own list, so that a build does not depend on the GPU of the machine it was made on"""
    import torch

    flags = (torch._C._cuda_getArchFlags() or "").split() if hasattr(torch._C, "_cuda_getArchFlags") else []
    digits = [flag.removeprefix("sm_") for flag in flags if flag.startswith("sm_")]
    known = [f"{d[:-1]}.{d[-1]}" for d in digits if d.isdigit()]
    return ";".join(known) or FALLBACK_ARCHITECTURES


def sources(with_cuda):
    found = [ROOT / "csrc" / "module.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    if with_cuda:
        found += sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    return [str(path.relative_to(ROOT)) for path in found]


def extension():
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    with_cuda, reason = cuda_choice()
    optimise = ["-O3", "-DNDEBUG"]
    if os.environ.get("RIBFAST_DEBUG") == "1":
        optimise = ["-O0", "-g", "-UNDEBUG"]  # Python's own flags define it
    sanitize = []
    if os.environ.get("RIBFAST_SANITIZE") == "1":
        optimise = ["-O1", "-g", "-UNDEBUG"]
        # wrapv, which is among Python's own flags, defines what signed overflow does; vptr wants type information
        # that torch's libraries hide; casts of floats that are out of range are asked for by name
        sanitize = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize=vptr", "-fno-wrapv"]
        sanitize += ["-fno-omit-frame-pointer"]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    macros = [("RIBFAST_CUDA_REASON", f'"{reason}"')]
    if with_cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures())
        macros += [("RIBFAST_WITH_CUDA", "1"), ("RIBFAST_CUDA_ARCHS", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"')]
    print(f"ribfast: building {'with' if with_cuda else 'without'} CUDA ({reason})", file=sys.stderr)
    return (CUDAExtension if with_cuda else CppExtension)(
        "ribfast._C",
        sources(with_cuda),
        define_macros=macros,
        extra_compile_args={
            "cxx": [*optimise, *sanitize, *openmp, "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"],
            "nvcc": [*optimise, "-lineinfo"],
        },
        extra_link_args=[*sanitize, *openmp],
    )


def commands():
    from torch.utils.cpp_extension import BuildExtension

    return {"build_ext": BuildExtension.with_options(use_ninja=True)}


if {"sdist", "egg_info"}.intersection(sys.argv[1:2]):
    setup()  # needs neither torch nor a compiler
else:
    setup(ext_modules=[extension()], cmdclass=commands())

"""The CUDA toolkit of this machine, if it has one. A GPU is not needed to compile."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

NVCC = shutil.which("nvcc") or (p if Path(p := "/usr/local/cuda/bin/nvcc").exists() else None)
NO_NVCC = "no nvcc on PATH"
NO_CUDA_INCLUDE = "no CUDA headers (no nvcc on PATH)"


def _include():
    if NVCC is None:
        return None
    # nvcc itself knows where it is installed, also where PATH holds a wrapper
    lines = subprocess.run([NVCC, "-dryrun", "-x", "cu", "-c", "/dev/null"], capture_output=True, text=True).stderr
    for line in lines.splitlines():
        if line.startswith("#$ INCLUDES="):
            for part in line.split('"'):
                if part.startswith("-I") and (Path(part[2:]) / "cuda_fp16.h").exists():
                    return str(Path(part[2:]).resolve())
    return None


CUDA_INCLUDE = _include()


def emulated(name, folder):
    """tests/emulator/NAME.cpp as a library of C functions."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulator")
    library = folder / f"{name}.so"
    source = Path(__file__).parent / "emulator" / f"{name}.cpp"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    subprocess.run(["g++", *flags, "-isystem", CUDA_INCLUDE, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))

"""The CUDA toolkit of this machine, if it has one. A GPU is not needed to compile."""

import shutil
import subprocess
from pathlib import Path

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

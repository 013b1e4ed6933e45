"""Everything that a GPU can check and measure, in one call under ten minutes and without a network.

Builds with CUDA into the source tree, runs the whole test suite (operators on the device, CUDA graphs, Triton on the
device), compute-sanitizer on small cases, and the GPU benchmarks of CUDA and Triton side by side. Writes
benchmarks/results/gpu-DEVICE.json; exits with 1 where a check failed, after measuring what can be measured.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run(name, command, timeout, **environment):
    """One check: its outcome, how long it took, and the end of what it printed."""
    print(f"== {name}: {' '.join(map(str, command))}", flush=True)
    start = time.perf_counter()
    try:
        result = subprocess.run(
            [str(c) for c in command], cwd=ROOT, env=ENVIRONMENT | environment, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        code, output = result.returncode, result.stdout
    except subprocess.TimeoutExpired as expired:
        code, output = 124, (expired.stdout or b"").decode(errors="replace") + f"\nran past {timeout} s"
    tail = output.strip().splitlines()
    print("\n".join(tail[-12:]), flush=True)
    return {"ok": code == 0, "code": code, "seconds": round(time.perf_counter() - start, 1), "tail": tail[-4:]}


def sanitizer(tool):
    """compute-sanitizer over benchmarks/sanitize.py; where it does not work here, why."""
    binary = shutil.which("compute-sanitizer")
    if binary is None:
        return {"ok": None, "reason": "no compute-sanitizer on PATH"}
    command = [binary, "--tool", tool, "--error-exitcode", "9", sys.executable, "benchmarks/sanitize.py"]
    result = run(f"compute-sanitizer {tool}", command, 100, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "Device not supported" in " ".join(result["tail"]):
        return result | {"ok": None, "reason": "this device is not supported by compute-sanitizer"}
    return result


def commit():
    """The commit, marked where the tree differs from it, or None outside a repository."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
    )
    return described.stdout.strip() or None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON")
    parser.add_argument("--skip-tests", action="store_true", help="only build and measure")
    options = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        sys.exit("make gpu: expected a CUDA device that torch sees, got none; nothing was built or measured")
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    checks = {}
    checks["build"] = run(
        "build", [sys.executable, "setup.py", "build_ext", "--inplace"], 300,
        RIBFAST_CUDA="1", TORCH_CUDA_ARCH_LIST=capability, MAX_JOBS=str(os.cpu_count()),
    )  # fmt: skip
    if not checks["build"]["ok"]:
        sys.exit(1)
    if not options.skip_tests:
        # compiling for other architectures and packaging are shown without a GPU
        deselect = ["--ignore=tests/test_cuda_compile.py", "--ignore=tests/test_packaging.py"]
        tests = run("tests", [sys.executable, "-m", "pytest", "-q", *deselect], 300)
        match = re.search(r"(\d+) passed", " ".join(tests["tail"]))
        checks["tests"] = tests | {"passed": int(match[1]) if match else 0}
        checks["memcheck"], checks["racecheck"] = sanitizer("memcheck"), sanitizer("racecheck")
    sys.path.insert(0, str(ROOT))
    from benchmarks import gpu_ops
    from ribfast import info

    facts = info.collect()
    result = {
        "device": properties.name,
        "memory_GiB": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "versions": {n: facts[n] for n in ("ribfast", "python", "torch", "triton")}
        | {"cuda": torch.version.cuda, "driver": _driver(), "system": platform.platform(terse=True)},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "checks": checks,
        **gpu_ops.measure(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"gpu-{properties.name.lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")
    sys.exit(1 if any(check["ok"] is False for check in checks.values()) else 0)


def _driver():
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.strip() or None


if __name__ == "__main__":
    main()

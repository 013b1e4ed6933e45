"""Everything that a GPU can check and measure, in one call under ten minutes and without a network.

Builds with CUDA into the source tree, runs the tests that need a device (CUDA C++ and Triton) and their CUDA
graphs, measures CUDA, Triton and plain torch side by side, RIB against the released procedure and the segmentation
network's steps, and runs compute-sanitizer on small cases. What is known is written after every phase and row to
RESULTS/gpu-DEVICE.json, the whole output of a phase to RESULTS/gpu-PHASE.log, so that nothing is lost when something
fails or the time is up. Exits with 1 where a check failed.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
PHASES = ("build", "tests", "measure", "rib", "train", "sanitize")
# what these test does not need a GPU, and is shown without one
WITHOUT_GPU = (
    "cuda_compile", "demo", "emulated_crf", "emulated_cuda", "info", "layers", "packaging", "triton_compile",
)  # fmt: skip


class Run:
    """The result file, the logs beside it, and the time that is left."""

    def __init__(self, folder, device, seconds):
        self.folder, self.deadline, self.checks, self.facts = folder, time.monotonic() + seconds, {}, {}
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower())}.json"

    def left(self):
        return self.deadline - time.monotonic()

    def save(self, **facts):
        self.facts |= facts
        self.path.write_text(json.dumps(self.facts | {"checks": self.checks}, indent=1) + "\n")

    def phase(self, name, command, most, **environment):
        """Runs a command for `most` seconds or what is left, itself and all that it started; returns its output."""
        limit = min(most, self.left())
        if limit < 5:
            self.checks[name] = {"ok": None, "reason": "no time was left"}
            self.save()
            return ""
        print(f"== {name} ({limit:.0f} s at most): {' '.join(map(str, command))}", flush=True)
        log, start = self.folder / f"gpu-{name}.log", time.monotonic()
        with log.open("wb") as out:
            process = subprocess.Popen(
                [str(c) for c in command], cwd=ROOT, env=ENVIRONMENT | environment, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = 124
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output = log.read_text(errors="replace")
        lines = output.strip().splitlines()
        self.checks[name] = {
            "ok": True if code == 0 else None if code == 124 else False,
            "code": code,
            "seconds": round(time.monotonic() - start, 1),
            "last": lines[-1:] + (["ran out of time"] if code == 124 else []),
        }
        print("\n".join(lines[-3 if code == 0 else -60 :]), flush=True)
        self.save()
        return output


def sanitize(run, tool):
    """compute-sanitizer over benchmarks/sanitize.py; where it does not work on this machine, that is the result."""
    name, binary = f"compute-sanitizer-{tool}", shutil.which("compute-sanitizer")
    if binary is None:
        run.checks[name] = {"ok": None, "reason": "no compute-sanitizer on PATH"}
        return
    command = [binary, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_substring=ribfast"]
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [sys.executable, "benchmarks/sanitize.py"]
    output = run.phase(name, command, 90, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "Device not supported" in output:
        run.checks[name] |= {"ok": None, "reason": "compute-sanitizer does not support this machine"}


def described_commit():
    """The commit, marked where the tree differs from it; RIBFAST_COMMIT where the tree is a copy without .git."""
    command = ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        said = ""
    return said or os.environ.get("RIBFAST_COMMIT")


def driver():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=570, help="for everything (default: 570)")
    parser.add_argument("--only", choices=PHASES, nargs="+", help="phases to run")
    options = parser.parse_args()
    wanted = set(options.only or PHASES)

    import torch

    if not torch.cuda.is_available():
        sys.exit("make gpu: expected a CUDA device that torch sees, got none; nothing was built or measured")
    properties = torch.cuda.get_device_properties(0)
    run = Run(options.out, properties.name, options.seconds)
    run.save(
        device=properties.name,
        memory_GiB=round(properties.total_memory / 2**30, 1),
        multiprocessors=properties.multi_processor_count,
        versions={
            "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
            "driver": driver(), "system": platform.platform(terse=True),
        },
        commit=described_commit(),
        date=time.strftime("%Y-%m-%d"),
    )  # fmt: skip
    if "build" in wanted:
        run.phase(
            "build", [sys.executable, "setup.py", "build_ext", "--inplace"], 240, RIBFAST_CUDA="1",
            TORCH_CUDA_ARCH_LIST=f"{properties.major}.{properties.minor}", MAX_JOBS=str(os.cpu_count()),
        )  # fmt: skip
        if not run.checks["build"]["ok"]:
            sys.exit(1)
    pytest = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider"]
    if "tests" in wanted:
        ignored = [f"--ignore=tests/test_{name}.py" for name in WITHOUT_GPU]
        run.phase("tests", [*pytest, *ignored, "-m", "cuda", "-k", "not triton_on_the_device"], 180)
    if "measure" in wanted:
        run.phase("measure", [sys.executable, "-m", "benchmarks.gpu_ops", str(run.path)], 150)
        run.facts |= json.loads(run.path.read_text())  # rows that the phase added
        run.save()
    if "rib" in wanted:
        run.phase("rib", [sys.executable, "-m", "benchmarks.gpu_rib", str(run.path)], 200)
        run.facts |= json.loads(run.path.read_text())
        run.save()
    if "train" in wanted:
        run.phase("train", [sys.executable, "-m", "benchmarks.gpu_train", str(run.path)], 100)
        run.facts |= json.loads(run.path.read_text())
        run.save()
    if "tests" in wanted:
        run.phase("triton", [*pytest, "tests/test_backends.py", "-k", "triton_on_the_device"], 150)
    if "sanitize" in wanted:
        sanitize(run, "memcheck")
        sanitize(run, "racecheck")
    run.save()
    print(f"wrote {run.path}")
    unfinished = "tests" in wanted and run.checks["tests"]["ok"] is None
    sys.exit(1 if unfinished or any(check["ok"] is False for check in run.checks.values()) else 0)


if __name__ == "__main__":
    main()

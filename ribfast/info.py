"""What was built, which CPU tier runs, which backend serves each operator, and why: `python -m ribfast.info`."""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

from . import __version__, _ext


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def collect() -> dict:
    """Everything that `python -m ribfast.info` prints."""
    built = _ext.build_info()
    steered = os.environ.get("ATEN_CPU_CAPABILITY")
    devices = ["cpu", "cuda"]
    return {
        "ribfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "built": built,
        "cpu": {
            "tier": _ext.cpu_tier(),
            "reason": f"ATEN_CPU_CAPABILITY={steered}" if steered else "the best that this processor has, by torch",
            "compiled": list(_ext.compiled_cpu_tiers),
            "threads": torch.get_num_threads(),
        },
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "requested": _ext.requested,
        "ops": {op: {device: _served(op, device) for device in devices} for op in _ext.OPS},
    }


def machine() -> dict:
    """This one, in a few words."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "torch": torch.__version__,
    }


def _served(op: str, device: str) -> dict:
    try:
        name, reason = _ext.backend(op, torch.device(device))
    except ValueError as error:
        return {"backend": "none", "reason": str(error)}
    return {"backend": name, "reason": reason}


def lines() -> list[str]:
    """`collect` for people."""
    facts = collect()
    built, cpu = facts["built"], facts["cpu"]
    cuda = f"with CUDA for {built['cuda_architectures']}" if built["cuda"] else "without CUDA"
    text = [
        f"ribfast {facts['ribfast']}, Python {facts['python']}, torch {facts['torch']}, triton {facts['triton']}",
        f"built against torch {built['torch']} by {built['compiler']}, {cuda} ({built['cuda_reason']}), "
        f"{'with' if built['openmp'] else 'WITHOUT'} OpenMP{', debug' if built['debug'] else ''}",
        f"CPU tier {cpu['tier']} of {', '.join(cpu['compiled'])} ({cpu['reason']}), {cpu['threads']} threads",
        f"CUDA devices: {', '.join(facts['cuda']) or 'none'}",
        f"RIBFAST_BACKEND={facts['requested']}",
    ]
    for op, served in facts["ops"].items():
        for device, choice in served.items():
            text.append(f"  {op:<16} {device:<5} {choice['backend']:<10} {choice['reason']}")
    return text


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ribfast.info", description=__doc__.split(":")[0])
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(argv)
    print(json.dumps(collect(), indent=2) if options.json else "\n".join(lines()))


if __name__ == "__main__":
    main()

"""What `ribfast demo` finds and how long it takes, into results/demo.json.

    python benchmarks/demo.py FOLDER [--seeds 0 1 2]

Each seed draws pictures and trains networks of its own, in a folder of its own; one that is there is not made again.
Prints the table of docs/methods.md.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from ribfast import __version__, _ext

RESULTS = Path(__file__).parent / "results" / "demo.json"
STAGES = ("cam", "rib", "masks", "ppmg", "relabelled", "predicted")


def measure(out: Path, seed: int) -> dict:
    """Points of mIoU by stage, seconds by the clock and of all processors, and the machine's load before and after."""
    kept = out / "measured.json"
    if not kept.is_file():
        start, load, before = time.time(), os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "ribfast", "demo", "--out", str(out), "--seed", str(seed)], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        facts = {"seed": seed, "seconds": round(time.time() - start), "processor_seconds": round(busy)}
        facts["load"] = [round(load, 1), round(os.getloadavg()[0], 1)]
        for stage in STAGES:
            found = json.loads((out / stage / "evaluation.json").read_text("utf-8"))
            facts[stage] = round(100 * found["reported"]["miou"], 2)
        kept.write_text(json.dumps(facts), "utf-8")
    return json.loads(kept.read_text("utf-8"))


def table() -> str:
    """Markdown: points of mIoU by seed and stage, and their means."""
    rows = json.loads(RESULTS.read_text("utf-8"))["rows"]
    rows = [{"seed": "mean", **{name: sum(row[name] for row in rows) / len(rows) for name in STAGES}}, *rows]
    lines = ["| seed | CAM | RIB | RIB's gain | CRF | PPMG | segmenter | segmenter, unseen |", "|---" * 8 + "|"]
    for row in [*rows[1:], rows[0]]:
        cells = [f"{row[name]:.1f}" for name in STAGES]
        cells.insert(2, f"{row['rib'] - row['cam']:+.1f}")
        lines.append(f"| {row['seed']} | {' | '.join(cells)} |")
    return "".join(f"{line}\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    machine = {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "tier": _ext.cpu_tier(),
        "threads": torch.get_num_threads(),
    }
    versions = {"ribfast": __version__, "torch": torch.__version__, "python": platform.python_version()}
    rows = [measure(options.folder / f"seed-{seed}", seed) for seed in options.seeds]
    RESULTS.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1) + "\n", "utf-8")
    print(table())


def _processor() -> str:
    lines = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in lines.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()

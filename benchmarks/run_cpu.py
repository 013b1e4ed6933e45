"""Runs the CPU benchmarks, ratios against plain torch and pydensecrf: benchmarks/results/cpu.json, and its tables.

`python run_cpu.py -k rib` runs some of them and puts their rows in place of the old ones, on the same kind of machine.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tables

from ribfast import info

HERE = Path(__file__).parent
RESULT = HERE / "results" / "cpu.json"


def others_running() -> float:
    """Processors that something else keeps busy, over half a second."""

    def ticks():
        fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(fields) - fields[3] - fields[4], sum(fields)

    if not Path("/proc/stat").exists():
        return 0.0
    busy, total = ticks()
    time.sleep(0.5)
    busy_after, total_after = ticks()
    return os.cpu_count() * (busy_after - busy) / max(1, total_after - total)


def main() -> int:
    if (busy := others_running()) > 0.5:
        print(f"bench: expected a quiet machine, got {busy:.1f} processors busy; two threads would wait for them")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "-q", "-o", "python_files=bench_*.py"]
        command += ["-o", "python_functions=bench_*", "--benchmark-disable-gc", "--benchmark-columns=min,median"]
        code = subprocess.run([*command, f"--benchmark-json={raw}", *sys.argv[1:]]).returncode
        if code or not raw.exists():
            return code or 1
        report = json.loads(raw.read_text())
    cpu = report["machine_info"].get("cpu", {})
    facts = info.collect()
    result = {
        "machine": {"cpu": cpu.get("brand_raw"), "cores": cpu.get("count"), "system": platform.platform(terse=True)},
        "versions": {name: facts[name] for name in ("ribfast", "python", "torch")},
        "tier": facts["cpu"]["tier"],
        "compiler": facts["built"]["compiler"],
        "note": "ratio: of minima for the CRF, median over interleaved pairs for the others; seconds: minima",
        "benchmarks": [
            {"name": b["name"].removeprefix("bench_"), **dict(sorted(b["extra_info"].items()))}
            for b in report["benchmarks"]
        ],
    }
    if len(sys.argv) > 1:
        old = json.loads(RESULT.read_text())
        same = ("machine", "versions", "tier", "compiler")
        if any(old[name] != result[name] for name in same):
            print(f"bench: expected the machine and versions of {RESULT.name}, got others; run all of it")
            return 1
        new = {row["name"]: row for row in result["benchmarks"]}
        rows = [new.pop(row["name"], row) for row in old["benchmarks"]]
        result["benchmarks"] = rows + list(new.values())
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{'benchmark':<70} {'ratio':>7} {'target':>7}")
    for row in result["benchmarks"]:
        target = "" if row["target"] is None else f"{row['target']:.1f}"
        missed = "  MISSED" if row["target"] and row["ratio"] < row["target"] else ""
        print(f"{row['name']:<70} {row['ratio']:>7.2f} {target:>7}{missed}")
    tables.write()
    print(f"wrote {RESULT.relative_to(HERE.parent)} and its tables in {' and '.join(tables.MADE)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

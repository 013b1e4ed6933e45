"""The GPU check's own bookkeeping (benchmarks/gpu.py), which must not lose results when a phase fails or hangs."""

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from ribfast.train import SegmentationConfig

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(code):
    return [sys.executable, "-c", code]


def test_phases_are_saved_as_they_end(gpu, tmp_path):
    run = gpu.Run(tmp_path / "results", "NVIDIA H200", 60)
    run.save(device="NVIDIA H200")
    assert run.phase("good", python("print('fine')"), 30) == "fine\n"
    run.phase("bad", python("print('reason'); raise SystemExit(3)"), 30)
    saved = json.loads((tmp_path / "results" / "gpu-nvidia-h200.json").read_text())
    assert saved["device"] == "NVIDIA H200"
    assert saved["checks"]["good"]["ok"] is True
    assert saved["checks"]["bad"] | {"seconds": 0} == {"ok": False, "code": 3, "seconds": 0, "last": ["reason"]}
    assert (tmp_path / "results" / "gpu-bad.log").read_text() == "reason\n"


def test_hanging_phase_is_ended_with_all_it_started(gpu, tmp_path):
    run = gpu.Run(tmp_path, "x", 60)
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '300']).pid, flush=True); time.sleep(300)"
    output = run.phase("hang", python(code), 10)
    check = json.loads(run.path.read_text())["checks"]["hang"]
    assert check["ok"] is None and check["last"][-1] == "ran out of time"
    end = time.monotonic() + 30  # a signal may take a moment
    while is_running(int(output)):
        assert time.monotonic() < end
        time.sleep(0.01)


def is_running(number):
    try:
        return "Z (zombie)" not in Path(f"/proc/{number}/status").read_text()
    except OSError:
        return False


def test_no_phase_starts_without_time(gpu, tmp_path):
    run = gpu.Run(tmp_path, "x", 2)
    run.phase("late", python("print('never')"), 30)
    assert json.loads(run.path.read_text())["checks"]["late"] == {"ok": None, "reason": "no time was left"}


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parents[1]))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_every_row_of_rib_is_measured(benchmarks):
    """On the CPU and small; a row that fails on a GPU alone says how."""
    gpu_rib = benchmarks("gpu_rib")
    case = gpu_rib.Case(torch.device("cpu"), (32, 40), 32, 2, 3, "resnet10")
    rows = gpu_rib.measure(lambda name, row: None, case, case, networks=(), at_once=(1,), workers=1)
    assert not [(name, row) for name, row in rows.items() if "error" in row]
    assert {"matrix", "released", "exact", "fast with loading", "graphs on, float32"} <= set(rows)
    assert rows["exact"]["correlation"] > 0.99 and rows["exact"]["ratio"] > 0


def test_steps_of_segmentation_are_measured(benchmarks):
    gpu_train, rows = benchmarks("gpu_train"), []
    small = dict(network="resnet10", batch=2, crop=33, steps=4, workers=1, device="cpu")
    ways = {"plain": SegmentationConfig(**small), "graphs": SegmentationConfig(**small, graphs=True)}
    gpu_train.measure(rows.append, ways, images=4, size=(40, 48), warm=1)
    assert [row["way"] for row in rows] == ["plain", "graphs"] and rows[0]["step_ms"] > 0 < rows[0]["tflops"]
    assert [row["largest_difference_of_losses"] for row in rows] == [0, 0]
    assert len(gpu_train.WAYS) >= 5


def test_steps_of_erasing_are_measured(benchmarks):
    gpu_train, rows = benchmarks("gpu_train"), []
    ways = [("bfloat16", "cam"), ("float32", "gradcam")]
    gpu_train.measure_erasing(rows.append, "cpu", "resnet10", images=2, crop=33, rounds=1, ways=ways)
    assert [row["way"] for row in rows] == ["bfloat16, cam", "float32, gradcam"] and len(gpu_train.ERASING) == 4
    for row in rows:
        assert row["losses"] == pytest.approx(row["plain_losses"], rel=1e-4 if "float32" in row["way"] else 0.1)
        assert row["ratio"] == pytest.approx(row["plain_step_ms"] / row["step_ms"])

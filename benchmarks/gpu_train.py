"""Steps of DeepLab-v2 on a GPU, from JPEG files: as CUDA graphs, without, compiled, and in float32; and steps of
adversarial erasing against plain torch.

ResNet-101 with random weights, crops of 321, batches of 10, 21 labels. A step's time is the median between lines of
metrics.jsonl; operations are counted, two a multiply-add, three times the forward's. Losses are compared with the first
way's. EADER's: a step of either turn, of 16 crops of 448 in memory, ResNet-50 against ResNet-18, 32 pairs of an image
and a class; the medians. Called by benchmarks/gpu.py: `python -m benchmarks.gpu_train RESULT.json` adds to that file
after every row.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.eader import Steps
from benchmarks.photographs import block_masks, picture, write
from ribfast import models
from ribfast.train import EaderConfig, SegmentationConfig, train_segmenter

CLASSES, STEPS = 20, 40
BASE = SegmentationConfig(
    steps=STEPS, lr=1e-4, graphs=False, workers=12, save_every=STEPS, precision="bfloat16", device="cuda"
)
WAYS = {
    "bfloat16": BASE,
    "bfloat16, graphs": dataclasses.replace(BASE, graphs=True),
    "bfloat16, graphs, images in memory": dataclasses.replace(BASE, graphs=True, cache_mib=1024),
    "float32": dataclasses.replace(BASE, precision="float32"),
    "bfloat16, compiled": dataclasses.replace(BASE, compile=True),
}
ERASING = list(itertools.product(("bfloat16", "float32"), ("cam", "gradcam")))


def weights(path: Path, network: str) -> Path:
    """Features that neither vanish nor explode."""
    torch.manual_seed(0)
    state = models.cam_classifier(network, 1).state_dict()
    state = {
        name: value * 0.2 if name.endswith(("bn2.weight", "bn3.weight")) else value for name, value in state.items()
    }
    state.pop("classifier.weight")
    models.save_checkpoint(path, state)
    return path


def operations(config) -> float:
    """Of a step."""
    model = models.segmenter(config.network, CLASSES).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(config.batch, 3, config.crop, config.crop, device="meta"))
    return 3 * counter.get_total_flops()


def measure(report, ways: dict[str, SegmentationConfig], images: int = 60, size=(375, 500), warm: int = 12) -> None:
    """report: called with each row as soon as it is there."""
    with tempfile.TemporaryDirectory() as folder:
        folder, expected = Path(folder), None
        made = write(folder / "data", (picture(n, size) for n in range(images)), lambda n: n % CLASSES, CLASSES)
        masks = block_masks(made, size)
        for number, (name, config) in enumerate(ways.items()):
            begun, out = time.perf_counter(), folder / str(number)
            start = weights(folder / "weights.safetensors", config.network)
            train_segmenter(made, config, out, labels=masks, weights=start)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            times = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(lines)]
            step, losses = statistics.median(times[warm:]), np.array([line["loss"] for line in lines])
            expected = losses if expected is None else expected
            row = {"way": name, "step_ms": 1e3 * step, "images_per_s": config.batch / step}
            row |= {"tflops": operations(config) / step / 1e12, "seconds": round(time.perf_counter() - begun, 1)}
            report(row | {"largest_difference_of_losses": float(np.abs(losses - expected).max())})


def measure_erasing(report, device="cuda", network="resnet50", images=16, crop=448, rounds=5, ways=ERASING) -> None:
    for precision, attention in ways:
        config = EaderConfig(network, attention=attention, crop=crop, precision=precision, device=device)
        steps, times, losses = Steps(config, images, torch.device(device)), {"ours": [], "plain": []}, {}
        for _ in range(rounds + 1):
            for name, run in (("ours", steps.ours), ("plain", steps.plain)):
                begun = time.perf_counter()
                losses[name] = run().tolist()  # which waits for the device
                times[name].append(time.perf_counter() - begun)
        ours, plain = (1e3 * statistics.median(times[name][1:]) / 2 for name in ("ours", "plain"))
        row = {"way": f"{precision}, {attention}", "step_ms": ours, "plain_step_ms": plain, "ratio": plain / ours}
        report(row | {"target": 2.0, "losses": losses["ours"], "plain_losses": losses["plain"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    facts = json.loads(path.read_text()) if path.exists() else {}
    facts["segmentation"], facts["erasing"] = [], []

    def report(kind: str, row: dict) -> None:
        facts[kind].append(row)
        path.write_text(json.dumps(facts, indent=1) + "\n")
        print(row, flush=True)

    measure(functools.partial(report, "segmentation"), WAYS)
    measure_erasing(functools.partial(report, "erasing"))


if __name__ == "__main__":
    main()

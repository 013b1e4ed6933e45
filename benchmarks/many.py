"""Ten thousand tiny images through every stage: what each costs along the way, and memory: results/many.json.

    python benchmarks/many.py [--images 10000] [--only stages|draws]

Every stage is a process of its own. Its cost is its processors' time, which other processes on the machine hardly
change; the first tenth is left out, in which memory fills and kernels are chosen. `growth` is the cost of an image of
the last third by that of one of the first third: 1 where the cost is linear. `growth_mib` is what the process holds
more at the end than after that tenth.

`draws` are the other images that `rib` draws for all images, none of them read, in a data set and in one four times as
large. An image has 1 to 6 of 80 classes at random, so nearly every one has a label set of its own. Here `growth` is the
cost of an image of the larger one by that of the smaller, `growth_mib` what drawing added to the larger one's process.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.photographs import write
from ribfast import cli, data, models, rib

RESULT = Path(__file__).parent / "results" / "many.json"
CLASSES, SIDE = 5, 40
DRAWN = (20_000, 80_000)  # images


def resident() -> float:
    """MiB that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def stage(words: list[str]) -> dict:
    """Runs a command here and looks at itself at 31 points of its way."""
    seen = []

    def look(done, total, name):
        wanted = total * len(seen) // 30
        if done >= max(1, wanted):
            seen.append((done, time.process_time(), resident()))

    cli._progress = lambda title="": look
    code = cli.main(words)
    if code:
        raise SystemExit(code)
    done, spent, held = map(np.array, zip(*seen, strict=True))
    start = int(np.searchsorted(done, 0.1 * done[-1]))
    third = (len(done) - start) // 3

    def cost(first, last):
        return float((spent[last] - spent[first]) / (done[last] - done[first]))

    return {
        "images": int(done[-1]),
        "milliseconds": 1e3 * cost(start, -1),
        "growth": cost(len(done) - 1 - third, -1) / cost(start, start + third),
        "mib": float(held[start]),
        "growth_mib": float(held[-1] - held[start]),
    }


def draws(preset: str, count: int) -> dict:
    """What it costs to draw the others of all of so many images."""
    rng = np.random.default_rng(0)
    sets = (np.sort(rng.choice(80, rng.integers(1, 7), replace=False)).tolist() for _ in range(count))
    items = (data.Item(str(i), Path(f"{i}.jpg"), tuple(classes), None) for i, classes in enumerate(sets))
    source = data.Source(tuple(map(str, range(80))), tuple(items))
    began = time.process_time()
    found = rib.Draws(source, source, getattr(rib.RIBConfig, preset)())
    held = resident()
    for block in found.blocks:
        found.draw(block)
    return {"seconds": time.process_time() - began, "mib": held, "growth_mib": resident() - held}


def compared(preset: str) -> dict:
    """Data sets of both sizes, each in a process of its own."""
    few, many = (_alone("--draws", json.dumps([preset, count])) for count in DRAWN)
    growth = many["seconds"] / few["seconds"] * DRAWN[0] / DRAWN[1]
    row = {"images": DRAWN, "seconds": [few["seconds"], many["seconds"]], "growth": growth}
    return row | {"mib": many["mib"], "growth_mib": many["growth_mib"]}


def draw(folder: Path, count: int) -> None:
    """Noise of a colour by the class, in files of a kilobyte."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 215, (CLASSES, 3))

    def image(number: int) -> np.ndarray:
        coarse = colours[number % CLASSES] + rng.integers(-40, 40, (5, 5, 3))
        return cv2.resize(coarse.clip(0, 255).astype(np.uint8), (SIDE, SIDE + 8), interpolation=cv2.INTER_CUBIC)

    write(folder, (image(number) for number in range(count)), lambda number: number % CLASSES, CLASSES)
    (folder / "masks").mkdir()
    for number in range(count):
        mask = np.full((SIDE + 8, SIDE), number % CLASSES + 1, np.uint8)
        mask[: SIDE // 2] = 0
        cv2.imwrite(str(folder / "masks" / f"{number}.png"), mask)


def commands(folder: Path) -> dict[str, list[str]]:
    """By name, each on what the ones before made."""
    torch.manual_seed(0)
    classifier, segmenter = models.cam_classifier("resnet18", CLASSES), models.segmenter("resnet18", CLASSES)
    for model, tensors in ((classifier, classifier.state_dict()), (segmenter, segmenter.tensors())):
        model.classes = tuple(map(str, range(CLASSES)))
        models.save_checkpoint(folder / f"{model.kind}.safetensors", tensors, model.metadata())
    data = ["--data", f"folder:{folder / 'data'}", "--workers", "1"]
    found = {
        "cam": ["--checkpoint", folder / "classifier.safetensors", "--scales", "1", "--device", "cpu"],
        "rib": ["--checkpoint", folder / "classifier.safetensors", "--scales", "1", "--loss-scales", "1", "--steps",
                "2", "--n-others", "1", "--others-crop", "32", "--others-long-side", "40,48", "--cache-mib", "8",
                "--device", "cpu"],
        "masks": ["--maps", folder / "cam", "--preset", "crf", "--device", "cpu"],
        "predict": ["--checkpoint", folder / "segmenter.safetensors", "--no-mirror", "--device", "cpu"],
    }  # fmt: skip
    words = {name: [name, *data, *map(str, more), "--out", str(folder / name)] for name, more in found.items()}
    words["scan"] = ["scan", *data]
    for name, kind in (("cam", "maps"), ("masks", "masks")):
        words[f"eval, {kind}"] = ["eval", *data, f"--{kind}", str(folder / name), "--resamples", "0"]
    return words


def _alone(*words: str) -> dict:
    """What this script says, started with such words in a process of one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(RESULT.parents[2])}
    call = [sys.executable, __file__, *words]
    return json.loads(subprocess.run(call, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--only", choices=["stages", "draws"], help="measure these anew, and keep the rest of --out")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # what this script starts itself with
    parser.add_argument("--draws", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage or options.draws:
        said, sys.stdout = sys.stdout, sys.stderr
        print(json.dumps(stage(json.loads(options.stage)) if options.stage else draws(*json.loads(options.draws))),
              file=said)  # fmt: skip
        return
    facts = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
    if options.only:
        kept = json.loads(options.out.read_text())
        if {name: kept[name] for name in facts} != facts:
            raise SystemExit(f"many: expected {options.out} to be of {facts}, got another machine's; leave --only out")
        facts = kept

    def keep(part: str, name: str, row: dict) -> None:
        facts[part][name] = row
        options.out.write_text(json.dumps(facts, indent=1) + "\n")

    if options.only != "stages":
        facts["draws"] = {}
        for preset in ("released", "coco", "fast", "paper"):
            row = compared(preset)
            keep("draws", preset, row)
            print(f"draws, {preset:<8} {row['seconds'][0]:.2f} and {row['seconds'][1]:.2f} s, "
                  f"growth {row['growth']:.3f}, {row['growth_mib']:+.1f} MiB", flush=True)  # fmt: skip
    if options.only == "draws":
        return
    facts["stages"] = {}
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "data", options.images)
        for name, words in commands(Path(folder)).items():
            row = _alone("--stage", json.dumps(words))
            keep("stages", name, row)
            print(f"{name:<12} {row['milliseconds']:8.2f} ms an image, growth {row['growth']:.3f}, "
                  f"{row['mib']:.0f} MiB, then {row['growth_mib']:+.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()

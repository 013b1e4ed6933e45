"""What RIB gains on real photographs: mIoU of CAM and of RIB's variants by the number of maps summed, over seeds.

    python benchmarks/quality.py DATA WEIGHTS FOLDER [--network ...] [--seeds 0 1 2] [--variants ...]

DATA: a folder of photographs with masks, train.txt and val.txt; WEIGHTS: an ImageNet backbone. FOLDER keeps classifiers
and what was measured, so that a run goes on where it was cut off. Thresholds are chosen on train images and reported on
val. Writes results/quality.json and quality.md.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ribfast import data, models, rib
from ribfast.cams import merge_cams
from ribfast.metrics import ThresholdSweep
from ribfast.pipeline import AdaptConfig, adapt_maps
from ribfast.rib import RIBConfig
from ribfast.store import Store
from ribfast.train import ClassifierConfig, train_classifier

RESULTS = Path(__file__).parent / "results"
STEPS = 11  # maps of theta_0 .. theta_10: K from 0, which is the CAM alone, to 10
THRESHOLDS = np.round(np.arange(0.02, 0.9, 0.01), 4)
SHARED = {"steps": STEPS, "horizon": 10, "precision": "auto", "n_others": 8}
RATES = {"mobilenet_v2": 3e-5}  # whose maps hardly move at the 8e-6 of ResNet-50; chosen on train images
VARIANTS = {
    "released": lambda: RIBConfig.released(**SHARED),
    "paper": lambda: RIBConfig.paper(precision="auto", n_others=8),
    "gap": lambda: RIBConfig.released(pooling="gap", **SHARED),
    "paper_gap": lambda: RIBConfig.paper(pooling="gap", precision="auto", n_others=8),  # without stops
    "fast": lambda: RIBConfig.fast(**SHARED),
}
ABOUT = """\
Made by `python benchmarks/quality.py` from quality.json: mIoU (%) on 119 val photographs of MSRC-v2's 15 object
classes, the threshold chosen on train photographs; mean over seeds (standard deviation). 19 % of the pixels are void,
objects are large and central, most images have one class. K: updates before the last map that is summed; K = 0 is the
CAM alone. 8 others an image, at 192 pixels. An image that was stopped keeps the maps that it had. In the last lines,
K = 10; `best on val`: with the threshold that is best there."""


def constants(model, variant, crop) -> RIBConfig:
    sizes = {"others_crop": crop, "others_long_side": (round(0.8 * crop), round(1.4 * crop))}
    return dataclasses.replace(VARIANTS[variant](), lr=RATES.get(model.name, 8e-6), **sizes)


def measure(model, variant, source, others, seed, crop) -> tuple[list[ThresholdSweep], dict]:
    """A sweep for each number of maps, over the images of source; an image that was stopped keeps its last maps."""
    config = constants(model, variant, crop)
    engine, draws = rib.Engine(model, config), rib.Draws(source, others, config, seed)
    sweeps = [ThresholdSweep(len(source.classes), THRESHOLDS) for _ in range(STEPS)]
    for item in source:
        if not item.classes:
            for sweep in sweeps:
                sweep.add(np.empty((0, 0, 0), np.float32), (), source.mask(item))
    cache, steps, stopped = data.ImageCache(others, 1 << 30), [], 0
    normalization = data.NORMALIZATIONS[model.normalization]
    with rib.keep_pages(), ThreadPoolExecutor(1) as threads:
        for block in draws.blocks:
            loader = rib.BlockLoader(draws, block, block, normalization, threads, cache)
            if loader.empty:
                raise ValueError(f"every other image shares a class with {loader.items[0].name}")
            batches = engine.batches(loader.items[0].classes, loader.others, len(loader.items))
            for item, target in loader.targets():
                if isinstance(target, Exception):
                    raise target
                last = []
                job = rib.Job(target, batches, watch=lambda step, maps, last=last: last.append(maps))
                ((_, result),) = engine.adapt_all([job])
                if result.error is not None:
                    raise ArithmeticError(f"{item.name}: {result.error}")
                steps.append(result.steps)
                stopped += result.stopped
                mask = source.mask(item)
                for number, sweep in enumerate(sweeps):
                    maps = last[min(number, len(last) - 1)]
                    _, high_res = merge_cams([m[None] for m in maps], result.keys, target.size)
                    sweep.add(high_res.numpy(), result.keys, mask)
    return sweeps, {"mean_steps": float(np.mean(steps)), "stopped": stopped, "images": len(steps)}


def precision(model, source, others, seed, crop) -> dict:
    """How far 16 bits are from float32: the released preset's maps, and masks at a third of the maximum."""
    found = {"correlations": [], "agreements": []}
    maps = {}
    for kind in ("float32", "auto"):
        config = dataclasses.replace(constants(model, "released", crop), precision=kind, steps=10)
        with tempfile.TemporaryDirectory() as folder:
            store = Store(folder, "irn")
            adapt_maps(source, model, store, AdaptConfig(**dataclasses.asdict(config), seed=seed), others=others)
            maps[kind] = {name: store.load(name).high_res for name in store.names()}
    for name, expected in maps["float32"].items():
        other = maps["auto"][name]
        found["correlations"].append(float(np.corrcoef(expected.ravel(), other.ravel())[0, 1]))
        found["agreements"].append(float(((expected > 1 / 3) == (other > 1 / 3)).mean()))
    return found


def classifier(options, source, seed, folder) -> models.CamClassifier:
    path = folder / "classifier.safetensors"
    if not path.exists():
        mobile = options.network == "mobilenet_v2"
        config = dataclasses.replace(
            ClassifierConfig.paper(), network=options.network, lr=0.03 if mobile else 0.01, epochs=8,
            long_side=(224, 384), crop=288, seed=seed, precision="bfloat16",
            tensorflow_padding=mobile, normalization="symmetric" if mobile else "imagenet",
        )  # fmt: skip
        train_classifier(source, config, folder, weights=options.weights)
    return models.open_classifier(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("weights", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", default="mobilenet_v2", choices=models.NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--every", type=int, default=4, help="of the train images, to choose thresholds on")
    parser.add_argument("--crop", type=int, default=192, help="of the other images")
    options = parser.parse_args()
    train, val = (data.open_source(f"folder:{options.data}", split) for split in ("train", "val"))
    chosen = data.Source(train.classes, train.items[:: options.every], train.upright)
    for seed in options.seeds:
        folder = options.folder / f"{options.network}-{seed}"
        model = classifier(options, train, seed, folder)
        for variant in options.variants:
            path = folder / f"{variant}.json"
            if path.exists():
                continue
            start, found = time.time(), {}
            for name, source in (("train", chosen), ("val", val)):
                sweeps, facts = measure(model, variant, source, train, seed, options.crop)
                found[name] = {"mious": [sweep.mious().tolist() for sweep in sweeps], **facts}
            found["seconds"] = time.time() - start
            path.write_text(json.dumps(found))
            print(f"{options.network} seed {seed} {variant}: {time.time() - start:.0f} s", flush=True)
        path = folder / "precision.json"
        if not path.exists():
            some = data.Source(val.classes, val.items[::9], val.upright)
            path.write_text(json.dumps(precision(model, some, train, seed, options.crop)))
    write(options.folder)


def write(folder: Path) -> None:
    """results/quality.json from all that was measured, and the table and curves in quality.md."""
    rows = []
    for path in sorted(folder.glob("*-*/*.json")):
        if path.stem not in VARIANTS:
            continue
        found = json.loads(path.read_text())
        network, _, seed = path.parent.name.rpartition("-")
        curve = []
        for on_train, on_val in zip(found["train"]["mious"], found["val"]["mious"], strict=True):
            best = int(np.argmax(on_train))
            curve.append({"threshold": float(THRESHOLDS[best]), "miou": on_val[best], "best_on_val": max(on_val)})
        facts = {"mean_steps": found["val"]["mean_steps"], "stopped": found["val"]["stopped"]}
        facts |= {"images": found["val"]["images"], "seconds": round(found["seconds"])}
        rows.append({"network": network, "seed": int(seed), "variant": path.stem, "curve": curve, **facts})
    close = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*-*/precision.json"))}
    facts = {"steps": STEPS, "rows": rows, "precision": close}
    (RESULTS / "quality.json").write_text(json.dumps(facts, indent=1) + "\n")
    (RESULTS / "quality.md").write_text(report(rows, close))


def report(rows: list[dict], close: dict[str, dict]) -> str:
    """Tables of mIoU on val, mean and spread over seeds; 16 bits against float32."""
    text = [ABOUT]
    for network in sorted({row["network"] for row in rows}):
        own = [row for row in rows if row["network"] == network]
        names = [name for name in VARIANTS if any(row["variant"] == name for row in own)]
        text += [f"\n## {network}\n", "| K | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        for k in range(STEPS):
            cells = []
            for name in names:
                values = [100 * row["curve"][k]["miou"] for row in own if row["variant"] == name]
                spread = f" ({np.std(values, ddof=1):.1f})" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.1f}{spread}")
            text.append(f"| {k} | " + " | ".join(cells) + " |")
        cells = []
        for name in names:
            values = [100 * row["curve"][-1]["best_on_val"] for row in own if row["variant"] == name]
            cells.append(f"{np.mean(values):.1f}")
        text.append(f"| best on val | {' | '.join(cells)} |")
        for label, key in (("steps begun, mean", "mean_steps"), ("images stopped", "stopped"), ("images", "images")):
            cells = [f"{np.mean([row[key] for row in own if row['variant'] == name]):.1f}" for name in names]
            text.append(f"| {label} | " + " | ".join(cells) + " |")
        text.append(f"| seeds | {' | '.join(str(sum(row['variant'] == n for row in own)) for n in names)} |")
    if close:
        text.append("\n## 16 bits after the trunk against float32, released preset\n")
        text += [
            "| network and seed | images | least correlation | mean | least agreement | mean |",
            "|---|---|---|---|---|---|",
        ]
        for name, found in close.items():
            both = [found["correlations"], found["agreements"]]
            cells = " | ".join(f"{min(values):.5f} | {np.mean(values):.5f}" for values in both)
            text.append(f"| {name} | {len(both[0])} | {cells} |")
        text.append("\nOf the class maps; agreement: the share of pixels on the same side of a third of the maximum.")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()

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

ABOUT_MASKS = """
## From CAMs to masks

Made by `python benchmarks/quality_masks.py` from quality_masks.json: mIoU (%) on the same val photographs of masks made
from the plain CAMs, mean over seeds (standard deviation); each method's constant (the background's, for PPMG the power)
is chosen on every fourth train photograph. IRN's network is trained on all train photographs."""

ABOUT_SEGMENTERS = """
## The segmenter trained on masks

Made by `python benchmarks/quality_segmentation.py` from quality_segmentation.json: mIoU (%) of segmenters on the same
val photographs, mean over seeds (standard deviation), the last weights of {steps} steps; trained on the train
photographs' masks by {masks}, with or without pretended under-fitting (PUF), on what such a segmenter predicts of the
train photographs (cycle), and on their ground truth. Labels on train: how good the masks are that it was trained on."""

ABOUT_EADER = """
## Classifiers trained by adversarial erasing

Made by `python benchmarks/quality_eader.py` from quality_eader.json: mIoU (%) of CAMs on the same val photographs, the
threshold chosen on all train photographs; mean over seeds (standard deviation). The localiser is trained as the plain
classifier is, for as many steps; the adversary, {adversary}, has as many again, in turns of {turn}."""


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


def configuration(options, seed) -> ClassifierConfig:
    mobile = options.network == "mobilenet_v2"
    return dataclasses.replace(
        ClassifierConfig.paper(), network=options.network, lr=0.03 if mobile else 0.01, epochs=8,
        long_side=(224, 384), crop=288, seed=seed, precision="bfloat16",
        tensorflow_padding=mobile, normalization="symmetric" if mobile else "imagenet",
    )  # fmt: skip


def classifier(options, source, seed, folder) -> models.CamClassifier:
    path = folder / "classifier.safetensors"
    if not path.exists():
        train_classifier(source, configuration(options, seed), folder, weights=options.weights, resume=True)
    return models.open_classifier(path)


def arguments(about: str, *, weights: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("data")
    if weights:
        parser.add_argument("weights", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", default="mobilenet_v2", choices=models.NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser


def main() -> None:
    parser = arguments(__doc__)
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
    write_report()


def write_report() -> None:
    """quality.md from quality.json and what there is of quality_eader.json, _masks.json and _segmentation.json."""
    names = ("quality", "quality_eader", "quality_masks", "quality_segmentation")
    facts, erasing, masks, segmenters = (
        json.loads(path.read_text()) if path.exists() else {} for path in (RESULTS / f"{name}.json" for name in names)
    )
    text = report(facts["rows"], facts["precision"])
    if erasing:
        text += report_of_eader(erasing)
    if masks:
        text += report_of_masks(masks["rows"])
    if segmenters:
        text += report_of_segmenters(segmenters, masks["rows"])
    (RESULTS / "quality.md").write_text(text)


def report_of_eader(facts: dict) -> str:
    """mIoU of CAMs by how their classifier was trained."""
    rows = facts["rows"]
    adversaries = sorted({row["adversary"] for row in rows})
    text = [ABOUT_EADER.format(adversary=", ".join(adversaries), turn=facts["turn"])]
    for network in sorted({row["network"] for row in rows}):
        own = [row for row in rows if row["network"] == network]
        text += [f"\n### {network}\n", "| trained by | mIoU | gain | best on val | on train | thresholds |",
                 "|---|---|---|---|---|---|"]  # fmt: skip
        plain = {row["seed"]: row["miou"] for row in own if row["variant"] == "BCE"}
        for variant in dict.fromkeys(row["variant"] for row in own):
            found = [row for row in own if row["variant"] == variant]
            cells = [_mean([100 * row["miou"] for row in found])]
            gains = [100 * (row["miou"] - plain[row["seed"]]) for row in found if row["seed"] in plain]
            cells += [_mean(gains) if gains else ""]
            cells += [_mean([100 * row[name] for row in found]) for name in ("best_on_val", "miou_on_train")]
            cells += [", ".join(f"{row['threshold']:g}" for row in found)]
            text.append(f"| {variant} | {' | '.join(cells)} |")
        text.append(f"\nSeeds: {', '.join(str(seed) for seed in sorted({row['seed'] for row in own}))}.")
    return "\n".join(text) + "\n"


def report_of_masks(rows: list[dict]) -> str:
    """mIoU of masks made from the same CAMs, mean and spread over seeds."""
    text = [ABOUT_MASKS]
    for network in sorted({row["network"] for row in rows}):
        own = [row for row in rows if row["network"] == network]
        text += [f"\n### {network}\n", "| | mIoU | gain over the CAM | constant chosen |", "|---|---|---|---|"]
        cam = {row["seed"]: row["miou"] for row in own if row["method"] == "CAM"}
        for method in dict.fromkeys(row["method"] for row in own):
            found = [row for row in own if row["method"] == method]
            values, gains = (
                [100 * (row["miou"] - base) for row, base in zip(found, bases, strict=True)]
                for bases in ([0.0] * len(found), [cam[row["seed"]] for row in found])
            )
            spreads = [f" ({np.std(each, ddof=1):.1f})" if len(each) > 1 else "" for each in (values, gains)]
            chosen = ", ".join(f"{row['constant']:g}" for row in found)
            text.append(
                f"| {method} | {np.mean(values):.1f}{spreads[0]} | {np.mean(gains):+.1f}{spreads[1]} | {chosen} |"
            )
        text.append(f"\nSeeds: {', '.join(str(seed) for seed in cam)}.")
    return "\n".join(text) + "\n"


def report_of_segmenters(facts: dict, of_masks: list[dict]) -> str:
    """mIoU on val by what segmenters were trained on, and its share of what ground truth gives."""
    rows = facts["rows"]
    text = [ABOUT_SEGMENTERS.format(masks=facts["masks"], steps=", ".join(str(n) for n in {r["steps"] for r in rows}))]
    for network in sorted({row["network"] for row in rows}):
        own, tests = [row for row in rows if row["network"] == network], list(rows[0]["miou"])
        text += [f"\n### {network}\n", f"| trained on | labels on train | {' | '.join(tests)} | of ground truth's |",
                 "|---|---|" + "---|" * (len(tests) + 1)]  # fmt: skip
        masks = [100 * row["miou"] for row in of_masks if (row["network"], row["method"]) == (network, facts["masks"])]
        text.append(f"| (the masks themselves) | | {_mean(masks)} |" + " |" * len(tests))
        best = {row["seed"]: row["miou"][tests[-1]] for row in own if row["variant"] == "ground truth"}
        for variant in dict.fromkeys(row["variant"] for row in own):
            found = [row for row in own if row["variant"] == variant]
            cells = [_mean([100 * row["trained_on"] for row in found])]
            cells += [_mean([100 * row["miou"][test] for row in found]) for test in tests]
            shares = [100 * row["miou"][tests[-1]] / best[row["seed"]] for row in found if row["seed"] in best]
            text.append(f"| {variant} | {' | '.join(cells)} | {_mean(shares)} % |")
        text.append(f"\nSeeds: {', '.join(str(seed) for seed in sorted({row['seed'] for row in own}))}.")
    return "\n".join(text) + "\n"


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.1f}" + (f" ({np.std(values, ddof=1):.1f})" if len(values) > 1 else "")


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

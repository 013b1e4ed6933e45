"""What a segmenter gains over the masks it is trained on, on real photographs, against one trained on ground truth.

    python benchmarks/quality_segmentation.py DATA WEIGHTS FOLDER [--network ...] [--seeds 0 1 2] [--variants ...]

DATA and FOLDER: as quality_masks.py left them, with classifiers, CAMs and IRN's networks; WEIGHTS: an ImageNet
backbone. Masks, segmenters and what was measured are kept in FOLDER, so that a run goes on where it was cut off. Writes
results/quality_segmentation.json and quality.md.
"""

import dataclasses
import json
import time
from pathlib import Path

from quality import RESULTS, arguments, write_report
from quality_masks import METHODS, Counter, irn_of

from ribfast import data, models
from ribfast.pipeline import PredictConfig, make_masks, predict_masks
from ribfast.store import Store
from ribfast.train import SegmentationConfig, train_segmenter

MASKS = "CAM + IRN walk of 64 steps"  # the best of quality_masks.py
FITS = {"masks": None, "masks, PUF clamp": "clamp", "masks, PUF clamp, cycle": None, "ground truth": None}
TESTS = {
    "one scale": PredictConfig(),
    "scales and CRF": PredictConfig(scales=(0.75, 1.0, 1.25, 1.5), crf=True),
}


def pseudo_masks(source, classifier, folder, seed) -> Store:
    """Of the train photographs, with the constant that quality_masks.py chose."""
    config, grid = METHODS[MASKS]
    (field,) = grid
    constant = json.loads((folder / f"{MASKS}.json").read_text())["constant"]
    store, maps = Store(folder / "pseudo"), Store(folder / "train")
    network = irn_of(source, maps, classifier, folder, seed)
    make_masks(source, maps, store, dataclasses.replace(config, **{field: constant}), network=network)
    return store


def miou_of(source, read) -> float:
    counter = Counter(source)
    for item in source:
        counter.save_mask(item.name, read(item.name))
    return counter.confusion.miou()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--variants", nargs="+", default=list(FITS), choices=FITS)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--crop", type=int, default=193)
    options = parser.parse_args()
    first = "masks, PUF clamp"
    if f"{first}, cycle" in options.variants and first not in options.variants:
        parser.error(f"expected {first!r} with its cycle, got --variants {options.variants}")
    train, val = (data.open_source(f"folder:{options.data}", split) for split in ("train", "val"))
    mobile = options.network == "mobilenet_v2"
    for seed in options.seeds:
        classifier = options.folder / f"{options.network}-{seed}" / "classifier.safetensors"
        of_masks = options.folder / f"{options.network}-{seed}-masks"
        folder = options.folder / f"{options.network}-{seed}-segmenters"
        pseudo = pseudo_masks(train, classifier, of_masks, seed)
        for variant in options.variants:
            path = folder / f"{variant}.json"
            if path.exists():
                continue
            start = time.time()
            base = SegmentationConfig.light() if mobile else dataclasses.replace(SegmentationConfig.voc(), batch=8)
            config = dataclasses.replace(
                base, network=options.network, steps=options.steps, crop=options.crop, seed=seed, save_every=100,
                under_fitting=FITS[variant], normalization="symmetric" if mobile else "imagenet",
                tensorflow_padding=mobile, cache_mib=512,
            )  # fmt: skip
            labels, read = pseudo.masks, pseudo.load_mask
            if variant == "ground truth":
                labels, read = None, None
            elif "cycle" in variant:
                store = Store(folder / first)
                model = models.open_segmenter(store.folder / "segmenter.safetensors")
                predict_masks(train, model, store, TESTS["scales and CRF"])
                labels, read = store.masks, store.load_mask
            checkpoint = train_segmenter(train, config, folder / variant, labels=labels, weights=options.weights,
                                         resume=True)  # fmt: skip
            model, found = models.open_segmenter(checkpoint), {}
            for name, prediction in TESTS.items():
                counter = Counter(val)
                predict_masks(val, model, counter, prediction)
                found[name] = counter.confusion.miou()
            facts = {"network": options.network, "seed": seed, "variant": variant, "steps": options.steps}
            facts |= {"crop": options.crop, "trained_on": 1.0 if read is None else miou_of(train, read), "miou": found}
            path.write_text(json.dumps(facts | {"seconds": round(time.time() - start)}))
            said = ", ".join(f"{name} {100 * value:.1f}" for name, value in found.items())
            print(f"seed {seed} {variant}: {said}; trained on {100 * facts['trained_on']:.1f}", flush=True)
    write(options.folder)


def write(folder: Path) -> None:
    """results/quality_segmentation.json from all that was measured, and the table in quality.md."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*-segmenters/*.json"))]
    rows.sort(key=lambda row: (row["network"], list(FITS).index(row["variant"]), row["seed"]))
    (RESULTS / "quality_segmentation.json").write_text(json.dumps({"masks": MASKS, "rows": rows}, indent=1) + "\n")
    write_report()


if __name__ == "__main__":
    main()

"""What masks gain over the class maps they are made of, on real photographs: CRF, IRN's walk, PPMG, PAR, over seeds.

    python benchmarks/quality_masks.py DATA FOLDER [--network ...] [--seeds 0 1 2] [--methods ...]

DATA: a folder of photographs with masks, train.txt and val.txt; FOLDER: as quality.py left it, with a classifier of
each seed. CAMs, IRN's networks and what was measured are kept in it, so that a run goes on where it was cut off.
Writes results/quality_masks.json and quality.md.
"""

import dataclasses
import json
import time

import numpy as np
from quality import RESULTS, arguments, write_report

from ribfast import data, models
from ribfast.metrics import Confusion
from ribfast.pipeline import EvaluateConfig, MasksConfig, evaluate_maps, make_cams, make_masks
from ribfast.store import Store
from ribfast.train import IrnConfig, train_irn

BACKGROUNDS = {"background": [round(0.05 * i, 2) for i in range(2, 19)]}
METHODS = {  # the configuration, and the constant that is chosen
    "CAM": (MasksConfig.threshold(), BACKGROUNDS),
    "CAM + CRF": (MasksConfig.crf(), BACKGROUNDS),
    "CAM + IRN walk": (MasksConfig.irn(), BACKGROUNDS),
    "CAM + IRN walk of 64 steps": (dataclasses.replace(MasksConfig.irn(), log2_steps=6), BACKGROUNDS),
    "CAM + PPMG": (MasksConfig.ppmg(), {"power": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 11.0, 15.0]}),
    "CAM + PPMG, as published": (MasksConfig.ppmg(), {"power": [11.0]}),
    "CAM + PAR": (MasksConfig.par(), BACKGROUNDS),
    "CAM + PAMR": (MasksConfig.pamr(), BACKGROUNDS),
}


class Counter:
    """A store of masks that keeps nothing but their confusion."""

    def __init__(self, source: data.Source):
        self.confusion, self.masks = Confusion(len(source.classes)), {item.name: source.mask(item) for item in source}

    def failures(self) -> dict:
        return {}

    def has_mask(self, name: str) -> bool:
        return False

    def save_mask(self, name: str, labels) -> None:
        self.confusion.add(labels, self.masks[name])

    def fail(self, name: str, reason: str) -> None:
        raise ValueError(f"{name}: {reason}")


def miou(source, maps, config, network) -> float:
    counter = Counter(source)
    make_masks(source, maps, counter, config, network=network)
    return counter.confusion.miou()


def irn_of(source, maps, classifier, folder, seed) -> models.IRNet:
    """Trained on what its CAMs are sure of. IRN's thresholds, 0.30 and 0.05, are for CAMs whose best one is about 0.15;
    these, which cover more, take 1.1 times and half of the best."""
    path = folder / "irn" / "irn.safetensors"
    if not path.exists():
        best = evaluate_maps(source, maps, EvaluateConfig(resamples=0))["best"]["threshold"]
        labels = Store(folder / "labels")
        sure = dataclasses.replace(MasksConfig.labels(), foreground=1.1 * best, background=0.5 * best)
        make_masks(source, maps, labels, sure)
        model = models.open_classifier(classifier)
        config = dataclasses.replace(
            IrnConfig.small(), network=model.name, normalization=model.normalization, seed=seed, precision="bfloat16",
            tensorflow_padding=model.name == "mobilenet_v2", epochs=6,
        )  # fmt: skip
        train_irn(source, folder / "labels" / "masks", config, folder / "irn", weights=classifier, resume=True)
    return models.open_irn(path)


def measure(method, sources, maps, network) -> dict:
    config, grid = METHODS[method]
    ((field, values),) = grid.items()
    on_train = [
        miou(sources["some"], maps["train"], dataclasses.replace(config, **{field: value}), network)
        for value in (values if len(values) > 1 else [])
    ]
    constant = values[int(np.argmax(on_train))] if on_train else values[0]
    value = miou(sources["val"], maps["val"], dataclasses.replace(config, **{field: constant}), network)
    return {"constant": constant, "on_train": dict(zip(map(str, values), on_train, strict=False)), "miou": value}


def main() -> None:
    parser = arguments(__doc__, weights=False)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options = parser.parse_args()
    sources = {name: data.open_source(f"folder:{options.data}", name) for name in ("train", "val")}
    train = sources["train"]
    sources["some"] = data.Source(train.classes, train.items[::4], train.upright)
    for seed in options.seeds:
        classifier = options.folder / f"{options.network}-{seed}" / "classifier.safetensors"
        folder = options.folder / f"{options.network}-{seed}-masks"
        maps = {name: Store(folder / name) for name in ("train", "val")}
        for name, store in maps.items():
            make_cams(sources[name], models.open_classifier(classifier), store)
        for method in options.methods:
            path = folder / f"{method}.json"
            if path.exists():
                continue
            start = time.time()
            walks = METHODS[method][0].method == "irn"
            network = irn_of(train, maps["train"], classifier, folder, seed) if walks else None
            found = measure(method, sources, maps, network)
            facts = {"network": options.network, "seed": seed, "method": method, **found}
            path.write_text(json.dumps(facts | {"seconds": round(time.time() - start)}))
            print(f"seed {seed} {method}: {100 * found['miou']:.1f} at {found['constant']:g}", flush=True)
    rows = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*-masks/*.json"))]
    rows.sort(key=lambda row: (row["network"], list(METHODS).index(row["method"]), row["seed"]))
    (RESULTS / "quality_masks.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    write_report()


if __name__ == "__main__":
    main()

"""What adversarial erasing gains on real photographs: mIoU of the CAMs of classifiers trained with it and without.

    python benchmarks/quality_eader.py DATA WEIGHTS FOLDER --adversary-weights WEIGHTS [--network ...] [--seeds 0 1 2]

DATA: a folder of photographs with masks, train.txt and val.txt; WEIGHTS: ImageNet backbones of the two networks.
Classifiers, CAMs and what was measured are kept in FOLDER, so that a run goes on where it was cut off; plain
classifiers are those of quality.py. Writes results/quality_eader.json and quality.md.
"""

import dataclasses
import json
import time
from pathlib import Path

from quality import RESULTS, arguments, classifier, configuration, write_report

from ribfast import data, models
from ribfast.pipeline import EvaluateConfig, evaluate_maps, make_cams
from ribfast.store import Store
from ribfast.train import EaderConfig, train_eader

TURN = 8  # steps: with 17 of them for an epoch, as many turns in a training as 200 steps make on VOC
VARIANTS = {"BCE": None, "EADER, CAM": "cam", "EADER, Grad-CAM": "gradcam"}


def localiser(options, source, variant, seed, folder) -> models.CamClassifier:
    """Trained as the plain classifier, the localiser for as many steps; the adversary has as many again."""
    if VARIANTS[variant] is None:
        return classifier(options, source, seed, options.folder / f"{options.network}-{seed}")
    plain = dataclasses.asdict(configuration(options, seed))
    plain |= {"method": "eader", "epochs": 2 * plain["epochs"]}
    config = EaderConfig(
        **plain, adversary=options.adversary, adversary_lr_scale=0.01 / plain["lr"], attention=VARIANTS[variant],
        localiser_steps=TURN, adversary_steps=TURN,
    )  # fmt: skip
    path = train_eader(source, config, folder / variant, weights=options.weights,
                       adversary_weights=options.adversary_weights, resume=True)  # fmt: skip
    return models.open_classifier(path)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--adversary", default="resnet18", choices=models.NAMES)
    parser.add_argument("--adversary-weights", type=Path, help="an ImageNet backbone")
    options = parser.parse_args()
    sources = {name: data.open_source(f"folder:{options.data}", name) for name in ("train", "val")}
    for seed in options.seeds:
        folder = options.folder / f"{options.network}-{seed}-eader"
        for variant in options.variants:
            path = folder / f"{variant}.json"
            if path.exists():
                continue
            start, found = time.time(), {}
            model = localiser(options, sources["train"], variant, seed, folder)
            trained = time.time() - start
            for name, source in sources.items():
                store = Store(folder / variant / name)
                make_cams(source, model, store)
                found[name] = evaluate_maps(
                    source, store, EvaluateConfig(resamples=0),
                    threshold=found["train"]["best"]["threshold"] if name == "val" else None,
                )  # fmt: skip
            facts = {"network": options.network, "adversary": options.adversary, "seed": seed, "variant": variant}
            facts |= {"threshold": found["train"]["best"]["threshold"], "miou_on_train": found["train"]["best"]["miou"]}
            facts |= {"miou": found["val"]["reported"]["miou"], "best_on_val": found["val"]["best"]["miou"]}
            facts |= {"training_seconds": round(trained)}
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(facts))
            print(f"seed {seed} {variant}: {100 * facts['miou']:.1f} at {facts['threshold']:g}", flush=True)
    rows = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*-eader/*.json"))]
    rows.sort(key=lambda row: (row["network"], list(VARIANTS).index(row["variant"]), row["seed"]))
    (RESULTS / "quality_eader.json").write_text(json.dumps({"turn": TURN, "rows": rows}, indent=1) + "\n")
    write_report()


if __name__ == "__main__":
    main()

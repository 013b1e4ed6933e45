"""The toy experiment otherwise: other digits, motifs, networks, rates and margins, into results/toy_variants.csv.

    python benchmarks/toy_variants.py [--seeds 0 1 2]

A row a variant and seed: HGR of the motif at layer 4, layer 5 and the logit, then of motif and background at the logit
after the updates, over all images and over those of each class.
"""

import argparse
import csv
from pathlib import Path

from ribfast import toy

RESULTS = Path(__file__).parent / "results" / "toy_variants.csv"
VARIANTS = [
    {},
    *({"digits": digits} for digits in ("96", "28", "82", "38", "25", "47", "17")),
    *({"motif_share": share} for share in (0.0, 0.5, 1.0)),
    {"motif": 4},
    {"noise": 0.1},
    {"width": 32},
    {"strides": (1, 1, 1, 1, 1)},
    {"strides": (1, 1, 1, 1, 1), "steps": 20},
    *({"adapt_lr": rate} for rate in (1e-4, 4e-4, 2e-2)),
    {"margin": 600.0},
    {"margin": 600.0, "steps": 20},
]
_, MOTIF, BACKGROUND = range(len(toy.REGIONS))


def row(config: toy.ToyConfig, seed: int) -> dict:
    found = toy.measure(config, seed)
    values = {"motif_layer_4": found.layers[3, MOTIF], "motif_layer_5": found.layers[4, MOTIF]}
    values |= {"motif_logit": found.layers[5, MOTIF], "background_logit": found.layers[5, BACKGROUND]}
    for loss in toy.LOSSES:
        values |= {f"motif_{loss}": found.steps[loss][-1, MOTIF]}
        values |= {f"background_{loss}": found.steps[loss][-1, BACKGROUND]}
    for label in range(toy.CLASSES):
        of = found.drawn.labels == label
        shares = toy.hgr(found.adapted_maps["rib"][of], found.drawn.regions[:, of])
        values |= {f"motif_rib_class_{label}": shares[MOTIF], f"background_rib_class_{label}": shares[BACKGROUND]}
    return {"accuracy": f"{found.accuracy:.3f}"} | {name: f"{value.item():.3f}" for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, rows = parser.parse_args(), []
    for variant in VARIANTS:
        name = " ".join(f"{field}={value}" for field, value in variant.items()) or "as it is"
        for seed in options.seeds:
            rows.append({"variant": name, "seed": seed} | row(toy.ToyConfig(**variant), seed))
            print(*rows[-1].values(), flush=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

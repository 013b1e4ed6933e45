"""The toy experiment otherwise: other digits, motifs, networks, rates and margins, into results/toy_variants.csv.

    python benchmarks/toy_variants.py [--seeds 0 1 2]

Prints docs/toy.md's table of them. A row a variant and seed: HGR of the motif at layer 4, layer 5 and the logit, of the
background at the logit, of both there after the updates, over all images and over those of each class.
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
UNSEEN = range(10, 16)  # seeds that no constant was chosen by
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


def table() -> str:
    """Markdown: means over seeds; of what the motif lost from layer 4 to the logit, the least and the most regained."""
    with open(RESULTS, newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| | layer 4 | logit | after BCE | after L_RIB | regained | first class | second class |",
        "|---" * 8 + "|",
    ]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        seeds = [row for row in rows if row["variant"] == variant]

        def mean(name: str, seeds: list[dict] = seeds) -> str:
            return f"{sum(float(row[name]) for row in seeds) / len(seeds):.2f}"

        def pair(end: str, mean=mean) -> str:
            return f"{mean('motif_' + end)} ({mean('background_' + end)})"

        regained = [_regained({name: float(row[name]) for name in row if name.startswith("motif_")}) for row in seeds]
        cells = [variant, mean("motif_layer_4"), *map(pair, ("logit", "bce", "rib"))]
        cells += [f"{100 * min(regained):.0f} to {100 * max(regained):.0f} %"]
        cells += map(pair, ("rib_class_0", "rib_class_1"))
        lines.append(f"| {' | '.join(cells)} |")
    return "".join(f"{line}\n" for line in lines)


def _regained(row: dict[str, float]) -> float:
    return (row["motif_rib"] - row["motif_logit"]) / (row["motif_layer_4"] - row["motif_logit"])


def _name(variant: dict) -> str:
    fields = (f"{field.replace('_', ' ')} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
              for field, value in variant.items())  # fmt: skip
    return ", ".join(fields) or "as it is"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, rows = parser.parse_args(), []
    runs = [(_name(variant), variant, options.seeds) for variant in VARIANTS]
    runs.insert(1, (f"as it is, seeds {UNSEEN[0]} to {UNSEEN[-1]}", {}, UNSEEN))
    for name, variant, seeds in runs:
        for seed in seeds:
            rows.append({"variant": name, "seed": seed} | row(toy.ToyConfig(**variant), seed))
            print(*rows[-1].values(), flush=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(table())


if __name__ == "__main__":
    main()

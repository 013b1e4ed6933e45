"""The figures of the README and of docs, made from benchmarks/results: `python benchmarks/tables.py` writes them in."""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
ROOT = HERE.parent
BEGIN, END = "<!-- made from benchmarks/results/{} -->\n", "<!-- end -->"
SHORT = {  # of the README: a row's name -> what it is of, and against what
    "rib_with_loading[resnet50-released-auto]": ("RIB, ResNet-50, released constants, from JPEG files to map files",
                                                 "the released procedure, two threads"),
    "rib_with_loading[resnet50-fast-auto]": ("the same, preset `fast`", "the same"),
    "rib_with_loading[mobilenet_v2-fast-auto]": ("RIB, MobileNetV2, preset `fast`, likewise", "the same"),
    "dense_crf[(3.0, 3.0)-(50.0, 5.0, 10.0)-2]": ("dense CRF, 2 labels, 375x500, 10 iterations",
                                                  "pydensecrf2, one thread"),
    "dense_crf[(3.0, 3.0)-(50.0, 5.0, 10.0)-21]": ("the same, 21 labels", "the same"),
    "random_walk[1 thread]": ("IRN's random walk, 256 steps, 94x125, 2 classes",
                              "the dense matrix (one squaring, times 8), one thread"),
    "evaluate[npz-2 threads]": ("mIoU of 200 images at 30 thresholds", "IRN's files read for each, two threads"),
}  # fmt: skip
ROWS = {
    "gndrp_forward_backward[{}-(8, 20, 32, 32)-float32]": "`gndrp`, forward and backward, (8, 20, 32, 32)",
    "gndrp_forward_backward[{}-(2, 80, 63, 84)-float32]": "`gndrp`, forward and backward, (2, 80, 63, 84)",
    "accumulate_cams[{}-20]": "`accumulate_cams`, 20 classes, 4 scales with mirrors, 375x500",
    "accumulate_cams_backward[{}]": "the same, forward and backward",
    "normalize_cams[{}]": "`normalize_cams`, 20 maps of 375x500",
}
CRF = {
    "dense_crf[(3.0, 3.0)-(50.0, 5.0, 10.0)-2]": "(3; 3), (50, 5; 10), 2 labels",
    "dense_crf[(3.0, 3.0)-(50.0, 5.0, 10.0)-4]": "(3; 3), (50, 5; 10), 4 labels",
    "dense_crf[(3.0, 3.0)-(50.0, 5.0, 10.0)-21]": "(3; 3), (50, 5; 10), 21 labels",
    "dense_crf[(3.0, 3.0)-(80.0, 13.0, 10.0)-4]": "(3; 3), (80, 13; 10), 4 labels",
    "dense_crf[(1.0, 3.0)-(67.0, 3.0, 4.0)-21]": "(1; 3), (67, 3; 4), 21 labels",
    "dense_crf[(1.0, 3.0)-(67.0, 3.0, 4.0)-81]": "(1; 3), (67, 3; 4), 81 labels",
}
RIB = {
    "rib_arithmetic[resnet50-released-float32]": "ResNet-50, released, float32",
    "rib_arithmetic[resnet50-released-auto]": "ResNet-50, released, bfloat16",
    "rib_with_loading[resnet50-released-auto]": "the same, from JPEG files to map files",
    "rib_arithmetic[resnet50-fast-auto]": "ResNet-50, fast",
    "rib_with_loading[resnet50-fast-auto]": "the same, from JPEG files to map files",
    "rib_arithmetic[mobilenet_v2-released-float32]": "MobileNetV2, released, float32",
    "rib_arithmetic[mobilenet_v2-released-auto]": "MobileNetV2, released, bfloat16",
    "rib_with_loading[mobilenet_v2-released-auto]": "the same, from JPEG files to map files",
    "rib_arithmetic[mobilenet_v2-fast-auto]": "MobileNetV2, fast",
    "rib_with_loading[mobilenet_v2-fast-auto]": "the same, from JPEG files to map files",
}
PAIRS = {
    "random_walk[{}]": "`random_walk`, 256 steps, 94x125, 2 classes, against the dense matrix (one squaring, times 8)",
    "series_against_steps[{}]": "the same, against its own kernel taking every step",
    "pair_losses[{}-2]": "`pair_losses`, forward and backward, (2, 128, 128), radius 10, against plain torch",
    "refine[{}-par-3]": "`refine`, PAR, 3 classes, 375x500, 10 iterations, against plain torch",
    "refine[{}-par-21]": "the same, 21 classes",
}
TRAIN = {
    "segmentation_loss[{}-21-mean]": "`segmentation_loss`, forward and backward, (2, 21, 41, 41) to 321x321",
    "segmentation_loss[{}-81-mean]": "the same, 81 labels",
    "segmentation_loss[{}-21-pow]": "21 labels, pretended under-fitting",
    "erase[{}]": "`erase`, forward and backward, 24 maps (28, 28) on 12 images of 448x448",
    "eader[{}-gradcam-straightforward]": "EADER, a step of either turn, Grad-CAM, against both networks run whole, and "
    "once more backward for each class",
    "eader[{}-cam-straightforward]": "the same, CAM, against both networks run whole",
    "eader[{}-cam-frozen]": "the same, against networks whose frozen layers have no gradients either",
}
EVALUATE = {"npz": "npz, strided maps", "irn": "IRN's files"}


def _results(name: str) -> dict:
    return json.loads((HERE / "results" / name).read_text())


def summary() -> str:
    """The README's part of `table`."""
    result = _results("cpu.json")
    rows = {row["name"]: row for row in result["benchmarks"]}
    lines = [f"On {result['machine']['cpu']} ({result['tier']}), torch {result['versions']['torch']}:\n",
             "| | against | times faster |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {what} | {against} | {_rounded(rows[name]['ratio'])} |" for name, (what, against) in SHORT.items()]
    return "\n".join(lines) + "\n"


def quality() -> str:
    """mIoU on real photographs, before a stage and after it."""
    curves, masks = _results("quality.json")["rows"], _results("quality_masks.json")["rows"]
    erasing, segmenters = _results("quality_eader.json")["rows"], _results("quality_segmentation.json")["rows"]

    def curve(variant: str, step: int) -> dict[int, float]:
        own = (row for row in curves if (row["network"], row["variant"]) == ("mobilenet_v2", variant))
        return {row["seed"]: 100 * row["curve"][step]["miou"] for row in own}

    def of_masks(method: str) -> dict[int, float]:
        return {row["seed"]: 100 * row["miou"] for row in masks if row["method"] == method}

    def of_cams(variant: str) -> dict[int, float]:
        return {row["seed"]: 100 * row["miou"] for row in erasing if row["variant"] == variant}

    def segmenter(variant: str) -> dict[int, float]:
        own = (row for row in segmenters if row["variant"] == variant)
        return {row["seed"]: 100 * row["miou"]["scales and CRF"] for row in own}

    walk = "CAM + IRN walk of 64 steps"
    rows = {
        "CAM → RIB's maps, released constants": (curve("released", 0), curve("released", 10)),
        "CAM → RIB's maps, preset `fast`": (curve("fast", 0), curve("fast", 10)),
        "CAM → RIB's maps, preset `paper`, K = 3": (curve("paper", 0), curve("paper", 3)),
        "CAM → RIB's maps, preset `paper`, K = 10": (curve("paper", 0), curve("paper", 10)),
        "CAM → CAM of a classifier trained by EADER": (of_cams("BCE"), of_cams("EADER, CAM")),
        "CAM → masks by the label CRF": (of_masks("CAM"), of_masks("CAM + CRF")),
        "CAM → masks by PPMG": (of_masks("CAM"), of_masks("CAM + PPMG")),
        "CAM → masks by IRN's walk of 256 steps": (of_masks("CAM"), of_masks("CAM + IRN walk")),
        "CAM → masks by IRN's walk of 64 steps": (of_masks("CAM"), of_masks(walk)),
        "masks by IRN's walk of 64 steps → a segmenter trained on such": (of_masks(walk), segmenter("masks")),
        "ground truth → the same segmenter trained on it": (None, segmenter("ground truth")),
    }
    lines = ["| from, to | before | after | gain |", "|---|---|---|---|"]
    for what, (before, after) in rows.items():
        cells = [f"{mean(after.values()):.1f} ({stdev(after.values()):.1f})", ""]
        if before is not None:
            gains = [after[seed] - before[seed] for seed in before]
            cells[1] = f"{mean(gains):+.1f} ({stdev(gains):.1f})"
        lines.append(f"| {what} | {'' if before is None else f'{mean(before.values()):.1f}'} | {' | '.join(cells)} |")
    adapted, erased, labelled = (mean(cam.values()) for cam in (curve("released", 0), of_cams("BCE"), of_masks("CAM")))
    note = (
        "Every CAM on the left is of the same three classifiers; their thresholds are chosen otherwise. "
        f"{adapted:.1f} are RIB's maps before the first update, at thresholds in steps of 0.01 chosen on every fourth "
        f"training photograph, {erased:.1f} the maps of `ribfast cam`, chosen on all of them, {labelled:.1f} the same "
        "maps, in steps of 0.05 on every fourth. Compare within a row."
    )
    lines += ["", *textwrap.wrap(note, 120, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"


def table() -> str:
    """Ratios against plain torch in one run."""
    result = _results("cpu.json")
    rows = {row["name"]: row for row in result["benchmarks"]}
    lines = [
        f"Times faster than plain torch {result['versions']['torch']} in one run, on {result['machine']['cpu']} "
        f"({result['tier']}):\n",
        "| | one thread | two threads | asked |",
        "|---|---|---|---|",
        *_on_threads(rows, ROWS),
    ]
    lines += [
        "\n`dense_crf` of a 375x500 photograph, 10 iterations, times faster than pydensecrf2, one thread each:\n",
        "| | times faster | asked | largest difference |",
        "|---|---|---|---|",
    ]
    for name, label in CRF.items():
        row = rows[name]
        lines.append(f"| {label} | {row['ratio']:.1f} | {row['target']} | {row['largest_difference']:.0e} |")
    one, four = (rows[f"dense_crf_on_two_threads[{images}]"]["ratio"] for images in ("one image", "4 images"))
    both = rows["two_label_crfs_of_one_image"]
    lines.append(f"| two label CRFs of one image, 3 labels each | {both['ratio']:.1f} | {both['target']} | "
                 f"{both['labels_that_differ']} labels differ |")  # fmt: skip
    memory = {labels: rows[f"peak_memory[{labels}]"] for labels in (2, 21, 81)}
    small = ", ".join(f"{row['ours_mib']:.0f} MiB at {labels} labels ({row['baseline_mib']:.0f})"
                      for labels, row in memory.items())  # fmt: skip
    large = rows["memory_of_16_megapixels"]
    unary = large["unary_mib"] / 1024
    lines.append(f"\nMemory that a call adds, its result included (pydensecrf2's): {small}; a 4096x4096 image with 21 "
                 f"labels {large['ours_mib'] / 1024:.1f} GiB, beside its unary of {unary:.1f}.")  # fmt: skip
    lines.append(f"\nOn two threads: {one:.1f} times as fast for one image, {four:.1f} for a batch of four.")
    problems = rows["problems_of_one_image[three calls]"]
    lines.append(f"\nThree CRFs of two labels of one image together: {problems['ratio']:.1f} times as fast as apart.")
    lines += [
        "\nFrom maps to masks, and training on them, times faster in one run:\n",
        "| | one thread | two threads | asked |",
        "|---|---|---|---|",
        *_on_threads(rows, PAIRS),
        *_on_threads(rows, TRAIN),
    ]
    walk = rows["random_walk_memory"]
    lines.append(f"\nA walk at 120x160 adds {walk['ours_mib']:.0f} MiB to the process (asked: less than 95); the dense "
                 f"matrix and its square are {walk['baseline_mib']:.0f}.")  # fmt: skip
    loading = rows["loading"]
    lines.append(f"\nTraining steps of the light network from JPEG files have {100 * loading['ratio']:.0f} % of the "
                 f"rate of steps on crops in memory, on two cores (asked: {100 * loading['target']:.0f}).")  # fmt: skip
    lines += [
        "\nRIB, 128-pixel images with 20 others, 4 steps, times faster than the released procedure written straight, "
        "on two threads:\n",
        "| | times faster | asked | correlation of the maps | pixels alike at 0.3 |",
        "|---|---|---|---|---|",
    ]
    for name, label in RIB.items():
        row = rows[name]
        alike = f"{row['correlation']:.5f} | {100 * row['agreement']:.2f} %" if "correlation" in row else " | "
        lines.append(f"| {label} | {row['ratio']:.1f} | {row['target'] or ''} | {alike} |")
    lines += [
        "\nmIoU at 30 thresholds of 200 images of 375x500, from files, times faster than the released way, which reads "
        "IRN's files for each threshold:\n",
        "| | one thread | two threads | asked | largest difference of mIoU |",
        "|---|---|---|---|---|",
    ]
    for format, label in EVALUATE.items():
        one, two = (rows[f"evaluate[{format}-{threads}]"] for threads in ("1 thread", "2 threads"))
        lines.append(f"| {label} | {one['ratio']:.0f} | {two['ratio']:.0f} | {one['target']:.0f} | "
                     f"{one['largest_difference']:.1g} |")  # fmt: skip
    short = [f"`{row['name']}` ({row['ratio']:.1f} of {row['target']:.0f})" for row in result["benchmarks"]
             if row["target"] and "ratio" in row and row["ratio"] < row["target"]]  # fmt: skip
    lines.append(f"\nShort of what is asked: {', '.join(short) or 'nothing'}.")
    return "\n".join(lines) + "\n"


def many() -> str:
    """What an image costs among ten thousand, and what drawing others costs in a data set four times as large."""
    result = _results("many.json")
    lines = ["| | milliseconds | growth | MiB | growth, MiB |", "|---|---|---|---|---|"]
    for stage, row in result["stages"].items():
        lines.append(f"| `{stage}` | {row['milliseconds']:.2f} | {row['growth']:.2f} | {row['mib']:.0f} | "
                     f"{row['growth_mib']:.1f} |")  # fmt: skip
    few, most = next(iter(result["draws"].values()))["images"]
    lines += [
        "",
        "What `rib` draws as other images, for all images, none of them read; growth is that of an image's cost:\n",
        f"| | {few:,} images, seconds | {most:,} images, seconds | growth | growth, MiB |",
        "|---|---|---|---|---|",
    ]
    for preset, row in result["draws"].items():
        first, last = row["seconds"]
        lines.append(f"| {preset} | {first:.1f} | {last:.1f} | {row['growth']:.2f} | {row['growth_mib']:.1f} |")
    return "\n".join(lines) + "\n"


def _on_threads(rows: dict[str, dict], labels: dict[str, str]) -> list[str]:
    """A line for each pattern of a row's name: its ratios on one thread and on two."""
    lines = []
    for pattern, label in labels.items():
        one, two = (rows[pattern.format(threads)] for threads in ("1 thread", "2 threads"))
        asked = "" if one["target"] is None else f"{one['target']:.0f}"
        lines.append(f"| {label} | {_rounded(one['ratio'])} | {_rounded(two['ratio'])} | {asked} |")
    return lines


def _rounded(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.1f}"


MADE = {  # file -> what is in it, by the results that it is made from
    "README.md": {"cpu.json": summary, "quality*.json": quality},
    "docs/performance.md": {"cpu.json": table, "many.json": many},
}


def with_tables(text: str, made: dict[str, Callable[[], str]]) -> str:
    """A file's text with its tables made anew."""
    for name, make in made.items():
        head, rest = text.split(BEGIN.format(name))
        text = head + BEGIN.format(name) + make() + END + rest.split(END, 1)[1]
    return text


def write() -> None:
    for name, made in MADE.items():
        path = ROOT / name
        path.write_text(with_tables(path.read_text(), made))


if __name__ == "__main__":
    write()

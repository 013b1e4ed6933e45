"""docs/overview.png: one picture's way through the stages, from the folder that `ribfast demo` wrote.

    python benchmarks/overview.py DEMO [--image NAME] [--out FILE]

Without --image: of the pictures of one class the one with the largest sum of RIB's gain over the CAM, at the thresholds
that are best for either on all pictures, and of both masks' IoU.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from ribfast import data
from ribfast.data.decode import VOC_PALETTE
from ribfast.store import Store

PICTURE = Path(__file__).parents[1] / "docs" / "overview.png"
SIDE, GAP, MARGIN, CAPTION = 296, 20, 12, 76  # of a panel, between two, around all, below each
STEP = 5  # between two shades, which keeps the file small
INK, PALE, PAPER = (34, 34, 34), (110, 110, 110), (255, 255, 255)
FONT = cv2.FONT_HERSHEY_DUPLEX


def iou(found: np.ndarray, truth: np.ndarray) -> float:
    return (found & truth).sum() / max(1, (found | truth).sum())


def chosen(demo: Path, source: data.Source) -> str:
    """The picture that shows best what the stages do, by ground truth."""
    at = {name: json.loads((demo / name / "evaluation.json").read_text())["best"]["threshold"]
          for name in ("cam", "rib")}  # fmt: skip
    scores = {}
    for item in source:
        if len(item.classes) == 1:
            truth = source.mask(item) == item.classes[0] + 1
            found = [iou(Store(demo / name).load(item.name).high_res[0] > at[name], truth) for name in ("cam", "rib")]
            masks = [iou(Store(demo / name).load_mask(item.name) == item.classes[0] + 1, truth)
                     for name in ("masks", "relabelled")]  # fmt: skip
            scores[item.name] = found[1] - found[0] + sum(masks)
    return max(scores, key=scores.get)


def heat(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """The map in colours over the picture in grey, (H, W, 3) RGB."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB).astype(np.float32)
    colours = cv2.cvtColor(cv2.applyColorMap((cam * 255).astype(np.uint8), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    share = 0.25 + 0.6 * cam[..., None]
    return (grey * (1 - share) + colours * share).astype(np.uint8)


def painted(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels in VOC's colours over the picture, with their outline."""
    small = cv2.resize(labels, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    colours = VOC_PALETTE[small].astype(np.float32)
    inside = (small > 0)[..., None]
    result = np.where(inside, 0.35 * image + 0.65 * colours, 0.6 * image + 0.4 * 255).astype(np.uint8)
    for label in np.unique(small[small > 0]):
        lines, _ = cv2.findContours((small == label).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(result, lines, -1, (255, 255, 255), 2, cv2.LINE_AA)
    return result


def caption(sheet: np.ndarray, left: int, title: str, *lines: str) -> None:
    base = MARGIN + SIDE + 24
    cv2.putText(sheet, title, (left, base), FONT, 0.58, INK, 1, cv2.LINE_AA)
    for number, line in enumerate(lines, 1):
        cv2.putText(sheet, line, (left, base + 21 * number), FONT, 0.44, PALE, 1, cv2.LINE_AA)


def draw(demo: Path, name: str | None) -> np.ndarray:
    source = data.open_source(f"folder:{demo / 'pictures'}", "train")
    item = next(item for item in source if item.name == (name or chosen(demo, source)))
    image = cv2.resize(source.image(item), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)

    def cam(stage: str) -> np.ndarray:
        maps = Store(demo / stage).load(item.name).high_res.max(0)
        return cv2.resize(maps, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR).clip(0, 1)

    classes = [source.classes[number] for number in item.classes]
    labels = {stage: Store(demo / stage).load_mask(item.name) for stage in ("masks", "relabelled")}
    panels = [
        (image, "Photograph", f"labels: {', '.join(classes)}", "nothing else is known"),
        (heat(image, cam("cam")), "CAM", "where the classifier looks:", "at what tells the class apart"),
        (heat(image, cam("rib")), "RIB's map", "the classifier adapted", "to this image"),
        (painted(image, labels["masks"]), "Mask", "of this map,", "refined by a CRF"),
        (painted(image, labels["relabelled"]), "Segmenter", "trained on such masks;", "is told no labels"),
    ]
    width = 2 * MARGIN + len(panels) * SIDE + (len(panels) - 1) * GAP
    sheet = np.full((2 * MARGIN + SIDE + CAPTION, width, 3), PAPER, np.uint8)
    for number, (panel, *words) in enumerate(panels):
        left = MARGIN + number * (SIDE + GAP)
        sheet[MARGIN : MARGIN + SIDE, left : left + SIDE] = panel
        caption(sheet, left, *words)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, metavar="DEMO", help="the --out of `ribfast demo`")
    parser.add_argument("--image", metavar="NAME", help="of its pictures/train.txt")
    parser.add_argument("--out", type=Path, default=PICTURE, metavar="FILE")
    options = parser.parse_args()
    sheet = draw(options.demo, options.image) // STEP * STEP
    sheet[sheet == 255 // STEP * STEP] = 255
    cv2.imwrite(str(options.out), sheet[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    main()

"""Data sets of JPEG files, made of the bundled photograph."""

from pathlib import Path

import cv2
import numpy as np

from ribfast import data

BUNDLED = Path(__file__).parents[1] / "ribfast" / "assets" / "coffee.jpg"


def picture(seed, size):
    """A part of the photograph, (H, W, 3) uint8 RGB, in colours of its own."""
    rng = np.random.default_rng(seed)
    image = cv2.cvtColor(cv2.imread(str(BUNDLED)), cv2.COLOR_BGR2RGB)
    h, w = (int(rng.integers(side // 2, side)) for side in image.shape[:2])
    y, x = (int(rng.integers(side - part)) for side, part in zip(image.shape[:2], (h, w), strict=True))
    part = cv2.resize(image[y : y + h, x : x + w], size[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(part.astype(np.int16) + rng.integers(-30, 30, 3), 0, 255).astype(np.uint8)


def block_masks(source: data.Source, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Labels of large blocks, of background and of each image's first class."""
    rng, masks = np.random.default_rng(0), {}
    for item in source:
        blocks = rng.choice([0, item.classes[0] + 1], (4, 5)).astype(np.uint8)
        masks[item.name] = cv2.resize(blocks, size[::-1], interpolation=cv2.INTER_NEAREST)
    return masks


def write(folder: Path, images, label, n_classes: int) -> data.Source:
    """The images as a data set; label: the class on each, by its number."""
    (folder / "images").mkdir(parents=True)
    rows = ["image,labels"]
    for number, image in enumerate(images):
        cv2.imwrite(str(folder / "images" / f"{number}.jpg"), image[:, :, ::-1])
        rows.append(f"{number}.jpg,{label(number)}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "classes.txt").write_text("\n".join(map(str, range(n_classes))) + "\n")
    return data.open_source(f"folder:{folder}")

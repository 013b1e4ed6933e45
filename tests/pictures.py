"""A data set of drawn pictures: red squares and green discs on grey noise, some with both, some with none."""

import cv2
import numpy as np

CLASSES = ("square", "disc")


def draw(folder, count=8, size=(64, 64), seed=0):
    """Writes a folder data set and returns its spec; picture i holds class i % 2, every fourth both, none the last."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    rows, (height, width) = ["image,labels"], size
    for i in range(count):
        picture = rng.integers(100, 140, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        classes = [] if i == count - 1 else [0, 1] if i % 4 == 3 else [i % 2]
        for c in classes:
            x, y = (int(rng.integers(20, side - 20)) for side in (width, height))
            colour = (30, 30, 220) if c == 0 else (30, 220, 30)
            for canvas, paint in ((picture, colour), (mask, c + 1)):
                if c == 0:
                    cv2.rectangle(canvas, (x - 16, y - 16), (x + 16, y + 16), paint, -1)
                else:
                    cv2.circle(canvas, (x, y), 18, paint, -1)
        cv2.imwrite(str(folder / "images" / f"p{i}.png"), picture)
        cv2.imwrite(str(folder / "masks" / f"p{i}.png"), mask)
        rows.append(f"p{i}.png," + ";".join(CLASSES[c] for c in classes))
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return f"folder:{folder}"

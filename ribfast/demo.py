"""The operators on a bundled photograph: multi-scale maps of two classes, pooled, merged, normalised and drawn.

A linear classifier on the colours of 16-pixel cells stands in for a network, so that the demo needs no weights.
"""

import argparse
import logging
from pathlib import Path

import cv2
import numpy as np
import torch

from . import ops

log = logging.getLogger("ribfast")
STRIDE = 16
SCALES = (1.0, 0.5, 1.5, 2.0)
CLASSES = ("red china", "porcelain")
WEIGHTS = torch.tensor([[9.0, -8.0, -14.0], [-3.0, 4.0, 7.0]])  # of R, G, B in [0, 1]
BIAS = torch.tensor([-0.5, -3.5])


def class_maps(picture: np.ndarray, scale: float) -> torch.Tensor:
    """(2, C, h, w) logits of the picture and of its mirror at one scale. picture: (H, W, 3) RGB, uint8."""
    height, width = (round(side * scale) for side in picture.shape[:2])
    resized = cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)
    views = []
    for view in (resized, resized[:, ::-1]):
        cells = cv2.resize(view, (-(-width // STRIDE), -(-height // STRIDE)), interpolation=cv2.INTER_AREA)
        views.append(torch.from_numpy(cells / 255.0).float() @ WEIGHTS.T + BIAS)
    return torch.stack(views).permute(0, 3, 1, 2)


def heat(picture: np.ndarray, cam: np.ndarray, title: str) -> np.ndarray:
    """The picture under a map in [0, 1], with a title."""
    colours = cv2.applyColorMap((cam.clip(0, 1) * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS)[:, :, ::-1]
    panel = cv2.addWeighted(picture, 0.35, np.ascontiguousarray(colours), 0.65, 0)
    cv2.putText(panel, title, (10, 28), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (255, 255, 255), 2, cv2.LINE_AA)
    return panel


def read(path: Path) -> np.ndarray:
    picture = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR) if path.is_file() else None
    if picture is None:
        raise ValueError(f"demo: expected a picture that OpenCV reads, got {path}")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def run(picture: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(merged normalised maps (C, H, W), GAP and GNDRP of scale 1 (C,))"""
    size = picture.shape[:2]
    maps = [class_maps(picture, scale).to(device) for scale in SCALES]
    present = torch.ones(2, len(CLASSES), dtype=torch.bool, device=device)
    pooled = ops.gndrp(maps[0], present).mean(0)
    average = ops.gndrp(maps[0], ~present).mean(0)
    padded = tuple(-(-side // STRIDE) * STRIDE for side in size)
    cams = ops.normalize_cams(ops.accumulate_cams(maps, size, padded=padded), inplace=True)
    return cams, average, pooled


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ribfast.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent / "assets" / "coffee.jpg")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for merged.png (default: demo)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    try:
        picture = read(options.picture)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    cams, average, pooled = run(picture, torch.device(options.device))
    for name, gap, gndrp in zip(CLASSES, average, pooled, strict=True):
        log.info("%-10s mean logit %6.2f, over its non-discriminative region %6.2f", name, gap, gndrp)
    panels = [picture, *(heat(picture, cam, name) for cam, name in zip(cams.cpu().numpy(), CLASSES, strict=True))]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "merged.png"
    ok, png = cv2.imencode(".png", cv2.cvtColor(np.concatenate(panels, axis=1), cv2.COLOR_RGB2BGR))
    assert ok, "OpenCV cannot encode PNG"
    path.write_bytes(png.tobytes())
    log.info("wrote %s: the picture, then the merged map of each class", path)


if __name__ == "__main__":
    main()

"""Masks for other tools: a folder as PASCAL VOC's, or COCO's annotations."""

import csv
import dataclasses
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from . import __version__, data, files
from .data.decode import encode_region, read_image, read_mask
from .store import Store

log = logging.getLogger("ribfast")
_JPEG = b"\xff\xd8"
_CATEGORIES = b'"categories": '
_TURNED = (b"Exif", b"eXIf", b"EXIF")  # how JPEG, PNG and WebP name what may say how a camera was held


@dataclass(frozen=True)
class ExportConfig:
    format: Literal["voc", "coco"] = "voc"  # a folder for mmsegmentation and deeplab-pytorch, or COCO's instances
    name: str | None = None  # of the list or the JSON; none: --split's, else train (coco: train2017)
    images: bool = True  # the photographs too; without them masks and lists, or annotations, alone
    link: Literal["copy", "hard", "symbolic"] = "copy"  # how a photograph comes there that is fit as it is
    # photographs that EXIF turns, as some tools do and others do not, are encoded anew, and for voc, whose tools ask
    # for NAME.jpg, those that are no JPEG, with its loss; without, such a photograph is an error
    convert: bool = True
    quality: int = 95  # of such JPEGs, 1 to 100
    regions: bool = False  # coco: an annotation of each connected region in place of one of each class of an image
    # coco: pixels of label 255: left to the background, or a crowd, which evaluations ignore, of each class that the
    # photograph is labelled with
    unsure: Literal["omit", "crowd"] = "omit"
    workers: int = 2  # threads

    def __post_init__(self):
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"ExportConfig: expected a name of letters, digits, `_`, `.` and `-`, got {self.name!r}")
        if self.format == "voc" and (self.regions or self.unsure != "omit"):
            raise ValueError("ExportConfig: expected regions and unsure with format coco, got voc, whose masks hold "
                             "every label")  # fmt: skip
        if not 1 <= self.quality <= 100 or self.workers < 0:
            raise ValueError(f"ExportConfig: expected a quality from 1 to 100 and workers of at least 0, got "
                             f"{self.quality} and {self.workers}")  # fmt: skip


@dataclass
class Exported:
    """What was written."""

    images: int
    encoded: int  # anew
    renamed: int  # voc's
    annotations: int = 0  # coco's


def export(
    source: data.Source,
    masks: Callable[[str], np.ndarray],
    out: str | os.PathLike,
    config: ExportConfig | None = None,
    *,
    begin: Callable[[], None] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Exported:
    """Writes the source's images with masks(name), (H, W) uint8 of class + 1, as another tool's data set.

    voc: out/VOC2012/, which mmsegmentation (data_root: out/VOC2012) and deeplab-pytorch (ROOT: out) read: JPEGImages/,
        SegmentationClassAug/, the same in SegmentationClass/, lists in ImageSets/; classes.txt has a line a label. `/`,
        `.` and blanks in names become `_`, for such tools cut names there, and names_NAME.csv says in which.
    coco: out/annotations/instances_NAME.json and out/NAME/, as open_source("coco:OUT", NAME) reads them. A JPEG that is
        encoded anew stays one, anything else becomes a PNG.

    Everything is decoded before anything is written, and all problems are raised together. begin is called in between.
    Where out holds other lists, their classes must be these, and what voc's call by the same name must be the same
    photograph, byte for byte, or if it is not there or not asked for, the same mask. A list of this name is replaced.
    """
    config, out, anew = config or ExportConfig(), Path(out), set()
    if config.name is None:
        config = dataclasses.replace(config, name="train" if config.format == "voc" else "train2017")
    _refuse_other_classes(out, source.classes, config)
    listed = _listed(out, config) if config.format == "voc" else {}
    stems, problems = _stems(source) if config.format == "voc" else ({item.name: item.name for item in source}, [])

    def look(item: data.Item, image: np.ndarray, mask: np.ndarray) -> None:
        stem, missed = stems[item.name], None
        if config.images and item.image.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"export: expected a photograph outside of {out}, got {item.image}; choose another --out")
        if config.images:
            missed = _missed(item.image, image, source.upright, config.format)
        if missed is not None and not config.convert:
            raise ValueError(f"export: expected {missed}, got {item.image}; say --convert to encode it anew")
        if missed is not None:
            anew.add(item.name)
        other = _other(out, stem, item, image, mask, config, missed is not None) if stem in listed else None
        if other is not None:
            raise ValueError(f"export: expected what {listed[stem]} calls {stem}, got another {other}; rename it or "
                             f"choose another --out")  # fmt: skip

    def report(done: int, total: int, name: str) -> None:
        if progress is not None:
            progress(done, 2 * total, name)

    found = data.scan(source, masks, also=look, workers=config.workers, progress=report)
    dataclasses.replace(found, problems=(*found.problems, *problems)).check("export")
    if absent := found.absent():
        log.warning("no mask holds a pixel of %s", ", ".join(absent))
    if config.format == "coco" and config.unsure == "omit" and found.pixels[-1]:
        log.warning("%.2f %% of the pixels are unsure and will be background; --unsure crowd has them ignored",
                    100 * found.pixels[-1] / found.pixels.sum())  # fmt: skip
    if begin is not None:
        begin()
    result = Exported(len(source), len(anew), sum(name != stem for name, stem in stems.items()))
    write = _write_voc if config.format == "voc" else _write_coco
    for number, annotations in enumerate(write(source, masks, out, config, stems, anew)):
        result.annotations += annotations
        report(len(source) + number + 1, len(source), source[number].name)
    return result


def _refuse_other_classes(out: Path, classes: tuple[str, ...], config: ExportConfig) -> None:
    """Masks there would come to mean other classes, or a number in two lists different ones."""
    if config.format == "voc":
        path, classes = out / "VOC2012" / "classes.txt", ("background", *classes)
        known = {path: _read_lines(path)} if path.is_file() else {}
    else:
        paths = sorted((out / "annotations").glob("instances_*.json"))
        known = {path: _categories(path) for path in paths if path.name != f"instances_{config.name}.json"}
    for path, there in known.items():
        if there is not None and there != list(classes):
            raise ValueError(f"export: expected the classes of {path}, {', '.join(there)}, got {', '.join(classes)}; "
                             f"choose another --out")  # fmt: skip


def _read_lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines()


def _categories(path: Path) -> list[str] | None:
    """Of annotations as they are written here, with a line for the categories: the rest can be gigabytes."""
    with open(path, "rb") as file:
        line = next((line for line in file if line.startswith(_CATEGORIES)), None)
    return line and [category["name"] for category in json.loads(line[len(_CATEGORIES) :].rstrip(b",\n"))]


def _listed(out: Path, config: ExportConfig) -> dict[str, Path]:
    """The stems in lists that stay, and the list of each."""
    paths = sorted((out / "VOC2012" / "ImageSets").glob("Segmentation*/*.txt"))
    paths = [path for path in paths if path.stem != config.name]
    return {Path(line.split()[0]).stem: path for path in paths for line in _read_lines(path) if line.strip()}


def _other(
    out: Path, stem: str, item: data.Item, image: np.ndarray, mask: np.ndarray, config: ExportConfig, anew: bool
) -> str | None:
    """What would be lost of a stem: another photograph, or where none tells, another mask."""
    photograph = out / "VOC2012" / "JPEGImages" / f"{stem}.jpg"
    if config.images and photograph.is_file():
        content = _encoded(image, ".jpg", config) if anew else item.image.read_bytes()
        same = photograph.read_bytes() == content
        return None if same else "photograph" + ", or the same encoded otherwise" * anew
    path = Store(out / "VOC2012" / "SegmentationClassAug", flat=True).mask_path(stem)
    return None if not path.is_file() or np.array_equal(read_mask(path), mask) else "mask"


def _stems(source: data.Source) -> tuple[dict[str, str], list[data.Problem]]:
    """Flat names, and which of them cannot be."""
    stems, first, problems = {}, {}, []
    for item in source:
        stem = stems[item.name] = re.sub(r"[/.\s]", "_", item.name)
        other = first.setdefault(stem, item.name)
        if other != item.name:
            reason = f"export: expected names that differ without folders, dots and blanks, got {other} too; rename one"
            problems.append(data.Problem(item.name, reason))
        if len(os.fsencode(stem)) > files.LONGEST_NAME - len(".jpg"):
            reason = f"export: expected at most {files.LONGEST_NAME - 4} bytes without folders, got more; rename it"
            problems.append(data.Problem(item.name, reason))
    return stems, problems


def _missed(path: Path, image: np.ndarray, upright: bool, format: str) -> str | None:
    """What keeps a photograph from being taken as it is."""
    content = path.read_bytes()
    if format == "voc" and not content.startswith(_JPEG):
        return "a JPEG"
    if any(mark in content for mark in _TURNED) and not np.array_equal(read_image(path, upright=not upright), image):
        return "a photograph that EXIF does not turn"
    return None


def _put_image(source: data.Source, item: data.Item, path: Path, config: ExportConfig, anew: bool) -> None:
    if anew:
        files.write(path, _encoded(source.image(item), path.suffix, config))
    elif config.link == "copy":
        files.write(path, item.image.read_bytes())
    else:
        files.link(path, item.image, symbolic=config.link == "symbolic")


def _encoded(image: np.ndarray, suffix: str, config: ExportConfig) -> bytes:
    flags = [] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, config.quality]
    return cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), flags)[1].tobytes()


def _write_voc(
    source: data.Source, masks: Callable, out: Path, config: ExportConfig, stems: Mapping[str, str], anew: set[str]
) -> Iterator[int]:
    root, lists = out / "VOC2012", out / "VOC2012" / "ImageSets"
    stores = [Store(root / folder, flat=True) for folder in ("SegmentationClassAug", "SegmentationClass")]

    def put(item: data.Item) -> int:
        stem, mask = stems[item.name], masks(item.name)
        if config.images:
            _put_image(source, item, root / "JPEGImages" / f"{stem}.jpg", config, item.name in anew)
        stores[0].save_mask(stem, mask)
        try:
            files.link(stores[1].mask_path(stem), stores[0].mask_path(stem))
        except OSError:  # a file system without links
            stores[1].save_mask(stem, mask)
        return 0

    yield from data.prefetch(put, source, workers=config.workers, ahead=max(2, config.workers))
    name, names, table = config.name, stems.values(), root / f"names_{config.name}.csv"
    pairs = [f"/JPEGImages/{stem}.jpg /SegmentationClassAug/{stem}.png" for stem in names]
    renamed = [(item, stem) for item, stem in stems.items() if item != stem]
    if renamed:
        csv.writer(rows := io.StringIO(), lineterminator="\n").writerows([("name", "exported"), *renamed])
        files.write(table, rows.getvalue().encode())
    else:
        table.unlink(missing_ok=True)  # of a list that this one replaces
    files.write(root / "classes.txt", _lines(["background", *source.classes]))
    files.write(lists / "SegmentationAug" / f"{name}.txt", _lines(pairs))
    files.write(lists / "Segmentation" / f"{name}.txt", _lines(names))


def _lines(lines) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _write_coco(
    source: data.Source, masks: Callable, out: Path, config: ExportConfig, stems: Mapping[str, str], anew: set[str]
) -> Iterator[int]:
    name, images, annotations = config.name, [], []

    def put(item: data.Item) -> tuple[str, tuple[int, int], list[dict]]:
        suffix, mask = item.image.suffix, masks(item.name)
        if item.name in anew and suffix.lower() not in (".jpg", ".jpeg"):
            suffix = ".png"
        file = stems[item.name] + suffix
        if config.images:
            _put_image(source, item, out / name / file, config, item.name in anew)
        return file, mask.shape, _annotations(mask, item.classes, config)

    made = data.prefetch(put, source, workers=config.workers, ahead=max(2, config.workers))
    for number, (file, (height, width), found) in enumerate(made, 1):
        images.append(_json({"id": number, "file_name": file, "height": height, "width": width}))
        for annotation in found:
            annotations.append(_json({"id": len(annotations) + 1, "image_id": number, **annotation}))
        yield len(found)
    categories = [{"id": number, "name": label} for number, label in enumerate(source.classes, 1)]
    files.write(
        out / "annotations" / f"instances_{name}.json",
        b'{"info": ', _json({"description": f"masks by ribfast {__version__}"}),
        b",\n", _CATEGORIES, _json(categories),
        b',\n"images": [\n', b",\n".join(images),
        b'],\n"annotations": [\n', b",\n".join(annotations), b"]}\n",
    )  # fmt: skip


def _json(content) -> bytes:
    return json.dumps(content).encode()


def _annotations(mask: np.ndarray, classes: tuple[int, ...], config: ExportConfig) -> list[dict]:
    found, labels = [], (np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[1:255]) + 1).tolist()
    for label in labels:
        here = (mask == label).view(np.uint8)
        if config.regions:
            _, numbers, boxes, _ = cv2.connectedComponentsWithStats(here, connectivity=8)
            found += [_annotation(numbers, number, boxes[number], label) for number in range(1, len(boxes))]
        else:
            found.append(_annotation(mask, label, cv2.boundingRect(here), label))
    if config.unsure == "crowd" and (mask == 255).any():
        box = cv2.boundingRect((mask == 255).view(np.uint8))
        for label in sorted({*labels, *(number + 1 for number in classes)}):
            found.append(_annotation(mask, 255, box, label, crowd=1))
    return found


def _annotation(numbers: np.ndarray, number: int, box, label: int, crowd: int = 0) -> dict:
    """Of the pixels of one number, which lie within the box."""
    x, y, width, height = map(int, box[:4])
    part = numbers[y : y + height, x : x + width] == number
    return {
        "category_id": label,
        "iscrowd": crowd,
        "area": int(np.count_nonzero(part)),
        "bbox": [x, y, width, height],
        "segmentation": encode_region(part, (y, x), numbers.shape),
    }

"""Where images, their labels and their masks come from: a folder, PASCAL VOC, COCO."""

import csv
import hashlib
import json
import logging
import math
import os
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .decode import draw_regions, read_image, read_mask

log = logging.getLogger("ribfast")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
MOST_CLASSES = 254  # of 8-bit labels, of which 0 is background and 255 ignored
_VOC_FOLDERS = ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationClassAug", "ImageSets")
_LARGEST = 1 << 30  # pixels, which OpenCV reads at most


@dataclass(frozen=True)
class Item:
    """An image: its name (relative, without suffix), its file, the classes on it (0-based, ascending), its mask."""

    name: str
    image: Path
    classes: tuple[int, ...]
    mask: Path | None


@dataclass(frozen=True)
class Drawing:
    """A mask that is yet to be drawn: the image's (H, W) and (label, segmentation) pairs, later ones on top."""

    size: tuple[int, int]
    regions: tuple[tuple[int, list | dict], ...]


@dataclass(frozen=True)
class Source:
    """Images with the classes on them, and their masks where there are any; a slice is a tuple of items.

    upright: whether cameras' EXIF orientation is applied. drawings: masks by name that no file holds.
    """

    classes: tuple[str, ...]
    items: tuple[Item, ...]
    upright: bool = False
    drawings: Mapping[str, Drawing] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def labels(self) -> torch.Tensor:
        """(N, C) bool: which classes each image holds."""
        labels = torch.zeros(len(self.items), len(self.classes), dtype=torch.bool)
        for row, item in zip(labels, self.items, strict=True):
            row[list(item.classes)] = True
        return labels

    def masked(self) -> tuple[Item, ...]:
        """The images that have masks."""
        return tuple(item for item in self.items if item.mask is not None or item.name in self.drawings)

    def digest(self) -> str:
        """Of the images' names, their order and their labels."""
        lines = [self.classes, *((item.name, *item.classes) for item in self.items)]
        return hashlib.sha256(json.dumps(lines).encode()).hexdigest()

    def image(self, item: Item) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        return read_image(item.image, upright=self.upright)

    def mask(self, item: Item, size: tuple[int, int] | None = None) -> np.ndarray | None:
        """(H, W) uint8: 0 background, class + 1, 255 ignored; None where there is none. size: what (H, W) must be."""
        if item.mask is not None:
            mask, place = read_mask(item.mask), item.mask
        elif item.name in self.drawings:
            drawing, place = self.drawings[item.name], f"the annotations of {item.name}"
            check_size(drawing.size, size, "Source.mask", image=item.image, place=place)  # before it is filled
            mask = draw_regions(drawing.size, drawing.regions, item.name)
        else:
            return None
        check_mask(mask, size, len(self.classes), "Source.mask", image=item.image, place=place)
        return mask


def check_size(
    shape: tuple[int, int],
    size: tuple[int, int] | None,
    op: str,
    *,
    image: Path | None = None,
    place: str | Path | None = None,
) -> None:
    """Refuses a mask's (H, W) that is not its image's; arguments as of check_mask."""
    if size is not None and tuple(shape) != tuple(size):
        pixels = f"{size[0]} x {size[1]} pixels"
        expected = f"a mask of the image's {pixels}" if image is None else f"{pixels} as {image} has"
        where = "" if place is None else f" in {place}"
        raise ValueError(f"{op}: expected {expected}, got {shape[0]} x {shape[1]}{where}; make both the same size")


def check_mask(
    mask: np.ndarray,
    size: tuple[int, int] | None,
    classes: int,
    op: str,
    *,
    image: Path | None = None,
    place: str | Path | None = None,
) -> None:
    """Refuses a mask of another size than its image's (H, W), or with labels of no class. image, place: files to name.

    size: None where the image's is not known.
    """
    check_size(mask.shape, size, op, image=image, place=place)
    where = "" if place is None else f" in {place}"
    wrong = mask[(mask > classes) & (mask != 255)]
    if wrong.size:
        raise ValueError(f"{op}: expected labels 0..{classes} (class + 1) or 255, got {wrong[0]}{where}; renumber the "
                         f"mask's labels")  # fmt: skip


def open_source(spec: str, split: str | None = None) -> Source:
    """Opens "folder:PATH", "voc:PATH" or "coco:PATH"; everything but the pictures themselves is checked here.

    folder: images/ and labels.csv (header `image,labels`, labels separated by `;`), optionally classes.txt (else the
        classes are all labels, sorted) and masks/NAME.png. split: PATH/SPLIT.txt, or any file with a name a line;
        None: every row. EXIF orientation is applied.
    voc: VOC2012 or the VOCdevkit around it. Classes from Annotations/*.xml, where one is missing from the mask; masks
        from SegmentationClassAug/, else SegmentationClass/. split: a list of ImageSets/Segmentation/ or Main/, or any
        such file, whose lines begin with a name or a path (what follows is not read); None: train_aug, else train.
    coco: annotations/instances_SPLIT.json and SPLIT/ or images/SPLIT/; None: train2014 or train2017; SPLIT:LIST: those
        of its images that PATH/LIST.txt, or any file, names, one a line. Classes in the order of the categories' ids.
        Masks from masks/SPLIT/NAME.png, else drawn from the annotations, smaller regions on top, crowds as 255.
    """
    scheme, root = _kind_and_folder(spec)
    source = _OPENERS[scheme](root, split)
    if not source.items:
        place = spec if split is None else f"the list {split} of {spec}"
        raise ValueError(f"open_source: expected at least one image, got none in {place}; fill it")
    _check_classes(source.classes, spec)
    return source


def places_of(spec: str) -> tuple[Path, ...]:
    """A data set's own folder, then those whose files open_source takes for its images, masks and annotations."""
    scheme, root = _kind_and_folder(spec)
    if scheme == "voc":
        root = _voc_folder(root)
    below = {"folder": ("images", "masks"), "voc": _VOC_FOLDERS, "coco": ("annotations", "images", "masks")}[scheme]
    found = [root, *(root / name for name in below)]
    if scheme == "coco":
        found += [root / split for split in _coco_splits(root)]
    return tuple(found)


def _kind_and_folder(spec: str) -> tuple[str, Path]:
    scheme, colon, place = spec.partition(":")
    if not colon or scheme not in _OPENERS or not place:
        known = ", ".join(f"{name}:PATH" for name in _OPENERS)
        raise ValueError(f"open_source: expected one of {known}, got {spec!r}; put the kind of data before the path")
    root = Path(place).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"open_source: expected a folder, got {root}, which is none; check the path")
    return scheme, root


def _check_classes(classes: tuple[str, ...], spec: str) -> None:
    """Results have a line a name, labels 8 bits."""
    if "background" in classes:
        raise ValueError(f"open_source: expected classes beside the background, which is label 0 of every mask, got "
                         f"one called background in {spec}; take it out of the labels, or rename it")  # fmt: skip
    if len(classes) > MOST_CLASSES:
        raise ValueError(f"open_source: expected at most {MOST_CLASSES} classes, as labels are 8 bits and 255 is none, "
                         f"got {len(classes)} in {spec}; split the classes among several data sets")  # fmt: skip


def open_images(place: str | os.PathLike, classes: Sequence[str]) -> Source:
    """An image, or all images below a folder, by name, of which nothing else is known; EXIF orientation is applied.

    Hidden files and folders (macOS's ._NAME.png) are passed over; a warning counts files that are no images by their
    suffix.
    """
    place = Path(place).expanduser()
    if place.is_file():
        return Source(tuple(classes), (Item(_name(place.name, str(place)), place, (), None),), upright=True)
    ignored: dict[str, int] = {}
    found = _files(place, SUFFIXES, hidden=False, ignored=ignored)
    counted = ", ".join(f"{suffix} {count}" for suffix, count in sorted(ignored.items()))
    if not found:
        instead = f"files of other kinds ({counted}); convert them" if ignored else "none; name their folder"
        raise ValueError(f"open_images: expected images ({', '.join(SUFFIXES)}) in {place}, got {instead}")
    if ignored:
        log.warning("left out: %d files in %s that are no images by their suffix (%s); read are %s",
                    sum(ignored.values()), place, counted, ", ".join(SUFFIXES))  # fmt: skip
    twice = next((paths for paths in found.values() if len(paths) > 1), None)
    if twice is not None:
        raise ValueError(f"open_images: expected names that differ without suffix, got {twice[0].name} and "
                         f"{twice[1].name} in {twice[0].parent}; rename one")  # fmt: skip
    for name in found:
        check_name(name, "open_images", str(place))
    items = (Item(name, found[name][0], (), None) for name in sorted(found))
    return Source(tuple(classes), tuple(items), upright=True)


def _open_folder(root: Path, split: str | None) -> Source:
    images, masks = _files(root / "images", SUFFIXES), _files(root / "masks", (".png",), required=False)
    table, classes = root / "labels.csv", None
    if (root / "classes.txt").is_file():
        lines = [(line, text.strip()) for line, text in _lines(root / "classes.txt")]
        classes = tuple(text for _, text in lines)
        _refuse_duplicates(lines, root / "classes.txt")
    rows: dict[str, tuple[int, Path, set[str]]] = {}
    missing = []
    for line, entry, labels in _rows(table):
        entry, name = _named(images, entry, f"{table}:{line}")
        try:
            image = _find(images, entry, name, root / "images", f"{table}:{line}")
        except FileNotFoundError as error:
            missing.append(error)
            continue
        if name in rows and rows[name][1:] != (image, {*labels}):
            raise ValueError(f"open_source: expected each image once, got {name} again in {table}:{line}, first in "
                             f"line {rows[name][0]}; remove one, or put all labels of an image in one line, separated "
                             f"by semicolons (names are told apart without suffix)")  # fmt: skip
        unknown = [label for label in labels if classes is not None and label not in classes]
        if unknown:
            raise ValueError(f"open_source: expected labels of {root / 'classes.txt'}, got {unknown[0]!r} in "
                             f"{table}:{line}; add it there or correct it")  # fmt: skip
        rows.setdefault(name, (line, image, {*labels}))
    if missing:
        more = f" ({len(missing) - 1} more lines name images that are not there)" * (len(missing) > 1)
        raise FileNotFoundError(f"{missing[0]}{more}")
    if classes is None:
        classes = tuple(sorted({label for _, _, labels in rows.values() for label in labels}))
    if not classes:
        raise ValueError(f"open_source: expected at least one class, got none in {root}; label images in {table} or "
                         f"list the classes in classes.txt")  # fmt: skip
    number = {label: index for index, label in enumerate(classes)}

    def item(name: str) -> Item:
        _, image, labels = rows[name]
        return Item(name, image, tuple(sorted({number[label] for label in labels})), _only(masks, name))

    if split is None:
        return Source(classes, tuple(item(name) for name in rows), upright=True)
    return Source(classes, tuple(item(name) for name in _listed(_list(split, [root]), rows, table)), upright=True)


def _open_voc(root: Path, split: str | None) -> Source:
    root = _voc_folder(root)
    images, notes = _files(root / "JPEGImages", SUFFIXES), _files(root / "Annotations", (".xml",), required=False)
    masks = _files(root / "SegmentationClass", (".png",), required=False)
    masks |= _files(root / "SegmentationClassAug", (".png",), required=False)
    lists = [root / "ImageSets" / "Segmentation", root / "ImageSets" / "Main"]
    if split is None:
        known = ("train_aug", "trainaug", "train")
        split = next((name for name in known if (lists[0] / f"{name}.txt").is_file()), "train")
    path, number = _list(split, lists), {label: index for index, label in enumerate(VOC_CLASSES)}
    entries = []
    for line, text in _lines(path):
        if text not in images:  # a list of VOC's own, in place of one of our names a line
            text = text.split()[0].lstrip("/").removeprefix("JPEGImages/")
        entries.append((line, *_named(images, text, f"{path}:{line}")))
    _refuse_duplicates([(line, name) for line, _, name in entries], path)
    items = []
    for line, entry, name in entries:
        image, mask = _find(images, entry, name, root / "JPEGImages", f"{path}:{line}"), _only(masks, name)
        if name in notes:
            classes = _voc_objects(notes[name][0], number)
        elif mask is not None:
            classes = {int(label) - 1 for label in np.unique(read_mask(mask)) if 0 < label <= len(VOC_CLASSES)}
        else:
            raise FileNotFoundError(f"open_source: expected {root / 'Annotations' / name}.xml or a mask to know the "
                                    f"classes of {path}:{line}, got neither; fetch one of them")  # fmt: skip
        items.append(Item(name, image, tuple(sorted(classes)), mask))
    return Source(VOC_CLASSES, tuple(items))


def _voc_folder(root: Path) -> Path:
    """VOC2012, also where the development kit around it is named."""
    if (root / "JPEGImages").is_dir():
        return root
    found = [root / "VOC2012"] if (root / "VOC2012").is_dir() else sorted(root.glob("VOC*/"))
    if len(found) != 1 or not (found[0] / "JPEGImages").is_dir():
        raise FileNotFoundError(f"open_source: expected VOC2012 or the VOCdevkit around it, got {root} without "
                                f"JPEGImages/; name the folder that holds it")  # fmt: skip
    return found[0]


def _voc_objects(path: Path, number: dict[str, int]) -> set[int]:
    try:
        labels = [(name.text or "").strip() for name in ElementTree.parse(path).getroot().iterfind("object/name")]
    except ElementTree.ParseError as error:
        raise ValueError(f"open_source: expected an annotation in XML, got {path}: {error}; fetch it again") from error
    unknown = [label for label in labels if label not in number]
    if unknown:
        raise ValueError(f"open_source: expected VOC's 20 classes, got {unknown[0]!r} in {path}; use folder: for "
                         f"classes of your own")  # fmt: skip
    return {number[label] for label in labels}


def _open_coco(root: Path, split: str | None) -> Source:
    notes = root / "annotations"
    split, listed, chosen = (split or "").partition(":")
    if not split:
        known = [name for name in ("train2014", "train2017") if (notes / f"instances_{name}.json").is_file()]
        split = known[0] if known else "train2014"
    path = notes / f"instances_{split}.json"
    if not path.is_file():
        there = ", ".join(_coco_splits(root)) or "none"
        raise FileNotFoundError(f"open_source: expected annotations of split {split!r}, got no {path}; the splits "
                                f"there: {there}")  # fmt: skip
    folder = next((f for f in (root / split, root / "images" / split) if f.is_dir()), root / split)
    images, masks = _files(folder, SUFFIXES), _files(root / "masks" / split, (".png",), required=False)
    try:
        content = json.loads(path.read_bytes())
        categories = sorted(content["categories"], key=lambda category: category["id"])
        number = {category["id"]: index for index, category in enumerate(categories)}
        regions: dict[int, list] = {image["id"]: [] for image in content["images"]}
        for region in content["annotations"]:
            if region["image_id"] not in regions or region["category_id"] not in number:
                raise ValueError(f"annotation {region['id']} is of an unknown image or category")
            label = 255 if region.get("iscrowd") else number[region["category_id"]] + 1
            drawn = region["area"], label, region["segmentation"], number[region["category_id"]]
            regions[region["image_id"]].append(drawn)
        items, drawings = [], {}
        for image in content["images"]:
            entry, there = image["file_name"], regions[image["id"]]
            entry, name = _named(images, entry, str(path))
            item = Item(name, _find(images, entry, name, folder, path),
                        tuple(sorted({category for *_, category in there})), _only(masks, name))  # fmt: skip
            items.append(item)
            if item.mask is None:
                there.sort(key=lambda region: -region[0])
                shapes = tuple((label, _compact(shape)) for _, label, shape, _ in there)
                drawings[name] = Drawing(_size(image, entry), shapes)
        classes = _category_names(categories)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        if str(error).startswith("open_source"):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"open_source: expected COCO's instances, got {path}: {reason}; fetch it again") from error
    _refuse_duplicates([(line, item.name) for line, item in enumerate(items, 1)], path, "image")
    if listed:
        by_name = {item.name: item for item in items}
        names = _listed(_list(chosen, [root]), by_name, path)
        items, drawings = [by_name[n] for n in names], {n: drawings[n] for n in names if n in drawings}
    return Source(classes, tuple(items), drawings=drawings)


def _coco_splits(root: Path) -> list[str]:
    return sorted(p.stem.removeprefix("instances_") for p in (root / "annotations").glob("instances_*.json"))


def _size(image: dict, entry: str) -> tuple[int, int]:
    """(H, W); some tools write whole numbers as 64.0."""
    sides = [image["height"], image["width"]]
    if not all(type(side) in (int, float) and side == math.trunc(side) and side > 0 for side in sides):
        raise ValueError(f"image {entry} has a height of {sides[0]!r} and a width of {sides[1]!r}, no whole numbers of "
                         f"pixels")  # fmt: skip
    if math.prod(sides) > _LARGEST:
        raise ValueError(f"image {entry} is said to have {sides[0]} x {sides[1]} pixels, more than a picture can have")
    return int(sides[0]), int(sides[1])


def _category_names(categories: list[dict]) -> tuple[str, ...]:
    names = [category["name"] for category in categories]
    for category, name in zip(categories, names, strict=True):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"category {category['id']} is called {name!r}, which is no text")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        both = ", ".join(str(category["id"]) for category in categories if category["name"] == twice)
        raise ValueError(f"open_source: expected names that categories do not share, got {twice!r} of those with ids "
                         f"{both}; rename one, or give their annotations one id")  # fmt: skip
    return tuple(names)


def _compact(segmentation: list | dict) -> list | dict:
    """Polygons as float32 arrays: COCO's as lists of Python floats would fill gigabytes."""
    if isinstance(segmentation, dict):
        return segmentation
    if any(len(polygon) % 2 for polygon in segmentation):
        raise ValueError("a polygon has an x without a y")
    return [np.asarray(polygon, np.float32) for polygon in segmentation if len(polygon) >= 6]


_OPENERS = {"folder": _open_folder, "voc": _open_voc, "coco": _open_coco}


def _files(
    folder: Path,
    suffixes: tuple[str, ...],
    required: bool = True,
    hidden: bool = True,
    ignored: dict[str, int] | None = None,
) -> dict[str, list[Path]]:
    """The files below a folder by name (relative, without suffix); each folder is listed once, no file is touched.

    hidden: False passes over what begins with a dot. ignored: takes how many files have each other suffix.
    """
    if not folder.is_dir():
        if required:
            raise FileNotFoundError(f"open_source: expected a folder, got {folder}, which is none; check the path")
        return {}
    found: dict[str, list[Path]] = {}
    for place, folders, files in os.walk(folder, followlinks=True):
        inner = Path(place).relative_to(folder).as_posix()
        if not hidden:
            folders[:] = [name for name in folders if not name.startswith(".")]
            files = [name for name in files if not name.startswith(".")]
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in suffixes:
                found.setdefault(stem if inner == "." else f"{inner}/{stem}", []).append(Path(place) / file)
            elif ignored is not None:
                kind = suffix or "without suffix"
                ignored[kind] = ignored.get(kind, 0) + 1
    return found


def _named(images: Mapping[str, list[Path]], text: str, where: str) -> tuple[str, str]:
    """A table's or list's text -> its entry and its image's name: the text as it stands where an image has it, else
    without the blanks around it; a file with its suffix before a name that looks as if it had one (scan.tif of
    scan.tif.png)."""
    for entry in (text, text.strip()):
        stem = _stem(entry)
        if any(path.name == entry.rpartition("/")[2] for path in images.get(stem, ())):
            return entry, _name(entry, where)
        if entry in images:
            check_name(entry, "open_source", where)
            return entry, entry
    return text.strip(), _name(text.strip(), where)


def _find(images: dict[str, list[Path]], entry: str, name: str, folder: Path, where: str | Path) -> Path:
    """The image that an entry means: with its suffix exactly that file, without one the only one of its name."""
    found = images.get(name, [])
    exact = [path for path in found if path.name == entry.rpartition("/")[2]]
    if not found or (entry != name and not exact):
        near, advice = _near(folder, entry)
        raise FileNotFoundError(f"open_source: expected {entry} in {folder}, got no such image{near}, named in "
                                f"{where}; {advice}")  # fmt: skip
    if len(found) > 1 and not exact:
        raise ValueError(f"open_source: expected one image called {name}, got {found[0].name} and {found[1].name} in "
                         f"{folder}, named in {where}; name one with its suffix or remove the other")  # fmt: skip
    return (exact or found)[0]


def _near(folder: Path, entry: str) -> tuple[str, str]:
    """What there is in place of an image that is not, and what to do."""

    def plain(text: str) -> str:
        return unicodedata.normalize("NFC", text).casefold()

    place = (folder / entry).parent
    there = sorted(os.listdir(place)) if place.is_dir() else []
    wanted = Path(entry).name
    similar = [name for name in there if plain(wanted) in (plain(name), plain(Path(name).stem))]
    similar += [name for name in there if name not in similar and plain(Path(name).stem) == plain(_stem(wanted))]
    for name in similar:
        if (place / name).is_dir():
            return f" but a folder {name}", "name the images in it, or remove the line"
        if Path(name).suffix.lower() not in SUFFIXES:
            return f" but {name}, of a kind that is not read", f"convert it to one of {', '.join(SUFFIXES)}"
        if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", wanted):
            return f" but {name} with its letters composed otherwise (Unicode NFC and NFD)", "rename it as it is named"
        return f" but {name}", "name it so, add the one that is named, or remove the line"
    return "", "add it or remove the line"


def _only(masks: dict[str, list[Path]], name: str) -> Path | None:
    return masks[name][0] if name in masks else None


def _name(entry: str, where: str) -> str:
    """An entry without its suffix: also the name of files to be written, so it must stay below their folder."""
    name = _stem(entry)
    check_name(name, "open_source", where, entry)
    return name


def _stem(entry: str) -> str:
    stem, dot, suffix = entry.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in SUFFIXES else entry


def check_name(name: str, op: str, where: str = "", entry: str | None = None) -> None:
    """Refuses a name that files cannot be written by. entry: what it was made of."""
    place = f" in {where}" * bool(where)
    if "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{op}: expected a relative path without `..`, got {entry or name!r}{place}; rename it")
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise ValueError(f"{op}: expected a name that a line of a list can hold, got control characters, line ends or "
                         f"bytes that are no UTF-8 in {entry or name!a}{place}; rename it")  # fmt: skip


def _list(split: str, folders: Iterable[Path]) -> Path:
    folders = list(folders)
    for path in (*(folder / f"{split}.txt" for folder in folders), Path(split).expanduser()):
        if path.is_file():
            return path
    there = sorted(path.stem for folder in folders for path in folder.glob("*.txt") if path.name != "classes.txt")
    raise FileNotFoundError(f"open_source: expected the list {folders[0] / split}.txt or a file, got split {split!r}, "
                            f"which is neither; the lists there: {', '.join(there[:20]) or 'none'}")  # fmt: skip


def _listed(path: Path, known: Mapping[str, object], table: Path) -> list[str]:
    """A list's names, each of which the table knows."""
    names = [(line, _known(text, known, f"{path}:{line}")) for line, text in _lines(path, known)]
    if not names:
        raise ValueError(f"open_source: expected at least one image, got none in {path}; fill it")
    _refuse_duplicates(names, path)
    for line, name in names:
        if name not in known:
            raise ValueError(f"open_source: expected images of {table}, got {name} in {path}:{line}; add its labels "
                             f"there or remove it")  # fmt: skip
    return [name for _, name in names]


def _known(text: str, known: Mapping[str, object], where: str) -> str:
    """The name that a list's line means: itself as it stands, as lists are written here, else without the blanks around
    it, else either without its suffix."""
    entry = text.strip()
    return next((name for name in (text, entry, _stem(text)) if name in known), None) or _name(entry, where)


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"open_source: expected a file, got {path}, which is none; add it")
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"open_source: expected UTF-8, got {path}:{line}: {error.reason}; save it as UTF-8") from error


def _lines(path: Path, known: Container[str] = ()) -> list[tuple[int, str]]:
    """(line number, text as it stands) of the lines that are not blank; known: of these too."""
    lines = enumerate(_text(path).split("\n"), 1)
    return [(line, text) for line, text in lines if text.strip() or text in known]


def _rows(path: Path) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(line number, image, labels) of labels.csv."""
    reader = csv.reader(_text(path).removesuffix("\n").split("\n"), strict=True)
    filled = (cells for cells in reader if any(cell.strip() for cell in cells))
    try:
        header = [cell.strip() for cell in next(filled, [])]
        if header != ["image", "labels"]:
            place = f"{path}:{max(1, reader.line_num)}"
            raise ValueError(f"open_source: expected the header image,labels, got {','.join(header)!r} in {place}; "
                             f"add it, and separate labels by semicolons")  # fmt: skip
        for cells in filled:
            if len(cells) != 2:
                raise ValueError(f"open_source: expected two columns, got {len(cells)} in {path}:{reader.line_num}; "
                                 f"separate labels by semicolons")  # fmt: skip
            if not cells[0].strip():
                raise ValueError(f"open_source: expected an image, got none in {path}:{reader.line_num}; name it or "
                                 f"remove the line")  # fmt: skip
            labels = tuple(label.strip() for label in cells[1].split(";") if label.strip())
            yield reader.line_num, cells[0], labels
    except csv.Error as error:
        raise ValueError(f"open_source: expected a table, got {path}:{reader.line_num}: {error}; correct it") from error


def _refuse_duplicates(lines: Iterable[tuple[int, str]], path: Path, unit: str = "line") -> None:
    first: dict[str, int] = {}
    for line, text in lines:
        if first.setdefault(text, line) != line:
            raise ValueError(f"open_source: expected each name once, got {text} in {unit} {line} of {path}, first in "
                             f"{unit} {first[text]}; remove one")  # fmt: skip

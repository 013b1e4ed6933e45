"""What maps cost on the disk, in each format, and what the strided ones lose: results/store.json.

    python benchmarks/store_size.py DATA CLASSIFIER [--split val]

DATA: a folder of photographs with masks; CLASSIFIER: a classifier.safetensors of its classes. Bytes and times are of
the photographs' CAMs; bytes are scaled to VOC's and COCO's sizes and classes by the pixels of their maps.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from ribfast import data, models
from ribfast.metrics import ThresholdSweep
from ribfast.pipeline import CamConfig, make_cams
from ribfast.store import Store

RESULT = Path(__file__).parent / "results" / "store.json"
KINDS = {"npz": ("npz", False), "npz, high_res": ("npz", True), "irn": ("irn", False), "pmm": ("pmm", False)}
# images, (H, W), classes an image, GB that their maps may take
SETS = {"VOC": (10_582, (375, 500), 1.5, 2.0), "COCO": (82_783, (480, 640), 2.9, 15.0)}
THRESHOLDS = np.round(np.arange(0.02, 0.9, 0.01), 4)


def milliseconds(call, items) -> float:
    """The median of one call."""
    took = []
    for item in items:
        start = time.perf_counter()
        call(item)
        took.append(1e3 * (time.perf_counter() - start))
    return statistics.median(took)


def sizes(folder: Path, maps: dict) -> dict:
    pixels = sum(m.high_res.size for m in maps.values())
    rows = {}
    for kind, (format, high_res) in KINDS.items():
        store = Store(folder / kind, format, high_res=high_res)
        write = milliseconds(lambda name, store=store: store.save(name, *maps[name][:3]), maps)
        row = {"write_ms": write, "read_ms": milliseconds(store.read, maps), "load_ms": milliseconds(store.load, maps)}
        found = [store.path(name).stat().st_size for name in maps]
        row |= {"bytes_an_image": sum(found) / len(found), "largest": max(found)}
        if format == "npz":
            stored = [sum(entry.file_size for entry in zipfile.ZipFile(store.path(name)).infolist()) for name in maps]
            row["uncompressed"] = sum(stored) / len(stored)
        for name, (images, (height, width), classes, most) in SETS.items():
            each = sum(found) * classes * height * width / pixels
            row[name] = {"bytes_an_image": each, "gigabytes": each * images / 1e9}
            if kind == "npz":
                row[name]["asked_gigabytes"] = most
        rows[kind] = row
    return rows


def durability(folder: Path, content: bytes) -> dict:
    """Milliseconds to write a file under a temporary name and rename it, by what is forced to the disk."""
    folder.mkdir()

    def write(number, file_too, folder_too):
        partial = folder / f"{number}.partial"
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            if file_too:
                os.fsync(file.fileno())
        os.replace(partial, folder / f"{number}")
        if folder_too:
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    forced = {"nothing": (False, False), "the file": (True, False), "the file and its folder": (True, True)}
    return {name: milliseconds(lambda n, how=how: write(n, *how), range(60)) for name, how in forced.items()}


def lost(source: data.Source, maps: dict, folder: Path) -> dict:
    """mIoU of the maps as they are made and as they are stored."""
    found = {}
    stores = {kind: Store(folder / kind, format) for kind, (format, _) in KINDS.items()}
    for kind in ("float32", *stores):
        sweep = ThresholdSweep(len(source.classes), THRESHOLDS)
        for item in source:
            loaded = (
                None if not item.classes else maps[item.name] if kind == "float32" else stores[kind].load(item.name)
            )
            sweep.add(*((np.empty((0, 0, 0)), ()) if loaded is None else (loaded.high_res, loaded.keys)),
                      source.mask(item))  # fmt: skip
        threshold, miou = sweep.best()
        found[kind] = {"miou": miou, "threshold": threshold, "mious": sweep.mious()}
    at = int(np.flatnonzero(np.isclose(THRESHOLDS, found["float32"]["threshold"]))[0])
    for row in found.values():
        row["miou_at_the_same_threshold"] = float(row.pop("mious")[at])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("classifier")
    parser.add_argument("--split", default="val")
    options = parser.parse_args()
    source = data.open_source(f"folder:{options.data}", options.split)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "made", "irn")
        make_cams(source, models.open_classifier(options.classifier), store, CamConfig(device="cpu"))
        maps = {name: store.load(name) for name in store.names()}
        pixels = sum(m.high_res[0].size for m in maps.values()) / len(maps)
        result = {
            "about": "CAMs of photographs: bytes and milliseconds (medians, one thread) an image; mIoU, the threshold "
            "chosen on the same images",
            "images": len(maps),
            "pixels_an_image": pixels,
            "classes_an_image": sum(len(m.keys) for m in maps.values()) / len(maps),
            "formats": sizes(Path(folder), maps),
            "forced_to_the_disk_ms": durability(Path(folder) / "forced", store.path(next(iter(maps))).read_bytes()),
            "quality": lost(source, maps, Path(folder)),
        }

    def rounded(value):
        if isinstance(value, dict):
            return {name: rounded(v) for name, v in value.items()}
        return float(f"{value:.6g}") if isinstance(value, float) else value

    RESULT.write_text(json.dumps(rounded(result), indent=1) + "\n")
    for kind, row in result["formats"].items():
        scaled = ", ".join(f"{name} {row[name]['gigabytes']:.2f} GB" for name in SETS)
        times = f"written in {row['write_ms']:.1f} ms, loaded in {row['load_ms']:.1f}"
        miou = 100 * result["quality"][kind]["miou"]
        print(f"{kind:<14} {row['bytes_an_image'] / 1e3:6.1f} kB an image; {scaled}; {times}; mIoU {miou:.2f}")


if __name__ == "__main__":
    main()

"""A run's folder: class maps, masks, facts and failures, written whole or not at all.

config.json       what made it
maps/NAME.npz     class maps in [0, 1] of the classes on an image (or .npy, as IRN's and PMM's tools have them)
steps/NAME.npz    where they are kept: the maps after each of RIB's steps, in 8 bits
masks/NAME.png    labels in VOC's palette: 0 background, class + 1, 255 unsure
metrics.jsonl     facts, a JSON object an image; of an image without classes that it was skipped
failures.jsonl    a JSON object an image that failed, with its reason
"""

import collections
import contextlib
import io
import os
import pickle
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import files
from .cams import enlarge_cams
from .data.decode import VOC_PALETTE, read_mask
from .data.sources import check_name

SUFFIXES = {"npz": ".npz", "irn": ".npy", "pmm": ".npy"}
CONFIG, METRICS, FAILURES = "config.json", "metrics.jsonl", "failures.jsonl"
EVALUATION = "evaluation.json"
CLAIMS = "claims"  # a folder, while several processes share the images, of who makes which
_STALE = 86_400  # seconds: no file takes that long to write, nor is a machine's clock so wrong: its writer was killed


class Maps(NamedTuple):
    """keys (n,) int64: 0-based classes; cam (n, ceil(H / 4), ceil(W / 4)), None in pmm's; high_res (n, H, W)."""

    keys: Tensor
    cam: Tensor | None
    high_res: np.ndarray | None
    size: tuple[int, int]  # (H, W); (0, 0) in pmm's without classes


class Store:
    """Maps, masks, facts and failures by image name; names with slashes lie in folders below.

    A file under its final name is whole, whoever was killed, so `name in store` and `has_mask(name)` say what a resumed
    run may skip. Several processes may write into one folder. Reading runs nothing that a file holds.

    format, of maps:
    "npz": maps/NAME.npz, which numpy.load reads: keys (n,) int64, cam (n, ceil(H / 4), ceil(W / 4)) float16, size (2,)
        int64, and with high_res=True high_res (n, H, W) float16. Without, `load` enlarges cam.
    "irn": maps/NAME.npy, a pickled dict of keys (LongTensor), cam (float tensor) and high_res (float32 array).
    "pmm": maps/NAME.npy, a pickled dict {class: float16 array (H, W)}; without classes the size is not kept.
    flat: maps and masks lie in the folder itself, as other tools have theirs.
    """

    def __init__(self, folder: str | os.PathLike, format: str = "npz", *, high_res: bool = False, flat: bool = False):
        if format not in SUFFIXES:
            raise ValueError(f"Store: expected a format of {', '.join(SUFFIXES)}, got {format!r}")
        self.folder, self.format, self.high_res = Path(folder), format, high_res
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"Store: expected a folder, got {self.folder}, a file; choose another place")
        self._maps, self.masks = (self.folder, self.folder) if flat else (self.folder / "maps", self.folder / "masks")
        self._steps = self.folder / "steps"
        self._is_tidy = False

    def path(self, name: str) -> Path:
        """Of an image's maps."""
        return _place(self._maps, name, SUFFIXES[self.format])

    def __contains__(self, name: str) -> bool:
        return _is_there(self.path(name))

    def names(self) -> list[str]:
        """Of images with maps, sorted."""
        return _names(self._maps, SUFFIXES[self.format])

    def save(self, name: str, keys, cam, high_res=None, size: tuple[int, int] | None = None) -> None:
        """Tensors or arrays; cam may be None for pmm, high_res where only cam is kept and size is given.

        Replaces what is there.
        """
        keys = torch.as_tensor(keys).detach().cpu().long().clone()
        if keys.ndim != 1 or len(keys.unique()) != len(keys) or (keys < 0).any():
            raise ValueError(f"Store.save: expected keys (n,), each class once, got {keys.tolist()} for {name}")
        high_res = None if high_res is None else torch.as_tensor(high_res).detach().cpu().float().numpy()
        if high_res is not None and (
            high_res.ndim != 3 or len(high_res) != len(keys) or not np.isfinite(high_res).all()
        ):
            raise ValueError(f"Store.save: expected finite high_res ({len(keys)}, H, W), got {high_res.shape} of "
                             f"{high_res.min(initial=0)} to {high_res.max(initial=0)} for {name}")  # fmt: skip
        if high_res is None and (self.high_res or self.format != "npz" or size is None):
            raise ValueError(f"Store.save: expected high_res for {self.format}, or a size where only cam is kept, got "
                             f"neither for {name}")  # fmt: skip
        size = tuple(int(side) for side in (size if high_res is None else high_res.shape[1:]))
        if self.format != "pmm":
            cam = None if cam is None else torch.as_tensor(cam).detach().cpu().float()
            expected = (len(keys), *(-(-side // 4) for side in size))
            if cam is None or tuple(cam.shape) != expected:
                shape = None if cam is None else tuple(cam.shape)
                raise ValueError(f"Store.save: expected cam of shape {expected}, got {shape} for {name}")
        path = self.path(name)
        _stay_within(self._maps, path)
        if self.format == "npz":
            parts = _npz(name, keys, cam, high_res if self.high_res else None, size)
        elif self.format == "irn":
            # clones: a view would be written with everything that it is a view of
            content = {"keys": keys, "cam": cam.clone(memory_format=torch.contiguous_format), "high_res": high_res}
            parts = _npy(content)
        else:
            with np.errstate(over="ignore"):
                content = {key: plane.astype(np.float16) for key, plane in zip(keys.tolist(), high_res, strict=True)}
            if not all(np.isfinite(plane).all() for plane in content.values()):
                raise ValueError(f"Store.save: expected maps below 65504, as pmm's are float16, got "
                                 f"{high_res.max()} for {name}; divide them by their maximum or use irn")  # fmt: skip
            parts = _npy(content)
        self._remove_stale()
        files.write(path, parts)

    def read(self, name: str) -> Maps:
        """As they are stored: high_res is None where only cam is kept."""
        path = self.path(name)
        if not _is_there(path):
            raise FileNotFoundError(f"Store.load: expected maps of {name}, got no {path}")
        if self.format == "npz":
            return _from_npz(path)
        content = _read(path)
        return _from_irn(content, path) if self.format == "irn" else _from_pmm(content, path)

    def load(self, name: str) -> Maps:
        """In float32; high_res enlarged from cam (cams.enlarge_cams) where it is not kept."""
        return enlarged(self.read(name))

    def save_steps(self, name: str, keys, steps) -> None:
        """steps (k, n, ceil(H / 4), ceil(W / 4)) uint8: the maps of keys (n,) after each step, 255 for 1.

        Replaces what is there.
        """
        keys, steps = np.asarray(keys, np.int64), np.asarray(steps)
        if keys.ndim != 1 or steps.ndim != 4 or steps.shape[1] != len(keys) or steps.dtype != np.uint8:
            raise ValueError(f"Store.save_steps: expected uint8 steps (k, {len(keys)}, h, w), got {steps.dtype} "
                             f"{steps.shape} for {name}")  # fmt: skip
        path = _place(self._steps, name, ".npz")
        _stay_within(self._steps, path)
        self._remove_stale()
        files.write(path, _archive({"keys": keys, "steps": steps}))

    def load_steps(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """(keys, steps) as they were saved; None where none were."""
        path = _place(self._steps, name, ".npz")
        if not _is_there(path):
            return None
        keys, steps = _arrays(path, "load_steps", "keys", "steps")
        if keys.ndim != 1 or steps.ndim != 4 or steps.shape[1] != len(keys) or steps.dtype != np.uint8:
            raise ValueError(f"Store.load_steps: expected uint8 steps (k, {len(keys)}, h, w), got {steps.dtype} "
                             f"{steps.shape} in {path}; remove it and make it again")  # fmt: skip
        return keys, steps

    def mask_path(self, name: str) -> Path:
        return _place(self.masks, name, ".png")

    def has_mask(self, name: str) -> bool:
        return _is_there(self.mask_path(name))

    def mask_names(self) -> list[str]:
        """Of images with masks, sorted."""
        return _names(self.masks, ".png")

    def save_mask(self, name: str, labels) -> None:
        """labels (H, W), integers from 0 to 255. Replaces what is there."""
        labels = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if labels.dtype.kind not in "iu" or labels.ndim != 2 or not labels.size:
            raise ValueError(f"Store.save_mask: expected integer labels (H, W), got {labels.dtype} {labels.shape} for "
                             f"{name}")  # fmt: skip
        if not 0 <= labels.min() <= labels.max() <= 255:
            raise ValueError(f"Store.save_mask: expected labels from 0 to 255, got {labels.min()} to {labels.max()} "
                             f"for {name}")  # fmt: skip
        path = self.mask_path(name)
        _stay_within(self.masks, path)
        self._remove_stale()
        files.write(path, _png(labels.astype(np.uint8)))

    def load_mask(self, name: str) -> np.ndarray:
        """(H, W) uint8; also masks of other tools, with labels as grey values, indices or VOC's colours."""
        if not self.has_mask(name):
            raise FileNotFoundError(f"Store.load_mask: expected a mask of {name}, got no {self.mask_path(name)}")
        return read_mask(self.mask_path(name))

    def record(self, name: str, **facts) -> None:
        """Appends what is known of an image to metrics.jsonl; any number of processes may do so."""
        files.append(self.folder / METRICS, {"name": name, **facts})

    def metrics(self) -> dict[str, dict]:
        """name -> its last facts."""
        return _last(self.folder / METRICS)

    def fail(self, name: str, reason: str | None, **facts) -> None:
        """Appends why an image could not be made to failures.jsonl; None: it has been made since."""
        files.append(self.folder / FAILURES, {"name": name, "error": reason, **facts})

    def failures(self) -> dict[str, str]:
        """name -> reason, of the images that have failed and were not made since."""
        found = _last(self.folder / FAILURES)
        return {name: facts["error"] for name, facts in found.items() if facts.get("error") is not None}

    def deaths(self) -> dict[str, int]:
        """name -> how many processes died with it, of the images that have failed for that."""
        found = _last(self.folder / FAILURES)
        return {name: facts["deaths"] for name, facts in found.items() if isinstance(facts.get("deaths"), int)}

    def follow(self) -> tuple[files.Tail, files.Tail]:
        """The facts and the failures that are recorded from now on, by any process."""
        return files.Tail(self.folder / METRICS), files.Tail(self.folder / FAILURES)

    def has_results(self) -> bool:
        """Whether there are maps or masks, whoever made them."""
        return any(
            path.suffix in (*SUFFIXES.values(), ".png") for base in (self._maps, self.masks) for path in _walk(base)
        )

    def clear(self, *kinds: str) -> None:
        """Removes what is of these kinds ("maps", "steps", "masks"), facts and failures, and last the configuration,
        which says whose they are if this is cut off."""
        places = {"maps": (self._maps, {*SUFFIXES.values()}), "steps": (self._steps, {".npz"}),
                  "masks": (self.masks, {".png"})}  # fmt: skip
        for base, suffixes in map(places.__getitem__, kinds):
            for path in _walk(base):
                if path.suffix in suffixes:
                    path.unlink(missing_ok=True)
        for name in (METRICS, FAILURES, EVALUATION, CONFIG):
            (self.folder / name).unlink(missing_ok=True)

    def _remove_stale(self) -> None:
        """What killed runs left half written; once, before the first file is written."""
        if self._is_tidy:
            return
        self._is_tidy = True
        for base in {self._maps, self._steps, self.masks}:
            for path in _walk(base):
                with contextlib.suppress(FileNotFoundError):  # another process was first
                    if path.name.endswith(files.PARTIAL) and time.time() - path.stat().st_mtime > _STALE:
                        path.unlink()


def enlarged(maps: Maps) -> Maps:
    """In float32; high_res enlarged from cam (cams.enlarge_cams) where it is not kept."""
    keys, cam, high_res, size = maps
    if high_res is None:
        high_res = enlarge_cams(cam, size).numpy()
    return Maps(keys, None if cam is None else cam.float(), high_res.astype(np.float32, copy=False), size)


def open_maps(folder: str | os.PathLike, format: str = "auto") -> Store:
    """The maps of a run's folder, or of a folder that map files lie in; auto: in the format that they have."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"open_maps: expected a folder of maps, got {folder}, which is none")
    flat = not (folder / "maps").is_dir() or any(path.suffix in SUFFIXES.values() for path in folder.iterdir())
    if format != "auto":
        return Store(folder, format, flat=flat)
    base, examples = folder if flat else folder / "maps", {}
    for path in _walk(base):
        if path.suffix in SUFFIXES.values():
            examples.setdefault(path.suffix, path)
    if len(examples) > 1:
        raise ValueError(f"open_maps: expected maps of one format, got {examples['.npz']} and {examples['.npy']}; say "
                         f"which: npz, irn or pmm")  # fmt: skip
    if ".npy" not in examples:
        return Store(folder, "npz", flat=flat)
    for name in _names(base, ".npy"):
        content = _read(base / f"{name}.npy")
        if content:
            return Store(folder, "irn" if "high_res" in content else "pmm", flat=flat)
    return Store(folder, "pmm", flat=flat)  # which alone hold nothing for images without classes


def open_masks(folder: str | os.PathLike) -> Store:
    """The masks of a run's folder, or of a folder that NAME.png lie in."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"open_masks: expected a folder of masks, got {folder}, which is none")
    return Store(folder, flat=not (folder / "masks").is_dir() or any(p.suffix == ".png" for p in folder.iterdir()))


def _place(base: Path, name: str, suffix: str) -> Path:
    parts = f"{name}{suffix}".split("/")
    check_name(name, "Store")
    longest = max(len(os.fsencode(part)) for part in parts)
    if longest > files.LONGEST_NAME:
        raise ValueError(f"Store: expected names of at most {files.LONGEST_NAME} bytes with {suffix}, got {longest} "
                         f"in {name[:40]}...; rename the image")  # fmt: skip
    return base / f"{name}{suffix}"


def _stay_within(base: Path, path: Path) -> None:
    """Folders below may be links, but not to places outside."""
    if path.parent != base and not path.parent.resolve().is_relative_to(base.resolve()):
        raise ValueError(f"Store: expected a place within {base}, got {path}, which a link leads out to "
                         f"{path.parent.resolve()}; remove the link")  # fmt: skip


def _is_there(path: Path) -> bool:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0


def _walk(base: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(base):
        yield from (Path(folder, name) for name in names)


def _names(base: Path, suffix: str) -> list[str]:
    found = (path for path in _walk(base) if path.suffix == suffix and _is_there(path))
    return sorted(path.relative_to(base).as_posix().removesuffix(suffix) for path in found)


def _last(path: Path) -> dict[str, dict]:
    found = {}
    for facts in files.lines(path):
        name = facts.pop("name", None)
        if isinstance(name, str):
            found[name] = facts
    return found


def _png(labels: np.ndarray) -> bytes:
    """With VOC's palette. Rows are stored as differences to the row above: label maps shrink best so."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = labels.shape
    rows = np.empty((height, width + 1), np.uint8)
    rows[:, 0], rows[0, 1:] = 2, labels[0]
    np.subtract(labels[1:], labels[:-1], out=rows[1:, 1:])
    head = struct.pack(">2I5B", width, height, 8, 3, 0, 0, 0)
    return b"".join((b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", head), chunk(b"PLTE", VOC_PALETTE.tobytes()),
                     chunk(b"IDAT", zlib.compress(rows, 6)), chunk(b"IEND", b"")))  # fmt: skip


def _npz(name: str, keys: Tensor, cam: Tensor, high_res: np.ndarray | None, size: tuple[int, int]) -> memoryview:
    with np.errstate(over="ignore"):
        arrays = {"keys": keys.numpy(), "cam": cam.numpy().astype(np.float16), "size": np.array(size, np.int64)}
        if high_res is not None:
            arrays["high_res"] = high_res.astype(np.float16)
    for kind in ("cam", "high_res"):
        values = arrays.get(kind)
        if values is not None and values.size and not 0 <= values.min() <= values.max() <= 1:  # nor NaN
            raise ValueError(f"Store.save: expected {kind} in [0, 1], got {values.min()} to {values.max()} for {name}; "
                             f"divide maps by their maximum, or use irn")  # fmt: skip
    return _archive(arrays)


def _archive(arrays: dict[str, np.ndarray]) -> memoryview:
    """As np.savez_compressed writes it, at zlib's lowest level: higher ones take longer and save nothing on maps."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for kind, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
            # a ZipInfo's date is fixed: the same maps give the same bytes
            archive.writestr(zipfile.ZipInfo(f"{kind}.npy"), content.getbuffer(), zipfile.ZIP_DEFLATED, 1)
    return file.getbuffer()


def _again(read: Callable[[], Any], tries: int = 20):
    """What it returns. NumPy has headers of arrays read by Python's parser, in which threads of Python 3.11 and 3.12
    stumble over one another now and then (SystemError, python/cpython#106905): the next attempt succeeds."""
    for _ in range(tries - 1):
        try:
            return read()
        except SystemError:
            pass
    return read()


def _arrays(path: Path, op: str, *names: str, optional: str | None = None) -> list[np.ndarray | None]:
    """Of an .npz; and the optional one, or None."""

    def read() -> list[np.ndarray | None]:
        with np.load(path, allow_pickle=False) as content:
            found = [content[name] for name in names]
            return found if optional is None else [*found, content[optional] if optional in content.files else None]

    try:
        return _again(read)
    except OSError:
        raise
    except Exception as error:  # a broken archive can raise any
        reason = files.first_line(error)
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        raise ValueError(f"Store.{op}: expected arrays {listed} in an .npz, got {path}: {reason}; remove it "
                         f"and make it again") from error  # fmt: skip


def _from_npz(path: Path) -> Maps:
    keys, cam, size, high_res = _arrays(path, "load", "keys", "cam", "size", optional="high_res")
    fits = keys.ndim == 1 and keys.dtype.kind in "iu" and size.shape == (2,) and size.dtype.kind in "iu"
    size = tuple(size.tolist()) if fits else ()
    fits = fits and min(size) > 0 and cam.dtype.kind == "f"
    fits = fits and cam.shape == (len(keys), *(-(-side // 4) for side in size))
    if not fits or (high_res is not None and (high_res.shape != (len(keys), *size) or high_res.dtype.kind != "f")):
        shapes = [None if array is None else array.shape for array in (keys, cam, high_res)]
        raise ValueError(f"Store.load: expected maps of {len(keys)} classes, strided ones a quarter of the size "
                         f"{size}, got keys {shapes[0]}, cam {shapes[1]}, high_res {shapes[2]} in {path}; remove "
                         f"it and make it again")  # fmt: skip
    return Maps(torch.from_numpy(keys.astype(np.int64)), torch.from_numpy(cam), high_res, size)


def _from_irn(content: dict, path: Path) -> Maps:
    if not {"keys", "cam", "high_res"} <= content.keys():
        advice = "; open the store with format='pmm'" if all(_whole(key) for key in content) else ""
        raise ValueError(f"Store.load: expected IRN's keys, cam and high_res, got {_some(content)} in {path}{advice}")
    try:
        keys = torch.as_tensor(content["keys"]).long()
        cam = torch.as_tensor(content["cam"])
        high_res = torch.as_tensor(content["high_res"]).float().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Store.load: expected tensors and arrays, got {path}: {error}") from error
    if keys.ndim != 1 or high_res.ndim != 3 or cam.ndim != 3 or not len(keys) == len(high_res) == len(cam):
        raise ValueError(f"Store.load: expected a map for each key, got keys {tuple(keys.shape)}, cam "
                         f"{tuple(cam.shape)} and high_res {high_res.shape} in {path}; remove it and "
                         f"make it again")  # fmt: skip
    return Maps(keys, cam, high_res, high_res.shape[1:])


def _from_pmm(content: dict, path: Path) -> Maps:
    planes = list(content.values())
    if not all(_whole(key) for key in content):
        advice = "; open the store with format='irn'" if "high_res" in content else ""
        raise ValueError(f"Store.load: expected PMM's {{class: map}}, got {_some(content)} in {path}{advice}")
    if not all(isinstance(plane, np.ndarray) and plane.ndim == 2 and plane.dtype.kind == "f" for plane in planes) or (
        len({plane.shape for plane in planes}) > 1
    ):
        raise ValueError(
            f"Store.load: expected maps (H, W) of one size, got others in {path}; remove it and make it again"
        )
    high_res = np.stack(planes) if planes else np.zeros((0, 0, 0), np.float16)
    return Maps(torch.tensor([int(key) for key in content], dtype=torch.long), None, high_res, high_res.shape[1:])


def _whole(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _some(content: dict) -> str:
    names = [str(key)[:40] for key in content]
    return f"{', '.join(names[:4]) or 'nothing'}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


class _Pickler(pickle._Pickler):
    """Names numpy's modules as numpy 1 did, which numpy 2 reads too: IRN's and PMM's tools run with either."""

    def save_global(self, obj, name=None):
        module = getattr(obj, "__module__", None) or ""
        if not module.startswith("numpy._core"):
            return super().save_global(obj, name)
        self.save(module.replace("numpy._core", "numpy.core", 1))
        self.save(name or obj.__qualname__)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)


def _npy(content: dict) -> memoryview:
    """As np.save writes an object."""
    array, file = np.array(content, dtype=object), io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    _Pickler(file, protocol=4).dump(array)
    return file.getbuffer()


def _storage(data: bytes):
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _bytes(text: str, encoding: str = "latin1") -> bytes:
    """How Python's older pickles hold bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text of encoding {encoding}")
    return text.encode("latin1")


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _bytes,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _storage,
}
_NUMPY = np._core if hasattr(np, "_core") else np.core
for _module, _name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer")):
    for _package in ("numpy.core", "numpy._core"):
        _ALLOWED[f"{_package}.{_module}", _name] = getattr(getattr(_NUMPY, _module), _name)


class _Unpickler(pickle.Unpickler):
    """Builds arrays, tensors and plain Python values, and nothing else."""

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which maps have no use for")
        return _ALLOWED[module, name]


def _read(path: Path) -> dict:
    def read():
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
            if shape != () or not dtype.hasobject:
                raise ValueError(f"it holds an array of {dtype} {shape}")
            return _Unpickler(file).load()

    try:
        content = _again(read)
        content = content.item() if isinstance(content, np.ndarray) and content.shape == () else content
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        size = path.stat().st_size
        for key, value in content.items():
            if getattr(value, "nbytes", 0) > size:  # by strides of 0, or never filled
                raise ValueError(f"{key} has {value.nbytes} bytes, more than the file's {size}")
        return content
    except OSError:
        raise
    except Exception as error:  # a pickle can raise any
        reason = files.first_line(error)
        raise ValueError(f"Store.load: expected a dict of maps as np.save writes it, got {path}: {reason}; "
                         f"remove it and make it again") from error  # fmt: skip

"""Class maps of images as files that IRN's and PMM's tools read, written whole or not at all; and facts about them."""

import collections
import io
import json
import logging
import os
import pickle
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("ribfast")
FORMATS = ("irn", "pmm")
_PARTIAL, _RECORDS = ".partial", "records.jsonl"
_STALE = 3600  # seconds: no file takes that long to write, so its writer was killed


class Maps(NamedTuple):
    """keys (n,) int64: 0-based classes; cam (n, ceil(H / 4), ceil(W / 4)) float, None in pmm's; high_res (n, H, W)."""

    keys: Tensor
    cam: Tensor | None
    high_res: np.ndarray


class MapStore:
    """Class maps by image name in a folder; names with slashes lie in folders below it.

    "irn": NAME.npy holds a pickled dict of keys (LongTensor), cam (float tensor) and high_res (float32 array).
    "pmm": NAME.npy holds a pickled dict {class: float16 array (H, W)}; without classes the size is not kept.
    A file is complete once it has its name, so `name in store` says what a resumed run may skip. Several processes may
    write into one folder. Reading runs nothing that a pickle holds.
    """

    def __init__(self, folder: str | os.PathLike, format: str = "irn"):
        if format not in FORMATS:
            raise ValueError(f"MapStore: expected a format of {', '.join(FORMATS)}, got {format!r}")
        self.folder, self.format = Path(folder), format
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"MapStore: expected a folder, got {self.folder}, a file; choose another place")
        for path in self.folder.rglob(f".*{_PARTIAL}"):  # of killed runs
            try:
                if time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()
            except FileNotFoundError:  # another process was first
                pass

    def path(self, name: str) -> Path:
        if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"MapStore: expected a relative name without `..`, got {name!r}")
        return self.folder / f"{name}.npy"

    def __contains__(self, name: str) -> bool:
        try:
            return self.path(name).stat().st_size > 0 and self.path(name).is_file()
        except (FileNotFoundError, NotADirectoryError):
            return False

    def names(self) -> list[str]:
        """Sorted."""
        paths = (path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.npy"))
        return sorted(name for path in paths if (name := path.removesuffix(".npy")) in self)

    def save(self, name: str, keys, cam, high_res) -> None:
        """Tensors or arrays; cam may be None for pmm. Replaces what is there."""
        path, keys, high_res = self.path(name), torch.as_tensor(keys), torch.as_tensor(high_res)
        keys, high_res = keys.detach().cpu().long().clone(), high_res.detach().cpu().float().numpy()
        if keys.ndim != 1 or len(keys.unique()) != len(keys) or (keys < 0).any():
            raise ValueError(f"MapStore.save: expected keys (n,), each class once, got {keys.tolist()} for {name}")
        if high_res.ndim != 3 or len(high_res) != len(keys) or not np.isfinite(high_res).all():
            raise ValueError(f"MapStore.save: expected finite high_res ({len(keys)}, H, W), got {high_res.shape} of "
                             f"{high_res.min(initial=0)} to {high_res.max(initial=0)} for {name}")  # fmt: skip
        if self.format == "irn":
            cam = None if cam is None else torch.as_tensor(cam).detach().cpu().float()
            expected = (len(keys), *(-(-side // 4) for side in high_res.shape[1:]))
            if cam is None or tuple(cam.shape) != expected:
                shape = None if cam is None else tuple(cam.shape)
                raise ValueError(f"MapStore.save: expected cam of shape {expected}, got {shape} for {name}")
            # clones: a view would be written with everything that it is a view of
            content = {"keys": keys, "cam": cam.clone(memory_format=torch.contiguous_format), "high_res": high_res}
        else:
            with np.errstate(over="ignore"):
                content = {key: plane.astype(np.float16) for key, plane in zip(keys.tolist(), high_res, strict=True)}
            if not all(np.isfinite(plane).all() for plane in content.values()):
                raise ValueError(f"MapStore.save: expected maps below 65504, as pmm's are float16, got "
                                 f"{high_res.max()} for {name}; divide them by their maximum or use irn")  # fmt: skip
        if path.is_dir():
            raise ValueError(f"MapStore.save: expected no folder at {path}; remove it or choose another folder")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"MapStore.save: expected a folder for {path}, got a file in its place; choose "
                             f"another folder") from error  # fmt: skip
        partial = path.with_name(f".{path.name}.{os.urandom(8).hex()}{_PARTIAL}")
        try:
            with open(partial, "wb") as file:
                _write(file, content)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def load(self, name: str) -> Maps:
        path = self.path(name)
        if name not in self:
            raise FileNotFoundError(f"MapStore.load: expected maps of {name}, got no {path}")
        content = _read(path)
        if self.format == "irn":
            return _from_irn(content, path)
        return _from_pmm(content, path)

    def record(self, name: str, **facts) -> None:
        """Appends what is known of an image to records.jsonl; any number of processes may do so."""
        line = json.dumps({"name": name, **facts}, default=_plain).encode() + b"\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / _RECORDS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a killed run's half line, which ends here
                line = b"\n" + line
            if os.write(descriptor, line) != len(line):
                raise OSError(f"MapStore.record: the disk took a part of the line for {name} in {self.folder}")
        finally:
            os.close(descriptor)

    def records(self) -> dict[str, dict]:
        """name -> its last facts; lines that a killed run left half written are passed over."""
        path, found = self.folder / _RECORDS, {}
        for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else (), 1):
            try:
                if line:
                    facts = json.loads(line)
                    found[facts.pop("name")] = facts
            except (ValueError, KeyError, TypeError, AttributeError):
                log.warning("passed over line %d of %s, which is no whole record", number, path)
        return found


def _plain(value):
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"MapStore.record: expected facts that JSON knows, got a {type(value).__name__}")


def _from_irn(content: dict, path: Path) -> Maps:
    if not {"keys", "cam", "high_res"} <= content.keys():
        advice = "; open the store with format='pmm'" if all(_whole(key) for key in content) else ""
        raise ValueError(
            f"MapStore.load: expected IRN's keys, cam and high_res, got {_some(content)} in {path}{advice}"
        )
    try:
        keys = torch.as_tensor(content["keys"]).long()
        cam = torch.as_tensor(content["cam"])
        high_res = torch.as_tensor(content["high_res"]).float().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"MapStore.load: expected tensors and arrays, got {path}: {error}") from error
    if keys.ndim != 1 or high_res.ndim != 3 or cam.ndim != 3 or not len(keys) == len(high_res) == len(cam):
        raise ValueError(f"MapStore.load: expected a map for each key, got keys {tuple(keys.shape)}, cam "
                         f"{tuple(cam.shape)} and high_res {high_res.shape} in {path}; make it again")  # fmt: skip
    return Maps(keys, cam, high_res)


def _from_pmm(content: dict, path: Path) -> Maps:
    planes = list(content.values())
    if not all(_whole(key) for key in content):
        advice = "; open the store with format='irn'" if "high_res" in content else ""
        raise ValueError(f"MapStore.load: expected PMM's {{class: map}}, got {_some(content)} in {path}{advice}")
    if not all(isinstance(plane, np.ndarray) and plane.ndim == 2 and plane.dtype.kind == "f" for plane in planes) or (
        len({plane.shape for plane in planes}) > 1
    ):
        raise ValueError(f"MapStore.load: expected maps (H, W) of one size, got others in {path}; make it again")
    high_res = np.stack(planes).astype(np.float32) if planes else np.zeros((0, 0, 0), np.float32)
    return Maps(torch.tensor([int(key) for key in content], dtype=torch.long), None, high_res)


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


def _write(file, content: dict) -> None:
    """As np.save writes an object."""
    array = np.array(content, dtype=object)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    _Pickler(file, protocol=4).dump(array)


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
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = header(file)
            if shape != () or not dtype.hasobject:
                raise ValueError(f"it holds an array of {dtype} {shape}")
            content = _Unpickler(file).load()
        content = content.item() if isinstance(content, np.ndarray) and content.shape == () else content
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except OSError:
        raise
    except Exception as error:  # a pickle can raise any
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"MapStore.load: expected a dict of maps as np.save writes it, got {path}: {reason}; "
                         f"make it again") from error  # fmt: skip

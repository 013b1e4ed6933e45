"""What trainings are given: label maps by the images' names, weights that fit, and digests of these."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from .. import data, files, models
from ..data.decode import read_mask
from ..processes import Processes, together

Labels = Callable[[str], np.ndarray] | Mapping[str, np.ndarray] | str | Path


def reader(op: str, source: data.Source, labels: Labels) -> Callable[[str], np.ndarray]:
    """An image's (H, W) uint8 by its name: from a function, a mapping, or a folder of NAME.png."""
    if callable(labels):
        return labels
    if isinstance(labels, Mapping):
        place, missing = "the mapping", [item.name for item in source if item.name not in labels]
    else:
        place = folder = Path(labels)
        missing = [item.name for item in source if not (folder / f"{item.name}.png").is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{op}: expected labels of {len(source)} images in {place}, got none of "
                         f"{', '.join(missing[:3])}{more}; make them first")  # fmt: skip
    return labels.__getitem__ if isinstance(labels, Mapping) else lambda name: read_mask(folder / f"{name}.png")


def look(
    op: str,
    source: data.Source,
    labels: Callable[[str], np.ndarray] | None,
    workers: int,
    here: Processes,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    masked: bool = True,
) -> data.Scan:
    """Decodes every image and mask and raises all that is wrong with them, in all processes, each of which looks at its
    share. labels: None: the source's own masks. masked: False: none at all."""
    items, first = source[here.rank :: here.world], here.rank == 0  # which also says that there are none at all
    share = dataclasses.replace(source, items=items)
    if not masked:
        bare = tuple(dataclasses.replace(item, mask=None) for item in items)
        share = dataclasses.replace(source, items=bare, drawings={})
    mine = data.scan(share, labels, required=masked, workers=workers, progress=progress) if items or first else None
    parts = [part for part in together(here, mine) if part is not None]
    found = dataclasses.replace(
        parts[0], images=len(source), masks=sum(part.masks for part in parts),
        pixels=sum(part.pixels for part in parts), problems=tuple(p for part in parts for p in part.problems),
    )  # fmt: skip
    found.check(op)
    return found


def digests(source: data.Source, weights: str | Path | None, **labels: Labels | None) -> dict[str, str]:
    """Of the images and their classes, of the weights' file, if there is one, and of the files that labels are read
    from; labels=None: the source's own. Of a function or a mapping nothing is known."""
    found = {"data": source.digest()}
    for name, given in labels.items():
        if given is None:
            found[name] = "own " + _of_files(item.mask for item in source if item.mask is not None)
        elif isinstance(given, (str, Path)):
            found[name] = _of_files(Path(given) / f"{item.name}.png" for item in source)
    return found | of_weights(weights)


def of_weights(path: str | Path | None, name: str = "weights") -> dict[str, str]:
    """The digest of a file by its name here; nothing where none is given."""
    if path is None:
        return {}
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: expected a file, got {path}, which is none")
    return {name: files.digest(Path(path))}


def changed(mine: dict[str, str], known: Mapping[str, str]) -> list[str]:
    """The inputs that an earlier run, by its metadata, had otherwise."""
    return [name for name, digest in mine.items() if known.get(name, digest) != digest]


def check_weights(op: str, weights: str | Path, mine: Mapping[str, str], role: str = "") -> None:
    """Refuses weights that were trained here as another network's, or on pixels of another form. role: what the fields
    of that network begin with, or are."""
    known = models.read_metadata(weights)
    for name in ("network", "normalization", "tensorflow_padding"):
        if known.get(name, mine[name]) != mine[name]:
            field = name if not role else role if name == "network" else f"{role}_{name}"
            raise ValueError(f"{op}: expected weights for {field} {mine[name]}, got {weights}, trained with "
                             f"{known[name]}; set {field} to that")  # fmt: skip


def _of_files(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(files.digest(path).encode())
    return total.hexdigest()

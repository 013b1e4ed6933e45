"""What a folder of results began with: its config.json, and what is refused in it."""

import argparse
import os
from pathlib import Path

from . import __version__, config, files

# fields of how a run is put to work, which change no result
INDIFFERENT = ("shard", "workers", "device", "batch", "cache_mib", "concurrency", "graphs")
# what --overwrite removes of a command's --out: what that command alone makes there
MADE = {"cam": ("maps",), "rib": ("maps", "steps"), "masks": ("masks",), "predict": ("masks",)}
UNKNOWN = {"command": "another program"}  # in `before`: results that --keep found without a config.json


def begin(
    options: argparse.Namespace, settings, indifferent: tuple[str, ...] | None = None, write: bool = True, **inputs
) -> None:
    """Writes OUT/config.json: the configuration, the inputs (files by their digests) and the command line.

    An OUT that another command began is refused, and one whose files would be taken for the data's. indifferent: the
    fields that do not change results; with it, an OUT whose config.json differs in others, or was made from other
    inputs, or that holds results and no config.json, is refused, for its files would be taken for this run's; unless
    --keep says that they may (what OUT began with stays in its config.json, under `before`), or --overwrite that they
    go, which this command alone must have made. write=False: refuses, and does nothing else.
    """
    path = options.out / "config.json"
    refuse_another_command(options, keep=indifferent is not None)
    inputs = {name: files.digest(value) if isinstance(value, Path) else value for name, value in inputs.items()}
    before, new = {}, indifferent is not None and not path.is_file()
    if new and _has_unknown_results(options):
        if not getattr(options, "keep", False):
            raise ValueError(f"expected an empty --out or a run's, got {options.out}, with maps or masks and no "
                             f"config.json that says whose; choose another --out"
                             f"{', or say --keep to add to them' * hasattr(options, 'keep')}")  # fmt: skip
        before = {"before": [UNKNOWN]}
    if indifferent is not None and getattr(options, "overwrite", False):
        _clear(options, settings)
    elif indifferent is not None and path.is_file():
        there = _read_run(path)
        found = config.differences(settings, there.get("config", {}), indifferent)
        others = {"command": options.command, **inputs}
        known = {"command": there.get("command", options.command), **there.get("inputs", {})}
        found += [f"{name} (here {_short(value)}, there {_short(known[name])})" for name, value in others.items()
                  if known.get(name, value) != value]  # fmt: skip
        if found and not getattr(options, "keep", False):
            advice = ", or say --keep to mix both" * hasattr(options, "keep")
            advice += ", or --overwrite to make all anew" * hasattr(options, "overwrite")
            raise config.AnotherRun(f"expected to go on in {options.out} as it began, got another {', '.join(found)}; "
                                    f"choose another --out{advice}", found)  # fmt: skip
        before = {"before": [*there.pop("before", []), *([there] if found else [])]}
    if write:  # each process, before its first result: nobody waits for the one that writes it
        words = {name: v for name, v in vars(options).items() if not name.startswith("field_") and v is not None}
        before = {name: value for name, value in before.items() if value}
        if not config.write(path, settings, new, command=options.command, ribfast=__version__, options=words,
                            inputs=inputs, **before):  # fmt: skip
            begin(options, settings, indifferent, **inputs)  # another process began meanwhile, perhaps otherwise


def refuse_another_command(options: argparse.Namespace, keep: bool = False) -> None:
    """And an OUT among the data's files. keep: --keep may say that another command's is meant."""
    if getattr(options, "data", None) is not None:
        _refuse_data_folder(options)
    path = options.out / "config.json"
    there = _read_run(path).get("command", options.command) if path.is_file() else options.command
    if there != options.command and not (keep and getattr(options, "keep", False)):
        raise ValueError(f"expected an --out of its own, or one that `{options.command}` began, got {options.out}, "
                         f"which `{there}` began; choose another --out")  # fmt: skip


def _refuse_data_folder(options: argparse.Namespace) -> None:
    """What is written there would be taken for the data's images and masks, or removed as if it were a run's."""
    from .data import places_of

    (root, *read), out = (place.resolve() for place in places_of(options.data)), options.out.resolve()
    own = [out / kind for kind in ("maps", "steps", "masks")]
    if out == root or any(out.is_relative_to(place) for place in read) or any(root.is_relative_to(p) for p in own):
        raise ValueError(f"expected an --out apart from the data, got {options.out}, whose files would be taken for "
                         f"those of {options.data}; choose another --out")  # fmt: skip


def _has_unknown_results(options: argparse.Namespace) -> bool:
    from .store import CONFIG, Store

    # looked for once more: another process may have begun this run meanwhile
    return options.out.is_dir() and Store(options.out).has_results() and CONFIG not in os.listdir(options.out)


def run_of(folder: Path) -> dict:
    """What tells the run in a folder from others: its command, configuration and inputs; nothing if there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    there = _read_run(path)
    settings = {name: value for name, value in there.get("config", {}).items() if name not in INDIFFERENT}
    return {"command": there.get("command"), "config": settings, "inputs": there.get("inputs", {})}


def _read_run(path: Path) -> dict:
    there = files.read_object(path)
    if there is None:
        raise ValueError(f"expected a run's configuration in {path}, got no JSON object; choose another --out")
    return there


def _short(value) -> str:
    text = value[:12] if isinstance(value, str) and len(value) == 64 else str(value)  # digests
    return text if len(text) <= 120 else f"{text[:117]}..."


def _clear(options: argparse.Namespace, settings) -> None:
    from .processes import rank_and_world

    if getattr(settings, "shard", None) is not None or rank_and_world()[1] > 1:
        raise ValueError("expected one process for --overwrite, got several, which would remove one another's files; "
                         "run it by one, or choose another --out")  # fmt: skip
    clear(options)


def clear(options: argparse.Namespace) -> None:
    """Removes what a command made in its OUT, which it must have begun and have for itself."""
    from .claims import Claims
    from .store import CLAIMS, Store

    if Claims(options.out / CLAIMS).is_alive():
        raise ValueError(f"expected nobody at work in {options.out}, got others, whose files would be removed; wait "
                         f"for them, or choose another --out")  # fmt: skip
    path = options.out / "config.json"
    before = _read_run(path).get("before", []) if path.is_file() else []
    others = [run.get("command") for run in before if run.get("command", options.command) != options.command]
    if others:
        raise ValueError(f"expected --overwrite of what `{options.command}` made alone, got {options.out}, where "
                         f"`{options.command}` went on with files of {others[0]}; choose another --out")  # fmt: skip
    Store(options.out).clear(*MADE.get(options.command, ()))

"""Configurations: frozen dataclasses with presets, filled from JSON and from the words of a command line.

A field's type says what it takes: bool, int, float, str, Path, Literal, a tuple of these, or one of them or None. Its
help is metadata["help"], else the comment on its line, else the one above it; metadata["each"], how a value looks, lets
its option be repeated. A preset is a classmethod without arguments.
"""

import ast
import dataclasses
import inspect
import io
import json
import os
import textwrap
import tokenize
import types
import typing
from collections.abc import Mapping
from pathlib import Path

from . import files

_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}


class ConfigError(ValueError):
    """A preset, a field or a value that a configuration does not have."""


class AnotherRun(ValueError):
    """What lies where results are to be was made otherwise. found: what was, by name."""

    def __init__(self, text: str, found: list[str]):
        super().__init__(text)
        self.found = found


def presets(kind: type) -> list[str]:
    """The names of a configuration's presets, in the order in which they are written."""
    found = {}
    for base in reversed(kind.__mro__):
        for name, member in vars(base).items():
            if isinstance(member, classmethod) and not name.startswith("_"):
                wanted = inspect.signature(getattr(kind, name)).parameters.values()
                if all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in wanted):
                    found[name] = None
    return list(found)


def make(kind: type, values: Mapping | None = None, preset: str | None = None):
    """The preset (or the defaults) with the values of some fields replaced; values as JSON has them."""
    if preset is not None and preset not in presets(kind):
        known = ", ".join(presets(kind)) or "none"
        raise ConfigError(f"{kind.__name__}: expected a preset of {known}, got {preset!r}")
    types_, fitted = hints(kind), {}
    for name, value in (values or {}).items():
        if name not in types_:
            raise ConfigError(f"{kind.__name__}: expected fields of {', '.join(types_)}, got {name!r}")
        try:
            fitted[name] = fit(types_[name], value)
        except ValueError as error:
            raise ConfigError(f"{kind.__name__}: {name}: {error}") from None
    return dataclasses.replace(kind() if preset is None else getattr(kind, preset)(), **fitted)


def read(path: str | os.PathLike) -> dict:
    """Fields from a JSON file: an object of them, or what `write` wrote."""
    if not Path(path).exists():  # a pipe is no file and can be read
        raise ConfigError(f"config: expected a JSON file of fields, got no {path}; check the path")
    try:
        values = json.loads(Path(path).read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config: expected JSON, got {path}: {files.first_line(error)}") from error
    if isinstance(values, dict) and isinstance(values.get("config"), dict):
        values = values["config"]
    if not isinstance(values, dict):
        raise ConfigError(f"config: expected an object of fields, got a {type(values).__name__} in {path}")
    return values


def write(path: Path, config, new: bool = False, **beside) -> bool:
    """The configuration, and what else a run began with, as JSON; whole or not at all. new: as in files.write."""
    text = json.dumps({**beside, "config": plain(config)}, indent=2, default=str) + "\n"
    # results that outlived it could be mixed with another run's
    return files.write(path, text.encode(), lasting=True, new=new)


def plain(config) -> dict:
    """A configuration's fields as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def differences(config, other: Mapping, without: tuple[str, ...] = ()) -> list[str]:
    """`field (here x, there y)` for each field, apart from `without`, that another run had otherwise."""
    return [
        f"{name} (here {value}, there {other[name]})"
        for name, value in plain(config).items()
        if name not in without and name in other and other[name] != value
    ]


def check_choices(config) -> None:
    """Raises where a field holds none of its type's choices, as a constructor alone lets it."""
    for name, hint in hints(type(config)).items():
        choices = [arm for arm in _arms(hint) if typing.get_origin(arm) is typing.Literal]
        if choices:
            try:
                fit(hint, getattr(config, name))
            except ValueError as error:
                raise ConfigError(f"{type(config).__name__}: {name}: {error}") from None


def hints(kind: type) -> dict:
    """The types of a configuration's fields by name."""
    known = typing.get_type_hints(kind)
    return {field.name: known[field.name] for field in dataclasses.fields(kind) if field.init}


def fit(hint, value):
    """A value as JSON has it -> as the field has it; ValueError if it is none of the type's."""
    arms, wrong = _arms(hint), f"expected {describe(hint)}, got {value!r}"
    if len(arms) > 1:
        for arm in arms:
            try:
                return fit(arm, value)
            except ValueError:
                pass
        raise ValueError(wrong)
    if hint is type(None):
        fits = value is None
    elif typing.get_origin(hint) is typing.Literal:
        fits = any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    elif typing.get_origin(hint) is tuple:
        kinds = _elements(hint, len(value)) if isinstance(value, (list, tuple)) else None
        if kinds is None:
            raise ValueError(wrong)
        return tuple(fit(kind, part) for kind, part in zip(kinds, value, strict=True))
    elif hint is Path:
        fits, value = isinstance(value, (str, Path)), Path(value) if isinstance(value, str) else value
    elif hint is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if fits else value
    elif hint in _KINDS:
        fits = type(value) is hint
    else:
        raise TypeError(f"config: expected a field of a type that JSON has, got {hint}")
    if not fits:
        raise ValueError(wrong)
    return value


def parse(hint, text: str):
    """A word of a command line -> a value of the type; tuples are separated by commas, None is written none."""
    arms = _arms(hint)
    if type(None) in arms and text.lower() == "none":
        return None
    for arm in arms:
        if arm is not type(None):
            try:
                return _parse(arm, text)
            except ValueError:
                pass
    raise ValueError(f"expected {describe(hint)}, got {text!r}")


def _parse(hint, text: str):
    if typing.get_origin(hint) is typing.Literal:
        choices = {str(choice): choice for choice in typing.get_args(hint)}
        return choices[text] if text in choices else fit(hint, text)
    if typing.get_origin(hint) is tuple:
        parts = [part.strip() for part in text.strip("()[]").split(",")] if text.strip("()[] ") else []
        kinds = _elements(hint, len(parts))
        if kinds is None:
            raise ValueError(text)
        return tuple(parse(kind, part) for kind, part in zip(kinds, parts, strict=True))
    if hint is bool:
        return fit(hint, {"true": True, "false": False}.get(text.lower()))
    return fit(hint, hint(text))


def describe(hint) -> str:
    """A type in words."""
    arms = _arms(hint)
    if len(arms) > 1:
        return " or ".join("none" if arm is type(None) else describe(arm) for arm in arms)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if parts[-1] is Ellipsis:
            return f"a list of {describe(parts[0]).partition(' ')[2]}s"
        return f"{len(parts)} values ({', '.join(describe(part) for part in parts)})"
    return _KINDS.get(hint, str(hint))


def comments(kind: type) -> dict[str, str]:
    """What is written beside or above each field, by field."""
    found = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # made without a file
            continue
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        said = {token.start: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        beside = {line: text for (line, column), text in said.items() if source.split("\n")[line - 1][:column].strip()}
        alone = {line: text for (line, _), text in said.items() if line not in beside}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                text = [beside[line] for line in range(node.lineno, node.end_lineno + 1) if line in beside]
                line = node.lineno - 1
                while (not text and line in alone) or (text and line in alone and line + 1 in alone):
                    text.insert(0, alone[line])
                    line -= 1
                if text:
                    found[node.target.id] = " ".join(text)
    for field in dataclasses.fields(kind):
        if "help" in field.metadata:
            found[field.name] = field.metadata["help"]
    return found


def repeated(kind: type) -> dict[str, str]:
    """The fields whose option is given once for each of their values, and how a value looks: metadata["each"]."""
    return {field.name: field.metadata["each"] for field in dataclasses.fields(kind) if "each" in field.metadata}


def _arms(hint) -> list:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return list(typing.get_args(hint))
    return [hint]


def _elements(hint, count: int) -> tuple | None:
    """The type of each of a tuple's elements; None if it does not have so many."""
    parts = typing.get_args(hint)
    if len(parts) == 2 and parts[1] is Ellipsis:
        return (parts[0],) * count
    return parts if len(parts) == count else None

"""The commands: `ribfast COMMAND --help`, or `python -m ribfast`.

A command is an entry in COMMANDS: its line of help, the configuration whose fields become options, what else it asks
for, and a function of both.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import io
import json
import logging
import os
import shlex
import signal
import sys
import threading
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __version__, config
from .begin import INDIFFERENT, begin, clear, refuse_another_command, run_of
from .errors import is_expected
from .progress import Progress, duration

log = logging.getLogger("ribfast")
# exit codes beside 0 and argparse's 2: nothing more can be made; some images could not be; interrupted, terminated
FAILED, INCOMPLETE, INTERRUPTED, TERMINATED = 1, 3, 130, 143
RESUMING = {"resume", "keep", "dry_run"}  # options of commands that go on with what is there


@dataclasses.dataclass(frozen=True)
class Command:
    """config: "module:Class", imported for this command alone, or one for each of its methods, the first the default,
    or None. run returns the exit code; None is success."""

    help: str
    config: str | dict[str, str] | None
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Any], int | None]
    preset: str | None = None  # what runs when nothing is said; None: the configuration's first


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ribfast",
        description="From image-level labels to segmentation masks.",
        epilog="commands:\n" + "".join(f"  {name:<18}{command.help}\n" for name, command in COMMANDS.items())
        + "\n`ribfast COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"ribfast {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="its options")
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        return 2
    chosen = parser.parse_args(argv)
    options = argparse.Namespace(debug="--debug" in chosen.options)
    handler = _log_to_stderr("--quiet" in chosen.options)
    _read_fields.cache_clear()
    before = _heed_termination()
    try:
        options, settings = _parse(chosen.command, chosen.options)
        return COMMANDS[chosen.command].run(options, settings) or 0
    except KeyboardInterrupt as stop:
        instead = " in place of --overwrite" * getattr(options, "overwrite", False)
        again = "the same command" + f" with --resume{instead}" * (getattr(options, "resume", True) is False)
        log.error("interrupted%s", f"; {again} goes on where it was" if RESUMING & vars(options).keys() else "")
        return TERMINATED if stop.args == (signal.SIGTERM,) else INTERRUPTED
    except BrokenPipeError:  # whoever read standard output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if not options.debug and _is_lost_peer(error):
            log.error("ribfast %s: another process ended, and said why; the same command goes on", chosen.command)
            return FAILED
        if options.debug or not is_expected(error):
            raise
        said = getattr(error, "filename", None) is None and getattr(error, "strerror", None)  # a reason and no number
        log.error("ribfast %s: %s", chosen.command, said or str(error) or type(error).__name__)
        return FAILED
    finally:
        log.removeHandler(handler)
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _heed_termination():
    """Schedulers and torchrun end processes by SIGTERM: as Ctrl-C, so that what they had in hand is free at once.
    Returns what was done before; None in a thread, which cannot change that."""

    def stop(number, frame):
        raise KeyboardInterrupt(number)

    return signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None


def _is_lost_peer(error: Exception) -> bool:
    if "torch" not in sys.modules:  # which takes seconds to import
        return False
    from .processes import is_lost_peer

    return is_lost_peer(error)


def _parse(name: str, words: list[str]) -> tuple[argparse.Namespace, Any]:
    """A command's options and its configuration."""
    parser, kind = _parser_of(name, words)
    options = parser.parse_args(words)
    options.command = name
    try:
        return options, None if kind is None else _make_config(kind, options, COMMANDS[name].preset)
    except ValueError as error:
        if options.debug:
            raise
        parser.error(str(error))


def _parser_of(name: str, words: list[str]) -> tuple[argparse.ArgumentParser, type | None]:
    command, kind = COMMANDS[name], None
    parser = argparse.ArgumentParser(
        prog=f"ribfast {name}", description=_sentence(command.help), allow_abbrev=False,
    )  # fmt: skip
    command.arguments(parser)
    parser.usage = f"ribfast {name} {_needed(parser)}[OPTIONS]"
    parser.add_argument("--quiet", action="store_true", help="say only what went wrong")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    if command.config is not None:
        methods = command.config if isinstance(command.config, dict) else {}
        place = methods[_method_of(methods, words)] if methods else command.config
        module, _, kind_name = place.partition(":")
        kind = getattr(importlib.import_module(module), kind_name)
        _add_config(parser, kind, tuple(methods), command.preset)
    return parser, kind


def _needed(parser: argparse.ArgumentParser) -> str:
    """What a command line must say: options, one of several, positions."""
    groups = [group._group_actions for group in parser._mutually_exclusive_groups if group.required]
    found = []
    for action in parser._actions:
        group = next((group for group in groups if action in group), [action] if action.required else [])
        if group and action is group[0]:
            shown = " | ".join(" ".join([*each.option_strings[:1], each.metavar or "{" + ",".join(each.choices) + "}"])
                               for each in group)  # fmt: skip
            found.append(f"({shown}) " if len(group) > 1 else f"{shown} ")
    return "".join(found)


def _method_of(methods: dict[str, str], words: list[str]) -> str:
    """What the options say, else their --config, else the first. Of several options, each is for some methods."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--method")
    first.add_argument("--config", type=Path)
    try:
        known, _ = first.parse_known_args(words)
        method = known.method or (known.config and _read_fields(known.config).get("method"))
    except (argparse.ArgumentError, ValueError, OSError):  # which the command's own parser will say
        method = None
    return method if isinstance(method, str) and method in methods else next(iter(methods))


@functools.lru_cache(1)  # a pipe can be read once
def _read_fields(path: Path) -> dict:
    return config.read(path)


def _log_to_stderr(quiet: bool) -> logging.Handler:
    """Lines in place of the bar, if there is one; of several processes the first one's alone, and warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(("\r\x1b[K" if sys.stderr.isatty() else "") + "%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO if _first() and not quiet else logging.WARNING)
    return handler


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _progress(title: str = "") -> Progress | None:
    return Progress(title=title) if log.isEnabledFor(logging.INFO) else None


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _add_config(
    parser: argparse.ArgumentParser, kind: type, methods: tuple[str, ...] = (), default: str | None = None
) -> None:
    """methods: of whose classes kind is one. default: the command's own preset."""
    group = parser.add_argument_group("configuration", "preset, then --config, then single fields")
    names, preset = config.presets(kind), _preset(kind, default)
    if names:
        shown = f"{', '.join(names)} (default: {preset})"
        group.add_argument("--preset", choices=names, help=shown)
    group.add_argument("--config", type=Path, metavar="FILE", help="JSON of fields, such as a run's config.json")
    said, each, base = config.comments(kind), config.repeated(kind), config.make(kind, preset=preset)
    for name, hint in config.hints(kind).items():
        option, default = "--" + name.replace("_", "-"), getattr(base, name)
        if name == "method" and methods:  # of which a class has one
            hint, default = typing.Literal[methods], methods[0]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else "none" if default is None else default
        text = f"{said.get(name, '')} (default: {shown})".strip().replace("%", "%%")
        common = {"dest": "field_" + name, "default": argparse.SUPPRESS, "help": text}
        if name in each:
            group.add_argument(option, action="append", metavar=each[name], **common | {"help": said[name]})
        elif hint is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, **common)
        else:
            words = ",".join(map(str, typing.get_args(hint))) if typing.get_origin(hint) is typing.Literal else ""
            metavar = f"{{{words}}}" if words else name.rpartition("_")[2].upper()
            group.add_argument(option, type=_parser(hint), metavar=metavar, **common)


def _preset(kind: type, default: str | None) -> str | None:
    """What is taken where options name none: the command's own, else the first."""
    return default or next(iter(config.presets(kind)), None)


def _parser(hint):
    def parse(text: str):
        try:
            return config.parse(hint, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _make_config(kind, options: argparse.Namespace, default: str | None = None):
    values = _read_fields(options.config) if options.config is not None else {}
    words = {name.removeprefix("field_"): v for name, v in vars(options).items() if name.startswith("field_")}
    words |= {name: [*values.get(name, ()), *words[name]] for name in config.repeated(kind) if name in words}
    return config.make(kind, values | words, getattr(options, "preset", None) or _preset(kind, default))


def _data_arguments(parser: argparse.ArgumentParser, none: str = "") -> None:
    """none: what is taken without --data, which may then be missing."""
    text = "folder:PATH, voc:PATH or coco:PATH" + f" (default: {none})" * bool(none)
    parser.add_argument("--data", required=not none, metavar="KIND:PATH", help=text)
    parser.add_argument("--split", metavar="NAME", help="a list of the data's images (default: its training images)")


def _classifier_arguments(parser: argparse.ArgumentParser) -> None:
    _data_arguments(parser)
    parser.add_argument("--validation", metavar="NAME", help="a split whose loss and mAP follow every epoch")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="the backbone to start from, .pth or .safetensors")
    parser.add_argument("--adversary-weights", type=Path, metavar="FILE", help="with --method eader: the adversary's")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for classifier.safetensors")
    _resume_arguments(parser, "whole epoch")


def _train_classifier(options: argparse.Namespace, settings) -> None:
    from .data import open_source
    from .train import train_classifier, train_eader

    if settings.method != "eader" and options.adversary_weights is not None:
        raise ValueError(f"expected --adversary-weights with --method eader, got --method {settings.method}")
    source = open_source(options.data, options.split)
    validation = None if options.validation is None else open_source(options.data, options.validation)
    training = functools.partial(train_classifier, source, settings)
    if settings.method == "eader":
        training = functools.partial(train_eader, source, settings, adversary_weights=options.adversary_weights)
    _train(options, settings, functools.partial(training, validation=validation, scanned=_stage_progress("scan")))


def _train(options: argparse.Namespace, settings, training: Callable[..., Path]) -> None:
    """config.json is written once the training has found nothing wrong with what it was given."""
    refuse_another_command(options)
    path = training(out=options.out, weights=options.weights, resume=options.resume, overwrite=options.overwrite,
                    progress=_progress(), begun=lambda inputs: begin(options, settings, **inputs))  # fmt: skip
    log.info("wrote %s", path)


def _resume_arguments(parser: argparse.ArgumentParser, after: str) -> None:
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help=f"go on after the last {after} in --out")
    again.add_argument("--overwrite", action="store_true", help="train anew in an --out where a training is")


def _cam_arguments(parser: argparse.ArgumentParser) -> None:
    _data_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="a trained classifier")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for maps/NAME.npz of each image")
    _again_arguments(parser)
    parser.add_argument("--network", metavar="NAME", help="of a checkpoint that does not say (default: by its tensors)")
    parser.add_argument(
        "--tensorflow-padding", action=argparse.BooleanOptionalAction, default=None, help="as the checkpoint says"
    )
    parser.add_argument("--normalization", choices=("imagenet", "symmetric"), help="as the checkpoint says")


def _again_arguments(parser: argparse.ArgumentParser) -> None:
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--keep", action="store_true", help="go on in an --out that began otherwise; its files stay")
    again.add_argument("--overwrite", action="store_true", help="remove what was made in --out, make all of it anew")
    parser.add_argument("--json", action="store_true", help="say on standard output what became of the images")


def _rib_arguments(parser: argparse.ArgumentParser) -> None:
    _cam_arguments(parser)
    parser.add_argument("--others", metavar="NAME", help="the split that the other images are drawn from (--split's)")


def _cam(options: argparse.Namespace, settings) -> int:
    from .pipeline import make_cams

    source, model = _open(options)
    begin(options, settings, INDIFFERENT, checkpoint=options.checkpoint, classifier=model.metadata())
    return _make_maps(options, settings, make_cams, source, model, keep=options.keep)


def _rib(options: argparse.Namespace, settings) -> int:
    from .data import open_source
    from .pipeline import adapt_maps
    from .processes import choose_device
    from .rib import resolve_precision

    source, model = _open(options)
    others = source if options.others is None else open_source(options.data, options.others)
    begin(
        options, settings, INDIFFERENT,
        checkpoint=options.checkpoint, classifier=model.metadata(), images=source.digest(), others=others.digest(),
        arithmetic=resolve_precision(settings.precision, choose_device(settings.device)),
    )  # fmt: skip
    return _make_maps(options, settings, adapt_maps, source, model, others=others)


def _open(options: argparse.Namespace) -> tuple:
    """(source, classifier)"""
    from .data import open_source
    from .models import open_classifier
    from .pipeline import check_classes

    source = open_source(options.data, options.split)
    model = open_classifier(
        options.checkpoint, network=options.network, n_classes=len(source.classes),
        tensorflow_padding=options.tensorflow_padding, normalization=options.normalization,
    )  # fmt: skip
    check_classes(options.command, source, model)
    return source, model


def _make_maps(options: argparse.Namespace, settings, stage: Callable, source, model, **more) -> int:
    from .store import Store

    store = Store(options.out, settings.format, high_res=settings.high_res)
    return _report(options, stage(source, model, store, settings, progress=_progress(), **more))


def _report(options: argparse.Namespace, result) -> int:
    elsewhere = f" here, {result.elsewhere} by other processes" if result.elsewhere else ""
    log.info("%d made%s, %d there before, %d without classes, %d failed; %s", result.made, elsewhere, result.kept,
             result.without_classes, len(result.failed), options.out)  # fmt: skip
    if options.json and _first():
        print(json.dumps(dataclasses.asdict(result), indent=2))
    return INCOMPLETE if result.failed else 0


def _masks_arguments(parser: argparse.ArgumentParser) -> None:
    _data_arguments(parser)
    parser.add_argument(
        "--maps", type=Path, required=True, metavar="FOLDER", help="a run's folder, or one of map files"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for masks/NAME.png")
    parser.add_argument(
        "--irn", type=Path, metavar="FILE", help="IRN's network, for method irn: train-irn's or its own"
    )
    parser.add_argument("--background-from", type=Path, metavar="FILE", help="evaluation.json whose threshold to take")
    _again_arguments(parser)


def _masks(options: argparse.Namespace, settings) -> int:
    from .data import open_source
    from .models import open_irn
    from .pipeline import make_masks, read_threshold
    from .processes import choose_device
    from .store import Store, open_maps

    if options.background_from is not None:
        if settings.method in ("ppmg", "labels"):
            raise ValueError(f"expected --background-from with a method that cuts maps at one threshold, got "
                             f"{settings.method}")  # fmt: skip
        settings = dataclasses.replace(settings, background=read_threshold(options.background_from))
    if (options.irn is None) != (settings.method != "irn"):
        raise ValueError(f"expected --irn with method irn, and with it alone, got method {settings.method} "
                         f"{'without' if options.irn is None else 'with'} --irn")  # fmt: skip
    source, maps = open_source(options.data, options.split), open_maps(options.maps)
    network = None if options.irn is None else open_irn(options.irn)
    choose_device(settings.device)  # or an error, before anything is written
    inputs = {} if options.irn is None else {"irn": options.irn}
    begin(options, settings, INDIFFERENT, maps=str(maps.folder.resolve()), run=run_of(maps.folder),
          images=source.digest(), **inputs)  # fmt: skip
    store = Store(options.out)
    return _report(options, make_masks(source, maps, store, settings, network=network, progress=_progress()))


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _data_arguments(parser)
    parser.add_argument(
        "--masks", type=Path, required=True, metavar="FOLDER", help="a run's folder, or one of NAME.png"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="for VOC2012/, or COCO's annotations/"
    )
    parser.add_argument(
        "--keep", action="store_true", help="add, say, another split to an --out that `export` began otherwise"
    )


def _export(options: argparse.Namespace, settings) -> None:
    from .data import open_source
    from .export import export
    from .store import open_masks

    refuse_another_command(options)
    if options.out.is_dir() and any(options.out.iterdir()) and not (options.out / "config.json").is_file():
        raise ValueError(f"expected an empty --out, or one that `export` began, got {options.out}, which holds other "
                         f"files; choose another --out")  # fmt: skip
    if settings.name is None and options.split is not None:
        settings = dataclasses.replace(settings, name=Path(options.split.rpartition(":")[2]).stem)
    source, masks = open_source(options.data, options.split), open_masks(options.masks)

    def start(write: bool = True) -> None:
        begin(options, settings, INDIFFERENT, write, masks=str(masks.folder.resolve()), run=run_of(masks.folder),
              images=source.digest())  # fmt: skip

    start(write=False)
    result = export(source, masks.load_mask, options.out, settings, begin=start, progress=_progress())
    log.info("%d images, %d of them encoded anew, %d renamed, %d annotations; %s", result.images, result.encoded,
             result.renamed, result.annotations, options.out)  # fmt: skip


def _irn_arguments(parser: argparse.ArgumentParser) -> None:
    _data_arguments(parser)
    parser.add_argument("--labels", type=Path, required=True, metavar="FOLDER",
                        help="confident labels: of masks --preset labels, or a folder of NAME.png")  # fmt: skip
    parser.add_argument("--weights", type=Path, metavar="FILE", help="the frozen backbone: ImageNet's, or a classifier")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for irn.safetensors")
    _resume_arguments(parser, "whole epoch")


def _train_irn(options: argparse.Namespace, settings) -> None:
    from .data import open_source
    from .store import open_masks
    from .train import train_irn

    source, labels = open_source(options.data, options.split), open_masks(options.labels).masks
    _train(options, settings, functools.partial(train_irn, source, labels, settings, scanned=_stage_progress("scan")))


def _segmenter_arguments(parser: argparse.ArgumentParser) -> None:
    _data_arguments(parser)
    parser.add_argument("--masks", type=Path, metavar="FOLDER",
                        help="a run's folder, or one of NAME.png (default: the data's own masks)")  # fmt: skip
    parser.add_argument("--validation", metavar="NAME", help="a split with masks, whose mIoU is looked at")
    parser.add_argument("--weights", type=Path, metavar="FILE",
                        help="the backbone to start from: ImageNet's, a classifier, deeplab-pytorch's")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for segmenter.safetensors")
    _resume_arguments(parser, "pause")
    parser.add_argument("--cycle", action="store_true",
                        help="PMM's: train, predict the training images, train again on these masks")  # fmt: skip
    parser.add_argument("--prediction", type=Path, metavar="FILE",
                        help="with --cycle: JSON of predict's fields (default: its preset multi)")  # fmt: skip


def _train_seg(options: argparse.Namespace, settings) -> None:
    from .data import open_source
    from .pipeline import PredictConfig, train_cycle
    from .store import open_masks
    from .train import train_segmenter

    if options.prediction is not None and not options.cycle:
        raise ValueError("expected --prediction with --cycle, got it alone")
    source = open_source(options.data, options.split)
    validation = None if options.validation is None else open_source(options.data, options.validation)
    labels = None if options.masks is None else open_masks(options.masks).masks
    given = dict(source=source, config=settings, labels=labels, validation=validation)
    if not options.cycle:
        _train(options, settings, lambda **more: train_segmenter(**given, **more, scanned=_stage_progress("scan")))
        return
    prediction = None
    if options.prediction is not None:
        prediction = config.make(PredictConfig, config.read(options.prediction), "multi")

    def cycle(progress, **more) -> Path:
        return train_cycle(**given, **more, prediction=prediction, progress=_stage_progress)

    _train(options, settings, cycle)


def _stage_progress(name: str) -> Progress | None:
    titles = {"scan": "looking at the data", "first": "training on these masks", "masks": "predicting the "
              "training images", "scan again": "looking at what was predicted", "last": "training on it"}  # fmt: skip
    return _progress(titles[name])


def _predict_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", type=Path, metavar="PATH", help="an image, or a folder of images")
    what.add_argument("--data", metavar="KIND:PATH", help="folder:PATH, voc:PATH or coco:PATH")
    parser.add_argument("--split", metavar="NAME", help="of --data: a list of its images (default: its training ones)")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE",
                        help="a trained segmenter: train-seg's, or deeplab-pytorch's")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for masks/NAME.png")
    _again_arguments(parser)


def _predict(options: argparse.Namespace, settings) -> int:
    from .data import open_images, open_source
    from .models import open_segmenter
    from .pipeline import check_classes, predict_masks
    from .processes import choose_device
    from .store import Store

    if options.images is not None and (settings.known or options.split is not None):
        raise ValueError("expected --data with --known and with --split, got --images, of which no classes are known")
    model, beside = open_segmenter(options.checkpoint), {}
    if options.images is not None:
        if options.out.resolve().is_relative_to(options.images.resolve()):
            raise ValueError(f"expected an --out beside the photographs, got {options.out} in {options.images}, whose "
                             f"masks would be taken for photographs")  # fmt: skip
        classes = model.classes or tuple(f"class {number}" for number in range(model.n_classes))
        source, beside["photographs"] = open_images(options.images, classes), str(options.images.resolve())
    else:
        source = open_source(options.data, options.split)
    check_classes("predict", source, model)
    choose_device(settings.device)  # or an error, before anything is written
    begin(options, settings, INDIFFERENT, checkpoint=options.checkpoint, images=source.digest(), **beside)
    made = predict_masks(source, model, Store(options.out), settings, progress=_progress())
    return _report(options, made)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    _data_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for a folder of each stage")
    _stages_arguments(parser)


def _stages_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--validation", metavar="NAME", help="the split to predict (default: --split's images)")
    parser.add_argument("--weights", type=Path, metavar="FILE",
                        help="the backbone to start from, such as torchvision's of ImageNet, .pth or .safetensors "
                        "(default: random weights, which a few hundred photographs hardly train)")  # fmt: skip
    parser.add_argument("--classifier", type=Path, metavar="FILE", help="a trained one, in place of the first stage")
    parser.add_argument("--remake", action="store_true",
                        help="make anew what --out holds made otherwise, and what follows from it")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the stages' command lines, and run none")
    parser.add_argument("--verbose", action="store_true", help="show the stages' command lines and eval's tables")
    parser.add_argument("--json", action="store_true", help="print mIoU of the stages for programs, and nothing else")


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    _data_arguments(parser, none="pictures, which are drawn")
    out = "for the pictures and a folder of each stage (default: demo)"
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="FOLDER", help=out)
    parser.add_argument("--pictures", type=_parser(int), metavar="N",
                        help="drawn to train on, and a quarter as many to validate on (default: 160)")  # fmt: skip
    _stages_arguments(parser)


def _demo(options: argparse.Namespace, settings) -> int:
    """`run` on pictures that are drawn, or, as it would be run on photographs, on --data."""
    from .data import synthetic
    from .processes import rank_and_world
    from .run import Facts

    if options.data is not None:
        if options.pictures is not None:
            raise ValueError("expected --pictures without --data, got both")
        return _run(options, _make_config(type(settings), options, "shown"))
    if options.split is not None or options.validation is not None:
        raise ValueError("expected --split and --validation with --data, got them for pictures that are drawn")
    if (world := rank_and_world()[1]) > 1:
        raise ValueError(f"expected one process to draw pictures, got {world}; give --data, or run it by one")
    folder, count = options.out / "pictures", 160 if options.pictures is None else options.pictures
    synthetic.check(count)
    refuse_another_command(options)
    options.data, options.split, options.validation = f"folder:{folder}", "train", "val"
    if options.dry_run:
        settings = _fit_classifier(options, settings, len(synthetic.CLASSES))
        return _print_plan(options, settings, Facts(count, True, True))
    wanted = {"pictures": count, "seed": settings.seed}
    known = synthetic.drawn(folder) or {}
    there = {"pictures": known.get("training", count), "seed": known.get("seed", settings.seed)}
    found = [f"{name} (here {wanted[name]}, there {there[name]})" for name in wanted if wanted[name] != there[name]]
    if found and not options.remake:
        raise ValueError(f"expected to go on with the pictures of {folder}, got another {', '.join(found)}; say "
                         f"--remake to draw others and make all anew, or choose another --out")  # fmt: skip
    if found or not (folder / synthetic.LAST).is_file():
        log.info("drawing pictures of %s", ", ".join(synthetic.CLASSES))
        synthetic.draw(folder, training=count, validation=count // 4, seed=settings.seed)
    return _run(options, settings)


def _fit_classifier(options: argparse.Namespace, settings, n_classes: int):
    """The configuration with --classifier's network, which options may name, too."""
    from .runner import fit_classifier

    if options.classifier is None:
        return settings
    chosen = {name.removeprefix("field_") for name in vars(options) if name.startswith("field_")}
    return fit_classifier(options.classifier, settings, n_classes, chosen)


def _run(options: argparse.Namespace, settings) -> int:
    """The stages' commands; their images that fail are left out and said in the exit code."""
    from .runner import Data, Runner, check

    refuse_another_command(options)
    given = _given(options)
    sources = Data.open(given)
    settings = _fit_classifier(options, settings, len(sources.split.classes))
    if options.dry_run:
        return _print_plan(options, settings, sources.facts())
    stages = _Stages(options, settings.fields())
    check(given, settings, sources, stages)
    if given.weights is None and given.classifier is None and settings.size != "tiny":
        log.warning("no --weights: networks begin at random and learn from these %d images alone; ImageNet's, such as "
                    "torchvision's, do far better", len(sources.split))  # fmt: skip
    origin = {"images": sources.split.digest()}
    if sources.validation is not None:
        origin["images to predict"] = sources.validation.digest()
    named = {name: value for name in ("weights", "classifier") if (value := getattr(given, name)) is not None}

    def begin_run() -> None:
        _refuse_another_origin(options, origin)
        begin(options, settings, **origin, **named)

    found = Runner(given, settings, sources, stages, remake=options.remake).run(begin_run)
    if _first():
        _print_stages(options, found)
    return 0 if found.complete else INCOMPLETE


def _refuse_another_origin(options: argparse.Namespace, origin: dict) -> None:
    """Lists of a run's images that were made of another data set; stages look after themselves."""
    known = run_of(options.out).get("inputs", {})
    found = [name for name, value in origin.items() if known.get(name, value) != value]
    if found and not options.remake:
        raise ValueError(f"expected to go on in {options.out} as it began, got another {', '.join(found)}; say "
                         f"--remake to make all anew, or choose another --out")  # fmt: skip


class _Stages:
    """The commands that `run` goes through: runner.Commands."""

    def __init__(self, options: argparse.Namespace, fields: dict[str, dict[str, str]]):
        self.verbose, self.json, self.fields = options.verbose, options.json, fields

    def settings(self, stage, line: list[str]):
        if stage.name in self.fields:
            kind = _parser_of(stage.command, line)[1]
            own = sorted({*config.hints(kind)} - {"shard"})  # of `run`, processes share
            if unknown := sorted(self.fields[stage.name].keys() - {*own}):
                raise ValueError(f"expected --set {stage.name}.FIELD=VALUE with a field of {', '.join(own)}, got "
                                 f"{', '.join(unknown)}")  # fmt: skip
        return _parse(stage.command, line)[1]

    def run(self, stage, line: list[str]) -> bool:
        options, settings = _parse(stage.command, line)
        if self.verbose:
            log.info("ribfast %s %s", stage.command, shlex.join(line))
        quiet = self.json or not self.verbose
        with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
            return bool(COMMANDS[stage.command].run(options, settings))

    def clear(self, stage, line: list[str]) -> None:
        clear(_parse(stage.command, line)[0])

    def progress(self, title: str) -> Progress | None:
        return _progress(title)


def _given(options: argparse.Namespace):
    from .run import Given

    return Given(*(getattr(options, name) for name in Given._fields))


def _print_plan(options: argparse.Namespace, settings, facts) -> int:
    from .run import stages

    given = _given(options)
    known = _Stages(options, settings.fields())
    for stage in stages(given, settings, facts):
        line = stage.line(given)
        known.settings(stage, line)
        print("ribfast", stage.command, shlex.join(line))
    return 0


def _print_stages(options: argparse.Namespace, outcome) -> None:
    """mIoU of what eval looked at, and what RIB adds to it."""
    report, parts = options.out / "report.html", outcome.evaluated
    found = {name: json.loads((options.out / name / "evaluation.json").read_text("utf-8")) for name in parts}
    mious = {name: each["reported"]["miou"] for name, each in found.items()}
    if options.json:
        print(json.dumps({"mious": mious, "complete": outcome.complete, "report": str(report)}, indent=2))
        return
    log.info("done in %s", duration(outcome.seconds))
    if found:
        print("\nmIoU against ground truth; of maps at the threshold that is best on these images:")
    for name, each in found.items():
        unseen = ", which nothing was trained on" * (parts[name] == "validation")
        print(f"  {name:<12} {100 * mious[name]:6.2f}   {each['images']} images{unseen}")
    if {"cam", "rib"} <= mious.keys() and found["cam"]["images"] == found["rib"]["images"]:
        print(f"RIB's maps gain {100 * (mious['rib'] - mious['cam']):+.2f} points over the CAM")
    print("\n" * bool(found) + str(report))


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _data_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--maps", type=Path, metavar="FOLDER", help="a run's folder, or one of map files")
    what.add_argument("--masks", type=Path, metavar="FOLDER", help="a run's folder, or one of NAME.png")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for evaluation.json (default: --maps or --masks)")
    parser.add_argument("--threshold-from", type=Path, metavar="FILE", help="evaluation.json of the split to choose on")
    parser.add_argument("--json", action="store_true", help="print the result for programs")


def _evaluate(options: argparse.Namespace, settings) -> None:
    from .data import open_source
    from .pipeline import evaluate_maps, evaluate_masks, read_threshold
    from .store import open_maps, open_masks

    if options.masks is not None and options.threshold_from is not None:
        raise ValueError("expected --threshold-from with --maps, got --masks, which have no threshold")
    threshold = None if options.threshold_from is None else read_threshold(options.threshold_from)
    source, progress = open_source(options.data, options.split), _progress()
    if options.masks is None:
        store = open_maps(options.maps, settings.format)
        result = evaluate_maps(source, store, settings, threshold=threshold, progress=progress)
    else:
        result = evaluate_masks(source, open_masks(options.masks), settings, progress=progress)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        if options.masks is None:
            _print_thresholds(result)
        _print_classes(result)
    beside = {"data": options.data, "split": options.split, "maps": options.maps, "masks": options.masks}
    beside["threshold_from"] = options.threshold_from
    config.write((options.out or options.maps or options.masks) / "evaluation.json", settings, **beside, **result)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _data_arguments(parser)
    parser.add_argument("--stage", action="append", required=True, type=_named_path, metavar="NAME=FOLDER",
                        help="a run's folder, or one of map files or of NAME.png; once for each, in order")  # fmt: skip
    parser.add_argument("--threshold-from", action="append", default=[], type=_named_path, metavar="NAME=FILE",
                        help="of a stage of maps: evaluation.json of the split to choose its threshold on")  # fmt: skip
    parser.add_argument("--split-of", action="append", default=[], type=_named, metavar="NAME=SPLIT",
                        help="of a stage of other images than --split's, which the gallery lacks")  # fmt: skip
    parser.add_argument("--training", action="append", default=[], type=_named_path, metavar="NAME=FOLDER",
                        help="a training's folder, whose steps and time the page has; repeatable")  # fmt: skip
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="of `ribfast run`: the page has its configuration")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE",
                        help="the page, or a folder for report.html")  # fmt: skip


def _named(text: str, what: str = "SPLIT") -> tuple[str, str]:
    name, is_named, value = text.partition("=")
    if not is_named or not name or not value:
        raise argparse.ArgumentTypeError(f"expected NAME={what}, got {text!r}")
    return name, value


def _named_path(text: str) -> tuple[str, Path]:
    name, place = _named(text, "PATH")
    return name, Path(place)


def _make_report(options: argparse.Namespace, settings) -> None:
    from .data import open_source
    from .info import machine
    from .pipeline import read_threshold
    from .report import collect, open_stage, open_training, write_report

    names = [name for name, _ in options.stage]
    chosen, splits = dict(options.threshold_from), dict(options.split_of)
    for option, found in (("--threshold-from", chosen), ("--split-of", splits)):
        if not found.keys() <= {*names}:
            raise ValueError(f"expected {option} of stages {', '.join(names)}, got {', '.join(found)}")
    thresholds = {name: read_threshold(path) for name, path in chosen.items()}
    source = open_source(options.data, options.split)
    others = {split: open_source(options.data, split) for split in {*splits.values()}}
    stages = [
        open_stage(name, folder, settings.format, thresholds.get(name), splits.get(name), others.get(splits.get(name)))
        for name, folder in options.stage
    ]
    if settings.title is None:
        place = Path(options.data.partition(":")[2]).absolute().name
        title = f"{place}, {options.split}" if options.split else place
        settings = dataclasses.replace(settings, title=title)
    trainings = [open_training(name, folder) for name, folder in options.training]
    report = collect(source, stages, settings, trainings=trainings, run=options.run, machine=machine(),
                     progress=_progress())  # fmt: skip
    page = options.out / "report.html" if options.out.is_dir() else options.out
    write_report(page, report)
    log.info("wrote %s, %.1f MB", page, page.stat().st_size / 1e6)


def _print_thresholds(result: dict) -> None:
    best, at = result["best"]["threshold"], result["reported"]["threshold"]
    step = max(1, len(result["thresholds"]) // 12)
    print("threshold    mIoU")
    for number, (value, miou) in enumerate(zip(result["thresholds"], result["mious"], strict=True)):
        if number % step == 0 or value in (best, at):
            marks = "  best" * (value == best)
            marks += "  chosen on other images" * (value == at and result["reported"]["chosen"] == "elsewhere")
            print(f"{value:9.4g}  {100 * miou:6.2f}{marks}")
    if result["best"]["at_end"]:
        print(f"the best is the end of these thresholds and may lie beyond {best:.4g}: give --thresholds")
    print()


def _print_classes(result: dict) -> None:
    def percent(value: float | None) -> str:
        return "  none" if value is None else format(100 * value, "6.2f")

    at = f" at {result['reported']['threshold']:.4g}" if "threshold" in result["reported"] else ""
    unsure = f", {100 * result['unsure']:.2f} % of their pixels unsure" if result.get("unsure") else ""
    width = max(map(len, result["ious"]))
    print(f"{result['images']} images{at}{unsure}:\n  {'':<{width}}     IoU  precision  recall")
    for name, iou in result["ious"].items():
        precision, recall = result["precision"][name], result["recall"][name]
        print(f"  {name:<{width}}  {percent(iou)}     {percent(precision)}  {percent(recall)}")
    print(f"  {'mean':<{width}}  {percent(result['reported']['miou'])}")
    if result["interval"] is not None:
        low, high, confidence = (result["interval"][name] for name in ("low", "high", "confidence"))
        print(f"  {100 * confidence:g} % of {result['interval']['resamples']} resamples of the images: "
              f"{percent(low).strip()} to {percent(high).strip()}")  # fmt: skip


def _scan_arguments(parser: argparse.ArgumentParser) -> None:
    _data_arguments(parser)
    parser.add_argument("--masks", action="store_true", help="an image without a mask is a problem")
    parser.add_argument("--workers", type=_parser(int), default=2, metavar="N", help="threads that decode (default: 2)")
    parser.add_argument("--json", action="store_true", help="for programs")


def _scan(options: argparse.Namespace, settings) -> int:
    from .data import open_source, scan

    if options.workers < 1:
        raise ValueError(f"expected --workers of at least 1, got {options.workers}")
    source = open_source(options.data, options.split)
    found = scan(source, required=options.masks, workers=options.workers, progress=_progress())
    images, pixels = source.labels().sum(0).tolist(), found.pixels.tolist()
    if options.json:
        classes = {name: {"images": count, "pixels": own} for name, count, own in
                   zip(found.classes, images, pixels[1:-1], strict=True)}  # fmt: skip
        facts = {"images": found.images, "masks": found.masks, "background": pixels[0], "ignored": pixels[-1]}
        problems = [problem._asdict() for problem in found.problems]
        print(json.dumps(facts | {"classes": classes, "problems": problems}, indent=2))
    else:
        print(f"{found.images} images, {found.masks} with masks without problems")
        rows = [("background", None, pixels[0]), *zip(found.classes, images, pixels[1:-1], strict=True)]
        rows += [("ignored", None, pixels[-1])]
        width, total = max(len(name) for name, *_ in rows), max(1, sum(pixels))
        for name, count, own in rows:
            of_images = "" if count is None else f"{count} images"
            print(f"  {name:<{width}}  {of_images:>14}  {100 * own / total:6.2f} % of the pixels")
        for problem in found.problems:
            print(f"{problem.name}: {problem.reason}")
    return INCOMPLETE if found.problems else 0


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")


def _info(options: argparse.Namespace, settings) -> None:
    from . import info

    print(json.dumps(info.collect(), indent=2) if options.json else "\n".join(info.lines()))


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")


def _bench(options: argparse.Namespace, settings) -> None:
    from . import bench

    machine, rows = bench.run(settings, progress=_progress())
    if options.json:
        print(json.dumps({"machine": machine, "operators": [row._asdict() for row in rows]}, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"{'':<20} {'ms':>9}  {'times faster':>12}  {'difference':>10}  of        backend")
    for row in rows:
        print(f"{row.operator:<20} {row.milliseconds:9.3f}  {row.times_faster:12.1f}  {row.difference:10.1e}  "
              f"{row.scale:<8.1e}  {row.backend}: {row.what}")  # fmt: skip


def _completion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="whose script to print, to be run by it")


def _completion(options: argparse.Namespace, settings) -> None:
    """Of commands and options; of what has few values, these; of files where paths are meant."""
    from .completion import Option, script

    def offered(name: str) -> list[Option]:
        command, found = COMMANDS[name], {}
        for method in command.config if isinstance(command.config, dict) else ("",):
            parser, _ = _parser_of(name, ["--method", method] if method else [])
            for action in parser._actions:
                values = action.choices or (action.metavar or "").strip("{}").split(",") * (
                    "{" in (action.metavar or "")
                )
                for word in action.option_strings:
                    found[word] = Option(word, tuple(map(str, values)), _taken(action), action.help or "")
        return list(found.values())

    print(script(options.shell, {name: (command.help, offered(name)) for name, command in COMMANDS.items()}), end="")


def _taken(action: argparse.Action) -> str:
    """By completion.Option."""
    if action.nargs == 0:
        return ""
    if action.metavar == "KIND:PATH":
        return "data"
    return {Path: "path", _named_path: "named"}.get(action.type, "other")


def _toy_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for toy.png and toy.csv")
    parser.add_argument("--overwrite", action="store_true", help="replace what `toy` made otherwise in --out")


def _toy(options: argparse.Namespace, settings) -> None:
    from . import toy

    there = [options.out / name for name in (toy.TABLE, toy.FIGURE) if (options.out / name).exists()]
    if there and not (options.out / "config.json").is_file():
        raise ValueError(f"expected an empty --out, or one that `toy` began, got {options.out} with {there[0].name} "
                         f"and no config.json that says whose; choose another --out")  # fmt: skip
    begin(options, settings, ())
    toy.run(settings, options.out, progress=_progress())
    log.info("wrote %s and %s", options.out / toy.FIGURE, options.out / toy.TABLE)


COMMANDS = {
    "run": Command(
        "everything below, from photographs with labels to a trained segmenter's masks",
        "ribfast.run:RunConfig", _run_arguments, _run,
    ),
    "demo": Command(
        "run on pictures that are drawn: no data, no weights, some minutes on two cores",
        "ribfast.run:RunConfig", _demo_arguments, _demo, "drawn",
    ),
    "train-classifier": Command(
        "train a classifier on image-level labels",
        {"bce": "ribfast.train:ClassifierConfig", "eader": "ribfast.train:EaderConfig"},
        _classifier_arguments, _train_classifier,
    ),
    "cam": Command("class activation maps of a trained classifier", "ribfast.pipeline:CamConfig", _cam_arguments, _cam),
    "rib": Command(
        "class maps of a classifier that is adapted to each image", "ribfast.pipeline:AdaptConfig", _rib_arguments, _rib
    ),
    "train-irn": Command(
        "train IRN's network on confident labels", "ribfast.train:IrnConfig", _irn_arguments, _train_irn
    ),
    "masks": Command(
        "masks from class maps: by CRF, IRN's walk, PMM's generation, PAR", "ribfast.pipeline:MasksConfig",
        _masks_arguments, _masks,
    ),
    "train-seg": Command(
        "train a segmentation network on masks", "ribfast.train:SegmentationConfig", _segmenter_arguments, _train_seg
    ),
    "predict": Command(
        "masks of a trained segmentation network", "ribfast.pipeline:PredictConfig", _predict_arguments, _predict
    ),
    "eval": Command(
        "mIoU of class maps at every threshold, or of masks",
        "ribfast.pipeline:EvaluateConfig", _evaluate_arguments, _evaluate,
    ),
    "report": Command(
        "one page of what stages gained: mIoU, curves, classes, a gallery",
        "ribfast.report:ReportConfig", _report_arguments, _make_report,
    ),
    "export": Command(
        "masks as VOC's folder or as COCO's annotations, for other tools",
        "ribfast.export:ExportConfig", _export_arguments, _export,
    ),
    "scan": Command("every problem of a data set at once, and what it holds", None, _scan_arguments, _scan),
    "info": Command(
        "what was built, which backend serves each operator, and why", None, _info_arguments, _info
    ),
    "bench": Command(
        "the operators on this machine: times, and how far from the specification in plain torch",
        "ribfast.bench:BenchConfig", _bench_arguments, _bench,
    ),
    "completion": Command(
        "a shell's completion of commands and options", None, _completion_arguments, _completion
    ),
    "toy": Command(
        "the information bottleneck on drawn digits: where layers respond, what L_RIB gives back",
        "ribfast.toy:ToyConfig", _toy_arguments, _toy,
    ),
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())

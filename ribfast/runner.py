"""Going through a run's stages: which images each is given, what is there already, and what stands in the way.

Every stage is given all images that can be read. Those that fail in one fail in those that read its results too, and
are tried again by the next start; a training, which cannot take up images later, keeps to the list it began with.
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from . import config, data, files
from .claims import Claims
from .data.scan import SHOWN
from .errors import is_expected
from .processes import processes, rank_and_world, together
from .run import CUTTING, Facts, Given, RunConfig, Stage, stages
from .store import CLAIMS, CONFIG, FAILURES, Store, open_maps, open_masks

log = logging.getLogger("ribfast")
ALONE = ("eval", "report")  # commands that processes do not share, of images whose results are all there
BY_IMAGE = ("cam", "rib", "masks", "predict")  # commands that make a file of each image, and go on where one fails
LISTS = {"split": "images.txt", "validation": "images-validation.txt"}  # of the images that can be read
FAR = 0.05  # between where maps are cut and where that is best, of which the log speaks


class Commands(Protocol):
    """The commands that stages are."""

    def settings(self, stage: Stage, line: list[str]) -> Any:
        """The configuration that a stage's words make; raises what is wrong with them, and with --set."""

    def run(self, stage: Stage, line: list[str]) -> bool:
        """Whether some images failed."""

    def clear(self, stage: Stage, line: list[str]) -> None:
        """Removes what the command made, where nobody else is at it."""

    def progress(self, title: str) -> Callable[[int, int, str], None] | None:
        """What is shown of work that is no command's."""


class Outcome(NamedTuple):
    evaluated: dict[str, str]  # folders that eval looked at, and whose images these were: split or validation
    complete: bool  # no image was left out, none failed, none came too late
    seconds: float


class Data(NamedTuple):
    split: data.Source
    validation: data.Source | None

    @classmethod
    def open(cls, given: Given) -> "Data":
        validation = None if given.validation is None else data.open_source(given.data, given.validation)
        return cls(data.open_source(given.data, given.split), validation)

    def facts(self) -> Facts:
        return Facts(len(self.split), *(source is not None and bool(source.masked()) for source in self))


def fit_classifier(path: Path, settings: RunConfig, n_classes: int, chosen: set[str]) -> RunConfig:
    """With the network that a trained classifier is. chosen: the fields that were asked for, which must be its."""
    from .models import open_classifier

    model = open_classifier(path, n_classes=n_classes)
    own = {"network": model.name, "normalization": model.normalization, "tensorflow_padding": model.tensorflow_padding}
    for name in chosen & own.keys():
        if getattr(settings, name) != own[name]:
            raise ValueError(f"run: expected {name} as {path} has it, {own[name]}, got {getattr(settings, name)}; "
                             f"leave it out, or give another --classifier")  # fmt: skip
    return dataclasses.replace(settings, **own)


def check(given: Given, settings: RunConfig, sources: Data, commands: Commands) -> None:
    """Raises what would otherwise stop a stage hours later."""
    world, plan = rank_and_world()[1], stages(given, settings, sources.facts())
    if idle := sorted(settings.fields().keys() - {stage.name for stage in plan}):
        log.warning("--set of %s changes nothing: this run has no such stage", ", ".join(idle))
    for stage in plan:
        own = commands.settings(stage, stage.line(given))
        if stage.command.startswith("train-") and own.batch % world:
            raise ValueError(f"expected batches that {world} processes can share, got {own.batch} of {stage.name}; say "
                             f"--set {stage.name}.batch=N")  # fmt: skip
        if stage.command == "rib" and own.disjoint and own.n_others:
            _check_others(sources.split)


def _check_others(source: data.Source) -> None:
    """Whether there are images for RIB to draw."""
    labels = source.labels()
    sets = labels[labels.any(1)].unique(dim=0)
    if len(sets) and all((sets & own).any(1).all() for own in sets):
        raise ValueError("run: expected images that share no class with one another, for RIB to adapt them beside, got "
                         "none; say --set rib.disjoint=false, or --rib none")  # fmt: skip


class Runner:
    """remake: whether stages that were made otherwise are made anew, where they are otherwise refused."""

    def __init__(self, given: Given, settings: RunConfig, sources: Data, commands: Commands, *, remake: bool):
        self.given, self.settings, self.sources, self.commands = given, settings, sources, commands
        self.facts, self.remake, self.complete, self.evaluated = sources.facts(), remake, True, {}

    def run(self, begin: Callable[[], None]) -> Outcome:
        """begin: writes what the run began with."""
        start = time.monotonic()
        with processes(self.settings.device) as self.here, self._alone():
            self._shared(True, begin)
            self.lists = self._shared(self.first, self._sound)[0]
            self.complete = not any(self.lists.values())
            plan = stages(self.given, self.settings, self.facts)
            for number, stage in enumerate(plan, 1):
                log.info("[%d/%d] %s", number, len(plan), stage.name)
                self._go(stage)
            together(self.here)  # one that ends with an exit code ends the others
        return Outcome(self.evaluated, self.complete, time.monotonic() - start)

    @property
    def first(self) -> bool:
        return self.here.rank == 0

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other `run` in the same OUT meanwhile, which would train the same networks into the same files."""
        folder = self.given.out / CLAIMS
        claims = Claims(folder)

        def take() -> None:
            if not claims.take_from_the_dead("run"):
                whose = claims.describe(claims.owner("run"))
                raise ValueError(f"expected one run in {folder.parent}, got another that is at it, {whose}; wait for "
                                 "it, or choose another --out")  # fmt: skip
            claims.clear()

        try:
            self._shared(self.first, take)
            yield
        finally:
            claims.close()

    def _shared(self, makes: bool, work: Callable, *arguments) -> list:
        """What each process that makes it has made. An error of one is everybody's: none waits for another."""
        made, error = None, None
        try:
            made = work(*arguments) if makes else None
        except Exception as own:
            if not is_expected(own):
                raise
            error = own
        said = None if error is None else (str(error), getattr(error, "found", None))
        found = together(self.here, (made, said))
        if error is not None:
            raise error
        for _, said in found:
            if said is not None:
                raise ValueError(said[0]) if said[1] is None else config.AnotherRun(*said)
        return [each for each, _ in found]

    def _go(self, stage: Stage) -> None:
        line, whole, is_other = self._shared(self.first, self._line, stage)[0]
        self.complete &= whole
        if line is None:
            log.info("no image with a mask has results")
            return
        try:
            if is_other:
                raise config.AnotherRun("", ["list of images"])
            failed = self._made(stage, line)
        except config.AnotherRun as error:
            folder, found = self.given.out / stage.name, ", ".join(error.found)
            if not self.remake:
                raise ValueError(
                    f"expected to go on in {folder} as it began, got another {found}; say --remake to make "
                    f"{stage.name} and what follows from it anew, or choose another --out"
                ) from error
            log.info("made otherwise (another %s): made anew", found)
            failed = self._made(stage, self._anew(stage, line))
        if any(failed):
            self.complete = False
            self._shared(self.first, self._refuse_many, stage)
        if stage.command == "eval":
            self._look(stage)

    def _made(self, stage: Stage, line: list[str]) -> list[bool]:
        """Whether images failed, by process."""
        if not stage.command.startswith("train-"):
            return self._shared(self.first or stage.command not in ALONE, self.commands.run, stage, line)
        # processes wait for one another within a training: one that cannot go on ends, and the others see that
        try:
            return [self.commands.run(stage, line)]
        except FloatingPointError as error:
            lr = self.commands.settings(stage, line).lr
            raise FloatingPointError(f"{error}: --set {stage.name}.lr={lr / 3:.2g} --remake") from error

    def _anew(self, stage: Stage, line: list[str]) -> list[str]:
        """The words that replace what a stage has made."""
        if stage.command.startswith("train-"):
            return [*(word for word in line if word != "--resume"), "--overwrite"]
        self._shared(self.first, self.commands.clear, stage, line)
        return line

    # ---- images

    def _sound(self) -> dict[str, str | None]:
        """The lists of images that can be read, by split; None where all can."""
        out, lists = self.given.out, dict.fromkeys(LISTS)
        listed = {part: out / name for part, name in LISTS.items()}
        sources = {part: source for part, source in self.sources._asdict().items() if source is not None}
        if self.remake:
            for path in (*listed.values(), out / FAILURES):
                path.unlink(missing_ok=True)
        known = [(each["part"], data.Problem(each["name"], each["reason"])) for each in files.lines(out / FAILURES)]
        begins = [part for part in sources if not listed[part].is_file()]
        for part in begins:
            show = self.commands.progress("looking at the images" + " to predict" * (part == "validation"))
            found = data.scan(sources[part], required=False, workers=self.settings.workers, progress=show).problems
            known = [(own, problem) for own, problem in known if own != part] + [(part, problem) for problem in found]
        if begins and known:
            rows = (json.dumps(problem._asdict() | {"part": part}) + "\n" for part, problem in known)
            files.write(out / FAILURES, "".join(rows).encode())
        for part, source in sources.items():
            problems = [problem for own, problem in known if own == part]
            bad = {problem.name for problem in problems}
            if part in begins:
                good = [item.name for item in source if item.name not in bad]
                self._say_left_out(problems, len(bad), len(source))
                if not good:
                    raise ValueError(f"run: expected images that can be read, got {len(source)} that cannot; the "
                                     f"first: {problems[0].reason}")  # fmt: skip
                files.write(listed[part], _lines(good))
            elif bad:
                self._say_mended(source, bad)
            if bad:
                lists[part] = _split(self.given, part, listed[part])
        return lists

    def _say_left_out(self, problems: list[data.Problem], count: int, total: int) -> None:
        for problem in problems[:SHOWN]:
            log.warning("left out: %s: %s", *problem)
        if problems:
            log.warning("left out: %d of %d images; all in %s", count, total, self.given.out / FAILURES)

    def _say_mended(self, source: data.Source, bad: set[str]) -> None:
        """Of images that were left out as the run began."""
        few = dataclasses.replace(source, items=tuple(item for item in source if item.name in bad))
        still = {problem.name for problem in data.scan(few, required=False, workers=self.settings.workers).problems}
        mended = sorted(bad - still)
        log.warning("left out since the run began: %d of %d images; why is in %s", len(bad), len(source),
                    self.given.out / FAILURES)  # fmt: skip
        if mended:
            log.warning("%d of them can be read now (%s): say --remake to make all anew with them", len(mended),
                        ", ".join(mended[:SHOWN]))  # fmt: skip

    def _images(self, part: str) -> data.Source:
        """Those that can be read."""
        source = getattr(self.sources, part)
        if self.lists[part] is None:
            return source
        good = _listed_in(self.given.out / LISTS[part])  # not opened by it: COCO's annotations take long to read
        return dataclasses.replace(source, items=tuple(item for item in source if item.name in good))

    def _line(self, stage: Stage) -> tuple[list[str] | None, bool, bool]:
        """A stage's words, with a list of images where it is not given all of them, None if there are none to look at;
        whether no image came too late for it; and whether it is to be made anew, with other images."""
        listed, out, whole, is_other = self.lists[stage.part], self.given.out, True, False
        if stage.of and stage.command not in BY_IMAGE:
            source = self._images(stage.part)
            there, file = _with_results(source, [out / name for name in stage.of]), f"images-{stage.name}.txt"
            if stage.command in ALONE:
                if stage.command == "eval" and not there & {item.name for item in source.masked()}:
                    return None, whole, is_other
                file = f"images-{stage.of[-1]}-{stage.command}.txt"
            else:
                there, whole, is_other = self._kept(stage, out / file, source, there)
            listed = self._listed(stage, stage.part, there, file)
        line = stage.line(self.given, listed)
        if "--validation" in line:
            place, names = line.index("--validation"), {item.name for item in self._images("validation").masked()}
            split = self._listed(stage, "validation", names, "images-validation-with-masks.txt") if names else None
            line[place : place + 2] = [] if split is None else ["--validation", split]
        if "--split-of" in line:
            names = _with_results(self._images("validation"), [out / "predicted"])
            split = self._listed(stage, "validation", names, "images-predicted-report.txt")
            line[line.index("--split-of") + 1] = f"predicted={split}"
        return line, whole, is_other

    def _listed(self, stage: Stage, part: str, names: set[str], file: str) -> str | None:
        """A split of these of a part's images alone, by a list where they are not all."""
        source = self._images(part)
        if not names:
            raise ValueError(f"{stage.name}: expected images with results of {', '.join(stage.of)}, got none; "
                             f"failures.jsonl in their folders says why")  # fmt: skip
        if len(names) == len(source):
            return self.lists[part] or getattr(self.given, part)
        path = self.given.out / file
        files.write(path, _lines(item.name for item in source if item.name in names))
        return _split(self.given, part, path)

    def _kept(self, stage: Stage, path: Path, source: data.Source, there: set[str]) -> tuple[set[str], bool, bool]:
        """The images that a training began with, or begins with now; whether these are all that are there; and whether
        it is to begin anew, as others are."""
        if not (self.given.out / stage.name / CONFIG).is_file():
            path.unlink(missing_ok=True)
            return there, True, False
        began = _listed_in(path) if path.is_file() else {item.name for item in source}
        if there != began and self.remake:
            path.unlink(missing_ok=True)
            return there, True, True
        if gone := sorted(began - there):
            raise ValueError(f"{stage.name}: expected results of the images that it began with, got none of "
                             f"{', '.join(gone[:SHOWN])}; mend these (failures.jsonl says what failed), or say "
                             f"--remake to train it without them")  # fmt: skip
        if late := sorted(there - began):
            log.warning("%s was trained without %d of the images that are there now (%s): say --remake to make it and "
                        "what follows from it anew", stage.name, len(late), ", ".join(late[:SHOWN]))  # fmt: skip
        return began, not late, False

    def _refuse_many(self, stage: Stage) -> None:
        """Where more than half of the images fail, it is not the images that are at fault."""
        if stage.command not in BY_IMAGE:
            return
        names = {item.name for item in self._images(stage.part)}
        reasons = Store(self.given.out / stage.name).failures()
        failed = [(name, reason) for name, reason in reasons.items() if name in names]
        if 2 * len(failed) > len(names):
            raise ValueError(f"{stage.name}: expected few images to fail, got {len(failed)} of {len(names)}, the first "
                             f"of which is {failed[0][0]}: {failed[0][1]}; once that is mended, the same command goes "
                             f"on")  # fmt: skip

    # ---- results

    def _look(self, stage: Stage) -> None:
        """What eval found, in a line."""
        name = stage.of[0]
        found = json.loads((self.given.out / name / "evaluation.json").read_text("utf-8"))
        self.evaluated[name] = stage.part
        at = found["reported"].get("threshold")
        log.info("mIoU %.2f%s", 100 * found["reported"]["miou"], "" if at is None else f", cut at {at:.2f}")
        maps = "cam" if self.settings.rib == "none" else "rib"
        if name == maps and self.settings.masks in CUTTING and not self.settings.tuned:
            masks = next(s for s in stages(self.given, self.settings, self.facts) if s.name == "masks")
            own = self.commands.settings(masks, masks.line(self.given))
            if abs(own.background - at) > FAR:
                log.info("masks are cut at %.2f (--tuned: at %.2f, where these maps are best)", own.background, at)


def _with_results(source: data.Source, folders: list[Path]) -> set[str]:
    """Images of which each folder has what it makes, maps or masks. Images without classes have no maps."""
    there = {item.name for item in source}
    for folder in folders:
        if not folder.is_dir():
            return set()
        masks = (folder / "masks").is_dir()
        own = {*(open_masks(folder).mask_names() if masks else open_maps(folder).names())}
        there &= own if masks else own | {item.name for item in source if not item.classes}
    return there


def _listed_in(path: Path) -> set[str]:
    return {*path.read_text("utf-8").splitlines()}


def _lines(names) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


def _split(given: Given, part: str, listed: Path) -> str:
    """A list of a split's images, as --split takes it. COCO's splits are JSON, which lists only choose from."""
    before = getattr(given, part) or ""
    return f"{before.partition(':')[0]}:{listed}" if given.data.startswith("coco:") else str(listed)

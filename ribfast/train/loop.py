"""What trainings share: steps of SGD, shared by processes, a line of metrics.jsonl each, resumed after a pause."""

import contextlib
import functools
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, distributed, nn

from .. import config as configuration
from .. import data, models
from ..processes import Processes
from . import inputs
from .journal import Journal

log = logging.getLogger("ribfast")
UNFINISHED = "unfinished.safetensors"
INDIFFERENT = ("workers", "device", "cache_mib", "graphs")  # fields that may change when a training goes on
Progress = Callable[[int, int, str], None]
Begun = Callable[[dict[str, str]], None]


class Config(Protocol):
    """The fields that a training's configuration has at least."""

    network: str
    batch: int
    lr: float
    weight_decay: float
    momentum: float
    power: float
    tensorflow_padding: bool
    precision: str
    seed: int
    workers: int


class Schedule(NamedTuple):
    steps: int
    every: int  # steps from one pause to the next: there the state is saved, which a stopped training goes on from


class Task(Protocol):
    """What one kind of training has of its own."""

    name: str  # of its function, in errors
    checkpoint: str  # the file's name
    config: Config
    files: tuple[str, ...]  # what else it writes, which a new training in the same folder removes
    indifferent: tuple[str, ...]  # its own fields that may change when a training goes on
    inputs: dict[str, str]  # digests of what it must be given again to go on
    images: int  # how many there are
    parts: int  # of a process's share of a batch, computed one after another to save memory; gradients are added
    idle: bool  # whether some of what trains has no gradient in some steps, and then stays as it is
    model: nn.Module  # once `begin` has made it

    def schedule(self, per_epoch: int) -> Schedule:
        """per_epoch: steps that go once through the images."""

    def inspect(self, here: Processes) -> None:
        """Raises what is wrong with the data, once everything else is right and before anything is written."""

    def begin(self, filled: bool) -> None:
        """Makes the model; filled: whether an unfinished training's weights will replace its own."""

    def groups(self) -> list[dict]:
        """What SGD trains: "params", and "scale", so many times the learning rate."""

    def prepared(self, here: Processes, images: int) -> nn.Module:
        """The model, which is on its device, as steps run it: on so many images at a time."""

    def load(self, index: int, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """An image and what belongs to it, to be stacked; called by threads."""

    def begin_step(self, step: int, batch: list[Tensor], here: Processes) -> None:
        """What losses of the batch's parts need to know of all of it."""

    def losses(self, forward: nn.Module, part: list[Tensor], here: Processes) -> dict[str, Tensor]:
        """ "loss", whose sum over the parts and mean over the processes is minimised, and others to be reported."""

    def pause(self, steps: int, here: Processes) -> dict[str, float]:
        """What is to be reported after so many steps, at a pause."""

    def finish(self, here: Processes) -> None:
        """What the model still needs after the last step."""

    def tensors(self) -> dict[str, Tensor]:
        """The model's, which a stopped training goes on from."""

    def fill(self, state: dict[str, Tensor]) -> None:
        """The opposite."""

    def result(self) -> dict[str, Tensor]:
        """The checkpoint's."""

    def metadata(self) -> dict[str, str]:
        """What a checkpoint says beside its tensors and the configuration."""

    def others(self, known: dict[str, str]) -> list[str]:
        """What else of an earlier run's metadata is of another run than this."""


def train(
    task: Task,
    out: Path,
    here: Processes,
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress | None,
    begun: Begun | None,
) -> Path:
    """Trains in `out` and returns the checkpoint. What an earlier training left there is an error, unless resume says
    to go on with it or overwrite to replace it, its checkpoint once the new one is whole. begun: called with the inputs
    once nothing is wrong, before an earlier run's files are removed."""
    if not resume and not overwrite:
        refuse_begun(task.name, out, task.checkpoint)
    return _Training(task, out, here, resume).run(progress or _silent, begun or _silent)


def _silent(*facts) -> None:
    pass


def check(config: Config) -> None:
    """Of the fields that all configurations have, and of all fields of few values."""
    kind = type(config).__name__
    configuration.check_choices(config)
    for name in ("epochs", "steps", "batch"):
        if getattr(config, name, 1) < 1:
            raise ValueError(f"{kind}: expected {name} of at least 1, got {getattr(config, name)}")
    for name in ("lr", "weight_decay", "momentum", "power", "seed", "workers"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{kind}: expected {name} of at least 0, got {getattr(config, name)}")
    if config.tensorflow_padding and config.network != "mobilenet_v2":
        raise ValueError(f"{kind}: expected tensorflow_padding with mobilenet_v2, got {config.network}")


def refuse_begun(op: str, out: Path, checkpoint: str) -> None:
    """Where hours of another training would be lost."""
    for name, kind in ((checkpoint, "a finished"), (UNFINISHED, "an unfinished")):
        if (out / name).is_file():
            raise ValueError(f"{op}: expected a folder without a training, got {out} with {kind} one, {name}; go on "
                             f"with it by resume (--resume), train anew by overwrite (--overwrite), or choose another "
                             f"folder")  # fmt: skip


def clear(out: Path, *names: str) -> None:
    """Removes what a training left in `out`: files by these names, and what was unfinished."""
    for name in (UNFINISHED, *names):
        (out / name).unlink(missing_ok=True)


def augmentation(config) -> data.Augmentation:
    """Of a configuration that rescales by a factor, as networks that see masks are trained."""
    normalization = data.NORMALIZATIONS[config.normalization]
    return data.Augmentation(None, config.crop, config.flip, normalization, rescale=config.rescale)


def autocast(config: Config, here: Processes):
    return torch.autocast(here.device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def to_device(batch: tuple[Tensor, ...], here: Processes) -> list[Tensor]:
    formats = (torch.channels_last if t.ndim == 4 else torch.preserve_format for t in batch)
    return [t.to(here.device, memory_format=f, non_blocking=True) for t, f in zip(batch, formats, strict=True)]


def keeps_gradients(task: Task, device: torch.device) -> bool:
    """Whether gradients stay where they are from step to step, as 0: on a GPU, where graphs write them there. What is
    idle must have none: its momentum would move it."""
    return device.type == "cuda" and not task.idle


class _Training:
    def __init__(self, task: Task, out: Path, here: Processes, resume: bool):
        self.task, self.config, self.out, self.here, self.resume = task, task.config, out, here, resume
        if self.config.batch % here.world:
            raise ValueError(f"{task.name}: expected a batch that {here.world} processes can share, got "
                             f"{self.config.batch}")  # fmt: skip
        self.batch = min(self.config.batch, task.images // here.world * here.world)
        if not self.batch:
            raise ValueError(f"{task.name}: expected an image for each of {here.world} processes, got {task.images}")
        if self.batch // here.world % task.parts:
            raise ValueError(f"{task.name}: expected each process's {self.batch // here.world} images to be shared by "
                             f"{task.parts} parts; choose another batch")  # fmt: skip
        self.per_epoch = task.images // self.batch
        self.steps, self.every = task.schedule(self.per_epoch)

    def run(self, progress: Progress, begun: Begun) -> Path:
        checkpoint, unfinished = self.out / self.task.checkpoint, self.out / UNFINISHED
        if self.resume and checkpoint.is_file() and not unfinished.is_file():
            self._refuse_another_run(checkpoint)
            begun(self.task.inputs)
            log.info("%s is there: nothing to train", checkpoint)
            return checkpoint
        goes_on = self.resume and unfinished.is_file()
        self.task.begin(filled=goes_on)
        self.task.model.to(self.here.device, memory_format=torch.channels_last).train()
        c = self.config
        self.optimizer = torch.optim.SGD(self.task.groups(), c.lr, momentum=c.momentum, weight_decay=c.weight_decay)
        self.keeps_gradients = keeps_gradients(self.task, self.here.device)
        if self.keeps_gradients:
            for parameter in self._trained():
                parameter.grad = torch.zeros_like(parameter)
        first = self._restore(unfinished) if goes_on else 0
        self.task.inspect(self.here)
        begun(self.task.inputs)
        if self.here.rank == 0 and not goes_on:  # or another run's would be taken for this one's
            clear(self.out, *self.task.files)
            if checkpoint.is_file():  # which stays until this run's is whole: resumed, this run goes on from here
                self._save(unfinished, 0)
        journal = Journal(self.out / "metrics.jsonl" if self.here.rank == 0 else None, first)
        self._run(first, journal, progress, unfinished)
        self.task.finish(self.here)
        if self.here.rank == 0:
            models.save_checkpoint(checkpoint, self.task.result(), self._metadata())
            unfinished.unlink(missing_ok=True)
        if self.here.world > 1:
            distributed.barrier()
        return checkpoint

    def _run(self, first: int, journal: Journal, progress: Progress, unfinished: Path) -> None:
        c, here, start, began = self.config, self.here, time.perf_counter(), round(time.time(), 3)
        forward = self.task.prepared(here, self.batch // here.world // self.task.parts)
        if here.world > 1:
            devices = [here.device] if here.device.type == "cuda" else None
            with warnings.catch_warnings():  # older versions of torch do not have this argument's successor
                warnings.simplefilter("ignore", FutureWarning)
                forward = nn.parallel.DistributedDataParallel(
                    forward, devices, broadcast_buffers=False, find_unused_parameters=self.task.idle
                )
        if first < self.steps:
            progress(first, self.steps, "")
        before = None  # a step's losses are read once the next step is on its way, so that a GPU does not wait
        for step, batch in enumerate(self._batches(first), first):
            rate = c.lr * (1 - step / self.steps) ** c.power
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            names, values = self._gradients(forward, step, to_device(batch, here))
            self.optimizer.step()
            if here.world > 1:
                distributed.all_reduce(values)

            def report(step=step, rate=rate, names=names, values=values):
                found = dict(zip(names, (values / here.world).tolist(), strict=True))
                loss = found["loss"]
                if not math.isfinite(loss):
                    raise FloatingPointError(f"{self.task.name}: expected a finite loss, got {loss} in step {step}; "
                                             f"lower lr ({c.lr})")  # fmt: skip
                epoch, seconds = step // self.per_epoch, round(time.perf_counter() - start, 3)
                journal.write(step=step, epoch=epoch, **found, lr=rate, began=began, seconds=seconds)
                epochs = math.ceil(self.steps / self.per_epoch)
                progress(step + 1, self.steps, f"epoch {epoch + 1} of {epochs}, loss {loss:.4f}")

            if before is not None:
                before()
            before = report
            if (step + 1) % self.every == 0 or step + 1 == self.steps:
                report()
                before = None
                self._pause(step, journal, unfinished)

    def _gradients(self, forward: nn.Module, step: int, batch: list[Tensor]) -> tuple[tuple[str, ...], Tensor]:
        """A step's losses, by name, once their gradients are there."""
        task, parts, total = self.task, self.task.parts, 0
        # a graph would write the next part's gradients where autograd has left this one's, had it not its own memory
        self.optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        task.begin_step(step, batch, self.here)
        for number, part in enumerate(zip(*(t.chunk(parts) for t in batch), strict=True), 1):
            waits = self.here.world > 1 and number < parts  # processes' gradients are added once
            with forward.no_sync() if waits else contextlib.nullcontext():
                losses = task.losses(forward, list(part), self.here)
                losses["loss"].backward()
            total = total + torch.stack([loss.detach() for loss in losses.values()])
        return tuple(losses), total

    def _pause(self, step: int, journal: Journal, unfinished: Path) -> None:
        epoch = step // self.per_epoch
        if not all(torch.isfinite(p).all() for p in self._trained()):
            raise FloatingPointError(f"{self.task.name}: expected finite weights, got others after step {step}; lower "
                                     f"lr ({self.config.lr})")  # fmt: skip
        try:  # before the state is saved: a training that is stopped meanwhile does this again
            found = self.task.pause(step + 1, self.here)
        except Exception:  # which would come again each time
            if self.here.rank == 0:
                self._save(unfinished, step + 1)
            raise
        if found:
            journal.write(step=step, epoch=epoch, **found)
            if self.here.rank == 0:
                log.info("epoch %d: %s", epoch + 1, ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
        if self.here.rank == 0:
            self._save(unfinished, step + 1)

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _batches(self, first: int) -> Iterator[tuple[Tensor, ...]]:
        """This process's share of each batch. A crop depends on the seed, the epoch and its place in it alone."""
        c, share = self.config, self.batch // self.here.world

        @functools.lru_cache(2)
        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng([c.seed, epoch]).permutation(self.task.images)

        def load(step: int) -> tuple[Tensor, ...]:
            epoch, begin = step // self.per_epoch, step % self.per_epoch * self.batch + self.here.rank * share
            indices = order(epoch)[begin : begin + share].tolist()
            rows = [  # from 1: [seed, epoch, 0] is [seed, epoch]
                self.task.load(index, np.random.default_rng([c.seed, epoch, place]))
                for place, index in enumerate(indices, begin + 1)
            ]
            return pinned(tuple(torch.stack(column) for column in zip(*rows, strict=True)), self.here)

        return data.prefetch(load, range(first, self.steps), workers=c.workers, ahead=max(2, c.workers))

    def _metadata(self) -> dict[str, str]:
        known = self.task.metadata() | self.task.inputs
        return known | {"training": json.dumps(configuration.plain(self.config))}

    def _save(self, path: Path, steps: int) -> None:
        """Everything that the next step needs."""
        state = {f"model.{name}": value for name, value in self.task.tensors().items()}
        for name, p in self.task.model.named_parameters():
            buffer = self.optimizer.state.get(p, {}).get("momentum_buffer")
            if buffer is not None:
                state[f"momentum.{name}"] = buffer
        models.save_checkpoint(path, state, self._metadata() | {"steps": str(steps)})

    def _restore(self, path: Path) -> int:
        """The step to go on with."""
        self._refuse_another_run(path)
        with self._readable(path):
            state, steps = models.load_checkpoint(path, unwrap=False), int(models.read_metadata(path).get("steps", ""))
        self.task.fill({n.removeprefix("model."): value for n, value in state.items() if n.startswith("model.")})
        for name, p in self.task.model.named_parameters():
            if f"momentum.{name}" in state:
                self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(state[f"momentum.{name}"])
        log.info("going on after step %d of %d", steps, self.steps)
        return steps

    @contextlib.contextmanager
    def _readable(self, path: Path) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.task.name}: {error}; or remove {path}, and the training begins anew") from error

    def _refuse_another_run(self, path: Path) -> None:
        with self._readable(path):
            known = models.read_metadata(path)
            there = json.loads(known.get("training", "{}"))
        found = configuration.differences(self.config, there, INDIFFERENT + self.task.indifferent)
        found += inputs.changed(self.task.inputs, known) + self.task.others(known)
        if found:
            raise configuration.AnotherRun(
                f"{self.task.name}: expected to go on as {path} began, got another {', '.join(found)}; choose another "
                f"folder, or start anew by overwrite (--overwrite)", found
            )  # fmt: skip


def pinned(batch: tuple[Tensor, ...], here: Processes) -> tuple[Tensor, ...]:
    return tuple(t.pin_memory() for t in batch) if here.device.type == "cuda" else batch

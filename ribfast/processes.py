"""This process among those that torchrun started: its device and its share of the work."""

import atexit
import contextlib
import datetime
import functools
import gc
import importlib
import itertools
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import distributed

WAIT = datetime.timedelta(hours=12)  # for one another: shares of a data set take as long as they take
_numbers = itertools.count()  # of the groups that this process has been in
_left = []  # groups of processes that are no more, whose threads are to be ended


class Processes(NamedTuple):
    rank: int
    world: int
    device: torch.device


def rank_and_world() -> tuple[int, int]:
    """As torchrun says it; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(name: str = "auto") -> torch.device:
    """auto: a GPU where there is one; `cuda` is the one of torchrun's LOCAL_RANK."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name, re.ASCII):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got cuda:{index}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def choose_shard(text: str | None) -> tuple[int, int]:
    """`i/n`, the i-th of n from 0, as (i, n); None: torchrun's, else everything."""
    if text is None:
        return rank_and_world()
    index, _, count = text.partition("/")
    if not index.isdecimal() or not count.isdecimal() or not int(index) < int(count):
        raise ValueError(f"shard: expected i/n with i from 0 to n - 1, got {text!r}")
    return int(index), int(count)


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Joins torchrun's other processes, if there are any, and leaves them at the end."""
    (rank, world), chosen = rank_and_world(), choose_device(device)
    here = Processes(rank, world, chosen)
    if world == 1 or distributed.is_initialized():
        yield here
        return
    _end_threads()
    # Before there is a group: what this imports, as DistributedDataParallel does, keeps the group of that moment among
    # its functions' defaults.
    importlib.import_module("torch.distributed.nn.functional")
    with _signals_end_this():
        store = distributed.PrefixStore(f"ribfast {next(_numbers)}", _store())
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=WAIT)
    try:
        yield here
    finally:
        _left.append(distributed.group.WORLD)
        distributed.destroy_process_group()
    _end_threads()  # after an error its traceback may hold a network that was trained: later


@functools.cache
def _store():
    """Through which processes find one another, for as long as this one lives: in a group's own, the next group of the
    same processes would read what the last one wrote."""
    store, _, _ = next(distributed.rendezvous("env://", timeout=WAIT))
    store.set_timeout(WAIT)
    return store


@atexit.register
def _end_threads() -> None:
    """Of groups that this process has left. A thread that lets go of a tensor as Python ends would abort the process.

    The reference that goes last must be this one: DistributedDataParallel, where it has the last, waits for the threads
    with Python's lock in hand, which they need to let go of tensors.
    """
    if _left:
        gc.collect()
        _left.clear()


def together(here: Processes, value=None) -> list:
    """Each process's value, once all of them are here."""
    values = [value] * here.world
    if here.world > 1:
        with _signals_end_this():
            distributed.all_gather_object(values, value)
    return values


def is_lost_peer(error: Exception) -> bool:
    """Whether another process has gone in the midst of what it shared with this one, for a reason that it has said."""
    gone = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")  # Gloo's words and NCCL's
    return rank_and_world()[1] > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in gone)


@contextlib.contextmanager
def _signals_end_this() -> Iterator[None]:
    """While it waits for others, which may take hours, in code where Python's handlers of signals do not run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not Python's

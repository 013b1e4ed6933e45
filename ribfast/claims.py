"""Which process makes what: several, on machines that share a folder, take up units of work by leaving files there.

Nobody leads. A process that dies leaves its claims behind, which are void: whoever comes by, or a later run, takes the
units up. Two processes that make one unit all the same, as they may where one of them was suspended for minutes, write
the same file twice.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import files

log = logging.getLogger("ribfast")
PATIENCE = 120.0  # seconds without a sign of life, after which a process of another machine counts as dead
POLL = 0.2  # seconds between looks at what others have in hand


class Claims:
    """Claims by name, as files in a folder that last as long as their process.

    A claim of this machine's is void once its process is gone; another machine's, once its file has not been touched
    for PATIENCE, by the clock of the file system. One that is void stays, and a further file (NAME.1, NAME.2, ...)
    beside it is the claim: two processes cannot both make that.
    """

    def __init__(self, folder: Path):
        self.folder, self._owner = folder, json.dumps(_this_process()).encode()
        self._held: dict[str, list[Path]] = {}
        self._lock, self._stop, self._thread = threading.Lock(), threading.Event(), None

    def take(self, name: str) -> bool:
        """Whether it is this process's now; False while a living one has it."""
        found = []
        while True:
            path = self._path(name, len(found))
            found.append(path)
            if self._make(path):
                with self._lock:
                    self._held[name] = found
                if len(found) > 2:
                    log.warning("taking up %s, with which %d processes died", name, len(found) - 1)
                return True
            if not self._is_void(path):
                return False

    def release(self, name: str) -> None:
        """Of what is done, or is left to others."""
        with self._lock:
            paths = self._held.pop(name)
        for path in paths:
            path.unlink(missing_ok=True)

    def is_alive(self) -> bool:
        """Whether a living process has a claim here."""
        return any(not self._is_void(generations[-1]) for generations in self._all().values())

    def clear(self) -> None:
        """Removes those that are void, of things that are made."""
        for generations in self._all().values():
            if self._is_void(generations[-1]):
                for path in generations:
                    path.unlink(missing_ok=True)
        for name in self._names():
            if name.startswith("."):  # a probe of a process that was killed
                (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Releases all, and removes the folder, if nobody has a claim."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for name in list(self._held):
            self.release(name)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, name: str, generation: int) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.{generation}"

    def _all(self) -> dict[str, list[Path]]:
        """The files of each claim, in order."""
        found = {}
        names = [name for name in self._names() if not name.startswith(".")]
        for path in sorted(map(self.folder.joinpath, names), key=lambda path: int(path.suffix[1:])):
            found.setdefault(path.stem, []).append(path)
        return found

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:  # the last one who was here has just gone
            return []

    def _make(self, path: Path) -> bool:
        with files.explained(path):
            while True:
                try:
                    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                    break
                except FileNotFoundError:  # nobody is here yet, or the last one has just gone
                    try:
                        os.makedirs(self.folder)
                    except FileExistsError:
                        if self.folder.exists() and not self.folder.is_dir():
                            raise
                except FileExistsError:
                    return False
            try:
                os.write(descriptor, self._owner)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
        if self._thread is None:
            self._thread = threading.Thread(target=self._live, name="ribfast-claims", daemon=True)
            self._thread.start()
        return True

    def _is_void(self, path: Path) -> bool:
        """Of a claim of another's. One that has just been released is not: what it was of may be done."""
        try:
            with open(path, "rb") as file:  # opening it, a network's file system asks its server
                owner, touched = file.read(), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return False
        try:
            machine, process = json.loads(owner)
        except ValueError:  # killed while it wrote this, or about to
            machine = process = None
        here = json.loads(self._owner)
        if machine is not None and machine == here[0]:
            return _is_gone(*process)
        probe = self.folder / f".{os.urandom(8).hex()}"
        try:
            probe.touch()
            return probe.stat().st_mtime - touched > PATIENCE
        except FileNotFoundError:  # the folder went, and the claim with it; or another cleared it
            return False
        finally:
            probe.unlink(missing_ok=True)

    def _live(self) -> None:
        while not self._stop.wait(PATIENCE / 6):
            self._touch()

    def _touch(self) -> None:
        """A sign of life."""
        with self._lock:
            held = [path for paths in self._held.values() for path in paths[-1:]]
        for path in held:
            with contextlib.suppress(OSError):  # released meanwhile, or the next time
                os.utime(path)


class Work:
    """A folder's units of work, each taken up by one process. A unit is a sequence of things that are made together.

    name: of a unit. left: what of a unit is not there yet, and was not found impossible since this began.
    share: (i, n): this process begins with the i-th of n shares, and goes on with what others have not come to.
    """

    def __init__(self, folder: Path, units: Sequence, name: Callable, left: Callable, share: tuple[int, int] = (0, 1)):
        self._claims, self._name, self._left, (index, count) = Claims(folder), name, left, share
        shares = [units[i::count] for i in range(count)]
        self._units = list(shares[index])
        for i in range(1, count):  # from the end, which their processes come to last
            self._units += reversed(shares[(index + i) % count])

    def rounds(self) -> Iterator[Iterator[tuple[Sequence, list]]]:
        """Units that this process has taken up with what is left of them, until nothing is: first those that nobody
        has, as they are asked for; then what others died on, as it shows. Each is to be released when it is done, and
        all of a round before the next."""
        others = []
        yield self._taken(self._units, others)
        waits = False
        while others:
            units, others = [unit for unit in others if self._left(unit)], []
            taken = self._taken(units, others)
            first = next(taken, None)
            if first is not None:
                yield _chain(first, taken)
            elif others:
                if not waits:
                    log.info("waiting for %d that other processes have in hand", sum(map(len, map(self._left, others))))
                    waits = True
                time.sleep(POLL)
        self._claims.clear()

    def release(self, unit: Sequence) -> None:
        self._claims.release(self._name(unit))

    def close(self) -> None:
        """Leaves to others what is not done."""
        self._claims.close()

    def _taken(self, units: Sequence, others: list) -> Iterator[tuple[Sequence, list]]:
        """others: is given those that another process has."""
        for unit in units:
            if not self._left(unit):
                continue
            if not self._claims.take(self._name(unit)):
                others.append(unit)
            elif left := self._left(unit):  # and nobody has made it meanwhile
                yield unit, left
            else:
                self.release(unit)


def _chain(first, others: Iterator) -> Iterator:
    yield first
    yield from others


def _this_process() -> tuple[str, tuple[int, int | None]]:
    """(the machine and its processes' numbering, (this process's number, when it began))"""
    machine = socket.gethostname()
    with contextlib.suppress(OSError):
        machine += " " + Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return machine, (os.getpid(), _began(os.getpid()))


def _is_gone(number: int, began: int | None) -> bool:
    """Of a process of this machine; its number may be another's now."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    now = _began(number)
    return now is not None and now != began


def _began(number: int) -> int | None:
    """When a process did, in ticks; 0 if it has ended and nobody has asked how; None: this machine does not say."""
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])

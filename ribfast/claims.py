"""Which process makes what: several, on machines that share a folder, take up units of work by leaving files there.

Nobody leads. A process that dies leaves its claims behind, which are void: whoever comes by, or a later run, takes the
units up. One that is stopped (Ctrl-Z, a disk that hangs) is not dead: on its own machine it keeps what it has in hand,
others wait for it, and say so each minute; to other machines it is dead after PATIENCE. Two processes that make one
unit all the same, as they may where one of them was stopped on another machine, write the same file twice.

What kills its process is found out: after ALONE_AFTER deaths with a unit in hand, its things are made one by one, with
nothing else in hand; what a process dies with then is given up.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import files

log = logging.getLogger("ribfast")
PATIENCE = 120.0  # seconds without a sign of life, after which a process of another machine counts as dead
POLL, LONGEST_POLL = 0.2, 5.0  # seconds between looks at what others have in hand, at first and after a while
SAID_EVERY = 60.0  # seconds between warnings of whom this waits for
GONE = (errno.ENOENT, errno.ESTALE)  # NFS says the second of a file that goes while it is open
ALONE_AFTER = 2  # deaths with a unit in hand, after which it is taken by itself


class Claims:
    """Claims by name, as files in a folder that last as long as their process.

    A claim of this machine's is void once its process is gone; another machine's, once its file has not been touched
    for PATIENCE, by the clock of the file system. One that is void stays, and a further file (NAME.1, NAME.2, ...)
    beside it is the claim: two processes cannot both make that.
    """

    def __init__(self, folder: Path):
        self.folder, self._owner = folder, json.dumps([*_this_process(), os.urandom(8).hex()]).encode()
        self._held: dict[str, list[Path]] = {}
        self._unsure: set[Path] = set()  # being made or removed, which Ctrl-C may cut short
        self._lock, self._stop, self._thread = threading.Lock(), threading.Event(), None
        self._clock = None  # the file system's minus this process's, and when that was looked at

    def take(self, name: str, deaths: int | None = None) -> bool | None:
        """Whether it is this process's now; False while a living one has it. None, and it is not taken, where `deaths`
        processes or more have died with it."""
        found = []
        while True:
            if deaths is not None and len(found) >= deaths:
                return None
            path = self._path(name, len(found))
            found.append(path)
            self._unsure.add(path)
            if self._make(path):
                if not all(map(self._is_void, found[:-1])):  # whoever took it up from the dead has just released it
                    path.unlink()
                    self._unsure.discard(path)
                    found.clear()
                    continue
                with self._lock:
                    self._held[name] = found
                self._unsure.discard(path)
                return True
            self._unsure.discard(path)
            if not self._is_void(path):
                return False

    def take_from_the_dead(self, name: str) -> bool:
        """As `take`, which cannot tell at once whether a process of another machine is dead: this waits until it is,
        or has given a sign of life."""
        before = None
        while not self.take(name):
            owner, sign = self.owner(name), self._last_sign(name)
            if owner is not None and owner[0] == json.loads(self._owner)[0]:
                return False
            if before is not None and sign not in (None, before):
                return False
            if before is None and sign is not None:
                log.info("waiting for a sign of life of %s", self.describe(owner))
                before = sign
            time.sleep(min(1.0, PATIENCE / 6))
        return True

    def deaths(self, name: str) -> int:
        """Of processes that had what is this process's now."""
        return len(self._held[name]) - 1

    def owner(self, name: str) -> tuple[str, int] | None:
        """The machine and the number of the process that has it; None: it has just gone, or come."""
        own = self._all().get(self._path(name, 0).stem, [])
        try:
            machine, (number, _), *_ = json.loads(own[-1].read_bytes())
        except (IndexError, OSError, ValueError, TypeError):
            return None
        return machine, number

    def describe(self, owner: tuple[str, int] | None) -> str:
        """An owner as people look for a process, and whether it is stopped now."""
        if owner is None:
            return "another process"
        machine, number = owner
        stopped = machine == json.loads(self._owner)[0] and _state(number) == "T"
        return f"process {number} of the machine {machine.split()[0]}" + " (stopped)" * stopped

    def release(self, name: str) -> None:
        """Of what is done, or is left to others."""
        own = self._held[name][-1]
        self._unsure.add(own)
        with self._lock:
            paths = self._held.pop(name)
        for path in paths:
            path.unlink(missing_ok=True)
        self._unsure.discard(own)

    def is_alive(self) -> bool:
        """Whether a living process has a claim here."""
        return not all(self._is_void(path) for generations in self._all().values() for path in generations)

    def clear(self) -> None:
        """Removes those that are void, of things that are made."""
        for generations in self._all().values():
            if all(map(self._is_void, generations)):
                for path in generations:
                    path.unlink(missing_ok=True)
        for name in self._names():
            if name.startswith("."):  # of a process that was killed
                with contextlib.suppress(OSError):  # NFS keeps what another has open under such a name
                    (self.folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Releases all, and removes the folder, if nobody has a claim."""
        self._stop.set()
        for path in list(self._unsure):
            with contextlib.suppress(OSError):
                if path.read_bytes() == self._owner:
                    path.unlink()
        for name in list(self._held):
            self.release(name)
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _path(self, name: str, generation: int) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.{generation}"

    def _all(self) -> dict[str, list[Path]]:
        """The files of each claim, in order."""
        found = {}
        names = [name for name in self._names() if name.rpartition(".")[2].isdecimal() and not name.startswith(".")]
        for path in sorted(map(self.folder.joinpath, names), key=lambda path: int(path.suffix[1:])):
            found.setdefault(path.stem, []).append(path)
        return found

    def _names(self) -> list[str]:
        with _gone_is_nothing():  # the last one who was here has just gone
            return os.listdir(self.folder)
        return []

    def _last_sign(self, name: str) -> tuple[Path, int] | None:
        """Of whoever has it: the claim, and when it was touched. None: it is gone."""
        with _gone_is_nothing():
            for path in self._all().get(self._path(name, 0).stem, [])[-1:]:
                return path, path.stat().st_mtime_ns
        return None

    def _make(self, path: Path) -> bool:
        """Whether it was not there."""
        if self._thread is None:
            thread = threading.Thread(target=self._live, name="ribfast-claims", daemon=True)
            thread.start()
            self._thread = thread
        with files.explained(path):
            while True:
                # it may be gone: nobody is here yet, the last one has just left, or another's `clear` took the draft
                with _gone_is_nothing():
                    return self._link(path)
                try:
                    os.makedirs(self.folder)
                except FileExistsError:
                    with _gone_is_nothing():  # again
                        if not stat.S_ISDIR(os.stat(self.folder).st_mode):
                            raise

    def _link(self, path: Path) -> bool:
        """The claim appears with its owner in it, or not at all, even if this process is killed: one without an owner
        holds for PATIENCE, as another machine's does. Only where files cannot have a second name may that happen."""
        draft = self._hidden()
        try:
            self._write(draft)
            try:
                os.link(draft, path)
            except FileExistsError:
                return os.stat(draft).st_nlink > 1  # this one, where a network's file system lost its first answer
            except OSError as error:
                if error.errno in GONE:
                    raise
                try:  # an error that is not the lack of links comes again
                    self._write(path)
                except FileExistsError:
                    return False
            return True
        finally:
            draft.unlink(missing_ok=True)

    def _write(self, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                os.write(descriptor, self._owner)
            finally:
                os.close(descriptor)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _hidden(self) -> Path:
        """A place for a file of a moment, which is no claim."""
        return self.folder / f".{os.urandom(8).hex()}"

    def _is_void(self, path: Path) -> bool:
        """Of a claim of another's. One that has just been released is not: what it was of may be done."""
        owner = None
        with _gone_is_nothing(), open(path, "rb") as file:  # opening it, a network's file system asks its server
            owner, touched = file.read(), os.fstat(file.fileno()).st_mtime
        if owner is None:
            return False
        try:
            machine, process, *_ = json.loads(owner)
        except ValueError:  # about to write this, where files have no second name; or killed meanwhile
            machine = process = None
        here = json.loads(self._owner)
        if machine is not None and machine == here[0]:
            return _is_gone(*process)
        with _gone_is_nothing():  # the folder went, and the claim with it; or another cleared it
            return self._now() - touched > PATIENCE
        return False

    def _now(self) -> float:
        """By the file system's clock, which is asked now and then: that takes a file."""
        here = time.monotonic()
        if self._clock is None or here - self._clock[1] > PATIENCE / 6:
            probe = self._hidden()
            try:
                probe.touch()
                self._clock = probe.stat().st_mtime - here, here
            finally:
                probe.unlink(missing_ok=True)
        return self._clock[0] + here

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
    deaths: of processes with a thing, that earlier runs gave it up for. give_up: is told of a thing that is not tried,
    and of so many deaths.
    """

    def __init__(
        self, folder: Path, units: Sequence, name: Callable, left: Callable, share: tuple[int, int] = (0, 1), *,
        deaths: Callable = lambda thing: 0, give_up: Callable = lambda thing, deaths: None,
    ):  # fmt: skip
        self._claims, self._name, self._left, (index, count) = Claims(folder), name, left, share
        self._deaths, self._give_up, self._by_itself = deaths, give_up, None
        shares = [units[i::count] for i in range(count)]
        self._units = list(shares[index])
        for i in range(1, count):  # from the end, which their processes come to last
            self._units += reversed(shares[(index + i) % count])

    @property
    def alone(self) -> bool:
        """Whether the round is of one thing that may kill its process."""
        return self._by_itself is not None

    def rounds(self) -> Iterator[Iterator[tuple[Sequence, list]]]:
        """Units that this process has taken up with what is left of them, until nothing is: first those that nobody
        has, as they are asked for; then, a round each, what processes died with again and again; then what others died
        on, as it shows. Each is to be released when it is done, and all of a round before the next."""
        others, suspects = [], []
        yield self._taken(self._units, others, suspects)
        pause, begun, said = POLL, None, 0
        while others or suspects:
            busy = []  # suspects that another process has
            for unit in suspects:
                yield from self._one_by_one(unit, busy)
            units, others, suspects = [unit for unit in (*others, *busy) if self._left(unit)], [], []
            taken = self._taken(units, others, suspects)
            first = next(taken, None)
            if first is not None:
                pause, begun, said = POLL, None, 0
                yield _chain(first, taken)
            elif (others or suspects) and all(unit in busy for unit in suspects):
                begun = begun or time.monotonic()
                if time.monotonic() - begun >= said * SAID_EVERY:
                    self._say_whose([*others, *suspects], logging.WARNING if said else logging.INFO)
                    said += 1
                time.sleep(pause)
                pause = min(1.5 * pause, LONGEST_POLL)
        self._claims.clear()

    def release(self, unit: Sequence) -> None:
        name = self._name(unit)
        if name != self._by_itself:  # of which more is to come
            self._claims.release(name)

    def close(self) -> None:
        """Leaves to others what is not done."""
        self._claims.close()

    def _taken(self, units: Sequence, others: list, suspects: list) -> Iterator[tuple[Sequence, list]]:
        """others: is given those that another process has; suspects: those that processes died with."""
        for unit in units:
            left = self._left(unit)
            if not left:
                continue
            if any(map(self._deaths, left)):
                suspects.append(unit)
                continue
            took = self._claims.take(self._name(unit), ALONE_AFTER)
            if not took:
                (suspects if took is None else others).append(unit)
            elif left := self._left(unit):  # and nobody has made it meanwhile
                yield unit, left
            else:
                self.release(unit)

    def _one_by_one(self, unit: Sequence, busy: list) -> Iterator[Iterator[tuple[Sequence, list]]]:
        """A round of each thing, with a claim of its own: who dies now, dies of that."""
        name = self._name(unit)
        if not self._left(unit):
            return
        if not self._claims.take(name):
            busy.append(unit)
            return
        self._by_itself = name
        try:
            for thing in self._left(unit):
                own, before = self._name((thing,)), self._deaths(thing) or ALONE_AFTER
                claim = f"{own} by itself"
                if not self._claims.take(claim):  # of one that was stopped, and goes on after all
                    continue
                if died := self._claims.deaths(claim):
                    self._give_up(thing, before + died)
                else:
                    log.warning("%d processes died with %s, or what was beside it: it is taken by itself", before, own)
                    yield iter([(unit, [thing])])
                self._claims.release(claim)
        finally:
            self._by_itself = None
        self.release(unit)

    def _say_whose(self, units: Sequence, level: int) -> None:
        """Whom this waits for, and how many things each has."""
        counts = {}
        for unit in units:
            owner = self._claims.owner(self._name(unit))
            counts[owner] = counts.get(owner, 0) + len(self._left(unit))
        for owner, count in counts.items():
            whose = self._claims.describe(owner)
            log.log(level, "waiting for %d image%s that %s has in hand", count, "s" * (count > 1), whose)


@contextlib.contextmanager
def _gone_is_nothing() -> Iterator[None]:
    """Of a file or a folder, which others remove at any moment."""
    try:
        yield
    except OSError as error:
        if error.errno not in GONE:
            raise


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
    fields = _stat(number)
    return None if fields is None else 0 if fields[0] in "ZX" else int(fields[19])


def _state(number: int) -> str | None:
    """`T`: stopped; None: this machine does not say."""
    fields = _stat(number)
    return None if fields is None else fields[0]


def _stat(number: int) -> list[str] | None:
    """What Linux says of a process, after its name."""
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None

"""Files that are whole or not there, and JSON lines that any number of processes append."""

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("ribfast")
PARTIAL = ".partial"  # ends the names of files that are being written
LONGEST_NAME = 255  # bytes of one part of a path, on every file system in use


def write(path: Path, *parts, lasting: bool = False, new: bool = False) -> bool:
    """The file holds these bytes or what it held before, whoever is killed meanwhile, by a loss of power too.

    new: only where there is none yet; of several that write it at once, one does, where files can have a second name.
    False: there is one, which stays.
    lasting: once this returns, its name survives a loss of power as well; otherwise the file may then be missing. A
    folder's entry costs about as much again as the file, so this is for files that others rely on.
    """
    with explained(path):
        if path.is_dir():
            raise ValueError(f"expected a place for a file, got {path}, a folder; choose another place")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.urandom(12).hex()}{PARTIAL}")
        try:
            with open(partial, "xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())  # or the name could reach the disk before the bytes
            if not (new and _has_linked(partial, path)):
                if new and path.exists():
                    partial.unlink()
                    return False
                os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        if lasting and os.name == "posix":
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    return True


def _has_linked(partial: Path, path: Path) -> bool:
    """As os.replace, but in place of nothing. False: there is something, or files cannot have a second name here."""
    try:
        os.link(partial, path)
    except OSError:
        return False
    partial.unlink()
    return True


def link(path: Path, target: Path, *, symbolic: bool = False) -> None:
    """A further name of the target's file, or a symbolic link to it, in place of what the path held before."""
    target = target.resolve()
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.urandom(12).hex()}{PARTIAL}")
        try:
            os.symlink(target, partial) if symbolic else os.link(target, partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)  # POSIX replaces no name of a file by another of the same file


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """What stands in the way of writing a path, said with the path and what to do."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"expected a folder for {path}, got a file in its place; choose another folder") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            said = f"no space left for {path}: {_free(path)}; free some and run it again, or choose another folder"
        elif error.errno == errno.EFBIG:
            said = f"expected room for {path}, got a limit on the size of files; raise it (ulimit -f)"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = os.strerror(error.errno).lower()
            said = f"expected to be allowed to write {path}, got {reason}; give the right, or choose another folder"
        elif error.errno in (errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP):
            said = f"expected a file system that links {path}, got {os.strerror(error.errno).lower()}; copy instead"
        elif error.errno == errno.ENAMETOOLONG:
            said = f"expected names of at most {LONGEST_NAME} bytes, got {path}; rename the image"
        else:
            raise
        raise OSError(error.errno, said) from error


def first_line(error: Exception) -> str:
    """What an error says, as a reason within another's line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _free(path: Path) -> str:
    """`N bytes free` on the disk that the path is, or would be, on."""
    for folder in path.parents:
        try:
            found = os.statvfs(folder)
        except FileNotFoundError:
            continue
        return f"{found.f_bavail * found.f_frsize} bytes free" + ("" if found.f_favail else ", and no inodes")
    return "unknown bytes free"


def append(path: Path, facts: dict) -> None:
    """Adds a line. It is not forced to the disk: what a loss of power takes are the last lines, at most halved."""
    line = json.dumps(facts, default=_plain).encode() + b"\n"
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a killed run's half line, which ends here
                line = b"\n" + line
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.ENOSPC, f"{path} took a part of a line")
        finally:
            os.close(descriptor)


def read_object(path: Path) -> dict | None:
    """A file's JSON object; None where it holds something else."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def lines(path: Path) -> list[dict]:
    """A file's JSON objects; what a killed run left half written is passed over."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else (), 1):
        try:
            facts = json.loads(line) if line else None
        except ValueError:
            facts = line
        if isinstance(facts, dict):
            found.append(facts)
        elif line:
            log.warning("passed over line %d of %s, which is no whole record", number, path)
    return found


class Tail:
    """The JSON objects that anybody appends to a file from now on."""

    def __init__(self, path: Path):
        self.path, self.offset = path, path.stat().st_size if path.is_file() else 0

    def read(self) -> list[dict]:
        """Those since the last time, as far as their lines are whole."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                text, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self.offset += len(text) + len(newline)
        found = []
        for line in text.split(b"\n"):
            with contextlib.suppress(ValueError):  # the rest of a killed run's half line
                found.append(json.loads(line))
        return [facts for facts in found if isinstance(facts, dict)]


def _plain(value):
    if hasattr(value, "tolist"):  # numpy's and torch's
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"expected facts that JSON knows, got a {type(value).__name__}")

"""How far a long command is: a bar, or lines."""

import logging
import shutil
import sys
import time

log = logging.getLogger("ribfast")


class Progress:
    """A bar on a terminal; elsewhere a line now and then. Its time begins with the first call, which says the title."""

    def __init__(self, stream=None, every: float = 30.0, title: str = ""):
        self.stream, self.title = stream or sys.stderr, title
        self.terminal = self.stream.isatty()
        self.wait = 0.1 if self.terminal else every
        self.first = None

    def __call__(self, done: int, total: int, text: str = "") -> None:
        now = time.monotonic()
        if self.first is None:
            self.start = self.shown = now
            self.first = done  # a run that goes on does not begin at 0
            if self.title:
                log.info("%s", self.title)
        if now - self.shown < self.wait and (done < total or not self.terminal):
            return
        self.shown = now
        each = (now - self.start) / max(1, done - self.first)
        pace = f"{_pace(each)}, {duration(each * (total - done))} left"
        if not self.terminal:
            log.info("%d of %d, %s: %s", done, total, pace, text)
            return
        filled = 24 * done // max(1, total)
        line = f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{total} {pace}  {text}"
        self.stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1] + "\n" * (done == total))
        self.stream.flush()


def _pace(each: float) -> str:
    """Of so many seconds each."""
    return f"{each:.1f} s each" if each >= 1 else f"{1 / max(each, 1e-6):.3g} a second"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"

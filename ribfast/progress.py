"""How far a long command is: a bar, or lines."""

import logging
import shutil
import sys
import time

log = logging.getLogger("ribfast")
LONG = 2.0  # seconds: what takes longer says at its end how long


class Progress:
    """A bar on a terminal; elsewhere a line now and then. Time begins with the first call, which says what is done
    before anything is made, and with one that counts anew."""

    def __init__(self, stream=None, every: float = 30.0, title: str = ""):
        self.stream, self.title = stream or sys.stderr, title
        self.terminal = self.stream.isatty()
        self.wait = 0.1 if self.terminal else every
        self.first, self.done, self.ended = None, 0, False

    def __call__(self, done: int, total: int, text: str = "") -> None:
        now = time.monotonic()
        begins = self.first is None or done < self.done
        if self.first is None and self.title:
            log.info("%s", self.title)
        if begins:
            self.start = self.shown = now
            self.first, self.ended = done, False  # a run that goes on does not begin at 0
        ends = done >= total and not self.ended
        self.done, self.ended = done, done >= total
        is_due = now - self.shown >= self.wait
        if (is_due or begins or ends) if self.terminal else (is_due and not ends):  # which says more below
            self.shown = now
            self._show(done, total, text, now - self.start)
        if ends and now - self.start >= LONG:
            log.info("%d of %d in %s, %s", done, total, _took(now - self.start), self._pace(done, now - self.start))

    def _show(self, done: int, total: int, text: str, seconds: float) -> None:
        pace = ""
        if done > self.first:
            left = seconds / (done - self.first) * (total - done)
            pace = f"{self._pace(done, seconds)}, {duration(left)} left"
        if not self.terminal:
            log.info("%s", f"{done} of {total}" + f", {pace}" * bool(pace) + f": {text}" * bool(text))
            return
        filled = 24 * done // max(1, total)
        line = f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{total} {pace}  {text}"
        self.stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1] + "\n" * (done == total))
        self.stream.flush()

    def _pace(self, done: int, seconds: float) -> str:
        return _pace(seconds / max(1, done - self.first))


def _pace(each: float) -> str:
    """Of so many seconds each, in three digits."""
    rate = 1 / max(each, 1e-6)
    return f"{each:.1f} s each" if each > 1 else f"{float(f'{rate:.3g}'):.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


def _took(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 59.5 else duration(seconds)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"

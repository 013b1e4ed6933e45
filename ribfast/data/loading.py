"""Images ahead of their use: made by threads, and kept while memory allows."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .sources import Item, Source


def prefetch(function: Callable, arguments: Iterable, *, workers: int = 2, ahead: int = 4) -> Iterator:
    """function(argument) for each argument, in order, made by threads, at most `ahead` before they are asked for.

    An exception, the function's or the arguments', is raised at its place in the order and ends the iteration. Closing
    the iterator, or dropping it, ends the threads. workers = 0 makes each result when it is asked for, without threads.
    """
    if workers < 0 or ahead < 1:
        raise ValueError(f"prefetch: expected workers of at least 0 and ahead of at least 1, got {workers} and {ahead}")
    return map(function, arguments) if workers == 0 else _prefetch(function, arguments, workers, ahead)


def _prefetch(function: Callable, arguments: Iterable, workers: int, ahead: int) -> Iterator:
    pool, pending = ThreadPoolExecutor(workers, "ribfast-prefetch"), deque()
    arguments, failure, more = iter(arguments), None, True
    try:
        while more or pending:
            while more and len(pending) <= ahead:
                try:
                    pending.append(pool.submit(function, next(arguments)))
                except StopIteration:
                    more = False
                except Exception as error:
                    more, failure = False, error
            if pending:
                yield pending.popleft().result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(cancel_futures=True)


class ImageCache:
    """A source's decoded images, the latest used of them, in at most limit_bytes; for any number of threads.

    Its arrays are shared, so they are read-only.
    """

    def __init__(self, source: Source, limit_bytes: int):
        if limit_bytes < 0:
            raise ValueError(f"ImageCache: expected limit_bytes of at least 0, got {limit_bytes}")
        self.source, self.limit_bytes = source, limit_bytes
        self.bytes = 0
        self._images: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def image(self, item: Item) -> np.ndarray:
        """source.image(item), from memory if it is there. Threads that miss at once all decode; one copy is kept."""
        with self._lock:
            if item.name in self._images:
                self._images.move_to_end(item.name)
                return self._images[item.name]
        image = self.source.image(item)
        image.flags.writeable = False
        with self._lock:
            if item.name in self._images:
                return self._images[item.name]
            if image.nbytes <= self.limit_bytes:
                while self.bytes + image.nbytes > self.limit_bytes:
                    self.bytes -= self._images.popitem(last=False)[1].nbytes
                self._images[item.name] = image
                self.bytes += image.nbytes
        return image

    def clear(self) -> None:
        with self._lock:
            self._images.clear()
            self.bytes = 0

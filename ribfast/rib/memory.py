"""Keeping the pages of large buffers, which steps would otherwise give back and map anew thousands of times."""

import contextlib
import ctypes
import sys
import threading

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's mallopt
_lock, _users = threading.Lock(), 0


@contextlib.contextmanager
def keep_pages():
    """While inside, glibc's malloc keeps what is freed; other allocators are left alone."""
    global _users
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    with _lock:
        _users += 1
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                libc.mallopt(_MMAP_MAX, 65536)
                libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)
                libc.mallopt(_TRIM_THRESHOLD, 64 * 2**20)
                libc.malloc_trim(0)

"""Which errors are said in a line, and which are a lack of memory."""

import errno

# what errors say that have no type of their own for it
WORDS = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator", "not enough memory", "bad_alloc")
OPENCV = -4  # its code for it


def is_expected(error: BaseException) -> bool:
    """Whether it is said in a line; others are bugs and show where."""
    return isinstance(error, (ValueError, OSError, ArithmeticError, MemoryError)) or lacks_memory(error)


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is a lack of memory. Told by names, where torch and OpenCV have the
    types, so that this asks for neither."""
    if error is None:
        return False
    kind = type(error)
    found = isinstance(error, MemoryError) or kind.__name__ == "OutOfMemoryError"
    found = found or (isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS))
    found = found or (kind.__module__ == "cv2" and getattr(error, "code", None) == OPENCV)
    found = found or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return found or lacks_memory(error.__context__)

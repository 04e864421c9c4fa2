"""Python's search for cycles, which a step can do without."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Switch Python's search for cycles off during a step.

    A step of a deep model makes thousands of small objects, none of them in a cycle. Looking for cycles among them, and
    among all that was imported, took 30 of 450 ms at 200 blocks.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

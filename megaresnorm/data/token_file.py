"""The tokens of a file, read piece by piece from a descriptor that stays open.

A file that is memory-mapped kills the process (SIGBUS) that reads where it has been cut, or where the disk fails. What
is read from an open descriptor is there or is not, and the error has a name. A file that is unlinked or replaced by
another stays whole for whoever has it open.
"""

import errno
import os
import resource
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from megaresnorm.errors import DataError
from megaresnorm.reading import open_plain_file

_LOOK_EVERY = 64  # reads; a look at a file's size costs a third of a short read
_REMEDY = "put the file back as it was prepared, and start again to go on from the newest checkpoint"


class TokenFile:
    """The tokens of a file, like a read-only array of them; every slice is read anew, into an array of its own.

    It may be read by several threads.

    Args:
        num_tokens: that the file has.

    Attributes:
        path: of the file.
        dtype: NumPy type of a stored token.

    Raises:
        DataError: it cannot be opened, or has another size; so do all reads, where it has been cut or cannot be read.
    """

    def __init__(self, path: Path, dtype: np.dtype, num_tokens: int) -> None:
        self.path, self.dtype, self._length, self._reads = path, dtype, num_tokens, 0
        try:
            self._descriptor = open_one_more(path)
        except OSError as e:
            raise DataError(f"{path}: cannot be read ({e.strerror})") from None
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._check_size()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, at: int | slice) -> Any:
        """One token, or those of a slice in steps of 1."""
        if not isinstance(at, slice):
            at = int(at) + self._length * (at < 0)
            if not 0 <= at < self._length:
                raise IndexError(at)
            return self._read(at, at + 1)[0]
        start, stop, step = at.indices(self._length)
        assert step == 1, "a file is read in one direction"
        return self._read(start, max(start, stop))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def tolist(self) -> list:
        """All tokens as Python's own numbers."""
        return self[:].tolist()

    def _read(self, start: int, stop: int) -> np.ndarray:
        offset, wanted = start * self.dtype.itemsize, (stop - start) * self.dtype.itemsize
        self._reads += 1
        if self._reads % _LOOK_EVERY == 0:
            self._check_size()
        try:
            data = os.pread(self._descriptor, wanted, offset)
            while 0 < len(data) < wanted and (more := self._next_part(wanted, offset, data)):
                data += more
        except OSError as e:
            raise DataError(f"{self.path}: byte {offset} cannot be read ({e.strerror}); {_REMEDY}") from None
        if len(data) < wanted:
            raise DataError(
                f"{self.path}: has {len(data)} of the {wanted} bytes from byte {offset} on: it was cut while it was in "
                f"use; {_REMEDY}"
            )
        return np.frombuffer(data, self.dtype)

    def _next_part(self, wanted: int, offset: int, data: bytes) -> bytes:
        """What follows: one call gives at most 2 GiB, and may be interrupted."""
        return os.pread(self._descriptor, wanted - len(data), offset + len(data))

    def _check_size(self) -> None:
        wanted = self._length * self.dtype.itemsize
        try:
            size = os.fstat(self._descriptor).st_size
        except OSError as e:
            raise DataError(f"{self.path}: cannot be read any more ({e.strerror}); {_REMEDY}") from None
        if size != wanted:
            raise DataError(f"{self.path}: has {size} bytes now, and had {wanted}: it was changed in use; {_REMEDY}")


def open_one_more(path: Path) -> int:
    """A descriptor of a plain file. Where a process may open no more, as many are allowed as it may allow itself.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        return open_plain_file(path)
    except OSError as e:
        if e.errno != errno.EMFILE:
            raise
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return open_plain_file(path)

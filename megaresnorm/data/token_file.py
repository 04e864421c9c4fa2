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
        self.path, self.dtype, self._length = path, dtype, num_tokens
        self._itemsize, self._reads = dtype.itemsize, 0
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
        if isinstance(at, slice):
            start, stop, step = at.indices(self._length)
            assert step == 1, "a file is read in one direction"
            return self.read(start, max(start, stop))
        at = int(at) + self._length * (at < 0)
        if not 0 <= at < self._length:
            raise IndexError(at)
        return self.read(at, at + 1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def tolist(self) -> list:
        """All tokens as Python's own numbers."""
        return self[:].tolist()

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens ``start`` to ``stop``, both within the file: a slice with less to do for Python.

        Raises:
            DataError: they are not there any more.
        """
        offset, wanted = start * self._itemsize, (stop - start) * self._itemsize
        self._reads += 1
        if self._reads % _LOOK_EVERY == 0:
            self._check_size()
        try:
            data = os.pread(self._descriptor, wanted, offset)
            if len(data) != wanted:
                data = self._completed(data, offset, wanted)
        except OSError as e:
            raise DataError(f"{self.path}: byte {offset} cannot be read ({e.strerror}); {_REMEDY}") from None
        return np.frombuffer(data, self.dtype)

    def _completed(self, data: bytes, offset: int, wanted: int) -> bytes:
        """What is read with what follows: one call gives at most 2 GiB, and may be interrupted."""
        parts, have = [data], len(data)
        while parts[-1] and have < wanted:
            parts.append(os.pread(self._descriptor, wanted - have, offset + have))
            have += len(parts[-1])
        if have < wanted:
            raise DataError(
                f"{self.path}: has {have} of the {wanted} bytes from byte {offset} on: it was cut while it was in use; "
                f"{_REMEDY}"
            )
        return b"".join(parts)

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

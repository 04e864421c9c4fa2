"""Megatron's token files: PREFIX.bin holds the tokens back to back, PREFIX.idx says where sequences and documents are.

idx := "MMIDIDX\\0\\0" | u64 version = 1 | u8 dtype code | u64 S sequences | u64 D document boundaries
       | i32 lengths[S] | i64 byte offsets[S] | i64 boundaries[D] (in sequences, from 0 to S) | optional i8 modes[S]
"""

import os
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megaresnorm.data.token_file import TokenFile, open_one_more
from megaresnorm.errors import DataError
from megaresnorm.reading import open_plain_file

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
MAX_SEQUENCE = (1 << 31) - 1  # tokens; lengths are i32
# An index may have INDEX_BYTES plus INDEX_SHARE times the bytes of its tokens: room for documents of one byte.
INDEX_BYTES, INDEX_SHARE = 1 << 26, 24
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}


class TokenFiles:
    """The tokens of PREFIX.bin, read as they are asked for, and the token offsets of its documents.

    Args:
        prefix: path of the two files, without .bin and .idx.

    Attributes:
        tokens: [num_tokens]; a slice of them is read from the file.
        boundaries: [num_documents + 1] int64; document d is tokens[boundaries[d] : boundaries[d + 1]].
        sequences: [num_sequences + 1] int64, the same for sequences.
        modes: [num_sequences] int8, or None where the index has none.

    Raises:
        DataError: the files are damaged or do not belong together; names file and byte offset.
    """

    def __init__(self, prefix: Path) -> None:
        self.bin_path, self.idx_path = prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")
        index = self._read_index()
        dtype, num_sequences, num_boundaries = self._read_header(index, len(index))
        self.dtype = np.dtype(dtype)
        at = HEADER.size
        lengths = np.frombuffer(index, "<i4", num_sequences, at)
        at += lengths.nbytes
        offsets = np.frombuffer(index, "<i8", num_sequences, at)
        offsets_at, at = at, at + offsets.nbytes
        documents = np.frombuffer(index, "<i8", num_boundaries, at)
        self._check_documents(documents, num_sequences, at)
        starts = self._check_sequences(lengths, offsets, offsets_at)
        self.tokens = TokenFile(self.bin_path, self.dtype, int(starts[-1]))
        self.boundaries, self.sequences = starts[documents], starts
        at += documents.nbytes
        self.modes = np.frombuffer(index, "i1", num_sequences, at) if len(index) > at else None

    @property
    def num_documents(self) -> int:
        """Number of documents, empty ones included."""
        return len(self.boundaries) - 1

    def check_token_range(self, vocab_size: int, max_bytes: int) -> None:
        """Check that tokens are whole numbers within the vocabulary; beyond ``max_bytes``, in evenly spread chunks.

        Raises:
            DataError: one is not; names it and its byte offset.
        """
        for start, stop in spread_chunks(len(self.tokens), max(1, max_bytes // self.dtype.itemsize)):
            chunk = self.tokens[start:stop]
            wrong = (chunk < 0) | (chunk >= vocab_size)
            if np.issubdtype(self.dtype, np.floating):  # Megatron may store tokens so; NaN is no whole number either
                wrong |= chunk != np.floor(chunk)
            if wrong.any():
                at = int(np.flatnonzero(wrong)[0])
                offset = (start + at) * self.dtype.itemsize
                raise DataError(
                    f"{self.bin_path}: token {chunk[at]} at byte {offset} is outside the vocabulary of {vocab_size}"
                )

    def _read_index(self) -> bytes:
        """Read all of PREFIX.idx, after a check that its header and the size of PREFIX.bin allow for its size."""
        try:
            tokens = os.fdopen(open_one_more(self.bin_path), "rb")
        except OSError as e:
            raise DataError(f"{self.bin_path}: cannot be read ({e.strerror})") from None
        with tokens:
            most = INDEX_BYTES + INDEX_SHARE * os.fstat(tokens.fileno()).st_size
        try:
            with os.fdopen(open_plain_file(self.idx_path), "rb") as file:
                header, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
                self._read_header(header, size)
                if size > most:
                    raise DataError(f"{self.idx_path}: has {size:,} bytes, and at most {most:,} for so few tokens")
                return header + file.read(size - len(header))
        except OSError as e:
            raise DataError(
                f"{self.idx_path}: cannot be read ({e.strerror}); make it with megaresnorm prepare"
            ) from None

    def _read_header(self, header: bytes, size: int) -> tuple[type, int, int]:
        """Check the header of an index of ``size`` bytes.

        Returns:
            (NumPy type of a token, number of sequences, number of document boundaries).
        """
        path = self.idx_path
        if len(header) < HEADER.size:
            raise DataError(f"{path}: ends at byte {len(header)} inside the header of {HEADER.size} bytes")
        magic, version, code, num_sequences, num_boundaries = HEADER.unpack_from(header)
        if magic != MAGIC:
            raise DataError(
                f"{path}: byte 0 is not the start of a Megatron index (got {magic[:7]!r}, wanted {MAGIC[:7]!r})"
            )
        if version != 1:
            raise DataError(f"{path}: version {version} at byte 9; only version 1 is known")
        if code not in DTYPES:
            raise DataError(f"{path}: type code {code} at byte 17 is unknown; wanted 1 to 8")
        without_modes = HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if size not in (without_modes, without_modes + num_sequences):
            raise DataError(
                f"{path}: has {size} bytes, but the {num_sequences} sequences and {num_boundaries} boundaries "
                f"announced at byte 18 need {without_modes}"
            )
        return DTYPES[code], num_sequences, num_boundaries

    def _check_documents(self, documents: np.ndarray, num_sequences: int, at: int) -> None:
        if len(documents) < 2 or documents[0] != 0:
            raise DataError(
                f"{self.idx_path}: byte {at}: the document boundaries must start with 0 and name a document"
            )
        steps = np.diff(documents)
        if (steps < 0).any():
            worst = int(np.flatnonzero(steps < 0)[0]) + 1
            raise DataError(
                f"{self.idx_path}: byte {at + 8 * worst}: document boundary {documents[worst]} is below the one before "
                "it"
            )
        if documents[-1] != num_sequences:
            raise DataError(
                f"{self.idx_path}: byte {at + 8 * (len(documents) - 1)}: the last document ends at sequence "
                f"{documents[-1]}, not at {num_sequences}"
            )

    def _check_sequences(self, lengths: np.ndarray, offsets: np.ndarray, offsets_at: int) -> np.ndarray:
        """Token offsets [S + 1], after a check that lengths, byte offsets and the .bin file agree."""
        if len(lengths) and lengths.min() < 0:
            worst = int(np.flatnonzero(lengths < 0)[0])
            raise DataError(
                f"{self.idx_path}: byte {HEADER.size + 4 * worst}: sequence {worst} has length {lengths[worst]}"
            )
        starts = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=starts[1:])
        wrong = np.flatnonzero(offsets != starts[:-1] * self.dtype.itemsize)
        if len(wrong):
            i = int(wrong[0])
            raise DataError(
                f"{self.idx_path}: byte {offsets_at + 8 * i}: sequence {i} is said to start at byte {offsets[i]}, "
                f"but the lengths put it at {starts[i] * self.dtype.itemsize}"
            )
        need = int(starts[-1]) * self.dtype.itemsize
        try:
            have = self.bin_path.stat().st_size
        except OSError as e:
            raise DataError(f"{self.bin_path}: cannot be read ({e.strerror})") from None
        if have != need:
            raise DataError(
                f"{self.bin_path}: has {have} bytes, but {self.idx_path.name} describes {need}; they do not belong "
                "together"
            )
        return starts


class TokenWriter:
    """Writes PREFIX.bin as tokens come, and PREFIX.idx when it is closed.

    The files are byte for byte what Megatron's own builder writes.

    Args:
        prefix: path of the two files, without .bin and .idx.
        dtype: NumPy type of a stored token, one of DTYPES.
    """

    def __init__(self, prefix: Path, dtype: type) -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self._bin: BinaryIO = prefix.with_name(prefix.name + ".bin").open("wb")
        self._lengths, self._modes, self._boundaries = array("i"), array("b"), array("q", [0])
        self._open = False  # the last sequence goes on

    @property
    def num_documents(self) -> int:
        """Number of documents that are complete."""
        return len(self._boundaries) - 1

    def add(self, tokens: np.ndarray, lengths: Sequence[int], *, ends: bool = True) -> None:
        """Append documents of one sequence each.

        Args:
            tokens: tokens of all documents back to back.
            lengths: number of tokens of each document.
            ends: False if the last document goes on with the next call.
        """
        self._write(tokens)
        for i, length in enumerate(lengths):
            if self._open and self._lengths[-1] + length <= MAX_SEQUENCE:
                self._lengths[-1] += length
            else:  # a new document, or one that is longer than a sequence can be
                self._lengths.append(length)
            self._open = i == len(lengths) - 1 and not ends
            if not self._open:
                self._boundaries.append(len(self._lengths))

    def add_document(self, tokens: np.ndarray, lengths: Sequence[int], modes: Sequence[int] | None = None) -> None:
        """Append one document of several sequences.

        Args:
            tokens: tokens of all its sequences back to back.
            lengths: number of tokens of each sequence.
            modes: Megatron's multimodal marks, one a sequence; given for all documents or for none.
        """
        assert not self._open
        self._write(tokens)
        self._lengths.extend(lengths)
        self._modes.extend(modes or ())
        self._boundaries.append(len(self._lengths))

    def close(self) -> None:
        """Write the index."""
        self._bin.close()
        (code,) = (code for code, dtype in DTYPES.items() if np.dtype(dtype) == self.dtype)
        lengths = np.asarray(self._lengths, dtype="<i4")
        offsets = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1].astype("<i8") * self.dtype.itemsize, out=offsets[1:])
        assert len(self._modes) in (0, len(lengths))
        with self.prefix.with_name(self.prefix.name + ".idx").open("wb") as index:
            index.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(self._boundaries)))
            for part in (lengths, offsets, np.asarray(self._boundaries, "<i8"), np.asarray(self._modes, "i1")):
                index.write(part.tobytes())

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _write(self, tokens: np.ndarray) -> None:
        self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype.newbyteorder("<")).tobytes())


def token_dtype(vocab_size: int) -> type:
    """NumPy type of a stored token. As in Megatron, it has two bytes where they are enough."""
    return np.uint16 if vocab_size < 65500 else np.int32


def spread_chunks(total: int, budget: int, chunk: int = 1 << 23) -> list[tuple[int, int]]:
    """Ranges of ``chunk`` items that cover ``total`` items, or evenly spread ones of about ``budget`` if that is less.

    >>> spread_chunks(10, budget=4, chunk=2)
    [(0, 2), (8, 10)]
    """
    ranges = [(start, min(start + chunk, total)) for start in range(0, total, chunk)]
    wanted = max(2, budget // chunk)
    if len(ranges) <= wanted:
        return ranges
    return [ranges[round(i * (len(ranges) - 1) / (wanted - 1))] for i in range(wanted)]

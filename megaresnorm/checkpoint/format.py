"""What a checkpoint is on disk.

step-00000500/
  manifest.json                        everything but tensors: files with size and SHA-256, global shapes, training state,
                                       recipe, versions, and a digest of itself
  weights-00003-00001.safetensors      what rank 3 wrote: tensors under their global names; which slices of the whole tensors
  optimizer-00003-00001.safetensors    their rows are stands in the file's own header
  tokenizer.model | .json              the tokenizer of the data, unless it is bytes
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megaresnorm.errors import CheckpointError
from megaresnorm.parallel.sharding import Box
from megaresnorm.reading import open_plain_file

MANIFEST = "manifest.json"
FORMAT = 2
FILE_NAME = re.compile(r"[a-z]+-[0-9]{5}-[0-9]{5}\.safetensors|tokenizer\.(model|json)")
UNFINISHED = ".tmp-"  # a folder that is being written or removed
DAMAGED = "damaged-"  # a folder that a run could not go on from, and went on from an older one
MAX_MANIFEST_BYTES = 1 << 24
DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.int8": "I8",
}  # in safetensors
_FOLDER_NAME = re.compile(r"step-([0-9]{8,})")
_CHUNK = 1 << 22
FINITE = ("weights", "optimizer")  # groups without NaN and infinity; a clipper's averages start as infinity


@dataclass(frozen=True)
class TensorSlices:
    """One tensor of the whole model, and what this rank has of it.

    shape, dtype: of the whole.   local: live memory, None where the rank has nothing of it; its rows are, one after the other, the
    slices ``boxes``.   owned: whether this is the one rank that writes them.   chunks: makes the rows of a whole tensor, some at a
    time, in the place of ``local`` where they are not to be in memory together.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    local: Tensor | None = None
    boxes: tuple[Box, ...] = ()
    owned: bool = False
    chunks: Callable[[], Iterable[Tensor]] | None = None

    @classmethod
    def of_whole(cls, tensor: Tensor) -> "TensorSlices":
        """A tensor that one rank has whole."""
        box = tuple((0, size) for size in tensor.shape)
        return cls(tuple(tensor.shape), tensor.dtype, tensor, (box,), owned=True)

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def file_tensor(self, name: str) -> "FileTensor":
        """What this rank has, as a tensor of a file."""
        if self.chunks is not None:
            return FileTensor(name, self.dtype, self.shape, self.chunks)
        local = self.local
        assert local is not None and local.dtype == self.dtype
        return FileTensor(name, self.dtype, tuple(local.shape), lambda: [local])


class FileTensor(NamedTuple):
    """One tensor of a safetensors file. chunks: makes its consecutive rows, some at a time."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Groups = Mapping[str, Mapping[str, TensorSlices]]  # weights, optimizer -> global name -> its slices


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """By its name; None for a name that is not of a step."""
    match = _FOLDER_NAME.fullmatch(folder.name)
    return None if match is None else int(match[1])


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint under ``root``, oldest first. Unfinished ones have other names."""
    try:
        if not root.is_dir():
            return []
        found = ((step_of(path), path) for path in root.iterdir())
        return sorted((step, path) for step, path in found if step is not None and (path / MANIFEST).is_file())
    except OSError as e:
        raise CheckpointError(f"{root}: cannot be read ({e.strerror})") from None


def root_of(folder: Path) -> Path:
    """Where the checkpoints are of a run's output folder; or the folder itself, if it is that already."""
    return folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder


def checkpoints_of(folder: Path) -> list[tuple[int, Path]]:
    """As ``list_checkpoints``, of a run's output folder or a folder of checkpoints."""
    return list_checkpoints(root_of(folder))


def file_sha256(path: Path, *, from_disk: bool = False, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file.

    from_disk: not what the operating system still remembers of writing it, where it can be made to forget.   progress: called with
    the bytes of every part.
    Raises: OSError for what is not a plain file.
    """
    digest = hashlib.sha256()
    with os.fdopen(open_plain_file(path), "rb", buffering=0) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def human_bytes(count: float) -> str:
    """
    >>> human_bytes(512), human_bytes(3_200_000)
    ('512 B', '3.2 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, in one pass that needs no memory."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, most = torch.aminmax(tensor)
    return isfinite(least.item()) and isfinite(most.item())

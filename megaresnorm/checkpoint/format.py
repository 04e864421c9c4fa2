"""The layout of a checkpoint on disk.

step-00000500/
  manifest.json                        everything but tensors: files with size and SHA-256, global shapes, training
                                       state, recipe, versions, and a digest of itself
  weights-00003-00001.safetensors      tensors that rank 3 wrote, under their global names; the file's own header says
  optimizer-00003-00001.safetensors    which slices of the whole tensors their rows are, or of a flat one its elements
  tokenizer.model | .json              the tokenizer of the data, unless it is bytes
  source.json                          what the model of Transformers that the weights come from said of itself, if any
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megaresnorm.errors import CheckpointError
from megaresnorm.files import UNFINISHED as UNFINISHED
from megaresnorm.parallel.sharding import Box
from megaresnorm.reading import open_plain_file

MANIFEST = "manifest.json"
FORMAT = 2
FILE_NAME = re.compile(r"[a-z]+-[0-9]{5}-[0-9]{5}\.safetensors|tokenizer\.(model|json)|source\.json")
SOURCE = "source.json"
DAMAGED = "damaged-"  # a folder that a run could not resume from; it resumed from an older one
MAX_MANIFEST_BYTES = 1 << 24
DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.int8": "I8",
    "torch.float8_e4m3fn": "F8_E4M3",
}  # PyTorch name -> safetensors name
_FOLDER_NAME = re.compile(r"step-([0-9]{8,})")
_CHUNK = 1 << 22
FINITE = ("weights", "optimizer")  # groups that must be finite; the running averages of a clipper start as infinity


@dataclass(frozen=True)
class TensorSlices:
    """One tensor of the whole model, and the slices of it that this rank holds.

    Attributes:
        shape, dtype: of the whole tensor.
        local: live memory; None where this rank holds nothing. Its rows are the slices ``boxes``, one after the other;
            if it is flat, its elements are.
        boxes: the bounds of those slices in the whole tensor.
        owned: whether this is the one rank that writes them.
        chunks: makes the rows of a whole tensor, some at a time. It takes the place of ``local`` where they are not to
            be in memory together.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    local: Tensor | None = None
    boxes: tuple[Box, ...] = ()
    owned: bool = False
    chunks: Callable[[], Iterable[Tensor]] | None = None

    @classmethod
    def of_whole(cls, tensor: Tensor) -> "TensorSlices":
        """A tensor that one rank holds whole."""
        box = tuple((0, size) for size in tensor.shape)
        return cls(tuple(tensor.shape), tensor.dtype, tensor, (box,), owned=True)

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def file_tensor(self, name: str) -> "FileTensor":
        """The slices that this rank holds, as one tensor of a file."""
        if self.chunks is not None:
            return FileTensor(name, self.dtype, self.shape, self.chunks)
        local = self.local
        assert local is not None and local.dtype == self.dtype
        return FileTensor(name, self.dtype, tuple(local.shape), lambda: [local])


class FileTensor(NamedTuple):
    """One tensor of a safetensors file.

    Attributes:
        chunks: makes its consecutive rows, some at a time.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Groups = Mapping[str, Mapping[str, TensorSlices]]  # group (weights, optimizer) -> global name -> slices


def folder_name(step: int) -> str:
    """Name of the folder of a complete checkpoint."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step that a folder is named after; None for any other name."""
    match = _FOLDER_NAME.fullmatch(folder.name)
    return None if match is None else int(match[1])


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint under ``root``, oldest first. Unfinished ones have other names.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        if not root.is_dir():
            return []
        found = ((step_of(path), path) for path in root.iterdir())
        return sorted((step, path) for step, path in found if step is not None and (path / MANIFEST).is_file())
    except OSError as e:
        raise CheckpointError(f"{root}: cannot be read ({e.strerror})") from None


def root_of(folder: Path) -> Path:
    """The folder of checkpoints in a run's output folder, or ``folder`` itself if it is that already."""
    return folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder


def checkpoints_of(folder: Path) -> list[tuple[int, Path]]:
    """As ``list_checkpoints``, for a run's output folder or a folder of checkpoints."""
    return list_checkpoints(root_of(folder))


def file_sha256(path: Path, *, from_disk: bool = False, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, in hexadecimal.

    Args:
        from_disk: read the disk, not the page cache that writing the file has left, where the system can be made to
            drop it.
        progress: called with the number of bytes of every part.

    Raises:
        OSError: the path is not a plain file, or cannot be read.
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


def human_bytes(count: float, *, at_least: bool = False) -> str:
    """A size in decimal units, for people.

    Args:
        at_least: round up, so that what is read back from the text suffices.

    >>> human_bytes(512), human_bytes(3_200_000)
    ('512 B', '3.2 MB')
    >>> human_bytes(5_910_000_000), human_bytes(5_910_000_000, at_least=True)
    ('5.9 GB', '6.0 GB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    if unit == "B":
        return f"{count:.0f} B"
    return f"{ceil(count * 10) / 10 if at_least else count:.1f} {unit}"


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, in one pass without extra memory."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # FP8 has few operations
    least, most = torch.aminmax(tensor)
    return isfinite(least.item()) and isfinite(most.item())

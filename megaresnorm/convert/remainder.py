"""What folding a constant into weights has rounded away, kept beside the model so that the way back is bit for bit.

A folded weight y is our w times a factor, rounded. y divided by the factor is w again but for a unit or two in the last place;
this difference, one byte an element, is in a file of its own that Transformers does not look at. It is of use with these weights
alone, so it says which they are.
"""

import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import FileTensor, file_sha256
from megaresnorm.checkpoint.writer import encoded
from megaresnorm.convert.files import Weights
from megaresnorm.convert.links import Source, links, row_chunks, scaled
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.plan import Plan
from megaresnorm.errors import CheckpointError
from megaresnorm.model.parameters import ParameterSpec

REMAINDER = "megaresnorm-remainder.safetensors"
_WHOLE = {torch.float32: torch.int32, torch.float64: torch.int64}


def write_remainder(folder: Path, native: NativeModel, chosen: Plan, chunk_bytes: int) -> None:
    """Of every parameter that was folded, by our names, beside the files of the weights in ``folder``.

    Raises: CheckpointError for values that cannot be had back.
    """
    assert chosen.fold is not None
    entries = []
    for link in links(chosen.family, chosen.recipe, native.table, chosen.fold.factor):
        if link.factor != 1.0:
            shape = native.table[link.ours].shape
            chunks = functools.partial(_remainders, native, link.ours, shape, link.factor, chunk_bytes)
            entries.append(FileTensor(link.ours, torch.int8, shape, chunks))
    with (folder / REMAINDER).open("xb") as file:
        for piece in encoded(entries, {"weights": _digest(folder)}, finite=False):
            file.write(piece)


def _remainders(native: Source, name: str, shape: tuple[int, ...], factor: float, chunk_bytes: int) -> Iterator[Tensor]:
    for start, stop in row_chunks(shape, 8, chunk_bytes):
        w = native.read(name, ((start, stop), *((0, size) for size in shape[1:])))
        whole = _WHOLE[w.dtype]
        difference = w.contiguous().view(whole) - scaled(scaled(w, factor), 1 / factor).contiguous().view(whole)
        if (difference.abs() > 127).any():
            raise CheckpointError(
                f"{name} has values that cannot be folded and had back (NaN, or too small); use --arch remote-code"
            )
        yield difference.to(torch.int8)


def open_remainder(weights: Weights, table: Mapping[str, ParameterSpec], dtype: torch.dtype) -> Weights | None:
    """The remainders of a folder's weights; None where there are none, or the weights are not those that they are of."""
    if not (weights.folder / REMAINDER).exists() or any(kind is not dtype for _, _, kind in weights.tensors.values()):
        return None
    found = Weights(weights.folder, REMAINDER)
    if found.metadata.get("weights") != _digest(weights.folder):
        return None
    for name, (_, shape, kind) in found.tensors.items():
        if name not in table or table[name].shape != shape or kind is not torch.int8:
            raise CheckpointError(f"{weights.folder / REMAINDER}: {name} is of no parameter of this model")
    return found


def restored(value: Tensor, remainder: Tensor) -> Tensor:
    """w again, of what the folded weight divided by the factor is."""
    whole = _WHOLE[value.dtype]
    return (value.contiguous().view(whole) + remainder.to(whole)).view(value.dtype)


def _digest(folder: Path) -> str:
    """Of the files of weights."""
    files = sorted(folder.glob("model*.safetensors"))
    try:
        return hashlib.sha256("".join(file_sha256(path) for path in files).encode()).hexdigest()
    except OSError as e:
        raise CheckpointError(f"{folder}: its weights cannot be read ({e.strerror})") from None

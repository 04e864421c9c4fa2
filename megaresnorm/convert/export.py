"""Export of a checkpoint to another framework: a folder that appears when it is complete. Includes ``to_megatron``."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import FileTensor
from megaresnorm.convert.families.megatron import MEGATRON
from megaresnorm.convert.family import MEGATRON_NAME
from megaresnorm.convert.files import (
    CONFIG,
    Progress,
    check_space,
    output_folder,
    refuse_existing,
    write_json,
    write_weights,
)
from megaresnorm.convert.links import Link, bands_of_rows, constants, links
from megaresnorm.convert.match import Match, mismatches
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.tokenizers import write_tokenizer
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """How a checkpoint is written for another framework.

    Attributes:
        dtype: of the written weights; None: that of the model that they come from, or the checkpoint's.
        max_shard_bytes: of the largest file.
        max_memory: bytes for tensors while writing.
        with_tokenizer: write the tokenizer, too.
        progress: is called with a label and a number of bytes; its result is then called with the bytes done.
    """

    dtype: torch.dtype | None = None
    max_shard_bytes: int = 5_000_000_000
    max_memory: int = 4_000_000_000
    with_tokenizer: bool = True
    progress: Callable[[str, int], Progress] = lambda label, total: lambda count: None


@dataclass(frozen=True)
class Export:
    """A folder that is being written.

    Attributes:
        folder: where; not yet under its final name.
        native: the checkpoint.
        match: what it is written as.
        dtype: of the weights.
        tokenizer: the checkpoint's, where it is written.
        num_bytes: of the weights.
    """

    folder: Path
    native: NativeModel
    match: Match
    dtype: torch.dtype
    tokenizer: Tokenizer | None
    num_bytes: int


@contextmanager
def export(
    native: NativeModel,
    match: Match,
    out: Path,
    settings: ExportSettings,
    check: Callable[[int], None] = lambda num_elements: None,
) -> Iterator[Export]:
    """Write weights and tokenizer; the caller adds what else the folder needs, and ``out`` appears when the block ends.

    Yields:
        The folder that is being written.

    Args:
        check: called with the number of elements of all tensors, before anything is written.

    Raises:
        ConfigError: there is no space.
        DataError: the tokenizer would not be the same.
    """
    dtype = settings.dtype or native.exported_dtype
    tokenizer = native.tokenizer() if settings.with_tokenizer else None
    tensors = list(weight_tensors(native, match, dtype, settings.max_memory // 8))
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    check_space(out, num_bytes)
    check(num_bytes // dtype.itemsize)
    with output_folder(out) as folder:
        write_weights(folder, tensors, settings.max_shard_bytes, settings.progress("writing", num_bytes))
        if tokenizer is not None:
            write_tokenizer(folder, tokenizer, native.provenance)
        yield Export(folder, native, match, dtype, tokenizer, num_bytes)


def to_megatron(
    checkpoint: Path,
    out: Path,
    *,
    implementation: str = "transformer_engine",
    settings: ExportSettings | None = None,
) -> Path:
    """Write ``out`` for Megatron-Core.

    Args:
        checkpoint: one of ours, or a run: its newest.
        out: a folder that is not there yet.
        implementation: TransformerConfig's transformer_impl.
        settings: how it is written.

    Raises:
        ConfigError: Megatron-Core does not hold the model.
        CheckpointError: the checkpoint cannot be read.
    """
    settings = settings or ExportSettings()
    refuse_existing(out)
    native = NativeModel(checkpoint, settings.progress("verifying the checkpoint", 0))
    family = MEGATRON[implementation]
    found = mismatches(family, native.recipe)
    if found:
        key, (ours, theirs) = next(iter(found.items()))
        said = native.recipe.topology if key == "topology" else f"{ours!r} (wanted {theirs!r})"
        raise ConfigError(f"megatron-core does not hold this model exactly: model.{key} is {said}")
    with export(native, Match(family, native.recipe), out, settings) as made:
        config = {"model_type": MEGATRON_NAME, **family.config(native.recipe), **native.origin(made.tokenizer)}
        write_json(made.folder / CONFIG, config)
    return out


def weight_tensors(native: NativeModel, match: Match, dtype: torch.dtype, chunk_bytes: int) -> Iterator[FileTensor]:
    """Every tensor of the architecture, made a chunk of rows at a time."""
    for link in links(match.family, match.recipe, native.table, match.factor):
        chunks = functools.partial(_chunks, link, native, dtype, chunk_bytes)
        yield FileTensor(link.theirs, dtype, link.shape, chunks)
    for name, shape, _ in constants(match.family, match.recipe):
        yield FileTensor(name, dtype, shape, functools.partial(_zeros, shape, dtype))


def _chunks(link: Link, native: NativeModel, dtype: torch.dtype, chunk_bytes: int) -> Iterator[Tensor]:
    for start, stop in bands_of_rows(link.shape, native.dtype.itemsize, chunk_bytes):
        yield link.their_rows(native, start, stop).to(dtype).contiguous()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    yield torch.zeros(shape, dtype=dtype)

"""Tensors of another framework as parameters of ours: every link is checked against what the files have."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.convert.family import Family
from megaresnorm.convert.files import CONFIG, Weights, is_buffer
from megaresnorm.convert.links import Link, bands_of_rows, constants, links
from megaresnorm.convert.match import Match
from megaresnorm.errors import CheckpointError
from megaresnorm.model.specs import ParameterSpec


def sliced_weights(
    weights: Weights, chosen: Match, table: dict[str, ParameterSpec], chunk_bytes: int
) -> tuple[dict[str, TensorSlices], torch.dtype]:
    """Every parameter of ours, to be made from theirs a chunk of rows at a time, and the type of all.

    Raises:
        CheckpointError: as of ``matched``.
    """
    found: dict[str, list[Link]] = {name: [] for name in table}
    for link in matched(weights, chosen, table):
        found[link.ours].append(link)
    wide = any(weights.tensors[link.theirs][2] is torch.float64 for ones in found.values() for link in ones)
    dtype = torch.float64 if wide else torch.float32
    slices = {name: native_slices(spec, found[name], weights, dtype, chunk_bytes) for name, spec in table.items()}
    return slices, dtype


def matched(weights: Weights, chosen: Match, table: dict[str, ParameterSpec]) -> Iterator[Link]:
    """Every link, under the name that its tensor has in the files.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or has no counterpart in our model.
    """
    used, tied = set[str](), "head.weight" not in table

    def there(name: str) -> str:
        names = [name, name.removeprefix(chosen.family.prefix), chosen.family.inside.get(name, name)]
        if tied and name == embedding_of(chosen.family):  # one matrix under two names, of which a file may have either
            names += heads_of(chosen.family)
        return next((one for one in names if one in weights.tensors), names[1])

    for link in links(chosen.family, chosen.recipe, table, chosen.factor):
        name = there(link.theirs)
        if name not in weights.tensors:
            indexed = ", which the index has there" if {name, link.theirs} & weights.missing.keys() else ""
            raise CheckpointError(f"{weights.folder}: has no tensor {link.theirs}{indexed}{_wrapped(weights)}")
        padding = chosen.family.padded and table[link.ours].parts[0].role in ("embedding", "head")
        rows = max(link.shape[0], weights.shape(name)[0]) if padding else link.shape[0]
        if weights.shape(name) != (rows, *link.shape[1:]):
            raise CheckpointError(
                f"{weights.folder}: {name} has shape {list(weights.shape(name))}, {CONFIG} makes it {list(link.shape)}"
            )
        used.add(name)
        if link.ours == "embedding.weight" and tied:
            used |= set(_same_again(weights, chosen.family, name))
        yield Link(name, link.ours, link.rows, link.shape, link.transposed, link.factor)
    for theirs, shape, must_be_zero in constants(chosen.family, chosen.recipe):
        name = there(theirs)
        if name in weights.tensors and must_be_zero:
            odd_shape = weights.shape(name) != shape
            if odd_shape or weights.read(name, tuple((0, size) for size in shape)).any():
                raise CheckpointError(
                    f"{weights.folder}: {name} is not {list(shape)} zeros, and our model has nothing for it"
                )
        used.add(name)
    for name in weights.tensors:
        if name not in used and not is_buffer(name):
            raise CheckpointError(f"{weights.folder}: {name} is a tensor that our model has nothing for")
    for name in weights.missing:  # what the index names and no file has; a parameter was asked for above
        if not tied or there(name) not in heads_of(chosen.family):
            raise CheckpointError(
                f"{weights.folder / weights.missing[name]}: has no tensor {name}, which the index has there"
            )


def embedding_of(family: Family) -> str:
    """The name of its embedding's matrix."""
    return next(f"{theirs}.weight" for theirs, of in family.modules.items() if of.name == "embedding")


def heads_of(family: Family) -> list[str]:
    """The names that its output matrix may have."""
    names = [f"{theirs}.weight" for theirs, of in family.modules.items() if of.name == "head"]
    return [*names, *(family.inside[name] for name in names if name in family.inside)]


def _wrapped(weights: Weights) -> str:
    """What to do where tensors have the prefix of a wrapper around the model, or a part of it, that was saved."""
    if any(name.endswith(".experts.gate_up_proj") for name in weights.tensors):
        return "; names are those inside of its class in Transformers: load them into it and call save_pretrained"
    for prefix, whose in _WRAPPERS.items():
        if any(f".{prefix}" in f".{name}" for name in weights.tensors):
            return f"; names have {prefix} in them, as {whose} leaves it: save the model inside of it, or rename them"
    return ""


_WRAPPERS = {
    "module.": "DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "PEFT",
}


def _same_again(weights: Weights, family: Family, embedding: str) -> Iterator[str]:
    """The name of a tied model's output matrix, where it was saved beside the embedding.

    Raises:
        CheckpointError: the two differ.
    """
    for name in heads_of(family):
        if name not in weights.tensors or name == embedding:
            continue
        shape = weights.shape(embedding)
        same = weights.shape(name) == shape and all(
            torch.equal(*(weights.read(one, ((start, stop), (0, shape[1]))) for one in (name, embedding)))
            for start, stop in bands_of_rows(shape, 8, 1 << 26)
        )
        if not same:
            raise CheckpointError(f"{weights.folder}: {name} differs from {embedding}, to which {CONFIG} ties it")
        yield name


def native_slices(
    spec: ParameterSpec,
    found: Sequence[Link],
    weights: Weights,
    dtype: torch.dtype,
    chunk_bytes: int,
) -> TensorSlices:
    """One parameter of ours, made a chunk of rows at a time. Rows that theirs lack (vocabulary padding) are zeros."""

    def chunks() -> Iterator[Tensor]:
        for start, stop in bands_of_rows(spec.shape, dtype.itemsize, chunk_bytes):
            value = torch.zeros(stop - start, *spec.shape[1:], dtype=dtype)
            for link in found:
                rows, theirs = link.our_rows(weights, start, stop, dtype)
                value[rows - start] = theirs
            yield value

    return TensorSlices(spec.shape, dtype, None, (tuple((0, size) for size in spec.shape),), owned=True, chunks=chunks)

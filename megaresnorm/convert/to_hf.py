"""A checkpoint of ours as a model of Hugging Face Transformers."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import FileTensor
from megaresnorm.convert.card import model_card
from megaresnorm.convert.compare import TOLERANCE, Agreement, compare, kept_logits_on, logits_on
from megaresnorm.convert.files import (
    CONFIG,
    Progress,
    check_space,
    new_folder,
    refuse_existing,
    write_json,
    write_weights,
)
from megaresnorm.convert.links import Link, constants, links, row_chunks
from megaresnorm.convert.loading import check_memory, load_theirs, of_ours, of_theirs, prompts_of
from megaresnorm.convert.native import OURS, NativeModel
from megaresnorm.convert.plan import Plan, plan
from megaresnorm.convert.remainder import write_remainder
from megaresnorm.convert.remote import FILE, code
from megaresnorm.convert.tokenizers import write_tokenizer
from megaresnorm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Report:
    """What was written. agreement: with the checkpoint, None where it was not verified.   rounding: what rounding the weights to
    another type has changed.
    """

    folder: Path
    plan: Plan
    num_bytes: int
    files: int
    agreement: Agreement | None
    rounding: Agreement | None = None


def to_hf(
    checkpoint: Path,
    out: Path,
    *,
    arch: str = "auto",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    max_memory: int = 4_000_000_000,
    verify: bool = True,
    with_tokenizer: bool = True,
    tolerance: float = TOLERANCE,
    progress: Callable[[str, int], Progress] = lambda label, total: lambda count: None,
) -> Report:
    """Write ``out`` for Transformers.

    checkpoint: one of ours, or a run: its newest.   arch: as ``plan``.   dtype: of the written weights, the checkpoint's where it
    is None.   max_memory: bytes for tensors while writing; verifying takes the whole model in FP32.   progress: makes from a label
    and a number of bytes what is called with those that are done.
    Raises: ConfigError, CheckpointError or DataError for what cannot be converted, ConversionError where the written model does not
    compute the same; ``out`` is not there then.
    """
    refuse_existing(out)
    native = NativeModel(checkpoint, progress("verifying the checkpoint", 0))
    chosen, dtype = plan(native.recipe, arch), dtype or native.dtype
    tokenizer = native.tokenizer() if with_tokenizer else None
    entries = list(weight_entries(native, chosen, dtype, max_memory // 8))
    num_bytes = sum(entry.num_bytes for entry in entries)
    exact = chosen.fold is not None and dtype == native.dtype
    check_space(out, num_bytes + (num_bytes // dtype.itemsize if exact else 0))
    if verify:
        check_memory(num_bytes // dtype.itemsize * 4, native.recipe.vocab_size or 0)
    with new_folder(out) as folder:
        write_weights(folder, entries, max_shard_bytes, progress("writing", num_bytes))
        write_beside(folder, native, chosen, dtype, tokenizer)
        if exact:
            write_remainder(folder, native, chosen, max_memory // 8)
        agreement = rounding = None
        if verify:
            agreement, rounding = verified(native, chosen, folder, tokenizer, dtype, tolerance)
        files = len(list(folder.glob("model*.safetensors")))
        (folder / "README.md").write_text(model_card(native, dtype, chosen, agreement, rounding), encoding="utf-8")
    return Report(out, chosen, num_bytes, files, agreement, rounding)


def write_beside(
    folder: Path, native: NativeModel, chosen: Plan, dtype: torch.dtype, tokenizer: Tokenizer | None
) -> None:
    """Everything but the weights and the model card. Raises: DataError for a tokenizer that would not be the same."""
    config = config_of(native, chosen, dtype, tokenizer)
    write_json(folder / CONFIG, config)
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ends})
    if chosen.family.name == OURS:
        (folder / FILE).write_bytes(code())
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer)


def weight_entries(native: NativeModel, chosen: Plan, dtype: torch.dtype, chunk_bytes: int) -> Iterator[FileTensor]:
    """Every tensor of the architecture, made a chunk of rows at a time."""
    for link in links(chosen.family, chosen.recipe, native.table, chosen.factor):
        chunks = functools.partial(_chunks, link, native, dtype, chunk_bytes)
        yield FileTensor(link.theirs, dtype, link.shape, chunks)
    for name, shape, _ in constants(chosen.family, chosen.recipe):
        yield FileTensor(name, dtype, shape, functools.partial(_zeros, shape, dtype))


def _chunks(link: Link, native: NativeModel, dtype: torch.dtype, chunk_bytes: int) -> Iterator[Tensor]:
    for start, stop in row_chunks(link.shape, native.dtype.itemsize, chunk_bytes):
        yield link.their_rows(native, start, stop).to(dtype).contiguous()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    yield torch.zeros(shape, dtype=dtype)


def config_of(native: NativeModel, chosen: Plan, dtype: torch.dtype, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The config.json: what Transformers reads, and the recipe of the model for the way back."""
    end = None if tokenizer is None else tokenizer.eod
    return {
        "architectures": [chosen.family.architecture],
        "model_type": chosen.family.name,
        **chosen.family.config(chosen.recipe),
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": None,
        "use_cache": True,
        **native.origin(tokenizer),
    }


def verified(
    native: NativeModel,
    chosen: Plan,
    folder: Path,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype,
    tolerance: float,
) -> tuple[Agreement, Agreement | None]:
    """What was written beside the checkpoint, and what rounding to ``dtype`` has changed. Raises: ConversionError."""
    prompts = prompts_of(native, tokenizer)
    rounded_to = dtype if dtype.itemsize < native.dtype.itemsize else None
    theirs = kept_logits_on(prompts, lambda: of_theirs(load_theirs(folder)))
    agreement = compare(logits_on(prompts, of_ours(native.model(rounded_to, chosen.factor))), theirs, tolerance)
    agreement.judge("the written model")
    return agreement, None if rounded_to is None else compare(logits_on(prompts, of_ours(native.model())), theirs)

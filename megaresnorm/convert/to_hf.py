"""A checkpoint of ours as a model of Hugging Face Transformers."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megaresnorm
from megaresnorm.checkpoint.format import Entry, human_bytes
from megaresnorm.convert.compare import (
    Agreement,
    compare,
    load_theirs,
    of_ours,
    of_theirs,
    random_prompts,
    text_prompts,
)
from megaresnorm.convert.files import CONFIG, Progress, check_space, new_folder, write_json, write_weights
from megaresnorm.convert.links import Link, constants, links, row_chunks
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.plan import Plan, plan
from megaresnorm.convert.remainder import remainder_entries, write_remainder
from megaresnorm.convert.remote import FILE, OURS, code
from megaresnorm.convert.tokenizers import check_equal, sample_texts, tokenizer_files
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.errors import ConfigError, ConversionError

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def main(argv):\n    for i, name in enumerate(argv):\n        print(f\"{i}: {name}\")\n",
    "In the beginning God created the heaven and the earth.\n\nAnd the earth was without form, and void;",
    "你好，世界。 Привет, мир! 😀 3.14159 = π",
)  # fmt: skip


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
    tolerance: float | None = None,
    progress: Callable[[str, int], Progress] = lambda label, total: lambda count: None,
) -> Report:
    """Write ``out`` for Transformers.

    checkpoint: one of ours, or a run: its newest.   arch: as ``plan``.   dtype: of the written weights, the checkpoint's where it
    is None.   max_memory: bytes for tensors while writing; verifying takes the whole model, twice.   progress: makes from a label
    and a number of bytes what is called with those that are done.
    Raises: ConfigError, CheckpointError or DataError for what cannot be converted, ConversionError where the written model does not
    compute the same; ``out`` is not there then.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists already, and nothing is written over; give another folder")
    native = NativeModel(checkpoint)
    chosen, dtype = plan(native.recipe, arch), dtype or native.dtype
    tokenizer = native.tokenizer() if with_tokenizer else None
    entries = list(weight_entries(native, chosen, dtype, max_memory // 8))
    num_bytes = sum(entry.num_bytes for entry in entries)
    check_space(out, num_bytes)
    if verify:
        check_memory(num_bytes // dtype.itemsize * 4)
    with new_folder(out) as folder:
        write_weights(folder, entries, max_shard_bytes, progress("writing", num_bytes))
        config = config_of(native, chosen, dtype, tokenizer)
        write_json(folder / CONFIG, config)
        ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **ends})
        if chosen.family.name == OURS:
            (folder / FILE).write_bytes(code())
        if chosen.fold is not None and dtype == native.dtype:
            write_remainder(folder, remainder_entries(native, chosen, max_memory // 8))
        if tokenizer is not None:
            for name, content in tokenizer_files(tokenizer).items():
                (folder / name).write_bytes(content)
            check_equal(tokenizer, folder, list(sample_texts()))
        agreement = rounding = None
        if verify:
            agreement, rounding = verified(native, folder, tokenizer, dtype, tolerance)
        files = len(list(folder.glob("model*.safetensors")))
        report = Report(out, chosen, num_bytes, files, agreement, rounding)
        (folder / "README.md").write_text(model_card(native, report, dtype), encoding="utf-8")
    return report


def weight_entries(native: NativeModel, chosen: Plan, dtype: torch.dtype, chunk_bytes: int) -> Iterator[Entry]:
    """Every tensor of the architecture, made a chunk of rows at a time."""
    factor = chosen.fold.factor if chosen.fold is not None else lambda name: 1.0
    for link in links(chosen.family, chosen.recipe, native.table, factor):
        chunks = functools.partial(_chunks, link, native, dtype, chunk_bytes)
        yield Entry(link.theirs, dtype, link.shape, chunks)
    for name, shape, _ in constants(chosen.family, chosen.recipe):
        yield Entry(name, dtype, shape, functools.partial(_zeros, shape, dtype))


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
        OURS: {
            "version": megaresnorm.__version__,
            "model": native.recipe.model_dump(exclude_none=True),
            "tokenizer": None if tokenizer is None else tokenizer.describe(),
        },
    }


def verified(
    native: NativeModel, folder: Path, tokenizer: Tokenizer | None, dtype: torch.dtype, tolerance: float | None
) -> tuple[Agreement, Agreement | None]:
    """What was written beside the checkpoint, and what rounding to ``dtype`` has changed. Raises: ConversionError."""
    vocab_size, seq_len = native.recipe.vocab_size, native.recipe.seq_len
    assert vocab_size is not None
    prompts = random_prompts(vocab_size, seq_len)
    if tokenizer is not None:
        prompts += text_prompts(TEXTS, tokenizer, vocab_size, seq_len)
    rounded_to = dtype if dtype.itemsize < native.dtype.itemsize else None
    options = {} if tolerance is None else {"tolerance": tolerance}
    theirs = of_theirs(load_theirs(folder))
    agreement = compare(of_ours(native.model(rounded_to)), theirs, prompts, **options)
    if not agreement.passed:
        raise ConversionError(
            f"FAIL: the written model does not compute the same: logits differ by up to {agreement.largest:.3g} of {agreement.scale:.3g} "
            f"(allowed {agreement.tolerance:.2g} of that), {agreement.clear_top1:.2%} have the same likeliest token; nothing was kept"
        )
    return agreement, None if rounded_to is None else compare(of_ours(native.model()), theirs, prompts)


def check_memory(num_bytes: int) -> None:
    """Raises: ConfigError where two models of so many bytes do not fit."""
    have = _available_memory()
    if have is not None and 2 * num_bytes > have:
        raise ConfigError(
            f"verifying needs {human_bytes(2 * num_bytes)} of memory, {human_bytes(have)} are free; switch it off by --verify off"
        )


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def model_card(native: NativeModel, report: Report, dtype: torch.dtype) -> str:
    """README.md: what the model is, and how exactly it was converted."""
    recipe, state, chosen = native.recipe, native.state, report.plan
    remote = chosen.family.name == OURS
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- megaresnorm", f"- {recipe.topology}", "---", "",
        f"# {recipe.topology}, {recipe.num_blocks} blocks", "",
        f"A decoder-only language model of {2 * recipe.num_blocks} sub-layers, trained with MegaResNorm and exported as "
        f"`{chosen.family.architecture}` in {str(dtype).removeprefix('torch.')}.", "",
        "| | |", "| --- | --- |",
        f"| residual topology | `{recipe.topology}` |",
        f"| width, blocks, heads (of keys and values) | {recipe.dim}, {recipe.num_blocks}, {recipe.num_heads} ({recipe.kv_heads}) |",
        f"| vocabulary, longest sequence | {recipe.vocab_size:,}, {recipe.seq_len:,} |",
        f"| parameters | {sum(spec.num_elements for spec in native.table.values()):,} |",
        f"| step, samples | {native.checkpoint.step:,}, {state.samples:,} |",
    ]  # fmt: skip
    if state.train_loss is not None:
        lines.append(f"| training loss, nats a token | {state.train_loss:.4f} |")
    trust = ", trust_remote_code=True" if remote else ""
    lines += ["", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
              f'model = AutoModelForCausalLM.from_pretrained("PATH"{trust})',
              'tokenizer = AutoTokenizer.from_pretrained("PATH")', "```", "", "## Exactness", ""]  # fmt: skip
    lines += [f"* {note}." for note in chosen.notes]
    if chosen.fold is not None:
        lines.append("* Constants of the topology are folded into the weights, which rounds them once more.")
    if report.agreement is None:
        lines.append("The logits were not compared with the checkpoint's.")
    else:
        lines += ["Logits in FP32 beside the checkpoint's:", "", "| | |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in report.agreement.rows().items()]
        lines.append("| verdict | PASS |")
    if report.rounding is not None:
        lines += ["", f"Rounding the weights moves logits by up to {report.rounding.largest:.3g} "
                  f"({report.rounding.top1:.2%} of the likeliest tokens stay)."]  # fmt: skip
    return "\n".join(lines) + "\n"

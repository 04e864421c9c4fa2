"""What the actions of megaresnorm convert share: options, settings, and what they print."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megaresnorm.cli.arguments import Words, count_up_to, memory, path, path_text, share, size, words
from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_SEQ_LEN
from megaresnorm.text import say, shown

if TYPE_CHECKING:
    import torch

    from megaresnorm.convert.compare import Agreement
    from megaresnorm.convert.export import ExportSettings
    from megaresnorm.convert.from_hf import Imported

_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
Model = Annotated[Path, typer.Argument(parser=path, metavar="MODEL", help="folder with config.json and safetensors")]
OutRun = Annotated[
    Path, typer.Argument(parser=path, metavar="OUT", help="folder to make: a checkpoint and recipe.yaml")
]
_WRITTEN = "type of the written weights; unset: that of the model that was trained on, or the checkpoint's"
Dtype = Annotated[Literal["fp32", "bf16", "fp16", "fp64"] | None, typer.Option(help=_WRITTEN)]
ShardSize = Annotated[
    int,
    typer.Option("--max-shard-size", parser=size, metavar="SIZE", show_default="5GB", help="largest file, as 500MB"),
]
WithTokenizer = Annotated[Literal["auto", "none"], typer.Option("--tokenizer", help="none: leave the tokenizer out")]
_KNOWN = "fields of config.json that are not known, and that you know not to matter, separated by commas"
IgnoreFields = Annotated[Words, typer.Option(parser=words, metavar="NAMES", help=_KNOWN)]
DataPath = Annotated[str, typer.Option("--data", parser=path_text, metavar="PATH", help="the recipe's data.path")]
_BUFFER = "memory for tensors while reading and writing"
_SHORTER = "longest sequence, to be shorter than the model's"
SeqLen = Annotated[int | None, typer.Option(parser=count_up_to(MAX_SEQ_LEN), metavar="N", help=_SHORTER)]
_LARGEST = "largest difference, as a share of the largest logit [2e-5]"
Tolerance = Annotated[float | None, typer.Option(parser=share, metavar="X", help=_LARGEST)]
Memory = Annotated[int, typer.Option("--max-memory", parser=memory, metavar="SIZE", show_default="4GB", help=_BUFFER)]


def check_kind(model: Path, *, megatron: bool) -> None:
    """Check that a folder holds weights of the kind that a command reads.

    Raises:
        ConfigError: they are of the other kind.
    """
    from megaresnorm.convert.config_json import is_megatron

    if is_megatron(model) != megatron:
        other, whose = ("from-hf", "Transformers") if megatron else ("from-megatron", "Megatron-Core")
        raise ConfigError(f"{model}: holds weights of {whose}; use megaresnorm convert {other}")


def print_imported(found: Imported, source: Path | None, data: str, end_token: str | None) -> None:
    """What was read, and the commands that come next.

    Args:
        source: folder of the tokenizer; None where data are already prepared.
    """
    from megaresnorm.data.tokenizer_files import ends_of_documents
    from megaresnorm.telemetry.log import console

    model = found.model
    origin = "a model of MegaResNorm" if found.family is None else found.family.name
    say(f"wrote     {found.checkpoint}")
    say(f"model     {model.topology}, {model.num_blocks} blocks, width {model.dim}, from {origin}")
    for note in found.notes:
        console.print(shown(f"note      {note}"), style="yellow")
    if found.same_bits:
        console.print("verdict   every weight was read again and is that of the files, bit for bit")
    else:
        print_agreement(found.agreement)
    if found.tokenizer is not None and source is not None:
        say(f"tokenizer {ends_of_documents(found.tokenizer)}")
        bos = "" if found.tokenizer.bos is None else " --bos"
        end = "" if end_token is None else f" --end-token {shlex.quote(end_token)}"
        kind = found.tokenizer.describe()["kind"]  # bytes and SentencePiece come back from an export of ours
        file = {"bytes": "bytes", "sentencepiece": str(source / "tokenizer.model")}.get(kind)
        folder = shlex.quote(file or str(source))
        say(f"prepare   megaresnorm prepare TEXT --tokenizer {folder}{bos}{end} --out {shlex.quote(data)}")
    say(f"train on  megaresnorm train {shlex.quote(str(found.recipe))}")
    settings = found.settings
    say(
        f"          in {settings.train.output}, for {settings.train.steps:,} steps of lr {settings.optim.lr:g} after "
        f"{settings.schedule.warmup_steps} of warm-up, in {settings.precision.compute}"
    )


def export_settings(
    dtype: str | None,
    max_shard_size: int,
    max_memory: int,
    tokenizer: str,
    progress: Callable[[str, int], Callable[[int], None]],
) -> ExportSettings:
    from megaresnorm.convert.export import ExportSettings

    return ExportSettings(
        dtype=_dtype(dtype),
        max_shard_bytes=max_shard_size,
        max_memory=max_memory,
        with_tokenizer=tokenizer == "auto",
        progress=progress,
    )


def tolerance_of(tolerance: float | None, verify: str) -> float:
    """The value of --tolerance or its default. Refused with --verify off, where it has no effect."""
    from megaresnorm.convert.compare import TOLERANCE

    if tolerance is not None and verify == "off":
        raise ConfigError(f"--tolerance {tolerance:g} has no effect with --verify off; remove one of them")
    return TOLERANCE if tolerance is None else tolerance


def print_agreement(agreement: Agreement | None) -> None:
    from megaresnorm.telemetry.log import Table, console

    if agreement is None:
        console.print("verdict   not verified")
        return
    table = Table(show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, value in agreement.rows().items():
        table.add_row(name, value)
    console.print(table)
    console.print("PASS" if agreement.passed else "FAIL", style="green" if agreement.passed else "red")


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, _TYPES[name])


def needs_transformers() -> None:
    """Refuse a missing or old Transformers, and keep it offline: everything that is converted is local."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import transformers
    except ImportError:
        raise ConfigError("converting needs transformers; install it with: pip install 'transformers>=5.0'") from None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ConfigError(
            f"transformers {transformers.__version__} is too old; install it with: pip install 'transformers>=5.0'"
        )

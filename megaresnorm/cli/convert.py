"""megaresnorm convert to-hf | from-hf | from-deepspeed | to-megatron | from-megatron | compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megaresnorm.cli.arguments import (
    CheckpointFolder,
    EndToken,
    NewFolder,
    Words,
    examples,
    new_app,
    path,
    path_text,
)
from megaresnorm.cli.conversion import (
    DataPath,
    Dtype,
    IgnoreFields,
    Memory,
    Model,
    OutRun,
    SeqLen,
    ShardSize,
    Tolerance,
    WithTokenizer,
    check_kind,
    export_settings,
    needs_transformers,
    print_agreement,
    print_imported,
    tolerance_of,
)
from megaresnorm.errors import ConfigError, ConversionError
from megaresnorm.resilience.signals import undone_on_sigterm
from megaresnorm.text import say, shown

NONE = Words()
_ARCHITECTURES = (
    "architecture: llama, qwen2, qwen3, granite, glm4, olmo2, minimax, gpt2, gpt_neox, starcoder2, stablelm, opt, "
    "bert-generation, gemma2, gemma3_text, mistral, olmo3, or remote-code, which brings its own code along for any "
    "topology; auto takes the first that holds the model exactly"
)
_Arch = Annotated[str, typer.Option(metavar="NAME", help=_ARCHITECTURES)]
_COMPARED = "compare logits of both models, which takes one after the other whole, in FP32; off where memory forbids it"
_Verify = Annotated[Literal["on", "off"], typer.Option(help=_COMPARED)]
_LAYERS = "which of Megatron's layers: they have different names"
_Implementation = Annotated[Literal["transformer_engine", "local"], typer.Option("--transformer-impl", help=_LAYERS)]
_WRITTEN_BY = "folder of safetensors that zero_to_fp32.py --safe_serialization has written"
_FromZero = Annotated[Path, typer.Argument(parser=path, metavar="FOLDER", help=_WRITTEN_BY)]
_CONFIG = "config.json of the model, or its folder, which has the tokenizer; unset: in FOLDER or the one above it"
_Config = Annotated[Path | None, typer.Option(parser=path, metavar="PATH", help=_CONFIG)]
_OURS = "recipe of a model of MegaResNorm, where FOLDER has the weights of one; its settings are those to train on with"
_DATA = "the recipe's data.path [runs/my-data]"
_TheirData = Annotated[str | None, typer.Option("--data", parser=path_text, metavar="PATH", help=_DATA)]
_RecipeFile = Annotated[Path | None, typer.Option("--recipe", parser=path, metavar="FILE", help=_OURS)]
_EITHER = "a checkpoint or a run of ours, or a folder of Transformers"
_A = Annotated[Path, typer.Argument(parser=path, metavar="A", help=_EITHER)]
_B = Annotated[Path, typer.Argument(parser=path, metavar="B", help="the other one")]
_TEXTS = (
    "a text in every line, where A or B is a checkpoint with a tokenizer; of more than 3,072 tokens both models are in "
    "memory together, otherwise one after the other [2,000 random tokens]"
)
_Prompts = Annotated[Path | None, typer.Option(parser=path, metavar="FILE", help=_TEXTS)]


def add_to(app: typer.Typer) -> None:
    """Add the convert command with its six actions."""
    convert = new_app(
        help="Convert to and from Transformers and Megatron-Core, from DeepSpeed.\n\nCheckpoints of whatever layout "
        "are read without starting ranks. Nothing is written over, and the output folder appears when it is complete."
    )
    to = examples("megaresnorm convert to-hf runs/quickstart/deepnorm-50 runs/quickstart/hf")
    back = examples("megaresnorm convert from-hf models/Qwen3-0.6B runs/qwen3 --seq-len 4096")
    convert.command("to-hf", epilog=to)(to_hf)
    convert.command("from-hf", epilog=back)(from_hf)
    theirs = examples(
        "python CHECKPOINT/zero_to_fp32.py CHECKPOINT CHECKPOINT/fp32 --safe_serialization",
        "megaresnorm convert from-deepspeed CHECKPOINT/fp32 runs/llama",
    )
    convert.command("from-deepspeed", epilog=theirs)(from_deepspeed)
    convert.command("to-megatron")(to_megatron)
    convert.command("from-megatron")(from_megatron)
    convert.command()(compare)
    app.add_typer(convert, name="convert")


def to_hf(
    checkpoint: CheckpointFolder,
    out: NewFolder,
    *,
    arch: _Arch = "auto",
    dtype: Dtype = None,
    max_shard_size: ShardSize = 5 * 10**9,
    tokenizer: WithTokenizer = "auto",
    max_memory: Memory = 4 * 10**9,
    verify: _Verify = "on",
    tolerance: Tolerance = None,
) -> None:
    """Write a checkpoint as a model of Hugging Face Transformers: safetensors, config, tokenizer, model card.

    The result is loaded by Transformers and its logits are compared with the checkpoint's; exit code 7 if they differ.
    """
    needs_transformers()
    from megaresnorm.checkpoint.format import human_bytes
    from megaresnorm.convert import to_hf as writing
    from megaresnorm.telemetry.log import console, progress_bars

    with undone_on_sigterm(), progress_bars() as progress:
        report = writing.to_hf(
            checkpoint,
            out,
            arch=arch,
            verify=verify == "on",
            tolerance=tolerance_of(tolerance, verify),
            settings=export_settings(dtype, max_shard_size, max_memory, tokenizer, progress),
        )
    say(f"wrote     {report.folder}: {report.files} file(s), {human_bytes(report.num_bytes)}")
    say(f"as        {report.match.family.architecture} (model_type {report.match.family.name})")
    for note in report.match.notes:
        console.print(shown(f"note      {note}"), style="yellow")
    if report.match.fold is not None:
        console.print("note      constants of the topology are folded into the weights, which rounds them once more")
    print_agreement(report.agreement)
    if report.rounding is not None:
        console.print(
            f"rounding the weights moves logits by up to {report.rounding.largest:.3g}; {report.rounding.top1:.2%} of "
            "the likeliest tokens stay"
        )


def from_hf(
    model: Model,
    out: OutRun,
    *,
    seq_len: SeqLen = None,
    tokenizer: WithTokenizer = "auto",
    end_token: EndToken = None,
    ignore_fields: IgnoreFields = NONE,
    data: DataPath = "runs/my-data",
    max_memory: Memory = 4 * 10**9,
    verify: _Verify = "on",
    tolerance: Tolerance = None,
) -> None:
    """Read a model of Hugging Face Transformers as a checkpoint that any layout can train on, with a recipe that does.

    The model is a downloaded folder (safetensors alone, never a pickle). A field or a tensor that our model has nothing
    for is refused by name.
    """
    needs_transformers()
    from megaresnorm.convert import from_hf as reading
    from megaresnorm.telemetry.log import progress_bars

    check_kind(model, megatron=False)
    with undone_on_sigterm(), progress_bars() as progress:
        found = reading.from_hf(
            model,
            out,
            seq_len=seq_len,
            data=data,
            max_memory=max_memory,
            verify=verify == "on",
            with_tokenizer=tokenizer == "auto",
            end_token=end_token,
            ignore_fields=list(ignore_fields),
            tolerance=tolerance_of(tolerance, verify),
            progress=progress,
        )
    print_imported(found, model, data, end_token)


def from_deepspeed(
    folder: _FromZero,
    out: OutRun,
    *,
    config: _Config = None,
    recipe: _RecipeFile = None,
    seq_len: SeqLen = None,
    tokenizer: WithTokenizer = "auto",
    end_token: EndToken = None,
    ignore_fields: IgnoreFields = NONE,
    data: _TheirData = None,
    max_memory: Memory = 4 * 10**9,
    verify: _Verify = "on",
    tolerance: Tolerance = None,
) -> None:
    """Read weights that were trained with DeepSpeed as a checkpoint that any layout can train on.

    They are those of a model of Transformers, or of one of MegaResNorm (--recipe), as zero_to_fp32.py writes them.
    DeepSpeed's own files are pickles, which are never read: for a folder of them the error has the command that makes
    safetensors of them. With --recipe, --verify compares all weights, bit for bit.
    """
    from megaresnorm.convert import from_deepspeed as reading
    from megaresnorm.telemetry.log import progress_bars

    shared: dict[str, Any] = {"max_memory": max_memory, "verify": verify == "on", "with_tokenizer": tokenizer == "auto"}
    if recipe is not None:
        of_theirs = {"--config": config, "--seq-len": seq_len, "--end-token": end_token, "--data": data}
        _no_effect(of_theirs | {"--ignore-fields": ignore_fields or None, "--tolerance": tolerance}, "--recipe")
        with undone_on_sigterm(), progress_bars() as progress:
            found = reading.of_recipe(folder, out, recipe, progress=progress, **shared)
        return print_imported(found, None, "", None)
    needs_transformers()
    path_of_data = "runs/my-data" if data is None else data
    with undone_on_sigterm(), progress_bars() as progress:
        found, source = reading.of_transformers(
            folder,
            out,
            config,
            seq_len=seq_len,
            data=path_of_data,
            end_token=end_token,
            ignore_fields=list(ignore_fields),
            tolerance=tolerance_of(tolerance, verify),
            progress=progress,
            **shared,
        )
    print_imported(found, source, path_of_data, end_token)


def _no_effect(given: dict[str, object], beside: str) -> None:
    """Refuse options that have no effect beside another one."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name} has no effect with {beside}; remove one of them")


def from_megatron(
    model: Model,
    out: OutRun,
    *,
    tokenizer: WithTokenizer = "auto",
    end_token: EndToken = None,
    ignore_fields: IgnoreFields = NONE,
    data: DataPath = "runs/my-data",
    max_memory: Memory = 4 * 10**9,
) -> None:
    """Read weights of Megatron-Core's GPT model as a checkpoint: safetensors with the names of GPTModel (0.16.1).

    They are those of one rank, with config.json for its settings; docs/conversion.md has the lines that write them.
    Logits are not compared.
    """
    needs_transformers()  # for the tokenizer alone
    from megaresnorm.convert import from_hf as reading
    from megaresnorm.telemetry.log import progress_bars

    check_kind(model, megatron=True)
    with undone_on_sigterm(), progress_bars() as progress:
        found = reading.from_hf(
            model,
            out,
            data=data,
            max_memory=max_memory,
            verify=False,
            with_tokenizer=tokenizer == "auto",
            end_token=end_token,
            ignore_fields=list(ignore_fields),
            progress=progress,
        )
    print_imported(found, model, data, end_token)


def to_megatron(
    checkpoint: CheckpointFolder,
    out: NewFolder,
    *,
    transformer_impl: _Implementation = "transformer_engine",
    dtype: Dtype = None,
    max_shard_size: ShardSize = 5 * 10**9,
    tokenizer: WithTokenizer = "auto",
    max_memory: Memory = 4 * 10**9,
) -> None:
    """Write a pre-norm checkpoint as weights of Megatron-Core's GPT model: safetensors with its names (0.16.1).

    They are those of one rank, with its settings as config.json; docs/conversion.md has the lines that load them.
    """
    needs_transformers()
    from megaresnorm.convert import export
    from megaresnorm.telemetry.log import progress_bars

    with undone_on_sigterm(), progress_bars() as progress:
        folder = export.to_megatron(
            checkpoint,
            out,
            implementation=transformer_impl,
            settings=export_settings(dtype, max_shard_size, max_memory, tokenizer, progress),
        )
    say(f"wrote     {folder}, for megatron-core's {transformer_impl} layers; the logits were not compared")


def compare(one: _A, other: _B, *, prompts: _Prompts = None, tolerance: Tolerance = None) -> int:
    """Compare the logits of two models in FP32; exit code 7 if they differ."""
    if any((folder / "config.json").exists() for folder in (one, other)):
        needs_transformers()
    from megaresnorm.convert.compare import TOLERANCE
    from megaresnorm.convert.models import compare_models
    from megaresnorm.convert.prompts import read_prompts

    texts = None if prompts is None else read_prompts(prompts)
    agreement, note = compare_models((one, other), texts, TOLERANCE if tolerance is None else tolerance)
    if note:
        say(f"note      {note}")
    print_agreement(agreement)
    return 0 if agreement.passed else ConversionError.exit_code

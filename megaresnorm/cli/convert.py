"""megaresnorm convert to-hf | from-hf | to-megatron | from-megatron | compare."""

from __future__ import annotations

import argparse
import os
import shlex
from typing import TYPE_CHECKING

from megaresnorm.cli.arguments import Commands, count_up_to, memory, names, path, path_text, share, size
from megaresnorm.errors import ConfigError, ConversionError
from megaresnorm.recipe.section import MAX_SEQ_LEN
from megaresnorm.text import say, shown

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from megaresnorm.convert.compare import Agreement
    from megaresnorm.convert.export import ExportSettings

_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
_CHECKPOINT = "a checkpoint, or the output folder of a run: its newest one"


def add_convert(commands: Commands) -> None:
    """Add the convert command with its five actions."""
    convert = commands.add_parser(
        "convert",
        help="to and from Hugging Face Transformers and Megatron-Core",
        description="Convert checkpoints, in whatever layout they were saved, without starting ranks. Nothing is "
        "written over, and the output folder appears when it is complete.",
    )
    actions = convert.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_to_hf(actions)
    _add_from_hf(actions)
    _add_megatron(actions)
    _add_compare(actions)


def _add_to_hf(actions: Commands) -> None:
    to_hf = actions.add_parser(
        "to-hf",
        help="a checkpoint as a model of Hugging Face Transformers",
        description="Write a checkpoint as a model of Hugging Face Transformers: safetensors, config, tokenizer, model "
        "card. The result is loaded by Transformers and its logits are compared with the checkpoint's; exit code 7 if "
        "they differ.",
        epilog="example: megaresnorm convert to-hf runs/quickstart/deepnorm-50 runs/quickstart/hf",
    )
    to_hf.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help=_CHECKPOINT)
    to_hf.add_argument("out", type=path, metavar="OUT", help="folder to make")
    to_hf.add_argument(
        "--arch",
        default="auto",
        help="architecture: llama, qwen2, qwen3, granite, glm4, olmo2, minimax, gpt2, gpt_neox, starcoder2, stablelm, "
        "opt, bert-generation, gemma2, gemma3_text, mistral, olmo3, or remote-code, which brings its own code "
        "along for any topology; auto takes the first that holds the model exactly [auto]",
    )
    _add_writing(to_hf)
    _add_verifying(to_hf)
    to_hf.set_defaults(run=_to_hf, undone=True)


def _add_from_hf(actions: Commands) -> None:
    from_hf = actions.add_parser(
        "from-hf",
        help="a model of Hugging Face Transformers as a checkpoint, to train it on",
        description="Read a downloaded model of Hugging Face Transformers (safetensors alone, never a pickle) and "
        "write a checkpoint that any layout can train on, with a recipe that does. A field or a tensor that our model "
        "has nothing for is refused by name.",
        epilog="example: megaresnorm convert from-hf models/Qwen3-0.6B runs/qwen3 --seq-len 4096",
    )
    from_hf.add_argument(
        "--seq-len", type=count_up_to(MAX_SEQ_LEN), metavar="N", help="longest sequence, to be shorter than the model's"
    )
    _add_reading(from_hf)
    _add_verifying(from_hf)
    from_hf.set_defaults(run=_from_hf, undone=True, megatron=False)


def _add_megatron(actions: Commands) -> None:
    to_megatron = actions.add_parser(
        "to-megatron",
        help="a checkpoint as weights of Megatron-Core's GPT model",
        description="Write a pre-norm checkpoint as safetensors with the names of Megatron-Core's GPTModel (0.16.1) on "
        "one rank, and its settings as config.json; docs/conversion.md has the lines that load them.",
    )
    to_megatron.add_argument("checkpoint", type=path, metavar="CHECKPOINT", help=_CHECKPOINT)
    to_megatron.add_argument("out", type=path, metavar="OUT", help="folder to make")
    to_megatron.add_argument(
        "--transformer-impl",
        choices=["transformer_engine", "local"],
        default="transformer_engine",
        help="which of Megatron's layers: they have different names [transformer_engine]",
    )
    _add_writing(to_megatron)
    to_megatron.set_defaults(run=_to_megatron, undone=True)
    from_megatron = actions.add_parser(
        "from-megatron",
        help="weights of Megatron-Core's GPT model as a checkpoint",
        description="Read safetensors with the names of Megatron-Core's GPTModel (0.16.1) on one rank and config.json "
        "with its settings; docs/conversion.md has the lines that write them. Logits are not compared.",
    )
    _add_reading(from_megatron)
    from_megatron.set_defaults(run=_from_hf, undone=True, megatron=True, seq_len=None, verify="off", tolerance=None)


def _add_compare(actions: Commands) -> None:
    compare = actions.add_parser(
        "compare",
        help="whether two models compute the same",
        description="Compare the logits of two models, each a checkpoint of ours or a folder of Hugging Face "
        "Transformers, in FP32. Exit code 7 if they differ.",
    )
    compare.add_argument("one", type=path, metavar="A")
    compare.add_argument("other", type=path, metavar="B")
    compare.add_argument(
        "--prompts",
        type=path,
        metavar="FILE",
        help="a text in every line, where A or B is a checkpoint with a tokenizer; of more than 3,072 tokens both "
        "models are in memory together, otherwise one after the other [2,000 random tokens]",
    )
    _add_tolerance(compare)
    compare.set_defaults(run=_compare)


def _add_writing(command: argparse.ArgumentParser) -> None:
    _add_tokenizer(command)
    what = "type of the written weights [that of the model that was trained on, or the checkpoint's]"
    command.add_argument("--dtype", choices=list(_TYPES), help=what)
    command.add_argument(
        "--max-shard-size", type=size, default=5 * 10**9, metavar="SIZE", help="largest file, such as 500MB [5GB]"
    )
    _add_memory(command)


def _add_tokenizer(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tokenizer", choices=["auto", "none"], default="auto", help="none: leave the tokenizer out [auto]"
    )


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=path, metavar="MODEL", help="folder with config.json and safetensors")
    command.add_argument("out", type=path, metavar="OUT", help="folder to make: a checkpoint and recipe.yaml")
    _add_tokenizer(command)
    command.add_argument("--end-token", metavar="TOKEN", help="token that ends documents [the one its files name]")
    what = "fields of config.json that are not known, and that you know not to matter, separated by commas"
    command.add_argument("--ignore-fields", type=names, default=[], metavar="NAMES", help=what)
    command.add_argument(
        "--data", type=path_text, default="runs/my-data", metavar="PATH", help="the recipe's data.path [runs/my-data]"
    )
    _add_memory(command)


def _add_memory(command: argparse.ArgumentParser) -> None:
    what = "memory for tensors while reading and writing [4GB]"
    command.add_argument("--max-memory", type=memory, default=4 * 10**9, metavar="SIZE", help=what)


def _add_verifying(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--verify",
        choices=["on", "off"],
        default="on",
        help="compare logits of both models, which takes one after the other whole, in FP32; "
        "off where memory forbids it [on]",
    )
    _add_tolerance(command)


def _add_tolerance(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tolerance", type=share, metavar="X", help="largest difference, as a share of the largest logit [2e-5]"
    )


def _to_hf(arguments: argparse.Namespace) -> int:
    _needs_transformers()
    from megaresnorm.checkpoint.format import human_bytes
    from megaresnorm.convert.to_hf import to_hf
    from megaresnorm.telemetry.log import console, progress_bars

    with progress_bars() as progress:
        report = to_hf(
            arguments.checkpoint,
            arguments.out,
            arch=arguments.arch,
            verify=arguments.verify == "on",
            tolerance=_tolerance_of(arguments),
            settings=_export_settings(arguments, progress),
        )
    say(f"wrote     {report.folder}: {report.files} file(s), {human_bytes(report.num_bytes)}")
    say(f"as        {report.match.family.architecture} (model_type {report.match.family.name})")
    for note in report.match.notes:
        console.print(shown(f"note      {note}"), style="yellow")
    if report.match.fold is not None:
        console.print("note      constants of the topology are folded into the weights, which rounds them once more")
    _print_agreement(report.agreement)
    if report.rounding is not None:
        console.print(
            f"rounding the weights moves logits by up to {report.rounding.largest:.3g}; {report.rounding.top1:.2%} of "
            "the likeliest tokens stay"
        )
    return 0


def _from_hf(arguments: argparse.Namespace) -> int:
    _needs_transformers()  # Megatron-Core's weights need it for their tokenizer alone
    from megaresnorm.convert.config_json import is_megatron
    from megaresnorm.convert.from_hf import from_hf
    from megaresnorm.data.tokenizer_files import ends_of_documents
    from megaresnorm.telemetry.log import console, progress_bars

    if is_megatron(arguments.model) != arguments.megatron:
        other, whose = ("from-hf", "Transformers") if arguments.megatron else ("from-megatron", "Megatron-Core")
        raise ConfigError(f"{arguments.model}: holds weights of {whose}; use megaresnorm convert {other}")
    with progress_bars() as progress:
        found = from_hf(
            arguments.model,
            arguments.out,
            seq_len=arguments.seq_len,
            data=arguments.data,
            max_memory=arguments.max_memory,
            verify=arguments.verify == "on",
            with_tokenizer=arguments.tokenizer == "auto",
            end_token=arguments.end_token,
            ignore_fields=arguments.ignore_fields,
            tolerance=_tolerance_of(arguments),
            progress=progress,
        )
    model = found.model
    say(f"wrote     {found.checkpoint}")
    say(f"model     {model.topology}, {model.num_blocks} blocks, width {model.dim}, from {found.family.name}")
    for note in found.notes:
        console.print(shown(f"note      {note}"), style="yellow")
    _print_agreement(found.agreement)
    if found.tokenizer is not None:
        say(f"tokenizer {ends_of_documents(found.tokenizer)}")
        bos = "" if found.tokenizer.bos is None else " --bos"
        end = "" if arguments.end_token is None else f" --end-token {shlex.quote(arguments.end_token)}"
        kind = found.tokenizer.describe()["kind"]  # bytes and SentencePiece come back from an export of ours
        file = {"bytes": "bytes", "sentencepiece": str(arguments.model / "tokenizer.model")}.get(kind)
        folder = shlex.quote(file or str(arguments.model))
        say(f"prepare   megaresnorm prepare TEXT --tokenizer {folder}{bos}{end} --out {shlex.quote(arguments.data)}")
    say(f"train on  megaresnorm train {shlex.quote(str(found.recipe))}")
    settings = found.settings
    say(
        f"          in {settings.train.output}, for {settings.train.steps:,} steps of lr {settings.optim.lr:g} after "
        f"{settings.schedule.warmup_steps} of warm-up, in {settings.precision.compute}"
    )
    return 0


def _to_megatron(arguments: argparse.Namespace) -> int:
    _needs_transformers()
    from megaresnorm.convert.export import to_megatron
    from megaresnorm.telemetry.log import progress_bars

    with progress_bars() as progress:
        folder = to_megatron(
            arguments.checkpoint,
            arguments.out,
            implementation=arguments.transformer_impl,
            settings=_export_settings(arguments, progress),
        )
    say(f"wrote     {folder}, for megatron-core's {arguments.transformer_impl} layers; the logits were not compared")
    return 0


def _export_settings(
    arguments: argparse.Namespace, progress: Callable[[str, int], Callable[[int], None]]
) -> ExportSettings:
    from megaresnorm.convert.export import ExportSettings

    return ExportSettings(
        dtype=_dtype(arguments.dtype),
        max_shard_bytes=arguments.max_shard_size,
        max_memory=arguments.max_memory,
        with_tokenizer=arguments.tokenizer == "auto",
        progress=progress,
    )


def _compare(arguments: argparse.Namespace) -> int:
    if any((folder / "config.json").exists() for folder in (arguments.one, arguments.other)):
        _needs_transformers()
    from megaresnorm.convert.compare import TOLERANCE
    from megaresnorm.convert.models import compare_models
    from megaresnorm.convert.prompts import read_prompts

    texts = None if arguments.prompts is None else read_prompts(arguments.prompts)
    tolerance = TOLERANCE if arguments.tolerance is None else arguments.tolerance
    agreement, note = compare_models((arguments.one, arguments.other), texts, tolerance)
    if note:
        say(f"note      {note}")
    _print_agreement(agreement)
    return 0 if agreement.passed else ConversionError.exit_code


def _tolerance_of(arguments: argparse.Namespace) -> float:
    """The value of --tolerance or its default. Refused with --verify off, where it has no effect."""
    from megaresnorm.convert.compare import TOLERANCE

    if arguments.tolerance is not None and arguments.verify == "off":
        raise ConfigError(f"--tolerance {arguments.tolerance:g} has no effect with --verify off; remove one of them")
    return TOLERANCE if arguments.tolerance is None else arguments.tolerance


def _print_agreement(agreement: Agreement | None) -> None:
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


def _needs_transformers() -> None:
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

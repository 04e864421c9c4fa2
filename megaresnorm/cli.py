"""megaresnorm train | prepare | depth | schema: parse, call the library, print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaresnorm.errors import ConfigError, UserError

if TYPE_CHECKING:  # commands import what they need, so that --help is instant
    from rich.table import Table

    from megaresnorm.recipe import Recipe

Commands = Any  # argparse keeps the type of add_subparsers() private

EPILOG = """exit codes: 0 done, 1 unexpected, 2 bad recipe or arguments, 3 bad data, 4 bad checkpoint, 5 the run cannot go on,
130 stopped by Ctrl-C and 143 by SIGTERM, with a checkpoint saved"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; errors that the user can cause are one line on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as e:
        print(f"megaresnorm: error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("megaresnorm: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megaresnorm",
        description="Pretraining of transformers hundreds of layers deep.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_prepare(commands)
    _add_depth(commands)
    schema = commands.add_parser("schema", help="print the JSON schema of a recipe, for editors")
    schema.set_defaults(run=_schema)
    return parser


def _add_train(commands: Commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a recipe, or go on training it",
        description="Train the run of a recipe. If its output folder has a checkpoint, the run goes on from the newest one.",
        epilog="example: megaresnorm train configs/quickstart.yaml model.topology=keel train.steps=100",
    )
    train.add_argument("recipe", help="YAML file, as in configs/")
    train.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file"
    )
    train.add_argument(
        "--dry-run", action="store_true", help="check recipe and data, print the resolved recipe, and end"
    )
    train.set_defaults(run=_train)


def _add_prepare(commands: Commands) -> None:
    prepare = commands.add_parser(
        "prepare",
        help="turn text into token files",
        description="Tokenize text into a folder with Megatron's .bin/.idx files. A folder that is the result of the same "
        "sources and settings is reused.",
        epilog="example: megaresnorm prepare --corpus stdlib --tokenizer sentencepiece --vocab-size 2048 --out runs/data",
    )
    add = prepare.add_argument
    add("paths", nargs="*", metavar="PATH", help=".txt files, .jsonl files, or folders of them")
    add("--corpus", choices=["stdlib"], help="a built-in corpus: stdlib, the sources of this Python's own library")
    add("--out", required=True, type=Path, help="folder to make")
    add("--tokenizer", default="bytes", help="bytes, sentencepiece (trained on the text), or a .model file [bytes]")
    add("--vocab-size", type=_count, help="pieces of a trained sentencepiece model [8192]")
    add("--text-key", default="text", help="key of the text in .jsonl objects [text]")
    add("--workers", type=_count, default=os.cpu_count() or 1, help="processes [all cores]")
    add("--overwrite", action="store_true", help="replace another data set at --out once the new one is complete")
    prepare.set_defaults(run=_prepare)


def _add_depth(commands: Commands) -> None:
    depth = commands.add_parser(
        "depth",
        help="what depth does to topologies",
        description="Probe topologies at several depths: RMS of the stream, ratio of the gradients before the first and after "
        "the last block, and the model update ||dF|| of one SGD step (per unit of learning rate) and one AdamW step (lr 1e-3). "
        "FP64, random tokens, medians over seeds.",
        epilog="example: megaresnorm depth --probe --topologies post,deepnorm,keel --depths 6,25,100 --json probe.json",
    )
    add = depth.add_argument
    add("--probe", action="store_true", required=True, help="measure models at initialisation and after one step")
    add(
        "--topologies",
        type=_names,
        default=["pre", "post", "deepnorm", "keel"],
        metavar="A,B",
        help="[pre,post,deepnorm,keel]",
    )
    add("--depths", type=_counts, default=[6, 12, 25, 50, 100], metavar="N,M", help="blocks [6,12,25,50,100]")
    add("--seeds", type=_count, default=3, help="how many seeds [3]")
    add("--dim", type=_count, default=64, help="width; the ffn is twice as wide [64]")
    add("--json", type=Path, metavar="FILE", help="write every result here")
    depth.set_defaults(run=_depth)


def _train(arguments: argparse.Namespace) -> int:
    from megaresnorm.config import dump_recipe, load_recipe
    from megaresnorm.telemetry.log import configure_logging, console

    configure_logging()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        return _dry_run(recipe)
    from megaresnorm.resilience.signals import StopSignals
    from megaresnorm.trainer import Run

    with StopSignals() as stop:
        run = Run(recipe)
        console.print(f"recipe    {run.output / 'recipe.yaml'}\n{dump_recipe(run.recipe).rstrip()}", markup=False)
        console.print("\n".join(run.describe()), markup=False)
        summary = run.train(stop)
        text = None if summary.exit_code else run.sample_text()
    if text is not None:
        console.print(f"\n--- sample ---\n{text}\n--------------\n", markup=False)
    if summary.valid_loss is not None and summary.unigram_entropy is not None:
        gap = summary.unigram_entropy - summary.valid_loss
        verdict = "better" if gap > 0 else "worse"
        console.print(
            f"validation loss {summary.valid_loss:.4f} nats a token; unigram entropy {summary.unigram_entropy:.4f}, "
            f"so {abs(gap):.4f} nats {verdict} than knowing only how frequent each token is"
        )
    console.print(f"checkpoint {summary.checkpoint}\nweights    {summary.weights_digest}", markup=False)
    return summary.exit_code


def _dry_run(recipe: Recipe) -> int:
    from megaresnorm.config import dump_recipe
    from megaresnorm.data.dataset import open_dataset, open_samples, resolve_vocab
    from megaresnorm.model.lint import check
    from megaresnorm.model.parameters import parameter_table

    for finding in check(recipe):
        print(f"warning: {finding.message}")
    data = open_dataset(recipe.data.path)
    recipe = resolve_vocab(recipe, data)
    open_samples(data, recipe)
    parameters = sum(spec.num_elements for spec in parameter_table(recipe.model).values())
    print(f"{dump_recipe(recipe)}# {parameters:,} parameters; recipe and data can be used")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    if bool(arguments.corpus) == bool(arguments.paths):
        raise ConfigError("give either --corpus stdlib or at least one PATH")
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from megaresnorm.data.corpus import find_files
    from megaresnorm.data.prepare import PrepareJob, prepare

    job = PrepareJob(
        out=arguments.out,
        corpus=arguments.corpus,
        paths=tuple(arguments.paths),
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        text_key=arguments.text_key,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    files = find_files(job.corpus, job.paths)
    console = Console(highlight=False, soft_wrap=True)
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("tokenizing", total=sum(f.num_bytes for f in files))
        result = prepare(job, files, lambda num_bytes: progress.advance(task, num_bytes))
    verb = "reused" if result.reused else "prepared"
    print(
        f"{verb} {result.folder}: {result.documents:,} documents, {result.tokens:,} tokens, vocabulary {result.vocab_size:,}"
    )
    return 0


def _depth(arguments: argparse.Namespace) -> int:
    from megaresnorm.model.topology import topology
    from megaresnorm.telemetry.depth import ProbeSetting, probe_all, summary_rows
    from megaresnorm.telemetry.log import console, progress_bar

    for name in arguments.topologies:
        topology(name)
    setting = ProbeSetting(dim=arguments.dim, ffn_dim=2 * arguments.dim)
    if arguments.dim % setting.num_heads:
        raise ConfigError(f"--dim={arguments.dim} must be a multiple of {setting.num_heads}, the number of heads")
    if arguments.json:
        _write_json(arguments.json, {})  # found out now rather than after the probe
    results = []
    with progress_bar("probing", len(arguments.topologies) * len(arguments.depths) * arguments.seeds) as progress:
        for result in probe_all(arguments.topologies, arguments.depths, range(arguments.seeds), setting):
            results.append(result)
            progress.advance(progress.task_ids[0])
    console.print(_probe_table(summary_rows(results)))
    if arguments.json:
        _write_json(arguments.json, {"setting": asdict(setting), "results": [asdict(r) for r in results]})
    return 0


def _write_json(path: Path, value: dict) -> None:
    try:
        path.write_text(json.dumps(value, indent=1))
    except OSError as e:
        raise ConfigError(f"--json {path}: cannot be written ({e.strerror})") from None


def _probe_table(rows: list[dict]) -> Table:
    from rich.table import Table

    table = Table(title="at initialisation and after one step (medians over seeds)")
    table.add_column("topology", no_wrap=True, min_width=12)
    for heading in ("blocks", "stream RMS", "gradient ratio", "SGD ||dF||/lr", "AdamW ||dF||"):
        table.add_column(heading, justify="right")
    for row in rows:
        values = (row["stream_rms"], row["gradient_ratio"], row["sgd_update"], row["adam_update"])
        table.add_row(row["topology"], str(row["num_blocks"]), *(f"{v:.3g}" for v in values))
    return table


def _schema(arguments: argparse.Namespace) -> int:
    print(json.dumps(recipe_schema(), indent=1))
    return 0


def recipe_schema() -> dict:
    """JSON schema of a recipe; the names of the topologies are added to it."""
    from megaresnorm.model.topology import TOPOLOGIES
    from megaresnorm.recipe import Recipe

    schema = Recipe.model_json_schema()
    schema["$defs"]["ModelRecipe"]["properties"]["topology"]["enum"] = list(TOPOLOGIES)
    return schema


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())

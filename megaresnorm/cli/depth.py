"""megaresnorm depth --probe | --train: the effect of depth on topologies."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megaresnorm.cli.arguments import Commands, count_up_to, depths, names, path, write_json
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.recipe.section import MAX_WIDTH
from megaresnorm.text import say, shown

if TYPE_CHECKING:  # commands import what they need, so that --help is instant
    from megaresnorm.telemetry.log import Table


MAX_SEEDS = 10_000  # each is a model
# Of a block of width 1: ten matrices in FP64, each four times for gradients and steps.
PROBE_BYTES = 320


def add_depth(commands: Commands) -> None:
    """Add the depth command."""
    depth = commands.add_parser(
        "depth",
        help="what depth does to topologies",
        description="--probe measures models at several depths at initialisation and after one step: "
        "RMS of the stream, ratio of\n"
        "the gradients before the first and after the last block, and the model update ||dF|| "
        "of one SGD step (per unit of learning rate)\n"
        "and one AdamW step (lr 1e-3). FP64, random tokens, medians over seeds.\n"
        "\n"
        "--train trains every topology at every depth with every seed on the same data "
        "and writes loss curves and a table. Runs that are\n"
        "done are kept, one that was interrupted goes on. With --max-lr the learning rate "
        "rises linearly from 0 to optim.lr (5e-2 unless\n"
        "set), and the table says where each run lost what it had learned.",
        epilog="examples: "
        "megaresnorm depth --probe --topologies post,deepnorm,keel --depths 6,25,100 --json probe.json\n"
        "          megaresnorm depth --train --topologies pre,deepnorm --depths 12,50 --seeds 2 --out runs/depth\n"
        "          megaresnorm depth --train --recipe configs/pre-24.yaml --data runs/my-data "
        "--out runs/mine train.steps=2000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = depth.add_argument
    what = depth.add_mutually_exclusive_group(required=True)
    what.add_argument("--probe", action="store_true", help="measure models at initialisation and after one step")
    what.add_argument("--train", action="store_true", help="train them and compare")
    add(
        "--topologies",
        type=names,
        default=["pre", "post", "deepnorm", "keel"],
        metavar="A,B",
        help="[pre,post,deepnorm,keel]",
    )
    add("--depths", type=depths, metavar="N,M", help="blocks [probe: 6,12,25,50,100; train: 12,50]")
    add("--seeds", type=count_up_to(MAX_SEEDS), help="how many seeds [probe: 3; train: 2]")
    probe = depth.add_argument_group("only with --probe")
    probe.add_argument("--dim", type=count_up_to(MAX_WIDTH), help="width; the ffn is twice as wide [64]")
    probe.add_argument("--json", type=path, metavar="FILE", help="write every result here")
    train = depth.add_argument_group("only with --train")
    train.add_argument("--out", type=path, metavar="FOLDER", help="runs, comparison.md, .csv and .png [runs/depth]")
    train.add_argument(
        "--data",
        metavar="PATH",
        help="a data set [the recipe's, else bytes of this Python's library, prepared in FOLDER/data]",
    )
    train.add_argument(
        "--recipe",
        metavar="FILE",
        help="what the runs share [width 48, 150 steps of 8 x 64 tokens]; --max-lr replaces its schedule",
    )
    train.add_argument(
        "--max-lr", action="store_true", help="ramp the learning rate up to see what each topology bears"
    )
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that all runs share")
    depth.set_defaults(run=_depth)


def _depth(arguments: argparse.Namespace) -> int:
    from megaresnorm.model.topology import topology

    probe_only = {"--dim": arguments.dim, "--json": arguments.json}
    train_only = {
        "--out": arguments.out,
        "--data": arguments.data,
        "--recipe": arguments.recipe,
        "--max-lr": arguments.max_lr,
        "section.key=value": arguments.overrides,
    }
    for name, given in (train_only if arguments.probe else probe_only).items():
        if given:
            raise ConfigError(f"{name} has no effect with --{'probe' if arguments.probe else 'train'}; remove it")
    for name in arguments.topologies:
        topology(name)
    return _probe(arguments) if arguments.probe else _train(arguments)


def _probe(arguments: argparse.Namespace) -> int:
    from megaresnorm.studies.probe_depth import ProbeSetting, probe_all, summary_rows
    from megaresnorm.telemetry.log import console, progress_bar

    dim, depths, seeds = arguments.dim or 64, arguments.depths or [6, 12, 25, 50, 100], arguments.seeds or 3
    setting = ProbeSetting(dim=dim, ffn_dim=2 * dim)
    if dim % setting.num_heads:
        raise ConfigError(f"--dim={dim} must be a multiple of {setting.num_heads}, the number of heads")
    _check_memory(PROBE_BYTES * max(depths) * dim**2)
    if arguments.json:
        write_json(arguments.json, {})  # found out now rather than after the probe
    results = []
    with progress_bar("probing", len(arguments.topologies) * len(depths) * seeds) as progress:
        for result in probe_all(arguments.topologies, depths, range(seeds), setting):
            results.append(result)
            progress.advance(progress.task_ids[0])
    console.print(_probe_table(summary_rows(results)))
    if arguments.json:
        write_json(arguments.json, {"setting": asdict(setting), "results": [asdict(r) for r in results]})
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
    for heading in ("blocks", "stream RMS", "gradient ratio", "SGD ||dF||/lr", "AdamW ||dF||"):
        table.add_column(heading, justify="right")
    for row in rows:
        values = (row["stream_rms"], row["gradient_ratio"], row["sgd_update"], row["adam_update"])
        table.add_row(row["topology"], str(row["num_blocks"]), *(f"{v:.3g}" for v in values))
    return table


def _train(arguments: argparse.Namespace) -> int:
    from rich.markdown import Markdown

    from megaresnorm.resilience.signals import StopSignals
    from megaresnorm.studies.compare_topologies import Comparison, base_recipe, compare, markdown, write_report
    from megaresnorm.telemetry.log import configure_logging, console, progress_bar

    configure_logging()
    out = arguments.out or Path("runs/depth")
    base = base_recipe(arguments.recipe, arguments.data, arguments.overrides, arguments.max_lr)
    if not {"path", "blend"} & base["data"].keys():
        base["data"]["path"] = _bytes_of_stdlib(out / "data")
    comparison = Comparison(
        out=out,
        topologies=arguments.topologies,
        depths=arguments.depths or [12, 50],
        seeds=range(arguments.seeds or 2),
        base=base,
        ramp=arguments.max_lr,
    )
    results, total = [], len(comparison.topologies) * len(comparison.depths) * len(comparison.seeds)
    with StopSignals() as stop, progress_bar("comparing", total) as progress:
        for result in compare(comparison, stop, lambda: progress.advance(progress.task_ids[0])):
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
    console.print(Markdown(shown(markdown(comparison, results), lines=True), hyperlinks=False))
    say("written    " + ", ".join(map(str, files)))
    return 0


def _bytes_of_stdlib(folder: Path) -> str:
    from megaresnorm.data.prepare import PrepareJob, prepare

    try:
        return str(prepare(PrepareJob(out=folder, corpus="stdlib")).folder)
    except DataError as e:
        raise DataError(f"{e} (--data {folder} takes it as it is)") from None

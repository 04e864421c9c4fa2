"""megaresnorm doctor: whether this machine has what a run needs, and which kernels it can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megaresnorm.cli.arguments import JsonFile, Overrides, check_json, count_up_to, examples, path_text, report
from megaresnorm.errors import ConfigError
from megaresnorm.parallel.plan import MAX_LOCAL
from megaresnorm.text import say

if TYPE_CHECKING:  # commands import what they need, so that --help is instant
    import torch
    from rich.text import Text

    from megaresnorm.resilience.cluster.check import Check

MAX_SIZE = 1 << 27  # rows or columns
ELEMENT_BYTES = 64  # of memory that kernels take for an element of a shape: sixteen FP32 tensors


class Shapes(tuple[tuple[int, int], ...]):
    """Pairs of rows and columns."""


def _shapes(text: str | Shapes) -> Shapes:
    if isinstance(text, Shapes):
        return text
    shapes = []
    for part in text.split(","):
        try:
            rows, columns = map(count_up_to(MAX_SIZE), part.split("x"))
        except (typer.BadParameter, ValueError):
            wanted = f"rows x columns, such as 8192x1024, of at most {MAX_SIZE} each"
            raise typer.BadParameter(f"{part[:60]!r} is no shape; wanted {wanted}") from None
        shapes.append((rows, columns))
    return Shapes(shapes)


_TIMED = (
    "run every backend of every kernel at every shape, forward and backward (products in FP8 forward), and say which "
    "one auto takes, and why not the others; times are the best of five calls"
)
_Kernels = Annotated[bool, typer.Option("--kernels", help=_TIMED)]
_Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="what to look at")]
_PRODUCTS = "--kernels: type of the matrix products, as precision.compute, which decides too [fp32]"
_Dtype = Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option(help=_PRODUCTS)]
_ROWS = "--kernels: rows x columns [256x64,1024x1024]"
_Shapes = Annotated[Shapes | None, typer.Option(parser=_shapes, metavar="RxC,..", help=_ROWS)]
_CLUSTER = (
    "examine all hosts of a job before its first step: what ranks must have in common, clocks, the output folder, "
    "limits, memory, addresses, links between hosts, speed and correctness of devices; what stands out is named"
)
_Cluster = Annotated[bool, typer.Option("--cluster", help=_CLUSTER)]
_RECIPE = "--cluster: a recipe, whose data, layout, memory and output folder are examined as well"
_Recipe = Annotated[str | None, typer.Argument(parser=path_text, metavar="[RECIPE]", help=_RECIPE)]
_RANKS = (
    "--cluster: ranks to start here; without it as many as GPUs, or 2. megaresnorm launch --doctor does so on nodes"
)
_Ranks = Annotated[int | None, typer.Option(parser=count_up_to(MAX_LOCAL), metavar="N", help=_RANKS)]
USUAL = Shapes(((256, 64), (1024, 1024)))


def add_to(app: typer.Typer) -> None:
    """Add the doctor command."""
    app.command(
        epilog=examples(
            "megaresnorm doctor",
            "megaresnorm doctor --kernels --dtype bf16 --shapes 1024x256,8192x4096 --json kernels.json",
            "megaresnorm doctor --cluster --ranks 4 configs/quickstart.yaml",
            "srun megaresnorm doctor --cluster configs/deepnorm-200-1b.yaml --json cluster.json",
        )
    )(doctor)


def doctor(
    recipe: _Recipe = None,
    overrides: Overrides = None,
    *,
    cluster: _Cluster = False,
    ranks: _Ranks = None,
    kernels: _Kernels = False,
    device: _Device = "auto",
    dtype: _Dtype = None,
    shapes: _Shapes = None,
    json: JsonFile = None,
) -> int:
    """Look at all that a run needs of this machine, or with --cluster of all hosts of a job.

    That is Python, torch, GPUs, memory, compiler, space, extras. Exit code 1 if something fails. With --cluster it is
    one rank of a job where torchrun, srun or mpirun has started it, and else starts ranks on this host.
    """
    if cluster:
        return _cluster(
            recipe, overrides or [], ranks, json, kernels=kernels, device=device, dtype=dtype, shapes=shapes
        )
    if recipe is not None or ranks is not None:
        raise ConfigError(f"{'--ranks' if recipe is None else recipe} has no effect without --cluster")
    from megaresnorm.assemble import choose_device

    check_json(json)
    found = choose_device(device)
    if kernels:
        return _time_kernels(found, dtype or "fp32", shapes or USUAL, json)
    for name, given in {"--dtype": dtype, "--shapes": shapes}.items():
        if given is not None:
            raise ConfigError(f"{name} has no effect without --kernels")
    return _look(found, json)


def _cluster(recipe: str | None, overrides: list[str], ranks: int | None, json: Path | None, **others: object) -> int:
    from megaresnorm.cli.cluster import doctor_cluster

    for name, given in others.items():
        if given not in (None, False, "auto"):
            raise ConfigError(f"--{name} has no effect with --cluster")
    return doctor_cluster(recipe, overrides, ranks, json)


def _look(device: torch.device, json: Path | None) -> int:
    from megaresnorm.machine import look_at_machine

    checks = list(look_at_machine(device))
    report(json, [asdict(one) for one in checks], *lines_of(checks))
    return int(any(one.verdict == "FAIL" for one in checks))


def lines_of(checks: Sequence[Check]) -> list[Text]:
    """Checks as lines of a table."""
    from rich.text import Text

    width, styles = max(len(one.name) for one in checks), {"PASS": "green", "WARN": "yellow", "FAIL": "red"}
    lines = []
    for one in checks:
        wanted = f" (wanted: {one.wanted})" if one.wanted and one.verdict != "PASS" else ""
        advice = f"; {one.advice}" if one.advice else ""
        words = f"  {one.name:{width}}  {one.found}{wanted}{advice}"
        lines.append(Text.assemble((one.verdict, styles[one.verdict]), words))
    return lines


def _time_kernels(device: torch.device, dtype: str, shapes: Shapes, json: Path | None) -> int:
    import torch
    from rich import box

    from megaresnorm.kernels import load_backends
    from megaresnorm.kernels.benchmark import benchmark_backends
    from megaresnorm.kernels.cpu.build import levels
    from megaresnorm.precision.dtypes import DTYPES
    from megaresnorm.telemetry.log import Table

    load_backends()
    _check_memory(device, max(rows * columns for rows, columns in shapes))
    what = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{levels()[0]}, {torch.get_num_threads()} threads"
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("op", "rows x columns", "backend", "ms", ""):
        table.add_column(heading, justify="right" if heading == "ms" else "left", no_wrap=heading != "")
    findings = benchmark_backends(device, DTYPES[dtype], list(shapes))
    seen: set[tuple] = set()
    for f in findings:
        group = (f.op, f.kind, f.shape)
        named = [f"{f.op} {f.kind or ''}".rstrip(), "{} x {}".format(*f.shape)] if group not in seen else ["", ""]
        seen.add(group)
        note = "taken by auto" if f.chosen and not f.reason else f.reason
        table.add_row(*named, f.backend, "" if f.milliseconds is None else f"{f.milliseconds:.2f}", note)
    if json is None or str(json) != "-":
        say(f"{device.type} ({what}), {dtype}, torch {torch.__version__}")
    report(json, [asdict(f) for f in findings], table)
    return 0


def _check_memory(device: torch.device, elements: int) -> None:
    """Check that kernels on tensors of ``elements`` elements fit in memory.

    Raises:
        ConfigError: they do not.
    """
    import torch

    from megaresnorm.checkpoint.format import human_bytes
    from megaresnorm.resilience.host import available_memory

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if free is not None and ELEMENT_BYTES * elements > free:
        need = human_bytes(ELEMENT_BYTES * elements)
        raise ConfigError(f"--shapes: the largest takes about {need} of memory, {human_bytes(free)} are free")

"""megaresnorm doctor: checks which kernels this machine can run."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from megaresnorm.cli.arguments import Commands, count_up_to, path, write_json
from megaresnorm.errors import ConfigError
from megaresnorm.text import say

if TYPE_CHECKING:  # commands import what they need, so that --help is instant
    import torch


MAX_SIZE = 1 << 27  # rows or columns
ELEMENT_BYTES = 64  # of memory that kernels take for an element of a shape: sixteen FP32 tensors


def add_doctor(commands: Commands) -> None:
    """Add the doctor command."""
    doctor = commands.add_parser(
        "doctor",
        help="what this machine can run",
        description="""\
--kernels runs every backend of every kernel at every shape, forward and backward, and says which one
auto takes and why it does not take the others. Times are the best of five calls: tools/bench_kernels.py measures.""",
        epilog="""examples: megaresnorm doctor --kernels
          megaresnorm doctor --kernels --dtype bf16 --shapes 1024x256,8192x4096 --json kernels.json""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = doctor.add_argument
    add("--kernels", action="store_true", help="examine the kernels [there is nothing else to examine yet]")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="[auto]")
    add(
        "--dtype",
        choices=["fp32", "bf16"],
        default="fp32",
        help="type of the matrix products, as precision.compute; it decides too [fp32]",
    )
    add(
        "--shapes",
        type=_shapes,
        default=[(256, 64), (1024, 1024)],
        metavar="RxC,..",
        help="rows x columns [256x64,1024x1024]",
    )
    add("--json", type=path, metavar="FILE", help="write the findings here")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    import torch
    from rich import box

    from megaresnorm.assemble import choose_device
    from megaresnorm.kernels import load_backends
    from megaresnorm.kernels.benchmark import benchmark_backends
    from megaresnorm.kernels.cpu.build import levels
    from megaresnorm.telemetry.log import Console, Table

    load_backends()
    device = choose_device(arguments.device)
    _check_memory(device, max(rows * columns for rows, columns in arguments.shapes))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    what = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{levels()[0]}, {torch.get_num_threads()} threads"
    )
    say(f"{device.type} ({what}), {arguments.dtype}, torch {torch.__version__}")
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("op", "rows x columns", "backend", "ms", ""):
        table.add_column(heading, justify="right" if heading == "ms" else "left", no_wrap=heading != "")
    findings = benchmark_backends(device, dtype, arguments.shapes)
    seen: set[tuple] = set()
    for f in findings:
        group = (f.op, f.shape)
        named = [f.op, "{} x {}".format(*f.shape)] if group not in seen else ["", ""]
        seen.add(group)
        note = "taken by auto" if f.chosen and not f.reason else f.reason
        table.add_row(*named, f.backend, "" if f.milliseconds is None else f"{f.milliseconds:.2f}", note)
    Console(width=120).print(table)
    if arguments.json is not None:
        write_json(arguments.json, [asdict(f) for f in findings])
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


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        sizes = part.split("x")
        try:
            rows, columns = map(count_up_to(MAX_SIZE), sizes)
        except (argparse.ArgumentTypeError, ValueError):
            wanted = f"rows x columns, such as 8192x1024, of at most {MAX_SIZE} each"
            raise argparse.ArgumentTypeError(f"{part[:60]!r} is no shape; wanted {wanted}") from None
        shapes.append((rows, columns))
    return shapes

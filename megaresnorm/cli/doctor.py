"""megaresnorm doctor: what this machine can run."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from megaresnorm.cli.arguments import Commands, write_json
from megaresnorm.text import say


def add_doctor(commands: Commands) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what this machine can run",
        description="""--kernels runs every backend of every kernel at every shape, forward and backward, and says which one
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
    add("--json", type=Path, metavar="FILE", help="write the findings here")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    import torch
    from rich import box

    from megaresnorm.assemble import choose_device
    from megaresnorm.kernels import load_backends
    from megaresnorm.kernels.cpu.build import levels
    from megaresnorm.kernels.examine import examine
    from megaresnorm.telemetry.log import Console, Table

    load_backends()
    device = choose_device(arguments.device)
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
    findings = examine(device, dtype, arguments.shapes)
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


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        sizes = part.split("x")
        if len(sizes) != 2 or not all(s.isdecimal() and int(s) > 0 for s in sizes):
            raise argparse.ArgumentTypeError(f"{part!r} is no shape; wanted rows x columns, such as 8192x1024")
        shapes.append((int(sizes[0]), int(sizes[1])))
    return shapes

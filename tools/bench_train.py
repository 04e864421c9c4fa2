#!/usr/bin/env python3
"""Training speed beside the peers: the same weights, batches and optimizer, one thread, in turn.

python tools/bench_train.py --out bench
python tools/bench_train.py --shapes 200x64 --architectures gpt2 --precisions fp32 --rounds 7 --compile
python tools/bench_train.py --layouts 1,tp2,pp2,dp2 --shapes 12x256 --architectures gpt2 --precisions fp32

Every contender is a process of its own with one thread and the same malloc settings. Before anything is timed, its
logits and the losses of its first steps are compared with ours. A round gives each contender the same number of steps
in turn, the order changing from round to round; rates are tokens per CPU second, medians over the rounds, and a ratio
is the median of the rounds' ratios. In BF16 a peer runs under autocast and with BF16 weights, and the faster one
counts. We run a second time with the reference kernels, which shows what the others give. With --compile we run with
train.compile=auto (and once without), and every peer once more with its layers compiled.

With --layouts every layout is a contender, ours and megatron-core's (1, tp2, pp2), with one thread a rank; a step is
one global batch of four microbatches for all, the losses of the first steps are compared, and rates are tokens per
second of the wall clock.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from contenders import AUTO, CLASSES, COMPILED, LAYOUTS, MALLOC, OURS, REFERENCE, Contender, compare, serve
from peers import MEGATRON, PEERS, Shape


def main() -> None:
    arguments = parse()
    if arguments.worker:
        serve(**json.loads(arguments.worker))
        return
    results, run = [], race_layouts if arguments.layouts else race
    for shape in arguments.shapes:
        for architecture in arguments.architectures:
            for precision in arguments.precisions:
                results.append(run(parse_shape(shape, architecture, arguments.vocab_size), precision, arguments))
    report = {"machine": machine(), "malloc": MALLOC if arguments.malloc == "tuned" else {}, "results": results}
    text = layouts_markdown(report) if arguments.layouts else markdown(report)
    print(text)
    if arguments.out:
        Path(f"{arguments.out}.json").write_text(json.dumps(report, indent=1))
        Path(f"{arguments.out}.md").write_text(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {"type": lambda text: text.split(",")}
    parser.add_argument(
        "--shapes", **names, default=["12x256", "200x64"],
        help="BLOCKSxDIM, A,B; the sequence is 256 tokens and the batch 4 "
        "from width 128 on, else 128 and 2 [12x256,200x64]"
    )  # fmt: skip
    parser.add_argument("--architectures", **names, default=list(PEERS), help=f"[{','.join(PEERS)}]")
    parser.add_argument("--precisions", **names, default=["fp32", "bf16"], help="[fp32,bf16]")
    parser.add_argument(
        "--compile", action="store_true",
        help="ours with train.compile=auto; the peers' layers compiled as well as eager, and the faster counts"
    )  # fmt: skip
    parser.add_argument("--layouts", **names, help=f"of {','.join(LAYOUTS)}")
    parser.add_argument("--vocab-size", type=int, default=8192, help="[8192]")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, in turn [5]")
    parser.add_argument("--steps", type=int, default=4, help="steps in one measurement [4]")
    parser.add_argument(
        "--malloc", choices=["default", "tuned"], default="default", help="allocator settings of all [default]"
    )
    parser.add_argument("--out", help="write OUT.json and OUT.md as well")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in arguments.layouts or []:
        if name not in LAYOUTS:
            parser.error(f"--layouts {name}: unknown; choose of {','.join(LAYOUTS)}")
    return arguments


def parse_shape(text: str, architecture: str, vocab_size: int) -> Shape:
    num_blocks, dim = (int(part) for part in text.split("x"))
    wide = dim >= 128
    ffn_dim = 4 * dim if architecture == "gpt2" else -(-8 * dim // 3 // 16) * 16
    heads = max(2, dim // 64)
    return Shape(architecture, num_blocks, dim, heads, 256 if wide else 128, 4 if wide else 2, vocab_size, ffn_dim)


# --- the race ---------------------------------------------------------------------------------------------------------


def race(shape: Shape, precision: str, arguments: argparse.Namespace) -> dict:
    """All contenders of one shape and precision, checked and then timed in turn."""
    modes = ["fp32"] if precision == "fp32" else ["autocast", "bf16"]
    with tempfile.TemporaryDirectory() as folder:
        ours = AUTO if arguments.compile else OURS
        contenders = [Contender(ours, precision, shape, folder, arguments.malloc)]  # writes the weights that peers load
        try:
            contenders += [
                Contender(name + suffix, mode, shape, folder, arguments.malloc)
                for name in PEERS[shape.architecture]
                for mode in modes
                for suffix in ("", COMPILED)[: 1 + arguments.compile]
            ]
            for peer in contenders[1:]:
                compare(contenders[0], peer)
            contenders += [Contender(OURS, precision, shape, folder, arguments.malloc)] if arguments.compile else []
            contenders.append(Contender(REFERENCE, precision, shape, folder, arguments.malloc))
            drift = max(compare(contenders[0], other) for other in contenders if other.name.startswith(OURS))
            rates: dict[str, list[float]] = {c.label: [] for c in contenders}
            for turn in range(arguments.rounds):
                shift = turn % len(contenders)
                for contender in contenders[shift:] + contenders[:shift]:
                    seconds = contender.ask("time", arguments.steps)[0]["cpu_seconds"]
                    rates[contender.label].append(arguments.steps * shape.batch * shape.seq_len / seconds)
            ends = {c.label: c.ask("profile", arguments.steps)[0] for c in contenders}
        finally:
            for contender in contenders:
                contender.close()
    ours = contenders[0].label
    rows = [
        {
            "name": label,
            "tokens_per_cpu_second": statistics.median(values),
            "ours_over_this": statistics.median(a / b for a, b in zip(rates[ours], values, strict=True)),
            "all_rates": values,
            **ends[label],
        }
        for label, values in rates.items()
    ]
    best = max((row for row in rows if not row["name"].startswith(OURS)), key=lambda row: row["tokens_per_cpu_second"])
    print(
        f"{shape.num_blocks}x{shape.dim} {shape.architecture} {precision}: "
        f"{best['ours_over_this']:.2f}x {best['name']}",
        file=sys.stderr,
    )
    return {
        "shape": asdict(shape),
        "precision": precision,
        "best_peer": best["name"],
        "ratio": best["ours_over_this"],
        "loss_difference_of_kernels": drift,
        "rows": rows,
    }


def race_layouts(shape: Shape, precision: str, arguments: argparse.Namespace) -> dict:
    """Our layouts and megatron-core's, in turn, by the wall clock."""
    shape = replace(shape, microbatches=4)
    mode = "fp32" if precision == "fp32" else "bf16"
    tokens = arguments.steps * shape.microbatches * shape.batch * shape.seq_len
    with tempfile.TemporaryDirectory() as folder:
        contenders = [Contender(OURS, precision, shape, folder, arguments.malloc)]  # writes the weights that peers load
        try:
            contenders += [
                Contender(name, m, shape, folder, arguments.malloc, layout)
                for layout in arguments.layouts
                for name, m, has in ((OURS, precision, layout != "1"), (MEGATRON, mode, layout in ("1", "tp2", "pp2")))
                if has
            ]
            for other in contenders[1:]:
                compare(contenders[0], other)
            wall: dict[str, list[float]] = {c.label: [] for c in contenders}
            cpu: dict[str, list[float]] = {c.label: [] for c in contenders}
            for turn in range(arguments.rounds):
                shift = turn % len(contenders)
                for contender in contenders[shift:] + contenders[:shift]:
                    answers = contender.ask("time", arguments.steps)
                    wall[contender.label].append(tokens / max(a["wall_seconds"] for a in answers))
                    cpu[contender.label].append(tokens / sum(a["cpu_seconds"] for a in answers))
            peaks = {c.label: max(a["peak_mib"] for a in c.ask("profile", 1)) for c in contenders}
        finally:
            for contender in contenders:
                contender.close()
    theirs = [label for label in wall if label.startswith(MEGATRON)]
    rows = [
        {
            "name": label,
            "tokens_per_second": statistics.median(rates),
            "tokens_per_cpu_second": statistics.median(cpu[label]),
            "over_one_rank": statistics.median(a / b for a, b in zip(rates, wall[contenders[0].label], strict=True)),
            "over_theirs": {t: statistics.median(a / b for a, b in zip(rates, wall[t], strict=True)) for t in theirs},
            "all_rates": rates,
            "peak_mib": peaks[label],
        }
        for label, rates in wall.items()
    ]
    return {"shape": asdict(shape), "precision": precision, "rows": rows}


# --- the report -------------------------------------------------------------------------------------------------------


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}"


def markdown(report: dict) -> str:
    lines = [f"{report['machine']}; one thread; malloc {'tuned' if report['malloc'] else 'default'}.", ""]
    for result in report["results"]:
        shape = result["shape"]
        lines += [
            f"**{shape['num_blocks']} blocks x {shape['dim']}, {shape['architecture']}, {result['precision']}** "
            f"(sequence {shape['seq_len']}, batch {shape['batch']}, vocabulary {shape['vocab_size']}): "
            f"{result['ratio']:.2f}x the best peer, {result['best_peer']}; over ten steps losses differ from those "
            f"of the reference kernels by at most {result['loss_difference_of_kernels']:.1e}",
            "",
            f"| | tokens per CPU second | ours is | peak MiB | {' | '.join(f'{c}, ms' for c in [*CLASSES, 'rest'])} |",
            "| --- " * (4 + len(CLASSES) + 1) + "|",
        ]
        for row in result["rows"]:
            cells = [f"{row['milliseconds'][c]:.0f}" for c in [*CLASSES, "rest"]]
            ratio = "" if row is result["rows"][0] else f"{row['ours_over_this']:.2f}x"
            lines.append(
                f"| {row['name']} | {row['tokens_per_cpu_second']:,.0f} | {ratio} | {row['peak_mib']:,} "
                f"| {' | '.join(cells)} |"
            )
        lines.append("")
    return "\n".join(lines)


def layouts_markdown(report: dict) -> str:
    lines = [f"{report['machine']}; one thread a rank; malloc {'tuned' if report['malloc'] else 'default'}.", ""]
    for result in report["results"]:
        shape, theirs = result["shape"], list(result["rows"][0]["over_theirs"])
        lines += [
            f"**{shape['num_blocks']} blocks x {shape['dim']}, {shape['architecture']}, {result['precision']}** "
            f"(sequence {shape['seq_len']}, {shape['microbatches']} microbatches of {shape['batch']}, "
            f"vocabulary {shape['vocab_size']})",
            "",
            f"| | tokens per second | over one rank | {' | '.join(f'over {t}' for t in theirs)} "
            "| tokens per CPU second | peak MiB a rank |",
            "| --- " * (5 + len(theirs)) + "|",
        ]
        for row in result["rows"]:
            ratios = [row["over_one_rank"], *row["over_theirs"].values()]
            cells = [f"{row['tokens_per_second']:,.0f}", *(f"{r:.2f}x" for r in ratios)]
            lines.append(
                f"| {row['name']} | {' | '.join(cells)} | {row['tokens_per_cpu_second']:,.0f} | {row['peak_mib']:,} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

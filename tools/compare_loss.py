#!/usr/bin/env python3
"""Compare the losses of two runs step by step: are they equal bit for bit, or within a tolerance?

    python tools/compare_loss.py runs/a runs/b [--tolerance 2e-6]
    python tools/compare_loss.py runs/a runs/b --final 0.5

Exit code 0 if every step that both runs have differs by at most the tolerance, or with --final the mean loss of the
last tenth of these steps by at most so many percent; 1 if not, 2 if they cannot be compared.
"""

import argparse
import json
import sys
from math import inf, isnan
from pathlib import Path


def read_losses(run: Path) -> dict[int, float]:
    """Step -> loss from a run's metrics.jsonl, whose steps count from 1, or from 0 in runs of versions before 0.2."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="output folder of a run")
    parser.add_argument("second", type=Path, help="output folder of another run")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference in nats [0: equal bit for bit]"
    )
    parser.add_argument(
        "--final", type=float, metavar="PERCENT", help="compare the mean of the last tenth of the steps"
    )
    arguments = parser.parse_args(argv)
    try:
        first, second = read_losses(arguments.first), read_losses(arguments.second)
    except (OSError, ValueError, KeyError) as e:
        print(f"compare_loss: error: {arguments.first} and {arguments.second} cannot be compared: {e}", file=sys.stderr)
        return 2
    common = sorted(first.keys() & second.keys())
    if not common:
        print("compare_loss: error: the runs have no step in common", file=sys.stderr)
        return 2
    if arguments.final is not None:
        last = common[-max(1, len(common) // 10) :]
        ends = [sum(losses[step] for step in last) / len(last) for losses in (first, second)]
        percent = 100 * abs(ends[1] / ends[0] - 1)
        print(f"last {len(last)} of {len(common)} steps: {ends[0]:.4f} and {ends[1]:.4f}, {percent:.3f} % apart")
        return 0 if percent <= arguments.final else 1
    differences = {step: abs(first[step] - second[step]) for step in common}
    worst = max(common, key=lambda step: inf if isnan(differences[step]) else differences[step])
    print(f"{len(common)} steps in common; largest difference {differences[worst]:.3g} nats, at step {worst}")
    return 0 if differences[worst] <= arguments.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())

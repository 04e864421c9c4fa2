#!/usr/bin/env python3
"""What a profile costs and how much of a step it accounts for, by shape and layout.

python tools/bench_profile.py --steps 20
python tools/bench_profile.py --shapes 12x256 --layouts one,tp2-tokens --steps 40

For every shape (blocks x width) and layout ``megaresnorm profile`` is run on the ranks that it needs, one thread each,
on bytes of Python's own library. A row says what share of a step is in its rows, in bubble, data and host's wait, and
in none of them, on the rank where that is most; and what the marks add to a step: the median over pairs of steps with
and without marks in turn, with its standard error; by the processor's time where one rank is alone on a CPU, by the
clock where there are several, so that a quiet machine is needed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_train import machine

from megaresnorm.data.prepare import PrepareJob, prepare

LAYOUTS = {
    "one": [],
    "one-branch": ["recompute.policy=branch"],
    "one-block": ["recompute.policy=block"],
    "tp2-full": ["parallel.tp=2"],
    "tp2-tokens": ["parallel.tp=2", "parallel.tensor_layout=tokens"],
    "tp2-columns": ["parallel.tp=2", "parallel.tensor_layout=columns"],
    "pp2": ["parallel.pp=2", "train.micro_batch=2"],
    "fsdp2": ["parallel.dp_shard=2"],
}


def profile_of(folder: Path, shape: str, layout: str, steps: int, topology: str) -> dict:
    """The profile of one case."""
    blocks, width = shape.split("x")
    recipe = folder / "recipe.yaml"
    heads = max(2, int(width) // 64)
    recipe.write_text(
        f"model: {{dim: {width}, num_blocks: {blocks}, num_heads: {heads}, seq_len: 64, topology: {topology}}}\n"
        f"data: {{path: {folder / 'data'}}}\n"
        f"train: {{steps: 1000, global_batch: 8, output: {folder / shape / layout}}}\n"
    )
    command = [sys.executable, "-m"]
    if not layout.startswith("one"):
        command += ["torch.distributed.run", "--nproc-per-node", "2", "-m"]
    command += ["megaresnorm", "profile", str(recipe), "--steps", str(steps), *LAYOUTS[layout]]
    ran = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{shape} {layout}: {ran.stderr[-2000:]}")
    return json.loads((folder / shape / layout / "profile" / "profile.json").read_text())


def line_of(shape: str, layout: str, profile: dict) -> str:
    """A row of the table."""
    worst = max(profile["ranks"], key=lambda rank: rank["unaccounted_ms"] / rank["step_ms"])
    beside = sum(worst[f"{name}_ms"] for name in ("bubble", "data", "host"))
    rows, step, whole = worst["own_ms"] + worst["exposed_ms"], worst["step_ms"], profile["whole"]
    return (
        f"| {shape} | {layout} | {step:.0f} | {rows / step:.1%} | {beside / step:.1%} | "
        f"{worst['unaccounted_ms'] / step:.2%} | {whole['overhead']:+.1%} ± {whole['overhead_noise']:.1%} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="100x64,12x256", help="blocks x width, separated by commas")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help=f"some of {', '.join(LAYOUTS)}")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed in each case")
    parser.add_argument("--topology", default="deepnorm", help="as model.topology")
    arguments = parser.parse_args()
    unknown = set(arguments.layouts.split(",")) - LAYOUTS.keys()
    if unknown:
        parser.error(f"--layouts: {', '.join(sorted(unknown))} is none of {', '.join(LAYOUTS)}")
    print(machine())
    print("| blocks x width | layout | step ms | rows | bubble, data, host | in none | marks add |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        prepare(PrepareJob(out=Path(name) / "data", corpus="stdlib"))
        for shape in arguments.shapes.split(","):
            for layout in arguments.layouts.split(","):
                profile = profile_of(Path(name), shape, layout, arguments.steps, arguments.topology)
                print(line_of(shape, layout, profile), flush=True)


if __name__ == "__main__":
    main()

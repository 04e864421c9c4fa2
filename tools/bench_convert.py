"""Memory and time of converting a large checkpoint, beside a plain copy of its files.

python tools/bench_convert.py --gigabytes 4 --max-memory 1GB
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.checkpoint.state import EngineState, RunState
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.model.parameters import parameter_table
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe

# What a process of its own runs; it prints the largest memory that was resident before and after.
_CONVERT = """
import json, sys, time
from megaresnorm.cli import main
import transformers, megaresnorm.convert.to_hf, megaresnorm.convert.from_hf
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before, start = peak(), time.perf_counter()
code = main(sys.argv[1:])
print(json.dumps({"code": code, "before": before, "peak": peak(), "seconds": time.perf_counter() - start}))
"""


def recipe_of(gigabytes: float, architecture: str) -> Recipe:
    """Of about so many bytes of FP32 weights: wide blocks, and an embedding that is a large tensor by itself."""
    dim, blocks = 2048, 2
    model = {"dim": dim, "num_blocks": blocks, "num_heads": 16, "num_kv_heads": 4, "seq_len": 128, "vocab_size": 65_000}
    if architecture == "gpt2":
        model |= {"num_kv_heads": 16, "norm": "layernorm", "positions": "learned", "ffn": "gelu", "bias": True}
    model |= {"topology": {"gpt2": "pre", "glm4": "sandwich"}.get(architecture, "deepnorm")}

    def made(num_blocks: int) -> Recipe:
        sections = {"data": {"path": "none"}, "train": {"output": "none", "steps": 1}}
        return build_recipe({"model": {**model, "num_blocks": num_blocks}, **sections})

    while num_bytes(made(blocks)) < gigabytes * 1e9:
        blocks += 1
    return made(blocks)


def num_bytes(recipe: Recipe) -> int:
    return sum(4 * prod(spec.shape) for spec in parameter_table(recipe.model).values())


def save(root: Path, recipe: Recipe) -> Path:
    """A checkpoint of random weights that were never in memory together."""

    def chunks(shape: tuple[int, ...]) -> Iterator[Tensor]:
        for start in range(0, shape[0], 4096):
            yield torch.randn(min(4096, shape[0] - start), *shape[1:]) * 0.02

    weights = {}
    for name, spec in parameter_table(recipe.model).items():
        box = tuple((0, size) for size in spec.shape)
        weights[name] = TensorSlices(spec.shape, torch.float32, None, (box,), True, lambda s=spec.shape: chunks(s))
    state = RunState(
        samples=0, skipped_in_a_row=0, train_loss=None, engine=EngineState(updates=0, clipper_steps=0),
        recipe=recipe.model_dump(exclude_none=True), data="",
    )  # fmt: skip
    return save_checkpoint(root, 1, {"weights": weights}, state.model_dump())


def converted(*arguments: str) -> dict:
    found = subprocess.run([sys.executable, "-c", _CONVERT, "convert", *arguments], capture_output=True, text=True)
    if found.returncode:
        sys.exit(found.stderr[-2000:])
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the weights [4]")
    parser.add_argument("--max-memory", default="1GB", help="as of convert to-hf [1GB]")
    parser.add_argument("--architecture", choices=["minimax", "glm4", "gpt2"], default="minimax", help="[minimax]")
    parser.add_argument("--verify", choices=["on", "off"], default="off", help="as of convert to-hf [off]")
    arguments = parser.parse_args()
    recipe = recipe_of(arguments.gigabytes, arguments.architecture)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = save(folder / "checkpoints", recipe)
        print(f"{arguments.architecture}, {recipe.model.num_blocks} blocks, {num_bytes(recipe) / 1e9:.2f} GB in FP32")
        options = ("--max-memory", arguments.max_memory, "--verify", arguments.verify)
        there = converted("to-hf", str(checkpoint), str(folder / "hf"), *options)
        back = converted("from-hf", str(folder / "hf"), str(folder / "back"), *options)
        start = time.perf_counter()
        shutil.copytree(checkpoint, folder / "copy")
        copy = time.perf_counter() - start
        for what, found in (("to-hf", there), ("from-hf", back)):
            peak, before = found["peak"] / 1e9, found["before"] / 1e9
            print(f"{what:8} peak {peak:.2f} GB, of which the interpreter with its packages had {before:.2f} GB before")
            print(f"{what:8} {found['seconds']:.1f} s; a plain copy of the files {copy:.1f} s")


if __name__ == "__main__":
    main()

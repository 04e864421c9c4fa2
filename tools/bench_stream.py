#!/usr/bin/env python3
"""Drift of a residual stream stored in FP32 and in BF16 from FP64, by depth: one model of each topology, untrained.

python tools/bench_stream.py --num-blocks 400 --dim 64
python tools/bench_stream.py --gradients --num-blocks 100    # how far apart gradients of tokens lie in one tensor
"""

import argparse

import torch

from megaresnorm.model.lint import swallowed_from
from megaresnorm.recipe import ModelRecipe
from megaresnorm.studies.gradient_rows import measure_gradient_rows
from megaresnorm.studies.probe_depth import ProbeSetting
from megaresnorm.studies.stream_drift import measure_drift

TOPOLOGIES = "pre,pre_scaled,peri,subln,lns,deepnorm,deepnorm_glm,keel,completep,gated,mix_ln,post"
DRIFT = (
    "topology", "lint: BF16 loses from", "after", "RMS", "FP32: error", "BF16: error", "of the movement",
    "1 - cosine", "lost",
)  # fmt: skip
GRADIENTS = (
    "topology", "block", "RMS", "largest row / median", "lint", "below normal E4M3", "E5M2",
    "E4M3, a scale for each token",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradients", action="store_true", help="gradients of tokens, not the stream")
    parser.add_argument("--topologies", default=TOPOLOGIES, metavar="A,B", help=f"[{TOPOLOGIES}]")
    parser.add_argument("--num-blocks", type=int, default=400, help="of every model [400]")
    parser.add_argument("--depths", default="25,50,100,200,400", metavar="N,M", help="[25,50,100,200,400]")
    parser.add_argument("--dim", type=int, default=64, help="[64]")
    parser.add_argument("--seq-len", type=int, default=64, help="[64]")
    a = parser.parse_args()
    torch.set_num_threads(1)
    setting = ProbeSetting(dim=a.dim, ffn_dim=2 * a.dim, seq_len=a.seq_len)
    recipes = [setting.model(topology, a.num_blocks) for topology in a.topologies.split(",")]
    if a.gradients:
        print_gradients(recipes)
    else:
        print_drift(recipes, [depth for depth in map(int, a.depths.split(",")) if depth <= a.num_blocks])


def print_table(columns: tuple[str, ...]) -> None:
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")


def print_drift(recipes: list[ModelRecipe], depths: list[int]) -> None:
    print_table(DRIFT)
    for recipe in recipes:
        warned = swallowed_from(recipe)
        found = {(one.stored, one.block): one for one in measure_drift(recipe, depths)}
        for i, depth in enumerate(depths):
            fp32, bf16 = found["fp32", depth], found["bf16", depth]
            first = f"{recipe.topology} | {'' if warned is None else f'{warned} blocks'}" if i == 0 else " | "
            print(
                f"| {first} | {depth} | {bf16.rms:.3g} | {fp32.error:.1e} | {bf16.error:.1e} | {bf16.of_movement:.1%} "
                f"| {1 - bf16.cosine:.1e} | {bf16.swallowed:.0%} |"
            )


def print_gradients(recipes: list[ModelRecipe]) -> None:
    print_table(GRADIENTS)
    for recipe in recipes:
        last = recipe.num_blocks - 1
        for one in measure_gradient_rows(recipe, [0, last // 2, last]):
            first = recipe.topology if one.block == 0 else ""
            print(
                f"| {first} | {one.block} | {one.rms:.1e} | {one.spread:.1e} | {one.expected:.1e} "
                f"| {one.below['e4m3']:.1%} | {one.below['e5m2']:.1%} | {one.below_by_token:.1%} |"
            )


if __name__ == "__main__":
    main()

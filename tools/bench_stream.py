#!/usr/bin/env python3
"""Drift of a residual stream stored in FP32 and in BF16 from FP64, by depth: one model of each topology, untrained.

python tools/bench_stream.py --num-blocks 400 --dim 64
"""

import argparse

import torch

from megaresnorm.model.lint import swallowed_from
from megaresnorm.studies.probe_depth import ProbeSetting
from megaresnorm.studies.stream_drift import measure_drift

TOPOLOGIES = "pre,pre_scaled,peri,subln,lns,deepnorm,deepnorm_glm,keel,completep,post"
COLUMNS = (
    "topology", "lint: BF16 loses from", "after", "RMS", "FP32: error", "BF16: error", "of the movement",
    "1 - cosine", "lost",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", default=TOPOLOGIES, metavar="A,B", help=f"[{TOPOLOGIES}]")
    parser.add_argument("--num-blocks", type=int, default=400, help="of every model [400]")
    parser.add_argument("--depths", default="25,50,100,200,400", metavar="N,M", help="[25,50,100,200,400]")
    parser.add_argument("--dim", type=int, default=64, help="[64]")
    parser.add_argument("--seq-len", type=int, default=64, help="[64]")
    a = parser.parse_args()
    torch.set_num_threads(1)
    setting = ProbeSetting(dim=a.dim, ffn_dim=2 * a.dim, seq_len=a.seq_len)
    depths = [depth for depth in map(int, a.depths.split(",")) if depth <= a.num_blocks]
    print(
        "| topology | BF16 loses from | after | RMS | FP32: error | BF16: error | of the movement | 1 - cosine | lost |"
    )
    print("| --- " * 9 + "|")
    for topology in a.topologies.split(","):
        recipe = setting.model(topology, a.num_blocks)
        warned = swallowed_from(recipe)
        found = {(one.stored, one.block): one for one in measure_drift(recipe, depths)}
        for i, depth in enumerate(depths):
            fp32, bf16 = found["fp32", depth], found["bf16", depth]
            first = f"{topology} | {'' if warned is None else f'{warned} blocks'}" if i == 0 else " | "
            print(
                f"| {first} | {depth} | {bf16.rms:.3g} | {fp32.error:.1e} | {bf16.error:.1e} | {bf16.of_movement:.1%} "
                f"| {1 - bf16.cosine:.1e} | {bf16.swallowed:.0%} |"
            )


if __name__ == "__main__":
    main()

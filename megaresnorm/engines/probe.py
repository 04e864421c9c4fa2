"""Whether DeepSpeed runs on this machine: ``python -m megaresnorm.engines.probe DEVICE`` makes a step of a tiny model.

``megaresnorm doctor`` starts it as a process of its own, as importing DeepSpeed takes seconds, prints, and may fail in
whatever way. Its exit code is 0 where the step was made; what went wrong is the last line of stderr.
"""

import sys
from collections.abc import Sequence

import torch

from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines import make_engine
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe.load import build_recipe


def main(argv: Sequence[str]) -> int:
    """Make one step with ZeRO-1 on the device that is named, and return the exit code."""
    device = torch.device(argv[0])
    recipe = build_recipe(
        {
            "model": {"dim": 16, "num_blocks": 1, "num_heads": 2, "seq_len": 8, "vocab_size": 16},
            "data": {"path": "none"},
            "train": {"output": "none", "steps": 1, "global_batch": 2},
            "engine": {"name": "deepspeed", "zero_stage": 1},
        }
    )
    engine = make_engine(recipe, ParallelContext.single(), device)
    tokens = torch.arange(16, device=device).view(2, 8)
    return 0 if engine.step(StepBatch.of([Batch(tokens, tokens, torch.arange(2))]), 1e-3).applied else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Engines: each does exactly one optimizer step, behind one small interface (engine.py)."""

import json
from typing import TYPE_CHECKING

from megaresnorm.packages import check_deepspeed_version

if TYPE_CHECKING:
    import torch

    from megaresnorm.assemble import Assembled
    from megaresnorm.engines.engine import Engine
    from megaresnorm.parallel.mesh import ParallelContext
    from megaresnorm.recipe import Recipe


def make_engine(recipe: "Recipe", context: "ParallelContext", device: "torch.device") -> "Engine":
    """The engine that ``engine.name`` asks for, with its model. Collective.

    Args:
        recipe: resolved, so that model.vocab_size is set.

    Raises:
        ConfigError: DeepSpeed is not installed, or in a version that is not supported; a run has checked it before.
    """
    if recipe.engine.name == "deepspeed":
        check_deepspeed_version()
        from megaresnorm.engines.deepspeed import DeepSpeedEngine  # each engine imports what it alone needs

        return DeepSpeedEngine(recipe, context, device)
    from megaresnorm.engines.native import NativeEngine

    return NativeEngine(recipe, context, device)


def engine_files(recipe: "Recipe", assembled: "Assembled") -> dict[str, str | None]:
    """What a run's folder says of its engine: the content of files by name, None for those of another engine.

    That is which blocks are recomputed how, and what DeepSpeed is told.

    Args:
        recipe: resolved.
        assembled: the engine's.
    """
    from megaresnorm.engines.deepspeed_config import deepspeed_config
    from megaresnorm.recompute_auto import recompute_file

    context, device = assembled.context, assembled.device.type
    told = None
    if recipe.engine.name == "deepspeed":
        config = deepspeed_config(recipe, data_ranks=context.dp.size, pin=device == "cuda")
        told = json.dumps(config, indent=1) + "\n"
    return {"recompute.json": recompute_file(recipe, context, assembled.segments, device), "deepspeed.json": told}

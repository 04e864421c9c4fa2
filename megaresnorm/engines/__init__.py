"""Engines: each does exactly one optimizer step, behind one small interface (engine.py)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from megaresnorm.engines.engine import Engine
    from megaresnorm.parallel.mesh import ParallelContext
    from megaresnorm.recipe import Recipe


def make_engine(recipe: "Recipe", context: "ParallelContext", device: "torch.device") -> "Engine":
    """The engine that ``engine.name`` asks for, with its model. Collective.

    Args:
        recipe: resolved, so that model.vocab_size is set.
    """
    if recipe.engine.name == "deepspeed":
        from megaresnorm.engines.deepspeed import DeepSpeedEngine  # each engine imports what it alone needs

        return DeepSpeedEngine(recipe, context, device)
    from megaresnorm.engines.native import NativeEngine

    return NativeEngine(recipe, context, device)

"""The model that an engine trains, built of its recipe in one place for all engines."""

from typing import Any

import torch

from megaresnorm.assemble import Assembled, build_model
from megaresnorm.layout import logit_rows_of
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe import Recipe
from megaresnorm.recompute_auto import plan_on_all_ranks


def model_of(recipe: Recipe, context: ParallelContext, device: torch.device, **sharding: Any) -> Assembled:
    """Build this rank's part of a recipe's model. Collective.

    Args:
        recipe: resolved, so that model.vocab_size is set.
        **sharding: how the engine shards it, see ``build_model``.

    Communication:
        None, but with ``recompute.policy=auto`` that of ``plan_on_all_ranks``.

    Raises:
        ConfigError: as ``build_model`` and ``plan_on_all_ranks``.
    """
    plans = recipe.recompute.policy == "auto"
    return build_model(
        recipe.model,
        recipe.precision,
        recipe.kernels,
        recipe.parallel,
        context,
        recompute=recipe.recompute,
        segments=plan_on_all_ranks(recipe, context, device) if plans else None,
        seed=recipe.train.seed,
        device=device,
        compiled=recipe.train.compile,
        logit_rows=logit_rows_of(recipe, context.tp.size, device.type),
        **sharding,
    )

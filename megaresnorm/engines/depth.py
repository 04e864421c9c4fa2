"""Depth telemetry of an engine's steps."""

from typing import cast

from megaresnorm.data.samples import Samples
from megaresnorm.engines.engine import Engine
from megaresnorm.engines.tensor_norms import TensorNorms
from megaresnorm.recipe import Recipe
from megaresnorm.telemetry.depth.probe import DepthProbe, ProbedEngine, probe_batch
from megaresnorm.telemetry.depth.recorder import Depth


def depth_of(recipe: Recipe, engine: Engine, samples: Samples) -> Depth:
    """What watches and probes an engine's model as a recipe asks for it.

    Args:
        samples: of training, the first of which are the batch that is probed.
    """
    telemetry, assembled, probe = recipe.telemetry, engine.assembled, None
    if telemetry.probe_every:
        batch = probe_batch(recipe, samples, assembled.device)
        native = cast(ProbedEngine, engine)  # as the recipe has been checked for
        probe = DepthProbe(recipe.model, assembled, native, batch, recipe.train.seed)
    norms = TensorNorms(engine, recipe.optim) if telemetry.every else None
    return Depth(recipe, assembled, norms, probe)

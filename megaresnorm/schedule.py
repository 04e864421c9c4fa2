"""Learning rate and batch size as pure functions of the step, counted from 0."""

from itertools import pairwise
from math import cos, pi, sqrt

from megaresnorm.recipe import Recipe, TrainRecipe


def learning_rate(step: int, recipe: Recipe) -> float:
    """The learning rate of one step, before the multipliers of a parameter's role."""
    schedule, peak, steps = recipe.schedule, recipe.optim.lr, recipe.train.steps
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = schedule.min_ratio
    # 0 at the first step after the warm-up, 1 at the last step of the run.
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    match schedule.kind:
        case "linear":
            return peak * (1 - (1 - floor) * progress)
        case "cosine":
            return peak * (floor + (1 - floor) * (1 + cos(pi * progress)) / 2)
        case "inverse_sqrt":
            return peak * sqrt(max(1, warmup) / (step + 1))
        case "wsd":
            decay = wsd_decay_steps(recipe)
            return peak * (1 - (1 - floor) * max(0.0, (step + 1 - (steps - decay)) / decay))
    return peak


def wsd_decay_steps(recipe: Recipe) -> int:
    """Steps of the final decay: the recipe's, else a tenth of the run, within what the warm-up leaves."""
    decay = recipe.schedule.decay_steps or max(1, recipe.train.steps // 10)
    return max(1, min(decay, recipe.train.steps - recipe.schedule.warmup_steps))


def total_variation(recipe: Recipe) -> float:
    """Sum over the run of |lr_t - lr_(t-1)|, from the rate of the first step on: how far from flat the schedule is."""
    rates = (learning_rate(step, recipe) for step in range(recipe.train.steps))
    return sum(abs(b - a) for a, b in pairwise(rates))


def batch_size(step: int, train: TrainRecipe) -> int:
    """Samples of one step: grows linearly from batch_ramp.start, in multiples of the microbatch."""
    ramp = train.batch_ramp
    if ramp is None or step >= ramp.steps:
        return train.global_batch
    micro = train.batch_multiple
    grown = ramp.start + (train.global_batch - ramp.start) * step / ramp.steps
    return max(micro, int(grown) // micro * micro)

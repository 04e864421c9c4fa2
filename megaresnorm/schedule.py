"""Learning rate and batch size as pure functions of the step, counted from 0."""

from math import cos, pi, sqrt

from megaresnorm.recipe import Recipe, TrainRecipe


def learning_rate(step: int, recipe: Recipe) -> float:
    """Learning rate of one step, before the multiplier of a parameter's role."""
    schedule, peak, steps = recipe.schedule, recipe.optim.lr, recipe.train.steps
    warmup = schedule.warmup(steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = schedule.min_ratio if schedule.min_lr is None else schedule.min_lr / peak
    # 0 at the first step after the warm-up, 1 at the last step of the decay, which is that of the run unless set.
    decay = steps - warmup if schedule.decay_steps is None else schedule.decay_steps
    progress = min(1.0, (step - warmup) / max(1, decay - 1))
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


def lr_jump(step: int, before: Recipe, now: Recipe) -> str | None:
    """What to say where changed settings move the learning rate at once by over a tenth; None where they do not.

    Args:
        step: steps that are done.
        before: the recipe that they were done with.
    """
    if not 0 < step < now.train.steps:
        return None
    unchanged, following = learning_rate(min(step, before.train.steps - 1), before), learning_rate(step, now)
    if abs(following - unchanged) <= 0.1 * unchanged:
        return None
    last = learning_rate(step - 1, before)
    said = f"the learning rate goes from {last:.2e} at step {step} to {following:.2e} at step {step + 1}"
    if now.train.steps == before.train.steps or now.schedule != before.schedule:
        return said
    if now.schedule.kind == "wsd":
        return f"{said}: a run with schedule.kind=wsd is extended before its decay begins"
    return f"{said}, since {now.schedule.kind} follows train.steps; schedule.decay_steps, or wsd, does not"


def wsd_decay_steps(recipe: Recipe) -> int:
    """Number of steps of the final decay: the recipe's, or a tenth of the run; at most what the warm-up leaves."""
    decay = recipe.schedule.decay_steps or max(1, recipe.train.steps // 10)
    return max(1, min(decay, recipe.train.steps - recipe.schedule.warmup(recipe.train.steps)))


def batch_size(step: int, train: TrainRecipe) -> int:
    """Number of samples of one step. It grows linearly from batch_ramp.start, in multiples of the microbatch."""
    ramp = train.batch_ramp
    if ramp is None or step >= ramp.steps:
        return train.global_batch
    micro = train.batch_multiple
    grown = ramp.start + (train.global_batch - ramp.start) * step // ramp.steps
    return grown // micro * micro


def samples_before(step: int, train: TrainRecipe) -> int:
    """Number of samples of all steps before this one: the sum of their ``batch_size``, without a loop over steps."""
    ramp = train.batch_ramp
    if ramp is None:
        return step * train.global_batch
    ramped, micro = min(step, ramp.steps), train.batch_multiple
    grown = _floor_sum(ramped, ramp.steps * micro, train.global_batch - ramp.start, ramp.start * ramp.steps)
    return micro * grown + (step - ramped) * train.global_batch


def _floor_sum(n: int, divisor: int, slope: int, offset: int) -> int:
    """Sum of (slope * i + offset) // divisor over i from 0 to n - 1, by Euclid's algorithm: counts points below a line.

    >>> _floor_sum(5, 3, 2, 1), sum((2 * i + 1) // 3 for i in range(5))
    (7, 7)
    """
    total = 0
    while n:
        total += (n - 1) * n // 2 * (slope // divisor) + n * (offset // divisor)
        slope, offset = slope % divisor, offset % divisor
        n, offset = divmod(slope * n + offset, divisor)
        slope, divisor = divisor, slope
    return total

"""Settings of what a run does about steps and weights that are not what they should be."""

from typing import Literal

from megaresnorm.recipe.section import Count, CountOr0, Section

Policy = Literal["stop", "skip", "rollback"]


class GuardRecipe(Section):
    """What becomes of a step with NaN, of a spike of the loss, and of replicas that differ."""

    nonfinite: Policy = "skip"
    """A loss or gradient that is not finite, also when the step is run again: end the run, leave the step out, or go
    back to the newest checkpoint and pass over the step's samples. Its rank, block, tensor and samples are named."""
    spike: Literal["none", "stop", "skip", "rollback"] = "none"
    """A loss or gradient norm far above the last 128 steps', also when the step is run again: what is done likewise."""
    max_skips: Count = 100
    """Steps left out for either reason before the run ends; train.max_skipped_steps counts those in a row."""
    max_rollbacks: Count = 5
    """Times that a run goes back to a checkpoint before it ends."""
    digest_every: CountOr0 = 100
    """Steps between comparisons of what several ranks hold alike, weights and moments, bit for bit; also before every
    checkpoint; 0: never."""
    replay_every: CountOr0 = 0
    """Steps between those whose gradients are computed twice, to find a device that errs now and then: each rank
    compares its own, before they are reduced. It costs one more pass in such a step; 0: never."""

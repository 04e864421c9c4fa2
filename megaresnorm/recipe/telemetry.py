"""Settings of what a run records beside the metrics of its steps."""

from megaresnorm.recipe.section import CountOr0, Section


class TelemetryRecipe(Section):
    """Records beside the metrics of every step."""

    every: CountOr0 = 0
    """Steps between records of the numbers that 16-bit and FP8 products read: by block the largest inputs, weights and
    gradients, and the shares that saturate and underflow (numbers.jsonl); 0: none."""

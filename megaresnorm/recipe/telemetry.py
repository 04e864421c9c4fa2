"""Settings of what a run records beside the metrics of its steps."""

from megaresnorm.recipe.section import CountOr0, Section


class TelemetryRecipe(Section):
    """Records beside the metrics of every step."""

    every: CountOr0 = 0
    """Steps between watched ones; 0: none. By block what depth does (depth.jsonl), and in FP8 and 16 bits what products
    lose of the numbers that they read (numbers.jsonl)."""
    probe_every: CountOr0 = 0
    """Steps between probes of a fixed batch, with passes of their own; 0: none. By block the entropy of attention and
    how alike tokens become, the change of the model, and which paths carry its gradient (depth.jsonl)."""

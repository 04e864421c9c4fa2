"""What a run is and its headline figures, as words."""

from collections.abc import Callable
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np

from megaresnorm.recipe import Recipe
from megaresnorm.report.curves import window_of
from megaresnorm.report.depth import has_shares
from megaresnorm.report.marks import smoothed
from megaresnorm.report.runs import RunFiles
from megaresnorm.schedule import batch_size
from megaresnorm.telemetry.describe import data_name, describe_engine
from megaresnorm.telemetry.log import large

CONVENTION = (
    "TFLOP/s and MFU count the forward pass and twice as much for backward, causal attention by half, and nothing that "
    "is recomputed; MFU in the curves is the share of the GPU's dense BF16 peak."
)


class Card(NamedTuple):
    """A headline figure: what it is, the figure, and a few words to it."""

    title: str
    value: str
    note: str = ""


def facts_of(run: RunFiles) -> dict[str, str]:
    """What the run is, by headings."""
    found = {"Progress": _progress(run)}
    if run.recipe is not None:
        found |= _recipe_facts(run.recipe, run)
    if run.numbers and not any(map(has_shares, run.numbers.values())):
        num = max(len(over.steps) for classes in run.numbers.values() for over in classes.values())
        found["Numbers"] = f"nothing saturates or underflows in {num:,} records"
    return {**found, "Folder": str(run.folder.resolve())}


def _progress(run: RunFiles) -> str:
    done = int(run.metrics.steps[-1]) if len(run.metrics) else 0
    of = "" if run.recipe is None else f" of {run.recipe.train.steps:,}"
    last = run.metrics.last("time")
    when = "" if last is None else f"; the last at {_moment(last)}"
    return f"{run.state}: {done:,}{of} steps{when}"


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return "an unknown time"


def _recipe_facts(recipe: Recipe, run: RunFiles) -> dict[str, str]:
    model, train, num_parameters = recipe.model, recipe.train, run.num_parameters
    size = "" if num_parameters is None else f", {large(num_parameters)} parameters ({num_parameters:,})"
    vocabulary = "" if model.vocab_size is None else f", vocabulary {model.vocab_size:,}"
    precision = recipe.precision
    weights = "" if precision.weights == "fp32" else f", weights {precision.weights}"
    return {
        "Model": f"{model.topology}, {model.num_blocks} blocks = {2 * model.num_blocks} sub-layers, width {model.dim}"
        f"{size}",
        "Shape": f"{model.num_heads} heads of {model.head_width} ({model.kv_heads} for keys and values), "
        f"{model.ffn} of {model.ffn_width}, {model.norm}, sequences of {model.seq_len:,}{vocabulary}",
        "Layout": layout_of(recipe, run.num_writers),
        "Precision": f"{precision.compute}{weights}, residual stream {precision.stream}",
        "Engine": describe_engine(recipe) or "native",
        "Data": data_name(recipe),
        "Schedule": f"{train.global_batch * model.seq_len:,} tokens a step"
        f"{' from ' + format(batch_size(0, train) * model.seq_len, ',') if train.batch_ramp else ''}, "
        f"{recipe.schedule.kind}, peak learning rate {recipe.optim.lr:g}, {recipe.recompute.policy} recomputed",
    }


def layout_of(recipe: Recipe, num_writers: int | None) -> str:
    """The layout that a recipe asks for, in a few words.

    Args:
        num_writers: ranks that wrote the newest checkpoint; None without one.
    """
    parallel = recipe.parallel
    parts = [f"tp {parallel.tp} ({parallel.tensor_layout})"] if parallel.tp > 1 else []
    parts += [f"pp {parallel.pp} ({parallel.pipeline})"] if parallel.pp > 1 else []
    parts += [f"dp_shard {parallel.dp_shard}"] if parallel.dp_shard > 1 else []
    copies = parallel.dp_replicate
    parts += [f"dp_replicate {copies}"] if copies is not None and copies > 1 else []
    asked = " x ".join(parts) or ("one rank" if 1 in (copies, num_writers) else "data parallel")
    return asked if num_writers in (None, 1) else f"{asked}; {num_writers} ranks wrote the newest checkpoint"


def cards_of(run: RunFiles) -> list[Card]:
    """Headline figures."""
    metrics, marks = run.metrics, run.marks
    found = [card for make in (_loss, _valid, _speed, _flops, _memory, _goodput) if (card := make(run)) is not None]
    tokens = metrics.last("tokens")
    if tokens is not None:
        times = metrics.values.get("time", np.zeros(0))
        times = times[np.isfinite(times)]
        hours = f"in {_duration(times[-1] - times[0])}" if len(times) > 1 else ""
        found.append(Card("Tokens", large(tokens), hours))
    if len(metrics):
        found.append(Card("Spikes", str(len(marks.spikes)), _where(metrics.steps[marks.spikes])))
        found.append(Card("Refused or skipped", str(len(marks.refused)), _where(metrics.steps[marks.refused])))
    if run.num_starts is not None:
        found.append(Card("Starts", str(run.num_starts), _where(metrics.steps[marks.starts], "again before step")))
    elif len(metrics):
        found.append(Card("Pauses", str(len(marks.pauses)), _where(metrics.steps[marks.pauses], "before step")))
    return found


def _where(steps: np.ndarray, word: str = "step") -> str:
    shown = ", ".join(f"{step:,}" for step in steps[:4])
    return f"{word} {shown}{', ...' if len(steps) > 4 else ''}" if len(steps) else ""


def _duration(seconds: float) -> str:
    """A time in few characters.

    >>> _duration(42), _duration(5400), _duration(200_000)
    ('42 s', '90 min', '56 h')
    """
    return (
        f"{seconds:.0f} s"
        if seconds < 180
        else f"{seconds / 60:.0f} min"
        if seconds < 3e4
        else f"{seconds / 3600:.0f} h"
    )


def final_loss(run: RunFiles) -> tuple[float, float, int] | None:
    """The smoothed loss at the end, the least that it has been, and at which step; None without losses."""
    loss = run.metrics.get("loss")
    if loss is None:
        return None
    mean = smoothed(loss, window_of(len(loss)))
    mean[~np.isfinite(loss)] = np.nan
    best = int(np.nanargmin(mean))
    return float(mean[np.isfinite(mean)][-1]), float(mean[best]), int(run.metrics.steps[best])


def _loss(run: RunFiles) -> Card | None:
    found = final_loss(run)
    if found is None:
        return None
    window = window_of(len(run.metrics))
    return Card("Loss", f"{found[0]:.4f}", f"mean of {window} steps; best {found[1]:.4f} at step {found[2]:,}")


def _valid(run: RunFiles) -> Card | None:
    valid = run.metrics.get("valid_loss")
    if valid is None:
        return None
    best, bits = int(np.nanargmin(valid)), run.metrics.last("valid_bits_per_byte")
    unit = "" if bits is None else f"{bits:.3f} bits a byte; "
    note = f"{unit}best {valid[best]:.4f} at step {run.metrics.steps[best]:,}"
    return Card("Validation loss", f"{run.metrics.last('valid_loss'):.4f}", note)


def median_of(run: RunFiles, name: str) -> float | None:
    """Median of a metric over all steps; None where there is none."""
    found = run.metrics.get(name)
    return None if found is None else float(np.nanmedian(found))


def _speed(run: RunFiles) -> Card | None:
    speed, seconds = median_of(run, "tokens_per_second"), median_of(run, "seconds")
    if speed is None:
        return None
    return Card("Tokens a second", f"{speed:,.0f}", "median" if seconds is None else f"median; {seconds:.3g} s a step")


def _flops(run: RunFiles) -> Card | None:
    tflops, mfu = median_of(run, "tflops"), median_of(run, "mfu")
    if tflops is None:
        return None
    note = "a rank, median; MFU: the peak of this device is not known"
    return Card("FLOP/s", large(1e12 * tflops), note if mfu is None else f"a rank, median; {mfu:.1%} MFU")


def _memory(run: RunFiles) -> Card | None:
    peak = run.metrics.get("peak_memory")
    return None if peak is None else Card("Peak memory", f"{np.nanmax(peak) / 1e9:.2f} GB", "of the first rank")


def _goodput(run: RunFiles) -> Card | None:
    share = run.metrics.last("goodput")
    return None if share is None else Card("Goodput", f"{share:.1%}", "of the time, in steps that stay")


COLUMNS: dict[str, Callable[[RunFiles], str]] = {
    "state": lambda run: run.state,
    "topology": lambda run: "" if run.recipe is None else run.recipe.model.topology,
    "blocks": lambda run: "" if run.recipe is None else str(run.recipe.model.num_blocks),
    "parameters": lambda run: "" if run.num_parameters is None else large(run.num_parameters),
    "steps": lambda run: f"{int(run.metrics.steps[-1]) if len(run.metrics) else 0:,}",
    "loss": lambda run: "" if (found := final_loss(run)) is None else f"{found[0]:.4f}",
    "best": lambda run: "" if (found := final_loss(run)) is None else f"{found[1]:.4f}",
    "validation": lambda run: "" if (last := run.metrics.last("valid_loss")) is None else f"{last:.4f}",
    "tokens/s": lambda run: "" if (speed := median_of(run, "tokens_per_second")) is None else f"{speed:,.0f}",
    "peak memory": lambda run: "" if (card := _memory(run)) is None else card.value,
    "spikes": lambda run: str(len(run.marks.spikes)),
    "goodput": lambda run: "" if (share := run.metrics.last("goodput")) is None else f"{share:.1%}",
    "refused": lambda run: str(len(run.marks.refused)),
}

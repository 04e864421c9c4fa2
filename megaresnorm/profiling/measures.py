"""What one rank has measured, as plain numbers: times of rows and phases over the steps, bytes, operations.

Ranks send these to each other, and profile.py makes one profile of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megaresnorm.engines.engine import Engine
from megaresnorm.model.branches import BRANCHES
from megaresnorm.model.cost import block_flops, head_flops
from megaresnorm.model.topology import SUBLAYERS
from megaresnorm.profiling.memory import Bytes
from megaresnorm.profiling.rows import BUBBLE, DATA, HOST, NUM_PHASES, OPTIMIZER, Phase, Row, Rows
from megaresnorm.profiling.timeline import Reduced
from megaresnorm.recipe import ModelRecipe

_BACKWARD = (Phase.BACKWARD, Phase.INPUT_GRAD, Phase.WEIGHT_GRAD)
_DIGITS = 5
ENOUGH = 5  # values, from where on their spread says something


def statistics(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """Median, 95th percentile, mean, largest, and the standard error of the median, of milliseconds.

    The error is that of a normal distribution with the interquartile range of the values: 1.253 sigma / sqrt(n). Of
    fewer than ENOUGH values it is None.
    """
    found = np.asarray(values, dtype=np.float64)
    low, middle, high, most = np.percentile(found, [25, 50, 75, 95])
    noise = 1.253 * (high - low) / 1.349 / len(found) ** 0.5
    numbers: list[float | None] = [round(float(x), _DIGITS) for x in (middle, most, found.mean(), found.max(), noise)]
    return numbers if len(found) >= ENOUGH else [*numbers[:-1], None]


def table_of(rows: Rows, steps: Sequence[Reduced]) -> np.ndarray:
    """Milliseconds [steps, rows, phases]."""
    places = len(rows.names)
    padded = [np.pad(step.places, (0, places - len(step.places))) for step in steps]  # rows may come later
    return np.stack(padded).reshape(len(steps), -1, NUM_PHASES)


def times_of(rows: Rows, steps: Sequence[Reduced], shares: Mapping[Row, float]) -> dict[str, dict[str, list]]:
    """Statistics by row and column, of those that are not zero. The optimizer's time is shared out.

    Args:
        shares: of the optimizer's time, by row.
    """
    table, found = table_of(rows, steps), {}
    hidden = np.stack([np.pad(step.hidden, (0, table.shape[1] - len(step.hidden))) for step in steps])
    optimizer = table[:, rows.number(OPTIMIZER), Phase.FORWARD] if OPTIMIZER in rows.rows else np.zeros(len(steps))
    for number, row in enumerate(rows.rows):
        if row == OPTIMIZER:
            continue
        columns = {
            "forward": table[:, number, Phase.FORWARD],
            "backward": table[:, number, _BACKWARD].sum(axis=1),
            "recompute": table[:, number, Phase.RECOMPUTE],
            "exposed": table[:, number, Phase.EXPOSED],
            "hidden": hidden[:, number],
            "optimizer": optimizer * shares.get(row, 0.0),
        }
        found[row.name] = {name: statistics(column) for name, column in columns.items() if np.any(column)}
    return found


def split_times(rows: Rows, steps: Sequence[Reduced]) -> dict[str, dict[str, list]]:
    """Statistics of the products for gradients of inputs and weights, by row, from steps that tell them apart."""
    if not steps:
        return {}
    table, kinds = table_of(rows, steps), {"input_grad": Phase.INPUT_GRAD, "weight_grad": Phase.WEIGHT_GRAD}
    return {
        row.name: {name: statistics(table[:, number, phase]) for name, phase in kinds.items()}
        for number, row in enumerate(rows.rows)
        if table[:, number, Phase.WEIGHT_GRAD].any() or table[:, number, Phase.INPUT_GRAD].any()
    }


def totals_of(rows: Rows, steps: Sequence[Reduced]) -> dict[str, float | None]:
    """Mean milliseconds of a step and of its parts; the parts that do not overlap make up the step.

    They are: own (everything that this rank computes), exposed, bubble, data, host, and unaccounted. Of own there
    are also the median and its standard error.
    """
    each = table_of(rows, steps)
    table = each.mean(axis=0)
    number = {row.part: i for i, row in enumerate(rows.rows) if row in (BUBBLE, DATA, HOST)}
    found = {part: float(table[number[part]].sum()) if part in number else 0.0 for part in ("bubble", "data", "host")}
    found["exposed"] = float(table[:, Phase.EXPOSED].sum() - sum(table[i, Phase.EXPOSED] for i in number.values()))
    found["unaccounted"] = float(table[rows.other // NUM_PHASES].sum())
    found["step"] = float(np.mean([step.duration for step in steps]))
    found["own"] = float(table.sum()) - sum(found[n] for n in ("bubble", "data", "host", "exposed", "unaccounted"))
    found["host_wait"] = float(np.mean([step.host_wait for step in steps]))
    beside = [i for i, row in enumerate(rows.rows) if row in (BUBBLE, DATA, HOST) or i == rows.other // NUM_PHASES]
    own = statistics(np.delete(np.delete(each, Phase.EXPOSED, 2), beside, 1).sum(axis=(1, 2)))
    return {name: round(value, _DIGITS) for name, value in found.items()} | {"own_p50": own[0], "own_noise": own[-1]}


def parameter_bytes(engine: Engine, rows: Sequence[Row]) -> dict[Row, int]:
    """Bytes of this rank's weights by row. Norms and gates of a block are those of its row of norms."""
    compiled = {row.block: row for row in rows if row.part == "block"}
    by_name = {row.name: row for row in rows}
    found: dict[Row, int] = {}
    for name, slices in engine.tensors["weights"].items():
        if slices.local is None:
            continue
        row = _row_of(name, by_name, compiled)
        if row is not None:
            found[row] = found.get(row, 0) + slices.local.numel() * slices.local.element_size()
    return found


def _row_of(name: str, by_name: Mapping[str, Row], compiled: Mapping[int | None, Row]) -> Row | None:
    if not name.startswith("blocks."):
        part = {"head": "output matrix", "final_norm": "final norm"}.get(name.split(".")[0], "embedding")
        return by_name.get(part)
    _, number, kind, *rest = name.split(".")
    if compiled:
        first = max((one for one in compiled if one is not None and one <= int(number)), default=None)
        return compiled.get(first)
    return by_name.get(f"block {number} {kind if rest[0] == 'branch' else 'norm'}")


def flops_of(recipe: ModelRecipe, row: Row, tokens: int, tp: int) -> int:
    """Floating-point operations of a row's forward passes in one step on one rank: products, and causal attention.

    Args:
        tokens: that this rank's model replica reads in a step.
        tp: ranks that share each product.
    """
    if row.part in SUBLAYERS:
        each = BRANCHES[row.part].flops(recipe)
    elif row.part == "block":
        each = row.num_blocks * block_flops(recipe)
    elif row.part == "head":
        each = head_flops(recipe)
    else:
        each = 0
    return each * tokens // tp


def again_flops(recipe: ModelRecipe, row: Row, rows: Rows, tokens: int, tp: int) -> int:
    """Operations of a row that are made twice in a step. The arguments are those of ``flops_of``."""
    if row not in rows.again:
        return 0
    widths = {"attention": recipe.num_heads * recipe.head_width, "ffn": recipe.ffn_width}
    last = 0 if rows.again[row] else 2 * widths[row.part] * recipe.dim * tokens // tp
    return flops_of(recipe, row, tokens, tp) - last


def measures_of_rank(
    engine: Engine,
    recipe: ModelRecipe,
    rows: Rows,
    timed: Sequence[Reduced],
    split: Sequence[Reduced],
    memory: Mapping[Row, Bytes],
    *,
    tokens: int,
) -> dict[str, Any]:
    """What this rank sends to the others, as JSON holds it."""
    sizes, context = parameter_bytes(engine, rows.rows), engine.assembled.context
    whole = sum(sizes.values())
    times = times_of(rows, timed, {row: size / whole for row, size in sizes.items()} if whole else {})
    products = split_times(rows, split)
    found = []
    for row in rows.rows:
        if row == OPTIMIZER or not times.get(row.name):
            continue
        held = memory.get(row)
        found.append(
            {
                **row._asdict(),
                "times": times[row.name] | products.get(row.name, {}),
                "flops": flops_of(recipe, row, tokens, context.tp.size),
                "flops_again": again_flops(recipe, row, rows, tokens, context.tp.size),
                "activation_bytes": None if held is None else held.kept,
                "transient_bytes": None if held is None else held.transient,
                "parameter_bytes": sizes.get(row),
            }
        )
    durations = statistics([step.duration for step in timed])
    return {"rows": found, "totals": totals_of(rows, timed), "step": durations}

"""Records of the numbers that products of fewer bits read: what saturates, what underflows, by class and block."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaresnorm.assemble import Assembled
from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.precision.counting import CLASSES, Seen
from megaresnorm.precision.dtypes import DTYPES
from megaresnorm.precision.fp8 import fp8_blocks
from megaresnorm.precision.watched import Watch
from megaresnorm.recipe import PrecisionRecipe, Recipe
from megaresnorm.telemetry.metrics import NUMBERS, read_records, short

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
# What is clamped are the largest elements, of which a product's sums consist: a hundredth of them is a large part of
# those. What underflows are the smallest: a twentieth of a tensor adds little to a sum, but more than that says that
# the format's range is spent, and that whole rows of small gradients begin to vanish.
MOST = {"saturated": 0.01, "underflown": 0.05}
_WORDS = {
    "input": "inputs of linear layers", "weight": "weights", "gradient": "gradients of linear layers' outputs",
    "saturated": "saturate", "underflown": "underflow",
}  # fmt: skip


class Numbers:
    """Watches a run's linear layers at every ``telemetry.every``-th step, where products are of 16 bits or FP8.

    Args:
        assembled: before FSDP2 has gathered a weight.
        weights: the engine's slices of them by global name: under ZeRO-3 a parameter has no memory of its own.

    Attributes:
        record: of the last step, as a line of numbers.jsonl; None where it was not watched.
        worst: the largest shares of it, among its metrics.
    """

    def __init__(self, recipe: Recipe, assembled: Assembled, weights: Mapping[str, TensorSlices]) -> None:
        self._every = recipe.telemetry.every if recipe.precision.rounds else 0
        self._precision, self._context = recipe.precision, assembled.context
        self._formats = formats_of(recipe.precision, recipe.model.num_blocks)
        self._watch: Watch | None = None
        if self._every:
            blocks = (pair for model in assembled.models.values() for pair in model.blocks.items())
            slices = {id(parameter): weights[name].local for name, parameter in assembled.parameters().items()}
            self._watch = Watch(
                ((int(number), block) for number, block in blocks),
                recipe.model.num_blocks,
                assembled.layout,
                DTYPES[recipe.precision.branches],
                assembled.device,
                {key: tensor for key, tensor in slices.items() if tensor is not None},
            )
        self.record: dict[str, Any] | None = None
        self.worst: dict[str, float | None] = {}
        self._warned: set[tuple[str, str]] = set()

    @contextmanager
    def seen_in(self, step: int) -> Iterator[None]:
        """Watch the step that is made within, if it is one of those. Collective.

        Args:
            step: counted from 1.

        Communication:
            That of ``Tally.over_ranks``, in a step that is watched.
        """
        self.record, self.worst = None, {}
        if self._watch is None or step % self._every:
            yield
            return
        with self._watch.watching() as tally:
            yield
        seen = tally.over_ranks(self._context)
        shares = {"saturated": seen.saturated, "underflown": seen.underflown}
        for kind, found in shares.items():
            self.worst[kind] = max((s for of in found.values() for s in of if s is not None), default=None)
        self._warn(step, shares)
        self.record = record_of(step, self._formats, seen)

    def _warn(self, step: int, shares: Mapping[str, Mapping[str, list[float | None]]]) -> None:
        """Say, once for each class, where too much of it is lost."""
        for kind, of in ((kind, name) for kind in shares for name in CLASSES):
            found = [share or 0.0 for share in shares[kind][of]]
            block = max(range(len(found)), key=found.__getitem__)
            if found[block] <= MOST[kind] or (kind, of) in self._warned:
                continue
            self._warned.add((kind, of))
            form = self._formats[of][block]
            log.warning(
                "warning: step %d: %.3g %% of the %s of block %d %s in %s; %s",
                *(step, 100 * found[block], _WORDS[of], block, _WORDS[kind], form.upper()),
                advice(self._precision, form, kind, of),
            )


def formats_of(precision: PrecisionRecipe, num_blocks: int) -> dict[str, list[str]]:
    """The formats that linear layers read tensors in: class -> that of each block."""
    inner = fp8_blocks(precision.fp8, num_blocks) if precision.compute == "fp8" else range(0)
    fp8 = {"input": "e4m3", "weight": "e4m3", "gradient": precision.fp8.gradients}
    return {
        name: [fp8[name] if block in inner else precision.branches for block in range(num_blocks)] for name in CLASSES
    }


def record_of(step: int, formats: dict[str, list[str]], seen: Seen) -> dict[str, Any]:
    """A line of numbers.jsonl. What is not finite is None; all else has six digits."""
    blocks = {
        name: {kind: [short(number) for number in of[name]] for kind, of in seen._asdict().items()} for name in CLASSES
    }
    return {"schema_version": SCHEMA_VERSION, "step": step, "format": formats, "blocks": blocks}


def advice(precision: PrecisionRecipe, form: str, kind: str, of: str) -> str:
    """What to change where too much of a class of tensors is lost.

    Args:
        form: the format in which it is read.
        kind: saturated or underflown.
        of: input, weight or gradient.

    >>> advice(PrecisionRecipe(compute="fp16"), "fp16", "underflown", "gradient")
    'set a larger precision.loss_scale, or set precision.compute=bf16'
    """
    if form == "fp16":
        dynamic = precision.loss_scale in (None, "dynamic")
        if of == "gradient" and kind == "saturated" and dynamic:
            return "the loss scale is halved; where this does not end, set precision.compute=bf16"
        scale = f"set a {'smaller' if kind == 'saturated' else 'larger'} precision.loss_scale, or "
        return f"{scale if of == 'gradient' else ''}set precision.compute=bf16"
    if form == "bf16":
        lost = "they are below 1e-38, as are FP32's: look at model.init and the topology's gates"
        return "the run diverges: try a smaller optim.lr" if kind == "saturated" else lost
    if kind == "saturated":
        return "set precision.fp8.scaling=current, or precision.fp8.recipe=rowwise with a scale for each token"
    others = "keep more blocks in BF16 (precision.fp8.bf16_first_blocks, bf16_last_blocks)"
    if of == "gradient":
        others = f"set precision.fp8.backward={'e5m2, which has a wider range, or ' if form == 'e4m3' else ''}bf16"
    finer = {"tensorwise": "rowwise", "rowwise": "block"}.get(precision.fp8.recipe)
    return others if finer is None else f"set precision.fp8.recipe={finer}, or {others}"


def read_numbers(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run's numbers.jsonl, by step. A line that was torn by a crash is left out, with a warning.

    Args:
        run: the folder of the run.

    Raises:
        DataError: there is no such file, or it is of a version that this one does not know.
    """
    return read_records(Path(run) / NUMBERS, SCHEMA_VERSION)

"""What is warned of, once each: figures beyond which depth is known to be lost, or a run to diverge."""

import logging
from collections.abc import Mapping
from typing import Any

from megaresnorm.model.lint import BF16_HALF_ULP
from megaresnorm.model.lint_precision import FP16_MAX, OUTLIERS
from megaresnorm.model.topology import SUBLAYERS, Learned, residual_at
from megaresnorm.recipe import Recipe
from megaresnorm.telemetry.depth.figures import DepthFigures, Numbers

log = logging.getLogger(__name__)

# Attention whose logits pass a hundred has entropies near 0, and runs with it diverge: Dehghani et al.,
# arXiv:2302.05442; Wortsman et al., arXiv:2309.14322.
LOGITS = 100.0
RATIOS = 1e-3, 1e3  # of the gradient before the first block and after the last
COLLAPSED = 1e-3  # of tokens' differences and the tokens: about what BF16 keeps of them


class Alarms:
    """Says each thing once in a run."""

    def __init__(self, recipe: Recipe) -> None:
        self._model, self._precision = recipe.model, recipe.precision
        self._said: set[str] = set()

    def watched(self, step: int, figures: DepthFigures) -> None:
        """Look at the cheap figures of a step."""
        self._swallowed(step, figures.by_sublayer["branch_ratio"])
        self._overflowing(step, figures.by_sublayer["stream_rms"])
        self._logits(step, figures.by_block["logit_max"])
        self._gradients(step, figures.whole["gradient_ratio"])

    def probed(self, step: int, record: Mapping[str, Any]) -> None:
        """Look at the dear ones."""
        known = {block: c for block, c in enumerate(record["by_block"]["collapse"]) if c is not None}
        if known and min(known.values()) < COLLAPSED:
            block = min(known, key=known.__getitem__)
            self._say(
                "collapse",
                step,
                f"after block {block} the tokens of a sequence differ by {known[block]:.2g} of their size, so that "
                "little of them is left to tell apart; set a smaller optim.lr, or a model.topology whose trunk "
                "outweighs its branches (pre, deepnorm, keel)",
            )

    def _say(self, name: str, step: int, what: str) -> None:
        if name not in self._said:
            self._said.add(name)
            log.warning("warning: step %d: %s", step, what)

    def _swallowed(self, step: int, ratios: Numbers) -> None:
        if self._precision.stream != "bf16":
            return
        found = {site: r for site, r in enumerate(ratios) if r is not None and not self._is_learned(site)}
        if found and min(found.values()) < BF16_HALF_ULP:
            site = min(found, key=found.__getitem__)
            self._say(
                "bf16-swallows",
                step,
                f"what the {_place(site)} adds is {found[site]:.2g} of its trunk, of which a BF16 stream rounds away "
                f"what is below {BF16_HALF_ULP:.2g}; set precision.residual_dtype=fp32",
            )

    def _is_learned(self, site: int) -> bool:
        """A learned gate finds its own size, and starts at 0 with some topologies."""
        block, place = divmod(site, len(SUBLAYERS))
        return isinstance(residual_at(self._model, block, SUBLAYERS[place]).gate, Learned)

    def _overflowing(self, step: int, sizes: Numbers) -> None:
        """Branches that read the stream as it is hold it in FP16."""
        if self._precision.compute != "fp16":
            return
        for site, rms in enumerate(sizes):
            block, place = divmod(site, len(SUBLAYERS))
            reads_stream = not residual_at(self._model, block, SUBLAYERS[place]).norm_in
            if rms is not None and reads_stream and rms * OUTLIERS > FP16_MAX:
                self._say(
                    "fp16-stream-growth",
                    step,
                    f"the {_place(site)} reads a stream of RMS {rms:.3g} that is not normalised; elements reach "
                    f"{OUTLIERS:.0f} times that, FP16 ends at {FP16_MAX:.0f}; set precision.compute=bf16",
                )
                return

    def _logits(self, step: int, largest: Numbers) -> None:
        found = {block: logit for block, logit in enumerate(largest) if logit is not None}
        if found and max(found.values()) > LOGITS:
            block = max(found, key=found.__getitem__)
            self._say(
                "logits",
                step,
                f"attention of block {block} has a logit of {found[block]:.4g}, more than {LOGITS:.0f}, as of runs "
                "that diverge; set model.qk_norm=head for a new run, or a smaller optim.lr",
            )

    def _gradients(self, step: int, ratio: float | None) -> None:
        if ratio is not None and not RATIOS[0] <= ratio <= RATIOS[1]:
            self._say(
                "gradients",
                step,
                f"the stream's gradient before block 0 is {ratio:.2g} times that after the last block: it "
                f"{'grows' if ratio > 1 else 'vanishes'} on its way down; use another model.topology (deepnorm, peri, "
                "pre_scaled), or longer schedule.warmup_steps",
            )


def _place(site: int) -> str:
    block, place = divmod(site, len(SUBLAYERS))
    return f"{SUBLAYERS[place]} of block {block}"

"""What an engine keeps for products of fewer bits: copies of the weights, and scales that steps hand on."""

from collections.abc import Mapping

from torch import Tensor, nn

from megaresnorm.assemble import Assembled
from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.engines.state import in_linear_layers, numbers_of_parameters
from megaresnorm.precision.copies import copy_weights
from megaresnorm.precision.delayed import DelayedScales
from megaresnorm.precision.fp8 import delayed_scales, fp8_layers
from megaresnorm.recipe import PrecisionRecipe


class LowPrecision:
    """Copies of an engine's weights, and delayed scales. In FP32 and FP64 there is nothing of it.

    Args:
        assembled: with memory and initial values, sharded by FSDP2 or not at all.
        parameters: of this rank, by global name.
    """

    def __init__(self, recipe: PrecisionRecipe, assembled: Assembled, parameters: Mapping[str, nn.Parameter]) -> None:
        self._assembled = assembled
        self._copies = copy_weights(assembled.models.values(), recipe, assembled.context)
        self._all_names = in_linear_layers(assembled)  # in any block: those in FP8 may be others in a later run
        self._names = [name for name in self._all_names if name in parameters]
        self._delayed: DelayedScales | None = None
        if recipe.compute == "fp8" and recipe.fp8.scaling == "delayed":
            layers = fp8_layers(assembled.models.values())
            self._delayed = delayed_scales(layers, self._names, recipe.fp8, assembled.device)

    @property
    def copies(self) -> list[Tensor]:
        """Copies of weights, with their scales."""
        return [tensor for copies in self._copies for tensor in copies.tensors]

    def refresh(self) -> None:
        """Copy the weights, after they have changed.

        Communication:
            That of ``Fp8Weights`` or ``Fp8Shards``, where there are weights in FP8.
        """
        for copies in self._copies:
            copies.refresh()

    def begin_step(self) -> None:
        """Get ready for the passes of a step."""
        if self._delayed is not None:
            self._delayed.begin_step()

    def end_step(self, refused: Tensor) -> None:
        """Take over what the passes of a step have seen.

        Args:
            refused: a number FP32; where it is 1 nothing changes.

        Communication:
            That of ``DelayedScales.end_step``.
        """
        if self._delayed is not None:
            self._delayed.end_step(self._assembled.context, refused)

    def step_was_applied(self) -> None:
        """Take note that ``refused`` was 0, which the host has learnt by now."""
        if self._delayed is not None:
            self._delayed.step_was_applied()

    def tensors(self) -> dict[str, dict[str, TensorSlices]]:
        """What a checkpoint has of it, as ``Engine.tensors``."""
        if self._delayed is None:
            return {}
        history = self._delayed.history
        mine = dict(zip(self._names, history, strict=True))
        return {"amax": numbers_of_parameters(self._assembled, mine, self._all_names, *history.shape[1:])}

    def loaded(self) -> None:
        """Use what a checkpoint has given. ``refresh`` is called as well."""
        if self._delayed is not None:
            self._delayed.loaded()

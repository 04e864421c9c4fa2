"""Settings of number formats."""

from math import frexp
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from megaresnorm.limits import LARGEST_POWER, MAX_HISTORY
from megaresnorm.recipe.section import BlocksOr0, Section, Word, refuse_ignored

FP8_MULTIPLE = 16  # of which GPUs want what an FP8 product sums over, and its columns, to be a multiple
_POWERS = f"a power of two from 2^-{LARGEST_POWER} to 2^{LARGEST_POWER}"


def _power_of_two(value: float) -> float:
    in_range = 2.0**-LARGEST_POWER <= value <= 2.0**LARGEST_POWER
    if not in_range or float(value) != value or frexp(value)[0] != 0.5:
        raise PydanticCustomError("power_of_two", f"{_POWERS}, which FP32 multiplies and divides by without rounding")
    return float(value)


def _loss_scale(value: Any) -> Any:
    """One line for whatever is no loss scale; a union of types would have one for each of them."""
    if value == "dynamic":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("loss_scale", f"dynamic, or {_POWERS}, such as 65536")
    return _power_of_two(value)


def _no_fp16_stream(value: Any) -> Any:
    if value == "fp16":
        raise PydanticCustomError(
            "fp16_stream", "fp32: the sum of many branches grows beyond 65504, where FP16 ends; leave it unset"
        )
    return value


PowerOfTwo = Annotated[float, AfterValidator(_power_of_two)]
LossScaleSetting = Annotated[Literal["dynamic"] | float, BeforeValidator(_loss_scale)]
StreamDtype = Annotated[Literal["fp32", "bf16", "fp64"], BeforeValidator(_no_fp16_stream)]


class Fp8Recipe(Section):
    """How the linear layers of the blocks compute in FP8; norms, attention, embedding and output matrix do not."""

    recipe: Literal["tensorwise", "rowwise", "block", "mxfp8"] = "rowwise"
    """What shares a scale. tensorwise: a tensor; rowwise: a token, and an output of a weight; block: 128 elements of a
    token, and 128 x 128 of a weight; mxfp8: 32 elements of either, emulated."""
    scaling: Literal["current", "delayed"] = "current"
    """tensorwise: scales from the values themselves, or from the largest of earlier steps, so that a norm can write FP8
    at once."""
    history: Annotated[int, Field(ge=1, le=MAX_HISTORY)] = 16
    """delayed: earlier steps whose largest values give the scale."""
    backward: Literal["e4m3", "e5m2", "bf16"] | None = None
    """Type of gradients in the product for the input's gradient; bf16: that product is in BF16. Unset: e5m2 under
    tensorwise, whose one scale leaves small gradients little room, else e4m3."""
    weight_grad: Literal["bf16", "fp8"] = "bf16"
    """Type of the product for the weight's gradient, which bears rounding the worst."""
    backend: Word = "auto"
    """What multiplies: torch, te (Transformer Engine), emulated; auto: torch where the device has the form, else
    emulated. ``megaresnorm doctor --kernels`` says which, and why."""
    bf16_first_blocks: BlocksOr0 = 1
    """Blocks at the start of the model whose products stay in BF16."""
    bf16_last_blocks: BlocksOr0 = 1
    """Likewise at its end."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.recipe != "tensorwise":
            refuse_ignored(self, "precision.fp8", f"precision.fp8.recipe={self.recipe}", "scaling")
        if self.scaling != "delayed":
            refuse_ignored(self, "precision.fp8", f"precision.fp8.scaling={self.scaling}", "history")
        if self.backward == "bf16":
            refuse_ignored(self, "precision.fp8", "precision.fp8.backward=bf16", "weight_grad")
        return self

    @property
    def gradients(self) -> str:
        """Type of gradients in the product for the input's gradient, whether it is set or not."""
        return self.backward or ("e5m2" if self.recipe == "tensorwise" else "e4m3")


class PrecisionRecipe(Section):
    """Number formats of the matrix products and of the residual stream."""

    compute: Literal["fp32", "bf16", "fp16", "fp8", "fp64"] = "fp32"
    """Type of the matrix products; weights, their gradients and the optimizer stay FP32 under bf16, fp16 and fp8. fp8:
    the linear layers of the blocks, all else as under bf16."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """bf16: the matrices (linear layers, embedding, learned positions, output matrix) are stored in BF16 alone and
    updated with stochastic rounding, with compute bf16. All else stays FP32: norms, biases, gates, gradients, moments.
    """
    residual_dtype: StreamDtype | None = None
    """Type the residual stream is stored in; unset: fp32, or fp64 under fp64."""
    loss_scale: LossScaleSetting | None = None
    """fp16: factor of the loss in backward, so that gradients fit into FP16. dynamic: halved when they overflow (that
    step is skipped), doubled after 2,000 good steps; or a power of two that stays. Unset: dynamic."""
    fp8: Fp8Recipe = Fp8Recipe()
    """How products in FP8 are scaled."""

    @model_validator(mode="after")
    def _fp8_is_computed(self) -> Self:
        if self.compute != "fp8" and self.fp8 != Fp8Recipe():
            key, value = next(iter(self.fp8.model_dump(exclude_defaults=True).items()))
            raise ValueError(
                f"precision.fp8.{key}={value} has no effect with precision.compute={self.compute}; remove it, or set "
                "precision.compute=fp8"
            )
        return self

    @model_validator(mode="after")
    def _fp64_is_whole(self) -> Self:
        if (self.compute == "fp64") != (self.stream == "fp64"):
            raise ValueError(
                f"precision.residual_dtype={self.stream} does not go with precision.compute={self.compute}; "
                "fp64 is for both or neither"
            )
        return self

    @model_validator(mode="after")
    def _bf16_weights_are_read_in_bf16(self) -> Self:
        if self.weights == "bf16" and self.compute != "bf16":
            raise ValueError(
                f"precision.weights=bf16 goes with precision.compute=bf16 alone, not {self.compute}; set that, or "
                "remove precision.weights"
            )
        return self

    @model_validator(mode="after")
    def _fp16_has_what_it_needs(self) -> Self:
        if self.compute != "fp16" and self.loss_scale is not None:
            shown = self.loss_scale if isinstance(self.loss_scale, str) else f"{self.loss_scale:g}"
            raise ValueError(
                f"precision.loss_scale={shown} has no effect with precision.compute={self.compute}; remove it"
            )
        if self.compute == "fp16" and self.stream != "fp32":
            raise ValueError(
                f"precision.residual_dtype={self.stream} does not go with precision.compute=fp16: it would round away "
                "bits that FP16 branches have; leave it unset (fp32)"
            )
        return self

    @property
    def branches(self) -> str:
        """Type that branches compute in where products are not in FP8."""
        return "bf16" if self.compute == "fp8" else self.compute

    @property
    def rounds(self) -> bool:
        """Whether products read numbers of fewer bits than FP32."""
        return self.compute not in ("fp32", "fp64")

    @property
    def stream(self) -> str:
        """Type the residual stream is stored in, whether it is set or not."""
        return self.residual_dtype or ("fp64" if self.compute == "fp64" else "fp32")

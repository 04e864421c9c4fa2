"""What FP16 and FP8 make of a topology and a depth: warnings from the estimates of its sub-layers at initialisation.

FP8 operands have scales, so that it is the spread of values under one scale that counts and not their size; FP16 values
have none. Norms decide both. A normalised input has rows of one RMS, of which no element is above D^1/2: FP16 holds
that at any width, and so does one E4M3 scale for the whole tensor, down to the usual element. There are no rules for
what was looked for and not found (docs/numerics.md has the figures): under current scaling the 1/L of KEEL and the
1/alpha of DeepNorm are one factor on all gradients of a tensor, which its scale takes up, and the growing stream that
unnormalised branches read has rows that grow alike.

D model dim   F ffn dim
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import exp, sqrt
from typing import TYPE_CHECKING

from megaresnorm.model.specs import matrix_std
from megaresnorm.model.topology import SUBLAYERS, ResidualSpec, TokenGate
from megaresnorm.recipe import ModelRecipe, PrecisionRecipe

if TYPE_CHECKING:
    from megaresnorm.model.lint import SublayerEstimate

FP16_MAX = 65504.0
# The largest element of a trained model's activations over their RMS. Within a row of width D it is at most D^1/2, and
# a few tokens have rows far above the others' (massive activations, arXiv:2402.17762): 10^2 to 10^3 in all.
OUTLIERS = 1000.0
# From the largest finite number of a format down to its smallest normal one, below which digits are lost.
NORMAL_RANGE = {"e4m3": 448 / 2**-6, "e5m2": 57344 / 2**-14, "fp16": FP16_MAX / 2**-14}
# The largest element of a gradient over the RMS of its rows, where these are alike: 3.8 to 5 as measured for 256 tokens
# x 64 columns; larger ones have more.
PEAK = 4.0
MANY_BLOCKS = 20  # of which the two at the ends are at most a tenth of the products

Warnings = Iterator[tuple[str, str]]  # name of the rule, message


def precision_warnings(
    model: ModelRecipe, precision: PrecisionRecipe, estimates: "Sequence[SublayerEstimate]"
) -> Warnings:
    """Warnings about precision.compute=fp16 and fp8.

    Args:
        estimates: of every sub-layer, from the input up.

    Yields:
        The name of the rule, and the message.
    """
    if precision.compute == "fp16":
        yield from _fp16_overflows(model, estimates)
        yield from _fp16_without_norms(model, estimates)
    yield from _gradient_rows(model, precision, estimates)
    yield from _fp8_first_and_last(model, precision)


def largest_rms(model: ModelRecipe, kind: str, spec: ResidualSpec, trunk: float) -> float:
    """The largest RMS among what a branch holds in the compute type: its input, the ffn's inner product, its output.

    A gated ffn multiplies two numbers that both grow with the input, so that its inner product grows as the square.

    Args:
        kind: of the sub-layer.
        trunk: RMS of the stream that it reads.
    """
    u = spec.norm_in_scale if spec.norm_in else trunk
    dim, ffn, q_dim = model.dim, model.ffn_width, model.num_heads * model.head_width
    kv_dim = model.kv_heads * model.head_width

    def through(role: str, fan_out: int, fan_in: int) -> float:
        return matrix_std(model, role, fan_out, fan_in, spec) * sqrt(fan_in)

    if kind == "attention":
        inner, out = u * through("v", kv_dim, dim), through("out", dim, q_dim)
    else:  # half of the numbers pass an activation, or a gate's
        gate = u * through("gate", ffn, dim) if model.gated_ffn else 1.0
        inner, out = gate * u * through("up", ffn, dim) / sqrt(2), through("down", dim, ffn)
    return max(u, inner, 1.0 if spec.norm_inner else inner * out)


def gradient_spread(estimates: "Sequence[SublayerEstimate]", first: int = 0) -> float:
    """The largest over the usual RMS of the rows of the gradient at block ``first``.

    Causal attention hands a share of a token's gradient to tokens before it and none back. What stays at the token is
    1 / (1 + r^2)^1/2 for a branch of r times the trunk (1 - T for a token gate of T), once for each attention above:
    2^(N/2) over N blocks of post-norm, while pre-norm's r falls as 1/l^1/2, DeepNorm's and KEEL's with depth. The first
    tokens keep all of theirs. A learned gate counts as nothing.

    Measured at 24 to 100 blocks (FP64, at initialisation): within a factor of 6 of this for pre, post, mix_ln, peri,
    sub-LN, DeepNorm and KEEL, over 14 decades; for gated 2 to 500 times this, which then warns late.
    """
    spread = 1.0
    for estimate in estimates[len(SUBLAYERS) * first :: len(SUBLAYERS)]:
        gate = estimate.spec.gate
        if isinstance(gate, TokenGate):
            spread *= 1 + exp(gate.bias)  # 1 / (1 - sigmoid(bias))
        elif isinstance(gate, float | int):
            spread *= sqrt(1 + estimate.branch_to_trunk**2)
    return spread


def _fp16_overflows(model: ModelRecipe, estimates: "Sequence[SublayerEstimate]") -> Warnings:
    """Branches whose numbers may pass FP16's largest. How a stream with learned gates grows is not known beforehand."""
    if any(one.spec.constant_gate is None for one in estimates):
        return
    kinds = len(SUBLAYERS)
    held = (largest_rms(model, SUBLAYERS[i % kinds], one.spec, one.trunk) for i, one in enumerate(estimates))
    for i, rms in enumerate(accumulate(held, max)):
        if rms * OUTLIERS > FP16_MAX:
            yield (
                "fp16-stream-growth",
                f"precision.compute=fp16: branches of model.topology={model.topology} read a stream that is not "
                f"normalised, and from block {i // kinds} on hold numbers of RMS {rms:.3g}; elements of trained models "
                f"reach {OUTLIERS:.0f} times that, FP16 ends at {FP16_MAX:.0f}; use precision.compute=bf16",
            )
            return


def _fp16_without_norms(model: ModelRecipe, estimates: "Sequence[SublayerEstimate]") -> Warnings:
    """ReZero and its like are reported unstable in FP16 even where they are shallow (arXiv:2203.00555, footnote 3)."""
    if any(not (one.spec.norm_in or one.spec.norm_branch or one.spec.norm_out) for one in estimates):
        yield (
            "fp16-rezero",
            f"precision.compute=fp16 with model.topology={model.topology}, whose blocks have no norm, is reported "
            "unstable (arXiv:2203.00555, footnote 3); use precision.compute=bf16, or a topology with norms",
        )


def _gradient_rows(model: ModelRecipe, precision: PrecisionRecipe, estimates: "Sequence[SublayerEstimate]") -> Warnings:
    """Rows of gradients that lie so far apart that one scale, or FP16's, does not reach the usual one.

    Scales by token (rowwise, block, mxfp8) reach all.
    """
    fp8, form = precision.fp8, str(precision.compute)
    if form == "fp8":
        form = fp8.gradients if fp8.recipe == "tensorwise" else "bf16"
    if form not in NORMAL_RANGE:
        return
    first = fp8.bf16_first_blocks if precision.compute == "fp8" else 0
    spread = gradient_spread(estimates, first)
    if spread * PEAK > NORMAL_RANGE[form]:
        remedy = "precision.compute=bf16" if form == "fp16" else "precision.fp8.recipe=rowwise, a scale for each token"
        yield (
            f"{precision.compute}-gradient-rows",
            f"model.topology={model.topology} at {model.num_blocks} blocks moves gradients to the first tokens: at "
            f"the start those of most others are about {spread:.1e} times smaller in block {first}, and {form} with "
            f"one scale keeps all digits over {NORMAL_RANGE[form]:.1e}; use {remedy}, or another topology",
        )


def _fp8_first_and_last(model: ModelRecipe, precision: PrecisionRecipe) -> Warnings:
    """The rule of thumb of FP8 training that the blocks at both ends bear it worst (--first-last-layers-bf16 of
    Megatron-LM is for this). In a deep model keeping them costs next to nothing.
    """
    if precision.compute != "fp8" or model.num_blocks < MANY_BLOCKS:
        return
    for key in ("bf16_first_blocks", "bf16_last_blocks"):
        if getattr(precision.fp8, key) == 0:
            yield (
                "fp8-first-last",
                f"precision.fp8.{key}=0: the first and the last blocks bear FP8 worst; one of {model.num_blocks} in "
                f"BF16 costs little: set precision.fp8.{key}=1",
            )

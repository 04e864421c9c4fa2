"""Device functions that write FP8 in Triton, to the bits of kernels/fp8/formats.py.

Numbers are compared and scaled by their bits. TOP is the exponent of a format's largest number, 8 of E4M3 and 15 of
E5M2.
"""

import triton
import triton.language as tl


@triton.jit
def size_of(v, mask):
    """|v| as int32, which are in the order of the numbers, NaN the largest; 0 where it is masked."""
    return tl.where(mask, tl.abs(v), 0.0).to(tl.int32, bitcast=True)


@triton.jit
def scales_of(bits, TOP: tl.constexpr):
    """``formats.scales_of`` an amax in int32: the scale, and its inverse, NaN where amax is not finite."""
    bits = bits & 0x7FFFFFFF  # a NaN may have a sign
    exponent = bits >> 23
    power = (TOP + 127) - exponent - tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)
    power = tl.where((bits == 0) | (exponent == 255), 0, tl.minimum(power, 126))
    scale = ((127 + power) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - power) << 23).to(tl.float32, bitcast=True)
    return scale, tl.where(exponent == 255, float("nan"), inverse)


@triton.jit
def scale_for(given, TOP: tl.constexpr):
    """The scale of the amax at ``given`` [1]."""
    scale, _inverse = scales_of(tl.load(given).to(tl.int32, bitcast=True), TOP)
    return scale


@triton.jit
def amax_of(bits, given, at, mask):
    """The amax of every group in int32: ``bits``, or where there are ``given`` ones those."""
    if given is not None:
        bits = tl.load(given + at, mask=mask, other=0.0).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def scaled(
    v, mask, row, row_mask, start, columns, inverse, given,
    GROUP: tl.constexpr, TOP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """v times its scales, of which GROUP columns share one, and whose inverse are stored in ``inverse`` [M, groups].

    The tile begins at column ``start``, a multiple of GROUP, of ``columns`` in a row. The scales are for the largest
    |v| of a group, or where they are given for those of ``given`` [M, groups].
    """
    if GROUP == BLOCK_N:
        at = row * ((columns + GROUP - 1) // GROUP) + start // GROUP
        scales, inverses = scales_of(amax_of(tl.max(size_of(v, mask), 1), given, at, row_mask), TOP)
        tl.store(inverse + at, inverses, mask=row_mask)
        y = v * scales[:, None]
    else:
        groups = (columns + GROUP - 1) // GROUP
        group = start // GROUP + tl.arange(0, BLOCK_N // GROUP)
        at = row[:, None] * groups + group[None, :]
        at_mask = row_mask[:, None] & (group < groups)[None, :]
        sizes = tl.max(tl.reshape(size_of(v, mask), [BLOCK_M, BLOCK_N // GROUP, GROUP]), 2)
        scales, inverses = scales_of(amax_of(sizes, given, at, at_mask), TOP)
        tl.store(inverse + at, inverses, mask=at_mask)
        y = tl.reshape(tl.reshape(v, [BLOCK_M, BLOCK_N // GROUP, GROUP]) * scales[:, :, None], [BLOCK_M, BLOCK_N])
    return y


@triton.jit
def saturated(y, TOP: tl.constexpr):
    """y within the format: its cast would not saturate in every version. NaN stays NaN."""
    y = tl.where(y > 1.75 * (1 << TOP), 1.75 * (1 << TOP), y)
    return tl.where(y < -1.75 * (1 << TOP), -1.75 * (1 << TOP), y)

"""The kernels that quantize, compiled for sm_90 as compile_triton.py does it, which runs this."""

from compile_triton import compiled

from megaresnorm.kernels.add_norm.spec import FORMS
from megaresnorm.kernels.fp8 import triton_quantize
from megaresnorm.kernels.fp8.formats import E4M3, ROW, TENSOR, TOP


def types_of(kernel, in_codes=False):
    """BF16 x or codes, codes in E4M3, all else FP32."""
    types = dict.fromkeys(kernel.arg_names, "*fp32") | {"codes": "*fp8e4nv", "x": "*fp8e4nv" if in_codes else "*bf16"}
    return types | dict.fromkeys(("rows", "columns", "rows_per_program", "count"), "i32")


def quantized(columns, name, folded):
    """The kernel for a form, also with columns multiplied by a factor."""
    form, absent = FORMS[name], set() if folded else {"factor"}
    absent |= {"inverse"} if form == TENSOR else {"given", "own"}
    tile = triton_quantize.tile_of(columns, form)
    if tile is None:
        kernel, constants, warps = triton_quantize.quantize_wide_kernel, {"BLOCK_N": triton_quantize.WIDE}, 8
    else:
        kernel, warps = triton_quantize.quantize_kernel, tile.warps
        constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        constants["GROUP"] = triton_quantize.group_of(form, columns, tile.block_n)
    in_blocks = ", in blocks" if tile is None else ""
    name = f"quantize{in_blocks} {name} {columns}{', folded' if folded else ''}"
    return name, compiled(kernel, absent, types_of(kernel), constants | {"TOP": TOP[E4M3]}, warps)


def transposed(name, source):
    """The kernels that transpose values, or codes in a form."""
    form, absent = FORMS[name], {"scales"} if source is None else set()
    absent |= set() if form == ROW else {"given"}
    in_group = (FORMS[source].columns if source else None) or triton_quantize.WHOLE
    constants = {"IN_GROUP": in_group, "BLOCK_M": triton_quantize.TOKENS, "BLOCK_N": triton_quantize.FEATURES}
    kernel = triton_quantize.transpose_kernel
    types = types_of(kernel, source is not None)
    all_constants = constants | {"GROUP": form.columns or 0, "TOP": TOP[E4M3]}
    kind = f" of codes {source}" if source else ""
    warps = triton_quantize.warps_of(form)
    yield f"quantize transposed{kind} {name}", compiled(kernel, absent, types, all_constants, warps)
    if form == ROW:
        kernel = triton_quantize.columns_kernel
        types = types_of(kernel, source is not None)
        yield f"largest of columns{kind}", compiled(kernel, absent, types, constants | {"BLOCK_M": 32}, 4)


def everything(some):
    """All of them; with ``some`` one of each kind."""
    found = {}
    for columns in (4096,) if some else (1024, 4096, 8192, 16384, 22016):
        for name in ("block", "tensor") if some else FORMS:
            found |= dict([quantized(columns, name, folded=False)])
    found |= dict([quantized(4096, "row", folded=True), quantized(22016, "row", folded=True)])
    every = [(name, source) for name in ("row", "block", "mx") for source in (None, name)]
    for name, source in [("row", None), ("mx", "mx")] if some else every:
        found |= dict(transposed(name, source))
    kernel, constants = triton_quantize.amax_kernel, {"TOP": TOP[E4M3], "BLOCK": triton_quantize.AMAXES}
    found["largest of programs"] = compiled(kernel, set(), types_of(kernel), constants, 8)
    return found

"""Compiles the Triton kernels for sm_90 without a GPU and prints what their machine code uses, as JSON.

With --write it sets new ceilings for this version of Triton. Run by test_triton.py in a process of its own, in which
Triton does not interpret.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megaresnorm.kernels.add_norm import triton_fp8 as triton_fp8
from megaresnorm.kernels.add_norm import triton_rows as triton_rows
from megaresnorm.kernels.add_norm import triton_sharded, triton_wide
from megaresnorm.kernels.add_norm.triton_rows import _shape

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS_OF_FP32 = ("weight", "bias", "statistics", "sums", "sum_", "gate", "amax", "scale", "coefficients", "inverse")
KINDS = {"rmsnorm": 1, "layernorm": 2}


def compiled(kernel, absent, types, constants, warps):
    """Registers, spilled bytes and 128-bit accesses of a kernel.

    Args:
        types: of pointers and numbers by name; everything else is FP32.
    """
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants or name in absent:
            signature[name], values[name] = "constexpr", constants.get(name)
        else:
            signature[name] = types[name]
            specialized = not kernel.params[i].do_not_specialize
            if specialized and signature[name][0] in "*i":  # aligned to 16 bytes, or a multiple of 16
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "spilled_bytes": int(stack),
        "loads_128": len(re.findall(r"LDG\.E\.(?:\S*\.)?128", code)),
        "stores_128": len(re.findall(r"STG\.E\.(?:\S*\.)?128", code)),
    }


def types_of(kernel, fp8):
    """BF16 tensors with FP32 weights and statistics."""
    types = dict.fromkeys(kernel.arg_names, "*bf16")
    types |= {name: "*fp32" for name in kernel.arg_names if name.startswith("sum_") or name.endswith(POINTERS_OF_FP32)}
    types |= {
        "rows": "i32",
        "columns": "i32",
        "rows_per_program": "i32",
        "blocks": "i32",
        "whole_columns": "i32",
        "fp8": "*fp8e4nv",
    }
    types |= dict.fromkeys(("alpha", "eps", "branch_eps", "next_eps"), "fp32")
    types["scale"] = "*fp32" if "fp8" in kernel.arg_names else "fp32"
    return types | ({"branch": "*fp8e4nv"} if fp8 else {})


def add_norm(columns, kind, mode):
    """The kernels of a call: one norm, two (KEEL), a branch norm and one (sandwich), or one with FP8 and amax."""
    branch, two, fp8 = mode == "sandwich", mode == "keel", mode == "fp8"
    number = KINDS[kind]
    norms = {"BRANCH_NORM": number * branch, "NORM": number * two, "NEXT_NORM": number, "GATE": 0}
    absent = {"gate", "sum_gate"} | ({"bias", "branch_bias", "next_bias"} if number == 1 else set())
    absent |= {f"sum_{name}" for name in absent if name.endswith("bias")}
    absent |= set() if fp8 else {"amax", "fp8_scale"}
    absent |= set() if two else {"trunk", "weight", "bias", "statistics", "sum_weight", "sum_bias"}
    if not branch:
        absent |= {"branch_weight", "branch_bias", "branch_statistics", "sum_branch_weight", "sum_branch_bias"}
    name = f"{columns} {kind} {mode}"
    wide = columns > triton_rows.MAX_COLUMNS
    forward = (triton_wide if wide else triton_rows).forward_kernel
    shape = triton_rows.Shape(1, triton_rows.WIDE_BLOCK, 8) if wide else _shape(columns, 1)
    blocks = {"BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n}
    yield (
        f"forward {name}",
        compiled(forward, absent, types_of(forward, fp8), {**norms, "FP8": fp8, **blocks}, shape.warps),
    )
    if fp8:
        return  # its gradient is the other's
    absent |= set() if branch else {"delta", "d_delta"}
    if columns * (1 + two + branch) > triton_rows.MAX_COLUMNS:
        for what, blocks, warps in (("rows", (1, triton_rows.WIDE_BLOCK), 8), ("columns", (8, 128), 4)):
            kernel = getattr(triton_wide, f"{what}_kernel")
            constants = {**norms, "BLOCK_M": blocks[0], "BLOCK_N": blocks[1]}
            yield f"backward, {what} {name}", compiled(kernel, absent, types_of(kernel, False), constants, warps)
        return
    kernel = triton_rows.backward_kernel
    shape = _shape(columns, 1 + two + branch)
    blocks = {"BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n}
    yield f"backward {name}", compiled(kernel, absent, types_of(kernel, False), {**norms, **blocks}, shape.warps)


def sharded(columns, kind):
    """The kernels of a norm that is sharded over the hidden dimension."""
    shape = triton_sharded._shape(columns)
    warps = shape.pop("num_warps")
    for piece in ("stats", "apply", "grad_sums", "grad_apply"):
        kernel = getattr(triton_sharded, f"{piece}_kernel")
        constants = shape | ({"LAYERNORM": kind == "layernorm"} if "LAYERNORM" in kernel.arg_names else {})
        absent = {"bias"} if kind == "rmsnorm" else set()
        yield f"sharded {piece} {columns} {kind}", compiled(kernel, absent, types_of(kernel, False), constants, warps)
    if columns == 512:
        kernel = triton_sharded.grad_weights_kernel
        sizes = {"BLOCK_M": triton_sharded.WEIGHTS_M, "BLOCK_N": triton_sharded.WEIGHTS_N}
        yield "sharded grad_weights, columns", compiled(kernel, set(), types_of(kernel, False), sizes, 4)


def everything(some=False):
    """All kernels; with ``some`` as they are launched for 4096 columns, and for 16384, which have their own."""
    found = {}
    sizes = (4096, 16384) if some else (1024, 4096, 8192, 16384)
    for columns, kind, mode in product(sizes, KINDS, ("pre", "keel", "sandwich", "fp8")):
        if columns != 16384 or mode in ("pre", "keel"):
            found |= dict(add_norm(columns, kind, mode))
    kernel = triton_fp8.norm_quant_kernel
    for blocks in (False, True):
        absent = {"scale"} if blocks else {"inverse"}
        sizes = {"BLOCK_M": 2, "BLOCK_N": 1024}
        found[f"norm_quant {'blocks' if blocks else 'whole'}"] = compiled(
            kernel, absent, types_of(kernel, False), sizes, 4
        )
    for columns, kind in product((512, 4096) if some else (512, 4096, 8192), KINDS):
        found |= dict(sharded(columns, kind))
    return found


if __name__ == "__main__":
    usage = everything("--some" in sys.argv)
    print(json.dumps(usage, indent=1))
    if "--write" in sys.argv:
        file, version = Path(__file__).with_name("registers.json"), ".".join(triton.__version__.split(".")[:2])
        ceilings = json.loads(file.read_text()) | {version: {name: u["registers"] for name, u in usage.items()}}
        file.write_text(json.dumps(dict(sorted(ceilings.items())), indent=1) + "\n")

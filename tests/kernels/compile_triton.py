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

from megaresnorm.kernels.add_norm import triton_launch, triton_rows, triton_sharded, triton_wide, triton_wide_forward
from megaresnorm.kernels.add_norm.spec import FORMS
from megaresnorm.kernels.dropout import threshold_of
from megaresnorm.kernels.fp8.triton_quantize import group_of

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS_OF_FP32 = ("weight", "bias", "statistics", "sums", "sum_", "gate", "given", "own", "coefficients", "inverse")
KINDS = {"rmsnorm": 1, "layernorm": 2}
TILE = {what: rf"tt\.{what} [^\n]*? : tensor<([^\n]*?)> loc" for what in ("load", "store")}
WIDTHS = {"bf16": 2, "f8E4M3FN": 1}


def compiled(kernel, absent, types, constants, warps):
    """Registers, spilled bytes and 128-bit accesses of a kernel, and what it moves.

    ``loads_behind_a_barrier`` are loads in the machine code that wait until all threads have met at a sum over columns.
    ``loaded`` and ``stored`` are bytes an element of all tiles [m, n] that the program names, of which rows that are
    read a block of columns at a time have one for each time that they are read. ``wide_offsets`` is whether more than
    2^31 elements are reached. ``order_of_sums`` is which threads have which numbers of the tiles that are summed.

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
    loaded, stored = (sum(map(bytes_of, re.findall(TILE[what], made.asm["ttir"]))) for what in ("load", "store"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "registers": int(registers),
        "spilled_bytes": int(stack),
        "loads_128": len(re.findall(r"LDG\.E\.(?:\S*\.)?128", code)),
        "stores_128": len(re.findall(r"STG\.E\.(?:\S*\.)?128", code)),
        "loads_behind_a_barrier": loads_behind_a_barrier(code),
        "loaded": loaded,
        "stored": stored,
        "wide_offsets": has_wide_offsets(made.asm["ttir"]),
        "order_of_sums": order_of_sums(made.asm["ttgir"]),
    }


def has_wide_offsets(code):
    """Whether int64 numbers lead to every tile [m, n] of BF16 or FP8: those of its elements, or that of its row."""
    tiles = re.findall(r"tt\.addptr .*: tensor<\d+x\d+x!tt\.ptr<(?:bf16|f8\w+)>>, tensor<\d+x\d+x(i\d+)>", code)
    return set(tiles) <= {"i64"} or re.search(r"tt\.addptr .*: !tt\.ptr<bf16>, i64", code) is not None


def order_of_sums(code):
    """Layouts of the tiles of FP32 that are summed over columns, one after the other."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.MULTILINE))
    sums = re.findall(r'"tt\.reduce"\(.*?\) <{axis = 1 .*?arith\.addf.*?: \(tensor<[^,]*, (#\w+)>', code, re.DOTALL)
    return [layouts[name] for name in sums]


def loads_behind_a_barrier(code):
    """Loads behind the first barrier of the longest loop, or of all code where there is no loop."""
    lines = [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^/;]*);", code)]
    jumps = [(int(to[1], 16), at) for at, what in lines if (to := re.search(r"BRA.* 0x([0-9a-f]+)", what))]
    start, end = max(
        (jump for jump in jumps if jump[0] < jump[1]), key=lambda jump: jump[1] - jump[0], default=(0, 1e9)
    )
    loop = [what for at, what in lines if start <= at <= end]
    first = next((i for i, what in enumerate(loop) if "BAR." in what), len(loop))
    return sum("LDG." in what for what in loop[first:])


def bytes_of(tile):
    """Bytes an element of a tile [m, n] as Triton writes it, 8x256x!tt.ptr<bf16>.

    0 for numbers of rows or columns, which are FP32, also where they are a tile [1, n].
    """
    return WIDTHS.get(re.search(r"<(\w+)", tile)[1], 0) if re.match(r"\d+x\d+x!", tile) else 0


def types_of(kernel):
    """BF16 tensors with FP32 weights and statistics, and codes in E4M3."""
    types = dict.fromkeys(kernel.arg_names, "*bf16")
    types |= {name: "*fp32" for name in kernel.arg_names if name.startswith("sum_") or name.endswith(POINTERS_OF_FP32)}
    types |= {
        "rows": "i32",
        "columns": "i32",
        "rows_per_program": "i32",
        "whole_columns": "i32",
        "codes": "*fp8e4nv",
    }
    types |= {"first_column": "i64", "key": "*i64", "numbers": "*i64"}
    return types | dict.fromkeys(("alpha", "scale", "factor", "eps", "branch_eps", "next_eps"), "fp32")


def add_norm(columns, kind, mode):
    """The kernels of a call.

    One norm, also with dropout; two (KEEL); a branch norm and one (sandwich); one with each form of FP8.
    """
    branch, two, drops, form = mode == "sandwich", mode == "keel", mode == "dropout", mode.removeprefix("fp8 ")
    fp8 = form in FORMS
    number = KINDS[kind]
    norms = {"BRANCH_NORM": number * branch, "NORM": number * two, "NEXT_NORM": number, "GATE": 0}
    norms |= {"THRESHOLD": threshold_of(0.1) if drops else 0}
    absent = {"gate", "sum_gate"} | ({"bias", "branch_bias", "next_bias"} if number == 1 else set())
    absent |= {f"sum_{name}" for name in absent if name.endswith("bias")}
    absent |= {"branch"} if fp8 else {"codes", "inverse"}
    absent |= {"inverse"} if form == "tensor" else {"given", "own"}
    absent |= set() if drops else {"key", "numbers"}
    absent |= set() if two else {"trunk", "weight", "bias", "statistics", "sum_weight", "sum_bias"}
    if not branch:
        absent |= {"branch_weight", "branch_bias", "branch_statistics", "sum_branch_weight", "sum_branch_bias"}
    name = f"{mode} {columns} {kind}"

    def of(kernel, without, shape, **constants):
        constants |= {"BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n}
        return compiled(kernel, without, types_of(kernel), {**norms, **constants}, shape.warps)

    shape = triton_launch.forward_shape(columns, 1 + two + branch, drops)
    kernel = (triton_wide_forward if shape is None else triton_rows).forward_kernel
    wide, shape = ", in blocks" if shape is None else "", shape or triton_launch.WIDE
    group = group_of(FORMS[form], columns, shape.block_n) if fp8 else 0
    yield f"forward{wide} {name}", of(kernel, absent, shape, GROUP=group)
    if fp8:
        return  # its gradient is the other's
    absent |= set() if branch or drops else {"d_delta"}
    absent |= set() if branch else {"delta"}
    shape = triton_launch.backward_shape(columns, 1 + two + branch, drops)
    if shape is not None:
        yield f"backward {name}", of(triton_rows.backward_kernel, absent | {"coefficients"}, shape)
        return
    sums = {argument for argument in triton_rows.backward_kernel.arg_names if argument.startswith("sum_")}
    shape = triton_launch.shape_without_sums(columns)
    if shape is None:
        yield f"backward, in blocks {name}", of(triton_wide.rows_kernel, absent, triton_launch.WIDE_BACKWARD)
    else:
        yield f"backward without sums {name}", of(triton_rows.backward_kernel, absent | sums, shape)
    yield f"backward, columns {name}", of(triton_wide.columns_kernel, absent, triton_launch.COLUMNS)


def sharded(columns, kind):
    """The kernels of a norm that is sharded over the hidden dimension."""
    shape = triton_sharded._shape(columns)
    warps = shape.pop("num_warps")
    for piece in ("stats", "apply", "grad_sums", "grad_apply"):
        kernel = getattr(triton_sharded, f"{piece}_kernel")
        constants = shape | ({"LAYERNORM": kind == "layernorm"} if "LAYERNORM" in kernel.arg_names else {})
        absent = {"bias"} if kind == "rmsnorm" else set()
        yield f"sharded {piece} {columns} {kind}", compiled(kernel, absent, types_of(kernel), constants, warps)
    if columns == 512:
        kernel = triton_sharded.grad_weights_kernel
        sizes = {"BLOCK_M": triton_sharded.WEIGHTS_M, "BLOCK_N": triton_sharded.WEIGHTS_N}
        yield "sharded grad_weights, columns", compiled(kernel, set(), types_of(kernel), sizes, 4)


def gathered(columns, kind):
    """The norm of whole rows whose columns have been gathered, and its gradient as it is sent."""
    absent, warps = {"bias"} if kind == "rmsnorm" else set(), triton_sharded._whole_warps(columns)
    types = dict.fromkeys(("block_columns", "block_pitch", "packed_columns"), "i32")
    for name, constants in (
        ("normalize_blocks", {"KIND": KINDS[kind]}),
        ("pack_gradient", {"LAYERNORM": kind == "layernorm", "RANKS": 4}),
    ):
        kernel = getattr(triton_sharded, f"{name}_kernel")
        yield (
            f"{name} {columns} {kind}",
            compiled(kernel, absent, types_of(kernel) | types, {**constants, "BLOCK_N": columns}, warps),
        )


def everything(some=False):
    """All kernels; with ``some`` as they are launched for 4096 columns, and those that only wider rows have."""
    found = {}
    sizes = (4096,) if some else (1024, 2048, 4096, 8192, 16384, 32768)
    modes = ("pre", "keel", "sandwich", "dropout", *(f"fp8 {form}" for form in FORMS))
    for columns, kind, mode in product(sizes, KINDS, modes):
        if mode.startswith("fp8"):
            wanted = columns != 16384 and not (some and kind == "layernorm")
        else:
            wanted = columns <= 8192 or mode in ("pre", "keel")
        if wanted:
            found |= dict(add_norm(columns, kind, mode))
    for columns in (8192, 32768) if some else ():
        found |= dict(add_norm(columns, "layernorm", "keel"))
    kernel, shape = triton_rows.sum_kernel, triton_launch.SUMS_TILE
    sizes = {"USED": 16, "BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n}
    types = types_of(kernel) | {"partial": "*fp32", "programs": "i32"}
    found["sums of programs"] = compiled(kernel, set(), types, sizes, shape.warps)
    for columns, kind in product((512, 4096) if some else (512, 4096, 8192), KINDS):
        found |= dict(sharded(columns, kind))
    for kind in KINDS:
        found |= dict(gathered(4096, kind))
    return found


if __name__ == "__main__":
    import compile_fp8  # which use what is above
    import compile_ops

    some = "--some" in sys.argv
    usage = everything(some) | compile_fp8.everything(some) | compile_ops.everything(some)
    print(json.dumps(usage, indent=1))
    if "--write" in sys.argv:
        file, version = Path(__file__).with_name("registers.json"), ".".join(triton.__version__.split(".")[:2])
        ceilings = json.loads(file.read_text()) | {version: {name: u["registers"] for name, u in usage.items()}}
        file.write_text(json.dumps(dict(sorted(ceilings.items())), indent=1) + "\n")

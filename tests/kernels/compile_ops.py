"""Compiles the kernels of activation and rotary for sm_90 without a GPU and prints what their machine code uses.

Run by test_gpu_ops.py in a process of its own, in which Triton does not interpret.
"""

import json
import re
import sys
from itertools import product

import compile_triton
import triton

from megaresnorm.kernels.gpu import activation, rotary

compile_ = triton.compile
NUMBERS = ("rows", "columns", "tokens", "seq")


def compiled(*arguments):
    """As compile_triton's, with ``wide_offsets``: whether those of all tiles of rows and columns are int64."""
    made = []
    compile_triton.triton.compile = lambda *a, **options: made.append(compile_(*a, **options)) or made[0]
    usage = compile_triton.compiled(*arguments)
    tiles = re.findall(r"tt\.addptr .*: tensor<(\d+)x(\d+)x!tt\.ptr<\w+>>, tensor<\d+x\d+x(i\d+)>", made[0].asm["ttir"])
    types = [number for rows, columns, number in tiles if int(rows) > 1 and int(columns) > 1]
    return usage | {"wide_offsets": len(types) > 1 and set(types) == {"i64"}}


def types_of(kernel, wide):
    """BF16 tensors; FP32 for the others, which are named."""
    types = dict.fromkeys(kernel.arg_names, "*bf16")
    return types | dict.fromkeys(wide, "*fp32") | dict.fromkeys(NUMBERS, "i32") | {"eps": "fp32"}


def activations(some):
    for kind in ("gelu", "swiglu") if some else ("gelu", "gelu_tanh", "relu", "swiglu", "geglu", "geglu_tanh"):
        for bias in (False, True):
            absent = set() if bias else {"bias", "partial"}
            constants = {
                "CURVE": activation.CURVES[kind], "GATE": kind in activation.GATED,
                "BLOCK_M": activation.BLOCK_M, "BLOCK_N": activation.BLOCK_N,
            }  # fmt: skip
            name = f"{kind}{', bias' if bias else ''}"
            types = types_of(activation.forward_kernel, ("bias",))
            yield f"forward {name}", compiled(activation.forward_kernel, absent, types, constants, 4)
            constants["TILES"] = activation.TILES if bias else 1
            types = types_of(activation.backward_kernel, ("bias", "partial"))
            yield f"backward {name}", compiled(activation.backward_kernel, absent, types, constants, 4)


def rotaries(some):
    for width, norm in ((128, "none"), (64, "layernorm")) if some else product((64, 80, 128, 256), rotary.NORMS):
        constants = {"HEADS": 32, "KV_HEADS": 8, "HALF": width // 2, "NORM": rotary.NORMS[norm], "EACH": False}
        constants["GROUP"] = rotary.GROUP
        absent = set() if norm == "layernorm" else {"q_bias", "k_bias"}
        absent |= {"q_weight", "k_weight", "partial", "qkv"} if norm == "none" else set()
        wide = ("cos", "sin", "q_weight", "q_bias", "k_weight", "k_bias", "partial")
        constants["BLOCK_T"], constants["BLOCK_H"] = rotary._shape(width, 2048)
        kernel = rotary.forward_kernel
        used = compiled(kernel, absent - {"qkv"}, types_of(kernel, wide), constants, 4)
        yield f"rotary forward {width} {norm}", used
        constants["BIASED"] = norm == "layernorm"
        constants["BLOCK_T"], constants["BLOCK_H"] = rotary._shape(width, 2048 if norm == "none" else 1024)
        kernel = rotary.backward_kernel
        yield f"rotary backward {width} {norm}", compiled(kernel, absent, types_of(kernel, wide), constants, 4)


if __name__ == "__main__":
    some = "--some" in sys.argv
    print(json.dumps({**dict(activations(some)), **dict(rotaries(some))}, indent=1))

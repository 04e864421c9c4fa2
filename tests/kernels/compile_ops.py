"""The kernels of activation, rotary and the loss, compiled for sm_90 as compile_triton.py does it, which runs this."""

from itertools import product

from compile_triton import compiled

from megaresnorm.kernels.gpu import activation, cross_entropy, rotary

NUMBERS = ("rows", "columns", "tokens", "seq", "width", "pitch")


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
        yield f"rotary forward {width} {norm}", of_q_and_k(used)
        constants["BIASED"] = norm == "layernorm"
        constants["BLOCK_T"], constants["BLOCK_H"] = rotary._shape(width, 2048 if norm == "none" else 1024)
        kernel = rotary.backward_kernel
        used = compiled(kernel, absent, types_of(kernel, wide), constants, 4)
        yield f"rotary backward {width} {norm}", of_q_and_k(used)


def of_q_and_k(used):
    """Bytes an element of q and k: the code has tiles of both halves of a head, and another two for a copy of v."""
    return used | {what: used[what] // 2 - 2 for what in ("loaded", "stored")}


def losses():
    numbers = {"scale": "fp32", "softcap": "fp32", "labels": "*i64", "sums": "*fp32", "coefficients": "*fp32"}
    for capped in (False, True):
        constants = {"CAPPED": capped, "BLOCK_M": cross_entropy.GROUPS, "GROUP": cross_entropy.GROUP}
        for name in ("statistics", "gradient"):
            kernel = getattr(cross_entropy, f"{name}_kernel")
            constants |= {"LEAST": cross_entropy.LEAST} if name == "statistics" else {}
            constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
            types = types_of(kernel, ()) | {key: value for key, value in numbers.items() if key in kernel.arg_names}
            yield (
                f"loss {name}{', capped' if capped else ''}",
                compiled(kernel, set(), types, constants, cross_entropy.WARPS),
            )


def everything(some):
    """All of them; with ``some`` one of each kind."""
    return {**dict(activations(some)), **dict(rotaries(some)), **dict(losses())}

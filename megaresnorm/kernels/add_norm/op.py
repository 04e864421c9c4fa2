"""``add_norm`` as one operator, whatever fused backend computes it.

What is kept for the backward pass is the stored sum (which is the residual stream, and alive anyway) and two numbers a row and
norm.

T rows (tokens)   D columns (model dim)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import AddNormOut, NormWeights
from megaresnorm.kernels.add_norm.spec import (
    FP8,
    SUMS,
    AddNormBackend,
    Call,
    GradientCall,
    Inputs,
    Outputs,
    Saved,
    _one_call,
    _one_gradient_call,
    backend_named,
    make_call,
    make_gradient_call,
)
from megaresnorm.kernels.custom_op import FLOATS, Operator
from megaresnorm.kernels.registry import Refusal, register_kernel


def fused_add_norm(backend: str) -> Callable[..., AddNormOut]:
    """``reference.add_norm`` by a fused backend, for FP32 and BF16 tensors."""

    def add_norm(
        x_TD: Tensor,
        delta_TD: Tensor | None = None,
        *,
        alpha: float = 1.0,
        gate: float | Tensor = 1.0,
        branch_norm: NormWeights | None = None,
        norm: NormWeights | None = None,
        next_norm: NormWeights | None = None,
        residual_dtype: torch.dtype,
        out_dtype: torch.dtype | None,
        fp8_scale: Tensor | None = None,
    ) -> AddNormOut:
        if delta_TD is None:
            alpha, gate, branch_norm = 1.0, 1.0, None
            if norm is None and next_norm is None and out_dtype != FP8:  # nothing to fuse
                trunk = x_TD.to(residual_dtype)
                return AddNormOut(trunk, None if out_dtype is None else trunk.to(out_dtype), None, None)
        learned: Tensor | None = None
        scale = 1.0
        if isinstance(gate, float):
            scale = gate
        else:
            learned = gate.float().contiguous()
        kind_0, weight_0, bias_0, eps_0 = _NO_NORM if branch_norm is None else branch_norm
        kind_1, weight_1, bias_1, eps_1 = _NO_NORM if norm is None else norm
        kind_2, weight_2, bias_2, eps_2 = _NO_NORM if next_norm is None else next_norm
        make = Call if torch.compiler.is_compiling() else _one_call
        call = make(
            (kind_0, kind_1, kind_2), (eps_0, eps_1, eps_2), alpha, scale, residual_dtype, out_dtype, backend
        )  # fmt: skip
        tensors = _add_norm(
            x_TD, delta_TD, learned, fp8_scale, weight_0, bias_0, weight_1, bias_1, weight_2, bias_2, call
        )  # fmt: skip
        outputs = _unflatten(tensors, call, call.stores_sum(x_TD, delta_TD))
        stored = x_TD if outputs.z is None else outputs.z
        trunk = stored if outputs.trunk is None else outputs.trunk
        branch = None if out_dtype is None else trunk if outputs.branch is None else outputs.branch
        return AddNormOut(
            trunk, branch, outputs.next_statistics, None if outputs.amax is None else largest(outputs.amax)
        )

    return add_norm


def register_add_norm(
    name: str, backend: AddNormBackend, requires: Refusal, avoid: Refusal = lambda device, dtype: None
) -> None:
    """Enter a fused backend under ``name``: the op and its norm over a sharded hidden dimension are one choice."""
    register_kernel("add_norm", name, requires, avoid, implementation=backend)(fused_add_norm(name))


_NO_NORM = ("none", None, None, 0.0)


def largest(amax_T: Tensor) -> Tensor:
    """Over all rows; 0 of none."""
    return amax_T.amax() if amax_T.numel() else amax_T.new_zeros(())


def _unflatten(tensors: Sequence, call: Call, stores_sum: bool) -> Outputs:
    """Name what the operator returns: only what there is, in the order of ``Outputs``."""
    rest = iter(tensors)
    return Outputs(
        next(rest) if stores_sum else None,
        next(rest) if call.norm else None,
        next(rest) if call.writes_branch else None,
        next(rest) if call.branch_norm else None,
        next(rest) if call.norm else None,
        next(rest) if call.next_norm else None,
        next(rest) if call.wants_amax else None,
    )


def _allocate(x: Tensor, delta: Tensor | None, call: Call) -> Outputs:
    empty, rows = functools.partial(torch.empty_like, memory_format=torch.contiguous_format), x.shape[0]
    return Outputs(
        empty(x, dtype=call.residual_dtype) if call.stores_sum(x, delta) else None,
        empty(x, dtype=call.residual_dtype) if call.norm else None,
        empty(x, dtype=call.out_dtype) if call.writes_branch else None,
        x.new_empty((rows, 2), dtype=torch.float32) if call.branch_norm else None,
        x.new_empty((rows, 2), dtype=torch.float32) if call.norm else None,
        x.new_empty((rows, 2), dtype=torch.float32) if call.next_norm else None,
        x.new_empty((rows,), dtype=torch.float32) if call.wants_amax else None,
    )


def _forward(
    x: Tensor, delta: Tensor | None, gate: Tensor | None, fp8_scale: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    *weights, call = rest
    _check(x, delta, gate, fp8_scale, weights, call)
    inputs = Inputs(x.contiguous(), None if delta is None else delta.contiguous(), gate, fp8_scale, weights)
    outputs = _allocate(inputs.x, delta, call)
    backend_named(call.backend).forward(inputs, call, outputs)
    return tuple([t for t in outputs if t is not None])


def _check(
    x: Tensor,
    delta: Tensor | None,
    gate: Tensor | None,
    fp8_scale: Tensor | None,
    weights: Sequence[Tensor | None],
    call: Call,
) -> None:
    if x.dtype not in FLOATS or (delta is not None and delta.dtype not in FLOATS):
        dtypes = [str(t.dtype) for t in (x, delta) if t is not None]
        raise TypeError(
            f"add_norm/{call.backend}: {' and '.join(dtypes)}; wanted float32 or bfloat16, or the reference backend"
        )
    if x.dim() != 2 or (delta is not None and delta.shape != x.shape):
        shapes = [list(t.shape) for t in (x, delta) if t is not None]
        raise ValueError(f"add_norm/{call.backend}: x and delta have shapes {shapes}; wanted two equal [rows, columns]")
    for weight in weights:
        if weight is not None and (
            weight.dtype != torch.float32 or weight.shape != x.shape[1:] or not weight.is_contiguous()
        ):
            raise TypeError(
                f"add_norm/{call.backend}: a norm's weight is {weight.dtype} {list(weight.shape)}; wanted float32 [{x.shape[1]}]"
            )
    if gate is not None and gate.shape not in ((1,), x.shape[1:]):
        raise ValueError(
            f"add_norm/{call.backend}: the gate has shape {list(gate.shape)}; wanted [1] or [{x.shape[1]}]"
        )
    if call.residual_dtype not in FLOATS or call.out_dtype not in (*FLOATS, FP8, None):
        raise TypeError(
            f"add_norm/{call.backend}: cannot write {call.residual_dtype} and {call.out_dtype}; take the reference"
        )
    if call.out_dtype == FP8 and (fp8_scale is None or fp8_scale.numel() != 1 or fp8_scale.dtype != torch.float32):
        raise ValueError(f"add_norm/{call.backend}: out_dtype={FP8} needs fp8_scale, one number in float32")


def _fake(x: Tensor, delta: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return tuple([t for t in _allocate(x, delta, rest[-1]) if t is not None])


def _save(ctx: Any, arguments: tuple, results: tuple[Tensor, ...]) -> None:
    x, delta, gate, _, *weights, call = arguments
    stores_sum = call.stores_sum(x, delta)
    z, trunk, _, *statistics, amax = _unflatten(results, call, stores_sum)
    ctx.mark_non_differentiable(*[t for t in (*statistics, amax) if t is not None])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if z is None else z,
        trunk if call.next_norm else None,
        delta if gate is not None or call.branch_norm else None,
        gate,
        *weights,
        *statistics,
    )
    ctx.call, ctx.stores_sum = call, stores_sum
    ctx.gradient_call = _one_gradient_call(call, x.dtype, None if delta is None else delta.dtype)


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple:
    z, *saved = ctx.saved_tensors
    d_z, d_trunk, d_branch = _unflatten(gradients, ctx.call, ctx.stores_sum)[:3]
    # With a norm on the sum nobody outside sees the sum itself.
    d_trunk = d_trunk if ctx.call.norm else d_z
    dx, *d_delta, sums = _add_norm_backward(z, d_trunk, d_branch, *saved, ctx.gradient_call)
    gate, weights = saved[2], saved[3:9]
    d_gate = None if gate is None else sums[6] if gate.numel() > 1 else sums[6].sum().view(1)
    d_weights = [None if w is None else sums[i] for i, w in enumerate(weights)]
    delta_dtype = ctx.gradient_call.delta_dtype
    return dx, None if delta_dtype is None else d_delta[0] if d_delta else dx, d_gate, None, *d_weights


def _allocate_gradients(z: Tensor, gate: Tensor | None, call: GradientCall) -> tuple[Tensor, Tensor | None]:
    """dx and d_delta; None for d_delta where it is the very tensor of dx."""
    own = call.delta_dtype is not None and not (call.shared and gate is None)
    empty = functools.partial(torch.empty_like, z, memory_format=torch.contiguous_format)
    return empty(dtype=call.x_dtype), empty(dtype=call.delta_dtype) if own else None


def _backward(
    z: Tensor, d_trunk: Tensor | None, d_branch: Tensor | None, trunk: Tensor | None, delta: Tensor | None, gate: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *saved, call = rest
    z = z.contiguous()
    dx, d_delta = _allocate_gradients(z, gate, call)
    sums = backend_named(call.call.backend).backward(
        None if d_trunk is None else _readable(d_trunk),
        None if d_branch is None else _readable(d_branch),
        Saved(z, trunk, None if delta is None else delta.contiguous(), gate, saved[:6], saved[6:]),
        call.call,
        dx,
        d_delta,
    )
    return (dx, sums) if d_delta is None else (dx, d_delta, sums)


def _readable(gradient: Tensor) -> Tensor:
    return gradient.contiguous() if gradient.dtype in FLOATS else gradient.float()


def _fake_backward(
    z: Tensor, d_trunk: Tensor | None, d_branch: Tensor | None, trunk: Tensor | None, delta: Tensor | None, gate: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    sums = z.new_empty((SUMS, z.shape[1]), dtype=torch.float32)
    return *(t for t in _allocate_gradients(z, gate, rest[-1]) if t is not None), sums


_PLACES = ("branch", "sum", "next")


_WEIGHTS = ", ".join(f"Tensor? {place}_weight, Tensor? {place}_bias" for place in _PLACES)


_STATISTICS = ", ".join(f"Tensor? {place}_statistics" for place in _PLACES)


_CALL = (
    "str[] kinds, float[] eps, float alpha, float scale, ScalarType residual_dtype, ScalarType? out_dtype, str backend"
)


_add_norm = Operator(
    f"add_norm(Tensor x, Tensor? delta, Tensor? gate, Tensor? fp8_scale, {_WEIGHTS}, {_CALL}) -> Tensor[]",
    10,
    make_call,
    _forward,
    _fake,
    _save,
    _differentiate,
)


_add_norm_backward = Operator(
    "add_norm_backward(Tensor z, Tensor? d_trunk, Tensor? d_branch, Tensor? trunk, Tensor? delta, Tensor? gate, "
    f"{_WEIGHTS}, {_STATISTICS}, {_CALL}, ScalarType x_dtype, ScalarType? delta_dtype) -> Tensor[]",
    15,
    make_gradient_call,
    _backward,
    _fake_backward,
)

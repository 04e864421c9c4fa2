"""``add_norm`` as one operator, whatever fused backend computes it.

The backward pass keeps the stored sum (which is the residual stream, and alive anyway) and two numbers a row and norm.

T rows (tokens)   D columns (model dim)
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormKernel, AddNormOutput, with_fp8
from megaresnorm.kernels.add_norm.spec import (
    FP8,
    SUMS,
    AddNormBackend,
    AddNormGradSpec,
    AddNormSpec,
    Inputs,
    Outputs,
    Saved,
    _one_grad_spec,
    _one_spec,
    backend_named,
    make_grad_spec,
    make_spec,
)
from megaresnorm.kernels.custom_op import FLOATS, CustomOp
from megaresnorm.kernels.registry import Refusal, register_kernel


def fused_add_norm(backend: str) -> AddNormKernel:
    """``reference.add_norm`` computed by the fused backend of that name, in FP32, BF16 and (not in C) FP16."""

    def add_norm(args: AddNormArgs) -> AddNormOutput:
        if args.fp8 is not None:
            return with_fp8(add_norm, args)
        if args.dropout is not None and (args.delta is None or not backend_named(backend).drops):
            args = _dropped(args, add_norm)
        x, delta, gate, out_dtype = args.x, args.delta, args.gate, args.out_dtype
        alpha, branch_norm = args.alpha, args.branch_norm
        probability, key, rows, first_column = _NO_DROPOUT if args.dropout is None else args.dropout
        if delta is None:
            alpha, gate, branch_norm = 1.0, 1.0, None
            if args.norm is None and args.next_norm is None and out_dtype != FP8:  # nothing to fuse
                trunk = x.to(args.residual_dtype)
                read = None if out_dtype is None else trunk.to(out_dtype)
                return AddNormOutput(trunk, read, None, None, trunk.detach())
        learned: Tensor | None = None
        constant_gate = 1.0
        if isinstance(gate, float):
            constant_gate = gate
        else:
            learned = gate.float().contiguous()
        kind_0, weight_0, bias_0, eps_0 = _NO_NORM if branch_norm is None else branch_norm
        kind_1, weight_1, bias_1, eps_1 = _NO_NORM if args.norm is None else args.norm
        kind_2, weight_2, bias_2, eps_2 = _NO_NORM if args.next_norm is None else args.next_norm
        make = AddNormSpec if torch.compiler.is_compiling() else _one_spec
        spec = make(
            (kind_0, kind_1, kind_2), (eps_0, eps_1, eps_2), alpha, constant_gate, args.residual_dtype, out_dtype,
            backend, probability, first_column,
        )  # fmt: skip
        tensors = _add_norm(
            x, delta, learned, args.fp8_scale, key, rows, weight_0, bias_0, weight_1, bias_1, weight_2, bias_2, spec
        )  # fmt: skip
        outputs = _unflatten(tensors, spec, spec.stores_sum(x, delta))
        stored = x if outputs.z is None else outputs.z
        trunk = stored if outputs.trunk is None else outputs.trunk
        branch = None if out_dtype is None else trunk if outputs.branch is None else outputs.branch
        return AddNormOutput(
            trunk,
            branch,
            outputs.next_statistics,
            None if outputs.amax is None else largest_of_rows(outputs.amax),
            stored.detach(),
        )

    return add_norm


def _dropped(args: AddNormArgs, add_norm: AddNormKernel) -> AddNormArgs:
    """The same call with a branch that is normalized and dropped already, for backends without dropout."""
    delta, norm, drop = args.delta, args.branch_norm, args.dropout
    if delta is not None and drop is not None:
        wide = torch.promote_types(delta.dtype, torch.float32)
        if norm is None:
            delta = delta.to(wide)
        else:
            delta = add_norm(AddNormArgs(delta, norm=norm, residual_dtype=wide, out_dtype=None)).trunk
        delta = drop(delta)
    return replace(args, delta=delta, branch_norm=None, dropout=None)


def register_add_norm(
    name: str, backend: AddNormBackend, requires: Refusal, avoid: Refusal = lambda device, dtype: None
) -> None:
    """Register a fused backend: the op and its norm over a sharded hidden dimension are one choice."""
    register_kernel("add_norm", name, requires, avoid, implementation=backend)(fused_add_norm(name))


_NO_NORM = ("none", None, None, 0.0)
_NO_DROPOUT = (0.0, None, None, 0)


def largest_of_rows(amax_T: Tensor) -> Tensor:
    """The largest amax over all rows; 0 without rows."""
    return amax_T.amax() if amax_T.numel() else amax_T.new_zeros(())


def _unflatten(tensors: Sequence, spec: AddNormSpec, stores_sum: bool) -> Outputs:
    """Name the operator's results, which are those of ``Outputs`` that exist, in its order."""
    rest = iter(tensors)
    return Outputs(
        next(rest) if stores_sum else None,
        next(rest) if spec.norm else None,
        next(rest) if spec.writes_branch else None,
        next(rest) if spec.branch_norm else None,
        next(rest) if spec.norm else None,
        next(rest) if spec.next_norm else None,
        next(rest) if spec.wants_amax else None,
    )


def _allocate(x: Tensor, delta: Tensor | None, spec: AddNormSpec) -> Outputs:
    empty, rows = functools.partial(torch.empty_like, memory_format=torch.contiguous_format), x.shape[0]
    return Outputs(
        empty(x, dtype=spec.residual_dtype) if spec.stores_sum(x, delta) else None,
        empty(x, dtype=spec.residual_dtype) if spec.norm else None,
        empty(x, dtype=spec.out_dtype) if spec.writes_branch else None,
        x.new_empty((rows, 2), dtype=torch.float32) if spec.branch_norm else None,
        x.new_empty((rows, 2), dtype=torch.float32) if spec.norm else None,
        x.new_empty((rows, 2), dtype=torch.float32) if spec.next_norm else None,
        x.new_empty((rows,), dtype=torch.float32) if spec.wants_amax else None,
    )


def _forward(
    x: Tensor, delta: Tensor | None, gate: Tensor | None, fp8_scale: Tensor | None, key: Tensor | None,
    rows: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *weights, spec = rest
    _check(x, delta, gate, fp8_scale, weights, spec)
    if spec.probability:
        _check_dropout(x, delta, key, rows, spec)
    delta = None if delta is None else delta.contiguous()
    inputs = Inputs(x.contiguous(), delta, gate, fp8_scale, key, rows, weights)
    outputs = _allocate(inputs.x, delta, spec)
    backend_named(spec.backend).forward(inputs, spec, outputs)
    return tuple([t for t in outputs if t is not None])


def _check(
    x: Tensor,
    delta: Tensor | None,
    gate: Tensor | None,
    fp8_scale: Tensor | None,
    weights: Sequence[Tensor | None],
    spec: AddNormSpec,
) -> None:
    if x.dtype not in FLOATS or (delta is not None and delta.dtype not in FLOATS):
        dtypes = [str(t.dtype) for t in (x, delta) if t is not None]
        raise TypeError(
            f"add_norm/{spec.backend}: {' and '.join(dtypes)}; wanted float32, bfloat16 or float16, or the reference"
        )
    if x.dim() != 2 or (delta is not None and delta.shape != x.shape):
        shapes = [list(t.shape) for t in (x, delta) if t is not None]
        raise ValueError(f"add_norm/{spec.backend}: x and delta have shapes {shapes}; wanted two equal [rows, columns]")
    for weight in weights:
        if weight is not None and (
            weight.dtype != torch.float32 or weight.shape != x.shape[1:] or not weight.is_contiguous()
        ):
            raise TypeError(
                f"add_norm/{spec.backend}: a norm's weight is {weight.dtype} {list(weight.shape)}; "
                f"wanted float32 [{x.shape[1]}]"
            )
    if gate is not None and gate.shape not in ((1,), x.shape[1:]):
        raise ValueError(
            f"add_norm/{spec.backend}: the gate has shape {list(gate.shape)}; wanted [1] or [{x.shape[1]}]"
        )
    if spec.residual_dtype not in FLOATS or spec.out_dtype not in (*FLOATS, FP8, None):
        raise TypeError(
            f"add_norm/{spec.backend}: cannot write {spec.residual_dtype} and {spec.out_dtype}; take the reference"
        )
    if spec.out_dtype == FP8 and (fp8_scale is None or fp8_scale.numel() != 1 or fp8_scale.dtype != torch.float32):
        raise ValueError(f"add_norm/{spec.backend}: out_dtype={FP8} needs fp8_scale, one number in float32")


def _check_dropout(x: Tensor, delta: Tensor | None, key: Tensor | None, rows: Tensor | None, spec: AddNormSpec) -> None:
    there = delta is not None and key is not None and rows is not None
    if not there or key.numel() != 1 or rows.shape != x.shape[:1] or not rows.is_contiguous():  # type: ignore
        raise ValueError(
            f"add_norm/{spec.backend}: dropout needs a branch, a key of one number and {x.shape[0]} numbers of rows"
        )
    if key.dtype != torch.int64 or rows.dtype != torch.int64:  # type: ignore[union-attr]
        raise TypeError(f"add_norm/{spec.backend}: key and numbers of rows of dropout are to be int64")


def _fake(x: Tensor, delta: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return tuple([t for t in _allocate(x, delta, rest[-1]) if t is not None])


def _save(ctx: Any, arguments: tuple, results: tuple[Tensor, ...]) -> None:
    x, delta, gate, _, key, rows, *weights, spec = arguments
    stores_sum = spec.stores_sum(x, delta)
    z, trunk, _, *statistics, amax = _unflatten(results, spec, stores_sum)
    ctx.mark_non_differentiable(*[t for t in (*statistics, amax) if t is not None])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if z is None else z,
        trunk if spec.next_norm else None,
        delta if gate is not None or spec.branch_norm else None,
        gate,
        key,
        rows,
        *weights,
        *statistics,
    )
    ctx.spec, ctx.stores_sum = spec, stores_sum
    ctx.grad_spec = _one_grad_spec(spec, x.dtype, None if delta is None else delta.dtype)


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple:
    z, *saved = ctx.saved_tensors
    d_z, d_trunk, d_branch = _unflatten(gradients, ctx.spec, ctx.stores_sum)[:3]
    # With a norm on the sum, the sum itself is no output and has no gradient.
    d_trunk = d_trunk if ctx.spec.norm else d_z
    dx, *d_delta, sums = _add_norm_backward(z, d_trunk, d_branch, *saved, ctx.grad_spec)
    gate, weights = saved[2], saved[5:11]
    d_gate = None if gate is None else sums[6] if gate.numel() > 1 else sums[6].sum().view(1)
    d_weights = [None if w is None else sums[i] for i, w in enumerate(weights)]
    delta_dtype = ctx.grad_spec.delta_dtype
    return dx, None if delta_dtype is None else d_delta[0] if d_delta else dx, d_gate, None, None, None, *d_weights


def _allocate_gradients(z: Tensor, gate: Tensor | None, spec: AddNormGradSpec) -> tuple[Tensor, Tensor | None]:
    """dx and d_delta; d_delta is None where it is the very tensor of dx, or nothing was added."""
    own = spec.delta_dtype is not None and not (spec.shared and gate is None)
    empty = functools.partial(torch.empty_like, z, memory_format=torch.contiguous_format)
    return empty(dtype=spec.x_dtype), empty(dtype=spec.delta_dtype) if own else None


def _backward(
    z: Tensor, d_trunk: Tensor | None, d_branch: Tensor | None, trunk: Tensor | None, delta: Tensor | None,
    gate: Tensor | None, key: Tensor | None, rows: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *saved, spec = rest
    z = z.contiguous()
    dx, d_delta = _allocate_gradients(z, gate, spec)
    sums = backend_named(spec.forward.backend).backward(
        None if d_trunk is None else _readable(d_trunk),
        None if d_branch is None else _readable(d_branch),
        Saved(z, trunk, None if delta is None else delta.contiguous(), gate, key, rows, saved[:6], saved[6:]),
        spec.forward,
        dx,
        d_delta,
    )
    return (dx, sums) if d_delta is None else (dx, d_delta, sums)


def _readable(gradient: Tensor) -> Tensor:
    return gradient.contiguous() if gradient.dtype in FLOATS else gradient.float()


def _fake_backward(
    z: Tensor, d_trunk: Tensor | None, d_branch: Tensor | None, trunk: Tensor | None, delta: Tensor | None,
    gate: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    sums = z.new_empty((SUMS, z.shape[1]), dtype=torch.float32)
    return *(t for t in _allocate_gradients(z, gate, rest[-1]) if t is not None), sums


_PLACES = ("branch", "sum", "next")


_WEIGHTS = ", ".join(f"Tensor? {place}_weight, Tensor? {place}_bias" for place in _PLACES)


_STATISTICS = ", ".join(f"Tensor? {place}_statistics" for place in _PLACES)


_SPEC = (
    "str[] kinds, float[] eps, float alpha, float scale, ScalarType residual_dtype, ScalarType? out_dtype, "
    "str backend, float probability, int first_column"
)


_add_norm = CustomOp(
    f"add_norm(Tensor x, Tensor? delta, Tensor? gate, Tensor? fp8_scale, Tensor? key, Tensor? rows, "
    f"{_WEIGHTS}, {_SPEC}) -> Tensor[]",
    12,
    make_spec,
    _forward,
    _fake,
    _save,
    _differentiate,
    is_triton=lambda spec: spec.backend == "triton",
)


_add_norm_backward = CustomOp(
    "add_norm_backward(Tensor z, Tensor? d_trunk, Tensor? d_branch, Tensor? trunk, Tensor? delta, Tensor? gate, "
    "Tensor? key, Tensor? rows, "
    f"{_WEIGHTS}, {_STATISTICS}, {_SPEC}, ScalarType x_dtype, ScalarType? delta_dtype) -> Tensor[]",
    17,
    make_grad_spec,
    _backward,
    _fake_backward,
    is_triton=lambda spec: spec.forward.backend == "triton",
)

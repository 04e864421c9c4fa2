"""Operators of torch.library that bypass its dispatcher in plain eager mode.

Each is one node for torch.compile, torch.export and selective recomputation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("megaresnorm", "FRAGMENT")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what kernels read and write; those in C have no FP16
_PLAIN = (Tensor, torch.nn.Parameter)


def check_fp32(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """Check that a tensor is one that a kernel can read in place: FP32, contiguous and of one of the shapes, or None.

    Raises:
        TypeError: it is not; the message begins with ``name``.
    """
    if tensor is None:
        return
    if tensor.dtype != torch.float32 or tuple(tensor.shape) not in shapes or not tensor.is_contiguous():
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise TypeError(f"{name} is {tensor.dtype} {list(tensor.shape)}; wanted float32 {wanted}, contiguous")


class CustomOp:
    """A functional operator ``megaresnorm::NAME`` with its gradient.

    Whatever observes operators (torch.compile, a dispatch mode, a subclass of Tensor) is given one. Any other call
    bypasses torch's dispatcher, whose way through Python would cost more than the arithmetic of a narrow model;
    torch.library.register_autograd would add another 0.1 ms for a schema as long as add_norm's.

    Args:
        schema: its arguments are the tensors, of which only the first is never None, and then the constants one by one.
        num_tensors: how many arguments of the schema are tensors.
        constants: makes one object of the other arguments; its ``values()`` are those arguments again.
        forward: called with (*tensors, constants). Returns a tensor or a tuple of tensors, none of them an argument.
        fake: called as ``forward``. Returns tensors of the same shapes and types without the values.
        save: called with (ctx, arguments, results), as torch.autograd.Function's ``setup_context``.
        backward: called with (ctx, *gradients). Returns one gradient for each tensor. Operators without ``save`` and
            ``backward`` are the gradients of others.
        is_triton: called with the constants: whether ``forward`` then is Triton kernels (``launcher``) and operators of
            torch. torch.compile sees them: it launches the kernels itself, without the way through Python.
    """

    def __init__(
        self,
        schema: str,
        num_tensors: int,
        constants: Callable,
        forward: Callable,
        fake: Callable,
        save: Callable | None = None,
        backward: Callable | None = None,
        is_triton: Callable[[Any], bool] | None = None,
    ) -> None:
        self._name = schema.split("(")[0]
        self._num_tensors, self._constants, self._forward = num_tensors, constants, forward
        _library.define(schema)
        for device in ("CPU", "CUDA"):
            _library.impl(self._name, self._flat(forward), device)
        torch.library.register_fake(f"megaresnorm::{self._name}", self._flat(fake), lib=_library)
        self._operator = getattr(torch.ops.megaresnorm, self._name).default
        if is_triton is not None:
            _show_kernels(
                f"megaresnorm::{self._name}", self._flat(forward), lambda rest: is_triton(constants(*rest)), num_tensors
            )
        self._function: type[torch.autograd.Function] | None = None
        if save is not None and backward is not None:
            self._function = _function(self._name, save, backward)
            _library.impl(self._name, self._flat(self._with_autograd), "Autograd")

    def __call__(self, *arguments: Any) -> Any:
        """Run the operator.

        Args:
            *arguments: the tensors, then the object of the constants.
        """
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or not _are_plain(arguments):
            return self._operator(*arguments[:-1], *arguments[-1].values())
        if self._function is not None and torch.is_grad_enabled():
            return self._function.apply(self._forward, *arguments)
        return self._forward(*arguments)

    def _flat(self, function: Callable) -> Callable:
        """``function``, called with the constants one by one, as the schema has them."""

        def flat(*arguments: Any) -> Any:
            results = function(*arguments[: self._num_tensors], self._constants(*arguments[self._num_tensors :]))
            return results if isinstance(results, Tensor) else list(results)

        return flat

    def _with_autograd(self, *arguments: Any) -> Any:
        assert self._function is not None
        if not torch.is_grad_enabled():
            return self._below_autograd(*arguments)
        return self._function.apply(self._below_autograd, *arguments)

    def _below_autograd(self, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            results = self._operator(*arguments[:-1], *arguments[-1].values())
        return results if isinstance(results, Tensor) else tuple(results)


def _show_kernels(name: str, forward: Callable, is_triton: Callable[[tuple], bool], num_tensors: int) -> None:
    """Let compilers trace through an operator where it is made of Triton kernels, as torch.library.triton_op does."""
    from torch._subclasses.functional_tensor import FunctionalTensorMode

    def traced(mode: Any, operator: Any, types: tuple, arguments: tuple, keywords: dict) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled  # which imports much

        if not is_triton(arguments[num_tensors:]) or custom_triton_ops_decomposition_disabled():  # torch.export
            return mode.__torch_dispatch__(operator, types, arguments, keywords)
        with mode:
            return forward(*arguments)

    torch.library.register_torch_dispatch(name, FunctionalTensorMode, traced, lib=_library)


def launcher(kernel: Any) -> Any:
    """A Triton kernel as it is, or where a compiler is tracing as a node that it sees."""
    return torch.library.wrap_triton(kernel) if torch._C._len_torch_dispatch_stack() else kernel


def _are_plain(arguments: tuple) -> bool:
    """Whether every tensor is a plain torch.Tensor or Parameter with memory behind it."""
    for argument in arguments:  # not a generator: twice as fast, in every call of an operator
        if isinstance(argument, Tensor) and (type(argument) not in _PLAIN or argument.is_meta):
            return False
    return True


def _function(name: str, save: Callable, backward: Callable) -> type[torch.autograd.Function]:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, compute: Callable, *arguments: Any) -> Any:
            results = compute(*arguments)
            save(ctx, arguments, results)
            return results

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
            if torch.is_grad_enabled():  # create_graph=True
                raise RuntimeError(
                    f"megaresnorm::{name} cannot be differentiated twice; use kernels that are named reference"
                )
            return None, *backward(ctx, *gradients), None

    Function.__name__ = Function.__qualname__ = name  # what a profiler shows
    return Function

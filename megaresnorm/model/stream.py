"""The residual stream with at most one add pending, and the kernel that closes it.

T tokens (batch * seq)   D model dim
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megaresnorm.kernels.activation import ActivationKernel
from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormKernel, NormWeights
from megaresnorm.kernels.attention import AttentionKernel, FusedAttention, Segments
from megaresnorm.kernels.dropout import Dropout
from megaresnorm.kernels.rotary import RotaryKernel
from megaresnorm.model.norm import Norm
from megaresnorm.parallel.branch_input import BranchInput
from megaresnorm.parallel.layouts import TensorLayout
from megaresnorm.parallel.linear_kernel import PLAIN, LinearKernel
from megaresnorm.parallel.remade import Remakes


class Stream(NamedTuple):
    """The residual stream with at most one add pending: alpha * x + gate * dropout(delta).

    A pre-norm add belongs to the next norm's kernel, a post-norm add to its own: so the pending add travels with the
    data, and whoever owns the next norm closes it. Numbers and dropout's key travel with it; a learned gate is applied
    in its block.
    """

    x: Tensor
    delta: Tensor | None = None
    alpha: float = 1.0
    gate: float | Tensor = 1.0
    dropout: Dropout | None = None

    def to_wire(self, add_norm: "AddNorm") -> tuple[Tensor, ...]:
        """The tensors that a pipeline sends from one stage to the next: the stream with its add closed."""
        return (add_norm.trunk(self),)

    @classmethod
    def from_wire(cls, tensors: tuple[Tensor, ...]) -> "Stream":
        """The stream from the tensors of ``to_wire``."""
        (x,) = tensors
        return cls(x)


@dataclass(frozen=True)
class AddNorm:
    """The add_norm kernel of this run, bound to a tensor layout and to the types that it reads and writes.

    Attributes:
        kernel: the chosen backend.
        layout: the stream's.
        residual_dtype: in which the stream is stored.
        compute_dtype: in which branches compute.
    """

    kernel: AddNormKernel
    layout: TensorLayout
    residual_dtype: torch.dtype
    compute_dtype: torch.dtype

    def __call__(
        self,
        stream: Stream,
        norm: Norm | None = None,
        next_norm: NormWeights | None = None,
        *,
        branch_norm: Norm | None = None,
        remakes: Remakes = Remakes.NOTHING,
        reader: LinearKernel = PLAIN,
    ) -> tuple[Tensor, BranchInput]:
        """Close the stream's add and open the next branch.

        Args:
            norm: the norm after the add, norm_out of the equation.
            next_norm: the norm_in of the next branch.
            branch_norm: the norm of the pending branch output, before its gate.
            remakes: what the branch input may be made of again in backward.
            reader: the products that read the branch input.

        Returns:
            The trunk norm(alpha * x + gate * branch_norm(delta)), and the branch input next_norm(trunk).
        """
        args = self._args(stream, norm, branch_norm, next_norm, reads=True)
        trunk, u = self.layout.add_norm(self.kernel, args, remakes, reader)
        assert u is not None
        return trunk, u

    def trunk(self, stream: Stream, norm: Norm | None = None, *, branch_norm: Norm | None = None) -> Tensor:
        """Close the stream's add where no branch reads it."""
        return self.layout.add_norm(self.kernel, self._args(stream, norm, branch_norm, None, reads=False))[0]

    def normalize(self, x: Tensor, norm: Norm) -> Tensor:
        """One norm by itself, over the last dim, computed in FP32 and returned in x's type and layout."""
        flat = x.reshape(-1, x.shape[-1])
        args = AddNormArgs(flat, norm=norm.weights(), residual_dtype=x.dtype, out_dtype=None)
        return self.layout.add_norm(self.kernel, args)[0].view(x.shape)

    def _args(
        self,
        stream: Stream,
        norm: Norm | None,
        branch_norm: Norm | None,
        next_norm: NormWeights | None,
        *,
        reads: bool,
    ) -> AddNormArgs:
        return AddNormArgs(
            stream.x,
            stream.delta,
            alpha=stream.alpha,
            gate=stream.gate,
            dropout=stream.dropout,
            branch_norm=None if branch_norm is None else branch_norm.weights(),
            norm=None if norm is None else norm.weights(),
            next_norm=next_norm,
            residual_dtype=self.residual_dtype,
            out_dtype=self.compute_dtype if reads else None,
        )


class Kernels(NamedTuple):
    """The chosen backends.

    Attributes:
        linear: the products of all linear layers.
        rotary: from fused q, k, v to rotated heads, for attention that reads those.
        attend: attention on rotated heads.
        fused_attention: the same backend's form for fused q, k, v with rotary positions; None where it has none.
        activate: the FFN's activation, as ``activation`` of kernels/activation.py describes it.
        normalize: (x, norm) -> x normalised, for rows that this rank has whole.
        prepare_attention: what ``attend`` asks of a batch's segments before the first layer; None for nothing.
        normalize_shared: the same for rows whose columns are sharded over the tensor-parallel ranks.
    """

    add_norm: AddNorm
    linear: LinearKernel
    rotary: RotaryKernel
    attend: AttentionKernel
    fused_attention: FusedAttention | None
    activate: ActivationKernel
    normalize: Callable[[Tensor, Norm], Tensor]
    normalize_shared: Callable[[Tensor, Norm], Tensor]
    prepare_attention: Callable[[Segments, torch.dtype], object] | None = None

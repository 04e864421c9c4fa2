"""The residual connection: the equation of topology.py, once, for every topology.

T tokens (batch * seq)   D model dim
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaresnorm.kernels.add_norm.reference import NormWeights
from megaresnorm.kernels.dropout import Dropout
from megaresnorm.model.branches import Branch
from megaresnorm.model.dropout import DropoutMasks
from megaresnorm.model.norm import Norm
from megaresnorm.model.sequence import SequenceInfo
from megaresnorm.model.specs import ParameterSpec, Part, multipliers_of, norm_parameters
from megaresnorm.model.stream import AddNorm, Stream
from megaresnorm.model.topology import Learned, ResidualSpec, TokenGate
from megaresnorm.parallel.branch_input import BranchInput, whole_rows
from megaresnorm.parallel.layouts import TensorLayout
from megaresnorm.parallel.remade import Remakes, read_twice
from megaresnorm.recipe import ModelRecipe
from megaresnorm.recompute import Region


class Residual(nn.Module):
    """One residual connection around one branch.

    A block runs it in three parts, so that everything between two branches is a single kernel:

        open            stream -> (x, u)      the pending add, then c * norm_in
        run             (x, u) -> y           F, the token gate
        close_and_open  (x, y) -> (x', u')    norm_branch, dropout, this add and norm_out, then the next c * norm_in
        close           (x, y) -> stream      norm_branch, dropout, this add and norm_out; a plain add is left pending

    The token gate acts after norm_branch and dropout, which then are kernels of their own, inside run.

    Args:
        norm: makes a norm of a given width.
        dim: width of the whole stream, of which ``layout`` gives this rank its columns.
        site: the branch's place in its block for dropout, see ``DropoutMasks.at``.
        dropout: the share of the branch's output that is dropped.

    Attributes:
        remakes: what the branch input is made of again in backward, rather than kept.
        reruns: whether all that the branch would keep is dropped, and the branch run again in backward.
    """

    def __init__(
        self,
        spec: ResidualSpec,
        branch: Branch,
        norm: Callable[[int], Norm],
        dim: int,
        add_norm: AddNorm,
        layout: TensorLayout,
        *,
        site: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec, self.add_norm, self.layout = spec, add_norm, layout
        self.site, self.dropout = site, dropout
        self.remakes, self.reruns = Remakes.NOTHING, False
        width = layout.width(dim)
        self.norm_in = norm(width) if spec.norm_in else None
        self.norm_branch = norm(width) if spec.norm_branch else None
        self.norm_out = norm(width) if spec.norm_out else None
        self.branch = branch
        self.gate = nn.Parameter(torch.empty(gate_size(spec.gate, width))) if isinstance(spec.gate, Learned) else None
        self.token_gate = nn.Linear(dim, 1) if isinstance(spec.gate, TokenGate) else None

    @staticmethod
    def parameter_specs(
        recipe: ModelRecipe, spec: ResidualSpec, branch: type[Branch], name: str
    ) -> Iterator[ParameterSpec]:
        """Specifications of a connection's parameters and its branch's, in the order of ``named_parameters``.

        Args:
            name: global, of the connection.
        """
        if isinstance(spec.gate, Learned):
            size = gate_size(spec.gate, recipe.dim)
            parts = (Part("residual_gate", size, mean=spec.gate.init),)
            multipliers = multipliers_of(spec, "residual_gate")
            yield ParameterSpec(f"{name}.gate", (size,), parts, decay=False, multipliers=multipliers)
        for role in ("norm_in", "norm_branch", "norm_out"):
            if getattr(spec, role):
                yield from norm_parameters(recipe, f"{name}.{role}", recipe.dim, spec)
        yield from branch.parameter_specs(recipe, spec, f"{name}.branch")
        if isinstance(spec.gate, TokenGate):
            multipliers = multipliers_of(spec, "token_gate")
            parts = (Part("token_gate", 1),)
            yield ParameterSpec(
                f"{name}.token_gate.weight", (1, recipe.dim), parts, decay=False, multipliers=multipliers
            )
            parts = (Part("token_gate", 1, mean=spec.gate.bias),)
            yield ParameterSpec(f"{name}.token_gate.bias", (1,), parts, decay=False, multipliers=multipliers)

    def open(self, stream: Stream) -> tuple[Tensor, BranchInput]:
        """The trunk x and the branch input u, from the stream."""
        reader = self.branch.reader.kernel
        return self.add_norm(stream, next_norm=self._norm_in_weights(), remakes=self.remakes, reader=reader)

    def close_and_open(
        self, following: "Residual", x: Tensor, y: Tensor, masks: DropoutMasks | None
    ) -> tuple[Tensor, BranchInput]:
        """The trunk x' after this connection and the branch input u' of ``following``, in one kernel."""
        return self.add_norm(
            self.pending(x, y, masks),
            self.norm_out,
            following._norm_in_weights(),
            branch_norm=self.fused_branch_norm,
            remakes=following.remakes,
            reader=following.branch.reader.kernel,
        )

    def close(self, x: Tensor, y: Tensor, masks: DropoutMasks | None) -> Stream:
        """The stream after this connection; its add stays pending where no norm or learned gate of its own needs it."""
        stream = self.pending(x, y, masks)
        if self.leaves_pending:
            return stream
        return Stream(self.add_norm.trunk(stream, self.norm_out, branch_norm=self.fused_branch_norm))

    @property
    def leaves_pending(self) -> bool:
        """Whether ``close`` leaves the add to whoever reads the stream."""
        return self.norm_out is None and self.gate is None and self.fused_branch_norm is None

    def pending(self, x: Tensor, y: Tensor, masks: DropoutMasks | None) -> Stream:
        """The add of this connection: of a branch's output y, before ``fused_branch_norm``, to its trunk x."""
        if self.token_gate is not None:  # which run applied, after dropout
            return Stream(x, y, self.spec.alpha)
        gate = self.spec.constant_gate if self.gate is None else self.gate
        assert gate is not None
        return Stream(x, y, self.spec.alpha, gate, self._dropout(masks))

    @property
    def fused_branch_norm(self) -> Norm | None:
        """norm_branch, if no token gate comes between it and the add."""
        return None if self.token_gate is not None else self.norm_branch

    def run(self, x: Tensor, u: BranchInput, rows: SequenceInfo, masks: DropoutMasks | None) -> Tensor:
        """The branch's output y for its input u, whole rows [T, D].

        Args:
            x: the trunk, which a token gate mixes y with.
            masks: of the block; None where nothing is dropped.

        Returns:
            y, laid out as x.
        """
        if not (self.reruns and torch.is_grad_enabled()):
            return self.run_once(x, u, rows, masks)
        if torch.compiler.is_compiling():  # which knows no hooks, but this
            run = functools.partial(self.run_once, rows=rows, masks=masks)
            return checkpoint(run, x, u, use_reentrant=False, preserve_rng_state=False)
        with Region() as region:
            x_again = (lambda: None) if self.token_gate is None else region.keep(x)
            u, u_again = read_twice(u, region.keep)
            region.begin(lambda: self.run_once(x_again(), u_again(), rows, masks))
            return self.run_once(x, u, rows, masks)

    def run_once(self, x: Tensor | None, u: BranchInput, rows: SequenceInfo, masks: DropoutMasks | None) -> Tensor:
        """What ``run`` runs, once in forward and where it ``reruns`` again in backward."""
        u = u if self.token_gate is None else u.gathered()  # which reads it, too
        y = self.branch(u, rows)
        if self.token_gate is not None:
            if self.norm_branch is not None:
                y = self.add_norm.normalize(y, self.norm_branch)
            if (dropout := self._dropout(masks)) is not None:  # after the norm, which would undo its scaling
                y = dropout(y)
            # (1 - T) x + T y = x + T (y - x), in FP32 (or FP64) so that x loses nothing.
            wide = self.token_gate.weight.dtype
            share = self.layout.token_weights(torch.sigmoid(self.token_gate(whole_rows(u).to(wide))))
            assert x is not None
            y = share * (y.to(wide) - x)
        return y

    def _dropout(self, masks: DropoutMasks | None) -> Dropout | None:
        return None if masks is None or self.dropout == 0.0 else masks.at(self.site, self.dropout)

    def _norm_in_weights(self) -> NormWeights | None:
        return None if self.norm_in is None else self.norm_in.weights(self.spec.norm_in_scale)


def gate_size(gate: Learned, dim: int) -> int:
    """Number of elements of a learned gate; a scalar is a vector of one, since sharding needs a dim."""
    return dim if gate.shape == "vector" else 1

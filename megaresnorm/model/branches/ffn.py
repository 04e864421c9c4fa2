"""The feed-forward branch: SwiGLU or GEGLU (arXiv:2002.05202, eq. 6), GELU (arXiv:1606.08415) or ReLU.

T tokens   D model dim   F ffn dim
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megaresnorm.model.branches.branch import Branch
from megaresnorm.model.norm import Norm
from megaresnorm.model.sequence import SequenceInfo
from megaresnorm.model.specs import ParameterSpec, linear_parameters, norm_parameters
from megaresnorm.model.stream import Kernels
from megaresnorm.model.topology import ResidualSpec
from megaresnorm.parallel.branch_input import BranchInput
from megaresnorm.parallel.layouts import TensorLayout
from megaresnorm.parallel.linear import ColumnLinear, RowLinear
from megaresnorm.recipe import ModelRecipe


class FeedForward(Branch):
    """down(activate(in(u))). With a gate the fused ``gate_up`` holds the logical matrices gate [F, D] and up [F, D].

    Under tensor parallelism F is this rank's share.

    Attributes:
        remakes_activation: whether the activation's output is made again in backward, rather than kept.
    """

    def __init__(
        self, recipe: ModelRecipe, kernels: Kernels, layout: TensorLayout, norm_inner: Callable[[int], Norm] | None
    ) -> None:
        super().__init__(recipe, kernels, layout, norm_inner)
        self.kind, self.activate, self.normalize_shared = recipe.ffn, kernels.activate, kernels.normalize_shared
        axis = layout.axis
        self.gated = recipe.gated_ffn
        into, width = ("gate_up", 2 * recipe.ffn_width) if self.gated else ("up", recipe.ffn_width)
        linear = ColumnLinear(recipe.dim, width, axis, bias=recipe.has_bias(into), kernel=kernels.linear)
        if self.gated:
            self.gate_up = linear
        else:
            self.up = linear
        self.down = RowLinear(recipe.ffn_width, recipe.dim, layout, bias=recipe.has_bias("down"), kernel=kernels.linear)
        self.norm_inner = None if norm_inner is None else norm_inner(recipe.ffn_width // axis.size)
        self.remakes_activation = False

    @property
    def reader(self) -> ColumnLinear:
        """See ``Branch``."""
        return self.gate_up if self.gated else self.up

    def forward(self, u_TD: BranchInput, rows: SequenceInfo) -> Tensor:
        """See ``Branch``."""
        into = self.reader
        # The bias belongs to the activation's kernel, which sums its gradient on the way.
        a = into.without_bias(u_TD)
        if self.remakes_activation and torch.compiler.is_compiling():  # which makes again what of this backward needs
            return checkpoint(self._out, a, into.bias, use_reentrant=False, preserve_rng_state=False)
        return self._out(a, into.bias)

    def _out(self, a: Tensor, bias: Tensor | None) -> Tensor:
        h = self.activate(a, bias, self.kind)
        if self.norm_inner is not None:
            return self.down(self.normalize_shared(h, self.norm_inner))
        remakes = self.remakes_activation and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return self.down(self.remade(h, a, bias) if remakes else h)

    def remade(self, h: Tensor, a: Tensor, bias: Tensor | None) -> BranchInput:
        """h, which backward makes again of what the activation keeps."""
        activate, kind = self.activate, self.kind
        sources = (a.detach(),) if bias is None else (a.detach(), bias.detach())

        def remake(sources: tuple[Tensor, ...]) -> Tensor:
            return activate(sources[0], sources[1] if len(sources) > 1 else None, kind)

        return BranchInput(h, sources=sources, remake=remake)

    @staticmethod
    def parameter_specs(recipe: ModelRecipe, spec: ResidualSpec, name: str) -> Iterator[ParameterSpec]:
        """See ``Branch``."""
        width = recipe.ffn_width
        into, parts = ("gate_up", (("gate", width), ("up", width))) if recipe.gated_ffn else ("up", (("up", width),))
        yield from linear_parameters(recipe, f"{name}.{into}", parts, recipe.dim, spec)
        yield from linear_parameters(recipe, f"{name}.down", (("down", recipe.dim),), width, spec)
        if spec.norm_inner:
            yield from norm_parameters(recipe, f"{name}.norm_inner", width, spec, role="inner")

    @staticmethod
    def flops(recipe: ModelRecipe) -> int:
        """Matrix products."""
        return 2 * (3 if recipe.gated_ffn else 2) * recipe.ffn_width * recipe.dim

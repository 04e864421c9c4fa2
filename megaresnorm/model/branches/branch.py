"""What a residual connection asks of a branch.

T tokens (batch * seq)   D model dim
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from megaresnorm.model.norm import Norm
from megaresnorm.model.sequence import SequenceInfo
from megaresnorm.model.specs import ParameterSpec
from megaresnorm.model.stream import Kernels
from megaresnorm.model.topology import ResidualSpec
from megaresnorm.parallel.branch_input import BranchInput
from megaresnorm.parallel.layouts import TensorLayout
from megaresnorm.parallel.linear import ColumnLinear
from megaresnorm.recipe import ModelRecipe


class Branch(nn.Module, ABC):
    """A branch: u [T, D] -> y, laid out as the stream.

    Args:
        norm_inner: makes the norm of the input of its last linear, of a given width; None: there is none.
    """

    @abstractmethod
    def __init__(
        self, recipe: ModelRecipe, kernels: Kernels, layout: TensorLayout, norm_inner: Callable[[int], Norm] | None
    ) -> None:
        super().__init__()

    @property
    @abstractmethod
    def reader(self) -> ColumnLinear:
        """The linear layer that reads its input."""

    @abstractmethod
    def forward(self, u_TD: BranchInput, rows: SequenceInfo) -> Tensor:
        """The branch's output [T, D], laid out as the stream."""

    @staticmethod
    @abstractmethod
    def parameter_specs(recipe: ModelRecipe, spec: ResidualSpec, name: str) -> Iterator[ParameterSpec]:
        """Specifications of its parameters, in the order of ``named_parameters``.

        Args:
            spec: of the connection around it.
            name: global, of the branch.
        """

    @staticmethod
    @abstractmethod
    def flops(recipe: ModelRecipe) -> int:
        """Floating-point operations of a forward pass, for one token."""

"""Linear layers and embeddings; on one rank they are the plain layers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W^T + b with weight [out_dim, in_dim]; the parameters are left uninitialised (see model/init.py).

    ``matmul(x, weight, bias)`` is replaced by precision.py when products are computed in another type.
    """

    matmul: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None
        self.matmul = F.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.weight, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """x W^T, for a kernel that adds the bias itself."""
        return self.matmul(x, self.weight, None)


class Embedding(nn.Module):
    """Rows of a table [num_rows, dim], looked up by number.

    F.embedding and not ``weight[ids]``: the backward of indexing adds in an order that differs from run to run when
    there are several threads.
    """

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, dim))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

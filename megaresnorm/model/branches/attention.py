"""Causal grouped-query attention.

T tokens (batch * seq)   B batch   S seq   N query heads   K key/value heads   H head width   D model dim
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megaresnorm.kernels.attention import reference_attention, sdpa_attention
from megaresnorm.model.branches.branch import Branch
from megaresnorm.model.norm import Norm, norm_of
from megaresnorm.model.sequence import SequenceInfo
from megaresnorm.model.specs import ParameterSpec, linear_parameters, norm_parameters
from megaresnorm.model.stream import Kernels
from megaresnorm.model.topology import ResidualSpec
from megaresnorm.parallel.branch_input import BranchInput
from megaresnorm.parallel.layouts import TensorLayout
from megaresnorm.parallel.linear import ColumnLinear, RowLinear
from megaresnorm.recipe import ModelRecipe


class Attention(Branch):
    """The fused ``qkv`` holds the logical matrices q [N*H, D], k [K*H, D] and v [K*H, D].

    Under tensor parallelism N and K are this rank's heads, and a norm over all heads together merges its statistics.
    """

    def __init__(
        self, recipe: ModelRecipe, kernels: Kernels, layout: TensorLayout, norm_inner: Callable[[int], Norm] | None
    ) -> None:
        super().__init__(recipe, kernels, layout, norm_inner)
        self.rotary, self.attend, self.fused_attention = kernels.rotary, kernels.attend, kernels.fused_attention
        self.normalize_shared = kernels.normalize_shared
        axis, self.head_dim = layout.axis, recipe.head_width
        self.scale, self.softcap = recipe.attention_multiplier, recipe.attention_softcap
        self.num_heads, self.kv_heads = recipe.num_heads // axis.size, recipe.kv_heads // axis.size
        q_dim, kv_dim = recipe.num_heads * self.head_dim, recipe.kv_heads * self.head_dim
        self.qkv = ColumnLinear(
            recipe.dim, q_dim + 2 * kv_dim, axis, bias=recipe.has_bias("qkv"), kernel=kernels.linear
        )
        self.out = RowLinear(q_dim, recipe.dim, layout, bias=recipe.has_bias("out"), kernel=kernels.linear)
        self.norm_inner = None if norm_inner is None else norm_inner(q_dim // axis.size)
        self.norm_per_head = recipe.qk_norm == "head"
        self.normalize_qk = kernels.normalize if self.norm_per_head else kernels.normalize_shared
        self.q_norm = self.k_norm = None
        if recipe.qk_norm != "none":
            per_head = (self.head_dim, self.head_dim)
            widths = per_head if self.norm_per_head else (q_dim // axis.size, kv_dim // axis.size)
            self.q_norm, self.k_norm = (norm_of(recipe)(width) for width in widths)

    @property
    def reader(self) -> ColumnLinear:
        """See ``Branch``."""
        return self.qkv

    def forward(self, u_TD: BranchInput, rows: SequenceInfo) -> Tensor:
        """See ``Branch``."""
        heads = self.num_heads, self.kv_heads, self.kv_heads
        qkv_BSJH = self.qkv(u_TD).view(rows.batch, rows.seq, sum(heads), self.head_dim)
        fused = self.fused_attention if rows.cache is None else None
        if self.q_norm is not None and self.k_norm is not None and (fused is not None or not self.norm_per_head):
            q, k, v = qkv_BSJH.split(heads, dim=2)
            qkv_BSJH = torch.cat((self._normalize(q, self.q_norm), self._normalize(k, self.k_norm), v), dim=2)
        if fused is not None:
            y_BSNH, _ = fused(
                qkv_BSJH, self.kv_heads, cos=rows.cos, sin=rows.sin, segments=rows.segments, scale=self.scale
            )
        else:
            y_BSNH = self._attend(qkv_BSJH, rows)
        y = y_BSNH.reshape(rows.batch * rows.seq, -1)
        return self.out(y if self.norm_inner is None else self.normalize_shared(y, self.norm_inner))

    @staticmethod
    def parameter_specs(recipe: ModelRecipe, spec: ResidualSpec, name: str) -> Iterator[ParameterSpec]:
        """See ``Branch``."""
        q_dim, kv_dim = recipe.num_heads * recipe.head_width, recipe.kv_heads * recipe.head_width
        qkv = (("q", q_dim), ("k", kv_dim), ("v", kv_dim))
        yield from linear_parameters(recipe, f"{name}.qkv", qkv, recipe.dim, spec)
        yield from linear_parameters(recipe, f"{name}.out", (("out", recipe.dim),), q_dim, spec)
        if spec.norm_inner:
            yield from norm_parameters(recipe, f"{name}.norm_inner", q_dim, spec, role="inner")
        if recipe.qk_norm != "none":
            for norm, width in (("q_norm", q_dim), ("k_norm", kv_dim)):
                dim, role = (recipe.head_width, "heads") if recipe.qk_norm == "head" else (width, "inner")
                yield from norm_parameters(recipe, f"{name}.{norm}", dim, spec, role=role)

    @staticmethod
    def flops(recipe: ModelRecipe) -> int:
        """Matrix products, and causal attention over a whole sequence."""
        q_dim, kv_dim = recipe.num_heads * recipe.head_width, recipe.kv_heads * recipe.head_width
        matrices = recipe.dim * (q_dim + 2 * kv_dim) + q_dim * recipe.dim
        return 2 * matrices + 2 * recipe.seq_len * q_dim  # scores and weighted sum, half of them masked

    def _attend(self, qkv_BSJH: Tensor, rows: SequenceInfo) -> Tensor:
        """Attention after norms of heads and rotary positions; in generation of what is new, over all cached."""
        q_norm, k_norm = (
            norm.weights() if norm is not None and self.norm_per_head else None for norm in (self.q_norm, self.k_norm)
        )
        q_BSNH, k_BSKH, v_BSKH = self.rotary(
            qkv_BSJH, self.kv_heads, cos=rows.cos, sin=rows.sin, q_norm=q_norm, k_norm=k_norm
        )
        attend, causal = self.attend, True
        if rows.cache is not None:
            causal = rows.cache.num_tokens == 0  # the whole prompt; afterwards a single new token sees all before it
            k_BSKH, v_BSKH = rows.cache.extend(self, k_BSKH, v_BSKH)
            attend = sdpa_attention if self.softcap is None else reference_attention
        return attend(
            q_BSNH, k_BSKH, v_BSKH, segments=rows.segments, causal=causal, scale=self.scale, softcap=self.softcap
        )[0]

    def _normalize(self, x_BSNH: Tensor, norm: Norm) -> Tensor:
        x = x_BSNH if self.norm_per_head else x_BSNH.flatten(2)
        return self.normalize_qk(x, norm).view_as(x_BSNH)

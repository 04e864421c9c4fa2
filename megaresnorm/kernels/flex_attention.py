"""Attention by torch's FlexAttention, which caps scores in its kernel: on GPUs scores are never written out.

B batch   S queries   C keys   N query heads   K key/value heads   H head width
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaresnorm.kernels.attention import PREPARATIONS, Segments
from megaresnorm.kernels.gpu.requires import triton_requires
from megaresnorm.kernels.registry import register_kernel


def flex_attention(
    q_BSNH: Tensor,
    k_BCKH: Tensor,
    v_BCKH: Tensor,
    *,
    segments: Segments | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``AttentionKernel`` by FlexAttention (arXiv:2412.05496), compiled on a GPU, once for every shape.

    Blocks of 128 keys that no query of a block sees are skipped: later ones, and those of other documents. Which these
    are is found once for a batch with documents, and else once for a shape.
    """
    from torch.nn.attention.flex_attention import AuxRequest  # a second's imports, for GPUs alone

    run = _compiled() if q_BSNH.is_cuda and not torch.compiler.is_compiling() else _function()
    mask = None
    if segments is not None:
        mask = block_mask_of(segments, causal)
    elif causal:
        make = _blocks if torch.compiler.is_compiling() else _blocks_of_a_shape
        mask = make(_causal, None, q_BSNH.shape[1], q_BSNH.device)
    y, aux = run(
        *(t.transpose(1, 2) for t in (q_BSNH, k_BCKH, v_BCKH)),
        score_mod=None if softcap is None else _cap(softcap),
        block_mask=mask,
        scale=scale,
        enable_gqa=k_BCKH.shape[2] != q_BSNH.shape[2],
        return_aux=AuxRequest(lse=True),
    )
    return y.transpose(1, 2), aux.lse.detach()


def block_mask_of(segments: Segments, causal: bool) -> Any:
    """The blocks of keys that blocks of queries see. The causal ones are found once for all layers."""
    if causal and segments.blocks is not None:
        return segments.blocks
    ids = segments.ids

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = ids[batch, query] == ids[batch, key]
        return same & (key <= query) if causal else same

    (batch, seq), device = ids.shape, ids.device
    blocks = _blocks(sees, batch, seq, device)
    if causal and not torch.compiler.is_compiling():
        segments.blocks = blocks
    return blocks


def _cap(softcap: float) -> Callable[..., Tensor]:
    """Gemma 2, arXiv:2408.00118, eq. 1."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def _blocks(sees: Callable[..., Tensor], batch: int | None, seq: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    make = create_block_mask
    if device.type == "cuda" and not torch.compiler.is_compiling():
        make = _compiled_blocks()
    return make(sees, batch, None, seq, seq, device=device)


@functools.cache
def _compiled_blocks(backend: str | Callable = "inductor") -> Callable[..., Any]:
    """create_block_mask, which as it is would write out a mask [B, S, S]; one graph for the masks of all batches."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=False, backend=backend)


_blocks_of_a_shape = functools.lru_cache(maxsize=4)(_blocks)


def _function() -> Callable[..., Any]:
    from torch.nn.attention import flex_attention as flex

    return flex.flex_attention


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(_function(), dynamic=False)


PREPARATIONS["flex"] = lambda segments, dtype: block_mask_of(segments, causal=True)
register_kernel("attention", "flex", requires=triton_requires, kinds=("plain", "softcap"))(flex_attention)

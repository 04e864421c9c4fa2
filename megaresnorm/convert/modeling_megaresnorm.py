"""MegaResNorm models of any residual topology for Hugging Face Transformers, in one file that needs nothing else.

    x' = norm_out( alpha * x  +  gate * norm_branch( F( c * norm_in(x) ) ) )

``config.residual`` says for every sub-layer, attention and ffn of the first block and so on, which norms there are and
what the constants are. Norms and rotary positions are computed in FP32.

T tokens (batch * seq)   B batch   S queries   C keys   N query heads   K key/value heads   H head width   D model dim
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class MegaResNormConfig(PretrainedConfig):
    """Settings of a model.

    Args:
        residual: a row for every sub-layer: norm_in, norm_in_scale, norm_inner, norm_branch, norm_out (booleans, the
            scale a number), alpha, gate (a number, "scalar", "vector" or "token").
        rope_frequencies: those of a stretched context, and the factor on cos and sin; None for the usual ones.
    """

    model_type = "megaresnorm"

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 64,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 1,
        num_key_value_heads: int = 1,
        head_dim: int = 64,
        intermediate_size: int = 256,
        max_position_embeddings: int = 128,
        residual: Any = None,
        norm: str = "rmsnorm",
        norm_eps: float = 1e-5,
        norm_bias: bool = True,
        norm_zero_centered: bool = False,
        embedding_norm: bool = False,
        final_norm: bool = True,
        positions: str = "rope",
        rope_theta: float = 10000.0,
        rotary_width: int = 64,
        rope_frequencies: dict | None = None,
        qk_norm: str = "none",
        activation: str = "swiglu",
        attention_bias: str = "none",
        mlp_bias: bool = False,
        embedding_multiplier: float = 1.0,
        attention_multiplier: float = 0.125,
        attention_softcap: float | None = None,
        logits_scaling: float = 1.0,
        logit_softcap: float | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim, self.intermediate_size = head_dim, intermediate_size
        self.max_position_embeddings, self.residual = max_position_embeddings, residual
        self.norm, self.norm_eps, self.norm_bias, self.norm_zero_centered = (
            norm,
            norm_eps,
            norm_bias,
            norm_zero_centered,
        )
        self.embedding_norm, self.final_norm, self.positions = embedding_norm, final_norm, positions
        self.rope_theta, self.rotary_width, self.rope_frequencies = rope_theta, rotary_width, rope_frequencies
        self.qk_norm, self.activation = qk_norm, activation
        self.attention_bias, self.mlp_bias = attention_bias, mlp_bias
        self.embedding_multiplier, self.attention_multiplier = embedding_multiplier, attention_multiplier
        self.attention_softcap, self.logits_scaling, self.logit_softcap = (
            attention_softcap,
            logits_scaling,
            logit_softcap,
        )
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dim, computed in FP32 (or FP64)."""

    def __init__(self, config: MegaResNormConfig, dim: int) -> None:
        super().__init__()
        self.layernorm, self.eps = config.norm == "layernorm", config.norm_eps
        self.offset = 1.0 if config.norm_zero_centered else 0.0
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - self.offset))
        self.bias = nn.Parameter(torch.zeros(dim)) if self.layernorm and config.norm_bias else None

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.layernorm:
            wide = wide - wide.mean(-1, keepdim=True)
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        y = y * ((self.weight.to(wide.dtype) + self.offset) * scale)
        return (y if self.bias is None else y + self.bias.to(wide.dtype) * scale).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: MegaResNormConfig, inner: bool, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        q_dim, kv_dim = (config.head_dim * heads for heads in self.heads[:2])
        self.qkv = nn.Linear(config.hidden_size, q_dim + 2 * kv_dim, bias=config.attention_bias != "none")
        self.out = nn.Linear(q_dim, config.hidden_size, bias=config.attention_bias == "all")
        self.norm_inner = Norm(config, q_dim) if inner else None
        if config.qk_norm != "none":
            widths = (config.head_dim,) * 2 if config.qk_norm == "head" else (q_dim, kv_dim)
            self.q_norm, self.k_norm = (Norm(config, width) for width in widths)

    def forward(self, u: Tensor, rotary: tuple | None, mask_BSC: Tensor, cache: Any) -> Tensor:
        batch, seq = u.shape[:2]
        qkv = self.qkv(u).view(batch, seq, sum(self.heads), self.config.head_dim)
        q, k, v = qkv.split(self.heads, dim=2)
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.config.qk_norm == "full":
            q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
        if rotary is not None:
            q, k = (rotate(t, *rotary) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        group = self.heads[0] // self.heads[1]
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        mask = mask_BSC.unsqueeze(1)
        if self.config.attention_softcap is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.config.attention_multiplier)
        else:
            cap = self.config.attention_softcap
            scores = cap * torch.tanh((q @ k.transpose(-1, -2)).float() * self.config.attention_multiplier / cap)
            y = scores.masked_fill(~mask, -math.inf).softmax(-1).to(v.dtype) @ v
        y = y.transpose(1, 2).reshape(batch, seq, -1)
        return self.out(y if self.norm_inner is None else self.norm_inner(y))


class FeedForward(nn.Module):
    def __init__(self, config: MegaResNormConfig, inner: bool) -> None:
        super().__init__()
        dim, width = config.hidden_size, config.intermediate_size
        self.kind, self.gated = config.activation, "glu" in config.activation
        if self.gated:
            self.gate_up = nn.Linear(dim, 2 * width, bias=config.mlp_bias)
        else:
            self.up = nn.Linear(dim, width, bias=config.mlp_bias)
        self.down = nn.Linear(width, dim, bias=config.mlp_bias)
        self.norm_inner = Norm(config, width) if inner else None

    def forward(self, u: Tensor) -> Tensor:
        h, up = self.gate_up(u).chunk(2, dim=-1) if self.gated else (self.up(u), None)
        if self.kind == "swiglu":
            h = F.silu(h)
        elif self.kind == "relu":
            h = F.relu(h)
        else:
            h = F.gelu(h, approximate="tanh" if self.kind.endswith("_tanh") else "none")
        h = h if up is None else h * up
        return self.down(h if self.norm_inner is None else self.norm_inner(h))


class Residual(nn.Module):
    """One residual connection around one branch."""

    def __init__(self, config: MegaResNormConfig, sublayer: int) -> None:
        super().__init__()
        norm_in, self.scale, inner, norm_branch, norm_out, self.alpha, self.kind = config.residual[sublayer]
        dim = config.hidden_size
        self.norm_in, self.norm_branch, self.norm_out = (
            Norm(config, dim) if there else None for there in (norm_in, norm_branch, norm_out)
        )
        attends = sublayer % 2 == 0
        self.branch = Attention(config, inner, sublayer // 2) if attends else FeedForward(config, inner)
        self.gate = (
            nn.Parameter(torch.zeros(dim if self.kind == "vector" else 1))
            if self.kind in ("scalar", "vector")
            else None
        )
        self.token_gate = nn.Linear(dim, 1) if self.kind == "token" else None

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        u = x if self.norm_in is None else self.norm_in(x, self.scale)
        y = self.branch(u, *arguments)
        y = y if self.norm_branch is None else self.norm_branch(y)
        if self.token_gate is not None:
            x = x + torch.sigmoid(self.token_gate(u)) * (y - x)
        else:
            x = self.alpha * x + (self.kind if self.gate is None else self.gate) * y
        return x if self.norm_out is None else self.norm_out(x)


class Block(nn.Module):
    def __init__(self, config: MegaResNormConfig, block: int) -> None:
        super().__init__()
        self.attention, self.ffn = Residual(config, 2 * block), Residual(config, 2 * block + 1)

    def forward(self, x: Tensor, rotary: tuple | None, mask_BSC: Tensor, cache: Any) -> Tensor:
        return self.ffn(self.attention(x, rotary, mask_BSC, cache))


class MegaResNormPreTrainedModel(PreTrainedModel):
    config: MegaResNormConfig
    config_class = MegaResNormConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize parameters that a checkpoint lacks; a model is trained from scratch with MegaResNorm itself."""
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(0.0, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data.zero_()


class MegaResNormModel(MegaResNormPreTrainedModel):
    """Token ids [B, S] -> hidden states [B, S, D] after the final norm."""

    def __init__(self, config: MegaResNormConfig) -> None:
        super().__init__(config)
        dim = config.hidden_size
        self.embedding = nn.Embedding(config.vocab_size, dim)
        self.positions = nn.Embedding(config.max_position_embeddings, dim) if config.positions == "learned" else None
        self.embedding_norm = Norm(config, dim) if config.embedding_norm else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = Norm(config, dim) if config.final_norm else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value  # type: ignore[assignment]

    def forward(
        self, embeds_BSD: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Any
    ) -> Tensor:
        batch, seq, _ = embeds_BSD.shape
        seen = 0 if cache is None else cache.get_seq_length()
        number = torch.arange(seen + seq, device=embeds_BSD.device)
        mask_BSC = (number[seen:].unsqueeze(1) >= number).expand(batch, -1, -1)
        if attention_mask is not None:
            there = attention_mask[:, : seen + seq].bool()
            itself = number[seen:].unsqueeze(1) == number  # so that no row of the mask is empty, not even at padding
            mask_BSC = (mask_BSC & there.unsqueeze(1)) | itself
            if position_ids is None:
                position_ids = (there.long().cumsum(1) - 1).clamp(min=0)[:, seen:]
        if position_ids is None:
            position_ids = number[seen:].unsqueeze(0)
        x = embeds_BSD * self.config.embedding_multiplier
        if self.positions is not None:
            if seen + seq > self.config.max_position_embeddings:
                raise ValueError(
                    f"{seen + seq} tokens; this model has learned {self.config.max_position_embeddings} positions"
                )
            x = x + self.positions(position_ids)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        rotary = None if self.positions is not None else rotary_tables(self.config, position_ids, x.dtype)
        for block in self.blocks:
            x = block(x, rotary, mask_BSC, cache)
        return x if self.final_norm is None else self.final_norm(x)


class MegaResNormForCausalLM(MegaResNormPreTrainedModel, GenerationMixin):
    accepts_loss_kwargs = False  # the loss is the mean of each call, whatever a trainer accumulates
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: MegaResNormConfig) -> None:
        super().__init__(config)
        self.model = MegaResNormModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the mean loss in nats where there are labels.

        Args:
            labels: [B, S], -100 where nothing is to be predicted. They are shifted by one here.
        """
        embeds = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        hidden = self.model(embeds, attention_mask, position_ids, cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is not None:
            keep = slice(None)
        logits = self.lm_head(hidden[:, keep]) / self.config.logits_scaling
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)


def rotate(x_BSNH: Tensor, cos_BSH: Tensor, sin_BSH: Tensor) -> Tensor:
    """Rotate the two halves of every head against each other; the first half of ``sin`` is negative."""
    exchanged = x_BSNH.roll(x_BSNH.shape[-1] // 2, dims=-1)
    return (x_BSNH * cos_BSH.unsqueeze(2) + exchanged * sin_BSH.unsqueeze(2)).to(x_BSNH.dtype)


def rotary_tables(config: MegaResNormConfig, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, H], in FP32 (or FP64); columns that are not rotated have an angle of 0."""
    width, half, factor = config.rotary_width, config.head_dim // 2, 1.0
    i = torch.arange(0, width, 2, dtype=torch.float64, device=positions_BS.device)
    frequencies = config.rope_theta ** (-i / width)
    if config.rope_frequencies is not None:
        frequencies = frequencies.new_tensor(config.rope_frequencies["values"])
        factor = config.rope_frequencies["factor"]
    angles = positions_BS.unsqueeze(-1) * frequencies
    cos, sin = angles.new_ones(*positions_BS.shape, half), angles.new_zeros(*positions_BS.shape, half)
    cos[..., : width // 2], sin[..., : width // 2] = angles.cos() * factor, angles.sin() * factor
    wide = torch.promote_types(dtype, torch.float32)
    return torch.cat((cos, cos), dim=-1).to(wide), torch.cat((-sin, sin), dim=-1).to(wide)

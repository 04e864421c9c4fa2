"""A Llama in plain PyTorch, as somebody would write it who wants torch.compile to do the rest: a peer of campaigns."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


class Layer(nn.Module):
    """Pre-norm attention with rotary positions, and SwiGLU."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate_up, self.down = nn.Linear(dim, 2 * ffn_dim, bias=False), nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, S, D]."""
        batch, seq, dim = x.shape
        u = F.rms_norm(x, (dim,), self.norm_1, EPS)
        q, k, v = self.qkv(u).view(batch, seq, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (_rotated(t, cos, sin) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, seq, dim))
        gate, up = self.gate_up(F.rms_norm(x, (dim,), self.norm_2, EPS)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class PlainLlama(nn.Module):
    """Token ids [B, S] -> logits [B, S, V]."""

    def __init__(self, num_blocks: int, dim: int, heads: int, ffn_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, dim), nn.Linear(dim, vocab_size, bias=False)
        self.layers = nn.ModuleList(Layer(dim, heads, ffn_dim) for _ in range(num_blocks))
        self.norm = nn.Parameter(torch.empty(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        x, half = self.embedding(tokens), self.embedding.weight.shape[1] // self.layers[0].heads // 2
        frequencies = 10000.0 ** (-torch.arange(half, device=tokens.device, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float64), frequencies)
        cos, sin = angles.cos().float(), angles.sin().float()
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(F.rms_norm(x, x.shape[-1:], self.norm, EPS))

    def load(self, weights: dict[str, Tensor]) -> "PlainLlama":
        """Take over our weights, by our names."""
        names = {"attention.norm_in.weight": "norm_1", "attention.branch.qkv.weight": "qkv.weight",
                 "attention.branch.out.weight": "out.weight", "ffn.norm_in.weight": "norm_2",
                 "ffn.branch.gate_up.weight": "gate_up.weight", "ffn.branch.down.weight": "down.weight"}  # fmt: skip
        top = {"final_norm.weight": "norm", "embedding.weight": "embedding.weight", "head.weight": "head.weight"}
        state = {}
        for name, value in weights.items():
            part, _, rest = name.partition(".")
            number, _, module = rest.partition(".")
            state[f"layers.{number}.{names[module]}" if part == "blocks" else top[name]] = value
        self.load_state_dict(state)
        return self

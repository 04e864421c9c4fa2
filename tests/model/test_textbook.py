"""Every topology against its textbook formula.

The textbook below is written with torch.nn.functional alone, one formula a topology, from the papers; it knows nothing
of Stream, add_norm or ResidualSpec, and reads the model's weights by their names only.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from megaresnorm.assemble import build_model
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.recipe import InitRecipe, ModelRecipe, PrecisionRecipe, TopologyOptions

N, D, HEADS, KV, HEAD, FFN, VOCAB, SEQ, EPS = 5, 24, 4, 2, 6, 40, 50, 12, 1e-5
BASE_BLOCKS, BASE_DIM = 2, 12


class Textbook:
    """A decoder written out plainly. ``w`` are the weights by name; every tensor is FP64."""

    def __init__(self, topology: str, recipe: ModelRecipe, w: dict) -> None:
        self.topology, self.recipe, self.w = topology, recipe, w

    def norm(self, x, name):
        weight = self.w[f"{name}.weight"] + float(self.recipe.norm_zero_centered)
        if self.recipe.norm == "layernorm":
            return F.layer_norm(x, weight.shape, weight, self.w.get(f"{name}.bias"), EPS)
        return F.rms_norm(x, weight.shape, weight, EPS)

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def attention(self, u, b):
        name = f"blocks.{b}.attention.branch"
        q, k, v = self.linear(u, f"{name}.qkv").split([HEADS * HEAD, KV * HEAD, KV * HEAD], dim=-1)
        if self.recipe.qk_norm == "full":
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        q, k, v = (t.unflatten(-1, (-1, HEAD)).transpose(1, 2) for t in (q, k, v))
        if self.recipe.qk_norm == "head":
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        if self.recipe.positions == "rope":
            q, k = self.rotary(q), self.rotary(k)
        k, v = (t.repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
        multiplier = self.recipe.attention_multiplier
        scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(HEAD) if multiplier is None else multiplier)
        if self.recipe.attention_softcap is not None:
            scores = self.recipe.attention_softcap * (scores / self.recipe.attention_softcap).tanh()
        scores = scores.masked_fill(torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1), -math.inf)
        return self.linear(self.inside((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), f"{name}.out")

    def rotary(self, x):
        """Each pair (i, i + H/2) is a complex number that is turned by position * theta^(-2i/R), if i is below R/2."""
        pair = torch.complex(x[..., : HEAD // 2], x[..., HEAD // 2 :])
        rotated = int(HEAD * self.recipe.rope_fraction)
        i = torch.arange(HEAD // 2, dtype=torch.float64)
        frequency = torch.where(i < rotated / 2, self.recipe.rope_theta ** (-2 * i / rotated), 0.0)
        turned = pair * torch.exp(1j * torch.outer(torch.arange(SEQ, dtype=torch.float64), frequency))
        return torch.cat((turned.real, turned.imag), dim=-1)

    def ffn(self, u, b):
        name = f"blocks.{b}.ffn.branch"
        gated = self.recipe.ffn in ("swiglu", "geglu", "geglu_tanh")
        h, up = self.linear(u, f"{name}.gate_up").split(FFN, dim=-1) if gated else (self.linear(u, f"{name}.up"), 1.0)
        if self.recipe.ffn == "swiglu":
            h = h * torch.sigmoid(h)
        elif self.recipe.ffn == "relu":
            h = torch.where(h > 0, h, 0.0)
        elif self.recipe.ffn.endswith("_tanh"):
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        else:
            h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        return self.linear(self.inside(h * up), f"{name}.down")

    inner = None

    def inside(self, h):
        """Sub-LN's second norm."""
        return h if self.inner is None else self.norm(h, self.inner)

    def sublayer(self, x, b, kind):
        """The topology's formula for one sub-layer."""
        name = f"blocks.{b}.{kind}"
        branch = getattr(self, kind)

        def f(u):
            return branch(u, b)

        def norm(role, t):
            return self.norm(t, f"{name}.{role}")

        match self.topology:
            case "pre" | "pre_scaled":
                return x + f(norm("norm_in", x))
            case "post":
                return norm("norm_out", x + f(x))
            case "deepnorm":
                return norm("norm_out", (2 * N) ** (1 / 4) * x + f(x))
            case "deepnorm_glm":
                return norm("norm_out", math.sqrt(2 * N) * x + f(x))
            case "keel":
                if b > 0:
                    return norm("norm_out", 2 * N * x + f(norm("norm_in", x)))
                return x + f(norm("norm_in", x)) if kind == "attention" else norm("norm_out", x + f(norm("norm_in", x)))
            case "peri" | "sandwich":
                return x + norm("norm_branch", f(norm("norm_in", x)))
            case "reordered":
                return x + norm("norm_branch", f(x))
            case "subln":
                self.inner = f"{name}.branch.norm_inner"
                y = f(norm("norm_in", x))
                self.inner = None
                return x + y
            case "lns":
                return x + f(norm("norm_in", x) / math.sqrt(b + 1))
            case "completep":
                return x + BASE_BLOCKS / N * f(norm("norm_in", x))
            case "rezero":
                return x + self.w[f"{name}.gate"] * f(x)
            case "layerscale":
                return x + self.w[f"{name}.gate"] * f(norm("norm_in", x))
            case "gated":
                u = norm("norm_in", x)
                t = torch.sigmoid(self.linear(u, f"{name}.token_gate"))
                return (1 - t) * x + t * f(u)
            case "mix_ln":
                return norm("norm_out", x + f(x)) if b < 2 else x + f(norm("norm_in", x))
        raise AssertionError(f"the textbook has no formula for {self.topology}")

    def logits(self, tokens):
        x = self.w["embedding.weight"][tokens] * self.recipe.embedding_multiplier
        if self.recipe.positions == "learned":
            x = x + self.w["positions.weight"]
        if "embedding_norm.weight" in self.w:
            x = self.norm(x, "embedding_norm")
        for b in range(N):
            x = self.sublayer(x, b, "attention")
            x = self.sublayer(x, b, "ffn")
        if self.topology not in ("post", "deepnorm", "deepnorm_glm", "keel"):
            x = self.norm(x, "final_norm")
        head = self.w["embedding.weight"] if self.recipe.tied_embeddings else self.w["head.weight"]
        logits = x @ head.T
        if self.topology == "completep":
            logits = logits * BASE_DIM / D
        logits = logits / self.recipe.logits_scaling
        return logits[..., :VOCAB]


VARIANTS = {
    "rms-rope-swiglu": {"norm": "rmsnorm", "positions": "rope", "ffn": "swiglu", "qk_norm": "head"},
    "ln-learned-gelu-bias-tied": {
        "norm": "layernorm", "positions": "learned", "ffn": "gelu", "qk_norm": "full", "bias": True,
        "tied_embeddings": True, "embedding_norm": True,
    },
    "ln-without-bias": {"norm": "layernorm", "norm_bias": False, "qk_norm": "none"},
    "multipliers-softcap-partial-geglu": {
        "qk_norm": "head", "norm_zero_centered": True, "ffn": "geglu_tanh", "attention_bias": "qkv",
        "rope_fraction": 0.7, "embedding_multiplier": 1.5, "attention_multiplier": 0.3, "attention_softcap": 0.8,
        "logits_scaling": 4.0,
    },
}  # fmt: skip


def cases():
    for topology, entry in TOPOLOGIES.items():
        for variant, settings in VARIANTS.items():
            if not (entry.requires_qk_norm and settings["qk_norm"] == "none"):
                yield pytest.param(topology, settings, id=f"{topology}-{variant}")


def build(topology: str, settings: dict):
    options = {"completep": {"base_dim": BASE_DIM, "base_num_blocks": BASE_BLOCKS}, "mix_ln": {"mix_ratio": 0.5}}
    recipe = ModelRecipe(
        dim=D,
        num_blocks=N,
        num_heads=HEADS,
        num_kv_heads=KV,
        ffn_dim=FFN,
        vocab_size=VOCAB,
        seq_len=SEQ,
        topology=topology,
        topology_options=TopologyOptions(**options.get(topology, {})),
        norm_eps=EPS,
        init=InitRecipe(embedding_std=0.7),
        **settings,
    )
    return recipe, build_model(recipe, PrecisionRecipe(compute="fp64"), seed=3).model


@pytest.mark.parametrize(("topology", "settings"), list(cases()))
def test_topology_equals_its_textbook_formula(topology, settings):
    recipe, model = build(topology, settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from the initial ones, zeros and 1e-6, behind which errors hide
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    tokens = torch.randint(VOCAB, (3, SEQ), generator=generator)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    seed = torch.randn(3 * SEQ, VOCAB, generator=generator, dtype=torch.float64)

    ours = model(tokens)
    ours.backward(seed)
    theirs = Textbook(topology, recipe, weights).logits(tokens).flatten(0, 1)
    theirs.backward(seed)

    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
    # A key bias moves all scores of a query alike, so its gradient is rounding alone: compare with the largest tensor.
    floor = max(w.grad.abs().max() for w in weights.values())
    for name, parameter in model.named_parameters():
        scale = torch.maximum(weights[name].grad.abs().max(), 1e-3 * floor)
        assert (parameter.grad - weights[name].grad).abs().max() <= 1e-12 * scale, name


@pytest.mark.parametrize("ffn", ["geglu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("bias", "attention"), [(False, "qkv"), (False, "all"), (True, "none"), (True, None)])
def test_activations_and_biases_equal_the_textbook(ffn, bias, attention):
    test_topology_equals_its_textbook_formula("pre", {"ffn": ffn, "bias": bias, "attention_bias": attention})
    _, model = build("pre", {"ffn": ffn, "bias": bias, "attention_bias": attention})
    names = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("bias")}
    in_attention = {None: {"qkv", "out"}, "none": set(), "qkv": {"qkv"}, "all": {"qkv", "out"}}[attention]
    assert names == in_attention | ({"down", "gate_up" if "glu" in ffn else "up"} if bias else set())


def test_a_gate_and_an_alpha_of_ones_own():
    """Granite's residual multiplier, and post-norm with any alpha, are options of pre and post."""
    for topology, option, formula in (
        ("pre", {"gate": 0.3}, lambda x, y, norm: x + 0.3 * y),
        ("post", {"alpha": 3.5}, lambda x, y, norm: norm(3.5 * x + y)),
    ):
        recipe = ModelRecipe(dim=D, num_blocks=1, num_heads=HEADS, vocab_size=VOCAB, seq_len=SEQ, topology=topology,
                             topology_options=TopologyOptions(**option))  # fmt: skip
        model = build_model(recipe, PrecisionRecipe(compute="fp64"), seed=3).model
        book = Textbook(topology, recipe, dict(model.named_parameters()))
        tokens = torch.randint(VOCAB, (1, SEQ))
        x = book.w["embedding.weight"][tokens]
        for kind in ("attention", "ffn"):
            branch, name = getattr(model.blocks["0"], kind).branch, f"blocks.0.{kind}"
            u = book.norm(x, f"{name}.norm_in") if topology == "pre" else x
            x = formula(
                x,
                branch(u.flatten(0, 1), model.rows(tokens)).view_as(x),
                functools.partial(lambda book, n, t: book.norm(t, f"{n}.norm_out"), book, name),
            )
        x = book.norm(x, "final_norm") if topology == "pre" else x
        theirs = (x @ book.w["head.weight"].T)[..., :VOCAB].flatten(0, 1)
        assert (model(tokens) - theirs).abs().max() <= 1e-12 * theirs.abs().max()


def test_textbook_would_see_a_wrong_constant():
    """Negative control: alpha 1 % off is four orders of magnitude outside the tolerance."""
    recipe, model = build("deepnorm", VARIANTS["rms-rope-swiglu"])
    tokens = torch.randint(VOCAB, (1, SEQ))
    theirs = Textbook("deepnorm", recipe, dict(model.named_parameters())).logits(tokens).flatten(0, 1)
    model.blocks["2"].ffn.spec = type(model.blocks["2"].ffn.spec)(norm_out=True, alpha=1.01 * (2 * N) ** 0.25)
    assert (model(tokens) - theirs).abs().max() > 1e-8 * theirs.abs().max()

"""The residual connection of every topology, as a pure function of a sub-layer's global position.

    x' = norm_out( alpha * x  +  gate * norm_branch( F( c * norm_in(x) ) ) )

    x ──┬── alpha ──────────────────────────(+)── norm_out ── x'
        └── c * norm_in ── F ── norm_branch ── gate ┘

A paper's formula is one function of a few lines; a new topology is one more function and one more entry of TOPOLOGIES.
N counts blocks and L = 2N sub-layers of the whole model, never of a pipeline stage.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import log, sqrt
from typing import Any, Literal

from megaresnorm.errors import ConfigError
from megaresnorm.recipe import ModelRecipe
from megaresnorm.recipe import TopologyOptions as Options
from megaresnorm.recipe.explain import suggest

SUBLAYERS = ("attention", "ffn")  # of every block, in order: kinds of model/branches


@dataclass(frozen=True)
class Position:
    """The place of one sub-layer in the whole model.

    Attributes:
        block: global number of its block, from 0.
        num_blocks: blocks of the whole model, the N of the papers.
        index: global number of the sub-layer, from 0.
        num_sublayers: sub-layers of the whole model, the L or 2N of the papers.
        kind: of its branch, one of ``SUBLAYERS``.
        dim: width of the residual stream.
    """

    block: int
    num_blocks: int
    index: int
    num_sublayers: int
    kind: str
    dim: int

    @property
    def is_last_of_block(self) -> bool:
        """Whether it is the last sub-layer of its block."""
        return self.kind == SUBLAYERS[-1]

    @classmethod
    def of(cls, block: int, kind: str, num_blocks: int, dim: int) -> "Position":
        """The place of a block's sub-layer of this kind."""
        a_block = len(SUBLAYERS)
        return cls(block, num_blocks, block * a_block + SUBLAYERS.index(kind), num_blocks * a_block, kind, dim)


@dataclass(frozen=True)
class Learned:
    """A learned gate that starts at ``init``: one number for the sub-layer, or one per column of the stream."""

    init: float
    shape: Literal["scalar", "vector"]


@dataclass(frozen=True)
class TokenGate:
    """One gate per token, T = sigmoid(w . u + b) of the branch input u; w starts at 0 and b at ``bias``.

    The trunk keeps the other share: x' = (1 - T) x + T F(u), a convex mixture.
    """

    bias: float


@dataclass(frozen=True)
class Multipliers:
    """Factors on the optimizer's settings for the parameters of one role."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ResidualSpec:
    """One residual connection: which norms, which constants, and what they ask of initialisation and optimizer.

    Attributes:
        norm_in_scale: c of the equation.
        norm_inner: whether F has a norm of its own, on the input of its last matrix (out, down).
        init_gain: factor on the standard deviation of a logical matrix: q, k, v, out; gate, up, down.
        optim: optimizer multipliers by role; the role ``*`` stands for those not named.
    """

    norm_in: bool = False
    norm_in_scale: float = 1.0
    norm_inner: bool = False
    norm_branch: bool = False
    norm_out: bool = False
    alpha: float = 1.0
    gate: float | Learned | TokenGate = 1.0
    init_gain: Mapping[str, float] = field(default_factory=dict)
    optim: Mapping[str, Multipliers] = field(default_factory=dict)

    @property
    def constant_gate(self) -> float | None:
        """The gate where it is a number, None where it is learned."""
        return None if isinstance(self.gate, Learned | TokenGate) else float(self.gate)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A residual connection for every position, and what the model around the blocks needs for it.

    Attributes:
        final_norm: whether a norm stands between the last block and the output matrix.
        embedding_norm: the kinds of norm under which the embedding is normalised unless the recipe says otherwise.
        options: the keys of model.topology_options that it reads.
        logit_scale: factor on the logits, from (dim, options).
        head_std: default standard deviation of the output matrix, from (dim, options).
        outer_optim: optimizer multipliers of the embeddings and the output matrix by role, from (dim, options).
    """

    residual: Callable[[Position, Options], ResidualSpec]
    final_norm: bool
    embedding_norm: tuple[str, ...] = ()
    requires_qk_norm: bool = False
    options: tuple[str, ...] = ()
    logit_scale: Callable[[int, Options], float] = lambda dim, options: 1.0
    head_std: Callable[[int, Options], float] = lambda dim, options: dim**-0.5
    outer_optim: Callable[[int, Options], Mapping[str, Multipliers]] = lambda dim, options: {}


def gains(value: float, *roles: str) -> dict[str, float]:
    """The same gain for several logical matrices."""
    return dict.fromkeys(roles, value)


def pre(at: Position, options: Options) -> ResidualSpec:
    """x + gate F(norm(x)), gate 1 unless set.

    Source:
        On Layer Normalization in the Transformer Architecture, arXiv:2002.04745, table 1.
    """
    return ResidualSpec(norm_in=True, gate=options.gate or 1.0)


def pre_scaled(at: Position, options: Options) -> ResidualSpec:
    """Pre-norm whose output matrices start 1/sqrt(2N) smaller. GPT-2 (Radford et al. 2019), section 2.3."""
    return ResidualSpec(norm_in=True, init_gain=gains(1 / sqrt(at.num_sublayers), "out", "down"))


def post(at: Position, options: Options) -> ResidualSpec:
    """norm(alpha x + F(x)), alpha 1 unless set. Attention Is All You Need, arXiv:1706.03762, section 3.1."""
    return ResidualSpec(norm_out=True, alpha=options.alpha or 1.0)


def deepnorm(at: Position, options: Options) -> ResidualSpec:
    """norm(alpha x + F(x)), alpha = (2N)^1/4, beta = (8N)^-1/4.

    beta scales v, out, up and down and not q, k or gate: then 2N (v^2 + w^2) / alpha^2 = 1 (theorem 4.2).

    Source:
        DeepNet, arXiv:2203.00555, figure 2, decoder-only.
    """
    alpha = (2 * at.num_blocks) ** 0.25
    beta = (8 * at.num_blocks) ** -0.25
    return ResidualSpec(norm_out=True, alpha=alpha, init_gain=gains(beta, "v", "out", "up", "down"))


def deepnorm_glm(at: Position, options: Options) -> ResidualSpec:
    """DeepNorm with alpha = (2N)^1/2 and beta = (2N)^-1/2. GLM-130B, arXiv:2210.02414, section 2.1."""
    alpha = (2 * at.num_blocks) ** 0.5
    return ResidualSpec(norm_out=True, alpha=alpha, init_gain=gains(1 / alpha, "v", "out", "up", "down"))


def keel(at: Position, options: Options) -> ResidualSpec:
    """norm(L x + F(norm(x))), L = 2N; the first block has alpha 1 and its attention no outer norm.

    Source:
        KEEL, arXiv:2601.19895, eq. 8.
    """
    if at.block == 0:
        return ResidualSpec(norm_in=True, norm_out=at.is_last_of_block)
    return ResidualSpec(norm_in=True, norm_out=True, alpha=float(at.num_sublayers))


def peri(at: Position, options: Options) -> ResidualSpec:
    """x + norm(F(norm(x))). Peri-LN, arXiv:2502.02732, eq. 3; sandwich-LN, CogView, arXiv:2105.13290, section 2.4."""
    return ResidualSpec(norm_in=True, norm_branch=True)


def reordered(at: Position, options: Options) -> ResidualSpec:
    """x + norm(F(x)), which needs normalised queries and keys. OLMo 2, arXiv:2501.00656, section 3.2."""
    return ResidualSpec(norm_branch=True)


def subln(at: Position, options: Options) -> ResidualSpec:
    """x + F(norm(x)), a second norm before out and down; v, out, up, down start (ln 2N)^1/2 larger.

    Source:
        Magneto, arXiv:2210.06423.
    """
    gain = sqrt(log(at.num_sublayers))
    return ResidualSpec(norm_in=True, norm_inner=True, init_gain=gains(gain, "v", "out", "up", "down"))


def lns(at: Position, options: Options) -> ResidualSpec:
    """x + F(norm(x) / sqrt(l)), l the block counted from 1. The Curse of Depth, arXiv:2502.05795, eq. 5."""
    return ResidualSpec(norm_in=True, norm_in_scale=1 / sqrt(at.block + 1))


def completep(at: Position, options: Options) -> ResidualSpec:
    """x + (N_base / N) F(norm(x)), with AdamW's rules for width and depth.

    Head width is meant to stay fixed while the model grows.

    Source:
        CompleteP, arXiv:2505.01618, table 1, alpha = 1.
    """
    m_width, m_depth = _growth(at.dim, at.num_blocks, options)
    eps = 1 / (m_width * m_depth)
    matrix = Multipliers(lr=1 / m_width, weight_decay=m_width, eps=eps)
    matrices = dict.fromkeys(("q", "k", "v", "out", "gate", "up", "down"), matrix)
    return ResidualSpec(norm_in=True, gate=1 / m_depth, optim={**matrices, "*": Multipliers(eps=eps)})


def rezero(at: Position, options: Options) -> ResidualSpec:
    """x + g F(x), g one learned number from 0, no norm in the block. ReZero, arXiv:2003.04887, eq. 1."""
    return ResidualSpec(gate=Learned(0.0, "scalar"))


def layerscale(at: Position, options: Options) -> ResidualSpec:
    """x + g * F(norm(x)), g a learned vector that starts small. CaiT, arXiv:2103.17239, eq. 4 and section 2."""
    depth = at.num_blocks
    return ResidualSpec(norm_in=True, gate=Learned(0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6, "vector"))


def gated(at: Position, options: Options) -> ResidualSpec:
    """(1 - T) x + T F(norm(x)), one gate per token from bias -2. Highway Networks, arXiv:1505.00387, eq. 3."""
    return ResidualSpec(norm_in=True, gate=TokenGate(bias=-2.0))


def mix_ln(at: Position, options: Options) -> ResidualSpec:
    """Post-norm in the first quarter of the blocks, pre-norm above. Mix-LN, arXiv:2412.13795, section 3."""
    ratio = 0.25 if options.mix_ratio is None else options.mix_ratio
    return (post if at.block < int(ratio * at.num_blocks) else pre)(at, options)


def _growth(dim: int, num_blocks: int, options: Options) -> tuple[float, float]:
    """CompleteP's m_d and m_N: how much wider and deeper than the base model."""
    return dim / (options.base_dim or dim), num_blocks / (options.base_num_blocks or num_blocks)


def _completep_outer_optim(dim: int, options: Options) -> dict[str, Multipliers]:
    m_width, _ = _growth(dim, 1, options)
    return {"*": Multipliers(eps=1 / m_width)}


TOPOLOGIES: dict[str, Topology] = {
    "pre": Topology(residual=pre, final_norm=True, options=("gate",)),
    "pre_scaled": Topology(residual=pre_scaled, final_norm=True),
    "post": Topology(residual=post, final_norm=False, options=("alpha",)),
    # With RMSNorm a normalised embedding lets a native Hugging Face class hold the model.
    "deepnorm": Topology(residual=deepnorm, final_norm=False, embedding_norm=("rmsnorm",)),
    "deepnorm_glm": Topology(residual=deepnorm_glm, final_norm=False, embedding_norm=("rmsnorm",)),
    "keel": Topology(residual=keel, final_norm=False),
    "peri": Topology(residual=peri, final_norm=True),
    "sandwich": Topology(residual=peri, final_norm=True),
    "reordered": Topology(residual=reordered, final_norm=True, requires_qk_norm=True),
    "subln": Topology(residual=subln, final_norm=True),
    "lns": Topology(residual=lns, final_norm=True),
    "completep": Topology(
        residual=completep,
        final_norm=True,
        options=("base_dim", "base_num_blocks"),
        logit_scale=lambda dim, options: (options.base_dim or dim) / dim,
        head_std=lambda dim, options: (options.base_dim or dim) ** -0.5,
        outer_optim=_completep_outer_optim,
    ),
    "rezero": Topology(residual=rezero, final_norm=True),
    "layerscale": Topology(residual=layerscale, final_norm=True),
    "gated": Topology(residual=gated, final_norm=True),
    "mix_ln": Topology(residual=mix_ln, final_norm=True, options=("mix_ratio",)),
}


def topology(name: str) -> Topology:
    """Look a topology up.

    Raises:
        ConfigError: there is none of this name; the message lists the known ones.
    """
    if name not in TOPOLOGIES:
        raise ConfigError(
            f"model.topology={name!r}: wanted one of {', '.join(TOPOLOGIES)}{suggest(name, list(TOPOLOGIES))}"
        )
    return TOPOLOGIES[name]


def position_of(recipe: ModelRecipe, block: int, kind: str) -> Position:
    """The place of a sub-layer of a model."""
    return Position.of(block, kind, recipe.num_blocks, recipe.dim)


def residual_at(recipe: ModelRecipe, block: int, kind: str) -> ResidualSpec:
    """The residual connection of a sub-layer of a model."""
    return topology(recipe.topology).residual(position_of(recipe, block, kind), recipe.topology_options)


def beside_others(name: str) -> dict[str, Any]:
    """Settings of the model under which a topology is compared with others.

    Post-norm families and KEEL read a normalised embedding, whatever the kind of norm, since nothing before their first
    branch scales it; QK-norm is on where the topology requires it.
    """
    settings: dict[str, Any] = {"embedding_norm": name in ("post", "deepnorm", "deepnorm_glm", "keel")}
    return settings | ({"qk_norm": "head"} if topology(name).requires_qk_norm else {})

"""Constants of the topologies, and that initialisation puts them where they belong."""

import math

import pytest
import torch

from megaresnorm.assemble import build_model
from megaresnorm.errors import ConfigError
from megaresnorm.model.topology import TOPOLOGIES, Learned, Position, ResidualSpec, TokenGate, topology
from megaresnorm.recipe import InitRecipe, ModelRecipe, TopologyOptions


def spec(name, block, num_blocks, sublayer="ffn", dim=64, **options):
    at = Position.of(block, sublayer, num_blocks, dim)
    return TOPOLOGIES[name].residual(at, TopologyOptions(**options))


@pytest.mark.parametrize(
    ("num_blocks", "alpha", "beta"),
    [(8, 2.0, 0.353553), (12, 2.213364, 0.319472), (24, 2.632148, 0.268642), (32, 2.828427, 0.25),
     (100, 3.760603, 0.188030), (128, 4.0, 0.1767767), (200, 4.472136, 0.158114), (500, 5.623413, 0.125743),
     (512, 5.656854, 0.125)],
)  # fmt: skip
def test_deepnorm_constants(num_blocks, alpha, beta):
    got = spec("deepnorm", 3, num_blocks)
    assert got.alpha == pytest.approx(alpha, abs=5e-7)
    assert got.init_gain == {role: pytest.approx(beta, abs=5e-7) for role in ("v", "out", "up", "down")}


def test_deepnorm_golden_values_are_exact():
    assert spec("deepnorm", 0, 32).init_gain["v"] == 0.25
    assert spec("deepnorm", 0, 128).alpha == 4.0


def test_constants_use_the_global_block_and_count_sublayers_where_the_paper_does():
    assert spec("keel", 1, 10).alpha == 20.0
    assert spec("keel", 0, 10).alpha == 1.0 and spec("keel", 0, 10).norm_out
    assert not spec("keel", 0, 10, "attention").norm_out
    assert spec("lns", 0, 10).norm_in_scale == 1.0 and spec("lns", 3, 10).norm_in_scale == 0.5
    assert spec("pre_scaled", 0, 8).init_gain == {"out": 0.25, "down": 0.25}
    assert spec("deepnorm_glm", 0, 8).alpha == 4.0 and spec("deepnorm_glm", 0, 8).init_gain["up"] == 0.25
    assert [spec("layerscale", 0, n).gate for n in (18, 24, 25)] == [Learned(v, "vector") for v in (0.1, 1e-5, 1e-6)]
    assert spec("rezero", 0, 4).gate == Learned(0.0, "scalar")
    assert spec("gated", 0, 4).gate == TokenGate(-2.0)
    assert [spec("mix_ln", b, 8).norm_out for b in range(8)] == [True, True] + [False] * 6
    assert [spec("mix_ln", b, 8, mix_ratio=0.5).norm_out for b in range(8)] == [True] * 4 + [False] * 4


def test_completep_rules():
    got = spec("completep", 0, 12, dim=256, base_dim=64, base_num_blocks=3)
    assert got.gate == 0.25
    matrix, other = got.optim["q"], got.optim["*"]
    assert (matrix.lr, matrix.weight_decay, matrix.eps) == (0.25, 4.0, 1 / 16)
    assert (other.lr, other.weight_decay, other.eps) == (1.0, 1.0, 1 / 16)
    assert TOPOLOGIES["completep"].logit_scale(256, TopologyOptions(base_dim=64)) == 0.25


def test_unknown_topology_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean deepnorm"):
        topology("deep_norm")


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_logical_matrix_starts_with_its_own_xavier_deviation(name):
    """q, k and v of a fused grouped-query projection have their own fans; beta goes to v, out, up and down alone."""
    n = 3
    recipe = ModelRecipe(
        dim=96,
        num_blocks=n,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        ffn_dim=160,
        vocab_size=64,
        seq_len=4,
        topology=name,
        qk_norm="head",
    )
    model = build_model(recipe, seed=5).model
    gain = {"deepnorm": (8 * n) ** -0.25, "deepnorm_glm": (2 * n) ** -0.5}.get(name, 1.0)
    gain = math.sqrt(math.log(2 * n)) if name == "subln" else gain
    out_gain = gain / math.sqrt(2 * n) if name == "pre_scaled" else gain
    for block in model.blocks.values():
        q, k, v = block.attention.branch.qkv.weight.split([128, 32, 32])
        gate, up = block.ffn.branch.gate_up.weight.split(160)
        out, down = block.attention.branch.out.weight, block.ffn.branch.down.weight
        for matrix, factor in (
            (q, 1.0),
            (k, 1.0),
            (v, gain),
            (out, out_gain),
            (gate, 1.0),
            (up, gain),
            (down, out_gain),
        ):
            expected = factor * math.sqrt(2 / sum(matrix.shape))
            # The deviation of n normal numbers is known to 1/sqrt(2n); five of those.
            assert matrix.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * matrix.numel()))


def test_scale_residual_and_normal_distribution():
    recipe = ModelRecipe(
        dim=64, num_blocks=8, num_heads=4, vocab_size=64, seq_len=4, topology="pre", bias=True,
        init=InitRecipe(distribution="normal", std=0.05, scale_residual=True),
    )  # fmt: skip
    block = build_model(recipe).model.blocks["5"]
    assert block.attention.branch.qkv.weight.std().item() == pytest.approx(0.05, rel=0.03)
    assert block.attention.branch.out.weight.std().item() == pytest.approx(0.05 / 4, rel=0.05)
    assert torch.equal(block.attention.branch.qkv.bias, torch.zeros(192))


def test_embeddings_positions_and_head_start_with_their_deviations():
    base = {"dim": 64, "num_blocks": 1, "num_heads": 4, "vocab_size": 4096, "seq_len": 4096, "positions": "learned"}

    def deviations(**settings):
        model = build_model(ModelRecipe(**base, **settings)).model
        return [round(t.weight.std().item(), 3) for t in (model.embedding, model.positions, model.head)]

    assert deviations() == [pytest.approx(1.0, rel=0.01), pytest.approx(0.5, rel=0.01), pytest.approx(0.125, rel=0.01)]
    assert deviations(tied_embeddings=True)[:2] == [pytest.approx(0.02, abs=6e-4), pytest.approx(0.01, abs=6e-4)]
    scaled = deviations(topology="completep", topology_options=TopologyOptions(base_dim=16, base_num_blocks=1))
    assert scaled[2] == pytest.approx(0.25, rel=0.01)  # base_dim^-1/2: the logits are scaled by base_dim / dim instead


def test_logit_softcap():
    recipe = ModelRecipe(dim=16, num_blocks=1, num_heads=2, seq_len=4, vocab_size=64)
    plain = build_model(recipe).model(torch.arange(4).unsqueeze(0))
    capped = build_model(recipe.model_copy(update={"logit_softcap": 0.5})).model(torch.arange(4).unsqueeze(0))
    assert torch.allclose(capped, 0.5 * torch.tanh(plain / 0.5), atol=1e-6) and capped.abs().max() <= 0.5


def test_a_constant_gate_may_be_any_number():
    assert ResidualSpec(gate=2).constant_gate == 2.0
    assert (
        ResidualSpec(gate=Learned(0.0, "scalar")).constant_gate
        is ResidualSpec(gate=TokenGate(-2.0)).constant_gate
        is None
    )

"""The probe of depth: its figures against formulas written out, its paths against the whole gradient."""

from itertools import combinations
from math import comb, exp, isclose, log

import pytest
import torch
from torch import Tensor

from megaresnorm.data.loader import Batch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.telemetry.depth.paths import distribution, draws, lengths, mean_length, wrap_path
from megaresnorm.telemetry.depth.probe import DepthProbe
from megaresnorm.telemetry.wrapped import Wrapped

SEQ, VOCAB, BLOCKS = 8, 32, 2


def recipe_of(topology: str = "pre", **model) -> Recipe:
    settings = {"dim": 16, "num_blocks": BLOCKS, "num_heads": 2, "ffn_dim": 24, "seq_len": SEQ, "vocab_size": VOCAB}
    settings |= {"topology": topology, "dropout": 0.2, "attention_softcap": 3.0} | model
    values = {"model": settings, "data": {"path": "none", "mask_documents": True}, "precision": {"compute": "fp64"}}
    return build_recipe(values | {"train": {"output": "none", "steps": 9}})


def batch() -> Batch:
    rows = torch.randint(VOCAB, (2, SEQ + 1))
    return Batch(rows[:, :-1], rows[:, 1:], torch.arange(2), torch.randint(2, (2, SEQ)).cumsum(1))


def probe_of(recipe: Recipe, part: Batch) -> tuple[DepthProbe, NativeEngine]:
    engine = NativeEngine(recipe)
    return DepthProbe(recipe.model, engine.assembled, engine, part, seed=3), engine


def seen_by(engine: NativeEngine, part: Batch) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The stream after every block, every block's probabilities of attention, and the hidden state; no dropout."""
    model, streams, probabilities = engine.model, [], []
    rows = model.rows(part.tokens, part.documents)
    stream = model.embed(part.tokens, rows)
    with torch.no_grad():
        for block in model.blocks.values():
            branch = block.attention.branch
            qkv = branch.qkv(block.attention.open(stream)[1]).view(2, SEQ, -1, branch.head_dim)
            q, k, _ = branch.rotary(qkv, branch.kv_heads, cos=rows.cos, sin=rows.sin)
            scores = torch.einsum("bsnh,bcnh->bnsc", q, k) * branch.head_dim**-0.5
            scores = 3.0 * torch.tanh(scores / 3.0)
            same = part.documents.unsqueeze(2) == part.documents.unsqueeze(1)
            probabilities.append(scores.masked_fill(~same.tril().unsqueeze(1), -torch.inf).softmax(-1))
            stream = block(stream, rows, None)
            streams.append(model.add_norm.trunk(stream))
        return streams, probabilities, model.finish(stream).local


@pytest.mark.parametrize("topology", ["pre", "deepnorm", "layerscale"])
def test_entropy_collapse_and_model_update_are_their_formulas(topology):
    """And the first probe has no update, nor does one without a step between."""
    recipe, part = recipe_of(topology), batch()
    probe, engine = probe_of(recipe, part)
    first = probe.probe(1)
    streams, probabilities, hidden = seen_by(engine, part)
    for block in range(BLOCKS):
        p = probabilities[block]
        entropy = -(p * p.clamp(min=1e-300).log()).sum(-1).mean().item()
        assert first["by_block"]["attention_entropy"][block] == pytest.approx(entropy, rel=1e-9)
        x = streams[block].view(2, SEQ, -1)
        rest = (x - x.mean(1, keepdim=True)).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
        assert first["by_block"]["collapse"][block] == pytest.approx(rest.mean().item(), rel=1e-9)
    assert first["whole"]["model_update"] is None
    assert probe.probe(1)["whole"]["model_update"] == 0.0
    with torch.no_grad():
        for parameter in engine.assembled.parameters().values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    engine.weights_changed()
    change = (seen_by(engine, part)[2] - hidden).pow(2).mean().sqrt().item()
    assert probe.probe(2)["whole"]["model_update"] == pytest.approx(change, rel=1e-9)


def gradient_along(engine: NativeEngine, part: Batch, through: frozenset[int] | None) -> Tensor:
    """Of the stream before the first block: along one path, or all of them (None)."""
    found = []

    def around(embed):
        def kept(*arguments):
            stream = embed(*arguments)
            stream.x.register_hook(found.append)
            return stream

        return kept

    with Wrapped() as wrapped:
        wrapped.method(engine.model, "embed", around)
        if through is not None:
            wrap_path(wrapped, engine.assembled, through)
        engine.probe(part, backward=True)
    return found[0]


@pytest.mark.parametrize("topology", ["pre", "deepnorm", "keel", "peri", "layerscale", "gated"])
def test_the_gradient_is_the_sum_of_those_of_all_paths(topology):
    """Of 2^4 paths; of each length the norms that a probe reports are among those of its paths."""
    recipe, part = recipe_of(topology), batch()
    probe, engine = probe_of(recipe, part)
    with torch.no_grad():
        for name, parameter in engine.assembled.parameters().items():
            if "gate" in name.split(".")[-1]:
                parameter.uniform_(0.2, 0.9)
    engine.weights_changed()
    along = {
        frozenset(chosen): gradient_along(engine, part, frozenset(chosen))
        for length in range(5)
        for chosen in combinations(range(4), length)
    }
    whole = gradient_along(engine, part, None)
    torch.testing.assert_close(sum(along.values()), whole, rtol=1e-9, atol=1e-12)
    found = probe.probe(5)["paths"]
    measured: dict[int, list[float]] = {}
    for length, through in draws(4, 3, 5):
        measured.setdefault(length, []).append(along[through].norm().item())
    for length, norms in measured.items():
        mean = sum(norms) / len(norms)
        assert found["log_norms"][length] == pytest.approx(log(mean), rel=1e-9)
    weights = [comb(4, k) * exp(found["log_norms"][k]) for k in range(5)]
    assert found["shares"] == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-9)


def test_shares_of_paths_are_binomials_times_interpolated_norms():
    flat = distribution({0: [1.0], 1: [1.0, 1.0], 2: [1.0, 1.0], 4: [1.0]}, 4)
    assert flat["shares"] == pytest.approx([comb(4, k) / 16 for k in range(5)]) and mean_length(flat) == 2.0
    assert flat["lengths"] == [0, 1, 2, 3, 4]
    falling = distribution({0: [1.0], 1: [0.05, 0.15], 2: [0.01], 4: [0.0001]}, 4)
    assert falling["log_norms"][3] == pytest.approx(log(0.001)), "between 2 and 4"
    assert mean_length(falling) == pytest.approx(4 * 0.1 / 1.1), "a binomial distribution again"
    gone = distribution({0: [2.0], 1: [0.0], 2: [0.0], 4: [0.0]}, 4)
    assert gone["shares"] == [1.0, 0.0, 0.0, 0.0, 0.0] and gone["log_norms"][1:] == [None] * 4
    nothing = distribution({0: [0.0], 1: [float("inf")]}, 1)
    assert nothing["shares"] == [0.0, 0.0] and mean_length(nothing) is None
    deep = distribution({k: [1e-3**k if k < 100 else 0.0] for k in lengths(2000)}, 2000)
    assert isclose(sum(deep["shares"]), 1.0) and 0 < mean_length(deep) < 3, "in logarithms: C(2000, 1000) is 1e600"


def test_paths_are_drawn_anew_at_every_step_and_alike_in_every_start():
    first, second = list(draws(24, 1, 10)), list(draws(24, 1, 20))
    assert first == list(draws(24, 1, 10)) != second
    assert [length for length, _ in first] == [0, 1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 24]
    assert all(len(through) == length for length, through in first)

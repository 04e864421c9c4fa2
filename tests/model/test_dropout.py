"""Dropout inside the model: where, with which masks, and that it scales nothing it should not."""

import functools
import shutil

import pytest
import torch

from megaresnorm.assemble import build_model
from megaresnorm.kernels.dropout import Dropout
from megaresnorm.model.dropout import DropoutKey, DropoutMasks
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.recipe import ModelRecipe, PrecisionRecipe


def build(topology, p, **settings):
    recipe = ModelRecipe(
        dim=16,
        num_blocks=3,
        num_heads=2,
        seq_len=8,
        vocab_size=64,
        topology=topology,
        qk_norm="head",
        dropout=p,
        **settings,
    )
    return build_model(recipe, PrecisionRecipe(compute="fp64")).model


def masks_of(seed, rows) -> DropoutMasks:
    """Of a model that ``build`` makes."""
    return DropoutKey(seed, rows).of_stream(layout(), 32, 6)


@functools.cache
def layout():
    return build("pre", 0.0).layout


TOKENS = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
ROWS = torch.arange(16) + 160


def test_every_place_has_its_own_mask_of_the_given_rows_and_seed(monkeypatch):
    calls = []
    original = Dropout.__call__
    monkeypatch.setattr(Dropout, "__call__", lambda self, x: calls.append(self) or original(self, x))
    build("pre", 0.25)(TOKENS, dropout=DropoutKey(7, ROWS))
    keys = masks_of(7, ROWS).keys
    assert torch.equal(
        torch.stack([dropout.key for dropout in calls]), keys[[6, 0, 1, 2, 3, 4, 5]]
    )  # the embedding, then the sub-layers
    assert all(torch.equal(dropout.rows, ROWS) and dropout.probability == 0.25 for dropout in calls)
    one = torch.ones(16, 32)
    masks = [
        masks_of(seed, rows).at(site, 0.5)(one)
        for seed, rows, site in [(7, ROWS, 0), (7, ROWS, 1), (8, ROWS, 0), (7, ROWS + 1, 0)]
    ]
    for i, mask in enumerate(masks):
        assert all(not torch.equal(mask, other) for other in masks[i + 1 :])
    assert len(masks[0].unique(dim=0)) == 16  # rows differ from each other


def test_a_key_that_is_not_given_by_its_name_is_refused_and_not_dropped():
    with pytest.raises(TypeError, match="by its name"):
        build("pre", 0.25)(TOKENS, DropoutKey(1, ROWS))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_dropout_changes_the_output_in_training_only(topology):
    model, without = build(topology, 0.3), build(topology, 0.0)
    with torch.no_grad():
        for p in (*model.parameters(), *without.parameters()):
            p.add_(0.1)  # gates that start at zero would hide the branches
    assert torch.equal(model(TOKENS), without(TOKENS))
    assert not torch.allclose(model(TOKENS, dropout=DropoutKey(1, ROWS)), model(TOKENS))
    assert torch.equal(without(TOKENS, dropout=DropoutKey(1, ROWS)), without(TOKENS))


@pytest.mark.parametrize(
    "topology", ["pre", "peri", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reordered", "layerscale"))]
)
def test_what_is_added_to_the_stream_keeps_its_mean(topology):
    """The branch's contribution averaged over 4000 masks is the one without dropout, also behind a branch norm."""
    model = build(topology, 0.3)
    residual = model.blocks["0"].attention
    rows = model.rows(TOKENS)
    x, u = residual.open(model.embed(TOKENS, rows))

    def added(key):
        return model.add_norm.trunk(residual.close(x, residual.run(x, u, rows, key), key)) - x

    plain = added(None)
    total = sum(added(masks_of(seed, ROWS)) for seed in range(4000)) / 4000
    error = (total - plain).norm() / plain.norm()
    assert error < 0.03  # one mask is off by sqrt(0.3 / 0.7) = 0.65; of 4000 the mean by 0.0104


def test_the_normalised_embedding_keeps_its_mean():
    model = build("deepnorm", 0.3, embedding_norm=True)
    plain = model.embed(TOKENS, model.rows(TOKENS)).x
    total = sum(model.embed(TOKENS, model.rows(TOKENS), masks_of(seed, ROWS)).x for seed in range(4000)) / 4000
    assert (total - plain).norm() / plain.norm() < 0.03


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_masks_are_the_same_at_every_place():
    key, ones = masks_of(7, ROWS), torch.ones(16, 32)
    drop = torch.compile(lambda masks, x, site: masks.at(site, 0.5)(x), fullgraph=True)
    for site in range(4):
        assert torch.equal(drop(key, ones, site), key.at(site, 0.5)(ones))

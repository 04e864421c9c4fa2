"""The table of parameters, and initialisation from (seed, global name)."""

import subprocess
import sys

import pytest
import torch

from megaresnorm.assemble import build_model
from megaresnorm.model.init import initial_value
from megaresnorm.model.parameters import parameter_table
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.recipe import ModelRecipe, PrecisionRecipe

RECIPE = ModelRecipe(dim=32, num_blocks=3, num_heads=4, num_kv_heads=2, seq_len=8, vocab_size=70, bias=True)


def weights(recipe=RECIPE, **settings):
    return dict(build_model(recipe, **settings).model.named_parameters())


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_the_table_is_the_model(topology, norm):
    """Names, order and shapes; building checks it as well, so that a stage or a shard can trust the table."""
    recipe = RECIPE.model_copy(update={"topology": topology, "norm": norm, "qk_norm": "full", "positions": "learned"})
    built = build_model(recipe).model.named_parameters()
    assert [(s.name, s.shape) for s in parameter_table(recipe).values()] == [(n, tuple(p.shape)) for n, p in built]
    for spec in parameter_table(recipe).values():
        assert sum(part.rows for part in spec.parts) == spec.shape[0]
        assert spec.decay == (
            spec.name.endswith("weight") and "norm" not in spec.name and "token_gate" not in spec.name
        )


def test_initial_weights_are_a_function_of_seed_and_name():
    first, again, other = weights(seed=1), weights(seed=1), weights(seed=2)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["blocks.1.ffn.branch.down.weight"], other["blocks.1.ffn.branch.down.weight"])
    # A deeper model, or one built in another order, has the same matrices by the same names (pre has no depth gains).
    shallow, deep = (RECIPE.model_copy(update={"num_blocks": n, "topology": "pre"}) for n in (3, 5))
    deeper = weights(deep)
    assert all(torch.equal(p, deeper[n]) for n, p in weights(shallow).items())


def test_fp64_and_fp32_start_from_the_same_numbers():
    single, double = weights(), weights(precision=PrecisionRecipe(compute="fp64"))
    assert all(torch.equal(single[n].double(), double[n]) for n in single)


def test_part_of_a_fused_matrix_can_be_drawn_alone():
    """Each logical matrix has its own stream, so q does not depend on how many key heads follow it."""
    one = parameter_table(RECIPE)["blocks.0.attention.branch.qkv.weight"]
    two = parameter_table(RECIPE.model_copy(update={"num_kv_heads": 4}))["blocks.0.attention.branch.qkv.weight"]
    q_one, q_two = (initial_value(s, 7, torch.float32, torch.device("cpu"))[:32] for s in (one, two))
    assert torch.equal(q_one, q_two)


def test_tied_embeddings_are_one_parameter():
    model = build_model(RECIPE.model_copy(update={"tied_embeddings": True})).model
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_vocabulary_is_padded_and_the_padding_never_predicted():
    model = build_model(RECIPE).model
    assert model.embedding.weight.shape[0] == 128 and model(torch.zeros(1, 8, dtype=torch.long)).shape == (8, 70)
    model(torch.zeros(1, 8, dtype=torch.long)).logsumexp(-1).sum().backward()
    assert not model.head.weight.grad[70:].any()


def test_building_a_model_needs_its_own_size_and_one_tensor():
    """Peak resident memory of a process that builds 520 MB of weights, whose largest tensor has 100 MB."""
    script = """
def peak():  # of this program alone; getrusage would count what the parent process held when it forked
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
from megaresnorm.assemble import build_model
from megaresnorm.model.parameters import parameter_table
from megaresnorm.recipe import ModelRecipe
small = ModelRecipe(dim=16, num_blocks=1, num_heads=2, seq_len=8, vocab_size=70)
build_model(small)  # whatever the first build loads or allocates for good
recipe = ModelRecipe(dim=512, num_blocks=24, num_heads=8, seq_len=8, vocab_size=51200)
before = peak()
model = build_model(recipe)
grown = peak() - before
sizes = [4 * s.num_elements for s in parameter_table(recipe).values()]
print(grown, sum(sizes), max(sizes))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    grown, size, largest = map(int, out.split())
    assert size > 500e6 and largest > 100e6
    assert 0.9 * size < grown <= size + largest + 16e6  # 16 MB for what the allocator rounds up

"""What cannot be sharded is refused in one line, before any process group starts; what can is sharded completely."""

import json
import re
from dataclasses import replace

import pytest
import torch.distributed as dist

from megaresnorm.assemble import build_model
from megaresnorm.errors import ConfigError
from megaresnorm.layout import check_layout, split_stages
from megaresnorm.model.parameters import parameter_table
from megaresnorm.parallel.mesh import Axis, ParallelContext
from megaresnorm.parallel.stages import bubble, split_blocks
from megaresnorm.recipe import KernelRecipe
from megaresnorm.recipe.load import build_recipe


def checked(num_ranks, model=None, train=None, precision=None, **parallel):
    sizes = {
        "dim": 24,
        "num_blocks": 6,
        "num_heads": 6,
        "num_kv_heads": 2,
        "seq_len": 9,
        "vocab_size": 100,
        "ffn_dim": 36,
    }
    recipe = build_recipe(
        {
            "model": sizes | {"vocab_multiple": 8} | (model or {}),
            "data": {"path": "none"},
            "train": {"output": "none", "steps": 1, "global_batch": 6} | (train or {}),
            "parallel": parallel,
            "precision": precision or {},
        }
    )
    return recipe, check_layout(recipe, num_ranks)


IMPOSSIBLE = [
    # the product of the axes and the number of ranks
    (1, {"tp": 2}, "= 2, but 1 rank was"),
    (3, {"tp": 2}, "= 2, but 3 ranks"),
    (2, {"pp": 3}, "= 3, but 2 ranks"),
    (2, {"tp": 2, "pp": 2}, "= 4, but 2 ranks"),
    (6, {"tp": 2, "pp": 2}, "= 4, but 6 ranks"),
    (4, {"dp_replicate": 3}, "dp_replicate 3"),
    (4, {"dp_replicate": 1}, "= 1, but 4 ranks"),
    (4, {"dp_shard": 3}, "dp_shard 3"),
    (8, {"dp_shard": 3, "tp": 2}, "= 6, but 8 ranks"),
    (8, {"dp_shard": 4, "dp_replicate": 4}, "= 16, but 8 ranks"),
    (7, {"pp": 2, "dp_shard": 2, "tp": 2}, "= 8, but 7 ranks"),
    (16, {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "tp": 1}, "= 8, but 16 ranks"),
    # sizes that are no counts
    (1, {"tp": 0}, "parallel.tp"),
    (1, {"pp": -1}, "parallel.pp"),
    (1, {"dp_shard": 0}, "parallel.dp_shard"),
    (1, {"dp_replicate": 0}, "parallel.dp_replicate"),
    (1, {"tp": 1.5}, "parallel.tp"),
    (1, {"tp": "2"}, "parallel.tp"),
    # names and settings without effect
    (1, {"tensor_parallel": 2}, "tensor_parallel"),
    (2, {"tp": 2, "tensor_layout": "rows"}, "parallel.tensor_layout"),
    (2, {"pp": 2, "pipeline": "zero-bubble"}, "parallel.pipeline"),
    (2, {"dp_shard": 2, "shard": "optimizer"}, "parallel.shard"),
    (2, {"tp": 2, "columns_norm": "merge"}, "has no effect"),
    (2, {"pp": 2, "stages_per_rank": 3}, "has no effect"),
    (2, {"pp": 2, "pipeline": "interleaved", "stages_per_rank": 1}, "parallel.stages_per_rank"),
    # heads, widths and the vocabulary
    (4, {"tp": 4}, "num_heads=6"),
    (3, {"tp": 3}, "num_kv_heads=2"),
    (6, {"tp": 6}, "num_kv_heads=2"),
    (2, {"tp": 2, "model": {"ffn_dim": 35}}, "ffn_dim=35"),
    (2, {"tp": 2, "model": {"num_kv_heads": 1}}, "num_kv_heads=1"),
    (2, {"tp": 2, "tensor_layout": "columns", "model": {"dim": 15, "num_heads": 2, "head_dim": 8}}, "dim=15"),
    (2, {"tp": 2, "model": {"vocab_multiple": 1, "vocab_size": 101}}, "vocab_multiple"),
    (2, {"tp": 2, "model": {"vocab_size": 3, "vocab_multiple": 8}}, "token for every rank"),
    # tokens of a microbatch
    (2, {"tp": 2, "tensor_layout": "tokens", "train": {"micro_batch": 1}}, "9 tokens"),
    (2, {"tp": 2, "tensor_layout": "tokens", "train": {"micro_batch": 3}}, "27 tokens"),
    # pipeline stages
    (7, {"pp": 7}, "7 pipeline stages"),
    (4, {"pp": 4, "pipeline": "interleaved"}, "8 pipeline stages"),
    (2, {"pp": 2, "pipeline": "interleaved", "stages_per_rank": 4}, "8 pipeline stages"),
    (2, {"pp": 2, "stage_blocks": [3, 2]}, "hold 5 blocks"),
    (2, {"pp": 2, "stage_blocks": [6]}, "1 stages"),
    (2, {"pp": 2, "stage_blocks": [2, 2, 2]}, "3 stages"),
    (2, {"pp": 2, "stage_blocks": [7, -1]}, "stage_blocks"),
    (3, {"pp": 3, "stage_blocks": [3, 0, 3]}, "only the first and the last stage"),
    # the type that would be gathered
    (
        2,
        {"tp": 2, "tensor_layout": "columns", "columns_norm": "gather", "precision": {"compute": "bf16"}},
        "residual_dtype=bf16",
    ),
]


@pytest.mark.parametrize(("num_ranks", "parallel", "says"), IMPOSSIBLE, ids=lambda v: str(v)[:60])
def test_impossible_layouts_are_refused_in_one_line(num_ranks, parallel, says):
    with pytest.raises(ConfigError) as caught:
        checked(num_ranks, **parallel)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("num_ranks", "parallel"), [(r, p) for r, p, says in IMPOSSIBLE if re.search(r"= \d+, but", says)]
)
def test_what_is_offered_instead_fits(num_ranks, parallel):
    with pytest.raises(ConfigError) as caught:
        checked(num_ranks, **parallel)
    offers = re.split(r"(?:were|was) started; ", str(caught.value))[1].split(", or ")
    needed = int(offers[0].split()[1])
    assert checked(needed, **parallel)[1].num_ranks == needed
    assert num_ranks > 1 or f"(megaresnorm launch RECIPE --gpus-per-node {needed} " in offers[0]
    for offer in offers[1:]:
        if offer.startswith("parallel.dp_shard in "):
            for shard in json.loads(offer.removeprefix("parallel.dp_shard in ")):
                assert checked(num_ranks, **parallel | {"dp_shard": shard})[1].num_ranks == num_ranks
            continue
        sizes = {key: int(value) for key, value in (pair.split("=") for pair in offer.split())}
        assert checked(num_ranks, **parallel | sizes)[1].num_ranks == num_ranks


def test_a_loss_kernel_by_name_is_refused_where_the_vocabulary_is_divided():
    recipe, _ = checked(2, tp=2)
    tp = replace(ParallelContext.single(), tp=Axis("tp", 2))
    with pytest.raises(
        ConfigError,
        match=r"kernels.cross_entropy=reference knows no vocabulary sharded over parallel.tp=2; use auto or chunked",
    ):
        build_model(recipe.model, kernels=KernelRecipe(cross_entropy="reference"), parallel=recipe.parallel, context=tp)


def test_ranks_that_are_left_replicate():
    assert checked(8, tp=2)[1].dp_replicate == 4
    assert checked(8, tp=2, dp_shard=2)[1].dp_replicate == 2


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 7, 16])
@pytest.mark.parametrize("num_blocks", [16, 17, 30, 31, 80])
def test_no_block_is_ever_dropped(num_blocks, stages):
    for last in (0.0, 0.5, 3.0, 40.0):
        ranges = split_blocks(num_blocks, stages, block=1.0, first=0.1, last=last)
        assert [b for r in ranges for b in r] == list(range(num_blocks)) and len(ranges) == stages


def test_stages_are_balanced_by_cost():
    """An output matrix as dear as three blocks takes their place; without one the blocks are shared out evenly."""
    assert [len(r) for r in split_blocks(29, 4, block=1.0, first=0.0, last=3.0)] == [8, 8, 8, 5]
    assert [len(r) for r in split_blocks(8, 4, block=1.0, first=0.0, last=0.0)] == [2, 2, 2, 2]


def test_stages_by_hand_and_the_embeddings_place():
    stages = split_stages(*(lambda r: (r.model, r.parallel))(checked(3, pp=3, stage_blocks=[1, 5, 0])[0]))
    assert [list(s.blocks) for s in stages] == [[0], [1, 2, 3, 4, 5], []]
    assert [(s.has_embedding, s.has_head) for s in stages] == [(True, False), (False, False), (False, True)]


def test_bubble_formula():
    assert bubble(4, 4) == 3 / 7 and bubble(4, 12) == 0.2 and bubble(4, 4, 2) == 3 / 11 and bubble(1, 9) == 0.0


@pytest.mark.parametrize("layout", ["full", "tokens", "columns"])
def test_every_parameter_says_how_it_lies_on_the_ranks(layout):
    """Exactly the parameters that are replicated but work on a shard of the stream have partial gradients."""
    recipe, _ = checked(
        1,
        model={"topology": "layerscale", "norm": "layernorm", "bias": True, "qk_norm": "head", "positions": "learned"},
    )
    table = parameter_table(recipe.model, layout)
    stream = re.compile(r"norm_(in|out|branch)|final_norm|positions|(attention|ffn)\.gate$|(out|down)\.bias")
    for name, spec in table.items():
        if stream.search(name):
            assert (spec.split is not None, spec.partial) == (layout == "columns", layout == "tokens"), name
        elif "q_norm" in name or "k_norm" in name:
            assert spec.split is None and spec.partial, name
        else:
            assert spec.split == (1 if name.endswith(("out.weight", "down.weight")) else 0) and not spec.partial, name

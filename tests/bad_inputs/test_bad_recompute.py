"""Recomputation as no run can have it costs one line that says what to do."""

import re

import pytest
from refused import refused
from test_bad_execution import recipe

from megaresnorm.errors import ConfigError
from megaresnorm.layout import check_execution
from megaresnorm.parallel.mesh import Sizes

GOOD = """
model: {dim: 64, num_blocks: 4, num_heads: 4, seq_len: 32}
data: {path: data}
train: {output: out, steps: 10, global_batch: 8}
"""
POLICIES = "none, norm, attention, ffn, branch, block, every, auto"
SIZE = "wanted a size such as 20GiB, or a share of the device's memory above 0 and at most 1, such as 0.9"
RANGES = "wanted a list of ranges, as in '[{first: 0, last: 9, policy: block}]'"
TOKENS = "parallel.tp=2 parallel.tensor_layout=tokens"


def ranges(*items: str) -> str:
    """An override without blanks, which stand between overrides below."""
    quoted = (re.sub(r"(\w+): ", r'"\1":', item).replace(" ", "") for item in items)
    return f"recompute.blocks=[{','.join(f'{{{item}}}' for item in quoted)}]"


OVERRIDES = [
    # what stands in the place of the section
    ("recompute=full", f"recompute.policy='full': wanted one of {POLICIES}; did you mean block"),
    ("recompute=selective", "did you mean norm (what is cheap), or attention or ffn"),
    ("recompute=blck", "did you mean block?"),
    ("recompute=Block", "did you mean block?"),
    ("recompute=off", "did you mean none?"),
    ("recompute=uniform", "did you mean every, with recompute.every?"),
    ("recompute=3", f"one of {POLICIES}, or a section with keys; did you mean '{{policy: every, every: 3}}'?"),
    ("recompute=0.6", "did you mean '{policy: auto, budget: 0.6}'?"),
    ("recompute=-1", "recompute=-1: wanted a policy, one of"),
    ("recompute=1" + "0" * 300, "recompute=a whole number of over 60 digits: wanted a policy"),
    ("recompute=.nan", "recompute=nan: wanted a policy, one of"),
    ("recompute=true", f"recompute=True: wanted a policy, one of {POLICIES}, or a section with keys; did you mean"),
    ("recompute=false", "did you mean none?"),
    ("recompute=", "recompute=None: wanted a policy, one of"),
    ("recompute=[block]", "recompute=['block']: wanted a policy, one of"),
    ("recompute=[]", "recompute=[]: wanted a policy, one of"),
    ("recompute={}x", "not valid YAML"),
    ("recompute.policy=", f"recompute.policy=None: wanted one of {POLICIES}; did you mean none?"),
    ("recompute.policy=true", "did you mean block (all but one tensor of each block)?"),
    ("recompute.policy=[block]", f"wanted one of {POLICIES}"),
    ("recompute.policy.block=true", f"wanted one of {POLICIES}"),
    ("recompute.policy=" + "block" * 2000, f"wanted one of {POLICIES}"),
    ("recompute.polici=block", "did you mean recompute.policy?"),
    ("recompute.block=true", "did you mean recompute.policy? (block)"),
    ("recompute.granularity=full", "did you mean recompute.policy? (block for full"),
    ("recompute.foo=1", "recompute has blocks, budget, every, gathered, offload, policy"),
    # every
    ("recompute=every", "recompute.policy=every needs recompute.every, the blocks that keep one tensor together"),
    ("recompute=every recompute.every=", "recompute.policy=every needs recompute.every"),
    ("recompute=every recompute.every=0", "recompute.every=0: wanted greater than or equal to 1"),
    ("recompute=every recompute.every=-2", "recompute.every=-2: wanted greater than or equal to 1"),
    ("recompute=every recompute.every=two", "recompute.every='two': wanted integer, got a str"),
    ("recompute=every recompute.every=2.0", "recompute.every=2.0: wanted integer, got a float"),
    ("recompute=every recompute.every=true", "recompute.every=True: wanted integer, got a bool"),
    ("recompute=every recompute.every=[2]", "recompute.every=[2]: wanted integer, got a list"),
    ("recompute=every recompute.every=5", "recompute.every=5 is more than model.num_blocks=4; use at most that, and 1"),
    ("recompute=every recompute.every=99999999999999999999", "recompute.every=99999999999999999999: wanted less than"),
    ("recompute.every=2", "recompute.every=2 has no effect with recompute.policy=none; use policy every"),
    ("recompute.every=2 recompute=block", "recompute.every=2 has no effect with recompute.policy=block; use policy "
     "every, or recompute.every=null"),
    # budget
    *((f"recompute=auto recompute.budget={value}", SIZE) for value in (
        "0", "-1", "0.0", "-0.5", "1.5", "true", ".nan", ".inf", "[0.5]", "{}", "'0.6'", "60%", "20GiBs", "GiB", "lots",
        "-20GiB", "0GiB", "1e300GB", "nanGB", "infGB", "1e10", "99999999999999999999", "1" + "0" * 300, "x" * 5000,
    )),
    ("recompute=auto recompute.budget=1", "a number without unit is in bytes, at least 1MiB; did you mean 1.0?"),
    ("recompute=auto recompute.budget=90", "did you mean 90GiB?"),
    ("recompute=auto recompute.budget=4KB", "at least 1MiB"),
    ("recompute.budget=20GiB", "recompute.budget=20GiB has no effect with recompute.policy=none; use policy auto"),
    ("recompute=block recompute.budget=0.5", "use policy auto, or recompute.budget=null"),
    # ranges of blocks
    (ranges("first: 0, last: 1, policy: block", "first: 1, last: 2, policy: none"), "0-1 and 1-2 overlap"),
    (ranges("first: 2, last: 3, policy: norm", "first: 0, last: 2, policy: ffn"), "0-2 and 2-3 overlap"),
    (ranges("first: 1, last: 1, policy: norm", "first: 1, last: 1, policy: norm"), "1-1 and 1-1 overlap"),
    (ranges("first: 2, last: 1, policy: block"), "first=2 is after last=1; give the smaller number first"),
    (ranges("first: 2, last: 4, policy: block"), "2-4 is not within the blocks 0-3 of model.num_blocks=4"),
    (ranges("first: -1, last: 2, policy: block"), "recompute.blocks.0.first=-1: wanted greater than or equal to 0"),
    (ranges("first: 0.0, last: 2, policy: block"), "recompute.blocks.0.first=0.0: wanted integer, got a float"),
    (ranges("first: 0, last: 999999999999, policy: block"), "recompute.blocks.0.last=999999999999: wanted less than"),
    (ranges("first: 0, last: 2, policy: auto"), "every and auto are for recompute.policy alone"),
    (ranges("first: 0, last: 2, policy: every"), "every and auto are for recompute.policy alone"),
    (ranges("first: 0, last: 2, policy: full"), "recompute.blocks.0.policy='full': wanted one of none, norm"),
    (ranges("first: 0, last: 2, policy: blck"), "did you mean block?"),
    (ranges("first: 0, last: 2, policy: null"), "recompute.blocks.0.policy=None: wanted one of none, norm"),
    (ranges("first: 0, last: 2"), "recompute.blocks.0.policy is missing; add it there"),
    (ranges(""), "recompute.blocks.0.first is missing; add it there"),
    (ranges("first: 0, last: 2, policy: block, every: 2"), "recompute.blocks.0 has first, last, policy"),
    (ranges("frst: 0, last: 2, policy: block"), "did you mean recompute.blocks.0.first?"),
    (ranges("first: 0, last: 2, policy: block, offload: true"), "recompute.blocks.0.offload: no such setting"),
    (ranges("first: 0, last: 3, policy: norm") + " recompute=block", "recompute.policy=block has no effect: "
     "recompute.blocks has another policy for all 4 blocks"),
    (ranges("first: 0, last: 1, policy: norm") + " recompute=auto", "recompute.blocks does not go with "
     "recompute.policy=auto, which chooses for every block; remove one"),
    *((f"recompute.blocks={value}", RANGES) for value in (
        "", "3", "block", "{}", "[block]", "[0,1]", "[[0,2,block]]", "[null]", '{"first":0,"last":2,"policy":block}',
    )),
    ("recompute.blocks.0.policy=block", RANGES),
    # offload and gathered
    *((f"{policy} recompute.offload=true", "it moves the tensors between blocks of policy block or every; use one of")
      for policy in ("recompute=none", "recompute=norm", "recompute=attention", "recompute=branch")),
    ("recompute=block recompute.offload=yes", "recompute.offload='yes': wanted boolean, true or false"),
    ("recompute=block recompute.offload=1", "recompute.offload=1: wanted boolean, true or false"),
    ("recompute=block recompute.offload=", "recompute.offload=None: wanted boolean, true or false"),
    ("recompute=block recompute.offload=true train.compile=cuda_graphs", "recompute.offload=true does not go with "
     "train.compile=cuda_graphs"),
    (f"recompute=block recompute.gathered=keep {TOKENS}", "recompute.gathered=keep does not go with "
     "recompute.policy=block: whole rows would be a second tensor"),
    (f"recompute=every recompute.every=2 recompute.gathered=keep {TOKENS}", "recompute.gathered=keep does not go with"),
    ("recompute=norm recompute.gathered=keep", "no effect with parallel.tensor_layout=full; remove it"),
    (f"recompute.gathered=true {TOKENS}", "recompute.gathered=True: wanted one of again, keep"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "wanted"), OVERRIDES, ids=lambda v: v[:50])
def test_settings_that_no_run_can_have_cost_one_line(overrides, wanted, tmp_path, capfd):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    refused(["train", "--dry-run", path, *overrides.split(" ")], wanted, tmp_path, capfd)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "recompute=None: wanted a policy"),
        ("7", "did you mean '{policy: every, every: 7}'?"),
        ("on", "recompute.policy='on': wanted one of"),
        ("[norm, block]", "recompute=['norm', 'block']: wanted a policy"),
        ("{policy: block, policy: norm}", "key 'policy' is given twice"),
        ("{policy: auto, budget: 1}", "did you mean 1.0?"),
        ("{blocks: [" + "{first: 0, last: 0, policy: norm}," * 900 + "]}", "0-0 and 0-0 overlap"),
        ("{blocks: [" + "{first: 0, last: 0, policy: norm}," * 1200 + "]}", "over 8,000 values"),
    ],
)
def test_a_file_with_such_a_section_costs_one_line(text, wanted, tmp_path, capfd):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{GOOD}recompute: {text}\n")
    refused(["train", "--dry-run", path], wanted, tmp_path, capfd)


@pytest.mark.parametrize("policy", ["block", "auto"])
def test_compiled_blocks_of_fsdp_are_not_run_again_as_a_whole(policy):
    with pytest.raises(ConfigError, match=rf"recompute\.policy={policy} runs whole blocks again, around FSDP2's hooks"):
        check_execution(recipe(train={"compile": "blocks"}, recompute={"policy": policy}), Sizes(dp_shard=2), "cuda")
    check_execution(recipe(train={"compile": "blocks"}, recompute={"policy": "branch"}), Sizes(dp_shard=2), "cuda")
    check_execution(recipe(train={"compile": "blocks"}, recompute={"policy": policy}), Sizes(), "cuda")

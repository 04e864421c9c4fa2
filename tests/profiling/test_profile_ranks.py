"""Profiles of several ranks: every rank's time adds up, and what is slow is named with its rank."""

import random
from pathlib import Path

import pytest
from launched import be_rank
from live_storages import live_storages
from profiled import profiled, slow_backward, slow_collective, slow_forward, slow_loader, slow_rank, slowed
from test_profile import check_trace

from megaresnorm.kernels.cross_entropy import differentiate
from megaresnorm.run import Run
from megaresnorm.testing import run_ranks
from megaresnorm.trainer import Trainer

MODEL = {"dim": 32, "num_blocks": 4, "num_heads": 4, "seq_len": 32, "ffn_dim": 64}
LAYOUTS = {
    "tp2 full": {"tp": 2},
    "tp2 tokens": {"tp": 2, "tensor_layout": "tokens"},
    "tp2 columns": {"tp": 2, "tensor_layout": "columns"},
    "pp2": {"pp": 2},
    "pp2 interleaved": {"pp": 2, "pipeline": "interleaved", "stages_per_rank": 2},
    "fsdp2": {"dp_shard": 2},
    "dp2": {"dp_replicate": 2},
}


def on_rank(rank, num_ranks, recipe, disturb):
    be_rank(rank, num_ranks)
    return profiled(recipe) if disturb is None else profiled(recipe, disturb)


def profile_of(num_ranks, recipe, disturb=None):
    return run_ranks(num_ranks, on_rank, num_ranks, recipe, disturb)[0]


def made(tiny, parallel, steps=4, recompute=None, **train):
    settings = {"profile": {"start": 2, "steps": steps}, "steps": 99, "global_batch": 8, "micro_batch": 2, **train}
    return tiny(model=MODEL, train=settings, parallel=parallel, recompute=recompute or {})


def check_sums(profile):
    for rank in profile["ranks"]:
        parts = sum(rank[f"{n}_ms"] for n in ("own", "exposed", "bubble", "data", "host", "unaccounted"))
        assert abs(parts / rank["step_ms"] - 1.0) < 1e-3
        assert rank["unaccounted_ms"] < 0.2 * rank["step_ms"]  # of a step of some milliseconds


def check_layout(profile, layout, recompute=None):
    """What a layout is known by."""
    rows = {row["name"]: row for row in profile["rows"]}
    if layout.startswith("tp2"):
        assert all(rows[f"block {b} ffn"]["exposed"] for b in range(4))
        assert all(rows[f"block {b} attention"]["hidden"] for b in range(4))
        # Blocks that are run again gather their first input where they begin.
        shares = "columns" in layout or ("tokens" in layout and recompute == {"policy": "block"})
        assert all((rows[f"block {b} norm"]["exposed"] is not None) == shares for b in range(4))
    if layout.startswith("pp2"):
        stages = [rows[f"block {b} ffn"]["stage"] for b in range(4)]
        assert stages == ([0, 1, 2, 3] if "interleaved" in layout else [0, 0, 1, 1])
        assert profile["whole"]["bubble"]["p50"] > 0 and 0 < profile["whole"]["ideal_bubble"] < 0.3
    if layout == "fsdp2":
        assert all(rows[f"block {b} weights"]["exposed"] for b in range(4))
    assert rows["gradients"]["exposed"] is not None or layout.startswith(("tp2", "pp2"))


def test_stages_and_tensor_parallel_ranks_add_up_and_send_arrows(tiny):
    recipe = made(tiny, {"tp": 2, "pp": 2})
    profile = profile_of(4, recipe)
    check_sums(profile)
    check_layout(profile, "pp2")
    assert [(r["pp"], r["tp"]) for r in profile["ranks"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    path = Path(recipe.train.output) / "profile" / "trace.json.gz"
    events = check_trace(path, 4, profile["step_ms"]["p50"])
    # 3 steps, 4 microbatches, 2 ranks of tp: a forward and a backward arrow between the two stages each.
    assert sum(e["ph"] == "s" for e in events) == 3 * 4 * 2 * 2


@pytest.mark.parametrize(
    ("layout", "disturb", "named"),
    [
        ("dp2", slow_rank(1, 0.002), "rank 1 on "),
        ("tp2 full", slow_collective(2, 0.02), "block 2 ffn: its exposed communication takes"),
    ],
    ids=["rank", "collective"],
)
def test_a_slow_rank_and_a_slow_collective_are_named(tiny, layout, disturb, named):
    profile = profile_of(2, made(tiny, LAYOUTS[layout], steps=6), disturb)
    check_sums(profile)
    check_layout(profile, layout)
    assert any(finding.startswith(named) for finding in profile["findings"]), profile["findings"]


def kept_on_rank(rank, recipe):
    """What rows keep of a microbatch, and what is alive after its forward pass."""
    be_rank(rank, 2)
    with Run(recipe) as run:
        trainer = Trainer(run)
        while run.steps_done < trainer.profiler.last_step:
            trainer.step()
        part = run.next_batch().microbatches[0]
        passes, model = run.engine.passes, run.engine.model
        live = live_storages(lambda: passes.train(model, part, 1.0)[1], differentiate)
    profile = run.largest(0) or trainer.profiler.profile
    rows = [] if profile is None else [r["activation_bytes"] or 0 for r in profile["rows"]]
    return [sum(rows), live.kept]


@pytest.mark.parametrize(
    "layout", [pytest.param("tp2 full", marks=pytest.mark.slow), pytest.param("tp2 tokens", marks=pytest.mark.slow),
               "tp2 columns"]
)  # fmt: skip
def test_kept_bytes_are_the_live_storages_under_messages(tiny, layout):
    (found, live), _ = run_ranks(2, kept_on_rank, made(tiny, LAYOUTS[layout]))
    assert found == pytest.approx(live, rel=0.05)


def test_what_follows_backward_is_own_work(tiny):
    """A rank that is slow after its backward pass would otherwise seem to wait."""

    def slow_collect(wrapped, run):
        wrapped.method(run.engine._optimizer, "collect", lambda collect: slowed(collect, 0.05))

    profile = profile_of(2, made(tiny, LAYOUTS["dp2"]), slow_collect)
    (gradients,) = (row for row in profile["rows"] if row["name"] == "gradients")
    assert gradients["backward"]["p50"] > 49.0


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [None, {"policy": "branch"}, {"policy": "block"}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_adds_up(tiny, layout, recompute):
    profile = profile_of(2, made(tiny, LAYOUTS[layout], recompute=recompute))
    check_sums(profile)
    check_layout(profile, layout, recompute)
    again = [row["recompute"] is not None for row in profile["rows"] if row["part"] in ("attention", "ffn")]
    assert len(again) == 8 and (all(again) if recompute else not any(again))


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_of_deepspeed_add_up(tiny, stage):
    train = {"profile": {"start": 2, "steps": 4}, "steps": 99, "global_batch": 8, "micro_batch": 2}
    engine = {"name": "deepspeed", "zero_stage": stage}
    recipe = tiny(model=MODEL, train=train, parallel={"dp_replicate": 2}, engine=engine)
    profile = profile_of(2, recipe)
    check_sums(profile)
    assert {row["name"] for row in profile["rows"]} >= {f"block {b} ffn" for b in range(4)} | {"gradients"}
    held = {row["name"]: row["parameter_bytes"] for row in profile["rows"]}
    assert held["block 1 ffn"] == 4 * 3 * 32 * 64 // (2 if stage == 3 else 1)


@pytest.mark.slow
def test_compiled_blocks_are_rows(tiny):
    train = {"profile": {"start": 3, "steps": 4}, "steps": 99, "compile": "blocks"}
    profile = profiled(tiny(model=MODEL, train=train))
    rows = {row["name"]: row for row in profile["rows"]}
    (name,) = [name for name in rows if name.startswith("blocks ")]
    assert name == "blocks 0-3" and rows[name]["forward"] and rows[name]["backward"]
    assert rows[name]["flops"] == 4 * 256 * (6 * 32 * 64 + 8 * 32 * 32 + 2 * 32 * 32) // 8 * 4
    check_sums(profile)


TWENTY = [
    *(("forward", block, None) for block in (0, 1, 2, 3)),
    *(("backward", block, None) for block in (0, 1, 2, 3)),
    *(("rank", rank, layout) for rank in (0, 1) for layout in ("dp2", "tp2 tokens")),
    *(("loader", 0, layout) for layout in (None, "dp2", "tp2 full", "pp2")),
    *(("collective", block, layout) for block, layout in ((0, "tp2 full"), (1, "tp2 tokens"), (2, "tp2 columns"),
                                                          (3, "tp2 full"))),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "where", "layout"), TWENTY)
def test_twenty_of_twenty(tiny, kind, where, layout):
    seconds = random.Random(f"{kind} {where}").uniform(0.01, 0.03)
    disturb = {
        "forward": lambda: slow_forward(where, seconds),
        "backward": lambda: slow_backward(where, seconds),
        "rank": lambda: slow_rank(where, seconds / 10),
        "loader": lambda: slow_loader(seconds),
        "collective": lambda: slow_collective(where, seconds),
    }[kind]()
    named = {
        "forward": f"block {where} ffn: its forward pass takes",
        "backward": f"block {where} ffn: its backward pass takes",
        "rank": f"rank {where} on ",
        "loader": "data: rank ",
        "collective": f"block {where} ffn: its exposed communication takes",
    }[kind]
    recipe = made(tiny, LAYOUTS[layout] if layout else {}, steps=8)
    profile = profiled(recipe, disturb) if layout is None else profile_of(2, recipe, disturb)
    assert any(finding.startswith(named) for finding in profile["findings"]), profile["findings"]

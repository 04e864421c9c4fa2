"""Where a step's time and memory go is found, adds up, and changes nothing of the step."""

import gzip
import json
from math import hypot
from pathlib import Path

import pytest
import torch
from live_storages import live_storages
from profiled import profiled, slow_backward, slow_forward, slow_loader

from megaresnorm.cli import main
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.kernels.cross_entropy import differentiate
from megaresnorm.model.cost import training_flops
from megaresnorm.profiling.findings import findings_of
from megaresnorm.profiling.profile import COLUMNS, problem_of, read_profile, total_of
from megaresnorm.profiling.rows import NUM_PHASES, Phase, Row, Rows
from megaresnorm.profiling.show import changes
from megaresnorm.profiling.timeline import CpuClock, Timeline, clock_of
from megaresnorm.profiling.window import SPLIT
from megaresnorm.recipe.load import build_recipe, dump_recipe
from megaresnorm.run import Run
from megaresnorm.telemetry.depth.records import read_depth
from megaresnorm.trainer import Trainer, train

WINDOW = {"start": 2, "steps": 4}
SMALL = {"dim": 32, "num_blocks": 4, "num_heads": 4, "seq_len": 32, "ffn_dim": 64}


@pytest.fixture
def recipe(tiny):
    def make(model=None, train=None, **sections):
        settings = {"profile": WINDOW, "steps": 40, "global_batch": 8, "micro_batch": 4, **(train or {})}
        return tiny(model={**SMALL, **(model or {})}, train=settings, **sections)

    return make


def row(profile, name):
    return next(row for row in profile["rows"] if row["name"] == name)


def sums_up(profile):
    """Rows, bubble, data, host and what is unaccounted make up a step: by their means on the one rank."""
    parts = sum(row[c]["mean"] for row in profile["rows"] for c in COLUMNS if row[c] and c not in INSIDE)
    whole = profile["whole"]
    parts += sum(whole[name]["mean"] for name in ("bubble", "data", "host", "unaccounted") if whole[name])
    return parts / profile["step_ms"]["mean"]


INSIDE = ("hidden", "input_grad", "weight_grad")  # of columns, what is in others


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_models_of_few_blocks_are_profiled(recipe, blocks):
    profile = profiled(recipe(model={"num_blocks": blocks}, train={"profile": {"start": 2, "steps": 6}}))
    assert sum(r["part"] == "ffn" for r in profile["rows"]) == blocks


def test_rows_make_up_the_step(recipe):
    profile = profiled(recipe())
    assert abs(sums_up(profile) - 1.0) < 1e-3
    assert profile["whole"]["unaccounted"]["p50"] < 0.2 * profile["step_ms"]["p50"]  # of a step of some milliseconds
    parts = {(row["block"], row["part"]) for row in profile["rows"]}
    assert {(b, part) for b in range(4) for part in ("attention", "ffn", "norm")} <= parts
    assert {(None, part) for part in ("embedding", "head", "gradients")} <= parts
    for each in profile["rows"]:
        if each["part"] in ("attention", "ffn"):
            assert all(each[c] is not None for c in ("forward", "backward", "input_grad", "weight_grad", "optimizer"))
            assert each["recompute"] is None and each["exposed"] is None
    assert profile["num_steps"] == 4 and profile["first_step"] == 2


LLAMA = {"num_kv_heads": 2, "norm": "rmsnorm", "ffn": "swiglu", "positions": "rope", "topology": "pre"}
GPT = {"ffn": "gelu", "norm": "layernorm", "positions": "learned", "tied_embeddings": True, "attention_bias": "all"}
GEMMA = {"ffn": "geglu", "head_dim": 16, "num_kv_heads": 1, "topology": "peri", "qk_norm": "head"}


def by_hand(model):
    """FLOPs of one token's forward pass: (attention, ffn, output matrix), written without the code's own cost."""
    d, s, heads, f, v = 32, 32, 4, 64, model.padded_vocab_size
    width = (model.head_dim or d // heads) * heads
    kv = (model.num_kv_heads or heads) * (model.head_dim or d // heads)
    attention = 2 * d * width + 2 * 2 * d * kv + 2 * width * d + (2 * width * s + 2 * width * s) // 2
    matrices = 3 if model.ffn in ("swiglu", "geglu") else 2
    return attention, matrices * 2 * d * f, 2 * d * v + 5 * v


@pytest.mark.parametrize("family", [LLAMA, GPT, GEMMA], ids=["llama", "gpt", "gemma"])
def test_flops_are_those_of_a_hand_count(recipe, family):
    made = recipe(model=family, train={"profile": {"start": 1, "steps": 1}})
    with Run(made) as run:
        model, trainer = run.recipe.model, Trainer(run)
        while run.steps_done < trainer.profiler.last_step:
            trainer.step()
    profile, tokens = trainer.profiler.profile, 8 * 32
    attention, ffn, head = by_hand(model)
    assert {row(profile, f"block {b} attention")["flops"] for b in range(4)} == {attention * tokens}
    assert {row(profile, f"block {b} ffn")["flops"] for b in range(4)} == {ffn * tokens}
    assert row(profile, "output matrix")["flops"] == head * tokens
    assert 3 * sum(r["flops"] for r in profile["rows"]) == training_flops(model) * tokens
    seconds = profile["step_ms"]["p50"] / 1e3
    assert profile["tflops"] == pytest.approx(training_flops(model) * tokens / seconds / 1e12, rel=1e-6)


@pytest.mark.parametrize("topology", ["pre", "deepnorm"])
@pytest.mark.parametrize("recompute", [{}, {"policy": "branch"}, {"policy": "every", "every": 2}], ids=str)
def test_activation_bytes_are_the_live_storages(recipe, topology, recompute):
    made = recipe(model={"topology": topology}, train={"micro_batch": 8}, recompute=recompute)
    profile = profiled(made)
    kept = sum(r["activation_bytes"] for r in profile["rows"] if r["activation_bytes"] is not None)
    with Run(made) as run:
        part = run.next_batch().microbatches[0]
        passes, model = run.engine.passes, run.engine.model
        run.engine.step(run.next_batch(), 1e-3)  # what is made once is there
        live = live_storages(lambda: passes.train(model, part, 1.0)[1], differentiate)
    assert kept == pytest.approx(live.kept, rel=0.05)
    # What is run again ends with the last tensor that backward needs: before the last product, unless blocks follow in
    # the same run, or a norm does.
    tokens, (_, whole, _) = 8 * 32, by_hand(model.recipe)
    part, whole = (whole - 2 * 32 * 64) * tokens, whole * tokens
    again = [r["flops_again"] for r in profile["rows"] if r["part"] == "ffn"]
    repeats = {"branch": [part] * 4, "every": [whole, part if topology == "pre" else whole] * 2}
    assert again == repeats.get(recompute.get("policy"), [0] * 4)
    assert (profile["hfu"] > profile["mfu"]) == bool(recompute)
    attention, ffn = row(profile, "block 1 attention"), row(profile, "block 1 ffn")
    assert (attention["recompute"] is not None) == (ffn["recompute"] is not None) == bool(recompute)
    assert min(attention["transient_bytes"], ffn["transient_bytes"]) > 0
    own = sum(p.numel() * 4 for p in model.blocks["1"].ffn.branch.parameters())
    assert ffn["parameter_bytes"] == own


def test_gradients_and_streams_of_rows_are_those_of_the_watched_step(recipe, tmp_path):
    made = recipe(train={"steps": 16}, telemetry={"every": 1})
    train(made)
    profile = read_profile(made.train.output)
    watched = 1 + 2 * 4 + SPLIT + 1  # from step 2: timed and plain in turn, split, watched
    (record,) = (r for r in read_depth(made.train.output) if r["step"] == watched)
    of = record["by_block"]
    for b in range(4):
        attention, ffn, norm = (row(profile, f"block {b} {part}") for part in ("attention", "ffn", "norm"))
        assert attention["gradient_norm"] == pytest.approx(
            hypot(of["gradient_norm/qkv"][b], of["gradient_norm/out"][b]), rel=1e-4
        )
        assert ffn["gradient_norm"] == pytest.approx(
            hypot(of["gradient_norm/ffn_in"][b], of["gradient_norm/ffn_out"][b]), rel=1e-4
        )
        assert norm["gradient_norm"] == pytest.approx(of["gradient_norm/norm"][b], rel=1e-4)
        wanted = record["by_sublayer"]["stream_rms"][2 * b : 2 * b + 2]
        assert [attention["stream_rms"], ffn["stream_rms"]] == pytest.approx(wanted, rel=1e-4)
    assert row(profile, "output matrix")["gradient_norm"] == pytest.approx(
        record["whole"]["gradient_norm/head"], rel=1e-4
    )


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_profiled_run_has_the_weights_of_another(recipe, tmp_path, compute):
    digests = [
        train(
            recipe(
                train={"steps": 16, "output": str(tmp_path / f"{bool(window)}"), "profile": window},
                precision={"compute": compute},
            )
        ).weights_digest
        for window in (None, WINDOW)
    ]
    assert digests[0] == digests[1]
    assert not (tmp_path / "False" / "profile").exists()
    assert {p.name for p in (tmp_path / "True" / "profile").iterdir()} == {
        "profile.json", "profile.csv", "trace.json.gz",
    }  # fmt: skip


@pytest.mark.alone
@pytest.mark.parametrize(
    ("disturb", "named"),
    [
        (slow_forward(2, 0.05), "block 2 ffn: its forward pass takes 1"),
        (slow_backward(1, 0.05), "block 1 ffn: its backward pass takes 1"),
        (slow_loader(0.1), "data: rank 0 waits 1"),
    ],
    ids=["forward", "backward", "loader"],
)
def test_what_is_slow_is_named(recipe, disturb, named):
    findings = profiled(recipe(train={"profile": {"start": 2, "steps": 6}}), disturb)["findings"]
    assert any(finding.startswith(named) for finding in findings), findings


def nested(slices):
    """Whether slices of one track lie beside or within each other, to a nanosecond."""
    ends = []
    for start, end in sorted((s["ts"], s["ts"] + s["dur"]) for s in slices):
        while ends and ends[-1] <= start + 1e-3:
            ends.pop()
        if ends and end > ends[-1] + 2e-3:
            return False
        ends.append(end)
    return True


def check_trace(path: Path, ranks: int, step_ms: float, numbers=("step 4", "step 6", "step 8")) -> list[dict]:
    """Chrome's format: what a track has, that slices nest, and that times are microseconds."""
    trace = json.loads(gzip.decompress(path.read_bytes()))
    events = trace["traceEvents"]
    assert trace["displayTimeUnit"] == "ms" and {e["ph"] for e in events} <= {"X", "M", "s", "f"}
    names = {(e["pid"], e["name"]) for e in events if e["ph"] == "M"}
    assert {(r, n) for r in range(ranks) for n in ("process_name", "thread_name", "process_sort_index")} <= names
    slices = [e for e in events if e["ph"] == "X"]
    assert all(e["dur"] >= 0 and isinstance(e["tid"], int) and e["name"] for e in slices)
    for rank in range(ranks):
        for tid in (0, 1, 3, 4):
            assert nested([e for e in slices if (e["pid"], e["tid"]) == (rank, tid)]), (rank, tid)
        steps = [e for e in slices if e["pid"] == rank and e["tid"] == 4]
        assert [e["name"] for e in steps] == [*numbers], "plain steps lie between those that are timed"
        assert all(0.2 < e["dur"] / 1e3 / step_ms < 5.0 for e in steps)
        inside = [e for e in slices if e["pid"] == rank and e["tid"] == 0]
        first, last = min(e["ts"] for e in steps), max(e["ts"] + e["dur"] for e in steps)
        assert all(first - 1.0 <= e["ts"] and e["ts"] + e["dur"] <= last + 1.0 for e in inside)
    arrows = {kind: {e["id"]: e for e in events if e["ph"] == kind} for kind in "sf"}
    assert arrows["s"].keys() == arrows["f"].keys()
    assert all(arrows["s"][i]["pid"] != arrows["f"][i]["pid"] for i in arrows["s"])
    return events


def test_the_trace_is_valid(recipe):
    made = recipe()
    profile = profiled(made)
    events = check_trace(Path(made.train.output) / "profile" / "trace.json.gz", 1, profile["step_ms"]["p50"])
    assert {"block 0 ffn forward", "block 3 attention backward"} <= {e["name"] for e in events}


def test_a_comparison_says_what_has_changed_and_nothing_else(recipe):
    def time(p50, noise=0.1):
        return {"p50": p50, "p95": p50, "mean": p50, "max": p50, "noise": noise, "rank": 0}

    def profile(ffn, norm):
        rows = [{"name": "block 0 ffn", "forward": time(ffn)}, {"name": "block 0 norm", "forward": time(norm)}]
        return {"step_ms": time(10.0, 1.0), "rows": [dict.fromkeys(COLUMNS) | r for r in rows]}

    assert list(changes(profile(2.0, 1.0), profile(2.0, 1.0))) == []
    assert list(changes(profile(2.5, 1.0), profile(2.0, 1.0))) == []  # within 4 * sqrt(0.1^2 + 0.1^2) = 0.57
    ((name, column, was, now, noise),) = changes(profile(2.6, 1.0), profile(2.0, 1.0))
    assert (name, column, was, now) == ("block 0 ffn", "forward", 2.0, 2.6) and noise == pytest.approx(0.5657, rel=1e-3)


def test_marks_are_charged_to_what_is_under_way():
    class Ticks(CpuClock):
        def __init__(self):
            self.ticks = iter(range(0, 10**9, 10**6))

        def now(self):
            return next(self.ticks)

    rows = Rows()
    ffn, norm = (rows.place(Row(name, name), Phase.FORWARD) for name in ("ffn", "norm"))
    timeline = Timeline(Ticks(), rows)
    for _ in range(2):  # the second step begins anew
        timeline.begin()
        for place in (ffn, norm, ffn):
            timeline.mark(place)
        measured = timeline.end()
        table = measured.reduced(len(rows.names), 1).places.reshape(-1, NUM_PHASES)
        assert table[:, Phase.FORWARD].tolist() == [1.0, 2.0, 1.0] and measured.duration == 4.0


def test_ranges_are_named_where_a_profiler_runs_and_nothing_is_wrapped_otherwise(recipe, tmp_path):
    with Run(recipe(train={"profile": None}, recompute={"policy": "branch"})) as run:
        trainer, residual = Trainer(run), run.engine.model.blocks["0"].ffn
        trainer.step()
        assert "run_once" not in vars(residual)
        with torch.profiler.profile() as profiler:
            trainer.step()
        assert "run_once" not in vars(residual)
    names = {event.key for event in profiler.key_averages()}
    assert {"block 0 ffn forward", "block 3 norm forward", "block 2 ffn recompute", "optimizer forward"} <= names
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X" and e.get("cat") in ("cpu_op", "user_annotation")]
    for thread in {e["tid"] for e in slices}:
        assert nested([e for e in slices if e["tid"] == thread])


def test_curves_over_depth_and_a_heat_map_go_to_tensorboard(recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = recipe(train={"loggers": ["tensorboard"]})
    profile = profiled(made)
    seen = EventAccumulator(str(Path(made.train.output) / "tensorboard" / "profile")).Reload()
    forward = {e.step: e.value for e in seen.Scalars("profile/forward_ms")}
    for block in range(4):
        rows = (row(profile, f"block {block} {part}") for part in ("attention", "ffn", "norm"))
        assert forward[block] == pytest.approx(sum(r["forward"]["p50"] for r in rows), rel=1e-5)
    (image,) = seen.Images("profile/blocks")
    assert image.encoded_image_string.startswith(b"\x89PNG") and image.height == 4 * 12


def test_the_command_writes_a_profile_and_compares(recipe, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe(train={"profile": None})))
    assert main(["profile", str(path), "--steps", "2", "--warmup", "1"]) == 0
    folder = tmp_path / "run" / "profile"
    said = capsys.readouterr()
    text = said.out + said.err
    assert "block 0 ffn" in text and "MFU" in text and "parts " in text
    assert main(["profile", str(path), "--steps", "2", "--warmup", "1", "--compare", str(tmp_path / "run"),
                 "--sort", "block", "--no-trace", "model.num_blocks=5"]) == 0  # fmt: skip
    text = "".join(capsys.readouterr())
    assert "3 rows are in one of them alone" in text
    assert not (folder / "trace.json.gz").exists() and not any((folder / "checkpoints").iterdir())
    profile = read_profile(tmp_path / "run")
    assert len([r for r in profile["rows"] if r["part"] == "ffn"]) == 5
    lines = (folder / "profile.csv").read_text().splitlines()
    assert len(lines) == 1 + len(profile["rows"]) and lines[0].startswith("name,part,block,stage,total_ms,forward_ms")
    first = profile["rows"][0]
    assert float(lines[1].split(",")[4]) == pytest.approx(total_of(first), abs=1e-4)


def test_bad_input_is_one_line(recipe, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"train.profile.start=50 is after the last step, train.steps=40"):
        recipe(train={"profile": {"start": 50, "steps": 1}})
    with pytest.raises(ConfigError, match=r"train.profile does not go with train.compile=cuda_graphs"):
        recipe(train={"profile": WINDOW, "compile": "cuda_graphs"})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe(train={"profile": None})))
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "metrics.jsonl").touch()
    for arguments, wanted in {
        ("--out", str(tmp_path / "real")): "a run is there, which a profile would take up; give --out a folder",
        ("--compare", str(tmp_path)): "there is no profile.json; make one with: megaresnorm profile RECIPE",
        ("--sort", "name"): "--sort=name is neither time nor block",
        ("--steps", "0"): "0' is not a whole number from 1",
    }.items():
        assert main(["profile", str(path), *arguments]) in (2, 3)
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and wanted in said[0]
    step = '"step_ms": {"p50": 1, "p95": 1, "mean": 1, "max": 1, "noise": null, "rank": 0}'
    for content in ("", "[]", '{"schema_version": 2}', '{"schema_version": 1, "rows": 3}', "[" * 10**5,
                    '{"schema_version": 1, "rows": []}', f'{{"schema_version": 1, "rows": [{{}}], {step}}}',
                    f'{{"schema_version": 1, "rows": [{{"name": "a", "forward": 3}}], {step}}}'):  # fmt: skip
        (tmp_path / "profile.json").write_text(content)
        with pytest.raises(DataError, match=r"profile\.json"):
            read_profile(tmp_path)


def test_a_run_that_ends_within_its_window_writes_and_says_what_it_has(recipe, caplog):
    made = recipe(train={"steps": 4, "profile": {"start": 2, "steps": 20}})
    with caplog.at_level("INFO"):
        train(build_recipe(made.model_dump(exclude_none=True)))
    assert sum(line.startswith(("profile   2 steps from step 2 on", "parts     ")) for line in caplog.messages) == 2
    assert read_profile(made.train.output)["num_steps"] == 2  # timed, plain, timed


def test_the_clock_of_a_gpu_takes_events_from_a_pool_and_waits_once(monkeypatch):
    class Event:
        made = waits = 0
        clock = waited_for = 0.0

        def __init__(self, enable_timing):
            assert enable_timing
            Event.made += 1

        def record(self):
            Event.clock += 1.5
            self.at = Event.clock

        def synchronize(self):
            Event.waits, Event.waited_for = Event.waits + 1, self.at

        def elapsed_time(self, other):
            assert Event.waited_for >= max(self.at, other.at), "both events must be completed"
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock, rows = clock_of(torch.device("cuda")), Rows()
    ffn = rows.place(Row("ffn", "ffn"), Phase.FORWARD)
    timeline = Timeline(clock, rows)
    for _ in range(2):
        timeline.begin()
        timeline.mark(ffn)
        start = timeline.now()
        timeline.overlap(ffn, start)  # whose events come before the step's end, which is what is to be waited for
        measured = timeline.end()
        assert measured.duration == 6.0 and measured.reduced(len(rows.names), 1).hidden.tolist() == [0.0, 1.5]
    assert (Event.made, Event.waits) == (5, 2)


def test_what_is_read_of_another_profile_is_times():
    good = {"p50": 0.0, "p95": 1, "mean": 1.0, "max": 1.0, "noise": None, "rank": 0}
    profile = {"schema_version": 1, "step_ms": good, "rows": [{"name": "a", "forward": good}]}
    assert problem_of(profile) is None
    for spoilt in ("1", None, -1.0, 10**400, float("nan"), [1]):
        assert problem_of({**profile, "step_ms": {**good, "p50": spoilt}}), spoilt
        assert problem_of({**profile, "rows": [{"name": "a", "forward": {**good, "noise": spoilt or -1}}]}), spoilt


def test_a_bubble_beyond_that_of_equal_stages_names_the_busiest_stage():
    def rank(pp, own, bubble):
        totals = {"own": own, "own_p50": own, "own_noise": 0.0, "bubble": bubble, "step": own + bubble, "exposed": 0.0}
        return {"rank": pp, "pp": pp, "host": "h", "totals": totals, "rows": []}

    def findings(*ranks):
        whole = {"data": None, "host": None, "unaccounted": None, "overhead": None, "ideal_bubble": 0.2}
        return findings_of({"step_ms": {"p50": 100.0}, "rows": [], "ranks": ranks, "whole": whole}, ranks)

    assert findings(rank(0, 78.0, 22.0), rank(1, 80.0, 20.0)) == []
    (said,) = findings(rank(0, 60.0, 40.0), rank(1, 80.0, 20.0))
    assert (
        said.startswith("bubble: rank 0 waits 40.0% of a step")
        and "rank 1 has the most work, 80.0 ms where others have 60.0: move blocks" in said
    )


def test_a_profile_that_cannot_be_written_costs_a_warning_and_no_run(recipe, caplog):
    made = recipe(train={"steps": 14})
    folder = Path(made.train.output)
    folder.mkdir()
    (folder / "profile").write_text("a file stands in its way")
    summary = train(made)
    assert summary.steps == 14 and summary.checkpoint is not None
    assert [m for m in caplog.messages if "the profile cannot be written" in m and m.endswith("; training goes on")]


def test_rates_of_a_growing_batch_are_those_of_the_steps_that_were_timed(recipe):
    ramp = {"start": 4, "steps": 4000}
    made = recipe(train={"batch_ramp": ramp, "global_batch": 32, "micro_batch": 4, "profile": {"start": 1, "steps": 3}})
    profile = profiled(made)
    tokens = profile["tokens_per_second"] * profile["step_ms"]["p50"] / 1e3
    assert tokens == pytest.approx(4 * 32, rel=0.01), "not those of train.global_batch"


def test_a_profile_within_another_profiler_leaves_that_its_events(recipe, caplog):
    with torch.profiler.profile() as profiler:
        profile = profiled(recipe(train={"profile": {"start": 1, "steps": 1}}))
    assert len(profiler.events()) > 100
    assert row(profile, "block 0 ffn")["activation_bytes"] is None
    assert any("has no bytes of rows" in message for message in caplog.messages)

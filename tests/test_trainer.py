"""Runs: resumed exactly, stopped in order, independent of microbatches, and never updated by a bad gradient."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digests import engine_digest

from megaresnorm.checkpoint import writer
from megaresnorm.checkpoint.manifest import encode_manifest
from megaresnorm.cli import main
from megaresnorm.data.loader import SampleRange, StepBatch
from megaresnorm.engines.engine import StepStats
from megaresnorm.errors import CheckpointError, StoppedError, TrainingError
from megaresnorm.guard import Guard
from megaresnorm.kernels.cpu.build import unavailable
from megaresnorm.model.cost import training_flops
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import dump_recipe
from megaresnorm.resilience.signals import StopSignals
from megaresnorm.run import Run
from megaresnorm.trainer import Trainer, train


def opened(recipe: Recipe) -> Run:
    """A run to look at or to drive by hand, which leaves its folder to others."""
    with Run(recipe) as run:
        return run


def losses(recipe):
    lines = (Path(recipe.train.output) / "metrics.jsonl").read_text().splitlines()
    return {json.loads(line)["step"]: json.loads(line)["loss"].hex() for line in lines}


class StopAfter(StopSignals):
    """A signal that comes after so many steps."""

    def __init__(self, run: Run, steps: int) -> None:
        super().__init__()
        self.run, self.steps = run, steps

    @property
    def exit_code(self):
        return 130 if self.run.steps_done >= self.steps else 0


SOME_STOPS = (1, 4, 9, 13, 20)


@pytest.mark.parametrize(
    "stops", [SOME_STOPS, pytest.param(tuple(set(range(1, 21)) - set(SOME_STOPS)), marks=pytest.mark.slow)]
)
def test_stopping_at_any_of_20_steps_resumes_bit_for_bit(stops, tiny, tmp_path):
    """Equal losses and weights, with dropout, warm-up, AdaGC, a growing batch, accumulation, epochs and evaluations."""
    steps = 20
    settings = {
        "model": {"dropout": 0.1, "topology": "layerscale", "num_blocks": 2},
        "optim": {"clip": "adagc", "adagc_warmup": 4},
        "schedule": {"warmup_steps": 5},
        "precision": {"compute": "bf16"},
    }
    common = {
        "steps": steps,
        "global_batch": 96,
        "micro_batch": 32,
        "batch_ramp": {"start": 32, "steps": 9},
        "eval_every": 6,
    }

    def recipe(name):
        return tiny(**settings, train={**common, "output": str(tmp_path / name)})

    whole = train(recipe("whole"))
    finished = opened(recipe("whole"))
    assert finished.samples_done > finished.samples.per_epoch  # more than one epoch
    for stop in stops:
        interrupted = recipe(f"stop-{stop}")
        run = opened(interrupted)
        Trainer(run).train(StopAfter(run, stop))
        resumed = train(interrupted)
        assert resumed.weights_digest == whole.weights_digest, f"stopped after step {stop}"
        assert losses(interrupted) == losses(recipe("whole")) and len(losses(interrupted)) == steps


def test_steps_after_a_checkpoint_that_were_lost_are_done_again(tiny):
    recipe = tiny(checkpoint={"every": 2})
    run = opened(recipe)
    for _ in range(5):  # the process dies at step 5 without a word; steps 1 to 4 are in the checkpoint of step 4
        Trainer(run).step()
        if run.steps_done in (2, 4):
            run.save_now()
    (Path(recipe.train.output) / "metrics.jsonl").write_text(
        '{"step": 4, "loss": 1.0}\n{"step": 5, "loss": 9.0}\n{"step": 6, "lo'
    )
    train(recipe)
    assert sorted(losses(recipe)) == [4, 5, 6] and losses(recipe)[5] != (9.0).hex()


def test_a_finished_run_does_nothing_more(tiny):
    first, second = train(tiny()), train(tiny())
    assert second.weights_digest == first.weights_digest and second.steps == 6 and second.train_loss == first.train_loss


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model": {"dim": 32}}, r"model\.dim=16"),
        ({"data": {"seed": 3}}, r"data\.seed=1234"),
        ({"train": {"seed": 3}}, r"train\.seed"),
        ({"model": {"topology": "keel"}}, r"model\.topology"),
        ({"precision": {"compute": "bf16"}}, r"precision\.compute"),
    ],
)
def test_a_folder_of_another_run_is_refused(tiny, change, part):
    train(tiny())
    with pytest.raises(CheckpointError, match=part):
        opened(tiny(**change))


def test_a_damaged_newest_checkpoint_is_named_set_aside_and_passed_over(tiny, caplog):
    """And refused with fallback=False; where none is whole, nothing is renamed."""
    recipe = tiny(checkpoint={"every": 2})
    digest = train(recipe).weights_digest
    root = Path(recipe.train.output) / "checkpoints"
    (root / "step-00000006" / "weights-00000-00001.safetensors").write_bytes(b"torn")
    with pytest.raises(
        CheckpointError, match=r"weights-00000-00001\.safetensors: has 4 bytes.* goes on from step-00000004"
    ):
        Run(recipe, fallback=False)
    assert opened(recipe).steps_done == 4
    assert (
        "weights-00000-00001.safetensors: has 4 bytes" in caplog.text and "going back to step-00000004" in caplog.text
    )
    assert sorted(p.name for p in root.iterdir()) == ["damaged-step-00000006", "step-00000004"]
    assert train(recipe).weights_digest == digest and (root / "step-00000006").is_dir()
    for name in ("step-00000004", "step-00000006"):
        (root / name / "weights-00000-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no older checkpoint is left; so are step-00000006"):
        Run(recipe)
    assert sorted(p.name for p in root.iterdir()) == ["damaged-step-00000006", "step-00000004", "step-00000006"]


def test_a_checkpoint_without_a_manifest_is_damaged_and_its_step_saved_again(tiny):
    recipe = tiny(checkpoint={"every": 2})
    digest = train(recipe).weights_digest
    root = Path(recipe.train.output) / "checkpoints"
    (root / "step-00000006" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000006.manifest\.json: not there.* goes on from step-00000004"):
        Run(recipe, fallback=False)
    assert train(recipe).weights_digest == digest
    assert sorted(p.name for p in root.iterdir()) == ["damaged-step-00000006", "step-00000004", "step-00000006"]


@pytest.mark.parametrize("reason", ["forbidden", "of a newer format"])
def test_a_checkpoint_that_is_not_damaged_is_never_set_aside(tiny, monkeypatch, reason):
    """One that this program or this user cannot read is an error: going back would lose good work."""
    recipe = tiny(checkpoint={"every": 3})
    train(recipe)
    root = Path(recipe.train.output) / "checkpoints"
    path = root / "step-00000006" / "manifest.json"
    if reason == "forbidden":
        from megaresnorm.checkpoint import manifest

        real = manifest.read_plain_file

        def read(file, *arguments, **options):
            if file == path:
                raise PermissionError(13, "Permission denied")
            return real(file, *arguments, **options)

        monkeypatch.setattr(manifest, "read_plain_file", read)
    else:
        path.write_bytes(encode_manifest(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match=r"Permission denied|format 99 is unknown"):
        Run(recipe)
    assert sorted(p.name for p in root.iterdir()) == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_error_leaves_the_folder_to_nobody_while_a_checkpoint_is_being_written(tiny, monkeypatch, ranks):
    """The next owner would remove what is half written. Alone, the error waits; others may be gone, never to answer."""
    gate, real = threading.Event(), writer._commit
    monkeypatch.setattr(writer, "_commit", lambda *rest: gate.wait(30) and real(*rest))
    with pytest.raises(RuntimeError, match="of this step"), Run(tiny()) as run:
        run.steps_done = 1
        run.save()
        run.context = replace(run.context, world=replace(run.context.world, size=ranks))
        if ranks == 1:
            threading.Timer(0.3, gate.set).start()
        raise RuntimeError("of this step")
    assert run.saver.busy == (ranks == 2)
    if ranks == 2:
        with pytest.raises(TrainingError, match="is in use by pid"):
            Run(tiny())
        gate.set()
        run.saver.join()
        run.close()
    assert opened(tiny()).steps_done == 1


def test_any_seed_can_be_used(tiny, tmp_path):
    for seed in (0, 2**63 - 1):
        train(
            tiny(
                data={"seed": seed},
                train={"seed": seed, "steps": 1, "output": str(tmp_path / str(seed))},
                model={"dropout": 0.1},
            )
        )


def test_longer_training_may_go_on_from_a_checkpoint_and_says_what_changed(tiny, caplog):
    train(tiny())
    assert train(tiny(train={"steps": 9}, optim={"lr": 1e-4})).steps == 9
    assert "optim.lr was 0.001 up to step 6 and is 0.0001" in caplog.text


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_topology_trains_through_the_whole_program(tiny, topology):
    recipe = tiny(
        model={"topology": topology, "qk_norm": "head"}, train={"steps": 8, "global_batch": 16}, optim={"lr": 1e-2}
    )
    train(recipe)
    curve = [float.fromhex(v) for v in losses(recipe).values()]
    assert curve[-1] < curve[0] - 0.3, curve


def one_step_gradients(recipe, count=16):
    run = opened(recipe)
    loss, _ = run.engine.gradients(run.loader.load(SampleRange(0, count)))
    return loss, {n: p.grad for n, p in run.engine.model.named_parameters()}


def test_microbatches_do_not_change_loss_gradients_or_dropout(tiny):
    """FP64, dropout on: 1, 3 and 16 microbatches of one global batch."""
    settings = {"model": {"dropout": 0.2}, "precision": {"compute": "fp64"}}
    whole, grads = one_step_gradients(tiny(**settings, train={"global_batch": 16}))
    for micro in (1, 8):
        parts, others = one_step_gradients(tiny(**settings, train={"global_batch": 16, "micro_batch": micro}))
        assert parts == pytest.approx(whole, rel=1e-13)
        for name, grad in grads.items():
            torch.testing.assert_close(others[name], grad, rtol=0, atol=1e-13 * grad.abs().max().item() + 1e-16)


def test_loss_is_the_mean_over_valid_tokens_of_unequal_microbatches(tiny):
    """One microbatch with 1 valid label and one with 31: a mean of their means would weigh the one label 31 times."""
    run = opened(tiny(precision={"compute": "fp64"}))
    (first,), (second,) = (run.loader.load(SampleRange(position, 4)).microbatches for position in (0, 4))
    labels = torch.full_like(first.labels, -1)
    labels[0, 3] = first.labels[0, 3]
    batches = [first._replace(labels=labels), second._replace(labels=second.labels.where(torch.arange(16) < 8, -1))]
    loss, tokens = run.engine.gradients(StepBatch(tuple(batches), 2, 33))
    nll = -torch.log_softmax(run.engine.model(torch.cat([b.tokens for b in batches])), -1)
    flat = torch.cat([b.labels for b in batches]).flatten()
    picked = nll[flat >= 0].gather(1, flat[flat >= 0, None])
    assert tokens == 33 and loss == pytest.approx(picked.mean().item(), rel=1e-13)


def test_bf16_gradients_are_accumulated_in_fp32(tiny):
    """64 microbatches: the sum's error against FP64 stays that of one BF16 product, far below BF16 accumulation's."""
    settings = {"model": {"num_blocks": 1}, "train": {"global_batch": 16, "micro_batch": 1}}
    _, exact = one_step_gradients(tiny(**settings, precision={"compute": "fp64"}))
    _, ours = one_step_gradients(tiny(**settings, precision={"compute": "bf16"}))
    assert all(g.dtype == torch.float32 for g in ours.values())
    for name, grad in exact.items():
        assert (ours[name] - grad).norm() < 0.03 * grad.norm(), name


def test_bf16_weights_are_refreshed_after_every_update(tiny):
    recipe = tiny(precision={"compute": "bf16"})
    run = opened(recipe)
    Trainer(run).step()
    head = run.engine.model.head
    assert torch.equal(head.operand, head.weight.detach().bfloat16())


def test_a_bad_gradient_changes_nothing_and_goes_on_for_a_while_only(tiny, caplog):
    run = opened(tiny(train={"max_skipped_steps": 3}))
    before = engine_digest(run.engine)
    run.engine.model.blocks["1"].ffn.branch.down.weight.register_hook(lambda gradient: gradient * float("nan"))
    Trainer(run).step()
    assert engine_digest(run.engine) == before
    assert "step 1 refused" in caplog.text and "gradient of blocks.1.ffn.branch.down.weight on rank 0" in caplog.text
    assert all(not slices.local.any() for slices in run.engine.tensors["optimizer"].values())
    with pytest.raises(TrainingError, match="3 steps in a row had a non-finite loss"):
        for _ in range(3):
            run.samples_done = 0
            Trainer(run).step()


def test_a_spoilt_weight_ends_the_run_at_once_and_is_named(tiny):
    """No step could be applied any more."""
    run = opened(tiny())
    with torch.no_grad():
        run.engine.model.embedding.weight[run.samples[0][0]] = float("nan")
    with pytest.raises(TrainingError, match=r"step 1 refused: .*weight embedding.weight on rank 0"):
        Trainer(run).step()


@pytest.mark.parametrize("clip", ["global", "adagc"])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_refused_step_leaves_the_engine_as_it_was(tiny, clip, compute):
    """Weights, moments, running averages of norms, counts and BF16 copies, after two good steps."""
    adagc = {"adagc_warmup": 1} if clip == "adagc" else {}
    run = opened(tiny(optim={"clip": clip, **adagc}, precision={"compute": compute}, train={"steps": 9}))
    trainer = Trainer(run)
    trainer.step(), trainer.step()

    def everything():
        tensors = {f"{g} {n}": s.local.clone() for g, m in run.engine.tensors.items() for n, s in m.items()}
        copies = {f"copy {i}": c.clone() for i, c in enumerate(run.engine.low_precision.copies)}
        return tensors | copies

    before, state = everything(), run.engine.state()
    weight = run.engine.model.blocks["1"].ffn.branch.down.weight
    hook = weight.register_hook(lambda gradient: gradient * float("nan"))
    trainer.step()
    hook.remove()
    assert run.skipped_in_a_row == 1 and run.engine.state() == state
    assert all(torch.equal(before[name], tensor) for name, tensor in everything().items())
    trainer.step()
    assert run.skipped_in_a_row == 0 and run.engine.state().updates == state.updates + 1


def test_a_signal_in_the_last_step_does_not_stop_a_run_that_is_done(tiny, monkeypatch):
    recipe = tiny(train={"steps": 3, "max_minutes": 60})
    real = Trainer.step

    def step(trainer):
        if trainer.run.steps_done == 2:
            trainer._stop._end = 0.0  # the time limit passes in the last step
        return real(trainer)

    monkeypatch.setattr(Trainer, "step", step)
    summary = train(recipe)
    assert summary.exit_code == 0 and summary.steps == 3 and summary.valid_loss is not None


def test_a_signal_during_an_evaluation_is_obeyed_before_another_step(tiny, monkeypatch):
    recipe = tiny(train={"steps": 6, "eval_every": 2})
    real = Run.evaluate

    def evaluate(run):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        return real(run)

    monkeypatch.setattr(Run, "evaluate", evaluate)
    summary = train(recipe)
    assert (summary.exit_code, summary.steps) == (143, 2)


def test_evaluation_changes_nothing_and_repeats(tiny):
    run = opened(tiny(model={"dropout": 0.5}))
    before = engine_digest(run.engine)
    assert run.evaluate() == run.evaluate() and engine_digest(run.engine) == before


def test_metrics_tensorboard_and_recipe_are_written(tiny, tmp_path):
    recipe = tiny(train={"loggers": ["tensorboard"], "eval_every": 4})
    summary = train(recipe)
    out = Path(recipe.train.output)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6] and records[3]["valid_loss"] > 0
    last = records[-1]
    assert last["samples"] == 24 and last["tokens"] == 24 * 16 and abs(last["time"] - time.time()) < 60
    assert last["tflops"] * 1e12 == pytest.approx(training_flops(recipe_with_vocab(recipe)) * 64 / last["seconds"])
    assert last["peak_memory"] > 10**8 and last["tokens_per_second"] == pytest.approx(64 / last["seconds"])
    # The last evaluation is in all three places.
    assert last["valid_loss"] == summary.valid_loss
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("valid/loss")] == [4, 6]
    assert {"optim/lr", "perf/tokens_per_second", "perf/seconds_per_step"} <= set(events.Tags()["scalars"])
    (text,) = (
        events.Tensors("recipe/text_summary")
        if "recipe/text_summary" in events.Tags()["tensors"]
        else (events.Tensors("recipe"))
    )
    assert b"| `model.vocab_size` | `257` |" in text.tensor_proto.string_val[0]
    assert "vocab_size: 257" in (out / "recipe.yaml").read_text()


def recipe_with_vocab(recipe):
    return recipe.model.model_copy(update={"vocab_size": 257})


def start(recipe, tmp_path, *overrides):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "megaresnorm.cli", "train", str(path), *overrides]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_exits_with_its_code(tiny, tmp_path, number, code):
    recipe = tiny(train={"steps": 10**6, "eval_every": 0}, checkpoint={"every": 0})
    process = start(recipe, tmp_path)
    metrics = Path(recipe.train.output) / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    saved = opened(recipe)
    assert saved.steps_done == len(losses(recipe)) > 0 and f"{number.name}: saved step {saved.steps_done}" in out


def test_a_signal_before_the_first_step_ends_the_run_at_once():
    """There is nothing to save: the main thread gets an error with the signal's exit code, whatever it is at."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="SIGTERM before the first step") as caught, StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert caught.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) is before


def test_a_run_in_a_thread_hears_no_signals_and_says_so(tiny, caplog):
    """A notebook's worker, say: Python gives signals to the main thread alone."""
    caplog.set_level(logging.WARNING, logger="megaresnorm")
    with ThreadPoolExecutor(1) as pool:
        summary = pool.submit(train, tiny(train={"max_minutes": 1e-6})).result()
    assert summary.exit_code == 124 and "hears no signals" in caplog.text


def test_the_first_signal_is_noted_and_the_second_ends_the_process_at_once():
    """Even while the main thread is in C code that lets no Python run in it."""
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        stop.begin()
        assert stop.received is None and stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        while stop.received is None:
            time.sleep(0.01)
        assert stop.received is signal.SIGTERM and stop.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    script = """
import threading
from megaresnorm.resilience.signals import StopSignals
with StopSignals() as stop:
    stop.begin()
    print("ready", flush=True)
    lock = threading.Lock()
    lock.acquire()
    while True:
        lock.acquire()  # goes on after a signal
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130 and time.monotonic() - start < 2
    assert "a second signal: ended at once" in process.stderr.read()


def test_the_time_limit_saves_and_exits_with_124(tiny):
    recipe = tiny(train={"steps": 10**6, "eval_every": 0, "max_minutes": 0.02}, checkpoint={"every": 0})
    summary = train(recipe)
    assert summary.exit_code == 124 and 0 < summary.steps == opened(recipe).steps_done


def test_command_line_trains_shows_and_resumes(tiny, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(tiny(train={"sample_tokens": 5, "sample_prompt": "def "})))
    assert main(["train", str(path), "train.steps=3"]) == 0
    first = capsys.readouterr().out
    kernel = f"kernels   add_norm {'cpu' if unavailable() is None else 'reference'}, "
    for part in ("vocab_size: 257", "3 blocks = 6 sub-layers", kernel, "step 3/3", "FLOP/s | ", "192 tokens | ",
                 "192 tokens in all", "--- sample ---\ndef ", "unigram entropy", "step-00000003",
                 ):  # fmt: skip
        assert part in first, part
    assert main(["train", str(path), "train.steps=5"]) == 0
    second = capsys.readouterr().out
    assert "resumed" in second and "step 3 of 5" in second and "step 4/5" in second and "step 2/5" not in second
    assert "weight_decay" not in second, "a default"
    assert "the learning rate goes from 1.00e-04 at step 3 to 2.32e-04 at step 4" in second
    assert main(["train", str(path), "train.steps=5"]) == 0
    assert capsys.readouterr().out == f"finished  {tmp_path}/run/checkpoints/step-00000005: step 5 of 5\n"
    assert main(["train", str(path), "train.steps=6", "--full"]) == 0
    assert "  weight_decay: 0.1\n" in capsys.readouterr().out


def test_unwritable_output_is_refused_before_step_0(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"train\.output=.*cannot be written"):
        opened(tiny(train={"output": str(tmp_path / "file" / "run")}))


def test_dry_run_touches_nothing(tiny, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(tiny(model={"topology": "post"})))
    assert main(["train", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "vocab_size: 257" in out and "\n# ranks      1; micro batch 4" in out and "# warning    B = 2N" in out
    assert not Path(tiny().train.output).exists()


@pytest.mark.parametrize("bare", [False, True])
def test_resuming_on_other_tokens_is_refused(tiny, byte_data, tmp_path, bare):
    """Also where the new files are whole and have the same documents."""
    import shutil

    from megaresnorm.data.dataset import digests_of

    folder = tmp_path / "data"
    shutil.copytree(byte_data, folder)
    path = str(folder / "tokens") if bare else str(folder)
    recipe = tiny(data={"path": path}, model={"vocab_size": 257})
    train(recipe)
    raw = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(raw[:200] + raw[202:204] + raw[200:202] + raw[204:])
    description = json.loads((folder / "dataset.json").read_text())
    description["files"]["tokens.bin"] = digests_of(folder / "tokens.bin")
    (folder / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="has changed since"):
        opened(recipe)


def test_the_data_may_move(tiny, byte_data, tmp_path):
    import shutil

    train(tiny())
    shutil.copytree(byte_data, tmp_path / "moved")
    assert opened(tiny(data={"path": str(tmp_path / "moved")})).steps_done == 6


def judge(run, stats: StepStats) -> None:
    """A step that comes out the same when it is made again."""
    Guard(run).judge(stats, run.next_batch(), lambda: stats)


def test_skipped_steps_are_counted_across_a_resume_and_forgotten_after_a_good_one(tiny, monkeypatch):
    from megaresnorm import run as run_module
    from megaresnorm.checkpoint.state import RunState

    run = opened(tiny(train={"max_skipped_steps": 3}))
    good, bad = StepStats(1.0, 1.0, 9, applied=True), StepStats(float("inf"), 1.0, 9, applied=False)
    judge(run, bad)
    judge(run, StepStats(1.0, float("nan"), 9, applied=False))
    assert run.skipped_in_a_row == 2
    run.save()
    assert run.saver.newest is None, "what is refused may be so for the weights"
    run.skipped_in_a_row, counted = 0, run.skipped_in_a_row
    with monkeypatch.context() as patch:  # a checkpoint of an older version, which saved all the same
        patch.setattr(run_module, "RunState", lambda **state: RunState(**state | {"skipped_in_a_row": counted}))
        run.save_now()
    with pytest.raises(TrainingError, match="3 steps in a row"):
        judge(opened(tiny(train={"max_skipped_steps": 3})), bad)
    run.skipped_in_a_row = counted
    judge(run, good)
    assert run.skipped_in_a_row == 0


def test_fewer_steps_than_were_made_are_refused(tiny):
    train(tiny())
    with pytest.raises(CheckpointError, match=r"step 6 is past train\.steps=4"):
        opened(tiny(train={"steps": 4}))


def test_z_loss_is_in_the_gradient_and_not_in_the_reported_loss(tiny):
    settings = {"precision": {"compute": "fp64"}}
    plain, without = one_step_gradients(tiny(**settings, train={"global_batch": 16}))
    reported, with_z = one_step_gradients(tiny(**settings, train={"global_batch": 16, "z_loss": 0.1}))
    assert reported == pytest.approx(plain, rel=1e-12)
    run = opened(tiny(**settings))
    (batch,) = run.loader.load(SampleRange(0, 4)).microbatches
    assert not torch.allclose(with_z["head.weight"], without["head.weight"])
    logits = run.engine.model(batch.tokens)
    z = 0.1 * logits.logsumexp(-1).square().mean()
    (extra,) = torch.autograd.grad(z, run.engine.model.head.weight)
    _, a = one_step_gradients(tiny(**settings, train={"global_batch": 4, "z_loss": 0.1}), count=4)
    _, b = one_step_gradients(tiny(**settings, train={"global_batch": 4}), count=4)
    assert torch.allclose(a["head.weight"] - b["head.weight"], extra, rtol=0, atol=1e-12)


def test_dropout_is_on_in_training_and_off_in_evaluation(tiny):
    settings = {"precision": {"compute": "fp64"}}
    plain, _ = one_step_gradients(tiny(**settings, train={"global_batch": 16}))
    dropped, _ = one_step_gradients(tiny(**settings, train={"global_batch": 16}, model={"dropout": 0.2}))
    other, _ = one_step_gradients(tiny(**settings, train={"global_batch": 16, "z_loss": 0.0}, model={"dropout": 0.4}))
    assert len({plain, dropped, other}) == 3
    assert opened(tiny(**settings, model={"dropout": 0.2})).evaluate() == opened(tiny(**settings)).evaluate()


def test_metrics_are_strict_json_whatever_happens(tiny):
    run = opened(tiny())
    from megaresnorm.telemetry.metrics import MetricsWriter

    writer = MetricsWriter(run.output, first_step=1)
    writer.write(1, {"loss": float("nan"), "lr": 1.0})
    writer.close()
    assert (run.output / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "lr": 1.0}\n'


def test_a_reader_that_goes_away_does_not_end_the_run(tiny, tmp_path):
    process = start(tiny(train={"steps": 40}), tmp_path)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 0, err
    assert opened(tiny(train={"steps": 40})).steps_done == 40


def test_a_checkpoint_that_knows_less_settings_is_resumed(tiny):
    """One written before a setting existed has that setting's default."""
    recipe = tiny(train={"steps": 2}, schedule={"kind": "constant"})
    train(recipe)
    (folder,) = Path(recipe.train.output, "checkpoints").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["state"]["recipe"]["data"]["mask_documents"], manifest["state"]["recipe"]["kernels"]
    del manifest["state"]["tokenizer"]
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    assert train(tiny(train={"steps": 3}, schedule={"kind": "constant"})).steps == 3

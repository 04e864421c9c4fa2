"""A microbatch that is replayed: the engine with a recorder that runs the function again, as a CUDA graph would."""

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines import graphs
from megaresnorm.engines.graphs import MicrobatchGraph
from megaresnorm.engines.native import NativeEngine
from megaresnorm.recipe.load import build_recipe
from megaresnorm.testing import RunAgain

SETTINGS = {
    "fp32": {},
    "bf16": {"precision": {"compute": "bf16"}},
    "fp16": {"precision": {"compute": "fp16"}},
    "dropout": {"model": {"dropout": 0.25}},
    "tied, adagc": {"model": {"tied_embeddings": True}, "optim": {"clip": "adagc", "adagc_warmup": 2}},
    "fp64": {"precision": {"compute": "fp64"}},
}


def engine_of(settings, device="cpu", **train):
    model = {"dim": 16, "num_blocks": 3, "num_heads": 2, "seq_len": 8, "vocab_size": 64, "topology": "keel"}
    values = {
        "model": model | settings.get("model", {}),
        "data": {"path": "none"},
        "train": {"output": "none", "steps": 9, "global_batch": 6, "micro_batch": 2, **train},
        **{section: values for section, values in settings.items() if section != "model"},
    }
    return NativeEngine(build_recipe(values), device=device)


def captured(settings, **train) -> tuple[NativeEngine, list]:
    """An engine that replays, and a list of what it has recorded."""
    engine, recorder = engine_of(settings, **train), RunAgain()
    engine.record_microbatches(recorder)
    return engine, recorder.recorded


def steps(count, device="cpu", sizes=(2, 2, 1)):
    """Steps of microbatches of several sizes, with fewer labels from one to the next, so that scales differ."""
    generator, samples = torch.Generator().manual_seed(0), itertools.count()
    for step in range(count):
        parts = []
        for size in sizes:
            tokens, labels = torch.randint(64, (2, size, 8), generator=generator)
            labels[:, : step % 5] = -1
            parts.append(
                Batch(*(t.to(device) for t in (tokens, labels, torch.tensor([next(samples) for _ in tokens]))))
            )
        yield StepBatch.of(parts)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_replayed_step_is_the_step(name):
    (replayed, recorded), plain = captured(SETTINGS[name]), engine_of(SETTINGS[name])
    rel = 1e-12 if name == "fp64" else 2e-5 if name != "bf16" else 5e-3
    for batch in steps(6):
        want, got = plain.step(batch, 1e-3), replayed.step(batch, 1e-3)
        assert got.loss == pytest.approx(want.loss, rel=rel)
        assert got.gradient_norm == pytest.approx(want.gradient_norm, rel=10 * rel)
    assert len(recorded) == 1, "recorded once, after the warm-up"
    for (key, a), (_, b) in zip(plain.full_state().items(), replayed.full_state().items(), strict=True):
        assert (a - b).norm() <= (1e-9 if name == "fp64" else 2e-2) * a.norm(), key


def test_gradients_stay_in_their_memory_and_start_from_zero():
    engine, _ = captured(SETTINGS["dropout"])
    parameters = list(engine.assembled.parameters().values())
    where = [p.grad.data_ptr() for p in parameters]
    for batch in steps(5):
        engine.step(batch, 1e-3)
        assert [p.grad.data_ptr() for p in parameters] == where
        assert not any(p.grad.any() for p in parameters)


def test_a_step_without_labels_changes_nothing():
    engine, _ = captured({})
    before = {name: t.clone() for name, t in engine.full_state().items()}
    (batch,) = steps(1)
    silent = [part._replace(labels=torch.full_like(part.labels, -1)) for part in batch.microbatches]
    assert engine.step(StepBatch.of(silent), 1e-3).loss is None
    assert all(torch.equal(t, before[name]) for name, t in engine.full_state().items())


def test_a_refused_step_leaves_gradients_of_zero_behind():
    engine, _ = captured({})
    first, second = steps(2)
    with torch.no_grad():
        head = engine.model.head.weight
        kept, head[0, 0] = head[0, 0].clone(), torch.nan
    assert not engine.step(first, 1e-3).applied
    with torch.no_grad():
        head[0, 0] = kept
    assert engine.step(second, 1e-3).applied


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_the_host_waits_once_a_step(replayed, microbatches, monkeypatch):
    """Whatever the number of microbatches: for the vector that holds loss, norm and the next step's tokens."""
    settings = {"kernels": {"cross_entropy": "reference"}}  # "chunked" asks on CPUs alone, where nothing is waited for
    engine = captured(settings)[0] if replayed else engine_of(settings)
    batches = list(steps(6, sizes=(2,) * microbatches))
    for batch in batches[:5]:
        engine.step(batch, 1e-3)
    waits: Counter[str] = Counter()
    for name in ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        original = getattr(Tensor, name)

        def counted(self, *arguments, _name=name, _original=original, **options):
            waits[_name] += 1
            return _original(self, *arguments, **options)

        monkeypatch.setattr(Tensor, name, counted)
    engine.step(batches[5], 1e-3)
    assert waits == {"tolist": 1}


def test_what_changes_between_steps_is_copied_not_remembered():
    """Another batch of the same memory, and another scale, give another result from the same recording."""
    seen = []

    def run(batch, scale):
        seen.append((batch.tokens.data_ptr(), batch.tokens.sum().item(), scale.item()))
        return scale * 0 + 1

    graph = MicrobatchGraph(run, torch.device("cpu"), RunAgain())
    batches = [part for batch in steps(graphs.WARMUPS + 2, sizes=(2,)) for part in batch.microbatches]
    for i, part in enumerate(batches):
        assert graph.accumulate((part,), 0.5 + i).item() == 1.0
    assert len({pointer for pointer, _, _ in seen}) == 1
    assert [(total, scale) for _, total, scale in seen] == [
        (b.tokens.sum().item(), 0.5 + i) for i, b in enumerate(batches)
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("name", SETTINGS)
def test_a_cuda_graph_is_the_step(name):
    plain = engine_of(SETTINGS[name], device="cuda")
    replayed = engine_of(SETTINGS[name], device="cuda", compile="cuda_graphs")
    for number, batch in enumerate(steps(8, "cuda")):
        if number == 5:  # between two replays: an evaluation, and a step that is refused
            assert replayed.evaluate(batch) == pytest.approx(plain.evaluate(batch), rel=1e-3)
            for engine in (plain, replayed):
                with torch.no_grad():
                    weight = engine.model.final_norm.weight
                    kept, weight[0] = weight[0].clone(), torch.nan
                    engine.weights_changed()
                    assert not engine.step(batch, 1e-3).applied
                    weight[0] = kept
                    engine.weights_changed()
        want, got = plain.step(batch, 1e-3), replayed.step(batch, 1e-3)
        assert got.loss == pytest.approx(want.loss, rel=1e-9 if name == "fp64" else 1e-3)
        assert got.gradient_norm == pytest.approx(want.gradient_norm, rel=1e-8 if name == "fp64" else 2e-2)
    for (key, a), (_, b) in zip(plain.full_state().items(), replayed.full_state().items(), strict=True):
        assert (a - b).norm() <= (1e-9 if name == "fp64" else 2e-2) * a.norm(), key

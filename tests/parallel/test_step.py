"""What a step sends and waits for beside its gradients and the model's own, and the loader that feeds it."""

import sys
import threading
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import LAYOUTS, SEQ, VOCAB, build, make_recipe

from megaresnorm.data.loader import Loader, SampleRange, StepBatch
from megaresnorm.engines import step_policy, step_vector
from megaresnorm.parallel import transport
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe import Recipe
from megaresnorm.testing import run_ranks

CPU = torch.device("cpu")


class Counting:
    """Sample i is made of i; which samples were read, and by which thread."""

    per_epoch = num_documents = 1000

    def __init__(self) -> None:
        self.read_by: list[tuple[int, str]] = []

    def read(self, i: int, tokens: np.ndarray, documents: np.ndarray | None = None) -> None:
        self.read_by.append((i, threading.current_thread().name))
        if i >= 900:
            raise OSError(f"sample {i} cannot be read")
        tokens[:] = (np.arange(len(tokens)) * 7 + i) % VOCAB
        if documents is not None:
            documents[:] = np.arange(len(tokens)) // (i % 4 + 2)


def loader_of(engine, recipe: Recipe) -> Loader:
    return Loader(
        Counting(), SEQ, engine.context, CPU, micro=2, mask_documents=recipe.data.mask_documents, stack=engine.stack
    )


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__")


def noting(real, note):
    """``real``, which tells ``note`` its arguments first, in the main thread."""

    def run(*arguments, **options):
        caller = sys._getframe(1).f_code.co_name  # on CPUs alone the loss looks at its labels and for a shortcut
        if threading.current_thread() is threading.main_thread() and caller not in ("scaled", "check_labels"):
            note(arguments)
        return real(*arguments, **options)

    return run


def counted(rank: int, recipe: Recipe, steps: int = 3) -> list[tuple[dict, int, int]]:
    """For each step: the engine's own collectives by size, all small messages of the process, and reads by the host."""
    _, engine = build(recipe)
    loader, places = loader_of(engine, recipe), [SampleRange(8 * i, 8) for i in range(steps)]
    real, own, reads, small = step_policy.all_reduce, Counter(), [], []

    def all_reduce(x, axis, **options):
        own[f"{axis.name} {list(x.shape)}"] += 1
        return real(x, axis, **options)

    step_policy.all_reduce = step_vector.all_reduce = all_reduce
    for module, name, place in (
        (transport, "all_gather_single", 1), (dist, "all_reduce", 0), (dist, "all_to_all_single", 1),
    ):  # fmt: skip
        setattr(module, name, noting(getattr(module, name), lambda tensors, at=place: sent(tensors[at])))

    def sent(tensor: torch.Tensor) -> None:
        if tensor.nbytes <= 64:
            small.append(tensor.nbytes)

    for name in READS:
        setattr(torch.Tensor, name, noting(getattr(torch.Tensor, name), lambda _, name=name: reads.append(name)))
    found = []
    for place, following in zip(places, [*places[1:], None], strict=True):
        batch = loader.step(place, following)
        own.clear(), reads.clear(), small.clear()
        engine.step(batch, 1e-3)
        found.append((dict(own), len(small), len(reads)))
    return found


@pytest.mark.parametrize("layout", ["tp2 columns, merge", "pp2 1f1b", "dp2 ddp", "fsdp2"])
def test_a_step_sends_one_small_vector_and_reads_it_once(layout):
    """Beside the gradients and the model's own messages. The first step counts its tokens by itself."""
    # The loss in one piece: chunked on a CPU it asks whether it may skip some of its work.
    kernels = {} if layout.startswith("tp2") else {"kernels": {"cross_entropy": "reference"}}
    recipe = make_recipe("deepnorm", "llama", LAYOUTS[layout][1], **kernels)
    replicated = layout in ("dp2 ddp", "fsdp2")
    for steps in run_ranks(2, counted, recipe):
        for number, (own, small, reads) in enumerate(steps):
            first = {"dp [1]": 1} if replicated and number == 0 else {}
            assert own == {"world [4]": 1} | first, (layout, number)
            meeting = layout == "pp2 1f1b" and number == 0  # torch's stages say hello in their first batch
            assert reads == 1 + len(first) + meeting, (layout, number, reads)
            if layout == "dp2 ddp":  # which has no messages of the model: nothing else is small
                assert small == 1 + len(first), (number, small)


def test_one_process_reads_once_a_step_whatever_its_microbatches():
    recipe = make_recipe("deepnorm", "llama", {}, kernels={"cross_entropy": "reference"})
    for steps in run_ranks(1, counted, recipe):  # in a process of its own, which it changes
        assert [(own, reads) for own, _, reads in steps] == [({"world [4]": 1}, 1)] * 3


def steps_of(rank: int, recipe: Recipe, ahead: bool) -> list[tuple[float, float, int]]:
    _, engine = build(recipe)
    loader, places = loader_of(engine, recipe), [SampleRange(5 * i, 5) for i in range(4)]
    found = []
    for place, following in zip(places, [*places[1:], None], strict=True):
        stats = engine.step(loader.step(place, following) if ahead else loader.load(place), 1e-3)
        found.append((stats.loss, stats.gradient_norm, stats.tokens))
    return found


@pytest.mark.parametrize("layout", ["tp2 tokens", "pp2 1f1b", "dp2 ddp"])
def test_tokens_counted_a_step_ahead_are_those_of_the_step(layout):
    """Batches of five samples with documents that are kept apart: ranks, and steps, differ in valid tokens."""
    recipe = make_recipe("deepnorm", "gpt", LAYOUTS[layout][1])
    (ahead, *_), (alone, *_) = (run_ranks(2, steps_of, recipe, flag) for flag in (True, False))
    assert ahead == alone and len({tokens for *_, tokens in ahead}) > 1


def test_a_batch_that_was_not_announced_is_counted_by_itself():
    """After a rollback, say: the number that the step before has summed is of another batch."""
    _, engine = build(make_recipe("deepnorm", "gpt", {}))
    loader = Loader(Counting(), SEQ, ParallelContext.single(), CPU, micro=2, mask_documents=True)
    engine.step(loader.step(SampleRange(0, 8), SampleRange(8, 8)), 1e-3)
    again = loader.step(SampleRange(0, 4), None)
    assert engine.step(again, 1e-3).tokens == again.num_valid != loader.load(SampleRange(8, 8)).num_valid


def test_the_next_step_is_read_by_a_thread_while_this_one_runs():
    samples = Counting()
    loader = Loader(samples, SEQ, ParallelContext.single(), CPU, micro=2)
    batch = loader.step(SampleRange(0, 4), SampleRange(4, 4))
    assert batch.following is not None and batch.following[0] == SampleRange(4, 4)
    assert batch.following[1]() == 4 * SEQ
    following = loader.step(SampleRange(4, 4), None)
    assert following.following is None and [len(b.tokens) for b in following.microbatches] == [2, 2]
    assert [i for i, _ in samples.read_by] == list(range(8))
    names = [name for _, name in samples.read_by]
    assert all("loader" in name for name in names[4:]) and not any("loader" in name for name in names[:4])
    other = loader.step(SampleRange(20, 4), None)  # not what was announced
    assert other.samples == SampleRange(20, 4) and torch.equal(other.microbatches[0].samples, torch.tensor([20, 21]))


def test_what_the_thread_cannot_read_is_an_error_of_the_step_that_needs_it():
    _, engine = build(make_recipe("deepnorm", "llama", {}))
    loader = loader_of(engine, make_recipe("deepnorm", "llama", {}))
    stats = engine.step(loader.step(SampleRange(0, 2), SampleRange(898, 4)), 1e-3)
    assert stats.applied and engine.state().updates == 1
    with pytest.raises(OSError, match="sample 900 cannot be read"):
        loader.step(SampleRange(898, 4), None)
    assert engine.step(loader.step(SampleRange(2, 2), None), 1e-3).tokens == 2 * SEQ


def test_a_stacked_batch_is_filled_up_without_labels():
    """Three microbatches where a schedule wants four; what stands in teaches nothing."""
    loader = Loader(Counting(), SEQ, ParallelContext.single(), CPU, micro=2, stack=lambda count: max(count, 4))
    batch = loader.load(SampleRange(10, 5))
    (rows,) = batch.microbatches
    assert batch.num_microbatches == 4 and rows.tokens.shape == (8, SEQ) and batch.num_valid == 5 * SEQ
    assert rows.samples.tolist() == [10, 11, 12, 13, 14, 10, 10, 10] and (rows.labels[5:] == -1).all()
    parts = loader_parts = Loader(Counting(), SEQ, ParallelContext.single(), CPU, micro=2).load(SampleRange(10, 6))
    stacked = StepBatch.of(parts.microbatches, lambda count: 4)
    assert stacked.num_valid == loader_parts.num_valid and stacked.microbatches[0].tokens.shape == (8, SEQ)

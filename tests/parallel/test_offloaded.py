"""Training with recompute.offload: the same bits as without recomputation, and the memory that it is for."""

import gc
from weakref import ref

import pytest
import torch
from cases import LAYOUTS, batches, build, gradients, make_recipe, outcome
from late_copies import LateCopies

from megaresnorm import offload
from megaresnorm.model.spans import Span
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.testing import run_ranks

BLOCKS, MICROBATCHES = 7, 4
OFFLOADED = {"block": {"policy": "block", "offload": True}, "every 3": {"policy": "every", "every": 3, "offload": True}}
SPANS = {"block": 7, "every 3": 3}
STREAM = 4 * 16 * 16  # bytes of a microbatch's FP32 stream in cases.py


@pytest.fixture(autouse=True)
def late(monkeypatch):
    """All copies that are made with CPUs, by rank; small tensors are copied, but none of statistics."""
    made = []

    def make():
        made.append(LateCopies())
        return made[-1]

    monkeypatch.setattr(offload, "LEAST", STREAM // 4)  # BF16, and half of the tokens
    monkeypatch.setattr(offload, "PlainCopies", make)
    return made


def recipe_of(policy, topology="pre", variant="llama", compute="fp32", **sections):
    recompute = OFFLOADED.get(policy, {"policy": policy})
    return make_recipe(topology, variant, {}, compute, BLOCKS, recompute=recompute, **sections)


COMPUTE = ("fp32", "bf16", "bf16 stream")


@pytest.mark.parametrize(("topology", "types"), [(topology, [COMPUTE[i % 3]]) for i, topology in enumerate(TOPOLOGIES)])
def test_loss_and_gradients_are_those_without_recomputation(topology, types, late):
    check_bits(topology, "gpt", types, late)


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("variant", ["llama", "gpt"])
def test_loss_and_gradients_are_those_without_recomputation_in_every_type(topology, variant, late):
    check_bits(topology, variant, COMPUTE, late)


def check_bits(topology, variant, types, late):
    """The variant gpt has dropout. Of every span one tensor is copied, but for the last, and never a weight."""
    for compute in types:
        found = {}
        for policy in ("none", *OFFLOADED):
            recipe = recipe_of(policy, topology, variant, compute)
            assembled, engine = build(recipe)
            found[policy] = engine.gradients(batches(engine, recipe))[0], gradients(assembled)
            if policy in OFFLOADED:
                size = STREAM // 2 if compute == "bf16 stream" else STREAM
                (copies,) = late
                assert [size for size, _ in copies.sent] == MICROBATCHES * (SPANS[policy] - 1) * [size]
                addresses = {parameter.data_ptr() for parameter in assembled.parameters().values()}
                assert not addresses & {address for _, address in copies.sent}
                late.clear()
            assert found[policy][0] == found["none"][0]
            for name, gradient in found["none"][1].items():
                assert torch.equal(found[policy][1][name], gradient), (compute, policy, name)


RANKS = {
    "pp2 1f1b": LAYOUTS["pp2 1f1b"],
    "pp2 interleaved": (2, {"pp": 2, "pipeline": "interleaved"}),
    "fsdp2": LAYOUTS["fsdp2"],
    "tp2 tokens": LAYOUTS["tp2 tokens"],
    "tp2 columns, merge": LAYOUTS["tp2 columns, merge"],
    "tp2 columns, gather": LAYOUTS["tp2 columns, gather"],
}


@pytest.mark.parametrize(
    "layout", [name if name == "pp2 1f1b" else pytest.param(name, marks=pytest.mark.slow) for name in RANKS]
)
def test_layouts_train_as_without_recomputation(layout, late):
    """Two steps, the second with gradients of weights that the first has changed."""
    num_ranks, parallel = RANKS[layout]
    compute = "bf16 stream" if "gather" in layout else "fp32"
    for topology, variant in (("pre", "gpt"), ("keel", "llama")):
        recipes = [
            make_recipe(topology, variant, parallel, compute, BLOCKS + 1, recompute=recompute)
            for recompute in ({"policy": "none"}, *OFFLOADED.values())
        ]
        for results in run_ranks(num_ranks, _trained, recipes, late):
            (wanted, _), *others = results
            for got, _ in others:
                different = [name for name, tensor in wanted.items() if not torch.equal(got[name], tensor)]
                assert not different, (topology, different[:3])
            assert others[0][1] > 0, "of every third block some stages have no other than what they receive"


def _trained(rank, recipes, late):
    """Losses, gradients and weights after two steps with each recipe, and how many tensors were copied."""
    results = []
    for recipe in recipes:
        late.clear()
        found = outcome(recipe)
        tensors = {f"gradient of {name}": tensor for name, tensor in found.gradients.items()} | found.weights
        losses = torch.tensor([found.loss, *(loss for loss, _ in found.steps)], dtype=torch.float64)
        results.append((tensors | {"losses": losses}, sum(len(copies.sent) for copies in late)))
    return results


def test_stages_of_a_rank_share_memory_and_leave_what_they_receive_where_it_is():
    """On stages of two blocks each, of which only the first copies its first block's tensor: whether it is first."""
    recipe = make_recipe("pre", "llama", {"pp": 2, "pipeline": "interleaved"}, "fp32", 8, recompute=OFFLOADED["block"])
    first, second = run_ranks(2, _keepers_of_rank, recipe)
    assert first == [[True, False], [None, True]] and second == [[None, True], [None, True]]


def _keepers_of_rank(rank, recipe):
    assembled, _ = build(recipe)
    keepers = [[run.keeper for run in model.runs.values()] for model in assembled.models.values()]
    assert len({id(keeper.func.__self__) for some in keepers for keeper in some if keeper is not None}) == 1
    return [[None if keeper is None else keeper.keywords["first"] for keeper in some] for some in keepers]


@pytest.fixture
def alive(monkeypatch):
    """Weak references to the memory of everything that is kept, in order."""
    found, keep = [], offload.Group.keep

    def noting(group, tensor):
        fetch = keep(group, tensor)
        if group._offload.takes(tensor):
            found.append(ref(tensor.untyped_storage()))
        return fetch

    monkeypatch.setattr(offload.Group, "keep", noting)
    return found


def there(alive):
    return len({storage()._cdata for storage in alive if storage() is not None})


def forward(engine, recipe):
    part = batches(engine, recipe).microbatches[0]
    return engine.model(part.tokens, labels_BS=part.labels, documents_BS=part.documents)[1]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_after_forward_the_device_has_the_tensors_of_two_spans(topology, alive, late):
    recipe = recipe_of("block", topology)
    _, engine = build(recipe)
    loss = forward(engine, recipe)
    assert len(late[0].sent) == BLOCKS - 1 and there(alive) == 2
    gc.collect()
    gc.disable()
    try:
        loss.backward()
        del loss
        assert there(alive) == 0
        loss = forward(engine, recipe)
        del loss  # a pass without backward
        assert there(alive) == 0 and gc.collect() == 0
    finally:
        gc.enable()
    forward(engine, recipe).backward()
    assert late[0].sizes == [offload.PAGE] * (BLOCKS - 1), "of the first pass"


def test_steps_take_no_more_memory_of_the_host_than_the_first(late):
    recipe = recipe_of("every 3", variant="gpt")
    _, engine = build(recipe)
    for step in range(3):
        engine.step(batches(engine, recipe, seed=step), 1e-3)
        assert len(late[0].sizes) == SPANS["every 3"] - 1


def test_an_evaluation_keeps_nothing(late, alive):
    recipe = recipe_of("block")
    _, engine = build(recipe)
    engine.evaluate(batches(engine, recipe))
    assert not alive and not late[0].log


def test_an_error_in_a_forward_pass_leaves_nothing(late, alive, monkeypatch):
    recipe = recipe_of("block")
    _, engine = build(recipe)
    last, run = list(engine.model.runs.values())[-1], Span._run
    assert isinstance(last, Span)

    def fail(span, *arguments):
        if span is last:
            raise RuntimeError("out of memory")
        return run(span, *arguments)

    gc.disable()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Span, "_run", fail)
            with pytest.raises(RuntimeError, match="out of memory") as raised:
                forward(engine, recipe)
            assert len(alive) > 0
            raised.value.__traceback__ = None
            del raised
        assert there(alive) == 0
    finally:
        gc.enable()
    forward(engine, recipe).backward()
    assert len(late[0].sizes) == BLOCKS - 1


@pytest.mark.gpu
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_gpu_trains_as_without_offload_with_less_memory(compute, monkeypatch):
    """Recomputation alone and with offload launch the same kernels; those of attention may add in another order."""
    from megaresnorm.data.loader import Batch, StepBatch
    from megaresnorm.engines.native import NativeEngine
    from megaresnorm.recipe.load import build_recipe

    monkeypatch.undo()
    tokens = torch.randint(256, (4, 1025), generator=torch.Generator().manual_seed(0)).cuda()
    found, peaks = [], []
    for offloads in (False, True):
        recipe = build_recipe({
            "model": {"dim": 512, "num_blocks": 24, "num_heads": 8, "seq_len": 1024, "vocab_size": 256},
            "data": {"path": "none"},
            "train": {"output": "none", "steps": 9, "global_batch": 8, "micro_batch": 4},
            "precision": {"compute": compute},
            "recompute": {"policy": "block", "offload": offloads},
        })  # fmt: skip
        engine = NativeEngine(recipe, device="cuda")
        part = Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(4, device="cuda"))
        loss, _ = engine.gradients(StepBatch.of([part, part]))
        found.append((loss, {name: p.grad.cpu() for name, p in engine.assembled.parameters().items()}))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine.gradients(StepBatch.of([part, part]))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del engine
    (loss, wanted), (other, got) = found
    assert other == pytest.approx(loss, rel=1e-6)
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, name
    stream = 4 * 4 * 1024 * 512
    assert peaks[0] - peaks[1] >= (24 - 4) * stream

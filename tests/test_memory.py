"""The memory that a recipe takes: as much as the code really allocates; refused in one line where there is less."""

import logging
import multiprocessing
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "parallel"))
from cases import LAYOUTS, Batch, StepBatch, batches, build, make_recipe

from megaresnorm.errors import ConfigError
from megaresnorm.memory import memory_of_stages, memory_per_rank
from megaresnorm.model.activations import Activations, BlockKind
from megaresnorm.model.parameters import parameter_table
from megaresnorm.model.topology import TOPOLOGIES, beside_others
from megaresnorm.parallel.data_parallel import PREFETCHED, local
from megaresnorm.parallel.mesh import Sizes
from megaresnorm.precision.dtypes import DTYPES
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.resilience import memory_check
from megaresnorm.resilience.host import HostMemory, host_memory
from megaresnorm.resilience.memory_check import check_memory
from megaresnorm.testing import run_ranks

GB = 10**9
CPU = torch.device("cpu")
EXACT = ("weights", "optimizer", "copies", "gradients", "packed")


def recipe_of(model: dict | None = None, **sections: dict) -> Recipe:
    values: dict = {
        "model": {"dim": 256, "num_blocks": 4, "num_heads": 4, "seq_len": 64, "vocab_size": 512, "topology": "keel"},
        "data": {"path": "none"},
        "train": {"output": "none", "steps": 1000, "global_batch": 8},
    }
    values["model"] |= model or {}
    return build_recipe({name: values.get(name, {}) | sections.get(name, {}) for name in values | sections})


def allocated(recipe: Recipe) -> dict[str, int]:
    """What one rank really has after a backward pass, before the optimizer takes its gradients over."""
    assembled, engine = build(recipe)
    parameters = assembled.parameters()
    slices = [one for group in engine.tensors.values() for one in group.values()]
    engine.gradients(batches(engine, recipe))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
    optimizer = engine._optimizer
    packed = [p.grad for p in optimizer.tensors if p.grad is not None and all(p is not q for q in parameters.values())]
    return {
        "stage": assembled.context.pp.rank,
        "weights": sum(local(p.detach()).nbytes for p in parameters.values()),
        "optimizer": sum(t.nbytes for p in parameters.values() for t in optimizer.state(p).values()),
        "copies": sum(copy.nbytes for copy in engine.low_precision.copies),
        "gradients": sum(local(g).nbytes for g in gradients),
        "packed": sum(g.nbytes for g in packed),
        "checkpoint": sum(s.local.nbytes for s in slices if s.owned and s.local is not None),
    }


def allocated_by_all(rank: int, recipes: list[Recipe]) -> list[dict[str, int]]:
    return [allocated(recipe) for recipe in recipes]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_kinds_that_are_certain_are_those_of_a_run_to_the_byte(num_ranks: int) -> None:
    """But the copies for a checkpoint, of which what several ranks have alike is shared out to within a tensor."""
    layouts = [parallel for ranks, parallel in LAYOUTS.values() if ranks == num_ranks]
    recipes = [
        make_recipe("keel", "llama", parallel, "fp32", num_blocks=8 if num_ranks == 4 else 4) for parallel in layouts
    ]
    if num_ranks == 2:  # tied embeddings and biases in BF16, token gates
        others = [LAYOUTS[name][1] for name in ("tp2 tokens", "pp2 1f1b", "fsdp2", "dp2 ddp")]
        recipes += [make_recipe("pre", "gpt", parallel, "bf16", num_blocks=3) for parallel in others]
        recipes += [make_recipe("gated", "llama", parallel, "fp32", num_blocks=3) for parallel in others]
        stored = {"compute": "bf16", "weights": "bf16"}  # which FSDP2 refuses
        unsharded = [parallel for parallel in others if "dp_shard" not in parallel]
        recipes += [make_recipe("pre", "gpt", parallel, num_blocks=3, precision=stored) for parallel in unsharded]
    for recipe, ranks in zip(recipes, zip(*run_ranks(num_ranks, allocated_by_all, recipes), strict=True), strict=True):
        largest = 3 * 4 * max(spec.num_elements for spec in parameter_table(recipe.model).values())
        for stage, memory in enumerate(memory_of_stages(recipe, num_ranks)):
            mine = [found for found in ranks if found["stage"] == stage]
            for kind in EXACT:
                assert getattr(memory, kind) == max(found[kind] for found in mine), (recipe.parallel, stage, kind)
            assert 0 <= max(found["checkpoint"] for found in mine) - memory.checkpoint < largest


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_one_block_of_each_kind_stands_for_all(name: str) -> None:
    recipe = recipe_of({"topology": name, "num_blocks": 13, **beside_others(name)})
    whole = sum(spec.num_elements for spec in parameter_table(recipe.model).values())
    assert memory_per_rank(recipe, 1).weights == 4 * whole


def test_what_fsdp_gathers_is_a_unit_or_all() -> None:
    model = {"vocab_size": 4096, "dim": 64}
    gathered = {
        reshards: memory_per_rank(recipe_of(model, parallel={"dp_shard": 2, "reshard_after_forward": reshards}), 2)
        for reshards in (True, False)
    }
    elements = sum(spec.num_elements for spec in parameter_table(recipe_of(model).model).values())
    assert gathered[True].gathered == 4 * 4096 * 64  # the embedding
    assert gathered[False].gathered == 4 * elements == 2 * gathered[False].weights
    whole = recipe_of(model, parallel={"dp_shard": 2, "accumulate": "unsharded"}, train={"micro_batch": 1})
    assert memory_per_rank(whole, 2).unsharded == 4 * elements
    assert gathered[True].unsharded == 4 * 4096 * 64


def test_gradients_of_ddp_are_not_beside_its_buckets_at_the_end_of_a_step() -> None:
    """With one microbatch never; with more the sums of earlier ones are, until the last."""
    model = {"dim": 16, "seq_len": 8, "vocab_size": 64}
    for micro, times in ((4, 0), (1, 1)):
        recipe = recipe_of(model, train={"micro_batch": micro}, checkpoint={"asynchronous": False})
        memory = memory_per_rank(recipe, 2)
        assert memory.buckets == memory.gradients == memory.weights
        standing = memory.weights + memory.optimizer + memory.packed + memory.buckets
        assert memory.needed - memory.process == standing + memory.logits + times * memory.gradients


def test_gpus_hold_messages_of_small_blocks_that_are_gathered_ahead() -> None:
    recipe = recipe_of(parallel={"dp_shard": 2}, precision={"compute": "bf16"})
    elements = sum(spec.num_elements for spec in parameter_table(recipe.model).values())
    assert elements < PREFETCHED
    cpu, gpu = (memory_per_rank(recipe, 2, device_type=kind) for kind in ("cpu", "cuda"))
    assert gpu.passing - cpu.passing == 2 * elements
    large = recipe_of({"dim": 2048, "vocab_size": 32_768, "topology": "pre"}, parallel={"dp_shard": 2})
    cpu, gpu = (memory_per_rank(large, 2, device_type=kind) for kind in ("cpu", "cuda"))
    assert gpu.passing == cpu.passing


def test_fp16_counts_like_bf16() -> None:
    """Copies of the matrices and activations of two bytes; what FSDP2 gathers is FP32 once it is there."""
    for parallel in ({}, {"dp_shard": 2}):
        half, brain, whole = (
            memory_per_rank(recipe_of(parallel=parallel, precision={"compute": compute}), 2)
            for compute in ("fp16", "bf16", "fp32")
        )
        assert half == brain and half.activations < whole.activations
        assert (half.copies > 0) == (not parallel) and whole.copies == 0


def saved_bytes(recipe: Recipe) -> int:
    """What autograd keeps of a forward pass of one sequence, without parameters and their copies."""
    assembled, engine = build(recipe)
    copies = engine.low_precision.copies
    ours = {t.untyped_storage().data_ptr() for t in (*assembled.parameters().values(), *copies)}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (at := tensor.untyped_storage().data_ptr()) not in ours:
            seen[at] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assembled.model(torch.zeros((1, recipe.model.seq_len), dtype=torch.int64))
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("name", ["pre", "keel", "peri", "subln", "rezero", "layerscale", "gated", "reordered"])
def test_activations_are_estimated_within_a_tenth(name: str, compute: str) -> None:
    def recipe(blocks: int) -> Recipe:
        model = {"topology": name, "num_blocks": blocks, **beside_others(name)}
        fp8 = {"fp8": {"bf16_first_blocks": 0, "bf16_last_blocks": 0}} if compute == "fp8" else {}
        return recipe_of(model, precision={"compute": compute} | fp8)

    more, fewer = recipe(4), recipe(2)
    of_block = (saved_bytes(more) - saved_bytes(fewer)) / 2 / more.model.seq_len
    sizes = DTYPES[more.precision.branches].itemsize, DTYPES[more.precision.stream].itemsize
    kind = BlockKind.of(more.model, 3, in_fp8=compute == "fp8")
    estimate = Activations(more.model, 1, "full", False, *sizes).of_block(kind)
    assert estimate == pytest.approx(of_block, rel=0.1)


def peak(rank: int, recipe: Recipe) -> int:
    """Largest resident memory of a step beyond that at its beginning."""
    _, engine = build(recipe)
    tokens = torch.zeros((recipe.train.global_batch, recipe.model.seq_len), dtype=torch.int64)
    engine.step(StepBatch.of([Batch(tokens, tokens, torch.arange(len(tokens)))], engine.stack), 1e-3)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    engine.step(StepBatch.of([Batch(tokens, tokens, torch.arange(len(tokens)))], engine.stack), 1e-3)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a process are Linux's")
@pytest.mark.parametrize(
    "model", [{}, *(pytest.param(m, marks=pytest.mark.slow) for m in ({"vocab_size": 65_535}, {"logit_softcap": 5.0}))]
)
def test_logits_are_the_peak_of_a_shallow_model_with_a_large_vocabulary(model: dict) -> None:
    shallow = {"dim": 16, "num_blocks": 1, "seq_len": 64, "vocab_size": 65_536, **model}
    recipe = recipe_of(shallow, train={"global_batch": 4})
    memory = memory_per_rank(recipe, 1)
    with multiprocessing.get_context("spawn").Pool(
        1
    ) as process:  # whose heap holds nothing that other tests have freed
        found = process.apply(peak, (0, recipe))
    assert memory.logits == pytest.approx(found, rel=0.15)


def test_pipelines_keep_microbatches_by_their_order() -> None:
    def stages(order: str) -> list[int]:
        parallel = {"pp": 4, "pipeline": order}
        recipe = recipe_of(
            {"num_blocks": 8, "vocab_size": 64}, parallel=parallel, train={"micro_batch": 1, "global_batch": 16}
        )
        return [memory.received // (4 * 64 * 256) for memory in memory_of_stages(recipe, 4)]

    assert stages("1f1b") == [1, 4, 3, 1]  # of pp - s activations and a gradient, which the ends lack one of
    assert stages("gpipe") == [1, 17, 17, 16]


def test_a_model_that_cannot_fit_is_refused_within_a_second_before_anything_is_built() -> None:
    recipe = recipe_of({"dim": 65_536, "num_blocks": 1000, "num_heads": 512, "vocab_size": 50_000})
    start, before = time.process_time(), _resident("VmRSS")
    with pytest.raises(ConfigError) as refused:
        check_memory(recipe, Sizes(dp_replicate=2), 2, CPU)
    assert time.process_time() - start < 1.0
    assert _resident("VmRSS") - before < 10_000_000
    line = str(refused.value)
    assert "\n" not in line
    assert "2 ranks of this node need at least" in line
    assert "weights 206.2 TB" in line
    assert "parallel.dp_shard" in line


def test_ten_thousand_blocks_are_counted_in_a_moment() -> None:
    recipe = recipe_of({"num_blocks": 10_000, "topology": "mix_ln"})
    start = time.process_time()
    memory = memory_per_rank(recipe, Sizes())
    assert time.process_time() - start < 1.0
    assert memory.weights > 4 * 10_000 * 10 * 256**2


def refuse_within(total: float, recipe: Recipe, ranks: int = 1, *, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(memory_check, "host_memory", lambda: HostMemory(int(total), int(total)))
    with pytest.raises(ConfigError) as refused:
        check_memory(recipe, Sizes(dp_replicate=ranks), ranks, CPU)
    return str(refused.value)


def test_what_helps_by_itself_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of({"num_blocks": 40}, train={"global_batch": 2})
    memory = memory_per_rank(recipe, 1)
    line = refuse_within(memory.needed - memory.checkpoint / 2, recipe, monkeypatch=monkeypatch)
    assert line.endswith("checkpoint.asynchronous=false needs less, and can fit")
    line = refuse_within(memory.needed / 2, recipe, monkeypatch=monkeypatch)
    assert "divide the model over 2 times as many machines" in line
    wide = recipe_of({"num_blocks": 1, "vocab_size": 100_000, "dim": 16}, checkpoint={"asynchronous": False})
    line = refuse_within(memory_per_rank(wide, 1).needed - 10**6, wide, monkeypatch=monkeypatch)
    assert line.endswith("train.micro_batch=1 needs less, and can fit")


def test_ranks_of_a_node_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of({"num_blocks": 40}, train={"global_batch": 2})
    needed = memory_per_rank(recipe, 4).needed
    monkeypatch.setattr(memory_check, "host_memory", lambda: HostMemory(3 * needed, 3 * needed))
    check_memory(recipe, Sizes(dp_replicate=4), 2, CPU)  # two nodes
    assert "4 ranks of this node" in refuse_within(3 * needed, recipe, 4, monkeypatch=monkeypatch)


def test_memory_that_only_activations_exceed_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of({"num_blocks": 40, "seq_len": 4096})
    memory = memory_per_rank(recipe, 1)
    assert memory.total > 2 * memory.needed
    for total, free, warnings in ((2 * memory.total, 2 * memory.total, 0), (memory.needed, memory.needed, 1)):
        monkeypatch.setattr(memory_check, "host_memory", lambda total=total, free=free: HostMemory(total, free))
        with caplog.at_level(logging.WARNING):
            check_memory(recipe, Sizes(), 1, CPU)
        assert len(caplog.records) == warnings
    assert "activations" in caplog.text
    assert "\n" not in caplog.records[0].getMessage()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_host_memory_is_the_least_of_machine_and_groups_of_both_versions(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    assert host_memory(proc, groups) is None
    write(
        proc / "meminfo", "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\nSwapTotal: 1000000 kB\nHugePages_Total: 0\n"
    )
    machine = HostMemory(1024 * 9_000_000, 1024 * 6_000_000)
    assert host_memory(proc, groups) == machine
    write(proc / "self" / "cgroup", "4:memory:/job/step\n3:cpu,cpuacct:/\n0::/pod/box\n")
    assert host_memory(proc, groups) == machine
    write(groups / "pod" / "memory.max", f"{4 * GB}\n")
    write(groups / "pod" / "memory.current", f"{3 * GB}\n")
    write(groups / "pod" / "memory.stat", f"anon 5\ninactive_file {2 * GB}\n")
    write(groups / "pod" / "box" / "memory.max", "max\n")
    assert host_memory(proc, groups) == HostMemory(4 * GB + 1024 * 1_000_000, 3 * GB)
    write(groups / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    write(groups / "memory" / "memory.usage_in_bytes", "7\n")
    write(groups / "memory" / "memory.stat", "total_inactive_file 1\n")
    write(groups / "memory" / "job" / "memory.limit_in_bytes", f"{2 * GB}\n")
    write(groups / "memory" / "job" / "memory.usage_in_bytes", f"{GB}\n")
    write(groups / "memory" / "job" / "memory.stat", "total_inactive_file 0\n")
    assert host_memory(proc, groups) == HostMemory(2 * GB + 1024 * 1_000_000, GB)


def test_this_machine_has_memory() -> None:
    found = host_memory()
    assert found is not None and 0 < found.free <= found.total


def test_a_gpu_keeps_the_checkpoint_and_the_building_in_the_hosts_memory() -> None:
    recipe = recipe_of({"vocab_size": 4096}, parallel={"tp": 2})
    cpu, gpu = (memory_per_rank(recipe, 2, device_type=kind) for kind in ("cpu", "cuda"))
    assert cpu.device.certain == 0
    assert gpu.host.certain == gpu.process + max(gpu.checkpoint, gpu.building)
    assert gpu.device.certain == cpu.needed - cpu.process - cpu.checkpoint


def test_capped_scores_are_written_out_on_a_cpu_alone() -> None:
    plain, capped = (recipe_of({"dim": 64, "seq_len": 512, **cap}) for cap in ({}, {"attention_softcap": 5.0}))
    on_gpu = [memory_per_rank(recipe, 1, device_type="cuda").activations for recipe in (plain, capped)]
    on_cpu = [memory_per_rank(recipe, 1).activations for recipe in (plain, capped)]
    assert on_gpu[0] == on_gpu[1] and on_cpu[1] > 2 * on_cpu[0]


def test_logits_in_parts_are_a_part_of_them_with_the_gradient_of_the_rows() -> None:
    sizes = {"vocab_size": 65_536, "vocab_multiple": 64, "dim": 64, "num_blocks": 1, "seq_len": 4096}
    found = {
        rows: memory_per_rank(recipe_of(sizes, train={"global_batch": 1, "logit_rows": rows}), 1, device_type="cuda")
        for rows in (None, 4096, 128)
    }
    made = 4 * 4096 * 64
    assert found[4096].logits == 4 * 4096 * 65_536
    assert found[None].logits == 4 * 1024 * 65_536 + made and found[128].logits == 4 * 128 * 65_536 + made

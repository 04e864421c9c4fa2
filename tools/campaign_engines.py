"""Training steps of gpu_campaign.py: our engine and its peers, with the same weights on the same tokens."""

import time
from collections.abc import Callable
from typing import Any

import torch
from campaign_report import DEVICE, SMOKE, attempt, emit, row, seconds
from torch import Tensor

Step = Callable[[Tensor, Tensor], float]
DENSE = {
    "num_blocks": 24,
    "dim": 2048,
    "num_heads": 16,
    "ffn_dim": 5632,
    "seq_len": 2048,
    "vocab_size": 50304,
    "batch": 4,
}
DEEP = {
    "num_blocks": 200,
    "dim": 1024,
    "num_heads": 16,
    "ffn_dim": 2816,
    "seq_len": 1024,
    "vocab_size": 32768,
    "batch": 4,
}
if SMOKE:
    DENSE = {
        **DENSE,
        "num_blocks": 2,
        "dim": 32,
        "num_heads": 2,
        "ffn_dim": 64,
        "seq_len": 16,
        "vocab_size": 128,
        "batch": 2,
    }
    DEEP = {**DENSE, "num_blocks": 3}
elif DEVICE.type == "cuda" and torch.cuda.get_device_properties(DEVICE).total_memory < 100 * 2**30:
    DEEP["batch"] = 2  # 84 GB of states and activations with 4


def recipe_of(settings: dict, compiled: str) -> Any:
    from megaresnorm.recipe.load import build_recipe

    model = {k: v for k, v in settings.items() if k != "batch"}
    batch = settings["batch"]
    train = {
        "output": "none",
        "steps": 1,
        "global_batch": batch,
        "micro_batch": batch,
        "compile": compiled,
    }
    return build_recipe({
        "model": {**model, "topology": "pre", "norm": "rmsnorm", "positions": "rope", "ffn": "swiglu"},
        "data": {"path": "none"}, "train": train, "precision": {"compute": "bf16"},
    })  # fmt: skip


def drawn_on_the_device(spec: Any, seed: int, dtype: torch.dtype, device: torch.device, buffer: Any = None) -> Tensor:
    """``initial_value`` drawn where the model will be: a CPU would take half a minute for each model of 2.6 B."""
    generator = torch.Generator(DEVICE).manual_seed(seed + sum(spec.name.encode()))
    parts = [
        torch.full((part.rows, *spec.shape[1:]), part.mean, device=DEVICE)
        if part.std == 0.0
        else torch.randn(part.rows, *spec.shape[1:], device=DEVICE, generator=generator) * part.std + part.mean
        for part in spec.parts
    ]
    return torch.cat(parts).to(dtype)


def engine_of(settings: dict, mode: str) -> Any:
    from megaresnorm.engines.native import NativeEngine
    from megaresnorm.model import init
    from megaresnorm.testing import RunAgain

    init.initial_value = drawn_on_the_device
    if DEVICE.type == "cuda" or mode != "cuda_graphs":
        return NativeEngine(recipe_of(settings, mode), device=DEVICE)
    engine = NativeEngine(recipe_of(settings, "blocks"), device=DEVICE)
    engine.record_microbatches(RunAgain())  # what a graph is to the engine, without a GPU
    return engine


def ours(settings: dict, engine: Any) -> Step:
    from megaresnorm.data.loader import Batch, StepBatch

    def step(rows: Tensor, labels: Tensor) -> float:
        size = settings["batch"]
        numbers = torch.arange(len(rows), device=DEVICE)
        parts = zip(rows.split(size), labels.split(size), numbers.split(size), strict=True)
        microbatches = tuple(Batch(*part) for part in parts)
        return engine.step(StepBatch(microbatches, len(microbatches), labels.numel()), 1e-3).loss  # the peers' rate

    return step


def peer(settings: dict, mode: str, weights: dict[str, Tensor]) -> Step:
    """Transformers' Llama, or the model of plain_llama.py, under autocast: FP32 weights and BF16 products, as ours."""
    from peers import PEERS, Peer, Place, Shape
    from plain_llama import PlainLlama

    names = ("num_blocks", "dim", "num_heads", "seq_len", "batch", "vocab_size", "ffn_dim")
    shape = Shape("llama", *(settings[name] for name in names))
    with torch.device(DEVICE):
        if mode.startswith("plain"):
            model = PlainLlama(shape.num_blocks, shape.dim, shape.num_heads, shape.ffn_dim, shape.vocab_size).load(
                weights
            )
            made = Peer(model, model, "autocast", batch=shape.batch)
        else:
            made = PEERS["llama"]["transformers Llama"](shape, weights, "autocast", Place())
    if "compiled" in mode:
        layers = made.model.layers if mode.startswith("plain") else made.model.model.layers
        for layer in layers:
            layer.compile(dynamic=False)
    return made.step


def tokens(settings: dict, microbatches: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (settings["batch"] * microbatches, settings["seq_len"] + 1)
    rows = torch.randint(settings["vocab_size"], size, generator=generator).to(DEVICE)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def race(title: str, settings: dict, contenders: list[str], microbatches: list[int]) -> None:
    """Tokens a second, MFU and peak memory of each, one after the other, and the losses of the first steps."""
    from megaresnorm.model.cost import training_flops
    from megaresnorm.telemetry.throughput import peak_tflops

    title = f"{title}, {settings['num_blocks']} x {settings['dim']}"
    flops, peak = training_flops(recipe_of(settings, "none").model), peak_tflops(DEVICE, "bf16")
    emit(note=f"{title}: MFU is tokens/s x {flops / 1e9:.3f} GFLOP (three times the products of a forward pass, causal "
              f"attention at half, five operations a logit) / {peak} TFLOP/s")  # fmt: skip
    weights: dict[str, Tensor] = {}
    for name in contenders:
        with attempt(title, name):
            _contend(title, name, settings, microbatches, weights, (flops, peak))


def _contend(
    title: str, name: str, settings: dict, microbatches: list[int], weights: dict, formula: tuple[int, float | None]
) -> None:
    before, start = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0, time.perf_counter()
    if before > 1e9:
        emit(note=f"{name}: {before / 1e9:.1f} GB of an earlier contender are still there")
    if name.startswith("ours"):
        engine = engine_of(settings, name.split()[-1])
        if not weights:  # with which the peers begin as well
            weights.update({key: t.detach().cpu().clone() for key, t in engine.full_state().items()})
        step = ours(settings, engine)
    else:
        step = peer(settings, name, weights)
    one = tokens(settings, 1)
    losses = [step(*one) for _ in range(2 if SMOKE else 6)]  # compiles, records
    cells: dict[str, Any] = {
        "losses": [round(x, 4) for x in losses[:3]],
        "ready, s": round(time.perf_counter() - start, 1),
    }
    for count in microbatches:
        data = tokens(settings, count)
        rate = data[0].numel() / seconds(lambda data=data: step(*data), 3.0 / count**0.5)
        cells[f"tokens/s, {count} microbatches"] = round(rate)
        cells[f"MFU, {count}"] = None if formula[1] is None else round(rate * formula[0] / 1e12 / formula[1], 4)
    if DEVICE.type == "cuda":
        cells["peak GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    row(title, name=name, **cells)

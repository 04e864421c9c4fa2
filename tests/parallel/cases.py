"""One model on any layout: the recipe, a batch of very unequal microbatches and ranks, and what a run of it gives."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from digests import engine_digest
from torch import Tensor

from megaresnorm.assemble import Assembled
from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines import make_engine
from megaresnorm.engines.native import NativeEngine
from megaresnorm.engines.state import FullState
from megaresnorm.layout import check_layout
from megaresnorm.model.topology import beside_others
from megaresnorm.parallel.data_parallel import local
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.testing import run_ranks

SAMPLES, SEQ, VOCAB, MICRO = 8, 8, 37, 2

LAYOUTS: dict[str, tuple[int, dict]] = {
    "tp2 full": (2, {"tp": 2}),
    "tp2 tokens": (2, {"tp": 2, "tensor_layout": "tokens"}),
    "tp2 columns, merge": (2, {"tp": 2, "tensor_layout": "columns", "columns_norm": "merge"}),
    "tp2 columns, gather": (2, {"tp": 2, "tensor_layout": "columns", "columns_norm": "gather"}),
    "pp2 1f1b": (2, {"pp": 2}),
    "pp2 gpipe": (2, {"pp": 2, "pipeline": "gpipe"}),
    "dp2 ddp": (2, {}),
    "fsdp2": (2, {"dp_shard": 2}),
    "fsdp2 gradients": (2, {"dp_shard": 2, "reshard_after_forward": False}),
    "fsdp2 unsharded": (2, {"dp_shard": 2, "accumulate": "unsharded"}),
    "pp4 interleaved": (4, {"pp": 4, "pipeline": "interleaved"}),
    "pp2 interleaved dp2": (4, {"pp": 2, "pipeline": "interleaved", "dp_replicate": 2}),
    "pp2 interleaved fsdp2": (4, {"pp": 2, "pipeline": "interleaved", "dp_shard": 2}),
    "hsdp": (4, {"dp_shard": 2, "dp_replicate": 2}),
    "pp2 fsdp2 unsharded": (4, {"pp": 2, "dp_shard": 2, "accumulate": "unsharded"}),
    "hsdp tp2": (8, {"dp_shard": 2, "dp_replicate": 2, "tp": 2, "tensor_layout": "tokens"}),
    "pp2 hsdp": (8, {"pp": 2, "dp_shard": 2, "dp_replicate": 2}),
    "tp2 pp2 dp2": (8, {"tp": 2, "pp": 2, "dp_replicate": 2}),
    "tp2 pp2 fsdp2": (8, {"tp": 2, "pp": 2, "dp_shard": 2, "tensor_layout": "columns"}),
}
# The other half of the options: learned positions, GELU, tied embeddings, dropout, QK-norm over all heads, RMSNorm.
VARIANTS: dict[str, dict] = {
    "llama": {"norm": "rmsnorm"},
    "gpt": {
        "norm": "layernorm", "bias": True, "positions": "learned", "ffn": "gelu", "tied_embeddings": True,
        "dropout": 0.1, "qk_norm": "full", "logit_softcap": 5.0,
    },
}  # fmt: skip
# Options of published models: partial and stretched rotary positions, multipliers, caps, GEGLU, zero-centred norms.
PUBLISHED: dict[str, dict] = {
    "gemma": {
        "norm_zero_centered": True, "ffn": "geglu_tanh", "attention_bias": "qkv", "rope_fraction": 0.5,
        "qk_norm": "head", "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_seq_len": 4},
        "embedding_multiplier": 2.0, "attention_multiplier": 0.3, "attention_softcap": 2.0, "logits_scaling": 2.0,
        "tied_embeddings": True,
    },
    "granite": {"topology_options": {"gate": 0.3}, "logits_scaling": 4.0, "bias": True, "attention_bias": "none",
                "ffn": "relu"},
    "own alpha": {"topology_options": {"alpha": 1.7}, "norm": "layernorm", "ffn": "gelu_tanh", "attention_bias": "all"},
}  # fmt: skip
# As a recipe says it, and with the stream in the type of compute, which the gathering form needs.
PRECISIONS: dict[str, dict] = {"bf16 stream": {"compute": "bf16", "residual_dtype": "bf16"}}


class Outcome(NamedTuple):
    """Loss and gradients of one batch; then loss and gradient norm of every step, final weights and their digest."""

    loss: float
    gradients: dict[str, Tensor]
    steps: list[tuple[float, float]]
    weights: dict[str, Tensor]
    digest: str


def make_recipe(
    topology: str, variant: str, parallel: dict, compute: str = "fp64", num_blocks: int = 8,
    logit_rows: int | None = None, **sections: dict,
) -> Recipe:  # fmt: skip
    model = {
        "dim": 16, "num_blocks": num_blocks, "num_heads": 4, "num_kv_heads": 2, "seq_len": SEQ, "vocab_size": VOCAB,
        "vocab_multiple": 8, "ffn_dim": 24, "topology": topology, **beside_others(topology),
        **(VARIANTS | PUBLISHED)[variant], **sections.pop("model", {}),
    }  # fmt: skip
    gpt = variant == "gpt"
    train = {
        "output": "none",
        "steps": 30,
        "global_batch": SAMPLES,
        "micro_batch": MICRO,
        "z_loss": 1e-2 if gpt else 0.0,
        "logit_rows": logit_rows,
    }
    values = {
        "model": model,
        "data": {"path": "none", "mask_documents": gpt},
        "train": train,
        "precision": PRECISIONS.get(compute, {"compute": compute}),
        "parallel": parallel,
    }
    return build_recipe(values | sections)


def build(recipe: Recipe) -> tuple[Assembled, NativeEngine]:
    """On the process group there is, or on one process without one; with the engine of the recipe."""
    sizes = check_layout(recipe, dist.get_world_size() if dist.is_initialized() else 1)
    context = ParallelContext.create(sizes, "cpu")
    engine = make_engine(recipe, context, torch.device("cpu"))
    return engine.assembled, engine


def batches(engine: NativeEngine, recipe: Recipe, seed: int = 3) -> StepBatch:
    """This rank's microbatches.

    One sample has no label at all, one has two, another lacks its first three; each has up to three documents where
    they are kept apart.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(VOCAB, (SAMPLES, SEQ + 1), generator=generator)
    labels = rows[:, 1:].clone()
    labels[1, 2:], labels[4], labels[5, :3] = -1, -1, -1
    documents = (
        torch.randint(2, (SAMPLES, SEQ), generator=generator).cumsum(1).clamp(max=2)
        if recipe.data.mask_documents
        else None
    )
    mine = torch.arange(engine.context.dp.rank, SAMPLES, engine.context.dp.size)
    parts = [Batch(rows[i, :-1], labels[i], i, None if documents is None else documents[i]) for i in mine.split(MICRO)]
    return StepBatch.of(parts, engine.stack)


def gradients(assembled: Assembled) -> dict[str, Tensor]:
    """Whole gradients by global name; they stay where they are."""
    parts = {
        name: torch.zeros_like(local(p.detach())) if p.grad is None else local(p.grad)
        for name, p in assembled.parameters().items()
    }
    return {name: t.clone() for name, t in FullState(assembled, parts).items()}


def found_with(rank: int, recipes: list[Recipe]) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and whole gradients with each recipe."""
    results = []
    for recipe in recipes:
        assembled, engine = build(recipe)
        loss, _ = engine.gradients(batches(engine, recipe))
        results.append((loss, gradients(assembled)))
    return results


def descend(engine: NativeEngine, lr: float) -> None:
    """Plain SGD along the gradients there are, which are gone then."""
    with torch.no_grad():
        for p in engine.assembled.parameters().values():
            if p.grad is not None:
                local(p.detach()).sub_(local(p.grad), alpha=lr)
                p.grad = None
    engine.weights_changed()


def outcome(recipe: Recipe, *, steps: int = 2, optimizer: str = "sgd") -> Outcome:
    """The gradients are of the weights at the start; the first step of SGD goes along them."""
    assembled, engine = build(recipe)
    loss, _ = engine.gradients(batches(engine, recipe))
    found = gradients(assembled)
    done: list[tuple[float, float]] = []
    if optimizer != "sgd":
        descend(engine, lr=0.0)  # each of its steps makes gradients of its own
    for step in range(steps):
        if optimizer == "sgd":
            here = loss if step == 0 else engine.gradients(batches(engine, recipe))[0]
            done.append((here, 0.0))
            descend(engine, lr=0.01)
        else:
            stats = engine.step(batches(engine, recipe, seed=step), 1e-3)
            done.append((stats.loss, stats.gradient_norm))
    weights = {name: t.clone() for name, t in engine.full_state().items()}
    return Outcome(loss, found, done, weights, engine_digest(engine))


def outcomes(num_ranks: int, recipes: list[Recipe], options: dict) -> list[list[Outcome | str]]:
    """Of every recipe on every rank; the ranks beside the first give digests alone."""
    first, *others = run_ranks(num_ranks, _outcomes_of_rank, recipes, options)
    return [[Outcome(**one) for one in first], *others]


def _outcomes_of_rank(rank: int, recipes: list[Recipe], options: dict) -> list[dict | str]:
    results = [outcome(recipe, **options) for recipe in recipes]
    return [result._asdict() if rank == 0 else result.digest for result in results]


def errors(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of every tensor, on the scale of its largest element or 1e-3 of the model's largest.

    The gradient of a key's bias is zero in mathematics, and judged on the scale of the whole fused bias it stands in.
    """
    largest = max(t.abs().max().item() for t in wanted.values())
    return {
        name: (got[name].double() - t).abs().max().item() / max(t.abs().max().item(), 1e-3 * largest)
        for name, t in wanted.items()
    }

"""How a model is split over ranks, and whether it fits. Pure: nothing is allocated, no rank is asked."""

from megaresnorm.errors import ConfigError
from megaresnorm.model.cost import block_flops, embedding_flops, head_flops
from megaresnorm.model.transformer import Stage
from megaresnorm.parallel.mesh import Sizes, resolve_sizes
from megaresnorm.parallel.stages import split_blocks, stage_ranges
from megaresnorm.recipe import KernelRecipe, ModelRecipe, ParallelRecipe, PrecisionRecipe, Recipe, divisors
from megaresnorm.recipe.names import flat

LARGE_VOCABULARY = 1 << 16  # tokens of a rank from which on the logits of a microbatch are the largest tensor by far
WHOLE_ROWS = ("cpu", "reference", "liger", "quack")  # backends of the loss without pieces
LOGITS = 1 << 26  # at a time, of a large vocabulary: 128 MiB in BF16, and products of 512 rows and more


def gathers_stream(parallel: ParallelRecipe, precision: PrecisionRecipe) -> bool:
    """Whether tensor_layout=columns gathers the stored stream, rather than its normalised columns."""
    return parallel.columns_norm != "merge" and precision.stream == precision.branches


def split_stages(recipe: ModelRecipe, parallel: ParallelRecipe) -> list[Stage]:
    """The pipeline's stages, as the recipe says or balanced by cost."""
    if parallel.stage_blocks is not None:
        ranges = stage_ranges(parallel.stage_blocks)
    else:
        ranges = split_blocks(
            recipe.num_blocks,
            parallel.num_stages,
            block=block_flops(recipe),
            first=embedding_flops(recipe),
            last=head_flops(recipe),
        )
    last = len(ranges) - 1
    return [Stage(blocks, has_embedding=i == 0, has_head=i == last) for i, blocks in enumerate(ranges)]


def logit_rows_of(recipe: Recipe, tp: int, device_type: str) -> int | None:
    """Tokens whose logits exist at a time in training, from train.logit_rows; None: those of a whole microbatch."""
    rows, vocabulary = recipe.train.logit_rows, recipe.model.padded_vocab_size // tp
    if rows is None:
        # Under gpipe every microbatch would keep a gradient of the output matrix until its backward pass.
        large = device_type == "cuda" and vocabulary >= LARGE_VOCABULARY and recipe.parallel.pipeline != "gpipe"
        return max(1, LOGITS // vocabulary) if large else None
    return rows


def ranks_without_samples(recipe: Recipe, sizes: Sizes) -> str | None:
    """What to say where a global batch has fewer samples than there are data-parallel ranks; None otherwise."""
    ranks, batch = sizes.dp_replicate * sizes.dp_shard, recipe.train.global_batch
    if ranks <= batch:
        return None
    return (
        f"train.global_batch={batch} has samples for {batch:,} of {ranks:,} data-parallel ranks, and the others have "
        "nothing to do; raise it, or use fewer ranks"
    )


def opaque_kernel(kernels: KernelRecipe, precision: PrecisionRecipe) -> str | None:
    """What torch.compile does not see through in the blocks, as key=value; None where there is nothing.

    That is a kernel of another package; FP8, where each layer's products are an object of its own, which has its
    weight, so that no two layers would share code; or weights in BF16, whose gradients it would round to BF16.
    """
    if precision.compute == "fp8":
        return "precision.compute=fp8"
    if precision.weights == "bf16":
        return "precision.weights=bf16"
    packages = {"add_norm": ("te", "apex", "liger", "quack"), "activation": ("liger",)}
    named = [(op, getattr(kernels, op)) for op in packages]
    return next((f"kernels.{op}={backend}" for op, backend in named if backend in packages[op]), None)


def check_sharded_loss(kernels: KernelRecipe, tp: int) -> None:
    """Check that the backend of the loss that was asked for can have a vocabulary sharded over tp.

    Raises:
        ConfigError: it reads whole rows of logits.
    """
    if tp > 1 and kernels.cross_entropy in WHOLE_ROWS:
        raise ConfigError(
            f"kernels.cross_entropy={kernels.cross_entropy} knows no vocabulary sharded over parallel.tp={tp}; "
            "use auto or chunked"
        )


def check_rotary(model: ModelRecipe, kernels: KernelRecipe) -> None:
    """Check that there is something to rotate, or a head to normalize, for a rotary backend that was asked for.

    Raises:
        ConfigError: there is nothing.
    """
    if kernels.rotary != "auto" and not calls_rotary(model):
        raise ConfigError(
            f"kernels.rotary={kernels.rotary} has no effect: model.positions={model.positions} rotates nothing; "
            "use auto"
        )


def calls_rotary(model: ModelRecipe) -> bool:
    """Whether attention has rotary positions or norms of heads."""
    return model.positions == "rope" or model.qk_norm == "head"


def check_execution(recipe: Recipe, sizes: Sizes, device_type: str) -> None:
    """Check that a layout can be compiled, recorded or made deterministic as the recipe says, on this kind of device.

    Raises:
        ConfigError: something cannot; the line says what would.
    """
    mode, gpu = recipe.train.compile, device_type == "cuda"
    check_sharded_loss(recipe.kernels, sizes.tp)
    check_rotary(recipe.model, recipe.kernels)
    if mode in ("blocks", "cuda_graphs") and (opaque := opaque_kernel(recipe.kernels, recipe.precision)):
        raise ConfigError(f"train.compile={mode}: {opaque} cannot be compiled into a block; use train.compile=none")
    spans = recipe.recompute.policies & {"block", "every", "auto"}
    if mode == "blocks" and sizes.dp_shard > 1 and spans:
        raise ConfigError(
            f"train.compile=blocks with parallel.dp_shard={sizes.dp_shard}: recompute.policy={min(spans)} runs whole "
            "blocks again, around FSDP2's hooks; use recompute.policy=branch, or train.compile=none"
        )
    if mode == "cuda_graphs":
        reasons = {
            f"records one rank's microbatch, not the messages of {sizes.num_ranks} ranks": sizes.num_ranks > 1,
            "has graphs of one length of document, data.mask_documents=true of many": recipe.data.mask_documents,
            "records no host that waits for its labels, as kernels.cross_entropy=liger does": (
                recipe.kernels.cross_entropy == "liger"
            ),
            f"needs a GPU, this is {device_type}": not gpu,
        }
        against = next((reason for reason, holds in reasons.items() if holds), None)
        if against:
            raise ConfigError(f"train.compile=cuda_graphs {against}; try train.compile=blocks")
    for key, value in flat(recipe.engine.passed_on).items():
        if key.endswith("pin_memory") and value and not gpu:
            raise ConfigError(f"engine.deepspeed.{key}=true has no effect on a CPU, which copies nothing; remove it")
    if recipe.train.deterministic and gpu:
        if recipe.kernels.add_norm in ("te", "apex"):
            raise ConfigError(
                f"train.deterministic=true: kernels.add_norm={recipe.kernels.add_norm} is not known to repeat its "
                "sums; use triton"
            )
        if recipe.data.mask_documents:
            raise ConfigError(
                "train.deterministic=true: on a GPU data.mask_documents=true takes attention whose gradient is summed "
                "in any order; set one of them to false"
            )


def check_layout(recipe: Recipe, num_ranks: int) -> Sizes:
    """The sizes of all axes for a recipe whose vocab_size is set; called before anything starts.

    Raises:
        ConfigError: something does not fit; the line says what would.
    """
    model, parallel = recipe.model, recipe.parallel
    sizes = resolve_sizes(
        num_ranks, pp=parallel.pp, dp_replicate=parallel.dp_replicate, dp_shard=parallel.dp_shard, tp=parallel.tp
    )
    rows = model.padded_vocab_size
    if rows % sizes.tp or (sizes.tp - 1) * (rows // sizes.tp) >= (model.vocab_size or 0):
        raise ConfigError(
            f"parallel.tp={sizes.tp} must divide the {rows} padded rows of model.vocab_size={model.vocab_size}, with a "
            f"token for every rank; set model.vocab_multiple to a multiple of {sizes.tp}, or try parallel.tp in "
            f"{divisors(rows)[:6]}"
        )
    micro = recipe.train.micro_batch_of(sizes.dp_replicate * sizes.dp_shard, sizes.pp)
    if parallel.tensor_layout == "tokens" and micro * model.seq_len % sizes.tp:
        raise ConfigError(
            f"parallel.tp={sizes.tp} must divide the {micro * model.seq_len} tokens of a microbatch under "
            "tensor_layout=tokens; change train.micro_batch or model.seq_len, or use tensor_layout=columns, which "
            "needs no such thing"
        )
    return sizes

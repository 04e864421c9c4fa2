"""The one place and order in which a model is put together: bare stages, which an engine then wraps.

Meta model in its tensor layout and precision, compile, the engine's sharding, materialise, initialise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megaresnorm.errors import ConfigError
from megaresnorm.kernels import load_backends
from megaresnorm.kernels.add_norm.spec import sharded_norm_kernels
from megaresnorm.kernels.attention import PREPARATIONS, FusedAttention, Segments
from megaresnorm.kernels.cross_entropy import CrossEntropyKernel, loss_of
from megaresnorm.kernels.fp8.product import kind_of
from megaresnorm.kernels.registry import Kernel, choose_kernel, kernel_named
from megaresnorm.layout import (
    calls_rotary,
    check_rotary,
    check_sharded_loss,
    gathers_stream,
    opaque_kernel,
    split_stages,
)
from megaresnorm.model.compiled import compile_blocks, resolve_compile_mode
from megaresnorm.model.init import materialize
from megaresnorm.model.norm import Norm
from megaresnorm.model.parameters import global_name, parameter_table
from megaresnorm.model.specs import ParameterSpec
from megaresnorm.model.stream import AddNorm, Kernels
from megaresnorm.model.transformer import Transformer
from megaresnorm.offload import Offload
from megaresnorm.parallel.control import all_gather_json
from megaresnorm.parallel.head import HeadLoss
from megaresnorm.parallel.layouts import FullLayout, TensorLayout, tensor_layout
from megaresnorm.parallel.linear_kernel import PLAIN, LinearKernel
from megaresnorm.parallel.mesh import Axis, ParallelContext
from megaresnorm.parallel.sharded_norm import ShardedNorm
from megaresnorm.parallel.stages import stages_of_rank
from megaresnorm.parallel.vocab import vocab_parallel_loss
from megaresnorm.precision.dtypes import DTYPES, StoredDtypes, stored_dtypes
from megaresnorm.precision.fp8 import compute_in_fp8, fp8_blocks
from megaresnorm.precision.half import half_linear
from megaresnorm.recipe import KernelRecipe, ModelRecipe, ParallelRecipe, PrecisionRecipe, RecomputeRecipe
from megaresnorm.recompute_plan import Segment, segments_of, set_up


@dataclass(frozen=True)
class Assembled:
    """A model, or this rank's stages of one, and what was decided on the way.

    Attributes:
        models: this rank's stages by number; one process has stage 0 alone.
        table: parameters of the whole model by global name.
        dtypes: the types that they are stored in.
        backends: chosen kernel backend by op.
        kernel_choices: the same with their reasons, and of compiling, for people to read.
        compiled: what ``train.compile`` came to.
        segments: which blocks are recomputed how, by stage, of all stages.
    """

    models: dict[int, Transformer]
    table: dict[str, ParameterSpec]
    dtypes: StoredDtypes
    layout: TensorLayout
    context: ParallelContext
    device: torch.device
    backends: dict[str, str]
    kernel_choices: dict[str, str]
    compiled: str
    segments: Mapping[int, Sequence[Segment]]

    @property
    def model(self) -> Transformer:
        """This rank's part of the model, where it has a single stage of it."""
        (model,) = self.models.values()
        return model

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by global name."""
        return {
            global_name(name, self.table): parameter
            for model in self.models.values()
            for name, parameter in model.named_parameters()
        }

    @property
    def copies(self) -> set[str]:
        """Parameters of this rank that an earlier rank of the pipeline has as well: a tied output matrix."""
        tied = "embedding.weight" in self.parameters() and not any(m.stage.has_embedding for m in self.models.values())
        return {"embedding.weight"} if tied else set()


def build_model(
    recipe: ModelRecipe,
    precision: PrecisionRecipe | None = None,
    kernels: KernelRecipe | None = None,
    parallel: ParallelRecipe | None = None,
    context: ParallelContext | None = None,
    *,
    recompute: RecomputeRecipe | None = None,
    segments: Mapping[int, Sequence[Segment]] | None = None,
    seed: int = 1234,
    device: str | torch.device = "cpu",
    compiled: str = "none",
    logit_rows: int | None = None,
    shard: Callable[[Transformer], None] | None = None,
    on_parameter: Callable[[nn.Parameter], None] = lambda _: None,
    shards_later: bool = False,
) -> Assembled:
    """Build, materialise and initialise the model of a recipe, or a rank's part of it. Collective.

    Args:
        recipe: with a vocab_size.
        context: None for one process.
        segments: of all stages; None: as ``recompute`` names them, whose policy is then not auto.
        compiled: train.compile.
        logit_rows: tokens whose logits exist at a time in training; None: all.
        shard: called with every stage while it is on the meta device, so that a rank gets memory for its shards alone.
        on_parameter: called with every parameter as soon as it has its value, in the same order on all ranks of dp,
            which may then partition it.
        shards_later: whether the engine will shard the finished model, and gather its weights by hooks in the blocks.

    Communication:
        None: initial weights are not sent.

    Raises:
        ConfigError: a topology, kernel or device cannot be used.
    """
    load_backends()
    device, recompute = torch.device(device), recompute or RecomputeRecipe()
    precision, kernels = precision or PrecisionRecipe(), kernels or KernelRecipe()
    parallel, context = parallel or ParallelRecipe(), context or ParallelContext.single()
    offload = Offload.of_device(device) if recompute.offload else None
    opaque, dtypes = opaque_kernel(kernels, precision), stored_dtypes(precision)
    sharded = shards_later or shard is not None
    compiling = resolve_compile_mode(compiled, recipe, device.type, tp=context.tp.size, sharded=sharded, opaque=opaque)
    compute, stored = DTYPES[precision.branches], DTYPES[precision.stream]
    kinds = {"activation": recipe.ffn, "attention": "plain" if recipe.attention_softcap is None else "softcap"}
    chosen = {
        op: choose_kernel(op, backend, device, compute, kinds.get(op), fused=op in compiling.fused)
        for op, backend in kernels
    }
    norm = ShardedNorm(context.tp, sharded_norm_kernels(chosen["add_norm"][0].backend), parallel.merge_chunks)
    layout = _layout(parallel, precision, context.tp, norm, keeps=recompute.gathered == "keep")
    choices = {op: line for op, (_, line) in chosen.items()} | compiling.choices(device.type)
    backends = {op: kernel.backend for op, (kernel, _) in chosen.items()}
    loss_kernel = _loss_kernel(chosen["cross_entropy"][0], kernels, context.tp.size)
    backends["cross_entropy"] = loss_kernel.backend
    choices["cross_entropy"] = _loss_choice(choices["cross_entropy"], loss_kernel, context.tp.size, logit_rows)
    functions = {op: kernel.function for op, (kernel, _) in chosen.items()}
    linear = half_linear(compute, device) if compute.itemsize == 2 else PLAIN
    attention = _fused_attention(recipe, kernels, chosen["attention"][0], choices, backends)
    prepare = PREPARATIONS.get(backends["attention"])
    model_kernels = _model_kernels(functions, layout, attention, norm, linear, stored, compute, prepare)
    stages = split_stages(recipe, parallel)
    segments = segments or {i: segments_of(recompute, stage.blocks) for i, stage in enumerate(stages)}
    table = parameter_table(recipe, parallel.tensor_layout if context.tp.size > 1 else "full")
    models: dict[int, Transformer] = {}
    for number in stages_of_rank(context.pp.rank, context.pp.size, len(stages)):
        with torch.device("meta"):
            model = Transformer(recipe, model_kernels, layout, stages[number])
        set_up(model, segments[number], offload)
        _compute_in_fp8(model, precision, choices, backends, device)
        compile_blocks(model, compiling)
        if shard is not None:
            shard(model)
        materialize(model, table, context, seed=seed, dtype_of=dtypes.of, device=device, on_parameter=on_parameter)
        if model.head is not None:
            model.head.loss = HeadLoss(_loss_of(loss_kernel, model, context.tp), logit_rows)
        models[number] = model
    return Assembled(models, table, dtypes, layout, context, device, backends, choices, compiling.mode, segments)


def _compute_in_fp8(
    model: Transformer,
    precision: PrecisionRecipe,
    choices: dict[str, str],
    backends: dict[str, str],
    device: torch.device,
) -> None:
    """Let the blocks of a stage that are to be in FP8 compute so, by the backend that is chosen here."""
    if precision.compute != "fp8":
        return
    fp8 = precision.fp8
    kind = kind_of(fp8.recipe, fp8.gradients)
    product, choices["fp8_product"] = choose_kernel(
        "fp8_product", fp8.backend, device, torch.bfloat16, kind, setting="precision.fp8.backend"
    )
    quantize, choices["fp8_quantize"] = choose_kernel("fp8_quantize", "auto", device, torch.bfloat16)
    backends |= {"fp8_product": product.backend, "fp8_quantize": quantize.backend}
    inner = fp8_blocks(fp8, model.recipe.num_blocks)
    blocks = (block for i, block in model.blocks.items() if int(i) in inner)
    compute_in_fp8(blocks, fp8, product.function, quantize.implementation)


def _layout(
    parallel: ParallelRecipe, precision: PrecisionRecipe, tp: Axis, norm: ShardedNorm, *, keeps: bool
) -> TensorLayout:
    gather = gathers_stream(parallel, precision)
    return tensor_layout(parallel.tensor_layout, tp, gather=gather, norm=norm, keeps=keeps)


def _loss_kernel(chosen: Kernel, kernels: KernelRecipe, tp: int) -> Kernel:
    """The backend of the loss; over a sharded vocabulary one that has the pieces of it."""
    check_sharded_loss(kernels, tp)
    return chosen if tp == 1 or chosen.implementation is not None else kernel_named("cross_entropy", "chunked")


def _loss_choice(line: str, kernel: Kernel, tp: int, logit_rows: int | None) -> str:
    """The line of the choice, with what else decides how the loss is computed."""
    start, found, why = line.partition(" (")
    if tp > 1:
        start, found, why = f"{start.rpartition(' ')[0]} {kernel.backend}, vocabulary sharded over {tp} ranks", "", ""
    parts = "" if logit_rows is None else f", logits of {logit_rows:,} tokens at a time"
    return f"{start}{parts}{found}{why}"


def _fused_attention(
    recipe: ModelRecipe, kernels: KernelRecipe, attention: Kernel, choices: dict[str, str], backends: dict[str, str]
) -> FusedAttention | None:
    """The form of attention that rotates by itself, where a backend has it and no other was asked to.

    Where the rotary op is not called, it is no choice either.
    """
    check_rotary(recipe, kernels)
    fused: FusedAttention | None = attention.implementation if kernels.rotary == "auto" else None
    if fused is not None or not calls_rotary(recipe):
        del choices["rotary"], backends["rotary"]
    return fused


def _loss_of(kernel: Kernel, model: Transformer, tp: Axis) -> CrossEntropyKernel:
    if tp.size == 1:
        return loss_of(kernel, model.logit_form)
    assert model.recipe.vocab_size is not None
    return vocab_parallel_loss(kernel.implementation, model.logit_form, tp, model.first_logit, model.recipe.vocab_size)


def compare_kernels(assembled: Assembled) -> None:
    """Check that all ranks have chosen the same kernels, and compile alike. Collective.

    Communication:
        One ``all_gather_json`` over control, of the backend of each op.

    Raises:
        ConfigError: ranks would compute with different kernels.
    """
    settings = {"fp8_product": "precision.fp8.backend", "fp8_quantize": "fp8_quantize"}  # which no setting names
    chosen = {settings.get(op, f"kernels.{op}"): backend for op, backend in assembled.backends.items()}
    everyone = all_gather_json(chosen | {"train.compile": assembled.compiled}, assembled.context.control)
    for rank, other in enumerate(everyone):
        for key, choice in other.items():
            if choice != everyone[0][key]:
                remedy = "use devices of one kind" if key == "fp8_quantize" else "name it in the recipe"
                raise ConfigError(
                    f"ranks have chosen different kernels: {key} is {everyone[0][key]} on the first, {choice} on rank "
                    f"{rank}; {remedy}"
                )


def _model_kernels(
    functions: dict[str, Callable],
    layout: TensorLayout,
    fused_attention: FusedAttention | None,
    sharded: ShardedNorm,
    linear: LinearKernel,
    stored: torch.dtype,
    compute: torch.dtype,
    prepare_attention: Callable[[Segments, torch.dtype], object] | None,
) -> Kernels:
    """The chosen kernels as the model calls them; those of the stream work in its layout."""
    add_norm = functions["add_norm"]
    whole = AddNorm(add_norm, FullLayout(Axis("tp")), stored, compute)

    def normalize_shared(x: Tensor, norm: Norm) -> Tensor:
        return sharded(x.reshape(-1, x.shape[-1]), norm.weights(), x.dtype).view(x.shape)

    return Kernels(
        AddNorm(add_norm, layout, stored, compute),
        linear,
        functions["rotary"],
        functions["attention"],
        fused_attention,
        functions["activation"],
        whole.normalize,
        normalize_shared if layout.axis.size > 1 else whole.normalize,
        prepare_attention,
    )


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a rank of this node.

    Args:
        name: train.device.

    Raises:
        ConfigError: cuda where there is none, or more ranks than GPUs.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda: torch sees no GPU here; use train.device=auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        here = torch.cuda.device_count()
        if local_rank >= here:
            raise ConfigError(f"rank {local_rank} of this node has no GPU, there are {here}; start {here} ranks a node")
        return torch.device("cuda", local_rank)
    return torch.device(name)

"""Description of a run, in lines for the console."""

import re
from math import log2

import torch

from megaresnorm.assemble import Assembled
from megaresnorm.data.inspect import draws_of
from megaresnorm.data.samples import Samples
from megaresnorm.layout import split_stages
from megaresnorm.packages import version_of
from megaresnorm.precision.loss_scale import LossScale
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import dump_recipe
from megaresnorm.recompute_auto import describe_recompute, sizes_of
from megaresnorm.schedule import samples_before
from megaresnorm.telemetry.log import large
from megaresnorm.text import shown


def describe_run(recipe: Recipe, assembled: Assembled, samples: Samples, *, full: bool = False) -> list[str]:
    """Lines on the settings, model, ranks, precision, kernels, data and schedule of a run.

    Args:
        full: every setting, rather than those that differ from the defaults.
    """
    model, train, threads = recipe.model, recipe.train, torch.get_num_threads()
    parameters = sum(spec.num_elements for spec in assembled.table.values())
    drawn = samples_before(train.steps, train)
    epochs = max(draw.epochs for draw in draws_of(recipe, samples, drawn))
    weights = "" if recipe.precision.weights == "fp32" else f", weights {recipe.precision.weights}"
    lines = [
        f"recipe    {train.output}/recipe.yaml{'' if full else ', where it differs from the defaults'}",
        *(f"  {line}" for line in dump_recipe(recipe, full=full).rstrip().splitlines()),
        f"model     {model.topology}, {model.num_blocks} blocks = {2 * model.num_blocks} sub-layers, "
        f"width {model.dim}, {parameters:,} parameters",
        *_ranks(recipe, assembled),
        *_engine(recipe),
        *_recompute(recipe, assembled),
        f"precision {recipe.precision.compute}{weights}, {_loss_scale(recipe)}"
        f"residual stream {recipe.precision.stream}, {assembled.device.type}, {threads} thread{'s' * (threads > 1)}",
        *_kernels(assembled),
        f"data      {data_name(recipe)}: {samples.num_documents:,} documents, "
        f"{samples.per_epoch:,} sequences of {model.seq_len} tokens to train on",
        f"schedule  {train.steps:,} steps of {train.global_batch * model.seq_len:,} tokens, {recipe.schedule.kind}, "
        f"peak lr {recipe.optim.lr:g}; {large(drawn * model.seq_len)} tokens in all, "
        f"{epochs:.3g} epochs{' of the source that is drawn from most often' if recipe.data.blend else ''}",
    ]
    return [shown(line) for line in lines]


def _loss_scale(recipe: Recipe) -> str:
    scale = LossScale.of(recipe.precision)
    return "" if scale is None else f"loss scale {'from ' * scale.is_dynamic}2^{log2(scale.value):g}, "


def _kernels(assembled: Assembled) -> list[str]:
    """The chosen backends in one line, then each reason for which another one was not taken, once."""
    chosen: list[str] = []
    ops_by_reason: dict[str, list[str]] = {}
    for op in assembled.backends:
        choice = assembled.kernel_choices[op]  # "op on device: backend (why; not another: reason; ...)"
        backend, _, why = choice.partition(": ")[2].partition(" (")
        chosen.append(f"{op} {backend}")
        for reason in re.split(r"; (?=not \w+: )", why.removesuffix(")"))[1:]:
            if not any(known in reason for known in ("NVIDIA GPUs", "only by name", "only BF16 gains")):
                ops_by_reason.setdefault(reason, []).append(op)
    reasons = [f"          {reason} ({', '.join(ops)})" for reason, ops in ops_by_reason.items()]
    return [f"kernels   {', '.join(chosen)}", *reasons, *_compiling(assembled)]


def _compiling(assembled: Assembled) -> list[str]:
    """What train.compile has come to, and what that means for the first step."""
    choice = assembled.kernel_choices.get("compile")  # "compile on device: mode (why)"
    if choice is None:
        return []
    patience = "" if assembled.compiled == "none" else "; the first step compiles, for half a minute or more"
    return [f"compile   {choice.partition(': ')[2]}{patience}"]


def data_name(recipe: Recipe) -> str:
    """Path of the data; of a blend the paths of its sources, with their weights."""
    sources = recipe.data.sources
    return ", ".join(f"{s.path} x {s.weight:g}" for s in sources) if len(sources) > 1 else sources[0].path


def _recompute(recipe: Recipe, assembled: Assembled) -> list[str]:
    """Which blocks are recomputed how; nothing where nothing is."""
    sizes, segments = sizes_of(assembled.context), assembled.segments
    lines = describe_recompute(recipe, sizes, segments, assembled.device.type)
    return [f"{'recompute' if i == 0 else '':9} {line}" for i, line in enumerate(lines)]


def describe_engine(recipe: Recipe) -> str | None:
    """Whose engine it is, and what it shards and offloads; None where it is ours."""
    engine = recipe.engine
    if engine.name == "native":
        return None
    offload = "" if engine.offload == "none" else f", {engine.offload} in host memory"
    return f"DeepSpeed {version_of(engine.name) or '(not installed here)'}, ZeRO stage {engine.zero_stage}{offload}"


def _engine(recipe: Recipe) -> list[str]:
    engine = describe_engine(recipe)
    return [] if engine is None else [f"engine    {engine}; it is told {recipe.train.output}/deepspeed.json"]


def _ranks(recipe: Recipe, assembled: Assembled) -> list[str]:
    return [] if assembled.context.world.size == 1 else [f"ranks     {describe_ranks(recipe, assembled)}"]


def describe_ranks(recipe: Recipe, assembled: Assembled) -> str:
    """How many ranks there are, and what they share."""
    context, parallel = assembled.context, recipe.parallel
    if context.world.size == 1:
        return "1 rank"
    sizes = sizes_of(context)
    split = f", stream in {parallel.tensor_layout}" if context.tp.size > 1 else ""
    stages = [len(stage.blocks) for stage in split_stages(recipe.model, parallel)]
    schedule = f", {parallel.pipeline}, blocks of the stages {stages}" if context.pp.size > 1 else ""
    return f"{context.world.size} = {sizes.product}{split}{schedule}"

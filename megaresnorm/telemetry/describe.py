"""Description of a run, in lines for the console."""

import torch

from megaresnorm.assemble import Assembled
from megaresnorm.data.samples import Samples
from megaresnorm.layout import split_stages
from megaresnorm.recipe import Recipe
from megaresnorm.schedule import total_variation
from megaresnorm.text import shown


def describe_run(recipe: Recipe, assembled: Assembled, samples: Samples) -> list[str]:
    """Lines on the model, ranks, precision, kernels, data and schedule of a run, control characters written out."""
    model = recipe.model
    parameters = sum(spec.num_elements for spec in assembled.table.values())
    tokens = recipe.train.global_batch * model.seq_len
    lines = [
        f"model     {model.topology}, {model.num_blocks} blocks = {2 * model.num_blocks} sub-layers, "
        f"width {model.dim}, {parameters:,} parameters",
        *_ranks(recipe, assembled),
        f"precision {recipe.precision.compute}, residual stream {recipe.precision.stream}, {assembled.device.type}, "
        f"{torch.get_num_threads()} threads",
        *(f"kernel    {choice}" for choice in assembled.kernel_choices.values()),
        f"data      {data_name(recipe)}: {samples.num_documents:,} documents, "
        f"{samples.per_epoch:,} sequences of {model.seq_len} tokens to train on",
        f"schedule  {recipe.train.steps:,} steps of {tokens:,} tokens, {recipe.schedule.kind}, "
        f"peak lr {recipe.optim.lr:g}, total variation of the lr {total_variation(recipe):.3g}",
    ]
    return [shown(line) for line in lines]


def data_name(recipe: Recipe) -> str:
    """Path of the data; of a blend the paths of its sources, with their weights."""
    sources = recipe.data.sources
    return ", ".join(f"{s.path} x {s.weight:g}" for s in sources) if len(sources) > 1 else sources[0].path


def _ranks(recipe: Recipe, assembled: Assembled) -> list[str]:
    context, parallel = assembled.context, recipe.parallel
    if context.world.size == 1:
        return []
    axes = (context.pp, context.dp_replicate, context.dp_shard, context.tp)
    split = f", stream in {parallel.tensor_layout}" if context.tp.size > 1 else ""
    stages = [len(stage.blocks) for stage in split_stages(recipe.model, parallel)]
    schedule = f", {parallel.pipeline}, blocks of the stages {stages}" if context.pp.size > 1 else ""
    sizes = " * ".join(f"{axis.name} {axis.size}" for axis in axes if axis.size > 1)
    return [f"ranks     {context.world.size} = {sizes}{split}{schedule}"]

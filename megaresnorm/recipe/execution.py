"""Settings of how a run is computed: kernels, ranks, and how long these wait for each other."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from megaresnorm.limits import MAX_BLOCKS, MAX_CHUNKS, MAX_SECONDS
from megaresnorm.recipe.section import BlocksOr0, Ranks, Section, Word, refuse_ignored

Seconds = Annotated[int, Field(ge=1, le=MAX_SECONDS)]


class KernelRecipe(Section):
    """``auto`` takes the fastest of our backends that can run; ``megaresnorm doctor --kernels`` lists all."""

    add_norm: Word = "auto"
    """Backend of the residual-add + norm op."""
    attention: Word = "auto"
    """Backend of attention."""
    rotary: Word = "auto"
    """Backend of rotary positions with the norms of heads, where attention does not rotate by itself."""
    activation: Word = "auto"
    """Backend of GELU and SwiGLU."""
    cross_entropy: Word = "auto"
    """Backend of the loss."""


class ParallelRecipe(Section):
    """Ranks are pp * dp_replicate * dp_shard * tp; ranks of one tp group are neighbours.

    The same recipe runs in every layout.
    """

    tp: Ranks = 1
    """Tensor parallel: ranks over which every matrix is sharded."""
    tensor_layout: Literal["full", "tokens", "columns"] = "full"
    """tp > 1: the residual stream is whole on every rank (full), sharded over the tokens (sequence parallel), or
    sharded over the hidden dimension (columns)."""
    columns_norm: Literal["auto", "merge", "gather"] = "auto"
    """columns: merge statistics and gather normalised columns, or gather the stored stream; auto: gather where its type
    is that of compute, else merge."""
    merge_chunks: Annotated[int, Field(ge=1, le=MAX_CHUNKS)] = 1
    """columns: parts of the rows whose statistics are merged one after the other, each under the work of the next; as
    many bytes in more messages."""
    pp: Ranks = 1
    """Pipeline parallel: ranks that each hold consecutive blocks."""
    pipeline: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    """pp > 1: order of forward and backward passes; interleaved gives every rank several stages."""
    stages_per_rank: Annotated[int, Field(ge=2, le=MAX_BLOCKS)] = 2
    """interleaved: stages of one rank."""
    stage_blocks: Annotated[list[BlocksOr0], Field(max_length=MAX_BLOCKS)] | None = None
    """Blocks of every stage, first to last; unset: balanced by cost, embedding and output matrix counted."""
    dp_shard: Ranks = 1
    """Fully sharded data parallel (FSDP2): ranks over which weights, gradients and optimizer state are sharded."""
    reshard_after_forward: bool = True
    """dp_shard > 1: free gathered weights after each forward pass, or keep them for backward (pipelines always do)."""
    accumulate: Literal["sharded", "unsharded"] = "sharded"
    """dp_shard > 1: reduce-scatter gradients in every microbatch, or keep whole ones in FP32 until the step's last."""
    dp_replicate: Ranks | None = None
    """Data parallel with whole copies (DDP; with dp_shard, of the sharded group); unset: all ranks that are left."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.tensor_layout != "columns":
            refuse_ignored(
                self, "parallel", f"parallel.tensor_layout={self.tensor_layout}", "columns_norm", "merge_chunks"
            )
        if self.dp_shard == 1:
            refuse_ignored(self, "parallel", "parallel.dp_shard=1", "accumulate")
        if self.pipeline != "interleaved":
            refuse_ignored(self, "parallel", f"parallel.pipeline={self.pipeline}", "stages_per_rank")
        if self.stage_blocks is not None and len(self.stage_blocks) != self.num_stages:
            raise ValueError(
                f"parallel.stage_blocks has {len(self.stage_blocks)} stages, parallel.pp={self.pp} with "
                f"parallel.pipeline={self.pipeline} makes {self.num_stages}; give {self.num_stages} numbers"
            )
        return self

    @property
    def num_stages(self) -> int:
        """Pipeline stages of the model over all ranks."""
        return self.pp * (self.stages_per_rank if self.pipeline == "interleaved" and self.pp > 1 else 1)


class WatchdogRecipe(Section):
    """How long a rank may make no progress before the job is ended; it may differ on resume."""

    start: Seconds = 1800
    """Seconds from the start of the ranks up to their first step, this included: they meet, read data and checkpoints,
    build the model and compile."""
    step: Seconds | None = None
    """Seconds in every later step; unset: 600 until twenty steps are known, then ten times the 99th percentile of the
    last hundred, at least 60."""
    evaluation: Seconds = 1800
    """Seconds in one evaluation."""
    checkpoint: Seconds = 3600
    """Seconds for a rank to write its part of a checkpoint, and for the slowest after the first has written its own."""

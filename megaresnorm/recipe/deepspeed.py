"""Settings of DeepSpeed's own that are passed on to it: those that no setting of a recipe decides, by its names.

They change how results are computed, not what comes out beyond the order of sums. What else DeepSpeed has is refused
with the setting that decides it, or the reason (foreign_names.tsv, explain.py).
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from megaresnorm.limits import MAX_BUCKET, MAX_ELEMENTS
from megaresnorm.recipe.section import Section, Word


def _whole(value: Any) -> Any:
    """A whole number that is written as 5e8, as in DeepSpeed's own files."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Bucket = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MAX_BUCKET)]
Elements = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MAX_ELEMENTS)]


class HostMemory(Section):
    """Host memory for moments and master weights (offload_optimizer) or weights (offload_param)."""

    pin_memory: bool | None = None
    """In pages that are never swapped out, between which and a GPU copies are fast; unset: with a GPU."""


class ZeroOptimization(Section):
    """Messages and buffers of ZeRO, in elements; unset: as ``RUN/deepspeed.json`` shows, else as DeepSpeed has them."""

    reduce_bucket_size: Bucket | None = None
    """Gradients that are reduced in one message, for which there is a buffer of FP32; unset: an eighth of the model, at
    least 8 Mi and at most 5e8."""
    reduce_scatter: bool | None = None
    """Each rank receives its own part of the sums, rather than all of them."""
    use_multi_rank_bucket_allreduce: bool | None = None
    """Stages 1 and 2, with reduce_scatter: the parts of all ranks in one all-reduce, or a reduce to each rank."""
    overlap_comm: bool | None = None
    """Reduce gradients in the backward pass, in a stream of their own."""
    parameter_alignment: bool | None = None
    """Stages 1 and 2: begin every parameter at a multiple of 16 bytes, with padding between them."""
    sub_group_size: Bucket | None = None
    """Stage 3: elements of a rank that are updated at a time; unset: 1e9."""
    stage3_max_live_parameters: Elements | None = None
    """Stage 3: gathered weights that a rank keeps at a time; unset: 1e9."""
    stage3_max_reuse_distance: Elements | None = None
    """Stage 3: keep gathered weights that are used again within so many others; unset: 1e9, 0 frees all at once."""
    stage3_prefetch_bucket_size: Elements | None = None
    """Stage 3: weights that are gathered ahead of their use; unset: 5e7."""
    stage3_param_persistence_threshold: Elements | None = None
    """Stage 3: parameters below this size stay gathered; unset: norms, biases and gates do."""
    stage3_model_persistence_threshold: Elements | None = None
    """Stage 3: at most so many elements of such parameters stay gathered."""
    stage3_use_all_reduce_for_fetch_params: bool | None = None
    """Stage 3: gather by all-reduces, with less work on the host."""
    stage3_allgather_sequential: bool | None = None
    """Stage 3: gather one parameter after the other, without a buffer for several."""
    offload_optimizer: HostMemory | None = None
    """engine.offload=optimizer and parameters: moments and master weights."""
    offload_param: HostMemory | None = None
    """engine.offload=parameters: weights."""


class CommsLogger(Section):
    """DeepSpeed's lines on what it sends, one for each message."""

    enabled: bool = False
    """Both of this and verbose are needed."""
    verbose: bool = False
    """A line for every message."""
    prof_all: bool | None = None
    """Of all operations, rather than those of prof_ops."""
    prof_ops: Annotated[list[Word], Field(max_length=100)] | None = None
    """Names of operations, such as all_reduce; needs prof_all: false."""
    debug: bool | None = None
    """With the function that sends."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not (self.enabled and self.verbose):
            raise ValueError(
                "engine.deepspeed.comms_logger has no effect without enabled: true and verbose: true; set both, or "
                "remove it"
            )
        if self.prof_ops is not None and self.prof_all is not False:
            raise ValueError(
                "engine.deepspeed.comms_logger.prof_ops has no effect without prof_all: false, as all operations are "
                "logged; set that, or remove it"
            )
        return self


class DeepSpeedSettings(Section):
    """Settings by their names in DeepSpeed's JSON, passed on to it: those that no setting of a recipe decides."""

    zero_optimization: ZeroOptimization | None = None
    """ZeRO, zero_stage 1 to 3."""
    wall_clock_breakdown: bool | None = None
    """Lines on the time of passes, reductions and updates in every step; each waits for the device."""
    memory_breakdown: bool | None = None
    """Lines on the memory in use at several places of every step; each collects garbage."""
    dump_state: bool | None = None
    """Lines on the state of DeepSpeed's engine when it has been made."""
    comms_logger: CommsLogger | None = None
    """Lines on messages."""
    log_level: Literal["debug", "info", "warning", "error"] | None = None
    """What DeepSpeed says on standard output; unset: info with dump_state or comms_logger, else warning."""


ONLY_STAGES = {  # of zero_optimization: the stages that read a setting, where not all of 1 to 3 do
    "use_multi_rank_bucket_allreduce": (1, 2),
    "parameter_alignment": (1, 2),
    "sub_group_size": (3,),
}

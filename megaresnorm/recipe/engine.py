"""Settings of what makes the optimizer steps, and what DeepSpeed's engine cannot do of those elsewhere in a recipe."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from megaresnorm.recipe.deepspeed import ONLY_STAGES, DeepSpeedSettings
from megaresnorm.recipe.execution import ParallelRecipe
from megaresnorm.recipe.names import flat
from megaresnorm.recipe.precision import PrecisionRecipe
from megaresnorm.recipe.recompute import RecomputeRecipe
from megaresnorm.recipe.section import Section, refuse_ignored
from megaresnorm.recipe.training import TrainRecipe

LOGGED = ("dump_state", "comms_logger")  # what DeepSpeed has to say of them, it says at level info


class EngineRecipe(Section):
    """What makes the optimizer steps."""

    name: Literal["native", "deepspeed"] = "native"
    """native: plain PyTorch with DDP, FSDP2 and torch's pipelines. deepspeed: DeepSpeed's ZeRO over the ranks of
    parallel.dp_replicate, with tensor parallelism, without pipelines."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """deepspeed: what is sharded over the data-parallel ranks. 0: nothing; 1: the optimizer's state; 2: gradients, too;
    3: weights, too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """deepspeed: what is kept in host memory. optimizer: moments and master weights, which the CPU updates (stages 1 to
    3); parameters: the weights as well (stage 3)."""
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    """deepspeed: settings of DeepSpeed's own that are passed on to it; none of those that the recipe decides."""

    @property
    def passed_on(self) -> dict[str, Any]:
        """The settings of ``deepspeed`` that are given, as in DeepSpeed's JSON."""
        return self.deepspeed.model_dump(exclude_none=True)

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        advice = "remove it"
        if self.name == "native":
            advice = "set engine.name=deepspeed, or engine='{name: native}' for the native engine alone"
            refuse_ignored(self, "engine", "engine.name=native", "zero_stage", "offload", advice=advice)
        for key, value in flat(self.passed_on).items():
            if why := self._ignores(key):
                shown = str(value).lower() if isinstance(value, bool) else value
                advice = "remove one of them" if why.startswith("engine.deepspeed.") else advice
                raise ValueError(f"engine.deepspeed.{key}={shown} has no effect with {why}; {advice}")
        return self

    def _ignores(self, key: str) -> str | None:
        """The setting with which one of ``deepspeed`` has no effect; None where it has one."""
        section, _, name = key.partition(".")
        if self.name == "native":
            return "engine.name=native"
        if section == "zero_optimization":
            return self._zero_ignores(name)
        level = self.deepspeed.log_level
        quiet = section in LOGGED and level in ("warning", "error")
        return f"engine.deepspeed.log_level={level}" if quiet else None

    def _zero_ignores(self, name: str) -> str | None:
        stages = (3,) if name.startswith("stage3_") else ONLY_STAGES.get(name, (1, 2, 3))
        if self.zero_stage not in stages:
            return f"engine.zero_stage={self.zero_stage}"
        offloaded = {"offload_optimizer": self.offload != "none", "offload_param": self.offload == "parameters"}
        if not offloaded.get(name.partition(".")[0], True):
            return f"engine.offload={self.offload}"
        zero = self.deepspeed.zero_optimization
        whole = name == "use_multi_rank_bucket_allreduce" and zero is not None and zero.reduce_scatter is False
        return "engine.deepspeed.zero_optimization.reduce_scatter=false" if whole else None

    @model_validator(mode="after")
    def _what_is_offloaded_is_sharded(self) -> Self:
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            stages = "1, 2 or 3" if needed == 1 else "3"
            raise ValueError(
                f"engine.offload={self.offload} needs engine.zero_stage={stages}, not {self.zero_stage}: DeepSpeed "
                "offloads what it shards; set that, or engine.offload=none"
            )
        return self


def check_engine(
    engine: EngineRecipe,
    parallel: ParallelRecipe,
    precision: PrecisionRecipe,
    recompute: RecomputeRecipe,
    train: TrainRecipe,
) -> None:
    """Check that DeepSpeed's engine can do what the other sections of its recipe ask for, and ignores nothing.

    Raises:
        ValueError: it cannot; the line says what can.
    """
    of, native = "does not go with engine.name=deepspeed", "use engine.name=native"
    reasons = {
        f"parallel.pp={parallel.pp} {of}: DeepSpeed pipelines only models made of its own PipelineModule, and none "
        f"with zero_stage 2 or 3; {native}, or parallel.pp=1": parallel.pp > 1,
        f"parallel.dp_shard={parallel.dp_shard} {of}, which shards over all data-parallel ranks by engine.zero_stage; "
        "set parallel.dp_shard=1 and, for weights as well, engine.zero_stage=3": parallel.dp_shard > 1,
        f"precision.compute=fp64 {of}, whose master weights are FP32; {native}": precision.compute == "fp64",
        f"precision.compute=fp8 {of}, which knows nothing of the FP8 codes of weights and their scales; {native}, or "
        "precision.compute=bf16": precision.compute == "fp8",
        f"precision.weights=bf16 {of}, which keeps master weights in FP32 beside them and rounds to nearest; {native}, "
        "or precision.weights=fp32": precision.weights == "bf16",
        f"train.compile=cuda_graphs {of}, whose hooks run on the host in every backward pass and cannot be recorded; "
        f"{native}, or train.compile=blocks with engine.zero_stage=0, 1 or 2": train.compile == "cuda_graphs",
        "train.compile=blocks does not go with engine.zero_stage=3: DeepSpeed gathers weights by hooks between the "
        "modules of a block, which no compiler sees through; use train.compile=none, or engine.zero_stage=2": (
            train.compile == "blocks" and engine.zero_stage == 3
        ),
        "engine.deepspeed.zero_optimization.stage3_prefetch_bucket_size does not go with "
        f"recompute.policy={recompute.policy}: blocks that run again gather their weights by themselves; remove it": (
            bool(recompute.policies & {"every", "auto"})
            and engine.passed_on.get("zero_optimization", {}).get("stage3_prefetch_bucket_size", 0) > 0
        ),
    }
    if against := next((reason for reason, holds in reasons.items() if holds), None):
        raise ValueError(against)
    refuse_ignored(parallel, "parallel", "engine.name=deepspeed", "reshard_after_forward")

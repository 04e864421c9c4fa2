"""Settings of the data, the optimizer and the run."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from megaresnorm.limits import MAX_PROFILED, MAX_SOURCES, MAX_STEPS, MAX_TOKENS
from megaresnorm.recipe.section import (
    AtLeast1,
    Batch,
    Count,
    CountOr0,
    Fraction,
    PathName,
    Positive,
    PositiveOr0,
    Section,
    Seed,
    refuse_ignored,
)

MAX_VALID = 64  # validation sets, each of which is read at every evaluation
# Not the names of the parts of the training data.
ValidName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$"), AfterValidator(lambda name: _no_part(name))]
VALID_FRACTION = 0.02


def _no_part(name: str) -> str:
    if name in ("train", "valid", "test"):
        raise ValueError(f"data.valid.{name}: the name of a part of the training data; call the set otherwise")
    return name


class BlendSource(Section):
    """One data set of a blend."""

    path: PathName
    """A data set, as in data.path."""
    weight: Positive
    """Share of the samples, relative to the other sources'."""


class DataRecipe(Section):
    """The tokens, and their split into training, validation and test."""

    path: PathName | None = None
    """Folder made by ``megaresnorm prepare``, or PREFIX of Megatron's PREFIX.bin and PREFIX.idx."""
    blend: Annotated[list[BlendSource], Field(min_length=1, max_length=MAX_SOURCES)] | None = None
    """Several weighted data sets in the place of ``path``; each has its own split and goes through its own epochs."""
    tokenizer: PathName | None = None
    """Tokenizer of bare Megatron files, as ``prepare --tokenizer`` takes it: for text samples and bits per byte."""
    mask_documents: bool = False
    """A token sees its own document alone, positions start anew with each, and a document's first token has no loss."""
    valid_fraction: Fraction = VALID_FRACTION
    """Share of the tokens kept for validation: documents at random, and the end of one that is too large for it."""
    test_fraction: Fraction = 0.0
    """Share of the tokens never used by training or validation, chosen likewise."""
    split: Annotated[list[PositiveOr0], Field(min_length=3, max_length=3)] | None = None
    """Megatron's split in place of both: relative numbers of sequences for train, valid and test, in order."""
    valid: (
        Annotated[
            dict[ValidName, PathName],
            Field(min_length=1, max_length=MAX_VALID),
            AfterValidator(lambda sets: dict(sorted(sets.items()))),  # in one order on all ranks
        ]
        | None
    ) = None
    """Validation sets of their own, name: path as in data.path, in place of a share of the training data."""
    seed: Seed = 1234
    """Seed of the split and of the order of the samples."""

    @model_validator(mode="after")
    def _something_left_to_train_on(self) -> Self:
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"data.valid_fraction={self.valid_fraction} and data.test_fraction={self.test_fraction} "
                "must leave something to train on; wanted a sum below 1"
            )
        return self

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> Self:
        if (self.path is None) == (self.blend is None):
            problem = "data.path is missing" if self.path is None else "data.path and data.blend are both set"
            raise ValueError(f"{problem}; give either data.path or data.blend")
        return self

    @model_validator(mode="after")
    def _one_kind_of_validation(self) -> Self:
        if self.split is not None:
            refuse_ignored(self, "data", "data.split", "valid_fraction", "test_fraction")
            if self.valid is not None:
                raise ValueError("data.split and data.valid are both set; give one of them")
            if not self.split[0]:
                raise ValueError(f"data.split={self.split} must leave something to train on; raise its first number")
        if self.valid is not None and self.valid_fraction:
            refuse_ignored(self, "data", "data.valid", "valid_fraction")
        return self

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the training data that are held out: of its sequences with data.split, else of its tokens."""
        if self.split is not None:
            return {"valid": self.split[1] / sum(self.split), "test": self.split[2] / sum(self.split)}
        return {"valid": 0.0 if self.valid else self.valid_fraction, "test": self.test_fraction}

    @property
    def sources(self) -> list[BlendSource]:
        """The data sets, whichever way they were given."""
        return self.blend or [BlendSource(path=self.path or "", weight=1.0)]


class ProfileRecipe(Section):
    """A window of steps whose time and memory are measured by block and branch, into RUN/profile/."""

    start: Count = 10
    """The first step of the window: those before it warm up."""
    steps: Annotated[int, Field(ge=1, le=MAX_PROFILED)] = 20
    """Steps that are timed. Up to 15 more are made: without marks, to tell their cost, and for what takes longer."""


class OptimRecipe(Section):
    """Settings of AdamW and of gradient clipping."""

    lr: Positive = 1e-3
    """Peak learning rate of AdamW."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: PositiveOr0 = 0.1
    """Decoupled weight decay of the matrices; norms, biases and gates have none."""
    clip: Literal["global", "adagc", "none"] = "global"
    """Clip the norm of all gradients together, or each tensor against its own history (AdaGC)."""
    clip_norm: Positive = 1.0
    """Largest norm under ``clip: global``, and during AdaGC's warm-up."""
    adagc_ratio: AtLeast1 = 1.05
    """AdaGC: a tensor's gradient may exceed the moving average of its clipped norms by this factor."""
    adagc_beta: Fraction = 0.98
    """AdaGC: decay of that moving average."""
    adagc_warmup: Count = 100
    """AdaGC: steps of global clipping while the averages settle."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.clip != "adagc":
            refuse_ignored(self, "optim", f"optim.clip={self.clip}", "adagc_ratio", "adagc_beta", "adagc_warmup")
        if self.clip == "none":
            refuse_ignored(self, "optim", "optim.clip=none", "clip_norm")
        return self


class ScheduleRecipe(Section):
    """Warm-up and decay of the learning rate."""

    kind: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    """Shape of the learning rate after the warm-up; wsd: constant, then linear over ``decay_steps``."""
    warmup_steps: CountOr0 = 0
    """Steps of linear warm-up from 0."""
    warmup_ratio: Fraction | None = None
    """The warm-up as a share of train.steps, in place of ``warmup_steps``."""
    decay_steps: Count | None = None
    """linear, cosine: steps of the decay after the warm-up, with the lowest rate from there on (unset: all that are
    left); wsd: the last steps of the run, in which the rate decays (unset: a tenth of train.steps)."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Lowest learning rate of the decay, as a share of optim.lr (linear, cosine, wsd)."""
    min_lr: PositiveOr0 | None = None
    """The lowest learning rate itself, in place of ``min_ratio``."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.kind in ("constant", "inverse_sqrt"):
            refuse_ignored(self, "schedule", f"schedule.kind={self.kind}", "min_ratio", "min_lr", "decay_steps")
        if self.warmup_ratio is not None:
            refuse_ignored(self, "schedule", "schedule.warmup_ratio", "warmup_steps")
        if self.min_lr is not None:
            refuse_ignored(self, "schedule", "schedule.min_lr", "min_ratio")
        return self

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of so many steps, whichever way they are given."""
        return self.warmup_steps if self.warmup_ratio is None else round(self.warmup_ratio * steps)


class BatchRamp(Section):
    """A global batch that grows at the start of the run."""

    start: Batch
    """Global batch of the first step, in samples."""
    steps: Count
    """Steps over which the batch grows linearly to train.global_batch, in multiples of train.micro_batch."""


class TrainRecipe(Section):
    """The run: its length, batches, seed, evaluation and output."""

    output: PathName
    """Folder of the run: recipe, log, metrics, TensorBoard files and checkpoints."""
    steps: Count
    """Optimizer steps of the whole run."""
    global_batch: Batch = 8
    """Samples (sequences) in one optimizer step."""
    micro_batch: Batch | None = None
    """Samples in one forward and backward pass of a rank; unset: all of its share, or under pp one sample."""
    batch_ramp: BatchRamp | None = None
    """Grow the global batch at the start of the run."""
    seed: Seed = 1234
    """Seed of the initial weights and of dropout."""
    initial_weights: PathName | None = None
    """A checkpoint, or a run, from whose weights this run starts at step 0; unset: from those that the seed gives."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    compile: Literal["none", "blocks", "cuda_graphs", "auto"] = "none"
    """blocks: torch.compile, equal blocks with the same code; cuda_graphs: also replay a whole microbatch as one CUDA
    graph; auto: compiled blocks on a GPU (not measured there yet) and, on a CPU, for narrow models, where they were
    faster; compiling costs half a minute at the first start."""
    deterministic: bool = False
    """On a GPU: only operations that repeat their sums in one order, so that a resumed run is equal to one that never
    stopped bit for bit, as runs on a CPU always are."""
    logit_rows: Count | None = None
    """Tokens whose logits exist at a time: the output matrix and the loss go over a microbatch in parts, so that logits
    of large vocabularies need not fit in memory. Parts of less than some hundred are slow; a number larger than a
    microbatch means all of it. Unset: parts on a GPU from 65,536 tokens of vocabulary a rank on, but not under gpipe,
    where each microbatch would keep a gradient of the matrix."""
    z_loss: PositiveOr0 = 0.0
    """Coefficient of log(Z)^2 per token, added to the loss (PaLM: 1e-4)."""
    eval_every: CountOr0 = 100
    """Steps between evaluations; 0: only at the end."""
    eval_samples: Count = 64
    """Validation samples of one evaluation (fewer if the split has fewer)."""
    log_every: Count = 1
    """Steps between console lines; metrics are recorded at every step."""
    loggers: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], Field(max_length=3)] = ["tensorboard"]
    """Where metrics go besides metrics.jsonl; wandb and mlflow are packages of their own (extras of those names)."""
    profile: ProfileRecipe | None = None
    """Measure a window of steps by block and branch; unset: none, and ``megaresnorm profile`` makes one at any time."""
    max_skipped_steps: Count = 10
    """Steps in a row refused for a non-finite gradient before the run gives up."""
    max_minutes: Positive | None = None
    """Wall-clock limit of one start of the run: after so many minutes it saves a checkpoint and exits with code 124."""
    sample_prompt: str = ""
    """Start of the text sample written at the end."""
    sample_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 200
    """Length of that sample; 0: none."""

    @model_validator(mode="after")
    def _profile_begins(self) -> Self:
        if self.profile is not None and self.profile.start > self.steps:
            raise ValueError(
                f"train.profile.start={self.profile.start} is after the last step, train.steps={self.steps}; wanted at "
                "most that"
            )
        if self.profile is not None and self.compile == "cuda_graphs":
            raise ValueError(
                "train.profile does not go with train.compile=cuda_graphs, which replays a microbatch as a whole; use "
                "train.compile=blocks"
            )
        return self

    @property
    def batch_multiple(self) -> int:
        """The number that divides every global batch, in whatever layout."""
        return self.micro_batch or self.global_batch

    def micro_batch_of(self, data_ranks: int, pp: int) -> int:
        """Samples in one pass of a rank: the recipe's, else its whole share of a batch, or one sample in a pipeline."""
        return self.micro_batch or (1 if pp > 1 else -(-self.global_batch // data_ranks))


class CheckpointRecipe(Section):
    """When checkpoints are written, how, and which are kept."""

    every: CountOr0 = 500
    """Steps between checkpoints; 0: only at the end and when interrupted."""
    keep: Annotated[int, Field(ge=2, le=MAX_STEPS)] = 2
    """Newest checkpoints kept; at least 2, so that one is whole while the next is written."""
    keep_every: Count | None = None
    """Checkpoints of steps that this divides are never removed."""
    asynchronous: bool = True
    """Copy the tensors to host memory and train on while a thread writes them; needs host memory for a rank's share."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What to do where a checkpoint is due while the one before is still being written."""
    max_failures: Count = 3
    """Checkpoints in a row that may fail (a full disk) before the run ends; until then it warns and trains on."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if not self.asynchronous:
            refuse_ignored(self, "checkpoint", "checkpoint.asynchronous=false", "when_busy")
        return self

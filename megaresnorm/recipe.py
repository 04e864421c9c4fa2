"""Every setting of a run, one typed field each, documented where it stands.

A recipe is frozen, refuses unknown keys, NaN and Inf, and never converts types: ``dim: "64"`` is an error. Relations
between fields are checked here; relations with data, topology or hardware where those are known.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Activation = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"]

NormKind = Literal["layernorm", "rmsnorm"]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def refuse_ignored(section: Section, name: str, why: str, *keys: str) -> None:
    """Raise for a setting that differs from its default but would have no effect."""
    for key in keys:
        if getattr(section, key) != type(section).model_fields[key].default:
            raise ValueError(f"{name}.{key}={getattr(section, key)} has no effect with {why}; remove it")


class TopologyOptions(Section):
    """What a few topologies need beside a block's position; refused by those that do not use it."""

    base_dim: Count | None = None
    """completep: width of the model whose hyper-parameters are transferred."""
    base_num_blocks: Count | None = None
    """completep: depth (blocks) of the model whose hyper-parameters are transferred."""
    mix_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """mix_ln: share of the blocks, counted from the input, that are post-norm (the paper's 0.25 when unset)."""
    gate: Positive | None = None
    """pre: factor on every branch, Granite's residual_multiplier (1 when unset)."""
    alpha: Positive | None = None
    """post: factor on the trunk at every add (1 when unset)."""


class RopeScaling(Section):
    """How the rotary frequencies are stretched for a context longer than the one that was trained on."""

    kind: Literal["linear", "llama3", "yarn"]
    """linear: all divided by factor; llama3: the slow ones alone, with a smooth passage; yarn: arXiv:2309.00071."""
    factor: Annotated[float, Field(ge=1)]
    """How much longer the context becomes."""
    original_seq_len: Count | None = None
    """llama3, yarn: tokens of the context that was trained on before."""
    low_freq_factor: Positive = 1.0
    """llama3: frequencies that turn less often than this in the original context are divided by factor."""
    high_freq_factor: Positive = 4.0
    """llama3: frequencies that turn more often than this in the original context stay."""
    beta_fast: Positive = 32.0
    """yarn: frequencies that turn more often than this in the original context stay."""
    beta_slow: Positive = 1.0
    """yarn: frequencies that turn less often than this are divided by factor."""
    attention_factor: Positive | None = None
    """yarn: factor on rotated queries and keys each (0.1 ln(factor) + 1 when unset)."""
    truncate: bool = True
    """yarn: take the bounds of the passage between frequencies as whole numbers."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if (self.kind == "linear") != (self.original_seq_len is None):
            problem = "has no effect with" if self.kind == "linear" else "is missing for"
            raise ValueError(f"model.rope_scaling.original_seq_len {problem} model.rope_scaling.kind={self.kind}")
        why = f"model.rope_scaling.kind={self.kind}"
        if self.kind != "llama3":
            refuse_ignored(self, "model.rope_scaling", why, "low_freq_factor", "high_freq_factor")
        elif self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor={self.low_freq_factor} must be below "
                f"model.rope_scaling.high_freq_factor={self.high_freq_factor}"
            )
        if self.kind != "yarn":
            refuse_ignored(self, "model.rope_scaling", why, "beta_fast", "beta_slow", "attention_factor", "truncate")
        return self


class InitRecipe(Section):
    """Initialisation; the gains of the topology multiply it (DeepNorm's beta, GPT-2's 1/sqrt(2N))."""

    distribution: Literal["xavier", "normal"] = "xavier"
    """xavier: normal with variance 2 / (fan_in + fan_out) of the logical q, k, v, gate or up matrix."""
    std: Positive = 0.02
    """Standard deviation of every matrix under ``distribution: normal``."""
    embedding_std: Positive | None = None
    """Token embedding; unset: 1, or min(0.02, dim^-0.5) when tied."""
    position_std: Positive | None = None
    """Learned positions; unset: half of the token embedding's, GPT-2's ratio."""
    head_std: Positive | None = None
    """Output matrix when it is not tied; unset: dim^-0.5 (completep: base_dim^-0.5)."""
    scale_residual: bool = False
    """Multiply the out and down matrices by 1/sqrt(2 * num_blocks) on top of the topology's gains."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.distribution == "xavier":
            refuse_ignored(self, "model.init", "model.init.distribution=xavier", "std")
        return self


class ModelRecipe(Section):
    dim: Count
    """Width of the residual stream."""
    num_blocks: Count
    """Blocks in the whole model; a block is two sub-layers (attention, ffn)."""
    num_heads: Count
    """Query heads."""
    seq_len: Count
    """Tokens in one training sequence."""
    num_kv_heads: Count | None = None
    """Key and value heads (grouped-query attention); unset: num_heads."""
    head_dim: Count | None = None
    """Width of one head; unset: dim / num_heads."""
    ffn_dim: Count | None = None
    """Inner width of the ffn; unset: 4 * dim, or with a gate 8/3 * dim rounded up to a multiple of 16."""
    vocab_size: Count | None = None
    """Tokens the model can predict; unset: the data set's."""
    vocab_multiple: Count = 64
    """The embedding and output matrices are padded to a multiple of this many rows."""
    topology: str = "deepnorm"
    """How residual and normalization are wired: a name of megaresnorm.TOPOLOGIES."""
    topology_options: TopologyOptions = TopologyOptions()
    """Options of the topology, for the few that have one."""
    norm: NormKind = "rmsnorm"
    """Kind of every norm of the model."""
    norm_eps: Positive = 1e-5
    """Added to the variance (or mean square) inside every norm."""
    norm_bias: bool = True
    """LayerNorm has a bias; RMSNorm never has one."""
    norm_zero_centered: bool = False
    """A norm multiplies by 1 + weight, and its weights start at 0 (Gemma)."""
    embedding_norm: bool | None = None
    """Normalise the embedding before the first block; unset: the topology's default."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary positions inside attention, or a learned table added to the embedding."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a head's width that is rotated (partial rotary positions)."""
    rope_scaling: RopeScaling | None = None
    """Stretch the rotary frequencies for a longer context."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Normalise queries and keys before the positions: per head, or over all heads together."""
    ffn: Activation = "swiglu"
    """swiglu: down(silu(gate(x)) * up(x)), geglu: GELU for SiLU; gelu: down(gelu(up(x))), exact; _tanh: GELU's approximation."""
    bias: bool = False
    """Biases in every linear layer of the blocks."""
    attention_bias: Literal["none", "qkv", "all"] | None = None
    """Biases in attention's linear layers: none, in q, k and v alone, or in out as well; unset: as bias."""
    embedding_multiplier: Positive = 1.0
    """Factor on the token embedding."""
    attention_multiplier: Positive | None = None
    """Factor on the products of queries and keys; unset: head_dim^-0.5."""
    attention_softcap: Positive | None = None
    """Attention's scores become softcap * tanh(scores / softcap) before the softmax."""
    dropout: Fraction = 0.0
    """Share of the embedding and of every branch's output that is dropped in training."""
    tied_embeddings: bool = False
    """The output matrix is the token embedding."""
    logits_scaling: Positive = 1.0
    """Logits are divided by this."""
    logit_softcap: Positive | None = None
    """Logits become softcap * tanh(logits / softcap)."""
    init: InitRecipe = InitRecipe()
    """Initialisation."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} must divide model.dim={self.dim}, or set model.head_dim; "
                f"try num_heads in {divisors(self.dim)}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.kv_heads} must divide model.num_heads={self.num_heads}; "
                f"try num_kv_heads in {divisors(self.num_heads)}"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"model.head_dim={self.head_width} must be even for model.positions=rope")
        if self.positions == "rope":
            refuse_ignored(self.init, "model.init", "model.positions=rope", "position_std")
            if self.rotary_width % 2 or not self.rotary_width:
                raise ValueError(
                    f"model.rope_fraction={self.rope_fraction} of model.head_dim={self.head_width} rotates {self.rotary_width} "
                    "columns; wanted an even number"
                )
        else:
            keys = "rope_theta", "rope_fraction", "rope_scaling"
            refuse_ignored(self, "model", f"model.positions={self.positions}", *keys)
        if self.norm == "rmsnorm":
            refuse_ignored(self, "model", "model.norm=rmsnorm", "norm_bias")
        if self.tied_embeddings:
            refuse_ignored(self.init, "model.init", "model.tied_embeddings=true", "head_std")
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.dim // self.num_heads

    @property
    def rotary_width(self) -> int:
        """Columns of a head that are rotated."""
        return int(self.head_width * self.rope_fraction)

    @property
    def gated_ffn(self) -> bool:
        """Whether the ffn multiplies by a gate."""
        return self.ffn in ("swiglu", "geglu", "geglu_tanh")

    @property
    def ffn_width(self) -> int:
        if self.ffn_dim:
            return self.ffn_dim
        return -(-8 * self.dim // 3 // 16) * 16 if self.gated_ffn else 4 * self.dim

    @property
    def biases(self) -> str:
        """Of attention: none, qkv or all."""
        return self.attention_bias or ("all" if self.bias else "none")

    def has_bias(self, linear: str) -> bool:
        """Of qkv, out, gate_up, up or down."""
        if linear in ("qkv", "out"):
            return self.biases == "all" or (self.biases, linear) == ("qkv", "qkv")
        return self.bias

    @property
    def padded_vocab_size(self) -> int:
        assert self.vocab_size is not None, "the recipe is resolved against the data before a model is built"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class BlendSource(Section):
    path: Annotated[str, Field(min_length=1)]
    """As data.path."""
    weight: Positive
    """Share of the samples, relative to the other sources'."""


class DataRecipe(Section):
    path: Annotated[str, Field(min_length=1)] | None = None
    """Folder made by ``megaresnorm prepare``, or PREFIX of Megatron's PREFIX.bin and PREFIX.idx."""
    blend: Annotated[list[BlendSource], Field(min_length=1)] | None = None
    """Several data sets with weights, in the place of ``path``; each has its own split and goes through its own epochs."""
    mask_documents: bool = False
    """Tokens see their own document alone, positions start anew with each, and no loss is taken of a document's first token."""
    valid_fraction: Fraction = 0.02
    """Share of the documents kept for validation."""
    test_fraction: Fraction = 0.0
    """Share of the documents never used by training or validation."""
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

    @property
    def sources(self) -> list[BlendSource]:
        """The data sets, whichever way they were given."""
        return self.blend or [BlendSource(path=self.path or "", weight=1.0)]


class OptimRecipe(Section):
    lr: Positive = 1e-3
    """Peak learning rate of AdamW."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay of the matrices; norms, biases and gates have none."""
    clip: Literal["global", "adagc", "none"] = "global"
    """Clip the norm of all gradients together, or each tensor against its own history (AdaGC)."""
    clip_norm: Positive = 1.0
    """Largest norm under ``clip: global``, and during AdaGC's warm-up."""
    adagc_ratio: Annotated[float, Field(ge=1)] = 1.05
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
    kind: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    """Shape of the learning rate after the warm-up; wsd: constant, then linear over ``decay_steps``."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0."""
    decay_steps: Count | None = None
    """wsd: steps of the final decay; unset: a tenth of train.steps."""
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the end, as a share of optim.lr (linear, cosine, wsd)."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.kind in ("constant", "inverse_sqrt"):
            refuse_ignored(self, "schedule", f"schedule.kind={self.kind}", "min_ratio")
        if self.kind != "wsd":
            refuse_ignored(self, "schedule", f"schedule.kind={self.kind}", "decay_steps")
        return self


class PrecisionRecipe(Section):
    compute: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Type of the matrix products; weights, their gradients and the optimizer stay FP32 under bf16."""
    residual_dtype: Literal["fp32", "bf16", "fp64"] | None = None
    """Type the residual stream is stored in; unset: fp32, or fp64 under fp64."""

    @model_validator(mode="after")
    def _fp64_is_whole(self) -> Self:
        if (self.compute == "fp64") != (self.stream == "fp64"):
            raise ValueError(
                f"precision.residual_dtype={self.stream} does not go with precision.compute={self.compute}; "
                "fp64 is for both or neither"
            )
        return self

    @property
    def stream(self) -> str:
        return self.residual_dtype or ("fp64" if self.compute == "fp64" else "fp32")


class KernelRecipe(Section):
    """``auto`` takes the fastest backend that can run here; ``megaresnorm doctor --kernels`` lists them."""

    add_norm: str = "auto"
    """Backend of the residual-add + norm op."""
    attention: str = "auto"
    """Backend of attention."""
    activation: str = "auto"
    """Backend of GELU and SwiGLU."""
    cross_entropy: str = "auto"
    """Backend of the loss."""


class ParallelRecipe(Section):
    """Ranks are pp * dp_replicate * dp_shard * tp; ranks of one tp group are neighbours. The same recipe runs in every layout."""

    tp: Count = 1
    """Tensor parallel: ranks that share every matrix."""
    tensor_layout: Literal["full", "tokens", "columns"] = "full"
    """tp > 1: the residual stream whole on every rank, split by token (sequence parallel), or by column with merged statistics."""
    columns_norm: Literal["auto", "merge", "gather"] = "auto"
    """columns: merge statistics and gather normalised columns, or gather the stored stream (auto: where its type is compute's)."""
    pp: Count = 1
    """Pipeline parallel: ranks that each hold consecutive blocks."""
    pipeline: Literal["1f1b", "gpipe", "interleaved"] = "1f1b"
    """pp > 1: order of forward and backward passes; interleaved gives every rank several stages."""
    stages_per_rank: Annotated[int, Field(ge=2)] = 2
    """interleaved: stages of one rank."""
    stage_blocks: list[Annotated[int, Field(ge=0)]] | None = None
    """Blocks of every stage, first to last; unset: balanced by cost, embedding and output matrix counted."""
    dp_shard: Count = 1
    """Fully sharded data parallel (FSDP2): ranks among which weights, gradients and optimizer state are divided."""
    shard: Literal["parameters", "gradients"] = "parameters"
    """dp_shard > 1: free gathered weights after each forward pass, or keep them until backward is done (pipelines always do)."""
    dp_replicate: Count | None = None
    """Data parallel with whole copies (DDP; with dp_shard, of the sharded group); unset: all ranks that are left."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.tensor_layout != "columns":
            refuse_ignored(self, "parallel", f"parallel.tensor_layout={self.tensor_layout}", "columns_norm")
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
        return self.pp * (self.stages_per_rank if self.pipeline == "interleaved" and self.pp > 1 else 1)


class BatchRamp(Section):
    start: Count
    """Global batch of the first step, in samples."""
    steps: Count
    """Steps over which the batch grows linearly to train.global_batch, in multiples of train.micro_batch."""


class TrainRecipe(Section):
    output: Annotated[str, Field(min_length=1)]
    """Folder of the run: recipe, log, metrics, TensorBoard files and checkpoints."""
    steps: Count
    """Optimizer steps of the whole run."""
    global_batch: Count = 8
    """Samples (sequences) in one optimizer step."""
    micro_batch: Count | None = None
    """Samples in one forward and backward pass of a rank; unset: all of its share, or under pp one sample."""
    batch_ramp: BatchRamp | None = None
    """Grow the global batch at the start of the run."""
    seed: Seed = 1234
    """Seed of the initial weights and of dropout."""
    initial_weights: Annotated[str, Field(min_length=1)] | None = None
    """A checkpoint, or a run, from whose weights this run starts at step 0; unset: from those that the seed gives."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    compile: Literal["none", "blocks", "cuda_graphs"] = "none"
    """torch.compile every block by itself; cuda_graphs: and replay it as a CUDA graph."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Coefficient of log(Z)^2 a token, added to the loss (PaLM: 1e-4)."""
    eval_every: Annotated[int, Field(ge=0)] = 100
    """Steps between evaluations; 0: only at the end."""
    eval_samples: Count = 64
    """Validation samples of one evaluation (fewer if the split has fewer)."""
    log_every: Count = 1
    """Steps between console lines; metrics are recorded at every step."""
    tensorboard: bool = True
    """Write TensorBoard files beside the JSON lines."""
    max_skipped_steps: Count = 10
    """Steps in a row refused for a non-finite gradient before the run gives up."""
    max_minutes: Positive | None = None
    """Wall-clock limit of one start of the run: after so many minutes it saves a checkpoint and exits with code 124."""
    sample_prompt: str = ""
    """Start of the text sample written at the end."""
    sample_tokens: Annotated[int, Field(ge=0)] = 200
    """Length of that sample; 0: none."""

    @property
    def batch_multiple(self) -> int:
        """What every global batch is a multiple of, in whatever layout."""
        return self.micro_batch or self.global_batch

    def micro_batch_of(self, data_ranks: int, pp: int) -> int:
        """Samples in one pass of a rank: the recipe's, else its whole share of a batch, or one sample in a pipeline."""
        return self.micro_batch or (1 if pp > 1 else -(-self.global_batch // data_ranks))


class CheckpointRecipe(Section):
    """When checkpoints are written, how, and which are kept."""

    every: Annotated[int, Field(ge=0)] = 500
    """Steps between checkpoints; 0: only at the end and when interrupted."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept; at least 2, so that one is whole while the next is written."""
    keep_every: Count | None = None
    """Checkpoints of steps that this divides are never removed."""
    asynchronous: bool = True
    """Copy the tensors to host memory and train on while a thread writes them; needs host memory of the size of a rank's share."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What a checkpoint does that is due while the one before is still being written."""
    max_failures: Count = 3
    """Checkpoints in a row that cannot be written (a full disk) before the run ends; until then it warns and trains on."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if not self.asynchronous:
            refuse_ignored(self, "checkpoint", "checkpoint.asynchronous=false", "when_busy")
        return self


class Recipe(Section):
    """One training run."""

    model: ModelRecipe
    """The transformer."""
    data: DataRecipe
    """The token files."""
    train: TrainRecipe
    """The run."""
    optim: OptimRecipe = OptimRecipe()
    """AdamW and gradient clipping."""
    schedule: ScheduleRecipe = ScheduleRecipe()
    """The learning rate over the run."""
    precision: PrecisionRecipe = PrecisionRecipe()
    """Number formats."""
    kernels: KernelRecipe = KernelRecipe()
    """Backends of the kernels."""
    parallel: ParallelRecipe = ParallelRecipe()
    """How many ranks share the work, and how."""
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    """Saving the run."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        train, schedule = self.train, self.schedule
        micro = train.batch_multiple
        if train.global_batch % micro:
            raise ValueError(
                f"train.micro_batch={micro} must divide train.global_batch={train.global_batch}; "
                f"try micro_batch in {divisors(train.global_batch)}"
            )
        if train.batch_ramp and (train.batch_ramp.start % micro or train.batch_ramp.start > train.global_batch):
            raise ValueError(
                f"train.batch_ramp.start={train.batch_ramp.start} must be a multiple of train.micro_batch={micro} "
                f"and at most train.global_batch={train.global_batch}"
            )
        decay = (schedule.decay_steps or 0) if schedule.kind == "wsd" else 0
        if schedule.warmup_steps + decay > train.steps:
            raise ValueError(
                f"schedule.warmup_steps={schedule.warmup_steps} and schedule.decay_steps={decay} "
                f"do not fit into train.steps={train.steps}"
            )
        return self

    @model_validator(mode="after")
    def _model_can_be_shared(self) -> Self:
        model, parallel = self.model, self.parallel
        shared = {
            "model.num_heads": model.num_heads,
            "model.num_kv_heads": model.kv_heads,
            "model.ffn_dim": model.ffn_width,
        }
        if parallel.tensor_layout == "columns":
            shared["model.dim"] = model.dim
        for key, size in shared.items():
            if size % parallel.tp:
                raise ValueError(
                    f"parallel.tp={parallel.tp} must divide {key}={size}; try parallel.tp in {divisors(size)}"
                )
        if parallel.columns_norm == "gather" and self.precision.stream != self.precision.compute:
            raise ValueError(
                f"parallel.columns_norm=gather needs precision.residual_dtype={self.precision.compute}, the type of compute, "
                f"not {self.precision.stream}; set it, or use columns_norm auto or merge"
            )
        if parallel.num_stages > model.num_blocks:
            raise ValueError(
                f"parallel.pp={parallel.pp} makes {parallel.num_stages} pipeline stages of model.num_blocks={model.num_blocks}; "
                f"wanted at most one a block"
            )
        blocks = parallel.stage_blocks
        if blocks is not None and sum(blocks) != model.num_blocks:
            raise ValueError(
                f"parallel.stage_blocks={blocks} hold {sum(blocks)} blocks, model.num_blocks={model.num_blocks}; "
                "every block must be in a stage"
            )
        if blocks is not None and 0 in blocks[1:-1]:
            raise ValueError(f"parallel.stage_blocks={blocks}: only the first and the last stage can be without blocks")
        return self


def divisors(n: int) -> list[int]:
    """All divisors of n, for error messages."""
    return [d for d in range(1, n + 1) if n % d == 0]

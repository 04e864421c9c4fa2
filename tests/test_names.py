"""What settings are called in other frameworks leads to our key or to a sentence, and the page says the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from megaresnorm.cli import main
from megaresnorm.errors import ConfigError
from megaresnorm.recipe.explain import recipe_keys, suggest
from megaresnorm.recipe.load import apply_override, build_recipe
from megaresnorm.recipe.names import foreign_names

ROOT = Path(__file__).parents[1]
# (as it is typed, what the line must say): from the sources of the frameworks, not from our table.
MEGATRON = {
    "train.distributed_timeout_minutes=20": "did you mean watchdog.step? (in seconds",
    "model.num_layers=24": "did you mean model.num_blocks?",
    "model.hidden_size=1024": "did you mean model.dim?",
    "model.ffn_hidden_size=4096": "did you mean model.ffn_dim?",
    "model.num_attention_heads=16": "did you mean model.num_heads?",
    "model.num_query_groups=4": "did you mean model.num_kv_heads?",
    "model.kv_channels=64": "did you mean model.head_dim?",
    "model.seq_length=2048": "did you mean model.seq_len?",
    "parallel.tensor_model_parallel_size=2": "did you mean parallel.tp?",
    "parallel.pipeline_model_parallel_size=2": "did you mean parallel.pp?",
    "parallel.sequence_parallel=true": "did you mean parallel.tensor_layout? (tokens, not true)",
    "parallel.context_parallel_size=2": "there is no context parallelism yet",
    "parallel.use_distributed_optimizer=true": "parallel.dp_shard",
    "model.untie_embeddings_and_output_weights=true": "model.tied_embeddings",
    "model.make_vocab_size_divisible_by=128": "did you mean model.vocab_multiple?",
    "model.init_method_std=0.02": "did you mean model.init.std?",
    "optim.adam_beta1=0.9": "did you mean optim.beta1?",
    "optim.clip_grad=1.0": "did you mean optim.clip_norm?",
    "schedule.lr_warmup_iters=100": "did you mean schedule.warmup_steps?",
    "schedule.lr_decay_iters=1000": "did you mean schedule.decay_steps?",
    "train.recompute_granularity='full'": "did you mean recompute.policy? (block for full;",
    "recompute.recompute_granularity=selective": "norm, attention or ffn for selective",
    "train.recompute_method=uniform": "did you mean recompute.policy? (every for uniform, with recompute.every;",
    "train.recompute_num_layers=2": "did you mean recompute.every? (with policy: every",
    "train.recompute_modules='[core_attn]'": "attention for core_attn, ffn for mlp",
    "train.recompute_activations=true": "did you mean recompute.policy? (attention, ffn or norm",
    "parallel.distribute_saved_activations=true": "did you mean parallel.tensor_layout? (tokens or columns",
    "train.cpu_offloading_num_layers=4": "did you mean recompute.offload?",
    "checkpoint.save_interval=500": "did you mean checkpoint.every?",
    "train.train_iters=100": "did you mean train.steps?",
}
TORCHTITAN = {
    "comm.init_timeout_seconds=300": "did you mean watchdog.start?",
    "comm.train_timeout_seconds=100": "did you mean watchdog.step?",
    "training.steps=4": "did you mean train.steps?",
    "training.local_batch_size=8": "did you mean train.micro_batch?",
    "training.seq_len=2048": "did you mean model.seq_len?",
    "training.max_norm=1.0": "did you mean optim.clip_norm?",
    "optimizer.lr=3e-4": "did you mean optim.lr?",
    "optimizer.weight_decay=0.1": "did you mean optim.weight_decay?",
    "lr_scheduler.warmup_steps=100": "did you mean schedule.warmup_steps?",
    "lr_scheduler.decay_ratio=0.1": "schedule.decay_steps",
    "parallelism.data_parallel_shard_degree=8": "did you mean parallel.dp_shard?",
    "parallelism.data_parallel_replicate_degree=2": "did you mean parallel.dp_replicate?",
    "parallelism.tensor_parallel_degree=2": "did you mean parallel.tp?",
    "parallelism.pipeline_parallel_degree=2": "did you mean parallel.pp?",
    "parallelism.context_parallel_degree=2": "there is no context parallelism yet",
    "parallelism.expert_parallel_degree=2": "there are no mixtures of experts",
    "parallelism.fsdp_reshard_after_forward=always": "did you mean parallel.reshard_after_forward?",
    "checkpoint.interval=500": "did you mean checkpoint.every?",
    "checkpoint.async_mode=async": "did you mean checkpoint.asynchronous?",
    "activation_checkpoint.mode=full": "did you mean recompute.policy? (block for full",
    "activation_checkpoint.selective_ac_option=op": "did you mean recompute.policy? (norm is nearest to op",
    "activation_checkpoint.memory_budget=0.5": "did you mean recompute.budget? (with policy: auto",
    "activation_checkpoint.early_stop=true": "there is nothing to set",
    "metrics.log_freq=10": "did you mean train.log_every?",
    "metrics.enable_wandb=true": "did you mean train.loggers?",
    "profiling.enable_profiling=true": "did you mean train.profile.start?",
}
HUGGING_FACE_AND_DEEPSPEED = {
    "train.ddp_timeout=1800": "did you mean watchdog.step? (without the first step",
    "train.per_device_train_batch_size=4": "did you mean train.micro_batch?",
    "train.gradient_accumulation_steps=8": "set train.global_batch and train.micro_batch: the rest is accumulated",
    "train.max_steps=100": "did you mean train.steps?",
    "train.num_train_epochs=3": "set train.steps",
    "train.learning_rate=1e-4": "did you mean optim.lr?",
    "train.max_grad_norm=1.0": "did you mean optim.clip_norm?",
    "train.lr_scheduler_type=cosine": "did you mean schedule.kind?",
    "train.warmup_ratio=0.1": "did you mean schedule.warmup_ratio?",
    "train.output_dir=x": "did you mean train.output?",
    "train.save_steps=500": "did you mean checkpoint.every?",
    "train.save_total_limit=2": "did you mean checkpoint.keep?",
    "train.logging_steps=10": "did you mean train.log_every?",
    "train.eval_steps=100": "did you mean train.eval_every?",
    "train.report_to=wandb": "did you mean train.loggers?",
    "train.gradient_checkpointing=true": "did you mean recompute.policy? (block, not true)",
    "train.gradient_checkpointing_kwargs={use_reentrant: false}": "did you mean recompute.policy?",
    "train.fsdp_activation_checkpointing=true": "did you mean recompute.policy? (block, not true)",
    "activation_checkpointing.partition_activations=true": "did you mean parallel.tensor_layout?",
    "activation_checkpointing.cpu_checkpointing=true": "did you mean recompute.offload? (with policy block or every)",
    "activation_checkpointing.number_checkpoints=4": "did you mean recompute.every?",
    "train.resume_from_checkpoint=true": "a run resumes by itself",
    "train.bf16=true": "did you mean precision.compute?",
    "train.fp16=true": "did you mean precision.compute? (fp16, not true;",
    "model.num_hidden_layers=12": "did you mean model.num_blocks?",
    "model.intermediate_size=3072": "did you mean model.ffn_dim?",
    "model.hidden_act=silu": "did you mean model.ffn?",
    "model.rms_norm_eps=1e-6": "did you mean model.norm_eps?",
    "model.tie_word_embeddings=true": "did you mean model.tied_embeddings?",
    "optim.adam_epsilon=1e-8": "did you mean optim.eps?",
    "train.train_micro_batch_size_per_gpu=4": "did you mean train.micro_batch?",
    "train.train_batch_size=32": "did you mean train.global_batch?",
    "engine.zero_optimization=2": "did you mean engine.zero_stage? (a number, with engine.name: deepspeed; natively",
    "train.zero_stage=3": "natively parallel.dp_shard, a number of ranks: reshard_after_forward: true for stage 3",
    "train.overlap_comm=true": "did you mean engine.deepspeed.zero_optimization.overlap_comm? (natively torch's",
    "train.deepspeed=ds.json": "did you mean engine.name? (deepspeed; what its JSON decides has its place in a",
    "train.deepspeed_config=ds.json": "engine.zero_stage, engine.offload, and engine.deepspeed for the rest",
    "train.fsdp_offload_params=true": "did you mean engine.offload? (parameters, with engine.name: deepspeed",
    "parallel.zero_hpz_partition_size=8": "nearest is parallel.dp_shard, natively: ranks of a node",
    "train.allgather_bucket_size=500": "nothing reads it",
    "train.gradient_clipping=1.0": "did you mean optim.clip_norm?",
}
FP8 = {  # of Megatron, torchtitan and torchao, accelerate, Transformer Engine
    "precision.fp8_format=hybrid": "did you mean precision.fp8.backward? (with precision.compute: fp8; e5m2 for hybrid",
    "model.fp8=hybrid": "did you mean precision.compute? (fp8; hybrid is precision.fp8.backward: e5m2",
    "precision.fp8_recipe=blockwise": "did you mean precision.fp8.recipe? (block for blockwise; delayed is",
    "precision.fp8_margin=1": "there is nothing to set: scales are the largest powers of two that fit",
    "precision.fp8.margin=1": "delayed ones leave room",
    "precision.fp8_amax_history_len=1024": "did you mean precision.fp8.history? (with recipe: tensorwise and",
    "precision.fp8_amax_compute_algo=most_recent": "did you mean precision.fp8.history? (1 for most_recent",
    "precision.no_fp8_wgrad=true": "did you mean precision.fp8.weight_grad? (bf16",
    "precision.first_last_layers_bf16=true": "did you mean precision.fp8.bf16_first_blocks?",
    "precision.num_layers_at_start_in_bf16=1": "did you mean precision.fp8.bf16_first_blocks?",
    "precision.num_layers_at_end_in_bf16=1": "did you mean precision.fp8.bf16_last_blocks?",
    "model.converters='[float8]'": "did you mean precision.compute? (fp8 for float8",
    "quantize.linear.float8.recipe_name=rowwise": "did you mean precision.fp8.recipe?",
    "quantize.linear.float8.enable_fsdp_float8_all_gather=true": "there is nothing to set",
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp=true": "weights are rounded once a step",
    "quantize.linear.float8.filter_fqns='[output]'": "did you mean precision.fp8.bf16_first_blocks?",
    "quantize.linear.float8.emulate=true": "did you mean precision.fp8.backend? (emulated, not true)",
    "quantize.linear.mx.recipe_name=mxfp8": "did you mean precision.fp8.recipe? (mxfp8",
    "float8.enable_float8_linear=true": "did you mean precision.compute? (fp8, not true)",
    "precision.fp8.recipe=rowwise_with_gw_hp": "it is rowwise here, where weight gradients stay in BF16",
    "precision.fp8.recipe=blockwise": "did you mean block?",
    "train.mixed_precision=fp8": "did you mean precision.compute? (bf16, fp16 or fp8;",
    "train.fp8_backend=TE": "did you mean precision.fp8.backend? (te, or torch for ao)",
    "train.amax_history_len=16": "did you mean precision.fp8.history?",
    "train.fp8_autocast=true": "did you mean precision.compute? (fp8)",
    "precision.fp8.recipe=MXFP8BlockScaling": "it is precision.fp8.recipe: mxfp8 here",
    "precision.fp8.recipe=DelayedScaling": "it is precision.fp8.recipe: tensorwise with scaling: delayed here",
    "precision.fp8.enabled=true": "did you mean precision.compute? (fp8, not true)",
}
QUALIFIED = {  # words that mean something in their own section alone
    "optimizer.name=AdamW": "the only optimizer is AdamW",
    "model.name=llama3": "a recipe gives the shape itself",
    "validation.enable=true": "did you mean train.eval_every?",
    "validation.steps=5": "did you mean train.eval_samples?",
    "fault_tolerance.enable=true": "megaresnorm launch restarts dead ranks",
    "training.seed=5": "did you mean train.seed?",
    "zero_optimization.stage=3": "did you mean engine.zero_stage?",
    "zero_optimization.offload_optimizer.device=cpu": "did you mean engine.offload? (optimizer, not cpu",
    "checkpoint.tag_validation=Warn": "checkpoints are written by megaresnorm",
    "bf16.enabled=true": "did you mean precision.compute? (bf16, not true)",
    "fp16.enabled=true": "did you mean precision.compute? (fp16, not true)",
    "fp16.loss_scale=0": "did you mean precision.loss_scale?",
    "fp16.initial_scale_power=16": "starts at 2^16",
    "fp16.loss_scale_window=1000": "grows after 2,000 good steps in a row",
    "fp16.hysteresis=2": "halved at the first overflow",
    "precision.compute=float16": "it is called fp16 here",
    "recompute.num_layers=1": "did you mean recompute.every?",
    "recompute.block=true": "did you mean recompute.policy? (block)",
    "recompute.norm=true": "did you mean recompute.policy? (norm)",
    "recompute=full": "did you mean block (all but one tensor of each block)?",
    "recompute=selective": "did you mean norm",
    "recompute.policy=core_attn": "did you mean attention?",
    "recompute=true": "did you mean block",
    "parallel.vpp=2": "parallel.pipeline: interleaved",
    "kernels.norm=apex": "did you mean kernels.add_norm?",
    "schedule.steps=5": "did you mean train.steps?",
    "architectures='[LlamaForCausalLM]'": "megaresnorm convert from-hf",
    "train.loggers=[comet]": "wanted one of tensorboard, wandb, mlflow",
    "train.loggers=wandb": "write train.loggers='[wandb]'",
}
NEVER = {
    "train.loggers=[comet]": "did you mean train.loggers",  # guesses by letters alone, which once misled
    "precision.compute=fp12": "did you mean",  # not a misspelt fp32 or fp16
    "parallel.ep=2": "optim.eps",
    "train.recompute=true": "train.compile",
    "model.attention_dropout=0.1": "attention_softcap",
    "model.seed=1": "did you mean data.seed",
    "model.activation=gelu": "did you mean kernels.activation",
    "optim.kind=adam": "did you mean schedule.kind",
    "train.save_every=5": "eval_every",
    "train.eval_iters=5": "did you mean train.eval_every",
    "parallel.dp=2": "train.steps",
    "parallel.cp=2": "did you mean",
    "recompute.block=1": "did you mean recompute.blocks",
    "recompute.norm=1": "model.norm",
    "train.mode=max": "recompute.policy",
    "train.debug=true": "comms_logger",
    "model.verbose=true": "engine.deepspeed",
    "recompute=3": "model",
}


def said(override: str) -> str:
    values: dict = {
        "model": {"dim": 64, "num_blocks": 2, "num_heads": 4, "seq_len": 16},
        "data": {"path": "d"},
        "train": {"output": "o", "steps": 10},
    }
    apply_override(values, override)
    with pytest.raises(ConfigError) as refused:
        build_recipe(values)
    return str(refused.value)


@pytest.mark.parametrize(
    ("override", "wanted"),
    [*MEGATRON.items(), *TORCHTITAN.items(), *HUGGING_FACE_AND_DEEPSPEED.items(), *FP8.items(), *QUALIFIED.items()],
)
def test_a_foreign_name_leads_to_our_key_or_to_a_sentence(override, wanted):
    line = said(override)
    assert wanted in line and "\n" not in line


@pytest.mark.parametrize(("override", "wrong"), NEVER.items())
def test_no_wrong_guess_is_made(override, wrong):
    assert wrong not in said(override)


def test_every_row_leads_somewhere():
    keys = set(recipe_keys())
    rows = foreign_names()
    assert len(rows) > 450 and {one.framework for one in rows} == {
        "megatron",
        "torchtitan",
        "deepspeed",
        "hf",
        "others",
    }
    assert not [one for one in rows if not (one.key or one.sentence) or (one.key and one.key not in keys)]
    assert all(one.name.replace(".", "_").isidentifier() for one in rows)
    assert len({(one.framework, one.name, one.key) for one in rows}) == len(rows)


def test_options_with_such_names_lead_there_too(capsys):
    for option, wanted in (
        ("--num-layers", "did you mean model.num_blocks?"),
        ("--tensor-model-parallel-size", "did you mean parallel.tp?"),
        ("--steps", "this one as train.steps=..."),
        ("--lr", "this one as optim.lr=..."),
        ("--fp16", "did you mean precision.compute? (fp16, not true;"),
        ("--initial-loss-scale", "starts at 2^16"),
        ("--min-loss-scale", "goes down to 1"),
        ("--loss-scale", "precision.loss_scale"),
        ("--training.local_batch_size", "did you mean train.micro_batch?"),
        ("--parallelism.tensor_parallel_degree", "did you mean parallel.tp?"),
        ("--model.dim", "this one as model.dim=..."),
        ("--optimizer.lr", "this one as optim.lr=..."),
        ("--nproc_per_node", "megaresnorm launch RECIPE --gpus-per-node N"),
    ):
        assert main(["train", "recipe.yaml", option, "4"]) == 2
        line = capsys.readouterr().err
        assert (
            line.startswith(f"megaresnorm: error: {option}: settings are given as section.key=value") and wanted in line
        )


def test_words_with_digits_and_short_ones_are_not_guessed():
    assert suggest("fp32x", ["fp32", "bf16"]) == "; did you mean fp32?"
    assert suggest("int8", ["fp32", "bf16", "fp64"]) == "" and suggest("cpu", ["gpu2", "auto"]) == ""


def test_the_pages_are_what_the_code_says():
    got = subprocess.run([sys.executable, ROOT / "tools" / "make_docs.py", "--check"], capture_output=True, text=True)
    assert got.returncode == 0, got.stdout + "run: python tools/make_docs.py"
    page = (ROOT / "docs" / "coming-from.md").read_text()
    assert all(f"* `{one.name}`:" in page for one in foreign_names())

"""Small random models as checkpoints, one recipe for each architecture they are exported to."""

from pathlib import Path

import torch

from megaresnorm.assemble import build_model
from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.checkpoint.state import EngineState, RunState
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe

# Awkward on purpose: grouped heads that are not dim / heads wide, an odd vocabulary, an ffn of no round width.
SIZES = {
    "dim": 24, "num_blocks": 3, "num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "ffn_dim": 36, "vocab_size": 37,
    "seq_len": 32, "vocab_multiple": 8,
}  # fmt: skip
DERIVED = {"head_dim": 4}  # of classes whose heads are dim / heads wide
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_seq_len": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"kind": "yarn", "factor": 4.0, "original_seq_len": 16}
YARN_OF_OTHERS = {**YARN, "attention_factor": 1.3, "truncate": False, "beta_fast": 8.0, "beta_slow": 2.0}
LN = {"norm": "layernorm"}
GPT = {**DERIVED, **LN, "num_kv_heads": 6, "positions": "learned", "ffn": "gelu_tanh", "bias": True, "ffn_dim": 96}
GEMMA = {"topology": "sandwich", "norm_zero_centered": True, "ffn": "geglu_tanh", "embedding_multiplier": 24**0.5}
# name -> (architecture that auto takes, settings)
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"topology": "pre"}),
    "llama tied, biases, linear": (
        "llama",
        {"topology": "pre_scaled", "tied_embeddings": True, "bias": True,
         "rope_scaling": {"kind": "linear", "factor": 2.0}},
    ),
    "llama mlp biases, llama3": ("llama",
                                 {"topology": "pre", "bias": True, "attention_bias": "none", "rope_scaling": LLAMA3}),
    "llama attention biases, yarn, geglu": (
        "llama",
        {"topology": "pre", "attention_bias": "all", "rope_scaling": YARN, "ffn": "geglu", "rope_theta": 500.0},
    ),
    "llama from lns": ("llama", {"topology": "lns"}),
    "qwen2": ("qwen2", {**DERIVED, "topology": "pre", "attention_bias": "qkv", "tied_embeddings": True}),
    "qwen3": ("qwen3", {"topology": "pre", "qk_norm": "head", "rope_scaling": YARN_OF_OTHERS}),
    "granite": (
        "granite",
        {
            **DERIVED, "topology": "pre", "topology_options": {"gate": 0.22}, "embedding_multiplier": 12.0,
            "attention_multiplier": 0.3, "logits_scaling": 8.0,
        },
    ),
    "granite from completep": (
        "granite",
        {**DERIVED, "topology": "completep", "topology_options": {"base_dim": 12, "base_num_blocks": 1}, "bias": True},
    ),
    "glm4": ("glm4", {"topology": "sandwich", "attention_bias": "qkv", "rope_fraction": 0.5}),
    "glm4 whole heads": ("glm4", {"topology": "peri", "tied_embeddings": True}),
    "olmo2": ("olmo2", {**DERIVED, "topology": "reordered", "qk_norm": "full"}),
    "minimax": ("minimax", {"topology": "deepnorm"}),
    "minimax glm, tied": ("minimax", {"topology": "deepnorm_glm", "tied_embeddings": True, "rope_scaling": LLAMA3}),
    "minimax post": ("minimax", {"topology": "post", "embedding_norm": True}),
    "minimax own alpha": ("minimax", {"topology": "post", "topology_options": {"alpha": 1.7}, "embedding_norm": True}),
    "gpt2": ("gpt2", {**GPT, "topology": "pre", "tied_embeddings": True}),
    "gpt2 untied, exact gelu, wide": ("gpt2", {**GPT, "topology": "pre_scaled", "ffn": "gelu", "ffn_dim": 40}),
    "gpt_neox": (
        "gpt_neox",
        {**DERIVED, **LN, "num_kv_heads": 6, "topology": "pre", "ffn": "gelu", "bias": True, "head_dim": 4,
         "rope_fraction": 0.5},
    ),
    "gpt_neox without attention's biases": (
        "gpt_neox",
        {**DERIVED, **LN, "num_kv_heads": 6, "topology": "pre", "ffn": "gelu", "bias": True, "attention_bias": "none"},
    ),
    "starcoder2": ("starcoder2",
                   {**DERIVED, **LN, "topology": "pre", "ffn": "gelu_tanh", "bias": True, "tied_embeddings": True}),
    "starcoder2 without biases": ("starcoder2", {**DERIVED, **LN, "topology": "pre", "ffn": "gelu"}),
    "stablelm": ("stablelm", {**DERIVED, **LN, "topology": "pre", "attention_bias": "qkv", "rope_fraction": 0.5}),
    "stablelm whole heads": ("stablelm", {**DERIVED, **LN, "topology": "pre"}),
    "opt post": ("opt", {**GPT, "topology": "post", "ffn": "gelu", "ffn_dim": 40}),
    "opt pre, tied": ("opt", {**GPT, "topology": "pre", "ffn": "relu", "tied_embeddings": True}),
    "opt without biases": ("opt", {**GPT, "topology": "post", "ffn": "relu", "bias": False}),
    "bert-generation": ("bert-generation", {**GPT, "topology": "post", "embedding_norm": True, "norm_eps": 1e-12}),
    "bert-generation tied": ("bert-generation",
                             {**GPT, "topology": "post", "embedding_norm": True, "tied_embeddings": True}),
    "gemma2": ("gemma2", {**GEMMA, "attention_softcap": 2.0, "logit_softcap": 3.0, "tied_embeddings": True}),
    "gemma2 plain": ("gemma2", {**GEMMA, "attention_multiplier": 0.25, "attention_bias": "all"}),
    "gemma3": ("gemma3_text", {**GEMMA, "qk_norm": "head", "tied_embeddings": True}),
    "mistral": ("mistral", {"topology": "pre"}),
    "olmo3": ("olmo3", {**DERIVED, "topology": "reordered", "qk_norm": "full", "attention_bias": "all"}),
    "opt deepnorm": ("opt", {**GPT, "topology": "deepnorm", "ffn": "gelu"}),
    "bert-generation deepnorm": ("bert-generation", {**GPT, "topology": "deepnorm", "embedding_norm": True}),
}  # fmt: skip
# Not what auto takes: the same model fits a better known class, or eps differs.
ASKED_FOR = ("mistral", "olmo3", "opt pre, tied", "opt deepnorm", "bert-generation deepnorm")


def recipe_of(settings: dict, **sections: dict) -> Recipe:
    model = {**SIZES, "norm_eps": 1e-5, **settings}
    return build_recipe({"model": model, "data": {"path": "none"}, "train": {"output": "none", "steps": 10}} | sections)


def save_random(root: Path, recipe: Recipe, tokenizer: Tokenizer | None = None, spread: float = 0.1) -> Path:
    """A checkpoint with weights away from the initial ones, so that every tensor counts."""
    model = build_model(recipe.model, recipe.precision).model
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(spread * torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype))
            if name in ("embedding.weight", "head.weight"):
                p[recipe.model.vocab_size :] = 0
    attached = {}
    if tokenizer is not None and "file" in tokenizer.describe():
        attached[tokenizer.describe()["file"]] = tokenizer.model
    state = RunState(
        samples=0, skipped_in_a_row=0, train_loss=None, engine=EngineState(updates=0, clipper_steps=0),
        recipe=recipe.model_dump(exclude_none=True), data="",
        tokenizer=None if tokenizer is None else tokenizer.describe(),
    )  # fmt: skip
    weights = {name: TensorSlices.of_whole(p.data) for name, p in model.named_parameters()}
    return save_checkpoint(root, 7, {"weights": weights}, state.model_dump(), attached=attached)

"""Our own architecture for Transformers (modeling_megaresnorm.py), for topologies that none of its classes has."""

import functools
from math import isclose
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megaresnorm.convert.family import OURS, Family, Of
from megaresnorm.convert.fields import By, Config, Settings, refused
from megaresnorm.convert.signature import scale, whole_logits_scaling, wiring
from megaresnorm.model.rotary import stretched
from megaresnorm.model.transformer import has_embedding_norm
from megaresnorm.recipe import ModelRecipe

FILE = "modeling_megaresnorm.py"
_KINDS = {"learned scalar": "scalar", "learned vector": "vector", "of every token": "token"}


def code() -> bytes:
    """The file that an exported model brings along."""
    return Path(__file__).with_name(FILE).read_bytes()


def _write(recipe: ModelRecipe) -> dict[str, Any]:
    final_norm, *sublayers = wiring(recipe)
    return {
        "auto_map": {
            "AutoConfig": "modeling_megaresnorm.MegaResNormConfig",
            "AutoModelForCausalLM": "modeling_megaresnorm.MegaResNormForCausalLM",
        },
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.dim,
        "num_hidden_layers": recipe.num_blocks,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_width,
        "intermediate_size": recipe.ffn_width,
        "max_position_embeddings": recipe.seq_len,
        "residual": [[*norms, alpha, _KINDS.get(gate, gate)] for *norms, alpha, gate in sublayers],
        "norm": recipe.norm,
        "norm_eps": recipe.norm_eps,
        "norm_bias": recipe.norm_bias,
        "norm_zero_centered": recipe.norm_zero_centered,
        "embedding_norm": has_embedding_norm(recipe),
        "final_norm": final_norm,
        "positions": recipe.positions,
        "rope_theta": recipe.rope_theta,
        "rotary_width": recipe.rotary_width,
        "rope_frequencies": _frequencies(recipe),
        "qk_norm": recipe.qk_norm,
        "activation": recipe.ffn,
        "attention_bias": recipe.biases,
        "mlp_bias": recipe.bias,
        "embedding_multiplier": recipe.embedding_multiplier,
        "attention_multiplier": scale(recipe),
        "attention_softcap": recipe.attention_softcap,
        "logits_scaling": whole_logits_scaling(recipe),
        "logit_softcap": recipe.logit_softcap,
        "tie_word_embeddings": recipe.tied_embeddings,
    }


def _frequencies(recipe: ModelRecipe) -> dict[str, Any] | None:
    if recipe.rope_scaling is None:
        return None
    i = torch.arange(0, recipe.rotary_width, 2, dtype=torch.float64)
    values, factor = stretched(recipe.rope_theta ** (-i / recipe.rotary_width), recipe.rope_scaling, recipe.rope_theta)
    return {"values": values.tolist(), "factor": factor}


def _read(config: Config) -> Settings:
    """The settings in our own key, with which all other keys must agree."""
    given = recipe_in(config)
    if given is None:
        raise refused(OURS, None, "is missing; this config.json was not written by MegaResNorm")
    for key, value in _write(given).items():
        if not _same(config.get(key), value):
            raise refused(key, config.get(key), f"is not {value!r}, as the model's recipe in this file has it")
    return given.model_dump(exclude_unset=True)


def _same(found: Any, value: Any) -> bool:
    """Equality, but for the rounding of frequencies: another machine may have rounded powers otherwise."""
    if (
        isinstance(value, dict)
        and "values" in value
        and isinstance(found, dict)
        and isinstance(found.get("values"), list)
    ):
        pairs = zip([*found["values"], found.get("factor")], [*value["values"], value["factor"]], strict=False)
        same_length = len(found["values"]) == len(value["values"])
        return same_length and all(isinstance(a, float | int) and isclose(a, b, rel_tol=1e-12) for a, b in pairs)
    return found == value


def recipe_in(config: Config) -> ModelRecipe | None:
    """The recipe that a config.json of ours brings along; None where there is none that can be read."""
    try:
        return ModelRecipe.model_validate(config[OURS]["model"])
    except (KeyError, TypeError, ValidationError):
        return None


_EXAMPLE = ModelRecipe(dim=2, num_blocks=1, num_heads=1, seq_len=1, vocab_size=1)


@functools.cache
def remote_family() -> Family:
    """The family of our own architecture, whose parameters have our names after ``model.``."""
    of_block = ("norm_in", "norm_branch", "norm_out", "gate", "token_gate")
    attention = (*of_block, *(f"branch.{name}" for name in ("qkv", "out", "norm_inner", "q_norm", "k_norm")))
    ffn = (*of_block, *(f"branch.{name}" for name in ("gate_up", "up", "down", "norm_inner")))
    names = ["embedding", "positions", "embedding_norm", "final_norm"]
    names += [f"blocks.{{}}.attention.{name}" for name in attention] + [f"blocks.{{}}.ffn.{name}" for name in ffn]
    return Family(
        name=OURS,
        architecture="MegaResNormForCausalLM",
        fields=(By(tuple(_write(_EXAMPLE)), _write, _read),),
        modules={f"model.{name}": Of(name) for name in names} | {"lm_head": Of("head")},
    )

"""What settings are called elsewhere, and what they were called before."""

import reprlib
from typing import Any

from megaresnorm.errors import ConfigError

MAX_SHOWN = 60  # characters of a name or value in an error
# Names that other frameworks have for our settings.
FOREIGN_NAMES = {
    "model.num_blocks": ("num_layers", "n_layer", "n_layers", "num_hidden_layers", "depth"),
    "model.dim": ("hidden_size", "d_model", "n_embd", "embed_dim", "width"),
    "model.ffn_dim": ("intermediate_size", "ffn_hidden_size", "hidden_dim", "d_ff"),
    "model.num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "model.num_kv_heads": ("num_key_value_heads", "num_query_groups", "n_kv_heads"),
    "model.seq_len": ("seq_length", "max_seq_len", "max_position_embeddings", "block_size", "context_length"),
    "model.tied_embeddings": ("tie_word_embeddings",),
    "optim.lr": ("learning_rate", "max_lr", "peak_lr"),
    "optim.clip_norm": ("clip_grad", "max_grad_norm", "gradient_clipping", "grad_clip"),
    "train.global_batch": ("batch_size", "global_batch_size"),
    "train.micro_batch": ("micro_batch_size", "per_device_train_batch_size"),
    "train.steps": ("max_steps", "train_iters", "max_iters", "num_train_steps"),
    "precision.compute": ("dtype", "bf16", "mixed_precision"),
}
# Settings of older versions: their present names, and the present value for each of theirs.
OLD_NAMES = {"parallel.shard": ("reshard_after_forward", {"parameters": True, "gradients": False})}


def under_new_names(values: dict) -> dict:
    """The values under today's names; refuse a setting that has both of its names, or never had such a value."""
    for old, (new, meanings) in OLD_NAMES.items():
        section, _, key = old.partition(".")
        given = values.get(section) if isinstance(values, dict) else None
        if not isinstance(given, dict) or key not in given:
            continue
        if new in given:
            raise ConfigError(f"{old} is called {section}.{new} now, and both are given; remove {old}")
        if not isinstance(given[key], str) or given[key] not in meanings:
            meant = ", ".join(f"{meaning} ({value})".lower() for value, meaning in meanings.items())
            raise ConfigError(f"{old}={short(given[key])}: it is called {section}.{new} now; set that to {meant}")
        rest = {name: value for name, value in given.items() if name != key}
        values = values | {section: rest | {new: meanings[given[key]]}}
    return values


NEWER = {"data": ("tokenizer", "split", "valid")}  # settings that there once were not, which is None today


def under_first_names(values: dict) -> dict:
    """The plain values of a recipe with every setting under the name that it had first, to digest or compare them.

    Newer settings that are not set are left out.

    >>> under_first_names({"parallel": {"tp": 2, "reshard_after_forward": False}})
    {'parallel': {'tp': 2, 'shard': 'gradients'}}
    """
    for old, (new, meanings) in OLD_NAMES.items():
        section, _, key = old.partition(".")
        if new in values.get(section, {}):
            rest = dict(values[section])
            given = rest.pop(new)
            values = values | {section: rest | {key: next(v for v, m in meanings.items() if m is given)}}
    for section, keys in NEWER.items():
        if section in values:
            kept = {key: value for key, value in values[section].items() if key not in keys or value is not None}
            values = values | {section: kept}
    return values


def short(value: Any) -> str:
    """A value of a recipe as an error shows it."""
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN:
        return f"a whole number of over {MAX_SHOWN} digits"
    text = reprlib.repr(value)  # not repr: aliases can make a small file an enormous value
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."

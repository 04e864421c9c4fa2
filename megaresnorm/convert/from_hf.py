"""A model of Hugging Face Transformers as a checkpoint of ours, to go on training it in any layout."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

import megaresnorm
from megaresnorm.checkpoint.format import Slices
from megaresnorm.checkpoint.state import EngineState, RunState
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.config import build_recipe, dump_recipe
from megaresnorm.convert.compare import (
    TOLERANCE,
    Agreement,
    check_memory,
    compare,
    load_theirs,
    of_ours,
    of_theirs,
    prompts_of,
)
from megaresnorm.convert.families import FAMILIES, Family
from megaresnorm.convert.files import CONFIG, Progress, Weights, check_space, new_folder, read_json
from megaresnorm.convert.links import Link, constants, links, row_chunks
from megaresnorm.convert.megatron import MEGATRON
from megaresnorm.convert.megatron import NAME as MEGATRON_NAME
from megaresnorm.convert.native import OURS, NativeModel
from megaresnorm.convert.plan import Plan, plan, problems
from megaresnorm.convert.remainder import REMAINDER, restored
from megaresnorm.convert.remote import recipe_in, remote_family
from megaresnorm.convert.signature import different
from megaresnorm.convert.tokenizers import read_tokenizer_of
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.errors import CheckpointError, ConfigError, UserError
from megaresnorm.model.parameters import ParameterSpec, parameter_table
from megaresnorm.recipe import ModelRecipe, Recipe

# Fields of a config.json that the logits of a model do not depend on: how it was made, trained and is to be sampled from.
_NAMES = """
_name_or_path architectures auto_map dtype torch_dtype transformers_version model_type id2label label2id problem_type
bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id
initializer_range init_std use_cache return_dict output_attentions output_hidden_states output_router_logits
attention_dropout attn_pdrop embd_pdrop resid_pdrop dropout hidden_dropout hidden_dropout_prob activation_dropout
attention_probs_dropout_prob embedding_dropout residual_dropout classifier_dropout layerdrop is_encoder_decoder
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
pretraining_tp chunk_size_feed_forward task_specific_params n_ctx prefix tokenizer_class torchscript pruned_heads
use_bfloat16 tf_legacy_loss finetuning_task cache_implementation gradient_checkpointing _attn_implementation
attn_implementation attn_implementation_autoset _attn_implementation_autoset max_window_layers _sliding_window_pattern
sliding_window_pattern router_aux_loss_coef router_jitter_noise block_size linear_attn_alpha_factor
linear_attn_beta_factor do_sample temperature top_k top_p typical_p max_length min_length num_beams num_beam_groups
num_return_sequences repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size early_stopping
encoder_no_repeat_ngram_size bad_words_ids forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens return_dict_in_generate output_scores
"""
IGNORED = frozenset(_NAMES.split())
# Buffers that old files hold, which their classes compute themselves.
_BUFFERS = (
    "._extra_state",
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".position_ids",
)


@dataclass(frozen=True)
class Imported:
    """checkpoint: ours.   recipe: a file to train on with.   agreement: with the original, None where it was not verified."""

    checkpoint: Path
    recipe: Path
    family: Family
    model: ModelRecipe
    notes: tuple[str, ...]
    agreement: Agreement | None


def from_hf(
    source: Path,
    out: Path,
    *,
    seq_len: int | None = None,
    data: str = "runs/my-data",
    max_memory: int = 4_000_000_000,
    verify: bool = True,
    tolerance: float = TOLERANCE,
    progress: Callable[[str, int], Progress] = lambda label, total: lambda count: None,
) -> Imported:
    """Write ``out/checkpoints/step-00000000`` and ``out/recipe.yaml``.

    seq_len: longest sequence, where it is to be shorter than the model's.   data: data.path of the recipe.   The rest: as
    ``to_hf``.
    Raises: CheckpointError naming what is missing, damaged or has no counterpart in our model; ConfigError for what was asked for;
    ConversionError where the two do not compute the same. ``out`` is not there then.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists already, and nothing is written over; give another folder")
    config = normalized(source)
    chosen, model, notes = described(source / CONFIG, config, seq_len)
    verify = verify and config["model_type"] != MEGATRON_NAME  # whose model runs in a process group of its own
    weights = Weights(source)
    table = parameter_table(model)
    found = matched(weights, chosen, table)
    dtype = torch.float64 if weights.tensors[found[0].theirs][2] is torch.float64 else torch.float32
    tokenizer = read_tokenizer_of(source, config)
    if tokenizer is not None and tokenizer.vocab_size > (model.vocab_size or 0):
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}"
        )
    recipe = training_recipe(model, out, data, dtype)
    remainder = remainder_of(source, weights, chosen, dtype)
    sliced = {
        name: native_slices(
            spec, [link for link in found if link.ours == name], weights, remainder, dtype, max_memory // 8
        )
        for name, spec in table.items()
    }
    num_bytes = sum(slices.num_bytes for slices in sliced.values())
    check_space(out, num_bytes)
    if verify:
        check_memory(num_bytes)
    with new_folder(out) as folder:
        tell = progress("writing", num_bytes)
        counted = {name: _counted(slices, tell) for name, slices in sliced.items()}
        attached = {}
        if tokenizer is not None and "file" in tokenizer.describe():
            attached[tokenizer.describe()["file"]] = tokenizer.model
        state = state_of_import(recipe, tokenizer)
        save_checkpoint(folder / "checkpoints", 0, {"weights": counted}, state.model_dump(), attached=attached)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        agreement = verified(source, folder, tolerance) if verify else None
    return Imported(out / "checkpoints" / "step-00000000", out / "recipe.yaml", chosen.family, model, notes, agreement)


def normalized(source: Path) -> dict[str, Any]:
    """The config.json with every field of its class, in the form of today's Transformers. Raises: CheckpointError."""
    path = source / CONFIG
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: not a folder; download the model first (hf download NAME --local-dir {source})"
        )
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind in (OURS, MEGATRON_NAME):
        return raw
    known = sorted({family.name for family in FAMILIES} | {OURS})
    if kind not in known:
        raise CheckpointError(f"{path}: model_type={kind!r} is not one of {', '.join(known)}")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind].from_dict(dict(raw)).to_dict()
    except Exception as e:  # noqa: BLE001 - whatever a class of theirs makes of bad values
        raise CheckpointError(f"{path}: not a configuration of {kind} ({' '.join(str(e).split())[:200]})") from None


def described(path: Path, config: dict[str, Any], seq_len: int | None) -> tuple[Plan, ModelRecipe, tuple[str, ...]]:
    """The architecture of a config.json as a plan, our recipe of the model, and what is to be said about it.

    A config.json that we have written brings the recipe that it was made from; where its fields still say the same, that counts.
    Raises: CheckpointError naming the field that has no counterpart.
    """
    candidates = [
        family for family in (*FAMILIES, remote_family(), *MEGATRON.values()) if family.name == config["model_type"]
    ]
    errors: list[UserError] = []
    for family in candidates:
        try:
            unknown = sorted(config.keys() - family.keys - IGNORED - {OURS})
            if unknown:
                raise CheckpointError(
                    f"{unknown[0]}={repr(config[unknown[0]])[:60]} is not a field that is known of {family.name}"
                )
            settings = family.settings(shortened(family, config, seq_len))
            read = ModelRecipe.model_validate(settings)
        except CheckpointError as e:
            errors.append(CheckpointError(f"{path}: {e}"))
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"]))
            errors.append(
                CheckpointError(f"{path}: {where or 'the model'}: {first['msg'].removeprefix('Value error, ')}")
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError) as e:
            errors.append(CheckpointError(f"{path}: a field is missing or has an odd value ({type(e).__name__}: {e})"))
        else:
            return _as_exported(family, config, read, seq_len)
    raise errors[-1]


def shortened(family: Family, config: dict[str, Any], seq_len: int | None) -> dict[str, Any]:
    """The config.json of the same model for shorter sequences. Raises: ConfigError where that is another model."""
    if seq_len is None:
        return config
    length = config.get("max_position_embeddings")
    if "rope_parameters" not in family.keys or not isinstance(length, int):
        raise ConfigError(
            f"--seq-len {seq_len}: {family.name} has learned positions, whose number cannot be changed; leave it out"
        )
    if seq_len > length:
        raise ConfigError(f"--seq-len {seq_len} is above max_position_embeddings={length}; give at most that")
    return config | {"max_position_embeddings": seq_len}


def _as_exported(
    family: Family, config: dict[str, Any], read: ModelRecipe, seq_len: int | None
) -> tuple[Plan, ModelRecipe, tuple[str, ...]]:
    """Under the name that the model had before it was exported, if it is still that model."""
    given = recipe_in(config)
    if given is None:
        return Plan(family, read), read, ()
    if seq_len is not None:
        given = given.model_copy(update={"seq_len": seq_len})
    before: Plan | None = Plan(family, given)
    if problems(family, given):
        try:
            before = plan(given, family.name)
        except ConfigError:
            before = None
    if before is None or before.family is not family or different(before.recipe, read).keys() - {"norm_eps"}:
        return (
            Plan(family, read),
            read,
            ("config.json was changed after the export: its fields count, the recipe in it does not",),
        )
    return before, given, before.notes


def matched(weights: Weights, chosen: Plan, table: dict[str, ParameterSpec]) -> list[Link]:
    """Every link under the name that its tensor has in the files.

    Raises: CheckpointError for a tensor that is missing, has another shape, or that nothing of ours corresponds to.
    """
    factor = chosen.fold.factor if chosen.fold is not None else lambda name: 1.0
    prefix, used, found = chosen.family.prefix, set[str](), []
    for link in links(chosen.family, chosen.recipe, table, factor):
        name = link.theirs if link.theirs in weights.tensors else link.theirs.removeprefix(prefix)
        if name not in weights.tensors:
            raise CheckpointError(f"{weights.folder}: has no tensor {link.theirs}")
        padding = chosen.family.padded and table[link.ours].parts[0].role in ("embedding", "head")
        if weights.shape(name) != (
            max(link.shape[0], weights.shape(name)[0]) if padding else link.shape[0],
            *link.shape[1:],
        ):
            raise CheckpointError(
                f"{weights.folder}: {name} has shape {list(weights.shape(name))}, {CONFIG} makes it {list(link.shape)}"
            )
        used.add(name)
        found.append(Link(name, link.ours, link.rows, link.shape, link.transposed, link.factor))
    for name, shape, must in constants(chosen.family, chosen.recipe):
        if name in weights.tensors and must and weights.read(name, tuple((0, size) for size in shape)).any():
            raise CheckpointError(f"{weights.folder}: {name} is not zero, and our model has nothing for it")
        used.add(name)
    tied = {"lm_head.weight", "embed_out.weight", "lm_head.decoder.weight"} if chosen.recipe.tied_embeddings else set()
    for name in weights.tensors:
        if name not in used | tied and not f".{name}".endswith(_BUFFERS):
            raise CheckpointError(f"{weights.folder}: {name} is a tensor that our model has nothing for")
    return found


def native_slices(
    spec: ParameterSpec,
    found: Sequence[Link],
    weights: Weights,
    remainder: Weights | None,
    dtype: torch.dtype,
    chunk_bytes: int,
) -> Slices:
    """One parameter of ours, made a chunk of rows at a time; rows that theirs lack, the vocabulary's padding, are zeros."""

    def chunks() -> Iterator[Tensor]:
        rest = tuple((0, size) for size in spec.shape[1:])
        for start, stop in row_chunks(spec.shape, dtype.itemsize, chunk_bytes):
            value = torch.zeros(stop - start, *spec.shape[1:], dtype=dtype)
            for link in found:
                rows, theirs = link.our_rows(weights, start, stop, dtype)
                value[rows - start] = theirs
            if remainder is not None and spec.name in remainder.tensors:
                value = restored(value, remainder.read(spec.name, ((start, stop), *rest)))
            yield value

    return Slices(spec.shape, dtype, None, (tuple((0, size) for size in spec.shape),), owned=True, chunks=chunks)


def remainder_of(source: Path, weights: Weights, chosen: Plan, dtype: torch.dtype) -> Weights | None:
    """What folding has rounded away, where the files still have the folded weights as they were written."""
    same = all(kind is dtype for _, _, kind in weights.tensors.values())
    return Weights(source, REMAINDER) if chosen.fold is not None and same and (source / REMAINDER).exists() else None


def training_recipe(model: ModelRecipe, out: Path, data: str, dtype: torch.dtype) -> Recipe:
    """A recipe that goes on from the converted weights; its data and length are to be set."""
    values: dict[str, Any] = {
        "model": model.model_dump(exclude_none=True),
        "data": {"path": data},
        "train": {"output": str(out / "training"), "steps": 1000, "initial_weights": str(out)},
    }
    if dtype is torch.float64:
        values["precision"] = {"compute": "fp64"}
    return build_recipe(values)


def state_of_import(recipe: Recipe, tokenizer: Tokenizer | None) -> RunState:
    """Of a run that has not taken a step."""
    return RunState(
        samples=0,
        skipped_in_a_row=0,
        train_loss=None,
        engine=EngineState(updates=0, clipper_steps=0),
        recipe=recipe.model_dump(exclude_none=True),
        data="",
        tokenizer=None if tokenizer is None else tokenizer.describe(),
        versions={"megaresnorm": megaresnorm.__version__, "torch": str(torch.__version__)},
    )


def verified(source: Path, folder: Path, tolerance: float) -> Agreement:
    """Raises: ConversionError where the checkpoint does not compute the same."""
    native = NativeModel(folder)
    agreement = compare(
        of_theirs(load_theirs(source)), of_ours(native.model()), prompts_of(native, native.tokenizer()), tolerance
    )
    agreement.judge("the checkpoint")
    return agreement


def _counted(slices: Slices, tell: Progress) -> Slices:
    """The same, telling of every chunk that was made."""
    made = slices.chunks
    assert made is not None

    def chunks() -> Iterator[Tensor]:
        for chunk in made():
            yield chunk
            tell(chunk.nbytes)

    return Slices(slices.shape, slices.dtype, None, slices.boxes, owned=True, chunks=chunks)

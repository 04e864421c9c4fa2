"""Weights that were trained with DeepSpeed as a checkpoint of ours: of a model of Transformers, or of our own.

What is read are the safetensors that DeepSpeed's zero_to_fp32.py writes, whose tensors have the names that the
parameters had in the program that trained them.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.convert.config_json import normalized
from megaresnorm.convert.deepspeed_files import open_weights
from megaresnorm.convert.describe import described
from megaresnorm.convert.files import CONFIG, Progress, Weights, check_space, is_buffer, output_folder, refuse_existing
from megaresnorm.convert.from_hf import Imported, counted, from_hf, save
from megaresnorm.convert.links import Link, bands_of_rows
from megaresnorm.convert.tensors import embedding_of, heads_of, native_slices
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.data.training_data import open_data, resolve_vocab
from megaresnorm.errors import CheckpointError, ConfigError, ConversionError
from megaresnorm.model.parameters import parameter_table
from megaresnorm.model.specs import ParameterSpec
from megaresnorm.parallel.sharding import Box
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import load_recipe, read_recipe

EMBEDDING, HEAD = "embedding.weight", "head.weight"


def of_transformers(source: Path, out: Path, config: Path | None = None, **options: Any) -> tuple[Imported, Path]:
    """Convert a model of Transformers that was trained with DeepSpeed.

    Args:
        source: a folder of safetensors. Their names may have a prefix, as ``module.``, that the model's do not have.
        out: a folder that is not there yet.
        config: a config.json or the folder that it lies in, with the tokenizer; None to look for it in ``source`` and
            in the folder above.
        **options: as of ``from_hf``.

    Returns:
        What was written, and the folder of config.json and tokenizer.

    Raises:
        CheckpointError: there is no config.json or there are no safetensors; something is missing or does not fit.
        ConfigError, DataError, ConversionError: as of ``from_hf``.
    """
    refuse_existing(out)
    where = _config_folder(source, config)
    fields = None if where is None else normalized(where)
    weights, notes = open_weights(source, None if fields is None else fields.get("tie_word_embeddings") is True)
    if where is None or fields is None:
        hint = "--recipe its recipe, for its tensors have MegaResNorm's names" if _looks_like_ours(weights) else (
            f"--config the folder of the model's {CONFIG}, or --recipe where it is a model of MegaResNorm"
        )  # fmt: skip
        raise CheckpointError(f"{source}: has no {CONFIG}, nor has the folder above it; give {hint}")
    family = described(where, fields, None, ignore_fields=options.get("ignore_fields", ()))[0].family
    names = [embedding_of(family), *heads_of(family)]
    weights.strip(_prefix(weights, [*names, *(name.removeprefix(family.prefix) for name in names)]))
    found = from_hf(where, out, weights=weights, **options)
    beside = () if where.samefile(source) else (f"{CONFIG} is that of {where}",)
    return replace(found, notes=(*beside, *notes, *found.notes)), where


def of_recipe(
    source: Path,
    out: Path,
    recipe: Path,
    *,
    max_memory: int = 4_000_000_000,
    verify: bool = True,
    with_tokenizer: bool = True,
    progress: Callable[[str, int], Progress] = lambda label, total: lambda count: None,
) -> Imported:
    """Convert weights of our Transformer that a program with DeepSpeed's engine has trained.

    Args:
        source: a folder of safetensors, whose tensors have our global names, perhaps behind a prefix as ``module.``.
        out: a folder that is not there yet.
        recipe: of the model. Its other settings become those of the recipe that is written.
        max_memory: bytes for tensors while reading and writing.
        verify: read the checkpoint again and compare every weight, bit for bit.
        with_tokenizer: take over the tokenizer of the recipe's data, where that is here.
        progress: as of ``from_hf``.

    Raises:
        CheckpointError: a tensor is missing, has another shape, is not finite, or is none of the model's.
        ConfigError: the recipe cannot be used.
        DataError: its data cannot be read.
        ConversionError: the checkpoint has other bits.
    """
    refuse_existing(out)
    values = read_recipe(recipe)
    settings, tokenizer = _resolved(load_recipe(recipe), recipe)
    model = settings.model
    weights, notes = open_weights(source, model.tied_embeddings)
    weights.strip(_prefix(weights, [EMBEDDING]))
    table = _fitting_table(weights, settings)
    wide = any(weights.tensors[name][2] is torch.float64 for name in table)
    dtype = torch.float64 if wide else torch.float32
    slices = {name: native_slices(spec, [_link(spec)], weights, dtype, max_memory // 8) for name, spec in table.items()}
    num_bytes = sum(each.num_bytes for each in slices.values())
    check_space(out, num_bytes)
    tokenizer = tokenizer if with_tokenizer else None
    values = _training_values(values, settings, out.resolve().name)
    with output_folder(out) as folder:
        tell = progress("writing", num_bytes)
        save(folder, out, values, tokenizer, None, {name: counted(each, tell) for name, each in slices.items()})
        if verify:
            _compare(Checkpoint(folder / "checkpoints" / "step-00000000"), weights, table, max_memory // 8)
    notes = (*notes, *(() if tokenizer is not None else ("without a tokenizer",)))
    checkpoint, written = out / "checkpoints" / "step-00000000", out / "recipe.yaml"
    settings = load_recipe(written)
    return Imported(checkpoint, written, settings, None, model, tokenizer, notes, None, same_bits=verify)


def _config_folder(source: Path, config: Path | None) -> Path | None:
    """The folder of the model's config.json; None where there is none.

    Raises:
        ConfigError: ``config`` is neither a config.json nor a folder that has one.
    """
    if config is None:
        return next((one for one in (source, source.absolute().parent) if (one / CONFIG).is_file()), None)
    folder = config.parent if config.name == CONFIG else config
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"--config {config}: no {CONFIG} there; give a {CONFIG}, or the folder that it lies in")
    return folder


def _looks_like_ours(weights: Weights) -> bool:
    return any(name.endswith(".branch.qkv.weight") for name in weights.tensors)


def _prefix(weights: Weights, names: Iterable[str]) -> str:
    """What stands before the first of ``names`` that the end of a tensor's name is; empty where there is none."""
    for wanted in names:
        for name in weights.tensors:
            if f".{name}".endswith(f".{wanted}"):
                return name.removesuffix(wanted)
    return ""


def _resolved(recipe: Recipe, path: Path) -> tuple[Recipe, Tokenizer | None]:
    """The recipe with model.vocab_size set, and the tokenizer of its data where that is here.

    Raises:
        ConfigError: neither the recipe nor its data say the size.
        DataError: the data are damaged.
    """
    if all(Path(one.path).exists() or Path(f"{one.path}.idx").exists() for one in recipe.data.sources):
        data = open_data(recipe.data)
        return resolve_vocab(recipe, data), data.tokenizer
    if recipe.model.vocab_size is None:
        raise ConfigError(f"{path}: model.vocab_size is missing, and its data are not here; set it in the recipe")
    return recipe, None


def _fitting_table(weights: Weights, recipe: Recipe) -> dict[str, ParameterSpec]:
    """The parameters of the recipe's model by name, found to be the tensors of the files.

    Raises:
        CheckpointError: one is missing, has another shape, or is none of the model's.
    """
    folder = weights.folder
    if recipe.model.num_blocks > len(weights.tensors):  # a table of so many would take a while
        raise CheckpointError(
            f"{folder}: its {len(weights.tensors)} tensors are not of {recipe.model.num_blocks} blocks"
        )
    table = parameter_table(recipe.model)
    for name, spec in table.items():
        if name not in weights.tensors:
            indexed = ", which the index has there" if name in weights.missing else ""
            raise CheckpointError(f"{folder}: has no tensor {name}{indexed}, which the recipe's model has")
        if weights.shape(name) != spec.shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(weights.shape(name))}, the recipe makes it {list(spec.shape)}"
            )
    for name in (*weights.tensors, *weights.missing):
        if name not in table and not is_buffer(name) and not _is_tied_head(name, weights, table):
            raise CheckpointError(f"{folder}: {name} is a tensor that the recipe's model does not have")
    return table


def _is_tied_head(name: str, weights: Weights, table: dict[str, ParameterSpec]) -> bool:
    """Whether a tensor is the output matrix of a tied model, which may lie beside the embedding.

    Raises:
        CheckpointError: it differs from the embedding.
    """
    if name != HEAD:
        return False
    spec = table[EMBEDDING]
    bands = bands_of_rows(spec.shape, 8, 1 << 26)
    there = name in weights.tensors
    same = not there or (
        weights.shape(name) == spec.shape
        and all(torch.equal(*(weights.read(one, _rows(spec, *band)) for one in (name, EMBEDDING))) for band in bands)
    )
    if not same:
        raise CheckpointError(f"{weights.folder}: {name} differs from {EMBEDDING}, to which the recipe ties it")
    return True


def _link(spec: ParameterSpec) -> Link:
    return Link(spec.name, spec.name, range(spec.shape[0]), spec.shape, transposed=False)


def _rows(spec: ParameterSpec, start: int, stop: int) -> Box:
    return ((start, stop), *((0, size) for size in spec.shape[1:]))


def _training_values(values: dict[str, Any], resolved: Recipe, name: str) -> dict[str, Any]:
    """Plain values of the user's recipe, from these weights on, into a run beside the folder ``name``."""
    model = {**values["model"], "vocab_size": resolved.model.vocab_size}
    train = {**values["train"], "output": f"../{name}-trained", "initial_weights": "./"}
    return values | {"model": model, "train": train}


def _compare(checkpoint: Checkpoint, weights: Weights, table: dict[str, ParameterSpec], chunk_bytes: int) -> None:
    """Compare a written checkpoint with the files, bit for bit.

    Raises:
        ConversionError: a weight differs.
    """
    for name, spec in table.items():
        for band in bands_of_rows(spec.shape, 8, chunk_bytes):
            box = _rows(spec, *band)
            ours, theirs = checkpoint.read_box("weights", name, box), weights.read(name, box)
            if not torch.equal(ours, theirs.to(ours.dtype)):
                raise ConversionError(f"FAIL: {name} is not what {weights.folder} has; nothing was kept")

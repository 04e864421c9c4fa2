"""A model of Hugging Face Transformers as a checkpoint of ours, to go on training it in any layout."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megaresnorm
from megaresnorm.checkpoint.format import SOURCE, TensorSlices
from megaresnorm.checkpoint.state import EngineState, RunState
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.convert.compare import (
    TOLERANCE,
    Agreement,
    compare,
    kept_logits_on,
    load_theirs,
    logits_on,
    of_ours,
    of_theirs,
)
from megaresnorm.convert.config_json import normalized
from megaresnorm.convert.describe import described
from megaresnorm.convert.family import MEGATRON_NAME, Family
from megaresnorm.convert.files import Progress, Weights, check_space, output_folder, refuse_existing
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.prompts import check_memory, prompts_of
from megaresnorm.convert.provenance import Provenance, provenance_of
from megaresnorm.convert.tensors import sliced_weights
from megaresnorm.convert.tokenizers import read_tokenizer_of
from megaresnorm.data.hf_tokenizer import HuggingFaceTokenizer
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.errors import CheckpointError, ConfigError
from megaresnorm.model.parameters import parameter_table
from megaresnorm.recipe import ModelRecipe, Recipe
from megaresnorm.recipe.load import beside, build_recipe, dump_values, load_recipe


@dataclass(frozen=True)
class Imported:
    """Result of a conversion to a checkpoint of ours.

    Attributes:
        checkpoint: its folder.
        recipe: a file to train on with.
        settings: what it says.
        family: of the original; None for weights that have the names of our own model.
        tokenizer: None without one.
        notes: for the user.
        agreement: of the logits with the original's; None where they were not compared.
        same_bits: whether the weights were compared instead, bit for bit.
    """

    checkpoint: Path
    recipe: Path
    settings: Recipe
    family: Family | None
    model: ModelRecipe
    tokenizer: Tokenizer | None
    notes: tuple[str, ...]
    agreement: Agreement | None
    same_bits: bool = False


def from_hf(
    source: Path,
    out: Path,
    *,
    weights: Weights | None = None,
    seq_len: int | None = None,
    data: str = "runs/my-data",
    max_memory: int = 4_000_000_000,
    verify: bool = True,
    with_tokenizer: bool = True,
    end_token: str | None = None,
    ignore_fields: Sequence[str] = (),
    tolerance: float = TOLERANCE,
    progress: Callable[[str, int], Progress] = lambda label, total: lambda count: None,
) -> Imported:
    """Write ``out/checkpoints/step-00000000`` and ``out/recipe.yaml``. After an error ``out`` is not there.

    Args:
        source: a folder of Transformers, or of Megatron-Core's weights.
        out: a folder that is not there yet.
        weights: those to read, where they are not in ``source``, or have a prefix to leave out.
        seq_len: longest sequence, where it is to be shorter than the model's.
        data: data.path of the recipe.
        max_memory: bytes for tensors while reading and writing.
        verify: load both models, one after the other, in FP32 and compare logits; has no effect for Megatron-Core.
        end_token: token of a tokenizer.json that ends a document; None for the one that its files name.
        ignore_fields: of config.json, that nobody knows and that are not to matter.
        tolerance: largest difference, as a share of the largest logit.
        progress: is called with a label and a number of bytes; its result is then called with the bytes done.

    Raises:
        CheckpointError: something is missing, damaged or has no counterpart in our model; it is named.
        ConfigError: what was asked for cannot be.
        DataError: the tokenizer cannot be used.
        ConversionError: the two do not compute the same.
    """
    refuse_existing(out)
    config = normalized(source)
    verify = verify and config["model_type"] != MEGATRON_NAME  # its model needs a process group
    chosen, model, notes = described(source, config, seq_len, verified=verify, ignore_fields=ignore_fields)
    tokenizer = read_tokenizer_of(source, config, end_token) if with_tokenizer else None
    if end_token is not None and not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ConfigError(
            f"--end-token {end_token} has no effect: there is no tokenizer.json that it is of; leave it out"
        )
    if tokenizer is not None and tokenizer.vocab_size > (model.vocab_size or 0):
        raise CheckpointError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}"
        )
    if tokenizer is None:
        notes = (
            *notes,
            "without a tokenizer" if not with_tokenizer else f"{source} has no tokenizer that is read",
        )
    weights = weights or Weights(source)
    if model.num_blocks > len(weights.tensors):  # listing the tensors of so many would take a while
        raise CheckpointError(
            f"{weights.folder}: its {len(weights.tensors)} tensors are not of {model.num_blocks} layers"
        )
    sliced, dtype = sliced_weights(weights, chosen, parameter_table(model), max_memory // 8)
    num_bytes = sum(slices.num_bytes for slices in sliced.values())
    check_space(out, num_bytes)
    if verify:
        check_memory(num_bytes // dtype.itemsize * 4, model.vocab_size or 0)
    provenance, left_out = provenance_of(source, config, weights, tokenizer)
    values, notes = training_values(model, out.resolve().name, data, provenance), (*notes, *left_out)
    with output_folder(out) as folder:
        tell = progress("writing", num_bytes)
        save(folder, out, values, tokenizer, provenance, {n: counted(slices, tell) for n, slices in sliced.items()})
        agreement = verify_import(source, weights, folder, tolerance) if verify else None
    checkpoint, recipe = out / "checkpoints" / "step-00000000", out / "recipe.yaml"
    return Imported(checkpoint, recipe, load_recipe(recipe), chosen.family, model, tokenizer, notes, agreement)


def save(
    folder: Path,
    out: Path,
    values: dict[str, Any],
    tokenizer: Tokenizer | None,
    provenance: Provenance | None,
    weights: dict[str, TensorSlices],
) -> None:
    """Write the checkpoint of a run that has not taken a step, and its recipe of these plain values.

    Args:
        folder: to write into, which will become ``out``.
        provenance: None where the weights come from no model of Transformers.
    """
    recipe = build_recipe(beside(values, str(out.absolute())))
    described_as = None if tokenizer is None else tokenizer.describe()
    attached = {} if provenance is None else {SOURCE: provenance.model_dump_json().encode()}
    if tokenizer is not None and described_as is not None and "file" in described_as:
        attached[described_as["file"]] = tokenizer.model
    state = RunState(
        samples=0,
        skipped_in_a_row=0,
        train_loss=None,
        engine=EngineState(updates=0, clipper_steps=0),
        recipe=recipe.model_dump(exclude_none=True),
        data="",
        tokenizer=described_as,
        versions={"megaresnorm": megaresnorm.__version__, "torch": str(torch.__version__)},
    )
    save_checkpoint(folder / "checkpoints", 0, {"weights": weights}, state.model_dump(), attached=attached)
    (folder / "recipe.yaml").write_text(dump_values(values), encoding="utf-8")


def training_values(model: ModelRecipe, name: str, data: str, provenance: Provenance) -> dict[str, Any]:
    """Plain values of a recipe that trains on from converted weights; the user sets its data and number of steps.

    All paths but that of the data are relative to the folder that it lies in, called ``name``, which may so be moved.
    The run is beside it.
    The learning rate is a usual one to go on with: the one to start with would undo what the model has learned.
    """
    compute = {"float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}.get(provenance.dtype, "fp32")
    return {
        "model": model.model_dump(exclude_none=True),
        "data": {"path": data},
        "train": {"output": f"../{name}-trained", "steps": 1000, "initial_weights": "./"},
        "optim": {"lr": 1e-5},
        "schedule": {"kind": "cosine", "warmup_steps": 100, "min_ratio": 0.1},
        "precision": {"compute": compute},
    }


def verify_import(source: Path, weights: Weights, folder: Path, tolerance: float) -> Agreement:
    """The written checkpoint beside the original, whose config.json is in ``source``.

    Raises:
        ConversionError: the two do not compute the same.
    """
    native = NativeModel(folder)
    prompts = prompts_of(native, native.tokenizer())
    theirs = kept_logits_on(prompts, lambda: of_theirs(load_theirs(source, weights=weights)))
    agreement = compare(theirs, logits_on(prompts, of_ours(native.model())), tolerance)
    agreement.judge("the checkpoint")
    return agreement


def counted(slices: TensorSlices, tell: Progress) -> TensorSlices:
    """The same slices; ``tell`` is called with the bytes of every chunk that was made."""
    made = slices.chunks
    assert made is not None

    def chunks() -> Iterator[Tensor]:
        for chunk in made():
            yield chunk
            tell(chunk.nbytes)

    return TensorSlices(slices.shape, slices.dtype, None, slices.boxes, owned=True, chunks=chunks)

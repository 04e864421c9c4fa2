"""A folder with a quantized model: codes and scales in safetensors, and what is what in JSON.

model.safetensors     codes under the global names of the matrices, int8 or float8_e4m3fn; their scales, FP32, under the
                      same names with .scale behind; all other parameters as they were trained. Several files and an
                      index where one would be too large.
quantization.json     schema_version, the scheme, the names that are quantized, the recipe, the checkpoint, the losses

A matrix is codes * scale: of every row its own (scale of shape [rows]) or one for all ([1]).
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import FileTensor
from megaresnorm.convert.files import Weights, check_space, output_folder, read_json, write_json, write_weights
from megaresnorm.errors import CheckpointError, ConfigError
from megaresnorm.model.parameters import parameter_table
from megaresnorm.model.transformer import Transformer
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.studies.quantize import (
    SCHEMES,
    Figures,
    Quantized,
    TrainedRun,
    finite,
    load,
    matrices,
    quantize,
    scheme,
    set_weights,
    untrained,
)

DESCRIPTION = "quantization.json"
SCHEMA_VERSION = 1
SCALE = ".scale"  # behind the name of a matrix
MAX_FILE_BYTES = 5_000_000_000
_TYPES = {"F64": torch.float64, "F32": torch.float32, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}


def write_quantized(out: Path, run: TrainedRun, name: str, figures: Figures, *, everything: bool = False) -> None:
    """Write ``out``, which appears when it is complete.

    Args:
        out: a folder that is not there yet, or empty.
        name: of the scheme.
        figures: of ``measure`` with this scheme.
        everything: embedding and output matrix are quantized, too.

    Raises:
        ConfigError: ``out`` is not empty, or cannot be written.
    """
    model = load(run)
    chosen = matrices(model, everything=everything)
    entries = list(_entries(model, list(chosen), name))
    check_space(out, sum(entry.num_bytes for entry in entries))
    with output_folder(out) as folder:
        write_weights(folder, entries, MAX_FILE_BYTES, lambda count: None)
        description = {
            "schema_version": SCHEMA_VERSION,
            "scheme": name,
            "values": f"codes * scale; the scales of NAME are NAME{SCALE}, one for each row or one for all",
            "quantized": list(chosen),
            "kept": [entry.name for entry in entries if entry.name not in chosen and not entry.name.endswith(SCALE)],
            "checkpoint": str(run.folder),
            "samples": figures.samples,
            "loss": {"trained": finite(figures.trained), "quantized": finite(figures.losses[name])},
            "recipe": run.recipe.model_dump(exclude_none=True),
        }
        write_json(folder / DESCRIPTION, description)


def quantized_model(folder: Path) -> tuple[Transformer, Recipe]:
    """The model of a folder that ``write_quantized`` has made, with the matrices that its codes stand for.

    Raises:
        CheckpointError: the folder is no such one, or damaged; one line.
    """
    path = folder / DESCRIPTION
    description = read_json(path)
    if description.get("schema_version") != SCHEMA_VERSION or description.get("scheme") not in SCHEMES:
        raise CheckpointError(f"{path}: not a quantized model of schema_version {SCHEMA_VERSION}")
    try:
        recipe = build_recipe(description.get("recipe") or {})
    except ConfigError as e:
        raise CheckpointError(f"{path}: its recipe cannot be used ({e})") from None
    weights, names = Weights(folder, _TYPES), description.get("quantized")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: does not say which matrices are quantized")
    _check(path, weights, names, recipe, description["scheme"])
    model = untrained(recipe)
    parameters = dict(model.named_parameters())
    codes = {name: Quantized(_whole(weights, name), _whole(weights, name + SCALE)) for name in names}
    device = next(model.parameters()).device
    set_weights(parameters, {name: Quantized(*(part.to(device) for part in one)) for name, one in codes.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name not in codes:
                parameter.copy_(_whole(weights, name))
    return model, recipe


def _entries(model: Transformer, chosen: list[str], name: str) -> Iterator[FileTensor]:
    for key, parameter in model.named_parameters():
        value = parameter.detach()
        if key not in chosen:
            yield _entry(key, value)
            continue
        quantized = quantize(value, scheme(name))
        yield _entry(key, quantized.codes)
        yield _entry(key + SCALE, quantized.scale)


def _entry(name: str, value: Tensor) -> FileTensor:
    return FileTensor(name, value.dtype, tuple(value.shape), lambda: [value])


def _check(path: Path, weights: Weights, names: list[str], recipe: Recipe, scheme_name: str) -> None:
    """Check that a folder has the tensors that it says, before a model is made of their sizes.

    Raises:
        CheckpointError: it has not; names the first.
    """
    model, dtype = recipe.model, scheme(scheme_name).dtype
    if model.vocab_size is None or model.num_blocks > len(weights.tensors):
        raise CheckpointError(f"{path}: its {len(weights.tensors)} tensors are not of the model of its recipe")
    shapes: dict[str, list[tuple[int, ...]]] = {name: [spec.shape] for name, spec in parameter_table(model).items()}
    unknown = [name for name in names if name not in shapes]
    if unknown:
        raise CheckpointError(f"{path}: {unknown[0][:80]!r} is not a matrix of the model of its recipe")
    shapes |= {name + SCALE: [(1,), (shapes[name][0][0],)] for name in names}
    if shapes.keys() != weights.tensors.keys():
        odd = sorted(shapes.keys() ^ weights.tensors.keys())[0]
        raise CheckpointError(f"{path}: {odd} is not in both the model of its recipe and {path.parent}")
    for name, wanted in shapes.items():
        _, shape, found = weights.tensors[name]
        if shape not in wanted or (found == dtype) != (name in names):
            raise CheckpointError(f"{path.parent}: {name} is {found} of shape {list(shape)}; wanted {list(wanted[0])}")


def _whole(weights: Weights, name: str) -> Tensor:
    return weights.read(name, tuple((0, size) for size in weights.shape(name)))

"""What quantization after training costs: matrices, and inputs of linear layers, as INT8 and FP8 (E4M3).

All of it is symmetric: value = code * scale, and a scale is the largest |value| that shares it over the largest code.
Losses are computed in FP32, so that nothing but the format differs between two of them.

T tokens   O out_dim   I in_dim
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megaresnorm.assemble import build_model, choose_device
from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.checkpoint.inspect import newest_of
from megaresnorm.checkpoint.manifest import read_manifest
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import fitting_table, recipe_of, state_of
from megaresnorm.data.loader import Loader, SampleRange
from megaresnorm.data.samples import Samples
from megaresnorm.data.training_data import open_data, open_samples, resolve_vocab
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.kernels.fp8.formats import E4M3, LARGEST
from megaresnorm.limits import FP32_TINY
from megaresnorm.model.transformer import Transformer
from megaresnorm.parallel.linear import Linear
from megaresnorm.parallel.linear_kernel import PLAIN
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe import PrecisionRecipe, Recipe
from megaresnorm.recipe.explain import suggest
from megaresnorm.studies.products import Through


@dataclass(frozen=True)
class Scheme:
    """A format of codes, and what shares a scale.

    Attributes:
        largest: magnitude of the largest code that is used.
        by_row: a scale for each row: of a matrix [O, I] an output channel, of inputs [T, I] a token. Otherwise one for
            the whole tensor.
    """

    dtype: torch.dtype
    largest: float
    by_row: bool


SCHEMES = {
    "int8-tensor": Scheme(torch.int8, 127.0, by_row=False),
    "int8-channel": Scheme(torch.int8, 127.0, by_row=True),
    "fp8-tensor": Scheme(E4M3, LARGEST[E4M3], by_row=False),
    "fp8-channel": Scheme(E4M3, LARGEST[E4M3], by_row=True),
}
INPUTS = "+inputs"  # end of the name of a loss for which inputs were quantized, too


class Quantized(NamedTuple):
    """Codes [R, C] and their scales, FP32: [1], or [R] with one for each row."""

    codes: Tensor
    scale: Tensor

    def values(self) -> Tensor:
        """The numbers that they stand for, FP32."""
        return self.codes.float() * self.scale.unsqueeze(-1)


def scheme(name: str) -> Scheme:
    """Look a scheme up.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in SCHEMES:
        raise ConfigError(f"--formats {name!r}: wanted some of {', '.join(SCHEMES)}{suggest(name, list(SCHEMES))}")
    return SCHEMES[name]


def quantize(x_RC: Tensor, scheme: Scheme) -> Quantized:
    """Round to the nearest code, ties to even.

    Of INT8 no value is off by more than half a scale; of FP8 by more than 2^-4 of itself, or by half of 2^-9 scale
    where that is more.
    """
    x_RC = x_RC.float()
    largest = x_RC.abs().amax(dim=1) if scheme.by_row else x_RC.abs().amax().reshape(1)
    scale = torch.where(largest > 0, largest / scheme.largest, 1.0).clamp(min=FP32_TINY)
    # What lies above the largest code by a rounding of the scale: FP8 casts saturate in some versions of torch only.
    codes = (x_RC / scale.unsqueeze(-1)).clamp(-scheme.largest, scheme.largest)
    return Quantized((codes.round() if scheme.dtype == torch.int8 else codes).to(scheme.dtype), scale)


class Outliers:
    """How far the largest of many numbers is from the rest; they come in parts."""

    def __init__(self) -> None:
        self._count, self._largest, self._squares, self._fourths = 0, 0.0, 0.0, 0.0

    def add(self, x: Tensor) -> Tensor:
        """Count these numbers, too; returns them."""
        squares = x.detach().double().square()
        self._count += x.numel()
        self._largest = max(self._largest, x.abs().max().item())
        self._squares += squares.sum().item()
        self._fourths += squares.square().sum().item()
        return x

    @property
    def peak(self) -> float:
        """The largest magnitude over the RMS."""
        return self._largest / (self._squares / self._count) ** 0.5 if self._squares else 0.0

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis E[x^4] / E[x^2]^2 - 3: 0 for normal numbers, larger where a few are far above the rest."""
        return self._fourths * self._count / self._squares**2 - 3 if self._squares else 0.0


def peak_of(x: Tensor) -> float:
    """The largest magnitude over the RMS."""
    outliers = Outliers()
    outliers.add(x)
    return outliers.peak


@dataclass(frozen=True)
class TrainedRun:
    """A trained run and what it is evaluated on.

    Attributes:
        name: as the user wrote it.
        folder: of the checkpoint.
        valid: validation samples of each set.
    """

    name: str
    folder: Path
    recipe: Recipe
    valid: dict[str, Samples]


@dataclass
class Figures:
    """One run. Losses are means a token, in nats.

    Attributes:
        samples: of each validation set.
        trained: loss with the weights as they are.
        losses: by scheme; those that end with INPUTS with quantized inputs, too.
        weight_peaks: largest |w| over RMS of each matrix.
        input_peaks, input_kurtosis: of the inputs of each linear layer, over all that was evaluated.
    """

    run: str
    checkpoint: str
    topology: str
    num_blocks: int
    samples: int
    trained: float
    losses: dict[str, float] = field(default_factory=dict)
    weight_peaks: dict[str, float] = field(default_factory=dict)
    input_peaks: dict[str, float] = field(default_factory=dict)
    input_kurtosis: dict[str, float] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON has it, which knows no NaN and no infinity."""
        return {
            key: {name: finite(number) for name, number in value.items()} if isinstance(value, dict) else finite(value)
            for key, value in asdict(self).items()
        }


def finite(value: Any) -> Any:
    """None for a number that is not finite, all else as it is."""
    return None if isinstance(value, float) and not isfinite(value) else value


def look(name: str, folder: Path) -> TrainedRun:
    """Find a run's newest checkpoint and its validation data, without reading its weights.

    Raises:
        CheckpointError: ``folder`` is neither a run nor a checkpoint.
        ConfigError: the run has no validation data.
        DataError: they are not there any more, or others than it was trained on.
    """
    folder = newest_of(folder)
    state = state_of(folder, read_manifest(folder)["state"])
    recipe = recipe_of(folder, state)
    if recipe.data.valid is None and not recipe.data.shares["valid"]:
        raise ConfigError(f"{name}: was trained without validation data, on which losses are compared; train it with "
                          "data.valid_fraction, data.split or data.valid")  # fmt: skip
    data = open_data(recipe.data)
    if data.digest != state.data:
        raise DataError(f"{data.sets[0].path}: not the data that {name} was trained on (its digest differs)")
    recipe = resolve_vocab(recipe, data)
    return TrainedRun(name, folder, recipe, open_samples(data, recipe, whole_documents=state.split == "documents")[1])


def load(run: TrainedRun) -> Transformer:
    """The model of a run with its trained weights; products are in FP32, or in FP64 where it was trained so.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = Checkpoint(run.folder)
    fitting_table(checkpoint, run.recipe.model)
    model = untrained(run.recipe)
    checkpoint.load("weights", {name: TensorSlices.of_whole(p.data) for name, p in model.named_parameters()})
    return model


def untrained(recipe: Recipe) -> Transformer:
    """The model of a recipe as the study runs it, in FP32, with the recipe's stream."""
    compute = "fp64" if recipe.precision.compute == "fp64" else "fp32"
    precision = PrecisionRecipe.model_validate({"compute": compute, "residual_dtype": recipe.precision.stream})
    return build_model(recipe.model, precision, seed=recipe.train.seed, device=choose_device("auto")).model


def linear_layers(model: nn.Module, *, everything: bool = False) -> dict[str, Linear]:
    """The linear layers of the blocks by name.

    Args:
        everything: the output matrix, too.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    return {name: module for name, module in found.items() if everything or name.startswith("blocks.")}


def matrices(model: Transformer, *, everything: bool = False) -> dict[str, nn.Parameter]:
    """The matrices of ``linear_layers`` by global name, and with ``everything`` the embedding."""
    layers = linear_layers(model, everything=everything)
    wanted = {f"{name}.weight" for name in layers} | ({"embedding.weight"} if everything else set())
    return {name: parameter for name, parameter in model.named_parameters() if name in wanted}  # a tied one once


@torch.no_grad()
def evaluate(run: TrainedRun, model: Transformer, samples: int) -> float:
    """Mean over the validation sets of the loss a token on the first ``samples`` samples of each.

    Raises:
        ConfigError: these have nothing to predict.
    """
    losses = []
    train, device = run.recipe.train, next(model.parameters()).device
    for name, source in run.valid.items():
        loader = Loader(
            source, run.recipe.model.seq_len, ParallelContext.single(), device,
            micro=train.micro_batch_of(1, 1), mask_documents=run.recipe.data.mask_documents,
        )  # fmt: skip
        batch = loader.load(SampleRange(0, min(samples, source.per_epoch)))
        if not batch.num_valid:
            where = f" of data.valid.{name}" if name else ""
            raise ConfigError(f"{run.name}: the validation samples{where} have nothing to predict; raise --samples")
        total = sum(
            model(part.tokens, documents_BS=part.documents, labels_BS=part.labels)[0].double().item()
            for part in batch.microbatches
        )
        losses.append(total / batch.num_valid)
    return sum(losses) / len(losses)


def measure(
    run: TrainedRun,
    formats: Sequence[str],
    *,
    samples: int | None = None,
    everything: bool = False,
    inputs: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> Figures:
    """Evaluate a run as trained, and with each format.

    Args:
        samples: of each validation set; None: as many as the run itself evaluates.
        everything: embedding and output matrix are quantized, too.
        inputs: evaluate with quantized inputs of the same layers as well, and look for their outliers.
        advance: called after every evaluation.
    """
    model, samples = load(run), samples or run.recipe.train.eval_samples
    weights, layers = matrices(model, everything=everything), linear_layers(model, everything=everything)
    watched = {name: Outliers() for name in layers} if inputs else {}
    for name, outliers in watched.items():
        layers[name].kernel = Through(outliers.add)
    figures = Figures(
        run=run.name,
        checkpoint=str(run.folder),
        topology=run.recipe.model.topology,
        num_blocks=run.recipe.model.num_blocks,
        samples=samples,
        trained=evaluate(run, model, samples),
        weight_peaks={name: peak_of(weight) for name, weight in weights.items()},
    )
    figures.input_peaks = {name: one.peak for name, one in watched.items()}
    figures.input_kurtosis = {name: one.kurtosis for name, one in watched.items()}
    advance()
    original = {name: weight.detach().clone() for name, weight in weights.items()}
    for name in formats:
        for part in ("", INPUTS) if inputs else ("",):
            set_inputs(layers, scheme(name) if part else None)
            set_weights(weights, {key: quantize(value, scheme(name)) for key, value in original.items()})
            figures.losses[name + part] = evaluate(run, model, samples)
            advance()
    return figures


@torch.no_grad()
def set_weights(weights: Mapping[str, nn.Parameter], quantized: Mapping[str, Quantized]) -> None:
    """Put what codes stand for in the place of weights."""
    for name, one in quantized.items():
        weights[name].copy_(one.values())


def set_inputs(layers: Mapping[str, Linear], scheme: Scheme | None) -> None:
    """Quantize the inputs of layers as they come, each with scales of its own; None: leave them as they are."""
    kernel = PLAIN if scheme is None else Through(lambda x: quantize(x, scheme).values().to(x.dtype))
    for layer in layers.values():
        layer.kernel = kernel


def num_evaluations(formats: Sequence[str], *, inputs: bool) -> int:
    """How many evaluations ``measure`` makes."""
    return 1 + len(formats) * (1 + inputs)

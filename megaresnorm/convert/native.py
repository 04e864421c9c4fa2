"""Our own checkpoints, as the converters read and write them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megaresnorm
from megaresnorm.assemble import build_model
from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.checkpoint.inspect import newest_of
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import RunState, fitting_table, recipe_of, state_of
from megaresnorm.convert.family import OURS
from megaresnorm.convert.links import rescaled
from megaresnorm.convert.provenance import Provenance, read_provenance
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.data.tokenizer_files import restore_tokenizer
from megaresnorm.model.specs import ParameterSpec
from megaresnorm.model.transformer import Transformer
from megaresnorm.parallel.sharding import Box
from megaresnorm.recipe import ModelRecipe


class NativeModel:
    """The weights of a checkpoint, whatever layout it was saved in. A TensorSource of links.py.

    Args:
        folder: a checkpoint, or a run: its newest one.
        progress: is called with the bytes of every part that has been verified.

    Attributes:
        recipe: the model's section alone.

    Raises:
        CheckpointError: it cannot be read, is damaged, or does not fit its recipe.
    """

    def __init__(self, folder: Path, progress: Callable[[int], None] | None = None) -> None:
        self.checkpoint = Checkpoint(newest_of(folder), progress=progress)
        self.folder = self.checkpoint.folder
        self.state: RunState = state_of(self.folder, self.checkpoint.state)
        self.recipe: ModelRecipe = recipe_of(self.folder, self.state).model
        self.table: dict[str, ParameterSpec] = fitting_table(self.checkpoint, self.recipe)

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds all weights: matrices may be stored in BF16 and norms in FP32."""
        types = {getattr(torch, tensor["dtype"]) for tensor in self.checkpoint.tensors["weights"].values()}
        return max(types, key=lambda dtype: dtype.itemsize)

    def read(self, name: str, box: Box) -> Tensor:
        """One slice of a parameter."""
        return self.checkpoint.read_box("weights", name, box)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None for a model that was trained on bare token files."""
        description = self.state.tokenizer
        if description is None:
            return None
        file = description.get("file")
        content = b"" if file is None else self.checkpoint.attached(file)
        return restore_tokenizer(description, content, str(self.folder))

    @functools.cached_property
    def provenance(self) -> Provenance | None:
        """What the model of Transformers that the weights come from said of itself; None for weights of our own.

        Raises:
            CheckpointError: it cannot be read.
        """
        return read_provenance(self.checkpoint.source(), self.folder)

    @property
    def exported_dtype(self) -> torch.dtype:
        """The type in which the weights are exported: that of the model that they come from, or their own.

        A model of several types is exported in ours, in which it comes back as it was.
        """
        if self.provenance is None or not self.provenance.uniform:
            return self.dtype
        found: torch.dtype = getattr(torch, self.provenance.dtype)
        return found if found.itemsize < self.dtype.itemsize else self.dtype

    def origin(self, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """The section of a config.json that says which model of ours it comes from, for the way back."""
        described = None if tokenizer is None else tokenizer.describe()
        model = self.recipe.model_dump(exclude_none=True)
        return {OURS: {"version": megaresnorm.__version__, "model": model, "tokenizer": described}}

    def model(
        self, rounded_to: torch.dtype | None = None, factor: Callable[[str], float] = lambda name: 1.0
    ) -> Transformer:
        """The model on this CPU in FP32.

        Args:
            rounded_to: a type that the weights, rescaled their ``factor``, are rounded to first; None leaves them.
        """
        model = build_model(self.recipe).model
        self.checkpoint.load("weights", {name: TensorSlices.of_whole(p.data) for name, p in model.named_parameters()})
        if rounded_to is not None:
            for name, p in model.named_parameters():
                p.data = rescaled(rescaled(p.data, factor(name)).to(rounded_to).to(p.dtype), 1 / factor(name))
        return model.eval()

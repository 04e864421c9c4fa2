"""Validation losses, and what they are in units that do not depend on the tokenizer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import exp, inf, log

import numpy as np

from megaresnorm.data.samples import Samples
from megaresnorm.data.tokenizer import Tokenizer, text_bytes
from megaresnorm.errors import TrainingError
from megaresnorm.recipe import Recipe


@dataclass(frozen=True)
class Evaluation:
    """Losses of a model on its validation sets. Figures of all sets together are means over the sets.

    Attributes:
        losses: cross entropy in nats a token, by the name of the set.
        bytes_per_token: of the text of each set's labels; of the sets whose tokenizer is known, on the first rank.
    """

    losses: Mapping[str, float]
    bytes_per_token: Mapping[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean loss of the sets, in nats a token."""
        return sum(self.losses.values()) / len(self.losses)

    @property
    def bits_per_byte(self) -> dict[str, float]:
        """Loss by set in bits for a byte of UTF-8, which models with different tokenizers can be compared by."""
        return {name: self.losses[name] / log(2) / size for name, size in self.bytes_per_token.items() if size}

    def metrics(self) -> dict[str, float]:
        """Figures by the names under which they are recorded; those of each set where there are several."""
        bits = self.bits_per_byte
        found = {"valid_loss": self.loss, "valid_perplexity": perplexity(self.loss)}
        if bits:
            found["valid_bits_per_byte"] = sum(bits.values()) / len(bits)
        if len(self.losses) > 1:
            for name, loss in self.losses.items():
                found |= {f"valid_loss/{name}": loss, f"valid_perplexity/{name}": perplexity(loss)}
            found |= {f"valid_bits_per_byte/{name}": value for name, value in bits.items()}
        return found


class Validation:
    """Evaluates a model on the first ``train.eval_samples`` samples of every validation set, always the same ones.

    Args:
        sets: samples of each set, by its name.
        loss_of: mean loss of the first so many samples of a set, None without labels. Collective.
        tokenizer: with which bytes of text are counted; None: they are not.
    """

    def __init__(
        self,
        recipe: Recipe,
        sets: Mapping[str, Samples],
        loss_of: Callable[[Samples, int], float | None],
        tokenizer: Tokenizer | None,
    ) -> None:
        self._sets, self._loss_of = sets, loss_of
        self._counts = {name: min(recipe.train.eval_samples, samples.per_epoch) for name, samples in sets.items()}
        self._bytes: dict[str, float] = {}
        if tokenizer is not None:
            masked = recipe.data.mask_documents
            for name, count in self._counts.items():
                self._bytes[name] = bytes_per_label(sets[name], count, tokenizer, mask_documents=masked)

    def evaluate(self) -> Evaluation | None:
        """The losses; None without a validation set. Collective.

        Raises:
            TrainingError: none of a set's samples has a label.
        """
        losses = {}
        for name, count in self._counts.items():
            loss = self._loss_of(self._sets[name], count)
            if loss is None:
                raise TrainingError(
                    f"none of the {count} validation samples{f' of {name}' if name else ''} has a label "
                    "(data.mask_documents, documents of one token); raise train.eval_samples, or evaluate on other data"
                )
            losses[name] = loss
        return Evaluation(losses, self._bytes) if losses else None


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats; infinite where a float cannot hold it.

    >>> perplexity(0.0), perplexity(1000.0)
    (1.0, inf)
    """
    return exp(loss) if loss < 700 else inf


def bytes_per_label(samples: Samples, count: int, tokenizer: Tokenizer, *, mask_documents: bool) -> float:
    """Bytes of text of the labels of the first ``count`` samples, for each of these labels.

    Args:
        mask_documents: whether the first token of a document is no label.
    """
    num_bytes = num_labels = 0
    for i in range(count):
        tokens, documents = samples[i]
        labels = tokens[1:][documents[1:] == documents[:-1]] if mask_documents else tokens[1:]
        num_bytes += text_bytes(tokenizer, np.asarray(labels).tolist())
        num_labels += len(labels)
    return num_bytes / max(1, num_labels)

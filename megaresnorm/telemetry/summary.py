"""How a run ended."""

from dataclasses import dataclass
from pathlib import Path

from megaresnorm.evaluation import Evaluation
from megaresnorm.telemetry.log import valid_figures


@dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    Attributes:
        steps: optimizer steps done in all.
        train_loss, unigram_entropy: means a token in nats; None where a signal came before them.
        evaluation: on the validation sets; None without any, or where a signal came before it.
        checkpoint: the newest; None where a signal came before one could be written.
        weights_digest: SHA-256 over the digests of its weight files. Equal runs in one layout have equal digests,
            where printed losses can hide a difference. Empty without a checkpoint.
        exit_code: as of ``StopSignals``; 0 where all steps are done.
    """

    steps: int
    train_loss: float | None
    evaluation: Evaluation | None
    unigram_entropy: float | None
    checkpoint: Path | None
    weights_digest: str
    exit_code: int

    @property
    def valid_loss(self) -> float | None:
        """Mean validation loss of the sets, in nats a token."""
        return None if self.evaluation is None else self.evaluation.loss

    def describe(self) -> list[str]:
        """Lines on what was learned and where it is."""
        lines = []
        if self.evaluation is not None and self.unigram_entropy is not None:
            gap = self.unigram_entropy - self.evaluation.loss
            lines += [
                f"validation loss {self.evaluation.loss:.4f} nats a token; unigram entropy {self.unigram_entropy:.4f}, "
                f"so {abs(gap):.4f} nats {'better' if gap > 0 else 'worse'} than knowing only how frequent each token "
                "is",
                valid_figures(self.evaluation.metrics()),
            ]
        if self.checkpoint is not None:
            lines += [f"checkpoint {self.checkpoint}", f"weights    {self.weights_digest}"]
        return lines

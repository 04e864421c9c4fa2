"""Comparison of two models by their logits on the same tokens, and the loading of the models for it."""

import gc
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.convert.config_json import normalized, their_config
from megaresnorm.convert.families import FAMILIES
from megaresnorm.convert.family import MEGATRON_NAME
from megaresnorm.convert.files import CONFIG, Weights, is_buffer
from megaresnorm.errors import CheckpointError, ConversionError
from megaresnorm.reading import first_line
from megaresnorm.resilience.host import available_memory

TOLERANCE = 2e-5  # share of the largest logit; a wrong conversion is off by orders of magnitude more
LOGITS = 1 << 22  # compared at a time, in FP64
MARGIN = 1e-4  # of logits, by which the likeliest token must lead the second to count in clear_top1
Logits = Callable[[Tensor], Tensor]  # tokens [B, S] -> [B, S, V], FP32 or FP64


@dataclass(frozen=True)
class Agreement:
    """How the logits of two models differ.

    Attributes:
        tokens: number of positions that were compared.
        largest, mean: of the absolute differences.
        scale: the largest absolute logit of the first model.
        top1: share of positions with the same likeliest token.
        clear_top1: the same share of the positions where the first model's likeliest token leads by MARGIN.
        kl: mean of KL(first || second) in nats.
        tolerance: the largest ``relative`` that is allowed.
    """

    tokens: int
    largest: float
    mean: float
    scale: float
    top1: float
    clear_top1: float
    kl: float
    tolerance: float = TOLERANCE

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest logit."""
        return self.largest / self.scale if self.scale else inf if self.largest else 0.0

    @property
    def passed(self) -> bool:
        """Whether the models compute the same: within the tolerance, and with the same clear likeliest tokens."""
        return self.relative <= self.tolerance and self.clear_top1 == 1.0  # False for infinite logits: relative is NaN

    def judge(self, made: str) -> None:
        """Refuse a conversion whose result, which the error calls ``made``, does not agree with the original.

        Raises:
            ConversionError: the models do not compute the same.
        """
        if self.passed:
            return
        raise ConversionError(
            f"FAIL: {made} does not compute the same: logits differ by up to {self.largest:.3g} of {self.scale:.3g} "
            f"(allowed {self.tolerance:.2g} of that), {self.clear_top1:.2%} have the same likeliest token; nothing was "
            "kept"
        )

    def rows(self) -> dict[str, str]:
        """The figures to print, by their names."""
        return {
            "positions compared": f"{self.tokens:,}",
            "largest difference": f"{self.largest:.3g} of logits up to {self.scale:.3g} ({self.relative:.2g} of that, "
            f"allowed {self.tolerance:.2g})",
            "mean difference": f"{self.mean:.3g}",
            "same likeliest token": f"{self.top1:.4%}, {self.clear_top1:.4%} where it leads by {MARGIN:g}",
            "KL divergence": f"{self.kl:.3g} nats a token",
        }


def logits_on(prompts: Sequence[Tensor], logits: Logits) -> Iterator[Tensor]:
    """Logits [B, S, V] of batches of tokens [B, S], one after the other."""
    for prompt_BS in prompts:
        with torch.no_grad():  # not around yield: a generator that is never resumed would leave it set
            found = logits(prompt_BS)
        yield found


def kept_logits_on(prompts: Sequence[Tensor], load: Callable[[], Logits]) -> list[Tensor]:
    """``logits_on`` of a model that is freed afterwards, so that there is memory for another."""
    kept = list(logits_on(prompts, load()))
    gc.collect()  # models of Transformers hold reference cycles
    return kept


@torch.no_grad()
def compare(one: Iterable[Tensor], other: Iterable[Tensor], tolerance: float = TOLERANCE) -> Agreement:
    """Compare two models' logits [B, S, V] on the same batches.

    Raises:
        CheckpointError: the vocabularies differ.
    """
    # Sums over positions: mean differences, equal first tokens, clear leads, equal first tokens with a clear lead, KL.
    sums = torch.zeros(5, dtype=torch.float64)
    tokens, largest, scale = 0, 0.0, 0.0
    for both in zip(one, other, strict=True):
        whole = [logits_BSV.flatten(0, 1) for logits_BSV in both]
        if whole[0].shape != whole[1].shape:
            sizes = " and ".join(str(logits.shape[1]) for logits in whole)
            raise CheckpointError(f"the models have logits of {sizes} tokens; they are not the same model")
        rows = max(1, LOGITS // whole[0].shape[1])
        for a, b in zip(*(logits.split(rows) for logits in whole), strict=True):
            a, b = a.double(), b.double()
            difference = (a - b).abs().nan_to_num(nan=inf, posinf=inf)
            largest, scale = max(largest, difference.max().item()), max(scale, a.abs().max().item())
            sums += _sums(a, b, difference)
            tokens += len(a)
    assert tokens
    mean, same, leads, same_that_leads, kl = sums.tolist()
    share = same_that_leads / leads if leads else 1.0
    return Agreement(tokens, largest, mean / tokens, scale, same / tokens, share, kl / tokens, tolerance)


def _sums(a_TV: Tensor, b_TV: Tensor, difference_TV: Tensor) -> Tensor:
    """The sums of ``compare`` over these positions."""
    top = a_TV.topk(min(2, a_TV.shape[1]), dim=1).values
    leads = top[:, 0] - top[:, -1] > MARGIN
    same = a_TV.argmax(1) == b_TV.argmax(1)
    logs_a, logs_b = a_TV.log_softmax(1), b_TV.log_softmax(1)
    kl = (logs_a.exp() * (logs_a - logs_b)).sum()
    counts = (difference_TV.mean(1).sum(), same.sum(), leads.sum(), (same & leads).sum(), kl)
    return torch.stack([count.double() for count in counts])


def of_ours(model: Any) -> Logits:
    """Logits of our Transformer."""

    def logits(tokens_BS: Tensor) -> Tensor:
        return model(tokens_BS).view(*tokens_BS.shape, -1)

    return logits


def of_theirs(model: Any) -> Logits:
    """Logits of a model of Transformers."""

    def logits(tokens_BS: Tensor) -> Tensor:
        return model(tokens_BS, use_cache=False).logits

    return logits


def checked_config(folder: Path, weights: Weights | None = None) -> dict[str, Any]:
    """The config.json of a folder of Transformers whose weights are safetensors.

    Args:
        weights: those of the model, where they are not in ``folder``.

    Raises:
        CheckpointError: it is none, or its config.json has more layers than there are tensors.
    """
    config = normalized(folder)
    if config["model_type"] == MEGATRON_NAME:
        raise CheckpointError(
            f"{folder}: weights of {MEGATRON_NAME} are not of Transformers; convert them first by from-megatron"
        )
    tensors = (weights or Weights(folder)).tensors  # which refuses whatever is not safetensors
    layers = [config.get(name) for name in ("num_hidden_layers", "n_layer")]
    if any(isinstance(number, int) and number > len(tensors) for number in layers):
        raise CheckpointError(f"{folder / CONFIG}: more layers than the {len(tensors)} tensors of {folder}")
    return config


def check_size(folder: Path, weights: Weights, loaded: Any, config: Any) -> None:
    """Check that a model is not much larger than its files, since Transformers would make up the missing weights.

    Args:
        folder: of config.json, for errors.
        loaded: the model's class in Transformers.
        config: its configuration.

    Raises:
        CheckpointError: config.json describes over twice as many parameters, or tables that do not fit in memory.
    """
    have = sum(prod(shape) for _, shape, _ in weights.tensors.values())
    with torch.device("meta"):
        skeleton = loaded(config)
    need = sum(p.numel() for p in skeleton.parameters())
    if need > 2 * have:
        raise CheckpointError(f"{folder / CONFIG}: of a model of {need:,} parameters; its files hold {have:,}")
    tables, free = sum(buffer.nbytes for buffer in skeleton.buffers()), available_memory()
    if free is not None and tables > free:
        raise CheckpointError(
            f"{folder}: Transformers would make tables of {human_bytes(tables)}, {human_bytes(free)} are free; is its "
            "longest sequence right?"
        )


def load_theirs(folder: Path, dtype: torch.dtype = torch.float32, weights: Weights | None = None) -> Any:
    """Load a model of Transformers by the class of its architecture, or by ours where the folder brings our code along.

    No code of the folder is run, and no pickle is read.

    Args:
        weights: those to load, where they are not in ``folder``, or have a prefix to leave out.

    Raises:
        CheckpointError: Transformers cannot load it, or tensors are missing, unexpected or of another shape.
    """
    import transformers

    weights = weights or Weights(folder)
    kind = checked_config(folder, weights)["model_type"]
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    if weights.prefix:
        options["key_mapping"] = {f"^{re.escape(weights.prefix)}": ""}
    if weights.folder != folder:  # where it would look for one
        options["generation_config"] = transformers.GenerationConfig()
    classes = {family.name: family.architecture for family in FAMILIES}
    ours = kind not in classes
    if ours:
        from megaresnorm.convert.modeling_megaresnorm import MegaResNormForCausalLM

        loaded: Any = MegaResNormForCausalLM
        options["attn_implementation"] = "sdpa"
    else:
        loaded = getattr(transformers, classes[kind])
        options["attn_implementation"] = "eager"  # every class has it, capped scores included
    before, bars = transformers.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = loaded.config_class.from_pretrained(folder, local_files_only=True) if ours else their_config(folder)
        config._attn_implementation = options["attn_implementation"]
        check_size(folder, weights, loaded, config)
        model, info = loaded.from_pretrained(weights.folder, config=config, output_loading_info=True, **options)
    except CheckpointError:
        raise
    except Exception as e:  # noqa: BLE001 - any error that a class of theirs makes of bad values
        raise CheckpointError(f"{folder}: Transformers cannot load it ({first_line(e)})") from None
    finally:
        transformers.logging.set_verbosity(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(name for name in map(str, info.get(problem) or ()) if not is_buffer(name))
        if names:
            raise CheckpointError(f"{folder}: Transformers finds {problem.replace('_', ' ')}, such as {names[0]}")
    return model.eval()

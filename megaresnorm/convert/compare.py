"""Whether two models compute the same: their logits on the same tokens."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.convert.files import CONFIG, read_json
from megaresnorm.convert.native import OURS, NativeModel
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.errors import CheckpointError, ConfigError, ConversionError

TOLERANCE = 2e-5  # of the largest logit; what two orders of summation in FP32 differ by at a hundred sub-layers
MARGIN = 1e-4  # by which the first token must lead the second to count in the agreement
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def main(argv):\n    for i, name in enumerate(argv):\n        print(f\"{i}: {name}\")\n",
    "In the beginning God created the heaven and the earth.\n\nAnd the earth was without form, and void;",
    "你好，世界。 Привет, мир! 😀 3.14159 = π",
)  # fmt: skip
Logits = Callable[[Tensor], Tensor]  # tokens [B, S] -> [B, S, V], FP32 or FP64


@dataclass(frozen=True)
class Agreement:
    """How the logits of two models differ over ``tokens`` positions.

    largest, mean: of the absolute differences.   scale: the largest absolute logit of the first.   top1: share of positions with
    the same likeliest token; clear_top1: of those where it leads by MARGIN.   kl: mean of KL(first || second) in nats.
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
        return self.largest / self.scale if self.scale else inf if self.largest else 0.0

    @property
    def passed(self) -> bool:
        return self.relative <= self.tolerance and self.clear_top1 == 1.0

    def judge(self, made: str) -> None:
        """Raises: ConversionError for a model that was made and does not agree."""
        if self.passed:
            return
        raise ConversionError(
            f"FAIL: {made} does not compute the same: logits differ by up to {self.largest:.3g} of {self.scale:.3g} (allowed "
            f"{self.tolerance:.2g} of that), {self.clear_top1:.2%} have the same likeliest token; nothing was kept"
        )

    def rows(self) -> dict[str, str]:
        """What is printed."""
        return {
            "positions compared": f"{self.tokens:,}",
            "largest difference": f"{self.largest:.3g} of logits up to {self.scale:.3g} ({self.relative:.2g} of that, "
            f"allowed {self.tolerance:.2g})",
            "mean difference": f"{self.mean:.3g}",
            "same likeliest token": f"{self.top1:.4%}, {self.clear_top1:.4%} where it leads by {MARGIN:g}",
            "KL divergence": f"{self.kl:.3g} nats a token",
        }


@torch.no_grad()
def compare(one: Logits, other: Logits, prompts: Iterable[Tensor], tolerance: float = TOLERANCE) -> Agreement:
    """Compare on batches of tokens [B, S]."""
    tokens, largest, total, scale, same, clear, clear_same, kl = 0, 0.0, 0.0, 0.0, 0, 0, 0, 0.0
    for prompt_BS in prompts:
        a, b = (logits(prompt_BS).flatten(0, 1).double() for logits in (one, other))
        if a.shape != b.shape:
            raise CheckpointError(
                f"the models have logits of {a.shape[1]} and {b.shape[1]} tokens; they are not the same model"
            )
        difference = (a - b).abs().nan_to_num(nan=inf)
        top = a.topk(min(2, a.shape[1]), dim=1).values
        leads = top[:, 0] - top[:, -1] > MARGIN
        agree = a.argmax(1) == b.argmax(1)
        logs = a.log_softmax(1), b.log_softmax(1)
        tokens += len(a)
        largest, scale = max(largest, difference.max().item()), max(scale, a.abs().max().item())
        total += difference.mean(1).sum().item()
        same, clear, clear_same = (
            same + int(agree.sum()),
            clear + int(leads.sum()),
            clear_same + int((agree & leads).sum()),
        )
        kl += (logs[0].exp() * (logs[0] - logs[1])).sum().item()
    share = clear_same / clear if clear else 1.0
    return Agreement(tokens, largest, total / tokens, scale, same / tokens, share, kl / tokens, tolerance)


def of_ours(model: Any) -> Logits:
    """Of our Transformer."""

    def logits(tokens_BS: Tensor) -> Tensor:
        return model(tokens_BS).view(*tokens_BS.shape, -1)

    return logits


def of_theirs(model: Any) -> Logits:
    """Of a model of Transformers."""

    def logits(tokens_BS: Tensor) -> Tensor:
        return model(tokens_BS, use_cache=False).logits

    return logits


def load_theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model of Transformers from a folder, by its own classes or, where the folder's code is ours, by ours.

    No code of the folder is run. Raises: CheckpointError.
    """
    import transformers

    config = read_json(folder / CONFIG)
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "attn_implementation": "eager"}
    loaded: Any = transformers.AutoModelForCausalLM
    if config.get("model_type") == OURS:
        from megaresnorm.convert.modeling_megaresnorm import MegaResNormForCausalLM

        loaded = MegaResNormForCausalLM
        del options["attn_implementation"]
    elif config.get("architectures"):
        loaded = getattr(transformers, str(config["architectures"][0]), loaded)
    level = logging.getLogger("transformers").level
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, info = loaded.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as e:
        raise CheckpointError(f"{folder}: Transformers cannot load it ({' '.join(str(e).split())[:200]})") from None
    finally:
        logging.getLogger("transformers").setLevel(level)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise CheckpointError(
                f"{folder}: Transformers finds {kind.replace('_', ' ')}, such as {sorted(map(str, info[kind]))[0]}"
            )
    return model.eval()


class Loaded(NamedTuple):
    """A model whose logits can be compared. seq_len: longest sequence.   tokenizer: of a checkpoint of ours that has one."""

    logits: Logits
    vocab_size: int
    seq_len: int
    tokenizer: Tokenizer | None = None


def load_logits(folder: Path) -> Loaded:
    """A checkpoint of ours, or a folder of Transformers. Raises: CheckpointError."""
    if (folder / CONFIG).exists():
        model = load_theirs(folder)
        config = model.config
        length: int = getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 128)
        return Loaded(of_theirs(model), config.vocab_size, length)
    native = NativeModel(folder)
    assert native.recipe.vocab_size is not None
    return Loaded(of_ours(native.model()), native.recipe.vocab_size, native.recipe.seq_len, native.tokenizer())


def random_prompts(vocab_size: int, seq_len: int, tokens: int = 2000, seed: int = 0) -> list[Tensor]:
    """At least ``tokens`` tokens drawn uniformly, in sequences of up to 128, some to a batch."""
    generator = torch.Generator().manual_seed(seed)
    length = min(seq_len, 128)
    rows = torch.randint(vocab_size, (-(-tokens // length), length), generator=generator)
    return list(rows.split(8))


def text_prompts(texts: Sequence[str], tokenizer: Tokenizer, vocab_size: int, seq_len: int) -> list[Tensor]:
    """Each a document of its own, cut to the longest sequence."""
    rows = [[tokenizer.eod, *tokenizer.encode(text).tolist()][:seq_len] for text in texts]
    return [torch.tensor([row]) for row in rows if max(row) < vocab_size]


def prompts_of(native: NativeModel, tokenizer: Tokenizer | None) -> list[Tensor]:
    """What a conversion is verified on: random tokens, and texts where there is a tokenizer."""
    vocab_size, seq_len = native.recipe.vocab_size, native.recipe.seq_len
    assert vocab_size is not None
    texts = [] if tokenizer is None else text_prompts(TEXTS, tokenizer, vocab_size, seq_len)
    return random_prompts(vocab_size, seq_len) + texts


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises: ConfigError."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--prompts {path}: cannot be read ({e})") from None
    if not lines:
        raise ConfigError(f"--prompts {path}: has no line of text")
    return lines


def check_memory(num_bytes: int) -> None:
    """Raises: ConfigError where two models of so many bytes do not fit."""
    have = _available_memory()
    if have is not None and 2 * num_bytes > have:
        raise ConfigError(
            f"verifying needs {human_bytes(2 * num_bytes)} of memory, {human_bytes(have)} are free; switch it off by --verify off"
        )


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)

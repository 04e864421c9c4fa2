"""Log-likelihoods of texts by lm-eval from an exported model, and by our own model from its checkpoint.

pip install lm-eval accelerate
python tools/score_with_lm_eval.py RUN EXPORTED [--text FILE]
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from megaresnorm.convert.native import NativeModel

TEXT = Path(argparse.__file__)


def windows(text: str, characters: int = 150, count: int = 20) -> list[tuple[str, str]]:
    """Contexts and continuations from all over the text. Spaces between belong to the continuation, as in lm-eval."""
    pairs = []
    for start in range(0, max(1, len(text) - characters), max(1, (len(text) - characters) // count)):
        end = start + len(text[start : start + characters // 2].rstrip())
        pairs.append((text[start:end], text[end : start + characters]))
    return [pair for pair in pairs if pair[0]][:count]


@torch.no_grad()
def our_scores(native: NativeModel, pairs: list[tuple[str, str]]) -> list[float]:
    """log p(continuation | context) of each pair, from the same tokens as lm-eval makes of them."""
    model, tokenizer = native.model(), native.tokenizer()
    assert tokenizer is not None
    scores = []
    for context, continuation in pairs:
        before, whole = tokenizer.encode(context).tolist(), tokenizer.encode(context + continuation).tolist()
        whole = (
            before + whole[len(before) :]
        )  # lm-eval keeps the context's own tokens, whatever they become with what follows
        logs = model(torch.tensor([whole[:-1]])).double().log_softmax(-1)
        scores.append(sum(logs[i - 1, whole[i]].item() for i in range(len(before), len(whole))))
    return scores


def their_scores(folder: Path, pairs: list[tuple[str, str]]) -> list[float]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return [score for score, _ in model.loglikelihood(requests, disable_tqdm=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a checkpoint, or a run")
    parser.add_argument("exported", type=Path, help="what megaresnorm convert to-hf has made of it")
    parser.add_argument("--text", type=Path, default=TEXT, help="text to score [a file of Python's library]")
    arguments = parser.parse_args()
    pairs = windows(arguments.text.read_text(encoding="utf-8"))
    ours, theirs = our_scores(NativeModel(arguments.run), pairs), their_scores(arguments.exported, pairs)
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(
        f"{len(pairs)} texts: ours {sum(ours):.5f} nats, lm-eval {sum(theirs):.5f}; "
        f"largest difference of one {worst:.2g}"
    )
    return 0 if worst < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())

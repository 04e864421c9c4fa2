#!/usr/bin/env python3
"""Whether a model writes words of its corpus, and whether it has only learned the corpus by heart.

python tools/judge_text.py runs/english/keel-24 --corpus english --prompt "And the king" --samples 10

Prints the share of the generated words that occur in the corpus, and the longest run of words that the corpus has as
well. Words are runs of letters, in lower case; the prompt does not count.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from megaresnorm.data.corpus import read_documents
from megaresnorm.data.sources import find_sources
from megaresnorm.errors import UserError
from megaresnorm.generate import generate, load_model

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="output folder of a run, or a checkpoint")
    parser.add_argument("--corpus", choices=["stdlib", "english"], help="what it was trained on")
    parser.add_argument("--paths", nargs="*", default=[], help="or these files")
    parser.add_argument("--prompt", default="", help="[start of a document]")
    parser.add_argument("--samples", type=int, default=10, help="texts, of seeds 0, 1, ... [10]")
    parser.add_argument("--tokens", type=int, default=300, help="tokens a text [300]")
    parser.add_argument("--temperature", type=float, default=0.8, help="[0.8]")
    parser.add_argument("--top-p", type=float, default=0.95, help="[0.95]")
    arguments = parser.parse_args()
    corpus = [
        words
        for source in find_sources(arguments.corpus, arguments.paths)
        for text in read_documents(source, "text")
        if (words := WORD.findall(text.lower()))
    ]
    known = {word for words in corpus for word in words}
    model, tokenizer = load_model(arguments.checkpoint)
    written: list[list[str]] = []
    for seed in range(arguments.samples):
        text = generate(
            model, tokenizer, arguments.prompt, arguments.tokens,
            temperature=arguments.temperature, top_p=arguments.top_p, seed=seed,
        )  # fmt: skip
        written.append(WORD.findall(text[len(arguments.prompt) :].lower()))
        if seed == 0:
            print(text)
    total = sum(map(len, written))
    right = sum(word in known for words in written for word in words)
    longest = max((longest_copy(words, corpus) for words in written), key=len)
    print(f"\n{right} of {total} words ({right / max(1, total):.1%}) are words of the corpus")
    print(f"longest run that the corpus has as well: {len(longest)} words ({' '.join(longest)})")


def longest_copy(words: list[str], corpus: list[list[str]]) -> list[str]:
    """The longest run of ``words`` that stands in one of the corpus's documents."""
    best: list[str] = []
    while len(best) < len(words):
        size = len(best) + 1
        runs = {run: list(run) for run in _runs(words, size)}
        found = next((run for document in corpus for run in _runs(document, size) if run in runs), None)
        if found is None:
            return best
        best = runs[found]
    return best


def _runs(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(size)), strict=False)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"judge_text: error: {e}")

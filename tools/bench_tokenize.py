#!/usr/bin/env python3
"""How fast prepare is beside its tokenizer alone: the same text, tokenizer and number of processes, in turn.

python tools/bench_tokenize.py --megabytes 1000 --workers 2

Makes a .jsonl file of that size out of the built-in corpus (repeated), tokenizes it with prepare into .bin/.idx, and
before and after that a sample of it with the tokenizer alone: the text is in memory already and the ids are thrown
away. Rates are of text, by the clock; memory is the peak of the largest process.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from pathlib import Path

from megaresnorm.data.corpus import read_documents
from megaresnorm.data.prepare import PrepareJob, prepare
from megaresnorm.data.sources import find_sources
from megaresnorm.data.tokenizer import SentencePieceTokenizer
from megaresnorm.data.tokenizer_files import read_tokenizer

SAMPLE_CHARACTERS = 1 << 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the text [1000]")
    parser.add_argument("--workers", type=int, default=2, help="processes [2]")
    parser.add_argument("--corpus", default="english", choices=["stdlib", "english"], help="[english]")
    parser.add_argument("--vocab-size", type=int, default=8192, help="pieces of the SentencePiece model [8192]")
    parser.add_argument("--folder", type=Path, help="where the files go, about 1.6 times the text [a temporary folder]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        print("\n".join(measure(arguments, Path(name))))


def measure(arguments: argparse.Namespace, folder: Path) -> list[str]:
    documents = [text for source in find_sources(arguments.corpus, ()) for text in read_documents(source, "text")]
    model = folder / "tokenizer.model"
    model.write_bytes(SentencePieceTokenizer.train(documents, arguments.vocab_size).model)
    text_bytes = write_text(folder / "text.jsonl", documents, arguments.megabytes * 10**6)
    own = [tokenizer_rate(model, documents, arguments.workers)]
    job = PrepareJob(
        out=folder / "out", paths=(str(folder / "text.jsonl"),), tokenizer=str(model), workers=arguments.workers
    )
    with PeakMemory() as memory:
        start = time.perf_counter()
        result = prepare(job)
        seconds = time.perf_counter() - start
    own.append(tokenizer_rate(model, documents, arguments.workers))
    alone, whole = statistics.mean(own), text_bytes / seconds / 1e6
    return [
        f"text        {text_bytes / 1e6:,.0f} MB of {arguments.corpus}, {result.documents:,} documents, "
        f"{result.tokens:,} tokens",
        f"tokenizer   {alone:.2f} MB/s alone, {arguments.workers} processes (before {own[0]:.2f}, after {own[1]:.2f})",
        f"prepare     {whole:.2f} MB/s, {seconds:.0f} s: {whole / alone:.0%} of the tokenizer's own rate",
        f"memory      {memory.mib:,.0f} MiB in the largest process",
    ]


def write_text(path: Path, documents: list[str], size: int) -> int:
    """The documents again and again up to ``size`` bytes of text; returns the bytes of text."""
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            for text in documents:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
                if written >= size:
                    break
    return written


def tokenizer_rate(model: Path, documents: list[str], workers: int) -> float:
    """MB/s of encode alone, every process with its own share of a sample."""
    sample: list[str] = []
    size = 0
    while size < SAMPLE_CHARACTERS:
        for text in documents:
            sample.append(text)
            size += len(text)
            if size >= SAMPLE_CHARACTERS:
                break
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(workers)
    with context.Pool(workers, set_gate, (gate,)) as pool:
        rates = pool.map(encode_share, [(str(model), sample[i::workers]) for i in range(workers)], chunksize=1)
    return sum(rates)


def set_gate(gate: threading.Barrier) -> None:
    global _gate
    _gate = gate


def encode_share(share: tuple[str, list[str]]) -> float:
    """MB/s of one process, measured while all of them work."""
    model, texts = share
    tokenizer = read_tokenizer(Path(model))
    _gate.wait()
    start = time.perf_counter()
    for text in texts:
        tokenizer.encode(text)
    return sum(len(text.encode()) for text in texts) / (time.perf_counter() - start) / 1e6


class PeakMemory:
    """Peak resident memory of the largest among this process and its children, asked for every quarter of a second."""

    mib = 0.0

    def __enter__(self) -> "PeakMemory":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            for process in [multiprocessing.current_process(), *multiprocessing.active_children()]:
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except OSError:
                    continue
                resident = next((line for line in status.splitlines() if line.startswith("VmRSS")), "VmRSS: 0 kB")
                self.mib = max(self.mib, int(resident.split()[1]) / 1024)


if __name__ == "__main__":
    main()

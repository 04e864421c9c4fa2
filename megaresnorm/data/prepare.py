"""megaresnorm prepare: text to a folder with token files, tokenizer and description, made whole or not at all."""

import concurrent.futures
import json
import multiprocessing
import shutil
import signal
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaresnorm.data.corpus import SourceFile, find_files, read_documents
from megaresnorm.data.dataset import DESCRIPTION, PREFIX, digests_of, json_digest
from megaresnorm.data.indexed import TokenWriter, token_dtype
from megaresnorm.data.tokenizer import SENTENCEPIECE_FILE, ByteTokenizer, SentencePieceTokenizer, Tokenizer
from megaresnorm.errors import ConfigError, DataError

WORK_CHARACTERS = 1 << 19  # text handed to a worker at a time
TRAINING_CHARACTERS = 1 << 25  # text a SentencePiece model is trained on

DEFAULT_VOCAB_SIZE = 8192  # of a trained SentencePiece model

Progress = Callable[[int], None]  # called with the number of source bytes done since the last call


@dataclass(frozen=True)
class PrepareJob:
    """What to prepare. ``tokenizer``: bytes, sentencepiece (trained on the corpus) or the path of a .model file."""

    out: Path
    corpus: str | None = None
    paths: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    vocab_size: int | None = None
    text_key: str = "text"
    workers: int = 1
    overwrite: bool = False

    @property
    def tokenizer_file(self) -> Path | None:
        """The .model file to load, if the tokenizer is one."""
        return None if self.tokenizer in ("bytes", "sentencepiece") else Path(self.tokenizer)

    def digest(self, files: list[SourceFile]) -> str:
        """Stands for what was asked for; recorded to tell whether a finished folder already is its result."""
        file = self.tokenizer_file
        return json_digest(
            {
                "files": [[str(f.path.resolve()), f.num_bytes, f.path.stat().st_mtime_ns] for f in files],
                "tokenizer": self.tokenizer if file is None else SentencePieceTokenizer.load(file).describe(),
                "vocab_size": self.vocab_size,
                "text_key": self.text_key,
            }
        )


@dataclass(frozen=True)
class Prepared:
    """The finished folder. ``reused``: it was there already, made from the same files with the same settings."""

    folder: Path
    documents: int
    tokens: int
    vocab_size: int
    reused: bool


def prepare(
    job: PrepareJob, files: list[SourceFile] | None = None, progress: Progress = lambda num_bytes: None
) -> Prepared:
    """Tokenize a corpus into ``job.out``. A folder there is reused if it is the result of the same job, and never replaced
    without ``overwrite``; what is there stays until its successor is complete.

    Raises: DataError, one line, for sources, tokenizer or output that cannot be used.
    """
    files = find_files(job.corpus, job.paths) if files is None else files
    if job.vocab_size is not None and job.tokenizer != "sentencepiece":
        raise ConfigError(f"--vocab-size={job.vocab_size} has no effect with --tokenizer {job.tokenizer}; remove it")
    request = job.digest(files)
    unique = uuid.uuid4().hex
    temporary = job.out.with_name(f".{job.out.name}.tmp-{unique}")
    try:
        if job.out.exists():
            if not job.overwrite:
                return _reuse(job.out, request)
            if not (job.out / DESCRIPTION).is_file():
                raise DataError(
                    f"{job.out}: exists and is not a data set, so --overwrite will not replace it; use another --out"
                )
        temporary.mkdir(parents=True)
        description = _write(job, files, temporary, progress)
        text = json.dumps({**description, "request": request}, indent=1)
        (temporary / DESCRIPTION).write_text(text, encoding="utf-8")
        _replace(temporary, job.out, job.out.with_name(f".{job.out.name}.old-{unique}"))
    except OSError as e:
        raise DataError(f"{job.out}: cannot be written ({e.strerror})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Prepared(job.out, description["documents"], description["tokens"], description["vocab_size"], reused=False)


def _write(job: PrepareJob, files: list[SourceFile], folder: Path, progress: Progress) -> dict:
    tokenizer = _make_tokenizer(job, files)
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / SENTENCEPIECE_FILE).write_bytes(tokenizer.model)
    writer = TokenWriter(folder / PREFIX, token_dtype(tokenizer.vocab_size))
    documents = num_tokens = 0
    try:
        for ids, lengths, num_bytes in _tokenize(job, files, tokenizer):
            writer.add(ids, lengths)
            documents, num_tokens = documents + len(lengths), num_tokens + len(ids)
            progress(num_bytes)
    finally:
        writer.close()
    if not documents:
        raise DataError(f"{files[0].path if files else job.out}: the sources hold no document with text")
    return {
        "format": 1,
        "tokenizer": tokenizer.describe(),
        "vocab_size": tokenizer.vocab_size,
        "documents": documents,
        "tokens": num_tokens,
        "files": {name: digests_of(folder / name) for name in (f"{PREFIX}.bin", f"{PREFIX}.idx")},
    }


def _make_tokenizer(job: PrepareJob, files: list[SourceFile]) -> Tokenizer:
    if job.tokenizer == "bytes":
        return ByteTokenizer()
    if job.tokenizer == "sentencepiece":
        return SentencePieceTokenizer.train(_training_text(files, job.text_key), job.vocab_size or DEFAULT_VOCAB_SIZE)
    return SentencePieceTokenizer.load(Path(job.tokenizer))


def _training_text(files: list[SourceFile], text_key: str) -> Iterator[str]:
    """All of a small corpus; of a large one about TRAINING_CHARACTERS, the same share of the documents of every file."""
    share = min(1.0, TRAINING_CHARACTERS / max(1, sum(f.num_bytes for f in files)))
    due = 0.0  # characters that should have been taken by now, less those that were
    for file in files:
        for text in read_documents(file, text_key):
            due += share * len(text)
            if due > 0:
                taken = text if share == 1.0 else text[: max(WORK_CHARACTERS, round(due))]
                due -= len(taken)
                yield taken


def _tokenize(
    job: PrepareJob, files: list[SourceFile], tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, list[int], int]]:
    """(ids, document lengths, source bytes) of one piece of work after the other, in the order of the sources."""
    work = _work(files, job.text_key)
    if job.workers <= 1:
        for texts, num_bytes in work:
            yield (*_encode(tokenizer, texts), num_bytes)
        return
    spawn = multiprocessing.get_context("spawn")
    model = tokenizer.model if isinstance(tokenizer, SentencePieceTokenizer) else None
    with concurrent.futures.ProcessPoolExecutor(job.workers, spawn, _start_worker, (model,)) as pool:
        pending: deque = deque()
        try:
            for texts, num_bytes in work:
                pending.append((pool.submit(_encode_in_worker, texts), num_bytes))
                if len(pending) > 4 * job.workers:
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        except BrokenProcessPool:
            raise DataError("a tokenizer process was killed (out of memory?); try fewer --workers") from None


def _result(entry: tuple) -> tuple[np.ndarray, list[int], int]:
    future, num_bytes = entry
    ids, lengths = future.result()
    return ids, lengths, num_bytes


def _work(files: list[SourceFile], text_key: str) -> Iterator[tuple[list[str], int]]:
    """Documents in pieces of about WORK_CHARACTERS, each with the source bytes that it finishes."""
    texts: list[str] = []
    size = done = 0
    for file in files:
        for text in read_documents(file, text_key):
            texts.append(text)
            size += len(text)
            if size >= WORK_CHARACTERS:
                yield texts, done
                texts, size, done = [], 0, 0
        done += file.num_bytes
    if texts or done:
        yield texts, done


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[np.ndarray, list[int]]:
    """The ids of all texts back to back, each text ended by eod, and the length of each."""
    pieces, lengths = [np.empty(0, np.int32)], []
    for text in texts:
        ids = tokenizer.encode(text)
        pieces += [ids, np.array([tokenizer.eod], np.int32)]
        lengths.append(len(ids) + 1)
    return np.concatenate(pieces), lengths


_worker_tokenizer: Tokenizer  # set once in every worker process


def _start_worker(model: bytes | None) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    _worker_tokenizer = ByteTokenizer() if model is None else SentencePieceTokenizer(model, "the tokenizer")


def _encode_in_worker(texts: list[str]) -> tuple[np.ndarray, list[int]]:
    return _encode(_worker_tokenizer, texts)


def _reuse(folder: Path, request: str) -> Prepared:
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        same = description["request"] == request
        whole = all((folder / name).stat().st_size == f["size"] for name, f in description["files"].items())
        counts = description["documents"], description["tokens"], description["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{folder}: exists and is not a whole data set; use --overwrite, or another --out") from None
    if not same:
        raise DataError(
            f"{folder}: exists and was made from other files or settings; use --overwrite, or another --out"
        )
    if not whole:
        raise DataError(f"{folder}: its token files are not those that were prepared; use --overwrite to make it again")
    return Prepared(folder, *counts, reused=True)


def _replace(temporary: Path, out: Path, old: Path) -> None:
    """Put the finished folder in place; the one that was there goes only afterwards."""
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)

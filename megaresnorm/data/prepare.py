"""megaresnorm prepare: from text to a folder with token files, tokenizer and description, made whole or not at all."""

import concurrent.futures
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaresnorm.data.corpus import read_pieces
from megaresnorm.data.dataset import DESCRIPTION, PREFIX, digests_of, json_digest, read_description
from megaresnorm.data.hub import HUB
from megaresnorm.data.indexed import TokenWriter, token_dtype
from megaresnorm.data.sources import Source, find_sources
from megaresnorm.data.tokenizer import SentencePieceTokenizer, Tokenizer
from megaresnorm.data.tokenizer_files import load_tokenizer, read_tokenizer, restore_tokenizer
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.files import new_folder, occupied, sweep_beside

WORK_CHARACTERS = 1 << 19  # text handed to a worker at a time
TRAINING_CHARACTERS = 1 << 25  # text that a SentencePiece model is trained on

DEFAULT_VOCAB_SIZE = 8192  # of a trained SentencePiece model

Progress = Callable[[int], None]  # called with the number of source bytes done since the last call


@dataclass(frozen=True)
class PrepareJob:
    """A request to prepare a data set.

    Attributes:
        out: folder to make.
        corpus: name of a built-in corpus; None to read ``paths``.
        paths: files, folders and hf:NAME.
        tokenizer: bytes, sentencepiece (trained on the corpus), or a path as of ``read_tokenizer``.
        vocab_size: of a trained SentencePiece model; None for DEFAULT_VOCAB_SIZE.
        end_token, bos, begin_token: tokens that end and begin documents, as of ``read_tokenizer``.
        text_key: key or column that holds the text, where a source has rows.
        workers: processes that tokenize.
        overwrite: whether a data set in ``out`` may be replaced.
    """

    out: Path
    corpus: str | None = None
    paths: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    vocab_size: int | None = None
    end_token: str | None = None
    bos: bool = False
    begin_token: str | None = None
    text_key: str = "text"
    workers: int = 1
    overwrite: bool = False

    @property
    def ready_tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None where it is trained on the corpus.

        Raises:
            ConfigError: a setting has no effect with it.
            DataError: it cannot be used.
        """
        if self.begin_token is not None and not self.bos:
            raise ConfigError(f"--begin-token {self.begin_token} has no effect without --bos; add it")
        if self.tokenizer == "sentencepiece":
            if self.end_token is not None or self.begin_token is not None:
                raise ConfigError("--end-token and --begin-token have no effect with --tokenizer sentencepiece")
            return None
        if self.vocab_size is not None:
            raise ConfigError(
                f"--vocab-size={self.vocab_size} has no effect with --tokenizer {self.tokenizer}; remove it"
            )
        return read_tokenizer(Path(self.tokenizer), self.end_token, bos=self.bos, begin=self.begin_token)

    def digest(self, sources: list[Source], tokenizer: Tokenizer | None) -> str:
        """Digest of the request. It is recorded to tell whether a finished folder already is the result."""
        trained = f"sentencepiece, begin {self.bos}"
        return json_digest(
            {
                "sources": [source.identity for source in sources],
                "tokenizer": trained if tokenizer is None else tokenizer.describe(),
                "vocab_size": self.vocab_size,
                "text_key": self.text_key,
            }
        )


@dataclass(frozen=True)
class Prepared:
    """The finished folder.

    Attributes:
        reused: it was there already, made from the same files with the same settings.
        tokenizer: with which it was made.
        without_text: names of the sources that hold no document with text.
    """

    folder: Path
    documents: int
    tokens: int
    vocab_size: int
    reused: bool
    tokenizer: Tokenizer
    without_text: tuple[str, ...] = ()


def prepare(
    job: PrepareJob, sources: list[Source] | None = None, progress: Progress = lambda num_bytes: None
) -> Prepared:
    """Tokenize a corpus into ``job.out``.

    A folder there is reused if it is the result of the same job, and never replaced without ``job.overwrite``. It stays
    until its successor is complete. An empty folder is filled, and a link to a folder stays one.

    Args:
        job: what to prepare.
        sources: those of the job, where they are known already.
        progress: called with the number of source bytes done since the last call.

    Raises:
        ConfigError: a setting has no effect with the job's tokenizer.
        DataError: sources, tokenizer or output cannot be used; one line.
    """
    sources = find_sources(job.corpus, job.paths) if sources is None else sources
    tokenizer = job.ready_tokenizer
    try:
        sweep_beside(job.out)
        request = job.digest(sources, tokenizer)
        if occupied(job.out):
            if not job.overwrite:
                return _reuse(job.out, request)
            if not (job.out / DESCRIPTION).is_file():
                raise DataError(
                    f"{job.out}: exists and is not a data set, so --overwrite will not replace it; use another --out"
                )
        with new_folder(job.out, replace=job.overwrite) as folder:
            if tokenizer is None:
                texts = _training_text(sources, job.text_key)
                tokenizer = SentencePieceTokenizer.train(texts, job.vocab_size or DEFAULT_VOCAB_SIZE, begin=job.bos)
            description, without_text = _write(job, sources, tokenizer, folder, progress)
            text = json.dumps({**description, "request": request}, indent=1)
            (folder / DESCRIPTION).write_text(text, encoding="utf-8")
    except OSError as e:
        raise DataError(f"{job.out}: cannot be written ({e.strerror})") from None
    counts = description["documents"], description["tokens"], description["vocab_size"]
    return Prepared(job.out, *counts, reused=False, tokenizer=tokenizer, without_text=tuple(without_text))


def _write(
    job: PrepareJob, sources: list[Source], tokenizer: Tokenizer, folder: Path, progress: Progress
) -> tuple[dict, list[str]]:
    """Write the token files and the tokenizer.

    Returns:
        (description without the request, names of the sources without text).
    """
    if "file" in tokenizer.describe():
        (folder / tokenizer.describe()["file"]).write_bytes(tokenizer.model)
    num_tokens, without_text = 0, list[str]()
    with TokenWriter(folder / PREFIX, token_dtype(tokenizer.vocab_size)) as writer:
        for (ids, lengths, ends), num_bytes in _tokenize(job, sources, tokenizer, without_text.append):
            writer.add(ids, lengths, ends=ends)
            num_tokens += len(ids)
            progress(num_bytes)
        documents = writer.num_documents
    if not documents:
        raise DataError(f"{sources[0].name if sources else job.out}: the sources hold no document with text")
    return {
        "format": 1,
        "tokenizer": tokenizer.describe(),
        "vocab_size": tokenizer.vocab_size,
        "documents": documents,
        "tokens": num_tokens,
        "files": {name: digests_of(folder / name) for name in (f"{PREFIX}.bin", f"{PREFIX}.idx")},
    }, without_text


def _training_text(sources: list[Source], text_key: str) -> Iterator[str]:
    """Text to train a tokenizer on: all of a small corpus, of a large one the same share of every file.

    The shares come to about TRAINING_CHARACTERS. Of a streamed data set, whose size is not known, it is the beginning.
    """
    share = min(1.0, TRAINING_CHARACTERS / max(1, sum(source.num_bytes for source in sources)))
    due = 0.0  # characters that should have been taken by now, less those that were
    for source in sources:
        streamed = 0
        for text, _ in read_pieces(source, text_key):
            due += share * len(text)
            if due > 0:
                taken = text if share == 1.0 else text[: max(WORK_CHARACTERS, round(due))]
                due -= len(taken)
                streamed += len(taken)
                yield taken
            if source.name.startswith(HUB) and streamed >= TRAINING_CHARACTERS:
                break


# Token ids, number of them that belong to each document, whether the last document ends with them.
Encoded = tuple[np.ndarray, list[int], bool]


def _tokenize(
    job: PrepareJob, sources: list[Source], tokenizer: Tokenizer, without_text: Callable[[str], None]
) -> Iterator[tuple[Encoded, int]]:
    """Encode the corpus in the order of the sources.

    Args:
        without_text: called with the name of every source that has no document.

    Yields:
        (encoded pieces, number of source bytes that they finish).
    """
    work = _work(sources, job.text_key, without_text)
    if job.workers <= 1:
        begins = True
        for pieces, num_bytes in work:
            yield _encode(tokenizer, pieces, begins), num_bytes
            begins = pieces[-1][1] if pieces else begins
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        job.workers, spawn, _start_worker, (tokenizer.describe(), tokenizer.model)
    ) as pool:
        pending: deque = deque()
        try:
            begins = True
            for pieces, num_bytes in work:
                pending.append((pool.submit(_encode_in_worker, pieces, begins), num_bytes))
                begins = pieces[-1][1] if pieces else begins
                if len(pending) > 4 * job.workers:
                    future, done = pending.popleft()
                    yield future.result(), done
            for future, done in pending:
                yield future.result(), done
        except BrokenProcessPool:
            raise DataError("a tokenizer process was killed (out of memory?); try fewer --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _work(
    sources: list[Source], text_key: str, without_text: Callable[[str], None]
) -> Iterator[tuple[list[tuple[str, bool]], int]]:
    """Divide the corpus into units of work.

    Yields:
        (pieces of documents, about WORK_CHARACTERS together; number of source bytes that they finish).
    """
    pieces: list[tuple[str, bool]] = []
    size = done = 0
    for source in sources:
        empty = True
        for text, ends in read_pieces(source, text_key):
            empty = False
            pieces.append((text, ends))
            size += len(text)
            if size >= WORK_CHARACTERS:
                yield pieces, done
                pieces, size, done = [], 0, 0
        done += source.num_bytes
        if empty:
            without_text(source.name)
    if pieces or done:
        yield pieces, done


def _encode(tokenizer: Tokenizer, pieces: Iterable[tuple[str, bool]], begins: bool) -> Encoded:
    """Token ids of all pieces back to back. ``tokenizer.bos``, if any, begins a document, ``tokenizer.eod`` ends it.

    Args:
        begins: whether the first piece begins a document.
    """
    found, lengths, ends = [np.empty(0, np.int32)], [0], begins
    for text, ends_after in pieces:
        if ends and tokenizer.bos is not None:
            found.append(np.array([tokenizer.bos], np.int32))
            lengths[-1] += 1
        ends = ends_after
        ids = tokenizer.encode(text)
        found.append(ids)
        lengths[-1] += len(ids)
        if ends:
            found.append(np.array([tokenizer.eod], np.int32))
            lengths[-1] += 1
            lengths.append(0)
    if ends:
        lengths.pop()
    return np.concatenate(found), lengths, ends


_worker_tokenizer: Tokenizer  # set once in every worker process


def _start_worker(description: dict, model: bytes) -> None:
    global _worker_tokenizer
    for number in (signal.SIGINT, signal.SIGTERM):  # which the main process handles, where the whole group gets them
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = restore_tokenizer(description, model, "the tokenizer")


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone: a killed one cannot tell it to."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(pieces: list[tuple[str, bool]], begins: bool) -> Encoded:
    return _encode(_worker_tokenizer, pieces, begins)


def _reuse(folder: Path, request: str) -> Prepared:
    try:
        description = read_description(folder)
        same = description["request"] == request
        names = [f"{PREFIX}.bin", f"{PREFIX}.idx"]
        whole = all((folder / name).stat().st_size == description["files"][name]["size"] for name in names)
        counts = description["documents"], description["tokens"], description["vocab_size"]
        tokenizer = load_tokenizer(description["tokenizer"], folder)
    except (DataError, OSError, KeyError):
        raise DataError(f"{folder}: exists and is not a whole data set; use --overwrite, or another --out") from None
    if not same:
        raise DataError(
            f"{folder}: exists and was made from other files or settings; use --overwrite, or another --out"
        )
    if not whole:
        raise DataError(f"{folder}: its token files are not those that were prepared; use --overwrite to make it again")
    return Prepared(folder, *counts, reused=True, tokenizer=tokenizer)

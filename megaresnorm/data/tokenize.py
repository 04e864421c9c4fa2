"""Text to token ids, by one process or by several: the tokens are the same."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from megaresnorm.data.corpus import read_pieces
from megaresnorm.data.sources import Source
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.data.tokenizer_files import restore_tokenizer
from megaresnorm.errors import DataError

WORK_CHARACTERS = 1 << 19  # text handed to a worker at a time

# Token ids, number of them that belong to each document, whether the last document ends with them.
Encoded = tuple[np.ndarray, list[int], bool]


def tokenize(
    sources: list[Source], tokenizer: Tokenizer, text_key: str, workers: int, without_text: Callable[[str], None]
) -> Iterator[tuple[Encoded, int]]:
    """Encode a corpus in the order of the sources.

    Args:
        text_key: key or column of the text.
        workers: processes that tokenize.
        without_text: called with the name of every source that has no document.

    Yields:
        (encoded pieces, number of source bytes that they finish).
    """
    work = _work(sources, text_key, without_text)
    if workers <= 1:
        begins = True
        for pieces, num_bytes in work:
            yield _encode(tokenizer, pieces, begins), num_bytes
            begins = pieces[-1][1] if pieces else begins
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, spawn, _start_worker, (tokenizer.describe(), tokenizer.model)
    ) as pool:
        pending: deque = deque()
        try:
            begins = True
            for pieces, num_bytes in work:
                pending.append((pool.submit(_encode_in_worker, pieces, begins), num_bytes))
                begins = pieces[-1][1] if pieces else begins
                if len(pending) > 4 * workers:
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
        ids = tokenizer.encode(text) if ends else _encode_rest(tokenizer, text)
        ends = ends_after
        found.append(ids)
        lengths[-1] += len(ids)
        if ends:
            found.append(np.array([tokenizer.eod], np.int32))
            lengths[-1] += 1
            lengths.append(0)
    if ends:
        lengths.pop()
    return np.concatenate(found), lengths, ends


def _encode_rest(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids of a text that goes on with a document, as behind a line: some tokenizers put a blank before a text."""
    before, ids = tokenizer.encode("\n"), tokenizer.encode(f"\n{text}")
    return ids[len(before) :] if np.array_equal(ids[: len(before)], before) else tokenizer.encode(text)


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

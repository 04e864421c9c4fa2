"""megaresnorm prepare: from text to a folder with token files, tokenizer and description, made whole or not at all."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megaresnorm.data.corpus import read_pieces
from megaresnorm.data.dataset import DESCRIPTION, PREFIX, digests_of, json_digest, read_description
from megaresnorm.data.hub import HUB
from megaresnorm.data.indexed import TokenWriter, token_dtype
from megaresnorm.data.sources import Source, find_sources
from megaresnorm.data.tokenize import WORK_CHARACTERS, tokenize
from megaresnorm.data.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE, SentencePieceTokenizer, Tokenizer
from megaresnorm.data.tokenizer_files import load_tokenizer, read_tokenizer
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.files import new_folder, occupied, sweep_beside

LOOKED_AT = 256  # texts, and characters of each, that are decoded again
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
        changed: one of the first texts that does not come back from its tokens, as it was and as it comes back; None
            where all do.
    """

    folder: Path
    documents: int
    tokens: int
    vocab_size: int
    reused: bool
    tokenizer: Tokenizer
    without_text: tuple[str, ...] = ()
    changed: tuple[str, str] | None = None


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
            _refuse_others(job.out)
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
    changed = _changed(sources, job.text_key, tokenizer)
    return Prepared(job.out, *counts, False, tokenizer, tuple(without_text), changed)


def _changed(sources: list[Source], text_key: str, tokenizer: Tokenizer) -> tuple[str, str] | None:
    """The first of LOOKED_AT texts, cut to so many characters, that does not come back from its tokens."""
    local = [source for source in sources if not source.name.startswith(HUB)]
    texts = (text[:LOOKED_AT] for source in local for text, _ in read_pieces(source, text_key))
    for text in itertools.islice(texts, LOOKED_AT):
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text:
            at = next(
                (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back))
            )
            return text[max(0, at - 10) : at + 20], back[max(0, at - 10) : at + 20]
    return None


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
        for (ids, lengths, ends), num_bytes in tokenize(
            sources, tokenizer, job.text_key, job.workers, without_text.append
        ):
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


def _refuse_others(folder: Path) -> None:
    """Refuse to replace anything but a data set, or one in which somebody has put something else."""
    if not (folder / DESCRIPTION).is_file():
        raise DataError(f"{folder}: exists and is not a data set, which nothing replaces; use another --out")
    ours = {DESCRIPTION, f"{PREFIX}.bin", f"{PREFIX}.idx", SENTENCEPIECE_FILE, HUGGINGFACE_FILE}
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if others:
        raise DataError(f"{folder}: {others[0]} is not part of a data set, and would be lost; move it first")


def _reuse(folder: Path, request: str) -> Prepared:
    if not (folder / DESCRIPTION).is_file():
        _refuse_others(folder)
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

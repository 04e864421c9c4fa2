"""A prepared data set: its files, its tokenizer, its split, and sample i as a pure function of (seed, i)."""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaresnorm.data.indexed import TokenFiles, spread_chunks
from megaresnorm.data.tokenizer import Tokenizer, load_tokenizer
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.recipe import DataRecipe, Recipe

DESCRIPTION = "dataset.json"
PREFIX = "tokens"
DIGEST_CHUNK = 1 << 24  # bytes under one digest
VERIFY_BYTES = 1 << 32  # at most so much is read before step 0
ENTROPY_TOKENS = 1 << 26


@dataclass(frozen=True)
class DataSet:
    """Token files and what is known of them. ``tokenizer`` is None for bare Megatron files."""

    files: TokenFiles
    tokenizer: Tokenizer | None
    vocab_size: int | None
    digest: str


def open_dataset(path: str) -> DataSet:
    """Open a folder made by prepare, or the PREFIX of bare Megatron files, and check all that can be checked.

    Raises: DataError naming file and offset for anything missing, damaged or mismatched.
    """
    folder = Path(path)
    try:
        is_folder, is_prefix = folder.is_dir(), folder.with_name(folder.name + ".idx").exists()
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be read ({getattr(e, 'strerror', e)})") from None
    if not is_folder:
        if not is_prefix:
            raise DataError(f"{path}: no such data set; make it with: megaresnorm prepare --out {path} ...")
        files = TokenFiles(folder)
        return DataSet(files, None, None, _content_digest(files.idx_path, files.bin_path))
    description = _read_description(folder)
    tokenizer = load_tokenizer(description["tokenizer"], folder)
    if tokenizer.vocab_size != description["vocab_size"]:
        raise DataError(
            f"{folder / DESCRIPTION}: vocab_size {description['vocab_size']} is not the tokenizer's {tokenizer.vocab_size}"
        )
    for name in (f"{PREFIX}.idx", f"{PREFIX}.bin"):
        _verify_digests(folder / name, description["files"][name])
    files = TokenFiles(folder / PREFIX)
    return DataSet(files, tokenizer, tokenizer.vocab_size, json_digest(description["files"]))


def resolve_vocab(recipe: Recipe, data: DataSet) -> Recipe:
    """The recipe with model.vocab_size set. Raises: ConfigError or DataError if tokens do not fit the model."""
    vocab_size = recipe.model.vocab_size or data.vocab_size
    if vocab_size is None:
        raise ConfigError(
            f"model.vocab_size is missing, and {recipe.data.path} does not say it; set model.vocab_size=..."
        )
    if data.vocab_size is not None and vocab_size < data.vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is smaller than the {data.vocab_size} tokens of {recipe.data.path}"
        )
    if data.tokenizer is None:  # files with a description were checked against their digests
        data.files.check_token_range(vocab_size, VERIFY_BYTES)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"vocab_size": vocab_size})})


class PackedSamples:
    """Sequences of seq_len + 1 tokens cut from one split's documents, laid end to end in a new order every epoch.

    Sample i is a pure function of (seed, i): resuming needs i alone, and the order knows nothing of ranks.
    """

    def __init__(self, files: TokenFiles, documents: np.ndarray, seq_len: int, seed: int) -> None:
        self.files, self.documents, self.seq_len, self.seed = files, documents, seq_len, seed
        lengths = files.boundaries[documents + 1] - files.boundaries[documents]
        self.per_epoch = max(0, int(lengths.sum()) - 1) // seq_len
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __getitem__(self, i: int) -> np.ndarray:
        """[seq_len + 1] int64."""
        epoch, place = divmod(i, self.per_epoch)
        order, ends, shuffle = self._epoch(epoch)
        start = int(shuffle[place]) * self.seq_len
        stop = start + self.seq_len + 1
        pieces = []
        d = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            document = order[d]
            skipped = ends[d] - start  # tokens of this document from ``start`` to its end
            take = min(stop - start, int(skipped))
            end = int(self.files.boundaries[document + 1])
            pieces.append(self.files.tokens[end - int(skipped) : end - int(skipped) + take])
            start, d = start + take, d + 1
        return np.concatenate(pieces).astype(np.int64)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents in this epoch's order, the token offset at which each ends, and the order of its samples."""
        order = self.documents[_random(self.seed, 2 * epoch).permutation(len(self.documents))]
        ends = np.cumsum(self.files.boundaries[order + 1] - self.files.boundaries[order])
        return order, ends, _random(self.seed, 2 * epoch + 1).permutation(self.per_epoch)


def split_documents(files: TokenFiles, recipe: DataRecipe) -> dict[str, np.ndarray]:
    """Document numbers of train, valid and test: a random assignment of whole documents, by share of the tokens.

    A split that is asked for has at least one document, as long as one is left to train on.
    """
    order = np.random.Generator(np.random.Philox(key=recipe.seed)).permutation(files.num_documents)
    lengths = files.boundaries[order + 1] - files.boundaries[order]
    share = np.cumsum(lengths) / max(1, int(lengths.sum()))  # share of the tokens up to and with each document

    def documents_in(fraction: float, taken: int, wanted: float) -> int:
        count = int(np.searchsorted(share, fraction, side="right"))
        return min(max(count, taken + (wanted > 0)), max(taken, files.num_documents - 1))

    num_test = documents_in(recipe.test_fraction, 0, recipe.test_fraction)
    num_held = documents_in(recipe.test_fraction + recipe.valid_fraction, num_test, recipe.valid_fraction)
    return {"test": order[:num_test], "valid": order[num_test:num_held], "train": order[num_held:]}


def open_samples(data: DataSet, recipe: Recipe) -> tuple[PackedSamples, PackedSamples | None]:
    """Training and validation samples. Raises: DataError if a split is too small for one sequence."""
    splits = split_documents(data.files, recipe.data)
    seq_len = recipe.model.seq_len
    train = PackedSamples(data.files, splits["train"], seq_len, recipe.data.seed)
    if train.per_epoch == 0:
        raise DataError(f"{recipe.data.path}: the training split is shorter than one sequence of {seq_len} + 1 tokens")
    if recipe.data.valid_fraction == 0:
        return train, None
    valid = PackedSamples(data.files, splits["valid"], seq_len, recipe.data.seed)
    if valid.per_epoch == 0:
        raise DataError(
            f"{recipe.data.path}: the validation split, {len(splits['valid'])} of {data.files.num_documents} documents, is "
            f"shorter than one sequence of {seq_len} + 1 tokens; raise data.valid_fraction, or set it to 0"
        )
    return train, valid


def unigram_entropy(samples: PackedSamples) -> float:
    """Entropy in nats of single tokens: the loss of a model that has learned their frequencies and nothing else."""
    files = samples.files
    counts = np.zeros(1, dtype=np.int64)
    seen = 0
    for document in samples.documents:
        tokens = files.tokens[files.boundaries[document] : files.boundaries[document + 1]]
        more = np.bincount(tokens.astype(np.int64), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
        seen += len(tokens)
        if seen >= ENTROPY_TOKENS:
            break
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def digests_of(path: Path) -> dict:
    """Size and SHA-256 of every chunk of a file, for dataset.json."""
    with path.open("rb") as file:
        chunks = [hashlib.sha256(chunk).hexdigest() for chunk in iter(lambda: file.read(DIGEST_CHUNK), b"")]
    return {"size": path.stat().st_size, "sha256": chunks}


def json_digest(value: dict) -> str:
    """SHA-256 that stands for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _content_digest(*paths: Path) -> str:
    """One digest of files that have no description: their sizes and chunks, evenly spread ones beyond VERIFY_BYTES."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.suffix} {size}\n".encode())
        with path.open("rb") as file:
            for start, stop in spread_chunks(size, VERIFY_BYTES, DIGEST_CHUNK):
                file.seek(start)
                digest.update(file.read(stop - start))
    return digest.hexdigest()


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream]))


def _read_description(folder: Path) -> dict:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror}); make the data set with megaresnorm prepare") from None
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not JSON ({e})") from None
    match description:
        case {
            "format": 1,
            "tokenizer": dict(),
            "vocab_size": int(),
            "files": {"tokens.bin": {"size": int(), "sha256": list()}, "tokens.idx": {"size": int(), "sha256": list()}},
        }:
            return description
    raise DataError(f"{path}: not the description of a data set of format 1; make it again with megaresnorm prepare")


def _verify_digests(path: Path, recorded: dict) -> None:
    """Compare chunks of a file (all of them up to VERIFY_BYTES, else evenly spread ones) with their digests."""
    try:
        size = path.stat().st_size
        if size != recorded["size"]:
            raise DataError(
                f"{path}: has {size} bytes, but {DESCRIPTION} says {recorded['size']}; it was cut or replaced"
            )
        if len(recorded["sha256"]) != -(-size // DIGEST_CHUNK):
            raise DataError(
                f"{path.parent / DESCRIPTION}: has {len(recorded['sha256'])} digests for the {size} bytes of {path.name}"
            )
        with path.open("rb") as file:
            for start, stop in spread_chunks(size, VERIFY_BYTES, DIGEST_CHUNK):
                file.seek(start)
                if hashlib.sha256(file.read(stop - start)).hexdigest() != recorded["sha256"][start // DIGEST_CHUNK]:
                    raise DataError(
                        f"{path}: damaged between byte {start} and {stop} (SHA-256 differs); make the data set again"
                    )
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None

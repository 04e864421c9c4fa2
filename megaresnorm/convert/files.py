"""Folders of sharded safetensors: written whole or not at all, read a slice at a time."""

import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaresnorm.checkpoint.format import FileTensor, human_bytes
from megaresnorm.checkpoint.reader import MAX_HEADER_BYTES, check_header
from megaresnorm.checkpoint.writer import encoded, free_bytes
from megaresnorm.errors import CheckpointError, ConfigError
from megaresnorm.files import new_folder, occupied, sweep_beside
from megaresnorm.parallel.sharding import Box
from megaresnorm.reading import LFS_POINTER, first_line, open_plain_file, read_json_object, refuse_pointer

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MAX_JSON_BYTES = 1 << 26
MAX_VALUES = 1 << 20  # of a JSON file, counted by its brackets and commas
MAX_FILES = 10_000  # of a folder
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Ends of the names of buffers in old files, which the classes compute themselves; some hold bytes or booleans.
BUFFERS = (
    "._extra_state",
    ".rotary_emb.inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".position_ids",
)
Progress = Callable[[int], None]


def is_buffer(name: str) -> bool:
    """Whether a tensor of this name is a buffer, which nobody reads, here or in Transformers."""
    return f".{name}".endswith(BUFFERS)


def refuse_existing(out: Path) -> None:
    """Check that nothing would be written over. An empty folder, or a link to one, may be there.

    Raises:
        ConfigError: ``out`` exists, or cannot be looked at.
    """
    try:
        sweep_beside(out)
        there = occupied(out) or (out.is_symlink() and not out.exists())
    except OSError as e:
        raise ConfigError(f"{out}: cannot be read ({e.strerror})") from None
    if there:
        raise ConfigError(f"{out}: exists already, and nothing is written over; give another folder")


@contextmanager
def output_folder(out: Path) -> Iterator[Path]:
    """``new_folder`` for a conversion.

    Raises:
        ConfigError: ``out`` exists or cannot be written.
    """
    refuse_existing(out)
    try:
        with new_folder(out) as folder:
            yield folder
    except OSError as e:
        raise ConfigError(f"{out}: cannot be written ({e.strerror or e})") from None


def check_space(out: Path, wanted: int) -> None:
    """Check that ``wanted`` bytes fit on the disk.

    Raises:
        ConfigError: they do not.
    """
    have = free_bytes(Path(os.path.realpath(out)).parent)
    if have < wanted:
        raise ConfigError(f"{out}: no space: need {human_bytes(wanted)}, have {human_bytes(have)}")


def write_weights(folder: Path, entries: Sequence[FileTensor], max_bytes: int, progress: Progress) -> None:
    """Write model.safetensors, or numbered files and their index.

    Args:
        max_bytes: largest size of a file's tensors together, unless a single tensor is larger.
        progress: is called with the bytes of every part that was written.
    """
    shards: list[list[FileTensor]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    names = [WEIGHTS] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("xb") as file:
            for piece in encoded(shard, {"format": "pt"}, finite=True):
                file.write(piece)
                progress(len(piece))
    if len(shards) > 1:
        where = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        metadata = {"total_size": sum(entry.num_bytes for entry in entries)}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": where})


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in UTF-8, indented."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """Read the object of a JSON file.

    Raises:
        CheckpointError: the file is not there, or not an object of a plausible size.
    """
    try:
        return read_json_object(path, MAX_JSON_BYTES, max_values)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise CheckpointError(f"{path}: {e}") from None


def check_plain_files(folder: Path) -> None:
    """Check the files of a folder, any of which a library may open by itself.

    Raises:
        CheckpointError: one is a pipe or a device, or a link to one.
    """
    try:
        entries = list(itertools.islice(os.scandir(folder), MAX_FILES + 1))
    except OSError as e:
        raise CheckpointError(f"{folder}: cannot be read ({e.strerror})") from None
    if len(entries) > MAX_FILES:
        raise CheckpointError(f"{folder}: has over {MAX_FILES:,} files; wanted the folder of one model")
    for entry in entries:
        try:
            mode = entry.stat().st_mode
        except OSError:  # a broken link, which nobody can open
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise CheckpointError(f"{entry.path}: not a plain file")


class Weights:
    """The tensors of a folder of safetensors, in one file or in several with an index. A TensorSource of links.py.

    Args:
        types: by safetensors' names, those that tensors may have.

    Attributes:
        tensors: name -> file, shape, type.
        metadata: of all files.
        missing: name -> file, of tensors that the index names and the file does not have.
        prefix: what ``strip`` has left out of the names.

    Raises:
        CheckpointError: something is missing, damaged or not what the index says; it is named.
    """

    def __init__(self, folder: Path, types: Mapping[str, torch.dtype] = _TYPES) -> None:
        self.folder, self._types, self.prefix = folder, types, ""
        self.tensors: dict[str, tuple[str, tuple[int, ...], torch.dtype]] = {}
        self.metadata: dict[str, str] = {}
        where = self._index()
        for file in dict.fromkeys(where.values()) if where is not None else [WEIGHTS]:
            self._look(file, where)
        named = (where or {}).items()
        self.missing = {name: file for name, file in named if name not in self.tensors and not is_buffer(name)}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.tensors[name][1]

    def strip(self, prefix: str) -> None:
        """Leave a prefix out of the names of all tensors.

        Raises:
            CheckpointError: a name does not begin with it.
        """
        other = next((name for name in (*self.tensors, *self.missing) if not name.startswith(prefix)), None)
        if other is not None:
            raise CheckpointError(f"{self.folder}: {other} does not begin with {prefix}, as the model's tensors do")
        self.tensors = {name.removeprefix(prefix): what for name, what in self.tensors.items()}
        self.missing = {name.removeprefix(prefix): file for name, file in self.missing.items()}
        self.prefix += prefix

    def read(self, name: str, box: Box) -> Tensor:
        """One slice of a tensor. Its file is closed again, so that no more of it stays mapped."""
        file = self.folder / self.tensors[name][0]
        try:
            with safe_open(file, framework="pt") as opened:
                return opened.get_slice(self.prefix + name)[tuple(slice(a, b) for a, b in box)]
        except (SafetensorError, OSError, ValueError) as e:
            raise CheckpointError(f"{file}: cannot be read any more ({first_line(e)})") from None

    def _index(self) -> dict[str, str] | None:
        """Tensor -> file; None for a single file."""
        if (self.folder / WEIGHTS).exists():
            return None
        if not (self.folder / INDEX).exists():
            pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.distcp") for p in self.folder.glob(kind))
            hint = (
                f"; {pickles[0]} is a pickle, which can run code and is never read: save it as safetensors first"
                if pickles
                else ""
            )
            raise CheckpointError(f"{self.folder}: has no {WEIGHTS} and no {INDEX}{hint}")
        where = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise CheckpointError(f"{self.folder / INDEX}: has no weight_map")
        for name, file in where.items():
            if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
                raise CheckpointError(
                    f"{self.folder / INDEX}: {name} is in {str(file)[:80]!r}, which is no name of a file here"
                )
        return where

    def _look(self, file: str, where: Mapping[str, str] | None) -> None:
        """Note which tensors a file has."""
        path = self.folder / file
        try:
            with os.fdopen(open_plain_file(path), "rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                start = opened.read(len(LFS_POINTER))
                refuse_pointer(start)
                header = int.from_bytes(start[:8], "little")
            if header > min(size - 8, MAX_HEADER_BYTES):
                text = f": it starts with {start[:16].decode()!r}" if start.isascii() and b"\0" not in start else ""
                raise ValueError(f"a header of {header} bytes in a file of {size}{text}")
            with safe_open(path, framework="pt") as tensors:
                check_header(path)
                self.metadata |= tensors.metadata() or {}
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    if where is not None and where.get(name) != file:
                        continue  # the index says which copy counts
                    view = tensors.get_slice(name)
                    if view.get_dtype() not in self._types:
                        if is_buffer(name):
                            continue
                        raise ValueError(f"{name} is {view.get_dtype()}; wanted one of {', '.join(self._types)}")
                    self.tensors[name] = file, tuple(view.get_shape()), self._types[view.get_dtype()]
        except FileNotFoundError:
            raise CheckpointError(f"{path}: is missing") from None
        except (SafetensorError, OSError, ValueError) as e:
            why = e.strerror if isinstance(e, OSError) and e.strerror else first_line(e)
            raise CheckpointError(f"{path}: not a readable safetensors file ({why})") from None

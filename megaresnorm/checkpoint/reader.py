"""Reading a checkpoint: everything is verified before a tensor is used, and nothing that is read can run code."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaresnorm.checkpoint.format import DTYPES, MANIFEST, SOURCE, TensorSlices, file_sha256
from megaresnorm.checkpoint.manifest import read_manifest, unreadable
from megaresnorm.checkpoint.slices import FileSlice, beside_each_other, overlap
from megaresnorm.data.tokenizer import MAX_TOKENIZER_BYTES
from megaresnorm.errors import CheckpointError, DamagedError
from megaresnorm.parallel.control import ALONE, all_or_raise, run_on_all_ranks
from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.sharding import Box
from megaresnorm.reading import read_plain_file

MAX_HEADER_BYTES = 1 << 24
MAX_SLICES = 64  # of one tensor in one file: one of every logical part, or three where it is flat
OPEN_FILES = 64
HASHING_THREADS = 4
CHUNK_ELEMENTS = 1 << 22  # of a tensor that is read and not kept: 16 MB in FP32
_UNREADABLE = (SafetensorError, OSError, KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError)
_TYPES = {code: name.removeprefix("torch.") for name, code in DTYPES.items()}


class Checkpoint:
    """A verified checkpoint folder.

    Each of several ranks verifies an equal share of the files and tells the others what it found: all go on, or none.
    Its methods raise CheckpointError for a file that cannot be read any more.

    Args:
        control: all ranks that read together; every one must make this object.
        progress: called with the number of bytes of every part that this rank has verified.
        hashed: whether ``verify_file`` has verified the files before.

    Raises:
        DamagedError: a file, which it names, is missing, damaged, or not part of the checkpoint; the same on all ranks.
        CheckpointError: a file cannot be read; the same on all ranks.
    """

    def __init__(
        self,
        folder: Path,
        control: Axis = ALONE,
        progress: Callable[[int], None] | None = None,
        *,
        hashed: bool = False,
    ) -> None:
        self.folder = folder
        self._manifest: dict[str, Any] = {}
        self._open: dict[str, Any] = {}

        def look() -> dict[str, Any]:
            self._manifest = read_manifest(folder)
            files = _share(self._manifest["files"], control)
            if not hashed:
                _verify_files(folder, files, progress)
            slices = {name: _slices(folder / name) for name in files if name.endswith(".safetensors")}
            return {"digest": self._manifest["digest"], "slices": slices}

        everyone = run_on_all_ranks(look, control)
        all_or_raise(lambda: self._index(everyone), control)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._manifest["step"]

    @property
    def state(self) -> dict[str, Any]:
        """State of the run as JSON, see ``RunState``."""
        return self._manifest["state"]

    @property
    def tensors(self) -> dict[str, dict[str, dict]]:
        """Group -> global name -> shape and dtype of the whole tensor."""
        return self._manifest["tensors"]

    def attached(self, name: str) -> bytes:
        """Content of a file that holds no tensors; CheckpointError if there is none of this name."""
        if name not in self._manifest["files"] or name.endswith(".safetensors"):
            raise CheckpointError(f"{self.folder}: has no file {name}")
        try:
            return read_plain_file(self.folder / name, MAX_TOKENIZER_BYTES, follow=False)
        except OSError as e:
            raise CheckpointError(f"{self.folder / name}: cannot be read ({e.strerror})") from None

    def source(self) -> bytes | None:
        """Content of SOURCE; None in a checkpoint whose weights were not converted."""
        return self.attached(SOURCE) if SOURCE in self._manifest["files"] else None

    def names(self, group: str) -> list[str]:
        """Global names of the tensors of a group."""
        return list(self.tensors.get(group, {}))

    def read(self, group: str, name: str) -> Tensor:
        """One whole tensor."""
        (whole,) = self._pieces(group, name, [tuple((0, size) for size in self.tensors[group][name]["shape"])])
        return whole

    def read_box(self, group: str, name: str, box: Box) -> Tensor:
        """One slice of a tensor. Files are closed afterwards, so that nothing of them stays mapped."""
        (piece,) = self._pieces(group, name, [box])
        self._open.clear()
        return piece

    def chunks(self, group: str, name: str) -> Iterator[Tensor]:
        """All elements of a tensor, at most CHUNK_ELEMENTS at a time, in the order of the files."""
        for slices in self._file_slices[group][name]:
            rows, *others = ((0, b - a) for a, b in slices.box)
            if slices.flat:
                rows, others = (0, rows[1] * prod(b for _, b in others)), []
            for where in _parts([(slices.row, slices.row + rows[1]), *others]):
                yield self._read(slices.file, name, where)
        self._open.clear()

    def load(self, group: str, members: Mapping[str, TensorSlices]) -> None:
        """Copy this rank's slices of each tensor of a group into place, reading nothing else, after ``check_names``."""
        self.check_names(group, {name: slices.shape for name, slices in members.items()})
        for name, slices in members.items():
            if slices.local is None:
                continue
            row, flat = 0, slices.local.dim() == 1
            for part in self._pieces(group, name, slices.boxes):
                rows = part.flatten() if flat else part
                slices.local[row : row + len(rows)].copy_(rows)
                row += len(rows)
        self._open.clear()

    def check_names(self, group: str, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check that the group has tensors of exactly these names and shapes; CheckpointError if it has not."""
        recorded = self.tensors.get(group, {})
        if recorded.keys() != shapes.keys():
            odd = sorted(recorded.keys() ^ shapes.keys())
            what = f"{group} differ in {len(odd)} tensors, the first is {odd[0]}; is it another model?"
            raise CheckpointError(f"{self.folder}: {what}")
        for name, shape in shapes.items():
            have = recorded[name]["shape"]
            if have != list(shape):
                raise CheckpointError(f"{self.folder}: {name} has shape {have}, the model's is {list(shape)}")

    def _index(self, everyone: list[dict[str, Any]]) -> None:
        """Note what every rank has found in its files; DamagedError unless that is all of every tensor, once."""
        self._file_slices: dict[str, dict[str, list[FileSlice]]] = {group: {} for group in self.tensors}
        for rank, said in enumerate(everyone):
            if said["digest"] != self._manifest["digest"]:
                raise CheckpointError(f"{self.folder / MANIFEST}: rank {rank} reads another one")
            for file, slices in said["slices"].items():
                self._enter(file, slices)
        self._check_complete()

    def _enter(self, file: str, slices: dict[str, Any]) -> None:
        """Note which slices a file holds; DamagedError for one that is of no tensor of the manifest."""
        group = file.split("-")[0]
        for name, (shape, dtype, boxes) in slices.items():
            recorded = self.tensors.get(group, {}).get(name)
            where = f"{self.folder / file}: {name}"
            if recorded is None:
                raise DamagedError(f"{where}: the manifest has no such tensor in {group}")
            if dtype != recorded["dtype"]:
                raise DamagedError(f"{where} is {dtype}, the manifest says {recorded['dtype']}")
            row, flat = 0, len(shape) == 1 < len(recorded["shape"])
            for box in boxes:
                inside = len(box) == len(recorded["shape"]) and all(
                    0 <= a < b <= size for (a, b), size in zip(box, recorded["shape"], strict=True)
                )
                sizes = [b - a for a, b in box]
                if not inside or (sizes[1:] != shape[1:] and not flat):
                    raise DamagedError(f"{where} of shape {shape} has no slice {box} of {recorded['shape']}")
                piece = FileSlice(file, row, tuple((a, b) for a, b in box), flat)
                self._file_slices[group].setdefault(name, []).append(piece)
                row += prod(sizes) if flat else sizes[0]
            if [row] != shape[:1]:
                raise DamagedError(f"{where} of shape {shape} has slices of {row} {'elements' if flat else 'rows'}")

    def _check_complete(self) -> None:
        """Check that every element of every tensor is in exactly one slice, or raise DamagedError."""
        for group, members in self.tensors.items():
            for name, recorded in members.items():
                slices = sorted(self._file_slices[group].get(name, []), key=lambda h: h.box)
                for one, other in beside_each_other(slices):
                    if overlap(one.box, other.box) is not None:
                        where = f"{self.folder / other.file}: {name}"
                        raise DamagedError(f"{where} has the slice {other.box}, which overlaps {one.box} of {one.file}")
                if sum(prod(b - a for a, b in h.box) for h in slices) != prod(recorded["shape"]):
                    raise DamagedError(f"{self.folder}: {name} is not complete in the {group} files")

    def _pieces(self, group: str, name: str, boxes: Sequence[Box]) -> Iterator[Tensor]:
        """The slices ``boxes`` of a tensor, one at a time, each assembled from the slices in files that overlap it."""
        for box in boxes:
            piece: Tensor | None = None
            for slices in self._file_slices[group][name]:
                common = overlap(slices.box, box)
                if common is None:
                    continue
                within = [slice(a - start, b - start) for (a, b), (start, _) in zip(common, slices.box, strict=True)]
                value = self._read_within(slices, name, within)
                if common == box:
                    piece = value
                else:
                    piece = value.new_empty([b - a for a, b in box]) if piece is None else piece
                    piece[
                        tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))
                    ] = value
            assert piece is not None, "the checkpoint was found complete"
            yield piece

    def _read_within(self, slices: FileSlice, name: str, within: Sequence[slice]) -> Tensor:
        """Part of a slice, of which a flat one gives whole rows."""
        rows, *rest = within
        if not slices.flat:
            return self._read(slices.file, name, (slice(rows.start + slices.row, rows.stop + slices.row), *rest))
        sizes = [b - a for a, b in slices.box[1:]]
        start, stop = (slices.row + row * prod(sizes) for row in (rows.start, rows.stop))
        return self._read(slices.file, name, (slice(start, stop),)).view(-1, *sizes)[(slice(None), *rest)]

    def _read(self, file: str, name: str, where: tuple[slice, ...]) -> Tensor:
        try:
            if file not in self._open:
                if len(self._open) == OPEN_FILES:
                    self._open.pop(next(iter(self._open)))
                self._open[file] = safe_open(self.folder / file, framework="pt")
            return self._open[file].get_slice(name)[where]
        except (SafetensorError, OSError, ValueError) as e:
            raise CheckpointError(f"{self.folder / file}: cannot be read any more ({e})") from None


def _share(files: dict[str, dict], control: Axis) -> dict[str, dict]:
    """The files that this rank verifies, about as many bytes as on every other rank."""
    loads = [0] * control.size
    mine = {}
    for name in sorted(files, key=lambda name: (-files[name]["size"], name)):
        rank = loads.index(min(loads))
        loads[rank] += files[name]["size"]
        if rank == control.rank:
            mine[name] = files[name]
    return mine


def _verify_files(folder: Path, files: dict[str, dict], progress: Callable[[int], None] | None) -> None:
    """Verify files in parallel; CheckpointError for the first, by name, that is damaged."""
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        waiting = [pool.submit(verify_file, folder, name, files[name], progress) for name in sorted(files)]
        for future in waiting:
            if future.exception() is not None:
                pool.shutdown(cancel_futures=True)
            future.result()


def verify_file(folder: Path, name: str, recorded: dict, progress: Callable[[int], None] | None = None) -> None:
    """Check a file against its entry in the manifest, ``recorded``; CheckpointError where it is another."""
    path = folder / name
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise DamagedError(f"{path}: not a plain file")
        size = path.stat().st_size
        if size != recorded["size"]:
            raise DamagedError(f"{path}: has {size} bytes, the manifest says {recorded['size']}")
        if name.endswith(".safetensors"):
            _check_header_size(path, size)
        if file_sha256(path, progress=progress) != recorded["sha256"]:
            raise DamagedError(f"{path}: damaged (SHA-256 differs)")
    except OSError as e:
        raise unreadable(path, e) from None


def _check_header_size(path: Path, size: int) -> None:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(size - 8, MAX_HEADER_BYTES):
        raise DamagedError(f"{path}: not a readable safetensors file (a header of {header} bytes in a file of {size})")


def check_header(path: Path) -> None:
    """Check the header of a file that safetensors has opened already, which bounds its size and proves its form.

    Raises:
        ValueError: a name stands there twice: safetensors would take the last, another reader the first.
        OSError: the file cannot be read.
    """

    def names_of(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"its header names {name} twice")
            seen.add(name)

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        json.loads(file.read(min(size, MAX_HEADER_BYTES)), object_pairs_hook=names_of)


def _parts(sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, ...]]:
    """Indices that together cover a box (first and end of each dimension), of at most CHUNK_ELEMENTS elements each."""
    (first, end), *others = sizes
    row = prod(b - a for a, b in others)
    if row > CHUNK_ELEMENTS:
        for i in range(first, end):
            for rest in _parts(others):
                yield slice(i, i + 1), *rest
        return
    step = max(1, CHUNK_ELEMENTS // row)
    for i in range(first, end, step):
        yield slice(i, min(i + step, end)), *(slice(a, b) for a, b in others)


def _slices(path: Path) -> dict[str, tuple[list[int], str, list]]:
    """Content of a file: name -> shape, dtype, and the slices of the whole tensor that its rows are."""
    try:
        with safe_open(path, framework="pt") as file:
            check_header(path)
            slices = json.loads((file.metadata() or {}).get("slices", "{}"))
            found = {}
            for name in file.keys():  # noqa: SIM118 - not a mapping
                view = file.get_slice(name)
                if len(slices[name]) > MAX_SLICES:
                    raise ValueError(f"over {MAX_SLICES} slices of {name}")
                boxes = [[(int(start), int(stop)) for start, stop in box] for box in slices[name]]
                found[name] = (list(view.get_shape()), _TYPES[view.get_dtype()], boxes)
            return found
    except _UNREADABLE as e:
        reason = f"{type(e).__name__} {e}".splitlines()[0][:200]
        raise DamagedError(f"{path}: not a readable safetensors file of slices ({reason})") from None

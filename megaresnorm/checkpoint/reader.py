"""Reading a checkpoint: everything is verified before a tensor is used, and nothing that is read can run code."""

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaresnorm.checkpoint.format import FILE_NAME, FORMAT, MANIFEST, file_sha256, manifest_digest
from megaresnorm.errors import CheckpointError

MAX_MANIFEST_BYTES = 1 << 28

Box = tuple[tuple[int, int], ...]  # the slice that a tensor is of a whole one: (start, stop) in every dim


class Checkpoint:
    """A verified checkpoint folder.

    Raises: CheckpointError naming the file that is missing, damaged, or not part of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = _read_manifest(folder)
        self.step: int = manifest["step"]
        self.state: dict[str, Any] = manifest["state"]
        self.tensors: dict[str, dict[str, dict]] = manifest["tensors"]
        self._files: list[str] = sorted(manifest["files"])
        for name, recorded in manifest["files"].items():
            _verify_file(folder, name, recorded)

    def attached(self, name: str) -> bytes:
        """The content of a file that is not of tensors. Raises: CheckpointError if there is none of this name."""
        if name not in self._files:
            raise CheckpointError(f"{self.folder}: has no file {name}")
        try:
            return (self.folder / name).read_bytes()
        except OSError as e:
            raise CheckpointError(f"{self.folder / name}: cannot be read ({e.strerror})") from None

    def read(self, group: str, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a group, whole, one at a time.

        Raises: CheckpointError if names or shapes differ from ``shapes``, or a tensor is not covered by its slices.
        """
        recorded = self.tensors.get(group, {})
        if recorded.keys() != shapes.keys():
            odd = sorted(recorded.keys() ^ shapes.keys())
            raise CheckpointError(
                f"{self.folder}: {group} differ in {len(odd)} tensors, the first is {odd[0]}; is it another model?"
            )
        for name, shape in shapes.items():
            if recorded[name]["shape"] != list(shape):
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {recorded[name]['shape']}, the model's is {list(shape)}"
                )
        places: dict[str, list[tuple[Path, Box]]] = {name: [] for name in shapes}
        for file in (f for f in self._files if f.startswith(f"{group}-")):
            for name, box in _slices(self.folder / file).items():
                if name not in shapes:
                    raise CheckpointError(f"{self.folder / file}: holds {name}, which the manifest does not name")
                places[name].append((self.folder / file, box))
        for name, boxes in places.items():
            yield name, self._assemble(name, group, recorded[name], boxes)

    def load_into(self, group: str, destination: Mapping[str, Tensor]) -> None:
        """Copy every tensor of a group into tensors that exist. Raises: CheckpointError as ``read``."""
        for name, whole in self.read(group, {name: tensor.shape for name, tensor in destination.items()}):
            destination[name].copy_(whole)

    def _assemble(self, name: str, group: str, recorded: dict, places: list[tuple[Path, Box]]) -> Tensor:
        """The whole tensor from its slices; the very one that is read where there is only one."""
        shape, done = recorded["shape"], list[Box]()
        whole: Tensor | None = None
        for path, box in places:
            value = _tensor(path, name)
            _check_box(path, name, box, value, recorded, done)
            done.append(box)
            if list(value.shape) == shape:
                whole = value
            else:
                whole = value.new_empty(shape) if whole is None else whole
                whole[tuple(slice(*edges) for edges in box)] = value
        if whole is None or sum(_size(box) for box in done) != prod(shape):
            raise CheckpointError(f"{self.folder}: {name} is not complete in the {group} files")
        return whole


def _slices(path: Path) -> dict[str, Box]:
    """Which slices a file holds, by name."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = json.loads((file.metadata() or {}).get("slices", "{}"))
            return {
                name: tuple((int(start), int(stop)) for start, stop in slices[name])
                for name in file.keys()  # noqa: SIM118 - not a mapping
            }
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file of slices ({e})") from None


def _tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, ValueError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file of slices ({e})") from None


def _size(box: Box) -> int:
    return prod(stop - start for start, stop in box)


def _check_box(path: Path, name: str, box: Box, value: Tensor, recorded: dict, others: list[Box]) -> None:
    """A slice lies within the tensor, has the shape and type it should, and overlaps no other."""
    whole = recorded["shape"]
    inside = len(box) == len(whole) and all(0 <= a <= b <= size for (a, b), size in zip(box, whole, strict=True))
    if not inside or [b - a for a, b in box] != list(value.shape):
        raise CheckpointError(f"{path}: {name} of shape {list(value.shape)} is not the slice {list(box)} of {whole}")
    if str(value.dtype).removeprefix("torch.") != recorded["dtype"]:
        raise CheckpointError(f"{path}: {name} is {value.dtype}, the manifest says {recorded['dtype']}")
    for other in others:
        if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(box, other, strict=True)):
            raise CheckpointError(f"{path}: {name} has the slice {list(box)}, which overlaps {list(other)}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; not a manifest")
        manifest = json.loads(path.read_bytes())
    except OSError as e:
        raise CheckpointError(
            f"{path}: cannot be read ({e.strerror}); wanted a folder such as .../checkpoints/step-00000500"
        ) from None
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON ({e})") from None
    match manifest:
        case {"format": int(), "digest": str(), "step": int(), "files": dict(), "tensors": dict(), "state": dict()}:
            pass
        case _:
            raise CheckpointError(f"{path}: not the manifest of a checkpoint")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {manifest['format']} is unknown; this version reads {FORMAT}")
    if manifest_digest(manifest) != manifest["digest"]:
        raise CheckpointError(f"{path}: damaged (its digest differs)")
    entries = [*manifest["files"].values(), *(t for group in manifest["tensors"].values() for t in group.values())]
    for entry in entries:
        match entry:
            case {"size": int(), "sha256": str()} | {"shape": list(), "dtype": str()}:
                pass
            case _:
                raise CheckpointError(f"{path}: {entry!r} is not the entry of a file or tensor")
    return manifest


def _verify_file(folder: Path, name: str, recorded: dict) -> None:
    path = folder / name
    if not FILE_NAME.fullmatch(name) or path.is_symlink():
        raise CheckpointError(f"{folder / MANIFEST}: {name!r} is not the name of a plain file of this checkpoint")
    try:
        size = path.stat().st_size
        if size != recorded["size"]:
            raise CheckpointError(f"{path}: has {size} bytes, the manifest says {recorded['size']}")
        if file_sha256(path) != recorded["sha256"]:
            raise CheckpointError(f"{path}: damaged (SHA-256 differs)")
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None

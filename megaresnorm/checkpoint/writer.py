"""Writing a checkpoint: a temporary folder, fsync, one rename. Nothing that exists is written over.

Every rank writes the slices that it owns; the first makes the folder, and renames it when all have written theirs.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import (
    DTYPES,
    FINITE,
    FORMAT,
    MANIFEST,
    UNFINISHED,
    FileTensor,
    Groups,
    TensorSlices,
    file_sha256,
    folder_name,
    human_bytes,
    is_finite,
)
from megaresnorm.checkpoint.manifest import encode_manifest, plausible
from megaresnorm.checkpoint.retention import THE_NEWEST_TWO, Retention, remove_old
from megaresnorm.errors import CheckpointError, NonFiniteTensorError
from megaresnorm.files import sync
from megaresnorm.parallel.control import ALONE, run_on_all_ranks
from megaresnorm.parallel.mesh import Axis

log = logging.getLogger(__name__)
FILE_BYTES = 1 << 30  # tensors are gathered into files of about this size, which ranks verify in parallel
FILE_TENSORS = 10_000  # in a file; a reader still accepts a header of so many
WRITE_BYTES = 1 << 24
T = TypeVar("T")


def save_checkpoint(
    root: Path,
    step: int,
    groups: Groups,
    state: Mapping[str, Any],
    *,
    retention: Retention = THE_NEWEST_TWO,
    attached: Mapping[str, bytes] | None = None,
    control: Axis = ALONE,
    check: Callable[[], None] = lambda: None,
    protected: Callable[[], int | None] = lambda: None,
) -> Path:
    """Write ``root/step-XXXXXXXX`` and remove old checkpoints. Collective: all ranks return or raise alike.

    Args:
        groups: group (weights, optimizer, clipper) -> global name -> slices.
        state: anything that JSON can hold; the first rank's counts.
        attached: name -> content of other files (the tokenizer); the first rank's counts.
        control: all ranks that save together.
        check: called on each rank before anything is made, and before the commit. What it raises is raised on all.
        protected: asked before old checkpoints are removed; those up to this step stay.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: it exists already or cannot be written. Earlier checkpoints stay as they are.
        NonFiniteTensorError: weights or moments hold NaN or infinity. Likewise.
    """
    assert retention.newest >= 2, "one checkpoint must be whole while the next is written"
    final = root / folder_name(step)
    temporary = root / f"{UNFINISHED}{final.name}"
    first = control.rank == 0

    def on_all(work: Callable[[], Any]) -> list[Any]:
        try:
            return run_on_all_ranks(lambda: _explained(work, root, final, groups), control)
        except BaseException:
            if first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    run_on_all_ranks(check, control)
    on_all(lambda: _make_folder(temporary, final, groups) if first else None)
    written = on_all(lambda: _write_share(temporary, groups, control.rank))

    # check is not in on_all: whoever has taken the folder over may be writing under the same name; nothing is removed.
    run_on_all_ranks(check, control)
    on_all(
        lambda: _commit(temporary, final, _manifest(step, written, groups, state), attached or {}) if first else None
    )
    if first:
        remove_old(root, retention._replace(protected=protected()))
    return final


def bytes_of(groups: Groups) -> int:
    """Size of the tensors of a whole checkpoint."""
    return sum(slices.num_bytes for members in groups.values() for slices in members.values())


def free_bytes(root: Path) -> int:
    """Free space for a folder, or for the nearest one above it that exists."""
    while not root.exists():
        root = root.parent
    return shutil.disk_usage(root).free


def write_tensors(path: Path, parts: Sequence[tuple[str, TensorSlices]], *, finite: bool = False) -> dict[str, Any]:
    """Write this rank's slices of some tensors into a safetensors file.

    Args:
        finite: as for ``encoded``.

    Returns:
        The entry of the file in a manifest: its size and SHA-256.

    Raises:
        NonFiniteTensorError: as for ``encoded``.
        OSError: the file exists already or cannot be written.
    """
    metadata = {"slices": json.dumps({name: slices.boxes for name, slices in parts})}
    return _write_durably(path, encoded([slices.file_tensor(name) for name, slices in parts], metadata, finite=finite))


def encoded(entries: Sequence[FileTensor], metadata: Mapping[str, str], *, finite: bool) -> Iterator[Any]:
    """The bytes of a safetensors file, in pieces.

    The pieces are the memory of the tensors or of their chunks; the safetensors package would first copy all of them.

    Args:
        finite: whether to check every element.

    Raises:
        NonFiniteTensorError: a tensor holds NaN or infinity; the first one is named.
    """
    header, offset = dict[str, Any]({"__metadata__": dict(metadata)}), 0
    for entry in entries:
        end = offset + entry.num_bytes
        shape = list(entry.shape)
        header[entry.name] = {"dtype": DTYPES[str(entry.dtype)], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    yield len(content).to_bytes(8, "little") + content
    for entry in entries:
        written = 0
        for chunk in entry.chunks():
            assert chunk.dtype == entry.dtype and chunk.shape[1:] == entry.shape[1:], f"{entry.name} is made wrongly"
            if finite and not is_finite(chunk):
                raise NonFiniteTensorError(f"{entry.name} holds NaN or infinity")
            written += chunk.nbytes
            yield _memory(chunk)
        assert written == entry.num_bytes, f"{entry.name} has {written} bytes instead of {entry.num_bytes}"


def sweep(root: Path) -> None:
    """Remove what killed saves have left.

    Raises:
        OSError: it cannot be removed.
    """
    for left in root.glob(f"{UNFINISHED}*"):
        log.info("removed   %s, which was never finished", left)
        shutil.rmtree(left)


def _make_folder(temporary: Path, final: Path, groups: Groups) -> None:
    """Make the temporary folder, if there is room and nothing is in the way."""
    root = final.parent
    root.mkdir(parents=True, exist_ok=True)
    sweep(root)
    if final.exists():
        raise FileExistsError(errno.EEXIST, "it exists already; checkpoints are never written over", str(final))
    if free_bytes(root) < bytes_of(groups):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    temporary.mkdir()


def _write_share(temporary: Path, groups: Groups, rank: int) -> dict[str, Any]:
    """Write this rank's files; returns name -> size and SHA-256."""
    files = {}
    for group, members in groups.items():
        owned = [(name, slices) for name, slices in members.items() if slices.owned and slices.boxes]
        for number, part in enumerate(_parts(owned), start=1):
            path = temporary / f"{group}-{rank:05d}-{number:05d}.safetensors"
            files[path.name] = write_tensors(path, part, finite=group in FINITE)
    return files


def _manifest(step: int, written: list[dict], groups: Groups, state: Mapping[str, Any]) -> dict[str, Any]:
    files = {name: entry for share in written for name, entry in share.items()}
    return {"format": FORMAT, "step": step, "files": files, "tensors": _shapes(groups), "state": dict(state)}


def _commit(temporary: Path, final: Path, manifest: dict[str, Any], attached: Mapping[str, bytes]) -> None:
    """Write what is missing, then rename: before that nobody reads the folder, and the next start sweeps it up."""
    for name, content in attached.items():
        manifest["files"][name] = _write_durably(temporary / name, [content])
    content = encode_manifest(manifest)
    if not plausible(content):
        raise OSError(errno.EFBIG, f"a manifest of {len(content)} bytes could not be read again", MANIFEST)
    _write_durably(temporary / MANIFEST, [content])
    sync(temporary)
    os.rename(temporary, final)  # the commit: from here on the checkpoint is resumed from
    try:
        sync(final.parent)
    except OSError as e:  # the checkpoint is there, but may be gone should the machine fail now
        log.warning("warning: %s: the folder cannot be synced (%s)", final.parent, e.strerror)


def _explained(work: Callable[[], T], root: Path, final: Path, groups: Groups) -> T:
    """Return what ``work`` returns; turn its OSError into a CheckpointError that says what went wrong on the disk."""
    try:
        return work()
    except OSError as e:
        raise CheckpointError(_reason(e, root, final, groups)) from None


def _reason(error: OSError, root: Path, final: Path, groups: Groups) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need, have = bytes_of(groups), free_bytes(root)
        why = " (a quota, or too many files)" if have >= need else ""
        return f"{final}: no space: need {human_bytes(need)}, have {human_bytes(have)}{why}"
    where = f", {error.filename}" if error.filename and error.filename != str(final) else ""
    return f"{final}: cannot be written ({error.strerror}{where})"


def _shapes(groups: Groups) -> dict[str, dict[str, dict]]:
    return {
        group: {
            name: {"shape": list(s.shape), "dtype": str(s.dtype).removeprefix("torch.")} for name, s in members.items()
        }
        for group, members in groups.items()
    }


def _parts(owned: Sequence[tuple[str, TensorSlices]]) -> Iterator[list[tuple[str, TensorSlices]]]:
    """Consecutive tensors of about FILE_BYTES together."""
    part: list[tuple[str, TensorSlices]] = []
    size = 0
    for name, slices in owned:
        num_bytes = slices.file_tensor(name).num_bytes
        if part and (size + num_bytes > FILE_BYTES or len(part) == FILE_TENSORS):
            yield part
            part, size = [], 0
        part.append((name, slices))
        size += num_bytes
    if part:
        yield part


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a tensor: its own memory if it is contiguous and on the CPU, otherwise a copy."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _write_durably(path: Path, chunks: Any) -> dict[str, Any]:
    """Write a new file, sync it, and verify it as read back from the disk; returns its size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                done = os.write(descriptor, rest[:WRITE_BYTES])
                digest.update(rest[:done])
                rest, size = rest[done:], size + done
        os.fsync(descriptor)
    except OSError as e:
        e.filename = str(path)
        raise
    finally:
        os.close(descriptor)
    if file_sha256(path, from_disk=True) != digest.hexdigest():
        raise OSError(errno.EIO, "what was read back is not what was written", str(path))
    return {"size": size, "sha256": digest.hexdigest()}

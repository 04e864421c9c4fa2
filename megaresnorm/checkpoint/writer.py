"""Writing a checkpoint: a temporary folder, fsync, one rename. Nothing that exists is written over."""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megaresnorm.checkpoint.format import FORMAT, MANIFEST, file_sha256, folder_name, list_checkpoints, manifest_digest
from megaresnorm.errors import CheckpointError

log = logging.getLogger(__name__)

UNFINISHED = ".tmp-"
FILE_BYTES = 1 << 31  # tensors are gathered into files of about this size


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    attached: Mapping[str, bytes] | None = None,
) -> Path:
    """Write ``root/step-XXXXXXXX`` and remove all but the newest ``keep`` checkpoints.

    tensors: group (weights, optimizer) -> global name -> tensor.   state: whatever JSON can hold.
    attached: name -> content of other files (the tokenizer).
    Raises: CheckpointError, one line, when it exists already or cannot be written; earlier checkpoints stay as they are.
    """
    assert keep >= 2, "one checkpoint must be whole while the next is written"
    final = root / folder_name(step)
    if final.exists():
        raise CheckpointError(f"{final}: exists already; checkpoints are never written over")
    temporary = root / f"{UNFINISHED}{folder_name(step)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"{UNFINISHED}*"):  # of a process that was killed while it saved or removed one
            shutil.rmtree(left)
        temporary.mkdir()
        files = {}
        shapes: dict[str, dict[str, dict]] = {}
        for name, content in (attached or {}).items():
            _write_durably(temporary / name, content)
            files[name] = {"size": len(content), "sha256": file_sha256(temporary / name)}
        for group, members in tensors.items():
            shapes[group] = {}
            for number, part in enumerate(_parts(members), start=1):
                path = temporary / f"{group}-{number:05d}.safetensors"
                _write_tensors(path, part)
                files[path.name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
                shapes[group] |= {
                    name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
                    for name, t in part.items()
                }
        manifest = {"format": FORMAT, "step": step, "files": files, "tensors": shapes, "state": dict(state)}
        manifest["digest"] = manifest_digest(manifest)
        _write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync_folder(temporary)
        temporary.rename(final)
        _sync_folder(root)
    except (OSError, SafetensorError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise CheckpointError(f"{final}: cannot be written ({reason}); earlier checkpoints are untouched") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if it was renamed
    _remove_old(root, keep)
    return final


def _remove_old(root: Path, keep: int) -> None:
    """Remove all but the newest ``keep``. Each is renamed first, so that one that is half gone is no checkpoint any more."""
    for step, old in list_checkpoints(root)[:-keep]:
        try:
            if not old.is_symlink():
                shutil.rmtree(old.rename(root / f"{UNFINISHED}{folder_name(step)}"))
        except OSError as e:
            log.warning("warning: %s: an old checkpoint cannot be removed (%s)", old, e.strerror)


def _parts(members: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Consecutive tensors of about FILE_BYTES together."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in members.items():
        if part and size + tensor.nbytes > FILE_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def _write_tensors(path: Path, part: Mapping[str, Tensor]) -> None:
    slices = {name: [[0, size] for size in tensor.shape] for name, tensor in part.items()}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in part.items()},
        path,
        {"slices": json.dumps(slices)},
    )
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

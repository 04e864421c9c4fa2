"""The root manifest of a checkpoint, trusted only if every byte is as it was written."""

import errno
import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from megaresnorm.checkpoint.format import FILE_NAME, FORMAT, MANIFEST, MAX_MANIFEST_BYTES, step_of
from megaresnorm.errors import CheckpointError, DamagedError
from megaresnorm.limits import MAX_STEPS
from megaresnorm.reading import first_line, read_plain_file

BLANK = "0" * 64
LARGE, SPARSE = 1 << 20, 12  # in a manifest of over LARGE bytes a value takes at least SPARSE bytes on average


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest file.

    Its digest, the first field, is the SHA-256 of all bytes with zeros in the digest's own place.
    """
    text = json.dumps({**manifest, "digest": BLANK}, indent=1, sort_keys=True).encode()
    return text.replace(BLANK.encode(), hashlib.sha256(text).hexdigest().encode(), 1)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, without looking at the files it names.

    Raises:
        DamagedError: it is missing, or not as it was written.
        CheckpointError: it may not be read, or is of another format.
    """
    path = folder / MANIFEST
    try:
        if not path.exists():
            raise DamagedError(f"{path}: not there; wanted a folder such as .../checkpoints/step-00000500")
        if path.is_symlink() or not path.is_file():
            raise DamagedError(f"{path}: not a plain file")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise DamagedError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; not a manifest")
        raw = read_plain_file(path, MAX_MANIFEST_BYTES, follow=False)
        if not plausible(raw):
            raise DamagedError(f"{path}: not a manifest: it has more values than one of its size can have")
        manifest = json.loads(raw)
    except OSError as e:
        raise unreadable(path, e) from None
    except (ValueError, RecursionError) as e:
        raise DamagedError(f"{path}: damaged, or not a manifest: no JSON ({first_line(e)})") from None
    match manifest:
        case {"format": int(), "digest": str(), "step": int(), "files": dict(), "tensors": dict(), "state": dict()}:
            pass
        case _:
            raise DamagedError(f"{path}: not the manifest of a checkpoint")
    blank = raw.replace(manifest["digest"].encode(errors="replace"), BLANK.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != manifest["digest"]:
        other = (
            "" if manifest["format"] == FORMAT else f" or of format {manifest['format']}, this version reads {FORMAT}"
        )
        raise DamagedError(f"{path}: damaged{other} (its digest differs)")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {manifest['format']} is unknown; this version reads {FORMAT}")
    if not 0 <= manifest["step"] <= MAX_STEPS:
        raise DamagedError(f"{path}: its step is not from 0 to {MAX_STEPS:,}")
    if step_of(folder) not in (None, manifest["step"]):
        raise DamagedError(f"{path}: of step {manifest['step']}, which is not the folder's")
    _check_entries(path, manifest)
    return manifest


def plausible(raw: bytes) -> bool:
    """Whether bytes may be a manifest. Parsed, a value can take twenty times the memory that it takes in the file."""
    few = len(raw) <= LARGE or sum(map(raw.count, (b"{", b"[", b","))) <= len(raw) // SPARSE
    return few and len(raw) <= MAX_MANIFEST_BYTES


def _check_entries(path: Path, manifest: dict[str, Any]) -> None:
    """Check the names and entries of files and the entries of tensors.

    Raises:
        DamagedError: one is not that of a checkpoint's file or tensor.
    """
    odd: list[Any] = [name for name in manifest["files"] if not FILE_NAME.fullmatch(name)]
    for entry in manifest["files"].values():
        match entry:
            case {"size": int(size), "sha256": str()} if 0 <= size < 1 << 62:
                continue
        odd.append(entry)
    for group in manifest["tensors"].values():
        for entry in group.values() if isinstance(group, dict) else [group]:
            match entry:
                case {"shape": list(shape), "dtype": str()} if _possible(shape):
                    continue
            odd.append(entry)
    if odd:
        raise DamagedError(f"{path}: {str(odd[0])[:80]!r} is not the name or the entry of a file or tensor")


def weights_digest(folder: Path) -> str:
    """SHA-256 of the names and digests of a checkpoint's weight files, in hexadecimal.

    Raises:
        CheckpointError: the manifest cannot be used.
    """
    files = read_manifest(folder)["files"]
    lines = (f"{name} {files[name]['sha256']}\n" for name in sorted(files) if name.startswith("weights-"))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _possible(shape: list[Any]) -> bool:
    """Whether a tensor can have this shape, with a size in bytes that 64 bits hold."""
    return 0 < len(shape) <= 8 and all(type(n) is int and n > 0 for n in shape) and prod(shape) < 1 << 60


def missing_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """The files of a manifest that are missing or have another size."""

    def there(path: Path, size: int) -> bool:
        try:
            return path.stat().st_size == size
        except OSError:
            return False

    return [name for name, entry in manifest["files"].items() if not there(folder / name, entry["size"])]


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """DamagedError for a file that is gone or that the disk cannot give back, else (no permission) CheckpointError."""
    damaged = error.errno in (errno.ENOENT, errno.EIO, errno.EUCLEAN)
    return (DamagedError if damaged else CheckpointError)(f"{path}: cannot be read ({error.strerror})")

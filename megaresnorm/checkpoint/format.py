"""What a checkpoint is on disk.

step-00000500/
  manifest.json                  everything but tensors: files with size and SHA-256, global shapes, training state,
                                 recipe, versions, and a digest of itself
  weights-00001.safetensors      tensors under their global names; the slice that each one is of the whole tensor
  optimizer-00001.safetensors    stands in the file's own header
  tokenizer.model | .json        the tokenizer of the data, unless it is bytes
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from megaresnorm.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
FILE_NAME = re.compile(r"[a-z]+-[0-9]{5}\.safetensors|tokenizer\.(model|json)")
_FOLDER_NAME = re.compile(r"step-([0-9]{8,})")


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint under ``root``, oldest first. Unfinished ones have other names."""
    try:
        if not root.is_dir():
            return []
        found = ((_FOLDER_NAME.fullmatch(path.name), path) for path in root.iterdir())
        return sorted((int(match[1]), path) for match, path in found if match and (path / MANIFEST).is_file())
    except OSError as e:
        raise CheckpointError(f"{root}: cannot be read ({e.strerror})") from None


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its own digest."""
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()

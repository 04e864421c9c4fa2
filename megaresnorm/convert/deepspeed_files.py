"""Folders that DeepSpeed or its zero_to_fp32.py has written: safetensors, or pickles and what makes those of them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from megaresnorm.convert.files import INDEX, WEIGHTS, Weights, check_plain_files
from megaresnorm.errors import CheckpointError

MADE = "fp32"  # the folder for them, inside that of the checkpoint, so that a config.json is in the one above it
SCRIPT = "zero_to_fp32.py"
_STATES = "_states.pt"
_SAVE = (
    "from huggingface_hub import save_torch_state_dict as save; path, out, *tag = sys.argv[1:]; "
    "os.makedirs(out, exist_ok=True); "
)
# Tensors that share memory are cloned: safetensors refuses them, and zero_to_fp32.py fails where embeddings are tied.
_TIED = (
    "import os, sys; from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as read; "
    + _SAVE
    + "save({k: v.clone() for k, v in read(path, *tag).items()}, out)"
)
_STAGE_0 = (
    "import os, sys, torch; "
    + _SAVE
    + 'save({k: v.clone() for k, v in torch.load(path, weights_only=True)["module"].items()}, out)'
)
_PICKLES = (
    "import glob, os, sys, torch; "
    + _SAVE
    + 'save({k: v.clone() for f in sorted(glob.glob(glob.escape(path) + "/pytorch_model*.bin")) '
    "for k, v in torch.load(f, weights_only=True).items()}, out)"
)


@dataclass(frozen=True)
class Pickles:
    """Files of a folder that are never read here.

    Attributes:
        folder: that of the checkpoint, with ``latest`` and a folder for each step.
        step: the folder of a step's ``*_states.pt``; None where there are only pytorch_model*.bin.
        named: whether the step has to be named.
        files: that lie in ``step``, or the pytorch_model*.bin.
    """

    folder: Path
    step: Path | None
    named: bool
    files: tuple[str, ...]

    def command(self, tied: bool | None) -> str:
        """The command that makes safetensors of them.

        Args:
            tied: whether the model's output matrix is its embedding; None where that is not known.

        Raises:
            CheckpointError: there is none.
        """
        out = str(self.folder / MADE)
        if self.step is None:
            return shlex.join(["python", "-c", _PICKLES, str(self.folder), out])
        parts = {found[1] for name in self.files if (found := re.search(r"mp_rank_(\d+)_", name))}
        if len(parts) > 1 or any(name.startswith("layer_") for name in self.files):
            raise CheckpointError(
                f"{self.step}: files of a model that was split by tensor or pipeline parallelism, which {SCRIPT} does "
                "not put together; save the whole model as safetensors from the program that trained it"
            )
        if not any(name.endswith(f"_optim{_STATES}") for name in self.files):  # stage 0
            return shlex.join(["python", "-c", _STAGE_0, str(self.step / self.files[0]), out])
        tag = [self.step.name] if self.named else []
        if tied:
            return shlex.join(["python", "-c", _TIED, str(self.folder), out, *tag])
        script = self.folder / SCRIPT
        program = [str(script)] if script.exists() else ["-m", "deepspeed.utils.zero_to_fp32"]
        asked = [word for name in tag for word in ("--tag", name)]
        return shlex.join(["python", *program, str(self.folder), out, "--safe_serialization", *asked])


def find_pickles(folder: Path) -> Pickles | None:
    """The pickles of a folder: DeepSpeed's own files in it or in a folder of it, or a model's; None without any."""
    if names := _names(folder, f"*{_STATES}"):
        return Pickles(folder.absolute().parent, folder.absolute(), True, names)
    steps = sorted(
        (path for path in folder.iterdir() if path.is_dir() and _names(path, f"*{_STATES}")),
        key=lambda path: [int(part) if part.isdigit() else -1 for part in re.split(r"(\d+)", path.name)],
    )
    if steps:
        return Pickles(folder, steps[-1], not (folder / "latest").exists(), _names(steps[-1], f"*{_STATES}"))
    names = _names(folder, "pytorch_model*.bin")
    return Pickles(folder, None, False, names) if names else None


def open_weights(folder: Path, tied: bool | None) -> tuple[Weights, tuple[str, ...]]:
    """The safetensors of a folder, whatever lies beside them.

    Args:
        tied: as of ``Pickles.command``.

    Returns:
        The weights, and a note where DeepSpeed's own files have more digits of them.

    Raises:
        CheckpointError: there are none, or some are missing; the line has the command that makes them of the pickles
            that are there.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; give the one that {SCRIPT} --safe_serialization has written")
    check_plain_files(folder)
    pickles = find_pickles(folder)
    lacks = f"{folder}: has no safetensors"
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        try:
            weights = Weights(folder)
            if pickles is None or not weights.missing:
                return weights, _rounded(weights, pickles, tied)
            name, file = next(iter(weights.missing.items()))
            lacks = f"{folder / file}: has no tensor {name}, which the index has there"
        except CheckpointError as e:
            if pickles is None:
                raise
            lacks = str(e)
    if pickles is None:
        raise CheckpointError(f"{lacks}, and nothing of DeepSpeed's; wanted what {SCRIPT} --safe_serialization writes")
    raise CheckpointError(
        f"{lacks}; {pickles.files[0]} is a pickle, which can run code and is never read here; if you trust it, make "
        f"safetensors of it and give {shlex.quote(str(pickles.folder / MADE))}: {pickles.command(tied)}"
    )


def _rounded(weights: Weights, pickles: Pickles | None, tied: bool | None) -> tuple[str, ...]:
    types = {dtype for _, _, dtype in weights.tensors.values()}
    if pickles is None or pickles.step is None or any(dtype.itemsize > 2 for dtype in types):
        return ()
    (name,) = {str(dtype).removeprefix("torch.") for dtype in types} if len(types) == 1 else {"16-bit numbers"}
    try:
        return (f"these weights are {name}; DeepSpeed's own files have them in FP32: {pickles.command(tied)}",)
    except CheckpointError:  # of a model that was split
        return ()


def _names(folder: Path, pattern: str) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.glob(pattern) if path.is_file()))

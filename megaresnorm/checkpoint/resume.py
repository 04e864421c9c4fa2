"""Resuming from a checkpoint: the newest one that is whole, if it belongs to this run."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaresnorm.checkpoint.format import DAMAGED, MANIFEST, step_of
from megaresnorm.checkpoint.inspect import newest_of
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import RunState, recipe_of, state_of
from megaresnorm.data.training_data import TrainingData
from megaresnorm.errors import CheckpointError, DamagedError
from megaresnorm.parallel.control import all_or_raise, run_on_all_ranks
from megaresnorm.parallel.mesh import Axis
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import differences

log = logging.getLogger(__name__)
# What a resumed run must share with its checkpoint. The folder of the data may move: its content is compared.
FIXED_ON_RESUME = (
    "model.",
    "data.valid_fraction",
    "data.test_fraction",
    "data.split",
    "data.seed",
    "data.mask_documents",
    "train.seed",
    "precision.compute",
    "precision.weights",
    "precision.residual_dtype",
    "precision.fp8.recipe",
    "precision.fp8.scaling",
    "precision.fp8.history",
    "precision.fp8.backward",
    "precision.fp8.weight_grad",
)
SECONDS_TO_SEE = 30.0  # network file systems show a node what another has written after a while


def open_newest(
    root: Path, control: Axis, *, fallback: bool, progress: Callable[[int], None] | None = None
) -> Checkpoint | None:
    """The newest checkpoint under ``root`` that is whole, verified by all ranks together. Collective.

    A damaged one is named in a warning and set aside under another name once an older one has been verified: nothing
    is lost, and its step can be saved again. The first rank's view of the folder counts.

    Args:
        fallback: whether a damaged newest checkpoint may be passed over for an older one.
        progress: called with the number of bytes of every part that this rank has verified.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        DamagedError: none is whole, or the newest is not and ``fallback`` is False.
        CheckpointError: one cannot be read.
    """
    seen = run_on_all_ranks(lambda: _folders(root) if control.rank == 0 else [], control)[0]
    found = [root / name for name, _ in seen]
    for name, has_manifest in seen:
        if has_manifest:
            wait_until_seen(root / name / MANIFEST)
    damaged: list[Path] = []
    for path in reversed(found):
        try:
            checkpoint = Checkpoint(path, control, progress)
        except DamagedError as e:
            older = found[: found.index(path)]
            if not older:
                others = f"; so are {', '.join(p.name for p in damaged)}" if damaged else ""
                raise _like(e, f"{e}; no older checkpoint is left{others}") from None
            if not fallback:
                raise _like(e, f"{e}; without --no-fallback the run goes on from {older[-1].name}") from None
            log.warning("warning: %s; going back to %s", e, older[-1].name)
            damaged.append(path)
        else:
            if control.rank == 0:
                for bad in damaged:
                    _set_aside(bad)
            return checkpoint
    return None


def open_weights(recipe: Recipe, tokenizer: dict[str, Any] | None, control: Axis) -> Checkpoint:
    """The checkpoint that train.initial_weights names, verified by all ranks together. Collective.

    Differences from this run in the model's other settings or the tokenizer are warnings: only the parameters must be
    the same.

    Args:
        tokenizer: the description of this run's tokenizer; None without one.

    Raises:
        CheckpointError: there is none, or it cannot be used; the same on all ranks.
    """
    assert recipe.train.initial_weights is not None
    given = Path(recipe.train.initial_weights)
    newest = run_on_all_ranks(lambda: str(newest_of(given)) if control.rank == 0 else "", control)[0]
    checkpoint = Checkpoint(Path(newest), control)

    def look() -> None:
        state = state_of(checkpoint.folder, checkpoint.state)
        before = recipe_of(checkpoint.folder, state).model.model_dump(exclude={"init", "dropout"}, exclude_none=True)
        now = recipe.model.model_dump(exclude={"init", "dropout"}, exclude_none=True)
        for key, (old, new) in differences(before, now, "model.").items():
            log.warning("warning: %s was %s for train.initial_weights and is %s now", key, old, new)
        if state.tokenizer is not None and tokenizer is not None and state.tokenizer != tokenizer:
            log.warning("warning: %s", _other_tokenizer(state.tokenizer, tokenizer))

    all_or_raise(look, control)
    return checkpoint


def _other_tokenizer(before: dict[str, str], now: dict[str, str]) -> str:
    """How the tokenizer of the weights and that of the data differ."""
    differing = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    for key, verb in (("begin_token", "begin"), ("end_token", "end")):
        if differing == {key}:
            tokens = [found.get(key, "no token") for found in (before, now)]
            return f"documents {verb} with {tokens[0]} for train.initial_weights, and with {tokens[1]} in the data"
    return "train.initial_weights were trained with another tokenizer than the one of the data"


def wait_until_seen(path: Path) -> bool:
    """Whether a file is there; waits up to SECONDS_TO_SEE, as another node may have just written it."""
    end = time.monotonic() + SECONDS_TO_SEE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _folders(root: Path) -> list[tuple[str, bool]]:
    """Folder names of all steps, oldest first, and whether each has a manifest; one without is a damaged checkpoint."""
    try:
        steps = sorted((step_of(path) or 0, path) for path in root.iterdir() if step_of(path) is not None)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise CheckpointError(f"{root}: cannot be read ({e.strerror})") from None
    return [(path.name, (path / MANIFEST).is_file()) for _, path in steps]


def _like(error: DamagedError, line: str) -> DamagedError:
    longer = DamagedError(line)
    longer.agreed = error.agreed
    return longer


def check_same_run(checkpoint: Checkpoint, state: RunState, recipe: Recipe, data: TrainingData, data_name: str) -> None:
    """Warn of the settings that have changed since a checkpoint was saved.

    Args:
        data: this run's; compared by the digest of its token files and its tokenizer.
        data_name: what errors call the data.

    Raises:
        CheckpointError: the run would not be the same one.
    """
    before = recipe_of(checkpoint.folder, state)  # settings that are newer than the checkpoint have their defaults
    changed = differences(before.model_dump(exclude_none=True), recipe.model_dump(exclude_none=True))
    for key, (old, now) in changed.items():
        held_out = key.startswith("data.valid") and before.data.shares != recipe.data.shares
        if key.startswith(FIXED_ON_RESUME) or held_out:
            raise CheckpointError(
                f"{checkpoint.folder}: made with {key}={old}, the recipe has {now}; "
                "use another train.output for another run"
            )
        if key.startswith("engine.") and before.engine.name != recipe.engine.name and key != "engine.name":
            continue  # settings of one engine alone
        log.warning("warning: %s was %s up to step %d and is %s from now on", key, old, checkpoint.step, now)
    if checkpoint.step > recipe.train.steps:
        raise CheckpointError(
            f"{checkpoint.folder}: step {checkpoint.step} is past train.steps={recipe.train.steps}; "
            "use another train.output for a shorter run"
        )
    if state.data != data.digest:
        weights = [[source.weight for source in one.data.sources] for one in (before, recipe)]
        weighed = "" if weights[0] == weights[1] else f" (its weights were {weights[0]} and are {weights[1]})"
        raise CheckpointError(f"{checkpoint.folder}: {data_name} has changed since{weighed}; use another train.output")
    tokenizer = None if data.tokenizer is None else data.tokenizer.describe()
    if state.tokenizer is not None and state.tokenizer != tokenizer:
        raise CheckpointError(
            f"{checkpoint.folder}: the tokenizer of {data_name} is another one than that of this run; "
            "use another train.output"
        )


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{DAMAGED}{path.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{DAMAGED}{path.name}-{number}")
    try:
        os.rename(path, aside)
        log.warning("warning: %s is %s now; nothing reads it any more", path, aside.name)
    except OSError as e:
        log.warning("warning: %s cannot be renamed (%s)", path, e.strerror)

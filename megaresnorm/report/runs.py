"""The files of one run, read as they are at this moment: the run may go on writing them."""

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megaresnorm.checkpoint.inspect import entries
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.model.parameters import parameter_table
from megaresnorm.profiling.profile import FILE, MAX_BYTES, SCHEMA_VERSION, problem_of
from megaresnorm.reading import read_json_object
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import load_recipe, read_recipe
from megaresnorm.report.columns import Columns, read_columns
from megaresnorm.report.depth_records import Depth, OverTime, depth_over_time, numbers_over_time
from megaresnorm.report.incidents import start_times
from megaresnorm.report.marks import Marks, marks_of
from megaresnorm.report.profile import MAX_PROFILE_VALUES
from megaresnorm.resilience.lock import is_held
from megaresnorm.telemetry.incidents import read_incidents
from megaresnorm.telemetry.metrics import DEPTH, NUMBERS
from megaresnorm.telemetry.numbers import read_numbers

_EVENTS = re.compile(r"events\.out\.tfevents\.([0-9]{19,20})\.")
State = Literal["finished", "going on", "stopped", "not begun", "profile"]


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder holds.

    Attributes:
        name: by which a page of several runs tells it apart.
        recipe: None where it cannot be read.
        num_parameters: of the whole model; None where the recipe does not say the vocabulary.
        num_writers: ranks that wrote the newest checkpoint; None without one.
        problems: lines on what could not be read, and is left out.
        incidents: what went wrong and was done about it, oldest first.
    """

    folder: Path
    name: str
    recipe: Recipe | None
    num_parameters: int | None
    num_writers: int | None
    metrics: Columns
    marks: Marks
    num_starts: int | None
    state: State
    depth: Depth
    numbers: Mapping[str, Mapping[str, OverTime]] = field(default_factory=dict)
    profile: Mapping[str, Any] | None = None
    problems: tuple[str, ...] = ()
    incidents: tuple[Mapping[str, Any], ...] = ()


def read_runs(folders: list[Path], now: float | None = None) -> list[RunFiles]:
    """Read runs. Their names are those of their folders, as far up as they need to differ.

    Args:
        now: seconds of the epoch; None: the present.

    Raises:
        ConfigError: a folder is no run, or is given twice.
    """
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise ConfigError(f"{' '.join(map(str, folders))}: a run is given twice; name each once")
    parts = 1
    while len({place.parts[-parts:] for place in places}) < len(places):
        parts += 1
    names = ["/".join(place.parts[-parts:]) for place in places]
    return [
        _read(folder, name, time.time() if now is None else now) for folder, name in zip(folders, names, strict=True)
    ]


def _read(folder: Path, name: str, now: float) -> RunFiles:
    known = ("metrics.jsonl", "recipe.yaml", FILE, f"profile/{FILE}")
    if not any((folder / name).is_file() for name in known):
        raise ConfigError(
            f"{folder}: has neither metrics.jsonl nor recipe.yaml nor a profile; wanted the output folder of a run "
            "(train.output)"
        )
    problems: list[str] = []
    recipe = _recipe(folder, problems)
    metrics = _metrics(folder, problems)
    incidents = tuple(read_incidents(folder))
    starts = start_times(incidents) or _starts(folder)
    return RunFiles(
        folder=folder,
        name=name,
        recipe=recipe,
        num_parameters=_num_parameters(recipe),
        num_writers=_num_writers(folder),
        metrics=metrics,
        marks=marks_of(metrics, starts),
        num_starts=len(starts) or None,
        state=_state(folder, recipe, metrics, now),
        depth=_depth(folder, problems),
        numbers=_numbers(folder, problems),
        profile=_profile(folder, problems),
        problems=tuple(problems),
        incidents=incidents,
    )


def _recipe(folder: Path, problems: list[str]) -> Recipe | None:
    path = folder / "recipe.yaml"
    try:
        if any("$" in text or text.startswith("~") for text in _texts(read_recipe(path))):
            problems.append(f"{path}: it names variables or a home folder, which are this machine's; it is left out")
            return None
        return load_recipe(path)
    except ConfigError as e:
        problems.append(str(e))
        return None


def _texts(values: Any) -> Iterator[str]:
    """All texts among plain values."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _texts(value)


def _num_parameters(recipe: Recipe | None) -> int | None:
    if recipe is None or recipe.model.vocab_size is None:
        return None
    return sum(spec.num_elements for spec in parameter_table(recipe.model).values())


def _num_writers(folder: Path) -> int | None:
    """Those that every whole checkpoint names; one that a run which goes on removes meanwhile has none."""
    try:
        known = [one.num_ranks for one in entries(folder) if one.num_ranks is not None]
    except OSError:
        return None
    return known[-1] if known else None


def _metrics(folder: Path, problems: list[str]) -> Columns:
    path = folder / "metrics.jsonl"
    try:
        found = read_columns(path)
    except FileNotFoundError:
        return Columns(np.zeros(0, dtype=np.int64))
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror})") from None
    if found.unreadable:
        problems.append(f"{path}: {found.unreadable:,} of its lines cannot be read and are left out")
    return found


def _depth(folder: Path, problems: list[str]) -> Depth:
    path = folder / DEPTH
    try:
        found = depth_over_time(path)
    except FileNotFoundError:
        return Depth()
    except OSError as e:
        problems.append(f"{path}: cannot be read ({e.strerror})")
        return Depth()
    if found.unreadable:
        problems.append(f"{path}: {found.unreadable:,} of its lines cannot be read and are left out")
    return found


def _numbers(folder: Path, problems: list[str]) -> Mapping[str, Mapping[str, OverTime]]:
    if not os.path.lexists(folder / NUMBERS):
        return {}
    try:
        return numbers_over_time(read_numbers(folder))
    except DataError as e:
        problems.append(str(e))
        return {}


def _profile(folder: Path, problems: list[str]) -> Mapping[str, Any] | None:
    path = folder / "profile" / FILE
    path = path if os.path.lexists(path) else folder / FILE  # of a profile that was made by itself
    try:
        found = read_json_object(path, MAX_BYTES, MAX_PROFILE_VALUES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        problems.append(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})")
        return None
    if found.get("schema_version") != SCHEMA_VERSION:
        problems.append(f"{path}: {problem_of(found)}")
        return None
    return found


def _starts(folder: Path) -> list[float]:
    """When the run was started, by the names of TensorBoard's files: a process makes one, named after the time."""
    try:
        names = os.listdir(folder / "tensorboard")
    except OSError:
        return []
    return sorted(int(found[1]) / 1e9 for found in map(_EVENTS.match, names) if found is not None)


def _state(folder: Path, recipe: Recipe | None, metrics: Columns, now: float) -> State:
    if recipe is not None and len(metrics) and metrics.steps[-1] >= recipe.train.steps:
        return "finished"
    held = is_held(folder, now)
    if held is None:  # copied from where it runs
        last = metrics.last("time")
        held = last is not None and now - last < max(60.0, 20 * (metrics.last("seconds") or 0.0))
    if not len(metrics) and os.path.lexists(folder / FILE):
        return "profile"
    return "going on" if held else "stopped" if len(metrics) else "not begun"

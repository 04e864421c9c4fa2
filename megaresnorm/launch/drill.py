"""A drill from its recipe to its table: a few steps to time them, an undisturbed run, the run with faults."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megaresnorm.errors import ConfigError, TrainingError
from megaresnorm.launch.soak import Soak
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe, dump_recipe
from megaresnorm.resilience.drill_plan import DrillPlan, plan_drill
from megaresnorm.resilience.drill_table import Row, digest_in, last_record, losses_of, rows_of, times_of
from megaresnorm.text import say

TIMED, NOT_TIMED = 40, 10  # steps of the first run, and those of them that are still warming up
START = 300  # seconds, watchdog.start


@dataclass
class Outcome:
    """What came of a drill.

    Attributes:
        code: exit code of the run's last start; 0 where it came to its end.
        starts: by hand, with the first one.
        differing: steps whose loss differs from the undisturbed run's; None without that.
        same_weights: whether both ended with the same weights; None likewise.
        goodput: productive share of the time; None where it is not known.
        productive: share of the steps made that were not made again or refused.
        exact: whether curve and weights must be those of the undisturbed run.
    """

    plan: DrillPlan
    rows: list[Row]
    code: int
    seconds: float
    starts: int
    goodput: float | None
    spent: dict[str, float] = field(default_factory=dict)
    productive: float = 0.0
    differing: int | None = None
    same_weights: bool | None = None

    @property
    def passed(self) -> bool:
        """Whether all that was injected was noticed and named, and the run has ended as it should."""
        same = not self.plan.exact or self.differing is None or (self.differing == 0 and bool(self.same_weights))
        return self.code == 0 and same and all(row.right for row in self.rows)

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        about = asdict(self)
        return {"schema_version": 1, "passed": self.passed, "exact": self.plan.exact} | about


class DrillRun:
    """Runs the parts of a drill in a folder of its own.

    Args:
        recipe: that is drilled.
        folder: to be made: recipes, logs and both runs.
        ranks: of this host.

    Raises:
        ConfigError: the folder has something in it.
    """

    def __init__(self, recipe: Recipe, folder: Path, ranks: int) -> None:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: it has something in it; give a drill a folder of its own (--out)")
        self._recipe, self._folder, self._ranks = recipe, folder, ranks
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"{folder}: cannot be made ({e.strerror})") from None

    def run(self, kinds: Sequence[str], *, seed: int, minutes: float, compares: bool) -> Outcome:
        """Make all of it.

        Args:
            kinds: of faults.
            minutes: that the run with faults is to take.
            compares: make an undisturbed run before it.

        Raises:
            TrainingError: the recipe does not train undisturbed.
        """
        say(f"timing    {TIMED} steps")
        self._undisturbed("timed", self._settings("timed", TIMED, TIMED))
        plan = plan_drill(
            kinds, seed=seed, ranks=self._ranks, seconds=60 * minutes, step_seconds=self._step_seconds("timed")
        )
        say(f"planned   {plan.steps:,} steps, a checkpoint every {plan.every}, {len(plan.faults)} faults, seed {seed}")
        settings = self._settings("undisturbed", plan.steps, plan.every, plan.deadline)
        digest = ""
        if compares:
            say("running   undisturbed")
            digest = self._undisturbed("undisturbed", settings)
        say("running   with faults")
        drill = {"seed": seed, "faults": plan.faults}
        soak, code, seconds = self._start("drilled", settings, drill=drill)
        run = self._folder / "drilled"
        outcome = Outcome(plan, rows_of(plan.faults, run, soak.lines), code, seconds, soak.starts, **_figures(run))
        if compares:
            ours, theirs = losses_of(run), losses_of(self._folder / "undisturbed")
            outcome.differing = sum(ours.get(step) != theirs.get(step) for step in ours.keys() | theirs.keys())
            outcome.same_weights = bool(digest) and digest_in(soak.lines) == digest
        return outcome

    def _settings(self, name: str, steps: int, every: int, deadline: int | None = None) -> dict[str, Any]:
        """The recipe's values for a run of a drill: deadlines that are short, files beside each other."""
        values = self._recipe.model_dump(exclude_none=True, exclude_defaults=True)
        values["train"] |= {"output": str(self._folder / name), "steps": steps, "loggers": [], "sample_tokens": 0}
        values["train"].pop("max_minutes", None)
        checkpoint, guard = values.setdefault("checkpoint", {}), values.setdefault("guard", {})
        checkpoint["every"] = every
        guard |= {"digest_every": every, "max_rollbacks": 1000, "max_skips": 1000}
        values["watchdog"] = {"start": START, "checkpoint": 60} | ({} if deadline is None else {"step": deadline})
        return values

    def _start(self, name: str, values: dict[str, Any], **more: Any) -> tuple[Soak, int, float]:
        values = values | more | {"train": values["train"] | {"output": str(self._folder / name)}}
        file = self._folder / f"{name}.yaml"
        file.write_text(dump_recipe(build_recipe(values)))
        soak, start = Soak(file, self._ranks, self._folder / f"{name}.log", drill=bool(more)), time.monotonic()
        return soak, soak.run(), time.monotonic() - start

    def _undisturbed(self, name: str, values: dict[str, Any]) -> str:
        """The digest of the weights at the end of a run without faults."""
        soak, code, _ = self._start(name, values)
        if code:
            last = next((text for _, text in reversed(soak.lines) if "error: " in text), f"see {name}.log")
            raise TrainingError(f"without faults the recipe ends with exit code {code}: {last.partition('error: ')[2]}")
        return digest_in(soak.lines)

    def _step_seconds(self, name: str) -> float:
        """Seconds of a step of a run, without its first steps, and with what goes on beside steps."""
        times = times_of(self._folder / name)
        return (times[TIMED] - times[NOT_TIMED]) / (TIMED - NOT_TIMED)


def _figures(run: Path) -> dict[str, Any]:
    """Where the time of a run went, and which share of its steps has stayed."""
    last = last_record(run)
    spent = {key[6:]: value for key, value in last.items() if key.startswith("spent_")}
    kept, made = spent.get("productive", 0.0), spent.get("productive", 0.0) + spent.get("lost", 0.0)
    return {"goodput": last.get("goodput"), "spent": spent, "productive": kept / made if made else 0.0}

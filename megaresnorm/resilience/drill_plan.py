"""Which faults a drill injects, when and where: a pure function of a seed and of how long steps take."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_SHOWN
from megaresnorm.recipe import Recipe
from megaresnorm.resilience.spikes import NEEDED

LOST = 10.0  # seconds that a fault costs about: ranks are started again, and make some steps again
SHARE = 0.1  # of a drill's time that its faults are to cost
SAVES = 2.0  # seconds between checkpoints
LEAST_DEADLINE = 8  # seconds for a step: ranks of one core each may be slow
SLOW_STEPS, SLOWER = 50, 0.1  # steps of a slow rank, and seconds that it is slower at least


class Usual(NamedTuple):
    """How a kind of fault is injected where nobody says.

    Attributes:
        places: chosen from.
        exact: whether the run is afterwards what it would have been, bit for bit.
    """

    places: tuple[str | None, ...] = (None,)
    exact: bool = True


KINDS = {
    "kill": Usual((None, "forward", "collective", "save")),
    "stop": Usual(),
    "hang": Usual((None, "loader", "collective", "interpreter")),
    "slow": Usual(("forward",)),
    "nan": Usual(("activation", "gradient")),
    "flip": Usual(("weight", "moment")),
    "spike": Usual(exact=False),
    "torn_write": Usual((None, "save")),
    "no_space": Usual(),
    "io_error": Usual(("save",)),
    "cut": Usual((None, "collective")),
    "clock": Usual(),
}


@dataclass(frozen=True)
class DrillPlan:
    """A drill.

    Attributes:
        steps: of the run.
        every: steps between checkpoints.
        deadline: seconds for a step, watchdog.step.
        faults: in the order of their steps, as ``FaultRecipe`` has them.
    """

    steps: int
    every: int
    deadline: int
    faults: list[dict[str, Any]]

    @property
    def exact(self) -> bool:
        """Whether the run must end as an undisturbed one."""
        return all(KINDS[fault["kind"]].exact for fault in self.faults)


def kinds_of(words: Sequence[str] | None, recipe: Recipe, ranks: int) -> list[str]:
    """The kinds of faults of a drill.

    Args:
        words: asked for; None for all that a run of this layout notices and survives exactly.

    Raises:
        ConfigError: one is none, or would not be noticed in this layout or by this recipe.
    """
    parallel = recipe.parallel
    copies = ranks // (parallel.tp * parallel.pp * parallel.dp_shard)
    unnoticed = _unnoticed(ranks, copies, recipe)
    if words is None:
        named = copies > 2 and parallel.dp_shard == 1  # else a flipped bit has no majority against it, or no copy
        usual = [kind for kind, usual in KINDS.items() if usual.exact and (kind != "flip" or named)]
        return [kind for kind in usual if kind not in unnoticed]
    for word in words:
        if word not in KINDS:
            raise ConfigError(f"--faults {word[:MAX_SHOWN]}: wanted some of {', '.join(KINDS)}, separated by commas")
        if word in unnoticed:
            possible = ", ".join(kind for kind in KINDS if kind not in unnoticed)
            raise ConfigError(f"--faults {word}: nobody would notice it: {unnoticed[word]}; possible here: {possible}")
    return list(dict.fromkeys(words))


def _unnoticed(ranks: int, copies: int, recipe: Recipe) -> dict[str, str]:
    """Kinds that nobody can notice, and why: with ``copies`` replicas of the model."""
    found: dict[str, str] = {}
    if ranks == 1:
        found |= {"slow": "one rank has no others to be slower than", "cut": "one rank has no connections"}
    if copies < 2:
        found["flip"] = f"{'one rank has' if ranks == 1 else f'{ranks} ranks have'} no second replica to compare with"
    if recipe.guard.spike == "none":
        found["spike"] = "guard.spike=none looks for none (add guard.spike=skip)"
    return found


def plan_drill(kinds: Sequence[str], *, seed: int, ranks: int, seconds: float, step_seconds: float) -> DrillPlan:
    """Faults of these kinds, each at least once, spread evenly over a run, each with room to recover from it.

    Args:
        kinds: of ``KINDS``.
        seed: chooses order, steps, ranks and places.
        seconds: that the run is to take, with what its faults cost.
        step_seconds: of an undisturbed step.
    """
    chance, every = random.Random(seed), max(4, ceil(SAVES / step_seconds))
    count = max(len(kinds), int(SHARE * seconds / LOST))
    least = max(5 * every, SLOW_STEPS + 3 * every if "slow" in kinds else 0)
    room = max(least, int((seconds - LOST * count) / count / step_seconds))
    order = [kind for _ in range(ceil(count / len(kinds))) for kind in chance.sample(list(kinds), len(kinds))]
    faults: list[dict[str, Any]] = []
    begin = NEEDED if "spike" in kinds else 0  # before which no step is a spike
    for number, kind in enumerate(order[:count]):
        step = begin + number * room + every + 1 + chance.randrange(every)
        fault = {
            "kind": kind,
            "step": step,
            "rank": chance.randrange(ranks),
            "place": chance.choice([p for p in KINDS[kind].places if ranks > 1 or p != "collective"]),
        }
        if kind == "slow":
            fault |= {"times": SLOW_STEPS, "seconds": max(SLOWER, 2 * step_seconds)}
        if kind == "clock":
            fault["rank"] = chance.randrange(min(1, ranks - 1), ranks)  # the first one's stamps what is told of others
        faults.append({key: value for key, value in fault.items() if value is not None})
        if kind == "torn_write":  # nobody looks at a checkpoint before the ranks are started again
            saved = ceil(step / every) * every  # which takes a while
            faults.append(
                {"kind": "kill", "step": saved + every // 2 + chance.randrange(every // 2), "rank": fault["rank"]}
            )
    deadline = max(LEAST_DEADLINE, ceil(20 * step_seconds))
    return DrillPlan(begin + count * room + 2 * every, every, deadline, faults)

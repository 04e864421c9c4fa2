"""megaresnorm doctor --cluster: the checks of all hosts of a job, on its ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megaresnorm.cli.arguments import check_json
from megaresnorm.errors import ConfigError, UserError

if TYPE_CHECKING:  # commands import what they need, so that --help is instant
    from torch.distributed import Store  # type: ignore[attr-defined]

    from megaresnorm.opening import Opened
    from megaresnorm.parallel.environment import Environment
    from megaresnorm.recipe import Recipe
    from megaresnorm.resilience.cluster.check import Check
    from megaresnorm.resilience.cluster.examination import Examination
    from megaresnorm.resilience.signals import StopSignals
    from megaresnorm.resilience.watchdog import Watchdog

PATIENCE = 120.0  # seconds that ranks wait for each other


def doctor_cluster(recipe: str | None, overrides: Sequence[str], ranks: int | None, json: Path | None) -> int:
    """Examine the hosts of a job: as one of its ranks, where a launcher has started them, else with ranks started here.

    Args:
        ranks: to be started here.

    Returns:
        The exit code; 1 where a check fails.
    """
    from megaresnorm.job import run_rank
    from megaresnorm.parallel.environment import read_environment
    from megaresnorm.recipe.load import load_recipe

    def load() -> Recipe:
        assert recipe is not None
        return load_recipe(recipe, overrides)

    environment = read_environment()
    if environment.rank == 0:  # which writes it
        check_json(json)
    if environment.world_size > 1 or environment.has_parent:
        if ranks is not None:
            raise ConfigError(f"--ranks={ranks}: a launcher has started {environment.world_size} already; leave it out")
        return run_rank(partial(_examine, load=None if recipe is None else load, json=json))
    from megaresnorm.resilience.supervisor import supervise

    if recipe is not None:
        load()  # an error in it is one line, before anything is started
    words = ["--cluster", *([] if recipe is None else [recipe]), *overrides]
    words += [] if json is None else [f"--json={json}"]
    settings = {"NODES": "1", "COMMAND": "doctor", "MAX_RESTARTS": "0"}
    return supervise(words, RANKS_PER_NODE=None if ranks is None else str(ranks), **settings)


def _examine(
    environment: Environment,
    stop: StopSignals,
    watchdog: Watchdog,
    *,
    load: Callable[[], Recipe] | None,
    json: Path | None,
) -> int:
    from megaresnorm.assemble import choose_device
    from megaresnorm.parallel.mesh import ParallelContext, Sizes, lost_contact, start_process_group
    from megaresnorm.parallel.rendezvous import open_store
    from megaresnorm.resilience.cluster.check import Check
    from megaresnorm.resilience.cluster.examination import Examination, Subject, examine

    size = environment.world_size
    store = open_store(environment, PATIENCE) if size > 1 else None
    found = Examination(_unreachable(environment, store))
    if found.failed:  # ranks would wait for each other in vain
        return _end(found, environment, json)
    opened, agreed = _open(load, environment, store)
    found = Examination([agreed])
    device = opened.device if opened is not None else choose_device("auto", environment.local_rank)
    try:
        if store is not None:
            start_process_group(device, store, environment.rank, size, PATIENCE)
        context = ParallelContext.create(Sizes(dp_replicate=size), device.type, PATIENCE)
    except RuntimeError as e:
        if (reason := lost_contact(e)) is None:
            raise
        advice = "ranks must reach each other: look at interfaces, firewalls and MASTER_ADDR"
        found.checks.append(Check("network", "FAIL", f"ranks do not reach each other ({reason})", advice))
    else:
        resolved = (None, None) if opened is None else (opened.recipe, opened.sizes)
        rest = examine(Subject(context, environment, device, *resolved))
        found = Examination([agreed, *rest.checks], rest.figures)
    return _end(found, environment, json)


def _unreachable(environment: Environment, store: Store | None) -> list[Check]:
    """The verdict on addresses that other nodes have no way to; nothing where there is none."""
    from megaresnorm.parallel.rendezvous import agree
    from megaresnorm.resilience.cluster.check import Check
    from megaresnorm.resilience.cluster.node import check_address

    if store is None:
        return []
    try:
        agree(lambda: check_address(environment), lambda _: {}, environment, store, PATIENCE)
    except ConfigError as e:
        return [Check("addresses", "FAIL", str(e), "ranks of other nodes have no way to this one")]
    return []


def _open(
    load: Callable[[], Recipe] | None, environment: Environment, store: Store | None
) -> tuple[Opened | None, Check]:
    """The recipe and its data as all ranks have them, and the verdict on that."""
    from megaresnorm.opening import facts_of_package, facts_of_program, open_recipe
    from megaresnorm.parallel.rendezvous import agree
    from megaresnorm.resilience.cluster.check import Check

    name, advice = "agreement", "all nodes need the same recipe, program and data"
    try:
        if load is None:
            if store is not None:
                agree(lambda: None, lambda _: facts_of_program() | facts_of_package(), environment, store, PATIENCE)
            return None, Check(name, "PASS", "the same versions and files of the program on all ranks; no recipe given")
        opened = open_recipe(load, environment, store)
        return opened, Check(name, "PASS", "the same recipe, versions, files of the program, and data on all ranks")
    except UserError as e:
        if environment.world_size > 1 and not e.agreed:
            raise
        return None, Check(name, "FAIL", str(e), advice)


def _end(found: Examination, environment: Environment, json: Path | None) -> int:
    from megaresnorm.cli.arguments import report
    from megaresnorm.cli.doctor import lines_of

    if environment.rank == 0:
        report(json, found.as_json(), *lines_of(found.checks))
    return int(found.failed)

"""Checks before the first collective: recipe, data, layout, device. Several ranks agree on all of them, or end."""

import json
import logging
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

import megaresnorm
from megaresnorm.assemble import choose_device
from megaresnorm.data.samples import Samples
from megaresnorm.data.training_data import TrainingData, open_data, open_samples, resolve_vocab
from megaresnorm.engines.extensions import check_offload
from megaresnorm.errors import LostRankError, TooManyRestartsError, UserError
from megaresnorm.kernels.deterministic import set_deterministic
from megaresnorm.layout import check_execution, check_layout, ranks_without_samples
from megaresnorm.model.lint import check
from megaresnorm.model.parameters import parameter_table
from megaresnorm.optim import check_eps
from megaresnorm.packages import check_deepspeed_version, untested, version_of
from megaresnorm.parallel.environment import Environment, read_environment
from megaresnorm.parallel.mesh import Sizes, usable_ranks
from megaresnorm.parallel.rendezvous import agree, open_store, wait_until_heard
from megaresnorm.recipe import Recipe, WatchdogRecipe
from megaresnorm.recipe.names import flat
from megaresnorm.resilience.cluster.node import check_address
from megaresnorm.resilience.faults import check_drill
from megaresnorm.resilience.launcher import Launcher
from megaresnorm.resilience.memory_check import check_memory
from megaresnorm.resilience.watchdog import Watchdog
from megaresnorm.telemetry.loggers import check_loggers

log = logging.getLogger(__name__)

PROGRESS = "megaresnorm/progress"  # in the store: a checkpoint has been written
ENDED = "megaresnorm/ended"  # in the store: the exit code of the ranks that work, for those that idle
LOOK = 0.5  # seconds between two looks at the store


@dataclass(frozen=True)
class Opened:
    """A recipe that has been checked, with what was opened for it.

    Attributes:
        recipe: resolved against the data.
        valid: validation samples of each set, by its name.
        sizes: mesh of the ranks that work; None where an elastic job has too few for one model.
        environment: of this rank.
        store: through which the ranks have met; None in one process.
        watchdog: of this process; None where a run has one of its own.
    """

    recipe: Recipe
    data: TrainingData
    samples: Samples
    valid: dict[str, Samples]
    device: torch.device
    sizes: Sizes | None
    environment: Environment
    store: Store | None = None
    watchdog: Watchdog | None = None

    @property
    def idles(self) -> bool:
        """Whether this rank of an elastic job has no place in the layout."""
        return self.sizes is None or self.environment.rank >= self.sizes.num_ranks


def open_recipe(
    load: Callable[[], Recipe], environment: Environment | None = None, store: Store | None = None
) -> Opened:
    """Read and check a recipe, and open its data. With several ranks, all agree on it. Nothing is allocated.

    Args:
        load: reads the recipe; an error in it becomes that of all ranks.
        environment: of this rank; None to read it from the process.
        store: through which several ranks meet; None to open one.

    Raises:
        UserError: that of the first rank which had one, on all ranks.
        ConfigError: a setting, version, source file or data set differs between two ranks; names the first.
        TooManyRestartsError: ranks have died too often since the newest checkpoint was written.
    """
    environment = environment or read_environment()
    if environment.world_size == 1:
        _check_restarts(environment)
        return _look(load(), environment, None)
    read: Future[Recipe] = Future()  # before the ranks meet, since it says how long they wait for each other
    try:
        _check_restarts(environment)  # each node counts for itself; if one has had enough, all end
        read.set_result(load())
    except Exception as e:  # noqa: BLE001 - for all ranks, where they meet
        read.set_exception(e)
    wait = (WatchdogRecipe() if read.exception() else read.result().watchdog).start
    store = store or open_store(environment, wait)
    # This comes first: what fails below may fail because of a setting that differs.
    recipe = agree(read.result, facts_of_start, environment, store, wait)
    return agree(lambda: _look(recipe, environment, store), facts_of_data, environment, store, wait)


def _look(recipe: Recipe, environment: Environment, store: Store | None) -> Opened:
    check_drill(recipe, environment)
    check_address(environment)
    check_loggers(recipe.train.loggers)
    if recipe.engine.name == "deepspeed":
        check_deepspeed_version()
        check_offload(recipe.engine)
        if newer := untested(version_of("deepspeed") or ""):
            log.warning("warning: %s", newer)
    for finding in check(recipe):
        log.warning("warning: %s", finding.message)
    data = open_data(recipe.data)
    recipe = resolve_vocab(recipe, data)
    samples, valid = open_samples(data, recipe)
    check_eps(recipe.optim, parameter_table(recipe.model, blocks=[0, recipe.model.num_blocks - 1]))
    device = choose_device(recipe.train.device, environment.local_rank)
    sizes = _sizes(recipe, environment)
    if sizes is not None:
        check_execution(recipe, sizes, device.type)
    if recipe.train.deterministic:
        set_deterministic(device)
    opened = Opened(recipe, data, samples, valid, device, sizes, environment, store)
    if sizes is not None and (idle := ranks_without_samples(recipe, sizes)):
        log.warning("warning: %s", idle)
    if sizes is not None and not opened.idles:
        first = environment.rank - environment.local_rank
        if environment.ranks_here is not None:
            check_memory(recipe, sizes, environment.ranks_here, device, first_rank=first)
    return opened


def _sizes(recipe: Recipe, environment: Environment) -> Sizes | None:
    """Mesh of the ranks that work; None where an elastic job has too few.

    Raises:
        ConfigError: the layout is impossible, in general or, unless nodes come and go, with this number of ranks.
    """
    num_ranks, parallel = environment.world_size, recipe.parallel
    if not environment.elastic:
        return check_layout(recipe, num_ranks)
    axes = {"pp": parallel.pp, "dp_replicate": parallel.dp_replicate, "dp_shard": parallel.dp_shard, "tp": parallel.tp}
    usable = usable_ranks(num_ranks, **axes)  # type: ignore[arg-type]
    least = parallel.pp * (parallel.dp_replicate or 1) * parallel.dp_shard * parallel.tp
    sizes = check_layout(recipe, usable or least)
    if not usable:
        log.warning("waiting for more nodes: %d ranks are here, the layout needs %d", num_ranks, least)
        return None
    if usable < num_ranks:
        log.warning("%d of %d ranks idle: the layout takes multiples of %d", num_ranks - usable, num_ranks, least)
    return sizes


def _check_restarts(environment: Environment) -> None:
    """Compare the number of restarts since the newest checkpoint with MAX_RESTARTS.

    Raises:
        TooManyRestartsError: ranks have died too often since it was written.
    """
    if environment.launcher is None or environment.max_restarts is None:
        return
    launcher = Launcher(environment.launcher)
    restarts = environment.attempt - (launcher.read("progress") or 0)
    if restarts > environment.max_restarts:
        raise TooManyRestartsError(
            f"ranks have died {restarts} times without a new checkpoint (MAX_RESTARTS={environment.max_restarts}); "
            "what ended the first of them stands above"
        )


def note_progress(environment: Environment, store: Store | None) -> None:
    """Note that this start of the ranks has written a checkpoint, from which MAX_RESTARTS counts anew.

    A month-long run may lose more ranks than that.
    """
    if environment.launcher is not None and environment.local_rank == 0:
        with suppress(OSError):  # a full /tmp: MAX_RESTARTS is not renewed, which is all that is lost
            Launcher(environment.launcher).write("progress", environment.attempt)
    if store is not None and environment.elastic and environment.rank == 0:
        with suppress(dist.DistError):
            store.set(PROGRESS, "")


_PLACES = ("data.path", "data.blend", "data.valid.", "data.tokenizer", "train.initial_weights")


def facts_of_start(recipe: Recipe) -> dict[str, str]:
    """Facts that must be equal on all ranks: settings by key, versions, and digests of the package's files."""
    versions = {}
    if recipe.engine.name == "deepspeed":
        versions["the version of deepspeed"] = version_of("deepspeed") or "none"
    settings = {key: json.dumps(value) for key, value in flat(recipe.model_dump(exclude_none=True)).items()}
    # A node may have its data elsewhere: their content is compared.
    own = {key: value for key, value in settings.items() if not key.startswith(_PLACES)}
    return facts_of_program() | versions | own | facts_of_package()


def facts_of_program() -> dict[str, str]:
    """Versions that must be equal on all ranks."""
    return {
        "the version of megaresnorm": megaresnorm.__version__,
        "the version of torch": str(torch.__version__),
        "the version of Python": platform.python_version(),
        "the version of numpy": numpy.__version__,
    }


def facts_of_data(opened: Opened) -> dict[str, str]:
    """Facts that must be equal on all ranks, of the data that the recipe was resolved against."""
    tokenizer = None if opened.data.tokenizer is None else opened.data.tokenizer.describe()
    valid = {f"the content of data.valid.{name}": one.digest for name, one in opened.data.valid.items()}
    return {"the content of the data": opened.data.digest, "the tokenizer of the data": json.dumps(tokenizer)} | valid


def facts_of_package() -> dict[str, str]:
    """Facts that must be equal on all ranks: digests of source files by path. One node may have an older file."""
    root = Path(megaresnorm.__file__).parent
    files = (path for path in sorted(root.rglob("*")) if path.suffix in (".py", ".c", ".h"))
    return {f"the file {path.relative_to(root.parent)}": sha256(path.read_bytes()).hexdigest()[:12] for path in files}


def _heard(rank: int) -> str:
    return f"{ENDED}/{rank}"


def idle(opened: Opened) -> int:
    """Wait, on a rank without work, for the end of the ranks that work.

    When nodes come or go, a signal ends the wait. A checkpoint of the others is noted as progress here, too.

    Returns:
        Exit code of the ranks that work.

    Raises:
        LostRankError: rank 0 is gone.
    """
    noted = opened.environment.launcher is None or opened.environment.local_rank > 0
    try:
        while opened.store is None or not opened.store.check([ENDED]):
            time.sleep(LOOK)
            if not noted and opened.store is not None and opened.store.check([PROGRESS]):
                note_progress(opened.environment, None)
                noted = True
        code = int(opened.store.get(ENDED))
        opened.store.set(_heard(opened.environment.rank), "")
        return code
    except dist.DistError as e:
        raise LostRankError(f"rank 0 is gone ({str(e).splitlines()[0]}); start again to go on") from None


@contextmanager
def tell_idle_ranks(opened: Opened) -> Iterator[Callable[[int], None]]:
    """Tell the idle ranks how the ranks that work have ended. If an error that all raise ends them, its code is told.

    Yields:
        A function that tells an exit code; only the first call counts.
    """
    said: list[int] = []

    def tell(code: int) -> None:
        if opened.store is not None and opened.environment.elastic and opened.environment.rank == 0 and not said:
            said.append(code)
            opened.store.set(ENDED, str(code))
            num_working = 0 if opened.sizes is None else opened.sizes.num_ranks
            idle_ranks = range(num_working, opened.environment.world_size)
            wait_until_heard(opened.store, [_heard(rank) for rank in idle_ranks])

    try:
        yield tell
    except UserError as e:
        if e.agreed:  # after another error the ranks are started again, the idle ones too
            tell(e.exit_code)
        raise

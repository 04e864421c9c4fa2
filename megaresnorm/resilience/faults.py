"""Drills: faults that are injected on purpose, to see that they are noticed, named and survived.

Nothing of a run knows of them: they are wrapped around single objects from outside, for single steps. They need the
recipe's ``drill``, and a variable that says the same, MEGARESNORM_DRILL=1.
"""

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megaresnorm.errors import ConfigError
from megaresnorm.files import open_plain
from megaresnorm.parallel.environment import DRILL, Environment
from megaresnorm.parallel.mesh import Axis, ParallelContext
from megaresnorm.parallel.sockets import cut_connections
from megaresnorm.recipe import DrillRecipe, FaultRecipe, Recipe
from megaresnorm.resilience.bad_files import BadFiles
from megaresnorm.resilience.bad_numbers import BadNumbers
from megaresnorm.telemetry.wrapped import Wrapped

_clock = time.time  # a drill may let that of the process jump
FOREVER = 10**6  # seconds
SLOWER, JUMP = 1.0, 3600.0  # seconds, where the recipe does not say


class Subject(NamedTuple):
    """What faults are injected into: parts of a run of this rank.

    Attributes:
        engine, loader, saver: see engines, data.loader and checkpoint.saver; their methods are wrapped.
        vocab_size: of the model.
    """

    context: ParallelContext
    engine: Any
    loader: Any
    saver: Any
    vocab_size: int


def check_drill(recipe: Recipe, environment: Environment) -> None:
    """Check that a drill is meant, and that its output folder holds no run that is none; nor that of a run a drill.

    Raises:
        ConfigError: only one of recipe and variable asks for a drill, a rank is none of the job's, or the folder holds
            a run of another kind.
    """
    drill = recipe.drill
    if (drill is not None) != environment.drill:
        have = f"the recipe has a drill, but {DRILL}=1 is not set" if drill else f"{DRILL}=1 is set without a drill"
        raise ConfigError(f"{have}; faults are injected only where recipe and variable agree: give both or neither")
    output = Path(recipe.train.output)
    if drill is None:
        if (output / Drill.FOLDER).is_dir():
            raise ConfigError(f"train.output={output} holds a drill; give a run that is none a folder of its own")
        return
    beyond = [fault.rank for fault in drill.faults if fault.rank >= environment.world_size]
    if beyond:
        raise ConfigError(f"drill: there is no rank {beyond[0]} among {environment.world_size}")
    if (output / "recipe.yaml").exists() and not (output / Drill.FOLDER).is_dir():
        raise ConfigError(f"train.output={output} holds a run that is no drill; give a drill a folder of its own")


class Drill:
    """The faults of one rank.

    Args:
        recipe: None: there are none, and nothing is wrapped.
        output: of the run; what was injected is written down there, so that it happens as often as asked for, however
            often the run starts.
        subject: None where there is no drill.
    """

    FOLDER = "drill"

    def __init__(self, recipe: DrillRecipe | None, output: Path, subject: Subject | None = None) -> None:
        self._faults: list[tuple[int, FaultRecipe]] = []
        if recipe is None or subject is None:
            return
        self._subject, self._rank = subject, subject.context.world.rank
        everywhere = ("spike",)
        self._faults = [
            (n, fault) for n, fault in enumerate(recipe.faults) if fault.rank == self._rank or fault.kind in everywhere
        ]
        (output / self.FOLDER).mkdir(parents=True, exist_ok=True)
        self._path = output / self.FOLDER / f"rank-{self._rank}.jsonl"
        self._numbers = BadNumbers(subject.engine, subject.context, recipe.seed)
        self._files = BadFiles(subject.saver, self._rank)

    @contextmanager
    def seen_in(self, step: int) -> Iterator[None]:
        """Inject the faults of the step that is made within.

        Args:
            step: counted from 1.
        """
        due = [(n, fault) for n, fault in self._faults if self._is_due(fault, step)]
        if not due:
            yield
            return
        with Wrapped() as wrapped, ExitStack() as stack:
            for number, fault in due:
                self._inject(number, fault, step, wrapped, stack)
            yield

    @staticmethod
    def _is_due(fault: FaultRecipe, step: int) -> bool:
        if fault.kind == "slow":
            return fault.step <= step < fault.step + fault.times
        early = fault.place == "loader"  # samples are read while the step before is made
        return step in (fault.step, fault.step - early)

    def _inject(self, number: int, fault: FaultRecipe, step: int, wrapped: Wrapped, stack: ExitStack) -> None:
        def fires() -> bool:
            return self._fires(number, fault, step)

        match fault.kind:
            case "kill" | "stop" | "hang":
                self._at_place(fault, wrapped, lambda: self._interrupt(fault) if fires() else None)
            case "slow":
                self._at_place(fault, wrapped, _once(fires, lambda: time.sleep(fault.seconds or SLOWER)))
            case "nan" | "flip":
                self._numbers.spoil(fault, step, fires, wrapped)
            case "spike":
                loader, vocab_size = self._subject.loader, self._subject.vocab_size
                wrapped.method(loader, "step", self._numbers.poisoned(step, vocab_size, fires))
            case "torn_write" | "no_space" | "io_error":
                self._files.spoil(fault, fires)
            case "cut":
                self._at_place(fault, wrapped, lambda: cut_connections() if fires() else None)
            case "clock":
                self._at_place(fault, wrapped, lambda: _jump(fault.seconds or JUMP) if fires() else None)

    def _fires(self, number: int, fault: FaultRecipe, step: int) -> bool:
        """Whether a fault is to happen once more; then it is written down, before it does."""
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        if sum(json.loads(line)["fault"] == number for line in lines) >= fault.times:
            return False
        about = {"fault": number, "kind": fault.kind, "place": fault.place, "step": step, "rank": self._rank}
        descriptor = open_plain(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(descriptor, (json.dumps(about | {"time": _clock()}) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return True

    def _at_place(self, fault: FaultRecipe, wrapped: Wrapped, happens: Callable[[], object]) -> None:
        """Let something happen where a step, or what goes on beside it, passes."""

        def before(method: Callable) -> Callable:
            def first(*arguments: Any, **options: Any) -> Any:
                happens()
                return method(*arguments, **options)

            return first

        subject = self._subject
        match fault.where:
            case "loader":
                wrapped.method(subject.loader, "_fill", before)
            case "collective":
                wrapped.value(self._axis, "transport", _Before(self._axis.transport, happens))
            case "save":  # which comes after the step: it stays wrapped
                subject.saver._check = before(subject.saver._check)
            case "forward":
                wrapped.method(subject.engine, "backward", before)
            case _:
                happens()

    @property
    def _axis(self) -> Axis:
        """On which collectives are met: where tensors are sharded, else where steps are summed up."""
        context = self._subject.context
        return context.tp if context.tp.size > 1 else context.world

    @staticmethod
    def _interrupt(fault: FaultRecipe) -> None:
        if fault.kind == "hang" and fault.place == "interpreter":
            while True:  # a signal that is heard ends one sleep
                ctypes.PyDLL(None).sleep(FOREVER)  # keeps the interpreter's lock, as a C extension may
        elif fault.kind == "hang":
            time.sleep(FOREVER)
        else:
            os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)


def _once(fires: Callable[[], bool], work: Callable[[], None]) -> Callable[[], None]:
    """Do some work the first time that a step comes here, if the fault fires."""
    left = [True]

    def first() -> None:
        if left and left.pop() and fires():
            work()

    return first


def _jump(seconds: float) -> None:
    """Set this process's clock forward, as a correction by ntpd would: what time.time gives, not the monotonic one."""
    before = time.time
    time.time = lambda: before() + seconds


class _Before:
    """A transport, before whose collectives something happens."""

    def __init__(self, transport: Any, happens: Callable[[], object]) -> None:
        self._transport, self._happens = transport, happens

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._transport, name)

        def first(*arguments: Any, **options: Any) -> Any:
            self._happens()
            return method(*arguments, **options)

        return first

"""A training process from its recipe to its exit code, as every rank of a job runs it.

The command line calls it, and it needs none itself: ``python -m megaresnorm.job RECIPE [section.key=value ...]``.
"""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from megaresnorm.errors import ConfigError, LostRankError, StoppedError, TooManyRestartsError, UserError
from megaresnorm.parallel.environment import Environment, host_name, read_environment, share_cores
from megaresnorm.resilience.following import BACKUP, UNKNOWN
from megaresnorm.resilience.host import available_cores
from megaresnorm.resilience.launcher import Failure, Launcher, end_with
from megaresnorm.resilience.rank_logs import write_to_log
from megaresnorm.resilience.signals import StopSignals, Terminated, end_on_purpose
from megaresnorm.resilience.torchrun import raise_limits
from megaresnorm.resilience.watchdog import Watchdog
from megaresnorm.text import prepare_streams, say, shown

if TYPE_CHECKING:
    from megaresnorm.opening import Opened
    from megaresnorm.recipe import Recipe


def run_job(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    fallback: bool = True,
    full: bool = False,
    adjust: "Callable[[Recipe], Recipe]" = lambda recipe: recipe,
    work: "Callable[[Opened, StopSignals], int] | None" = None,
) -> int:
    """Train the run of a recipe, as one rank of however many, and say what it does.

    Args:
        recipe: a recipe's file.
        overrides: of the form section.key=value.
        fallback: whether a damaged newest checkpoint may be passed over for an older one.
        full: print every setting, rather than those that differ from the defaults.
        adjust: changes the recipe that was read.
        work: done with the opened recipe in the place of training, on the ranks that have a place in its layout;
            returns the exit code.

    Returns:
        The exit code, in a job of one rank. One of several ends its process with it here (``os._exit``).

    Raises:
        UserError: one line.
    """
    loaded: list[Recipe] = []

    def train(environment: Environment, stop: StopSignals, watchdog: Watchdog) -> int:
        def load() -> "Recipe":
            from megaresnorm.recipe.load import load_recipe

            loaded.append(adjust(load_recipe(recipe, overrides)))
            watchdog.obey(loaded[0].watchdog)
            return loaded[0]

        return _work(load, environment, stop, work or partial(_train, fallback=fallback, full=full), watchdog)

    return run_rank(train, lambda: loaded[0].watchdog.model_dump() if loaded else {})


def run_rank(
    work: Callable[[Environment, StopSignals, Watchdog], int],
    time_outs: Callable[[], Mapping[str, int | None]] = dict,
) -> int:
    """Do what a job is there for as one of its ranks, which hears signals, has a log, and ends with its launcher.

    Args:
        work: what all ranks do; returns the exit code.
        time_outs: seconds that ranks wait for each other by the setting's name, for the line on one that is silent.

    Returns:
        The exit code, in a job of one rank. One of several ends its process with it here (``os._exit``): nothing of
        its caller is done any more, be it a ``finally``.

    Raises:
        UserError: one line.
    """
    from megaresnorm.telemetry.log import configure_logging, console

    environment = read_environment()
    launcher = None if environment.launcher is None else Launcher(environment.launcher)
    if launcher is not None:
        launcher.introduce(environment.rank, environment.local_rank, environment.attempt)
    if environment.has_parent:
        end_with(os.getppid(), launcher)
        raise_limits()
        if launcher is None and environment.world_size > 1:  # else the supervisor has done so
            share_cores(available_cores(), environment.ranks_here)
    write_to_log(environment)
    configure_logging(environment.rank)
    console.quiet = environment.rank > 0
    watchdog = Watchdog(environment, whole=True)
    with closing(watchdog), StopSignals(environment) as stop:  # before torch is imported, which takes seconds
        from megaresnorm.parallel.mesh import end_process_group, lost_contact

        try:
            exit_code = work(environment, stop, watchdog)
        except RuntimeError as e:
            reason = lost_contact(e)
            if reason is None:
                raise
            why = _why_lost(reason, time_outs())
            raise LostRankError(f"another rank {why}; start again to go on from the newest checkpoint") from None
    end_process_group()
    code = end_on_purpose(exit_code, environment)
    if environment.world_size > 1:
        _leave(code)
    return code


def _is_in_group() -> bool:
    """Whether this process is in a process group of torch, which may not have been imported."""
    torch = sys.modules.get("torch.distributed")
    return torch is not None and torch.is_available() and torch.is_initialized()


def _leave(code: int) -> None:
    """End this rank now: threads of torch may outlive the group, and abort the interpreter at its end."""
    with suppress(OSError):  # a full disk under the log, or a reader that went away
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _work(
    load: "Callable[[], Recipe]",
    environment: Environment,
    stop: StopSignals,
    work: "Callable[[Opened, StopSignals], int]",
    watchdog: Watchdog,
) -> int:
    from megaresnorm.opening import idle, open_recipe, tell_idle_ranks

    opened = replace(open_recipe(load, environment), watchdog=watchdog)
    if opened.idles:
        watchdog.rest()
        return idle(opened)
    with tell_idle_ranks(opened) as tell:
        code = work(opened, stop)
        tell(code)
    return code


def _train(opened: "Opened", stop: StopSignals, *, fallback: bool, full: bool) -> int:
    from megaresnorm.generate import sample_text
    from megaresnorm.run import Run
    from megaresnorm.telemetry.log import console, log_lines
    from megaresnorm.trainer import Trainer

    with Run(opened, fallback=fallback) as run:
        if run.is_finished:
            return 0
        log_lines(run.describe(full=full))
        summary = Trainer(run).train(stop)
        text = None
        if not summary.exit_code and run.context.world.size == 1:
            text = sample_text(run.engine.model, run.data.tokenizer, run.recipe.train)
    if text is not None:
        console.print(f"\n--- sample ---\n{text}\n--------------\n", markup=False)
    log_lines(summary.describe())
    return summary.exit_code


def _why_lost(reason: str, watchdog: Mapping[str, int | None]) -> str:
    """What is said of a rank that cannot be reached.

    Args:
        reason: torch's, which has no names of settings, but the milliseconds of a time-out.
        watchdog: seconds by setting; process groups wait for ``BACKUP`` longer.

    >>> _why_lost("Timed out waiting 605000ms for recv operation to complete", {"start": 1800, "step": 600})
    'was silent for 605 s (watchdog.step=600)'
    >>> _why_lost("Connection closed by peer [::1]:5", {"start": 1800, "step": 600})
    'is gone (Connection closed by peer [::1]:5)'
    """
    if re.search("tim(ed|e)? ?-?out", reason, re.IGNORECASE) is None:
        return f"is gone ({reason})"
    found = re.search(r"(\d+) ?ms|\(ms\)=(\d+)\b", reason)
    seconds = 0.0 if found is None else int(found[1] or found[2]) / 1000
    values = {name: UNKNOWN if value is None else value for name, value in watchdog.items()}
    named = [f"watchdog.{name}={value:.6g}" for name, value in values.items() if abs(value + BACKUP - seconds) < 0.5]
    return f"was silent for {seconds:.6g} s ({', '.join(named)})" if named else f"was silent for too long ({reason})"


def exit_code_of(work: Callable[[], int]) -> int:
    """Do some work of a command. Errors that the user can cause are one line on stderr.

    Returns:
        The work's exit code, or that of its error.
    """
    try:
        code = work()
        sys.stdout.flush()
        return code
    except UserError as e:
        environment = _environment()
        if environment.rank == 0 or not e.agreed:
            kind = "" if isinstance(e, StoppedError) else "error: "
            rank = "" if environment.rank == 0 else f"rank {environment.rank}: "
            say(f"megaresnorm: {kind}{rank}{e}", error=True)
        code = _code_of(e, environment)
        if not e.agreed and not isinstance(e, LostRankError):
            _note_failure(str(e), e.exit_code, environment)
        if environment.world_size > 1 and environment.has_parent and _is_in_group():
            _leave(code)
        return code
    except KeyboardInterrupt as e:
        say("megaresnorm: stopped", error=True)
        return 128 + (signal.SIGTERM if isinstance(e, Terminated) else signal.SIGINT)
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as e:
        if e.errno != errno.ENOSPC or e.filename is not None:
            raise
        _discard_output()
        say(f"megaresnorm: error: the output cannot be written ({e.strerror})", error=True)
        return 1
    except Exception as e:
        _note_failure(f"{type(e).__name__}: {e}", 1, _environment())
        raise


def _note_failure(line: str, exit_code: int, environment: Environment) -> None:
    """Tell the supervisor why this rank fails, which it says once more behind the errors that this one causes."""
    if environment.launcher is None:
        return
    failure = Failure(environment.rank, host_name(), shown(line), exit_code)
    with suppress(OSError):
        Launcher(environment.launcher).note_failure(failure, environment.attempt)


def _discard_output() -> None:
    """Let what is still to be printed go nowhere: Python would try once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _environment() -> Environment:
    """This process's environment; that of one rank if its variables are wrong, which is then the error printed."""
    try:
        return read_environment()
    except ConfigError:
        return Environment()


def _code_of(error: UserError, environment: Environment) -> int:
    """The exit code for an error. One that other ranks may not have must end them too: they may wait for this rank."""
    if isinstance(error, LostRankError) and not isinstance(error, TooManyRestartsError):
        return error.exit_code
    code = end_on_purpose(error.exit_code, environment)
    return code if error.agreed or environment.world_size == 1 else error.exit_code


def main(argv: Sequence[str]) -> int:
    """Train as ``python -m megaresnorm.job`` does.

    Args:
        argv: a recipe's file, then overrides.

    Returns:
        The exit code.
    """

    def work() -> int:
        words = [word for word in argv if not word.startswith("--local_rank=")]  # which DeepSpeed's launcher adds
        if not words or words[0].startswith("-"):
            raise ConfigError("usage: python -m megaresnorm.job RECIPE [section.key=value ...]")
        return run_job(words[0], words[1:])

    prepare_streams()
    return exit_code_of(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The megaresnorm command: parses arguments, calls the library, prints."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from io import TextIOWrapper
from types import FrameType
from typing import NoReturn

from megaresnorm.cli.checkpoint import add_checkpoint
from megaresnorm.cli.convert import add_convert
from megaresnorm.cli.data import add_data, add_prepare
from megaresnorm.cli.depth import add_depth
from megaresnorm.cli.doctor import add_doctor
from megaresnorm.cli.generate import add_generate
from megaresnorm.cli.train import add_schema, add_train
from megaresnorm.errors import ConfigError, LostRankError, StoppedError, TooManyRestartsError, UserError
from megaresnorm.parallel.environment import Environment, read_environment
from megaresnorm.resilience.signals import end_on_purpose
from megaresnorm.text import OneLine, say, shown

EPILOG = (
    "exit codes: 0 done, 1 unexpected, 2 bad recipe or arguments, 3 bad data, 4 bad checkpoint, "
    "5 the run cannot go on,\n"
    "6 another rank is gone, 7 a converted model differs, 124 train.max_minutes are over, "
    "130 stopped by Ctrl-C, 138 by SIGUSR1\n"
    "and 143 by SIGTERM, with a checkpoint saved"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Errors that the user can cause are one line on stderr.

    Args:
        argv: arguments without the program's name; None for those of this process.

    Returns:
        The exit code.
    """
    _prepare_streams()
    try:
        arguments = _parser().parse_args(argv)
        with _sigterm_is_raised() if getattr(arguments, "undone", False) else nullcontext():
            return arguments.run(arguments)
    except UserError as e:
        environment = _environment()
        if environment.rank == 0 or not e.agreed:
            kind = "" if isinstance(e, StoppedError) else "error: "
            rank = "" if environment.rank == 0 else f"rank {environment.rank}: "
            say(f"megaresnorm: {kind}{rank}{e}", error=True)
        return _code_of(e, environment)
    except KeyboardInterrupt as e:
        say("megaresnorm: stopped", error=True)
        return 128 + (signal.SIGTERM if isinstance(e, _Terminated) else signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing else hears it: what has begun is undone, as after Ctrl-C."""


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


@contextmanager
def _sigterm_is_raised() -> Iterator[None]:
    """Raise _Terminated on SIGTERM, in commands that undo what they have begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(shown(message))


class _WarningsOnStderr(logging.Handler):
    """Prints the warnings of commands that do not configure logging."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), error=True)


def _prepare_streams() -> None:
    """Escape characters that the terminal's encoding lacks, and print each warning as a line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logger = logging.getLogger("megaresnorm")
    if not logger.handlers:
        handler = _WarningsOnStderr(logging.WARNING)
        handler.setFormatter(OneLine())
        logger.addHandler(handler)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="megaresnorm",
        description="Pretraining of transformers hundreds of layers deep.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        add_train,
        add_prepare,
        add_data,
        add_checkpoint,
        add_convert,
        add_generate,
        add_depth,
        add_doctor,
        add_schema,
    ):
        add(commands)
    return parser

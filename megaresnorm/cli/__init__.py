"""The megaresnorm command: reads arguments, calls the library, prints."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command

import megaresnorm
from megaresnorm.cli import (
    checkpoint,
    convert,
    data,
    depth,
    doctor,
    drill,
    generate,
    launch,
    profile,
    quantize,
    recipes,
    report,
    train,
)
from megaresnorm.cli.arguments import new_app
from megaresnorm.errors import ConfigError
from megaresnorm.job import exit_code_of
from megaresnorm.launch.words import decoded
from megaresnorm.text import prepare_streams, say, write

PROGRAM = "megaresnorm"
LONGEST = 300  # characters of what is wrong with an argument
COMPLETE = "_MEGARESNORM_COMPLETE"  # set by the scripts that --install-completion writes
UsageError: Any = typer.BadParameter.__base__  # what Typer raises for arguments that it cannot use
EPILOG = """\b
exit codes: 0 done, 1 unexpected, 2 bad recipe or arguments, 3 bad data, 4 bad checkpoint, 5 the run cannot go on,
6 another rank is gone, 7 a converted model differs, 124 train.max_minutes are over, 130 stopped by Ctrl-C,
138 by SIGUSR1 and 143 by SIGTERM, with a checkpoint saved"""


def _print_version(asked: bool) -> None:
    if asked:
        say(f"megaresnorm {megaresnorm.__version__}")
        raise typer.Exit


app = new_app()


@app.callback(epilog=EPILOG)
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Pretraining of transformers hundreds of layers deep."""


train.add_to(app)
profile.add_to(app)
data.add_to(app)
checkpoint.add_to(app)
convert.add_to(app)
generate.add_to(app)
depth.add_to(app)
quantize.add_to(app)
report.add_to(app)
launch.add_to(app)
doctor.add_to(app)
drill.add_to(app)
recipes.add_to(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Errors that the user can cause are one line on stderr.

    Args:
        argv: arguments without the program's name; None for those of this process.

    Returns:
        The exit code.
    """
    prepare_streams()
    return exit_code_of(lambda: _run(sys.argv[1:] if argv is None else [str(one) for one in argv]))


def _run(argv: list[str]) -> int:
    command = get_command(app)
    argv = decoded(argv) if argv[:1] == ["launch"] else argv
    if COMPLETE in os.environ:
        return command.main(argv, PROGRAM, standalone_mode=False)
    try:
        with command.make_context(PROGRAM, argv) as context:
            return command.invoke(context) or 0
    except typer.Exit as e:
        return e.exit_code
    except UsageError as e:
        if type(e).__name__ == "NoArgsIsHelpError":
            write(e.ctx.get_help() + "\n")
            return 0
        raise ConfigError(_one_line(e)) from None


def _one_line(error: Any) -> str:
    """What is wrong with the arguments, and where their description is."""
    command = error.ctx.command_path if error.ctx is not None else PROGRAM
    option = getattr(error, "option_name", None)
    takes_settings = command in (f"{PROGRAM} train", f"{PROGRAM} depth", f"{PROGRAM} launch")
    if takes_settings and option is not None and "requires" not in error.format_message():
        from megaresnorm.recipe.explain import meant_by_option

        found = meant_by_option(option)
        if found is not None:
            return f"{option}: {found}"
    text = re.sub(r"^Invalid value for '?(.*?)'?: (Value error, )?", r"\1: ", error.format_message())
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
    return f"{text.rstrip('.')}; see {command} --help"

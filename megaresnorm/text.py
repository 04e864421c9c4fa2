"""Display of strings that come from elsewhere: names, keys, paths, values of files, messages of other packages.

Whatever is in them, they stay within their line, do not move the cursor, and read in the order in which they are
stored.
"""

import logging
import os
import re
import sys
from io import TextIOWrapper

# C0, DEL and C1 controls, line and paragraph separators, characters that change the direction of writing (embeddings,
# overrides, isolates), and halves of surrogate pairs, which stand for bytes that are not UTF-8. Marks and joiners that
# scripts need stay.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_CONTROLS_WITHIN_LINES = re.compile(_CONTROLS.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
LONGEST = 2000  # characters of one line: more than any line of ours has, and few enough to be read


def shown(text: object, *, lines: bool = False) -> str:
    r"""A string with its control characters written out, in one line. The middle of a very long one is left out.

    Args:
        text: converted by ``str``.
        lines: keep line breaks and tabs, and any length: for text that is printed on several lines on purpose.

    >>> shown("runs/a\nstep 99/100\x1b[2J")
    'runs/a\\nstep 99/100\\x1b[2J'
    """
    text = str(text)
    if lines:
        return _CONTROLS_WITHIN_LINES.sub(_written_out, text)
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return _CONTROLS.sub(_written_out, text)


def say(line: object, *, error: bool = False) -> None:
    """Print one line on stdout, or on stderr for an ``error``."""
    stream = sys.stderr if error else sys.stdout
    stream.write(f"{shown(line)}\n")


def write(text: str) -> None:
    """Print text of several lines, such as a model's: as it is into a file or a pipe, as ``shown`` on a terminal."""
    sys.stdout.write(shown(text, lines=True) if sys.stdout.isatty() else text)
    sys.stdout.flush()


class OneLine(logging.Formatter):
    """A log record is one line, whatever its arguments hold."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, also with a traceback."""
        return shown(super().format(record))


class _WarningsOnStderr(logging.Handler):
    """Prints the warnings of commands that do not configure logging."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), error=True)


def prepare_streams() -> None:
    """Escape characters that the terminal's encoding lacks, and print each warning as a line on stderr.

    A stream that is closed is replaced by one that goes nowhere.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logger = logging.getLogger("megaresnorm")
    if not logger.handlers:
        handler = _WarningsOnStderr(logging.WARNING)
        handler.setFormatter(OneLine())
        logger.addHandler(handler)


def _written_out(character: re.Match[str]) -> str:
    return character[0].encode("unicode_escape").decode()

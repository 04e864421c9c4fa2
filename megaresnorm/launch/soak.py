"""A run under the launcher, watched from outside, and started again by hand where the launcher has given it up."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from megaresnorm.parallel.environment import DRILL
from megaresnorm.resilience.drill_table import Line
from megaresnorm.text import say, shown

BY_HAND = 5  # starts after errors that a person would look at: data that cannot be read
PATIENCE = 90.0  # seconds that the launcher has to end once it was asked to
RESTARTS = 100_000  # that the launcher may make by itself
TOLD = re.compile(r"warning: |error: |hangs in|hangs while|started again|^rollback|^resumed|^weights ")


class Soak:
    """One recipe on ranks of this host.

    Args:
        recipe: its file.
        ranks: how many.
        log: file for all that is printed.
        drill: whether faults are to be injected.

    Attributes:
        lines: what it printed, each with the time.
        starts: how often it was started from here.
    """

    def __init__(self, recipe: Path, ranks: int, log: Path, *, drill: bool) -> None:
        own = [f"{DRILL}=1"] if drill else ["-u", DRILL]
        launch = [sys.executable, "-m", "megaresnorm", "launch", str(recipe), "--ranks-per-node", str(ranks)]
        # Attached: it ends in order where this process is gone.
        self._command = ["env", *own, *launch, "--max-restarts", str(RESTARTS), "--attached"]
        self._log, self._drill = log, drill
        self.lines: list[Line] = []
        self.starts = 0

    def run(self) -> int:
        """Run it to its end; the exit code of the last start."""
        code = 1
        with self._log.open("w") as file:
            while code and self.starts < (BY_HAND if self._drill else 1):
                self.starts += 1
                code = self._start(file)
                if code >= 128:  # a person has ended it
                    break
        return code

    def _start(self, file: TextIO) -> int:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,  # Ctrl-C in a terminal reaches this process alone, which passes it on
        )
        try:
            reader = threading.Thread(target=self._read, args=(process.stdout, file), daemon=True)
            reader.start()
            code = process.wait()
        except BaseException:
            _end(process)
            raise
        reader.join(2.0)
        return code if code >= 0 else 128 - code

    def _read(self, stream: Sequence[bytes], file: TextIO) -> None:
        for raw in stream:
            text = shown(raw.decode(errors="backslashreplace").rstrip("\r\n"))
            self.lines.append((time.time(), text))
            file.write(f"{self.lines[-1][0]:.3f} {text}\n")
            file.flush()
            if TOLD.search(text):
                say(f"  {text}")


def _end(process: subprocess.Popen) -> None:
    """End a launcher: it saves and ends by itself, or, after ``PATIENCE`` or on a second signal, at once.

    Its ranks end with it.
    """
    process.terminate()
    try:
        process.wait(PATIENCE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        process.wait()

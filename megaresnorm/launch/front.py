"""The process of the terminal from which a job is submitted: it runs the commands that start the nodes, to their end.

Lines of all nodes are printed as they come, and the first error of a rank once more as the last line. A signal is told
to every node, whose supervisor saves a checkpoint; a second one ends them at once. Where one node has ended with an
error, the others are ended. Nothing is left running, also where this process is killed: the commands run in a child
process that watches it.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from megaresnorm.resilience.hearing import Hearing
from megaresnorm.resilience.launcher import SIGNALS, end_with, kill
from megaresnorm.resilience.signals import TIME_IS_UP
from megaresnorm.text import say, shown

FIRST_ERROR = re.compile(r"megaresnorm: error: (rank \d+ on \S+: .*)")
SAYS_WHOSE = re.compile(r"megaresnorm: error: rank \d+ on |\[rank \d+ on ")  # starts of lines that need no label
LABEL = re.compile(r"\S+: ")
ON_PURPOSE = (0, TIME_IS_UP, *(128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)))
OURS = range(2, 8)  # exit codes of errors that a user can cause
OTHERS = 30.0  # seconds that other nodes have to end once one has, on purpose
OTHERS_FAILED = 4.0  # the same once one has failed; then they are told again, which ends them at once
AT_ONCE = 3.0  # seconds from being told a second time to being killed


@dataclass
class Part:
    """A command that starts one node, or all.

    Attributes:
        words: of the command; no shell reads them.
        label: stands before each line that it prints; empty for none.
        labels: what its program itself puts before lines of each node; those of node 0 are printed without it.
        variables: environment variables besides those of this process.
    """

    words: Sequence[str]
    label: str = ""
    labels: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)

    def labelled(self, line: str) -> str:
        """A line as it is shown: with a label unless it is of rank 0's node, or says itself whose it is."""
        label, rest = self.label, line
        if (found := LABEL.match(line)) and found[0] in self.labels:
            label, rest = "" if found[0] == self.labels[0] else found[0], line[found.end() :]
        return rest if SAYS_WHOSE.match(rest) else label + rest


# Called in a thread of its own, and may last as long as the processes.
Tell = Callable[[Sequence["subprocess.Popen[bytes]"], signal.Signals], None]


class Front:
    """Runs the parts of a job.

    Args:
        parts: started at once.
        tell: passes a signal on to the nodes; given the running processes and the signal.
    """

    def __init__(self, parts: Sequence[Part], tell: Tell) -> None:
        self._parts, self._tell = parts, tell
        self._first_error = ""
        self._last_line = ""
        self._has_printed = False
        self._told = 0  # how often the nodes were told to end
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def run(self) -> int:
        """Run the job to its end.

        Returns:
            128 + the signal that ended it, unless all parts have ended well or one has failed by itself; else the exit
            code of the first part that has failed, or 0.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until each of the two processes hears them
        child = os.fork()
        if child:
            return _wait_for(child)
        code = 1
        try:
            os.setsid()  # Ctrl-C in a terminal reaches the parent alone, which passes it on
            end_with(parent, None, first=self._kill_all)
            code = self._run()
            sys.stdout.flush()
            sys.stderr.flush()
        except Exception:  # noqa: BLE001 - of a forked process, which must not go on in its parent's place
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)

    def _run(self) -> int:
        hearing = Hearing(self._pass_on)
        readers = []
        try:
            for part in self._parts:
                if hearing.stop:
                    break
                process = subprocess.Popen(
                    part.words,
                    env=os.environ | part.variables,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self._processes.append(process)
                readers.append(threading.Thread(target=self._read, args=(process, part), daemon=True))
                readers[-1].start()
            if hearing.stop:
                self._terminate()  # also those that it was not passed on to
            failed = self._wait(hearing)
        except OSError as e:
            say(f"megaresnorm: error: {part.words[0]} cannot be started ({e.strerror})", error=True)
            failed = 1
        finally:
            self._kill_all()
            for reader in readers:
                reader.join(2.0)  # what a process that was left behind holds open is not waited for
        # A run that was at its end anyway is no stop, nor is, say, a checkpoint that could not be saved.
        well = bool(self._processes) and all(process.poll() == 0 for process in self._processes)
        stopped = hearing.stop and not well and failed not in OURS
        if failed and self._first_error and not stopped and self._first_error not in self._last_line:
            say(f"megaresnorm: error: {self._first_error}", error=True)
        return hearing.stop if stopped else failed

    def _wait(self, hearing: Hearing) -> int:
        """Wait until all parts have ended, or are to be ended; the exit code of the first that has failed, or 0."""
        failed, until = 0, float("inf")
        while any(process.poll() is None for process in self._processes):
            hearing.sleep(0.1)
            if hearing.again and self._told < 2:
                self._tell_again(signal.Signals(hearing.stop - 128))
                until = time.monotonic() + AT_ONCE
            codes = [code for process in self._processes if (code := process.poll()) is not None]
            failed = failed or next((_positive(code) for code in codes if code), 0)
            if codes and until == float("inf") and any(codes):
                until = time.monotonic() + (OTHERS if failed in ON_PURPOSE else OTHERS_FAILED)
                if failed not in ON_PURPOSE:
                    self._pass_on(signal.SIGTERM)
            if time.monotonic() > until:
                if self._told >= 2:
                    break
                self._tell_again(signal.SIGTERM)
                until = time.monotonic() + AT_ONCE
        codes = [process.returncode for process in self._processes if process.returncode is not None]
        return failed or next((_positive(code) for code in codes if code), 0)

    def _pass_on(self, number: signal.Signals) -> None:
        self._told += 1
        if not self._has_printed:  # then no node has begun, and a launcher that is starting them may not pass it on
            self._terminate()
            return
        running = [process for process in self._processes if process.poll() is None]
        threading.Thread(target=self._tell, args=(running, number), daemon=True).start()

    def _tell_again(self, number: signal.Signals) -> None:
        while self._told < 2:
            self._pass_on(number)

    def _read(self, process: "subprocess.Popen[bytes]", part: Part) -> None:
        assert process.stdout is not None
        for raw in process.stdout:
            line = part.labelled(shown(raw.decode(errors="backslashreplace").rstrip("\r\n")))
            with self._lock:
                self._last_line, self._has_printed = line, True
                if found := FIRST_ERROR.search(line):
                    self._first_error = self._first_error or found[1]
                self._print(line)

    def _print(self, line: str) -> None:
        """Print a line; where the reader has gone away, or a disk is full, the job goes on without it."""
        try:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def _terminate(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()

    def _kill_all(self) -> None:
        """End what this process has started: each part, and what has stayed in its session."""
        self._terminate()
        end = time.monotonic() + 1.0
        while time.monotonic() < end and any(process.poll() is None for process in self._processes):
            time.sleep(0.05)
        for process in self._processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def _positive(code: int) -> int:
    return code if code >= 0 else 128 - code


def _wait_for(child: int) -> int:
    """Pass signals on to the child process, and return its exit code."""
    hearing = Hearing(lambda number: kill(child, number))
    passed_again = False
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return _positive(os.waitstatus_to_exitcode(status))
        hearing.sleep(0.1)
        if hearing.again and not passed_again:
            passed_again = True
            kill(child, signal.Signals(hearing.stop - 128))


def tell_by_signal(running: Sequence["subprocess.Popen[bytes]"], number: signal.Signals) -> None:
    """Tell the nodes through a launcher that passes SIGUSR1 on to them, and takes other signals as its own end."""
    for process in running:
        kill(process.pid, signal.SIGUSR1)

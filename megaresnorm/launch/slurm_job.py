"""A batch job of Slurm from the terminal that submits it: its number, and with --wait its log and its exit code."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megaresnorm.errors import UserError
from megaresnorm.launch.front import FIRST_ERROR
from megaresnorm.resilience.hearing import Hearing
from megaresnorm.text import say

ASK = 3.0  # seconds between two questions to Slurm's controller
ASK_SOON = 1.0  # the same once a rank has failed
LOOK = 0.3  # seconds between two looks at the log
LATE = 5.0  # seconds that a file server may take to show the end of a log
PATIENCE = 600.0  # seconds in which Slurm may not answer: its controller is being restarted
NOT_YET = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")


def submit_job(script: str, *, wait: bool) -> int:
    """Give a script to sbatch, and say the job's number and where its log is.

    Args:
        wait: stay until its end.

    Returns:
        sbatch's exit code; with ``wait`` that of the job.
    """
    hearing = _hears() if wait else None
    done = subprocess.run(["sbatch", "--parsable"], input=script, stdout=subprocess.PIPE, text=True, check=False)
    number, _, cluster = (done.stdout.strip().splitlines() or [""])[-1].partition(";")
    if done.returncode or not number.isdecimal():
        say(f"megaresnorm: error: sbatch has not taken the job: {done.stdout.strip()}", error=True)
        return done.returncode or 1
    job = Job(number, ["--cluster", cluster] if cluster else [])
    log = job.log()
    say(f"job {number} is submitted; its log is {log or 'where sbatch puts it'}")
    if hearing is not None:
        return Wait(job, log, hearing).run()
    say(f"scancel --signal=TERM {number} saves and ends it, scancel {number} ends it, squeue --job {number} shows it")
    return 0


def _hears() -> Hearing:
    """Hear signals from here on: what comes while sbatch runs counts. A terminal that is closed still ends this."""
    ends = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # as nohup has set it
    hearing = Hearing(lambda number: None)
    if ends:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    return hearing


class Job:
    """A job that Slurm has taken.

    Args:
        number: of the job.
        where: options of Slurm's commands that name its cluster.
    """

    def __init__(self, number: str, where: Sequence[str] = ()) -> None:
        self.number, self._where = number, where

    def facts(self) -> dict[str, str] | None:
        """What Slurm says of it, by name; None where it does not answer, empty where it knows no such job any more."""
        command = ["scontrol", *self._where, "show", "job", "-o", self.number]
        try:
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode == 0:
            return facts_of(done.stdout)
        return {} if "Invalid job id" in done.stderr else None

    def log(self) -> Path | None:
        """Its log; None where Slurm does not say."""
        facts = self.facts() or {}
        path = facts.get("StdOut")
        if not path:
            return None
        for pattern, value in {"%j": self.number, "%A": self.number, "%x": facts.get("JobName", "%x")}.items():
            path = path.replace(pattern, value)  # some versions of Slurm show it as it was asked for
        return Path(path)

    def has_tasks(self) -> bool:
        """Whether srun has started some; the shell of the script is none. True where Slurm does not answer."""
        command = ["squeue", *self._where, "--steps", "--noheader", "--format=%i", f"--jobs={self.number}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return True
        return done.returncode != 0 or re.search(r"\.\d+\s*$", done.stdout, re.MULTILINE) is not None

    def cancel(self, *options: str) -> None:
        """Call scancel, which ends the job, or sends its tasks a signal."""
        command = ["scancel", *self._where, *options, self.number]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def facts_of(line: str) -> dict[str, str]:
    """The facts in a line of scontrol, the values of which may have spaces.

    >>> facts_of("JobId=7 JobName=a JobState=RUNNING StdOut=/my runs/a-7.log Power=")["StdOut"]
    '/my runs/a-7.log'
    """
    return dict(re.findall(r"(?:^|\s)([A-Z][A-Za-z:/]*)=(.*?)(?=\s+[A-Z][A-Za-z:/]*=|\s*$)", line.strip()))


def exit_code_of(facts: Mapping[str, str]) -> int | None:
    """The exit code of a job that has ended for good; None while it has not.

    >>> exit_code_of({"JobState": "FAILED", "ExitCode": "3:0"}), exit_code_of({"JobState": "RUNNING"})
    (3, None)
    >>> exit_code_of({"JobState": "CANCELLED", "ExitCode": "0:15"}), exit_code_of({"JobState": "TIMEOUT"})
    (143, 1)
    """
    state = facts.get("JobState", "")
    if state in (*NOT_YET, *RUNNING, ""):
        return None
    code, _, number = facts.get("ExitCode", "").partition(":")
    if int(code or 0):
        return int(code)
    if int(number or 0):
        return 128 + int(number)
    return 0 if state == "COMPLETED" else 1


class Wait:
    """Waits for the end of a job, also through turns in which it is queued again, and prints what its log gets.

    The first SIGTERM or Ctrl-C saves a checkpoint and ends the job; one that has not begun is cancelled. SIGUSR1 saves
    and lets it wait for its next turn. A second signal cancels it. A terminal that is closed ends this alone.

    Args:
        log: its file; None where that is not known.
        hearing: of signals to this process.
    """

    def __init__(self, job: Job, log: Path | None, hearing: Hearing) -> None:
        self._job, self._log, self._hearing = job, log, hearing
        self._read, self._rest = 0, b""
        self._first_error = self._last_line = ""
        self._state, self._told = "", 0

    def run(self) -> int:
        """The exit code of the job."""
        asked, heard, turns = 0.0, time.monotonic(), "0"
        code: int | None = None
        while code is None:
            sys.stdout.flush()
            self._hearing.sleep(LOOK)
            self._show_log()
            self._obey()
            now = time.monotonic()
            if now < asked + (ASK_SOON if self._first_error else ASK):
                continue
            asked, facts = now, self._job.facts()
            if facts is not None:
                heard = now
                self._state = facts.get("JobState", "")
                if facts.get("Restarts", turns) != turns:
                    turns, self._first_error = facts["Restarts"], ""
                code = exit_code_of(facts) if facts else 1
            if facts == {} or now > heard + PATIENCE:
                raise UserError(
                    f"Slurm does not tell any more what became of job {self._job.number}; see its log, {self._log}"
                )
        return self._end(code)

    def _obey(self) -> None:
        if self._hearing.stop and self._told == 0:
            self._told = 1
            saves = self._job.has_tasks()
            signal_name = "USR1" if self._hearing.stop == 128 + signal.SIGUSR1 else "TERM"
            self._job.cancel(*([f"--signal={signal_name}"] if saves else []))
        if self._hearing.again and self._told == 1:
            self._told = 2
            self._job.cancel()

    def _end(self, code: int) -> int:
        """Print the rest of the log, and last the first error of a rank."""
        end = time.monotonic() + LATE
        while self._show_log() or (code and not self._last_line and time.monotonic() < end):
            time.sleep(LOOK)
        if self._rest:
            self._show(self._rest)
        if code and self._first_error and self._first_error not in self._last_line:
            say(f"megaresnorm: error: {self._first_error}", error=True)
        elif code:
            say(f"job {self._job.number} has ended with code {code} ({self._state})")
        return code

    def _show_log(self) -> bool:
        """Print the lines that are new; whether there were any."""
        if self._log is None:
            return False
        try:
            with self._log.open("rb") as file:
                if file.seek(0, 2) < self._read:  # it was begun anew
                    self._read, self._rest = 0, b""
                file.seek(self._read)
                data = file.read()
        except OSError:  # the job has not begun
            return False
        self._read += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._show(line)
        return bool(data)

    def _show(self, raw: bytes) -> None:
        self._last_line = raw.decode(errors="backslashreplace").rstrip("\r")
        if found := FIRST_ERROR.search(self._last_line):
            self._first_error = self._first_error or found[1]
        say(self._last_line)

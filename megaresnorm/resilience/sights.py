"""What a watcher sees of a rank: its slot, how long it has been there, its process's state and its stack."""

import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaresnorm.resilience.beats import (
    ALLOWED,
    BLOCK,
    C_WAITS_SINCE,
    MICROBATCH,
    PHASE,
    PID,
    PLACE,
    PLACE_SINCE,
    SECOND,
    SINCE,
    STACKS,
    STEP,
    WAITS_SINCE,
    WORDS,
    WRITES_ALLOWED,
    WRITES_SINCE,
    WRITTEN_STEP,
    Beat,
    Phase,
    Place,
)

PATIENCE = 1.0  # seconds in which a process must have written its stacks
QUIET = 0.05  # seconds without another line, after which they are whole
MOST_BYTES = 1 << 20  # of the stacks of a process
DEEPEST = 200  # lines of one thread
GONE = "gone"
_FRAME = re.compile(r'  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<function>.*)')
_TIMES = (SINCE, PLACE_SINCE, WAITS_SINCE, WRITES_SINCE, C_WAITS_SINCE)
_SETTINGS = {
    Phase.START: "start",
    Phase.BACK: "start",
    Phase.EVALUATION: "evaluation",
    Phase.SAVE: "checkpoint",
    Phase.CLOSING: "checkpoint",
    Phase.METRICS: "checkpoint",
}
PLACES = {
    Place.BEGIN: "before its samples are read",
    Place.DATA: "while reading samples",
    Place.FORWARD: "in the forward pass",
    Place.BACKWARD: "in the backward pass",
    Place.UPDATE: "in the update",
    Place.AFTER: "after the update",
}


@dataclass(frozen=True)
class Sight:
    """What is seen of one rank.

    Attributes:
        beat: its slot.
        host: of its node.
        ages: seconds since the times in its slot, by word; pauses of the whole host are left out.
        state: letter of its process as in /proc, or ``GONE``; t: there is a debugger at it, whatever it does.
        call: system call in which it is, where the system tells.
        stack: frames of its main thread, innermost first, as "function (file:line)".
        stacks: of all its threads, as text.
    """

    beat: Beat
    host: str
    ages: Mapping[int, float]
    state: str = "S"
    call: str = ""
    stack: tuple[str, ...] = ()
    stacks: str = field(default="", repr=False)

    @property
    def rank(self) -> int:
        """Of all ranks."""
        return self.beat.rank

    @property
    def is_dead(self) -> bool:
        """Whether it can do nothing: stopped, a zombie, or gone."""
        return self.state in ("T", "Z", "X", GONE)

    @property
    def is_debugged(self) -> bool:
        """Whether somebody looks at it with a debugger, and may have stopped it."""
        return self.state == "t"

    @property
    def lasts_too_long(self) -> bool:
        """Whether the main thread's phase has lasted longer than it may.

        What waits for a checkpoint to be written has no time of its own meanwhile.
        """
        words = self.beat.words
        waits_for_writing = self.beat.writes and words[PHASE] in (Phase.SAVE, Phase.CLOSING)
        return 0 < words[ALLOWED] < self.ages[SINCE] * SECOND and not waits_for_writing

    @property
    def writes_too_long(self) -> bool:
        """Whether its checkpoint is what has taken longer than it may."""
        allowed = self.beat.words[WRITES_ALLOWED]
        late = self.beat.writes and 0 < allowed < self.ages[WRITES_SINCE] * SECOND
        return late and not self.lasts_too_long and not self.is_dead

    @property
    def is_overdue(self) -> bool:
        """Whether either has."""
        allowed = self.beat.words[WRITES_ALLOWED]
        return self.lasts_too_long or (self.beat.writes and 0 < allowed < self.ages[WRITES_SINCE] * SECOND)

    @property
    def step(self) -> int:
        """In which it is, or whose checkpoint it does not get done."""
        return self.beat.words[WRITTEN_STEP if self.writes_too_long else STEP]

    @property
    def seconds(self) -> float:
        """How long it has been in what it has a time for."""
        return self.ages[WRITES_SINCE if self.writes_too_long else SINCE]

    @property
    def setting(self) -> str:
        """The setting that limits this, with its value."""
        words = self.beat.words
        name = _SETTINGS.get(Phase(words[PHASE]), "step")
        name, allowed = ("checkpoint", words[WRITES_ALLOWED]) if self.writes_too_long else (name, words[ALLOWED])
        return f"watchdog.{name}={allowed / SECOND:.6g}"

    @property
    def where(self) -> str:
        """In which step and phase it is, in words."""
        words = self.beat.words
        phase, place, step = Phase(words[PHASE]), Place(words[PLACE]), words[STEP]
        if self.writes_too_long:
            return f"while saving step {words[WRITTEN_STEP]}"
        match phase:
            case Phase.START if step == 0:
                return "before its first step"
            case Phase.EVALUATION:
                return f"in the evaluation after step {step}"
            case Phase.SAVE:
                return f"while saving step {step}"
            case Phase.BACK:
                return f"while going back to a checkpoint from step {step}"
            case Phase.METRICS:
                return f"while its loggers end or begin again, after step {step}"
            case Phase.CLOSING | Phase.REST:
                return f"at the end of the run, after step {step}"
        passes = place in (Place.FORWARD, Place.BACKWARD)
        more = f", microbatch {words[MICROBATCH]}" if passes and words[MICROBATCH] >= 0 else ""
        more += f", block {words[BLOCK]}" if passes and words[BLOCK] >= 0 else ""
        return f"in step {step} {PLACES[place]}{more}"

    def to_json(self) -> dict[str, Any]:
        """What JSON holds of it, for other nodes; without the whole stacks."""
        return {
            "words": list(self.beat.words),
            "host": self.host,
            "ages": {str(word): age for word, age in self.ages.items()},
            "state": self.state,
            "call": self.call,
            "stack": list(self.stack[:20]),
        }

    @classmethod
    def of_json(cls, value: Any) -> "Sight":
        """What another node has sent.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is not one.
        """
        words = tuple(int(word) for word in value["words"])
        ages = {int(word): float(age) for word, age in value["ages"].items()}
        if len(words) != WORDS or set(ages) != set(_TIMES):
            raise ValueError("not a slot")
        Phase(words[PHASE]), Place(words[PLACE])
        stack = tuple(str(frame) for frame in value["stack"])
        return cls(Beat(words), str(value["host"]), ages, str(value["state"]), str(value["call"]), stack)


def sight_of(beat: Beat, host: str, now: int, pauses: Sequence[tuple[int, int]] = ()) -> Sight:
    """A rank of this host.

    Args:
        now: CLOCK_MONOTONIC in nanoseconds.
        pauses: in which the watcher itself stood still, and so may have all of the host.
    """
    ages = {}
    for word in _TIMES:
        since = beat.words[word]
        lost = sum(max(0, end - max(start, since)) for start, end in pauses)
        ages[word] = max(0, now - since - lost) / SECOND
    state, call = process_state(beat.words[PID])
    return Sight(beat, host, ages, state, call)


def process_state(pid: int) -> tuple[str, str]:
    """The letter of a process's state, and where in the kernel it waits if it cannot be interrupted there."""
    folder = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
        state = status["State"].split()[0]
    except (OSError, KeyError, IndexError):
        return GONE, ""
    if status.get("TracerPid", "0").strip() != "0":
        return "t", ""
    found = []
    for name in ("syscall", "wchan") if state == "D" else ():
        with suppress(OSError):
            found.append(f"{name} {(folder / name).read_text().split()[0]}")
    return state, ", ".join(found)


def stacks_of(beats: Sequence[Beat], patience: float = PATIENCE) -> dict[int, str]:
    """Stacks of all threads of processes, by rank, which they write down at a signal even while a C call is under way.

    A process that is stopped, or cannot be interrupted, has none.
    """
    asked: dict[int, tuple[int, int]] = {}
    for beat in beats:
        pid, descriptor = beat.words[PID], beat.words[STACKS]
        if descriptor < 0 or process_state(pid)[0] in ("T", "t", "Z", "X", GONE) or not _hears(pid):
            continue
        with suppress(OSError):
            asked[beat.rank] = (pid, os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC))
    try:
        for pid, descriptor in asked.values():
            os.ftruncate(descriptor, 0)  # what was asked for before; it is appended to
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
        _wait_for(asked, patience)
        return {
            rank: os.pread(descriptor, MOST_BYTES, 0).decode(errors="replace")
            for rank, (_, descriptor) in asked.items()
        }
    finally:
        for _, descriptor in asked.values():
            os.close(descriptor)


def _wait_for(asked: Mapping[int, tuple[int, int]], patience: float) -> None:
    end, quiet, last = time.monotonic() + patience, time.monotonic(), dict[int, int]()
    while time.monotonic() < end:
        now = {rank: os.fstat(descriptor).st_size for rank, (_, descriptor) in asked.items()}
        if now != last:
            last, quiet = now, time.monotonic()
        elif all(now.values()) and time.monotonic() > quiet + QUIET:
            return
        time.sleep(QUIET / 5)


def _hears(pid: int) -> bool:
    """Whether a process has a handler for the signal, which would end it otherwise."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signal.SIGUSR2 - 1) & 1)


def main_stack(stacks: str) -> tuple[str, ...]:
    """Frames of the main thread in what faulthandler writes, innermost first: its threads come with the main one last.

    >>> main_stack('Current thread 0x1 (most recent call first):\\n  File "/a/b.py", line 3 in wait\\n')
    ('wait (b.py:3)',)
    """
    last = re.split(r"^(?:Current thread|Thread) .*$", stacks, flags=re.MULTILINE)[-1]
    frames = (_FRAME.match(line) for line in last.splitlines()[:DEEPEST])
    return tuple(f"{found['function']} ({Path(found['file']).name}:{found['line']})" for found in frames if found)

"""Watches the slots of a node's ranks, from another process where there is one, and ends ranks that hang."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megaresnorm.parallel.environment import host_name
from megaresnorm.resilience.beats import PHASE, PID, SECOND, Beat, Beats, Phase
from megaresnorm.resilience.hang_report import EXIT_CODE, Hang
from megaresnorm.resilience.launcher import Launcher, kill
from megaresnorm.resilience.neighbours import APART, Answers, Neighbours
from megaresnorm.resilience.sights import GONE, Sight, main_stack, sight_of, stacks_of
from megaresnorm.resilience.signals import exit_reason
from megaresnorm.resilience.suspects import Verdict, judge
from megaresnorm.text import say

log = logging.getLogger(__name__)

EVERY = 0.2  # seconds between two looks
PAUSE = 2.0  # seconds between two looks from which on the watcher itself stood still
MOST_PAUSES = 64
WARNED = 600.0  # seconds between two warnings, where that is all that is done
SAID = 60.0  # seconds between two errors of its own that a watcher says
AGAIN, MOST_AGAIN = 1.0, 8.0  # seconds until ranks that are within their time are looked at again; doubled with others
HEARD = 1.0  # seconds in which other nodes hear of a hang through a store that may end with this process


class Watcher:
    """Looks at the slots of a node's ranks again and again.

    Args:
        slots: gives the ranks' slots as they are.
        act: called with a hang that was found; returns whether it has ended the ranks, which are then left alone.
        others: the watchers of other nodes; None where there are none, or none are heard of.
    """

    def __init__(
        self, slots: Callable[[], Iterator[Beat]], act: Callable[[Hang], bool], others: Neighbours | None = None
    ) -> None:
        self._slots, self._act, self._others = slots, act, others
        self._pauses: list[tuple[int, int]] = []
        self._done: set[int] = set()
        self._debugged: set[int] = set()  # processes of which it was said
        self._unborn: tuple[int, ...] = ()  # ranks of this node that have not said anything
        self._last, self._not_before = time.monotonic_ns(), 0.0
        self._late, self._judge_at, self._again = frozenset[int](), 0.0, AGAIN
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look from now on, in a thread."""
        self._last = time.monotonic_ns()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop looking."""
        self._end.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        said = -SAID
        while not self._end.wait(EVERY):
            try:
                self.look()
            except Exception:
                if time.monotonic() >= said + SAID:  # it may last
                    said = time.monotonic()
                    log.exception("the watchdog goes on after an error of its own")

    def look(self) -> None:
        """Look once, and act on a hang."""
        now = time.monotonic_ns()
        if now - self._last > PAUSE * SECOND:
            self._pauses = [*self._pauses[-MOST_PAUSES:], (self._last, now)]
        self._last = now
        mine = self._see(now)
        late = frozenset(_late(mine))
        if not late <= self._late:  # another one, of which nothing is known yet
            self._judge_at, self._again = 0.0, AGAIN
        self._late = late
        if self._others is not None and (found := self._others.listen(lambda: mine)) is not None:
            sights, verdict, hosts = found
            mine = self._with_stacks(mine)
            self._found(mine, sights | mine, verdict, hosts)
        elif late and time.monotonic() >= max(self._not_before, self._judge_at):
            self._decide(mine)
            self._last = time.monotonic_ns()  # what that took is no pause

    def _see(self, now: int) -> dict[int, Sight]:
        host, seen, empty, first = host_name(), dict[int, Sight](), list[int](), 0
        for slot, beat in enumerate(self._slots()):
            if not beat.is_used or beat.words[PID] in self._done:
                empty.append(slot)
                continue
            first = beat.rank - slot
            sight = sight_of(beat, host, now, self._pauses)
            if sight.state not in (GONE, "Z") or beat.words[PHASE] not in (Phase.REST, Phase.CLOSING):
                seen[beat.rank] = sight
        self._unborn = tuple(first + slot for slot in empty)
        return seen

    def _allow(self, mine: Mapping[int, Sight]) -> bool:
        """Give all ranks of this node their time anew where there is a debugger at one, and say so once."""
        debugged = [sight for sight in mine.values() if sight.is_debugged]
        for sight in debugged:
            if (pid := sight.beat.words[PID]) not in self._debugged:
                self._debugged.add(pid)
                what = "the watchdog does not end the job while it is there; the time-outs of process groups still may"
                log.warning("warning: rank %d (process %d) is under a debugger: %s", sight.rank, pid, what)
        if debugged:
            last = max((end for _, end in self._pauses), default=0)
            self._pauses = [*self._pauses[-MOST_PAUSES:], (last, time.monotonic_ns())]
        return bool(debugged)

    def _decide(self, mine: Mapping[int, Sight]) -> None:
        if self._allow(mine):
            return
        found = Answers(dict(mine), {}) if self._others is None else self._others.ask(mine)
        if not self._is_hang(found, self._verdict(mine, found)):
            return
        mine = self._with_stacks(mine)
        found = found._replace(sights=found.sights | mine)
        verdict, again = self._verdict(mine, found), self._see(time.monotonic_ns())
        moved = not _late(again)  # who has gone on meanwhile does not hang
        dead = [rank for rank in verdict.ranks if rank in found.sights and found.sights[rank].is_dead]
        if moved or any(rank in again and not again[rank].is_dead for rank in dead):
            self._judge_again()
        elif self._is_hang(found, verdict):
            if self._others is not None:
                self._others.tell(verdict, found.sights)
            self._found(mine, found.sights, verdict, found.hosts)

    def _verdict(self, mine: Mapping[int, Sight], found: Answers) -> Verdict:
        starts = any(sight.is_overdue and sight.beat.words[PHASE] == Phase.START for sight in mine.values())
        if self._unborn and starts and not any(sight.is_dead for sight in found.sights.values()):
            return Verdict(self._unborn, unborn=True)
        return judge(found.sights, [rank for rank in found.hosts if rank in found.silent])

    def _is_hang(self, found: Answers, verdict: Verdict) -> bool:
        """Whether it is one, rather than ranks that have time left, or a store or a node that was slow to answer."""
        sights = found.sights
        missing = {rank for rank in (*found.hosts, *verdict.ranks) if rank not in sights}
        dead = any(rank in sights and sights[rank].is_dead for rank in verdict.ranks)
        if verdict.in_time:
            self._judge_again()
            return False
        if self._others is None or verdict.unborn or dead:
            return True
        known = missing <= found.silent and (found.heard or self._others.is_cut)
        if not known:
            self._judge_at = time.monotonic() + APART
        return known

    def _judge_again(self) -> None:
        self._judge_at = time.monotonic() + self._again
        if self._others is not None:
            self._again = min(2 * self._again, MOST_AGAIN)

    def _with_stacks(self, mine: Mapping[int, Sight]) -> dict[int, Sight]:
        stacks = stacks_of([sight.beat for sight in mine.values()])
        return {
            rank: replace(sight, stacks=stacks.get(rank, ""), stack=main_stack(stacks.get(rank, "")))
            for rank, sight in mine.items()
        }

    def _found(
        self, mine: Mapping[int, Sight], sights: Mapping[int, Sight], verdict: Verdict, hosts: Mapping[int, str]
    ) -> None:
        hang = Hang(sights, verdict, hosts, host_name(), frozenset(mine), self._others is not None)
        if self._act(hang):
            self._done |= {sight.beat.words[PID] for sight in mine.values()}
        else:
            self._not_before = time.monotonic() + WARNED


def _late(sights: Mapping[int, Sight]) -> list[int]:
    """Ranks that live and whose time is over. One that is gone is its supervisor's to notice."""
    return [rank for rank, sight in sights.items() if sight.is_overdue and sight.state not in (GONE, "Z")]


def ends_ranks(launcher: Launcher, others: Neighbours | None = None) -> Callable[[Hang], bool]:
    """What the agent of a node does about a hang: it says and writes it down, and ends the ranks of its node.

    Where the link to the store that the nodes share is cut, torchrun waits for that in vain: the agent ends as well. It
    also does where the job was asked to stop, so that torchrun does not start ranks again that are not to go on.

    Args:
        launcher: the node's files; there the ranks have said where the run's folder is.
    """

    def act(hang: Hang) -> bool:
        output = launcher.read_json("run").get("output")
        report = hang.write(Path(output)) if isinstance(output, str) else "there is no folder for them yet"
        failure = hang.failure(report)
        with suppress(OSError):
            launcher.note_failure(failure, launcher.read("attempt") or 0)
        say(f"megaresnorm: {failure}", error=True)
        if stop := launcher.asked_to_stop():
            with suppress(OSError):
                launcher.write("end", stop)
            say(f"megaresnorm: {exit_reason(stop)}: ended without saving, since rank {hang.named} hung", error=True)
            time.sleep(0.0 if others is None else HEARD)
        end(hang)
        if stop or (others is not None and others.is_cut):
            os._exit(stop or EXIT_CODE)
        return True

    return act


def end(hang: Hang) -> None:
    """End the ranks of this node that have hung; a stopped one hears nothing less."""
    for rank in hang.own:
        sight = hang.sights[rank]
        if sight.state != GONE and sight.beat.words[PID] != os.getpid():
            kill(sight.beat.words[PID])


def slots_of(beats: Beats, num_ranks: int) -> Callable[[], Iterator[Beat]]:
    """What ``Watcher`` asks for: the first slots of some memory."""
    return lambda: (beats.read(slot) for slot in range(min(num_ranks, beats.num_slots)))


def known_hosts(launcher: Launcher) -> dict[int, str]:
    """Hosts of all ranks, as these have told each other in this start of theirs; empty before."""
    run = launcher.read_json("run")
    hosts: Any = run.get("hosts") if run.get("attempt") == launcher.read("attempt") else None
    return {rank: str(host) for rank, host in enumerate(hosts)} if isinstance(hosts, list) else {}

"""What is said and written of a hang: one line, a report of all ranks, an event of the run."""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from megaresnorm.files import replace_file
from megaresnorm.resilience.launcher import Failure
from megaresnorm.resilience.sights import Sight
from megaresnorm.resilience.suspects import Verdict
from megaresnorm.telemetry.incidents import Incidents

SCHEMA_VERSION = 1  # of the report
EXIT_CODE = 6  # that of LostRankError
WRITING = 1.5  # seconds for the report; the run's folder may be what hangs
MOST_NAMED = 8  # ranks in a line
STATES = {"T": "stopped by a signal", "Z": "a zombie", "X": "dead", "gone": "gone"}


@dataclass(frozen=True)
class Hang:
    """A hang and what is known of it.

    Attributes:
        sights: by rank.
        verdict: who is named.
        hosts: of all ranks, as far as they are known.
        here: this node.
        own: ranks of this node.
        asked: whether the other nodes were asked; otherwise nothing is known of what their ranks do.
    """

    sights: Mapping[int, Sight]
    verdict: Verdict
    hosts: Mapping[int, str]
    here: str
    own: frozenset[int] = frozenset()
    asked: bool = True

    @property
    def num_ranks(self) -> int:
        """Of the job, as far as they are known."""
        return max(len(self.hosts), len(self.sights))

    @property
    def named(self) -> int:
        """The rank that is named first."""
        return self.verdict.ranks[0]

    @property
    def longest(self) -> Sight:
        """That of the ranks seen whose time has been over for longest."""
        overdue = [sight for sight in self.sights.values() if sight.is_overdue]
        return max(overdue or list(self.sights.values()), key=lambda sight: sight.seconds)

    @property
    def step(self) -> int:
        """Of the rank that is named, or of those that wait for it."""
        return self.sights.get(self.named, self.longest).step

    def host(self, rank: int) -> str:
        """Name of a rank's node."""
        unknown = self.here if self.verdict.unborn else "another host"
        return self.sights[rank].host if rank in self.sights else self.hosts.get(rank, unknown)

    def failure(self, report: str) -> Failure:
        """What ends the job.

        Args:
            report: where the stacks are, or why they are not.
        """
        return Failure(self.named, self.host(self.named), f"{self.line}; stacks: {report}", EXIT_CODE)

    @property
    def line(self) -> str:
        """What the rank that is named does, and what the others do."""
        others = [sight for rank, sight in self.sights.items() if rank not in self.verdict.ranks]
        if self.verdict.unreachable or self.verdict.unborn:
            late = self.longest
            seen = f"rank {late.rank} on {late.host} has waited for it {late.where} for {late.seconds:.1f} s"
            if self.verdict.unborn:
                what = f"has not come so far as to read its recipe{self._others_named('; nor has')}"
                return f"{what}: {seen} ({late.setting})"
            if not self.asked:
                return f"is waited for; what it does is not seen from {self.here}: {seen} ({late.setting})"
            return f"cannot be reached{self._others_named('; nor can')}: {seen} ({late.setting})"
        sight = self.sights[self.named]
        timed = sight if sight.is_overdue else self.longest
        state = f", {STATES[sight.state]}" if sight.is_dead else f", in the kernel ({sight.call})" if sight.call else ""
        said = f"hangs {sight.where} for {timed.seconds:.1f} s{state} ({timed.setting})"
        if len(self.verdict.ranks) > 1:
            said += self._others_named("; so do" if sight.is_dead else "; it cannot be told from")
        return said + _of_others(others)

    def _others_named(self, word: str) -> str:
        ranks = self.verdict.ranks[1:]
        if not ranks:
            return ""
        more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
        named = ", ".join(f"rank {rank} on {self.host(rank)}" for rank in ranks[:MOST_NAMED])
        return f"{word} {named}{more}"

    def text(self) -> str:
        """The report: the line, a line for each rank, and the stacks of those of this node."""
        lines = [f"schema_version {SCHEMA_VERSION}", f"time {time.time():.3f}", str(self.failure("below")), ""]
        for rank, sight in sorted(self.sights.items()):
            wait, writing = sight.beat.waits, sight.beat.waits_over_control
            lines.append(f"rank {rank} on {sight.host}: {sight.where} for {sight.seconds:.1f} s; state {sight.state}")
            lines += [f"  in the kernel: {sight.call}"] if sight.call else []
            lines += [f"  waits for {wait}"] if wait is not None else []
            if sight.beat.writes:
                lines.append(f"  writes a checkpoint{'' if writing is None else f', waits for {writing}'}")
            lines += [f"  {frame}" for frame in sight.stack]
        for rank, sight in sorted(self.sights.items()):
            if sight.stacks:
                lines += ["", f"--- stacks of rank {rank}, all threads, the main one last ---", sight.stacks.rstrip()]
        return "\n".join(lines) + "\n"

    def write(self, output: Path) -> str:
        """Write the report and the event into a run's folder, unless that takes too long.

        Returns:
            The report's path, or why there is none.
        """
        name = f"hang-{self.step}-{self.here}"
        path = output / f"{name}.txt"
        done: list[str] = []

        def work() -> None:
            names = (f"{name}{'' if number == 1 else f'-{number}'}.txt" for number in count(1))
            try:
                free = next(one for one in map(output.joinpath, names) if not one.exists())  # it may have hung before
                replace_file(free, self.text())
                if self.named in self.own or self.verdict.unreachable or self.verdict.unborn:  # else its node notes it
                    self._note(Incidents(output), free.name)
                done.append(str(free))
            except OSError as e:
                done.append(f"{path} cannot be written ({e.strerror})")

        thread = threading.Thread(target=work, name="hang report", daemon=True)
        thread.start()
        thread.join(WRITING)
        return done[0] if done else f"{path} is not written yet"

    def _note(self, incidents: Incidents, report: str) -> None:
        host, ranks = self.host(self.named), list(self.verdict.ranks)
        incidents.note("hang", self.step, self.line, rank=self.named, host=host, ranks=ranks, report=report)


def _of_others(others: list[Sight]) -> str:
    """What most of the others wait for."""
    if not others:
        return ""
    waits = Counter(str(sight.beat.waits or sight.beat.waits_over_control or "") for sight in others)
    wait, count = waits.most_common(1)[0]
    who = "the other" if len(others) == 1 else "the others" if count == len(others) else f"{count} others"
    one = len(others) == 1 or count == 1
    if wait:
        return (
            f"; {who} wait{'s' if one else ''} for {wait}"
            if "stage" in wait
            else (f"; {who} wait{'s' if one else ''} in {wait}")
        )
    return f"; {who} {'is' if one else 'are'} {others[0].where}"

"""What came of a drill: each fault with what noticed it, after how long, and whether it was named."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megaresnorm.resilience.faults import Drill
from megaresnorm.telemetry.incidents import read_incidents

Line = tuple[float, str]  # of the launcher, with the time at which it came
REFUSED, RESTARTS = ("nan", "flip", "spike"), ("kill", "stop", "hang", "cut")
SUMMED = 10  # steps, of rank_times.py
EARLY = 0.05  # seconds by which clocks of files and of lines may differ


class Notice(NamedTuple):
    """How a kind of fault is noticed.

    Attributes:
        event: kind of a line of events.jsonl; empty for none.
        line: pattern of a line of the launcher; ``rank`` and ``file`` are groups that name.
        names: what is to be named: the rank, the step, or nothing where nobody can tell.
    """

    event: str = ""
    line: str = ""
    names: str = "rank"


NOTICES = {
    "kill": Notice(line=r"rank (?P<rank>\d+) on \S+: killed by SIGKILL"),
    "stop": Notice("hang"),
    "hang": Notice("hang"),
    "slow": Notice("straggler"),
    "nan": Notice("nonfinite", names="step"),
    "spike": Notice("spike", names="step"),
    "flip": Notice("corruption"),
    "torn_write": Notice(line=r"(?P<file>step-\d+/\S+): .*; going back to ", names="file"),
    "no_space": Notice(line=r"step-\d+: no space: need", names=""),
    "io_error": Notice(line=r"cannot be (?:written|read) \(Input/output error(?:, (?P<file>[^)]+))?\)", names="file"),
    "cut": Notice(line=r"rank is gone|rank \d+ is gone|is gone \(", names=""),
    "clock": Notice(names=""),
}


@dataclass
class Row:
    """A fault and what came of it.

    Attributes:
        injected: whether it happened.
        noticed: by what; empty if by nothing. A clock that jumps is to disturb nothing.
        after: seconds from the fault to the notice; None without one.
        named: whether what is to be named was; None where nobody can tell who it was.
        lost: steps that were made again.
    """

    fault: int
    kind: str
    place: str
    step: int
    rank: int
    injected: bool = False
    noticed: str = ""
    after: float | None = None
    named: bool | None = None
    lost: int = 0

    @property
    def right(self) -> bool:
        """Whether it was injected, noticed and named."""
        return self.injected and bool(self.noticed) and self.named is not False


def rows_of(faults: Sequence[dict[str, Any]], run: Path, lines: Sequence[Line]) -> list[Row]:
    """A row for each fault.

    Args:
        faults: of the plan.
        run: the output folder.
        lines: of the launcher.
    """
    injected, events = _injected(run), list(read_incidents(run))
    used: set[tuple[float, str]] = set()
    rows = []
    for number, fault in enumerate(faults):
        row = Row(number, fault["kind"], fault.get("place", ""), fault["step"], fault.get("rank", 0))
        records = injected.get(number, [])
        rows.append(row)
        if not records:
            continue
        row.injected, start = True, records[0]["time"]
        _notice(row, start, events, lines, used)
        row.lost = _lost(records[0], events)
    return rows


def _injected(run: Path) -> dict[int, list[dict[str, Any]]]:
    """What ranks have written down before it happened, by number of the fault."""
    found: dict[int, list[dict[str, Any]]] = {}
    for path in sorted((run / Drill.FOLDER).glob("rank-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["fault"], []).append(record)
    return found


def _notice(
    row: Row, start: float, events: Sequence[dict], lines: Sequence[Line], used: set[tuple[float, str]]
) -> None:
    notice = NOTICES[row.kind]
    if row.kind == "clock":
        row.noticed = "nothing is disturbed"
        return
    matches = [(one["time"], one, "events.jsonl") for one in events if notice.event and one["kind"] == notice.event]
    matches += [
        (when, found.groupdict(), "the log")
        for when, text in lines
        if notice.line and (found := re.search(notice.line, text))
    ]
    matches = [one for one in matches if one[0] >= start - EARLY and (one[0], one[2]) not in used]
    if row.kind == "slow":  # which shows in sums of ten steps
        matches = [one for one in matches if one[1]["step"] >= row.step + SUMMED]
    right = [one for one in matches if _names(row, notice, one[1])]
    if not matches:
        return
    when, what, row.noticed = min(right or matches, key=lambda one: one[0])
    used.add((when, row.noticed))
    row.after = max(0.0, when - start)
    row.named = None if not notice.names or _nobody_can_tell(what) else bool(right)


def _names(row: Row, notice: Notice, what: dict[str, Any]) -> bool:
    """Whether a notice names what it is to name."""
    match notice.names:
        case "rank":
            return what.get("rank") is not None and int(what["rank"]) == row.rank
        case "step":
            return what.get("step") == row.step and what.get("rank") in (None, row.rank)
        case "file":
            file = what.get("file") or ""
            return f"-{row.rank:05d}-" in file or not file
        case _:
            return True


def _nobody_can_tell(what: dict[str, Any]) -> bool:
    """Whether replicas differ, and there are two."""
    return "none is in the majority" in str(what.get("what", ""))


def _lost(record: dict[str, Any], events: Sequence[dict]) -> int:
    """Steps that were made again, up to the next start of the ranks or the next way back."""
    for one in events:
        if one["time"] < record["time"] - EARLY:
            continue
        if one["kind"] == "rollback" and record["kind"] in REFUSED:
            return max(0, one["step"] - one.get("to_step", one["step"]))
        if one["kind"] == "start":
            restarts = record["kind"] in RESTARTS or record.get("place") == "loader"
            return max(0, record["step"] - one["step"]) if restarts else 0
    return 0


def losses_of(run: Path) -> dict[int, str]:
    """Step -> loss as the bits that it has."""
    found = {}
    for record in _records(run):
        if record.get("loss") is not None:
            found[int(record["step"])] = float(record["loss"]).hex()
    return found


def times_of(run: Path) -> dict[int, float]:
    """Step -> when it was done, in seconds of the epoch."""
    return {int(record["step"]): float(record["time"]) for record in _records(run)}


def last_record(run: Path) -> dict[str, Any]:
    """The metrics of the last step; empty without one."""
    return next(iter(_records(run)[-1:]), {})


def _records(run: Path) -> list[dict[str, Any]]:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def digest_in(lines: Sequence[Line]) -> str:
    """The digest of the weights with which a run has ended; empty without one."""
    found = [match[1] for _, text in lines if (match := re.match(r"weights +([0-9a-f]{64})", text))]
    return found[-1] if found else ""

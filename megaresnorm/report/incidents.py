"""What went wrong in a run and where its time went, as rows and words."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from megaresnorm.report.columns import Columns
from megaresnorm.telemetry.goodput import APART, KINDS, PREFIX

MOST = 200  # rows of a page
LATEST = 1e11  # seconds of the epoch: a later time is none
HEADINGS = ("time", "step", "what", "kind", "what was done")
WORDS = {
    "productive": "steps that stay",
    "lost": "steps refused or made again",
    "checkpoint": "checkpoints, and comparisons of replicas",
    "evaluation": "evaluations",
    "start": "starts, and restarts since the last step",
    "waiting": "of the steps that stay: mean rank waits for the slowest",
}


def incident_rows(incidents: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The newest of a run's events; orderly starts and ends are left out, but for starts after another one."""
    rows = []
    begun = False
    for one in incidents:
        kind = one["kind"]
        if kind == "end" or (kind == "start" and not begun):
            begun = kind == "start"
            continue
        begun = begun or kind == "start"
        rows.append([_moment(one.get("time")), f"{one['step']:,}", str(one.get("what", "")), kind, _done(one)])
    return rows[-MOST:]


def _done(one: Mapping[str, Any]) -> str:
    action = one.get("action")
    return action if isinstance(action, str) else ""


def _moment(seconds: Any) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError, TypeError):
        return ""


def start_times(incidents: Sequence[Mapping[str, Any]]) -> list[float]:
    """When the run was started, in seconds of the epoch."""
    found = (one.get("time") for one in incidents if one["kind"] == "start")
    return [float(seconds) for seconds in found if isinstance(seconds, int | float) and 0 <= seconds < LATEST]


def spent_rows(metrics: Columns) -> list[list[str]]:
    """Seconds by kind and their shares; empty for runs of versions that did not count them."""
    found = {kind: metrics.last(PREFIX + kind) for kind in KINDS}
    seconds = {kind: value for kind, value in found.items() if value is not None}
    whole = sum(value for kind, value in seconds.items() if kind not in APART)
    if not whole:
        return []
    return [[WORDS[kind], f"{value:,.1f} s", f"{value / whole:.1%}"] for kind, value in seconds.items() if value]

"""One thing that was looked at, and the verdict on it."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["PASS", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        verdict: FAIL where no run can work, WARN where some cannot or are slow.
        found: what is there.
        advice: what to do; empty where nothing is wrong.
        wanted: what would pass, where that is a figure; else empty.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str = ""
    wanted: str = ""


def check(name: str, found: str, right: bool, advice: str, otherwise: Verdict = "WARN", *, wanted: str = "") -> Check:
    """A check that passes, or has another verdict with advice."""
    return Check(name, "PASS" if right else otherwise, found, "" if right else advice, wanted)


def some_of(names: list[str], most: int = 4) -> str:
    """A few of some names, and how many there are besides.

    >>> some_of(["a", "b"]), some_of(list("abcdef"))
    ('a, b', 'a, b, c, d and 2 more')
    """
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")

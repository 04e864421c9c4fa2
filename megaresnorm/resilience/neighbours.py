"""How the watchers of several nodes tell each other what they see, through the store of torchrun's rendezvous.

Whoever sees a hang draws a number, and appends what it sees of its ranks under it; all others, who look for a new
number twice a second, append theirs. So each node names the same rank. One that has not answered two questions, which
begin two seconds apart, is out of reach: a single answer may be late for many reasons. What a node has asked before, it
removes. Messages are JSON. No call may hold a watcher up: on a link that is cut a store answers neither yes nor no.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple, TypeVar

from megaresnorm.resilience.sights import Sight
from megaresnorm.resilience.suspects import Verdict

ANSWERS = 1.2  # seconds in which other nodes answer
EVERY = 0.5  # seconds between two looks for a question
LISTENS = 5.0  # seconds after an answer in which the verdict is waited for
CONNECT = 3.0  # seconds to reach the store
APART = 1.0  # seconds from the end of a question that was not answered to the next one, which says who is out of reach
FORGOTTEN = 30.0  # seconds after which a question that was not answered tells nothing any more
AGAIN = 5.0  # seconds after which a store that did not answer is tried again
T = TypeVar("T")
Found = tuple[dict[int, Sight], Verdict, dict[int, str]]


class Answers(NamedTuple):
    """What came of a question.

    Attributes:
        sights: what is seen of all ranks that can be reached.
        hosts: of all ranks, as far as they are known.
        silent: ranks that are out of reach.
        heard: whether the store has answered.
    """

    sights: dict[int, Sight]
    hosts: dict[int, str]
    silent: frozenset[int] = frozenset()
    heard: bool = True


class Neighbours:
    """The watchers of other nodes; see ``Others``.

    Args:
        connect: opens a store that all nodes share; called in a thread, again where the connection was lost.
        hosts: of all ranks, as far as they are known.
    """

    def __init__(self, connect: Callable[[], Any], hosts: Callable[[], dict[int, str]]) -> None:
        self._connect, self._hosts = connect, hosts
        self._store: Any = None
        self._failures, self._failed_first, self._failed_last = 0, 0.0, 0.0  # the end of one, the beginning of another
        self._missed: dict[int, float] = {}  # since when a rank has not answered
        self._asked_last = 0.0
        self._drawn: int | None = None  # the last question of its own
        self._answered: int | None = None  # the last question
        self._listens_until, self._next = 0.0, 0.0

    @property
    def is_cut(self) -> bool:
        """Whether the store has not answered twice in succession, some seconds apart."""
        return self._failures > 1 and self._failed_last - self._failed_first >= APART

    def ask(self, mine: Mapping[int, Sight]) -> Answers:
        """What is seen of all ranks.

        Communication:
            What this node sees to the store, and what all see from it, several times within ``ANSWERS``.
        """
        hosts, seen = self._hosts(), dict(mine)
        num_ranks = max([len(hosts), *(prod(sight.beat.sizes) for sight in mine.values())])

        def work(store: Any) -> int:
            end = time.monotonic() + ANSWERS
            for name in () if self._drawn is None else ("seen", "found"):
                store.delete_key(f"{name}/{self._drawn}")
            self._drawn = number = store.add("asked", 1)
            store.append(f"seen/{number}", _encoded(mine))
            while len(seen) < num_ranks and time.monotonic() < end:
                if (newer := store.add("asked", 0)) > number:  # another node asks as well: all answer the last one
                    number = newer
                    store.append(f"seen/{number}", _encoded(mine))
                seen.update({**_decoded(store.get(f"seen/{number}")), **mine})
                time.sleep(0.05)
            self._answered = number
            return number

        connects = CONNECT if self._store is None and not self._failures else 0.0
        began = time.monotonic()
        heard = self._call(work, connects + ANSWERS + 0.2) is not None
        return Answers(seen, hosts, self._silent(set(range(num_ranks)) - set(seen), began, heard=heard), heard)

    def _silent(self, missing: set[int], began: float, *, heard: bool) -> frozenset[int]:
        """Which of the ranks that have not answered a question are out of reach."""
        if not heard:
            return frozenset(missing if self.is_cut else ())
        before = self._missed if began < self._asked_last + FORGOTTEN else {}
        self._asked_last = now = time.monotonic()
        self._missed = {rank: before.get(rank, now) for rank in missing}
        return frozenset(rank for rank, since in self._missed.items() if began >= since + APART)

    def tell(self, verdict: Verdict, sights: Mapping[int, Sight], seconds: float = 0.5) -> None:
        """Tell the others what was found, a moment before the ranks of this node are ended."""
        if self._failures:
            return
        about = {"ranks": verdict.ranks, "unreachable": verdict.unreachable, "sights": _json(sights)}
        content = json.dumps(about)
        self._call(lambda store: store.set(f"found/{self._answered}", content), seconds)
        time.sleep(seconds)

    def listen(self, see: Callable[[], Mapping[int, Sight]]) -> Found | None:
        """Answer what others ask.

        Returns:
            What another node has found since, if it has.
        """
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + EVERY

        def work(store: Any) -> Found | None:
            number = store.add("asked", 0)
            if self._answered is None or number < self._answered:  # the first look, or a new store
                self._answered = number
            elif number > self._answered:
                store.append(f"seen/{number}", _encoded(see()))
                self._answered, self._listens_until = number, now + LISTENS
            if now > self._listens_until or not store.check([f"found/{self._answered}"]):
                return None
            self._listens_until = 0.0
            said = json.loads(store.get(f"found/{self._answered}"))
            verdict = Verdict(tuple(int(rank) for rank in said["ranks"]), bool(said["unreachable"]))
            return {sight.rank: sight for sight in map(Sight.of_json, said["sights"])}, verdict, self._hosts()

        return self._call(work, EVERY)

    def _call(self, work: Callable[[Any], T], seconds: float) -> T | None:
        """What a thread gets done in time with the store; None where it does not."""
        results: list[T] = []

        def call() -> None:
            with suppress(RuntimeError, ValueError, TypeError, KeyError, AttributeError, OSError):
                if self._store is None:
                    self._store = self._connect()
                results.append(work(self._store))

        began = time.monotonic()
        thread = threading.Thread(target=call, name="neighbours", daemon=True)
        thread.start()
        thread.join(seconds)
        self._failures = 0 if results else self._failures + 1
        if not results:
            self._failed_last = began
            self._failed_first = time.monotonic() if self._failures == 1 else self._failed_first
            self._store, self._next = None, time.monotonic() + AGAIN
            return None
        return results[0]


def _json(sights: Mapping[int, Sight]) -> list[dict[str, Any]]:
    return [sight.to_json() for sight in sights.values()]


def _encoded(sights: Mapping[int, Sight]) -> str:
    return json.dumps(_json(sights)) + "\n"


def _decoded(content: bytes) -> dict[int, Sight]:
    """What the nodes have appended; what is no sight is left out."""
    found: dict[int, Sight] = {}
    for line in content.decode(errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            values: Any = json.loads(line)
            found |= {sight.rank: sight for sight in map(Sight.of_json, values)}
    return found

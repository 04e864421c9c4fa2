"""Methods of single objects wrapped for a while: how a model is watched in some steps at no cost in the others."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

_NOTHING = object()


class Wrapped:
    """Wraps methods of single objects, and puts them back when its context ends.

    Modules that torch.compile has compiled are to be wrapped from outside, by whoever calls them: a method within one
    would be compiled anew.

    >>> class Layer:
    ...     def forward(self, x):
    ...         return x + 1
    >>> layer = Layer()
    >>> with Wrapped() as wrapped:
    ...     wrapped.method(layer, "forward", lambda forward: lambda x: 10 * forward(x))
    ...     layer.forward(1)
    20
    >>> layer.forward(1)
    2
    """

    def __init__(self) -> None:
        self._undo = ExitStack()

    def __enter__(self) -> "Wrapped":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def method(self, owner: Any, name: str, around: Callable[[Callable], Callable]) -> None:
        """Replace ``owner.name`` by what ``around`` makes of it."""
        self.value(owner, name, around(getattr(owner, name)))

    def value(self, owner: Any, name: str, new: Any) -> None:
        """Replace an attribute of an object; the class keeps its own."""
        before = vars(owner).get(name, _NOTHING)
        if before is _NOTHING:
            self.at_end(partial(object.__delattr__, owner, name))
        else:
            self.at_end(partial(object.__setattr__, owner, name, before))
        object.__setattr__(owner, name, new)  # of frozen objects as well

    def at_end(self, undo: Callable[[], object]) -> None:
        """Call ``undo`` when the context ends; what came last is undone first."""
        self._undo.callback(undo)

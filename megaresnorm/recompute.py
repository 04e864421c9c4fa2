"""Recomputation: what autograd keeps of a function is dropped, and made again when backward first asks for it.

The function is run once more in backward, as in torch.utils.checkpoint, without its bookkeeping for random numbers and
contexts, which narrow models hundreds of blocks deep would notice. The second run ends with the last tensor that
backward needs: a product or a collective after it is not repeated. Its values are those of the first run, bit for bit,
since nothing in a model draws random numbers or counts its calls (dropout masks are hashes).
"""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Keeper(Protocol):
    """Keeps the tensors that a region is made again from."""

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What returns the tensor later. Of two tensors in the same memory one is kept."""


class Device:
    """Keeps tensors where they are."""

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See ``Keeper``."""
        return lambda: tensor


DEVICE = Device()


class Region:
    """A part of a forward pass that is run again in backward, as a context around it.

    Autograd's nodes inside save slots instead of tensors. The first slot that backward asks for runs the part again,
    and fills all of them; each is emptied when it is read, so that a tensor lives no longer than without a region.

        with Region() as region:
            x_again = region.keep(x)
            region.begin(lambda: function(x_again()))
            y = function(x)

    What nodes save before ``begin`` is kept, by the keeper as well.

    Args:
        keeper: None: nothing is moved.
    """

    def __init__(self, keeper: Keeper | None = None) -> None:
        self._keeper = keeper
        self._hooks: saved_tensors_hooks | None = None
        self._again: Callable[[], object] | None = None
        self._forms: list[_Form] = []
        self._made: list[Tensor | None] = []

    def __enter__(self) -> "Region":
        assert _RUN.made is None, "what is run again opens no region of its own: it would end the first one's run"
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._hooks is not None
        self._hooks.__exit__(kind, error, trace)
        self._hooks = None  # they refer to this object, which must go with the graph, without a garbage collection

    def begin(self, again: Callable[[], object]) -> None:
        """From here on drop what nodes save.

        Args:
            again: runs the same nodes in the same order, on tensors without a graph. What follows the last node that
                saves a tensor may be left out.
        """
        self._again = again

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Keep a tensor for ``again``, which gets it from what is returned: without a graph, but with a gradient if
        the tensor has one."""
        fetch = (self._keeper or DEVICE).keep(tensor.detach())
        wants = tensor.requires_grad
        return lambda: fetch().detach().requires_grad_(wants)

    def _pack(self, tensor: Tensor) -> Any:
        if self._again is None:
            tensor = tensor if tensor.is_leaf else tensor.detach()  # an output of the node would keep the node alive
            return tensor if self._keeper is None else _Kept(self._keeper.keep(tensor))
        self._forms.append((tensor.shape, tensor.dtype))
        return len(self._forms) - 1

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed, _Kept):
            return packed.fetch()
        if not self._made or self._made[packed] is None:
            self._made = _made_again(self._again, self._forms)
        tensor, self._made[packed] = self._made[packed], None
        assert tensor is not None
        return tensor


_Form = tuple[torch.Size, torch.dtype]


class _Kept:
    def __init__(self, fetch: Callable[[], Tensor]) -> None:
        self.fetch = fetch


class _Run(threading.local):
    """The recomputation that a thread is in: what it has made, and how much it is to make."""

    made: list[Tensor] | None = None
    count = 0


_RUN = _Run()


class _Done(Exception):
    """Every tensor that is needed has been made."""


def _made_again(again: Callable[[], object] | None, forms: list[_Form]) -> list[Tensor | None]:
    assert again is not None
    made: list[Tensor] = []
    count = len(forms)
    outer = _RUN.made, _RUN.count
    _RUN.made, _RUN.count = made, count

    def pack(tensor: Tensor) -> None:
        made.append(tensor.detach())
        if len(made) == count:
            raise _Done

    try:
        with torch.enable_grad(), saved_tensors_hooks(pack, _never):
            again()
    except _Done:
        pass
    finally:
        _RUN.made, _RUN.count = outer
    if len(made) != count:
        raise RuntimeError(f"a recomputation has made {len(made)} tensors where forward had saved {count}")
    for number, (tensor, wanted) in enumerate(zip(made, forms, strict=True)):
        if (tensor.shape, tensor.dtype) != wanted:
            raise RuntimeError(
                f"a recomputation has made {tensor.dtype} {list(tensor.shape)} as tensor {number}, where forward had "
                f"saved {wanted[1]} {list(wanted[0])}"
            )
    return [*made]


def _never(packed: object) -> Tensor:
    raise AssertionError("nothing is differentiated within a recomputation")


def is_running_again() -> bool:
    """Whether what runs now has run before: it is a recomputation."""
    return _RUN.made is not None


def saves_last(*tensors: Tensor | None) -> None:
    """End a recomputation here where these are the last tensors that it is to make.

    An autograd.Function's tensors are saved when its forward is through. One whose result costs much, and is needed for
    nothing else, calls this before it computes it, with what it is going to save, in the same order.
    """
    if _RUN.made is None:
        return
    found = [tensor.detach() for tensor in tensors if tensor is not None]
    if len(_RUN.made) + len(found) == _RUN.count:
        _RUN.made += found
        raise _Done

"""Bytes of tensors that are alive: what a forward pass keeps for backward, and the most that both passes need.

From the memory events of torch's profiler, which sees every allocation. Hooks on saved tensors would miss what a graph
keeps by plain references.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "live_storages: forward has ended"


class Live(NamedTuple):
    """Bytes beyond those before the forward pass.

    Attributes:
        kept: when forward has ended.
        peak: at most, in both passes.
    """

    kept: int
    peak: int


def live_storages(forward: Callable[[], Any], backward: Callable[[Any], None]) -> Live:
    """Run both passes once, and follow the memory that they take.

    Args:
        backward: of what ``forward`` has returned.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = forward()
        with record_function(_MARK):
            pass
        backward(result)
        del result
    events = profiler.profiler.kineto_results.events()
    end = next(event.start_ns() for event in events if event.name() == _MARK)
    now = peak = kept = 0
    for at, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += size
        kept, peak = (now if at < end else kept), max(peak, now)
    return Live(kept, peak)

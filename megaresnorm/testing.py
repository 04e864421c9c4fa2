"""Several ranks inside one program, for tests of layouts: fork, gloo, a file store.

Two ranks start in a fifth of a second. This calls function(rank, *arguments) on each:

    first, second = run_ranks(2, function, *arguments)
"""

import json
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # this and the two below: imported by the parent once, so that no child has to
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

LOST_NEIGHBOUR = "Connection closed by peer"


class RunAgain:
    """A recorder of microbatches (engines/graphs.py) that runs the function again, as a CUDA graph would on a GPU.

    Attributes:
        recorded: the functions.
    """

    def __init__(self) -> None:
        self.recorded: list[Callable[[], None]] = []

    def warm_up(self, function: Callable[[], None]) -> None:
        """See ``Recorder``."""
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """See ``Recorder``."""
        self.recorded.append(function)
        return function


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300.0) -> list[Any]:
    """Call ``function(rank, *arguments)`` on every rank of a new gloo process group on this host.

    The ranks are forked, so ``function`` may be a closure; the caller must have no process group of its own, must not
    have used a GPU, and should have no other threads.

    Args:
        num_ranks: how many ranks there are.
        function: what each of them calls. It may return Python's own numbers and strings, None and tensors, and lists,
            tuples and dictionaries of these; a named tuple as ``_asdict()``.
        *arguments: its further arguments.
        timeout: seconds after which ranks that have not ended are killed.

    Returns:
        What every rank has returned, in the order of the ranks.

    Raises:
        AssertionError: with the traceback of a rank that failed by itself, or with the numbers of those that hung.
    """
    assert not dist.is_initialized(), "a parent with a process group cannot fork"
    with tempfile.TemporaryDirectory() as name:
        folder, context = Path(name), mp.get_context("fork")
        processes = [
            context.Process(target=_child, args=(rank, num_ranks, folder, function, arguments))
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in hung:
            processes[rank].kill()
        errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
        errors.sort(key=lambda text: LOST_NEIGHBOUR in text)  # those that lost a neighbour come last
        assert not errors, errors[0]
        assert not hung, f"ranks {hung} did not end within {timeout} s"
        assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
        return [_read(folder, rank) for rank in range(num_ranks)]


def _child(rank: int, num_ranks: int, folder: Path, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=FileStore(f"{folder}/store", num_ranks),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=120),
        )
        _write(folder, rank, function(rank, *arguments))
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - the parent raises it
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _write(folder: Path, rank: int, value: Any) -> None:
    """A result as JSON, with its tensors in a file beside it."""
    tensors: dict[str, Tensor] = {}
    (folder / f"result-{rank}.json").write_text(json.dumps(_packed(value, tensors)))
    save_file(tensors, folder / f"result-{rank}.safetensors")


def _read(folder: Path, rank: int) -> Any:
    tensors = load_file(folder / f"result-{rank}.safetensors")
    return _unpacked(json.loads((folder / f"result-{rank}.json").read_text()), tensors)


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON's own values as they are, anything else as [kind, content]; tensors go into ``tensors``.

    >>> _unpacked(_packed((1, [{"a": None, 2: 0.5}]), {}), {})
    (1, [{'a': None, 2: 0.5}])
    """
    kind = type(value)  # not isinstance: a named tuple would come back as a plain one, an enum as a string
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return ["tensor", name]
    if kind is dict:
        return ["dict", [[_packed(key, tensors), _packed(item, tensors)] for key, item in value.items()]]
    if kind in (list, tuple):
        return [kind.__name__, [_packed(item, tensors) for item in value]]
    raise TypeError(f"a rank cannot return a {kind.__name__}; return numbers, strings, tensors, or lists of them")


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in content}
    items = [_unpacked(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items

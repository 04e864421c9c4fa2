"""Starting several ranks inside a program: fork, gloo, a file store. Two of them take a fifth of a second. Tests use it, too."""

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported by the parent once, so that no child has to
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any, timeout: float = 300.0) -> list[Any]:
    """function(rank, *arguments) on every rank of a new process group; what each returned, tensors included.

    Raises: AssertionError with the traceback of a rank that failed by itself.
    """
    assert not dist.is_initialized(), "a parent with a process group cannot fork"
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("fork")
        processes = [
            context.Process(target=_child, args=(rank, num_ranks, folder, function, arguments))
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        hung = [i for i, process in enumerate(processes) if process.is_alive()]
        for i in hung:
            processes[i].kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        errors.sort(key=lambda text: "Connection closed by peer" in text)  # those who lost a neighbour come last
        assert not errors, errors[0]
        assert not hung, f"ranks {hung} did not end within {timeout} s"
        assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
        # What our own children have written into a folder of ours.
        return [torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(num_ranks)]


def _child(rank: int, num_ranks: int, folder: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(f"{folder}/store", num_ranks),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=120),
        )
        torch.save(function(rank, *arguments), Path(folder, f"result-{rank}"))
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - the parent raises it
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)

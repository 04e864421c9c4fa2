"""How a stage of gpu_campaign.py tells what it has found, and measures.

It writes into the file that it was given as it finds it, one JSON object a line: {"title", "row"} for a row of a table,
{"note"} for a sentence. What a stage had found when it was ended counts.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

SMOKE = "--smoke" in sys.argv
DEVICE = torch.device("cpu" if SMOKE or not torch.cuda.is_available() else "cuda")


def emit(**what: Any) -> None:
    """Hand a row or a note to the parent."""
    with open(sys.argv[2], "a") as file:
        file.write(json.dumps(what) + "\n")


def row(title: str, **cells: Any) -> None:
    emit(title=title, row=cells)


@contextmanager
def attempt(title: str, name: str) -> Iterator[None]:
    """One contender: where it fails, that is its row, and the stage goes on with all memory back."""
    try:
        yield
    except Exception as e:  # noqa: BLE001  (a report of what failed is the purpose)
        row(title, name=name, failed=f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:300])
    gc.collect()  # graphs and engines hold each other
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], least: float = 0.3) -> float:
    """Median seconds of a call, of five at least."""
    run()
    wait()
    times: list[float] = []
    end = time.perf_counter() + (0.01 if SMOKE else least)
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)

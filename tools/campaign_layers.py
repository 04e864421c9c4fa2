"""The stage of gpu_campaign.py that profiles a model by block, beside the kernels that torch's profiler sees."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from campaign_report import DEVICE, SMOKE, attempt, row, wait

from megaresnorm.data.prepare import PrepareJob, prepare
from megaresnorm.profiling.profile import time_of
from megaresnorm.profiling.window import Profiler
from megaresnorm.recipe.load import build_recipe
from megaresnorm.run import Run
from megaresnorm.trainer import Trainer

ROOT = Path(__file__).parents[1]


@contextmanager
def prepared() -> Iterator[Path]:
    """A folder with a data set of this repository's own text, as bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [path.read_text() for path in sorted((ROOT / "megaresnorm").rglob("*.py"))]
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        prepare(PrepareJob(out=folder / "bytes", paths=(str(folder / "text.jsonl"),)))
        yield folder


def layers() -> None:
    """24 blocks of width 2,048 in BF16: rows of a step, what marks cost, and all kernels of one step beside them."""
    small = {"dim": 32, "num_blocks": 2, "num_heads": 2, "seq_len": 32}
    model = small if SMOKE else {"dim": 2048, "num_blocks": 24, "num_heads": 16, "seq_len": 2048}
    with prepared() as folder:
        for mode in ("none", "blocks"):
            with attempt("profile by block", mode):
                _layers(folder, model, mode)


def _layers(folder: Path, model: dict[str, Any], mode: str) -> None:
    steps = 6 if SMOKE else 10  # of fewer than five the noise is not known
    recipe = build_recipe(
        {
            "model": model | {"topology": "deepnorm"},
            "data": {"path": str(folder / "bytes")},
            "train": {
                "output": str(folder / mode),
                "steps": 99,
                "global_batch": 4,
                "micro_batch": 2,
                "loggers": [],
                "compile": mode,
                "profile": {"start": 4, "steps": steps},
                "device": DEVICE.type,
            },
            "precision": {"compute": "bf16"},
        }
    )
    with Run(recipe) as run:
        profiler = Profiler(run, recipe.train.profile, folder / mode / "profile", "tools/gpu_campaign.py")
        trainer = Trainer(run, profiler)
        while run.steps_done < profiler.last_step:
            trainer.step()
        kernels = _kernels_of_a_step(trainer)
    profile = profiler.profile
    assert profile is not None
    (rank,), whole = profile["ranks"], profile["whole"]
    parts: dict[str, float] = {}
    for one in profile["rows"]:
        parts[one["part"]] = parts.get(one["part"], 0.0) + time_of(one, "forward", "backward", "recompute", "exposed")
    row(
        "profile by block",
        name=f"compile {mode}",
        **{"step, ms": round(profile["step_ms"]["p50"], 2), "kernels of a step, ms": round(kernels, 2)},
        **{"unaccounted share": round(rank["unaccounted_ms"] / rank["step_ms"], 4)},
        **{"marks add": round(whole["overhead"], 4), "noise": round(whole["overhead_noise"], 4)},
        **{"of peak": round(profile["mfu"], 4), "host waits, ms": round(rank["host_wait_ms"], 2)},
    )
    for part, time in sorted(parts.items(), key=lambda item: -item[1]):
        row(f"parts of a step, compile {mode}", name=part, ms=round(time, 3))
    for one in sorted(profile["rows"], key=lambda one: -time_of(one, "forward", "backward"))[:6]:
        held = one["activation_bytes"]
        times = {column: round(time_of(one, column), 3) for column in ("forward", "backward", "optimizer")}
        row(f"slowest rows, compile {mode}", name=one["name"], **times, tflops=one["tflops"], kept=held)
    for finding in profile["findings"]:
        row(f"findings, compile {mode}", name=finding)


def _kernels_of_a_step(trainer: Trainer) -> float:
    """Milliseconds of all kernels of one step, of operators on a CPU, by torch's profiler."""
    from campaign_stages import kernels_of  # which imports this module
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    with profile(activities=activities) as trace:
        trainer.step()
        wait()
    kernels, spent = kernels_of(trace.key_averages())
    return sum(map(spent, kernels)) / 1e3

"""A job that a test submits on one host of several, and what holds for it under every launcher."""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hosts import ROOT, Hosts
from launched import Launched, alive, losses

from megaresnorm.checkpoint.format import list_checkpoints
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import dump_recipe

STEPS, INTERVAL = 150, 10
SECONDS = 10.0  # from a failure, or from a signal with nothing to save, to the end of everything
LAUNCH = (sys.executable, "-m", "megaresnorm", "launch")
ERROR = "the weather in node 1"
# Found by every Python that has its folder on PYTHONPATH; only the rank that the file names does anything.
FAULT = """
import ctypes, json, os, pathlib, signal, threading, time

def fail():
    fault = json.loads(pathlib.Path({path!r}).read_text())
    metrics = pathlib.Path(fault["metrics"])
    while not metrics.exists() or metrics.read_text().count("\\n") < fault["lines"]:
        time.sleep(0.02)
    Weather = type("WeatherError", (Exception,), {{"__str__": lambda self: fault["text"], "__module__": "builtins"}})
    pathlib.Path({path!r} + ".at").write_text(str(time.monotonic()))
    if fault["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.main_thread().ident), ctypes.py_object(Weather))

if os.environ.get("RANK") == "1" and "MEGARESNORM_LAUNCHER" in os.environ and pathlib.Path({path!r}).exists():
    threading.Thread(target=fail, daemon=True).start()
"""


class Submitted(Launched):
    """A command on a host that starts a job there and on others.

    Args:
        host: index of the host on which it is submitted.
        command: without what puts it on that host.
        folder: in which it works.
    """

    def __init__(
        self, hosts: Hosts, host: int, command: Sequence[str], folder: Path, output: Path, **variables: str
    ) -> None:
        self.hosts = hosts
        self.start([*hosts.on(host), *command], folder, output, variables_of_a_user(folder) | variables)

    def kill_all(self) -> None:
        """End what a failed test has left on the hosts."""
        self.end()
        for pid in self.hosts.processes():
            os.kill(pid, signal.SIGKILL)

    def wait_until_nothing_is_left(self, seconds: float) -> float:
        """The seconds until no process of a job is left on any host."""
        start = time.monotonic()
        while left := self.hosts.processes():
            assert time.monotonic() < start + seconds, [
                Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in left if alive(pid)
            ]
            time.sleep(0.05)
        return time.monotonic() - start


def variables_of_a_user(folder: Path) -> dict[str, str]:
    """Environment of the terminal in which a job is submitted."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "DS_ACCELERATOR": "cpu",
    }


def write_recipe(folder: Path, recipe: Recipe) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))


def write_hostfile(hosts: Hosts, folder: Path, names: Sequence[str] | None = None, slots: int = 1) -> Path:
    path = folder / "hosts.txt"
    path.write_text("".join(f"{name} slots={slots}\n" for name in names or hosts.addresses))
    return path


def plan_fault(folder: Path, output: Path, *, kill: bool = False, lines: int = 3, text: str = ERROR) -> Path:
    """Let rank 1 fail in its main thread, or be killed, once the run has reported some steps; the file of the time."""
    path = folder / "fault.json"
    fault = {"metrics": str(output / "metrics.jsonl"), "lines": lines, "kill": kill, "text": text}
    path.write_text(json.dumps(fault))
    (folder / "sitecustomize.py").write_text(FAULT.format(path=str(path)))
    return Path(f"{path}.at")


Submit = Callable[..., Submitted]  # (folder, recipe, *options) -> the job, by one launcher


def check_failure(submit: Submit, folder: Path, recipe: Recipe, *, kill: bool) -> None:
    """A rank of node 2 fails: its error is the last line here within seconds, and nothing is left anywhere."""
    write_recipe(folder, recipe)
    at = plan_fault(folder, Path(recipe.train.output), kill=kill)
    job = submit(folder, recipe, "--max-restarts", "0")
    job.wait_for(at.exists, "fault")
    code = job.finish(60)
    seconds = time.monotonic() - float(at.read_text())
    left = job.wait_until_nothing_is_left(2)
    print(f"\n{seconds:.1f} s from {'SIGKILL' if kill else 'the error'} to the end, code {code}", flush=True)
    want = "killed by SIGKILL" if kill else f"WeatherError: {ERROR}"
    last = job.lines[-1][1]
    assert last.startswith(f"megaresnorm: error: rank 1 on {job.hosts.names[1]}: {want}"), job.text
    assert code == (128 + signal.SIGKILL if kill else 1) and seconds + left < SECONDS, (code, seconds, left, job.text)


def check_stop_before_the_first_step(
    submit: Submit, folder: Path, recipe: Recipe, when: str = "ranks", pause: float = 0.0
) -> None:
    """SIGTERM before there is anything to save.

    Args:
        when: ``start`` for as soon as the launcher hears signals, ``ranks`` for while ranks import torch.
        pause: seconds of waiting before the signal.
    """
    write_recipe(folder, recipe)
    job = submit(folder, recipe)
    if when == "ranks":
        job.wait_for(lambda: sum("megaresnorm.cli" in command(pid) for pid in job.hosts.processes()) >= 1, "rank")
    else:
        job.wait_for(lambda: len(job.everybody()) >= 2, "process that watches")
    time.sleep(pause)
    start = time.monotonic()
    os.kill(job.process.pid, signal.SIGTERM)
    code = job.finish(60)
    seconds = time.monotonic() - start
    left = job.wait_until_nothing_is_left(10)
    print(f"\n{seconds:.1f} s from SIGTERM before the first step ({when}) to the end, +{left:.1f}", flush=True)
    assert code == 143 and seconds + left < SECONDS and not job.steps, job.text
    assert "Traceback" not in job.text, job.text


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def check_stop_and_resume(submit: Submit, folder: Path, recipe: Recipe, want: tuple[dict[int, str], str]) -> None:
    """SIGTERM saves a checkpoint and ends with 143; the same command goes on from it, bit for bit.

    Args:
        want: losses and digest of the run left alone.
    """
    write_recipe(folder, recipe)
    job = submit(folder, recipe)
    job.wait_for_step(12)
    start = time.monotonic()
    os.kill(job.process.pid, signal.SIGTERM)
    code = job.finish(60)
    seconds = time.monotonic() - start
    job.wait_until_nothing_is_left(5)
    print(f"\n{seconds:.1f} s from SIGTERM during training to the end", flush=True)
    done = len(losses(job.output))
    assert code == 143 and f"saved step {done} of {STEPS}" in job.text and 12 <= done < STEPS, job.text
    assert list_checkpoints(job.output / "checkpoints")[-1][0] == done and "Traceback" not in job.text
    again = submit(folder, recipe)
    assert again.finish(120) == 0, again.text
    again.wait_until_nothing_is_left(5)
    assert f"step {done} of {STEPS}" in again.text and losses(job.output) == want[0] and again.digest == want[1]


def check_second_signal(submit: Submit, folder: Path, recipe: Recipe) -> None:
    """A rank that does not answer keeps the job from ever saving; a second signal ends it all the same."""
    write_recipe(folder, recipe)
    job = submit(folder, recipe)
    job.wait_for_step(3)
    rank = next(pid for pid in ranks_on(job.hosts, 1))
    os.kill(rank, signal.SIGSTOP)
    os.kill(job.process.pid, signal.SIGTERM)
    time.sleep(3)
    assert job.process.poll() is None, job.text
    start = time.monotonic()
    os.kill(job.process.pid, signal.SIGTERM)
    code = job.finish(60)
    seconds = time.monotonic() - start
    left = job.wait_until_nothing_is_left(10)
    print(f"\n{seconds:.1f} s from the second SIGTERM to the end, +{left:.1f}", flush=True)
    assert code == 143 and seconds + left < SECONDS, (code, job.text)


def ranks_on(hosts: Hosts, i: int) -> list[int]:
    return [pid for pid in hosts.processes(i) if re.search(r"megaresnorm\.(cli train|job) ", command(pid))]


def check_killed(submit: Submit, folder: Path, recipe: Recipe, *, started: bool) -> None:
    """kill -9 of the submitting process leaves nothing on any host, be it while nodes are starting or in training."""
    write_recipe(folder, recipe)
    job = submit(folder, recipe)
    if started:
        job.wait_for_step(3)
    else:
        job.wait_for(lambda: bool(job.hosts.processes(1)), "process on the second host")
    start = time.monotonic()
    os.kill(job.process.pid, signal.SIGKILL)
    job.wait_until_nothing_is_left(30)
    print(f"\n{time.monotonic() - start:.1f} s from kill -9 to nothing left", flush=True)
    assert job.finish(5) == -signal.SIGKILL


def check_logs(submit: Submit, folder: Path, recipe: Recipe) -> None:
    """Each rank's file has its rank and host in its name and all that it printed; here its lines say whose they are."""
    write_recipe(folder, recipe)
    plan_fault(folder, Path(recipe.train.output))
    job = submit(folder, recipe, "--max-restarts", "0", "--log-dir", str(folder / "logs"))
    job.finish(120)
    job.wait_until_nothing_is_left(2)
    names = [f"rank-{i:05d}.{name}.log" for i, name in enumerate(job.hosts.names[:2])]
    assert sorted(path.name for path in (folder / "logs").iterdir()) == names
    zero, one = ((folder / "logs" / name).read_text() for name in names)
    assert "Traceback" in one and f"WeatherError: {ERROR}" in one and ERROR not in zero and "step " in zero
    assert any(line.startswith("step ") for _, line in job.lines)
    shown = [line for _, line in job.lines if f"WeatherError: {ERROR}" in line]
    assert shown[0].startswith(f"[rank 1 on {job.hosts.names[1]}] "), job.text
    assert job.lines[-1][1] == f"megaresnorm: error: rank 1 on {job.hosts.names[1]}: WeatherError: {ERROR}"

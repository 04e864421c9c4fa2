"""A real Slurm, on a login node and two compute nodes that have addresses of their own.

Run with: pytest -m slow tests/launch/test_slurm.py
"""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from launched import losses, train_on_rank
from slurm_cluster import WHY_NOT, SlurmCluster, Terminal

from megaresnorm.checkpoint.format import list_checkpoints
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import dump_recipe
from megaresnorm.testing import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

STEPS = 200
FAILS = "this node has lost its disk"
# Read by every Python of a job: slower steps, a slower start of supervisors, a rank that fails.
DISTURBED = f"""
import os, sys, threading, time

if "launch" in sys.argv or "launch" in sys.orig_argv:
    time.sleep(float(os.environ.get("TEST_SLOW_START", 0)))

def disturb():
    while not hasattr(sys.modules.get("megaresnorm.trainer"), "Trainer"):
        time.sleep(0.01)
    trainer = sys.modules["megaresnorm.trainer"].Trainer
    step, done = trainer.step, []
    def slower(self):
        time.sleep(float(os.environ.get("TEST_SLOW_STEPS", 0)))
        done.append(1)
        if len(done) == 5 and os.environ.get("TEST_FAILS") == os.environ.get("RANK", "-"):
            raise RuntimeError("{FAILS}")
        return step(self)
    trainer.step = slower

if "RANK" in os.environ or "megaresnorm.job" in sys.orig_argv:  # ranks alone: others block signals later, by thread
    threading.Thread(target=disturb, daemon=True).start()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with SlurmCluster(2, tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def terminal(cluster, tmp_path):
    """A function from a command on the login node to its terminal; what is left at the end is ended."""
    started: list[Terminal] = []
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DISTURBED)
    path = os.pathsep.join([str(tmp_path / "site"), cluster.environment["PYTHONPATH"]])

    def run(words, **variables: str) -> Terminal:
        started.append(Terminal(cluster, tmp_path, words, PYTHONPATH=path, **variables))
        return started[-1]

    yield run
    for one in started:
        one.end()
    cluster.end_jobs()


@pytest.fixture
def recipe(tiny, tmp_path) -> Recipe:
    made = tiny(
        model={"dim": 32, "num_blocks": 4, "num_heads": 4, "dropout": 0.1, "ffn_dim": 64, "seq_len": 32},
        train={"steps": STEPS, "global_batch": 8, "eval_every": 0, "output": str(tmp_path / "run")},
        checkpoint={"every": 50},
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(made))
    return made


@pytest.fixture(scope="module")
def undisturbed():
    """A function from a recipe to the losses and the digest of its run on two ranks of one host, kept."""
    known: dict[int, tuple[dict, str]] = {}

    def outcome(recipe: Recipe) -> tuple[dict, str]:
        if 2 not in known:
            output = f"{recipe.train.output}-undisturbed"
            apart = recipe.model_copy(update={"train": recipe.train.model_copy(update={"output": output})})
            digest = run_ranks(2, train_on_rank, 2, apart)[0]
            known[2] = losses(Path(output)), digest
        return known[2]

    return outcome


TWO_NODES = ("recipe.yaml", "--nodes", "2", "--ranks-per-node", "1", "--job", "pretrain")
SLOW = {"TEST_SLOW_STEPS": "0.15"}


def digest(text: str) -> str:
    return re.findall(r"weights +([0-9a-f]{64})", text)[-1]


def saved_steps(recipe: Recipe) -> list[int]:
    return [step for step, _ in list_checkpoints(Path(recipe.train.output) / "checkpoints")]


def submitted(run: Terminal) -> int:
    return int(run.wait_for(r"^job (\d+) is submitted; its log is /.*/pretrain-\1\.log$")[1][1])


def in_allocation(cluster: SlurmCluster, *words: str) -> list[str]:
    return cluster.on_login("salloc", "--quiet", "--nodes=2", "--exclusive", *words)


def nothing_is_left(cluster: SlurmCluster, within: float = 10) -> bool:
    end = time.monotonic() + within
    while (left := cluster.processes()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left, left
    return True


def test_two_nodes_train_as_two_ranks_of_one_host(cluster, terminal, recipe, undisturbed):
    """No host can resolve what Slurm calls the nodes."""
    run = terminal(cluster.launch(*TWO_NODES, "--wait"))
    number = submitted(run)
    assert run.finish() == 0, run.text
    want_losses, want_digest = undisturbed(recipe)
    assert losses(Path(recipe.train.output)) == want_losses and digest(run.text) == want_digest
    assert cluster.job(number)["JobState"] == "COMPLETED" and nothing_is_left(cluster)


def goes_on(cluster, run, number, recipe, undisturbed, log) -> int:
    """Wait for a job that was told to save: it is queued again and ends as one that was never stopped.

    Returns:
        The step at which it was saved.
    """
    end = time.monotonic() + 240
    while (facts := cluster.job(number))["JobState"] not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"):
        if facts["JobState"] == "PENDING" and facts["TimeLimit"] == "00:02:00":
            cluster.ask("scontrol", "update", f"JobId={number}", "TimeLimit=10")  # one turn more is enough
        assert time.monotonic() < end, log.read_text()
        time.sleep(1)
    text = log.read_text()
    assert facts["JobState"] == "COMPLETED" and facts["Restarts"] == "1" and facts["ExitCode"] == "0:0", text
    (step,) = map(int, re.findall(rf"saved step (\d+) of {STEPS}", text))
    assert text.count(f"megaresnorm: saved, code 138; job {number} waits for its next turn") == 1
    assert re.search(
        rf"(?m)^resumed .*step-0*{step}\b|step {step} of {STEPS}", text.split("waits for its next turn")[1]
    )
    want_losses, want_digest = undisturbed(recipe)
    assert losses(Path(recipe.train.output)) == want_losses and digest(text) == want_digest
    assert nothing_is_left(cluster)
    return step


def test_usr1_saves_and_the_job_goes_on_in_its_next_turn(cluster, terminal, recipe, undisturbed, tmp_path):
    run = terminal(cluster.launch(*TWO_NODES, "--wait"), **SLOW)
    number = submitted(run)
    run.wait_for(r"^step +20/")
    start = time.monotonic()
    cluster.ask("scancel", "--signal=USR1", number)
    saved, _ = run.wait_for(r"saved step \d+ of")
    ended, _ = run.wait_for("waits for its next turn")
    step = goes_on(cluster, run, number, recipe, undisturbed, tmp_path / f"pretrain-{number}.log")
    again = next(at for at, line in run.lines if line.startswith(f"step {step + 1:>3}/"))
    assert run.finish(30) == 0 and not list(tmp_path.glob(".saved-*"))
    print(
        f"USR1 to saved {saved - start:.1f} s, to the end {ended - start:.1f} s, to the next step {again - start:.1f} s"
    )


def test_the_time_limit_saves_and_the_job_goes_on_in_its_next_turn(cluster, terminal, recipe, undisturbed, tmp_path):
    """Of two minutes, the second of which is for saving; Slurm itself may be up to a minute early."""
    limit = ("--sbatch", "time=2", "--sbatch", "signal=USR1@60")
    run = terminal(cluster.launch(*TWO_NODES, *limit), TEST_SLOW_STEPS="0.4")
    number = submitted(run)
    assert run.finish() == 0
    log = tmp_path / f"pretrain-{number}.log"
    step = goes_on(cluster, run, number, recipe, undisturbed, log)
    print(f"the limit came at step {step}")


def test_a_node_that_does_not_end_does_not_keep_the_job_from_its_next_turn(cluster, terminal, recipe, tmp_path):
    """Its supervisor is stopped, so Slurm kills the task, and srun's exit code is no more that of a run that saved."""
    run = terminal(cluster.launch(*TWO_NODES, "--wait"), **SLOW)
    number = submitted(run)
    run.wait_for(r"^step +10/")
    stuck = next(pid for pid in cluster.hosts.processes(2) if "--saved" in command(pid) and "trap" not in command(pid))
    os.kill(stuck, signal.SIGSTOP)
    cluster.ask("scancel", "--signal=USR1", number)
    _, code = run.wait_for(r"megaresnorm: saved, code (\d+); job \d+ waits for its next turn", 90)
    assert code[1] != "138"
    end = time.monotonic() + 60
    while cluster.job(number)["Restarts"] != "1":
        assert time.monotonic() < end
        time.sleep(1)


def test_usr1_while_python_starts_ends_the_run_in_order_and_is_no_next_turn(cluster, terminal, recipe, tmp_path):
    """Else a limit that is shorter than the start would queue the job again for ever."""
    run = terminal(cluster.launch(*TWO_NODES, "--wait"), TEST_SLOW_START="5")
    number = submitted(run)
    end = time.monotonic() + 60
    while cluster.job(number)["JobState"] != "RUNNING" or len(cluster.processes()) < 5:
        assert time.monotonic() < end
        time.sleep(0.2)
    time.sleep(1.5)
    cluster.ask("scancel", "--signal=USR1", number)
    assert run.finish(60) == 138, run.text
    assert "megaresnorm: error: USR1 came before this turn had written a checkpoint; give it more time" in run.text
    assert "User defined signal" not in run.text and not re.search(r"(?m)^step ", run.text)
    assert cluster.job(number)["JobState"] == "FAILED" and cluster.job(number)["Restarts"] == "0"
    assert nothing_is_left(cluster)


@pytest.mark.parametrize("where", ["a batch job", "an allocation"])
def test_the_error_of_a_rank_is_the_last_line(cluster, terminal, recipe, where):
    """Of the second node; the job is not queued again."""
    words = cluster.launch(*TWO_NODES, "--max-restarts", "0", *(["--wait"] if where == "a batch job" else []))
    if where == "an allocation":
        words = in_allocation(cluster, *words[words.index("-") + 1 :])
    run = terminal(words, TEST_FAILS="1", **SLOW)
    failed, _ = run.wait_for(FAILS)
    code = run.finish()
    seconds = time.monotonic() - failed
    assert code not in (0, 138), run.text
    assert run.lines[-1][1] == f"megaresnorm: error: rank 1 on n2: RuntimeError: {FAILS}", run.text
    assert seconds < 10 and nothing_is_left(cluster, 3)
    if where == "a batch job":
        facts = cluster.job(submitted(run))
        assert facts["JobState"] == "FAILED" and facts["ExitCode"] == f"{code}:0" and facts["Restarts"] == "0"
    print(f"{where}: {seconds:.1f} s from the error to the end, code {code}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", ["a batch job", "an allocation"])
def test_a_signal_before_the_first_step_ends_all_at_once(cluster, terminal, recipe, where, number):
    words = cluster.launch(*TWO_NODES, *(["--wait"] if where == "a batch job" else []))
    if where == "an allocation":
        words = in_allocation(cluster, *words[words.index("-") + 1 :])
    run = terminal(words, **SLOW)
    end = time.monotonic() + 60
    while len(ranks := [line for line in cluster.processes() if " train recipe.yaml" in line]) < 2:
        assert time.monotonic() < end, (run.text, cluster.processes())
        time.sleep(0.05)
    start = time.monotonic()
    os.kill(front(cluster, where), number)
    assert run.finish(30) == (143 if where == "a batch job" else 128 + number), run.text
    assert time.monotonic() - start < 12 and nothing_is_left(cluster) and ranks
    assert not re.search(r"(?m)^step ", run.text) and "Traceback" not in run.text
    print(f"{where}, {number.name}: {time.monotonic() - start:.1f} s")


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def front(cluster: SlurmCluster, where: str) -> int:
    """The process that submits; in an allocation, of the two the parent."""
    pids = [
        int(line.partition(":")[0]) for line in cluster.processes() if "--with slurm" in line and "salloc" not in line
    ]
    return min(pids)


@pytest.mark.parametrize("where", ["a batch job", "an allocation"])
def test_a_signal_saves_and_ends_the_job(cluster, terminal, recipe, where):
    words = cluster.launch(*TWO_NODES, *(["--wait"] if where == "a batch job" else []))
    if where == "an allocation":
        words = in_allocation(cluster, *words[words.index("-") + 1 :])
    run = terminal(words, **SLOW)
    run.wait_for(r"^step +10/")
    start = time.monotonic()
    os.kill(front(cluster, where), signal.SIGTERM)
    assert run.finish(60) == 143, run.text
    assert len(saved := saved_steps(recipe)) == 1 and 10 <= saved[0] <= 15, run.text
    assert nothing_is_left(cluster) and "waits for its next turn" not in run.text
    if where == "a batch job":
        facts = cluster.job(submitted(run))
        assert facts["JobState"] == "FAILED" and facts["ExitCode"] == "143:0" and facts["Restarts"] == "0"
    print(f"{where}: saved and ended in {time.monotonic() - start:.1f} s")


def test_a_waiting_job_is_cancelled_by_a_signal(cluster, terminal, recipe):
    run = terminal(cluster.launch(*TWO_NODES, "--wait", "--sbatch", "begin=now+1hour"))
    number = submitted(run)
    time.sleep(4)
    os.kill(front(cluster, "a batch job"), signal.SIGTERM)
    assert run.finish(30) != 0
    assert cluster.job(number)["JobState"] == "CANCELLED"


def test_scancel_saves_and_leaves_nothing(cluster, terminal, recipe):
    run = terminal(cluster.launch(*TWO_NODES, "--wait"), **SLOW)
    number = submitted(run)
    run.wait_for(r"^step +10/")
    start = time.monotonic()
    cluster.ask("scancel", number)
    assert run.finish(60) == 143, run.text
    assert nothing_is_left(cluster) and cluster.job(number)["JobState"] == "CANCELLED"
    print(f"{time.monotonic() - start:.1f} s; saved {saved_steps(recipe)}")


@pytest.mark.parametrize("nodes", [1, 2])
def test_srun_starts_ranks_directly(cluster, terminal, recipe, undisturbed, nodes):
    """A rank for each task, by Slurm's variables alone; srun is given on the login node."""
    job = (sys.executable, "-m", "megaresnorm.job", "recipe.yaml")
    run = terminal(cluster.on_login("srun", f"--nodes={nodes}", "--ntasks=2", *job))
    assert run.finish() == 0, run.text
    want_losses, want_digest = undisturbed(recipe)
    assert losses(Path(recipe.train.output)) == want_losses and digest(run.text) == want_digest


def test_launch_with_several_tasks_on_a_node_is_refused(cluster, terminal, recipe):
    launch = (sys.executable, "-m", "megaresnorm", "launch", "recipe.yaml", "--ranks-per-node", "1")
    run = terminal(cluster.on_login("srun", "--quiet", "--nodes=1", "--ntasks=2", *launch))
    assert run.finish() == 2, run.text
    ours = [line for _, line in run.lines if not line.startswith("srun:")]
    assert len(set(ours)) == 1 and "Slurm has started 2 processes on this node" in ours[0], run.text

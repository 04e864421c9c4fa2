"""The batch script for Slurm, and what its nodes make of Slurm's variables, without Slurm."""

import ast
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaresnorm.cli import main
from megaresnorm.errors import ConfigError
from megaresnorm.launch.request import Request
from megaresnorm.launch.slurm import HEARS_LATER, batch_script, options_of
from megaresnorm.launch.slurm_job import exit_code_of, facts_of
from megaresnorm.parallel import environment
from megaresnorm.parallel.environment import master_here
from megaresnorm.parallel.launchers import address_in_batch
from megaresnorm.parallel.plan import read_plan
from megaresnorm.recipe.load import dump_recipe

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "launch" / "slurm.sbatch"


def request(**changes) -> Request:
    given = {"recipe": "recipe.yaml", "job": "job", "nodes": 2, "ranks": 8, "variables": {}, "folder": Path("/work")}
    return Request(**given | changes)


def test_the_shipped_script_is_what_the_generator_makes():
    made = request(recipe="configs/deepnorm-200-1b.yaml", job="deepnorm-200-1b", nodes=4, python="python")
    options = {"time": "24:00:00"}
    assert SHIPPED.read_text() == batch_script(made, gpus=True, options=options, portable=True)


def test_the_command_line_makes_it_too_up_to_folder_and_python(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for name in [
        name for name in os.environ if name.startswith(("OMP_", "PYTHONPATH", "NCCL_", "GLOO_", "TORCH", "MKL_"))
    ]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    words = ["--nodes", "4", "--gpus-per-node", "8", "--with", "slurm", "--job", "deepnorm-200-1b", "--dry-run"]
    assert main(["launch", "configs/deepnorm-200-1b.yaml", *words, "--sbatch", "time=24:00:00"]) == 0
    printed = capsys.readouterr().out.replace(shlex.quote(sys.executable), "python").splitlines()
    differ = [line for line in SHIPPED.read_text().splitlines() if line not in printed]
    assert [line.partition(" ")[0] for line in differ] == ["#", "cd", "#"], differ  # where it is, folder, environment


def test_no_shell_takes_offence_at_it(tmp_path):
    subprocess.run(["bash", "-n", SHIPPED], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SHIPPED], check=True)


HOSTILE = '/w/it\'s $(touch pwned) `id`; "x" & *'


def test_paths_overrides_and_variables_reach_srun_as_they_are(tmp_path):
    """The script is run, with a srun that prints its words."""
    folder = tmp_path / HOSTILE.replace("/", "_")
    folder.mkdir()
    (tmp_path / "srun").write_text(
        f'#!{sys.executable}\nimport os, sys\nprint([*sys.argv[1:], os.environ["NCCL_X"]])\n'
    )
    (tmp_path / "srun").chmod(0o755)
    made = request(
        recipe=HOSTILE, overrides=(f"train.output={HOSTILE}",), folder=folder, variables={"NCCL_X": HOSTILE},
        logs=HOSTILE, python=f"/py thon/{HOSTILE}",
    )  # fmt: skip
    script = batch_script(made, gpus=True, options={})
    run = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=run, cwd=tmp_path)
    words = ast.literal_eval(done.stdout)
    assert words[-1] == HOSTILE and words[-2] == f"{folder}/.saved-7" and words[-3] == "--saved", done
    assert f"train.output={HOSTILE}" in words and f"/py thon/{HOSTILE}" in words and words.count(HOSTILE) == 3
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("partition=a b", "wanted NAME=VALUE"),
        ("comment=x\n#SBATCH --uid=0", "wanted NAME=VALUE"),
        ("comment=x#y", "wanted NAME=VALUE"),
        ("comment='x", "wanted NAME=VALUE"),
        ("comment=\u00e9", "wanted NAME=VALUE"),
        ("--time=1", "wanted NAME=VALUE"),
        ("t=1", "wanted NAME=VALUE"),
        ("Time=1", "wanted NAME=VALUE"),
        ("", "wanted NAME=VALUE"),
        ("array=0-3", "one job trains one recipe"),
        ("ntasks-per-node=8", "a node has one task"),
        ("nodes=3", "give --nodes itself"),
        ("wait", "give --wait itself"),
        ("wrap=ls", "the script is made here"),
    ],
)
def test_hostile_options_are_refused_in_one_line(option, says):
    with pytest.raises(ConfigError) as caught:
        options_of([option])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_options_replace_those_of_the_script():
    options = options_of(["time=24:00:00", "partition=gpu", "signal=USR1@600", "exclusive=user", "mail-type=END"])
    lines = [
        line.partition(" #")[0].rstrip() for line in batch_script(request(), gpus=False, options=options).splitlines()
    ]
    for wanted in ("time=24:00:00", "partition=gpu", "signal=USR1@600", "exclusive=user", "mail-type=END"):
        assert f"#SBATCH --{wanted}" in lines
    assert not any("gpus" in line and line.startswith("#SBATCH") for line in lines)
    assert sum("--signal" in line for line in lines) == 1 and not any(
        line.startswith("##SBATCH --time") for line in lines
    )


CASES = {  # exit code of srun, whether node 0 has left its file -> exit code, whether the job is queued again
    "all saved": (138, True, 138, True),
    "a node had to be killed": (137, True, 137, True),
    "no progress": (138, False, 138, False),
    "the end of the recipe": (0, False, 0, False),
    "an error": (1, False, 1, False),
    "ended by a user": (143, False, 143, False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_script_asks_for_its_next_turn_after_progress_alone(case, tmp_path):
    code, saved, want, again = CASES[case]
    leave = 'for last; do :; done; touch "$last"' if saved else ":"
    (tmp_path / "srun").write_text(f"#!/bin/bash\n{leave}\nexit {code}\n")
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "scontrol $*"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".saved-7").touch()  # of an earlier turn, which was killed
    script = batch_script(request(folder=tmp_path), gpus=False, options={})
    run = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env=run)
    assert done.returncode == want and ("scontrol requeue 7" in done.stdout) == again, done
    assert ("give it more time" in done.stdout) == (case == "no progress")
    assert not (tmp_path / ".saved-7").exists()


HEARS = """
import signal, sys, time
print("up", flush=True)
time.sleep(1)
heard = []
signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
print(len(heard))
"""


@pytest.mark.parametrize("env", ["new", "old"])
def test_usr1_waits_until_python_hears_it(env, tmp_path):
    """With an old env it is lost, but ends nobody."""
    (tmp_path / "env").write_text('#!/bin/sh\necho "env: unrecognized option" >&2\nexit 125\n')
    (tmp_path / "env").chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin" if env == "old" else "/usr/bin:/bin"
    process = subprocess.Popen(
        ["bash", "-c", HEARS_LATER, "-", sys.executable, "-c", HEARS],
        env={"PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=10)[0] == ("0\n" if env == "old" else "1\n") and process.returncode == 0


BATCH = {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7", "ENVIRONMENT": "BATCH", "SLURM_JOB_NODELIST": "n[07-09]"}


@pytest.mark.parametrize(
    ("changed", "host", "want"),
    [
        ({}, "n07", "10.0.0.7"),
        ({}, "n08", None),  # a step on some of the nodes
        ({"ENVIRONMENT": ""}, "n07", None),  # srun was given on a login node
        ({"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}, "n07", None),
        ({"SLURM_LAUNCH_NODE_IPADDR": ""}, "n07", None),
        ({"SLURM_JOB_NODELIST": ""}, "n07", None),
    ],
)
def test_the_address_of_the_first_node_of_a_batch_job(changed, host, want):
    assert address_in_batch(BATCH | changed, host) == want


def test_a_node_is_reached_by_its_name_then_by_what_slurm_says(monkeypatch):
    known = {"n07"}
    monkeypatch.setattr(environment, "resolved", lambda host: host if host in known else None)
    monkeypatch.setattr(environment, "address_by_slurm", lambda node: "10.0.0.8" if node == "n08" else None)
    inside = BATCH | {"SLURM_JOB_ID": "3"}
    assert master_here("n07", inside) == "n07"
    known.clear()
    assert master_here("n07", inside) == "10.0.0.7" and master_here("n08", inside) == "10.0.0.8"
    assert master_here("n09", inside) == "n09"  # waited for, and then an error names it
    assert master_here("n07", BATCH) == "n07"  # not under Slurm at all


def test_scontrol_is_read(tmp_path, monkeypatch):
    from megaresnorm.parallel.addresses import address_by_slurm

    monkeypatch.setenv("PATH", str(tmp_path))
    assert address_by_slurm("n1") is None
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\n[ "$4" = n1 ] || exit 1\necho "NodeName=n1 NodeAddr=127.0.0.9 NodeHostName=x"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    assert address_by_slurm("n1") == "127.0.0.9" and address_by_slurm("n2") is None


def test_the_file_for_the_next_turn_is_part_of_the_plan():
    assert read_plan(lambda: 1, {}, SAVED="/x/.saved-7").saved == Path("/x/.saved-7")
    assert read_plan(lambda: 1, {}).saved is None


@pytest.mark.parametrize(
    ("state", "code", "want"),
    [
        ("COMPLETED", "0:0", 0), ("FAILED", "143:0", 143), ("CANCELLED", "0:15", 143), ("TIMEOUT", "0:0", 1),
        ("NODE_FAIL", "0:0", 1), ("PENDING", "138:0", None), ("RUNNING", "0:0", None), ("COMPLETING", "0:0", None),
        ("REQUEUED", "0:0", None),
    ],
)  # fmt: skip
def test_the_exit_code_of_a_job(state, code, want):
    assert exit_code_of(facts_of(f"JobId=7 JobName=a JobState={state} Restarts=1 ExitCode={code}")) == want


FAKES = {  # commands that know one job, whose state and restarts stand in a file
    "sbatch": 'cat > script; echo "7;far"',
    "scontrol": '[ "$*" = "--cluster far show job -o 7" ] || exit 1\n'
    'echo "JobId=7 JobName=job $(cat state) StdErr=$PWD/a%j.log StdOut=$PWD/%x-%j.log"',
    "squeue": "cat steps",
    "scancel": 'echo "$*" >> cancelled',
}


@pytest.fixture
def waiting(tmp_path, tiny):
    """A process that waits for a job of a Slurm that is none."""
    (tmp_path / "bin").mkdir()
    for name, script in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny()))
    (tmp_path / "state").write_text("JobState=RUNNING Restarts=0 ExitCode=0:0")
    (tmp_path / "steps").write_text("7.batch\n7.0\n")
    (tmp_path / "job-7.log").write_text("step 1\nmegaresnorm: error: rank 3 on n2: of an earlier turn\nstep")
    words = [
        "launch",
        "recipe.yaml",
        "--with",
        "slurm",
        "--nodes",
        "2",
        "--ranks-per-node",
        "1",
        "--wait",
        "--job",
        "job",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "megaresnorm", *words],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup may have started the tests
    )
    assert process.stdout.readline() == f"job 7 is submitted; its log is {tmp_path}/job-7.log\n"
    assert process.stdout.readline() == "step 1\n"
    yield process
    process.kill()
    process.wait()


def test_a_job_is_waited_for_through_its_turns_and_its_error_is_the_last_line(waiting, tmp_path):
    (tmp_path / "state").write_text("JobState=PENDING Restarts=1 ExitCode=138:0")
    with (tmp_path / "job-7.log").open("a") as log:
        log.write(" 2\n")
    time.sleep(3.5)
    (tmp_path / "state").write_text("JobState=FAILED Restarts=1 ExitCode=5:0")
    with (tmp_path / "job-7.log").open("a") as log:
        log.write("megaresnorm: error: rank 1 on n9: the cause\nsrun: error: much ado")
    lines = waiting.stdout.read().splitlines()
    assert waiting.wait(20) == 5
    assert lines[1:] == [
        "step 2", "megaresnorm: error: rank 1 on n9: the cause", "srun: error: much ado",
        "megaresnorm: error: rank 1 on n9: the cause",
    ]  # fmt: skip


def cancelled(folder, count: int) -> list[str]:
    """What scancel was told, once it was so often."""
    file, end = folder / "cancelled", time.monotonic() + 20
    while not file.exists() or len(file.read_text().splitlines()) < count:
        assert time.monotonic() < end
        time.sleep(0.05)
    return file.read_text().splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_a_second_one_cancels(waiting, tmp_path, number):
    waiting.send_signal(number)
    name = "USR1" if number == signal.SIGUSR1 else "TERM"
    assert cancelled(tmp_path, 1) == [f"--cluster far --signal={name} 7"]
    time.sleep(1.5)  # what comes sooner counts as the same signal
    waiting.send_signal(number)
    assert cancelled(tmp_path, 2)[1:] == ["--cluster far 7"]
    (tmp_path / "state").write_text("JobState=CANCELLED Restarts=0 ExitCode=0:15")
    assert waiting.wait(20) == 143


def test_a_job_without_tasks_is_cancelled_at_once(waiting, tmp_path):
    """Its script is starting, or it waits for its turn: nothing would hear a signal."""
    (tmp_path / "steps").write_text("7.batch\n")
    waiting.send_signal(signal.SIGTERM)
    assert cancelled(tmp_path, 1) == ["--cluster far 7"]


def test_a_closed_terminal_leaves_the_job(waiting, tmp_path):
    waiting.send_signal(signal.SIGHUP)
    assert waiting.wait(20) == -signal.SIGHUP and not (tmp_path / "cancelled").exists()


def test_what_a_node_is_told_is_no_option_of_the_command_that_starts_nodes(capsys):
    assert main(["launch", "recipe.yaml", "--with", "slurm", "--saved", "x"]) == 2
    assert "--saved is for the command that each node runs" in capsys.readouterr().err

"""What megaresnorm launch refuses: one line, exit code 2, and nothing is started."""

import signal
import subprocess

import pytest

from megaresnorm.cli import main
from megaresnorm.launch import front, ssh, submit
from megaresnorm.recipe.load import dump_recipe
from megaresnorm.resilience.launcher import SIGNALS

HOSTFILES = {
    "nothing": "",
    "comments alone": "# node0 slots=8\n\n",
    "an option in the place of a host": "-oProxyCommand=touch${IFS}pwned slots=8\n",
    "a command": "node0;reboot slots=8\n",
    "a substitution": "$(reboot) slots=8\n",
    "a quote": "node0' slots=8\n",
    "a user": "root@node0 slots=8\n",
    "a path": "../../etc/passwd\n",
    "a wildcard": "node* slots=8\n",
    "a list of Slurm's": "node[0-3] slots=8\n",
    "escape sequences": "node0\x1b[2J slots=8\n",
    "a host twice in other letters": "node0 slots=8\nNode0. slots=8\n",
    "a host twice": "node0 slots=8\nnode1 slots=8\nnode0 slots=8\n",
    "slots that are a word": "node0 slots=many\n",
    "no slots": "node0 slots=0\n",
    "negative slots": "node0 slots=-1\n",
    "slots without a number": "node0 slots=\n",
    "more slots than a host has": "node0 slots=100000\n",
    "slots in other digits": "node0 slots=\u0661\n",
    "different slots": "node0 slots=8\nnode1 slots=4\n",
    "slots on one host alone": "node0 slots=8\nnode1\n",
    "two hosts in a line": "node0 node1\n",
    "a name of 300 characters": "n" * 300 + " slots=8\n",
    "half an address": "fe80::1::2 slots=1\n",
    "a port": "node0:22:33\n",
    "not UTF-8": b"node0\xff slots=8\n",
    "NUL": "node0\0 slots=8\n",
}


@pytest.fixture
def recipe(tiny, tmp_path, monkeypatch):
    """A recipe in the current folder; whatever would start something fails the test."""
    (tmp_path / "r.yaml").write_text(dump_recipe(tiny()))
    monkeypatch.chdir(tmp_path)

    def started(*words, **settings):
        raise AssertionError(f"started {words}")

    for module in (front, ssh, submit):
        monkeypatch.setattr(module.subprocess, "Popen", started)
        monkeypatch.setattr(module.subprocess, "run", started)
    heard = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGHUP)}
    yield "r.yaml"
    signal.set_wakeup_fd(-1)  # a supervisor hears signals from its first moment on
    for number, handler in heard.items():
        signal.signal(number, handler)


def refusal(capsys, *words: str) -> str:
    """The one line with which a command is refused."""
    assert main(["launch", *words]) == 2
    got = capsys.readouterr()
    (line,) = got.err.splitlines()
    assert line.startswith("megaresnorm: error: ") and "\x1b" not in line and not got.out
    return line


@pytest.mark.parametrize("case", HOSTFILES)
@pytest.mark.parametrize("by", ["torchrun", "deepspeed", "mpirun"])
def test_a_broken_or_hostile_hostfile_is_refused(case, by, recipe, tmp_path, capsys):
    content = HOSTFILES[case]
    (tmp_path / "hosts").write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal(capsys, recipe, "--hostfile", "hosts", "--with", by)
    assert "hosts" in line or "hostfile" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hosts", "r.yaml"]


def test_a_line_is_named(recipe, tmp_path, capsys):
    (tmp_path / "hosts").write_text("# mine\nnode0 slots=8\nnode1 slot=8\n")
    assert "hosts, line 3: 'node1 slot=8'; wanted 'HOST', 'HOST slots=N' or" in refusal(
        capsys, recipe, "--hostfile", "hosts"
    )
    (tmp_path / "hosts").write_text("node0 slots=8\nnode1\n")  # which torchrun and mpirun take with --gpus-per-node
    assert "line 2: 'node1'; wanted 'HOST slots=N'" in refusal(
        capsys, recipe, "--hostfile", "hosts", "--with", "deepspeed", "--gpus-per-node", "8"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.yaml", "--with", "slurm"], "none.yaml"),
        (["r.yaml", "model.dim=0", "--with", "slurm"], "model.dim"),
        (["r.yaml", "parallel.pp=3", "--with", "slurm", "--nodes", "2", "--gpus-per-node", "4"], "= 6, but 8 ranks"),
        (["r.yaml", "--with", "slrum"], "--with 'slrum': wanted one of torchrun, deepspeed, slurm"),
        (["r.yaml", "--nodes", "0", "--with", "slurm"], "--nodes '0'"),
        (["r.yaml", "--nodes", "2:4", "--with", "slurm"], "--nodes '2:4'"),
        (["r.yaml", "--gpus-per-node", "0"], "--gpus-per-node"),
        (["r.yaml", "--gpus-per-node", "8", "--ranks-per-node", "8"], "are the same number"),
        (["r.yaml", "--nodes", "2"], "NODES=2 needs NODE_RANK and MASTER_ADDR"),
        (["r.yaml", "--nodes", "2", "--node-rank", "2", "--master-addr", "a"], "--node-rank '2'"),
        (["r.yaml", "--nodes", "2", "--node-rank", "0", "--master-addr", "-oX"], "--master-addr '-oX'"),
        (["r.yaml", "--nodes", "2", "--node-rank", "0", "--master-addr", "a b"], "--master-addr 'a b'"),
        (["r.yaml", "--master-port", "70000"], "--master-port"),
        (["r.yaml", "--max-restarts", "-1"], "--max-restarts '-1'"),
        (["r.yaml", "--max-restarts", "often", "--with", "slurm"], "--max-restarts 'often'"),
        (["r.yaml", "--job", "a;b", "--with", "slurm"], "--job 'a;b'"),
        (["r.yaml", "--job", "../x", "--with", "mpirun"], "--job '../x'"),
        (["r.yaml", "--job", "a b"], "--job 'a b'"),
        (["r.yaml", "--env", "1X=2", "--with", "mpirun"], "--env '1X=2': wanted NAME, or NAME=VALUE"),
        (["r.yaml", "--env", "X=a\nb", "--with", "mpirun"], "--env 'X=a\\nb'"),
        (["r.yaml", "--env", "NOT_SET_HERE"], "--env NOT_SET_HERE: no such variable here"),
        (["r.yaml", "--ssh", "ssh '", "--with", "mpirun"], "--ssh \"ssh '\": no closing quotation"),
        (["r.yaml", "--ssh", "", "--with", "mpirun"], "--ssh '': wanted a command"),
        (["r.yaml", "--ssh", "ssh -p 1"], "--ssh has no effect in a job of this node alone"),
        (["r.yaml", "--with", "slurm", "--hostfile", "hosts"], "--hostfile has no effect with --with slurm"),
        (["r.yaml", "--with", "slurm", "--ranks-per-node", "1", "--sbatch", "time=1 #"], "--sbatch 'time=1 #'"),
        (["r.yaml", "--with", "slurm", "--ranks-per-node", "1", "--sbatch", "x;y"], "--sbatch 'x;y'"),
        (["r.yaml", "--with", "mpirun", "--sbatch", "time=1"], "--sbatch has no effect with --with mpirun"),
        (["r.yaml", "--with", "mpirun", "--nodes", "2"], "needs --hostfile, or --master-addr"),
        (["r.yaml", "--with", "mpirun", "--nodes", "2", "--master-addr", "a;b"], "--master-addr 'a;b'"),
        (["r.yaml", "--with", "deepspeed", "--nodes", "2"], "needs --hostfile, with lines 'HOST slots=N'"),
        (["r.yaml", "--with", "deepspeed", "--no-ssh"], "belong together"),
        (["r.yaml", "--with", "torchrun", "--hostfile", "none"], "--hostfile none: no such file"),
        (["r.yaml", "--with", "torchrun", "--hostfile", "."], "--hostfile .: no such file"),
        (["r.yaml", "--with", "kubernetes"], "needs --image"),
        (["r.yaml", "--with", "slurm", "--nodes", "2"], "--with slurm needs --gpus-per-node, or --ranks-per-node"),
        (["r.yaml", "--nodes", ""], "--nodes '': it is empty"),
        (["r.yaml", "--job", " "], "--job '': it is empty"),
        (["--", "-dash.yaml"], "'-dash.yaml' would be taken for an option; write ./-dash.yaml"),
        (["r.yaml", "bogus.key=1", "--with", "kubernetes", "--ranks-per-node", "2", "--image", "a"], "bogus"),
        (["r.yaml", "--node-rank", "3", "--master-addr", "n0"], "--node-rank has no effect on one node; give --nodes"),
        (["r.yaml", "--with", "deepspeed", "--ssh", "/opt/mine -p 1"], "pdsh takes options of ssh alone"),
        (["r.yaml", "--with", "torchrun", "--image", "x"], "--image has no effect"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(words, says, recipe, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert says in refusal(capsys, *words)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "x"}, "not Slurm's: SLURM_PROCID is 'x'"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "2"}, "SLURM_PROCID is '2', wanted a whole number from 0 to 1"),
        ({"SLURM_STEP_NUM_TASKS": "many", "SLURM_PROCID": "0"}, "SLURM_STEP_NUM_TASKS is 'many'"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
          "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[1-2]"}, "Slurm has started 4 processes on this node"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": ""}, "not Open MPI's: OMPI_COMM_WORLD_RANK is ''"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
         "Open MPI has started 2 processes on this node"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "started 2 nodes, and nothing says where"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is not set, wanted a whole number"),
        ({"PMI_SIZE": "2", "PMI_RANK": "7"}, "not MPI's: PMI_RANK is '7'"),
        ({"CROSS_SIZE": "2", "CROSS_RANK": "0", "LOCAL_SIZE": "8"}, "DeepSpeed has started 8 processes on this node"),
        ({"CROSS_SIZE": "2", "CROSS_RANK": "5", "MASTER_ADDR": "a"}, "NODE_RANK='5'"),
        ({"CROSS_SIZE": "2", "CROSS_RANK": "0", "NODES": "4", "MASTER_ADDR": "a"},
         "NODES=4, but the launcher that has started this says 2"),
        ({"PET_NNODES": "two"}, "NODES='two'"),
        ({"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "$(x):1", "PET_NODE_RANK": "0"}, "MASTER_ADDR='$(x)'"),
        ({"JOB_COMPLETION_INDEX": "-1", "NODES": "2", "MASTER_ADDR": "a-0.a"}, "NODE_RANK='-1'"),
        ({"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "http://a"}, "MASTER_ADDR='http://a'"),
        ({"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a,b"}, "MASTER_ADDR='a,b'"),
        ({"RANKS_PER_NODE": "2e1"}, "RANKS_PER_NODE='2e1'"),
        ({"JOB_ID": "x\ny"}, "JOB_ID='x\\ny'"),
        ({"LOG_DIR": "/dev/null/x", "RANKS_PER_NODE": "1"}, "--log-dir /dev/null/x: cannot be written"),
    ],
)  # fmt: skip
def test_a_broken_environment_is_refused(variables, says, recipe, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert says in refusal(capsys, recipe)


def test_nothing_is_started_where_the_launcher_is_missing(recipe, capsys, monkeypatch, tmp_path):
    (tmp_path / "hosts").write_text("node0 slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    hosts = ["--hostfile", "hosts"]
    cases = {"ssh": hosts, "deepspeed": [*hosts, "--with", "deepspeed"], "mpirun": [*hosts, "--with", "mpirun"],
             "sbatch": ["--with", "slurm", "--ranks-per-node", "1"]}  # fmt: skip
    for program, words in cases.items():
        assert f"{program} is not installed here; --dry-run prints what would be run" in refusal(capsys, recipe, *words)


def test_those_who_may_not_be_here_are_no_subprocess_module(recipe):
    """The fixture above would see what is started: they are one module."""
    assert front.subprocess is subprocess is ssh.subprocess is submit.subprocess

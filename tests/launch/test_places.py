"""What the variables of launchers mean, and what each launcher is given: pure functions, nothing is started."""

import json
import os
import resource
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megaresnorm import launch
from megaresnorm.cli import main
from megaresnorm.errors import ConfigError
from megaresnorm.launch import mpirun, ssh, tell
from megaresnorm.launch.hostfile import Host, read_hostfile, slots_of
from megaresnorm.launch.request import FORWARDED, Request, forwarded
from megaresnorm.launch.words import decoded, encoded
from megaresnorm.parallel import addresses
from megaresnorm.parallel.environment import listening_socket, read_environment, share_cores
from megaresnorm.parallel.plan import Plan, read_plan
from megaresnorm.recipe.load import dump_recipe
from megaresnorm.resilience.host import available_cores
from megaresnorm.resilience.launcher import Failure, Launcher, ancestors
from megaresnorm.resilience.processes import launchers
from megaresnorm.resilience.rank_logs import Followed, log_name, write_to_log
from megaresnorm.resilience.torchrun import environment_of, raise_limits, torchrun_command

SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "n[01-02],m1",
}  # fmt: skip
SUPERVISORS = SLURM | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURM_PROCID": "2",
                       "SLURM_NODEID": "2", "SLURM_LOCALID": "0"}  # fmt: skip
RANKS = SLURM | {"SLURM_STEP_NUM_TASKS": "10", "SLURM_STEP_TASKS_PER_NODE": "4(x2),2", "SLURM_PROCID": "9",
                 "SLURM_NODEID": "2", "SLURM_LOCALID": "1"}  # fmt: skip
HOSTILE = [
    "a b",
    "$(touch x)",
    "`x`",
    "a;b",
    "a'b",
    'a"b',
    "a\\b",
    "~/x",
    "%41",
    "{a,b}",
    "*",
    "a&b",
    "ä",
    "a\nb",
    "#x",
]


def plan(variables, **settings):
    return read_plan(lambda: 2, variables, **settings)


def test_a_task_a_node_of_slurm_is_a_supervisor():
    found = plan(SUPERVISORS)
    assert (found.nodes, found.node_rank, found.job, found.ranks_here) == ((3, 3), 2, "slurm-4711-0", 2)
    host, port = found.master
    assert host == "n01" and 15000 <= port < 30000
    assert plan(SUPERVISORS | {"SLURM_PROCID": "0"}).master == (host, port)
    assert plan(SUPERVISORS | {"SLURM_JOB_ID": "4712"}).master != (host, port)
    assert plan(SUPERVISORS, MASTER_ADDR="10.0.0.1", MASTER_PORT="7").master == ("10.0.0.1", 7)
    assert plan(SUPERVISORS | {"MASTER_ADDR": "10.0.0.1"}, RANKS_PER_NODE="8").ranks_here == 8


def test_a_task_a_rank_of_slurm_is_a_rank():
    found = read_environment(RANKS)
    assert (found.rank, found.local_rank, found.world_size, found.ranks_here) == (9, 1, 10, 2)
    assert (found.master_addr, found.job, found.has_parent, found.one_node) == ("n01", "slurm-4711-0", True, False)
    assert read_environment(RANKS | {"SLURM_NODEID": "1"}).ranks_here == 4
    one = read_environment(RANKS | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "10",
                                    "SLURM_NODEID": "0"})  # fmt: skip
    assert one.one_node and one.master_addr == "127.0.0.1"
    torchrun = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert read_environment(RANKS | torchrun).world_size == 2, "of a supervisor's ranks: torchrun's are nearer"


@pytest.mark.parametrize("left", [
    {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_NNODES": "2"},  # of a batch script
    SUPERVISORS | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"},
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, {"PMI_RANK": "3"}, {"JOB_COMPLETION_INDEX": "1"},
])  # fmt: skip
def test_one_process_is_no_rank(left):
    assert read_environment(left).world_size == 1 and plan(left).nodes == (1, 1)


def test_mpis_variables_are_read():
    openmpi = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
               "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "77"}  # fmt: skip
    with pytest.raises(ConfigError, match="nothing says where rank 0 can be reached; set MASTER_ADDR"):
        read_environment(openmpi)
    found = read_environment(openmpi | {"MASTER_ADDR": "n0"})
    assert (found.rank, found.local_rank, found.world_size, found.ranks_here) == (3, 1, 4, 2)
    here = read_environment(openmpi | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    assert here.one_node and here.master_addr == "127.0.0.1" and here.master_port == found.master_port
    intel = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert read_environment(intel).one_node and read_environment(intel).local_rank == 1
    supervisor = openmpi | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert (plan(supervisor, MASTER_ADDR="n0").node_rank, plan(supervisor, MASTER_ADDR="n0").nodes) == (3, (4, 4))


def test_deepspeeds_variables_are_read():
    ranks = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29500",
             "CROSS_RANK": "1", "CROSS_SIZE": "2", "LOCAL_SIZE": "2"}  # fmt: skip
    found = read_environment(ranks)
    assert (found.ranks_here, found.local_rank, found.has_parent) == (2, 1, True)
    found = plan(ranks | {"LOCAL_SIZE": "1", "WORLD_SIZE": "2", "RANK": "1"})
    assert (found.nodes, found.node_rank, found.master, found.attached) == ((2, 2), 1, ("n0", 29500), True)
    given = environment_of(found, ranks | {"CUDA_VISIBLE_DEVICES": "0"}, Path("/x"), None)
    assert not {"CUDA_VISIBLE_DEVICES", "CROSS_SIZE", "LOCAL_SIZE", "RANK", "WORLD_SIZE"} & set(given)
    assert environment_of(found, {"CUDA_VISIBLE_DEVICES": "1"}, Path("/x"), None)["CUDA_VISIBLE_DEVICES"] == "1"


def test_hostfiles_of_all_forms(tmp_path):
    file = tmp_path / "hosts"
    file.write_text(
        "# mine\n\nnode0 slots=8\n10.0.0.2 slots = 8 max_slots=9 # the second\nnode-2:8\n[fe80::1] slots=8\n"
    )
    hosts = read_hostfile(file)
    assert hosts == (Host("node0", 8), Host("10.0.0.2", 8), Host("node-2", 8), Host("fe80::1", 8))
    assert slots_of(hosts, None) == 8 and slots_of(hosts, 4) == 4
    with pytest.raises(ConfigError, match="gives node0 8 slots"):
        slots_of(hosts, 16)
    file.write_text("node0\nnode1\n")
    assert slots_of(read_hostfile(file), None) is None


def test_words_survive_a_launcher_that_joins_them():
    words = ["r.yaml", *(f"train.output={text}" for text in HOSTILE), *HOSTILE]
    sent = encoded(words)
    assert decoded(["launch", *sent]) == ["launch", *words]
    assert all(word.isascii() and not set(word) & set(" $`;'\"\\~{}*&\n#()<>|!?[]") for word in sent)
    plain = ["r.yaml", "train.output=runs/a", "--job", "a-1.b_2", "parallel.tp=2"]
    assert encoded(plain) == plain == decoded(plain)


def request(**more) -> Request:
    return Request(**{"recipe": "my recipe.yaml", "overrides": tuple(f"train.output={text}" for text in HOSTILE),
                      "job": "j", "nodes": 2, "ranks": 8, "hosts": (Host("n0", 8), Host("n1", 8)),
                      "variables": {"NCCL_DEBUG": "INFO $X"}, "folder": Path("/my runs/$x")} | more)  # fmt: skip


def test_a_shell_of_ssh_gives_the_node_its_words_unchanged(tmp_path):
    """Run by a shell here, as sshd would: it starts exactly the node's command, in its folder."""
    folder = tmp_path / "my runs;'$x"
    folder.mkdir()
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\nimport json, os, sys\n"
                      "print(json.dumps([sys.argv[1:], os.getcwd(), os.environ['NCCL_DEBUG']]))\n")  # fmt: skip
    script.chmod(0o755)
    asked = request(folder=folder, python=str(script))
    first, second = ssh.node_parts(asked)
    assert list(second.words[:3]) == ["ssh", "-o", "BatchMode=yes"] and second.label == "n1: "
    assert list(second.words[-3:-1]) == ["--", "n1"] and "ServerAliveInterval=15" in second.words
    done = os.popen(second.words[-1])  # noqa: S605 - what is tested
    words, place, debug = json.loads(done.read())
    assert done.close() is None and place == str(folder) and debug == "INFO $X"
    assert words == [*asked.node_command()[1:], "--node-rank", "1", "--attached"]
    assert words[3:5] == ["my recipe.yaml", "train.output=a b"] and first.label == ""


def test_mpirun_starts_one_unbound_process_a_node_and_passes_names_of_variables():
    part = mpirun.job_part(request(ssh=("ssh", "-p", "2222")))
    words = list(part.words)
    assert words[:5] == ["mpirun", "-np", "2", "--bind-to", "none"]
    assert words[words.index("--host") + 1] == "n0,n1" and words[words.index("-x") + 1] == "NCCL_DEBUG"
    assert words[words.index("plm_rsh_agent") + 1] == "ssh -p 2222" and part.variables["NCCL_DEBUG"] == "INFO $X"


def test_secrets_are_not_sent_unless_they_are_named():
    here = {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "x", "HF_TOKEN": "y", "TORCH_SECRET": "z", "HOME": "/root",
            "OMP_NUM_THREADS": "4", "PYTHONPATH": "/a", "TORCHELASTIC_RUN_ID": "j"}  # fmt: skip
    assert forwarded([], here) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "PYTHONPATH": "/a"}
    assert forwarded(["HF_TOKEN", "A=b=c", "NCCL_DEBUG=WARN"], here)["HF_TOKEN"] == "y"
    assert forwarded(["A=b=c"], here)["A"] == "b=c" and forwarded(["NCCL_DEBUG=WARN"], here)["NCCL_DEBUG"] == "WARN"


@pytest.mark.parametrize("by", ["torchrun", "deepspeed", "mpirun", "slurm"])
def test_a_dry_run_prints_what_would_be_run_where_no_launcher_is_installed(by, tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "r.yaml").write_text(dump_recipe(tiny()))
    (tmp_path / "hosts").write_text("n0 slots=2\nn1 slots=2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    where = ["--nodes", "2", "--gpus-per-node", "2"] if by == "slurm" else ["--hostfile", "hosts"]
    words = ["launch", "r.yaml", "train.seed=7", "--with", by, *where, "--job", "j", "--dry-run", "--no-fallback"]
    assert main(words) == 0
    got = capsys.readouterr().out
    for line in got.splitlines() if by != "slurm" else [got.replace("\\\n", "").partition("\nsrun ")[2].split("||")[0]]:
        assert "megaresnorm launch r.yaml train.seed=7 --no-fallback --nodes 2 --gpus-per-node 2" in line
        assert shlex.split(line)
    assert len(got.splitlines()) == (2 if by == "torchrun" else 1) or by == "slurm"
    assert main(["launch", "r.yaml", "--gpus-per-node", "2", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "--nproc-per-node 2" in said and "megaresnorm.cli train r.yaml" in said and "2 ranks" in said


def test_ipv6_addresses_are_written_as_torchrun_reads_them(monkeypatch, tmp_path):
    found = plan({"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "fd77::1", "JOB_ID": "j"})
    command = torchrun_command(found, tmp_path, "fd77::1")
    assert command[command.index("--rdzv-endpoint") + 1] == "[fd77::1]:29500"
    table = tmp_path / "if_inet6"
    table.write_text("00000000000000000000000000000001 01 80 10 80       lo\n"
                     "fd770000000000000000000000000001 02 40 00 80     eth7\n")  # fmt: skip
    monkeypatch.setattr(addresses, "_IPV6_ADDRESSES", table)
    assert addresses.interface_of("fd77::1") == "eth7" and addresses.interface_of("fd77::2") is None
    assert addresses.interface_of("fe80::1%eth3") == "eth3"
    variables = environment_of(found, {}, tmp_path, "fd77::1")
    assert variables["NCCL_SOCKET_FAMILY"] == "AF_INET6" and variables["GLOO_SOCKET_IFNAME"] == "eth7"


def test_a_store_listens_on_one_address_where_that_is_known(monkeypatch):
    def where(host: str) -> tuple[str, int]:
        with socket.socket(fileno=addresses.listen_where_reached(host, 0)) as listener:
            return listener.getsockname()[0]

    assert where("127.0.0.1") == "127.0.0.1" and where("localhost") in ("127.0.0.1", "::1")
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: real(
        {"own-name": "127.0.1.1", "behind-a-proxy": "192.0.2.7"}.get(host, host), *rest, **more))  # fmt: skip
    assert where("own-name") == where("behind-a-proxy") == "0.0.0.0"
    descriptor = addresses.listen("127.0.0.1", 0)
    found = listening_socket({"MEGARESNORM_STORE": str(descriptor)})
    assert (
        found is not None and found[:2] == (descriptor, "127.0.0.1") and found[2] > 0 and listening_socket({}) is None
    )
    os.close(descriptor)


def test_ranks_share_the_cores_of_a_node(tmp_path, monkeypatch):
    for text, cores in (("max 100000\n", 96), ("1600000 100000\n", 16), ("50000 100000\n", 1), ("", 96)):
        (tmp_path / "cpu.max").write_text(text)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(96)), raising=False)
        assert available_cores(tmp_path) == cores
    monkeypatch.setattr("megaresnorm.resilience.torchrun.available_cores", lambda: 96)
    assert environment_of(Plan(8), {}, tmp_path, None)["OMP_NUM_THREADS"] == "12"
    assert environment_of(Plan(200), {}, tmp_path, None)["OMP_NUM_THREADS"] == "1"
    assert environment_of(Plan(8), {"OMP_NUM_THREADS": "3"}, tmp_path, None)["OMP_NUM_THREADS"] == "3"


def test_ranks_without_a_supervisor_share_the_cores_too(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    for bound, ranks, want in ((96, 8, "12"), (4, 8, "4"), (96, None, "96"), (96, 200, "1")):
        variables: dict[str, str] = {}
        share_cores(bound, ranks, variables)
        assert variables == {"OMP_NUM_THREADS": want}
    variables = {"OMP_NUM_THREADS": "3"}
    share_cores(96, 8, variables)
    assert variables == {"OMP_NUM_THREADS": "3"}


def test_the_limit_of_open_files_is_raised():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(300, before[0]), before[1]))
        raise_limits()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(65536, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_rank_writes_what_it_prints_into_its_own_log_and_the_supervisor_prints_it(tmp_path, capsys):
    monitored = read_environment({"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "a",
                                  "MASTER_PORT": "1", "MEGARESNORM_LOGS": str(tmp_path)})  # fmt: skip
    host = socket.gethostname()
    (tmp_path / log_name(3, host)).write_text("of a run before\n")
    followed = Followed(tmp_path, lambda: [3])
    pid = os.fork()
    if not pid:
        write_to_log(monitored)
        os.write(1, "step 1\nstep ä\x1b[2J\nhalf".encode())
        os.write(2, b" a line")
        os._exit(0)
    os.waitpid(pid, 0)
    followed.print_new()
    assert capsys.readouterr().out == f"[rank 3 on {host}] step 1\n[rank 3 on {host}] step ä\\x1b[2J\n"
    followed.print_new(last=True)
    assert capsys.readouterr().out == f"[rank 3 on {host}] half a line\n"
    text = (tmp_path / log_name(3, host)).read_text()
    assert f"--- rank 3 of 8 on {host}, pid {pid}, start 1, " in text and text.startswith("of a run before\n")
    assert log_name(0, "a/../b c") == "rank-00000.a_.._b_c.log"
    (tmp_path / "none").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_to_log(read_environment({"MEGARESNORM_LOGS": str(tmp_path / "none")}))


def test_the_first_failure_of_the_newest_start_is_the_one_that_counts(tmp_path):
    launcher = Launcher(tmp_path)
    assert launcher.failure() is None
    launcher.note_failure(Failure(3, "n1", "first", 1), attempt=0)
    launcher.note_failure(Failure(4, "n1", "caused by it", 1), attempt=0)
    assert str(launcher.failure()) == "rank 3 on n1: first"
    launcher.note_failure(Failure(5, "n1", "later", 137), attempt=11)
    assert launcher.failure() == Failure(5, "n1", "later", 137)
    launcher.introduce(5, 0, 12)
    assert launcher.failure() is not None, "which start 12 has counted, and ended for"
    launcher.introduce(5, 0, 13)
    assert launcher.failure() is None, "healed: start 12 went well for long enough to need another"
    launcher.introduce(17, 1, 2)
    launcher.introduce(16, 0, 2)
    assert launcher.ranks() == {0: 16, 1: 17} and launcher.read("attempt") == 2


def test_who_has_started_a_process_is_known_up_to_the_first_one():
    found = ancestors(os.getpid())
    assert found[0] == os.getppid() and len(found) >= 2
    pid = os.fork()
    if not pid:
        os._exit(0 if ancestors(os.getpid()) == (os.getppid(), *found) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_only_supervisors_of_the_job_are_told(tmp_path, capsys):
    """Neither the command that a user has typed, nor a node of another job, nor what starts a node."""
    node = ["python", "-u", *tell.SUPERVISOR, "r.yaml", "--job", "mine", "--node-rank", "1", tell.ATTACHED]
    others = [
        ["python", *tell.SUPERVISOR, "r.yaml", "--hostfile", "h", "--job", "mine"],
        ["python", *tell.SUPERVISOR, "r.yaml", "--with=mpirun", "--job", "mine"],
        ["python", *tell.SUPERVISOR, "r.yaml", "--job", "other", tell.ATTACHED],
        ["sh", "-c", " ".join(node)],
        ["python", "-m", "deepspeed.launcher.launch", *node[2:]],
        [],
    ]
    for pid, words in enumerate([node, *others], start=100):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_text("".join(f"{word}\0" for word in words))
    assert tell.supervisors("mine", tmp_path) == [100] and tell.supervisors("other", tmp_path) == [102 + 1]
    assert tell.main(["no-such-job", "15"]) == 1 and tell.main(["j", "9"]) == 2 and tell.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_who_has_started_a_supervisor_ends_at_its_session():
    """A login shell above may end: of what ssh has started the first one that counts is sshd's process."""
    script = "from megaresnorm.resilience.processes import launchers; print(*launchers())"
    inner = [sys.executable, "-c", script]
    leader = f"import os, subprocess, sys; os.setsid(); print(os.getpid(), os.getppid()); sys.stdout.flush(); " \
             f"subprocess.run(['sh', '-c', '\"$@\"; exit 0', '-', *{inner!r}])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", leader], capture_output=True, text=True, check=True)
    of_session, found = [[int(pid) for pid in line.split()] for line in done.stdout.splitlines()]
    assert len(found) == 3 and found[1:] == of_session and found[2] == os.getpid()
    assert launchers()[0] == os.getppid()


def test_a_reader_that_goes_away_does_not_hang_a_job(tmp_path):
    """``launch ... | head -1``: the parts go on, and are drained."""
    script = f"""
import sys
from megaresnorm.launch.front import Front, Part
part = Part([{sys.executable!r}, "-c", "for i in range(30000): print('a line that is long enough to fill a pipe')"])
sys.exit(Front([part], lambda running, number: None).run())
"""
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[1] == "0" and not done.stderr, done


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ("trap 'exit 143' TERM", 143),
        ("trap 'exit 138' TERM", 143),  # of a launcher that passes SIGUSR1 on
        ("trap 'exit 1' TERM", 143),  # of a launcher that is ended
        ("trap 'exit 0' TERM", 0),
        ("trap 'echo \"megaresnorm: error: rank 1 on n1: no space\"; exit 5' TERM", 5),
    ],
)
def test_what_a_signal_has_come_to_is_the_exit_code_of_a_job(part, code):
    loop = f"{part}; echo on; while :; do sleep 0.05; done"
    script = f"""
import signal, sys
from megaresnorm.launch.front import Front, Part
def tell(running, number):
    for process in running:
        process.send_signal(number)
sys.exit(Front([Part(["bash", "-c", {loop!r}])], tell).run())
"""
    job = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "on\n"
    job.terminate()
    said, errors = job.communicate(timeout=30)
    assert job.returncode == code and "Traceback" not in errors, errors
    assert said.splitlines()[-1:] == (["megaresnorm: error: rank 1 on n1: no space"] if code == 5 else [])


def test_the_map_of_the_package_names_every_module():
    folder = Path(launch.__file__).parent
    assert not [path.name for path in folder.glob("[a-z]*.py") if path.name not in launch.__doc__]


def test_forwarded_variables_are_listed_for_users():
    text = " ".join((Path(__file__).parents[2] / "launch" / "README.md").read_text().split())
    assert not [name for name in FORWARDED if f"`{name}`" not in text]

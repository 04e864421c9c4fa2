"""How ranks are started: what is said to torchrun, in which environment, on which addresses."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_elastic import free_port
from torch.distributed import DistError, HashStore

from megaresnorm.errors import ConfigError, TooManyRestartsError
from megaresnorm.opening import ENDED, idle, note_progress, open_recipe
from megaresnorm.parallel import addresses
from megaresnorm.parallel import rendezvous as control
from megaresnorm.parallel.addresses import address_towards, interface_of
from megaresnorm.parallel.environment import Environment, host_name
from megaresnorm.parallel.mesh import lost_contact, usable_ranks
from megaresnorm.parallel.plan import Plan, read_plan
from megaresnorm.resilience.agent import Deaths
from megaresnorm.resilience.beats import STEP, Beats
from megaresnorm.resilience.launcher import Failure, Launcher
from megaresnorm.resilience.supervisor import Supervisor
from megaresnorm.resilience.torchrun import JOIN, environment_of, torchrun_command
from megaresnorm.run import Run
from megaresnorm.telemetry.incidents import read_incidents
from megaresnorm.trainer import Trainer

TWO_NODES = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1"}


def test_variables_become_a_plan():
    assert read_plan(lambda: 2, {"JOB_ID": "j"}) == Plan(2, job="j")
    assert (
        read_plan(lambda: 2, {}).job != read_plan(lambda: 2, {}).job
    )  # of two jobs that share a folder neither may take the other for itself
    assert read_plan(lambda: 2, {"RANKS_PER_NODE": "8", "MAX_RESTARTS": "0", "JOB_ID": "j"}) == Plan(
        8, job="j", max_restarts=0
    )
    two = Plan(2, (2, 2), 1, ("127.0.0.1", 29500), "megaresnorm-127.0.0.1-29500")
    assert read_plan(lambda: 2, TWO_NODES) == two and not two.elastic
    elastic = read_plan(lambda: 8, {"NODES": "4:8", "MASTER_ADDR": "node0", "MASTER_PORT": "7", "JOB_ID": "j"})
    assert elastic == Plan(8, (4, 8), None, ("node0", 7), "j") and elastic.elastic


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"NODES": "2"}, "NODES=2 needs NODE_RANK and MASTER_ADDR"),
        ({"NODES": "2", "MASTER_ADDR": "a"}, "NODES=2 needs NODE_RANK and MASTER_ADDR"),
        ({"NODES": "1:2"}, "NODES=1:2 needs MASTER_ADDR"),
        ({"NODES": "0"}, "NODES='0': wanted a number"),
        ({"NODES": "3:2"}, "NODES='3:2': wanted a number up to 99999, or MIN:MAX"),
        ({"NODES": "two"}, "NODES='two'"),
        ({"NODES": "1" * 9}, "wanted a number"),
        ({"RANKS_PER_NODE": "0"}, "RANKS_PER_NODE='0': wanted a whole number from 1 to 1024"),
        ({"RANKS_PER_NODE": "10" * 9}, "RANKS_PER_NODE"),
        ({"MAX_RESTARTS": "-1"}, "MAX_RESTARTS='-1'"),
        ({**TWO_NODES, "MASTER_PORT": "99999"}, "MASTER_PORT='99999': wanted a whole number from 1 to 65535"),
        ({**TWO_NODES, "NODE_RANK": "2"}, "NODE_RANK='2': wanted a whole number from 0 to 1"),
    ],
)
def test_wrong_variables_are_one_line(variables, says):
    with pytest.raises(ConfigError) as caught:
        read_plan(lambda: 2, variables)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_torchrun_is_told_all_that_its_own_variables_could_say(tmp_path):
    """Kubeflow sets PET_NNODES and the like, which torchrun would believe."""
    set_by_others = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "9",
        "PET_RDZV_ENDPOINT": "elsewhere:1",
        "PET_STANDALONE": "1",
    }
    environment = environment_of(
        Plan(2), {**os.environ, **set_by_others, "RANK": "5", "WORLD_SIZE": "9"}, tmp_path, None
    )
    assert not [name for name in environment if name.startswith("PET_")] and "RANK" not in environment
    script = """
import sys
from torch.distributed.run import config_from_args, parse_args
config, command, arguments = config_from_args(parse_args(sys.argv[1:]))
print(config.min_nodes, config.max_nodes, config.nproc_per_node, config.rdzv_backend, config.rdzv_endpoint,
      config.rdzv_configs["store_type"], arguments[-1])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *torchrun_command(Plan(2, job="j"), tmp_path, None)[3:], "recipe.yaml"],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.split() == ["1", "1", "2", "c10d", str(tmp_path / "rendezvous"), "file", "recipe.yaml"], (
        done.stderr
    )


def test_one_node_uses_loopback_and_several_the_address_in_use(tmp_path):
    assert environment_of(Plan(2), {}, tmp_path, None)["GLOO_SOCKET_IFNAME"] == "lo"
    two = read_plan(lambda: 1, TWO_NODES)
    assert address_towards("127.0.0.1", 29500) == "127.0.0.1" and address_towards("no.such.host.invalid", 1) is None
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.1") is None and interface_of(None) is None
    assert environment_of(two, {}, tmp_path, "127.0.0.1")["NCCL_SOCKET_IFNAME"] == "=lo"
    assert environment_of(two, {"GLOO_SOCKET_IFNAME": "eth7"}, tmp_path, "127.0.0.1")["GLOO_SOCKET_IFNAME"] == "eth7"
    assert "GLOO_SOCKET_IFNAME" not in environment_of(two, {}, tmp_path, None)
    arguments = torchrun_command(two, Path("/x"), "127.0.0.1")
    assert arguments[arguments.index("--local-addr") + 1] == "127.0.0.1"
    (conf,) = (argument for argument in arguments if argument.startswith("store_type=tcp,is_host=0,"))
    assert f"join_timeout={JOIN}" in conf  # others may be long in coming


def test_a_name_that_is_loopback_on_its_own_node_is_no_address_for_others(monkeypatch):
    """Debian's /etc/hosts has 127.0.1.1 for the node's own name."""
    known = {"node0": "127.0.1.1", "127.0.0.1": "127.0.0.1", "localhost": "127.0.0.1", addresses.ELSEWHERE: "10.1.2.3"}
    monkeypatch.setattr(addresses, "address_towards", lambda host, port: known.get(host))
    assert addresses.local_address_of("node0", 29500) == "10.1.2.3"
    assert addresses.local_address_of("127.0.0.1", 29500) == addresses.local_address_of("localhost", 1) == "127.0.0.1"
    assert addresses.local_address_of("unknown", 29500) is None


def test_rank_0_of_several_nodes_listens_where_the_others_reach_it(monkeypatch):
    """Without launch/torchrun.sh, with a name that is loopback on its own node: by srun or mpirun."""
    monkeypatch.setattr(control, "local_address_of", lambda host, port: "127.0.0.1" if host == "node0" else None)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # which this process would keep
        monkeypatch.setenv(name, "lo")
    port = free_port()
    started = Environment(world_size=2, ranks_here=1, master_addr="node0", master_port=port)
    store = control.open_store(started)
    other = control.open_store(replace(started, rank=1, master_addr="127.0.0.1", attempt=3))
    store.set("a", "b")
    assert other.get("a") == b"b"  # nodes may count their attempts differently


def test_a_rank_that_has_nobody_to_work_with_waits(tiny, tmp_path):
    """One process, of an elastic job whose layout needs two."""
    opened = open_recipe(lambda: tiny(parallel={"tp": 2}), Environment(elastic=True))
    assert opened.idles and opened.store is None
    waiting = threading.Thread(target=idle, args=(opened,), daemon=True)
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive()


def test_a_checkpoint_is_progress_for_nodes_whose_ranks_idle(tiny, tmp_path):
    launcher, store = Launcher(tmp_path), HashStore()
    opened = open_recipe(lambda: tiny(), Environment(launcher=tmp_path, elastic=True, attempt=2))
    opened = replace(opened, store=store, sizes=None)
    waiting = threading.Thread(target=idle, args=(opened,), daemon=True)
    waiting.start()
    waiting.join(1)
    assert launcher.read("progress") is None
    note_progress(Environment(elastic=True), store)
    end = time.monotonic() + 5
    while launcher.read("progress") != 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    store.set(ENDED, "0")
    waiting.join(5)
    assert not waiting.is_alive()


@pytest.mark.parametrize(
    ("ranks", "layout", "usable"),
    [
        (56, {"pp": 4, "tp": 8}, 32),
        (64, {"pp": 4, "tp": 8}, 64),
        (31, {"pp": 4, "tp": 8}, 0),
        (7, {"dp_shard": 2}, 6),
        (7, {"dp_replicate": 2, "tp": 2}, 4),
        (3, {"dp_replicate": 2, "tp": 2}, 0),
    ],
)
def test_an_elastic_job_uses_the_largest_multiple_that_fits(ranks, layout, usable):
    assert usable_ranks(ranks, **{"pp": 1, "dp_replicate": None, "dp_shard": 1, "tp": 1} | layout) == usable


def test_restarts_are_counted_from_the_newest_checkpoint(tiny, tmp_path):
    recipe, started = tiny(), Environment(launcher=tmp_path, max_restarts=3, attempt=3)
    open_recipe(lambda: recipe, started)
    with pytest.raises(TooManyRestartsError, match=r"died 4 times without a new checkpoint \(MAX_RESTARTS=3\)"):
        open_recipe(lambda: recipe, replace(started, attempt=4))
    Launcher(tmp_path).write("progress", 2)
    open_recipe(lambda: recipe, replace(started, attempt=5))
    with pytest.raises(TooManyRestartsError, match="died 4 times"):
        open_recipe(lambda: recipe, replace(started, attempt=6))


def test_a_saved_checkpoint_is_progress(tiny, tmp_path):
    (tmp_path / "launcher").mkdir()
    launcher = Launcher(tmp_path / "launcher")
    opened = open_recipe(lambda: tiny(), Environment(launcher=launcher.folder, attempt=7))
    with Run(opened) as run:
        assert launcher.read("progress") is None
        Trainer(run).step()
        run.save_now()
    assert launcher.read("progress") == 7


def test_a_lost_rank_is_found_in_what_it_caused():
    """torch's pipelines put an error of a stage into another."""
    try:
        try:
            raise DistError("[/x/pair.cc:12] Connection closed by peer [::1]:5. More")
        except DistError as e:
            raise RuntimeError("[Stage 0] failed to run forward") from e
    except RuntimeError as e:
        assert lost_contact(e) == "Connection closed by peer [::1]:5"
    assert lost_contact(RuntimeError("of a model")) is None
    meeting = "Gloo connectFullMesh failed with [/x/pair.cc:152] timed out connecting: Connection refused"
    assert lost_contact(RuntimeError(meeting)) is not None, "before there is a group: the other has ended meanwhile"


def test_what_is_left_in_the_folder_is_read_whole_or_not_at_all(tmp_path):
    launcher = Launcher(tmp_path)
    assert launcher.read("end") is None and launcher.asked_to_stop() == 0
    (tmp_path / "end").write_text("")
    assert launcher.read("end") is None
    launcher.write("end", 5)
    assert launcher.read("end") == 5 and launcher.asked_to_stop() == 0
    launcher.write("stop", 143)
    assert launcher.asked_to_stop() == 143
    assert not launcher.is_supervised()
    descriptor = launcher.lock()
    assert launcher.is_supervised()
    os.close(descriptor)
    assert not launcher.is_supervised()


KILLED = Failure(1, "n1", "killed by SIGKILL", 137)


@pytest.mark.parametrize(
    ("end", "stop", "torchrun", "failed", "code", "says"),
    [
        (0, 0, 0, False, 0, ""),
        (None, 0, 1, True, 137, "error: rank 1 on n1: killed by SIGKILL"),
        (6, 0, 0, True, 6, "error: rank 1 on n1: killed by SIGKILL"),  # restarts are used up
        (5, 0, 0, True, 5, ""),  # another error, which rank 0 has said: that of a start before was healed
        (124, 0, 0, True, 124, ""),
        (143, 0, 0, True, 143, ""),  # another node was sent the signal
        (None, 0, -9, False, 137, "torchrun on"),
        (None, 143, -9, False, 143, "SIGTERM: nothing was to be saved"),
    ],
)
def test_the_last_word_of_a_node(end, stop, torchrun, failed, code, says, tmp_path, capsys):
    ended = ended_supervisor(tmp_path, end, stop=stop, torchrun=torchrun)
    if failed:
        ended._launcher.note_failure(KILLED, attempt=0)
    assert ended._last_word() == code
    said = capsys.readouterr().err.splitlines()
    assert says in said[-1] if says else not said


@pytest.mark.parametrize(
    ("end", "progress", "node_rank", "leaves"),
    [(138, 0, 0, True), (138, 0, None, True), (138, None, 0, False), (143, 0, 0, False), (0, 0, 0, False),
     (138, 0, 1, False)],
)  # fmt: skip
def test_node_0_says_that_usr1_has_saved_where_it_has(end, progress, node_rank, leaves, tmp_path):
    ended = ended_supervisor(tmp_path, end, node_rank=node_rank, saved=tmp_path / "saved")
    if progress is not None:
        ended._launcher.write("progress", progress)
    assert ended._last_word() == end and (tmp_path / "saved").exists() == leaves


def test_a_rank_that_died_is_an_event_of_the_run_and_one_that_was_ended_is_none(tmp_path):
    launcher, output = Launcher(tmp_path / "launcher"), tmp_path / "run"
    launcher.folder.mkdir()
    output.mkdir()
    launcher.write_json("run", {"output": str(output)})
    launcher.write("rank-1", 3)
    beats, descriptor = Beats.make(2)
    Beats(descriptor, own=1).own[STEP] = 7
    deaths = Deaths(launcher, beats)

    def in_attempt(number: int, code: int, failure: Failure | None = None) -> list[dict]:
        launcher.write("attempt", number)
        if failure is not None:
            launcher.note_failure(failure, number)
        before = len(list(read_incidents(output)))
        deaths.note(code, 1)
        deaths.note(code, 1)  # torchrun logs it as well
        return list(read_incidents(output))[before:]

    (killed,) = in_attempt(0, -9)
    assert (killed["kind"], killed["rank"], killed["step"], killed["exit_code"]) == ("died", 3, 7, 137)
    assert killed["what"].startswith("killed by SIGKILL") and killed["host"] == host_name()
    (failed,) = in_attempt(1, 1, Failure(3, "n1", "ValueError: x", 1))
    assert (failed["what"], failed["rank"], failed["host"]) == ("ValueError: x", 3, "n1")
    assert not in_attempt(2, 1, Failure(2, "n1", "ValueError: x", 1)), "rank 2 has died, rank 3 has lost it"
    assert not in_attempt(3, -9, Failure(3, "n1", "hangs in step 4", 6)), "that is an event of its own"
    assert not in_attempt(4, 6) and not in_attempt(5, -15)
    launcher.write("stop", 143)
    assert not in_attempt(6, -9), "a second signal has ended it"


def test_a_start_of_the_ranks_that_is_not_allowed_is_not_announced_as_one(tmp_path, capsys):
    watched = ended_supervisor(tmp_path, None, max_restarts=1)
    watched._starts, watched._last_ranks, watched._said_starts, watched._said_failure = 0, set(), 0, -1
    watched._progress = None
    assert not any(watched._starts_in_vain([pid]) for pid in (1, 2, 3, 4))
    again, refused = capsys.readouterr().err.splitlines()
    assert "ranks are started again (1 of at most 1 without a new checkpoint)" in again
    assert "ranks are not started again (MAX_RESTARTS=1 without a new checkpoint)" in refused


def ended_supervisor(folder, end, *, stop=0, torchrun=0, **plan):
    """A supervisor whose torchrun has ended, without the signal handlers of one."""
    supervisor = Supervisor.__new__(Supervisor)
    supervisor._followed, supervisor._launcher, supervisor._plan = None, Launcher(folder), Plan(1, **plan)
    supervisor._hearing = SimpleNamespace(stop=stop, again=False)
    supervisor._torchrun = SimpleNamespace(returncode=torchrun)
    if end is not None:
        supervisor._launcher.write("end", end)
    return supervisor

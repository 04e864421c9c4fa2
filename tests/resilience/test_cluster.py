"""doctor --cluster on ranks of this host, each of which takes itself for a host of its own."""

import json
import resource
import time
from pathlib import Path

import pytest
import torch
from launched import be_rank

from megaresnorm.cli import cluster
from megaresnorm.cli import main as command
from megaresnorm.errors import ConfigError
from megaresnorm.parallel import addresses
from megaresnorm.parallel.environment import Environment, read_environment
from megaresnorm.parallel.mesh import ParallelContext, Sizes
from megaresnorm.parallel.plan import Plan, read_plan
from megaresnorm.recipe.load import dump_recipe
from megaresnorm.resilience.cluster import compute, network, node
from megaresnorm.resilience.cluster.start import check_start
from megaresnorm.resilience.torchrun import torchrun_command
from megaresnorm.testing import run_ranks

RANKS = 4
NAMES = ["agreement", "ranks", "clocks", "output folder", "space", "write speed", "open files", "processes",
         "shared memory", "host memory", "addresses", "ports", "bandwidth", "latency", "all-reduce", "products",
         "copies", "known answers"]  # fmt: skip


def examined(rank: int, recipe, folder: Path) -> dict:
    """What the command prints and writes, on rank 0."""
    file = folder / "cluster.json"
    code = cluster._examine(read_environment(), None, None, load=lambda: recipe, json=file if rank == 0 else None)
    return {"code": code, "report": json.loads(file.read_text()) if rank == 0 else {}}


def be_host(rank: int) -> None:
    be_rank(rank, RANKS)
    sockets = node.own_sockets
    node.host_name = lambda: f"host{rank}"
    node.own_sockets = lambda: [one._replace(address=f"10.0.0.{rank}") for one in sockets()]


def test_every_check_is_made_and_written_and_healthy_hosts_pass(tiny, tmp_path):
    recipe = tiny()

    def on_rank(rank: int) -> dict:
        be_host(rank)
        return examined(rank, recipe, tmp_path)

    found = run_ranks(RANKS, on_rank)
    report = found[0]["report"]
    assert [one["name"] for one in report["checks"]] == NAMES
    assert {one["code"] for one in found} == {0}
    loud = {"bandwidth", "latency", "products", "copies"}  # of which other programs of this machine may take a share
    assert all(one["verdict"] == "PASS" for one in report["checks"] if one["name"] not in loud)
    assert all(set(one) == {"name", "verdict", "found", "wanted", "advice"} for one in report["checks"])
    assert all(one["found"] and (one["verdict"] == "PASS") != bool(one["advice"]) for one in report["checks"])
    assert report["schema_version"] == 1 and report["world_size"] == RANKS
    assert report["hosts"] == {f"host{rank}": [rank] for rank in range(RANKS)}
    assert [one["rank"] for one in report["ranks"]] == list(range(RANKS))
    assert all(one["tflops"] > 0 and one["copy_bytes_per_second"] > 0 for one in report["ranks"])
    assert len({one["answers"][0] for one in report["ranks"]}) == 1
    assert len(report["links"]) == 6 and all(one["bytes_per_second"] > 0 for one in report["links"])
    assert set(report["clocks"]) == {"host1", "host2", "host3"}
    assert all(abs(one["seconds"]) <= one["error"] + 1e-3 for one in report["clocks"].values())
    assert report["output"]["checkpoint_bytes"] > 1000 and not Path(recipe.train.output).exists()


def test_each_of_four_faults_is_named_with_its_rank_and_host(tiny, tmp_path):
    """A slow product on rank 0, a wrong one on rank 1, a slow network at rank 2, a clock an hour ahead at rank 3."""
    recipe = tiny()

    def on_rank(rank: int) -> dict:
        be_host(rank)
        compute.AGAIN = 3  # which is enough here
        product, both_ways, now = torch.Tensor.__matmul__, network._both_ways, time.time
        if rank == 0:
            torch.Tensor.__matmul__ = lambda a, b: [product(a, b) for _ in range(4)][-1]
        elif rank == 1:

            def wrong(a, b):
                y = product(a, b)
                y.view(torch.int32)[3, 5] ^= 1 << 20
                return y

            torch.Tensor.__matmul__ = wrong
        elif rank == 2:
            network._both_ways = lambda *arguments: (time.sleep(0.008), both_ways(*arguments))
        else:
            time.time = lambda: now() + 3600
        return examined(rank, recipe, tmp_path)

    found = run_ranks(RANKS, on_rank)
    wrong = {one["name"]: one for one in found[0]["report"]["checks"] if one["verdict"] != "PASS"}
    assert set(wrong) == {"clocks", "bandwidth", "latency", "products", "known answers"}, wrong
    assert wrong["products"]["verdict"] == "FAIL" and "rank 0 on host0: " in wrong["products"]["found"]
    assert wrong["known answers"]["found"].startswith("wrong products: rank 1 on host1: ")
    assert wrong["known answers"]["verdict"] == "FAIL"
    assert wrong["bandwidth"]["found"].startswith("host host2: ") and "to all others" in wrong["bandwidth"]["found"]
    assert wrong["latency"]["found"].startswith("host host2: ")
    assert wrong["clocks"]["found"].startswith("host3 +3600.0")
    assert {one["code"] for one in found} == {1}, "all ranks end alike"


def test_ranks_that_differ_fail_in_one_row_and_the_rest_is_still_examined(tiny, tmp_path):
    def on_rank(rank: int) -> dict:
        be_rank(rank, 2)
        return examined(rank, tiny(optim={"lr": 1e-3 * (1 + rank)}), tmp_path)

    found = run_ranks(2, on_rank)
    rows = {one["name"]: one for one in found[0]["report"]["checks"]}
    assert rows["agreement"]["verdict"] == "FAIL" and "optim.lr is 0.002 on rank 1" in rows["agreement"]["found"]
    assert rows["known answers"]["verdict"] == "PASS" and "space" not in rows
    assert [one["code"] for one in found] == [1, 1]


def test_a_start_checks_in_a_second_warns_of_a_clock_and_ends_where_no_run_can_work(caplog):
    def on_rank(rank: int) -> dict:
        be_host(rank)
        now, limit = time.time, resource.getrlimit
        context = ParallelContext.create(Sizes(dp_replicate=RANKS), "cpu", 60)
        start = time.perf_counter()
        check_start(read_environment(), context, torch.device("cpu"))
        seconds, quiet = time.perf_counter() - start, list(caplog.messages)
        if rank == 2:
            time.time = lambda: now() - 90
        check_start(read_environment(), context, torch.device("cpu"))
        said = list(caplog.messages)
        if rank == 1:
            resource.getrlimit = lambda what: (30, 30) if what == resource.RLIMIT_NOFILE else limit(what)
        try:
            check_start(read_environment(), context, torch.device("cpu"))
        except ConfigError as e:
            return {"seconds": seconds, "quiet": quiet, "said": said, "error": str(e), "agreed": e.agreed}
        return {}

    found = run_ranks(RANKS, on_rank)
    assert max(one["seconds"] for one in found) < 1.0
    assert found[0]["quiet"] == [] and [one["said"] for one in found[1:]] == [[]] * 3
    (line,) = found[0]["said"]
    assert line.startswith("warning: clocks: host2 -90.0") and "(wanted: within 1 s)" in line
    assert {one["error"].partition("(")[0] for one in found} == {"open files: 30 on host1 "}
    assert all(one["agreed"] for one in found), "one of them prints it"


def test_it_is_started_on_this_host_on_many_and_by_other_launchers(tiny, tmp_path, monkeypatch, capsys):
    """The same command is run by ranks of torchrun; a launcher's dry run says so."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(tiny()))
    assert torchrun_command(Plan(2, job="j", command="doctor"), tmp_path, None)[-2:] == ["megaresnorm.cli", "doctor"]
    assert torchrun_command(read_plan(lambda: 2, {}), tmp_path, None)[-2:] == ["megaresnorm.cli", "train"]
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    launch = ["launch", str(recipe), "--doctor", "--json", "x.json", "--dry-run"]
    assert command([*launch, "--ranks-per-node", "2", "train.steps=3"]) == 0
    assert f"megaresnorm.cli doctor {recipe} train.steps=3 --cluster --json=x.json" in capsys.readouterr().out
    assert command([*launch, "--hostfile", str(tmp_path / "hosts")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("--doctor --json=x.json" in line and "--max-restarts 0" in line for line in lines)
    started = []
    monkeypatch.setattr("megaresnorm.resilience.supervisor.supervise", lambda words, **s: started.append((words, s)))
    command(["doctor", "--cluster", "--ranks", "4", str(recipe), "train.steps=3"])
    (words, settings) = started[0]
    assert words == ["--cluster", str(recipe), "train.steps=3"] and settings["RANKS_PER_NODE"] == "4"
    assert settings["COMMAND"] == "doctor" and settings["MAX_RESTARTS"] == "0"


def test_bad_arguments_are_one_line(tiny, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(tiny()))
    for arguments, words in (
        (["doctor", "--cluster", "--ranks", "0"], "--ranks: '0' is not a whole number"),
        (["doctor", "--cluster", str(tmp_path / "no.yaml")], "no.yaml: cannot be read"),
        (["doctor", "--cluster", "--json", str(tmp_path)], f"--json {tmp_path}: cannot be written (Is a directory)"),
        (["launch", str(recipe), "--doctor", "--json", str(tmp_path / "a" / "b")], "cannot be written (No such file"),
        (["doctor", "--json", str(tmp_path)], "cannot be written (Is a directory)"),
        (["doctor", "--cluster", str(recipe), "train.stepz=1"], "did you mean train.steps?"),
        (["doctor", "--cluster", "--kernels"], "--kernels has no effect with --cluster"),
        (["doctor", "--ranks", "2"], "--ranks has no effect without --cluster"),
        (["doctor", str(recipe)], "has no effect without --cluster"),
        (["launch", str(recipe), "--json", "x"], "--json has no effect without --doctor"),
        (["launch", str(recipe), "--doctor", "--full"], "--full has no effect with --doctor"),
        (["launch", str(recipe), "--doctor", "--nodes", "2:4"], "a fixed number of nodes"),
    ):
        assert command(arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("megaresnorm: error: ") and words in line
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "h", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert command(["doctor", "--cluster", "--ranks", "2"]) == 2 and "leave it out" in capsys.readouterr().err


def two_nodes(address: str) -> Environment:
    variables = {"WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": address,
                 "MASTER_PORT": 29500}  # fmt: skip
    return read_environment({name: str(value) for name, value in variables.items()})


@pytest.mark.parametrize("interface", [None, "lo"])
def test_loopback_on_several_hosts_ends_a_job_in_one_line(monkeypatch, interface):
    """An address of another host, and a name that is loopback by this host's own /etc/hosts."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(node, "local_address_of", lambda host, port: "127.0.1.1")
    monkeypatch.setattr(addresses, "resolved", lambda host: "127.0.1.1" if host == "node0" else host)
    monkeypatch.setattr(addresses, "_has_network", lambda: True)
    if interface is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    for address in ("192.0.2.1", "node0"):
        words = f"MASTER_ADDR={address} is loopback" if interface is None else "GLOO_SOCKET_IFNAME=lo is loopback"
        with pytest.raises(ConfigError, match=words):
            node.check_address(two_nodes(address))


@pytest.mark.parametrize("interface", [None, "lo"])
def test_several_nodes_of_one_machine_may_meet_on_its_loopback(monkeypatch, interface):
    """By its address, and by any name where that machine has no network."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(addresses, "resolved", lambda host: "127.0.1.1")
    monkeypatch.setattr(addresses, "_has_network", lambda: False)
    if interface is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    for address in ("127.0.0.1", "::1", "localhost", "node0"):
        node.check_address(two_nodes(address))

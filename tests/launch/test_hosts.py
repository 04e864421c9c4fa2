"""Jobs of torchrun on several hosts: started by ssh from one of them, or by hand on each."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import submitted
from hosts import CAN_MAKE_HOSTS, SSHD, Hosts
from launched import listening, losses
from submitted import LAUNCH, Submitted, write_hostfile, write_recipe

needs_hosts = pytest.mark.skipif(not CAN_MAKE_HOSTS, reason="needs root, ip and unshare, to make network namespaces")
needs_ssh = pytest.mark.skipif(
    not CAN_MAKE_HOSTS or SSHD is None or not shutil.which("ssh"), reason="needs root, ip, unshare, sshd and ssh"
)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(4, tmp_path_factory.mktemp("hosts"), sshd=SSHD is not None) as made:
        yield made


@pytest.fixture
def submit(hosts):
    """A function that submits a job of one rank on each of two hosts."""

    def start(folder, recipe, *options, names=None) -> Submitted:
        hostfile = write_hostfile(hosts, folder, names or hosts.addresses[:2])
        command = [*LAUNCH, "recipe.yaml", "--hostfile", str(hostfile), "--ssh", hosts.ssh, *options]
        return Submitted(hosts, 0, command, folder, Path(recipe.train.output))

    return start


@needs_ssh
@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True], ids=["error", "killed"])
def test_a_failure_on_node_2_is_the_last_line_of_a_job_by_ssh(submit, long_recipe, tmp_path, kill):
    submitted.check_failure(submit, tmp_path / "job", long_recipe(), kill=kill)


@needs_ssh
@pytest.mark.slow
@pytest.mark.parametrize(("when", "pause"), [("start", 0.0), ("start", 0.7), ("ranks", 0.0), ("ranks", 1.5)])
def test_a_signal_before_the_first_step_ends_a_job_by_ssh(submit, long_recipe, tmp_path, when, pause):
    submitted.check_stop_before_the_first_step(submit, tmp_path / "job", long_recipe(steps=10**6), when, pause)


@needs_ssh
@pytest.mark.slow
def test_a_signal_saves_a_job_by_ssh_and_it_resumes_exactly(submit, long_recipe, tmp_path, alone):
    recipe = long_recipe()
    submitted.check_stop_and_resume(submit, tmp_path / "job", recipe, alone(recipe))


@needs_ssh
@pytest.mark.slow
def test_a_second_signal_ends_a_job_by_ssh_at_once(submit, long_recipe, tmp_path):
    submitted.check_second_signal(submit, tmp_path / "job", long_recipe(steps=10**6))


@needs_ssh
@pytest.mark.slow
@pytest.mark.parametrize("started", [False, True], ids=["starting", "training"])
def test_a_killed_terminal_leaves_nothing_of_a_job_by_ssh(submit, long_recipe, tmp_path, started):
    submitted.check_killed(submit, tmp_path / "job", long_recipe(steps=10**6), started=started)


@needs_ssh
@pytest.mark.slow
def test_each_rank_of_a_job_by_ssh_has_its_log(submit, long_recipe, tmp_path):
    submitted.check_logs(submit, tmp_path / "job", long_recipe())


def by_hand(hosts, folder, recipe, node, master, *options, nodes=2) -> Submitted:
    """A node of a job that is started on each host by itself."""
    place = ["--nodes", str(nodes), "--node-rank", str(node), "--master-addr", master, "--ranks-per-node", "1"]
    return Submitted(hosts, node, [*LAUNCH, "recipe.yaml", *place, *options], folder, Path(recipe.train.output))


def text_of(jobs) -> str:
    return "\n".join(job.text for job in jobs)


@needs_hosts
def test_two_hosts_that_know_no_name_of_each_other_train_together(hosts, tiny, tmp_path):
    """Each has its own name at 127.0.1.1. Node 0 keeps the store on the one address that it was given."""
    recipe = tiny(train={"steps": 10**6, "eval_every": 0})
    write_recipe(tmp_path / "job", recipe)
    jobs = [by_hand(hosts, tmp_path / "job", recipe, i, hosts.addresses[0]) for i in (0, 1)]
    jobs[0].wait_for_step(2)
    for i, job in enumerate(jobs):
        found = {(address, port == 29500) for _, address, port in listening(job.everybody())}
        assert {address for address, _ in found} <= {hosts.addresses[i]}, found
        assert (hosts.addresses[i], True) in found or i, found
    os.kill(jobs[1].process.pid, signal.SIGTERM)
    assert [job.finish(60) for job in jobs] == [143, 143], text_of(jobs)
    assert "ranks     2 = dp_replicate 2" in jobs[0].text and f"saved step {len(losses(jobs[0].output))} of" in (
        jobs[0].text
    )
    jobs[0].wait_until_nothing_is_left(5)


@needs_ssh
@pytest.mark.slow
def test_four_hosts_by_ssh_have_their_ranks_in_the_order_of_the_list(submit, hosts, tiny, tmp_path):
    recipe = tiny()
    write_recipe(tmp_path / "job", recipe)
    order = (2, 0, 3, 1)
    job = submit(tmp_path / "job", recipe, "--log-dir", "logs", names=[hosts.addresses[i] for i in order])
    assert job.finish(120) == 0 and "ranks     4 = dp_replicate 4" in job.text, job.text
    names = [f"rank-{rank:05d}.mrn-{i}.log" for rank, i in enumerate(order)]
    assert sorted(path.name for path in (tmp_path / "job" / "logs").iterdir()) == names
    job.wait_until_nothing_is_left(5)


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize("family", [4, 6])
def test_a_node_that_comes_first_says_for_whom_it_waits(hosts, long_recipe, tmp_path, alone, family):
    recipe = long_recipe()
    write_recipe(tmp_path / "job", recipe)
    master = (hosts.addresses if family == 4 else hosts.addresses_v6)[0]
    place = f"{master}:29500" if family == 4 else f"[{master}]:29500"
    one = by_hand(hosts, tmp_path / "job", recipe, 1, master)
    one.wait_for(lambda: f"mrn-1, node 1, waits for node 0: nothing answers at {place} yet" in one.text, "word", 30)
    zero = by_hand(hosts, tmp_path / "job", recipe, 0, master)
    assert [job.finish(120) for job in (zero, one)] == [0, 0], text_of((zero, one))
    assert (losses(zero.output), zero.digest) == alone(recipe)


@needs_hosts
@pytest.mark.slow
def test_a_name_that_resolves_only_later_is_waited_for(hosts, tiny, tmp_path):
    """Node 0 has it at 127.0.1.1, and so listens on all addresses; others get it while the job waits."""
    recipe = tiny()
    write_recipe(tmp_path / "job", recipe)
    before = hosts.hosts_file(1).read_text()
    jobs = [by_hand(hosts, tmp_path / "job", recipe, i, hosts.names[0]) for i in (0, 1)]
    try:
        says = f"mrn-1 waits for the name {hosts.names[0]} (MASTER_ADDR) to resolve"
        jobs[1].wait_for(lambda: says in jobs[1].text, "word about the name", 30)
        jobs[0].wait_for(lambda: "waiting for 1 of 2 nodes" in jobs[0].text, "word about the other node", 30)
        found = listening(jobs[0].everybody())
        assert {address for _, address, _ in found} == {"0.0.0.0"}, found
        hosts.hosts_file(1).write_text(f"{before}{hosts.addresses[0]} {hosts.names[0]}\n")
        assert [job.finish(90) for job in jobs] == [0, 0], text_of(jobs)
    finally:
        hosts.hosts_file(1).write_text(before)
    assert "ranks     2 = dp_replicate 2" in jobs[0].text

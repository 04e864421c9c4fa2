"""Jobs of torchrun on several hosts: started by ssh from one of them, or by hand on each."""

import os
import shutil
import signal
import time

import pytest
import submitted
from hosts import CAN_MAKE_HOSTS, SSHD, Hosts
from launched import Launched
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
        return Submitted(hosts, 0, command, folder, submitted.Path(recipe.train.output))

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

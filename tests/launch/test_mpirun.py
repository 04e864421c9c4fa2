"""Jobs that Open MPI's mpirun starts on two hosts: one supervisor a node, or the ranks themselves."""

import shutil
from pathlib import Path

import pytest
import submitted
from hosts import CAN_MAKE_HOSTS, SSHD, Hosts
from launched import losses
from submitted import LAUNCH, Submitted, write_hostfile, write_recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CAN_MAKE_HOSTS or SSHD is None, reason="needs root, ip, unshare and sshd"),
    pytest.mark.skipif(not shutil.which("mpirun"), reason="needs Open MPI's mpirun"),
]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(2, tmp_path_factory.mktemp("hosts"), sshd=True) as made:
        yield made


@pytest.fixture
def submit(hosts):
    """A function that submits a job of one rank on each of two hosts."""

    def start(folder, recipe, *options, names=None, host=0) -> Submitted:
        hostfile = write_hostfile(hosts, folder, names)
        command = [*LAUNCH, "recipe.yaml", "--with", "mpirun", "--hostfile", str(hostfile), "--ssh", hosts.ssh]
        return Submitted(hosts, host, [*command, *options], folder, Path(recipe.train.output))

    return start


@pytest.mark.parametrize("kill", [False, True], ids=["error", "killed"])
def test_a_failure_on_node_2_is_the_last_line_of_a_job_by_mpirun(submit, long_recipe, tmp_path, kill):
    submitted.check_failure(submit, tmp_path / "job", long_recipe(), kill=kill)


@pytest.mark.parametrize(("when", "pause"), [("start", 0.0), ("start", 0.7), ("ranks", 0.0), ("ranks", 1.5)])
def test_a_signal_before_the_first_step_ends_a_job_by_mpirun(submit, long_recipe, tmp_path, when, pause):
    submitted.check_stop_before_the_first_step(submit, tmp_path / "job", long_recipe(steps=10**6), when, pause)


def test_a_signal_saves_a_job_by_mpirun_and_it_resumes_exactly(submit, long_recipe, tmp_path, alone):
    recipe = long_recipe()
    submitted.check_stop_and_resume(submit, tmp_path / "job", recipe, alone(recipe))


def test_a_second_signal_ends_a_job_by_mpirun_at_once(submit, long_recipe, tmp_path):
    submitted.check_second_signal(submit, tmp_path / "job", long_recipe(steps=10**6))


@pytest.mark.parametrize("started", [False, True], ids=["starting", "training"])
def test_a_killed_terminal_leaves_nothing_of_a_job_by_mpirun(submit, long_recipe, tmp_path, started):
    submitted.check_killed(submit, tmp_path / "job", long_recipe(steps=10**6), started=started)


def test_each_rank_of_a_job_by_mpirun_has_its_log(submit, long_recipe, tmp_path):
    submitted.check_logs(submit, tmp_path / "job", long_recipe())


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("host", [0, 1])
def test_rank_0_of_mpirun_is_on_the_first_host_of_the_list(submit, hosts, tiny, tmp_path, first, host):
    """Wherever it is submitted: the others look for it there."""
    recipe = tiny()
    write_recipe(tmp_path / "job", recipe)
    names = [hosts.addresses[first], hosts.addresses[1 - first]]
    job = submit(tmp_path / "job", recipe, "--log-dir", "logs", names=names, host=host)
    assert job.finish(60) == 0, job.text
    assert (tmp_path / "job" / "logs" / f"rank-00000.mrn-{first}.log").exists()


def test_mpirun_starts_ranks_by_itself_on_one_host(hosts, long_recipe, tmp_path, alone):
    recipe = long_recipe()
    write_recipe(tmp_path / "job", recipe)
    command = ["mpirun", "-np", "2", submitted.sys.executable, "-m", "megaresnorm.job", "recipe.yaml"]
    job = Submitted(hosts, 0, command, tmp_path / "job", Path(recipe.train.output))
    assert job.finish(120) == 0, job.text
    assert (losses(job.output), job.digest) == alone(recipe)

"""Jobs that DeepSpeed's launcher starts on two hosts: by pdsh and ssh, or by hand on each; and ranks by itself."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import submitted
from hosts import CAN_MAKE_HOSTS, SSHD, Hosts
from launched import losses
from submitted import LAUNCH, Submitted, write_hostfile, write_recipe

DEEPSPEED = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CAN_MAKE_HOSTS, reason="needs root, ip and unshare, to make network namespaces"),
    pytest.mark.skipif(DEEPSPEED is None, reason="needs the deepspeed command"),
]
needs_pdsh = pytest.mark.skipif(SSHD is None or not shutil.which("pdsh"), reason="needs sshd and pdsh")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(2, tmp_path_factory.mktemp("hosts"), sshd=SSHD is not None) as made:
        yield made


@pytest.fixture
def submit(hosts):
    """A function that submits a job of one rank on each of two hosts, through pdsh."""

    def start(folder, recipe, *options) -> Submitted:
        hostfile = write_hostfile(hosts, folder)
        command = [*LAUNCH, "recipe.yaml", "--with", "deepspeed", "--hostfile", str(hostfile), "--ssh", hosts.ssh]
        return Submitted(hosts, 0, [*command, *options], folder, Path(recipe.train.output))

    return start


@needs_pdsh
@pytest.mark.parametrize("kill", [False, True], ids=["error", "killed"])
def test_a_failure_on_node_2_is_the_last_line_of_a_job_by_deepspeed(submit, long_recipe, tmp_path, kill):
    submitted.check_failure(submit, tmp_path / "job", long_recipe(), kill=kill)


@needs_pdsh
@pytest.mark.parametrize(("when", "pause"), [("start", 0.0), ("start", 4.0), ("ranks", 0.0), ("ranks", 1.5)])
def test_a_signal_before_the_first_step_ends_a_job_by_deepspeed(submit, long_recipe, tmp_path, when, pause):
    submitted.check_stop_before_the_first_step(submit, tmp_path / "job", long_recipe(steps=10**6), when, pause)


@needs_pdsh
def test_a_signal_saves_a_job_by_deepspeed_and_it_resumes_exactly(submit, long_recipe, tmp_path, alone):
    recipe = long_recipe()
    submitted.check_stop_and_resume(submit, tmp_path / "job", recipe, alone(recipe))


@needs_pdsh
def test_a_second_signal_ends_a_job_by_deepspeed_at_once(submit, long_recipe, tmp_path):
    submitted.check_second_signal(submit, tmp_path / "job", long_recipe(steps=10**6))


@needs_pdsh
@pytest.mark.parametrize("started", [False, True], ids=["starting", "training"])
def test_a_killed_terminal_leaves_nothing_of_a_job_by_deepspeed(submit, long_recipe, tmp_path, started):
    submitted.check_killed(submit, tmp_path / "job", long_recipe(steps=10**6), started=started)


@needs_pdsh
def test_each_rank_of_a_job_by_deepspeed_has_its_log(submit, long_recipe, tmp_path):
    submitted.check_logs(submit, tmp_path / "job", long_recipe())


NOTE = "$(touch pwned) $HOME; 'a' \\"


def strange(folder, recipe) -> tuple[list[str], Path]:
    """A recipe, an override and a variable that a shell would split, expand and run; and where the run then is."""
    write_recipe(folder, recipe)
    path, output = folder / "my recipe & more;.yaml", folder / "my run;touch pwned;' `touch pwned` \"* %41 #"
    (folder / "recipe.yaml").rename(path)
    note = "import os, pathlib\nif 'NOTE' in os.environ and 'RANK' in os.environ:\n"
    note += f"    pathlib.Path({str(folder)!r}, 'note-' + os.environ['RANK']).write_text(os.environ['NOTE'])\n"
    (folder / "sitecustomize.py").write_text(note)
    return [path.name, f"train.output={output}", "--env", f"NOTE={NOTE}"], output


def check_untouched(folder: Path) -> None:
    assert not list(folder.rglob("pwned")) and not (Path.home() / "pwned").exists()
    assert [(folder / f"note-{rank}").read_text() for rank in (0, 1)] == [NOTE, NOTE]


@needs_pdsh
def test_words_reach_other_hosts_through_deepspeed_as_they_are(submit, hosts, long_recipe, tmp_path, alone):
    recipe = long_recipe()
    words, output = strange(tmp_path / "job", recipe)
    hostfile = write_hostfile(hosts, tmp_path / "job")
    command = [*LAUNCH, *words, "--with", "deepspeed", "--hostfile", str(hostfile), "--ssh", hosts.ssh]
    job = Submitted(hosts, 0, command, tmp_path / "job", output)
    assert job.finish(120) == 0, job.text
    check_untouched(tmp_path / "job")
    assert (losses(output), job.digest) == alone(recipe)


def test_deepspeed_is_started_by_hand_on_each_host(hosts, long_recipe, tmp_path, alone):
    recipe = long_recipe()
    words, output = strange(tmp_path / "job", recipe)
    hostfile = write_hostfile(hosts, tmp_path / "job")
    command = [*LAUNCH, *words, "--with", "deepspeed", "--no-ssh", "--hostfile", str(hostfile)]
    jobs = [Submitted(hosts, i, [*command, "--node-rank", str(i)], tmp_path / "job", output) for i in (1, 0)]
    assert [job.finish(60) for job in jobs] == [0, 0], "\n".join(job.text for job in jobs)
    check_untouched(tmp_path / "job")
    assert (losses(output), jobs[1].digest) == alone(recipe)


def test_a_signal_to_one_host_ends_a_job_started_by_hand(hosts, long_recipe, tmp_path):
    recipe = long_recipe(steps=10**6)
    write_recipe(tmp_path / "job", recipe)
    hostfile = write_hostfile(hosts, tmp_path / "job")
    command = [*LAUNCH, "recipe.yaml", "--with", "deepspeed", "--no-ssh", "--hostfile", str(hostfile)]
    jobs = [
        Submitted(hosts, i, [*command, "--node-rank", str(i), "--job", "one"], tmp_path / "job", tmp_path / "run")
        for i in (0, 1)
    ]
    jobs[0].wait_for_step(5)
    os.kill(jobs[1].process.pid, submitted.signal.SIGTERM)
    assert [job.finish(60) for job in jobs] == [143, 143], jobs[0].text
    assert f"saved step {len(losses(jobs[0].output))} of" in jobs[0].text
    jobs[0].wait_until_nothing_is_left(5)


@needs_pdsh
def test_deepspeed_starts_ranks_by_itself_on_two_hosts(hosts, long_recipe, tmp_path, alone):
    recipe = long_recipe()
    write_recipe(tmp_path / "job", recipe)
    hostfile = write_hostfile(hosts, tmp_path / "job")
    command = [DEEPSPEED, "--hostfile", str(hostfile), "--no_ssh_check", "--master_addr", hosts.addresses[0]]
    command += ["--module", "megaresnorm.job", "recipe.yaml"]
    ssh = " ".join(hosts.ssh.split()[1:])
    (tmp_path / "job" / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")  # its launcher sends no other variable
    job = Submitted(hosts, 0, command, tmp_path / "job", Path(recipe.train.output), PDSH_SSH_ARGS_APPEND=ssh)
    assert job.finish(120) == 0, job.text
    assert (losses(job.output), job.digest) == alone(recipe)


def test_deepspeed_starts_ranks_by_itself_by_hand_on_each_host(hosts, long_recipe, tmp_path, alone):
    recipe = long_recipe()
    write_recipe(tmp_path / "job", recipe)
    hostfile = write_hostfile(hosts, tmp_path / "job")
    command = [DEEPSPEED, "--hostfile", str(hostfile), "--no_ssh", "--master_addr", hosts.addresses[0]]
    jobs = [
        Submitted(
            hosts,
            i,
            [*command, "--node_rank", str(i), "--module", "megaresnorm.job", "recipe.yaml"],
            tmp_path / "job",
            Path(recipe.train.output),
        )
        for i in (0, 1)
    ]
    assert [job.finish(60) for job in jobs] == [0, 0], "\n".join(job.text for job in jobs)
    assert (losses(jobs[0].output), jobs[0].digest) == alone(recipe)

"""Pods of a manifest as a cluster runs them: each on a host, as its process 1, with names that come late, and lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hosts import CAN_MAKE_HOSTS, ROOT, Hosts

from megaresnorm.errors import LostRankError
from megaresnorm.launch.kubernetes import FINAL, SAVED, Cluster, manifest
from megaresnorm.launch.request import Request
from megaresnorm.recipe.load import dump_recipe

Launched = None  # conftest.py: it starts several ranks, and is not to run beside other tests


class Pod:
    """The container of a manifest in a namespace of process ids, on one of the hosts.

    Args:
        job: the manifest's object of that kind.
        index: of the pod.
    """

    def __init__(self, hosts: Hosts, folder: Path, job: dict, index: int) -> None:
        (container,) = job["spec"]["template"]["spec"]["containers"]
        name = f"{job['metadata']['name']}-{index}"
        variables = {one["name"]: one["value"] for one in container["env"]}
        variables |= {"HOSTNAME": name, "JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
        words = [sys.executable, *container["command"][1:]]
        inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *words]
        self._log = folder / f"{name}-{time.monotonic_ns()}.log"
        self.process = subprocess.Popen(
            [*hosts.on(index), *inside],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT)} | variables,
            stdout=self._log.open("w"),
            stderr=subprocess.STDOUT,
        )

    @property
    def text(self) -> str:
        return self._log.read_text()

    @property
    def first(self) -> int:
        """Its process 1."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text())

    def wait(self, timeout: float = 60) -> int:
        return self.process.wait(timeout)

    def lose(self) -> None:
        """As with its node: nothing of it is left, and nobody is told."""
        self.process.kill()
        self.process.wait()


def wait_for(condition, pods: list[Pod], what: str, timeout: float = 90) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "\n".join([f"no {what}", *(pod.text for pod in pods)])
        time.sleep(0.05)


def steps(run: Path) -> int:
    """How many steps are recorded."""
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


@pytest.mark.slow
@pytest.mark.skipif(not CAN_MAKE_HOSTS, reason="needs root, ip and unshare")
def test_pods_start_in_any_order_and_join_again_when_they_are_made_again(tiny, tmp_path):
    """The exit codes of what is lost are those that make a pod again, and a drained pod saves with all others."""
    recipe = tiny(train={"steps": 10**6, "eval_every": 0, "output": "run"}, checkpoint={"every": 10})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    request = Request(recipe="recipe.yaml", job="pods", nodes=2, ranks=1, folder=tmp_path,
                      variables={"OMP_NUM_THREADS": "1"})  # fmt: skip
    *_, job = yaml.safe_load_all(manifest(request, Cluster(image="mrn", gpus=False)))
    run = tmp_path / "run"

    def go_on(pods: list[Pod]) -> None:
        before = steps(run)
        wait_for(lambda: steps(run) > before + 5, pods, f"step after {before}")

    with Hosts(2, tmp_path) as hosts:
        second = Pod(hosts, tmp_path, job, 1)
        wait_for(lambda: "waits for the name pods-0.pods" in second.text, [second], "word about the name")
        for i in range(2):  # the cluster's names, once pod 0 has an address
            own = " pods-0" if i == 0 else ""
            with hosts.hosts_file(i).open("a") as file:
                file.write(f"{hosts.addresses[0]} pods-0.pods{own}\n")
        first = Pod(hosts, tmp_path, job, 0)
        go_on([first, second])

        second.lose()
        second = Pod(hosts, tmp_path, job, 1)
        go_on([first, second])
        assert first.process.poll() is None, "pod 0 has waited"

        first.lose()
        assert second.wait() == LostRankError.exit_code not in (0, *FINAL, *SAVED), second.text
        first, second = (Pod(hosts, tmp_path, job, i) for i in range(2))
        go_on([first, second])

        os.kill(second.first, signal.SIGTERM)
        assert [first.wait(), second.wait()] == [143, 143] and 143 in SAVED, first.text + second.text
        assert f"saved step {steps(run)} of" in first.text + second.text
        assert hosts.processes() == []

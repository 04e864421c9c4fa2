"""Manifests of jobs under Kubernetes, held against its schemas, and what pods make of their variables."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megaresnorm.cli import main
from megaresnorm.errors import ConfigError
from megaresnorm.launch.kubernetes import FINAL, LOSSES, Cluster, manifest
from megaresnorm.launch.request import Request, forwarded, job_name, new_job_name
from megaresnorm.parallel.environment import Environment, read_environment
from megaresnorm.parallel.plan import Plan, read_plan
from megaresnorm.resilience import supervisor

ROOT = Path(__file__).parents[2]
# Before 1.29 the published schemas ask for onPodConditions in every rule, which the servers then refuse.
VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
HOSTILE = [
    "plain", "a: b", "- a", "# no comment", "'single' \"double\"", "back\\slash \\n", "$(HOME) $HOME $$ $$(X) ${X} $",
    "two\nlines\r\n\ttab", "yes", "null", "~", "1e3", "0x10", "012", "2026-11-29", "", " ", "{a: [b]}",
    "*alias &anchor", "!tag", "%percent", "@at `tick`", "<NAME> <COMMAND>", "\x00\x07\x1b\x7f\x85\x9f\xa0",
    "\u2028\u2029\ufeff\uffff", "Grüße, 世界 🌍", "\U0010ffff", "---", "...", "a\n---\nb",
]  # fmt: skip


def request(**changed) -> Request:
    settings = {"recipe": "configs/deepnorm-200-1b.yaml", "job": "deep", "nodes": 4, "ranks": 8, "variables": {}}
    return Request(**settings | {"folder": Path("/here")} | changed)


def cluster(**changed) -> Cluster:
    return Cluster(**{"image": "megaresnorm:latest"} | changed)


def objects(text: str) -> dict[str, dict]:
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


def container(text: str) -> dict:
    (found,) = objects(text)["Job"]["spec"]["template"]["spec"]["containers"]
    return found


def as_given(text: str, variables: dict[str, str]) -> str:
    """What a container gets for a word: Kubernetes replaces ``$(NAME)``, and ``$$`` by ``$``."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), text)


CASES = {
    "as it is": (request(), cluster()),
    "with all": (
        request(variables={"NCCL_DEBUG": "INFO"}, master=(None, 29600), logs="logs", max_restarts=0),
        cluster(claim="runs", namespace="research", image="registry.example:5000/team/mrn:v1.2@sha256:" + "0" * 64),
    ),
    "without GPUs": (request(ranks=2), cluster(gpus=False)),
    "one node": (request(nodes=1), cluster()),
    "very many": (request(nodes=99_999, job="a" * 57), cluster()),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_object_is_one_of_kubernetes(case, version):
    validate = pytest.importorskip("kubernetes_validate")
    found = objects(manifest(*CASES[case]))
    assert list(found) == ["Service", "NetworkPolicy", "Job"]
    for one in found.values():
        validate.validate(one, version, strict=True)


def test_a_schema_finds_what_is_wrong():
    validate = pytest.importorskip("kubernetes_validate")
    job = objects(manifest(request(), cluster()))["Job"]
    for change in ({"completions": "four"}, {"complettions": 4}, {"podFailurePolicy": {"rules": [{"action": 1}]}}):
        with pytest.raises(validate.ValidationError):
            validate.validate(job | {"spec": job["spec"] | change}, "1.37", strict=True)


def test_pods_know_their_places_and_are_alone_with_each_other():
    found = objects(manifest(*CASES["with all"]))
    job, pod = found["Job"]["spec"], found["Job"]["spec"]["template"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 4, 4)
    command = container(manifest(*CASES["with all"]))["command"]
    assert command[:5] == ["python", "-m", "megaresnorm", "launch", "configs/deepnorm-200-1b.yaml"]
    service = found["Service"]["metadata"]["name"]
    assert found["Service"]["spec"]["clusterIP"] == "None" and pod["subdomain"] == service
    assert command[command.index("--master-addr") + 1] == f"{found['Job']['metadata']['name']}-0.{service}"
    ports = [found["Service"]["spec"]["ports"][0]["port"], pod["containers"][0]["ports"][0]["containerPort"]]
    assert ports == [int(command[command.index("--master-port") + 1])] * 2 == [29600] * 2
    assert {one["metadata"]["namespace"] for one in found.values()} == {"research"}
    labels = found["Job"]["spec"]["template"]["metadata"]["labels"]
    selectors = [found["Service"]["spec"]["selector"], found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]]
    (rule,) = found["NetworkPolicy"]["spec"]["ingress"]
    selectors += [one["podSelector"]["matchLabels"] for one in rule["from"]]
    (apart,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert all(one == labels for one in [*selectors, apart["labelSelector"]["matchLabels"]])
    assert found["NetworkPolicy"]["spec"]["policyTypes"] == ["Ingress"]


def test_a_pod_has_what_its_ranks_need():
    with_claim = objects(manifest(*CASES["with all"]))["Job"]["spec"]["template"]["spec"]
    (one,) = with_claim["containers"]
    assert one["resources"]["limits"] == {"nvidia.com/gpu": 8} and with_claim["tolerations"]
    mounts = {mount["name"]: mount["mountPath"] for mount in one["volumeMounts"]}
    assert mounts == {"shm": "/dev/shm", "work": one["workingDir"]}
    volumes = {volume["name"]: volume for volume in with_claim["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory"}
    assert volumes["work"]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert with_claim["terminationGracePeriodSeconds"] == 600 and with_claim["restartPolicy"] == "Never"
    without = objects(manifest(*CASES["without GPUs"]))["Job"]["spec"]["template"]["spec"]
    assert "limits" not in without["containers"][0]["resources"] and "tolerations" not in without
    assert [volume["name"] for volume in without["volumes"]] == ["shm"]


def test_what_a_restart_does_not_mend_ends_the_job_and_what_a_signal_ended_is_no_failure():
    job = objects(manifest(request(), cluster()))["Job"]["spec"]
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"]
             if "onExitCodes" in rule}  # fmt: skip
    assert codes == {"FailJob": [*FINAL], "Ignore": [130, 138, 143]} and 6 not in FINAL
    assert all(values == sorted(set(values)) for values in codes.values()), "the server asks for that"
    last = job["podFailurePolicy"]["rules"][-1]
    assert last == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert job["backoffLimit"] == LOSSES * 4


def test_whatever_is_in_words_and_variables_reaches_the_pod_as_it_was_given():
    variables = {f"V{i}": value for i, value in enumerate(HOSTILE)}
    given = request(recipe="my 'recipes'/\"a\": b.yaml", overrides=tuple(HOSTILE), variables=variables, logs="lo gs\n")
    found = container(manifest(given, cluster()))
    env = {one["name"]: one["value"] for one in found["env"]}
    known = {"HOME": "/root", "X": "expanded", **env}
    assert {name: as_given(value, known) for name, value in env.items()} == {"PYTHONUNBUFFERED": "1", **variables}
    words = [as_given(word, known) for word in found["command"]]
    assert words[4 : 5 + len(HOSTILE)] == ["my 'recipes'/\"a\": b.yaml", *HOSTILE]
    assert words[words.index("--log-dir") + 1] == "lo gs\n"
    assert set(objects(manifest(given, cluster()))) == {"Service", "NetworkPolicy", "Job"}


def test_text_that_is_not_utf_8_is_one_line():
    with pytest.raises(ConfigError, match="not UTF-8"):
        manifest(request(overrides=("data.path=\udcff",)), cluster())


WRONG = {
    "--job": [{"job": name} for name in ("Deep", "deep_1", "1deep", "-a", "a-", "a.b", "", "a" * 62, "a\n", "ä")],
    "--image": [{"image": name} for name in ("", "a b", "a'", 'a"b', "a\nb", "a\n", "-a", "A", "a:", "a@sha256:1",
                                             "a::b", "$(x)", "a" * 600, "ä")],
    "--namespace": [{"namespace": name} for name in ("A", "a.b", "", "a" * 64, "a\n", "a: b")],
    "--claim": [{"claim": name} for name in ("A", "a..b", "", "a" * 254, "a}", "a\n")],
    "--gpus-per-node": [{"ranks": None}],
    "--master-addr": [{"master": ("node0", None)}],
}  # fmt: skip


@pytest.mark.parametrize("option", WRONG)
def test_names_that_kubernetes_does_not_take_are_one_line(option):
    for changed in WRONG[option]:
        of_request = {name: value for name, value in changed.items() if name in ("job", "ranks", "master")}
        of_cluster = {name: value for name, value in changed.items() if name not in of_request}
        with pytest.raises(ConfigError) as caught:
            manifest(request(**of_request), cluster(**of_cluster))
        assert option in str(caught.value) and len(str(caught.value).splitlines()) == 1, changed


def test_usual_names_are_taken():
    for image in ("a", "library/a", "ghcr.io/b/c:1.0", "localhost:5000/a__b/c-d.e:V1_x", "a@sha256:" + "a" * 64):
        assert container(manifest(request(), cluster(image=image)))["image"] == image
    manifest(request(job="a" * 61), cluster(namespace="a" * 63, claim="a.b-c." + "d" * 63))


@pytest.mark.parametrize(
    "recipe", ["configs/deepnorm-200-1b.yaml", "1B.yaml", "My Recipe_v2.final.yaml", "世界.yaml", "-x.yaml", "a" * 99]
)
def test_a_job_without_a_name_gets_one_that_every_launcher_takes(recipe):
    name = new_job_name(recipe)
    assert job_name(name) == name
    manifest(request(job=name, nodes=99_999), cluster())


def test_hosts_that_name_the_job_by_themselves_name_it_alike(tmp_path, capsys):
    """Else each would wait for the others of a job that is only its own."""
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    words = ["launch", "configs/quickstart.yaml", "--with", "deepspeed", "--hostfile", str(tmp_path / "hosts")]
    for rank in ("0", "1"):
        assert main([*words, "--no-ssh", "--node-rank", rank, "--dry-run"]) == 0
        assert "--job quickstart-port-29500 " in capsys.readouterr().out


def test_a_pod_waits_for_the_name_of_node_0_as_long_as_the_cluster_needs(monkeypatch):
    """Elsewhere a name that does not resolve for a quarter of an hour is wrong, and code 2 would end the whole Job."""
    waiting = SimpleNamespace(_hearing=SimpleNamespace(stop=0, sleep=lambda seconds: None), _say=lambda line: None)
    answers = iter([None] * 5 + ["10.1.2.3"] + [None] * 5)
    monkeypatch.setattr(supervisor, "local_address_of", lambda host, port: next(answers))
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: next(hours))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    assert supervisor.Supervisor._await_address(waiting, "deep-0.deep", 29500) == "10.1.2.3"
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=deep-0\.deep does not resolve"):
        supervisor.Supervisor._await_address(waiting, "deep-0.deep", 29500)


def test_the_command_prints_it_and_sends_no_path_of_this_machine(capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/of/this/machine")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "wlan0")
    monkeypatch.setenv("TOKEN", "it: 'is'")
    words = ["launch", "no-such-recipe.yaml", "model.dim=64", "--nodes", "2", "--ranks-per-node", "1"]
    words += ["--with", "kubernetes", "--image", "mrn", "--env", "TOKEN", "--env", "A=$(B)", "--dry-run"]
    assert main(words) == 0
    text = capsys.readouterr().out
    env = {one["name"]: one["value"] for one in container(text)["env"]}
    assert env == {"A": "$$(B)", "PYTHONUNBUFFERED": "1", "TOKEN": "it: 'is'"}
    assert forwarded([], {"NCCL_DEBUG": "INFO"}) == {"NCCL_DEBUG": "INFO"}


def test_the_file_in_launch_is_what_the_command_prints():
    text = (ROOT / "launch" / "kubernetes" / "job.yaml").read_text()
    made = manifest(request(job="deepnorm-200-1b"), cluster(claim="megaresnorm"))

    def body(of: str) -> str:
        return of[of.index("# Names for the pods") :]

    assert body(text) == body(made)
    assert all(line.startswith("# ") and len(line) <= 120 for line in text[: text.index("# Names")].splitlines())


POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
# What Kubeflow's training operator sets for a PyTorchJob, and its trainer for a TrainJob.
PYTORCH_JOB = POD | {
    "HOSTNAME": "deep-worker-0", "PYTHONUNBUFFERED": "1", "MASTER_ADDR": "deep-master-0", "MASTER_PORT": "23456",
    "WORLD_SIZE": "16", "RANK": "1", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "deep-master-0", "PET_MASTER_PORT": "23456",
}  # fmt: skip
OLD_PYTORCH_JOB = POD | {
    "HOSTNAME": "deep-worker-1", "MASTER_ADDR": "deep-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "4", "RANK": "2"
}  # fmt: skip
ELASTIC_JOB = POD | {
    "HOSTNAME": "deep-worker-2", "PET_RDZV_ENDPOINT": "deep-worker-0:23456", "PET_RDZV_BACKEND": "c10d",
    "PET_NNODES": "2:4", "PET_RDZV_ID": "deep", "PET_NPROC_PER_NODE": "gpu", "PET_MAX_RESTARTS": "9",
}  # fmt: skip
TRAIN_JOB = POD | {
    "HOSTNAME": "deep-node-0-3", "JOB_COMPLETION_INDEX": "3", "PET_NNODES": "4", "PET_NPROC_PER_NODE": "auto",
    "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "deep-node-0-0.deep", "PET_MASTER_PORT": "29400",
}  # fmt: skip
AT = "deep-node-0-0.deep"
PLANS = {
    "PyTorchJob": (PYTORCH_JOB, Plan(8, (2, 2), 1, ("deep-master-0", 23456), "megaresnorm-deep-master-0-23456")),
    "its master": (
        PYTORCH_JOB | {"HOSTNAME": "deep-master-0", "RANK": "0", "PET_NODE_RANK": "0"},
        Plan(8, (2, 2), 0, ("deep-master-0", 23456), "megaresnorm-deep-master-0-23456"),
    ),
    "PyTorchJob without PET": (
        OLD_PYTORCH_JOB, Plan(3, (4, 4), 2, ("deep-master-0", 23456), "megaresnorm-deep-master-0-23456")),
    "elastic": (ELASTIC_JOB, Plan(3, (2, 4), None, ("deep-worker-0", 23456), "deep")),
    "elastic, of one size": (
        ELASTIC_JOB | {"PET_NNODES": "4"}, Plan(3, (4, 4), 2, ("deep-worker-0", 23456), "deep")),
    "TrainJob": (TRAIN_JOB, Plan(3, (4, 4), 3, (AT, 29400), f"megaresnorm-{AT}-29400")),
    "TrainJob of one node": (TRAIN_JOB | {"PET_NNODES": "1", "PET_NODE_RANK": "0"}, Plan(3, job="j")),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS)
def test_the_pods_of_kubeflow_know_their_places(case):
    variables, plan = PLANS[case]
    job = {} if plan.nodes[1] > 1 else {"JOB_ID": "j"}
    assert read_plan(lambda: 3, variables, **job) == plan


@pytest.mark.parametrize("index", [0, 3])
def test_a_pod_of_a_manifest_knows_its_place(index):
    """By the options of its command, and by the variable that Kubernetes sets."""
    command = container(manifest(request(), cluster()))["command"]
    options = dict(zip(command[5::2], command[6::2], strict=True))
    settings = {
        name: options[f"--{name.lower().replace('_', '-')}"] for name in ("NODES", "MASTER_ADDR", "MASTER_PORT")
    }
    pod = POD | {"JOB_COMPLETION_INDEX": str(index), "HOSTNAME": f"deep-{index}"}
    plan = read_plan(lambda: 2, pod, **settings, RANKS_PER_NODE=options["--gpus-per-node"], JOB_ID=options["--job"])
    assert plan == Plan(8, (4, 4), index, ("deep-0.deep", 29500), "deep")
    assert read_environment(pod) == Environment(), "the supervisor itself is no rank"


def test_pods_whose_variables_contradict_the_command_are_refused():
    with pytest.raises(ConfigError, match="NODES=3, but the launcher that has started this says 4"):
        read_plan(lambda: 2, TRAIN_JOB, NODES="3")
    with pytest.raises(ConfigError, match="NODE_RANK='4': wanted a whole number from 0 to 3"):
        read_plan(lambda: 2, TRAIN_JOB | {"PET_NODE_RANK": "4"})


def test_a_pod_of_kubeflow_is_a_rank_only_where_it_is_to_start_no_others():
    """Without megaresnorm launch. With several ranks a pod, most ranks would never come."""
    one = read_environment(OLD_PYTORCH_JOB)
    assert (one.rank, one.local_rank, one.world_size, one.ranks_here) == (2, 0, 4, 1)
    assert read_environment(PYTORCH_JOB | {"WORLD_SIZE": "2", "PET_NPROC_PER_NODE": "1"}).rank == 1
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=16, on 2 nodes .* let the pods run megaresnorm launch RECIPE"):
        read_environment(PYTORCH_JOB)
    supervised = PYTORCH_JOB | {"LOCAL_RANK": "3", "RANK": "11", "LOCAL_WORLD_SIZE": "8"}
    assert read_environment(supervised).rank == 11


def test_yaml_is_json_that_kubectl_reads_too():
    """Nothing depends on what is special to one reader of YAML: every scalar of a user's is a string of JSON."""
    text = manifest(request(variables={"A": "x: y"}), cluster(claim="runs"))
    quoted = re.findall(r'"(?:[^"\\]|\\.)*"', text)
    assert len(quoted) > 25 and all(isinstance(json.loads(one), str) for one in quoted)
    assert text.isascii() and "\t" not in text and sys.getsizeof(text) < 10_000

"""A job under Kubernetes: an indexed Job with a pod for each node, and a headless Service that gives them names.

A pod that fails or whose node goes is made again under the same name and index, and joins the others, which wait for it
(resilience/supervisor.py).
"""

import json
import re
from dataclasses import dataclass, replace

from megaresnorm.errors import ConfigError
from megaresnorm.launch.request import Request
from megaresnorm.limits import MAX_SHOWN
from megaresnorm.parallel.launchers import PORT
from megaresnorm.resilience.signals import TIME_IS_UP

GRACE = 600  # seconds that a pod has to save a checkpoint once it is to end
WORK, USER = "/workspace", 1000  # where containers work, and as whom (launch/Dockerfile)
# Exit codes that making pods again does not mend: recipe, data, checkpoint, training, conversion; and a run whose
# train.max_minutes are over is to end.
FINAL = (2, 3, 4, 5, 7, TIME_IS_UP)
SAVED = (130, 138, 143)  # what a signal has ended: a node was drained, and the others have saved with it
# Where node 0 is lost, the other nodes lose the rendezvous, and all pods fail: that is one failure of the job.
LOSSES = 3

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_PART = r"[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*"
_IMAGE = (
    rf"([A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{{1,5}})?/)?{_PART}(/{_PART})*(:\w[\w.-]{{0,127}})?(@sha256:[0-9a-f]{{64}})?"
)
# What YAML does not take as it is within quotes, or takes for the end of a line.
_ESCAPED = re.compile("[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What only Kubernetes asks for.

    Attributes:
        image: container image with this package.
        namespace: None for the one that kubectl is set to.
        claim: a volume claim that all nodes can write, in which the containers work; None for none.
        gpus: whether each rank has one.
    """

    image: str
    namespace: str | None = None
    claim: str | None = None
    gpus: bool = True


def manifest(request: Request, cluster: Cluster) -> str:
    """The objects of a job, as YAML.

    Raises:
        ConfigError: a name is none that Kubernetes takes, or an option is missing or has no effect.
    """
    _check(request, cluster)
    name, port = request.job, request.master[1] or PORT
    request = replace(request, master=(f"{name}-0.{name}", port))
    command = request.node_command(python=("python", "-m", "megaresnorm"))
    variables = sorted(({"PYTHONUNBUFFERED": "1"} | dict(request.variables)).items())
    gpus = [f"nvidia.com/gpu: {request.ranks}"] if cluster.gpus else []
    lines = {
        "COMMAND": [f"- {_text(_literal(word))}" for word in command],
        "ENV": [line for key, value in variables for line in (f"- name: {key}", f"  value: {_text(_literal(value))}")],
        "LIMITS": ["limits:", *(f"  {line}" for line in gpus)] if gpus else [],
        "TOLERATIONS": ["tolerations:", "  - {key: nvidia.com/gpu, operator: Exists}"] if gpus else [],
        "MOUNT": [f"- {{name: work, mountPath: {WORK}}}"] if cluster.claim else [],
        "VOLUME": ["- name: work", f"  persistentVolumeClaim: {{claimName: {_text(cluster.claim)}}}"]
        if cluster.claim
        else [],
        "NAMESPACE": [f"namespace: {_text(cluster.namespace)}"] if cluster.namespace else [],
    }
    texts = {
        "NAME": _text(name),
        "IMAGE": _text(cluster.image),
        "PORT": str(port),
        "NODES": str(request.nodes),
        "CORES": str(request.ranks),
        "BACKOFF": str(LOSSES * request.nodes),
        "FINAL": str([*FINAL]),
        "SAVED": str([*SAVED]),
        "GRACE": str(GRACE),
        "WORK": WORK,
        "USER": str(USER),
    }
    return _filled(TEMPLATE, lines, texts)


def _check(request: Request, cluster: Cluster) -> None:
    name, most = request.job, 63 - len(f"-{request.nodes - 1}")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > most:
        raise ConfigError(
            f"--job {name[:MAX_SHOWN]!r}: Kubernetes wants lower-case letters, digits and '-', at most {most}, the "
            "first a letter, the last no '-'"
        )
    if not re.fullmatch(_IMAGE, cluster.image, re.ASCII) or len(cluster.image) > 512:
        raise ConfigError(f"--image {cluster.image[:MAX_SHOWN]!r}: wanted [HOST/]NAME[:TAG][@sha256:DIGEST]")
    if cluster.namespace is not None and not (re.fullmatch(_LABEL, cluster.namespace) and len(cluster.namespace) < 64):
        raise ConfigError(f"--namespace {cluster.namespace[:MAX_SHOWN]!r}: wanted lower-case letters, digits and '-'")
    if cluster.claim is not None and not (
        re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", cluster.claim) and len(cluster.claim) < 254
    ):
        raise ConfigError(f"--claim {cluster.claim[:MAX_SHOWN]!r}: wanted lower-case letters, digits, '-' and '.'")
    if request.ranks is None:
        raise ConfigError("--with kubernetes needs --gpus-per-node, or --ranks-per-node for ranks without GPUs")
    if request.master[0] is not None:
        raise ConfigError("--master-addr has no effect with --with kubernetes: it is the pod of node 0")


def _text(text: str) -> str:
    """A text as YAML: a string of JSON, with what YAML would change within quotes escaped.

    Raises:
        ConfigError: it has bytes that are no UTF-8.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"{text[:MAX_SHOWN]!a}: not UTF-8, which a manifest has to be")
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def _literal(text: str) -> str:
    """A text of a command or a variable, in which Kubernetes would replace ``$(NAME)``, and takes ``$$`` for ``$``."""
    return text.replace("$", "$$")


def _filled(template: str, lines: dict[str, list[str]], texts: dict[str, str]) -> str:
    """A template with ``<NAME>`` replaced, by lines where it stands alone, which get its indentation, else by text.

    What is put in is never looked at again.
    """
    found = []
    for line in template.splitlines():
        alone = re.fullmatch(r"( *)<([A-Z]+)>", line)
        if alone:
            found += [alone[1] + one for one in lines[alone[2]]]
        else:
            found.append(re.sub(r"<([A-Z]+)>", lambda match: texts[match[1]], line))
    return "\n".join(found) + "\n"


TEMPLATE = """\
# Made by megaresnorm launch --with kubernetes --dry-run, and to be edited: kubectl apply -f THIS_FILE
# Names for the pods: NAME-0.NAME is that of node 0.
apiVersion: v1
kind: Service
metadata:
  name: <NAME>
  <NAMESPACE>
  labels: {megaresnorm.job: <NAME>}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector: {megaresnorm.job: <NAME>}
  ports:
    - {name: rendezvous, port: <PORT>}
---
# Ranks do not authenticate each other: only the job's own pods may reach them. It takes a network plugin that enforces
# policies; without one, everybody who reaches the pods can run code in them.
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: <NAME>
  <NAMESPACE>
  labels: {megaresnorm.job: <NAME>}
spec:
  podSelector:
    matchLabels: {megaresnorm.job: <NAME>}
  policyTypes: [Ingress]
  ingress:
    - from:
        - podSelector:
            matchLabels: {megaresnorm.job: <NAME>}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: <NAME>
  <NAMESPACE>
  labels: {megaresnorm.job: <NAME>}
spec:
  completionMode: Indexed
  completions: <NODES>
  parallelism: <NODES>
  # Failed pods, of all nodes together: the loss of node 0 fails every pod, and this is for three such losses.
  backoffLimit: <BACKOFF>
  podFailurePolicy:
    rules:
      - action: FailJob # what another start does not mend; 124: train.max_minutes are over
        onExitCodes: {containerName: train, operator: In, values: <FINAL>}
      - action: Ignore # a signal has saved a checkpoint, as all nodes do where one is drained
        onExitCodes: {containerName: train, operator: In, values: <SAVED>}
      - action: Ignore # drained, preempted
        onPodConditions:
          - {type: DisruptionTarget, status: "True"}
  template:
    metadata:
      labels: {megaresnorm.job: <NAME>}
    spec:
      subdomain: <NAME>
      restartPolicy: Never
      terminationGracePeriodSeconds: <GRACE> # SIGTERM saves a checkpoint
      enableServiceLinks: false # a service called master would set MASTER_PORT
      automountServiceAccountToken: false
      securityContext: {fsGroup: <USER>, fsGroupChangePolicy: OnRootMismatch} # the image's user writes to the volume
      affinity:
        podAntiAffinity: # each pod on a node of its own
          requiredDuringSchedulingIgnoredDuringExecution:
            - topologyKey: kubernetes.io/hostname
              labelSelector:
                matchLabels: {megaresnorm.job: <NAME>}
      <TOLERATIONS>
      containers:
        - name: train
          image: <IMAGE>
          workingDir: <WORK>
          command:
            <COMMAND>
          env:
            <ENV>
          ports:
            - {name: rendezvous, containerPort: <PORT>}
          resources:
            requests: {cpu: <CORES>}
            <LIMITS>
          securityContext: {allowPrivilegeEscalation: false}
          volumeMounts:
            - {name: shm, mountPath: /dev/shm}
            <MOUNT>
      volumes:
        - name: shm # ranks of a node exchange tensors there
          emptyDir: {medium: Memory}
        <VOLUME>
"""

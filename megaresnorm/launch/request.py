"""What a user asks of ``megaresnorm launch``, checked before anything is started."""

import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megaresnorm.errors import ConfigError
from megaresnorm.launch.hostfile import Host
from megaresnorm.limits import MAX_SHOWN

# Variables that every node is to have as the terminal has them. They stand in command lines, which other users of a
# host can read: none of these is a secret.
FORWARDED = ("CUDA_DEVICE_MAX_CONNECTIONS", "GLOO_", "MEGARESNORM_CACHE", "MKL_NUM_THREADS", "NCCL_", "OMP_",
             "PYTHONPATH", "TORCH_", "TORCHINDUCTOR_", "TRITON_")  # fmt: skip
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A job as it was asked for.

    Attributes:
        recipe: a recipe's file, as the nodes see it.
        overrides: of the form section.key=value, and options of ``megaresnorm train``.
        job: name of the job; letters, digits, ``.``, ``_`` and ``-``.
        nodes: number of nodes.
        ranks: ranks of each node; None where each node is to count its GPUs.
        hosts: the nodes, the first of which is that of rank 0; empty where the launcher knows them.
        master: host of node 0 and a port there, as far as they were given.
        max_restarts: as of ``Plan``; None for its default.
        logs: folder for the logs of ranks; None for none.
        variables: environment variables that every node is to have.
        ssh: the words of the command that reaches another host.
        python: the interpreter on the nodes.
        folder: the folder on the nodes in which they work.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    job: str
    nodes: int = 1
    ranks: int | None = None
    hosts: tuple[Host, ...] = ()
    master: tuple[str | None, int | None] = (None, None)
    max_restarts: int | None = None
    logs: str | None = None
    variables: Mapping[str, str]
    ssh: tuple[str, ...] = ("ssh",)
    python: str = sys.executable
    folder: Path

    @property
    def master_host(self) -> str | None:
        """Host of node 0; None where only the launcher knows it."""
        return self.master[0] or (self.hosts[0].name if self.hosts else None)

    def node_command(self, *more: str, python: Iterable[str] | None = None, job: bool = True) -> list[str]:
        """The command that each node runs.

        Args:
            more: options that only one launcher needs.
            job: name the job; the launcher does so itself where it tells a job from others.
            python: what stands before ``launch``; None for the interpreter of the nodes.
        """
        given = {
            "--nodes": str(self.nodes) if self.nodes > 1 else None,
            "--gpus-per-node": None if self.ranks is None else str(self.ranks),
            "--master-addr": self.master_host if self.nodes > 1 else None,
            "--master-port": None if self.master[1] is None or self.nodes == 1 else str(self.master[1]),
            "--max-restarts": None if self.max_restarts is None else str(self.max_restarts),
            "--log-dir": self.logs,
            "--job": self.job if job else None,
        }
        options = [word for name, value in given.items() if value is not None for word in (name, value)]
        start = [self.python, "-m", "megaresnorm"] if python is None else list(python)
        return [*start, "launch", self.recipe, *self.overrides, *options, *more]


def forwarded(
    names: Iterable[str], variables: Mapping[str, str] | None = None, *, only_named: bool = False
) -> dict[str, str]:
    """The variables that nodes are to have: ``FORWARDED`` as they are here, and those that ``--env`` names.

    Args:
        names: NAME, to be had as it is here, or NAME=VALUE.
        variables: in place of the process's own.
        only_named: leave out ``FORWARDED``, whose paths and interfaces are not those of a container.

    Raises:
        ConfigError: a name is none, or is not set here.
    """
    variables = os.environ if variables is None else variables
    found = {
        name: value
        for name, value in variables.items()
        if name.startswith(FORWARDED) and not SECRET.search(name)
        if not only_named
    }
    for text in names:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII) or "\0" in value or "\n" in value:
            raise ConfigError(f"--env {text[:MAX_SHOWN]!r}: wanted NAME, or NAME=VALUE in one line")
        if not equals and name not in variables:
            raise ConfigError(f"--env {name}: no such variable here; give it a value, --env {name}=VALUE")
        found[name] = value if equals else variables[name]
    return found


def new_job_name(recipe: str, of_its_own: str | None = None) -> str:
    """A name for a job that was given none, in what every launcher takes.

    Args:
        recipe: the recipe's file.
        of_its_own: what tells the job from others of that recipe, the same on all hosts that make the name by
            themselves; None for the time.

    >>> new_job_name("my recipes/1B_deep.v2.yaml", "port-29500")
    'job-1b-deep-v2-port-29500'
    """
    words = re.sub(r"[^a-z0-9]+", "-", Path(recipe).stem.lower())[:40].strip("-")
    name = words if words[:1].isalpha() else f"job-{words}".strip("-")
    return f"{name}-{of_its_own or time.strftime('%m%d-%H%M%S')}"


def job_name(text: str) -> str:
    """Check the name of a job, which goes into names of files, folders and Kubernetes' objects.

    Raises:
        ConfigError: it has other characters than those have, or too many.
    """
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?", text, re.ASCII):
        raise ConfigError(
            f"--job {text[:MAX_SHOWN]!r}: wanted letters, digits, '.', '_' and '-', at most 100, the first and the "
            "last a letter or digit"
        )
    return text


def ssh_words(text: str) -> tuple[str, ...]:
    """The words of ``--ssh``.

    Raises:
        ConfigError: it has none, or a quote that does not end.
    """
    try:
        words = tuple(shlex.split(text))
    except ValueError as e:
        raise ConfigError(f"--ssh {text[:MAX_SHOWN]!r}: {str(e).lower()}") from None
    if not words:
        raise ConfigError("--ssh '': wanted a command, such as 'ssh -p 2222'")
    return words

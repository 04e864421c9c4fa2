"""A job under Slurm: a batch script, or srun in an allocation; one task a node, the supervisor of its ranks."""

import re
import shlex
from collections.abc import Sequence

from megaresnorm.errors import ConfigError
from megaresnorm.launch.front import Part
from megaresnorm.launch.request import Request
from megaresnorm.limits import MAX_SHOWN
from megaresnorm.resilience.supervisor import BARRIER

SAVED = 138  # exit code of a run that SIGUSR1 has ended
NOTICE = 300  # seconds before the time limit at which Slurm sends it
# A task that has ended leaves the others this many seconds; supervisors of one job end within BARRIER of each other.
WAIT = int(BARRIER) + 10
# Slurm may send USR1 while Python is still starting, which would end it.
HEARS_LATER = ("bash", "-c", 'trap "" USR1; exec "$@"', "-")


def srun_words(request: Request, *more: str) -> list[str]:
    """The srun command: on each node one task, bound to no cores, since all ranks of the node come from it."""
    srun = ["srun", *more, "--ntasks-per-node=1", "--cpu-bind=none", f"--wait={WAIT}"]
    return [*srun, *HEARS_LATER, *request.node_command(job=False)]


def job_part(request: Request) -> Part:
    """The srun command in an allocation. Its tasks have this process's variables."""
    count = (f"--nodes={request.nodes}", f"--ntasks={request.nodes}", f"--chdir={request.folder}")
    return Part(srun_words(request, *count), variables=request.variables)


def options_of(texts: Sequence[str]) -> dict[str, str]:
    """Options of sbatch, given as NAME=VALUE, or NAME for one without a value.

    Raises:
        ConfigError: one is not of that form.
    """
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or re.search(r"[\s#'\"\\]", value):
            raise ConfigError(
                f"--sbatch {text[:MAX_SHOWN]!r}: wanted NAME=VALUE of an option of sbatch without its dashes, such as "
                "time=24:00:00"
            )
        found[name] = value
    return found


def batch_script(request: Request, *, gpus: bool, options: dict[str, str]) -> str:
    """A batch script that trains to the end of the recipe, however often the time limit interrupts it.

    Args:
        gpus: whether each rank has one.
        options: of sbatch, besides or in place of those here.
    """
    wanted = {
        "job-name": request.job,
        "nodes": str(request.nodes),
        "ntasks-per-node": "1",
        **({"gpus-per-node": str(request.ranks)} if gpus and request.ranks else {}),
        "exclusive": "",
        "signal": f"USR1@{NOTICE}",
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.log",
        **options,
    }
    lines = [f"#SBATCH --{name}{f'={value}' if value else ''}" for name, value in wanted.items()]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(request.variables.items())]
    return "\n".join([
        "#!/bin/bash",
        f"# Trains a recipe on {request.nodes} node{'s' if request.nodes > 1 else ''}: sbatch THIS_FILE. Made by",
        "# megaresnorm launch --with slurm --dry-run, and to be edited.",
        *lines,
        f"cd {shlex.quote(str(request.folder))} || exit 1",
        *exports,
        f"# One supervisor a node. USR1, {NOTICE} s before the time limit, saves a checkpoint and ends the run with",
        f"# code {SAVED}; then the same job waits for its next turn, and goes on from there.",
        "code=0",
        f"{shlex.join(srun_words(request))} || code=$?",
        f'[ "$code" -ne {SAVED} ] || scontrol requeue "$SLURM_JOB_ID"',
        'exit "$code"',
        "",
    ])  # fmt: skip

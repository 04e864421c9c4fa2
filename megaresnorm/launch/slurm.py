"""A job under Slurm: a batch script, or srun in an allocation; one task a node, the supervisor of its ranks.

The script trains to the end of the recipe, however often the time limit interrupts it. Slurm sends SIGUSR1 before the
limit; the run saves and ends, and node 0 leaves a file that says so. Only where the script finds this file the job is
queued again. A turn in which no checkpoint was written leaves none: the limit is then shorter than the start, and the
next turn would end like this one. What other tasks end with does not matter, be it that Slurm had to kill one.
"""

import re
import shlex
from collections.abc import Sequence

from megaresnorm.errors import ConfigError
from megaresnorm.launch.front import Part
from megaresnorm.launch.request import Request
from megaresnorm.limits import MAX_SHOWN
from megaresnorm.resilience.supervisor import BARRIER, NEXT_TURN

NOTICE = 300  # seconds before the time limit at which Slurm sends SIGUSR1
# A task that has ended leaves the others this many seconds; supervisors of one job end within BARRIER of each other.
WAIT = int(BARRIER) + 10
# Slurm may send USR1 while Python is still starting, which would end it. Blocked, it waits until Python hears it; where
# env is older than coreutils 8.31, it is ignored for these seconds.
HEARS_LATER = 'trap "" USR1; env --block-signal=USR1 true 2>/dev/null && exec env --block-signal=USR1 "$@"; exec "$@"'
OURS = {  # options of sbatch that the job has from elsewhere, or that would make it another
    "array": "one job trains one recipe", "ntasks": "a node has one task, the supervisor of its ranks",
    "ntasks-per-node": "a node has one task, the supervisor of its ranks", "nodes": "give --nodes itself",
    "parsable": "what sbatch prints is read", "test-only": "--dry-run prints the script",
    "wait": "give --wait itself", "wrap": "the script is made here",
}  # fmt: skip
TO_CHOOSE = {  # options of sbatch that most clusters ask for: an example, and what it is
    "partition": ("gpu", "the queue; sinfo lists them"),
    "account": ("my-project", "who pays, where the cluster asks for that"),
    "time": ("24:00:00", "of one turn; the job goes on in the next one"),
}


def srun_words(request: Request, *more: str) -> list[str]:
    """The srun command: on each node one task, bound to no cores, since all ranks of the node come from it.

    No task that has ended ends the others before WAIT seconds, whatever the cluster's default is: they are saving.
    """
    srun = ["srun", *more, "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0", f"--wait={WAIT}"]
    return [*srun, "bash", "-c", HEARS_LATER, "-", *request.node_command(job=False)]


def job_part(request: Request) -> Part:
    """The srun command in an allocation. Its tasks have this process's variables."""
    count = (f"--nodes={request.nodes}", f"--ntasks={request.nodes}", f"--chdir={request.folder}")
    return Part(srun_words(request, *count), variables=request.variables)


def options_of(texts: Sequence[str]) -> dict[str, str]:
    """Options of sbatch, given as NAME=VALUE, or NAME for one without a value.

    Raises:
        ConfigError: one is not of that form, or is not a user's to give.
    """
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if (
            not re.fullmatch(r"[a-z][a-z0-9-]+", name)
            or not re.fullmatch(r"[!-~]*", value)
            or re.search("[#'\"\\\\]", value)
        ):
            raise ConfigError(
                f"--sbatch {text[:MAX_SHOWN]!r}: wanted NAME=VALUE of an option of sbatch without its dashes, such as "
                "time=24:00:00, the value without blanks, quotes, # and backslashes"
            )
        if name in OURS:
            raise ConfigError(f"--sbatch {text[:MAX_SHOWN]}: {OURS[name]}")
        found[name] = value
    return found


def batch_script(request: Request, *, gpus: bool, options: dict[str, str], portable: bool = False) -> str:
    """A batch script that trains to the end of the recipe, however often the time limit interrupts it.

    Args:
        gpus: whether each rank has one.
        options: of sbatch, besides or in place of those here.
        portable: a script for others, which works in the folder in which it is submitted.
    """
    return "\n".join([*_head(request, gpus, options, portable), *_body(request, portable), ""])


def _head(request: Request, gpus: bool, options: dict[str, str], portable: bool) -> list[str]:
    wanted = {
        "job-name": request.job,
        "nodes": str(request.nodes),
        "ntasks-per-node": "1",
        **({"gpus-per-node": str(request.ranks)} if gpus and request.ranks else {}),
        "exclusive": "",
        "mem": "0",
        "signal": f"USR1@{NOTICE}",
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.log",
        **options,
    }
    why = {
        "ntasks-per-node": "one supervisor, which starts a rank for each GPU",
        "mem": "all memory of the nodes",
        "signal": "seconds before the time limit: for a step and a checkpoint, and Slurm may be a minute early",
        "output": "name and number of the job",
    } | {name: what for name, (_, what) in TO_CHOOSE.items()}
    lines = [_option(name, value, why.get(name)) for name, value in wanted.items()]
    open_ones = [f"#{_option(name, TO_CHOOSE[name][0], why[name])}" for name in TO_CHOOSE if name not in wanted]
    made = "Made by megaresnorm launch --with slurm --dry-run, and to be edited."
    return [
        "#!/bin/bash",
        f"# Trains a recipe on {request.nodes} node{'s' if request.nodes > 1 else ''}, turn after turn: "
        f"sbatch {'launch/slurm.sbatch' if portable else 'THIS_FILE'}",
        f"# {made} Two # make an option a comment.",
        *lines,
        *open_ones,
    ]


def _option(name: str, value: str, why: str | None) -> str:
    option = f"#SBATCH --{name}{f'={value}' if value else ''}"
    return option if why is None else f"{option:<34} # {why}"


def _body(request: Request, portable: bool) -> list[str]:
    folder = '"$SLURM_SUBMIT_DIR"' if portable else shlex.quote(str(request.folder))
    activate = ["# source venv/bin/activate # or module load, conda activate, ...: what has python with megaresnorm"]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(request.variables.items())]
    words = srun_words(request)
    shell, command = words.index("bash"), words.index("-") + 1
    return [
        "",
        f"cd {folder} || exit 1",
        *(activate if portable else []),
        *exports,
        "# USR1 saves a checkpoint and ends the run. Node 0 then leaves this file, if this turn has written one.",
        'saved="$PWD/.saved-$SLURM_JOB_ID"',
        'rm -f "$saved"',
        "code=0",
        "# One supervisor a node. USR1 waits until its Python hears it; an old env cannot do that, and ignores it.",
        f"hears_later={shlex.quote(HEARS_LATER)}",
        f'{shlex.join(words[:shell])} bash -c "$hears_later" - \\',
        f'  {shlex.join(words[command:])} --saved "$saved" || code=$?',
        'if [ -e "$saved" ]; then',
        '  rm -f "$saved"',
        '  echo "megaresnorm: saved, code $code; job $SLURM_JOB_ID waits for its next turn"',
        '  scontrol requeue "$SLURM_JOB_ID" && exit "$code"',
        f'elif [ "$code" -eq {NEXT_TURN} ]; then',
        '  echo "megaresnorm: error: USR1 came before this turn had written a checkpoint; give it more time"',
        "fi",
        'exit "$code"',
    ]

"""megaresnorm launch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megaresnorm.cli.arguments import Overrides, check_json, count_up_to, examples, path, path_text
from megaresnorm.cli.train import Full, NoFallback
from megaresnorm.errors import ConfigError
from megaresnorm.launch.request import new_job_name
from megaresnorm.launch.submit import LAUNCHERS, Extras, submit
from megaresnorm.parallel.environment import MAX_PORT
from megaresnorm.parallel.launchers import PORT
from megaresnorm.parallel.plan import MAX_LOCAL, settings_of
from megaresnorm.text import say

_Recipe = Annotated[str, typer.Argument(parser=path_text, metavar="RECIPE", help="YAML file, as every node sees it")]
_WITH = "what starts the nodes; torchrun: this node's ranks, or with --hostfile those of all its hosts, by ssh"
_With = Annotated[str, typer.Option("--with", metavar="|".join(LAUNCHERS), help=_WITH)]
_NODES = "how many nodes; MIN:MAX for nodes that come and go (torchrun) [the hosts of --hostfile, else 1]"
_Nodes = Annotated[str | None, typer.Option(metavar="N", help=_NODES)]
_GPUS = "ranks of each node, a GPU for each [the slots of the hostfile, else the GPUs of a node, or 2 without one]"
_Gpus = Annotated[int | None, typer.Option(parser=count_up_to(MAX_LOCAL), metavar="N", help=_GPUS)]
_RANKS = "the same on nodes without GPUs: Slurm and Kubernetes are asked for none"
_Ranks = Annotated[int | None, typer.Option(parser=count_up_to(MAX_LOCAL), metavar="N", help=_RANKS)]
_HOSTFILE = "hosts, one a line, as HOST or HOST slots=N; the first is that of rank 0"
_Hostfile = Annotated[Path | None, typer.Option(parser=path, metavar="FILE", help=_HOSTFILE)]
_NODE_RANK = "which node this is, from 0, where the command is given on each (torchrun, deepspeed --no-ssh)"
_NodeRank = Annotated[str | None, typer.Option(metavar="K", help=_NODE_RANK)]
_MasterAddr = Annotated[str | None, typer.Option(metavar="HOST", help="where node 0 can be reached")]
_PORT_HELP = "a free port of node 0 [29500, or one made of the launcher's number of the job]"
_MasterPort = Annotated[int | None, typer.Option(parser=count_up_to(MAX_PORT), metavar="PORT", help=_PORT_HELP)]
_JOB = "name of the job, no other job's [from the recipe's file and the time, or the port]"
_Job = Annotated[str | None, typer.Option(metavar="NAME", help=_JOB)]
_RESTARTS = "how often ranks are started again without a new checkpoint; 0: an error of one ends the job [3]"
_Restarts = Annotated[str | None, typer.Option(metavar="N", help=_RESTARTS)]
_LOGS = "folder into which each rank writes all that it prints, a file with rank and host in its name"
_LogDir = Annotated[Path | None, typer.Option(parser=path, metavar="FOLDER", help=_LOGS)]
_ENV = "a variable that every node is to have, as it is here or with a value; those of NCCL, gloo, torch are sent "
_ENV += "without it, but to containers"
_Env = Annotated[list[str] | None, typer.Option(metavar="NAME[=VALUE]", help=_ENV)]
_SSH = "the command that reaches other hosts, with its options"
_Ssh = Annotated[str, typer.Option(metavar="COMMAND", help=_SSH)]
_NoSsh = Annotated[
    bool, typer.Option("--no-ssh", help="deepspeed: the command is given on each host, with --node-rank")
]
_SBATCH = "slurm: an option of sbatch without its dashes, such as time=24:00:00 or partition=gpu"
_Sbatch = Annotated[list[str] | None, typer.Option(metavar="NAME[=VALUE]", help=_SBATCH)]
_Image = Annotated[str | None, typer.Option(metavar="IMAGE", help="kubernetes: container image with this package")]
_Namespace = Annotated[str | None, typer.Option(metavar="NAME", help="kubernetes: where the job goes")]
_CLAIM = "kubernetes: a volume claim that all nodes can write, in which the containers work"
_Claim = Annotated[str | None, typer.Option(metavar="NAME", help=_CLAIM)]
_SAVED = "a file that node 0 makes once SIGUSR1 has ended the run and it has saved; scripts of batch systems ask for it"
_Saved = Annotated[Path | None, typer.Option(parser=path, metavar="FILE", hidden=True, help=_SAVED)]
_WAIT = (
    "slurm: stay until the job's end, show its log, and end with its exit code; the first SIGTERM or Ctrl-C saves and "
    "ends the job, SIGUSR1 saves and lets it wait for its next turn, a second signal cancels it"
)
_Wait = Annotated[bool, typer.Option("--wait", help=_WAIT)]
_DRY = "print the command, script or manifest, and end; the launcher need not be installed here"
_DryRun = Annotated[bool, typer.Option("--dry-run", help=_DRY)]
_Attached = Annotated[bool, typer.Option("--attached", hidden=True, help="end with what has started this")]

_DOCTOR = "examine the hosts of the job, as megaresnorm doctor --cluster does, in the place of training"
_Doctor = Annotated[bool, typer.Option("--doctor", help=_DOCTOR)]
_JSON = "--doctor: write every figure here, on the node of rank 0"
_Json = Annotated[Path | None, typer.Option("--json", parser=path, metavar="FILE", help=_JSON)]

_ALONE = "in a job of this node alone (--with torchrun without --hostfile)"


def add_to(app: typer.Typer) -> None:
    """Add the launch command."""
    app.command(
        epilog=examples(
            "megaresnorm launch recipe.yaml --gpus-per-node 8",
            "megaresnorm launch recipe.yaml --hostfile hosts",
            "megaresnorm launch recipe.yaml --hostfile hosts --doctor",
            "megaresnorm launch recipe.yaml --hostfile hosts --with deepspeed",
            "megaresnorm launch recipe.yaml --nodes 4 --gpus-per-node 8 --with slurm --sbatch time=24:00:00",
            "megaresnorm launch recipe.yaml --nodes 4 --gpus-per-node 8 --with kubernetes --image IMAGE --dry-run",
        )
    )(launch)


def launch(
    recipe: _Recipe,
    overrides: Overrides = None,
    *,
    by: _With = "torchrun",
    nodes: _Nodes = None,
    gpus_per_node: _Gpus = None,
    ranks_per_node: _Ranks = None,
    hostfile: _Hostfile = None,
    node_rank: _NodeRank = None,
    master_addr: _MasterAddr = None,
    master_port: _MasterPort = None,
    job: _Job = None,
    max_restarts: _Restarts = None,
    log_dir: _LogDir = None,
    env: _Env = None,
    ssh: _Ssh = "ssh",
    no_ssh: _NoSsh = False,
    sbatch: _Sbatch = None,
    wait: _Wait = False,
    image: _Image = None,
    namespace: _Namespace = None,
    claim: _Claim = None,
    full: Full = False,
    no_fallback: NoFallback = False,
    doctor: _Doctor = False,
    json: _Json = None,
    dry_run: _DryRun = False,
    saved: _Saved = None,
    attached: _Attached = False,
) -> int:
    """Train a recipe on several ranks of one node or of many, started by torchrun or by the launcher of a cluster.

    On every node one supervisor starts the ranks: it starts dead ones again with all others, from the newest
    checkpoint, and passes signals on: the first SIGTERM, SIGUSR1 or Ctrl-C saves a checkpoint, a second one ends at
    once. Exit codes are those of megaresnorm train.
    """
    _check_words(recipe, nodes=nodes, node_rank=node_rank, master_addr=master_addr, job=job, max_restarts=max_restarts)
    if by not in LAUNCHERS:
        raise ConfigError(f"--with {by!r}: wanted one of {', '.join(LAUNCHERS)}")
    if gpus_per_node is not None and ranks_per_node is not None:
        raise ConfigError("--gpus-per-node and --ranks-per-node are the same number; give one of them")
    flags = _flags(["--full"] * full + ["--no-fallback"] * no_fallback, doctor, nodes, json)
    ranks, words = gpus_per_node or ranks_per_node, [recipe, *(overrides or []), *flags]
    extras = Extras(
        hostfile=hostfile, node_rank=node_rank, no_ssh=no_ssh, ssh=ssh, sbatch=tuple(sbatch or ()), wait=wait,
        image=image, namespace=namespace, claim=claim, gpus=ranks_per_node is None,
    )  # fmt: skip
    settings = {
        "NODES": nodes,
        "RANKS_PER_NODE": None if ranks is None else str(ranks),
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": None if master_port is None else str(master_port),
        "MAX_RESTARTS": "0" if doctor else max_restarts,
        "LOG_DIR": None if log_dir is None else str(log_dir),
        "JOB_ID": job,
    }
    if by != "torchrun" or hostfile is not None:
        if saved is not None:
            raise ConfigError("--saved is for the command that each node runs; --with and --hostfile make that command")
        settings["JOB_ID"] = job or settings_of().get("JOB_ID") or _new_job_name(recipe, master_port, no_ssh)
        return submit(by, words, settings, env or [], extras, dry_run=dry_run)
    extras.refuse(_ALONE, "ssh", "no_ssh", "sbatch", "wait", "image", "namespace", "claim")
    settings |= {"NODE_RANK": node_rank, "SAVED": None if saved is None else str(saved)}
    return _this_node(words, settings, env or [], json, attached=attached, dry_run=dry_run)


def _check_words(recipe: str, **options: str | None) -> None:
    """Refuse options that a script has given an empty variable, and a recipe that would be taken for an option."""
    empty = next((name for name, value in options.items() if value is not None and not value.strip()), None)
    if empty is not None:
        raise ConfigError(f"--{empty.replace('_', '-')} '': it is empty; leave it out, or give it a value")
    if recipe.startswith("-"):
        raise ConfigError(f"{recipe!r} would be taken for an option; write ./{recipe}")


def _flags(flags: list[str], doctor: bool, nodes: str | None, json: Path | None) -> list[str]:
    """Options as each node is given them; those that have no effect with --doctor, or without it, are refused."""
    if json is not None and not doctor:
        raise ConfigError("--json has no effect without --doctor")
    if doctor and flags:
        raise ConfigError(f"{flags[0]} has no effect with --doctor")
    if doctor and nodes is not None and ":" in nodes:
        raise ConfigError(f"--nodes {nodes}: --doctor examines a fixed number of nodes")
    return flags + ["--doctor"] * doctor + ([] if json is None else [f"--json={json}"])


def _new_job_name(recipe: str, port: int | None, on_each: bool) -> str:
    """A job's name, the same on all hosts where the command is given on each; jobs beside each other have own ports."""
    return new_job_name(recipe, f"port-{port or PORT}" if on_each else None)


def _this_node(
    words: list[str],
    settings: dict[str, str | None],
    env: list[str],
    json: Path | None,
    *,
    attached: bool,
    dry_run: bool,
) -> int:
    from megaresnorm.launch.request import forwarded
    from megaresnorm.resilience.supervisor import describe, supervise

    os.environ |= forwarded(env, only_named=True)
    if "--doctor" in words:
        settings, words = settings | {"COMMAND": "doctor"}, ["--cluster" if w == "--doctor" else w for w in words]
        if not dry_run and settings["NODE_RANK"] in (None, "0"):
            check_json(json)
    if attached:
        settings["ATTACHED"] = "1"
    if not dry_run:
        return supervise(words, **settings)
    for line in describe(words, **settings):
        say(line)
    return 0

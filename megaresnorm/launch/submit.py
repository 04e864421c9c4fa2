"""From what was asked for to a running, submitted or printed job, by the launcher that was asked for."""

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from megaresnorm.errors import ConfigError
from megaresnorm.launch import deepspeed, kubernetes, mpirun, slurm, ssh
from megaresnorm.launch.front import Front, Tell, tell_by_signal
from megaresnorm.launch.hostfile import Host, read_hostfile, slots_of
from megaresnorm.launch.request import Request, forwarded, job_name, ssh_words
from megaresnorm.launch.slurm_job import submit_job
from megaresnorm.limits import MAX_SHOWN
from megaresnorm.parallel.environment import MAX_PORT, is_in_allocation
from megaresnorm.parallel.launchers import is_number
from megaresnorm.parallel.plan import MAX_LOCAL, MAX_NODES, UNLIMITED, check_host, settings_of
from megaresnorm.text import say, write

LAUNCHERS = ("torchrun", "deepspeed", "slurm", "kubernetes", "mpirun")
OWN = {  # options that only these launchers take
    "hostfile": ("torchrun", "deepspeed", "mpirun"),
    "node_rank": ("deepspeed",),
    "no_ssh": ("deepspeed",),
    "ssh": ("torchrun", "deepspeed", "mpirun"),
    "sbatch": ("slurm",),
    "wait": ("slurm",),
    "image": ("kubernetes",),
    "namespace": ("kubernetes",),
    "claim": ("kubernetes",),
}


@dataclass(frozen=True, kw_only=True)
class Extras:
    """Options that not every launcher takes; ``megaresnorm launch --help`` says what they are."""

    hostfile: Path | None = None
    node_rank: str | None = None
    no_ssh: bool = False
    ssh: str = "ssh"
    sbatch: tuple[str, ...] = ()
    wait: bool = False
    image: str | None = None
    namespace: str | None = None
    claim: str | None = None
    gpus: bool = True

    def refuse(self, why: str, *names: str) -> None:
        """Refuse options that would have no effect.

        Raises:
            ConfigError: one of these was given.
        """
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"--{name.replace('_', '-')} has no effect {why}")


def submit(
    by: str,
    words: Sequence[str],
    settings: Mapping[str, str | None],
    env: Sequence[str],
    extras: Extras,
    *,
    dry_run: bool,
) -> int:
    """Start a job by a launcher, and wait for its end where the launcher does; or print what would be run.

    Args:
        by: one of ``LAUNCHERS``.
        words: recipe, overrides and options of ``megaresnorm train``.
        settings: as of ``read_plan``.
        env: as of ``forwarded``.

    Returns:
        The exit code.

    Raises:
        ConfigError: something that was asked for cannot be; nothing has been started.
    """
    extras.refuse(f"with --with {by}", *(name for name, whose in OWN.items() if by not in whose))
    request = _request(by, words, settings, env, extras)
    if by != "kubernetes" or Path(words[0]).is_file():  # there it may be in the image, or on a volume
        _check_recipe(words, request)
    if by == "kubernetes":
        return _apply(request, extras, dry_run)
    if by == "slurm" and not is_in_allocation():
        if request.ranks is None:
            raise ConfigError("--with slurm needs --gpus-per-node, or --ranks-per-node for ranks without GPUs")
        script = slurm.batch_script(request, gpus=extras.gpus, options=slurm.options_of(extras.sbatch))
        if dry_run:
            write(script)
            return 0
        _find("sbatch")
        return submit_job(script, wait=extras.wait)
    tell: Tell = tell_by_signal
    if by == "slurm":
        extras.refuse("in an allocation of Slurm, whose options are chosen", "sbatch")
        extras.refuse("in an allocation of Slurm, in which srun is waited for anyway", "wait")
        parts = [slurm.job_part(request)]
    elif by == "mpirun":
        parts = [mpirun.job_part(request)]
    elif by == "deepspeed":
        rank = _node_rank(extras, request)
        parts, tell = [deepspeed.job_part(request, extras.hostfile, rank)], ssh.teller(request, here=rank is not None)
    else:
        parts, tell = ssh.node_parts(request), ssh.teller(request)
    if dry_run:
        for part in parts:
            variables = [f"{name}={value}" for name, value in sorted(part.variables.items())]
            write(shlex.join([*(["env", *variables] if variables else []), *part.words]) + "\n")
        return 0
    for program in dict.fromkeys(part.words[0] for part in parts):
        _find(program)
    if by == "deepspeed" and extras.hostfile is not None and not extras.no_ssh:
        _find("pdsh")
    return Front(parts, tell).run()


def _request(
    by: str, words: Sequence[str], settings: Mapping[str, str | None], env: Sequence[str], extras: Extras
) -> Request:
    hosts = () if extras.hostfile is None else read_hostfile(extras.hostfile, for_deepspeed=by == "deepspeed")
    # Options stand before variables, as they do on a node.
    chosen = settings_of() | {name: value for name, value in settings.items() if value is not None}
    nodes = _nodes(chosen.get("NODES"), hosts)
    hosts = hosts[:nodes]
    ranks = _whole("--gpus-per-node", chosen.get("RANKS_PER_NODE"), 1, MAX_LOCAL)
    address = chosen.get("MASTER_ADDR")
    if address is not None:
        check_host("--master-addr ", address)
    if by == "mpirun" and nodes > 1 and not hosts and address is None:
        raise ConfigError("--with mpirun on several nodes needs --hostfile, or --master-addr, the host of its rank 0")
    shell = ssh_words(extras.ssh)
    if by == "deepspeed" and shell == ("ssh",):  # the options that pdsh gives to ssh
        shell = (*shell, *deepspeed.ssh_options())
    return Request(
        recipe=words[0],
        overrides=tuple(words[1:]),
        job=job_name(chosen["JOB_ID"]),
        nodes=nodes,
        ranks=slots_of(hosts, ranks),
        hosts=hosts,
        master=(address, _whole("--master-port", chosen.get("MASTER_PORT"), 1, MAX_PORT)),
        max_restarts=_whole("--max-restarts", chosen.get("MAX_RESTARTS"), 0, UNLIMITED),
        logs=chosen.get("LOG_DIR"),
        variables=forwarded(env, only_named=by == "kubernetes"),
        ssh=shell,
        folder=Path.cwd(),
    )


def _whole(option: str, text: str | None, least: int, most: int) -> int | None:
    """The number of an option, or of its variable; None where there is none."""
    if text is not None and not is_number(text, least, most):
        raise ConfigError(f"{option} {text[:MAX_SHOWN]!r}: wanted a whole number from {least} to {most}")
    return None if text is None else int(text)


def _nodes(text: str | None, hosts: tuple[Host, ...]) -> int:
    if text is not None and ":" in text:
        raise ConfigError(f"--nodes {text[:MAX_SHOWN]!r}: nodes come and go where the command is given on each of them")
    number = _whole("--nodes", text, 1, MAX_NODES) or len(hosts) or 1
    if hosts and number > len(hosts):
        raise ConfigError(f"--nodes {text}, but the hostfile names {len(hosts)}")
    return number


def _node_rank(extras: Extras, request: Request) -> int | None:
    """Which node of the hostfile this one is; None where DeepSpeed's launcher reaches all of them.

    Raises:
        ConfigError: only one of --no-ssh and --node-rank was given, or there is no such node.
    """
    rank = extras.node_rank
    if request.nodes > 1 and extras.hostfile is None:
        raise ConfigError("--with deepspeed on several nodes needs --hostfile, with lines 'HOST slots=N'")
    if rank is None and not extras.no_ssh:
        return None
    if rank is None or not extras.no_ssh or extras.hostfile is None:
        raise ConfigError("--no-ssh, --node-rank and --hostfile belong together: the command is given on each host")
    return _whole("--node-rank", rank, 0, request.nodes - 1)


def _check_recipe(words: Sequence[str], request: Request) -> None:
    """Check what would end the job at once, before hosts are asked or a queue is waited in.

    Raises:
        ConfigError: the recipe cannot be used, or not with so many ranks.
    """
    from megaresnorm.parallel.mesh import resolve_sizes
    from megaresnorm.recipe.load import load_recipe

    parallel = load_recipe(words[0], [word for word in words[1:] if not word.startswith("--")]).parallel
    if request.ranks is not None:
        axes = {"pp": parallel.pp, "dp_replicate": parallel.dp_replicate, "dp_shard": parallel.dp_shard}
        resolve_sizes(request.nodes * request.ranks, tp=parallel.tp, **axes)  # type: ignore[arg-type]


def _apply(request: Request, extras: Extras, dry_run: bool) -> int:
    if extras.image is None:
        raise ConfigError("--with kubernetes needs --image, a container image with this package (launch/Dockerfile)")
    cluster = kubernetes.Cluster(image=extras.image, namespace=extras.namespace, claim=extras.claim, gpus=extras.gpus)
    text = kubernetes.manifest(request, cluster)
    if dry_run:
        write(text)
        return 0
    _find("kubectl")
    done = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True, check=False)
    if done.returncode == 0:
        where = f" --namespace {extras.namespace}" if extras.namespace else ""
        say(
            f"kubectl logs{where} -f job/{request.job} follows it, kubectl delete{where} job/{request.job} saves and "
            "ends it; --job with another name is another job"
        )
    return done.returncode if done.returncode >= 0 else 1


def _find(program: str) -> None:
    if shutil.which(program) is None:
        raise ConfigError(f"{program} is not installed here; --dry-run prints what would be run")

"""Lists of hosts, as DeepSpeed and MPI read them: one a line, with the number of its ranks."""

import re
from dataclasses import dataclass
from pathlib import Path

from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_SHOWN
from megaresnorm.parallel.launchers import is_number
from megaresnorm.parallel.plan import MAX_LOCAL, MAX_NODES, check_host

MOST_BYTES = 16_000_000


@dataclass(frozen=True)
class Host:
    """A node.

    Attributes:
        name: or address.
        slots: ranks there; None where the list does not say.
    """

    name: str
    slots: int | None = None


def read_hostfile(path: Path, *, for_deepspeed: bool = False) -> tuple[Host, ...]:
    """The hosts in a file, in its order.

    A line is ``HOST``, ``HOST slots=N`` or ``HOST:N``; empty lines and what follows a ``#`` are left out.

    Args:
        for_deepspeed: take ``HOST slots=N`` alone, as DeepSpeed does.

    Raises:
        ConfigError: it cannot be read, has no host, a host twice, or a line that is none of these; names the line.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"--hostfile {path}: no such file")
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"--hostfile {path}: larger than {MOST_BYTES:,} bytes; is it a list of hosts?")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise ConfigError(f"--hostfile {path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--hostfile {path}: not a text file in UTF-8") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip() if for_deepspeed else line.partition("#")[0].strip()
        if not line or line.startswith("#"):
            continue
        where = f"--hostfile {path}, line {number}"
        host = _host(where, line, for_deepspeed)
        known_as = host.name.lower().rstrip(".")
        if known_as in hosts:
            raise ConfigError(f"{where}: {host.name} is there twice; give each host once, with slots=N")
        hosts[known_as] = host
    if not hosts:
        raise ConfigError(f"--hostfile {path}: names no host; wanted lines such as 'node0 slots=8'")
    if len(hosts) > MAX_NODES:
        raise ConfigError(f"--hostfile {path}: {len(hosts):,} hosts, at most {MAX_NODES:,} can be started")
    return tuple(hosts.values())


def _host(where: str, line: str, for_deepspeed: bool) -> Host:
    found = re.fullmatch(r"(\S+)(?:\s+slots\s*=\s*(\S+))?(?:\s+max[_-]slots\s*=\s*\S+)?", line)
    if found is None or (for_deepspeed and not re.fullmatch(r"\S+\s+slots=[0-9]+", line)):
        wanted = "'HOST slots=N'" if for_deepspeed else "'HOST', 'HOST slots=N' or 'HOST:N'"
        raise ConfigError(f"{where}: {line[:MAX_SHOWN]!r}; wanted {wanted}")
    name, slots = found[1], found[2]
    if "@" in name:
        raise ConfigError(f"{where}: {name[:MAX_SHOWN]!r}; give the user as --ssh 'ssh -l USER', or in ~/.ssh/config")
    if slots is None and name.count(":") == 1:
        name, _, slots = name.partition(":")
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]
    if slots is not None and not is_number(slots, 1, MAX_LOCAL):
        raise ConfigError(f"{where}: {slots[:MAX_SHOWN]!r} slots; wanted a whole number from 1 to {MAX_LOCAL}")
    return Host(check_host(f"{where}: ", name), None if slots is None else int(slots))


def slots_of(hosts: tuple[Host, ...], ranks: int | None) -> int | None:
    """Ranks of each host: what was asked for, else what the list says.

    Raises:
        ConfigError: the list gives hosts different numbers, or fewer than were asked for.
    """
    named = {host.slots for host in hosts}
    if ranks is not None:
        small = next((host for host in hosts if host.slots is not None and host.slots < ranks), None)
        if small is not None:
            raise ConfigError(f"--gpus-per-node {ranks}, but the hostfile gives {small.name} {small.slots} slots")
        return ranks
    if len(named) > 1:
        counts = ", ".join(sorted("none" if one is None else str(one) for one in named))
        raise ConfigError(f"the hostfile gives its hosts different slots ({counts}); give --gpus-per-node")
    return named.pop() if named else None

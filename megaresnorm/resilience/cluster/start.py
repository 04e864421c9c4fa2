"""What every start of several ranks looks at: clocks, limits and shared memory, in a fraction of a second."""

import logging
from dataclasses import asdict

import torch

from megaresnorm.errors import ConfigError
from megaresnorm.parallel.control import all_gather_json
from megaresnorm.parallel.environment import Environment
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.resilience.cluster.clocks import judge_clocks, measure_clocks
from megaresnorm.resilience.cluster.node import Place, hosts_of, judge_addresses, judge_limits

log = logging.getLogger(__name__)
TRIES = 3  # round trips to each host


def check_start(environment: Environment, context: ParallelContext, device: torch.device) -> None:
    """Check what is cheap to check before step 0, and warn in a line of what will be slow or hard to read. Collective.

    Nothing is done in one process. ``megaresnorm doctor --cluster`` measures the rest.

    Communication:
        One ``all_gather_json``, and ``TRIES`` round trips of 8 bytes from rank 0 to each other host.

    Raises:
        ConfigError: a limit or an address is one with which no run can work, the same on all ranks.
    """
    if context.world.size == 1:
        return
    places = [Place(**said) for said in all_gather_json(asdict(Place.here(environment, device)), context.control)]
    hosts = hosts_of(places)
    firsts = {ranks[0]: host for host, ranks in hosts.items() if 0 not in ranks}
    offsets = measure_clocks(sorted(firsts), context.control, TRIES)
    checks = [*judge_limits(places, hosts, context.tp.size), *judge_addresses(places, hosts)]
    checks.append(judge_clocks({firsts[rank]: offset for rank, offset in offsets.items()}))
    for one in checks:
        line = f"{one.name}: {one.found}{f' (wanted: {one.wanted})' if one.wanted else ''}; {one.advice}"
        if one.verdict == "FAIL":
            error = ConfigError(line)
            error.agreed = True
            raise error
        if one.verdict == "WARN":
            log.warning("warning: %s", line)

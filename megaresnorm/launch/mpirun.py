"""A job that Open MPI's mpirun starts: one process a node, the supervisor of its ranks."""

import shlex
from collections.abc import Mapping

from megaresnorm.launch.front import Part
from megaresnorm.launch.request import Request


def job_part(request: Request) -> Part:
    """The mpirun command. Variables reach the nodes through it, by name.

    Without hosts it starts the nodes of a batch system's allocation, or this one.
    """
    variables: Mapping[str, str] = dict(sorted(request.variables.items()))
    words = ["mpirun", "-np", str(request.nodes)]
    words += ["--bind-to", "none"]  # it would bind the supervisor, and with it all ranks, to one core
    if request.hosts:  # in their order, in which the first is where the others look for rank 0
        words += ["--map-by", "seq", "--host", ",".join(host.name for host in request.hosts)]
    else:
        words += ["--map-by", "ppr:1:node"]
    if request.ssh != ("ssh",):
        words += ["--mca", "plm_rsh_agent", shlex.join(request.ssh)]
    for name in variables:
        words += ["-x", name]
    return Part([*words, "--wdir", str(request.folder), *request.node_command()], variables=variables)

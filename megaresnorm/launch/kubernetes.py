"""A job under Kubernetes: an indexed Job with a pod for each node, and a headless Service that gives them names."""

from dataclasses import dataclass

from megaresnorm.launch.request import Request

GRACE = 600  # seconds that a pod has to save a checkpoint once it is to end


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
    """The objects of a job, as YAML."""
    raise NotImplementedError

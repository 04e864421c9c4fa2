"""Kinds of memory of one rank, in bytes, and sums of them."""

from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from megaresnorm.checkpoint.format import human_bytes

# Private memory of Python, torch and this package once a model is built; the libraries' code is shared.
PROCESS = 250_000_000
PROCESS_WITH_DEEPSPEED = 360_000_000
RESERVE = 2 * 10**9  # bytes of a GPU for CUDA, libraries and fragments
_ON_HOST = ("checkpoint", "building", "offloaded", "host_states", "process")  # also where the rest is on a GPU


class Need(NamedTuple):
    """Bytes of device or host memory.

    Attributes:
        certain: allocated in any case.
        likely: with the estimate of the activations.
    """

    certain: int = 0
    likely: int = 0


NOTHING = Need()


@dataclass(frozen=True, kw_only=True)
class MemoryPerRank:
    """Bytes of one rank by kind, each at its own fullest moment, and their sum at the fullest moment of all.

    Attributes:
        weights: this rank's part of the parameters.
        gradients: of what this rank accumulates: of all parameters, or of its partition of them.
        packed: gradients of small parameters once more, side by side, as the optimizer takes them; with DeepSpeed those
            of one of the optimizer's groups.
        masters: DeepSpeed's second copy of the weights that this rank updates.
        optimizer: two moments of each parameter.
        copies: 16-bit copies of the matrices.
        gathered: weights that FSDP2 or ZeRO-3 has gathered.
        unsharded: gradients of whole FSDP2 units before they are reduced and scattered.
        buckets: messages of gradients: DistributedDataParallel's, of which gradients become views in the step's last
            microbatch, or DeepSpeed's, with what waits to be sent.
        received: receive buffers of pipeline stages.
        logits: of the microbatches whose loss exists at once, with what softcap and slicing keep beside them.
        checkpoint: the copy in host memory that a thread writes.
        building: a whole tensor, drawn in host memory before it is sharded.
        starting: all that there is while DeepSpeed moves the weights into its own tensors.
        activations: kept for the backward passes of all microbatches under way, and at most what one backward pass
            takes beside them, such as activations that are made again. An estimate.
        offloaded: activations in host memory instead of a GPU's.
        host_states: masters, moments and gradients, or weights as well, that engine.offload keeps in host memory.
        passing: a gradient before it is added to that of earlier microbatches, and FSDP2's messages. An estimate.
        process: the interpreter and its libraries, in host memory.
        device, host: sums of the kinds; on CPUs all is in host memory.
    """

    weights: int = 0
    gradients: int = 0
    packed: int = 0
    masters: int = 0
    optimizer: int = 0
    copies: int = 0
    gathered: int = 0
    unsharded: int = 0
    buckets: int = 0
    received: int = 0
    logits: int = 0
    checkpoint: int = 0
    building: int = 0
    starting: int = 0
    activations: int = 0
    offloaded: int = 0
    host_states: int = 0
    passing: int = 0
    process: int = PROCESS
    device: Need = NOTHING
    host: Need = NOTHING

    @property
    def needed(self) -> int:
        """Bytes that are allocated for certain, in device and host memory."""
        return self.device.certain + self.host.certain

    @property
    def total(self) -> int:
        """``needed`` with the estimate of the activations."""
        return self.device.likely + self.host.likely

    def describe(self, where: Literal["all", "device", "host"] = "all") -> str:
        """The kinds that are not zero, in one line, largest first: all, or those that are on a GPU, or beside it."""
        kinds = [(size, name) for name, size in asdict(self).items() if isinstance(size, int) and size]
        wanted = [(size, name) for size, name in kinds if where == "all" or (name in _ON_HOST) == (where == "host")]
        return ", ".join(f"{name} {human_bytes(size)}" for size, name in sorted(wanted, reverse=True))

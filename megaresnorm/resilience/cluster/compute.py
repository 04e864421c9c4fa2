"""Speed of each device at products and copies, and whether it computes what its siblings do."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from megaresnorm.parallel.control import all_gather_json
from megaresnorm.parallel.mesh import Axis
from megaresnorm.resilience.cluster.check import Check, Verdict, check, some_of
from megaresnorm.resilience.cluster.judge import NOTABLE, SLOW, odd_answers, shares_of_siblings
from megaresnorm.telemetry.throughput import product_tflops

SWEEPS = 3  # measures of each rank, the fastest of which counts
AGAIN = 5  # times that all of them are made while a rank stands out; the fastest of all counts
MOST_TURNS = 8  # ranks of a host measure one after the other, as far as these
PRODUCT, COPIED = {"cpu": 512, "cuda": 4096}, {"cpu": 1 << 24, "cuda": 1 << 28}  # rows; bytes
SHIFTS = (0, 0, 512, 1024, 1536, 2560, 3584, 16384)  # bytes; places of a copy
ANSWERS, ROWS, SEED = 6, 256, 20_260_101


@dataclass(frozen=True)
class Speeds:
    """Of each rank, in the order of the ranks.

    Attributes:
        tflops: of products of matrices.
        copied: bytes a second of a copy within the device's memory.
    """

    tflops: list[float]
    copied: list[float]


def kind_of(device: torch.device) -> str:
    """What a device is, and how many threads it computes with: devices of one kind are siblings."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {torch.get_num_threads()} threads"


def measure_speeds(axis: Axis, device: torch.device, local_rank: int, kinds: Mapping[int, str]) -> Speeds:
    """Speeds of all ranks; those that stand out are measured again, with all others. Collective.

    On CPUs the ranks of a host take turns, since they share its memory and heat; GPUs are measured together.

    Args:
        axis: all ranks, its group on CPUs.
        kinds: of each rank, as of ``kind_of``.

    Communication:
        A barrier for each turn, and one ``all_gather_json`` for each round of measures.
    """
    turns = 1 if device.type == "cuda" else MOST_TURNS
    best = Speeds([0.0] * axis.size, [0.0] * axis.size)
    for _ in range(AGAIN):
        mine = list[tuple[float, float]]()

        def measure(mine: list[tuple[float, float]] = mine) -> None:
            mine.append((product_tflops(device, *_product(device)), copy_speed(device)))

        for _ in range(SWEEPS):
            in_turns(measure, local_rank % turns, turns, axis)
        fastest = [max(figures) for figures in zip(*mine, strict=True)]
        everyone = all_gather_json(fastest, axis)
        best = Speeds(
            [max(before, now[0]) for before, now in zip(best.tflops, everyone, strict=True)],
            [max(before, now[1]) for before, now in zip(best.copied, everyone, strict=True)],
        )
        share = NOTABLE[device.type]
        if not _notable(best.tflops, kinds, share) and not _notable(best.copied, kinds, share):
            break
    return best


def _product(device: torch.device) -> tuple[str, int]:
    return ("bf16" if device.type == "cuda" else "fp32"), PRODUCT[device.type]


def _notable(speeds: list[float], kinds: Mapping[int, str], least: float) -> dict[int, float]:
    shares = shares_of_siblings(dict(enumerate(speeds)), kinds)
    return {rank: share for rank, share in shares.items() if share < least}


def in_turns(work: Callable[[], None], turn: int, turns: int, axis: Axis) -> None:
    """Do some work in this rank's turn. Collective.

    Communication:
        A barrier before each turn.
    """
    for now in range(turns):
        if axis.group is not None:
            dist.barrier(group=axis.group)
        if now == turn:
            work()


def copy_speed(device: torch.device) -> float:
    """Bytes a second of a copy within the memory of a device: the fastest of a few.

    On CPUs it depends on where the two buffers lie to each other, which differs from process to process.
    """
    a = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    space, seconds = torch.ones(len(a) + SHIFTS[-1], dtype=torch.uint8, device=device), []
    for shift in SHIFTS:
        b = space[shift : shift + len(a)]
        start = time.perf_counter()
        b.copy_(a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return a.nbytes / min(seconds)


def known_answers(device: torch.device) -> list[str]:
    """Distinct digests of a product whose factors are the same everywhere, made several times.

    A device that computes rightly has one, and the same as the others of its kind.
    """
    generator = torch.Generator().manual_seed(SEED)
    a, b = (torch.randn(ROWS, ROWS, generator=generator).to(device) for _ in range(2))
    found = dict[str, None]()
    for _ in range(ANSWERS):
        digest = sha256((a @ b).cpu().numpy().tobytes())
        if device.type == "cuda":
            digest.update((a.bfloat16() @ b.bfloat16()).float().cpu().numpy().tobytes())
        found[digest.hexdigest()[:16]] = None
    return list(found)


def judge_speed(
    name: str, speeds: list[float], kinds: Mapping[int, str], hosts: list[str], unit: str, *, notable: float
) -> Check:
    """The verdict on one speed of all devices.

    Args:
        name: of the check.
        hosts: of each rank.
        unit: of the speeds, as it is shown.
        notable: share of its siblings' below which a device is named, of ``NOTABLE``.
    """
    slow = _notable(speeds, kinds, notable)
    words = [
        f"rank {r} on {hosts[r]}: {speeds[r]:.3g} {unit}, {share:.0%} of its siblings" for r, share in slow.items()
    ]
    usual = f"{median(speeds):.3g} {unit}, from {min(speeds):.3g} to {max(speeds):.3g}" if len(speeds) > 1 else ""
    found = some_of(words) or usual or f"{speeds[0]:.3g} {unit}"
    advice = "look at its clocks, heat and power, and at other programs; leave the host out if it stays so"
    worst: Verdict = "FAIL" if min(slow.values(), default=1.0) < SLOW else "WARN"
    return check(name, found, not slow, advice, worst, wanted=f"{notable:.0%} of the median of the same kind")


def judge_answers(answers: list[list[str]], kinds: Mapping[int, str], hosts: list[str]) -> Check:
    """The verdict on known answers of all devices."""
    odd, decided = odd_answers(dict(enumerate(answers)), kinds)
    words = [f"rank {rank} on {hosts[rank]}: {' and '.join(answers[rank])}" for rank in odd]
    head = "wrong products: " if decided else "products differ, and no majority says whose are wrong: "
    right = f"the same product on all {len(answers)} ranks, {ANSWERS} times"
    found = head + some_of(words) if odd else right if len(set(kinds.values())) == 1 else f"{right}, by kind of device"
    return check("known answers", found, not odd, "this device computes wrongly: leave its host out", "FAIL")

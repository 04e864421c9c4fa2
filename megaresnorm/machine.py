"""What a run needs of a machine, looked at piece by piece. Nothing is downloaded; the C kernels are compiled, once."""

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import megaresnorm
from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.kernels import load_backends
from megaresnorm.kernels.benchmark import OPS, PRODUCT
from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.cpu.trusted import BuildError
from megaresnorm.kernels.fp8.product import RECIPES
from megaresnorm.kernels.registry import choose_kernel, kernel_named
from megaresnorm.packages import DEEPSPEED, is_supported, untested, version_of
from megaresnorm.parallel.addresses import address_towards, interface_of, is_loopback, local_address_of
from megaresnorm.reading import first_line
from megaresnorm.resilience.cluster.check import Check, check
from megaresnorm.resilience.host import host_memory
from megaresnorm.telemetry.loggers import installed

EXTRAS = {  # of pyproject.toml, and a module of each
    "data": "datasets", "hf": "transformers", "plots": "matplotlib", "wandb": "wandb", "mlflow": "mlflow",
    "deepspeed": "deepspeed", "te": "transformer_engine",
}  # fmt: skip
LEAST_TORCH = (2, 11)
LEAST_SHM = 1 << 30  # bytes: ranks of a node exchange tensors there; a container has 64 MB unless told otherwise
LEAST_DISK = 10 * 10**9
SECONDS_TO_STEP = 180  # that DeepSpeed has for its import and one step
LEAST_FILES = 1024  # open files: every rank has sockets to others


def look_at_machine(device: torch.device) -> Iterator[Check]:
    """Look at everything that a run on a device needs."""
    yield Check("megaresnorm", "PASS", f"{megaresnorm.__version__}, {Path(megaresnorm.__file__).parent}")
    yield _python()
    yield _torch()
    yield from _gpus() if device.type == "cuda" else [_no_gpu()]
    yield _processor()
    yield _memory()
    yield _compiler()
    yield _cache()
    yield from _kernels(device)
    if device.type == "cuda":
        yield _attention(device)
    yield _fp8(device)
    yield _space("shared memory", Path("/dev/shm"), LEAST_SHM, "docker run --shm-size=8g, or run one rank")
    yield _space("temporary files", Path(tempfile.gettempdir()), 10**8, "set TMPDIR to a folder with space")
    yield _space("this folder", Path.cwd(), LEAST_DISK, "checkpoints need space: set train.output elsewhere")
    yield _open_files()
    yield _network()
    yield _launchers()
    yield _extras()
    yield _deepspeed(device)


def _python() -> Check:
    found = f"{platform.python_version()}, {sys.executable}"
    return check("Python", found, sys.version_info >= (3, 10), "3.10 or newer is needed", "FAIL")


def _torch() -> Check:
    version = str(torch.__version__)
    build_of = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
    found = f"{version}, {build_of}, {Path(torch.__file__).parent}"
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return check("torch", found, numbers >= LEAST_TORCH, "2.11 or newer is needed", "FAIL")


def _driver() -> str | None:
    """Version of NVIDIA's driver; None without one."""
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in line.split() if word[:1].isdigit()), line)


def _no_gpu() -> Check:
    driver = _driver()
    if driver is None:
        return Check("GPU", "PASS", "none; runs are on the CPU")
    if torch.version.cuda is None:
        found = f"driver {driver}, but torch is a build for CPUs"
        return Check("GPU", "WARN", found, "install a build of torch for CUDA")
    found = f"driver {driver}, but torch sees no GPU"
    return Check("GPU", "WARN", found, "look at nvidia-smi and CUDA_VISIBLE_DEVICES")


def _gpus() -> Iterator[Check]:
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        kind = f"{properties.name}, sm_{properties.major}{properties.minor}"
        found = f"{kind}, {human_bytes(free)} of {human_bytes(total)} free"
        yield check(f"GPU {index}", found, free > 0.9 * total, "another program uses it")
    yield Check("driver", "PASS", f"{_driver() or 'unknown'}; NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    triton = version_of("triton")
    yield check("triton", triton or "missing", triton is not None, "pip install triton")
    if not torch.cuda.is_bf16_supported():
        yield Check("BF16", "WARN", "these GPUs have none", "precision.compute: fp16")


def _processor() -> Check:
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    found = f"{cores} cores for this job, torch's threads {threads}, instructions {build.levels()[0]}"
    advice = "other programs use it, and threads wait for each other: OMP_NUM_THREADS=1 may be faster"
    return check("processor", found, os.getloadavg()[0] <= cores or threads == 1, advice)


def _memory() -> Check:
    found = host_memory()
    if found is None:
        return Check("memory", "WARN", "unknown", "the check before a run is left out")
    text = f"{human_bytes(found.free)} of {human_bytes(found.total)} free, with swap and the job's limits"
    return check("memory", text, found.free > 2 * 10**9, "that is little")


def _compiler() -> Check:
    reason = build.unavailable()
    if reason is None:
        return Check("C kernels", "PASS", "compiled, and loaded")
    return Check("C kernels", "WARN", f"cannot be used: {reason}", "training on CPUs is slower without them")


def _cache() -> Check:
    try:
        folder = build.cache_folder()
    except BuildError as e:
        return Check("cache", "WARN", str(e))
    there = next(one for one in (folder, *folder.parents) if one.exists())
    return check("cache", str(folder), os.access(there, os.W_OK), "not writable: set MEGARESNORM_CACHE")


def _kernels(device: torch.device) -> Iterator[Check]:
    load_backends()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen = {op: choose_kernel(op, "auto", device, dtype)[0].backend for op in OPS}
    fast = device.type == "cpu" or chosen["add_norm"] != "reference"
    found = ", ".join(f"{op} {backend}" for op, backend in chosen.items())
    yield check("kernels", found, fast, "megaresnorm doctor --kernels says why")


SDPA = {1: "flash", 2: "memory-efficient", 3: "cuDNN"}  # of torch.nn.attention.SDPBackend


def _attention(device: torch.device, width: int = 128) -> Check:
    """Which kernels attention comes to, by a call of each kind that torch decides on when it is made."""
    q = torch.zeros(1, 4, 256, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    try:
        taken = SDPA.get(torch._fused_sdp_choice(q, q, q, is_causal=True))
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    except RuntimeError as e:
        return Check("attention", "WARN", f"torch's fails: {(str(e) or type(e).__name__).splitlines()[0][:100]}")
    plain, softcap = (
        choose_kernel("attention", "auto", device, torch.bfloat16, kind)[0].backend for kind in ("plain", "softcap")
    )
    documents = "varlen" if plain == "sdpa" else plain
    found = f"{plain} takes {taken or 'math'}, documents {documents}, softcap {softcap}"
    return check("attention", f"{found} (BF16, heads of {width})", taken is not None, "torch has no fused kernel here")


def _fp8(device: torch.device) -> Check:
    """Which products in FP8 there are but in emulation, and what ``auto`` takes."""
    torchs, taken = kernel_named(PRODUCT, "torch"), dict[str, list[str]]()
    has = [recipe for recipe in RECIPES if torchs.refusal(device, torch.bfloat16, recipe) is None]
    for recipe in RECIPES:
        backend = choose_kernel(PRODUCT, "auto", device, torch.bfloat16, recipe)[0].backend
        taken.setdefault(backend, []).append(recipe)
    autos = ", ".join(f"{backend} for {', '.join(recipes)}" for backend, recipes in taken.items())
    found = f"torch has {', '.join(has) or 'none'} here; auto takes {autos}"
    advice = "emulated products are slower than those in BF16: precision.compute: bf16"
    return check("FP8", found, device.type == "cpu" or bool(has), advice)


def _space(name: str, folder: Path, least: int, advice: str) -> Check:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as e:
        return Check(name, "WARN", f"{folder} cannot be looked at ({e.strerror})", advice)
    enough = free >= least and os.access(folder, os.W_OK)
    return check(name, f"{human_bytes(free)} free in {folder}", enough, advice)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return check("open files", f"{soft} (at most {hard})", soft >= LEAST_FILES, f"ulimit -n {hard}")


def _network() -> Check:
    """How other nodes would reach this one."""
    name = socket.gethostname()
    own, route = address_towards(name, 1), local_address_of(name, 1)
    interface = interface_of(route)
    found = f"{name} is {own or 'unknown'} here"
    if route is not None and route != own:
        found += f", and {route} for others"
    found += f" ({interface})" if interface else ""
    advice = "for a job of several nodes give --master-addr as an address that others reach"
    return check("network", found, route is not None and not is_loopback(route), advice)


def _launchers() -> Check:
    programs = {"ssh": "ssh", "slurm": "sbatch", "kubernetes": "kubectl", "deepspeed": "deepspeed", "mpirun": "mpirun"}
    there = [name for name, program in programs.items() if shutil.which(program)]
    return Check("launchers", "PASS", ", ".join(["torchrun", *there]))


def _extras() -> Check:
    versions = {extra: version_of(module.replace("_", "-")) for extra, module in EXTRAS.items() if installed(module)}
    there = [f"{extra} ({version or 'there'})" for extra, version in versions.items()]
    missing = [extra for extra, module in EXTRAS.items() if not installed(module)]
    more = f"; not installed: {', '.join(missing)} (pip install 'megaresnorm[NAME]')" if missing else ""
    return Check("extras", "PASS", (", ".join(there) or "none") + more)


def _deepspeed(device: torch.device) -> Check:
    """Whether DeepSpeed makes a step here, in a process of its own."""
    version = version_of("deepspeed")
    if version is None:
        return Check("DeepSpeed", "PASS", f"not installed; engine.name: deepspeed needs {DEEPSPEED}")
    if not is_supported(version):
        advice = f"for engine.name: deepspeed pip install 'deepspeed{DEEPSPEED}'"
        return Check("DeepSpeed", "WARN", version, advice)
    command, start = [sys.executable, "-m", "megaresnorm.engines.probe", str(device)], time.monotonic()
    try:
        got = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_STEP)
        lines = got.stderr.strip().splitlines()
        failure = None if got.returncode == 0 else lines[-1][:200] if lines else f"exit code {got.returncode}"
    except (OSError, subprocess.TimeoutExpired) as e:
        failure = first_line(e)
    if failure is not None:
        return Check("DeepSpeed", "WARN", f"{version}, which makes no step here: {failure}", "engine.name: native")
    done = f"{version}, imported, and made a step in {time.monotonic() - start:.1f} s"
    newer = untested(version)
    return Check("DeepSpeed", "PASS", done) if newer is None else Check("DeepSpeed", "WARN", done, newer)

"""Compiles the C files beside this one, once for each machine's instructions, and calls them.

The library lies in a folder of the user's own (``MEGARESNORM_CACHE``, else ``~/.cache/megaresnorm``) under a name that is a hash
of the sources, the flags and the compiler, so that a new version never meets an old file. It is built under a temporary name and
renamed: any number of processes may start at once, and on one machine only the first of them compiles.
"""

import ctypes
import fcntl
import functools
import hashlib
import itertools
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = [
    "-O3",
    "-std=gnu11",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
]
# Name, what /proc/cpuinfo must list, and the flags; the best first. The last one is what every compiler makes by default.
LEVELS: dict[str, tuple[set[str], list[str]]] = {
    "avx512": (
        {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"},
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    ),
    "avx2": ({"avx2", "fma"}, ["-mavx2", "-mfma"]),
    "scalar": (set(), []),
}
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float8_e4m3fn: 2}  # as common.h numbers them
THREAD_ELEMENTS = 1 << 18  # a thread is worth starting for this many


class BuildError(Exception):
    """Why there is no library."""


def levels() -> list[str]:
    """The levels of instructions that this processor has, the best first."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []  # macOS has none, and gets the last level
    features = set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())
    return [name for name, (needed, _) in LEVELS.items() if needed <= features]


@functools.cache
def load(level: str | None = None) -> ctypes.CDLL:
    """The compiled library for a level, the processor's best when None. Raises: BuildError."""
    level = level or levels()[0]
    compiler = _compiler()
    flags = [*FLAGS, *LEVELS[level][1]]
    files = sorted(SOURCES.glob("*.[ch]"))
    digest = hashlib.sha256()
    for part in (*(file.read_bytes() for file in files), " ".join(flags).encode(), _version(compiler)):
        digest.update(len(part).to_bytes(8, "little") + part)
    library = _folder() / f"{level}-{digest.hexdigest()[:24]}.so"
    if not library.exists():
        with (library.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # processes that start together wait for the first one's work
            if not library.exists():
                _compile(compiler, flags, [file for file in files if file.suffix == ".c"], library)
    if not _is_ours(library.lstat()):
        raise BuildError(
            f"{library} was not written by you alone; delete it, or set MEGARESNORM_CACHE to a folder of yours"
        )
    return ctypes.CDLL(str(library))


@functools.cache
def unavailable() -> str | None:
    """None where the kernels can run, else the reason, which is also logged once."""
    try:
        load()
    except (BuildError, OSError) as e:
        log.warning("the C kernels cannot be used, slower ones will be: %s", e)
        return str(e)
    return None


def requires(device: torch.device, dtype: torch.dtype) -> str | None:
    """Of every kernel here, as dispatch.py wants it."""
    if device.type != "cpu":
        return "made for CPUs"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in FP32, not in {dtype}"
    return unavailable()


def call(function: "ctypes._NamedFuncPointer", argument: ctypes.Structure, count: int, elements: int) -> None:
    """Run ``function(argument, first, last)`` over 0 .. count, on as many of torch's threads as ``elements`` of work are worth."""
    threads = max(1, min(torch.get_num_threads(), count, elements // THREAD_ELEMENTS))
    pointer = ctypes.byref(argument)
    if threads == 1:
        function(pointer, ctypes.c_long(0), ctypes.c_long(count))
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    ranges = list(itertools.pairwise(bounds))
    jobs = [_pool(os.getpid()).submit(function, pointer, ctypes.c_long(a), ctypes.c_long(b)) for a, b in ranges[1:]]
    function(pointer, *map(ctypes.c_long, ranges[0]))
    for job in jobs:
        job.result()


def address(tensor: Tensor | None) -> int | None:
    """What a C structure holds of a tensor."""
    if tensor is None:
        return None
    if not tensor.is_cpu:
        raise ValueError(f"the C kernels run on CPU tensors, got one on {tensor.device}")
    return tensor.data_ptr()


def check_fp32(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """Raise TypeError unless it is None, or FP32 in one of the shapes, contiguous: C reads it as it lies."""
    if tensor is None:
        return
    if tensor.dtype != torch.float32 or tuple(tensor.shape) not in shapes or not tensor.is_contiguous():
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise TypeError(f"{name} is {tensor.dtype} {list(tensor.shape)}; wanted float32 {wanted}, contiguous")


def type_of(tensor: Tensor | None) -> int:
    """How common.h numbers its type; any number does for one that is not there."""
    return 0 if tensor is None else TYPES[tensor.dtype]


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="megaresnorm")


def _compiler() -> list[str]:
    """The command of CC, which may have words (``ccache gcc``), or the first compiler that there is."""
    asked = shlex.split(os.environ.get("CC", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise BuildError(f"CC={os.environ['CC']}: {asked[0]} was not found; unset CC, or name a C compiler")
        return asked
    found = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    if found is None:
        raise BuildError("no C compiler was found; install gcc or clang, or set CC")
    return [found]


def _version(compiler: list[str]) -> bytes:
    return (
        subprocess.run([*compiler, "--version"], capture_output=True, check=False).stdout + " ".join(compiler).encode()
    )


def _is_ours(status: os.stat_result) -> bool:
    """A folder or a plain file of this user's, no link, that nobody else can write to."""
    kind = stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)
    return kind and status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o022


def _folder() -> Path:
    """A folder that nobody else can write to: what lies there is loaded as code."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("MEGARESNORM_CACHE") or os.path.join(cache, "megaresnorm")).expanduser() / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as e:
        raise BuildError(
            f"{folder} cannot be used ({e.strerror}); set MEGARESNORM_CACHE to a folder of yours"
        ) from None
    if not _is_ours(status):
        raise BuildError(f"others can write to {folder}; set MEGARESNORM_CACHE to a folder of yours")
    return folder


def _compile(compiler: list[str], flags: list[str], sources: list[Path], library: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=library.parent, suffix=".tmp")
    os.close(handle)
    try:
        done = subprocess.run(
            [*compiler, *flags, *map(str, sources), "-o", temporary, "-lm"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise BuildError(f"{compiler[0]} failed: {first}")
        os.chmod(temporary, 0o700)
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)

"""Compiles the C files beside this one, once for each level of processor instructions, and calls them.

The library lies in a folder of the user's own (``MEGARESNORM_CACHE``, else ``~/.cache/megaresnorm``) under a name that
is a hash of the sources, the flags and the compiler, so that a new version never loads an old file. Its own digest lies
beside it: a library that is incomplete or was changed is compiled again. It is built under a temporary name and then
renamed, so any number of processes may start at once, and on one machine only the first of them compiles.
"""

import ctypes
import functools
import hashlib
import itertools
import logging
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from megaresnorm.kernels.cpu import trusted
from megaresnorm.kernels.cpu.trusted import BuildError

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
# Name, what /proc/cpuinfo must list, and the compiler's flags; the best first. The last one is what every compiler
# makes by default.
LEVELS: dict[str, tuple[set[str], list[str]]] = {
    "avx512": (
        {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"},
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    ),
    "avx2": ({"avx2", "fma"}, ["-mavx2", "-mfma"]),
    "scalar": (set(), []),
}
FLOATS = (torch.float32, torch.bfloat16)  # of activations
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as common.h numbers them
THREAD_ELEMENTS = 1 << 18  # elements of work for which a thread is worth starting
VERSION_SECONDS = (
    60.0  # for ``cc --version``: milliseconds, but a cold network file system under a cluster's start takes its time
)
BUILD_SECONDS = (
    300.0  # for compiling, and for waiting while another process does: three seconds, a hundred times that at the worst
)


def levels() -> list[str]:
    """The levels of instructions that this processor has, the best first."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []  # macOS has none, and gets the last level
    features = set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())
    return [name for name, (needed, _) in LEVELS.items() if needed <= features]


@functools.cache
def load(level: str | None = None) -> ctypes.CDLL:
    """The compiled library for a level of instructions, compiled first where it is missing.

    Args:
        level: the processor's best when None.
    Raises:
        BuildError: there is no compiler, it failed, or the folder cannot be used.
    """
    level = level or levels()[0]
    compiler, flags, deadline = _compiler(), [*FLAGS, *LEVELS[level][1]], time.monotonic() + BUILD_SECONDS
    name = f"{level}-{_identity(compiler, flags)[:24]}.so"
    path = cache_folder()
    try:
        folder = trusted.open_folder(path)
        try:
            content = trusted.read(folder, name)
            if content is None:
                with trusted.locked(folder, deadline):  # processes that start together wait for the first to compile
                    content = trusted.read(folder, name)
                    if content is None:
                        log.info("compiling the C kernels (once; a few seconds to a minute)")
                        content = _compile(compiler, flags, folder, path, deadline)
                        trusted.write(folder, name, content)
            return trusted.opened(content, "library.so", ctypes.CDLL, folder, path, deadline)
        finally:
            os.close(folder)
    except OSError as e:
        raise BuildError(f"{path} cannot be used ({e.strerror or e}); {trusted.ADVICE}") from None


@functools.cache
def unavailable() -> str | None:
    """None where the kernels can run, else the reason, which is also logged once."""
    try:
        load()
    except BuildError as e:
        log.warning("the C kernels cannot be used, slower ones will be: %s", e)
        return str(e)
    return None


def requires(device: torch.device, dtype: torch.dtype) -> str | None:
    """The ``requires`` of every kernel here, as registry.py takes it."""
    if device.type != "cpu":
        return "made for CPUs"
    if dtype not in FLOATS:
        return f"it computes in FP32, not in {dtype}"
    return unavailable()


def call(function: "ctypes._NamedFuncPointer", argument: ctypes.Structure, count: int, elements: int) -> None:
    """Run ``function(argument, first, last)`` over ranges that make up 0 .. count, on several threads.

    Args:
        count: of rows, blocks or heads, which may be computed independently.
        elements: of work in all; each thread gets at least THREAD_ELEMENTS. There are at most as many threads as torch
            uses.
    """
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
    """The address that a C structure holds for a tensor; None, a null pointer, for None.

    Raises:
        ValueError: the tensor is not on a CPU.
    """
    if tensor is None:
        return None
    if not tensor.is_cpu:
        raise ValueError(f"the C kernels run on CPU tensors, got one on {tensor.device}")
    return tensor.data_ptr()


def type_of(tensor: Tensor | None) -> int:
    """The number of a tensor's type in common.h; 0, which is not read, for None."""
    return 0 if tensor is None else number_of(tensor.dtype)


def number_of(dtype: torch.dtype) -> int:
    """The number of a type in common.h.

    Raises:
        TypeError: it has none.
    """
    if dtype not in TYPES:
        raise TypeError(f"the C kernels read and write float32 and bfloat16, not {dtype}; take the reference")
    return TYPES[dtype]


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The thread pool of this process, whose id is the argument: threads do not survive a fork."""
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="megaresnorm")


def _compiler() -> list[str]:
    """The command in CC, which may have several words (``ccache gcc``), or the first compiler that is installed."""
    try:
        asked = shlex.split(os.environ.get("CC", ""))
    except ValueError as e:
        raise BuildError(f"CC={os.environ['CC']} is no command ({e}); unset CC, or name a C compiler") from None
    if asked:
        if shutil.which(asked[0]) is None:
            raise BuildError(f"CC={os.environ['CC']}: {asked[0]} was not found; unset CC, or name a C compiler")
        return asked
    found = next((path for path in map(shutil.which, ("cc", "gcc", "clang")) if path), None)
    if found is None:
        raise BuildError("no C compiler was found; install gcc or clang, or set CC")
    return [found]


def _identity(compiler: list[str], flags: list[str]) -> str:
    """Digest of all that determines the library: the sources, the flags and the compiler."""
    version = run_compiler([*compiler, "--version"], VERSION_SECONDS).stdout + " ".join(compiler).encode()
    return digest_of((*(file.read_bytes() for file in _sources("[ch]")), " ".join(flags).encode(), version))


def digest_of(parts: Iterable[bytes]) -> str:
    """SHA-256 of several contents, which are told apart."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _sources(suffix: str) -> list[Path]:
    return sorted(SOURCES.glob(f"*.{suffix}"))


def cache_folder() -> Path:
    """Absolute path of the folder of the libraries."""
    cache, named = os.environ.get("XDG_CACHE_HOME") or "~/.cache", os.environ.get("MEGARESNORM_CACHE")
    folder = Path(named or os.path.join(cache, "megaresnorm")) / "kernels"
    try:
        return folder.expanduser().absolute()
    except (RuntimeError, OSError) as e:  # a user without a home, as in containers; a working folder that is gone
        if isinstance(e, RuntimeError) and not named:
            return Path(tempfile.gettempdir()).absolute() / f"megaresnorm-{os.getuid()}" / "kernels"
        raise BuildError(f"{folder} cannot be used ({e}); set MEGARESNORM_CACHE to an absolute path of yours") from None


def _compile(compiler: list[str], flags: list[str], folder: int, path: Path, deadline: float) -> bytes:
    """Compile the library in a scratch folder, where the compiler also puts its temporary files; return its bytes."""
    with trusted.scratch(folder, path) as (descriptor, there):
        if os.path.isdir("/proc/self/fd"):
            there = f"/proc/self/fd/{descriptor}"  # the compiler inherits it: no path that could change meanwhile
        command = [*compiler, *flags, *map(str, _sources("c")), "-o", f"{there}/library.so", "-lm"]
        done = run_compiler(command, deadline - time.monotonic(), descriptor, TMPDIR=there)
        if done.returncode:
            errors = done.stderr.decode(errors="replace")
            first = next((line for line in errors.splitlines() if "error" in line), errors.strip()[:200])
            raise BuildError(f"{compiler[0]} failed: {first}")
        return trusted.take(descriptor, "library.so")


def run_compiler(
    command: list[str], seconds: float, *descriptors: int, named_in: str = "CC", **variables: str
) -> "subprocess.CompletedProcess[bytes]":
    """Run the compiler, which inherits the descriptors; all processes that it started end with it.

    Args:
        seconds: that it may take.
        named_in: the variable by which users name the compiler.
        **variables: of its environment, beside this process's.

    Raises:
        BuildError: it cannot be started or does not end in time.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **variables},
            pass_fds=descriptors,
            start_new_session=True,
            umask=0o077,
        )
    except OSError as e:
        raise BuildError(f"{command[0]} cannot be started ({e.strerror}); set {named_in} to another compiler") from None
    with process:
        try:
            out, errors = process.communicate(timeout=max(seconds, 0))
        except subprocess.TimeoutExpired:
            raise BuildError(
                f"{command[0]} did not end in {seconds:.0f} s; set {named_in} to another compiler"
            ) from None
        finally:
            if process.returncode is None:  # too late, or Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, errors)

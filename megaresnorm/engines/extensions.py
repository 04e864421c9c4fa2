"""Operations in C++ of another package: compiled once on a machine, and loaded without waiting for ever.

``torch.utils.cpp_extension`` makes a file ``lock`` in the folder in which it builds. A process that is killed leaves
it there, and every later one waits for it in silence and without end. Here each build has a new folder of its own,
under a lock that ends with its holder (kernels/cpu/trusted.py), and what it made is kept, verified and loaded as the
library of the C kernels is. Nothing here imports the package: it is handed a builder.
"""

import contextlib
import importlib.machinery
import importlib.util
import io
import logging
import os
import platform
import re
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from megaresnorm.errors import ConfigError
from megaresnorm.kernels.cpu import build, trusted
from megaresnorm.kernels.cpu.trusted import BuildError
from megaresnorm.recipe.engine import EngineRecipe

log = logging.getLogger(__name__)

BUILD_SECONDS = 1500.0  # to wait while another process compiles: a minute or two of its own, tenfold on a busy machine
_SET_CXX = "unset CXX, or name a C++ compiler"
_ERROR = re.compile(r"error:|cannot find|not found|required", re.IGNORECASE)
_BIN = Path(sys.executable).parent  # pip puts ninja there, which is in no PATH where the environment is not activated


class Builder(Protocol):
    """What of DeepSpeed's ``OpBuilder`` is used here.

    Attributes:
        name: of the operation, and of the module with it.
    """

    name: str
    _loaded_ops: dict[str, Any]  # module by name: what ``load`` returns from then on

    def sources(self) -> Sequence[str]:
        """Files to compile, for ``deepspeed_src_path``."""

    def include_paths(self) -> Sequence[str]:
        """Folders of headers, for ``deepspeed_src_path``."""

    def deepspeed_src_path(self, code_path: str) -> str:
        """Absolute path of a file or folder."""

    def load(self, verbose: bool = False) -> Any:
        """Compile the operation in TORCH_EXTENSIONS_DIR/name and import its module, by torch."""


def check_offload(engine: EngineRecipe) -> None:
    """Check that the host can update what is offloaded to it.

    Raises:
        ConfigError: DeepSpeed's operation for it cannot be compiled here.
    """
    if engine.offload != "none" and (missing := unavailable()) is not None:
        raise ConfigError(f"engine.offload={engine.offload}: {missing}; engine.offload=none needs no compiler")


def unavailable() -> str | None:
    """None where DeepSpeed's cpu_adam is installed or can be compiled, else what is missing and what to do.

    It is one line. Nothing is compiled, and DeepSpeed is not imported.
    """
    package = importlib.util.find_spec("deepspeed")
    if package is not None and package.origin and any(Path(package.origin).parent.glob("ops/adam/cpu_adam_op*")):
        return None
    try:
        compiler = _compiler()[0]
    except ValueError as e:
        return f"CXX={os.environ['CXX']} is no command ({e}); {_SET_CXX}"
    if shutil.which(compiler) is None:
        return f"no C++ compiler was found ({compiler}); install g++, or name another compiler in CXX"
    if shutil.which("ninja", path=_search_path()) is None:
        return "ninja was not found, by which torch compiles C++; pip install ninja"
    return None


def load_extension(builder: Builder, *versions: str) -> ModuleType:
    """The module of an operation, compiled first where it is missing; ``builder.load`` returns it from then on.

    Processes that start together wait for the first of them to compile, up to BUILD_SECONDS.

    Args:
        builder: of the operation.
        versions: of what its sources belong to.

    Raises:
        BuildError: it cannot be compiled, another process that compiles it does not end, or the folder of the user's
            cache cannot be used. The text is one line.
    """
    if builder.name in builder._loaded_ops:
        return builder._loaded_ops[builder.name]
    if (missing := unavailable()) is not None:
        raise BuildError(missing)
    try:
        module = _kept_or_compiled(
            builder, build.cache_folder() / f"{builder.name}-{_identity(builder, versions)[:24]}"
        )
    except OSError as e:
        raise BuildError(f"{build.cache_folder()} cannot be used ({e.strerror or e}); {trusted.ADVICE}") from None
    builder._loaded_ops[builder.name] = module
    return module


def _kept_or_compiled(builder: Builder, path: Path) -> ModuleType:
    """The module whose file is kept in a folder, where it is compiled first if it is missing or damaged."""
    what, file, deadline = f"DeepSpeed's {builder.name}", f"{builder.name}.so", time.monotonic() + BUILD_SECONDS
    folder = trusted.open_folder(path)
    try:
        content = trusted.read(folder, file)
        if content is None:
            waits = partial(log.info, "waiting for another process that compiles %s", what)
            with trusted.locked(folder, deadline, what, waits):
                content = trusted.read(folder, file)
                if content is None:
                    log.info("compiling %s (once; a minute or two)", what)
                    return _compiled(builder, folder, path, file)
        return trusted.opened(content, file, lambda at: _import(builder.name, at), folder, path, deadline)
    finally:
        os.close(folder)


def _compiled(builder: Builder, folder: int, path: Path, file: str) -> ModuleType:
    """Compile and import the module in a new folder, and keep its file. The caller holds the lock."""
    with trusted.scratch(folder, path) as (_, there):
        with _quiet() as said, _variables(TORCH_EXTENSIONS_DIR=there, PATH=_search_path()), _private_files():
            try:
                module = builder.load(verbose=False)
            except Exception as e:  # noqa: BLE001 - torch lets through whatever its tools raise
                raise BuildError(f"{builder.name} could not be compiled: {_first_error(f'{e}', said)}") from None
        made = os.open(f"{there}/{builder.name}", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            content = trusted.take(made, file)
        finally:
            os.close(made)
    trusted.write(folder, file, content)
    return module


def _import(name: str, path: str) -> ModuleType:
    """Import a module in machine code, whatever the name of its file ends with."""
    loader = importlib.machinery.ExtensionFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _identity(builder: Builder, versions: Sequence[str]) -> str:
    """Digest of all that determines the module: sources, versions, the compiler, and for what processor it compiles."""
    folders = [Path(builder.deepspeed_src_path(each)) for each in builder.include_paths()]
    sources = [Path(builder.deepspeed_src_path(each)) for each in builder.sources()]
    files = [*sources, *sorted(file for folder in folders for file in folder.rglob("*.h*"))]
    compiler = _compiler()
    asked = build.run_compiler([*compiler, "--version"], build.VERSION_SECONDS, named_in="CXX")
    if asked.returncode:
        raise BuildError(f"{shlex.join(compiler)} --version fails (exit code {asked.returncode}); {_SET_CXX}")
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    # ``-march=native``: nodes of several kinds may share a home.
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    words = [*versions, torch.__version__, str(sys.implementation.cache_tag), platform.machine(), processor, *compiler]
    return build.digest_of((asked.stdout, *(word.encode() for word in words), *(file.read_bytes() for file in files)))


def _compiler() -> list[str]:
    """The command that torch compiles C++ with.

    Raises:
        ValueError: CXX is no command.
    """
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _search_path() -> str:
    """PATH, with the folder of this Python behind it."""
    return os.pathsep.join(filter(None, (os.environ.get("PATH", os.defpath), str(_BIN))))


@contextlib.contextmanager
def _variables(**values: str) -> Iterator[None]:
    """Set variables of this process's environment, and afterwards what they were."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """Let nobody else write what is made, whatever this process's mask is."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Keep what is printed, and drop warnings."""
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore")
        yield said


def _first_error(text: str, said: io.StringIO) -> str:
    """The line of a build's output that says what is wrong."""
    lines = [line.strip() for line in f"{text}\n{said.getvalue()}".splitlines() if line.strip()]
    # The first line names the extension, the next ones repeat commands of a thousand letters.
    told = (line for line in lines[1:] if _ERROR.search(line) and not line.startswith("FAILED"))
    return next(told, lines[0] if lines else "no reason was given")[:300]

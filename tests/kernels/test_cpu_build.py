"""Building and loading the C kernels: once, safely, by any number of processes, or not at all with one warning."""

import ctypes
import multiprocessing
import os
import random
import signal
import stat
import sys
import time
from pathlib import Path

import pytest
import torch

from megaresnorm.errors import ConfigError
from megaresnorm.kernels import load_backends
from megaresnorm.kernels.activation import fused_activation
from megaresnorm.kernels.add_norm.op import fused_add_norm
from megaresnorm.kernels.add_norm.reference import AddNormArgs
from megaresnorm.kernels.cpu import build, trusted
from megaresnorm.kernels.registry import choose_kernel

load_backends()
needs_compiler = pytest.mark.skipif(build.unavailable() is not None, reason="no C compiler")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="gives folders to another user")
load = build.load.__wrapped__
NOBODY = 65534
FLAGS_OF_BEST = [*build.FLAGS, *build.LEVELS[build.levels()[0]][1]]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A library that is compiled in no time, in place of the kernels."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.c").write_text('__attribute__((visibility("default"))) int answer(void) { return 42; }\n')
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch, sources):
    """The folder in which libraries lie."""
    monkeypatch.setenv("MEGARESNORM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiled(monkeypatch):
    """A list that gets an entry whenever the compiler makes a library."""
    calls, compile_library = [], build._compile
    monkeypatch.setattr(build, "_compile", lambda *a: calls.append(a) or compile_library(*a))
    return calls


def library_of(cache) -> Path:
    (library,) = cache.glob("*.so")
    return library


def script(path, text) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_eight_processes_may_start_at_once(tmp_path, cache, monkeypatch):
    compile_library = build._compile

    def compile_and_tell(*arguments):
        (tmp_path / f"compiled-{os.getpid()}").touch()
        return compile_library(*arguments)

    monkeypatch.setattr(build, "_compile", compile_and_tell)
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=lambda: sys.exit(load("scalar").answer())) for _ in range(8)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [42] * 8
    assert len(list(tmp_path.glob("compiled-*"))) == 1
    assert sorted(p.suffix for p in cache.iterdir()) == ["", ".sha256", ".so"]  # the lock, and one library
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


@needs_compiler
def test_a_library_is_built_once_and_another_source_or_flag_is_another_library(cache, sources, compiled, monkeypatch):
    assert load("scalar").answer() == 42 and load("scalar").answer() == 42 and len(compiled) == 1
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-DOTHER"])
    assert load("scalar").answer() == 42 and len(compiled) == 2
    (sources / "answer.c").write_text('__attribute__((visibility("default"))) int answer(void) { return 43; }\n')
    assert load("scalar").answer() == 43 and len(compiled) == 3
    assert len(list(cache.glob("*.so"))) == 3


@needs_compiler
def test_the_kernels_run_after_their_library_was_torn(tmp_path, monkeypatch):
    build.load()  # where all tests have it
    folder = os.open(build.cache_folder(), os.O_RDONLY)
    name = f"{build.levels()[0]}-{build._identity(build._compiler(), FLAGS_OF_BEST)[:24]}.so"
    whole = trusted.read(folder, name)
    os.close(folder)
    compiled = []
    monkeypatch.setattr(build, "_compile", lambda *a: compiled.append(a) or whole)
    monkeypatch.setenv("MEGARESNORM_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "load", load)
    x = torch.randn(4, 64)
    for count in (1, 2):
        y = fused_activation("cpu")(x, None, "gelu")
        assert len(compiled) == count and (y - torch.nn.functional.gelu(x)).abs().max() < 1e-6
        os.truncate(library_of(tmp_path / "kernels"), len(whole) // 2)


@needs_compiler
def test_every_torn_library_is_compiled_again(cache, compiled):
    load("scalar")
    library = library_of(cache)
    whole = library.read_bytes()
    for size in (0, 1, 64, 4096, len(whole) // 2, len(whole) - 1):
        os.truncate(library, size)
        count = len(compiled)
        assert load("scalar").answer() == 42 and len(compiled) == count + 1, size
        assert library.read_bytes() == whole
    assert [p.name for p in cache.glob("*.tmp")] == []


@needs_compiler
def test_each_of_forty_flipped_bits_is_seen(cache, monkeypatch):
    load("scalar")
    library = library_of(cache)
    whole = library.read_bytes()
    compiled = []
    monkeypatch.setattr(build, "_compile", lambda *a: compiled.append(a) or whole)
    chosen = random.Random(0)
    for count in range(40):
        torn = bytearray(whole)
        torn[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        library.write_bytes(torn)
        assert load("scalar").answer() == 42 and len(compiled) == count + 1
        assert library.read_bytes() == whole


@needs_compiler
@pytest.mark.parametrize("digest", [None, b"", b"0" * 64 + b"\n", b"\0" * 65])
def test_a_library_without_its_digest_is_compiled_again(digest, cache, compiled):
    load("scalar")
    beside = Path(f"{library_of(cache)}.sha256")
    right = beside.read_bytes()
    beside.unlink()
    if digest is not None:
        beside.write_bytes(digest)
    assert load("scalar").answer() == 42 and len(compiled) == 2 and beside.read_bytes() == right


@needs_compiler
@pytest.mark.parametrize("what", ["mode", "link", "fifo", "owner"])
def test_what_another_user_could_have_written_is_compiled_again(what, tmp_path, cache, compiled):
    if what == "owner" and os.geteuid() != 0:
        pytest.skip("gives a file to another user")
    load("scalar")
    library = library_of(cache)
    if what == "mode":
        library.chmod(0o622)
    elif what == "owner":
        os.chown(library, NOBODY, -1)
    else:
        library.rename(tmp_path / "elsewhere.so")
        library.symlink_to(tmp_path / "elsewhere.so") if what == "link" else os.mkfifo(library)
    assert load("scalar").answer() == 42 and len(compiled) == 2
    status = library.lstat()
    assert stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


@needs_compiler
def test_a_folder_that_others_can_write_to_is_refused(cache, compiled):
    load("scalar")
    for mode in (0o777, 0o720, 0o1777):
        cache.chmod(mode)
        with pytest.raises(build.BuildError, match=r"others can write to .*kernels.*; .*MEGARESNORM_CACHE"):
            load("scalar")
    cache.chmod(0o755)
    assert load("scalar").answer() == 42 and len(compiled) == 1


@needs_compiler
def test_so_is_a_folder_above_unless_it_is_sticky(tmp_path, cache, sources, monkeypatch):
    load("scalar")
    tmp_path.chmod(0o777)
    for path in (cache.parent, tmp_path / "not-yet" / "made"):
        monkeypatch.setenv("MEGARESNORM_CACHE", str(path))
        with pytest.raises(
            build.BuildError, match=rf"others can write to {tmp_path} \(mode 777\); chmod go-w it, or set"
        ):
            load("scalar")
    tmp_path.chmod(0o1777)
    assert load("scalar").answer() == 42


@needs_compiler
@root_only
def test_a_folder_above_that_belongs_to_another_user_is_refused(tmp_path, cache):
    load("scalar")
    os.chown(tmp_path, NOBODY, -1)
    with pytest.raises(
        build.BuildError, match=rf"{tmp_path} belongs to another user \(number {NOBODY}\); set MEGARESNORM_"
    ):
        load("scalar")


@needs_compiler
def test_folders_of_the_host_are_trusted_where_root_has_no_number(tmp_path, cache, monkeypatch):
    """As in a container of an ordinary user, which sees them as the overflow user's."""
    read_text = Path.read_text
    for ranges, owners in (
        ("0 0 4294967295", {0, 7}),
        ("7 1000 1", {0, 7, 65534}),
        ("0 1000 1\n1 100000 65536", {0, 7, 65534}),
    ):
        files = {"/proc/self/uid_map": f"{ranges}\n", "/proc/sys/kernel/overflowuid": "65534\n"}
        monkeypatch.setattr(Path, "read_text", lambda self, files=files: files.get(str(self)) or read_text(self))
        monkeypatch.setattr(os, "geteuid", lambda: 7)
        assert trusted._owners() == owners, ranges


@needs_compiler
def test_another_folder_under_the_same_path_is_not_seen_once_it_was_looked_at(tmp_path, cache, monkeypatch):
    load("scalar")
    name, open_folder = library_of(cache).name, trusted.open_folder

    def open_and_swap(path):
        descriptor = open_folder(path)
        cache.rename(tmp_path / "looked-at")
        cache.mkdir(mode=0o700)
        (cache / name).write_bytes(b"another's")
        return descriptor

    monkeypatch.setattr(trusted, "open_folder", open_and_swap)
    assert load("scalar").answer() == 42 and (cache / name).read_bytes() == b"another's"


@needs_compiler
def test_a_compiler_writes_into_the_folder_that_was_looked_at(tmp_path, cache, monkeypatch, compiled):
    open_folder = trusted.open_folder

    def open_and_swap(path):
        descriptor = open_folder(path)
        cache.rename(tmp_path / "looked-at")
        cache.mkdir(mode=0o700)
        return descriptor

    monkeypatch.setattr(trusted, "open_folder", open_and_swap)
    assert load("scalar").answer() == 42 and len(compiled) == 1
    assert list(cache.iterdir()) == [] and library_of(tmp_path / "looked-at")


@needs_compiler
def test_the_bytes_that_were_read_are_those_that_are_loaded(cache, monkeypatch):
    load("scalar")
    library, read = library_of(cache), trusted.read

    def read_and_swap(folder, name):
        content = read(folder, name)
        library.write_bytes(b"another's")
        return content

    monkeypatch.setattr(trusted, "read", read_and_swap)
    assert load("scalar").answer() == 42 and library.read_bytes() == b"another's"


@needs_compiler
def test_where_code_cannot_be_loaded_from_memory_it_is_from_a_folder_that_is_removed(cache, monkeypatch):
    for memory in (None, "/proc/1/no-such-file"):
        monkeypatch.setattr(trusted, "in_memory", lambda content, memory=memory: memory)
        assert load("scalar").answer() == 42
        assert sorted(p.suffix for p in cache.iterdir()) == ["", ".sha256", ".so"]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux has it")
def test_what_is_loaded_from_memory_cannot_be_changed_and_no_path_comes_twice():
    first, second = trusted.in_memory(b"abc"), trusted.in_memory(b"abc")
    assert first != second and Path(first).read_bytes() == b"abc"
    with pytest.raises(OSError, match="not permitted"), open(first, "r+b", buffering=0) as file:
        file.write(b"x")
    with pytest.raises(OSError, match="not permitted"):
        os.truncate(first, 0)


@needs_compiler
def test_two_libraries_of_one_process_are_not_taken_for_each_other(cache, sources):
    first = load("scalar")
    (sources / "answer.c").write_text('__attribute__((visibility("default"))) int answer(void) { return 43; }\n')
    assert (first.answer(), load("scalar").answer()) == (42, 43)
    assert isinstance(first, ctypes.CDLL)


@needs_compiler
def test_links_on_the_way_are_followed_and_what_they_lead_to_is_what_counts(tmp_path, cache, monkeypatch):
    load("scalar")
    (tmp_path / "link").symlink_to(cache.parent)
    monkeypatch.setenv("MEGARESNORM_CACHE", str(tmp_path / "link"))
    assert load("scalar").answer() == 42
    cache.chmod(0o777)
    with pytest.raises(build.BuildError, match=str(cache)):
        load("scalar")


@needs_compiler
def test_what_a_killed_compiler_left_is_swept_by_the_next(cache):
    (cache / "0123.tmp").mkdir(parents=True)
    (cache / "0123.tmp" / "library.so").write_text("half")
    (cache / "4567.tmp").write_text("half")
    load("scalar")
    assert sorted(p.suffix for p in cache.iterdir()) == ["", ".sha256", ".so"]


@needs_compiler
def test_a_relative_cache_lies_in_the_working_folder(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEGARESNORM_CACHE", "here")
    assert load("scalar").answer() == 42 and library_of(tmp_path / "here" / "kernels")


def test_a_user_without_a_home_gets_a_cache_in_the_temporary_folder(monkeypatch, tmp_path):
    for name in ("MEGARESNORM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = tmp_path / f"megaresnorm-{os.getuid()}" / "kernels"
    assert load("scalar") and library_of(own) and stat.S_IMODE(own.stat().st_mode) == 0o700


def test_a_setting_that_names_no_folder_is_named(monkeypatch):
    monkeypatch.setenv("MEGARESNORM_CACHE", "~no-such-user/cache")
    with pytest.raises(build.BuildError, match=r"~no-such-user/cache/kernels cannot be used .* set MEGARESNORM_CACHE"):
        load("scalar")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-compiler -O2", "CC=no-such-compiler -O2: no-such-compiler was not found; unset CC"),
        ("gcc '", r"CC=gcc ' is no command \(No closing quotation\); unset CC, or name a C compiler"),
    ],
)
def test_a_compiler_that_cannot_be_asked_is_an_error(command, message, cache, monkeypatch):
    monkeypatch.setenv("CC", command)
    with pytest.raises(build.BuildError, match=message):
        load("scalar")


def test_a_compiler_that_cannot_be_started_is_an_error(tmp_path, cache, monkeypatch):
    file = tmp_path / "cc"
    file.write_text("#!/no/such/interpreter\n")
    file.chmod(0o755)
    monkeypatch.setenv("CC", str(file))
    with pytest.raises(
        build.BuildError, match=f"{file} cannot be started .No such file or directory.; set CC to another"
    ):
        load("scalar")


@pytest.mark.parametrize("limit", ["VERSION_SECONDS", "BUILD_SECONDS"])
def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(limit, tmp_path, cache, monkeypatch):
    at_once = 'case "$*" in --version) exit 0;; esac; ' if limit == "BUILD_SECONDS" else ""
    monkeypatch.setenv("CC", script(tmp_path / "cc", f"{at_once}sleep 600 & echo $! > {tmp_path}/child; wait"))
    monkeypatch.setattr(build, limit, 1.0)
    started = time.monotonic()
    with pytest.raises(build.BuildError, match=rf"{tmp_path}/cc did not end in 1 s; set CC to another compiler"):
        load("scalar")
    assert time.monotonic() - started < 30
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # killed, but perhaps not yet gone
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        pytest.fail("a child of the compiler went on")
    assert list(cache.glob("*.tmp")) == [] and list(cache.glob("*.so")) == []


@needs_compiler
def test_waiting_for_another_process_has_an_end_too(cache, monkeypatch):
    load("scalar")
    library_of(cache).unlink()
    monkeypatch.setattr(build, "BUILD_SECONDS", 0.2)
    folder = os.open(cache, os.O_RDONLY)
    with (
        trusted.locked(folder, time.monotonic()),
        pytest.raises(build.BuildError, match="another process is compiling the C kernels and does not end"),
    ):
        load("scalar")
    os.close(folder)


def test_a_folder_that_cannot_be_made(tmp_path, cache, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEGARESNORM_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(
        build.BuildError, match=r"file/folder/kernels cannot be used .Not a directory.; set MEGARESNORM_CACHE"
    ):
        load("scalar")


@needs_compiler
def test_a_compiler_that_fails_leaves_nothing_behind(cache, monkeypatch):
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-fno-such-flag"])
    with pytest.raises(build.BuildError, match=r"failed: .*fno-such-flag"):
        load("scalar")
    assert [p.name for p in cache.iterdir()] == ["lock"]


@pytest.mark.parametrize("problem", ["no compiler", "unbalanced", "no home"])
def test_whatever_is_wrong_the_reference_runs_with_one_warning(problem, monkeypatch, caplog):
    reason = {
        "no compiler": "no C compiler was found",
        "unbalanced": "CC=gcc ' is no command",
        "no home": "cannot be used",
    }
    monkeypatch.delenv("CC", raising=False)
    if problem == "no compiler":
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    elif problem == "unbalanced":
        monkeypatch.setenv("CC", "gcc '")
    else:
        monkeypatch.setenv("MEGARESNORM_CACHE", "~no-such-user")
        monkeypatch.setenv("CC", "true")
    monkeypatch.setattr(build, "load", load)
    build.unavailable.cache_clear()
    try:
        cpu = torch.device("cpu")
        for op in ("add_norm", "activation", "attention", "cross_entropy"):
            kernel, line = choose_kernel(op, "auto", cpu, torch.float32)
            assert kernel.backend != "cpu" and reason[problem] in line
        assert len([r for r in caplog.records if reason[problem] in r.message]) == 1
        with pytest.raises(ConfigError, match=rf"kernels\.add_norm=cpu cannot run on cpu: .*{reason[problem]}"):
            choose_kernel("add_norm", "cpu", cpu, torch.float32)
    finally:
        build.unavailable.cache_clear()


def test_fp64_gets_the_reference_and_says_why():
    kernel, line = choose_kernel("add_norm", "auto", torch.device("cpu"), torch.float64)
    assert kernel.backend == "reference" and "not cpu: it computes in FP32, not in torch.float64" in line


@needs_compiler
def test_fp16_gets_no_kernel_in_c_and_says_why():
    """By name it is an error, and tensors that reach one all the same are refused, not read as another type."""
    cpu, half = torch.device("cpu"), torch.float16
    for op in ("add_norm", "rotary", "attention", "activation", "cross_entropy"):
        kernel, line = choose_kernel(op, "auto", cpu, half)
        assert kernel.backend != "cpu" and "not cpu: it computes in FP32, not in torch.float16" in line
        with pytest.raises(ConfigError, match=rf"kernels.{op}=cpu cannot run on cpu: it computes in FP32"):
            choose_kernel(op, "cpu", cpu, half)
    x = torch.ones(4, 8, dtype=half)
    with pytest.raises(TypeError, match=r"not torch\.float16"):
        fused_add_norm("cpu")(AddNormArgs(x, x, residual_dtype=torch.float32, out_dtype=torch.float32))
    with pytest.raises(TypeError, match=r"not torch\.float16"):
        fused_activation("cpu")(x, None, "gelu")

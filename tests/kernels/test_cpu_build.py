"""Building and loading the C kernels: once, safely, by any number of processes, or not at all with one warning."""

import os
import stat
import subprocess
import sys

import pytest
import torch

from megaresnorm.errors import ConfigError
from megaresnorm.kernels import load_backends
from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.dispatch import choose_kernel

load_backends()
needs_compiler = pytest.mark.skipif(build.unavailable() is not None, reason="no C compiler")
USE = """
import torch
from megaresnorm.kernels.cpu.activation import cpu_activation
print(cpu_activation(torch.ones(2, 3), None, "gelu").sum().item())
"""


def start(folder, **environment):
    environment = {**os.environ, "MEGARESNORM_CACHE": str(folder), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", USE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@needs_compiler
def test_eight_processes_may_start_at_once(tmp_path):
    running = [start(tmp_path / "cache") for _ in range(8)]
    answers = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * 8, answers
    assert len({out for out, _ in answers}) == 1
    assert sorted(p.suffix for p in (tmp_path / "cache" / "kernels").iterdir()) == [
        "",
        ".so",
    ]  # the lock and one library
    assert stat.S_IMODE((tmp_path / "cache" / "kernels").stat().st_mode) == 0o700


@needs_compiler
def test_a_library_is_built_once_and_another_source_or_flag_is_another_library(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGARESNORM_CACHE", str(tmp_path))
    load = build.load.__wrapped__
    load("scalar")
    (library,) = tmp_path.glob("kernels/*.so")
    built = library.stat().st_mtime_ns
    load("scalar")
    assert [p.stat().st_mtime_ns for p in tmp_path.glob("kernels/*.so")] == [built]
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-DOTHER"])
    load("scalar")
    assert len(list(tmp_path.glob("kernels/*.so"))) == 2


@needs_compiler
@pytest.mark.parametrize("what", ["folder", "library", "link", "owner"])
def test_what_others_could_have_written_is_not_loaded(what, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGARESNORM_CACHE", str(tmp_path))
    load = build.load.__wrapped__
    load("scalar")
    (library,) = tmp_path.glob("kernels/*.so")
    if what == "folder":
        library.parent.chmod(0o777)
    elif what == "library":
        library.chmod(0o722)
    elif what == "link":
        library.rename(tmp_path / "elsewhere.so")
        library.symlink_to(tmp_path / "elsewhere.so")
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(build.BuildError, match="MEGARESNORM_CACHE"):
        load("scalar")


def test_a_compiler_that_is_asked_for_and_missing_is_an_error(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(build.BuildError, match="CC=no-such-compiler -O2: no-such-compiler was not found"):
        build.load.__wrapped__("scalar")


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEGARESNORM_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(build.BuildError, match="cannot be used"):
        build.load.__wrapped__("scalar")


@needs_compiler
def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGARESNORM_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-fno-such-flag"])
    with pytest.raises(build.BuildError, match="failed"):
        build.load.__wrapped__("scalar")
    assert [p.name for p in (tmp_path / "kernels").iterdir()] == ["lock"]


def test_without_a_compiler_the_reference_runs_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "load", build.load.__wrapped__)
    build.unavailable.cache_clear()
    try:
        cpu = torch.device("cpu")
        for op in ("add_norm", "activation", "attention", "cross_entropy"):
            kernel, line = choose_kernel(op, "auto", cpu, torch.float32)
            assert kernel.backend != "cpu" and "no C compiler was found" in line
        assert len([r for r in caplog.records if "no C compiler" in r.message]) == 1
        with pytest.raises(
            ConfigError, match=r"kernels\.add_norm=cpu cannot run on cpu: no C compiler was found; install gcc"
        ):
            choose_kernel("add_norm", "cpu", cpu, torch.float32)
    finally:
        build.unavailable.cache_clear()


def test_fp64_gets_the_reference_and_says_why():
    kernel, line = choose_kernel("add_norm", "auto", torch.device("cpu"), torch.float64)
    assert kernel.backend == "reference" and "not cpu: it computes in FP32, not in torch.float64" in line

"""DeepSpeed's cpu_adam is compiled once on a machine, whatever becomes of the process that compiles it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaresnorm.engines import extensions

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.slow,
    pytest.mark.skipif(extensions.unavailable() is not None, reason="no C++ compiler"),
]

LOADS = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
import deepspeed, torch
from deepspeed.ops.op_builder import CPUAdamBuilder
from megaresnorm.engines.extensions import load_extension
module = load_extension(CPUAdamBuilder(), deepspeed.__version__)
assert CPUAdamBuilder().load() is module
weights, gradients, first, second = torch.ones(99), torch.full((99,), 2.0), torch.zeros(99), torch.zeros(99)
module.create_adam(0, 0.1, 0.9, 0.95, 1e-8, 0.0, True, False)
module.adam_update(0, 1, 0.1, 0.9, 0.95, 1e-8, 0.0, True, weights, gradients, first, second)
assert (weights - 0.9).abs().max() < 1e-6
"""
MAKES_AN_ENGINE = """
from megaresnorm.engines import make_engine
from megaresnorm.errors import ConfigError
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe.load import build_recipe
recipe = build_recipe({
    "model": {"dim": 8, "num_blocks": 1, "num_heads": 1, "seq_len": 4, "vocab_size": 8}, "data": {"path": "none"},
    "train": {"output": "none", "steps": 1}, "engine": {"name": "deepspeed", "offload": "optimizer"},
})
try:
    make_engine(recipe, ParallelContext.single(), "cpu")
except ConfigError as e:
    print(f"ConfigError: {e}")
"""


@pytest.fixture
def start(tmp_path):
    """Starts Python on a script, with a cache of the test's own; ends what is left of all afterwards."""
    started = []

    def start(script: str, **variables: str) -> subprocess.Popen:
        variables = {"MEGARESNORM_CACHE": str(tmp_path / "cache"), "DS_ACCELERATOR": "cpu"} | variables
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def told(text: str) -> list[str]:
    """Lines about the extension."""
    return [line for line in text.splitlines() if "cpu_adam" in line]


def test_a_process_killed_in_the_middle_of_a_build_holds_up_no_other_and_two_at_once_build_once(start, tmp_path):
    killed = start(LOADS)
    while not (lock := list(Path(tmp_path).glob("cache/kernels/cpu_adam-*/*.tmp/cpu_adam/lock"))):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    time.sleep(3.0)  # the compilers are at work, and go on when their starter is gone
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert lock[0].exists()  # which would hold up every later build in this folder

    both = [start(LOADS) for _ in range(2)]
    outputs = [process.communicate(timeout=extensions.BUILD_SECONDS) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    lines = sorted(line for _, err in outputs for line in told(err))
    assert lines == [
        "compiling DeepSpeed's cpu_adam (once; a minute or two)",
        "waiting for another process that compiles DeepSpeed's cpu_adam",
    ]
    assert not any(word in out for out, _ in outputs for word in ("Time to load", "ninja", "c++"))
    (folder,) = Path(tmp_path).glob("cache/kernels/cpu_adam-*")
    assert {file.name for file in folder.iterdir()} == {"cpu_adam.so", "cpu_adam.so.sha256", "lock"}

    later = start(LOADS)
    _, err = later.communicate(timeout=120)
    assert later.returncode == 0 and told(err) == []


def test_a_compiler_that_fails_is_one_line_when_the_engine_is_made(start, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\ncase " $* " in *" -c "*) echo "a.cpp:1:1: error: no luck" >&2; exit 1;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    process = start(MAKES_AN_ENGINE, CXX=str(compiler))
    out, _ = process.communicate(timeout=300)
    (line,) = [line for line in out.splitlines() if line.startswith("ConfigError")]
    assert line == (
        "ConfigError: engine.offload=optimizer: cpu_adam could not be compiled: a.cpp:1:1: error: no luck; "
        "engine.offload=none needs no compiler"
    )

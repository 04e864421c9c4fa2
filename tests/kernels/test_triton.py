"""The Triton kernels: numbers in Triton's interpreter, machine code for sm_90 without a GPU, and numbers on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from add_norm_checks import BF16, DTYPES, GATES, PATTERNS, check, check_fp8, make_norm

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.add_norm import op
from megaresnorm.kernels.add_norm.reference import AddNormArgs, add_norm
from megaresnorm.kernels.registry import backends

pytest.importorskip("triton")
load_backends()
HERE = Path(__file__).parent


def run_alone(*arguments, **environment):
    """In a process of its own: Triton decides when it is imported whether it interprets, and how it fuses."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_numbers_in_the_interpreter(which):
    done = run_alone(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        which,
        HERE / "interpreted_triton.py",
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("some", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_machine_code_for_sm_90(some):
    """Every kernel, as it is launched, compiled ahead of time: no spills up to 8192 columns, 128-bit accesses.

    Registers are as in registers.json, which ``python tests/kernels/compile_triton.py --write`` renews.
    """
    done = run_alone(HERE / "compile_triton.py", *(["--some"] if some else []))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    ceilings = json.loads((HERE / "registers.json").read_text())
    assert set(found) <= set(ceilings) if some else set(found) == set(ceilings)
    assert len(found) > 30
    for name, usage in found.items():
        assert usage["spilled_bytes"] == 0, (name, usage)
        assert usage["registers"] <= ceilings[name], (name, usage)
        # A program of the columns kernels stores 128 sums, one a thread; one of stats and sums a number or two.
        few = any(word in name for word in ("columns", "stats", "sums"))
        assert usage["loads_128"] > 0 and (usage["stores_128"] > 0 or few), (name, usage)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 192, 760, 1128, 4096, 8192, 12288])
@pytest.mark.parametrize("rows", [1, 199, 8192])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_on_a_gpu(rows, columns, dtypes):
    kernel = op.fused_add_norm("triton")
    for pattern in PATTERNS:
        for gate in GATES:
            check(kernel, rows, columns, pattern, gate, dtypes, device="cuda")


@pytest.mark.gpu
def test_fp8_on_a_gpu():
    for columns in (192, 4096, 8192, 12288):
        check_fp8(op.fused_add_norm("triton"), 199, columns, "pre, rms", device="cuda")


@pytest.mark.gpu
def test_more_elements_than_two_to_the_31_on_a_gpu():
    rows, columns = (1 << 31) // 4096 + 5, 4096
    x = torch.zeros(rows, columns, device="cuda", dtype=BF16)
    x[-1] = torch.linspace(-1, 1, columns, device="cuda").to(BF16)
    norm = make_norm("rmsnorm", columns, torch.Generator().manual_seed(0))
    norm = norm._replace(weight=norm.weight.detach().cuda())
    out = op.fused_add_norm("triton")(AddNormArgs(x, next_norm=norm, residual_dtype=BF16, out_dtype=BF16))
    want = add_norm(AddNormArgs(x[-1:], next_norm=norm, residual_dtype=BF16, out_dtype=BF16))
    assert not out.branch_input[0].any()
    torch.testing.assert_close(out.branch_input[-1:], want.branch_input, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "backend", [pytest.param("te", marks=pytest.mark.te), pytest.param("apex", marks=pytest.mark.apex)]
)
def test_norms_of_other_packages_on_a_gpu(backend):
    kernel = next(k.function for k in backends("add_norm") if k.backend == backend)
    for pattern in ("pre", "pre, rms", "keel"):
        check(kernel, 199, 1024, pattern, "number", "bf16 on fp32", device="cuda")

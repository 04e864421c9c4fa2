"""The Triton kernels: numbers in Triton's interpreter, machine code for sm_90 without a GPU, and numbers on a GPU."""

import json
import os
import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import numpy
import pytest
import torch
from add_norm_checks import BF16, DTYPES, GATES, PATTERNS, check, make_norm

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.add_norm import op
from megaresnorm.kernels.add_norm.reference import AddNormArgs, add_norm
from megaresnorm.kernels.registry import backends

triton = pytest.importorskip("triton")
load_backends()
HERE = Path(__file__).parent
WHOLE_ROWS = ("forward ", "backward ")  # the kernels of add_norm that have a row in registers
VERSION = ".".join(triton.__version__.split(".")[:2])


def run_alone(*arguments, **environment):
    """In a process of its own: Triton decides when it is imported whether it interprets, and how it fuses."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.skipif(
    VERSION < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of this Triton takes int() of an array of one element, an error since NumPy 2.4",
)
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

    Registers are as in registers.json for this version of Triton, whose ceilings ``python
    tests/kernels/compile_triton.py --write`` renews; with a version that is not there they are not compared.
    """
    done = run_alone(HERE / "compile_triton.py", *(["--some"] if some else []))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    known = json.loads((HERE / "registers.json").read_text())
    ceilings = known.get(VERSION, {})
    names = set(next(iter(known.values())))
    assert set(found) <= names if some else set(found) == names
    assert len(found) > 30
    met = check_bytes(found)
    assert some or met == set(bytes_in_the_docs())
    assert_same_order_of_sums(found)
    for name, usage in found.items():
        assert usage["spilled_bytes"] == 0, (name, usage)
        assert usage["registers"] <= ceilings.get(name, 255), (name, usage)
        assert usage["wide_offsets"], (name, usage)
        if name.startswith(WHOLE_ROWS):
            # With a norm of the branch and another, one weight comes later at 8192 columns, or registers would not do.
            late = 4 if name.startswith("backward without sums sandwich") else 0
            assert usage["loads_behind_a_barrier"] <= late, (name, usage)
        # A program of the columns kernels stores 128 sums, one a thread; one of statistics and sums a number or two.
        few = any(word in name for word in ("columns", "stats", "sums", "statistics", "largest"))
        assert (usage["loads_128"] > 0 or name == "largest of programs") and (usage["stores_128"] > 0 or few), (
            name,
            usage,
        )


def assert_same_order_of_sums(found):
    """A branch input in FP8 is the bits of that in BF16, which a recomputation makes of it: sums are in one order."""
    for name, usage in found.items():
        if name.startswith("forward") and "fp8" in name:
            plain = re.sub("fp8 [a-z]+", "pre", name)
            assert usage["order_of_sums"] and usage["order_of_sums"] == found[plain]["order_of_sums"], name


def bytes_in_the_docs():
    """kernel -> (loaded, stored), from the table of docs/kernels.md."""
    found, rows = {}, (HERE.parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8").splitlines()
    rows = rows[rows.index("| kernel | loads | stores | bytes |") + 2 :]
    for row in rows[: rows.index("")]:
        names, *numbers = (cell.strip() for cell in row.strip("|").split("|"))
        loaded, stored, total = map(int, numbers)
        assert loaded + stored == total, row
        for name in re.split(r", (?!columns|in blocks|capped)", names):
            found[name] = loaded, stored
    return found


def check_bytes(usage):
    """Compare what the kernels move with the table. Returns the rows that were met."""
    table, met = bytes_in_the_docs(), set()
    for name, used in usage.items():
        if name in ("sums of programs", "largest of programs"):  # which have no tensor of elements
            continue
        plain = re.sub(r" \d+\b|, bias", "", name)  # without the width
        row = max((row for row in table if plain.startswith(row)), key=len, default=None)
        assert row is not None, f"{name} is not in the table"
        assert table[row] == (used["loaded"], used["stored"]), (name, row, used)
        met.add(row)
    return met


def pairwise(*factors):
    """Combinations in which every two values of two factors meet at least once."""
    left = {(i, a, j, b) for (i, x), (j, y) in combinations(enumerate(factors), 2) for a in x for b in y}
    found = []
    while left:
        met = lambda c: {(i, c[i], j, c[j]) for i, j in combinations(range(len(c)), 2)}  # noqa: E731
        best = max(product(*factors), key=lambda c: len(met(c) & left))
        found.append(best)
        left -= met(best)
    return found


FACTORS = (list(PATTERNS), list(GATES), list(DTYPES), [192, 1128, 4096, 8192, 12288], [199, 4097])


def test_a_cover_has_every_pair():
    cover = pairwise(*FACTORS)
    assert 40 <= len(cover) <= 60  # each is three kernels: forward, the stored sum alone, backward
    for i, j in combinations(range(len(FACTORS)), 2):
        assert {(c[i], c[j]) for c in cover} == set(product(FACTORS[i], FACTORS[j]))


@pytest.mark.gpu
@pytest.mark.parametrize(("pattern", "gate", "dtypes", "columns", "rows"), pairwise(*FACTORS))
def test_on_a_gpu(pattern, gate, dtypes, columns, rows):
    check(op.fused_add_norm("triton"), rows, columns, pattern, gate, dtypes, device="cuda")


@pytest.mark.gpu_all
@pytest.mark.parametrize("columns", [1, 192, 760, 1128, 4096, 8192, 12288])
@pytest.mark.parametrize("rows", [1, 199, 8192])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_on_a_gpu(rows, columns, dtypes, pattern):
    for gate in GATES:
        check(op.fused_add_norm("triton"), rows, columns, pattern, gate, dtypes, device="cuda")


@pytest.mark.gpu_all
def test_more_elements_than_two_to_the_31_on_a_gpu():
    """Values and gradients of the last row, whose offsets an int32 does not hold."""
    rows, columns = (1 << 31) // 4096 + 5, 4096
    x = torch.zeros(rows, columns, device="cuda", dtype=BF16)
    x[-1] = torch.linspace(-1, 1, columns, device="cuda").to(BF16)
    norm = make_norm("rmsnorm", columns, torch.Generator().manual_seed(0))
    norm = norm._replace(weight=norm.weight.detach().cuda().requires_grad_())
    found = []
    for rows_of, kernel in ((x, op.fused_add_norm("triton")), (x[-1:].clone(), add_norm)):
        leaf = rows_of.requires_grad_()
        out = kernel(AddNormArgs(leaf, next_norm=norm, residual_dtype=BF16, out_dtype=BF16)).branch_input
        gradient = torch.zeros_like(out)
        gradient[-1] = torch.linspace(1, -1, columns, device="cuda").to(BF16)
        dx, dw = torch.autograd.grad(out, (leaf, norm.weight), gradient)
        found.append((out[-1:].detach(), dx[-1:], dw))
        assert rows_of is not x or not (out[0].any() or dx[0].any())
        del out, gradient, dx
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_a_compiler_sees_the_kernels():
    """In the graphs a call is one kernel forward and two backward, launched without Python; no input is copied."""
    done = run_alone(HERE / "traced_triton.py")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for operators, count in zip(found["graphs"], (1, 2), strict=True):
        assert sum("triton_kernel_wrapper" in name for name in operators) == count
        assert not [name for name in operators if "clone" in name or "megaresnorm" in name]
    assert len(found["graphs"]) == 2
    assert found["launches"] == {"forward_kernel": 1, "backward_kernel": 1, "sum_kernel": 1}


@pytest.mark.parametrize(
    "backend", [pytest.param("te", marks=pytest.mark.te), pytest.param("apex", marks=pytest.mark.apex)]
)
def test_norms_of_other_packages_on_a_gpu(backend):
    kernel = next(k.function for k in backends("add_norm") if k.backend == backend)
    for pattern in ("pre", "pre, rms", "keel"):
        check(kernel, 199, 1024, pattern, "number", "bf16 on fp32", device="cuda")

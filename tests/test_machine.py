"""doctor looks at everything a run needs, and says what to do where something is wrong."""

import json
import os
import shutil
import subprocess
from collections import namedtuple

import pytest
import torch

from megaresnorm import machine
from megaresnorm.cli import main
from megaresnorm.kernels.benchmark import PRODUCT, benchmark_backends
from megaresnorm.kernels.fp8 import torch_product
from megaresnorm.kernels.fp8.product import RECIPES
from megaresnorm.machine import look_at_machine
from megaresnorm.resilience.host import HostMemory

BACKENDS = ("emulated", "torch", "te")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def found(name: str) -> machine.Check:
    return next(check for check in look_at_machine(CPU) if check.name == name)


def test_everything_that_a_run_needs_is_looked_at(capsys):
    assert main(["doctor", "--json", "-"]) == 0
    checks = json.loads(capsys.readouterr().out)
    names = {"megaresnorm", "Python", "torch", "GPU", "processor", "memory", "C kernels", "cache", "kernels", "FP8",
             "shared memory", "temporary files", "this folder", "open files", "network",
             "launchers", "extras", "DeepSpeed"}  # fmt: skip
    assert names <= {one["name"] for one in checks}
    assert all(one["verdict"] in ("PASS", "WARN") and one["found"] for one in checks)
    assert all(one["advice"] for one in checks if one["verdict"] == "WARN" and one["name"] != "cache")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names) and out.count("PASS") > 8


def test_what_cannot_work_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", "2.4.0+cpu")
    assert found("torch").verdict == "FAIL" and "2.11" in found("torch").advice
    assert main(["doctor"]) == 1 and "FAIL  torch" in capsys.readouterr().out


def little(path):
    return namedtuple("Usage", "free")(64 << 20)


@pytest.mark.parametrize(
    ("name", "patch", "wanted"),
    [
        ("shared memory", (shutil, "disk_usage", little), "--shm-size"),
        ("this folder", (shutil, "disk_usage", little), "train.output"),
        ("memory", (machine, "host_memory", lambda: HostMemory(10**9, 10**9)), "little"),
        ("processor", (torch, "get_num_threads", lambda: 64), "OMP_NUM_THREADS=1"),
        ("open files", (machine.resource, "getrlimit", lambda what: (256, 4096)), "ulimit -n 4096"),
        ("network", (machine, "local_address_of", lambda host, port: "127.0.1.1"), "--master-addr"),
        ("C kernels", (machine.build, "unavailable", lambda: "nosuchcc was not found"), "slower"),
        ("GPU", (machine, "_driver", lambda: "580.12"), "install a build of torch for CUDA"),
    ],
)
def test_what_is_wrong_is_a_warning_with_advice(name, patch, wanted, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 9.0, 9.0))
    monkeypatch.setattr(*patch)
    check = found(name)
    if name == "GPU" and torch.version.cuda is not None:
        wanted = "nvidia-smi"
    assert check.verdict == "WARN" and wanted in check.advice, check


def test_a_user_without_a_home_has_a_cache(monkeypatch, tmp_path):
    for name in ("HOME", "XDG_CACHE_HOME", "MEGARESNORM_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the user is not in /etc/passwd
    assert machine.build.cache_folder() == tmp_path / f"megaresnorm-{os.getuid()}" / "kernels"


def test_options_of_the_kernels_need_kernels(capsys):
    assert main(["doctor", "--shapes", "8x8"]) == 2
    assert "--shapes has no effect without --kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "verdict", "words"),
    [
        (3, "PASS", "sdpa takes cuDNN, documents varlen, softcap flex"),
        (1, "PASS", "sdpa takes flash"),
        (2, "PASS", "sdpa takes memory-efficient"),
        (0, "WARN", "sdpa takes math"),
    ],
)
def test_doctor_says_which_attention_torch_takes_on_a_gpu(choice, verdict, words, monkeypatch):
    asked = []
    choose = machine.choose_kernel
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda q, *rest, **options: asked.append(q.device) or choice)
    monkeypatch.setattr(machine, "choose_kernel", lambda op, auto, device, *rest: choose(op, auto, CUDA, *rest))
    check = machine._attention(CPU)  # the call that is looked at can be made anywhere
    assert check.verdict == verdict and words in check.found and asked == [CPU]


def test_doctor_says_that_attention_fails(monkeypatch):
    def fails(*tensors, **options):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(torch, "_fused_sdp_choice", fails)
    check = machine._attention(CPU)
    assert check.verdict == "WARN" and check.found == "torch's fails: no kernel image"


def test_doctor_says_which_products_in_fp8_there_are(monkeypatch):
    check = found("FP8")
    assert check.verdict == "PASS" and "torch has tensorwise" in check.found
    assert "auto takes emulated for tensorwise, rowwise, block, mxfp8" in check.found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch_product, "_failure", lambda recipe, device: None if recipe == "rowwise" else "none")
    check = machine._fp8(CUDA)
    assert check.verdict == "PASS" and "torch has rowwise here" in check.found
    assert "auto takes emulated for tensorwise, block, mxfp8, torch for rowwise" in check.found
    monkeypatch.setattr(torch_product, "_failure", lambda recipe, device: "this GPU has none")
    check = machine._fp8(CUDA)
    assert check.verdict == "WARN" and "torch has none here" in check.found
    assert check.advice == "emulated products are slower than those in BF16: precision.compute: bf16"


def test_doctor_times_a_product_for_every_recipe(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_backends, "__defaults__", ((PRODUCT,),))  # nothing else, which is slow
    assert main(["doctor", "--kernels", "--device", "cpu", "--shapes", "16x32", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["kind"], row["backend"]) for row in rows} == {(k, b) for k in RECIPES for b in BACKENDS}
    for row in rows:
        if row["backend"] == "emulated":
            assert row["chosen"] and row["milliseconds"] > 0 and row["reason"] == ""
        else:
            assert not row["chosen"] and ((row["milliseconds"] is None) == row["reason"].startswith("cannot run: "))
    (te,) = (row["reason"] for row in rows if row["backend"] == "te" and row["kind"] == "rowwise")
    assert te == "cannot run: has no rowwise fp8_product"
    assert main(["doctor", "--kernels", "--device", "cpu", "--shapes", "16x32"]) == 0
    table = capsys.readouterr().out
    assert (
        all(f"fp8_product {recipe}" in table for recipe in RECIPES)
        and "several times slower than the emulation" in table
    )


@pytest.mark.parametrize(
    ("version", "code", "verdict", "words"),
    [
        (None, 0, "PASS", "not installed; engine.name: deepspeed needs >=0.19.7,<0.20"),
        (
            "0.17.6",
            0,
            "WARN",
            "0.17.6 for engine.name: deepspeed pip install 'deepspeed>=0.19.7,<0.20'",
        ),
        ("0.19.8", 1, "WARN", "0.19.8, which makes no step here: ImportError: it is broken engine.name: native"),
        ("0.19.8", -11, "WARN", "0.19.8, which makes no step here: exit code -11 engine.name: native"),
    ],
)
def test_doctor_says_whether_deepspeed_can_run(version, code, verdict, words, monkeypatch):
    def fails(command, **options):
        said = "Traceback:\nImportError: it is broken\n" if code == 1 else ""
        return subprocess.CompletedProcess(command, code, "[WARNING] what it prints\n", said)

    monkeypatch.setattr(machine, "version_of", lambda package: version)
    monkeypatch.setattr(machine.subprocess, "run", fails)
    check = machine._deepspeed(CPU)
    assert check.verdict == verdict and f"{check.found} {check.advice}".strip() == words


@pytest.mark.gpu
def test_doctor_says_it_on_a_gpu():
    (check,) = [one for one in look_at_machine(CUDA) if one.name == "attention"]
    assert check.verdict == "PASS" and "sdpa takes" in check.found

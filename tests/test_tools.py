"""The scripts in tools/ run as scripts."""

import contextlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch.multiprocessing as mp

TOOLS = Path(__file__).parents[1] / "tools"


NO_COMMANDS = {
    "peers.py",
    "plain_llama.py",
    "contenders.py",
    "recompute_runs.py",
    "campaign_stages.py",
    "campaign_engines.py",
    "campaign_report.py",
    "campaign_kernels.py",
    "campaign_layers.py",
    "norm_contenders.py",
    "stub_driver.py",
    "version_probe.py",
}


def run(script, *arguments):
    return subprocess.run([sys.executable, TOOLS / script, *map(str, arguments)], capture_output=True, text=True)


def help_of(script: Path, said: Path) -> None:
    """In a fork of this process, which has imported torch already."""
    with said.open("w") as file, contextlib.redirect_stdout(file), contextlib.suppress(SystemExit):
        sys.argv, sys.path = [str(script), "--help"], [str(TOOLS), *sys.path]
        runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", sorted({p.name for p in TOOLS.glob("*.py")} - NO_COMMANDS))
def test_help(script, tmp_path):
    process = mp.get_context("fork").Process(target=help_of, args=(TOOLS / script, tmp_path / "said"))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and "usage:" in (tmp_path / "said").read_text().lower()


def test_compare_loss(tmp_path):
    for name, shift in (("a", 0.0), ("b", 1e-6), ("c", float("nan"))):
        (tmp_path / name).mkdir()
        records = [{"step": s, "loss": 3.0 - 0.1 * s + (shift if s == 2 else 0)} for s in range(5)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    same = run("compare_loss.py", tmp_path / "a", tmp_path / "a")
    assert same.returncode == 0 and "5 steps in common; largest difference 0" in same.stdout
    other = run("compare_loss.py", tmp_path / "a", tmp_path / "b")
    assert other.returncode == 1 and "at step 2" in other.stdout
    assert run("compare_loss.py", tmp_path / "a", tmp_path / "b", "--tolerance", "2e-6").returncode == 0
    assert run("compare_loss.py", tmp_path / "a", tmp_path / "c", "--tolerance", "1").returncode == 1
    assert run("compare_loss.py", tmp_path / "a", tmp_path / "none").returncode == 2
    (tmp_path / "b" / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "loss": 2.626}) + "\n" for s in range(5))
    )
    for percent, code in ((1.1, 0), (0.9, 1)):
        final = run("compare_loss.py", tmp_path / "a", tmp_path / "b", "--final", percent)
        assert final.returncode == code and "2.6000 and 2.6260, 1.000 % apart" in final.stdout

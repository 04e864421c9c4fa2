"""launch/environment.sh leaves alone what it did not make, and mends what it did."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def shell(code, **environment):
    env = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHON": sys.executable, **environment}
    script = f"set -euo pipefail; source launch/environment.sh; {code}"
    return subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)


def test_a_folder_that_is_no_environment_is_never_removed(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "precious").write_text("years of work")
    got = shell("make_venv", VENV=str(tmp_path / "venv"))
    assert got.returncode == 1 and "is not a virtual environment; set VENV=another-folder" in got.stderr
    assert (tmp_path / "venv" / "precious").exists()


def test_a_half_made_environment_is_made_again(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("")
    got = shell("make_venv && make_venv", VENV=str(venv))
    assert got.returncode == 0, got.stderr
    assert got.stdout.count("==> making") == 1 and (venv / "bin" / "pip").exists()


def test_missing_and_old_pythons_are_said(tmp_path):
    assert "not found; install Python 3.10" in shell("make_environment ''", PYTHON="no-such-python").stderr
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\ncase $1 in --version) echo Python 3.8.1;; *) exit 1;; esac\n")
    old.chmod(0o755)
    assert "Python 3.8.1 is too old" in shell("make_environment ''", PYTHON=str(old)).stderr


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_scripts_have_help(script):
    got = subprocess.run(["bash", ROOT / "launch" / script, "--help"], capture_output=True, text=True)
    assert got.returncode == 0 and "bash launch/" in got.stdout

"""The wheel has all that a run needs, wherever it is installed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """What the wheel unpacks to, far from the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("docs/", "tests/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, source]
    subprocess.run(pip, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(installed, folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "megaresnorm", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_recipes_schema_names_and_c_files_are_in_it(installed):
    package = installed / "megaresnorm"
    for name in ("configs/quickstart.yaml", "configs/recipe.schema.json", "recipe/foreign_names.tsv", "py.typed"):
        assert (package / name).is_file(), name
    ours = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert {path.name for path in (package / "configs").glob("*.yaml")} == ours
    c_files = {path.name for path in (ROOT / "megaresnorm/kernels/cpu").glob("*.[ch]")}
    assert {path.name for path in (package / "kernels/cpu").glob("*.[ch]")} == c_files
    assert not list(installed.glob("tests")) and not list(installed.glob("configs"))


def test_it_trains_elsewhere(installed, tmp_path):
    assert str(installed) in run(installed, tmp_path, "doctor").stdout
    text = run(installed, tmp_path, "recipe", "quickstart").stdout
    (tmp_path / "my.yaml").write_text(text)
    assert text == (ROOT / "configs" / "quickstart.yaml").read_text()
    (tmp_path / "text.txt").write_text((ROOT / "README.md").read_text() * 3)
    assert run(installed, tmp_path, "prepare", "text.txt", "--out", "data").returncode == 0
    small = ["model.num_blocks=2", "train.steps=2", "train.output=run", "data.path=data", "train.sample_tokens=0"]
    got = run(installed, tmp_path, "train", "my.yaml", *small)
    assert got.returncode == 0 and "step 2/2" in got.stdout and (tmp_path / "run" / "recipe.yaml").is_file(), got
    assert "cannot be read" in run(installed, tmp_path, "train", "configs/quickstart.yaml").stderr

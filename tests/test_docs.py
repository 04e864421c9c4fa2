"""The documentation: it builds as a site without a warning, and names only files that there are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import griffe
import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")))


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    got = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert got.returncode == 0 and "WARNING" not in got.stderr, got.stderr[-3000:]
    page = (tmp_path / "site" / "reference" / "model" / "index.html").read_text()
    assert "megaresnorm.model.topology.ResidualSpec" in page and "../../src" not in page


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_continuous_integration_runs_what_contributors_run():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert "bash .ci/run" in steps and "launch/test.sh" in (ROOT / ".ci/run").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {hook["id"] for hook in hooks} == {"ruff", "ruff-format", "codespell"}


def objects(of):
    """Modules, classes, functions and attributes of ours, with what is in them."""
    for member in of.members.values():
        if not member.is_alias:
            yield member
            yield from objects(member)


def test_every_docstring_can_be_read_by_a_parser(caplog):
    """Google's form: sections that name parameters there are, and no lists in a form of our own."""
    package = griffe.load("megaresnorm", search_paths=[ROOT], docstring_parser=griffe.Parser.google)
    sections = home_made = 0
    with caplog.at_level("WARNING"):
        for found in objects(package):
            if found.docstring is not None and "modeling_" not in found.path:
                parsed = found.docstring.parse("google", warnings=True, returns_named_value=False)
                sections += sum(section.kind is not griffe.DocstringSectionKind.text for section in parsed)
                home_made += bool(re.search(r"\S {3}[a-z_]\w*(, \w+)*: |(^|\s)Raises: ?\S", found.docstring.value))
    assert not caplog.messages
    assert sections > 300 and not home_made


def test_the_training_path_is_documented():
    """Every public class, function and method of it."""
    package = griffe.load("megaresnorm", search_paths=[ROOT])
    rooms = (
        "model",
        "kernels",
        "parallel",
        "precision",
        "engines",
        "checkpoint",
        "recipe",
        "resilience",
        "trainer",
        "run",
    )
    lacking = [
        found.path
        for room in rooms
        for found in objects(package[room])
        if (found.is_class or found.is_function) and found.docstring is None and ".cpu." not in found.path
        if not any(part.startswith("_") for part in found.path.split(".")) and not found.is_alias
    ]
    assert not lacking

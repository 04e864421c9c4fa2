"""README and docs say what is there."""

import re
from pathlib import Path

import pytest

from megaresnorm.cli import main
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.recipe.explain import recipe_keys
from megaresnorm.recipe.names import foreign_names

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "README.zh.md",
    ROOT / "CONTRIBUTING.md",
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("[a-z]*/README.md"),
]


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_every_topology_has_a_row(page):
    rows = "\n".join(line.split("|")[1] for line in (ROOT / page).read_text().splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([a-z_]+)`", rows)) >= set(TOPOLOGIES)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_scripts_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for script in re.findall(r"\b(?:launch|configs|tests|tools)/[\w./-]+\.(?:sh|py|yaml|json)", text):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_settings_that_are_named_exist(page):
    keys = set(recipe_keys()) | {one.name for one in foreign_names()}
    sections = {key.rpartition(".")[0] for key in keys} | {"train.batch_ramp"}
    for key in re.findall(
        r"\b((?:model|data|train|optim|schedule|precision|kernels|parallel|checkpoint)\.[a-z][a-z_0-9.]*[a-z0-9])\b",
        re.sub(r"```python.*?```", "", page.read_text(), flags=re.S),
    ):
        assert key in keys | sections or key.endswith((".py", ".md", ".safetensors")), key


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["prepare"],
        ["data"],
        ["data", "show"],
        ["data", "verify"],
        ["generate"],
        ["depth"],
        ["quantize"],
        ["report"],
        ["doctor"],
        ["schema"],
        ["recipe"],
        ["checkpoint"],
        ["convert"],
        *(
            ["convert", verb]
            for verb in ("to-hf", "from-hf", "from-deepspeed", "to-megatron", "from-megatron", "compare")
        ),
        *(["checkpoint", verb] for verb in ("ls", "show", "verify", "diff", "prune")),
    ],
)
def test_help_is_printed(command, capsys):
    assert main([*command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(" ".join(["Usage: megaresnorm", *command]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train"],
        ["depth"],
        ["depth", "--probe", "--depths", "0"],
        ["prepare"],
        ["doctor", "--shapes", "3"],
    ],
)
def test_wrong_arguments_exit_2(arguments, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megaresnorm: error: ") and " --help" in line


def test_both_languages_show_the_same_commands_and_figures():
    blocks = [re.findall(r"```.*?```", (ROOT / page).read_text(), re.S) for page in ("README.md", "README.zh.md")]
    strip = [[re.sub(r"\s+#.*", "", b) for b in page] for page in blocks]
    assert strip[0] == strip[1]

"""What the command line promises: options anywhere, help at once, no command line needed to train."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import megaresnorm
from megaresnorm.cli import app, main
from megaresnorm.recipe.explain import recipe_keys
from megaresnorm.recipe.load import dump_recipe

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe_file(tiny, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(tiny()))
    return path


def run(*command, **settings):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **settings)


def test_overrides_stand_anywhere_on_the_line(recipe_file, capsys):
    first = ["train", recipe_file, "train.steps=3", "model.dim=32", "--dry-run", "--ranks", "2"]
    outputs = set()
    for order in (
        first,
        [first[0], *first[4:], *first[1:4]],
        [*first[:2], "--dry-run", first[2], "--ranks=2", first[3]],
    ):
        assert main(order) == 0
        outputs.add(capsys.readouterr().out)
    assert len(outputs) == 1 and "  dim: 32\n" in outputs.pop()
    assert main(["depth", "--train", "train.steps=1", "--topologies", "kell"]) == 2  # as far as reading them


def test_help_takes_a_moment_and_is_what_stands_alone():
    for command in ([], ["--help"], ["checkpoint"], ["-h"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        got = run("-m", "megaresnorm", *command)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert got.returncode == 0 and got.stdout.startswith("Usage: megaresnorm") and not got.stderr
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5, "of the processor"
    assert re.fullmatch(r"megaresnorm 0\.\d+\.\d+\S*\n", run("-m", "megaresnorm", "--version").stdout)


def test_a_misspelt_option_or_command_says_which_was_meant(capsys):
    for arguments, wanted in (
        (["train", "x.yaml", "--dry-rn"], "--dry-run"),
        (["convertt"], "convert"),
        (["checkpoint", "prunee"], "prune"),
        (["generate", "x", "--tokens", "-3"], "--tokens: '-3' is not a whole number from 1 to"),
        (["generate"], "Missing argument 'CHECKPOINT'"),
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert wanted in line and line.startswith("megaresnorm: error: ") and "--help" in line


def test_every_option_has_help():
    from typer.main import get_command

    def options(command, name):
        for one in getattr(command, "commands", {}).values():
            yield from options(one, f"{name} {one.name}")
        yield from ((name, parameter) for parameter in command.params if not hasattr(command, "commands"))

    found = list(options(get_command(app), "megaresnorm"))
    assert len(found) > 70 and not [(name, one.name) for name, one in found if not one.help]


def test_a_shell_completes_settings_commands_and_recipes(tmp_path):
    environment = {**os.environ, "_MEGARESNORM_COMPLETE": "complete_bash", "HOME": str(tmp_path)}
    program = [sys.executable, "-m", "megaresnorm"]

    def complete(*words):
        line = {"COMP_WORDS": " ".join(["megaresnorm", *words]), "COMP_CWORD": str(len(words))}
        return subprocess.run(program, env=environment | line, capture_output=True, text=True).stdout.split()

    assert complete("train", "x.yaml", "model.num_b") == ["model.num_blocks="]
    assert complete("che") == ["checkpoint"] and complete("recipe", "qu") == ["quickstart"]
    assert set(complete("train", "x.yaml", "schedule.")) == {
        f"{key}=" for key in recipe_keys() if key.startswith("schedule.")
    }
    shown = run("-m", "megaresnorm", "--show-completion", "bash", env={**os.environ, "HOME": str(tmp_path)})
    assert shown.returncode == 0 and "_MEGARESNORM_COMPLETE" in shown.stdout


def test_recipes_that_come_along_are_listed_and_printed(capsys):
    assert main(["recipe"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    for name in names:
        assert main(["recipe", name]) == 0
        assert capsys.readouterr().out == (ROOT / "configs" / f"{name}.yaml").read_text()
    assert main(["recipe", "gpt5"]) == 2
    assert "no recipe is called 'gpt5'; there are deepnorm-200-1b, english" in capsys.readouterr().err


def test_training_needs_no_command_line(recipe_file, tmp_path):
    """Neither the package that builds it, nor ours."""
    script = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *rest):\n"
        "        assert name.partition('.')[0] != 'typer' and not f'{name}.'.startswith('megaresnorm.cli.'), name\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from megaresnorm.job import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    got = run("-c", script, recipe_file, "train.steps=2", cwd=tmp_path)
    assert got.returncode == 0 and "step 2/2" in got.stdout, got
    again = run("-m", "megaresnorm.job", recipe_file, "train.steps=2")
    assert again.returncode == 0 and again.stdout.startswith("finished ") and again.stdout.count("\n") == 1
    wrong = run("-m", "megaresnorm.job", recipe_file, "train.step=2")
    assert wrong.returncode == 2 and "did you mean train.steps?" in wrong.stderr
    assert run("-m", "megaresnorm.job").returncode == 2


def test_tables_in_a_pipe_are_as_wide_as_their_content(tiny, tmp_path):
    from megaresnorm.trainer import train

    train(tiny(train={"steps": 1}))
    out = run(
        "-m", "megaresnorm", "checkpoint", "show", tmp_path / "run", "--tensors", env={**os.environ, "COLUMNS": "40"}
    )
    names = [line.split("│")[2].strip() for line in out.stdout.splitlines() if line.startswith("│ weights")]
    assert "blocks.0.attention.branch.qkv.weight" in names and "…" not in out.stdout and len(names) > 20


def test_checkpoints_as_json(tiny, tmp_path, capsys):
    from megaresnorm.trainer import train

    train(tiny(train={"steps": 2}, checkpoint={"every": 1}))
    run_folder, one = str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints" / "step-00000001")

    def read(*arguments, code=0):
        capsys.readouterr()  # what training has said, unless another test has configured logging
        assert main(["checkpoint", *arguments, "--json", "-"]) == code
        return json.loads(capsys.readouterr().out)

    listed = read("ls", run_folder)
    assert [entry["step"] for entry in listed] == [1, 2] and listed[0]["num_bytes"] > 10_000
    assert read("ls", one) == listed, "a checkpoint stands for its run"
    assert read("show", run_folder)["step"] == 2 and "weights" in read("show", one, "--tensors")["tensors"]
    assert [entry["problems"] for entry in read("verify", run_folder)] == [[], []]
    differing = read("diff", one, run_folder, "--only", "weights", code=1)
    assert differing["compared"] == len(differing["tensors"]) > 20 and differing["state"] == {}
    file = tmp_path / "ls.json"
    assert main(["checkpoint", "ls", run_folder, "--json", str(file)]) == 0
    assert "step-00000002" in capsys.readouterr().out and json.loads(file.read_text()) == listed


def test_the_second_interrupt_leaves_a_notebooks_kernel_alive(tiny, tmp_path):
    script = (
        "import os, signal, sys, threading, time, types\n"
        "sys.modules['ipykernel'] = types.ModuleType('ipykernel')\n"
        "from megaresnorm import load_recipe, train\n"
        "import megaresnorm.trainer as trainer\n"
        "def slow(self):\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.8); os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\n"
        "trainer.Trainer.step = slow\n"
        "try:\n"
        "    train(load_recipe(sys.argv[1]))\n"
        "except KeyboardInterrupt:\n"
        "    print('alive')\n"
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(tiny()))
    got = run("-c", script, path)
    assert got.returncode == 0 and got.stdout.endswith("alive\n"), got


def test_output_that_cannot_be_written_costs_a_line_and_no_run(recipe_file):
    """A full disk under the log, and streams that are closed."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "megaresnorm", "train", recipe_file, "train.steps=3"]
        got = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert "Traceback" not in got.stderr and "the output cannot be written (No space left on device)" in got.stderr
        command = [sys.executable, "-m", "megaresnorm", "schema"]
        schema = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (schema.returncode, len(schema.stderr.splitlines())) == (1, 1)
    assert run("-m", "megaresnorm", "checkpoint", "ls", recipe_file.parent / "run").stdout.count("step-00000003") == 1
    for arguments in ("--version", "recipe quickstart", "doctor"):
        shell = f"{sys.executable} -m megaresnorm {arguments} >&-"
        closed = subprocess.run(["bash", "-c", shell], stderr=subprocess.PIPE, text=True)
        assert closed.returncode == 0 and not closed.stderr, (arguments, closed)


def test_the_python_interface_says_what_it_takes(recipe_file):
    from megaresnorm import UserError, load_recipe, train

    for wrong in ("model.dim=64", [5], ["model.topology=kell"]):
        with pytest.raises(UserError):
            load_recipe(recipe_file, wrong)
    with pytest.raises(UserError, match="takes the path of a file, not a dict"):
        load_recipe({})
    with pytest.raises(UserError, match=r"train\(load_recipe\(PATH\)\), not a str"):
        train(str(recipe_file))


def test_the_version_is_that_of_the_package():
    assert megaresnorm.__version__ in run("-m", "megaresnorm.cli", "--version").stdout

"""Names and values of strangers stay within their line and cell: on the terminal, in logs, in tables, in errors."""

import ast
import io
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest

import megaresnorm
from megaresnorm.checkpoint.manifest import encode_manifest
from megaresnorm.cli import main
from megaresnorm.telemetry.log import Console, Table, configure_logging, console, progress_bar
from megaresnorm.text import LONGEST, say, shown, write
from megaresnorm.trainer import train

FORGED = "step 99/100 | loss 0.0001"
NAME = f"a\x1b[2J[b]c[/b]d[link=x]\n{FORGED} :smile: \u202eevil\r\x9b\u2028{{task}}"
HARMLESS = "a\\x1b[2J[b]c[/b]d[link=x]\\nstep 99/100 | loss 0.0001 :smile: \\u202eevil\\r\\x9b\\u2028{task}"


def test_control_characters_are_written_out_and_scripts_are_not():
    assert shown(NAME) == HARMLESS
    assert shown("日本語 é\u200d😀 العربية\u200f") == "日本語 é\u200d😀 العربية\u200f"
    assert shown("\udcff\x00\x7f\u2066") == "\\udcff\\x00\\x7f\\u2066"
    assert shown("a\tb\nc\x1b", lines=True) == "a\tb\nc\\x1b"
    long = shown("x" * 10**6 + "the reason")
    assert long.endswith("the reason") and len(long) < LONGEST + 100 and "998,010 characters" in long


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_a_model_writes_is_escaped_on_a_terminal_and_as_it_is_in_a_file(monkeypatch):
    for stream, wanted in ((Terminal(), "a\n\\x1b[2Jb\tc\n"), (io.StringIO(), "a\n\x1b[2Jb\tc\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        write("a\n\x1b[2Jb\tc\n")
        assert stream.getvalue() == wanted


def clean(text: str) -> None:
    """Nothing but line breaks and printable characters, and no line of somebody else's."""
    assert shown(text, lines=True) == text and not any(
        line.lstrip("│ ").startswith(FORGED) for line in text.splitlines()
    )


def test_tables_bars_and_the_console_take_strings_as_they_are(monkeypatch):
    file = io.StringIO()
    there = Console(file=file, width=400, force_terminal=True, color_system=None, soft_wrap=True)
    monkeypatch.setattr("megaresnorm.telemetry.log.console", there)
    table = Table(title=shown(NAME))
    table.add_column(shown(NAME))
    table.add_row(NAME)
    table.add_row([NAME, "a line of its own"])
    there.print(table)
    assert file.getvalue().count(HARMLESS) == 4 and "a line of its own" in file.getvalue()
    clean(file.getvalue())
    there.print("runs/a[/b]c :smile: \x1b[2J")  # whoever forgets
    assert "runs/a[/b]c :smile: \\x1b[2J" in file.getvalue()
    with progress_bar(NAME, 3) as bar:
        bar.advance(note=NAME)
    assert HARMLESS in file.getvalue()


def test_a_log_record_is_one_line(capsys):
    logger = logging.getLogger("megaresnorm")
    before = logger.handlers, logger.level, logger.propagate
    try:
        configure_logging()
        logging.getLogger("megaresnorm.x").warning("warning: %s [/b]", NAME)
    finally:
        logger.handlers, logger.level, logger.propagate = before
    out = capsys.readouterr().out
    assert out == f"warning: {HARMLESS} [/b]\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", f"{NAME}.yaml"],
        ["train", "configs/quickstart.yaml", f"model.{NAME}=1"],
        ["train", "configs/quickstart.yaml", f"model.topology={NAME}"],
        ["checkpoint", "ls", NAME],
        ["checkpoint", "verify", NAME],
        ["checkpoint", "diff", NAME, NAME],
        ["checkpoint", "prune", NAME],
        ["checkpoint", "show", "x", NAME],
        ["data", "show", NAME],
        ["data", "verify", NAME],
        ["prepare", NAME, "--out", "x"],
        ["generate", NAME],
        ["report", NAME],
        ["convert", "compare", NAME, NAME],
        ["convert", "from-hf", NAME, "x"],
        ["convert", "to-megatron", NAME, "x"],
        ["doctor", "--kernels", f"--json={NAME}/x", NAME],
        [NAME],
    ],
    ids=lambda arguments: " ".join(arguments)[:20].split("\x1b")[0],
)
def test_an_error_is_one_line_whatever_was_given(arguments, capsys):
    code = main(arguments)
    out, err = capsys.readouterr()
    clean(out + err)
    errors = [line for line in err.splitlines() if "error: " in line]
    assert code in (2, 3, 4, 5) and len(errors) == 1


@pytest.fixture
def hostile_run(tiny, tmp_path, monkeypatch) -> Path:
    """A run in a folder of such a name, whose manifests and data set say such things."""
    monkeypatch.setattr(console, "width", 1000)
    folder = tmp_path / NAME
    folder.mkdir(parents=True)
    recipe = tiny(train={"output": str(folder), "steps": 2}, checkpoint={"every": 1, "keep": 3})
    train(recipe)
    for path in (folder / "checkpoints").glob("step-*"):
        manifest = json.loads((path / "manifest.json").read_bytes())
        manifest["state"] |= {"versions": {NAME: NAME}, "kernels": {"x": NAME}, "data": NAME + path.name}
        (path / "manifest.json").write_bytes(encode_manifest(manifest))
        (path / f"evil{NAME.replace('/', '-')}.pt").write_bytes(b"")
    return folder


def test_every_command_that_lists_shows_names_in_their_cells(hostile_run, byte_data, capsys):
    step = hostile_run / "checkpoints" / "step-00000001"
    data = hostile_run / "data"
    shutil.copytree(byte_data, data)
    for arguments, code in (
        (["checkpoint", "ls", hostile_run], 0),
        (["checkpoint", "show", hostile_run], 0),
        (["checkpoint", "show", hostile_run, "--tensors"], 0),
        (["checkpoint", "verify", hostile_run], 0),
        (["checkpoint", "diff", step, hostile_run], 1),
        (["checkpoint", "prune", hostile_run], 0),
        (["data", "show", data], 0),
        (["data", "verify", data], 0),
        (["prepare", Path(json.__file__).with_name("scanner.py"), "--out", hostile_run / "out"], 3),
    ):
        assert main([str(a) for a in arguments]) == code, arguments
        out, err = capsys.readouterr()
        clean(out + err)
        if arguments[1] in ("show", "verify"):
            assert HARMLESS.replace("{task}", "")[:40] in out.replace("\n", ""), arguments


def test_what_training_prints_names_its_folder_in_one_line(hostile_run, tiny, capsys, tmp_path):
    recipe = tiny(train={"output": str(hostile_run), "steps": 2})
    from megaresnorm.recipe.load import dump_recipe
    from megaresnorm.run import Run

    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    with Run(tiny(train={"output": str(tmp_path / "b")})) as run:
        assert all("\n" not in line for line in run.describe())
    say(f"warning: {NAME}")
    assert capsys.readouterr().out == f"warning: {HARMLESS}\n"


def test_nothing_is_printed_past_these_functions():
    """print() is for texts of our own in commands; a table is always the one whose cells are strings as they are."""
    for path in Path(megaresnorm.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and path.name != "log.py":
                assert node.module not in ("rich.table", "rich.console"), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                own = node.args and isinstance(node.args[0], ast.Constant)
                json_text = node.args and "json.dumps" in ast.unparse(node.args[0])
                assert own or json_text, f"{path}:{node.lineno}"

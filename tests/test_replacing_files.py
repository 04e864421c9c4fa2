"""Files that a run writes: whole or not at all, and never through a link that somebody else has put in their place."""

import os
import signal

import pytest

from megaresnorm.errors import TrainingError
from megaresnorm.files import open_plain, replace_file
from megaresnorm.run import Run
from megaresnorm.trainer import train


def test_a_file_is_replaced_and_a_link_in_its_place_is_not_followed(tmp_path):
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("precious")
    link.symlink_to(victim)
    replace_file(link, "é\n")
    assert victim.read_text() == "precious" and not link.is_symlink() and link.read_text(encoding="utf-8") == "é\n"
    replace_file(link, iter([b"a", b"b"]))
    assert link.read_bytes() == b"ab" and sorted(p.name for p in tmp_path.iterdir()) == ["link", "victim"]


def test_nothing_changes_when_writing_fails(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("before")

    def pieces():
        yield b"after"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        replace_file(tmp_path / "a", pieces())
    monkeypatch.setattr("megaresnorm.files.secrets.token_hex", lambda count: "guessed")
    (tmp_path / ".new-guessed").symlink_to(tmp_path / "a")
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "a", b"after")
    assert (tmp_path / "a").read_text() == "before" and (tmp_path / ".new-guessed").is_symlink()


def test_what_a_killed_process_left_is_removed_by_the_next_run(tiny, tmp_path):
    recipe = tiny(train={"steps": 2})
    output = tmp_path / "run"
    train(recipe)
    pid = os.fork()
    if pid == 0:
        replace_file(output / "metrics.jsonl", iter(lambda: os.kill(os.getpid(), signal.SIGKILL), None))
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL and list(output.glob(".new-*"))
    train(recipe)
    assert not list(output.glob(".new-*")) and (output / "metrics.jsonl").read_text().count("\n") == 2


def test_only_plain_files_are_opened_and_no_pipe_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name, reason in (("pipe", "not a plain file"), ("link", "a link stands in its place")):
        for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT):
            with pytest.raises(OSError, match=reason):
                os.close(open_plain(tmp_path / name, flags))


def test_a_run_writes_through_no_link_that_waits_in_its_folder(tiny, tmp_path):
    """The names that it once wrote to first, the files themselves, and those of TensorBoard."""
    recipe, run = tiny(train={"steps": 2}), tmp_path / "run"
    run.mkdir()
    names = (".recipe.yaml.tmp", "metrics.tmp", "recipe.yaml")
    for name in names:
        (tmp_path / f"victim of {name}").write_text("precious")
        (run / name).symlink_to(tmp_path / f"victim of {name}")
    train(recipe)
    assert all((tmp_path / f"victim of {name}").read_text() == "precious" for name in names)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(tmp_path / "victim of recipe.yaml")
    with Run(tiny(train={"steps": 3})) as again, pytest.raises(TrainingError, match="a link stands in its place"):
        again.open_metrics()
    assert (tmp_path / "victim of recipe.yaml").read_text() == "precious"

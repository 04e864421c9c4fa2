"""A killed prepare or conversion leaves nothing that the next one does not sweep, and a link stays what it was."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from megaresnorm.cli import main
from megaresnorm.data.dataset import open_dataset

KILLED = """
import os, signal, sys
from megaresnorm.cli import main
where, number, *arguments = sys.argv[1:]
module, _, name = where.rpartition(".")
__import__(module)
real = getattr(sys.modules[module], name)
def kill(*given, **named):
    os.kill(os.getpid(), int(number))
    return real(*given, **named)
setattr(sys.modules[module], name, kill)
sys.exit(main(arguments))
"""


def killed_at(where: str, number: int, arguments: list[str]) -> subprocess.CompletedProcess:
    """Run a command that gets a signal when it comes to a function."""
    command = [sys.executable, "-c", KILLED, where, str(int(number)), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """Text, a run, and an export of it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text("some text of a few words\n" * 200)
    (folder / "r.yaml").write_text(
        "model: {dim: 16, num_blocks: 2, num_heads: 2, seq_len: 16, topology: pre}\n"
        "data: {path: ./data}\n"
        "train: {output: ./run, steps: 1, global_batch: 2, tensorboard: false, sample_tokens: 0}\n"
    )
    assert main(["prepare", str(folder / "text.txt"), "--out", str(folder / "data"), "--workers", "1"]) == 0
    assert main(["train", str(folder / "r.yaml")]) == 0
    assert main(["convert", "to-hf", str(folder / "run"), str(folder / "hf"), "--verify", "off"]) == 0
    return folder


COMMANDS = {
    "prepare": ("megaresnorm.data.prepare.digests_of", ["prepare", "{made}/text.txt", "--workers", "1", "--out"]),
    "prepare with workers": (
        "megaresnorm.data.prepare.digests_of", ["prepare", "{made}/text.txt", "--workers", "2", "--out"],
    ),
    "to-hf": ("megaresnorm.convert.export.write_tokenizer",
              ["convert", "to-hf", "{made}/run", "--verify", "off"]),
    "from-hf": ("megaresnorm.convert.from_hf.dump_values", ["convert", "from-hf", "{made}/hf", "--verify", "off"]),
    "to-megatron": ("megaresnorm.convert.export.write_tokenizer", ["convert", "to-megatron", "{made}/run"]),
}  # fmt: skip


TERM, KILL = signal.SIGTERM, signal.SIGKILL
USUAL = (("prepare", TERM), ("prepare", KILL), ("prepare with workers", KILL), ("to-hf", KILL), ("from-hf", TERM))
CASES = [(name, number) for name in COMMANDS for number in (TERM, KILL)]


@pytest.mark.parametrize(
    ("name", "number"), [case if case in USUAL else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
)
def test_what_a_killed_command_leaves_is_swept_by_the_next(name, number, made, tmp_path, capsys):
    where, command = COMMANDS[name]
    arguments = [*(part.format(made=made) for part in command), str(tmp_path / "out")]
    done = killed_at(where, number, arguments)
    left = os.listdir(tmp_path)
    if number == signal.SIGKILL:
        assert done.returncode == -signal.SIGKILL and len(left) == 1 and left[0].startswith(".tmp-out-")
    else:
        assert (done.returncode, left) == (143, []) and done.stderr == "megaresnorm: stopped\n", done.stderr
    assert main(arguments) == 0
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("moved", [False, True])
def test_a_data_set_that_is_replaced_is_never_lost(moved, made, tmp_path, capsys):
    """Killed before its successor is complete, or between the two renames."""
    text, out = tmp_path / "t.txt", tmp_path / "out"
    text.write_text("the old text")
    arguments = ["prepare", str(text), "--workers", "1", "--out", str(out)]
    assert main(arguments) == 0
    before = (out / "tokens.bin").read_bytes()
    text.write_text("the new and longer text")
    where = "megaresnorm.files.sync" if not moved else "megaresnorm.files.os.rename"
    script = KILLED
    if moved:  # at the second rename
        script = KILLED.replace("def kill(*given, **named):", "seen = []\ndef kill(*given, **named):\n"
                                "    seen.append(1)\n    if len(seen) < 2: return real(*given, **named)")  # fmt: skip
        where = "os.rename"
    done = subprocess.run(
        [sys.executable, "-c", script, where, str(int(signal.SIGKILL)), *arguments, "--overwrite"], timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert out.exists() != moved
    text.write_text("the old text")
    assert main(arguments) == 0  # which finds the data set again, and what was left is gone
    assert (out / "tokens.bin").read_bytes() == before and sorted(os.listdir(tmp_path)) == ["out", "t.txt"]


def test_a_link_keeps_its_target(made, tmp_path, capsys):
    text, real, link = tmp_path / "t.txt", tmp_path / "disk" / "real", tmp_path / "link"
    text.write_text("old")
    real.mkdir(parents=True)
    link.symlink_to(real)
    arguments = ["prepare", str(text), "--workers", "1", "--out", str(link)]
    assert main(arguments) == 0  # into the empty folder
    text.write_text("new text")
    assert main(arguments) == 3
    assert main([*arguments, "--overwrite"]) == 0
    assert link.is_symlink() and link.readlink() == real and os.listdir(real.parent) == ["real"]
    data = open_dataset(str(real))
    assert data.tokenizer.decode(data.files.tokens[:-1]) == "new text"
    hf = tmp_path / "hf"
    (tmp_path / "disk" / "hf").mkdir()
    hf.symlink_to(tmp_path / "disk" / "hf")
    assert main(["convert", "to-hf", str(made / "run"), str(hf), "--verify", "off"]) == 0
    assert hf.is_symlink() and (tmp_path / "disk" / "hf" / "config.json").exists()
    assert main(["convert", "to-hf", str(made / "run"), str(hf), "--verify", "off"]) == 2  # it is not empty any more


@pytest.fixture
def disk(tmp_path):
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: a full disk needs the right to mount a small one ({mounted.stderr.decode().strip()})")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_one_line_and_leaves_nothing(made, disk, tmp_path, capsys, monkeypatch):
    from megaresnorm.convert import files

    (tmp_path / "big.txt").write_text("text " * 100_000)
    monkeypatch.setattr(files, "free_bytes", lambda root: 10**12)  # it fills up while it is written
    (disk / "filler").write_bytes(bytes(200_000))
    for code, command in (
        (3, ["prepare", str(tmp_path / "big.txt"), "--workers", "1", "--out"]),
        (2, ["convert", "to-hf", str(made / "run"), "--verify", "off"]),
        (2, ["convert", "from-hf", str(made / "hf"), "--verify", "off"]),
    ):
        assert main([*command, str(disk / "out")]) in (code, 4), command
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "space" in error.lower(), error
        assert os.listdir(disk) == ["filler"]


def test_folders_of_other_commands_stay(made, tmp_path, capsys):
    """Of another output, and those in which a process is at work, whatever its number: a container begins at 1."""
    unique = "0123456789abcdef"
    stay = [f".tmp-other-{unique}", f".tmp-out-{unique[::-1]}", ".tmp-out", f".tmp-out-{unique}-x", ".tmp-out-1234"]
    for name in (*stay, f".tmp-out-{unique}", f".old-out-{unique}"):
        (tmp_path / name).mkdir()
    (tmp_path / f".old-out-{unique}" / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(made)
    (tmp_path / "link").rename(tmp_path / f".tmp-out-{'f' * 16}")
    command = ["prepare", str(made / "text.txt"), "--workers", "1", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [sys.executable, "-c", "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); "
         "print(flush=True); sys.stdin.read()", str(tmp_path / stay[1])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as at_work:  # fmt: skip
        at_work.stdout.readline()
        assert main([*command, "--overwrite"]) == 3  # what was about to be replaced is put back: no data set of ours
        (tmp_path / "out" / "thesis.txt").unlink()
        assert main(command) == 0
        assert sorted(os.listdir(tmp_path)) == sorted([*stay, f".tmp-out-{'f' * 16}", "out"])
        at_work.stdin.close()
    assert main(command) == 0
    assert stay[1] not in os.listdir(tmp_path) and (made / "text.txt").exists()


def test_what_cannot_be_replaced_is_said_before_the_work(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["prepare", str(made / "text.txt"), "--workers", "1", "--out"]
    assert main([*command, "."]) == 3
    assert "it is the working directory, which cannot be replaced" in capsys.readouterr().err
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")], capture_output=True)
    if mounted.returncode == 0:
        try:
            assert main([*command, "disk"]) == 3
            assert "it is a mount point, which cannot be replaced; give a folder in it" in capsys.readouterr().err
            assert main([*command, "disk/data"]) == 0
        finally:
            subprocess.run(["umount", str(tmp_path / "disk")], check=True)
    assert os.listdir(tmp_path) == ["disk"]


@pytest.mark.parametrize("where", ["indexed.TokenWriter._write", "prepare.digests_of"])
def test_no_space_at_any_place_costs_one_line_and_leaves_nothing(where, made, tmp_path, capsys, monkeypatch):
    """As on a full disk, where none can be mounted."""

    def full(*given, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"megaresnorm.data.{where}", full)
    command = ["prepare", str(made / "text.txt"), "--workers", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 3
    assert capsys.readouterr().err.endswith("cannot be written (No space left on device)\n")
    assert os.listdir(tmp_path) == []

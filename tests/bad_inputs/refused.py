"""A command that is given bad input ends in one line, soon, in little memory, and leaves the disk as it was."""

import os
import signal
import stat
import time
from pathlib import Path

import transformers.models.llama.modeling_llama  # noqa: F401 - once, so that no case pays for it

import megaresnorm.convert.from_hf
import megaresnorm.convert.to_hf
import megaresnorm.generate
import megaresnorm.studies.quantized_files  # noqa: F401
from megaresnorm.cli import main

SECONDS = 2.0  # of the processor; other processes may have the machine
MEGABYTES = 300
HANGS = 60  # seconds of the clock, however busy the machine is
CODES = (2, 3, 4, 5, 7)


def refused(argv: list, wanted: str, root: Path, capture) -> str:
    """Run a command that must be refused, and return the line.

    Args:
        wanted: a part of the line.
        root: the folder in which nothing may change.
        capture: pytest's capfd, which sees what libraries of other languages print.
    """
    argv, before = [str(one) for one in argv], _contents(root)
    capture.readouterr()
    start, memory = time.process_time(), _peak_afresh()
    previous = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(HANGS)
    try:
        code = main(argv)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    seconds = time.process_time() - start
    grown = (_peak() - memory) / 1024
    error = capture.readouterr().err
    lines = error.splitlines()
    assert code in CODES, (code, error[-2000:])
    assert "Traceback" not in error and "panicked" not in error, error[-2000:]
    assert len(lines) == 1, error[-2000:]
    line = lines[-1]
    assert line.startswith("megaresnorm") and "error: " in line and len(line) < 2500, line[:500]
    assert wanted in line, line
    assert seconds < SECONDS, (seconds, line)
    assert grown < MEGABYTES, (grown, line)
    assert _contents(root) == before
    return line


def _hangs(number, frame) -> None:
    raise AssertionError(f"it waits for something: nothing within {HANGS} s")


def _peak_afresh() -> int:
    """kB of memory now, from which on the peak is counted."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """The most memory in kB that this process has had since ``_peak_afresh``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _contents(root: Path) -> dict:
    found = {}
    for folder, names, files in os.walk(root):
        for name in (*names, *files):
            info = os.lstat(os.path.join(folder, name))
            own = (info.st_size, info.st_mtime_ns) if stat.S_ISREG(info.st_mode) else ()
            found[os.path.join(folder, name)] = (info.st_mode, info.st_ino, *own)
    return found


def put(content) -> "callable":
    """Something that puts a thing at a path: bytes, a size of zeros that take no space, or a function of the path."""

    def make(path: Path) -> None:
        if path.is_symlink() or path.is_file():
            path.unlink()
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, int):
            path.touch()
            os.truncate(path, content)
        else:
            content(path)

    return make


ZEROS = put(lambda path: path.symlink_to("/dev/zero"))
PIPE = put(os.mkfifo)
FOLDER = put(os.mkdir)
LOOP = put(lambda path: path.symlink_to(path.name))
NOT_FILES = {"endless": ZEROS, "a pipe": PIPE, "a folder": FOLDER, "a link to itself": LOOP, "8 TB": put(1 << 43)}

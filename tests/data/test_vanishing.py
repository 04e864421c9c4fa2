"""Token files that change or vanish while they are in use: what is still there is read, what is not is one line."""

import errno
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from megaresnorm.data import token_file
from megaresnorm.data.dataset import open_dataset
from megaresnorm.data.indexed import TokenFiles
from megaresnorm.errors import DataError


@pytest.fixture
def prefix(byte_data, tmp_path):
    shutil.copytree(byte_data, tmp_path / "data")
    return tmp_path / "data" / "tokens"


def all_of(files: TokenFiles) -> np.ndarray:
    return np.concatenate([files.tokens[i : i + 100] for i in range(0, len(files.tokens), 100)])


def test_slices_are_those_of_the_file_whole_or_in_part(prefix):
    files = TokenFiles(prefix)
    want = np.fromfile(files.bin_path, files.dtype)
    n = len(want)
    assert len(files.tokens) == n and np.array_equal(files.tokens, want) and files.tokens[-1] == want[-1]
    for a, b in ((0, 5), (n - 3, n), (-4, None), (10, 10), (20, 10), (n - 1, n + 50), (None, None)):
        assert np.array_equal(files.tokens[a:b], want[a:b])
    with pytest.raises(IndexError):
        files.tokens[n]


@pytest.mark.parametrize("change", ["unlinked", "replaced", "folder moved"])
def test_a_file_that_is_removed_or_replaced_is_read_on_to_its_end(prefix, change):
    files = TokenFiles(prefix)
    want = np.fromfile(files.bin_path, files.dtype)
    if change == "unlinked":
        files.bin_path.unlink()
    elif change == "replaced":
        new = files.bin_path.with_suffix(".new")
        new.write_bytes(b"\1" * 10)
        new.replace(files.bin_path)
    else:
        prefix.parent.rename(prefix.parent.with_name("elsewhere"))
    assert np.array_equal(all_of(files), want)


def test_a_file_that_is_cut_says_its_name_the_byte_and_how_much_was_there(prefix):
    files = TokenFiles(prefix)
    size = files.bin_path.stat().st_size
    os.truncate(files.bin_path, size - 50)
    n, item = len(files.tokens), files.dtype.itemsize
    assert len(files.tokens[:100]) == 100
    with pytest.raises(DataError) as error:
        files.tokens[n - 100 : n]
    line = str(error.value)
    part = f"has {100 * item - 50} of the {100 * item} bytes from byte {size - 100 * item} on"
    assert line.startswith(f"{files.bin_path}: {part}")
    assert "\n" not in line and "cut while it was in use" in line


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_is_cut_elsewhere_or_grows_is_noticed_soon(prefix, change):
    files = TokenFiles(prefix)
    size = files.bin_path.stat().st_size
    os.truncate(files.bin_path, size + change)
    with pytest.raises(DataError, match=f"has {size + change} bytes now, and had {size}: it was changed in use"):
        for _ in range(token_file._LOOK_EVERY):
            files.tokens[:10]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENXIO])
def test_what_the_system_cannot_read_is_one_line_with_file_and_byte(prefix, code, monkeypatch):
    files = TokenFiles(prefix)

    def fails(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(DataError) as error:
        files.tokens[7:9]
    at = 7 * files.dtype.itemsize
    assert str(error.value).startswith(f"{files.bin_path}: byte {at} cannot be read ({os.strerror(code)})")


def test_a_read_that_comes_in_parts_is_put_together(prefix, monkeypatch):
    files, real = TokenFiles(prefix), os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: real(descriptor, min(size, 7), offset))
    assert np.array_equal(files.tokens[3:60], np.fromfile(files.bin_path, files.dtype)[3:60])


def test_a_file_of_another_size_than_its_index_says_is_refused(prefix):
    files = TokenFiles(prefix)
    with pytest.raises(DataError, match="bytes now, and had"):
        token_file.TokenFile(files.bin_path, files.dtype, len(files.tokens) + 1)


def test_a_blend_may_have_more_files_than_a_process_may_open_at_first(prefix):
    script = """
import resource, sys
from pathlib import Path
from megaresnorm.data.indexed import TokenFiles
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 200))
opened = [TokenFiles(Path(sys.argv[1])) for _ in range(100)]
print(sum(int(files.tokens[5]) for files in opened), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run([sys.executable, "-c", script, str(prefix)], capture_output=True, text=True)
    assert done.stdout.split() == [str(100 * int(TokenFiles(prefix).tokens[5])), "200"], done.stderr


def test_descriptors_are_closed_with_their_files(prefix):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        open_dataset(str(prefix.parent))
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_mount_that_goes_away_leaves_what_is_open(prefix, tmp_path):
    place = tmp_path / "mount"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "none", str(place)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"NOT RUN, mounting needs root: {made.stderr.strip()}")
    try:
        shutil.copytree(prefix.parent, place / "data")
        files = TokenFiles(place / "data" / "tokens")
        want = np.fromfile(files.bin_path, files.dtype)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
    assert not files.bin_path.exists()
    assert np.array_equal(all_of(files), want)

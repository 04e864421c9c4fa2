"""Installs MegaResNorm, and what is missing of requirements.lock, beside a torch that stays as it is.

For images and environments that come with a torch of their own; run by their Python, in this repository's root:

python launch/install_beside_torch.py    # exit code 1, and one line, where torch is missing, too old, or has changed

pip's own settings hold, with the constraints of the image (PIP_CONSTRAINT): a package for which they name another
version than the lock is taken in theirs.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import check_environment

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]


def main() -> int:
    wanted = check_environment.requirements("")
    (torch,) = (requirement for requirement in wanted if re.match(r"torch\b", requirement))
    others = [requirement for requirement in wanted if requirement != torch]
    if (why := check_environment.problem(torch)) is not None or check_environment.version_of("torch") is None:
        return fail(f"{why or 'torch has no record of its version'}; take an image with {torch}")
    before = fingerprint()
    with tempfile.TemporaryDirectory() as folder:
        install(others, Path(folder))
    importlib.invalidate_caches()
    if fingerprint() != before:
        return fail(f"torch was {before[0]} and is {fingerprint()[0]}, or its files have changed")
    print(f"MegaResNorm beside torch {before[0]}, of which nothing has changed")
    return 0


def fail(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 1


def install(others: list[str], folder: Path) -> None:
    """Install what is missing, then the package.

    Args:
        others: requirements besides torch.
        folder: an empty one.
    """
    entries, theirs = lock_entries(), constrained()
    old = {name_of(requirement) for requirement in others if check_environment.problem(requirement)}
    missing = [
        text
        for name, texts in entries.items()
        if name not in ("setuptools", *theirs)
        if check_environment.version_of(name) is None or name in old
        for text in texts
    ]
    (folder / "missing.txt").write_text("".join(missing))
    (folder / "torch.txt").write_text(f"torch=={importlib.metadata.version('torch')}\n")
    (folder / "setuptools.txt").write_text("".join(entries["setuptools"]))
    if missing:
        run(*PIP, "--no-deps", "--require-hashes", "--requirement", folder / "missing.txt")
    # What the constraints of the image decide, and what the image has in versions that do not fit together.
    run(*PIP, "--constraint", folder / "torch.txt", *others)
    # The package is built by the setuptools of the lock, which does not become the image's.
    build = folder / "build"
    scratch = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    run(*PIP, "--no-deps", "--require-hashes", "--target", build, "--requirement", folder / "setuptools.txt",
        environment=scratch)  # fmt: skip
    run(*PIP, "--no-deps", "--no-build-isolation", ROOT, environment=os.environ | {"PYTHONPATH": str(build)})


def run(*words: object, environment: Mapping[str, str] | None = None) -> None:
    done = subprocess.run([str(word) for word in words], env=environment, check=False)
    if done.returncode:
        raise SystemExit(fail("pip could not install (see above)"))


def name_of(requirement: str) -> str:
    """Its package, in the form of the lock."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def lock_entries() -> dict[str, list[str]]:
    """Of requirements.lock by package, each with its condition and digests."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for entry in re.findall(r"^[a-z0-9].*\n(?:    .*\n)*", text, re.MULTILINE):
        found.setdefault(name_of(entry), []).append(entry)
    return found


def constrained() -> set[str]:
    """Packages that pip's constraints name, of its variables and files of settings alike."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    settings = re.findall(r"^\S+\.constraint='(.*)'$", done.stdout, re.MULTILINE)
    files = [Path(name) for setting in settings for name in re.split(r"\s|\\n", setting) if name]
    lines = [line for file in files if file.is_file() for line in file.read_text(encoding="utf-8").splitlines()]
    return {name_of(line) for line in lines if re.match(r"[A-Za-z0-9]", line)}


def fingerprint() -> tuple[str, str]:
    """Version of torch, and a digest of the names, sizes and times of its files."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    digest = hashlib.sha256()
    for top in (folder, *sorted(folder.parent.glob("torch-*.dist-info"))):
        for path in sorted(top.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                about = path.stat()
                digest.update(f"{path.relative_to(folder.parent)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return importlib.metadata.version("torch"), digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())

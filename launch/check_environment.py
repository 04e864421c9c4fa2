"""Says which Python and torch an environment has, or in one line on stderr what is missing there.

Run by the environment's own Python:

python launch/check_environment.py [EXTRA]    # EXTRA of pyproject.toml, as dev; exit code 1 where something is missing
"""

import ast
import importlib.metadata
import importlib.util
import re
import shlex
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
MODULES = {"pyyaml": "yaml"}  # where the module has another name than its package


def requirements(extra: str) -> list[str]:
    """The requirements in pyproject.toml.

    Those with a condition (``; python_version < ...``) are left out: the tests do without them.
    Python has a reader of TOML from 3.11 on; lists of strings are written in TOML as they are in Python.
    """
    text = PROJECT.read_text(encoding="utf-8")
    wanted: list[str] = []
    for name in ("dependencies", *([extra] if extra else [])):
        found = re.search(rf"^{name} = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)
        if found is None:
            raise SystemExit(f"{PROJECT}: has no extra {name}")
        wanted += ast.literal_eval(found[1])
    return [requirement for requirement in wanted if ";" not in requirement]


def problem(requirement: str) -> str | None:
    """Why a requirement (``name>=1.2``, ``name>=1.2,<2`` or a name) is not met here, in a few words."""
    name, _, bounds = requirement.partition(">=")
    oldest, _, below = bounds.partition(",<")
    name = name.partition("[")[0]  # of the extras in brackets nothing is recorded
    version = version_of(name)
    if version is None:  # some are there without a package's records
        return None if place_of(MODULES.get(name.lower(), name)) else f"{name} is missing"
    if oldest and numbers(version) < numbers(oldest):
        return f"{name} is {version}, older than {oldest}"
    return f"{name} is {version}, not below {below}" if below and numbers(version) >= numbers(below) else None


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def place_of(module: str) -> Path | None:
    """The folder from which it would be imported; it is not, which would take seconds."""
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).parents[1] if spec and spec.origin else None


def numbers(version: str) -> list[int]:
    """Of 2.13.0a0+cpu: 2, 13, 0."""
    found = re.match(r"\d+(\.\d+)*", version)
    return [int(number) for number in found[0].split(".")] if found else []


def main(extra: str = "") -> int:
    wrong = {requirement: why for requirement in requirements(extra) if (why := problem(requirement))}
    if wrong:
        pip = [sys.executable, "-m", "pip", "install"]
        if place_of("pip") is None:  # made by uv
            pip = ["uv", "pip", "install", "--python", sys.executable]
        print(f"{', '.join(wrong.values())}; install it there: {shlex.join([*pip, *wrong])}", file=sys.stderr)
        return 1
    place = place_of("torch")
    elsewhere = "" if place is None or place.is_relative_to(sys.prefix) else f" of {place}"
    print(f"Python {sys.version.split()[0]}, torch {version_of('torch') or 'of unknown version'}{elsewhere}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

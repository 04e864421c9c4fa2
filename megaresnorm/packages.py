"""Versions of optional packages, looked up without importing them, and those of DeepSpeed that its engine takes."""

import platform
import re
from importlib import metadata

from megaresnorm.errors import ConfigError

# DeepSpeed's engine reads where ZeRO keeps its partitions, which no interface promises. 0.19.6 knows not all settings
# that it is given. pyproject.toml says the same, and constraints.txt has the newest one that was tested.
DEEPSPEED = ">=0.19.7,<0.20"
NEWEST_TESTED = "0.19.8"


def version_of(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions_of_run(engine: str) -> dict[str, str]:
    """Versions of what computes a run, by name, as its checkpoints have them.

    Args:
        engine: engine.name.
    """
    import torch

    import megaresnorm

    versions = {"megaresnorm": megaresnorm.__version__, "torch": str(torch.__version__)}
    versions["python"] = platform.python_version()
    return versions | ({"deepspeed": version_of("deepspeed") or "unknown"} if engine == "deepspeed" else {})


def numbers_of(version: str) -> tuple[int, ...]:
    """What a version is compared by.

    >>> numbers_of("0.19.8+cu128"), numbers_of("0.20.0rc1")
    ((0, 19, 8), (0, 20, 0))
    """
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def is_supported(version: str) -> bool:
    """Whether the engine takes this version of DeepSpeed.

    >>> [is_supported(version) for version in ("0.19.6", "0.19.7", "0.19.10", "0.20.0")]
    [False, True, True, False]
    """
    least, below = (numbers_of(bound.lstrip("<>=")) for bound in DEEPSPEED.split(","))
    return least <= numbers_of(version) < below


def untested(version: str) -> str | None:
    """What to say of a version of DeepSpeed that is newer than those that were tested; None of others.

    >>> untested("0.19.9"), untested("0.19.8")
    ('DeepSpeed 0.19.9 is newer than 0.19.8, the newest one that was tested', None)
    """
    if numbers_of(version) <= numbers_of(NEWEST_TESTED):
        return None
    return f"DeepSpeed {version} is newer than {NEWEST_TESTED}, the newest one that was tested"


def check_deepspeed_version() -> None:
    """Check that DeepSpeed is installed, in a version that its engine takes.

    Raises:
        ConfigError: it is not; the line says what to install.
    """
    version, install = version_of("deepspeed"), f"pip install 'deepspeed{DEEPSPEED}', or set engine.name=native"
    if version is None:
        raise ConfigError(f"engine.name=deepspeed: DeepSpeed is not installed; {install}")
    if not is_supported(version):
        raise ConfigError(
            f"engine.name=deepspeed: DeepSpeed {version} is installed, {DEEPSPEED} is supported; {install}"
        )

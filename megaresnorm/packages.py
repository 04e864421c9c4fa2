"""Versions of optional packages, looked up without importing them, and those of DeepSpeed that were tested."""

import re
from importlib import metadata

from megaresnorm.errors import ConfigError

# DeepSpeed's engine reads where ZeRO keeps its partitions, which no interface promises. 0.19.6 knows not all settings
# that it is given. pyproject.toml says the same.
DEEPSPEED = ">=0.19.7,<0.20"


def version_of(package: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def numbers_of(version: str) -> tuple[int, ...]:
    """What a version is compared by.

    >>> numbers_of("0.19.8+cu128"), numbers_of("0.20.0rc1")
    ((0, 19, 8), (0, 20, 0))
    """
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def is_tested(version: str) -> bool:
    """Whether the engine works with this version of DeepSpeed.

    >>> [is_tested(version) for version in ("0.19.6", "0.19.7", "0.19.10", "0.20.0")]
    [False, True, True, False]
    """
    least, below = (numbers_of(bound.lstrip("<>=")) for bound in DEEPSPEED.split(","))
    return least <= numbers_of(version) < below


def check_deepspeed() -> None:
    """Check that DeepSpeed is installed, in a version that its engine works with.

    Raises:
        ConfigError: it is not; the line says what to install.
    """
    version, install = version_of("deepspeed"), f"pip install 'deepspeed{DEEPSPEED}', or set engine.name=native"
    if version is None:
        raise ConfigError(f"engine.name=deepspeed: DeepSpeed is not installed; {install}")
    if not is_tested(version):
        raise ConfigError(f"engine.name=deepspeed: DeepSpeed {version} is installed, {DEEPSPEED} was tested; {install}")

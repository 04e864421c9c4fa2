"""The recipes that come with the package: configs/ of the repository, or its copy in an installed package."""

import re
from pathlib import Path

import megaresnorm
from megaresnorm.errors import ConfigError


def configs_folder() -> Path:
    """Where they are."""
    package = Path(megaresnorm.__file__).parent
    return next((folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()), package)


def shipped_recipes() -> list[str]:
    """Their names."""
    return sorted(path.stem for path in configs_folder().glob("*.yaml"))


def read_shipped(name: str) -> str:
    """The text of one of them.

    Raises:
        ConfigError: there is none of this name.
    """
    name = name.removeprefix("configs/").removesuffix(".yaml")
    if name not in shipped_recipes():
        raise ConfigError(f"no recipe is called {name[:60]!r}; there are {', '.join(shipped_recipes())}")
    return (configs_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def title_of(name: str) -> str:
    """What one of them is: the first sentence of its comment."""
    comment = [line.lstrip("# ") for line in read_shipped(name).splitlines() if line.startswith("# ")]
    text = " ".join(line for line in comment if not line.startswith("yaml-language-server"))
    return re.split(r"(?<=[.:]) ", text)[0].rstrip(":.")

"""Data sets of the Hugging Face hub, and folders that look like one. Only files of the data set itself are read.

The README.md of a data set says which files belong to it, and ``datasets`` takes any path or address there: another
file of this machine, or of its network. So the list of files is checked before anything is read.
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from megaresnorm.errors import ConfigError, DataError
from megaresnorm.reading import read_plain_file

HUB = "hf:"
CARDS = ("README.md", ".huggingface.yaml")
MAX_CARD_BYTES = 1 << 20  # of a README.md or .huggingface.yaml
# Readers of files that contain all their data: HDF5 can point into other files.
KINDS = ("arrow", "csv", "json", "parquet", "text")
_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---(\r?\n|$)", re.DOTALL)


def hub_address(name: str) -> tuple[str, str | None, str]:
    """Parse hf:NAME[:CONFIG[:SPLIT]].

    Returns:
        (name, config, split); config is None where it is not given, split is train.

    Raises:
        ConfigError: not of this form.
    """
    address, *rest = name.removeprefix(HUB).split(":")
    if not address or len(rest) > 2:
        raise ConfigError(f"{name}: wanted hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    config, split = [*rest, "", ""][:2]
    return address, config or None, split or "train"


def optional(module: str, what: str) -> Any:
    """Import a module of the optional packages for data.

    Args:
        module: its full name.
        what: the file or data set that needs it, for the error.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"{what} cannot be read without the package datasets; pip install datasets") from None


class HubData:
    """A data set of the hub, or of a local folder that ``datasets`` can load.

    Args:
        name: hf:NAME[:CONFIG[:SPLIT]], where NAME may be a local folder.

    Raises:
        DataError: it cannot be opened, or consists of anything but its own files.
    """

    def __init__(self, name: str) -> None:
        datasets = optional("datasets", name)
        datasets.disable_progress_bars()
        address, config, self._split = hub_address(name)
        self._name, self._folder = name, Path(address) if Path(address).is_dir() else None
        if self._folder is not None:
            _check_cards(self._folder, name)
        try:
            self._builder = datasets.load_dataset_builder(address, config)
        except Exception as e:  # noqa: BLE001 - datasets passes on whatever its backends raise
            raise self._unreadable(e) from None
        kind = type(self._builder).__module__.rpartition(".")[2]
        if kind not in KINDS:
            raise DataError(f"{name}: holds files for the reader {kind!r}; wanted those for {', '.join(KINDS)}")
        for paths in (self._builder.config.data_files or {}).values():
            for path in paths:
                self._check_file(str(path), address)

    def files(self) -> list[Path]:
        """The files of the split of a local folder.

        Raises:
            DataError: there is no such split.
        """
        assert self._folder is not None
        splits = self._builder.config.data_files or {}
        if self._split not in splits:
            raise DataError(
                f"{self._name}: cannot be read (no split {self._split!r}; it has {', '.join(map(str, splits))})"
            )
        return [Path(path) for path in splits[self._split]]

    @property
    def is_local(self) -> bool:
        """Whether it is a local folder."""
        return self._folder is not None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Stream the rows as they are stored: no picture or sound in them is opened.

        Raises:
            DataError: they cannot be read.
        """
        try:
            rows = self._builder.as_streaming_dataset(split=self._split)
            yield from rows if rows.features is None else rows.decode(False)
        except Exception as e:  # noqa: BLE001 - as above
            raise self._unreadable(e) from None

    def _check_file(self, path: str, address: str) -> None:
        """Check that a file belongs to this data set.

        Raises:
            DataError: it does not.
        """
        if self._folder is None:
            inside = path.startswith("hf://datasets/") and "::" not in path
            inside = inside and ("/" not in address or path[14:].lower().startswith(f"{address.lower()}@"))
            how = "it asks for"
        else:
            found = Path(path).resolve()
            inside = found.is_relative_to(self._folder.resolve()) and found.is_file()
            how = "copy it here with cp -rL; the folder asks for"
        if not inside:
            raise DataError(f"{self._name}: only plain files of the data set itself are read; {how} {path}")

    def _unreadable(self, error: Exception) -> DataError:
        reason = (str(error).splitlines() or [""])[0]
        return DataError(f"{self._name}: cannot be read ({type(error).__name__}: {reason[:200]})")


def read_card(folder: Path, card: str = "README.md") -> dict[str, Any]:
    """Fields at the start of the card of a data set or a model; empty where there are none.

    Raises:
        DataError: it cannot be read.
    """
    path = folder / card
    if not path.exists():
        return {}
    try:
        text = read_plain_file(path, MAX_CARD_BYTES).decode("utf-8-sig")
        described = _described(text, front_matter=card == "README.md")
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise DataError(f"{path}: not a readable description ({type(e).__name__})") from None
    return described if isinstance(described, dict) else {}


def card_fields(fields: dict[str, Any]) -> str:
    """Fields as ``read_card`` reads them, without the lines around them."""
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _check_cards(folder: Path, name: str) -> None:
    """Check the description of a folder, before ``datasets`` looks for the files that it names.

    Raises:
        DataError: it cannot be read, or names files outside of the folder.
    """
    for card in CARDS:
        for pattern in _patterns(read_card(folder, card)):
            if "://" in pattern or "::" in pattern or pattern[:1] in "/~" or ".." in Path(pattern).parts:
                raise DataError(f"{name}: only files of the folder are read; its {card} asks for {pattern}")


def _described(text: str, *, front_matter: bool) -> Any:
    """Parse YAML without aliases, which could make a small text a thousand times as large.

    Raises:
        ValueError, yaml.YAMLError: it has an alias, or is not YAML.
    """
    if front_matter:
        match = _FRONT_MATTER.match(text)
        text = "" if match is None else match[1]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("an alias")
    return yaml.safe_load(text)


def _patterns(described: dict[str, Any]) -> Iterator[str]:
    """All strings under data_files and data_dir of the configurations."""
    configs = described.get("configs")
    waiting = [
        one.get(key) for one in configs or [] if isinstance(one, dict) for key in ("data_files", "data_dir")
    ] if isinstance(configs, list) else []  # fmt: skip
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and value:
            yield value
        elif isinstance(value, list | dict):
            waiting += value.values() if isinstance(value, dict) else value

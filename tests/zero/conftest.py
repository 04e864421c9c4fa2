"""The model and batches of tests/parallel are these tests', too."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "parallel"))


@pytest.fixture(scope="session", autouse=True)
def imported_once() -> None:
    """In the parent of all ranks, each of which would take seconds for it."""
    if find_spec("deepspeed") is not None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # noqa: F401

"""Fixtures and small recipes shared by the tests."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first product of a process on a GPU
import torch

from megaresnorm.data.prepare import PrepareJob, prepare
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that start ranks take all cores by themselves, and wait for each other longer beside others that do."""
    for item in items:
        module = getattr(item, "module", None)
        if any(hasattr(module, name) for name in ("run_ranks", "outcomes", "Launched")):
            item.add_marker(pytest.mark.alone)
        if item.get_closest_marker("deepspeed") and find_spec("deepspeed") is None:
            item.add_marker(pytest.mark.skip(reason="DeepSpeed is not installed"))


@pytest.fixture(autouse=True)
def one_thread():
    """Times and sums that do not depend on the machine's cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def determinism_of_its_own():
    """A test that asks for it leaves nothing of it to others."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.backends.cuda.enable_mem_efficient_sdp(before[1])


@pytest.fixture(autouse=True)
def one_seed():
    """The same random numbers in every run of a test, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def byte_data(tmp_path_factory) -> Path:
    """A prepared data set of bytes: 40 documents of Python source, enough for a few hundred short sequences."""
    import json as source

    folder = tmp_path_factory.mktemp("data")
    text = Path(source.__file__).read_text()
    (folder / "text.jsonl").write_text(
        "".join(source.dumps({"text": text[i * 300 : i * 300 + 300 + 7 * i]}) + "\n" for i in range(40))
    )
    prepare(PrepareJob(out=folder / "bytes", paths=(str(folder / "text.jsonl"),)))
    return folder / "bytes"


@pytest.fixture
def tiny(byte_data, tmp_path):
    """A function from overrides to the recipe of a run that takes a second."""

    def make(**sections) -> Recipe:
        values: dict = {
            "model": {"dim": 16, "num_blocks": 3, "num_heads": 2, "seq_len": 16, "ffn_dim": 24},
            "data": {"path": str(byte_data), "valid_fraction": 0.1},
            "train": {
                "output": str(tmp_path / "run"),
                "steps": 6,
                "global_batch": 4,
                "loggers": [],
                "sample_tokens": 0,
            },
        }
        for section, settings in sections.items():
            values.setdefault(section, {}).update(settings)
        return build_recipe(values)

    return make

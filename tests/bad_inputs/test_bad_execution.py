"""What cannot be compiled, recorded or made deterministic costs one line, before anything is built."""

import os
import subprocess
import sys

import pytest
import torch

from megaresnorm.errors import ConfigError
from megaresnorm.kernels import deterministic
from megaresnorm.layout import check_execution
from megaresnorm.parallel.mesh import Sizes
from megaresnorm.recipe.load import build_recipe

ONE = Sizes(1, 1, 1, 1, 1)


def recipe(**sections):
    values = {
        "model": {"dim": 16, "num_blocks": 2, "num_heads": 2, "seq_len": 8, "vocab_size": 64},
        "data": {"path": "none"},
        "train": {"output": "none", "steps": 2},
    }
    for section, settings in sections.items():
        values[section] = {**values.get(section, {}), **settings}
    return build_recipe(values)


GRAPHS = {"compile": "cuda_graphs"}
REFUSED = [  # sections, sizes of the mesh, device, what the line says
    ({"train": GRAPHS}, ONE, "cpu", "train.compile=cuda_graphs needs a GPU, this is cpu; try train.compile=blocks"),
    ({"train": GRAPHS}, Sizes(1, 2, 1, 1, 1), "cuda", "not the messages of 2 ranks; try train.compile=blocks"),
    ({"train": GRAPHS}, Sizes(1, 1, 2, 1, 1), "cuda", "not the messages of 2 ranks"),
    ({"train": GRAPHS}, Sizes(1, 1, 1, 1, 2), "cuda", "not the messages of 2 ranks"),
    ({"train": GRAPHS}, Sizes(2, 2, 1, 1, 1), "cuda", "not the messages of 4 ranks"),
    ({"train": GRAPHS}, Sizes(2, 1, 1, 1, 1), "cuda", "not the messages of 2 ranks"),
    ({"train": GRAPHS, "data": {"mask_documents": True}}, ONE, "cuda", "data.mask_documents=true"),
    ({"train": {"deterministic": True}, "kernels": {"add_norm": "te"}}, ONE, "cuda", "kernels.add_norm=te"),
    ({"train": {"deterministic": True}, "kernels": {"add_norm": "apex"}}, ONE, "cuda", "kernels.add_norm=apex"),
    ({"train": {"deterministic": True}, "data": {"mask_documents": True}}, ONE, "cuda", "mask_documents=true"),
]


@pytest.mark.parametrize(("sections", "sizes", "device", "says"), REFUSED)
def test_an_execution_that_cannot_be_is_refused(sections, sizes, device, says):
    with pytest.raises(ConfigError) as error:
        check_execution(recipe(**sections), sizes, device)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sections", "device"),
    [
        ({"train": GRAPHS}, "cuda"),
        ({"train": {"compile": "auto", "deterministic": True}, "data": {"mask_documents": True}}, "cpu"),
        ({"train": {**GRAPHS, "deterministic": True}}, "cuda"),
    ],
)
def test_what_can_be_is_not_refused(sections, device):
    check_execution(recipe(**sections), ONE, device)


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"compile": True}, "train.compile=True"),
        ({"compile": "yes"}, "train.compile='yes'"),
        ({"compile": "max-autotune"}, "none, blocks, cuda_graphs, auto"),
        ({"compile": "reduce-overhead"}, "none, blocks, cuda_graphs, auto"),
        ({"compile": ["blocks"]}, "train.compile"),
        ({"compile": "cuda_graph"}, "cuda_graphs"),
        ({"deterministic": "maybe"}, "train.deterministic='maybe'"),
        ({"deterministic": 2}, "train.deterministic=2"),
        ({**GRAPHS, "global_batch": 8, "batch_ramp": {"start": 2, "steps": 4}}, "train.micro_batch"),
    ],
)
def test_a_setting_that_cannot_be_costs_one_line(train, says):
    with pytest.raises(ConfigError) as error:
        recipe(train=train)
    assert says.lower() in str(error.value).lower() and "\n" not in str(error.value)


@pytest.mark.parametrize("found", ["", ":0:0", "garbage"])
def test_a_setting_of_cublas_that_is_not_deterministic_is_refused(found, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", found)
    with pytest.raises(ConfigError, match="lets cuBLAS add in any order"):
        deterministic.set_deterministic(torch.device("cuda"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_blocks_without_a_compiler_cost_one_line(byte_data, tmp_path):
    """torch.compile would raise from the middle of the first step."""
    command = [sys.executable, "-m", "megaresnorm.job", str(tmp_path / "recipe.yaml"), "train.compile=blocks"]
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{dim: 16, num_blocks: 2, num_heads: 2, seq_len: 8}}\ndata: {{path: {byte_data}}}\n"
        f"train: {{output: {tmp_path}/run, steps: 2, loggers: [], sample_tokens: 0, device: cpu}}\n"
    )
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": str(tmp_path), "CXX": ""}
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "train.compile=blocks" in done.stderr and "C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 2

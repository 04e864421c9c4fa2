"""What cannot be compiled, recorded or made deterministic costs one line, before anything is built."""

import re

import pytest
import torch

from megaresnorm.errors import ConfigError
from megaresnorm.kernels import deterministic
from megaresnorm.layout import check_execution
from megaresnorm.model.compiled import resolve_compile_mode
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
    ({"train": GRAPHS, "kernels": {"cross_entropy": "liger"}}, ONE, "cuda", "kernels.cross_entropy=liger"),
    ({"kernels": {"cross_entropy": "reference"}}, Sizes(1, 1, 1, 1, 2), "cpu", "parallel.tp=2; use auto or chunked"),
    ({"kernels": {"rotary": "reference"}, "model": {"positions": "learned"}}, ONE, "cpu", "rotates nothing; use auto"),
    ({"train": GRAPHS, "kernels": {"add_norm": "te"}}, ONE, "cuda", "kernels.add_norm=te cannot be compiled"),
    ({"train": {"compile": "blocks"}, "kernels": {"activation": "liger"}}, ONE, "cuda", "kernels.activation=liger"),
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


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"CXX": "/nonexistent"}, "no C++ compiler was found"),
        ({"TORCHINDUCTOR_CACHE_DIR": "/proc/nope"}, "TORCHINDUCTOR_CACHE_DIR"),
        ({"TORCHINDUCTOR_CACHE_DIR": "/dev/full"}, "TORCHINDUCTOR_CACHE_DIR"),
    ],
)
def test_where_no_code_can_be_generated_blocks_cost_one_line_and_auto_goes_without(variables, says, monkeypatch):
    import torch._inductor.config as inductor

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    model = recipe().model
    with inductor.patch({"cpp.cxx": (None, variables.get("CXX", "g++"))}):  # read from CXX when torch is imported
        with pytest.raises(ConfigError, match=f"train.compile=blocks: .*{re.escape(says)}"):
            resolve_compile_mode("blocks", model, "cpu")
        chosen = resolve_compile_mode("auto", model, "cpu")
    assert chosen.mode == "none" and says in chosen.why

"""Number formats as no run can have them cost one line that says what to do."""

import re

import pytest
import torch
from refused import refused
from test_bad_execution import recipe

from megaresnorm.assemble import build_model
from megaresnorm.errors import ConfigError
from megaresnorm.kernels import load_backends
from megaresnorm.kernels.registry import choose_kernel
from megaresnorm.layout import check_execution
from megaresnorm.parallel.mesh import Sizes
from megaresnorm.planner.estimate import estimate
from megaresnorm.recipe.load import load_recipe

GOOD = """
model: {dim: 64, num_blocks: 4, num_heads: 4, seq_len: 32, vocab_size: 64}
data: {path: data}
train: {output: out, steps: 10, global_batch: 8}
precision: {compute: fp8}
"""
OVERRIDES = [
    # sizes that no GPU multiplies in FP8
    ("model.dim=72", "model.dim=72: precision.compute=fp8 needs columns in a multiple of 16 with parallel.tp=1"),
    ("model.dim=72", "not 72; use 80, or precision.compute=bf16"),
    ("model.ffn_dim=100", "model.ffn_dim=100: precision.compute=fp8 needs columns in a multiple of 16"),
    ("model.ffn_dim=176 parallel.tp=2", "columns in a multiple of 32 with parallel.tp=2, as GPUs multiply FP8, "
     "not 176; use 192"),
    ("model.head_dim=6", "model.num_heads=4 of model.head_dim=6: precision.compute=fp8 needs columns in a multiple"),
    ("parallel.tp=4 model.head_dim=8 model.ffn_dim=256", "model.num_heads=4 of model.head_dim=8"),
    ("model.num_heads=8 model.head_dim=4 model.num_kv_heads=1", "model.num_kv_heads=1 of model.head_dim=4: "),
    # backends
    ("precision.fp8.backend=", "precision.fp8.backend=None: wanted string"),
    # what belongs to other settings
    ("precision.fp8.scaling=delayed", "precision.fp8.scaling=delayed has no effect with precision.fp8.recipe=rowwise"),
    ("precision.fp8.recipe=mxfp8 precision.fp8.scaling=delayed", "has no effect with precision.fp8.recipe=mxfp8"),
    ("precision.fp8.recipe=tensorwise precision.fp8.history=4", "precision.fp8.history=4 has no effect with "
     "precision.fp8.scaling=current; remove it"),
    ("precision.fp8.backward=bf16 precision.fp8.weight_grad=fp8", "precision.fp8.weight_grad=fp8 has no effect with "
     "precision.fp8.backward=bf16; remove it"),
    ("precision.compute=bf16 precision.fp8.recipe=block", "precision.fp8.recipe=block has no effect with "
     "precision.compute=bf16; remove it, or set precision.compute=fp8"),
    ("precision.compute=fp32 precision.fp8.backend=torch", "precision.fp8.backend=torch has no effect with "
     "precision.compute=fp32"),
    ("precision.compute=fp64 precision.residual_dtype=fp64 precision.fp8.weight_grad=fp8", "has no effect with "
     "precision.compute=fp64"),
    ("precision.residual_dtype=fp64", "precision.residual_dtype=fp64 does not go with precision.compute=fp8; fp64 is "
     "for both or neither"),
    # blocks that stay in BF16
    ("precision.fp8.bf16_first_blocks=3", "precision.fp8.bf16_first_blocks=3 and bf16_last_blocks=1 leave none of "
     "model.num_blocks=4 in FP8; lower them, or set precision.compute=bf16"),
    ("precision.fp8.bf16_first_blocks=9 precision.fp8.bf16_last_blocks=0", "leave none of model.num_blocks=4 in FP8"),
    ("model.num_blocks=2", "precision.fp8.bf16_first_blocks=1 and bf16_last_blocks=1 leave none of model.num_blocks=2"),
    ("precision.fp8.bf16_last_blocks=-1", "precision.fp8.bf16_last_blocks=-1: wanted greater than or equal to 0"),
    # values
    ("precision.compute=e4m3", "precision.compute='e4m3': wanted one of"),
    ("precision.fp8=true", "precision.fp8"),
    ("precision.fp8=rowwise", "precision.fp8"),
    ("precision.fp8.recipe=blockwise", "'blockwise': wanted one of tensorwise, rowwise, block, mxfp8"),
    ("precision.fp8.recipe=delayed", "precision.fp8.recipe='delayed': wanted one of"),
    ("precision.fp8.backward=fp16", "precision.fp8.backward='fp16': wanted one of e4m3, e5m2, bf16"),
    ("precision.fp8.weight_grad=e5m2", "precision.fp8.weight_grad='e5m2': wanted one of bf16, fp8"),
    ("precision.fp8.recipe=tensorwise precision.fp8.scaling=delayed precision.fp8.history=0",
     "precision.fp8.history=0: wanted greater than or equal to 1"),
    ("precision.fp8.recipe=tensorwise precision.fp8.scaling=delayed precision.fp8.history=100000",
     "precision.fp8.history=100000: wanted less than or equal to 10000"),
    ("precision.fp8.margin=0", "precision.fp8.margin"),
]  # fmt: skip
PLANNED = [  # what is found when a run is planned, wherever it is to run
    ("precision.fp8.backend=cutlass", "precision.fp8.backend='cutlass': wanted one of auto, torch, emulated, te"),
    ("precision.fp8.backend=auto,te", "precision.fp8.backend='auto,te': wanted one of"),
    ("precision.fp8.recipe=mxfp8 precision.fp8.backend=torch", "precision.fp8.backend='torch': has no mxfp8 "
     "fp8_product; wanted one of auto, emulated"),
    ("precision.fp8.recipe=mxfp8 precision.fp8.backend=te", "precision.fp8.backend='te': has no mxfp8 fp8_product"),
    ("precision.fp8.backend=te", "precision.fp8.backend='te': has no rowwise fp8_product; wanted one of auto, torch, "
     "emulated"),
    ("precision.fp8.recipe=block precision.fp8.backward=e5m2 precision.fp8.backend=torch",
     "has no block-e5m2 fp8_product; wanted one of auto, emulated"),
    # what does not see through them
    ("train.compile=blocks", "train.compile=blocks: precision.compute=fp8 cannot be compiled into a block; use "
     "train.compile=none"),
    ("train.compile=cuda_graphs", "train.compile=cuda_graphs: precision.compute=fp8 cannot be compiled into a block"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "wanted"), OVERRIDES, ids=lambda v: v[:60])
def test_settings_of_fp8_that_no_run_can_have_cost_one_line(overrides, wanted, tmp_path, capfd):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    refused(["train", "--dry-run", path, *overrides.split(" ")], wanted, tmp_path, capfd)


@pytest.mark.parametrize(("overrides", "wanted"), PLANNED, ids=lambda v: v[:60])
def test_what_cannot_multiply_or_compile_costs_one_line_when_a_run_is_planned(overrides, wanted, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    with pytest.raises(ConfigError) as error:
        estimate(load_recipe(path, overrides.split(" ")), with_data=False)
    assert wanted in str(error.value) and "\n" not in str(error.value)


def fp8(**settings):
    model = {"dim": 32, "num_blocks": 3, "num_heads": 2, "seq_len": 16}
    return recipe(model=model, precision={"compute": "fp8", "fp8": settings})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"recipe": "block", "backend": "torch"}, r"cannot run on cpu: torch \S+ has no block product"),
        ({"recipe": "block", "backend": "te"}, "cannot run on cpu: made for NVIDIA GPUs"),
        ({"recipe": "mxfp8", "backend": "torch"}, "has no mxfp8 fp8_product"),
        ({"recipe": "rowwise", "backend": "te"}, "has no rowwise fp8_product"),
        ({"backend": "nvidia"}, "wanted one of auto, torch, emulated, te"),
    ],
)
def test_a_backend_without_the_form_here_is_refused_when_a_model_is_built(settings, says):
    given = fp8(**settings)
    with pytest.raises(ConfigError, match=rf"precision\.fp8\.backend='?{settings['backend']}'?.*{says}") as error:
        build_model(given.model, given.precision)
    assert "\n" not in str(error.value)


def test_a_package_that_is_not_installed_is_named():
    load_backends()
    with pytest.raises(ConfigError, match=r"precision\.fp8\.backend=te cannot run on cuda: ") as error:
        choose_kernel(
            "fp8_product", "te", torch.device("cuda"), torch.bfloat16, "block", setting="precision.fp8.backend"
        )
    assert re.search("is not installed|sees no GPU|needs", str(error.value)) and "\n" not in str(error.value)


def test_auto_compiles_no_fp8_and_says_why():
    given = fp8()
    built = build_model(given.model, given.precision, compiled="auto")
    assert built.compiled == "none" and built.backends["fp8_product"] in ("emulated", "torch")
    assert "auto: precision.compute=fp8 cannot be compiled into a block" in built.kernel_choices["compile"]
    for mode in ("auto", "none"):
        train = given.train.model_copy(update={"compile": mode})
        check_execution(given.model_copy(update={"train": train}), Sizes(), "cuda")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recipe": "tensorwise", "scaling": "delayed", "history": 4, "weight_grad": "fp8"},
        {"recipe": "block", "backward": "e5m2"},
        {"recipe": "mxfp8", "backend": "emulated", "bf16_first_blocks": 0, "bf16_last_blocks": 0},
        {"backward": "bf16"},
    ],
)
def test_what_can_be_is_not_refused(settings):
    given = fp8(**settings)
    assert build_model(given.model, given.precision).backends["fp8_product"] in ("emulated", "torch")

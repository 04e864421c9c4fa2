"""Every architecture holds our models: logits of both on 2,000 tokens, and the way back bit for bit."""

import json
import logging
import weakref
from math import inf, nan
from pathlib import Path

import pytest
import torch
from models import ASKED_FOR, GEMMA, MODELS, recipe_of, save_random

from megaresnorm.checkpoint.inspect import compare_tensors
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.cli import main
from megaresnorm.convert.compare import (
    compare,
    kept_logits_on,
    load_theirs,
    logits_on,
    of_ours,
    of_theirs,
)
from megaresnorm.convert.export import ExportSettings
from megaresnorm.convert.families import FAMILIES
from megaresnorm.convert.files import CONFIG
from megaresnorm.convert.from_hf import from_hf
from megaresnorm.convert.links import links
from megaresnorm.convert.match import match_family
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.prompts import random_prompts
from megaresnorm.convert.to_hf import to_hf
from megaresnorm.errors import CheckpointError, ConfigError, ConversionError

logging.getLogger("transformers").setLevel(logging.ERROR)
BAR = 5e-6  # of the largest logit, in FP32
# A few hundred bytes, so that even these tensors are read and written in several chunks.
LITTLE = 8 * 300


def exported(name: str, folder: Path, *, dtype: torch.dtype | None = None, verify: bool = True) -> tuple[Path, object]:
    arch, settings = MODELS[name]
    checkpoint = save_random(folder / "run" / "checkpoints", recipe_of(settings))
    asked = arch if name in ASKED_FOR else "auto"
    settings = ExportSettings(dtype=dtype, max_memory=LITTLE)
    report = to_hf(checkpoint, folder / "hf", arch=asked, tolerance=BAR, verify=verify, settings=settings)
    assert report.match.family.name == arch
    return checkpoint, report


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_and_the_way_back_is_bit_for_bit(name, tmp_path):
    """Where constants are folded into weights, the way back rounds those once more."""
    checkpoint, report = exported(name, tmp_path)
    assert report.agreement.tokens >= 2000 and report.agreement.relative <= BAR and report.agreement.clear_top1 == 1.0
    back = from_hf(tmp_path / "hf", tmp_path / "back", max_memory=LITTLE, tolerance=BAR)
    assert back.agreement.tokens >= 2000 and back.agreement.passed
    print(f"\n{name} | {report.match.family.name} | {report.agreement.relative:.1e} | {back.agreement.relative:.1e}")
    differences = list(compare_tensors(Checkpoint(checkpoint), Checkpoint(back.checkpoint), lambda: None))
    folded = {f"weights {name}" for name in NativeModel(checkpoint).table if report.match.factor(name) != 1.0}
    assert all(d.name in folded and d.largest <= 2e-7 * d.scale for d in differences)
    assert report.match.fold is not None or not differences
    assert back.model == recipe_of(MODELS[name][1]).model
    assert [note for note in back.notes if "has no tokenizer" not in note] == list(report.match.notes)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if i % 3 == 0 else [pytest.mark.slow]) for i, name in enumerate(MODELS)]
)
def test_a_model_that_others_have_made_is_read(name, tmp_path):
    """Without what we add to config.json, and saved by Transformers itself, in BF16 in every second case."""
    _, report = exported(name, tmp_path, verify=False)
    dtype = torch.bfloat16 if len(name) % 2 else torch.float32
    model = load_theirs(tmp_path / "hf", dtype)
    del model.config.megaresnorm
    model.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    back = from_hf(tmp_path / "theirs", tmp_path / "back", max_memory=LITTLE, tolerance=BAR)
    assert back.agreement.passed and back.agreement.tokens >= 2000
    again = to_hf(
        back.checkpoint,
        tmp_path / "again",
        arch=report.match.family.name,
        tolerance=BAR,
        settings=ExportSettings(dtype=dtype),
    )
    assert again.match.family is back.family
    before, after = (_tensors(p) for p in (tmp_path / "theirs", tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from megaresnorm.convert.files import Weights

    weights = Weights(folder)
    return {name: weights.read(name, tuple((0, size) for size in weights.shape(name))) for name in weights.tensors}


@pytest.mark.parametrize("spoilt", ["alpha", "swapped q and k", "interleaved heads", "shifted norms"])
def test_verification_fails_what_is_wrong(spoilt, tmp_path, monkeypatch):
    """Negative controls: nothing is kept of a model that does not compute the same."""
    from megaresnorm.convert import links as module
    from megaresnorm.convert import match as planning

    settings = {"topology": "deepnorm"}
    checkpoint = save_random(tmp_path / "run" / "checkpoints", recipe_of(settings))
    family = next(f for f in FAMILIES if f.name == "minimax")
    if spoilt == "alpha":
        honest = type(family).config
        monkeypatch.setattr(
            type(family), "config", lambda self, recipe: honest(self, recipe) | {"mlp_alpha_factor": 1.01 * 6**0.25}
        )
        monkeypatch.setattr(planning, "mismatches", lambda one, recipe: {} if one is family else {"topology": (1, 2)})
    else:
        honest_links = links

        def swapped(*arguments):
            pair = {
                "swapped q and k": ("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
                "interleaved heads": ("self_attn.q_proj.weight", "self_attn.q_proj.weight"),
                "shifted norms": ("layers.1.input_layernorm.weight", "layers.2.input_layernorm.weight"),
            }[spoilt]
            for link in honest_links(*arguments):
                one, other = pair
                name = link.theirs.replace(one, other) if link.theirs.endswith(one) else (
                    link.theirs.replace(other, one) if link.theirs.endswith(other) else link.theirs
                )  # fmt: skip
                rows = link.rows
                if spoilt == "interleaved heads" and link.theirs.endswith(one):
                    rows = torch.arange(rows.start, rows.stop).view(-1, 2, 4).transpose(1, 2).flatten()
                yield module.Link(name, link.ours, rows, link.shape, link.transposed, link.factor)

        monkeypatch.setattr("megaresnorm.convert.export.links", swapped)
    with pytest.raises(ConversionError, match="FAIL: the written model does not compute the same"):
        to_hf(checkpoint, tmp_path / "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("multiplier", [1e-37, 0.01, 0.9, 1.5, 2.0, 1e38])
def test_any_factor_on_scores_can_be_exported(multiplier, tmp_path):
    for settings in ({"topology": "keel"}, {**GEMMA, "topology": "sandwich"}):
        assert match_family(recipe_of({**settings, "attention_multiplier": multiplier}).model).family.name


def test_a_class_that_fixes_eps_says_how_much_that_changes(tmp_path):
    _, report = exported("opt deepnorm", tmp_path)
    assert report.match.notes == ("eps of all norms is 1e-05 instead of 4.08e-06",)
    assert "eps of all norms is 1e-05" in (tmp_path / "hf" / "README.md").read_text()
    assert 0 < report.agreement.relative <= BAR


@pytest.mark.parametrize(
    ("arch", "settings", "wanted"),
    [
        ("llama", {"topology": "deepnorm"}, "model.topology is deepnorm"),
        ("llama", {"topology": "pre", "norm": "layernorm"}, "model.norm is 'layernorm', there it is 'rmsnorm'"),
        (
            "llama",
            {"topology": "pre", "dim": 32, "num_heads": 6},
            "model.num_heads is 6, there it is 'a divisor of 32'",
        ),
        ("qwen2", {"topology": "pre", "head_dim": 8, "attention_bias": "qkv"}, "model.head_dim is 8, there it is 4"),
        (
            "minimax",
            {"topology": "deepnorm", "embedding_norm": False},
            "model.embedding_norm is False, there it is True",
        ),
        ("granite", {"topology": "keel", "head_dim": 4}, "model.topology is keel"),
        ("lama", {"topology": "pre"}, "did you mean llama"),
    ],
)
def test_an_architecture_that_does_not_hold_a_model_is_refused_with_the_setting(arch, settings, wanted):
    with pytest.raises(ConfigError, match="--arch") as error:
        match_family(recipe_of(settings).model, arch)
    assert wanted in str(error.value)


@pytest.mark.parametrize("name", ["minimax", "llama from lns"])
def test_weights_rounded_to_bf16_are_compared_as_such(name, tmp_path):
    """Where constants are folded into them, those are rounded that have them."""
    _, report = exported(name, tmp_path, dtype=torch.bfloat16)
    assert report.agreement.relative <= BAR and 1e-4 < report.rounding.relative < 0.1
    config = json.loads((tmp_path / "hf" / CONFIG).read_text())
    assert config["dtype"] == "bfloat16"


def test_models_that_are_compared_are_in_memory_one_after_the_other(tmp_path, monkeypatch):
    checkpoint, _ = exported("llama", tmp_path, verify=False)
    alive, count = weakref.WeakSet(), 0

    def one_at_a_time(make):
        def made(*arguments, **settings):
            nonlocal count
            assert not alive
            model = make(*arguments, **settings)
            alive.add(model)
            count += 1
            return model

        return made

    monkeypatch.setattr(NativeModel, "model", one_at_a_time(NativeModel.model))
    for module in ("models", "to_hf", "from_hf"):
        monkeypatch.setattr(f"megaresnorm.convert.{module}.load_theirs", one_at_a_time(load_theirs))
    to_hf(
        checkpoint, tmp_path / "rounded", settings=ExportSettings(dtype=torch.bfloat16)
    )  # which compares with ours as it was, too
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert main(["convert", "compare", str(checkpoint), str(tmp_path / "hf")]) == 0
    assert main(["convert", "compare", str(tmp_path / "hf"), str(checkpoint)]) == 0
    assert count == 3 + 2 + 2 + 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([inf, 0.0], [5.0, 0.0]),
        ([3.0, -inf], [9.0, 0.0]),
        ([5.0, 0.0], [inf, 0.0]),
        ([inf, 0.0], [inf, 0.0]),
        ([nan, 0.0], [1.0, 0.0]),
    ],
)
def test_logits_that_are_no_numbers_never_pass(one, other):
    assert not compare(*([torch.tensor([[values, [1.0, 2.0]]])] for values in (one, other))).passed


def test_a_refused_comparison_leaves_gradients_on():
    prompts = [torch.zeros(1, 3, dtype=torch.int64)] * 2
    streams = [logits_on(prompts, lambda tokens, v=v: torch.ones(*tokens.shape, v)) for v in (4, 5)]
    with pytest.raises(CheckpointError, match="logits of 4 and 5 tokens"):
        compare(*streams)
    del streams
    assert torch.is_grad_enabled()


def test_dropout_is_that_of_the_model(tmp_path):
    """Transformers' GPT-2 has 0.1 where its config.json says nothing."""
    recipe = recipe_of({**MODELS["gpt2"][1], "dropout": 0.2})
    report = to_hf(save_random(tmp_path / "checkpoints", recipe), tmp_path / "hf", verify=False)
    config = json.loads((tmp_path / "hf" / CONFIG).read_text())
    assert report.match.family.name == "gpt2"
    assert (config["resid_pdrop"], config["embd_pdrop"], config["attn_pdrop"]) == (0.2, 0.2, 0.0)


def test_comparison_would_see_one_wrong_number(tmp_path):
    checkpoint, _ = exported("llama", tmp_path, verify=False)
    native = NativeModel(checkpoint)
    model, prompts = native.model(), random_prompts(37, 32)
    theirs = kept_logits_on(prompts, lambda: of_theirs(load_theirs(tmp_path / "hf")))
    assert compare(logits_on(prompts, of_ours(model)), theirs, BAR).passed
    with torch.no_grad():
        model.blocks["1"].ffn.branch.down.weight[3, 5] += 0.02
    assert not compare(logits_on(prompts, of_ours(model)), theirs, BAR).passed

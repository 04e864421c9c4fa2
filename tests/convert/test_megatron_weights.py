"""Weights in the form of megatron-core's GPTModel: it computes the same from them, and what it saves is read."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import recipe_of, save_random
from safetensors.torch import load_file, save_file

from megaresnorm.checkpoint.inspect import compare_tensors
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.cli import main
from megaresnorm.convert.compare import of_ours
from megaresnorm.convert.export import ExportSettings, to_megatron
from megaresnorm.convert.from_hf import from_hf
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.to_hf import to_hf
from megaresnorm.data.tokenizer import ByteTokenizer
from megaresnorm.errors import CheckpointError, ConfigError

MODELS = {
    "llama": {"topology": "pre"},
    "qkv biases, half rotary, norms of heads, tied": {
        "topology": "pre", "attention_bias": "qkv", "rope_fraction": 0.5, "qk_norm": "head", "tied_embeddings": True,
    },
    "gpt": {"topology": "pre", "norm": "layernorm", "ffn": "gelu", "bias": True, "positions": "learned"},
    "relu": {"topology": "pre_scaled", "norm": "layernorm", "ffn": "relu", "bias": True},
    "one key for each query": {"topology": "pre", "num_kv_heads": 6, "ffn": "geglu", "rope_theta": 5000.0},
}  # fmt: skip
# Its local norms have no form of these.
OF_ENGINE = {"zero-centred": {"topology": "pre", "norm_zero_centered": True, "norm": "layernorm"}}
has_megatron = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")


@has_megatron
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if i % 2 == 0 else [pytest.mark.slow]) for i, name in enumerate(MODELS)]
)
def test_megatron_computes_the_same_and_comes_back(name, tmp_path):
    recipe = recipe_of({**MODELS[name], "vocab_multiple": 64})
    checkpoint = save_random(tmp_path / "run" / "checkpoints", recipe)
    to_megatron(checkpoint, tmp_path / "megatron", implementation="local", settings=ExportSettings(max_memory=3000))
    tokens = torch.randint(37, (8, 32))
    save_file({"tokens": tokens}, tmp_path / "tokens")
    program = [sys.executable, str(Path(__file__).with_name("megatron_model.py"))]
    arguments = [str(tmp_path / one) for one in ("megatron", "saved", "tokens", "logits")]
    found = subprocess.run([*program, *arguments], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    theirs = load_file(tmp_path / "logits")["logits"]
    with torch.no_grad():
        ours = of_ours(NativeModel(checkpoint).model())(tokens)
    assert (ours - theirs).abs().max() <= 5e-6 * ours.abs().max()
    back = from_hf(tmp_path / "saved", tmp_path / "back", max_memory=3000)
    assert back.agreement is None
    assert list(compare_tensors(Checkpoint(checkpoint), Checkpoint(back.checkpoint), lambda: None)) == []


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
@pytest.mark.parametrize("name", MODELS | OF_ENGINE)
def test_both_kinds_of_layers_come_back_bit_for_bit(name, implementation, tmp_path, capsys):
    recipe = recipe_of((MODELS | OF_ENGINE)[name])
    checkpoint = save_random(tmp_path / "run" / "checkpoints", recipe)
    command = ["convert", "to-megatron", str(checkpoint), str(tmp_path / "megatron")]
    if name in OF_ENGINE and implementation == "local":
        assert main([*command, "--transformer-impl", implementation]) == 2
        assert "model.norm_zero_centered is True (wanted False)" in capsys.readouterr().err
        return
    assert main([*command, "--transformer-impl", implementation]) == 0
    names = load_file(tmp_path / "megatron" / "model.safetensors").keys()
    norm = {
        "local": "decoder.layers.2.pre_mlp_layernorm.weight",
        "transformer_engine": "decoder.layers.2.mlp.linear_fc1.layer_norm_weight",
    }
    assert norm[implementation] in names and "decoder.layers.0.self_attention.linear_qkv.weight" in names
    assert main(["convert", "from-megatron", str(tmp_path / "megatron"), str(tmp_path / "back")]) == 0
    assert "not verified" in capsys.readouterr().out
    back = tmp_path / "back" / "checkpoints" / "step-00000000"
    assert list(compare_tensors(Checkpoint(checkpoint), Checkpoint(back), lambda: None)) == []
    assert NativeModel(back).recipe == recipe.model


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"topology": "deepnorm"}, "model.topology is deepnorm"),
        ({"topology": "pre", "logit_softcap": 5.0}, "model.logit_softcap is 5.0"),
        ({"topology": "pre", "rope_scaling": {"kind": "linear", "factor": 2.0}}, "model.rope_scaling"),
        ({"topology": "pre", "qk_norm": "full"}, "model.qk_norm is 'full'"),
    ],
)
def test_what_megatron_does_not_have_is_refused(settings, wanted, tmp_path):
    checkpoint = save_random(tmp_path / "run" / "checkpoints", recipe_of(settings))
    with pytest.raises(ConfigError) as error:
        to_megatron(checkpoint, tmp_path / "megatron")
    assert wanted in str(error.value) and not (tmp_path / "megatron").exists()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"rotary_interleaved": True}, "rotary_interleaved=True has no counterpart"),
        ({"num_moe_experts": 8}, "num_moe_experts=8 is not a field that is known"),
        ({"transformer_impl": "local"}, "has no tensor decoder.layers.0.input_layernorm.weight"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"transformer_impl": "inference_optimized"}, "wanted 'local'; or transformer_impl='inference_optimized'"),
        ({"activation_func": "quick_gelu"}, "activation_func='quick_gelu'"),
        ({"normalization": "L2Norm"}, "normalization='L2Norm'"),
    ],
)
def test_what_we_do_not_have_is_refused(changes, wanted, tmp_path, capsys):
    checkpoint = save_random(tmp_path / "run" / "checkpoints", recipe_of({"topology": "pre"}))
    to_megatron(checkpoint, tmp_path / "megatron")
    path = tmp_path / "megatron" / "config.json"
    config = json.loads(path.read_text()) | changes
    del config["megaresnorm"]
    path.write_text(json.dumps(config))
    assert main(["convert", "from-megatron", str(tmp_path / "megatron"), str(tmp_path / "back")]) == 4
    assert wanted in capsys.readouterr().err and not (tmp_path / "back").exists()


def test_buffers_of_bytes_and_truth_values_are_passed_over(tmp_path):
    """Which Transformer Engine and old versions of Transformers save."""
    checkpoint = save_random(tmp_path / "run" / "checkpoints", recipe_of({"topology": "pre"}))
    to_megatron(checkpoint, tmp_path / "megatron")
    path = tmp_path / "megatron" / "model.safetensors"
    more = {
        "decoder.layers.0.self_attention.linear_qkv._extra_state": torch.zeros(0, dtype=torch.uint8),
        "decoder.layers.1.attn.bias": torch.ones(2, 2, dtype=torch.bool),
    }
    save_file(load_file(path) | more, path)
    back = from_hf(tmp_path / "megatron", tmp_path / "back")
    assert list(compare_tensors(Checkpoint(checkpoint), Checkpoint(back.checkpoint), lambda: None)) == []
    save_file(load_file(path) | {"decoder.more": torch.zeros(1, dtype=torch.uint8)}, path)
    with pytest.raises(CheckpointError, match=r"decoder\.more is U8"):
        from_hf(tmp_path / "megatron", tmp_path / "again")


def test_a_tokenizer_can_be_left_out_and_its_end_be_named(tmp_path, capsys):
    settings = recipe_of({"topology": "pre", "vocab_size": 257})
    checkpoint = save_random(tmp_path / "run" / "checkpoints", settings, ByteTokenizer())
    command = ["convert", "to-megatron", str(checkpoint)]
    assert (
        main([*command, str(tmp_path / "with")]) == 0
        and main([*command, str(tmp_path / "without"), "--tokenizer", "none"]) == 0
    )
    assert (tmp_path / "with" / "tokenizer.json").exists() and not (tmp_path / "without" / "tokenizer.json").exists()
    command = ["convert", "from-megatron", str(tmp_path / "with")]
    assert main([*command, str(tmp_path / "back"), "--tokenizer", "none"]) == 0
    assert NativeModel(tmp_path / "back").tokenizer() is None
    capsys.readouterr()
    assert main([*command, str(tmp_path / "again"), "--end-token", "x"]) == 2
    assert "--end-token x has no effect" in capsys.readouterr().err
    to_hf(checkpoint, tmp_path / "hf", verify=False)
    assert main(["convert", "from-megatron", str(tmp_path / "hf"), str(tmp_path / "wrong")]) == 2
    assert "holds weights of Transformers; use megaresnorm convert from-hf" in capsys.readouterr().err

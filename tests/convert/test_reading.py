"""Models as they are found: old configurations, files without a prefix, buffers, windows, stretched positions."""

import json
from pathlib import Path

import pytest
import torch
from models import GEMMA, GPT, recipe_of, save_random
from safetensors.torch import load_file, save_file

from megaresnorm.cli import main
from megaresnorm.convert.from_hf import from_hf
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.to_hf import to_hf
from megaresnorm.generate import load_model
from megaresnorm.model.rotary import rotary_tables
from megaresnorm.recipe import ModelRecipe, RopeScaling
from megaresnorm.recipe.load import load_recipe


def exported(folder: Path, settings: dict, arch: str = "auto") -> Path:
    checkpoint = save_random(folder / "run" / "checkpoints", recipe_of(settings))
    to_hf(checkpoint, folder / "hf", arch=arch, verify=False)
    return folder / "hf"


def change(folder: Path, **values) -> dict:
    config = json.loads((folder / "config.json").read_text())
    config.pop("megaresnorm", None)
    config |= values
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize(
    ("settings", "arch", "old", "found"),
    [
        ({"topology": "pre"}, "llama", {"rope_theta": 500.0, "torch_dtype": "float32", "dtype": ...},
         {"rope_theta": 500.0}),
        (
            {"topology": "pre"},
            "llama",
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 500.0, "rope_scaling": RopeScaling(kind="linear", factor=2.0)},
        ),
        (
            {**GPT, "topology": "pre", "positions": "rope", "ffn": "gelu", "rope_fraction": 0.5},
            "gpt_neox",
            {"rotary_pct": 0.5, "rotary_emb_base": 700},
            {"rope_theta": 700.0, "rope_fraction": 0.5},
        ),
        ({"topology": "sandwich", "rope_fraction": 0.5}, "glm4", {"partial_rotary_factor": 0.5},
         {"rope_fraction": 0.5}),
    ],
)  # fmt: skip
def test_configurations_of_older_versions(settings, arch, old, found, tmp_path):
    folder = exported(tmp_path, settings, arch)
    change(folder, rope_parameters=..., **old)
    back = from_hf(folder, tmp_path / "back", tolerance=5e-6)
    assert {key: getattr(back.model, key) for key in found} == found


# As they stand beside published weights, but for their sizes, which are those of the model of the test.
PUBLISHED = {
    "Llama-3.1": (
        "llama",
        {"topology": "pre"},
        {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": [2, 3],
            "hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": False, "pretraining_tp": 1,
            "rope_theta": 500000.0, "torch_dtype": "bfloat16",
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
                "rope_type": "llama3",
            },
            "transformers_version": "4.43.0.dev0", "use_cache": True,
        },
    ),
    "SmolLM2": (
        "llama",
        {"topology": "pre", "tied_embeddings": True},
        {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None,
         "transformers.js_config": {"dtype": "q4"}},
    ),
    "Qwen2.5": (
        "qwen2",
        {"topology": "pre", "attention_bias": "qkv", "head_dim": 4},
        {"max_window_layers": 21, "sliding_window": 32, "use_mrope": False, "use_sliding_window": False,
         "rope_theta": 1000000.0},
    ),
    "Qwen3": (
        "qwen3",
        {"topology": "pre", "qk_norm": "head"},
        {"max_window_layers": 28, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
         "use_sliding_window": False},
    ),
    "Gemma-2": (
        "gemma2",
        {**GEMMA, "attention_softcap": 50.0, "logit_softcap": 30.0, "tied_embeddings": True},
        {
            "cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "sliding_window_size": 32, "sliding_window": 32,
            "rope_theta": 10000.0, "layer_types": ...,
        },
    ),
    "GPT-2": (
        "gpt2",
        {**GPT, "topology": "pre", "tied_embeddings": True},
        {
            "n_ctx": 32, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
            "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "n_inner": ...,
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        },
    ),
    "StarCoder2": (
        "starcoder2",
        {**GPT, "topology": "pre", "positions": "rope", "tied_embeddings": True},
        {
            "activation_function": "gelu", "attention_softmax_in_fp32": True, "layer_norm_epsilon": 1e-05,
            "mlp_type": "default", "norm_type": "layer_norm", "scale_attention_softmax_in_fp32": True,
            "scale_attn_weights": True, "sliding_window": 32, "rope_theta": 999999.0, "embedding_dropout": 0.1,
            "residual_dropout": 0.1,
        },
    ),
    "OPT": (
        "opt",
        {**GPT, "topology": "pre", "ffn": "relu", "tied_embeddings": True},
        {"activation_dropout": 0.0, "layerdrop": 0.0, "prefix": "</s>", "dropout": 0.1, "torch_dtype": "float16"},
    ),
    "Granite-3": (
        "granite",
        {"topology": "pre", "topology_options": {"gate": 0.22}, "head_dim": 4, "embedding_multiplier": 12.0,
         "logits_scaling": 8.0},
        {"attention_dropout": 0.1, "mlp_bias": False, "rope_scaling": None, "rope_theta": 5000000.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_as_they_are_published(name, tmp_path):
    arch, settings, config = PUBLISHED[name]
    folder = exported(tmp_path, settings, arch)
    old = {"rope_parameters": ...} if settings.get("positions", "rope") == "rope" else {}
    change(folder, **old, **config)
    assert from_hf(folder, tmp_path / "back", tolerance=5e-6).agreement.passed


def test_a_tokenizer_that_cannot_be_read_is_told(tmp_path, capsys):
    folder = exported(tmp_path, {**GPT, "topology": "pre", "tied_embeddings": True}, "gpt2")
    for file in ("vocab.json", "merges.txt"):
        (folder / file).write_text("{}")
    command = ["convert", "from-hf", str(folder), str(tmp_path / "back")]
    assert main(command) == 3
    assert "vocab.json: wanted GPT-2's vocab.json and merges.txt" in capsys.readouterr().err
    for file in ("vocab.json", "merges.txt"):
        (folder / file).unlink()
    assert main(command) == 0
    assert "has no tokenizer that is read" in " ".join(capsys.readouterr().out.split())


def test_our_own_code_can_have_shorter_sequences_too(tmp_path):
    folder = exported(tmp_path, {"topology": "keel"})
    back = from_hf(folder, tmp_path / "back", seq_len=8, tolerance=5e-6)
    assert back.model.seq_len == 8 and back.model.topology == "keel"


def test_files_without_the_prefix_and_with_buffers_as_the_first_gpt2_has_them(tmp_path):
    folder = exported(tmp_path, {**GPT, "topology": "pre", "tied_embeddings": True}, "gpt2")
    before = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): t for name, t in before.items()}
    for block in range(3):
        tensors[f"h.{block}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    tensors["lm_head.weight"] = before["transformer.wte.weight"].clone()  # a tied matrix that was saved twice
    save_file(tensors, folder / "model.safetensors")
    assert from_hf(folder, tmp_path / "back", tolerance=5e-6).agreement.passed


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("gemma2", GEMMA),
        ("mistral", {"topology": "pre"}),
        ("olmo3", {"topology": "reordered", "qk_norm": "full", "head_dim": 4}),
        ("qwen3", {"topology": "pre", "qk_norm": "head"}),
    ],
)
def test_a_window_is_refused_unless_no_sequence_is_longer(arch, settings, tmp_path, capsys):
    folder = exported(tmp_path, settings, arch)
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]} if arch != "mistral" else {}
    used = {"use_sliding_window": True} if arch == "qwen3" else {}
    change(folder, sliding_window=12, **kinds, **used)
    command = ["convert", "from-hf", str(folder), str(tmp_path / "back")]
    assert main(command) == 4
    assert "sliding_window=12 is shorter than max_position_embeddings=32" in capsys.readouterr().err
    back = from_hf(folder, tmp_path / "back", seq_len=12, tolerance=5e-6)
    assert back.model.seq_len == 12 and back.agreement.passed and back.agreement.tokens >= 2000


def test_a_window_as_long_as_the_longest_sequence_does_nothing(tmp_path):
    folder = exported(tmp_path, GEMMA, "gemma2")
    change(folder, sliding_window=32, layer_types=["sliding_attention"] * 3)
    assert from_hf(folder, tmp_path / "back", tolerance=5e-6).agreement.passed


def test_rotary_bases_that_differ_between_layers_are_refused(tmp_path, capsys):
    folder = exported(tmp_path, {**GEMMA, "qk_norm": "head"}, "gemma3_text")
    one, other = ({"rope_type": "default", "rope_theta": theta} for theta in (10000.0, 1e6))
    change(
        folder,
        rope_parameters={"sliding_attention": one, "full_attention": other},
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        sliding_window=32,
    )
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "back")]) == 4
    assert "differ between layers" in capsys.readouterr().err


@pytest.mark.parametrize("seq_len", [64, 8])
def test_the_longest_sequence_can_be_shorter_but_not_longer(seq_len, tmp_path, capsys):
    folder = exported(tmp_path, {"topology": "deepnorm"})
    command = ["convert", "from-hf", str(folder), str(tmp_path / "back"), "--seq-len", str(seq_len)]
    assert main(command) == (2 if seq_len > 32 else 0)
    if seq_len > 32:
        assert "is above max_position_embeddings=32" in capsys.readouterr().err
    else:
        assert NativeModel(tmp_path / "back").recipe.seq_len == 8
    folder = exported(tmp_path / "learned", {**GPT, "topology": "pre"})
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "x"), "--seq-len", "8"]) == 2
    assert "gpt2 has learned positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("linear", {"factor": 4.0}),
        ("llama3",
         {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32768}),
        ("yarn", {"factor": 16.0, "original_max_position_embeddings": 4096, "beta_fast": 20.0, "truncate": False}),
        ("yarn", {"factor": 40.0, "original_max_position_embeddings": 4096, "attention_factor": 1.5}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_stretched_frequencies_of_published_sizes_are_those_of_transformers(kind, theirs, fraction):
    """Their frequencies are in FP32; ours are in FP64 until the tables are made."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": kind, "rope_theta": 500000.0, "partial_rotary_factor": fraction, **theirs}
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072, rope_parameters=rope)
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    named = {"original_max_position_embeddings": "original_seq_len"}
    scaling = RopeScaling(kind=kind, **{named.get(key, key): value for key, value in theirs.items()})
    recipe = ModelRecipe(
        dim=4096,
        num_blocks=1,
        num_heads=32,
        seq_len=8,
        rope_theta=500000.0,
        rope_fraction=fraction,
        rope_scaling=scaling,
    )
    cos, sin = rotary_tables(recipe, 2, torch.float64, torch.device("cpu"))
    count = int(128 * fraction) // 2
    torch.testing.assert_close(cos[1, :count], frequencies.double().cos() * factor, rtol=0, atol=3e-7)
    torch.testing.assert_close(sin[1, 64 : 64 + count], frequencies.double().sin() * factor, rtol=0, atol=3e-7)
    assert (cos[1, count:64] == 1).all() and (sin[1, count:64] == 0).all()


def test_a_converted_model_generates_and_compares_by_the_command_line(tmp_path, capsys):
    folder = exported(tmp_path, {"topology": "deepnorm"})
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "back"), "--data", "runs/text"]) == 0
    out = capsys.readouterr().out
    assert "PASS" in out and f"train on  megaresnorm train {tmp_path / 'back' / 'recipe.yaml'}\n" in out
    assert load_recipe(tmp_path / "back" / "recipe.yaml").data.path == "runs/text"
    assert main(["convert", "compare", str(tmp_path / "back"), str(folder)]) == 0
    assert main(["convert", "compare", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out.count("PASS") == 2
    other = save_random(tmp_path / "other" / "checkpoints", recipe_of({"topology": "deepnorm"}), spread=0.11)
    assert main(["convert", "compare", str(folder), str(other)]) == 7
    assert "FAIL" in capsys.readouterr().out
    small = save_random(tmp_path / "small" / "checkpoints", recipe_of({"topology": "deepnorm", "vocab_size": 36}))
    assert main(["convert", "compare", str(folder), str(small)]) == 4
    assert "they are not the same model" in capsys.readouterr().err


def test_compare_takes_texts(tmp_path, capsys):
    from megaresnorm.data.tokenizer import ByteTokenizer

    settings = {"topology": "pre", "vocab_size": 257}
    save_random(tmp_path / "run" / "checkpoints", recipe_of(settings), ByteTokenizer())
    to_hf(tmp_path / "run", tmp_path / "hf", verify=False)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one text\n\nanother, ünlike the first\n")
    command = ["convert", "compare", str(tmp_path / "run"), str(tmp_path / "hf"), "--prompts", str(prompts)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "PASS" in out and f"{len(b'one text') + len('another, ünlike the first'.encode()) + 2}" in out
    prompts.write_text("0123456789\n" * 300)  # too many for all logits of a model to be kept
    assert main(command) == 0 and f"{300 * 11:,}" in capsys.readouterr().out
    prompts.write_text("\n")
    assert main(command) == 2 and "has no line of text" in capsys.readouterr().err
    assert (
        main(["convert", "compare", str(tmp_path / "hf"), str(tmp_path / "hf"), "--prompts", str(tmp_path / "x")]) == 2
    )
    prompts.write_text("text\n")
    assert main(["convert", "compare", str(tmp_path / "hf"), str(tmp_path / "hf"), "--prompts", str(prompts)]) == 2
    assert "needs a checkpoint of ours with a tokenizer" in capsys.readouterr().err
    model, tokenizer = load_model(from_hf(tmp_path / "hf", tmp_path / "back").checkpoint)
    assert tokenizer.describe() == {"kind": "bytes"} and model.recipe.vocab_size == 257

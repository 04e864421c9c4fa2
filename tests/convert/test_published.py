"""Published configurations with what their mirrors add to them; harmful fields are refused by name."""

import json

import pytest
import torch
from models import GPT, recipe_of, save_random
from safetensors.torch import load_file, save_file

from megaresnorm.cli import main
from megaresnorm.convert.config_json import normalized
from megaresnorm.convert.describe import described
from megaresnorm.convert.from_hf import from_hf
from megaresnorm.convert.to_hf import to_hf

GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "initializer_range": 0.02, "model_type": "llama",
    "torch_dtype": "float16", "use_cache": True, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
}  # fmt: skip
QWEN = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "use_cache": True, "rms_norm_eps": 1e-06, "use_sliding_window": False,
}  # fmt: skip
# Marks of conversions, fine-tuning and quantizing tools, of libraries, and of former versions of Transformers.
MARKS = {"_name_or_path": "/home/someone/model", "unsloth_version": "2025.3.19", "unsloth_fixed": True,
         "_commit_hash": None, "transformers.js_config": {"dtype": "q4"}, "quantization_config": None,
         "model_creator": "somebody", "rope_type": None, "alibi": False, "is_decoder": False}  # fmt: skip
# name -> config.json, --seq-len, and what our model of it has
PUBLISHED = {
    "gpt2": (GPT2 | {"n_embd": 768, "n_head": 12, "n_layer": 12}, None, {"dim": 768, "num_blocks": 12}),
    "gpt2-medium": (
        GPT2 | {"n_embd": 1024, "n_head": 16, "n_layer": 24, "n_special": 0, "predict_special_tokens": True},
        None, {"dim": 1024, "num_blocks": 24},
    ),
    "gpt2-large": (
        GPT2 | {"n_embd": 1280, "n_head": 20, "n_layer": 36, "n_special": 0, "predict_special_tokens": True},
        None, {"dim": 1280, "num_blocks": 36},
    ),
    "gpt2-xl": (
        GPT2 | {"n_embd": 1600, "n_head": 25, "n_layer": 48, "n_special": 0, "predict_special_tokens": True,
                "output_past": True},
        None, {"dim": 1600, "num_heads": 25, "num_blocks": 48},
    ),
    "Llama-2-7b": (
        LLAMA | {"bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 11008,
                 "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
                 "num_key_value_heads": 32, "pretraining_tp": 1, "rope_scaling": None, "vocab_size": 32000,
                 "pad_token_id": 0, "max_sequence_length": None, "attention_bias": None, "mlp_bias": None},
        None, {"dim": 4096, "seq_len": 4096, "ffn_dim": 11008, "bias": False, "attention_bias": "none"},
    ),
    "Llama-3.1-8B": (
        LLAMA | {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
                 "eos_token_id": [128001, 128008, 128009], "hidden_size": 4096, "intermediate_size": 14336,
                 "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
                 "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rope_theta": 500000.0,
                 "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                  "original_max_position_embeddings": 8192, "rope_type": "llama3"},
                 "torch_dtype": "bfloat16", "vocab_size": 128256, "head_dim": None, "finetuned_from": "meta"},
        None, {"num_kv_heads": 8, "head_dim": 128, "rope_theta": 500000.0},
    ),
    "Qwen2.5-7B": (
        QWEN | {"architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643,
                "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072,
                "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28,
                "num_key_value_heads": 4, "rope_theta": 1000000.0, "sliding_window": 131072,
                "tie_word_embeddings": False, "use_mrope": False, "vocab_size": 152064},
        None, {"dim": 3584, "num_kv_heads": 4, "attention_bias": "qkv"},
    ),
    "Qwen3-8B": (
        QWEN | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
                "eos_token_id": 151645, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288,
                "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
                "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_scaling": None,
                "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 151936},
        None, {"qk_norm": "head", "head_dim": 128},
    ),
    "gemma-2-9b": (
        {"architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
         "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
         "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
         "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
         "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2",
         "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0,
         "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
         "sliding_window_size": 4096, "torch_dtype": "float32", "use_cache": True, "vocab_size": 256000},
        4096, {"topology": "sandwich", "logit_softcap": 30.0, "seq_len": 4096, "norm_zero_centered": True},
    ),
    "Mistral-7B-v0.3": (
        {"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
         "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
         "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
         "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
         "vocab_size": 32768, "head_dim": 128},
        None, {"num_kv_heads": 8, "topology": "pre"},
    ),
    "OLMo-2-7B": (
        {"architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
         "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
         "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "olmo2",
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277,
         "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False,
         "torch_dtype": "float32", "use_cache": True, "vocab_size": 100352, "clip_qkv": None},
        None, {"topology": "reordered", "qk_norm": "full"},
    ),
    "GLM-4-9B-0414": (
        {"architectures": ["Glm4ForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
         "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
         "initializer_range": 0.02, "intermediate_size": 13696, "max_position_embeddings": 32768,
         "model_type": "glm4", "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
         "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
         "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 151552},
        None, {"topology": "sandwich", "rope_fraction": 0.5, "attention_bias": "qkv"},
    ),
}  # fmt: skip


def read(folder, config, seq_len=None, **options):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return described(folder, normalized(folder), seq_len, **options)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read_with_what_mirrors_add(name, tmp_path):
    """And without the comparison of logits an error names a flag, since nothing shows that an addition is harmless."""
    config, seq_len, has = PUBLISHED[name]
    _, plain, _ = read(tmp_path / "plain", config, seq_len)
    _, model, notes = read(tmp_path / "mirror", config | MARKS, seq_len)
    assert model == plain and {key: getattr(model, key) for key in has} == has
    (note,) = notes
    assert note.startswith("fields of config.json that nobody knows were passed over: ") and "unsloth_fixed" in note
    with pytest.raises(Exception, match="without --verify off"):
        read(tmp_path / "mirror", config | MARKS, seq_len, verified=False)
    unknown = note.split(": ")[1].split(", ")
    assert read(tmp_path / "mirror", config | MARKS, seq_len, verified=False, ignore_fields=unknown)[1] == plain


# name of the published configuration -> a field that makes it another model, and what the line names
HARMFUL = {
    "experts": ("Llama-3.1-8B", {"num_local_experts": 8}, "num_local_experts=8"),
    "another order of norms": ("Llama-2-7b", {"norm_position": "post"}, "norm_position='post'"),
    "attention with linear biases": ("Llama-2-7b", {"alibi": True}, "alibi=True"),
    "clipped queries": ("OLMo-2-7B", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    "dynamic positions": ("Llama-2-7b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
    "quantized": ("Mistral-7B-v0.3", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "quantized by MLX": ("Llama-3.1-8B", {"quantization": {"bits": 4, "group_size": 64}}, "quantization"),
    "a window": ("Mistral-7B-v0.3", {"sliding_window": 4096}, "sliding_window=4096"),
    "scores by layer": ("gpt2-xl", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    "another activation": ("Llama-3.1-8B", {"hidden_act": "relu2"}, "hidden_act='relu2'"),
    "windows in some layers": ("Qwen2.5-7B", {"use_sliding_window": True, "sliding_window": 4096,
                                              "max_window_layers": 0}, "sliding_window=4096"),
    "half-width residuals": ("GLM-4-9B-0414", {"residual_scale": 0.5}, "residual_scale=0.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_field_is_refused_by_name(name, tmp_path, capsys):
    of, change, wanted = HARMFUL[name]
    config, _, _ = PUBLISHED[of]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | change))
    command = ["convert", "from-hf", str(tmp_path / "m"), str(tmp_path / "out")]
    assert main(command) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and wanted in error, error
    assert not (tmp_path / "out").exists()


def test_only_fields_that_nobody_knows_can_be_ignored(tmp_path, capsys):
    config, _, _ = PUBLISHED["Mistral-7B-v0.3"]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"sliding_window": 4096, "odd": 3}))
    command = ["convert", "from-hf", str(tmp_path / "m"), str(tmp_path / "out"), "--ignore-fields"]
    for given, code, wanted in (
        ("sliding_window", 2, "--ignore-fields sliding_window: a field of config.json which is known"),
        ("nothing", 2, "--ignore-fields nothing: a field of config.json which is not there"),
        ("odd", 4, "sliding_window=4096 is shorter"),
    ):
        assert main([*command, given]) == code
        assert wanted in capsys.readouterr().err


def exported(folder, settings, arch="auto"):
    to_hf(save_random(folder / "run" / "checkpoints", recipe_of(settings)), folder / "hf", arch=arch, verify=False)
    return folder / "hf"


def change(folder, **values):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    config.pop("megaresnorm", None)
    path.write_text(json.dumps(config))


def test_nulls_of_older_files_are_what_they_stood_for(tmp_path):
    """Transformers 4 took null for false; what logits do not depend on has its default. The logits agree."""
    folder = exported(tmp_path, {"topology": "pre"})
    change(folder, attention_bias=None, mlp_bias=None, tie_word_embeddings=None, initializer_range=None,
           use_cache=None, head_dim=8, unsloth_version="2025.1", odd=None)  # fmt: skip
    back = from_hf(folder, tmp_path / "back", tolerance=5e-6)
    assert back.agreement.passed and back.notes == (
        "fields of config.json that nobody knows were passed over: odd, unsloth_version",
        f"{folder} has no tokenizer that is read",
    )


def test_buffers_are_passed_over_by_the_reader_and_by_the_comparison(tmp_path):
    """One list for both: what old files have beside the weights, in whatever type."""
    for name, settings, buffers in (
        ("gpt2", {**GPT, "topology": "pre", "tied_embeddings": True},
         {"transformer.h.{}.attn.bias": torch.ones(1, 1, 32, 32).tril().bool(),
          "transformer.h.{}.attn.masked_bias": torch.tensor(-1e4)}),
        ("llama", {"topology": "pre"}, {"model.layers.{}.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ("gpt_neox", {**GPT, "topology": "pre", "positions": "rope", "ffn": "gelu", "rope_fraction": 0.5},
         {"gpt_neox.layers.{}.attention.rotary_emb.inv_freq": torch.ones(2),
          "gpt_neox.layers.{}.attention.bias": torch.ones(1, 1, 32, 32).byte(),
          "gpt_neox.layers.{}.attention.masked_bias": torch.tensor(-1e4)}),
    ):  # fmt: skip
        folder = exported(tmp_path / name, settings, name)
        tensors = load_file(folder / "model.safetensors")
        for buffer, value in buffers.items():
            tensors |= {buffer.format(block): value.clone() for block in range(3)}
        save_file(tensors, folder / "model.safetensors")
        assert from_hf(folder, tmp_path / name / "back", tolerance=5e-6).agreement.passed
        assert main(["convert", "compare", str(folder), str(tmp_path / name / "back")]) == 0


def test_a_tied_model_whose_index_names_its_head_is_read(tmp_path, capsys):
    """As sharded tied models are published: the index has lm_head.weight, and no file does."""
    folder = exported(tmp_path, {"topology": "pre", "tied_embeddings": True})
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    file = "model-00001-of-00001.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys([*names, "lm_head.weight"], file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert from_hf(folder, tmp_path / "back", tolerance=5e-6).agreement.passed
    index["weight_map"]["model.layers.7.odd.weight"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "again")]) == 4
    assert "has no tensor model.layers.7.odd.weight, which the index has there" in capsys.readouterr().err


@pytest.mark.parametrize(("prefix", "whose"), [("module.", "DistributedDataParallel"), ("_orig_mod.", "torch.compile")])
def test_the_prefix_of_a_wrapper_is_named(prefix, whose, tmp_path, capsys):
    folder = exported(tmp_path, {"topology": "pre"})
    tensors = load_file(folder / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "back")]) == 4
    assert f"names have {prefix} in them, as {whose} leaves it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(name, tmp_path, capsys):
    folder = exported(tmp_path, {"topology": "pre"})
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22\nsize 12345\n"
    (folder / name).write_text(pointer)
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "back")]) in (3, 4)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "it is a pointer of Git LFS; fetch the file itself with git lfs pull" in error


def test_which_implementation_is_used_is_not_for_a_config_to_say(tmp_path):
    """A mark of whoever saved the model, which may name a package that is not there, or code to fetch."""
    for name in ("flash_attention_2", "someone/kernels"):
        folder = exported(tmp_path / name.replace("/", "-"), {"topology": "pre"})
        change(folder, _attn_implementation=name, attn_implementation=name, _attn_implementation_autoset=True)
        assert from_hf(folder, folder.parent / "back", tolerance=5e-6).agreement.passed
    folder = exported(tmp_path / "own", {"topology": "keel"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_attn_implementation": "someone/kernels"}))
    assert main(["convert", "compare", str(folder), str(tmp_path / "own" / "run")]) == 0


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("README.md", b"---\ntitle: foo: bar\n---\n"),
        ("README.md", b"---\na: &x 1\nlicense: *x\n---\n"),
        ("README.md", b"\xff\xfe"),
        ("README.md", b"---\n- a list\n---\n"),
        ("generation_config.json", b"{"),
        ("generation_config.json", b"[1]"),
    ],
)
def test_what_a_model_says_and_cannot_be_read_is_left_out(file, content, tmp_path):
    folder = exported(tmp_path, {"topology": "pre"})
    (folder / file).write_bytes(content)
    back = from_hf(folder, tmp_path / "back", verify=False)
    noted = [note for note in back.notes if note.startswith("left out what cannot be read: ")]
    assert len(noted) == (content != b"---\n- a list\n---\n") and all(file in note for note in noted)


def test_weights_of_several_types_come_back_as_they_were(tmp_path):
    """Norms in FP32 beside matrices in BF16 are not rounded by an export that nobody asked to round."""
    folder = exported(tmp_path, {"topology": "pre"})
    before = load_file(folder / "model.safetensors")
    before = {name: t.bfloat16() if t.ndim == 2 else t + 1e-4 for name, t in before.items()}
    save_file(before, folder / "model.safetensors")
    change(folder, dtype="bfloat16")
    assert from_hf(folder, tmp_path / "back").settings.precision.compute == "bf16"
    to_hf(tmp_path / "back", tmp_path / "again")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(before[name].float(), after[name]) for name in before)
    assert main(["convert", "compare", str(folder), str(tmp_path / "back")]) == 0

"""What cannot be converted costs one line that names it, and the output folder is not there."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from models import GEMMA, GPT, recipe_of, save_random
from safetensors.torch import load_file, save_file

from megaresnorm.cli import main
from megaresnorm.convert.export import ExportSettings
from megaresnorm.convert.to_hf import to_hf
from megaresnorm.data.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A checkpoint, what it is exported as in four architectures, and in several files."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = ByteTokenizer()
    save_random(folder / "run" / "checkpoints", recipe_of({"topology": "pre", "vocab_size": 257}), tokenizer)
    to_hf(folder / "run", folder / "llama", verify=False)
    to_hf(folder / "run", folder / "sharded", verify=False, settings=ExportSettings(max_shard_bytes=20_000))
    for name, settings in (
        ("minimax", {"topology": "deepnorm"}),
        ("keel", {"topology": "keel"}),
        ("gemma2", {**GEMMA}),
        ("tied", {"topology": "pre", "tied_embeddings": True}),
        ("opt", {**GPT, "topology": "post", "ffn": "relu", "ffn_dim": 40}),
        ("gpt_neox",
         {"topology": "pre", "norm": "layernorm", "ffn": "gelu", "bias": True, "head_dim": 4, "num_kv_heads": 6}),
        ("gpt2", {"topology": "pre", "norm": "layernorm", "ffn": "gelu", "bias": True, "head_dim": 4, "num_kv_heads": 6,
                  "positions": "learned"}),
        ("bert",
         {"topology": "post", "norm": "layernorm", "ffn": "gelu", "bias": True, "head_dim": 4, "num_kv_heads": 6,
                  "positions": "learned", "embedding_norm": True}),
    ):  # fmt: skip
        checkpoint = save_random(folder / f"{name} run" / "checkpoints", recipe_of(settings))
        to_hf(checkpoint, folder / name, verify=False)
    return folder


def edited(**changes):
    """Change fields of config.json; a value of ... removes one."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config.pop("megaresnorm", None)
        for key, value in changes.items():
            if value is ...:
                del config[key]
            else:
                config[key] = value
        path.write_text(json.dumps(config))

    return edit


def rope(**values):
    return edited(rope_parameters={"rope_theta": 10000.0, "rope_type": "default", **values})


def tensors(change):
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        found = load_file(path)
        change(found)
        save_file({name: t.contiguous() for name, t in found.items()}, path)

    return edit


def cut(name: str, keep: float):
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return edit


def index(change):
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return edit


def write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str):
    return lambda folder: (folder / name).unlink()


def ours_without_size(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vocab_size"] = None
    del config["megaresnorm"]["model"]["vocab_size"]
    path.write_text(json.dumps(config))


def an_index_of_a_pickle(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(found, folder / "weights.bin")
    value = {"metadata": {}, "weight_map": dict.fromkeys(found, "weights.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(value))


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


SHARD = "model-00002-of-00007.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"
# folder, what is done to it, exit code, what the line has
FROM = {
    "no such folder": (None, None, 4, "not a folder; download the model first"),
    "no config": ("llama", remove("config.json"), 4, "config.json: cannot be read"),
    "config is no JSON": ("llama", write("config.json", b"{"), 4, "config.json: not JSON"),
    "config is a list": ("llama", write("config.json", b"[1]"), 4, "not a JSON object"),
    "config is deep": ("llama", write("config.json", b'{"a":' * 100_000), 4, "config.json: not JSON"),
    "config is huge": (
        "llama",
        write("config.json", b'{"a": [' + b"1," * (1 << 21) + b"1]}"),
        4,
        "values; not such a file",
    ),
    "family that is not known": ("llama", edited(model_type="mamba"), 4, "model_type='mamba' is not one of"),
    "no family": ("llama", edited(model_type=...), 4, "model_type=None is not one of"),
    "wrong family": ("llama", edited(model_type="gpt2"), 4, "config.json: "),
    "field that is not known": (
        "llama",
        edited(num_experts=8),
        4,
        "num_experts=8 is not a field that is known of llama",
    ),
    "quantized": ("llama", edited(quantization_config={"bits": 4}), 4, "quantization_config"),
    "weights of another name": ("llama", edited(transformers_weights="x.bin"), 4, "transformers_weights"),
    "an adapter": ("llama", write("adapter_config.json", b"{}"), 4, "has an adapter"),
    "layers without end": ("llama", edited(num_hidden_layers=10**9), 4, "num_hidden_layers=1000000000 is above 10000"),
    "of Megatron-Core": ("llama", edited(model_type="megatron-core"), 2, "use megaresnorm convert from-megatron"),
    "activation": ("llama", edited(hidden_act="quick_gelu"), 4, "hidden_act='quick_gelu' has no counterpart"),
    "parallel residual": (
        "gpt_neox",
        edited(use_parallel_residual=True),
        4,
        "use_parallel_residual=True has no counterpart",
    ),
    "sliding window": (
        "gemma2",
        edited(sliding_window=8, layer_types=["sliding_attention"] * 3),
        4,
        "--seq-len 8 the two are the same",
    ),
    "dynamic rope": (
        "llama",
        rope(rope_type="dynamic", factor=2.0),
        4,
        "rope_parameters.rope_type='dynamic' is not supported",
    ),
    "longrope": (
        "llama",
        rope(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=16),
        4,
        "rope_parameters.rope_type='longrope' is not supported",
    ),
    "yarn with mscale": (
        "llama",
        rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.5),
        4,
        "rope_parameters.mscale=0.7 has no counterpart",
    ),
    "llama3 upside down": (
        "llama",
        rope(
            rope_type="llama3",
            **{"factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
        ),
        4,
        "low_freq_factor=4.0 must be below",
    ),
    "partial rotary where the class has none": (
        "llama",
        rope(partial_rotary_factor=0.5),
        4,
        "rope_parameters.partial_rotary_factor=0.5",
    ),
    "experts": ("minimax", edited(num_local_experts=4), 4, "num_local_experts=4 has no counterpart"),
    "linear attention": ("minimax", edited(layer_types=["linear_attention"] * 3), 4, "layer_types='linear_attention'"),
    "factors that differ": (
        "minimax",
        edited(mlp_alpha_factor=2.0),
        4,
        "mlp_alpha_factor=2.0 differs from full_attn_alpha_factor",
    ),
    "beta": ("minimax", edited(mlp_beta_factor=0.5), 4, "mlp_beta_factor=0.5 has no counterpart"),
    "scores by layer": (
        "gpt2",
        edited(scale_attn_by_inverse_layer_idx=True),
        4,
        "scale_attn_by_inverse_layer_idx=True",
    ),
    "vocabulary of unknown size": ("llama", edited(vocab_size=None), 4, "config.json: "),
    "our own code without a size": ("keel", lambda f: ours_without_size(f), 4, "vocab_size"),
    "weights of bytes": ("llama", tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})), 4, f"{Q} is I8"),
    "head bias of another shape": (
        "bert",
        tensors(lambda t: t.update({"lm_head.bias": torch.zeros(())})),
        4,
        "lm_head.bias is not [37] zeros",
    ),
    "tied head that differs": (
        "tied",
        tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        4,
        "lm_head.weight differs from model.embed_tokens.weight, to which config.json ties it",
    ),
    "post-norm OPT": ("opt", edited(activation_function="tanh"), 4, "activation_function='tanh' has no counterpart"),
    "tokenizer that is a folder": (
        "minimax",
        lambda folder: (folder / "tokenizer.json").mkdir(),
        3,
        "tokenizer.json: cannot be read",
    ),
    "tokenizer without an end": (
        "minimax",
        write("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'),
        3,
        "name one with --end-token",
    ),
    "head bias": ("bert", tensors(lambda t: t["lm_head.bias"].add_(1)), 4, "lm_head.bias is not [37] zeros"),
    "size that does not fit": (
        "llama",
        edited(hidden_size=48),
        4,
        "has shape [257, 24], config.json makes it [257, 48]",
    ),
    "size that is text": ("llama", edited(hidden_size="large"), 4, "config.json: "),
    "size below zero": ("llama", edited(num_hidden_layers=-1), 4, "config.json: "),
    "eps of nothing": ("llama", edited(rms_norm_eps=0.0), 4, "norm_eps"),
    "tensor missing": ("llama", tensors(lambda t: t.pop(Q)), 4, f"has no tensor {Q}"),
    "tensor too many": (
        "llama",
        tensors(lambda t: t.update(extra=torch.ones(2))),
        4,
        "extra is a tensor that our model has nothing for",
    ),
    "tensor of integers": ("llama", tensors(lambda t: t.update({Q: t[Q].long()})), 4, f"{Q} is I64"),
    "truncated": ("llama", cut("model.safetensors", 0.7), 4, "model.safetensors: not a readable safetensors file"),
    "empty": ("llama", write("model.safetensors", b""), 4, "model.safetensors: not a readable safetensors file"),
    "header of gigabytes": (
        "llama",
        write("model.safetensors", (1 << 40).to_bytes(8, "little") + b"{}"),
        4,
        "a header of",
    ),
    "no weights": (
        "llama",
        remove("model.safetensors"),
        4,
        "has no model.safetensors and no model.safetensors.index.json",
    ),
    "only a pickle": ("llama", only_a_pickle, 4, "pytorch_model.bin is a pickle, which can run code and is never read"),
    "shard missing": ("sharded", remove(SHARD), 4, f"{SHARD}: is missing"),
    "shard truncated": ("sharded", cut(SHARD, 0.5), 4, f"{SHARD}: not a readable"),
    "index that leads outside": (
        "sharded",
        index(lambda v: v["weight_map"].update({Q: "../run/x.safetensors"})),
        4,
        "which is no name of a file here",
    ),
    "index of another file": (
        "sharded",
        index(lambda v: v["weight_map"].update({Q: v["weight_map"]["lm_head.weight"]})),
        4,
        f"has no tensor {Q}, which the index has there",
    ),
    "index without a map": ("sharded", index(lambda v: v.pop("weight_map")), 4, "has no weight_map"),
    "tokenizer too large": ("minimax", write("tokenizer.json", b""), 3, "tokenizer.json: not a tokenizer.json"),
    "our own key at odds": ("keel", edited(), 4, "megaresnorm=None is missing"),
}


@pytest.mark.parametrize("case", FROM)
def test_what_cannot_be_read_costs_one_line_and_leaves_nothing(case, made, tmp_path, capsys):
    kind, edit, code, wanted = FROM[case]
    source = tmp_path / "model"
    if kind is not None:
        shutil.copytree(made / kind, source)
        edit(source)
    before = sorted(os.listdir(tmp_path))
    assert main(["convert", "from-hf", str(source), str(tmp_path / "out"), "--verify", "off"]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and wanted in error and "Traceback" not in error, error
    assert sorted(os.listdir(tmp_path)) == before


def test_fields_of_our_own_code_must_say_the_same(made, tmp_path, capsys):
    shutil.copytree(made / "keel", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["residual"][3][5] = 2.5
    path.write_text(json.dumps(config))
    assert main(["convert", "from-hf", str(tmp_path / "model"), str(tmp_path / "out")]) == 4
    assert "residual=" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_config_that_was_changed_counts_and_is_told(made, tmp_path, capsys):
    """Of a class of Transformers, whose fields are what it computes with."""
    shutil.copytree(made / "minimax", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["full_attn_alpha_factor"] = config["mlp_alpha_factor"] = 2.0
    path.write_text(json.dumps(config))
    assert main(["convert", "from-hf", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "config.json was changed after the export" in out and "post, 3 blocks" in out and "PASS" in out


def test_a_recipe_of_a_later_version_does_not_count(made, tmp_path, capsys):
    shutil.copytree(made / "llama", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["megaresnorm"]["model"]["topology"] = "of tomorrow"
    path.write_text(json.dumps(config))
    assert main(["convert", "from-hf", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "config.json was changed after the export" in out and "pre, 3 blocks" in out


@pytest.mark.parametrize("options", [["--end-token", "x"], ["--end-token", "x", "--tokenizer", "none"]])
def test_an_end_token_of_nothing_is_refused(options, made, tmp_path, capsys):
    for kind in ("llama", "minimax"):
        assert main(["convert", "from-hf", str(made / kind), str(tmp_path / "out"), *options]) == 2
        assert "--end-token x has no effect" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_help_names_every_architecture(capsys):
    from megaresnorm.convert.families import FAMILIES

    assert main(["convert", "to-hf", "--help"]) == 0
    said = capsys.readouterr().out.replace(",", " ").split()
    assert {family.name for family in FAMILIES} | {"remote-code", "auto"} <= set(said)


@pytest.mark.parametrize("edit", ["eps", "alpha"])
def test_any_field_that_was_changed_counts(edit, made, tmp_path):
    from megaresnorm.convert.from_hf import from_hf

    shutil.copytree(made / "minimax", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    changes = {"rms_norm_eps": 0.01} if edit == "eps" else {"full_attn_alpha_factor": 2.0, "mlp_alpha_factor": 2.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    back = from_hf(tmp_path / "model", tmp_path / "out")
    assert any("was changed after the export" in note for note in back.notes)
    assert back.model.norm_eps == (0.01 if edit == "eps" else 1e-5) and back.agreement.passed


def unknown_with_code(folder: Path) -> None:
    edited(model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def known_with_code(folder: Path) -> None:
    edited(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, architectures=["evil.M"])(folder)
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


def other_weights(folder: Path) -> None:
    edited(transformers_weights="adapter_model.bin")(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")


def of_megatron(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "megatron-core", "vocab_size": 257}')


COMPARED = {
    "weights of another name, a pickle": (
        other_weights,
        4,
        "transformers_weights: weights of another name are not read",
    ),
    "an adapter": (write("adapter_config.json", b"{}"), 4, "has an adapter, which is not read"),
    "of Megatron-Core": (of_megatron, 4, "convert them first by from-megatron"),
    "code of an unknown kind": (unknown_with_code, 4, "model_type='evil' is not one of"),
    "code beside a known kind": (known_with_code, 0, ""),
    "only a pickle": (only_a_pickle, 4, "pytorch_model.bin is a pickle, which can run code and is never read"),
    "index of a pickle": (an_index_of_a_pickle, 4, "which is no name of a file here"),
    "quantized": (edited(quantization_config={"load_in_4bit": True}), 4, "quantized weights are not read"),
    "size that is text": (edited(hidden_size="x"), 4, "not a configuration of llama"),
    "kind that is a list": (edited(model_type=["x"]), 4, "model_type=['x'] is not one of"),
    "architectures of nothing": (edited(architectures=5), 0, ""),
    "truncated": (cut("model.safetensors", 0.7), 4, "not a readable safetensors file"),
    "tensor missing": (tensors(lambda t: t.pop(Q)), 4, f"missing keys, such as {Q}"),
}


@pytest.mark.parametrize("case", COMPARED)
def test_comparing_runs_no_code_and_reads_no_pickle(case, made, tmp_path, capsys, monkeypatch):
    edit, code, wanted = COMPARED[case]
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    folder = tmp_path / "model"
    shutil.copytree(made / "llama", folder)
    edit(folder)
    assert main(["convert", "compare", str(made / "run"), str(folder)]) == code
    error = capsys.readouterr().err
    assert wanted in error and error.count("\n") == (1 if code else 0) and not (folder / "ran").exists()


TO = {
    "no such run": (["nowhere"], 4, "nowhere: has no checkpoint"),
    "no such architecture": (["RUN", "--arch", "lama"], 2, "did you mean llama"),
    "architecture that does not fit": (["RUN", "--arch", "minimax"], 2, "does not hold this model exactly"),
    "no such tokenizer": (["RUN", "--tokenizer", "x"], 2, "--tokenizer"),
    "no such type": (["RUN", "--dtype", "int8"], 2, "--dtype"),
    "tolerance of nothing": (["RUN", "--tolerance", "0.1", "--verify", "off"], 2, "has no effect with --verify off"),
    "other norm for OPT": (["RUN", "--arch", "opt"], 2, "model.num_kv_heads is 2, there it is 6"),
    "too little memory": (["RUN", "--max-memory", "1MB"], 2, "is too little; give at least 64MB"),
    "size that is none": (["RUN", "--max-memory", "much"], 2, "'much' is not a size"),
    "negative size": (["RUN", "--max-shard-size", "-1"], 2, "--max-shard-size"),
    "tolerance": (["RUN", "--tolerance", "2"], 2, "'2' is not a share from 0 to 1"),
}


@pytest.mark.parametrize("case", TO)
def test_what_cannot_be_written_costs_one_line_and_leaves_nothing(case, made, tmp_path, capsys):
    arguments, code, wanted = TO[case]
    command = [
        "convert",
        "to-hf",
        *(str(made / "run") if a == "RUN" else a for a in arguments[:1]),
        str(tmp_path / "out"),
    ]
    found = main([*command, *arguments[1:]])
    error = capsys.readouterr().err
    assert found == code and wanted in error.splitlines()[-1] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["to-hf", "from-hf", "to-megatron"])
@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_an_output_that_exists_is_left_as_it_is(command, kind, made, tmp_path, capsys):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine").write_text("kept")
    elif kind == "file":
        out.write_text("kept")
    else:
        out.symlink_to(tmp_path / "nowhere")
    source = made / ("llama" if command == "from-hf" else "run")
    assert main(["convert", command, str(source), str(out)]) == 2
    assert "exists already, and nothing is written over" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["out"]
    if kind != "link to nothing":
        assert (out / "mine" if kind == "folder" else out).read_text() == "kept"


def test_a_damaged_checkpoint_is_named(made, tmp_path, capsys):
    shutil.copytree(made / "run", tmp_path / "run")
    file = next((tmp_path / "run").rglob("weights-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 4
    assert f"{file}: damaged" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_full_disk_is_said_before_and_leaves_nothing(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megaresnorm.convert.files.free_bytes", lambda root: 1000)
    assert main(["convert", "to-hf", str(made / "run"), str(tmp_path / "out")]) == 2
    assert "no space: need" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(made, tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megaresnorm.convert.export.write_weights", full)
    assert main(["convert", "to-hf", str(made / "run"), str(tmp_path / "out")]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_what_a_killed_conversion_has_left_is_swept_up(made, tmp_path):
    left = tmp_path / ".tmp-out-0123456789abcdef"
    left.mkdir()
    (left / "half").write_text("x")
    (tmp_path / ".tmp-out-bf16-0123456789abcdef").mkdir()  # of a conversion to another folder
    assert main(["convert", "to-hf", str(made / "run"), str(tmp_path / "out"), "--verify", "off"]) == 0
    assert sorted(os.listdir(tmp_path)) == [".tmp-out-bf16-0123456789abcdef", "out"]
    assert not (tmp_path / "out" / "half").exists()


def test_too_little_memory_to_verify_is_said_before(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megaresnorm.convert.prompts.available_memory", lambda: 10_000)
    assert main(["convert", "to-hf", str(made / "run"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "verifying needs" in error and "--verify off" in error and list(tmp_path.iterdir()) == []
    assert main(["convert", "to-hf", str(made / "run"), str(tmp_path / "out"), "--verify", "off"]) == 0

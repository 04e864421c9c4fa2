"""Folders of Hugging Face's models that would hang, fill the memory or end in a traceback."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from refused import NOT_FILES, put, refused
from safetensors.torch import load_file, save_file

from megaresnorm.assemble import build_model
from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.checkpoint.state import EngineState, RunState
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.cli import main
from megaresnorm.convert.to_hf import to_hf
from megaresnorm.recipe.load import build_recipe

MODEL = {"dim": 8, "num_blocks": 2, "num_heads": 2, "seq_len": 16, "ffn_dim": 16, "vocab_size": 257, "topology": "pre"}
LEARNED = {
    "topology": "post",
    "embedding_norm": True,
    "ffn_dim": 32,
    "norm": "layernorm",
    "positions": "learned",
    "ffn": "gelu_tanh",
    "bias": True,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A Llama, a model with a table of masks in every layer, and one of our own code."""
    folder = tmp_path_factory.mktemp("made")
    for name, settings in (("llama", {}), ("bert", LEARNED), ("own", {"topology": "keel"})):
        recipe = build_recipe({"model": MODEL | settings, "data": {"path": "x"}, "train": {"output": "x", "steps": 1}})
        model = build_model(recipe.model).model
        state = RunState(
            samples=0, skipped_in_a_row=0, train_loss=None, engine=EngineState(updates=0, clipper_steps=0),
            recipe=recipe.model_dump(exclude_none=True), data="", tokenizer={"kind": "bytes"},
        )  # fmt: skip
        weights = {name: TensorSlices.of_whole(p.data) for name, p in model.named_parameters()}
        to_hf(
            save_checkpoint(folder / f"{name} run", 1, {"weights": weights}, state.model_dump()),
            folder / name,
            verify=False,
        )
    return folder


def edited(**changes):
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config.pop("megaresnorm", None)
        path.write_text(json.dumps(config | changes))

    return edit


def own(**changes):
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["megaresnorm"]["model"] |= changes
        path.write_text(json.dumps(config))

    return edit


def written(name: str, content):
    return lambda folder: put(content)(folder / name)


def rope(**values):
    return edited(rope_parameters={"rope_theta": 10000.0, "rope_type": "default", **values})


def settings(content: bytes):
    """Of a tokenizer that is not known to be ours."""
    return lambda folder: (edited()(folder), written("tokenizer_config.json", content)(folder))


def of_weights(header: bytes, size: int | None = None):
    return written("model.safetensors", (len(header) if size is None else size).to_bytes(8, "little") + header)


INDEX = "model.safetensors.index.json"
LABELS = {str(i): f"LABEL_{i}" for i in range(60_000)}
FOLDERS = {
    "10^12 positions": ("llama", edited(max_position_embeddings=10**12),
                        "max_position_embeddings=1000000000000 is above"),
    "10^30 positions": ("llama", edited(max_position_embeddings=10**30), "max_position_embeddings=10^30 is above"),
    "10^8 labels": ("llama", edited(num_labels=10**8), "num_labels=100000000 is above"),
    "120,000 values": ("llama", edited(id2label=LABELS, label2id={v: k for k, v in LABELS.items()}),
                       "over 100,000 values"),
    "3 x 10^7 layers": ("llama", edited(num_hidden_layers=3 * 10**7), "num_hidden_layers=30000000 is above"),
    "10,000 layers": ("llama", edited(num_hidden_layers=10_000), "10000"),
    "a vocabulary of 10^12": ("llama", edited(vocab_size=10**12), "vocab_size=1000000000000 is above"),
    "a vocabulary of 2^24": ("llama", edited(vocab_size=2**24), ""),
    "a width of 2^40": ("llama", edited(hidden_size=2**40), "hidden_size=1099511627776 is above"),
    "a width of 2^22": ("llama", edited(hidden_size=2**22), ""),
    "an ffn of 2^63": ("llama", edited(intermediate_size=2**63), "intermediate_size=9223372036854775808 is above"),
    "heads of 10^12": ("llama", edited(num_attention_heads=10**12), "num_attention_heads=1000000000000 is above"),
    "heads of 0": ("llama", edited(num_attention_heads=0), "config.json"),
    "heads below 0": ("llama", edited(num_attention_heads=-2, num_key_value_heads=-2), "config.json"),
    "heads of 10^400": ("llama", edited(head_dim=10**400), "head_dim=10^400 is above"),
    "a token of 10^400": ("llama", edited(eos_token_id=10**400), "eos_token_id=10^400 is above"),
    "layer types of numbers": ("own", own(num_blocks=10**9), "num_blocks=1000000000 is above"),
    "our recipe of 2^40": ("own", own(dim=2**40), "config.json"),
    "our recipe of a list": ("own", own(dim=[]), "config.json"),
    "our recipe without a size": ("own", own(vocab_size=None), "config.json"),
    "rope of 10^300": ("llama", rope(rope_theta=1e300), "rope_theta"),
    "rope of nothing": ("llama", rope(rope_theta=1e-320), "rope_theta"),
    "rope of a list": ("llama", edited(rope_parameters=[1]), "config.json"),
    "rope of words": ("llama", rope(rope_theta="big"), "config.json"),
    "rope for 10^30": (
        "llama",
        rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=10**30),
        "original_max_position_embeddings=10^30 is above",
    ),
    "an eps of 1e-320": ("llama", edited(rms_norm_eps=1e-320), "norm_eps"),
    "an eps of 1e999": ("llama", written("config.json", b'{"model_type": "llama", "rms_norm_eps": 1e999}'),
                        "config.json"),
    "a type of a list": ("llama", edited(model_type=["llama"]), "model_type=['llama'] is not one of"),
    "a type of 100,000 letters": ("llama", edited(model_type="x" * 100_000), "is not one of"),
    "a key of 100,000 letters": ("llama", edited(**{"x" * 100_000: 1}), "is not a field that is known"),
    "a value of 100,000 letters": ("llama", edited(hidden_act="x" * 100_000), "config.json"),
    "a field of lists": ("llama", edited(architectures={"a": [[1]]}, dtype=[1]), ""),
    "a key of control characters": ("llama", edited(**{"\x1b[2J\n": 1}), "is not a field that is known"),
    "nested": ("llama", written("config.json", b'{"a":' * 50_000), "nested too deeply"),
    "nested 500 deep": ("llama",
                        written("config.json", b'{"model_type": "llama", "x":' + b"[" * 500 + b"]" * 500 + b"}"), ""),
    "a number of 100,000 digits": ("llama", written("config.json", b'{"a": ' + b"1" * 100_000 + b"}"), "not JSON"),
    "windows of nothing": ("own", own(topology="none"), "config.json"),
    "an index of a list": (
        "llama",
        lambda f: ((f / "model.safetensors").unlink(), written(INDEX, b'{"weight_map": [1]}')(f)),
        "has no weight_map",
    ),
    "an index of pipes": (
        "llama",
        lambda f: ((f / "model.safetensors").unlink(), written(INDEX, b'{"weight_map": {"a": "x.safetensors"}}')(f),
                   os.mkfifo(f / "x.safetensors")),
        "x.safetensors: not a plain file",
    ),
    "an index of a million": (
        "llama",
        lambda f: ((f / "model.safetensors").unlink(),
                   written(INDEX, b'{"weight_map": {' + b'"a": "a",' * (1 << 20) + b'"b": "b"}}')(f)),
        "values; not such a file",
    ),
    "a header of 2^63": ("llama", of_weights(b"{}", 2**63), "a header of"),
    "a header that is deep": ("llama", of_weights(b'{"a":' * 10_000), "not a readable safetensors file"),
    "a header of lists": ("llama", of_weights(b"[]"), "not a readable safetensors file"),
    "a tensor of 2^62 rows": (
        "llama",
        of_weights(json.dumps({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}).encode()),
        "not a readable safetensors file",
    ),
    "a tokenizer that panics": (
        "llama",
        written("tokenizer.json",
                b'{"model": {"type": "BPE", "vocab": {"</s>": 0}, "merges": []}, "normalizer": {"type": '
                                  b'"Precompiled", "precompiled_charsmap": "AAAA"}}'),
        "tokenizer.json",
    ),
    "an end of a list": ("llama", settings(b'{"eos_token": [1]}'), "eos_token"),
    "an end of a table": ("llama", settings(b'{"eos_token": {"content": {}}}'), "eos_token"),
    "settings that are deep": ("llama", settings(b"[" * 100_000), "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_model_that_is_none_costs_one_line(case, made, tmp_path, capfd):
    kind, edit, wanted = FOLDERS[case]
    shutil.copytree(made / kind, tmp_path / "model")
    edit(tmp_path / "model")
    refused(["convert", "from-hf", tmp_path / "model", tmp_path / "out", "--verify", "off"], wanted, tmp_path, capfd)


COMPARED = ("10^12 positions", "10^8 labels", "10,000 layers", "a vocabulary of 10^12", "a vocabulary of 2^24",
            "a width of 2^22", "heads of 0", "a header of 2^63", "rope of words", "nested 500 deep")  # fmt: skip


@pytest.mark.parametrize("case", COMPARED)
def test_a_model_that_is_none_is_not_compared(case, made, tmp_path, capfd):
    kind, edit, _ = FOLDERS[case]
    shutil.copytree(made / kind, tmp_path / "model")
    edit(tmp_path / "model")
    refused(["convert", "compare", tmp_path / "model", made / "llama"], "", tmp_path, capfd)


KINDS = [
    (case, name)
    for case in ("endless", "a pipe", "a folder")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "other.json")
    if (case, name) != ("a folder", "other.json")  # which is passed over
]


@pytest.mark.parametrize(("case", "name"), KINDS)
def test_a_model_whose_files_are_none_costs_one_line(case, name, made, tmp_path, capfd):
    shutil.copytree(made / "llama", tmp_path / "model")
    edited()(tmp_path / "model")  # a tokenizer of ours would not ask for its settings
    (tmp_path / "model" / name).unlink(missing_ok=True)
    NOT_FILES[case](tmp_path / "model" / name)
    refused(["convert", "from-hf", tmp_path / "model", tmp_path / "out", "--verify", "off"], name, tmp_path, capfd)


def test_a_model_whose_generation_settings_are_a_pipe_is_not_compared(made, tmp_path, capfd):
    """Transformers opens it by itself, and would wait for ever."""
    shutil.copytree(made / "llama", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    os.mkfifo(tmp_path / "model" / "generation_config.json")
    refused(["convert", "compare", tmp_path / "model", made / "llama"], "not a plain file", tmp_path, capfd)


def test_tables_that_do_not_fit_are_not_made(made, tmp_path, capfd, monkeypatch):
    """A BERT decoder makes a table of the numbers of its positions: 2 MB of 2^18 of them, where there is 1 MB."""
    shutil.copytree(made / "bert", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    (name,) = (name for name in tensors if "position" in name)
    tensors[name] = torch.zeros(1 << 18, tensors[name].shape[1])
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    edited(max_position_embeddings=1 << 18)(tmp_path / "model")
    monkeypatch.setattr("megaresnorm.convert.compare.available_memory", lambda: 1 << 20)
    refused(
        ["convert", "compare", tmp_path / "model", tmp_path / "model"],
        "Transformers would make tables",
        tmp_path,
        capfd,
    )


def test_a_folder_of_links_as_in_the_cache_of_the_hub_is_read(made, tmp_path):
    """snapshots/ holds relative links to blobs/."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted((made / "llama").iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert main(["convert", "from-hf", str(snapshot), str(tmp_path / "out")]) == 0

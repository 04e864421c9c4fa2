"""What users bring and cannot be used: forty kinds of text, tokenizers, splits, paths and models, one line each."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from refused import put, refused
from tokenizers import models

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 3\n"
LLAMA = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 16, "vocab_size": 16, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
RECIPE = """
model: {dim: 8, num_blocks: 1, num_heads: 1, seq_len: 16}
data: {path: DATA}
train: {output: ROOT/run, steps: 2, global_batch: 2}
"""


def bpe(**parts) -> bytes:
    made = tokenizers.Tokenizer(models.BPE({"a": 0, "</s>": 1, "<s>": 2}, []))
    made.add_special_tokens(["</s>", "<s>"])
    return json.dumps({**json.loads(made.to_str()), **parts}).encode()


def model(**fields):
    """A folder of Transformers of this config.json, without weights."""

    def make(path: Path) -> None:
        path.mkdir()
        config = {key: value for key, value in (LLAMA | fields).items() if value is not ...}
        (path / "config.json").write_text(json.dumps(config))

    return make


def folder(**files):
    """A folder of files, whose names have __ for a dot."""

    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            put(content)(path / name.replace("__", "."))

    return make


PREPARE = ["prepare", "TEXT", "--workers", "1", "--out", "ROOT/out"]
FROM = ["convert", "from-hf", "ROOT/thing", "ROOT/out", "--verify", "off"]
# what is at ROOT/thing*, the command, what the line has. TEXT, DATA, ROOT stand for a text, a data set, the folder.
CASES: dict[str, tuple[dict, list[str], str]] = {
    # texts
    "a pointer for a text": ({"thing.txt": POINTER}, ["prepare", "ROOT/thing.txt", "--out", "ROOT/out"],
                             "git lfs pull"),
    "a pointer for rows": ({"thing.jsonl": POINTER}, ["prepare", "ROOT/thing.jsonl", "--out", "ROOT/out"],
                           "git lfs pull"),
    "a pointer for packed rows": ({"thing.jsonl.gz": POINTER}, ["prepare", "ROOT/thing.jsonl.gz", "--out", "ROOT/out"],
                                  "git lfs pull"),
    "UTF-16": ({"thing.txt": "text".encode("utf-16")}, ["prepare", "ROOT/thing.txt", "--out", "ROOT/out"],
               "iconv -f UTF-16 -t UTF-8"),
    "text that is a list": ({"thing.jsonl": b'{"text": ["a"]}\n'}, ["prepare", "ROOT/thing.jsonl", "--out", "ROOT/out"],
                            "its 'text' is a list, not a text"),
    "text that is true": ({"thing.ndjson": b'{"text": true}\n'}, ["prepare", "ROOT/thing.ndjson", "--out", "ROOT/out"],
                          "its 'text' is true or false"),
    "text that is an object": ({"thing.json": b'{"text": {}}\n'}, ["prepare", "ROOT/thing.json", "--out", "ROOT/out"],
                               "its 'text' is an object"),
    "one JSON array": ({"thing.json": b'[{"text": "a"}]\n'}, ["prepare", "ROOT/thing.json", "--out", "ROOT/out"],
                       "wanted a JSON object, got a list"),
    "an empty .zst": ({"thing.jsonl.zst": b""}, ["prepare", "ROOT/thing.jsonl.zst", "--out", "ROOT/out"],
                      "it is empty, which no compressed file is"),
    "a cut .txt.gz": ({"thing.txt.gz": gzip.compress(b"text " * 1000)[:-20]},
                      ["prepare", "ROOT/thing.txt.gz", "--out", "ROOT/out"], "not a whole gzip file"),
    "a bomb of text": ({"thing.txt.gz": gzip.compress(bytes(16 << 20), 9)},
                       ["prepare", "ROOT/thing.txt.gz", "--out", "ROOT/out", "--workers", "1"], "which no text is"),
    "a folder of a mark alone": ({"thing": folder(a__txt=b"\xef\xbb\xbf")},
                                 ["prepare", "ROOT/thing", "--workers", "1", "--out", "ROOT/out"],
                                 "no document with text"),
    "a folder of hidden files": ({"thing": folder(__a__txt=b"x")}, ["prepare", "ROOT/thing", "--out", "ROOT/out"],
                                 "1 hidden: .a.txt"),
    "a variable that is not set": ({}, ["prepare", "$NO_SUCH_VARIABLE/x.txt", "--out", "ROOT/out"],
                                   "the variable $NO_SUCH_VARIABLE is not set"),
    "a home that is not there": ({}, [*PREPARE[:-1], "~nobody-of-this-name/out"], "there is no home folder"),
    "an output that is a file": ({"thing": b"x"}, [*PREPARE[:-1], "ROOT/thing", "--overwrite"], "is not a data set"),
    "an output in a file": ({"thing": b"x"}, [*PREPARE[:-1], "ROOT/thing/out"], "cannot be written"),
    # tokenizers
    "a name of the hub": ({}, [*PREPARE, "--tokenizer", "gpt2"], "hf download gpt2"),
    "a folder without one": ({"thing": folder(a__txt=b"x")}, [*PREPARE, "--tokenizer", "ROOT/thing"],
                             "the folder has no tokenizer"),
    "a vocabulary without merges": ({"thing": folder(vocab__json=b'{"a": 0}')}, [*PREPARE, "--tokenizer", "ROOT/thing"],
                                    "belongs to merges.txt, which is not beside it"),
    "a vocabulary of words": ({"thing": folder(vocab__json=b'{"a": "b"}', merges__txt=b"")},
                              [*PREPARE, "--tokenizer", "ROOT/thing"], "vocab.json is no table of tokens"),
    "merges of one part": ({"thing": folder(vocab__json=b'{"a": 0}', merges__txt=b"#version: 0.2\nab\n")},
                           [*PREPARE, "--tokenizer", "ROOT/thing"], "a line of merges.txt is no pair"),
    "merges of another vocabulary": ({"thing": folder(vocab__json=b'{"a": 0}', merges__txt=b"x y\n")},
                                     [*PREPARE, "--tokenizer", "ROOT/thing"], "wanted GPT-2's vocab.json"),
    "a vocabulary without an end": ({"thing": folder(vocab__json=b'{"a": 0}', merges__txt=b"")},
                                    [*PREPARE, "--tokenizer", "ROOT/thing"], "to end documents with"),
    "a tokenizer that is a pointer": ({"thing.json": POINTER}, [*PREPARE, "--tokenizer", "ROOT/thing.json"],
                                      "git lfs pull"),
    "an end token that is a number": (
        {"thing": folder(tokenizer__json=bpe(), tokenizer_config__json=b'{"eos_token": 3}')},
        [*PREPARE, "--tokenizer", "ROOT/thing"], "eos_token is '3', which is no token",
    ),
    "an end token that is not there": (
        {"thing": folder(tokenizer__json=bpe(), tokenizer_config__json=b'{"eos_token": "<eot>"}')},
        [*PREPARE, "--tokenizer", "ROOT/thing"], "has no token <eot> to end documents with",
    ),
    "settings that are no JSON": ({"thing": folder(tokenizer__json=bpe(), tokenizer_config__json=b"{")},
                                  [*PREPARE, "--tokenizer", "ROOT/thing"], "tokenizer_config.json: not JSON"),
    "a begin token of bytes": ({}, [*PREPARE, "--bos"], "--bos has no effect with --tokenizer bytes"),
    "a begin token without --bos": ({"thing.json": bpe()},
                                    [*PREPARE, "--tokenizer", "ROOT/thing.json", "--begin-token", "<s>"],
                                    "has no effect without --bos"),
    "a begin token that ends": ({"thing.json": bpe()},
                                [*PREPARE, "--tokenizer", "ROOT/thing.json", "--bos", "--begin-token", "</s>"],
                                "leave out --bos"),
    "a begin token of a trained model": ({}, [*PREPARE, "--tokenizer", "sentencepiece", "--bos", "--begin-token", "x"],
                                         "have no effect with --tokenizer sentencepiece"),
    # recipes
    "one of two files": ({}, ["train", "RECIPE", "data.path=DATA/tokens.bin"], "give the prefix of the two files"),
    "the folder of a run": ({}, ["train", "RECIPE", "data.path=ROOT"], "did you mean"),
    "a path with an unset variable": ({}, ["train", "RECIPE", "train.output=$NO_SUCH_VARIABLE/run"],
                                      "the variable $NO_SUCH_VARIABLE is not set"),
    "yes": ({}, ["train", "RECIPE", "train.tensorboard=yes"], "it is called train.loggers now; set that to"),
    "a ramp without microbatches": (
        {}, ["train", "RECIPE", "train.global_batch=8", "train.batch_ramp={start: 2, steps: 2}"],
        "train.micro_batch, which is not set",
    ),
    "a vocabulary that is too small": ({}, ["train", "RECIPE", "model.vocab_size=100"],
                                       "smaller than the 257 tokens of the tokenizer"),
    "a tokenizer for data that has one": ({}, ["train", "RECIPE", "data.tokenizer=bytes"], "has its own tokenizer"),
    "a split of nothing": ({}, ["train", "RECIPE", "data.split=[0, 0, 1]"], "must leave something to train on"),
    "a split of two": ({}, ["train", "RECIPE", "data.split=[98, 2]"], "data.split"),
    "validation in two ways": ({}, ["train", "RECIPE", "data.valid.web=DATA", "data.valid_fraction=0.1"],
                               "has no effect with data.valid"),
    "a validation set that is not there": ({}, ["train", "RECIPE", "data.valid.web=ROOT/nowhere"], "no such data set"),
    "a validation set of one sequence less": ({}, ["train", "RECIPE", "data.valid.web=SMALL"],
                                              "are for validation, less than one sequence"),
    "a comment for a path": ({}, ["train", "RECIPE", "data.path=ROOT/my #1 data"], "my #1 data: no such data set"),
    # models of Transformers
    "weights that are a pointer": ({"thing": model()}, FROM, "git lfs pull"),
    "a mark without a comparison": ({"thing": model(unsloth_version="1")}, FROM, "without --verify off"),
    "a null without a comparison": ({"thing": model(odd=None)}, FROM, "odd=None is not a field that is known of llama"),
    "a null that matters": ({"thing": model(rms_norm_eps=None)}, FROM, "rms_norm_eps"),
    "a field to ignore that is known": ({"thing": model()}, [*FROM, "--ignore-fields", "hidden_size"],
                                        "hidden_size: a field of config.json which is known"),
    "a field that says something": ({"thing": model(num_experts=8)}, FROM[:-2], "num_experts=8 is not a field"),
    "weights of MLX": ({"thing": model(quantization={"bits": 4})}, FROM, "quantized weights are not read"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sets(byte_data, tmp_path_factory):
    from megaresnorm.cli import main

    root = tmp_path_factory.mktemp("sets")
    shutil.copytree(byte_data, root / "data")
    (root / "small.txt").write_text("too short")
    assert main(["prepare", str(root / "small.txt"), "--out", str(root / "small"), "--workers", "1"]) == 0
    return root


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_used_costs_one_line(case, sets, tmp_path, capfd, monkeypatch):
    things, command, wanted = CASES[case]
    for name, content in things.items():
        (content if callable(content) else put(content))(tmp_path / name)
    if case == "weights that are a pointer":
        (tmp_path / "thing" / "model.safetensors").write_bytes(POINTER)
    (tmp_path / "text.txt").write_text("some text\n" * 20)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DATA", str(sets / "data")).replace("ROOT", str(tmp_path)))
    monkeypatch.setattr("megaresnorm.data.corpus.EXPANSION_FREE", 1 << 20)  # not to unpack 256 MiB
    if case == "the folder of a run":
        shutil.copytree(sets / "data", tmp_path / "data")
    for word, path in (("RECIPE", tmp_path / "recipe.yaml"), ("TEXT", tmp_path / "text.txt"), ("DATA", sets / "data"),
                       ("SMALL", sets / "small"), ("ROOT", tmp_path)):  # fmt: skip
        command = [part.replace(word, str(path)) for part in command]
    refused(command, wanted, tmp_path, capfd)


def test_there_are_forty_kinds_and_more():
    assert len(CASES) >= 40 and len({wanted for _, _, wanted in CASES.values()}) >= 35

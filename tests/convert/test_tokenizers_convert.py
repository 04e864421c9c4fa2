"""Tokenizers before and after: the same tokens of 2,000 texts."""

import json

import pytest
from models import recipe_of, save_random
from transformers import AutoTokenizer

from megaresnorm.convert.export import ExportSettings
from megaresnorm.convert.from_hf import from_hf
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.to_hf import to_hf
from megaresnorm.convert.tokenizers import byte_letters, check_equal, sample_texts, tokenizer_files
from megaresnorm.data.hf_tokenizer import HuggingFaceTokenizer
from megaresnorm.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from megaresnorm.errors import DataError

TEXTS = list(sample_texts())


def of_kind(kind: str):
    if kind == "bytes":
        return ByteTokenizer()
    trained = SentencePieceTokenizer.train(TEXTS[:500], 700)
    if kind == "sentencepiece":
        return trained
    files = tokenizer_files(ByteTokenizer() if kind == "byte-level json" else trained)
    return HuggingFaceTokenizer(files["tokenizer.json"], "tokenizer.json")


def test_texts_have_what_tokenizers_differ_on():
    assert len(TEXTS) == len(list(sample_texts())) == 2000 and list(sample_texts()) == TEXTS
    everything = "".join(TEXTS)
    for needle in (
        "\t",
        "\n\n",
        "   ",
        "\r\n",
        "\u00a0",
        "\u3000",
        "😀",
        "你好",
        "한국어",
        "e\u0301",
        "def",
        "__init__",
        "&amp;",
        "▁",
    ):
        assert sum(needle in text for text in TEXTS) >= 20, needle
    assert "" in TEXTS and len(set(everything)) > 100


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "byte-level json", "metaspace json"])
@pytest.mark.parametrize("topology", ["pre", "deepnorm", "keel"])
def test_2000_texts_have_the_same_tokens_before_and_after(kind, topology, tmp_path):
    """In an exported model, whose class must not bring another tokenizer; and read back from it."""
    tokenizer = of_kind(kind)
    recipe = recipe_of({"topology": topology, "vocab_size": tokenizer.vocab_size + 3})
    checkpoint = save_random(tmp_path / "run" / "checkpoints", recipe, tokenizer)
    to_hf(checkpoint, tmp_path / "hf", verify=False)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    back = from_hf(tmp_path / "hf", tmp_path / "back", verify=False)
    after = NativeModel(back.checkpoint).tokenizer()
    assert after.describe() == tokenizer.describe() and after.model == tokenizer.model
    for text in TEXTS:
        ours = tokenizer.encode(text).tolist()
        assert theirs.encode(text, add_special_tokens=False) == ours == theirs.encode(text)
        assert after.encode(text).tolist() == ours
        assert theirs.decode(ours) == tokenizer.decode(ours)
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eod
    config, generation = (
        json.loads((tmp_path / "hf" / f).read_text()) for f in ("config.json", "generation_config.json")
    )
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eod


def test_a_tokenizer_that_differs_is_refused_and_nothing_is_kept(tmp_path, monkeypatch):
    tokenizer = of_kind("sentencepiece")
    recipe = recipe_of({"topology": "pre", "vocab_size": tokenizer.vocab_size})
    checkpoint = save_random(tmp_path / "run" / "checkpoints", recipe, tokenizer)
    monkeypatch.setattr("megaresnorm.convert.tokenizers._merges", lambda ids: [])
    with pytest.raises(DataError, match=r"Transformers makes other tokens of \d+ of 2000 texts"):
        to_hf(checkpoint, tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    to_hf(checkpoint, tmp_path / "hf", verify=False, settings=ExportSettings(with_tokenizer=False))
    assert not list((tmp_path / "hf").glob("tokenizer*"))


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_tokenizer_that_was_changed_after_the_export_is_the_one_that_is_read(kind, tmp_path):
    tokenizer = of_kind(kind)
    recipe = recipe_of({"topology": "pre", "vocab_size": tokenizer.vocab_size + 3})
    to_hf(save_random(tmp_path / "run" / "checkpoints", recipe, tokenizer), tmp_path / "hf", verify=False)
    path = tmp_path / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    token = {"id": tokenizer.vocab_size, "content": "<|user|>", "single_word": False, "lstrip": False, "rstrip": False}
    content["added_tokens"].append(token | {"normalized": False, "special": True})
    path.write_text(json.dumps(content))
    after = NativeModel(from_hf(tmp_path / "hf", tmp_path / "back", verify=False).checkpoint).tokenizer()
    assert after.vocab_size == tokenizer.vocab_size + 1
    assert after.encode("<|user|>").tolist() == tokenizer.encode("<|user|>").tolist()  # its letters
    assert after.encode("some text").tolist() == tokenizer.encode("some text").tolist()


def test_special_tokens_in_a_text_are_the_documented_difference(tmp_path):
    """Their name in a text is the token for Transformers and its letters for us."""
    for tokenizer, name in ((of_kind("bytes"), "<|endoftext|>"), (of_kind("sentencepiece"), "</s>")):
        folder = tmp_path / name.strip("</>|")
        folder.mkdir()
        for file, content in tokenizer_files(tokenizer).items():
            (folder / file).write_bytes(content)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs.encode(name) == [tokenizer.eod] != tokenizer.encode(name).tolist()
        check_equal(tokenizer, folder, [name])  # letters for both, where Transformers is asked for letters


def test_letters_of_bytes_are_those_of_byte_level_tokenizers():
    from tokenizers import pre_tokenizers

    assert set(byte_letters()) == set(pre_tokenizers.ByteLevel.alphabet()) and byte_letters()[65] == "A"
    assert byte_letters()[32] == "Ġ" and byte_letters()[10] == "Ċ"

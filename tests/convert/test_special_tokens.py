"""What is spelled like a special token in a text stays letters, on every path, and comes back as it was."""

import json
import re

import numpy as np
import pytest
import tokenizers
from models import recipe_of, save_random
from spelled import KINDS, texts_of

from megaresnorm.cli import main
from megaresnorm.convert.compare import of_ours
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.prompts import prompts_of, text_prompts
from megaresnorm.data.dataset import open_dataset
from megaresnorm.data.hf_tokenizer import HuggingFaceTokenizer
from megaresnorm.data.tokenizer import SentencePieceTokenizer, start_tokens
from megaresnorm.data.tokenizer_files import ends_of_documents, read_tokenizer, restore_tokenizer
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.generate import sample_text
from megaresnorm.recipe.load import build_recipe
from megaresnorm.trainer import train


def special_ids(made) -> set[int]:
    return {i for i, token in made.get_added_tokens_decoder().items() if token.special}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def file(kind, tmp_path):
    path = tmp_path / "tokenizer.json"
    KINDS[kind][0]().save(str(path))
    return path


def test_texts_are_letters_and_come_back(kind, file):
    """Forty texts in all, each of which holds a special token for the tokenizer itself."""
    plain, ours = tokenizers.Tokenizer.from_file(str(file)), read_tokenizer(file)
    special, texts = special_ids(plain), texts_of(kind)
    assert len(texts) == len(set(texts)) == 10
    for text in texts:
        assert special & set(plain.encode(text, add_special_tokens=False).ids), text
        ids = ours.encode(text).tolist()
        assert not special & set(ids) and ours.decode(ids) == text, (text, ids)
    for text in ("plain words", "a<b", "end"):  # and nothing else is changed
        assert ours.encode(text).tolist() == plain.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("workers", ["1", "2"])
def test_prepare_keeps_them_as_letters(kind, file, workers, tmp_path):
    texts = texts_of(kind)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["prepare", str(tmp_path / "t.jsonl"), "--tokenizer", str(file), "--out", str(tmp_path / "out")]
    assert main([*command, "--workers", workers]) == 0
    data = open_dataset(str(tmp_path / "out"))
    assert data.files.num_documents == len(texts)
    special = special_ids(tokenizers.Tokenizer.from_file(str(file)))
    for d, text in enumerate(texts):
        tokens = data.files.tokens[data.files.boundaries[d] : data.files.boundaries[d + 1]].tolist()
        assert tokens[-1] == data.tokenizer.eod and not special & set(tokens[:-1])
        assert data.tokenizer.decode(tokens[:-1]) == text


def test_generate_and_the_sample_of_a_run_read_letters(kind, file, tmp_path, capsys):
    words = " ".join(texts_of(kind))
    (tmp_path / "t.txt").write_text(f"{words}\n" * 60)
    command = ["prepare", str(tmp_path / "t.txt"), "--tokenizer", str(file), "--out", str(tmp_path / "data")]
    assert main([*command, "--workers", "1"]) == 0
    text = texts_of(kind)[7]
    recipe = build_recipe(
        {
            "model": {"dim": 16, "num_blocks": 1, "num_heads": 2, "seq_len": 64, "ffn_dim": 24},
            "data": {"path": str(tmp_path / "data")},
            "train": {"output": str(tmp_path / "run"), "steps": 1, "global_batch": 2, "tensorboard": False,
                      "sample_prompt": text, "sample_tokens": 2},
        }
    )  # fmt: skip
    assert main(["prepare", str(tmp_path / "t.txt"), "--tokenizer", str(tmp_path / "data"), "--out",
                 str(tmp_path / "again"), "--workers", "1"]) == 0  # the tokenizer of a data set  # fmt: skip
    train(recipe)
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "--prompt", text, "--tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith(text)
    tokenizer = read_tokenizer(file)
    start = start_tokens(tokenizer, text)
    assert start[0] == tokenizer.eod and not special_ids(tokenizers.Tokenizer.from_file(str(file))) & set(start[1:])
    from megaresnorm.run import Run

    with Run(recipe) as run:
        assert sample_text(run.engine.model, run.data.tokenizer, run.recipe.train).startswith(text)


def test_the_comparison_of_an_export_reads_letters(kind, file, tmp_path, monkeypatch):
    """The texts on which logits are compared, and those on which the tokenizer is."""
    from megaresnorm.convert import prompts

    tokenizer = read_tokenizer(file)
    special = special_ids(tokenizers.Tokenizer.from_file(str(file)))
    monkeypatch.setattr(prompts, "TEXTS", tuple(texts_of(kind)))
    recipe = recipe_of({"topology": "pre", "vocab_size": tokenizer.vocab_size})
    native = NativeModel(save_random(tmp_path / "run" / "checkpoints", recipe, tokenizer))
    texts = prompts_of(native, native.tokenizer())[-10:]
    for row in texts:
        assert row[0, 0] == tokenizer.eod and not special & set(row[0, 1:].tolist())
    assert of_ours(native.model())(texts[0]).isfinite().all()
    if kind != "wordpiece":  # which changes the spaces of texts, and so is refused by the comparison of tokenizers
        assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0


def test_tokens_of_one_letter_and_those_that_are_not_special_stay_what_they_are():
    made = KINDS["byte-level"][0]()
    made.add_special_tokens(["!"])  # a letter that is marked, as in CLIP
    made.add_tokens(["<think>"])
    ours = HuggingFaceTokenizer(made.to_str().encode(), "tokenizer.json")
    assert ours.encode("a!").tolist() == made.encode("a!").ids
    assert ours.encode("<think>x").tolist() == made.encode("<think>x").ids != made.encode("x").ids


def test_one_rule_says_which_tokens_end_and_begin_documents(tmp_path, capsys):
    """The same for prepare and from-hf: an option, then the files beside the tokenizer, then its vocabulary."""
    made = KINDS["byte-level"][0]()
    made.save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(tmp_path).end == "<|endoftext|>"
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(config))
    assert read_tokenizer(tmp_path).end == read_tokenizer(tmp_path / "tokenizer.json").end == "<|im_end|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_start|>"}))
    assert read_tokenizer(tmp_path).end == "<|im_start|>"
    assert read_tokenizer(tmp_path, "<|endoftext|>").end == "<|endoftext|>"
    assert read_tokenizer(tmp_path).bos is None
    with pytest.raises(DataError, match=r"<\|im_start\|> ends every document, and so comes before the next one"):
        read_tokenizer(tmp_path, bos=True)
    both = read_tokenizer(tmp_path, "<|endoftext|>", bos=True)
    assert (both.end, both.begin) == ("<|endoftext|>", "<|im_start|>")
    named = read_tokenizer(tmp_path, bos=True, begin="<|begin_of_text|>")
    assert restore_tokenizer(named.describe(), named.model, "x").bos == named.bos == made.token_to_id(named.begin)
    with pytest.raises(DataError, match=r"has no token <\|no\|> to begin documents with"):
        read_tokenizer(tmp_path, bos=True, begin="<|no|>")


def test_only_what_a_tokenizer_puts_before_a_text_begins_it(tmp_path, capsys):
    from tokenizers import processors

    from megaresnorm.convert.tokenizers import read_tokenizer_of

    made = KINDS["byte-level"][0]()
    ids = [(token, made.token_to_id(token)) for token in KINDS["byte-level"][1]]
    for template, prefix in (
        ("$A <|im_start|>", []),
        ("<|im_start|> $A <|im_end|>", ["<|im_start|>"]),
        ("<|im_start|> <|begin_of_text|> $A", ["<|im_start|>", "<|begin_of_text|>"]),
    ):
        made.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
        made.save(str(tmp_path / "tokenizer.json"))
        found = read_tokenizer_of(tmp_path, {})
        assert found.prefix == prefix and found.begin == (prefix[0] if len(prefix) == 1 else None)
        said = ends_of_documents(found)
        assert ("of which --bos writes one" in said) == (len(prefix) == 2)


def test_a_tokenizer_json_of_any_name_is_one(tmp_path):
    KINDS["byte-level"][0]().save(str(tmp_path / "vocab-400.json"))
    assert read_tokenizer(tmp_path / "vocab-400.json").vocab_size == KINDS["byte-level"][0]().get_vocab_size()
    KINDS["byte-level"][0]().model.save(str(tmp_path))
    merges = (tmp_path / "merges.txt").read_bytes()
    before = read_tokenizer(tmp_path / "vocab.json").model
    (tmp_path / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
    assert read_tokenizer(tmp_path / "vocab.json").model == before


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece bpe"], indirect=True)
def test_bos_begins_every_document_once(kind, file, workers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megaresnorm.data.tokenize.WORK_CHARACTERS", 10)  # a document is handed on in parts
    monkeypatch.setattr("megaresnorm.data.corpus.PIECE_CHARACTERS", 20)
    texts = ["short", "a line\nand another line\nand more of them\n" * 3, "x"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["prepare", str(tmp_path / "t.jsonl"), "--tokenizer", str(file), "--workers", workers]
    assert main([*command, "--bos", "--out", str(tmp_path / "with")]) == 0
    assert re.search(r"documents begin with <\S+> and end with <\S+>\n", capsys.readouterr().out)
    assert main([*command, "--out", str(tmp_path / "without")]) == 0
    said = capsys.readouterr().out
    assert ("its own file puts <s> before every text, which --bos does here" in said) == (kind != "byte-level")
    one, other = (open_dataset(str(tmp_path / name)) for name in ("with", "without"))
    assert other.tokenizer.bos is None and one.files.num_documents == other.files.num_documents == 3
    for d in range(3):
        with_bos, plain = (
            data.files.tokens[data.files.boundaries[d] : data.files.boundaries[d + 1]].tolist() for data in (one, other)
        )
        assert with_bos == [one.tokenizer.bos, *plain]
    assert start_tokens(one.tokenizer, "x") == [one.tokenizer.bos, *one.tokenizer.encode("x").tolist()]
    assert main([*command, "--bos", "--out", str(tmp_path / "without")]) == 3  # another request


def test_bos_of_a_sentencepiece_model(tmp_path):
    text = "some text of a few words " * 100
    (tmp_path / "t.txt").write_text(text)
    command = ["prepare", str(tmp_path / "t.txt"), "--tokenizer", "sentencepiece", "--vocab-size", "290"]
    assert main([*command, "--bos", "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    data = open_dataset(str(tmp_path / "out"))
    assert data.files.tokens[0] == data.tokenizer.bos == 1 and data.tokenizer.describe()["begin_token"] == "<s>"
    assert np.count_nonzero(np.asarray(data.files.tokens) == 1) == 1
    assert read_tokenizer(tmp_path / "out").bos == 1  # that of the data set, for others to be blended with it
    model = SentencePieceTokenizer.train([text], 290, begin=True)
    assert model.encode("<s></s><unk>").tolist() and not {0, 1, 2} & set(model.encode("<s></s><unk>").tolist())


def test_gpt2s_two_files_are_read_as_its_own_tokenizer_reads_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    made = KINDS["byte-level"][0]()
    made.model.save(str(tmp_path))  # vocab.json and merges.txt
    texts = ["the quick brown fox", "  two  spaces\n\ttabs", "naïve 你好 😀", "it's 3.14", "<|endoftext|>"]
    theirs = transformers.GPT2TokenizerFast(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    for path in (tmp_path, tmp_path / "vocab.json", tmp_path / "merges.txt"):
        ours = read_tokenizer(path)
        assert ours.end == "<|endoftext|>" and ours.model == read_tokenizer(tmp_path).model
        for text in texts[:-1]:
            assert ours.encode(text).tolist() == theirs.encode(text) and ours.decode(ours.encode(text)) == text
        assert ours.eod not in ours.encode(texts[-1]).tolist()
    (tmp_path / "vocab.json").rename(tmp_path / "gpt2-vocab.json")
    (tmp_path / "merges.txt").rename(tmp_path / "gpt2-merges.txt")  # Megatron's names
    assert read_tokenizer(tmp_path / "gpt2-vocab.json").model == ours.model
    (tmp_path / "gpt2-merges.txt").unlink()
    with pytest.raises(DataError, match=r"belongs to gpt2-merges\.txt, which is not beside it"):
        read_tokenizer(tmp_path / "gpt2-vocab.json")


def test_bare_megatron_files_have_the_tokenizer_that_the_recipe_names(tiny, byte_data, tmp_path, capsys):
    import shutil

    for suffix in ("bin", "idx"):
        shutil.copy(byte_data / f"tokens.{suffix}", tmp_path / f"bare.{suffix}")
    data = {"path": str(tmp_path / "bare"), "tokenizer": "bytes"}
    summary = train(tiny(data=data))
    assert summary.evaluation.bits_per_byte and summary.valid_loss is not None
    assert main(["generate", str(tmp_path / "run"), "--prompt", "def ", "--tokens", "3"]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--verify", "off"]) == 0
    assert (tmp_path / "hf" / "tokenizer.json").exists()
    from megaresnorm.data.training_data import open_data

    with pytest.raises(ConfigError, match=r"data\.tokenizer=bytes: .* has its own tokenizer; remove it"):
        open_data(tiny(data={"tokenizer": "bytes"}).data)
    assert text_prompts(["x"], NativeModel(tmp_path / "run").tokenizer(), 257, 9)[0].tolist() == [[256, 120]]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_documents_of_several_parts_come_back_as_they_were(scheme, tmp_path, monkeypatch):
    """Also with a tokenizer that puts a blank before every text, which is not the start of a document here."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    made = Tokenizer.from_str(KINDS["sentencepiece bpe"][0]().to_str())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    made.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr("megaresnorm.data.corpus.PIECE_CHARACTERS", 40)
    text = "a line of words without its end " * 9 + "x" * 100 + " and the rest"
    (tmp_path / "t.txt").write_text(text)
    command = ["prepare", str(tmp_path / "t.txt"), "--tokenizer", str(tmp_path / "tokenizer.json"), "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    data = open_dataset(str(tmp_path / "out"))
    assert data.files.num_documents == 1 and data.tokenizer.decode(data.files.tokens[:-1].tolist()) == text


def test_an_end_that_is_a_letter_of_texts_is_refused(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "$": 1, "a": 2, "<end>": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(["$", "[UNK]", "<end>"])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"a text that has \$ could not be told from a document's end"):
        read_tokenizer(tmp_path, "$")
    assert read_tokenizer(tmp_path, "<end>").encode("a$a").tolist() == [2, 1, 2]


def test_texts_that_do_not_come_back_are_told(tmp_path, capsys):
    """Letters that a vocabulary lacks vanish, or become unknown; a normalizer changes them."""
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("plain", "with Ünknown")))
    for kind, told in (("wordpiece", True), ("sentencepiece bpe", True), ("byte-level", False)):
        KINDS[kind][0]().save(str(tmp_path / "tokenizer.json"))
        command = ["prepare", str(tmp_path / "t.jsonl"), "--tokenizer", str(tmp_path / "tokenizer.json")]
        assert main([*command, "--workers", "1", "--out", str(tmp_path / kind)]) == 0
        said = capsys.readouterr().out
        assert ("note: not every text comes back from its tokens as it was, such as 'with Ünknown'" in said) == told

"""Training, validation and test: exact shares of the tokens, or Megatron's, or sets of their own; and what is told."""

import json
import logging
import re

import numpy as np
import pytest

from megaresnorm.cli import main
from megaresnorm.data.dataset import DataSet
from megaresnorm.data.indexed import TokenFiles, TokenWriter
from megaresnorm.data.splits import num_tokens, pieces_between, split_by_documents, split_in_order
from megaresnorm.data.training_data import HELD_OUT, TrainingData, open_data, open_samples, resolve_vocab, split_of
from megaresnorm.errors import CheckpointError, ConfigError, DataError
from megaresnorm.recipe.load import build_recipe, dump_recipe
from megaresnorm.trainer import train


def write_files(prefix, lengths) -> TokenFiles:
    """Bare token files of one byte a token: documents of these lengths."""
    writer = TokenWriter(prefix, np.uint8)
    writer.add((np.arange(sum(lengths)) % 251).astype(np.uint8), list(lengths))
    writer.close()
    return TokenFiles(prefix)


def recipe_of(**data):
    model = {"dim": 8, "num_blocks": 1, "num_heads": 1, "seq_len": 128, "vocab_size": 256}
    return build_recipe({"model": model, "data": {"path": "x", **data}, "train": {"output": "none", "steps": 2}})


def opened(files, recipe):
    data = DataSet("corpus", files, None, None, "")
    return open_samples(TrainingData([data], {}, None, None, ""), recipe)


def everything_once(split, files) -> bool:
    pieces = np.concatenate(list(split.values()))
    pieces = pieces[np.argsort(pieces[:, 0])]
    return pieces[0, 0] == 0 and pieces[-1, 1] == len(files.tokens) and np.array_equal(pieces[1:, 0], pieces[:-1, 1])


@pytest.mark.parametrize("part", range(8))
def test_a_share_is_exact_and_a_warning_is_given_only_where_it_is_below_a_sequence(part, tmp_path, caplog):
    """200 corpora of 1 to 50 documents of 10 to 10^6 tokens: within 5 %, wherever the share is one sequence."""
    below = 0
    for case in range(25):
        draw = np.random.default_rng(1000 * part + case)
        count = int(draw.integers(1 if case == 0 else 2, 51))
        lengths = np.exp(draw.uniform(np.log(10), np.log(10.0 ** draw.uniform(1.5, 6)), count)).astype(int)
        wanted, test = float(draw.choice([0.01, 0.02, 0.1, 0.3])), float(draw.choice([0.0, 0.0, 0.05]))
        files = write_files(tmp_path / "t", lengths)
        recipe = recipe_of(valid_fraction=wanted, test_fraction=test, seed=int(draw.integers(1 << 40)))
        total, least = len(files.tokens), recipe.model.seq_len + 1
        split = split_of(DataSet("corpus", files, None, None, ""), recipe)
        assert everything_once(split, files)
        assert abs(num_tokens(split["test"]) - test * total) <= max(1, 0.05 * test * total)
        if num_tokens(split["train"]) < least:
            continue  # a corpus of less than a sequence
        caplog.clear()
        samples, valid = opened(files, recipe)
        assert samples.per_epoch >= 1
        warned = "are for validation" in caplog.text
        if round(wanted * total) >= least:
            assert abs(valid[HELD_OUT].num_tokens / (wanted * total) - 1) <= 0.05 and not caplog.records
        else:
            below += 1
            held = valid[HELD_OUT].num_tokens if valid else 0
            assert held == (least if total - round(test * total) >= 2 * least else 0)
            assert warned == (abs(held - wanted * total) > 0.05 * wanted * total)
    assert part or below


def test_a_corpus_of_one_document_is_trained_on_and_its_end_is_for_validation(tiny, tmp_path):
    files = write_files(tmp_path / "t", [5000])
    recipe = tiny(data={"path": str(tmp_path / "t"), "valid_fraction": 0.1}, model={"vocab_size": 256})
    split = split_of(DataSet("corpus", files, None, None, ""), recipe)
    assert split["train"].tolist() == [[0, 4500]] and split["valid"].tolist() == [[4500, 5000]]
    assert split_of(DataSet("", files, None, None, ""), tiny(data={"test_fraction": 0.2}))["test"].tolist() == [
        [4000, 5000]
    ]
    summary = train(recipe)
    assert summary.steps == 6 and summary.valid_loss is not None


def test_one_long_document_does_not_go_to_validation_as_a_whole(tmp_path):
    files = write_files(tmp_path / "t", [40] * 50 + [1_000_000])
    for seed in range(20):
        split = split_of(DataSet("", files, None, None, ""), recipe_of(seed=seed))
        assert num_tokens(split["valid"]) == pytest.approx(0.02 * len(files.tokens), rel=0.03)
        cut = [name for name, pieces in split.items() for a, b in pieces if b - a not in (40, 1_000_000)]
        assert len(cut) <= 2  # one document is cut at most


def test_documents_stay_whole_where_the_shares_allow_it(byte_data, tiny):
    """Of many documents one ends near enough to every share."""
    (data,) = open_data(tiny().data).sets
    split = split_of(data, tiny(data={"valid_fraction": 0.5}))
    assert np.isin(np.concatenate(list(split.values())), data.files.boundaries).all()
    assert num_tokens(split["valid"]) / len(data.files.tokens) == pytest.approx(0.5, rel=0.05)
    assert not np.array_equal(split["valid"], split_of(data, tiny(data={"valid_fraction": 0.5, "seed": 5}))["valid"])


def test_too_little_to_train_on_is_refused_with_figures(tmp_path):
    files = write_files(tmp_path / "t", [60, 60])
    with pytest.raises(DataError, match=r"120 of its 120 tokens are for training, less than one sequence of 128 \+ 1"):
        opened(files, recipe_of())
    with pytest.raises(DataError, match=r"no document of the train split has two tokens"):
        opened(write_files(tmp_path / "u", [1] * 500), recipe_of(mask_documents=True, valid_fraction=0.0))


@pytest.mark.parametrize("weights", [[969, 30, 1], [99, 1, 0], [1, 1, 1], [0.7, 0.2, 0.1], [98, 2, 0]])
def test_the_ordered_split_is_megatrons(weights, tmp_path):
    """By sequences and with Megatron's own rounding, so that validation losses can be compared."""
    config = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_config")
    split = config.parse_and_normalize_split(",".join(map(str, weights)))
    matrix = config.convert_split_vector_to_split_matrix(split)
    draw = np.random.default_rng(0)
    for count in (3, 7, 50, 1013):
        writer = TokenWriter(tmp_path / "t", np.uint8)
        for _ in range(count):  # documents of several sequences
            lengths = draw.integers(1, 30, int(draw.integers(1, 4)))
            writer.add_document(np.zeros(lengths.sum(), np.uint8), lengths.tolist())
        writer.close()
        files = TokenFiles(tmp_path / "t")
        found = split_in_order(files.boundaries, files.sequences, weights)
        assert everything_once(found, files)
        for name, ends in zip(("train", "valid", "test"), matrix, strict=True):
            begin, end = (0, 0) if ends is None else (round(e * float(len(files.sequences) - 1)) for e in ends)
            assert num_tokens(found[name]) == files.sequences[end] - files.sequences[begin]
            if num_tokens(found[name]):
                assert found[name][0, 0] == files.sequences[begin]


@pytest.fixture
def three(tmp_path, byte_data):
    for name, text in (("web", "some words of the web. "), ("code", "for i in range(10): print(i)\n")):
        (tmp_path / f"{name}.txt").write_text(text * 100)
        assert main(["prepare", str(tmp_path / f"{name}.txt"), "--out", str(tmp_path / name), "--workers", "1"]) == 0
    return {name: str(tmp_path / name) for name in ("web", "code")}


def test_validation_sets_of_their_own_are_evaluated_by_name(tiny, three, tmp_path, capsys):
    recipe = tiny(data={"valid": three, "valid_fraction": 0.0}, train={"eval_every": 3, "eval_samples": 4})
    data = open_data(recipe.data)
    samples, valid = open_samples(data, resolve_vocab(recipe, data))
    assert samples.num_tokens == len(data.sets[0].files.tokens)  # all of it is trained on
    assert {name: one.num_tokens for name, one in valid.items()} == {"web": 2301, "code": 2901}
    summary = train(recipe)
    assert summary.valid_loss == pytest.approx(sum(summary.evaluation.losses.values()) / 2)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = rows[5]
    assert "valid_loss" not in rows[4] and last["valid_loss/web"] == summary.evaluation.losses["web"]
    for name in ("", "/web", "/code"):
        loss = last[f"valid_loss{name}"]
        assert last[f"valid_perplexity{name}"] == pytest.approx(np.exp(loss))
    # A byte a token: a loss in bits is bits a byte, but for the label that ends a document.
    assert last["valid_bits_per_byte/code"] == pytest.approx(last["valid_loss/code"] / np.log(2), rel=1e-12)
    # One set alone has no name in the metrics, and another one costs a warning only.
    alone = tiny(
        data={"valid": {"web": three["code"]}, "valid_fraction": 0.0},
        train={"steps": 7, "eval_every": 1, "eval_samples": 4},
    )
    train(alone)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[6])
    assert {name for name in row if name.startswith("valid")} == {
        "valid_loss", "valid_perplexity", "valid_bits_per_byte",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"made with data\.valid"):  # with a share, other samples would follow
        train(tiny(train={"steps": 8}))


def test_bits_per_byte_do_not_depend_on_the_tokenizer_and_count_what_is_predicted(tiny, tmp_path):
    """Two models that know nothing have log(V) nats a token: the ratio of their bits a byte is that of their tokens."""
    text = "the quick brown fox, Größe, 你好. " * 300
    (tmp_path / "t.txt").write_text(text)
    found = {}
    for name, options in (("bytes", []), ("pieces", ["--tokenizer", "sentencepiece", "--vocab-size", "300"])):
        out = tmp_path / name
        assert main(["prepare", str(tmp_path / "t.txt"), "--out", str(out), "--workers", "1", *options]) == 0
        recipe = tiny(data={"path": str(out), "valid_fraction": 0.3},
                      train={"output": str(tmp_path / f"run {name}"), "steps": 1, "eval_samples": 10_000})  # fmt: skip
        summary = train(recipe)
        data = open_data(recipe.data)
        _, valid = open_samples(data, resolve_vocab(recipe, data))
        samples = valid[HELD_OUT]
        labels = np.concatenate([samples[i].tokens[1:] for i in range(samples.per_epoch)])
        pieces = [data.tokenizer.decode([i]) for i in labels[labels != data.tokenizer.eod].tolist()]
        size = sum(1 if piece == "\ufffd" else len(piece.encode()) for piece in pieces)  # U+FFFD: one byte of several
        nats = summary.valid_loss * len(labels)
        found[name] = (summary.evaluation.bits_per_byte[HELD_OUT], nats / np.log(2) / size)
    for ours, counted in found.values():
        assert ours == pytest.approx(counted, rel=0.02)  # two bytes of a cut character count as one


def test_a_validation_set_needs_the_tokenizer_of_the_training_data(tiny, three, tmp_path):
    (tmp_path / "t.txt").write_text("words and words " * 200)
    options = ["--tokenizer", "sentencepiece", "--vocab-size", "280", "--workers", "1"]
    assert main(["prepare", str(tmp_path / "t.txt"), "--out", str(tmp_path / "sp"), *options]) == 0
    with pytest.raises(DataError, match="sp: its tokenizer is not that of"):
        open_data(tiny(data={"valid": {"other": str(tmp_path / "sp")}, "valid_fraction": 0.0}).data)


def test_bare_files_and_data_sets_with_the_same_tokenizer_go_together(tiny, byte_data, three, tmp_path, caplog):
    import shutil

    for suffix in ("bin", "idx"):
        shutil.copy(byte_data / f"tokens.{suffix}", tmp_path / f"bare.{suffix}")
    settings = {"path": str(tmp_path / "bare"), "tokenizer": "bytes", "valid": three, "valid_fraction": 0.0}
    assert open_data(tiny(data=settings).data).vocab_size == 257
    with pytest.raises(DataError, match="its tokenizer is not that of"):
        open_data(tiny(data=settings | {"tokenizer": None}).data)
    open_data(tiny(data={"valid": {"same": str(byte_data)}, "valid_fraction": 0.0}).data)
    assert "data.valid.same is a set that is trained on" in caplog.text


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"split": [969, 30, 1], "valid_fraction": 0.1}, "data.valid_fraction=0.1 has no effect with data.split"),
        ({"split": [969, 30, 1], "valid": {"a": "b"}}, "data.split and data.valid are both set"),
        ({"split": [0, 1, 1]}, "must leave something to train on"),
        ({"split": [1, 1]}, "data.split"),
        ({"split": [1, -1, 1]}, "data.split"),
        ({"valid": {"a": "b"}, "valid_fraction": 0.1}, "data.valid_fraction=0.1 has no effect with data.valid"),
        ({"valid": {}}, "data.valid"),
        ({"valid": {"a b": "c"}}, "data.valid"),
    ],
)
def test_settings_of_a_split_that_contradict_each_other_cost_one_line(data, wanted):
    with pytest.raises(ConfigError, match=re.escape(wanted)) as error:
        recipe_of(**data)
    assert "\n" not in str(error.value)


def test_data_show_tells_every_part(tiny, three, tmp_path, capsys):
    recipe = tiny(data={"valid_fraction": 0.25, "test_fraction": 0.1})
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert main(["data", "show", str(tmp_path / "r.yaml"), "--json", str(tmp_path / "j.json")]) == 0
    parts = json.loads((tmp_path / "j.json").read_text())["parts"]
    assert [p["part"] for p in parts] == ["train", "valid", "test"]
    assert sum(p["tokens"] for p in parts) == 17_500 and sum(p["share"] for p in parts) == pytest.approx(1)
    for part in parts:
        assert part["share"] == pytest.approx(part["wanted"], rel=0.05)
        assert part["sequences"] == (part["tokens"] - 1) // 16
    assert "how the tokens are split" in capsys.readouterr().out
    (tmp_path / "r.yaml").write_text(dump_recipe(tiny(data={"valid": three, "valid_fraction": 0.0})))
    assert main(["data", "show", str(tmp_path / "r.yaml"), "--json", str(tmp_path / "j.json")]) == 0
    assert [p["part"] for p in json.loads((tmp_path / "j.json").read_text())["parts"]] == [
        "train",
        "code",
        "web",
    ]  # by name
    assert main(["data", "show", three["web"]]) == 0 and "for validation" in capsys.readouterr().out


def test_a_run_of_an_older_version_goes_on_with_its_samples(tiny, tmp_path, monkeypatch, caplog):
    """Its checkpoints do not say how the data was split: by whole documents."""
    import megaresnorm.run as module

    recipe = tiny(train={"steps": 3})
    real = module.Run._state
    monkeypatch.setattr(module.Run, "_state", lambda run, t: real(run, t).model_copy(update={"split": "documents"}))
    train(recipe)
    monkeypatch.setattr(module.Run, "_state", real)
    data = open_data(recipe.data)
    with module.Run(tiny(train={"steps": 5})) as run:
        files = data.sets[0].files
        before = split_by_documents(files.boundaries, recipe.data.shares, recipe.data.seed)
        assert np.array_equal(run.samples.pieces, before["train"])
        assert np.array_equal(run.valid[HELD_OUT].pieces, before["valid"])
        assert run._state(None).split == "documents"
    with module.Run(tiny(train={"steps": 5, "output": str(tmp_path / "new")})) as run:
        now = split_of(data.sets[0], run.recipe)
        assert np.array_equal(run.samples.pieces, now["train"]) and run._state(None).split == "tokens"
        assert not np.array_equal(now["train"], before["train"])


def test_a_blend_validates_on_the_sources_that_have_enough(tiny, three, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    (tmp_path / "small.txt").write_text("x" * 30)
    assert main(["prepare", str(tmp_path / "small.txt"), "--out", str(tmp_path / "small"), "--workers", "1"]) == 0
    blend = [{"path": three["web"], "weight": 1.0}, {"path": str(tmp_path / "small"), "weight": 1.0}]
    recipe = tiny(data={"path": None, "blend": blend})
    data = open_data(recipe.data)
    samples, valid = open_samples(data, resolve_vocab(recipe, data))
    assert len(samples.sources) == 2 and len(valid[HELD_OUT].sources) == 1
    assert "small: 0 tokens (0.00%) are for validation; 0.1 of its 31 tokens were asked for" in caplog.text


def test_pieces_of_a_range_are_cut_at_its_ends():
    boundaries = np.array([0, 10, 10, 30, 31])
    assert pieces_between(boundaries, 0, 31).tolist() == [[0, 10], [10, 30], [30, 31]]
    assert pieces_between(boundaries, 3, 12).tolist() == [[3, 10], [10, 12]]
    assert pieces_between(boundaries, 7, 7).tolist() == []

"""Checkpoints with right digests and hostile content, and results of comparisons that are none."""

import json
import shutil
from pathlib import Path

import pytest
from refused import NOT_FILES, refused

from megaresnorm.assemble import build_model
from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.checkpoint.manifest import encode_manifest
from megaresnorm.checkpoint.state import EngineState, RunState
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.cli import main
from megaresnorm.recipe.load import build_recipe

MODEL = {"dim": 8, "num_blocks": 1, "num_heads": 2, "seq_len": 8, "ffn_dim": 16, "vocab_size": 257, "topology": "pre"}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """The checkpoint of a tiny run."""
    recipe = build_recipe({"model": MODEL, "data": {"path": "x"}, "train": {"output": "x", "steps": 1}})
    model = build_model(recipe.model).model
    state = RunState(
        samples=0, skipped_in_a_row=0, train_loss=None, engine=EngineState(updates=0, clipper_steps=0),
        recipe=recipe.model_dump(exclude_none=True), data="", tokenizer={"kind": "bytes"},
    )  # fmt: skip
    weights = {name: TensorSlices.of_whole(p.data) for name, p in model.named_parameters()}
    return save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints", 1, {"weights": weights}, state.model_dump())


def model(**changes):
    return lambda m: m["state"]["recipe"]["model"].update(changes)


def section(name, **changes):
    return lambda m: m["state"]["recipe"].setdefault(name, {}).update(changes)


def state(**changes):
    return lambda m: m["state"].update(changes)


def without(*path):
    def change(m) -> None:
        for key in path[:-1]:
            m = m[key]
        del m[path[-1]]

    return change


MANIFESTS = {
    "dim 2^40": (model(dim=2**40), "model.dim=1099511627776"),
    "dim that fits no file": (model(dim=2**20), "the model's is"),
    "10^12 blocks": (model(num_blocks=10**12), "model.num_blocks=1000000000000"),
    "10,000 blocks": (model(num_blocks=10_000), "10000 blocks"),
    "a vocabulary of 2^24": (model(vocab_size=2**24), "the model's is"),
    "an ffn of 2^22": (model(ffn_dim=2**22), "the model's is"),
    "a sequence of 10^30": (model(seq_len=10**30), "model.seq_len="),
    "heads of 0": (model(num_heads=0), "model.num_heads=0"),
    "no vocab_size": (without("state", "recipe", "model", "vocab_size"), "model.vocab_size is missing"),
    "no model": (without("state", "recipe", "model"), "model is missing"),
    "no recipe": (without("state", "recipe"), "state.recipe"),
    "a recipe of a list": (state(recipe=[]), "state.recipe"),
    "a recipe of numbers": (state(recipe={"model": 1}), "its recipe cannot be used"),
    "a recipe with other keys": (section("model", **{"x" * 5000: 1}), "no such setting"),
    "a topology that is code": (model(topology="__import__('os')"), "__import__('os')"),
    "10^15 steps": (section("train", steps=10**15), "train.steps="),
    "an output of NUL": (section("train", output="\0"), "a name without NUL"),
    "a tokenizer of lists": (state(tokenizer={"kind": "huggingface", "file": [], "end_token": "x"}),
                             "state.tokenizer.file"),
    "a tokenizer whose kind is a list": (state(tokenizer={"kind": []}), "state.tokenizer.kind"),
    "a tokenizer that is a list": (state(tokenizer=[]), "state.tokenizer"),
    "a tokenizer of another kind": (state(tokenizer={"kind": "words"}), "unknown tokenizer"),
    "a tokenizer of weights": (
        state(tokenizer={"kind": "sentencepiece", "file": "weights-00000-00001.safetensors"}), "has no file weights"
    ),
    "a tokenizer of another folder": (state(tokenizer={"kind": "sentencepiece", "file": "../../x"}),
                                      "has no file ../../x"),
    "a tokenizer without a file": (state(tokenizer={"kind": "sentencepiece"}), "not a SentencePiece model"),
    "samples of 10^30": (state(samples=10**30), "state.samples"),
    "samples below 0": (state(samples=-1), "state.samples"),
    "samples of true": (state(samples=True), "state.samples"),
    "updates of 10^30": (state(engine={"updates": 10**30, "clipper_steps": 0}), "state.engine.updates"),
    "a loss of words": (state(train_loss="low"), "state.train_loss"),
    "a loss of 10^400": (state(train_loss=10**400), "state.train_loss"),
    "kernels of numbers": (state(kernels={"add_norm": 1}), "state.kernels"),
    "data of a list": (state(data=[]), "state.data"),
    "an engine of a list": (state(engine=[]), "state.engine"),
    "more than there is": (state(extra=1), "state.extra"),
    "a step of 10^30": (lambda m: m.update(step=10**30), "its step is not"),
    "a step below 0": (lambda m: m.update(step=-1), "its step is not"),
    "a format of 10^400": (lambda m: m.update(format=10**400), "this version reads 2"),
    "a shape of 10^400": (lambda m: m["tensors"]["weights"]["embedding.weight"].update(shape=[10**400]),
                          "is not the name or"),
    "a shape of 2^64 elements": (
        lambda m: m["tensors"]["weights"]["embedding.weight"].update(shape=[2**32, 2**32]), "is not the name or"
    ),
    "a shape of true": (lambda m: m["tensors"]["weights"]["embedding.weight"].update(shape=[True]),
                        "is not the name or"),
    "a tensor with a long name": (lambda m: m["tensors"]["weights"].update({"x" * 10**5: 1}), "is not the name or"),
    "weights of a list": (lambda m: m["tensors"].update(weights=[]), "is not the name or"),
}  # fmt: skip


def forged(good: Path, folder: Path, change) -> Path:
    target = folder / ("step-00000001" if change is not None else "x")
    shutil.copytree(good, target)
    manifest = json.loads((target / "manifest.json").read_bytes())
    change(manifest)
    (target / "manifest.json").write_bytes(encode_manifest(manifest))
    if manifest["step"] != 1:
        target = target.rename(folder / "forged")
    return target


def test_the_good_one_works(good, capfd):
    assert main(["generate", str(good), "--tokens", "1"]) == 0


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_forged_manifest_costs_one_line(case, good, tmp_path, capfd):
    change, wanted = MANIFESTS[case]
    folder = forged(good, tmp_path, change)
    refused(["generate", folder, "--tokens", "1"], wanted, tmp_path, capfd)


@pytest.mark.parametrize("case", ["dim 2^40", "10^12 blocks", "no vocab_size", "no recipe", "data of a list"])
def test_a_forged_manifest_is_not_quantized(case, good, tmp_path, capfd):
    change, wanted = MANIFESTS[case]
    refused(["quantize", forged(good, tmp_path, change)], wanted, tmp_path, capfd)


@pytest.mark.parametrize("command", ["to-hf", "to-megatron", "compare"])
@pytest.mark.parametrize(
    "case", ["dim 2^40", "dim that fits no file", "10,000 blocks", "no vocab_size", "a recipe of numbers"]
)
def test_a_forged_manifest_is_not_converted(case, command, good, tmp_path, capfd):
    change, wanted = MANIFESTS[case]
    folder = forged(good, tmp_path, change)
    refused(["convert", command, folder, good if command == "compare" else tmp_path / "out"], wanted, tmp_path, capfd)


@pytest.mark.parametrize("name", ["manifest.json", "weights-00000-00001.safetensors"])
@pytest.mark.parametrize("case", NOT_FILES)
def test_a_checkpoint_whose_files_are_none_costs_one_line(case, name, good, tmp_path, capfd):
    folder = tmp_path / "step-00000001"
    shutil.copytree(good, folder)
    (folder / name).unlink()
    NOT_FILES[case](folder / name)
    refused(["generate", folder], "step-00000001", tmp_path, capfd)
    refused(["checkpoint", "verify", folder], "damaged" if name != "manifest.json" else "", tmp_path, capfd)


@pytest.mark.parametrize("text", ["/dev/zero", "/dev/null", "nowhere", "", "a\0b", "x" * 5000])
@pytest.mark.parametrize(
    "command", [["generate"], ["quantize"], ["checkpoint", "show"], ["checkpoint", "ls"], ["checkpoint", "verify"]]
)
def test_what_is_no_checkpoint_costs_one_line(command, text, tmp_path, capfd):
    refused([*command, text], "", tmp_path, capfd)


RESULTS = {
    "nested": b"[" * 100_000,
    "a list": b"[1]",
    "nothing": b"",
    "null": b"null",
    "no result": b'{"request": "R"}',
    "a result of a list": b'{"request": "R", "result": [1]}',
    "more than there is": b'{"request": "R", "result": {"extra": 1}}',
    "losses of words": None,
    "a number of 100,000 digits": b'{"request": ' + b"1" * 100_000 + b"}",
}


@pytest.mark.parametrize("name", ["request.json", "result.json"])
@pytest.mark.parametrize("case", [*RESULTS, *NOT_FILES])
def test_a_kept_result_that_is_none_costs_one_line(case, name, byte_data, tmp_path, capfd):
    run = tmp_path / "out" / "runs" / "pre-1-seed0"
    run.mkdir(parents=True)
    (run / "request.json").write_text('{"request": "another"}')
    if case in NOT_FILES:
        (run / name).unlink(missing_ok=True)
        NOT_FILES[case](run / name)
    else:
        words = {
            **dict.fromkeys(("final_loss", "valid_loss", "unigram_entropy", "best", "lr_at_best"), 1.0),
            "losses": "many",
        }
        made = json.dumps({"request": "R", "result": {"topology": "pre", "num_blocks": 1, "seed": 0, **words}}).encode()
        (run / name).write_bytes(made if RESULTS[case] is None else RESULTS[case])
    argv = [
        "depth",
        "--train",
        "--topologies",
        "pre",
        "--depths",
        1,
        "--seeds",
        1,
        "--data",
        byte_data,
        "--out",
        tmp_path / "out",
    ]
    refused(argv, "pre-1-seed0", tmp_path, capfd)


@pytest.mark.parametrize(("override", "wanted"), [
    ("data=5", "data: wanted a section"), ("train=[]", "train: wanted a section"),
    ("optim=x", "optim: wanted a section"), ("train.max_minutes=soon", "train.max_minutes='soon'"),
    ("model=1", "model: wanted a section"), ("train.steps=many", "train.steps="),
    ("train.steps=1000000000000000", "train.steps="), ("data.blend=5", "data.blend=5"),
    ("model.dim=5", "must divide model.dim=5"),
])  # fmt: skip
def test_settings_that_no_comparison_can_have_cost_one_line(override, wanted, byte_data, tmp_path, capfd):
    argv = ["depth", "--train", "--topologies", "pre", "--depths", 1, "--seeds", 1, "--out", tmp_path / "out"]
    data = [] if override.startswith("data") else ["--data", byte_data]
    refused([*argv, *data, override], wanted, tmp_path, capfd)


def test_the_weights_of_a_forged_manifest_are_never_made(good, tmp_path, monkeypatch, capfd):
    """A model is made only of sizes that the files have."""
    folder = forged(good, tmp_path, MANIFESTS["a vocabulary of 2^24"][0])
    monkeypatch.setattr("megaresnorm.generate.build_model", lambda *a, **k: pytest.fail("a model was made"))
    assert main(["generate", str(folder)]) == 4

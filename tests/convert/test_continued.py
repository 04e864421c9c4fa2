"""A model of Transformers in, trained on, and out again: what it said of itself is kept, and no question is asked."""

import hashlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models import recipe_of, save_random
from safetensors.torch import load_file
from spelled import byte_level
from tokenizers import processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.cli import main
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.to_hf import to_hf
from megaresnorm.data.tokenizer import ByteTokenizer
from megaresnorm.recipe.load import load_recipe

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A chat model in BF16: begin token, end tokens, template, card and tokenizer of its own."""
    folder = tmp_path_factory.mktemp("source") / "tiny-llama"
    folder.mkdir()
    made = byte_level()
    begin = made.token_to_id("<|begin_of_text|>")
    made.post_processor = processors.TemplateProcessing(
        "<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    made.save(str(folder / "tokenizer.json"))
    ends = [made.token_to_id("<|endoftext|>"), made.token_to_id("<|im_end|>")]
    config = LlamaConfig(
        vocab_size=made.get_vocab_size() + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=begin, eos_token_id=ends,
        pad_token_id=ends[0], tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({
            "tokenizer_class": "LlamaTokenizerFast", "bos_token": {"content": "<|begin_of_text|>"},
            "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 4096,
            "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
        })
    )  # fmt: skip
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ tools }}")
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny\nlanguage:\n- en\n- no\nbase_model: acme/tiny-base\n"
        "tags: [x]\n---\nHi\n"
    )
    return folder


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory) -> Path:
    """The folder in which the commands that from-hf proposes were run."""
    folder = tmp_path_factory.mktemp("work")
    before = os.getcwd()
    os.chdir(folder)
    try:
        (folder / "text.txt").write_text("the quick brown fox jumps over\n" * 200)
        assert main(["convert", "from-hf", str(llama), "mine", "--data", "data"]) == 0
        assert main(["prepare", "text.txt", "--tokenizer", str(llama), "--bos", "--out", "data", "--workers", "1"]) == 0
        (folder / "mine").rename(folder / "moved")  # its recipe goes with it
        overrides = ["train.steps=3", "train.global_batch=2", "train.tensorboard=false", "train.sample_tokens=0"]
        assert main(["train", "moved/recipe.yaml", *overrides]) == 0
        assert main(["train", "moved/recipe.yaml", *overrides, "train.steps=4"]) == 0  # a resumed run knows it, too
        assert main(["convert", "to-hf", "mine-trained", "hf"]) == 0
    finally:
        os.chdir(before)
    return folder


def test_settings_are_those_to_train_on_with(trained):
    recipe = load_recipe(trained / "moved" / "recipe.yaml")
    assert (recipe.optim.lr, recipe.schedule.kind, recipe.schedule.warmup_steps) == (1e-5, "cosine", 100)
    assert recipe.precision.compute == "bf16" and recipe.train.steps == 1000
    assert recipe.train.initial_weights == str(trained / "moved")
    assert recipe.train.output == str(trained / "mine-trained")  # not within the converted folder


def test_an_export_has_what_the_source_said_of_itself(llama, trained):
    was, now = ({f.name: f for f in folder.iterdir()} for folder in (llama, trained / "hf"))
    config, before = (json.loads(files["config.json"].read_text()) for files in (now, was))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype"):
        assert config[key] == before[key], key
    generation = json.loads(now["generation_config.json"].read_text())
    assert generation["eos_token_id"] == before["eos_token_id"] and generation["bos_token_id"] == before["bos_token_id"]
    assert {t.dtype for t in load_file(now["model.safetensors"]).values()} == {torch.bfloat16}
    assert now["chat_template.jinja"].read_text() == TEMPLATE
    more = trained / "hf" / "additional_chat_templates" / "tool_use.jinja"
    assert more.read_text() == "tools: {{ tools }}"
    assert now["tokenizer.json"].read_bytes() == was["tokenizer.json"].read_bytes()
    settings = json.loads(now["tokenizer_config.json"].read_text())
    assert (settings["bos_token"], settings["eos_token"], settings["pad_token"], settings["model_max_length"]) == (
        "<|begin_of_text|>", "<|im_end|>", "<|endoftext|>", 4096,
    )  # fmt: skip
    assert "auto_map" not in settings  # which names code
    card = yaml.safe_load(now["README.md"].read_text().split("---\n")[1])
    assert card["license"] == "other" and card["license_name"] == "tiny" and card["language"] == ["en", "no"]
    assert card["base_model"] == "acme/tiny-base" and "x" not in card["tags"]
    assert "trained on from `acme/tiny-base` with MegaResNorm" in now["README.md"].read_text()
    theirs = AutoTokenizer.from_pretrained(trained / "hf")
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    assert theirs.encode("the fox")[0] == theirs.bos_token_id == before["bos_token_id"]


def test_the_card_names_the_model_by_its_name_on_the_hub_where_that_is_known(llama, tmp_path):
    import shutil

    snapshot = tmp_path / "models--acme--tiny-chat" / "snapshots" / "0123"
    shutil.copytree(llama, snapshot)
    assert main(["convert", "from-hf", str(snapshot), str(tmp_path / "back"), "--verify", "off"]) == 0
    to_hf(tmp_path / "back", tmp_path / "hf", verify=False)
    card = yaml.safe_load((tmp_path / "hf" / "README.md").read_text().split("---\n")[1])
    assert card["base_model"] == "acme/tiny-chat"


def test_bf16_comes_back_bit_for_bit_where_nothing_was_trained(llama, trained, tmp_path):
    to_hf(trained / "moved", tmp_path / "hf")
    before, after = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "hf"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_begin_and_end_are_those_that_were_trained_with(llama, trained, tmp_path):
    """Where documents began or ended with other tokens than the source's, the export says so."""
    ids = {token.content: i for i, token in byte_level().get_added_tokens_decoder().items()}
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 100)
    for bos, end, begins, ends in (
        (["--bos", "--begin-token", "<|im_start|>"], [], "<|im_start|>", "<|im_end|>"),
        ([], ["--end-token", "<|im_start|>"], "<|begin_of_text|>", "<|im_start|>"),
    ):
        work = tmp_path / begins.strip("<|>")
        command = ["prepare", str(tmp_path / "text.txt"), "--tokenizer", str(llama), *bos, *end, "--workers", "1"]
        assert main([*command, "--out", str(work / "data")]) == 0
        overrides = [f"data.path={work / 'data'}", f"train.output={work / 'run'}", "train.steps=1",
                     "train.global_batch=2", "train.tensorboard=false", "train.sample_tokens=0"]  # fmt: skip
        assert main(["train", str(trained / "moved" / "recipe.yaml"), *overrides]) == 0
        to_hf(work / "run", work / "hf", verify=False)
        config, settings = (json.loads((work / "hf" / f).read_text()) for f in ("config.json", "tokenizer_config.json"))
        assert (settings["bos_token"], settings["eos_token"]) == (begins, ends)
        assert config["bos_token_id"] == ids[begins]
        wanted = [ids["<|endoftext|>"], ids["<|im_end|>"]] if ends == "<|im_end|>" else ids["<|im_start|>"]
        assert config["eos_token_id"] == wanted


def test_a_source_without_a_begin_token_has_none_afterwards(llama, tmp_path):
    """As Qwen: its files say null."""
    import shutil

    shutil.copytree(llama, tmp_path / "m")
    made = byte_level()
    made.save(str(tmp_path / "m" / "tokenizer.json"))
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        path = tmp_path / "m" / name
        found = json.loads(path.read_text())
        null = {"bos_token": None} if name.startswith("tokenizer") else {"bos_token_id": None}
        extra = {"additional_special_tokens": [{"content": "<|im_start|>"}]} if name.startswith("tokenizer") else {}
        path.write_text(json.dumps(found | null | extra))
    assert main(["convert", "from-hf", str(tmp_path / "m"), str(tmp_path / "back"), "--verify", "off"]) == 0
    to_hf(tmp_path / "back", tmp_path / "hf", verify=False)
    config, settings = (json.loads((tmp_path / "hf" / f).read_text()) for f in ("config.json", "tokenizer_config.json"))
    assert config["bos_token_id"] is None and settings["bos_token"] is None
    assert settings["additional_special_tokens"] == ["<|im_start|>"]


def test_another_tokenizer_brings_its_own_tokens(trained, tmp_path):
    """What the source said of its tokenizer is not said of another one; its licence still is."""
    from megaresnorm.checkpoint.format import SOURCE, TensorSlices
    from megaresnorm.checkpoint.writer import save_checkpoint

    native = NativeModel(trained / "moved")
    state = {**native.checkpoint.state, "tokenizer": ByteTokenizer().describe()}
    weights = {name: TensorSlices.of_whole(native.checkpoint.read("weights", name)) for name in native.table}
    attached = {SOURCE: native.checkpoint.source()}
    save_checkpoint(tmp_path / "run" / "checkpoints", 3, {"weights": weights}, state, attached=attached)
    to_hf(tmp_path / "run", tmp_path / "hf", verify=False)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["bos_token_id"] == config["eos_token_id"] == 256 and config["pad_token_id"] is None
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
    assert "license: other" in (tmp_path / "hf" / "README.md").read_text()


def test_compare_rounds_both_alike(llama, trained, tmp_path, capsys):
    """An export in another type is the same model: rounding says nothing of a conversion."""
    capsys.readouterr()
    assert main(["convert", "compare", str(trained / "mine-trained"), str(trained / "hf")]) == 0
    assert "the weights of B are bfloat16, and the other's were rounded alike" in capsys.readouterr().out
    assert main(["convert", "compare", str(trained / "hf"), str(trained / "mine-trained")]) == 0
    assert "the weights of A are bfloat16" in capsys.readouterr().out
    assert main(["convert", "compare", str(llama), str(trained / "moved")]) == 0
    assert "rounded" not in capsys.readouterr().out  # numbers of BF16 in both
    assert main(["convert", "compare", str(llama), str(trained / "hf")]) == 7  # two steps apart
    for topology in ("lns", "keel"):  # constants folded into the weights, and our own code
        run = save_random(tmp_path / topology / "checkpoints", recipe_of({"topology": topology}))
        out = tmp_path / f"{topology} hf"
        assert main(["convert", "to-hf", str(run), str(out), "--dtype", "bf16"]) == 0
        assert main(["convert", "compare", str(run), str(out)]) == 0
        wide = tmp_path / f"{topology} wide"
        assert main(["convert", "to-hf", str(run), str(wide)]) == 0
        assert main(["convert", "compare", str(wide), str(out)]) == 0


def test_diff_says_of_the_weights_alone_that_they_are_equal(trained, tmp_path, capsys):
    run = str(trained / "mine-trained")
    assert main(["convert", "to-hf", run, str(tmp_path / "hf"), "--dtype", "fp32", "--verify", "off"]) == 0
    assert main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "back"), "--verify", "off"]) == 0
    count = len(Checkpoint(next((trained / "mine-trained" / "checkpoints").iterdir())).tensors["weights"])
    capsys.readouterr()
    assert main(["checkpoint", "diff", run, str(tmp_path / "back"), "--only", "weights"]) == 0
    assert capsys.readouterr().out == f"{count} weights are equal, bit for bit\n"
    assert main(["checkpoint", "diff", run, str(tmp_path / "back")]) == 1
    said = capsys.readouterr().out
    assert f"{count} weights are equal, bit for bit\n" in said and f"optimizer: {2 * count}, in A alone\n" in said
    assert said.count("optimizer") < 5  # a line, and the settings
    assert main(["checkpoint", "diff", run, str(tmp_path / "back"), "--only", "optimizer"]) == 4
    assert main(["checkpoint", "diff", run, str(trained / "moved"), "--only", "weights"]) == 1
    assert "tensors differ" in capsys.readouterr().out


def on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Run a command whose standard input is a terminal on which nobody types; its exit code, and what it writes."""
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    finally:
        os.close(ours)
        os.close(theirs)
    return done.returncode, done.stdout


@pytest.mark.parametrize("topology", ["keel", pytest.param("deepnorm", marks=pytest.mark.slow)])
def test_neither_an_export_nor_the_example_of_its_card_asks_a_question(topology, tmp_path):
    recipe = recipe_of({"topology": topology, "vocab_size": 257})
    run = save_random(tmp_path / "run" / "checkpoints", recipe, ByteTokenizer())
    out = tmp_path / "hf"
    code, said = on_a_terminal([sys.executable, "-m", "megaresnorm.cli", "convert", "to-hf", str(run), str(out)])
    assert code == 0 and "PASS" in said and "[y/N]" not in said, said
    example = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert ("trust_remote_code=True" in example) == (topology == "keel") and example.count("from_pretrained") == 2
    example = example.replace('"PATH"', repr(str(out))).replace("max_new_tokens=100", "max_new_tokens=3")
    code, said = on_a_terminal([sys.executable, "-c", example])
    assert code == 0 and "[y/N]" not in said and "Once upon a time" in said, said


def test_source_json_of_a_stranger_is_checked(trained, tmp_path, capsys):
    import shutil

    from megaresnorm.checkpoint.manifest import encode_manifest, read_manifest

    shutil.copytree(trained / "moved", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-00000000"
    for content in (b"{", b'{"dtype": "load"}', b'{"card": {"license": 3}}', b"[]"):
        (folder / "source.json").write_bytes(content)
        manifest = read_manifest(folder)
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"]["source.json"] |= {"size": len(content), "sha256": digest}
        manifest.pop("digest")
        (folder / "manifest.json").write_bytes(encode_manifest(manifest))
        assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 4
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "its source.json is not readable" in error, error

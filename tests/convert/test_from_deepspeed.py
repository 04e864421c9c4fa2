"""Weights that zero_to_fp32.py has written come back bit for bit; of everything else one line says what to do."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from models import DERIVED, LN, recipe_of, save_random
from safetensors.torch import load_file, save_file

from megaresnorm.assemble import build_model
from megaresnorm.cli import main
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.to_hf import to_hf
from megaresnorm.recipe.load import dump_recipe

NEOX = {**DERIVED, **LN, "num_kv_heads": 6, "topology": "pre", "ffn": "gelu", "bias": True, "rope_fraction": 0.5}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """For each model a run of ours and the same as a folder of Transformers."""
    root = tmp_path_factory.mktemp("models")
    for name, settings in {
        "llama": {"topology": "pre"},
        "tied": {"topology": "pre", "tied_embeddings": True},
        "gpt_neox": NEOX,
        "minimax": {"topology": "deepnorm"},
    }.items():
        save_random(root / name / "run" / "checkpoints", recipe_of(settings))
        to_hf(root / name / "run", root / name / "hf", verify=False)
    return root


def trained(models: Path, name: str, folder: Path, rename=lambda name: name, change=lambda tensors: None) -> Path:
    """What zero_to_fp32.py writes for a model of Transformers: tensors alone, in fp32/, beneath config.json."""
    (folder / "fp32").mkdir(parents=True)
    shutil.copy(models / name / "hf" / "config.json", folder)
    tensors = load_file(models / name / "hf" / "model.safetensors")
    change(tensors)
    save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / "fp32" / "model.safetensors")
    return folder / "fp32"


def sharded(folder: Path, drop: str = "") -> None:
    """Two files and an index in place of one, as of a large model."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (i > 4)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file and name != drop}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    native = NativeModel(folder)
    return {name: native.read(name, tuple((0, n) for n in spec.shape)) for name, spec in native.table.items()}


def assert_equal(one: Path, other: Path) -> None:
    mine, its = weights(one), weights(other)
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def convert(*words: object) -> int:
    return main(["convert", "from-deepspeed", *map(str, words)])


def refused(capsys, *words: object) -> str:
    """The line that a conversion ends with. Nothing is written."""
    out = Path(words[-1])
    code = convert(*words, "--verify", "off")
    (line,) = capsys.readouterr().err.splitlines()
    assert code in (2, 4) and not out.exists(), line
    return line


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "wrapped.llm."])
def test_a_prefix_of_all_names_is_left_out(prefix, models, tmp_path):
    folder = trained(models, "llama", tmp_path / "trained", lambda name: prefix + name)
    assert convert(folder, tmp_path / "out", "--verify", "off") == 0
    assert_equal(tmp_path / "out", models / "llama" / "run")


def test_a_prefix_is_left_out_for_the_comparison_of_logits_too(models, tmp_path, capsys):
    folder = trained(models, "tied", tmp_path / "trained", lambda name: f"module.{name}")
    sharded(folder)
    assert convert(folder, tmp_path / "out", "--data", "runs/other") == 0
    said = capsys.readouterr().out
    assert "PASS" in said and f"config.json is that of {tmp_path / 'trained'}" in said
    assert "path: runs/other" in (tmp_path / "out" / "recipe.yaml").read_text()
    assert_equal(tmp_path / "out", models / "tied" / "run")


def test_names_that_differ_inside_of_the_class_are_known(models, tmp_path):
    def rename(name: str) -> str:
        return name.replace("embed_out", "lm_head")

    folder = trained(models, "gpt_neox", tmp_path / "trained", rename)
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    assert convert(folder, tmp_path / "out") == 0
    assert_equal(tmp_path / "out", models / "gpt_neox" / "run")


@pytest.mark.parametrize("kept", ["embedding", "head", "both"])
def test_a_tied_matrix_may_have_either_name_or_both(kept, models, tmp_path):
    def change(tensors: dict) -> None:
        if kept != "embedding":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if kept == "head":
            del tensors["model.embed_tokens.weight"]

    folder = trained(models, "tied", tmp_path / "trained", change=change)
    assert convert(folder, tmp_path / "out", *(() if kept == "head" else ("--verify", "off"))) == 0
    assert_equal(tmp_path / "out", models / "tied" / "run")


def test_the_configuration_can_be_elsewhere(models, tmp_path, capsys):
    folder = trained(models, "llama", tmp_path / "trained")
    (tmp_path / "trained" / "config.json").rename(tmp_path / "config.json")
    assert "give --config" in refused(capsys, folder, tmp_path / "out")
    assert f"--config {folder}: no config.json there" in refused(capsys, folder, "--config", folder, tmp_path / "out")
    for i, where in enumerate((tmp_path, tmp_path / "config.json")):
        assert convert(folder, tmp_path / f"out {i}", "--config", where, "--verify", "off") == 0


def ours(models: Path, name: str, folder: Path, **changes: torch.Tensor) -> tuple[Path, Path]:
    """Weights with our names, as of a program with DeepSpeed's engine around our Transformer, and their recipe."""
    folder.mkdir(parents=True)
    save_file(weights(models / name / "run") | changes, folder / "model.safetensors")
    native = NativeModel(models / name / "run")
    settings = recipe_of(native.recipe.model_dump(exclude_none=True), optim={"lr": 0.0125})
    (folder.parent / "recipe.yaml").write_text(dump_recipe(settings, full=False))
    return folder, folder.parent / "recipe.yaml"


@pytest.mark.parametrize("name", ["minimax", "tied"])
def test_weights_of_our_own_model_need_its_recipe(name, models, tmp_path, capsys):
    folder, recipe = ours(models, name, tmp_path / "trained" / "fp32")
    line = refused(capsys, folder, tmp_path / "out")
    assert "--recipe its recipe, for its tensors have MegaResNorm's names" in line
    assert convert(folder, tmp_path / "out", "--recipe", recipe) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "a model of MegaResNorm" in said and "every weight was read again and is that of the files" in said
    assert convert(folder, tmp_path / "unread", "--recipe", recipe, "--verify", "off") == 0
    assert "verdict not verified" in " ".join(capsys.readouterr().out.split())
    assert_equal(tmp_path / "out", models / name / "run")
    written = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "lr: 0.0125" in written and "output: ../out-trained" in written and "initial_weights: ./" in written


def test_a_program_of_its_own_is_converted_with_what_torch_calls_its_weights(models, tmp_path):
    """The names of state_dict(), a tied output matrix among them, behind DeepSpeed's module."""
    native = NativeModel(models / "tied" / "run")
    _, recipe = ours(models, "tied", tmp_path / "a" / "fp32")
    model = build_model(native.recipe).model
    model.load_state_dict(native.model().state_dict())
    state = {f"module.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    assert "module.head.weight" in state
    (tmp_path / "b").mkdir()
    save_file(state, tmp_path / "b" / "model.safetensors")
    assert convert(tmp_path / "b", tmp_path / "out", "--recipe", recipe) == 0
    assert_equal(tmp_path / "out", models / "tied" / "run")


def test_what_does_not_fit_the_recipe_is_named(models, tmp_path, capsys):
    one, down = torch.ones(4, 4), "blocks.1.ffn.branch.down.weight"
    for i, (change, wanted) in enumerate([
        ({"final_norm.weight": one}, "final_norm.weight is a tensor that the recipe's model does not have"),
        ({down: one}, f"{down} has shape [4, 4], the recipe makes it [24, 36]"),
        ({down: torch.full((24, 36), torch.nan)}, f"{down} holds NaN or infinity"),
        ({"head.weight": one}, "head.weight has shape [4, 4]"),
    ]):  # fmt: skip
        folder, recipe = ours(models, "minimax", tmp_path / str(i) / "fp32", **change)
        assert wanted in refused(capsys, folder, "--recipe", recipe, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    del tensors["blocks.2.attention.branch.qkv.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert "has no tensor blocks.2.attention.branch.qkv.weight" in refused(
        capsys, folder, "--recipe", recipe, tmp_path / "out"
    )
    folder, recipe = ours(models, "tied", tmp_path / "tied" / "fp32", **{"head.weight": torch.ones(40, 24)})
    assert "head.weight differs from embedding.weight" in refused(capsys, folder, "--recipe", recipe, tmp_path / "out")


def test_what_does_not_fit_the_configuration_is_named(models, tmp_path, capsys):
    q, norm = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"
    for i, (change, wanted) in enumerate([
        (lambda tensors: tensors.pop(q), f"has no tensor {q}"),
        (lambda tensors: tensors.update({q: torch.ones(2, 2)}), f"{q} has shape [2, 2]"),
        (lambda tensors: tensors.update(score=torch.ones(2)), "score is a tensor that our model has nothing for"),
        (lambda tensors: tensors.update({norm: torch.full((24,), torch.inf)}), "holds NaN or infinity"),
    ]):  # fmt: skip
        assert wanted in refused(capsys, trained(models, "llama", tmp_path / str(i), change=change), tmp_path / "out")
    other = trained(models, "llama", tmp_path / "two", lambda name: name if name == norm else f"policy.{name}")
    assert f"{norm} does not begin with policy." in refused(capsys, other, tmp_path / "out")
    fused = trained(models, "minimax", tmp_path / "fused", lambda name: name.replace(
        "block_sparse_moe.experts.0.w1.weight", "mlp.experts.gate_up_proj"))  # fmt: skip
    assert "load them into it and call save_pretrained" in refused(capsys, fused, tmp_path / "out")


ZERO = ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt")


def checkpoint(folder: Path, files=ZERO, steps=("global_step9", "global_step10"), latest: bool = True) -> Path:
    """Empty files with the names that DeepSpeed's have, since none of them is read."""
    for step in steps:
        (folder / step).mkdir(parents=True)
        for file in files:
            (folder / step / file).touch(mode=0)
    (folder / "zero_to_fp32.py").touch()
    if latest:
        (folder / "latest").write_text("global_step10")
    return folder


def command_in(line: str) -> list[str]:
    """The words of the command that ends a line."""
    return shlex.split(line[line.index(": python ") + 2 :])


def test_of_deepspeeds_own_files_the_line_has_the_command_for_them(tmp_path, capsys):
    folder = checkpoint(tmp_path / "it's mine")
    made = str(folder / "fp32")
    script = str(folder / "zero_to_fp32.py")
    line = refused(capsys, folder, tmp_path / "out")
    assert "zero_pp_rank_0_mp_rank_00_optim_states.pt" in line or "mp_rank_00_model_states.pt" in line
    assert "is a pickle, which can run code and is never read here" in line
    assert command_in(line) == ["python", script, str(folder), made, "--safe_serialization"]
    (folder / "latest").unlink()
    tag = ["--tag", "global_step10"]
    assert command_in(refused(capsys, folder, tmp_path / "out"))[-3:] == ["--safe_serialization", *tag]
    (folder / "zero_to_fp32.py").unlink()
    inner = command_in(refused(capsys, folder / "global_step9", tmp_path / "out"))
    assert inner == ["python", "-m", "deepspeed.utils.zero_to_fp32", str(folder), made, "--safe_serialization",
                     "--tag", "global_step9"]  # fmt: skip


def test_other_pickles_have_commands_of_their_own(models, tmp_path, capsys):
    tied = checkpoint(tmp_path / "tied")
    shutil.copy(models / "tied" / "hf" / "config.json", tied)
    python, c, code, *paths = command_in(refused(capsys, tied, tmp_path / "out"))
    assert (python, c, paths) == ("python", "-c", [str(tied), str(tied / "fp32")])
    assert "get_fp32_state_dict_from_zero_checkpoint" in code and "clone" in code
    compile(code, "command", "exec")
    stage_0 = checkpoint(tmp_path / "stage 0", ZERO[1:])
    *_, code, path, out = command_in(refused(capsys, stage_0, tmp_path / "out"))
    assert (path, out) == (str(stage_0 / "global_step10" / ZERO[1]), str(stage_0 / "fp32"))
    compile(code, "command", "exec")
    for names in ((*ZERO, "zero_pp_rank_0_mp_rank_01_optim_states.pt"), (*ZERO, "layer_00-model_states.pt")):
        split = checkpoint(tmp_path / str(len(names[-1])), names)
        line = refused(capsys, split, tmp_path / "out")
        assert "split by tensor or pipeline parallelism" in line and "python" not in line


def test_the_command_for_a_models_pickles_makes_what_is_then_read(models, tmp_path, capsys):
    folder = tmp_path / "a model"
    folder.mkdir()
    shutil.copy(models / "tied" / "hf" / "config.json", folder)
    tensors = load_file(models / "tied" / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    half = len(tensors) // 2
    for i, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
        torch.save({name: tensors[name] for name in names}, folder / f"pytorch_model-0000{i}-of-00002.bin")
    *_, code, path, out = command_in(refused(capsys, folder, tmp_path / "out"))
    run_as_a_program(code, path, out)
    assert convert(out, tmp_path / "out", "--verify", "off") == 0
    assert_equal(tmp_path / "out", models / "tied" / "run")


def run_as_a_program(code: str, *arguments: str) -> None:
    """In this process, which has imported torch already."""
    import sys

    before, sys.argv = sys.argv, ["-c", *arguments]
    try:
        exec(compile(code, "command", "exec"), {"__name__": "__main__"})  # noqa: S102
    finally:
        sys.argv = before


def test_safetensors_beside_pickles_are_used_if_they_are_complete(models, tmp_path, capsys):
    folder = trained(models, "llama", tmp_path / "trained")
    checkpoint(folder)
    assert convert(folder, tmp_path / "out", "--verify", "off") == 0
    half = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors")
    capsys.readouterr()
    assert convert(folder, tmp_path / "rounded", "--verify", "off") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "these weights are float16; DeepSpeed's own files have them in FP32: python" in said
    sharded(folder, drop="model.norm.weight")
    line = refused(capsys, folder, tmp_path / "damaged")
    assert "has no tensor model.norm.weight, which the index has there" in line and command_in(line)[0] == "python"
    next(folder.glob("model-00001*")).unlink()
    line = refused(capsys, folder, tmp_path / "damaged")
    assert "is missing" in line and command_in(line)[0] == "python"


def test_what_is_neither_and_options_without_effect_are_refused(models, tmp_path, capsys):
    assert "not a folder" in refused(capsys, tmp_path / "none", tmp_path / "out")
    assert "has no safetensors, and nothing of DeepSpeed's" in refused(capsys, tmp_path, tmp_path / "out")
    folder, recipe = ours(models, "minimax", tmp_path / "trained" / "fp32")
    for option in (["--seq-len", "8"], ["--data", "x"], ["--config", tmp_path], ["--end-token", "x"]):
        line = refused(capsys, folder, "--recipe", recipe, *option, tmp_path / "out")
        assert f"{option[0]} has no effect with --recipe" in line
    text = recipe.read_text()
    recipe.write_text("\n".join(line for line in text.splitlines() if "vocab_size" not in line))
    assert "model.vocab_size is missing, and its data are not here" in refused(
        capsys, folder, "--recipe", recipe, tmp_path / "out"
    )

"""What DeepSpeed has trained and saved, and its own script has made safetensors of, is converted bit for bit."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megaresnorm.assemble import build_model
from megaresnorm.cli import main
from megaresnorm.convert.compare import load_theirs, of_theirs
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.to_hf import to_hf
from megaresnorm.recipe.load import build_recipe, dump_recipe
from megaresnorm.testing import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]
VOCAB = 37
SIZES = {"vocab_size": VOCAB, "num_blocks": 3, "dim": 24, "num_heads": 6, "num_kv_heads": 2, "ffn_dim": 36}
OURS = build_recipe({
    "model": {**SIZES, "seq_len": 32, "vocab_multiple": 8, "topology": "keel"},
    "data": {"path": "none"},
    "train": {"output": "none", "steps": 10},
})  # fmt: skip


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))


def loss_of(logits_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    logits_TV = logits_BSV.float().view(*tokens_BS.shape, -1)[:, :-1, :VOCAB].flatten(0, 1)
    return nn.functional.cross_entropy(logits_TV, tokens_BS[:, 1:].flatten())


def llama(tied: bool, folder: Path | None = None):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        head_dim=8, intermediate_size=36, max_position_embeddings=32, tie_word_embeddings=tied, pad_token_id=0,
    )  # fmt: skip
    if folder is not None:
        config.save_pretrained(folder)
    return LlamaForCausalLM(config)


def train(rank: int, kind: str, stage: int, bf16: bool, folder: Path) -> dict:
    """Five steps of DeepSpeed's engine, as a program without MegaResNorm's trainer makes them."""
    from deepspeed.utils import safe_get_full_fp32_param

    from megaresnorm.engines.deepspeed import load_deepspeed

    deepspeed = load_deepspeed(torch.device("cpu"))
    torch.manual_seed(0)
    is_ours = kind == "ours"
    model = build_model(OURS.model).model if is_ours else llama(kind == "tied", folder if rank == 0 else None)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=config, dist_init_required=False
    )
    tokens_BS = tokens()

    def logits() -> Tensor:
        return engine(tokens_BS) if is_ours else engine(input_ids=tokens_BS, use_cache=False).logits

    for _ in range(5):
        engine.backward(loss_of(logits(), tokens_BS))
        engine.step()
    engine.save_checkpoint(folder)
    wholes = {name: safe_get_full_fp32_param(p) if stage else p.detach() for name, p in model.named_parameters()}
    weights = {name: whole.clone() for name, whole in wholes.items()}
    with torch.no_grad():
        return {"weights": weights, "loss": loss_of(logits(), tokens_BS).item()}


def make_safetensors(folder: Path, capsys, *options: str) -> Path:
    """Run the command that the error names, and return the folder that it is said to make."""
    assert main(["convert", "from-deepspeed", str(folder), str(folder / "out"), *options]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    command = shlex.split(line[line.index(": python ") + 2 :])
    made = shlex.split(line[line.index(" give ") + 6 : line.index(": python ")])
    subprocess.run([sys.executable, *command[1:]], check=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    return Path(*made)


@pytest.mark.parametrize(
    ("kind", "stage", "bf16"),
    [("untied", 2, False), ("untied", 3, True), ("tied", 2, True), ("tied", 3, False), ("tied", 0, False)],
)
def test_a_model_of_transformers_comes_back_bit_for_bit(kind, stage, bf16, tmp_path, capsys):
    folder = tmp_path / "it's trained"
    trained, _ = run_ranks(2, train, kind, stage, bf16, folder)
    made = make_safetensors(folder, capsys)
    assert main(["convert", "from-deepspeed", str(made), str(tmp_path / "ours")]) == 0  # logits are compared
    to_hf(tmp_path / "ours", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == trained["weights"].keys()
    assert all(torch.equal(back[name], weight) for name, weight in trained["weights"].items())
    model, tokens_BS = NativeModel(tmp_path / "ours").model(), tokens()
    with torch.no_grad():
        ours, theirs = model(tokens_BS), of_theirs(load_theirs(tmp_path / "back"))(tokens_BS)
    assert loss_of(ours, tokens_BS).item() == pytest.approx(loss_of(theirs, tokens_BS).item(), abs=1e-6)
    # Of BF16 the engine computes with rounded weights; in FP32 it is the same sum in another order.
    assert loss_of(ours, tokens_BS).item() == pytest.approx(trained["loss"], abs=0.02 if bf16 else 1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_model_of_ours_comes_back_bit_for_bit(stage, tmp_path, capsys):
    folder, recipe = tmp_path / "trained", tmp_path / "recipe.yaml"
    trained, _ = run_ranks(2, train, "ours", stage, False, folder)
    recipe.write_text(dump_recipe(OURS, full=False))
    options = ("--recipe", str(recipe))
    made = make_safetensors(folder, capsys, *options)
    assert main(["convert", "from-deepspeed", str(made), str(tmp_path / "ours"), *options]) == 0
    native = NativeModel(tmp_path / "ours")
    assert native.table.keys() == trained["weights"].keys()
    for name, weight in trained["weights"].items():
        assert torch.equal(native.read(name, tuple((0, size) for size in weight.shape)), weight), name
    with torch.no_grad():
        assert loss_of(native.model()(tokens()), tokens()).item() == pytest.approx(trained["loss"], abs=1e-6)

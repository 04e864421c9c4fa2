"""Training at 100 sub-layers: minutes on a core. Run with: pytest -m slow"""

import json
from pathlib import Path

import pytest

from megaresnorm.data.prepare import PrepareJob, prepare
from megaresnorm.recipe.load import build_recipe
from megaresnorm.trainer import train


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    return prepare(PrepareJob(out=tmp_path_factory.mktemp("data") / "stdlib", corpus="stdlib", workers=2)).folder


def final_loss(stdlib, output, **model) -> float:
    """Mean loss of the last 10 of 150 steps: width 48, sequence 64, batch 8, lr 1e-3, no warm-up, 50 blocks."""
    recipe = build_recipe(
        {
            "model": {
                "num_blocks": 50, "dim": 48, "num_heads": 2, "ffn_dim": 96, "seq_len": 64, "ffn": "gelu",
                "norm": "layernorm", "norm_bias": False, "positions": "learned", **model,
            },
            "data": {"path": str(stdlib)},
            "train": {"output": str(output), "steps": 150, "global_batch": 8, "eval_every": 0, "tensorboard": False},
            "optim": {"lr": 1e-3},
            "schedule": {"kind": "constant"},
        }
    )  # fmt: skip
    summary = train(recipe)
    lines = (Path(recipe.train.output) / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line)["loss"] for line in lines[-10:]]
    final = sum(last) / len(last)
    print(f"{model}: mean loss of the last 10 steps {final:.3f}, validation {summary.valid_loss:.3f}")
    return final


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "trains"), [("deepnorm", True), ("keel", True), ("pre", True), ("post", False)])
def test_100_sublayers_without_warmup(topology, trains, stdlib, tmp_path):
    """Post-norm stays at the frequencies of single bytes; the others learn."""
    final = final_loss(stdlib, tmp_path, topology=topology, embedding_norm=topology != "pre")
    assert final < 2.8 if trains else final > 3.0


@pytest.mark.slow
def test_positions_as_large_as_tokens_slow_a_near_identity_model_down(stdlib, tmp_path):
    """Why learned positions start at half of the tokens' deviation."""
    settings = {"topology": "keel", "embedding_norm": True}
    default = final_loss(stdlib, tmp_path / "default", **settings)
    equal = final_loss(stdlib, tmp_path / "equal", **settings, init={"position_std": 1.0})
    assert equal > default + 0.04

"""A model trained with several ranks, as users train it, in Transformers: text, logits, log-likelihoods."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from launched import ROOT, Launched, train_on_rank
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaresnorm.checkpoint.inspect import newest_of
from megaresnorm.convert.to_hf import to_hf
from megaresnorm.data.prepare import PrepareJob, prepare
from megaresnorm.data.tokenizer import ByteTokenizer
from megaresnorm.generate import generate, load_model
from megaresnorm.recipe.load import load_recipe
from megaresnorm.testing import run_ranks


def test_a_deepnorm_model_trained_under_tp2_x_pp2_writes_the_same_text_in_transformers(tiny, tmp_path):
    recipe = tiny(
        model={"num_blocks": 12, "num_heads": 4, "num_kv_heads": 2, "dim": 32, "seq_len": 64, "ffn_dim": 48},
        train={"steps": 20, "global_batch": 4},
        parallel={"tp": 2, "pp": 2},
        optim={"lr": 3e-3},
    )
    run_ranks(4, train_on_rank, 4, recipe)
    report = to_hf(newest_of(Path(recipe.train.output)), tmp_path / "hf", tolerance=5e-6)
    assert report.match.family.architecture == "MiniMaxForCausalLM" and report.agreement.passed
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    start = tokenizer(tokenizer.eos_token + "def ", return_tensors="pt")
    tokens = theirs.generate(**start, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    ours, _ = load_model(Path(recipe.train.output))
    text = generate(ours, ByteTokenizer(), "def ", 40, temperature=0.0)
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == text and len(text) > 4


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_quickstarts_model_scores_the_same_in_lm_eval(tmp_path):
    """100 sub-layers under tp2 x pp2: pip install lm-eval accelerate first."""
    prepare(PrepareJob(out=tmp_path / "data", corpus="stdlib", tokenizer="sentencepiece", vocab_size=1024))
    overrides = [
        f"data.path={tmp_path / 'data'}", f"train.output={tmp_path / 'run'}", "train.steps=100", "train.micro_batch=2",
        "parallel.tp=2", "parallel.pp=2", "train.tensorboard=false",
    ]  # fmt: skip
    run = Launched(tmp_path, load_recipe(ROOT / "configs" / "quickstart.yaml", overrides), 4)
    assert run.finish(600) == 0, run.text
    report = to_hf(tmp_path / "run", tmp_path / "hf", tolerance=5e-6)
    assert report.agreement.passed
    program = [
        sys.executable,
        str(ROOT / "tools" / "score_with_lm_eval.py"),
        str(tmp_path / "run"),
        str(tmp_path / "hf"),
    ]
    found = subprocess.run(program, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    assert float(found.stdout.split("difference of one ")[1]) < 1e-3

"""Topologies that no class of Transformers has, exported with code of their own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import YARN, recipe_of, save_random
from transformers import AutoModelForCausalLM

from megaresnorm.checkpoint.inspect import compare_tensors
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.convert import modeling_megaresnorm
from megaresnorm.convert.compare import compare, logits_on, of_ours, of_theirs
from megaresnorm.convert.export import ExportSettings
from megaresnorm.convert.from_hf import from_hf
from megaresnorm.convert.match import match_family
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.prompts import random_prompts
from megaresnorm.convert.to_hf import to_hf
from megaresnorm.model.topology import TOPOLOGIES, beside_others

VARIANTS: dict[str, dict] = {
    "llama": {},
    "gpt": {
        "norm": "layernorm", "positions": "learned", "ffn": "gelu", "bias": True, "tied_embeddings": True,
        "qk_norm": "full",
    },
    "gemma": {
        "norm_zero_centered": True, "ffn": "geglu_tanh", "attention_bias": "qkv", "rope_fraction": 0.5,
        "rope_scaling": YARN, "embedding_multiplier": 2.0, "attention_multiplier": 0.3, "attention_softcap": 2.0,
        "logit_softcap": 3.0, "logits_scaling": 2.0, "qk_norm": "head",
    },
}  # fmt: skip
OPTIONS = {"mix_ln": {"mix_ratio": 0.4}, "completep": {"base_dim": 12, "base_num_blocks": 1}}


IN_EVERY_VARIANT = ("deepnorm", "gated")  # in CI; with the slow tests all are


@pytest.mark.parametrize(
    ("topology", "variant"),
    [
        pytest.param(t, v, marks=[] if v == "llama" or t in IN_EVERY_VARIANT else [pytest.mark.slow])
        for t in TOPOLOGIES
        for v in VARIANTS
    ],
)
def test_every_topology_loads_generates_and_comes_back(topology, variant, tmp_path):
    settings = {**beside_others(topology), **VARIANTS[variant], "topology_options": OPTIONS.get(topology, {})}
    recipe = recipe_of({**settings, "topology": topology})
    checkpoint = save_random(tmp_path / "run" / "checkpoints", recipe)
    to_hf(checkpoint, tmp_path / "hf", arch="remote-code", tolerance=5e-6, settings=ExportSettings(max_memory=3000))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32)
    assert type(model).__module__ != modeling_megaresnorm.__name__
    prompts = random_prompts(37, 32, 300)
    ours = logits_on(prompts, of_ours(NativeModel(checkpoint).model()))
    agreement = compare(ours, logits_on(prompts, of_theirs(model)), 5e-6)
    assert agreement.passed, agreement
    tokens = torch.randint(37, (2, 7))
    seen = torch.ones_like(tokens)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens, attention_mask=seen, use_cache=True, **options)
    assert torch.equal(cached, model.generate(tokens, attention_mask=seen, use_cache=False, **options))
    # Padding on the left changes nothing.
    padded, mask = (torch.cat((torch.zeros(2, 3, dtype=torch.long), t), dim=1) for t in (tokens, seen))
    with torch.no_grad():
        alone, beside = model(tokens).logits, model(padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-5 * alone.abs().max().item())
    back = from_hf(tmp_path / "hf", tmp_path / "back", max_memory=3000, tolerance=5e-6)
    assert back.model == recipe.model
    assert list(compare_tensors(Checkpoint(checkpoint), Checkpoint(back.checkpoint), lambda: None)) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"topology": "keel"},
        {"topology": "subln"},
        {"topology": "rezero"},
        {"topology": "layerscale"},
        {"topology": "gated"},
        {"topology": "mix_ln", "topology_options": {"mix_ratio": 0.4}},
        {"topology": "deepnorm", "embedding_norm": False},
        {"topology": "deepnorm", "norm": "layernorm"},
        {"topology": "pre", "qk_norm": "full"},
        {"topology": "reordered", "qk_norm": "head"},
        {"topology": "pre", "norm": "layernorm", "norm_bias": False},
    ],
)
def test_auto_brings_its_own_code_where_no_class_is_exact(settings):
    assert match_family(recipe_of(settings).model).family.name == "megaresnorm"


def test_its_file_needs_torch_and_transformers_alone():
    tree = ast.parse(Path(modeling_megaresnorm.__file__).read_text())
    modules = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    assert modules == {"math", "typing", "torch", "transformers"}


def test_a_loss_of_labels_is_the_mean_of_the_next_tokens(tmp_path):
    checkpoint = save_random(tmp_path / "run" / "checkpoints", recipe_of({"topology": "keel"}))
    to_hf(checkpoint, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokens = torch.randint(37, (2, 9))
    labels = tokens.clone()
    labels[0, :4] = -100
    out = model(tokens, labels=labels)
    logs = out.logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)
    counted = (labels != -100)[:, 1:]
    torch.testing.assert_close(out.loss, -logs[counted].mean())
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_exported_model_runs_where_we_are_not_installed(tmp_path):
    """In a process that cannot import this package."""
    checkpoint = save_random(tmp_path / "run" / "checkpoints", recipe_of({"topology": "keel"}))
    to_hf(checkpoint, tmp_path / "hf", verify=False)
    script = (
        "import sys; sys.modules['megaresnorm'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'hf')!r}, trust_remote_code=True)\n"
        "print(m(torch.tensor([[1, 2, 3]])).logits.double().sum().item())"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-1500:]
    ours = of_ours(NativeModel(checkpoint).model())(torch.tensor([[1, 2, 3]])).double().sum().item()
    assert abs(float(found.stdout) - ours) < 1e-4

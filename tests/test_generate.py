"""Sampling text."""

import shutil
from pathlib import Path

import pytest
import torch

from megaresnorm.assemble import build_model
from megaresnorm.cli import main
from megaresnorm.data.prepare import PrepareJob, prepare
from megaresnorm.data.tokenizer import ByteTokenizer
from megaresnorm.generate import choose, generate, generate_tokens, load_model
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.recipe import KernelRecipe, ModelRecipe, PrecisionRecipe, RopeScaling
from megaresnorm.trainer import train


def model(**settings):
    return build_model(ModelRecipe(dim=16, num_blocks=2, num_heads=2, seq_len=8, vocab_size=257, **settings)).model


def test_text_continues_the_prompt_and_repeats_with_its_seed():
    for positions in ("rope", "learned"):
        one = model(positions=positions)
        with torch.no_grad():
            one.head.weight[256:] = 0  # documents do not end by chance
        text = generate(one, ByteTokenizer(), "hello wörld ", 30, seed=1)
        assert text.startswith("hello wörld ") and len(text) > 20
        assert text == generate(one, ByteTokenizer(), "hello wörld ", 30, seed=1)
        assert text != generate(one, ByteTokenizer(), "hello wörld ", 30, seed=2)


def test_greedy_takes_the_likeliest_token_and_forgets_the_first_half_of_a_full_context():
    one = model()
    tokens = [256, 65]
    window = tokens
    for _ in range(20):
        window = window if len(window) <= 8 else window[-4:]
        tokens.append(int(one(torch.tensor([window]))[-1].argmax()))
        window = [*window, tokens[-1]]
        if tokens[-1] == 256:
            break
    greedy = ByteTokenizer().decode(tokens)
    assert generate(one, ByteTokenizer(), "A", 20, temperature=0.0) == greedy
    assert generate(one, ByteTokenizer(), "A", 20, temperature=1e-5) == greedy


def test_with_a_cache_published_models_settings_count_as_well():
    recipe = ModelRecipe(
        dim=16, num_blocks=2, num_heads=4, num_kv_heads=2, seq_len=24, vocab_size=257, topology="sandwich",
        qk_norm="head", head_dim=8, rope_fraction=0.5,
        rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_seq_len=8),
        attention_multiplier=0.4, attention_softcap=1.5, embedding_multiplier=3.0, logits_scaling=0.1,
        norm_zero_centered=True, ffn="geglu_tanh",
    )  # fmt: skip
    one = build_model(recipe, PrecisionRecipe(compute="fp64")).model
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.2 * torch.randn(p.shape, dtype=p.dtype))
        one.head.weight[256:] = 0
    for softcap in (1.5, None):
        for block in one.blocks.values():
            block.attention.branch.softcap = softcap
        texts = {
            cache: generate(one, ByteTokenizer(), "hello", 60, temperature=0.5, cache=cache) for cache in (True, False)
        }
        assert texts[True] == texts[False] and len(texts[True]) > 20


IN_EVERY_FORM = ("deepnorm", "keel")  # in CI; with the slow tests all are


@pytest.mark.parametrize(
    ("topology", "positions", "attention"),
    [
        pytest.param(t, p, a, marks=[] if (p, a) == ("rope", "sdpa") or t in IN_EVERY_FORM else [pytest.mark.slow])
        for t in TOPOLOGIES
        for p in ("rope", "learned")
        for a in ("sdpa", "blocked")
    ],
)
def test_with_and_without_cache_the_tokens_are_the_same(topology, positions, attention):
    """Greedy and sampled, past the end of the context; in FP64, where rounding decides nothing."""
    recipe = ModelRecipe(
        dim=16, num_blocks=2, num_heads=4, num_kv_heads=2, seq_len=24, vocab_size=257, topology=topology,
        qk_norm="head", positions=positions,
    )  # fmt: skip
    one = build_model(recipe, PrecisionRecipe(compute="fp64"), KernelRecipe(attention=attention)).model
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(0)))
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3}, {"top_k": 20, "top_p": 0.9, "seed": 4}):
        runs = [
            list(generate_tokens(one, [256, *b"deep"], 40, vocab_size=257, cache=cache, **sampling))
            for cache in (True, False)
        ]
        assert runs[0] == runs[1] and len(runs[0]) == 40


def test_the_cache_computes_one_token_at_a_time():
    one = model()
    seen = []
    one.embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    list(generate_tokens(one, [256, 65, 66], 5, vocab_size=257))
    assert seen == [3, 1, 1, 1, 1]


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(byte_data, tiny, tmp_path, capsys):
    recipe = tiny(data={"path": str(byte_data / "tokens")}, model={"vocab_size": 260}, train={"steps": 1})
    train(recipe)
    (tmp_path / "t.txt").write_text("some words and other words, again and again\n" * 200)
    prepare(
        PrepareJob(out=tmp_path / "sp", paths=(str(tmp_path / "t.txt"),), tokenizer="sentencepiece", vocab_size=280)
    )
    assert main(["generate", recipe.train.output, "--tokenizer", str(tmp_path / "sp" / "tokenizer.model")]) == 3
    assert "the tokenizer has 280 tokens, the model of" in capsys.readouterr().err


def test_no_temperature_breaks_the_choice():
    logits = torch.tensor([1.0, 3e4, 2.0])
    for temperature in (1e-40, 1e-5, 1e30):
        assert choose(logits, temperature, None, None, torch.Generator().manual_seed(0)) in range(3)
    assert choose(logits, 1e-40, 2, 0.9, torch.Generator()) == 1


def test_top_k_and_top_p_choose_among_the_likeliest():
    p = torch.tensor([0.05, 0.4, 0.3, 0.2, 0.05])

    def chosen(**limits):
        generator = torch.Generator().manual_seed(0)
        limits = {"top_k": None, "top_p": None, **limits}
        return {choose(p.log(), 1.0, limits["top_k"], limits["top_p"], generator) for _ in range(300)}

    assert chosen() == {0, 1, 2, 3, 4} and chosen(top_k=1) == {1} and chosen(top_k=3) == {1, 2, 3}
    assert chosen(top_p=0.39) == {1} and chosen(top_p=0.6) == {1, 2} and chosen(top_p=0.95) >= {1, 2, 3}
    assert (
        chosen(top_k=2, top_p=0.99) == {1, 2}
        and chosen(top_k=50) == {0, 1, 2, 3, 4}
        and chosen(top_p=1.0) == {0, 1, 2, 3, 4}
    )
    counts = torch.zeros(5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5000):
        counts[choose(p.log(), 1.0, 3, None, generator)] += 1
    torch.testing.assert_close(counts / 5000, torch.tensor([0, 4, 3, 2, 0]) / 9, rtol=0, atol=0.025)


def test_the_command_continues_a_checkpoint(tiny, tmp_path, capsys):
    recipe = tiny(model={"seq_len": 32})
    train(recipe)
    run = recipe.train.output
    command = ["generate", run, "--prompt", "def é", "--tokens", "30", "--seed", "5"]
    capsys.readouterr()
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.startswith("def é")
    assert main([*command, "--no-cache"]) == 0 and capsys.readouterr().out == text
    (folder,) = Path(run, "checkpoints").iterdir()
    assert main(["generate", str(folder), *command[2:]]) == 0 and capsys.readouterr().out == text
    loaded, tokenizer = load_model(folder)
    assert text == generate(loaded, tokenizer, "def é", 30, seed=5) + "\n"
    assert main([*command, "--samples", "2", "--top-k", "5", "--top-p", "0.9", "--temperature", "0.5"]) == 0
    assert capsys.readouterr().out.count("--- seed") == 2


def test_a_checkpoint_brings_its_tokenizer(tiny, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("some words and other words, again and again\n" * 200)
    prepare(
        PrepareJob(out=tmp_path / "sp", paths=(str(tmp_path / "t.txt"),), tokenizer="sentencepiece", vocab_size=280)
    )
    recipe = tiny(data={"path": str(tmp_path / "sp"), "valid_fraction": 0.0}, train={"steps": 2})
    train(recipe)
    shutil.rmtree(tmp_path / "sp")
    capsys.readouterr()
    assert main(["generate", recipe.train.output, "--prompt", "other words", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("other words")
    file = next(Path(recipe.train.output, "checkpoints").iterdir()) / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert main(["generate", recipe.train.output]) == 4 and "tokenizer.model: damaged" in capsys.readouterr().err


def test_a_checkpoint_of_bare_files_is_given_a_tokenizer(byte_data, tiny, tmp_path, capsys):
    recipe = tiny(data={"path": str(byte_data / "tokens")}, model={"vocab_size": 300}, train={"steps": 2})
    train(recipe)
    assert main(["generate", recipe.train.output]) == 4
    assert "has no tokenizer (trained on bare token files); give --tokenizer FILE or bytes" in capsys.readouterr().err
    assert main(["generate", recipe.train.output, "--tokenizer", "bytes", "--tokens", "3"]) == 0
    (tmp_path / "t.txt").write_text("some words and other words, again and again\n" * 200)
    prepare(
        PrepareJob(out=tmp_path / "sp", paths=(str(tmp_path / "t.txt"),), tokenizer="sentencepiece", vocab_size=280)
    )
    assert (
        main(
            ["generate", recipe.train.output, "--tokenizer", str(tmp_path / "sp" / "tokenizer.model"), "--tokens", "3"]
        )
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nowhere"], "nowhere/manifest.json: not there; wanted a folder such as"),
        (["RUN", "--tokenizer", "x.model"], "has its own tokenizer; remove --tokenizer"),
    ],
)
def test_bad_checkpoints_cost_one_line(arguments, wanted, tiny, capsys):
    recipe = tiny(train={"steps": 1})
    train(recipe)
    assert main(["generate", *(recipe.train.output if a == "RUN" else a for a in arguments)]) == 4
    error = capsys.readouterr().err
    assert wanted in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "bad", ["--top-p 1.5", "--top-p 0", "--temperature -1", "--temperature nan", "--top-k 0", "--seed -1"]
)
def test_bad_arguments_cost_one_line(bad, capsys):
    assert main(["generate", "x", *bad.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"megaresnorm: error: {bad.split()[0]}: ")


def test_the_end_of_a_document_ends_the_text():
    one = model()
    prompt = torch.tensor([[256, 65]])
    with torch.no_grad():
        hidden = one.finish(one.run_blocks(one.embed(prompt, one.rows(prompt)), one.rows(prompt)))
        one.head.weight[:] = 0
        one.head.weight[256] = 1e4 * hidden.local[-1]
    assert generate(one, ByteTokenizer(), "A", 20) == "A"


def test_a_model_with_more_tokens_than_its_data_generates_tokens_of_its_data():
    one = build_model(ModelRecipe(dim=16, num_blocks=1, num_heads=2, seq_len=8, vocab_size=4000)).model
    with torch.no_grad():
        one.head.weight[256] = 0
    assert len(generate(one, ByteTokenizer(), "A", 40)) > 1

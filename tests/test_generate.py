"""Sampling text."""

import torch

from megaresnorm.assemble import build_model
from megaresnorm.data.tokenizer import ByteTokenizer
from megaresnorm.generate import generate
from megaresnorm.recipe import ModelRecipe


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


def test_low_temperature_is_greedy():
    one = model()
    tokens = [256, 65]
    for _ in range(20):
        tokens.append(int(one(torch.tensor([tokens[-8:]]))[-1].argmax()))
        if tokens[-1] == 256:
            break
    assert generate(one, ByteTokenizer(), "A", 20, temperature=1e-5) == ByteTokenizer().decode(tokens)


def test_the_end_of_a_document_ends_the_text():
    one = model()
    prompt = torch.tensor([[256, 65]])
    with torch.no_grad():
        hidden = one.finish(one.run_blocks(one.embed(prompt, one.rows(prompt)), one.rows(prompt)))
        one.head.weight[:] = 0
        one.head.weight[256] = 1e4 * hidden[-1]
    assert generate(one, ByteTokenizer(), "A", 20) == "A"


def test_a_model_with_more_tokens_than_its_data_generates_tokens_of_its_data():
    one = build_model(ModelRecipe(dim=16, num_blocks=1, num_heads=2, seq_len=8, vocab_size=4000)).model
    with torch.no_grad():
        one.head.weight[256] = 0
    assert len(generate(one, ByteTokenizer(), "A", 40)) > 1

"""Text from a model."""

import torch

from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer, tokenizer: Tokenizer, prompt: str, num_tokens: int, *, temperature: float = 0.8, seed: int = 0
) -> str:
    """Continue ``prompt`` (or start a new document) by up to ``num_tokens`` sampled tokens, and return prompt and continuation.

    Every token is computed from the last model.seq_len tokens anew. Ends early at the end of a document.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = [tokenizer.eod, *tokenizer.encode(prompt).tolist()]
    for _ in range(num_tokens):
        window = torch.tensor([ids[-model.recipe.seq_len :]], device=device)
        logits_V = model(window)[-1, : tokenizer.vocab_size].float().cpu()  # a model may have more tokens than its data
        chosen = int(torch.multinomial(torch.softmax(logits_V / temperature, dim=-1), 1, generator=generator))
        if chosen == tokenizer.eod:
            break
        ids.append(chosen)
    return tokenizer.decode(ids[1:])

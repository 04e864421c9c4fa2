"""The README.md of an exported model: what it is, how to load it, how exactly it was converted."""

import torch

from megaresnorm.convert.compare import Agreement
from megaresnorm.convert.native import OURS, NativeModel
from megaresnorm.convert.plan import Plan

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- megaresnorm
- {topology}
---

# {topology}, {blocks} blocks

A decoder-only language model of {sublayers} sub-layers, trained with MegaResNorm and exported as `{architecture}` in {dtype}.

| | |
| --- | --- |
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{trust})
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

{start}
## Exactness

{exactness}
"""
_START = """Every document of the training data follows the token that ends the one before, so a text starts with it:
`tokenizer.eos_token + text`.
"""


def model_card(
    native: NativeModel, dtype: torch.dtype, chosen: Plan, agreement: Agreement | None, rounding: Agreement | None
) -> str:
    recipe, state = native.recipe, native.state
    rows = {
        "residual topology": f"`{recipe.topology}`",
        "width": f"{recipe.dim:,}",
        "heads (of keys and values)": f"{recipe.num_heads} ({recipe.kv_heads})",
        "vocabulary": f"{recipe.vocab_size:,}",
        "longest sequence": f"{recipe.seq_len:,}",
        "parameters": f"{sum(spec.num_elements for spec in native.table.values()):,}",
        "step": f"{native.checkpoint.step:,}",
        "samples": f"{state.samples:,}",
    }
    if state.train_loss is not None:
        rows["training loss, nats a token"] = f"{state.train_loss:.4f}"
    return _CARD.format(
        topology=recipe.topology,
        blocks=recipe.num_blocks,
        sublayers=2 * recipe.num_blocks,
        architecture=chosen.family.architecture,
        dtype=str(dtype).removeprefix("torch."),
        rows=_table(rows),
        trust=", trust_remote_code=True" if chosen.family.name == OURS else "",
        start=_START if state.tokenizer is not None else "",
        exactness="\n".join(_exactness(chosen, agreement, rounding)),
    )


def _exactness(chosen: Plan, agreement: Agreement | None, rounding: Agreement | None) -> list[str]:
    lines = [f"* {note}." for note in chosen.notes]
    if chosen.fold is not None:
        lines.append("* Constants of the topology are folded into the weights, which rounds them once more.")
    if agreement is None:
        return [*lines, "The logits were not compared with the checkpoint's."]
    rows = _table(agreement.rows() | {"verdict": "PASS"})
    lines += ["", "Logits in FP32 beside the checkpoint's:", "", "| | |", "| --- | --- |", rows]
    if rounding is not None:
        moved = f"Rounding the weights moves logits by up to {rounding.largest:.3g}"
        lines += ["", f"{moved}; {rounding.top1:.2%} of the likeliest tokens stay."]
    return lines


def _table(rows: dict[str, str]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())

"""A checkpoint of ours as a model of Hugging Face Transformers, with a README.md that says how exact it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaresnorm.convert.compare import (
    TOLERANCE,
    Agreement,
    compare,
    kept_logits_on,
    load_theirs,
    logits_on,
    of_ours,
    of_theirs,
)
from megaresnorm.convert.export import Export, ExportSettings, export
from megaresnorm.convert.family import OURS
from megaresnorm.convert.files import CONFIG, refuse_existing, write_json
from megaresnorm.convert.match import Match, match_family
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.prompts import check_memory, prompts_of
from megaresnorm.convert.provenance import Ids, Provenance
from megaresnorm.convert.remote import FILE, code
from megaresnorm.data.hub import card_fields
from megaresnorm.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Report:
    """Result of a conversion to Transformers.

    Attributes:
        folder: where.
        match: which architecture holds the model, and how.
        num_bytes: of the weights.
        files: how many files the weights are in.
        agreement: with the checkpoint; None where it was not verified.
        rounding: what rounding the weights to another type has changed.
    """

    folder: Path
    match: Match
    num_bytes: int
    files: int
    agreement: Agreement | None
    rounding: Agreement | None = None


def to_hf(
    checkpoint: Path,
    out: Path,
    *,
    arch: str = "auto",
    verify: bool = True,
    tolerance: float = TOLERANCE,
    settings: ExportSettings | None = None,
) -> Report:
    """Write ``out`` for Transformers.

    Args:
        checkpoint: one of ours, or a run: its newest.
        out: a folder that is not there yet.
        arch: as ``match_family`` takes it.
        verify: load the result by Transformers and compare its logits, which takes the whole model in FP32.
        tolerance: largest difference, as a share of the largest logit.
        settings: how it is written.

    Raises:
        ConfigError, CheckpointError, DataError: what cannot be converted.
        ConversionError: the written model does not compute the same; ``out`` is not there then.
    """
    settings = settings or ExportSettings()
    refuse_existing(out)
    native = NativeModel(checkpoint, settings.progress("verifying the checkpoint", 0))
    match = match_family(native.recipe, arch)

    def check(num_elements: int) -> None:
        if verify:
            check_memory(4 * num_elements, native.recipe.vocab_size or 0)

    with export(native, match, out, settings, check) as made:
        write_config(made)
        agreement, rounding = verify_export(made, tolerance) if verify else (None, None)
        files = len(list(made.folder.glob("model*.safetensors")))
        (made.folder / "README.md").write_text(model_card(made, agreement, rounding), encoding="utf-8")
    return Report(out, match, made.num_bytes, files, agreement, rounding)


def write_config(made: Export) -> None:
    """Write what Transformers reads beside weights and tokenizer, and our modeling code where the model needs it."""
    write_json(made.folder / CONFIG, config_of(made))
    provenance = made.native.provenance
    ids = _ids(made.tokenizer, provenance, {} if provenance is None else provenance.ids | provenance.generation_ids)
    write_json(made.folder / "generation_config.json", {"_from_model_config": True, **ids})
    if made.match.family.name == OURS:
        (made.folder / FILE).write_bytes(code())


def config_of(made: Export) -> dict[str, Any]:
    """The config.json: what Transformers reads, and the recipe of the model for the way back."""
    provenance = made.native.provenance
    return {
        "architectures": [made.match.family.architecture],
        "model_type": made.match.family.name,
        **made.match.family.config(made.match.recipe),
        "dtype": str(made.dtype).removeprefix("torch."),
        **_ids(made.tokenizer, provenance, {} if provenance is None else provenance.ids),
        "use_cache": True,
        **made.native.origin(made.tokenizer),
    }


def _ids(tokenizer: Tokenizer | None, provenance: Provenance | None, given: Ids) -> Ids:
    """Tokens that begin, end and pad texts.

    Args:
        given: those of the model that was trained on, which count while its tokenizer is the same and documents began
            and ended with them.
    """
    end = None if tokenizer is None else tokenizer.eod
    begin = end if tokenizer is None or tokenizer.bos is None else tokenizer.bos
    ids: Ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": None}
    if provenance is None or not (tokenizer is None or provenance.belongs_to(tokenizer)):
        return ids
    ids |= given
    ends = ids["eos_token_id"]
    if end is not None and end not in (ends if isinstance(ends, list) else [ends]):
        ids["eos_token_id"] = end
    if tokenizer is not None and tokenizer.bos is not None:
        ids["bos_token_id"] = tokenizer.bos
    return ids


def verify_export(made: Export, tolerance: float) -> tuple[Agreement, Agreement | None]:
    """The written model beside the checkpoint, and what rounding the weights has changed, where they were rounded.

    Raises:
        ConversionError: the two do not compute the same.
    """
    native, prompts = made.native, prompts_of(made.native, made.tokenizer)
    rounded_to = made.dtype if made.dtype.itemsize < native.dtype.itemsize else None
    theirs = kept_logits_on(prompts, lambda: of_theirs(load_theirs(made.folder)))
    # No name for our model: it must be gone before the next one is made.
    agreement = compare(logits_on(prompts, of_ours(native.model(rounded_to, made.match.factor))), theirs, tolerance)
    agreement.judge("the written model")
    return agreement, None if rounded_to is None else compare(logits_on(prompts, of_ours(native.model())), theirs)


_CARD = """---
{fields}---

# {topology}, {blocks} blocks

A decoder-only language model of {sublayers} sub-layers, trained {base}with MegaResNorm and \
exported as `{architecture}` in {dtype}.

| | |
| --- | --- |
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{trust})
{example}```

## Exactness

{exactness}
"""
_EXAMPLE = """tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})
text = {text}  # every document of the training data follows that token
tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=100)[0]))
"""


def model_card(made: Export, agreement: Agreement | None, rounding: Agreement | None) -> str:
    """The README.md of an exported model: what it is, how to load it, how exactly it was converted."""
    native, match = made.native, made.match
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
    trust = ", trust_remote_code=True" if match.family.name == OURS else ""
    provenance = native.provenance
    names = [] if provenance is None else provenance.base_models
    fields: dict[str, Any] = {} if provenance is None else dict(provenance.card)
    fields.pop("base_model", None)
    if names:
        fields["base_model"] = names[0] if len(names) == 1 else names
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    fields["tags"] = ["megaresnorm", recipe.topology]
    return _CARD.format(
        fields=card_fields(fields),
        topology=recipe.topology,
        blocks=recipe.num_blocks,
        sublayers=2 * recipe.num_blocks,
        architecture=match.family.architecture,
        base=f"on from {', '.join(f'`{name}`' for name in names)} " if names else "",
        dtype=str(made.dtype).removeprefix("torch."),
        rows=_table(rows),
        trust=trust,
        example="" if made.tokenizer is None else _EXAMPLE.format(trust=trust, text=_text(made.tokenizer)),
        exactness="\n".join(_exactness(match, agreement, rounding)).lstrip("\n"),
    )


def _text(tokenizer: Tokenizer) -> str:
    """The text of the card's example, in Python: it starts as every document of the training data does."""
    return f'tokenizer.{"eos" if tokenizer.bos is None else "bos"}_token + "Once upon a time"'


def _exactness(match: Match, agreement: Agreement | None, rounding: Agreement | None) -> list[str]:
    lines = [f"* {note}." for note in match.notes]
    if match.fold is not None:
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

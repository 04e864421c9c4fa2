"""Writes the parts of docs/ that follow from the code: the settings, and what they are called elsewhere.

python tools/make_docs.py            # writes them
python tools/make_docs.py --check    # exit code 1 where a page is not what it would write
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from megaresnorm.cli.recipes import recipe_schema
from megaresnorm.recipe.names import Foreign, foreign_names

DOCS = Path(__file__).parents[1] / "docs"
MARK = "<!-- What follows is written by tools/make_docs.py. -->\n"
FRAMEWORKS = {
    "megatron": "Megatron-LM",
    "torchtitan": "torchtitan",
    "deepspeed": "DeepSpeed",
    "hf": "Hugging Face (TrainingArguments, config.json, accelerate)",
    "others": "Other names",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, made in (("configuration.md", settings()), ("coming-from.md", names())):
        page = DOCS / name
        old = page.read_text(encoding="utf-8")
        new = old[: old.index(MARK)] + MARK + "\n" + made
        if new != old:
            stale.append(name)
            if not check:
                page.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'not up to date' if check else 'written'}: {', '.join(stale)}")
    return int(check and bool(stale))


def names() -> str:
    """A list for each framework."""
    parts = []
    for framework, title in FRAMEWORKS.items():
        rows = [one for one in foreign_names() if one.framework == framework]
        parts.append("\n".join([f"## {title}\n", *(item(f"`{one.name}`", meaning(one)) for one in rows)]))
    return "\n\n".join(parts) + "\n"


def meaning(one: Foreign) -> str:
    """Our key, the sentence, or both."""
    return ": ".join(part for part in (f"`{one.key}`" if one.key else "", one.sentence) if part)


def settings() -> str:
    """A list for each section of a recipe, from its JSON schema."""
    schema = recipe_schema()
    parts: list[str] = []
    section(schema, "", schema, parts)
    return "\n\n".join(parts) + "\n"


def section(node: dict[str, Any], name: str, schema: dict[str, Any], parts: list[str]) -> None:
    """Append the list of one section, then those of the sections in it, and of the items of its lists."""
    rows, inner = [], []
    for key, field in node["properties"].items():
        reference = reference_of(field)
        full = f"{name}.{key}" if name else key
        if reference is not None:
            inner.append((full, schema["$defs"][reference]))
        inner += [(f"{full}[]", schema["$defs"][one]) for one in items_of(field)]
        needed = key in node.get("required", [])
        if reference is not None:
            continue
        default = "required" if needed else f"default {shown(field['default'])}"
        rows.append(item(f"`{full}` ({kind_of(field, schema)}; {default})", field.get("description", "")))
    if rows:
        parts.append(
            "\n".join([f"## {name}\n\n{' '.join(node.get('description', '').replace('``', '`').split())}\n", *rows])
        )
    for full, one in inner:
        section(one, full, schema, parts)


def reference_of(field: dict[str, Any]) -> str | None:
    """Name of the section that a field is, if it is one."""
    for one in (field, *field.get("anyOf", []), *field.get("allOf", [])):
        if "$ref" in one:
            return one["$ref"].rpartition("/")[2]
    return None


def items_of(field: dict[str, Any]) -> list[str]:
    """Names of the sections that a list holds."""
    found = [reference_of(one["items"]) for one in field.get("anyOf", [field]) if "items" in one]
    return [one for one in found if one is not None]


def kind_of(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """Type of a setting, in a few words."""
    if reference_of(field) is not None:
        return "a section"
    found = []
    for one in field.get("anyOf", [field]):
        if one.get("type") == "null":
            continue
        if "enum" in one or "const" in one:
            found.append(", ".join(f"`{value}`" for value in one.get("enum", [one.get("const")])))
        elif one.get("type") == "array":
            items = one.get("items", {})
            of = "sections" if reference_of(items) else kind_of(items, schema)
            found.append(f"list of {of}")
        elif one.get("type") == "object":
            found.append("names and paths")
        else:
            words = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "string": "text"}
            word = words[one["type"]]
            found.append("path" if one.get("format") == "path" else word + bounds(one))
    return " or ".join(dict.fromkeys(found))


def bounds(one: dict[str, Any]) -> str:
    """The bounds that a user can meet."""
    low, above = one.get("minimum"), one.get("exclusiveMinimum")
    high, below = one.get("maximum"), one.get("exclusiveMaximum")
    parts = [f"≥ {low:g}"] if low is not None else [f"> {above:g}"] if above is not None else []
    parts += [f"≤ {high:g}"] if high is not None and high < 1e6 else []
    parts += [f"< {below:g}"] if below is not None and below < 1e6 else []
    return f" {', '.join(parts)}" if parts else ""


def shown(value: Any) -> str:
    """A default as YAML has it."""
    words = "unset" if value is None else json.dumps(value) if isinstance(value, bool | list) or value == "" else value
    return words if value is None else f"`{words}`"


def item(name: str, text: str) -> str:
    """An item of a list, in lines of at most 120 characters."""
    text = " ".join(f"* {name}: {text}".replace("``", "`").split())
    return textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())

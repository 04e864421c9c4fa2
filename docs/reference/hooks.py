"""For the site: links into the source tree, which is not part of it, lead to the reference if that has the module."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1]
MODULES = {
    module: page.stem
    for page in (DOCS / "reference").glob("*.md")
    for module in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Called by mkdocs with the text of every page."""
    up = "../" * page.file.src_uri.count("/")

    def link(match: re.Match) -> str:
        text, target = match[1], match[2].lstrip("./")
        module = target.removesuffix(".py").replace("/", ".")
        return f"[{text}]({up}reference/{MODULES[module]}.md#{module})" if module in MODULES else text

    return re.sub(r"\[([^\]]*)\]\(((?:\.\./)+(?:megaresnorm|tests|tools|launch|configs|README)[^)]*)\)", link, markdown)

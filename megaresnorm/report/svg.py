"""SVG files as elements of a page: no namespaces, no styles for everything, ids of their own. Pure text."""

import re
from collections.abc import Mapping
from xml.etree import ElementTree

_DIGITS = re.compile(r"-?\d+\.\d{3,}")
_URL = re.compile(r"url\(#([^)]*)\)")
_FAMILY = re.compile(r"font-family: [^;]*;? ?")
_FONT = re.compile(r"font: [^;]*?([\d.]+px)[^;]*")


def inlined(file: bytes, name: str, title: str, variables: Mapping[str, str]) -> str:
    """An SVG file as an element of a page that has others.

    Args:
        name: prefix of its ids.
        title: what readers of screens say.
        variables: colours -> what takes their places.
    """
    root = ElementTree.fromstring(file)
    for parent in [*root.iter()]:
        for child in [*parent]:
            if _name(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
        element.tag = _name(element.tag)
        element.attrib = {_name(key): _value(_name(key), value, name) for key, value in element.attrib.items()}
        for colour, variable in variables.items():
            for key in ("style", "fill", "stroke"):
                if key in element.attrib:
                    element.set(key, element.attrib[key].replace(colour, variable))
    used = {name for element in root.iter() for name in _references(element)}
    for element in root.iter():
        if element.attrib.get("id") not in used:
            element.attrib.pop("id", None)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib = {"role": "img", "aria-label": title, **root.attrib}
    return ElementTree.tostring(root, encoding="unicode")


def _name(tag: str) -> str:
    """Without its namespace."""
    return tag.rpartition("}")[2]


def _references(element: ElementTree.Element) -> list[str]:
    """Ids that an element refers to."""
    href = element.attrib.get("href", "")
    return [*([href[1:]] if href.startswith("#") else []), *_URL.findall(" ".join(element.attrib.values()))]


def _value(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value[1:]}" if value.startswith("#") else value
    value = _URL.sub(rf"url(#{name}-\1)", value)
    if key == "style":
        return _FONT.sub(r"font-size: \1", _FAMILY.sub("", value))  # the page's own font
    return _DIGITS.sub(lambda digits: f"{float(digits[0]):.2f}".rstrip("0").rstrip("."), value) if key == "d" else value

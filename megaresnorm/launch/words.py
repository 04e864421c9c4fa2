"""Words of a command line in characters that no shell changes, for launchers that join them with spaces."""

from collections.abc import Sequence
from urllib.parse import quote, unquote

MARK = "--encoded"  # the words behind it are encoded
_KEPT = "/:=,@+"  # besides letters, digits and _ . -


def encoded(words: Sequence[str]) -> list[str]:
    """Words with ``%`` and two hex digits in the place of each byte that a shell may change (RFC 3986).

    >>> encoded(["r.yaml", "train.output=runs/a b"])
    ['--encoded', 'r.yaml', 'train.output=runs/a%20b']
    >>> encoded(["r.yaml", "model.dim=64"])
    ['r.yaml', 'model.dim=64']
    """
    found = [quote(word, safe=_KEPT).replace("~", "%7E") for word in words]
    return list(words) if found == list(words) else [MARK, *found]


def decoded(words: Sequence[str]) -> list[str]:
    """The words that ``encoded`` was given."""
    if MARK not in words:
        return list(words)
    start = list(words).index(MARK)
    return [*words[:start], *map(unquote, words[start + 1 :])]

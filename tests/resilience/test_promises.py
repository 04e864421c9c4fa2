"""What docs/reliability.md promises is held by tests that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_row_of_the_matrix_names_one_test():
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| [^|]+ \| `(\w+): (\w+)` \|$", page, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, 38))
    for _, module, name in rows:
        (file,) = (ROOT / "tests").glob(f"*/test_{module}.py")
        found = re.findall(rf"^def test_{name}\w*\(", file.read_text(), re.MULTILINE)
        assert len(found) == 1, f"{module}: {name}"

"""What docs/reliability.md promises is held by tests that there are, and that run where it says that they do."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SLOW = "pytest.mark.slow"


def page() -> str:
    return (ROOT / "docs" / "reliability.md").read_text()


def rows() -> list[tuple[str, str, Path, str]]:
    """Number, star, file and beginning of the test's name of each row of the matrix."""
    found = re.findall(r"^\| (\d+)(\*?) \| [^|]+ \| [^|]+ \| `(\w+): (\w+)` \|$", page(), re.MULTILINE)
    return [(number, star, *(ROOT / "tests").glob(f"*/test_{module}.py"), name) for number, star, module, name in found]


def test_every_row_of_the_matrix_names_one_test_and_stars_those_that_are_slow():
    assert [int(number) for number, *_ in rows()] == list(range(1, 38))
    for number, star, file, name in rows():
        tree = ast.parse(file.read_text())
        found = [one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name.startswith(f"test_{name}")]
        assert len(found) == 1, f"{file.name}: {name}"
        assert is_slow(tree, found[0]) == bool(star), f"row {number}: {file.name}: {name}"


def is_slow(module: ast.Module, test: ast.FunctionDef) -> bool:
    """Whether a test, or each of its cases, is marked slow; by text: nothing is imported."""
    of_module = [ast.unparse(one) for one in module.body if isinstance(one, ast.Assign)]
    if any(one.startswith("pytestmark") and SLOW in one for one in of_module):
        return True
    return any(ast.unparse(one) == SLOW or _all_cases_are(one) for one in test.decorator_list)


def _all_cases_are(decorator: ast.expr) -> bool:
    """Whether it is parametrize, with a list each case of which is marked."""
    if not isinstance(decorator, ast.Call) or len(decorator.args) < 2:
        return False
    cases = getattr(decorator.args[1], "elts", [])
    return bool(cases) and all(SLOW in ast.unparse(case) for case in cases)


def test_what_is_slow_is_told_from_what_has_a_fast_case():
    for source, slow in {
        "@pytest.mark.slow\ndef test_a(): pass": True,
        "def test_a(): pass": False,
        "pytestmark = [pytest.mark.slow]\ndef test_a(): pass": True,
        "@pytest.mark.parametrize('x', [1, pytest.param(2, marks=pytest.mark.slow)])\ndef test_a(x): pass": False,
        "@pytest.mark.parametrize('x', [pytest.param(2, marks=pytest.mark.slow)])\ndef test_a(x): pass": True,
    }.items():
        module = ast.parse(source)
        assert is_slow(module, module.body[-1]) == slow, source


def test_the_command_behind_the_matrix_has_the_folders_of_all_its_tests():
    (command,) = re.findall(r"`bash launch/test.sh ([^`]+)` runs\nthose without a star", page())
    assert command.split() == sorted({str(file.parent.relative_to(ROOT)) for _, _, file, _ in rows()})

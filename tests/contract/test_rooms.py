"""Imports go one way: a room may import the rooms and modules above it, never those below."""

import ast

import pytest

from medkit.stage import ROOT

ORDER = [
    {"params", "stage", "sources", "statistics", "variants", "plotting", "code_digest"},
    {"prompts"},
    {"data"},
    {"modeling"},
    {"lora"},
    {"distillation", "quantization"},  # siblings: neither imports the other
    {"inference"},
    {"evaluation"},
    {"reporting"},
    {"checks", "preflight"},
    {"runner"},
    {"sweep"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
PACKAGE = ROOT / "medkit"


def imported_rooms(path):
    """Names of the rooms and top-level modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "medkit":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medkit."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("medkit."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_what_stands_above(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for other in set(imported_rooms(path)) - {room}:
        allowed = LEVEL[other] < LEVEL[room] or LEVEL[other] == LEVEL[room] == 0
        assert allowed, f"{path.relative_to(PACKAGE)} imports {other}, which stands below it"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_importing_a_module_calls_nothing_for_its_effect(path):
    """So it silences neither Python's warnings nor transformers' log, which belong to whoever imports the package."""
    calls = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)]
    assert [ast.unparse(call) for call in calls] == []

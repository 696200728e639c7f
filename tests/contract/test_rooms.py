"""Imports go one way: a room may import the rooms and modules above it, never those below."""

import ast

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
    {"run_store"},
    {"runner"},
    {"sweep"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
PACKAGE = ROOT / "medkit"
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_rooms(path):
    """Names of the rooms and top-level modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "medkit":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medkit."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("medkit."))


def test_a_file_imports_only_what_stands_above_its_room():
    wrong = []
    for path in FILES:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in set(imported_rooms(path)) - {room} if room != "__init__" else ():
            if not (LEVEL[other] < LEVEL[room] or LEVEL[other] == LEVEL[room] == 0):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert FILES and wrong == []


def test_importing_a_module_calls_nothing_for_its_effect():
    """So it silences neither Python's warnings nor transformers' log, which belong to whoever imports the package."""
    statements = [node for path in FILES for node in ast.parse(path.read_text()).body]
    calls = [node for node in statements if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert [ast.unparse(call) for call in calls] == []

"""The room depends on public names of its libraries, and on bitsandbytes' storage format of a bounded version."""

import ast
import tomllib

import pytest

from medkit.stage import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "medkit" / "quantization").glob("*.py")), ids=lambda path: path.stem)
def test_no_private_name_of_another_object_is_used(path):
    private = [
        f"line {node.lineno}: .{node.attr}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    ]  # fmt: skip
    overridden = [
        f"line {node.lineno}: {node.name}"
        for parent in ast.walk(ast.parse(path.read_text()))
        if isinstance(parent, ast.ClassDef)
        for node in parent.body
        if isinstance(node, ast.FunctionDef) and node.name in ("_save_to_state_dict", "_load_from_state_dict")
    ]
    assert private + overridden == []


def test_bitsandbytes_has_an_upper_bound():
    """`packing_format_for_cpu` and the byte layout of NF4 are not documented, so a new version must be tried first."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (bound,) = (line for line in dependencies if line.startswith("bitsandbytes"))
    assert "<" in bound

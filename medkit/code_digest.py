"""Which code a result depends on: the definitions that some code reaches, followed through imports, and their digest.

A definition is a function, a class or a constant at the top of a module of this package. From a notebook's cells or
from a function, every name is followed to the definition behind it, and on to the names in that definition. What is
never reached does not count, so an edit of one function makes stale only the results that it can change. Comments,
docstrings and layout never count. Tables and templates beside a module count for the definitions that name them.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from medkit.params import digest

PACKAGE = Path(__file__).parent
BESIDE = {".csv", ".yaml", ".j2"}
Symbol = tuple[str, str]  # a module's dotted name and a name in it; an empty name stands for the module as a whole


def digest_code(source: str) -> str:
    """Digest of a piece of source, such as a notebook's cells, and of all that it reaches in this package."""
    tree = _without_docstrings(ast.parse(source))
    return _digest_reached([ast.dump(tree)], _reached_from(tree, _bindings(tree)))


def digest_functions(*functions: Callable) -> str:
    """Digest of some functions or classes of this package and of all that they reach in it."""
    return _digest_reached([], {(f.__module__, f.__qualname__.split(".")[0]) for f in functions})


def _digest_reached(start: list[str], todo: set[Symbol]) -> str:
    found: dict[Symbol, list[str]] = {}
    while todo:
        symbol = todo.pop()
        if symbol in found or not _path(symbol[0]):
            continue
        nodes = _definitions(symbol[0]).get(symbol[1], [])
        found[symbol] = [part for node in nodes for part in (ast.dump(node), *_files_beside(symbol[0], node))]
        for node in nodes:
            todo |= _reached_from(node, _imports(symbol[0])) | {
                (symbol[0], name) for name in _names(node) if name in _definitions(symbol[0])
            }
        if not nodes and symbol[1] in _imports(symbol[0]):  # a name that an index passes on
            todo.add(_imports(symbol[0])[symbol[1]])
        todo.add((symbol[0], ""))  # statements that run whenever the module is imported
    return digest([start, sorted((*symbol, parts) for symbol, parts in found.items() if parts)])


@cache
def _path(module: str) -> Path | None:
    """The file of a module of this package, None for any other module."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return None
    below = PACKAGE.joinpath(*parts[1:])
    return next((p for p in (below.with_suffix(".py"), below / "__init__.py") if p.is_file()), None)


@cache
def _tree(module: str) -> ast.Module:
    return _without_docstrings(ast.parse(_path(module).read_text()))


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return tree


@cache
def _imports(module: str) -> dict[str, Symbol]:
    return _bindings(_tree(module))


def _bindings(tree: ast.AST) -> dict[str, Symbol]:
    """Local names of what is imported from this package, anywhere in the tree."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _path(node.module or ""):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found[alias.asname or alias.name] = (
                    (inner, "") if _is_module(node.module, alias.name) else (node.module, alias.name)
                )
    return found


def _is_module(package: str, name: str) -> bool:
    """A room's function hides a module of the same name, as it does for Python."""
    return bool(_path(f"{package}.{name}")) and name not in _imports(package)


@cache
def _definitions(module: str) -> dict[str, list[ast.stmt]]:
    """Top-level definitions by name; under "" the other statements, imports left out."""
    found: dict[str, list[ast.stmt]] = {}
    for node in _tree(module).body:
        match node:
            case ast.Import() | ast.ImportFrom():
                continue
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names = {name}
            case ast.Assign() | ast.AnnAssign():
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            case _:
                names = {""}
        for name in names:
            found.setdefault(name, []).append(node)
    return found


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id


def _reached_from(tree: ast.AST, imported: dict[str, Symbol]) -> set[Symbol]:
    """The symbols of this package that a tree names: `f` where f is imported, `room.f` where the room is."""
    imported = imported | _bindings(tree)
    found = {imported[name] for name in _names(tree) if name in imported}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            module, name = imported[node.value.id]
            if not name:
                found.add((module, node.attr))
    return found


def _files_beside(module: str, node: ast.AST) -> Iterator[str]:
    """Contents of the files that a definition names by `with_name`, such as a table of labels."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and Path(inner.value).suffix in BESIDE:
            path = _path(module).with_name(Path(inner.value).name)
            if path.is_file():
                yield path.read_text()

"""Which code a result depends on: the definitions that some code reaches, followed through imports, and their digest.

A definition is a function, a class or a constant at the top of a module of this package, with the files beside the
module that it names. Every name in a notebook's cells or in a function is followed to its definition, and on to the
names in that. So an edit makes stale only the results that it can change; comments, docstrings and layout never count.
"""

import ast
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from medkit.params import digest

PACKAGE = Path(__file__).parent
BESIDE = {".csv", ".yaml", ".j2"}
Symbol = tuple[str, str]  # a module's dotted name and a name in it; "" are the statements that run at its import


def digest_code(source: str) -> str:
    """Digest of a piece of source, such as a notebook's cells, and of all that it reaches in this package."""
    tree = _without_docstrings(ast.parse(source))
    return digest([[ast.dump(tree)], _reached(frozenset(_named_in(list(ast.walk(tree)), {})))])


def digest_functions(*functions: Callable) -> str:
    """Digest of some functions or classes of this package and of all that they reach in it."""
    return digest([[], _reached(frozenset((f.__module__, f.__qualname__.split(".")[0]) for f in functions))])


@cache
def _reached(start: frozenset[Symbol]) -> list[tuple[str, str, list[str]]]:
    """Module, name and code of every definition that some symbols lead to, sorted."""
    seen, todo = {}, set(start)
    while todo:
        symbol = todo.pop()
        if symbol not in seen and _path(symbol[0]):
            seen[symbol], named = _definition(*symbol)
            todo |= named
    return sorted((*symbol, parts) for symbol, parts in seen.items() if parts)


@cache
def _definition(module: str, name: str) -> tuple[list[str], set[Symbol]]:
    """The code of a symbol and of the files that it names, and the symbols that it names."""
    definitions, imports = _definitions(module), _imports(module)
    nodes = definitions.get(name, [])
    inner = [node for outer in nodes for node in ast.walk(outer)]
    parts = [*map(ast.dump, nodes), *_files_beside(module, inner)]
    named = {(module, "")}  # statements that run whenever the module is imported
    named |= _named_in(inner, imports) | {(module, other) for other in _names(inner) if other in definitions}
    if not nodes and name in imports:  # a name that an index passes on
        named.add(imports[name])
    return parts, named


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
    return _bindings(ast.walk(_tree(module)))


def _bindings(nodes: Iterable[ast.AST]) -> dict[str, Symbol]:
    """Local names of what some nodes import from this package."""
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 0 and _path(n.module or "")]
    return {alias.asname or alias.name: (node.module, alias.name) for node in imports for alias in node.names}


@cache
def _definitions(module: str) -> dict[str, list[ast.stmt]]:
    """Top-level definitions by name; under "" the other statements, imports left out."""
    definitions: dict[str, list[ast.stmt]] = {}
    for node in _tree(module).body:
        match node:
            case ast.Import() | ast.ImportFrom():
                continue
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names = {name}
            case ast.Assign(targets=targets):
                names = {name for target in targets for name in _names(ast.walk(target))}
            case ast.AnnAssign(target=target):
                names = set(_names(ast.walk(target)))
            case _:
                names = {""}
        for name in names:
            definitions.setdefault(name, []).append(node)
    return definitions


def _names(nodes: Iterable[ast.AST]) -> Iterator[str]:
    return (node.id for node in nodes if isinstance(node, ast.Name))


def _named_in(nodes: list[ast.AST], imports: dict[str, Symbol]) -> set[Symbol]:
    """The imported symbols that some nodes name: `f` where f is imported, `room.f` where the room is."""
    imports = imports | _bindings(nodes)
    named = {imports[name] for name in _names(nodes) if name in imports}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imports:
            named.add((".".join(imports[node.value.id]), node.attr))  # of a module that is none, nothing is reached
    return named


def _files_beside(module: str, nodes: list[ast.AST]) -> Iterator[str]:
    """Contents of the files that a definition names, such as a table of labels: by `with_name`, or by `with_suffix`."""
    for name in (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)):
        if name in BESIDE or Path(name).suffix in BESIDE:
            own = _path(module)
            path = own.with_suffix(name) if name in BESIDE else own.with_name(Path(name).name)
            if path.is_file():
                yield path.read_text()

"""A params file as a plain mapping: strict yaml, single keys overridden, paths of local sources made absolute.

What the keys mean and which there are is for `params`. No torch and no data here.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import yaml


class ParamsError(ValueError):
    """A profile or an override that cannot be used; the message names the key and the cure."""


def read_profile(path: Path, overrides: dict) -> dict:
    """The profile's sections; `overrides` maps dotted keys, which must be there, to values. Raises ParamsError."""
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ParamsError(f"{path}: no such params file; there are {beside or 'none in that folder'}")
    try:
        raw = _StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: not valid yaml: {str(error).splitlines()[0]}") from error
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: a profile is a mapping of sections, this is a {type(raw).__name__}")
    for dotted, value in overrides.items():
        _override(raw, dotted, value, path)
    _anchor(raw, path.parent.resolve())
    return raw


class _StrictLoader(yaml.SafeLoader):
    """Safe, and a key written twice is an error: yaml itself would keep the second in silence."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} stands twice{node.start_mark}".replace("\n", " "))
        return super().construct_mapping(node, deep)


def _anchor(node, folder: Path) -> None:
    """Relative paths of local sources start at the profile's folder, since notebooks run in one of their own."""
    if isinstance(node, dict):
        if node.get("kind") in ("local", "table") and isinstance(node.get("path"), str):
            node["path"] = str(folder / Path(node["path"]).expanduser())
        for child in node.values():
            _anchor(child, folder)


def _override(raw: dict, dotted: str, value, path: Path) -> None:
    *parents, leaf = dotted.split(".")
    node = raw
    for key in [*parents, leaf]:
        if not isinstance(node, dict) or key not in node:
            known = sorted(map(str, node)) if isinstance(node, dict) else []
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {known}"
            raise ParamsError(f"{path}: override {dotted!r}: no such parameter {key!r}{hint}")
        parent, node = node, node[key]
    parent[leaf] = value

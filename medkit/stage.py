"""The run directory: `outputs/<run>/<stage>/`, and the manifest that says a stage is complete.

A stage writes its artifacts first and its manifest last, so a manifest that exists means that every file it lists is
whole. Nothing else may decide that a stage is done. Every write is atomic: a scratch file, then a rename.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["01_data", "02_distillation", "03_lora", "04_quantization", "05_inference", "06_evaluation"]
MANIFEST = "manifest.json"
FINGERPRINT = "MEDKIT_FINGERPRINT"  # set by the runner; absent when a person runs the notebook
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SCRATCH = re.compile(r".+\.(\d{1,7})\.part")  # of which process
DISCLAIMER = "Research and teaching only, not a medical device."
# the libraries that compute: another version of one of them may give other numbers
VERSIONED = (
    *("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "accelerate", "gguf"),
    *("numpy", "pandas", "scipy", "scikit-learn", "statsmodels", "rapidfuzz"),
)
FETCHED: dict[str, str] = {}  # what this process read from the cache: source → commit or sha256, for the manifest


class MedkitError(Exception):
    """Base of every error that a user can cause. Its message is one sentence: what, where, and the cure."""

    def __str__(self) -> str:
        """The sentence in one line that every terminal can show, whatever a file put into it; its middle may be cut."""
        text = re.sub(r"\s*[\r\n]\s*", " ", super().__str__())
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        return text if len(text) <= 8000 else f"{text[:6000]} … {text[-1000:]}"

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a notebook: the sentence alone, without a hundred lines of calls."""
        return [f"{type(self).__name__}: {self}"]


class StageError(MedkitError):
    """A stage or run that cannot be used as asked; the message names it and the cure."""


@contextmanager
def reading(what: object, error_class: type[MedkitError], cure: str, fault: str = "cannot be read") -> Iterator[None]:
    """Raise what a library makes of somebody else's damaged file as an `error_class`; a full disk stays what it is."""
    try:
        yield
    except MedkitError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise error_class(f"{what}: {fault} ({str(error).strip() or repr(error)}); {cure}") from error


def outputs_root() -> Path:
    """Directory of all runs: $MEDKIT_OUTPUTS, or outputs/ beside the package."""
    return folder_of("MEDKIT_OUTPUTS", ROOT / "outputs")


def folder_of(variable: str, default: Path) -> Path:
    """The folder that an environment variable names, absolute; `default` where it is not set."""
    return Path(os.path.abspath(os.path.expanduser(os.environ.get(variable) or default)))


def run_dir(run: str) -> Path:
    """Directory of one run. Raises StageError if the name is no plain file name."""
    if not RUN_NAME.fullmatch(run):
        raise StageError(
            f"run name {run!r}: use letters, digits, '.', '_' and '-' only in --run; runs live in {outputs_root()}"
        )
    return outputs_root() / run


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A scratch path beside `path`, renamed to it if the block succeeds and removed if it does not.

    Works for files and for folders; a folder that exists is replaced as a whole. Raises StageError if `path` cannot be
    written. An error of the block that does not come from writing the scratch path is raised as it is.
    """
    scratch, aside = (path.with_name(f"{path.name}{kind}.{os.getpid()}.part") for kind in ("", ".old"))
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(scratch)  # a killed process may have had our number
            _remove(aside)
        with write_errors(path, scratch):
            yield scratch
        with write_errors(path):
            if path.is_dir() and scratch.exists():
                path.replace(aside)  # killed here, neither is left: the new folder is made again
            scratch.replace(path)
    finally:
        _remove(scratch)
        _remove(aside)


def write_text(path: Path, text: str) -> Path:
    """Write a text file (UTF-8) atomically; returns its path. Raises as `atomic_path`."""
    with atomic_path(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return path


def _remove(left: Path) -> None:
    if left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
    elif os.path.lexists(left):
        left.unlink()


@contextmanager
def write_errors(path: Path, scratch: Path | None = None) -> Iterator[None]:
    """Raise a failed write as a StageError with its cure; with `scratch`, only a full disk or an error that names it.

    safetensors, torch and gguf tell of a full disk in errors of their own kinds and words, so the disk is asked too.
    """
    try:
        yield
    except MedkitError:
        raise
    except Exception as error:
        number, is_system = getattr(error, "errno", None), isinstance(error, OSError)
        full = shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free < 2**16
        full |= any(os.strerror(n) in str(error) for n in (errno.ENOSPC, errno.EDQUOT))
        named = is_system and (scratch is None or str(scratch) in f"{error.filename} {error.filename2} {error}")
        by_torch = re.search("PytorchStreamWriter|unexpected pos", str(error))  # it keeps the system's reason to itself
        if not (full or named or by_torch):
            raise
        if full:
            cure = "the disk is full; free space, then run the same command again"
        elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
            cure = "you may not write there; change its permissions, or set MEDKIT_OUTPUTS or MEDKIT_CACHE elsewhere"
        elif by_torch:
            cure = "torch does not say why; the disk may have been full for a moment: run the same command again"
        else:
            cure = "correct the path, then run the same command again"
        reason = getattr(error, "strerror", None) or (os.strerror(errno.ENOSPC) if full else error)
        raise StageError(f"{path}: could not be written ({reason}): {cure}") from error


@contextmanager
def lock_run(run: str) -> Iterator[Path]:
    """The folder of a run, for this process alone; what killed processes left half-written there is removed.

    Raises StageError where it cannot be written, and where another process holds it. A dead process holds nothing.
    """
    path = run_dir(run) / ".lock"
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read() or "of unknown number"
            raise StageError(
                f"run {run!r}: another process works on it ({holder}); wait for it, or choose another --run"
            ) from error
        with write_errors(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            for left in list(path.parent.rglob("*.part")):
                match = SCRATCH.fullmatch(left.name)
                if match and not Path("/proc", match[1]).exists():  # a notebook that a person runs takes no lock
                    _remove(left)
        yield path.parent


class Stage:
    """One notebook's folder in a run: where it writes, what it may read, and its manifest."""

    def __init__(self, run: str, name: str):
        self.run, self.name = run, name
        self.dir = run_dir(run) / name
        self.started = time.monotonic()

    def path(self, filename: str) -> Path:
        """Where this stage writes `filename`; creates the folder above it."""
        path = self.dir / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def require(self, stage: str, filename: str) -> Path:
        """Path of an artifact of an earlier, complete stage of the same run.

        `filename` may be a folder. Raises StageError if that stage has not committed it; the message names the first
        notebook that has to run.
        """
        upstream = Stage(self.run, stage)
        listed = upstream.manifest().get("files", {})
        wanted = [f for f in listed if f == filename or f.startswith(filename + "/")]
        if not wanted or not all((upstream.dir / f).is_file() for f in wanted):
            earlier = [] if listed else [name for name in STAGES if name < stage]
            first = next((name for name in earlier if not Stage(self.run, name).manifest()), stage)
            raise StageError(f"{stage}/{filename} is not there: run notebook {first} first (run={self.run!r})")
        return upstream.dir / filename

    def write_table(self, filename: str, table: "pd.DataFrame") -> Path:
        """Write a parquet table atomically."""
        with atomic_path(self.dir / filename) as scratch:
            table.to_parquet(scratch, index=False)
        return self.dir / filename

    def write_json(self, filename: str, value) -> Path:
        """Write a json file atomically."""
        return write_text(self.dir / filename, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def manifest(self) -> dict:
        """The stage's manifest, `{}` while it is not complete (or if the manifest itself was damaged)."""
        try:
            manifest = json.loads((self.dir / MANIFEST).read_text())
        except (FileNotFoundError, ValueError):  # bytes that are no text are a ValueError too
            return {}
        return manifest if isinstance(manifest, dict) else {}

    def commit(self, also: Sequence[Path] = (), **facts) -> dict:
        """Close the stage: record every file with size and sha256, provenance, and `facts`. Returns the manifest.

        `also` are files of the stage that lie outside its folder, such as the run's results.
        """
        shutil.rmtree(self.dir / "checkpoints", ignore_errors=True)  # only a killed stage needs them
        inside = [p.relative_to(self.dir) for p in sorted(self.dir.rglob("*")) if p.is_file()]
        whole = [p for p in inside if p != Path(MANIFEST) and not any(part.endswith(".part") for part in p.parts)]
        files = {str(p): (self.dir / p).stat().st_size for p in whole}
        files |= {os.path.relpath(p, self.dir): p.stat().st_size for p in also}
        manifest = {
            "stage": self.name,
            "run": self.run,
            "fingerprint": os.environ.get(FINGERPRINT),
            "disclaimer": DISCLAIMER,
            "files": files,
            "sha256": {name: sha256_of(self.dir / name) for name in files},
            "facts": facts,
            "sources": dict(FETCHED),
            "duration_s": round(time.monotonic() - self.started, 1),
            **provenance(),
        }
        self.write_json(MANIFEST, manifest)
        return manifest

    def reopen(self) -> None:
        """Take the manifest away, so that a crash from here on leaves an open stage."""
        (self.dir / MANIFEST).unlink(missing_ok=True)

    def is_whole(self) -> bool:
        """The manifest exists and every file it lists is there with the size it lists."""
        files = self.manifest().get("files")
        return files is not None and all(
            (self.dir / f).is_file() and (self.dir / f).stat().st_size == n for f, n in files.items()
        )

    def changed_files(self) -> list[str]:
        """The files whose bytes are not those that the manifest lists, or that are gone. Reads all of them."""
        manifest = self.manifest()
        files, digests = (manifest.get(name, {}) for name in ("files", "sha256"))
        return [f for f in files if not (self.dir / f).is_file() or sha256_of(self.dir / f) != digests.get(f)]


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_versions(names: Sequence[str] = VERSIONED) -> dict[str, str | None]:
    """Installed version of every library that computes; None for an optional one that is absent."""
    found = {name: importlib.metadata.distributions(name=name) for name in names}
    return {name: next((one.version for one in each), None) for name, each in found.items()}


def provenance() -> dict:
    """Where and with what something was made: date, device, versions, git commit (`-dirty` if files were edited)."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    git = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "git_commit": git or None,
        "device": device_name(),
        "python": platform.python_version(),
        "versions": library_versions((*VERSIONED, "xllamacpp")),
    }


def count_cores() -> int:
    """The processor cores that this process may use: under Slurm or taskset fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def device_name() -> str:
    """What the run computed on: the GPU torch sees if torch is loaded, else the CPU's model and core count."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.+)", info)
    return f"{model.group(1) if model else platform.processor() or platform.machine()}, {count_cores()} cores"

"""Run the notebooks in order with papermill, and know which of them are already done.

A stage is done iff its manifest is whole and its fingerprint is the wanted one. The fingerprint covers the stages
before it, the notebook's code cells, the medkit modules it imports, its own params section and the shared keys: what a
result depends on and nothing else. Prose, docstrings and comments rerun nothing.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
from filelock import FileLock, Timeout
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from medkit import sources
from medkit.code_digest import digest_code
from medkit.params import Params, digest, load_params
from medkit.stage import FINGERPRINT, ROOT, MedkitError, Stage, run_dir

PARAMETERS = {"params_file", "run", "overrides"}
# threads spin a little before they sleep, and freed memory stays with the process: 1.4 times the speed on two cores
# that are ours alone, without the collapse of endless spinning when they are not (docs/log.md)
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONHASHSEED": "0",
}


class RunError(MedkitError):
    """A run that did not finish; the message names the notebook, the cell and the last line of the error."""


@dataclass(frozen=True)
class StageStatus:
    name: str
    state: str
    """`done`, `stale` (made from other code, params or inputs), `damaged` (a file is lost) or `missing`."""
    duration_s: float | None


def notebooks() -> list[Path]:
    """The numbered notebooks; their order is the pipeline."""
    return sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def stage_names() -> list[str]:
    return [notebook.stem for notebook in notebooks()]


def source_digest(notebook: Path) -> str:
    """Digest of a notebook's code cells and of every definition in medkit that they reach."""
    cells = nbformat.read(notebook, as_version=4).cells
    return digest_code("\n".join(cell.source for cell in cells if cell.cell_type == "code"))


def fingerprints(params: Params) -> dict[str, str]:
    """The wanted fingerprint of every stage.

    A section belongs to the notebook of the same name (`lora` to 03_lora); every other key is shared by all. A user's
    own table counts by its content: wheels are pinned by their sha256, a file is not.
    """
    values = params.model_dump()
    for name, dataset in params.data.datasets.items():
        if dataset.origin.kind == "table":
            values["data"]["datasets"][name]["content"] = sources.sha256_of(sources.fetch(dataset.origin))
    topics = {name: name.split("_", 1)[1] for name in stage_names()}
    upstream = digest({k: v for k, v in values.items() if k not in topics.values()})
    chain = {}
    for notebook in notebooks():
        upstream = digest([upstream, source_digest(notebook), values.get(topics[notebook.stem])])
        chain[notebook.stem] = upstream
    return chain


def status(params: Params, run: str) -> list[StageStatus]:
    """What each stage of a run is worth under these params."""
    found = []
    for name, wanted in fingerprints(params).items():
        stage = Stage(run, name)
        manifest = stage.manifest()
        if not manifest:
            state = "missing"
        elif not stage.is_whole():
            state = "damaged"
        else:
            state = "done" if manifest["fingerprint"] == wanted else "stale"
        found.append(StageStatus(name, state, manifest.get("duration_s")))
    return found


def run_all(params_file: str | Path, run: str, overrides: dict | None = None, first: str | None = None) -> list[str]:
    """Execute every stage that is not done, in order; returns the names of those that ran.

    `first` reruns that stage and all after it. The same command after a crash or kill goes on where it stopped.
    Raises RunError for a notebook that fails, an unknown stage, and a run that another process is working on.
    """
    params, names = load_params(params_file, overrides), stage_names()
    if first is not None and first not in names:
        raise RunError(f"no stage {first!r}; the stages are {names}")
    folder = run_dir(run)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=2):
            return _run_stages(Path(params_file).resolve(), params, run, overrides or {}, first)
    except Timeout as error:
        raise RunError(
            f"run {run!r} is being worked on by another process; wait for it, or choose another --run"
        ) from error


def _run_stages(params_file: Path, params: Params, run: str, overrides: dict, first: str | None) -> list[str]:
    ran: list[str] = []
    wanted, names = fingerprints(params), stage_names()
    with _Display(len(names)) as display:
        for number, notebook in enumerate(notebooks(), 1):
            stage = Stage(run, notebook.stem)
            done = stage.is_whole() and stage.manifest()["fingerprint"] == wanted[stage.name]
            if done and (first is None or stage.name < first):
                display.say(f"[{number}/{len(names)}] {stage.name}: up to date")
                continue
            stage.reopen()
            display.begin(number, notebook)
            _execute(notebook, stage, wanted[stage.name], params_file, overrides, display)
            display.end(f"[{number}/{len(names)}] {stage.name}: done in {time.monotonic() - stage.started:.0f} s")
            ran.append(stage.name)
    return ran


def _execute(
    notebook: Path, stage: Stage, fingerprint: str, params_file: Path, overrides: dict, display: _Display
) -> None:
    declared = set(papermill.inspect_notebook(str(notebook)))
    if declared != PARAMETERS:  # papermill itself only warns
        raise RunError(
            f"{notebook.name}: the parameters cell must declare {sorted(PARAMETERS)}, it has {sorted(declared)}"
        )
    executed = run_dir(stage.run) / "notebooks" / notebook.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: os.environ.get(name) for name in [*ENVIRONMENT, FINGERPRINT]}
    os.environ.update(ENVIRONMENT, **{FINGERPRINT: fingerprint})
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            cwd=str(notebook.parent),
            progress_bar=False,
            engine_name=_CellEngine.NAME,
            on_cell=display.cell,
            extra_arguments=["--log-level=ERROR"],
            parameters={"params_file": str(params_file), "run": stage.run, "overrides": overrides},
        )
    except PapermillExecutionError as error:
        # an assertion has no message of its own: then the line that failed says most
        lines = (str(error.evalue).strip() or error.source.strip()).splitlines()
        raise RunError(
            f"{notebook.name}, cell {error.exec_count}: {error.ename}: {lines[-1]} (whole notebook: {executed})"
        ) from error
    except DeadKernelError as error:
        raise RunError(
            f"{notebook.name}: its kernel died, most often for want of memory; close other programs or choose a "
            f"smaller profile, then run the same command again (whole notebook: {executed})"
        ) from error
    finally:
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    if not stage.is_whole():
        raise RunError(f"{notebook.name} ended without committing its stage")


class _CellEngine(NBClientEngine):
    """papermill's own engine, telling the display which cell begins."""

    NAME = "medkit"

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, on_cell=lambda index: None, **kwargs):
        start = nb_man.cell_start

        def cell_start(cell, cell_index=None, **more):
            on_cell(cell_index)
            return start(cell, cell_index=cell_index, **more)

        nb_man.cell_start = cell_start
        return super().execute_managed_notebook(nb_man, kernel_name, **kwargs)


papermill_engines.register(_CellEngine.NAME, _CellEngine)


class _Display:
    """Stage, cell and elapsed time: a live bar on a terminal, a line per stage elsewhere."""

    def __init__(self, num_stages: int):
        self.console = Console(stderr=True, highlight=False)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("cells"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.num_stages, self.task = num_stages, None

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *error) -> None:
        self.progress.stop()

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def begin(self, number: int, notebook: Path) -> None:
        cells = len(nbformat.read(notebook, as_version=4).cells)
        title = f"[{number}/{self.num_stages}] {notebook.stem}"
        self.task = self.progress.add_task(title, total=cells)
        if not self.console.is_terminal:
            self.say(f"{title}: {cells} cells …")

    def cell(self, index: int | None) -> None:
        self.progress.update(self.task, completed=index or 0)

    def end(self, line: str) -> None:
        self.progress.remove_task(self.task)
        self.say(line)

"""Run the notebooks in order with papermill, and know which of them are already done.

A stage is done if and only if its manifest is whole and its fingerprint is the wanted one. The fingerprint covers the
stages before it, the notebook's code cells, the definitions of medkit that they reach, its own params section, what it
reads of later ones, the shared keys and the versions of the libraries that compute. Prose, docstrings and comments
rerun nothing.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from medkit import run_store, sources
from medkit.code_digest import digest_code
from medkit.params import OWN, RUN_PARAMS, Params, digest, load_params, save_run_params
from medkit.stage import (
    FINGERPRINT,
    MANIFEST,
    ROOT,
    STAGES,
    MedkitError,
    Stage,
    atomic_path,
    library_versions,
    lock_run,
    outputs_root,
    run_dir,
    sha256_of,
    write_errors,
)
from medkit.variants import ADAPTER, VARIANTS, list_variants

PARAMETERS = {"params_file", "run", "overrides"}
# settings of later sections on which a notebook's results depend; what only its printed intervals depend on is left out
READS_ALSO = {
    "02_distillation": [("inference", key) for key in ("batch_tokens", "max_new_tokens", "max_thinking_tokens")],
    "03_lora": [("quantization", "double_quant"), ("evaluation", "headline_source")],
    "05_inference": [("evaluation", "headline_source")],
}
# threads wait a short time actively before they sleep, and freed memory stays with the process: 1.4 times as fast on
# two idle cores, and no collapse on busy ones (docs/log). Warnings that no reader of a notebook can act on stay out.
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "20000",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONWARNINGS": "ignore:IProgress not found,ignore:`is_gradient_checkpointing` is deprecated",
}


def notebooks() -> list[Path]:
    """The notebook of every stage, in order. Raises MedkitError where medkit is installed without them."""
    paths = [ROOT / "notebooks" / f"{name}.ipynb" for name in STAGES]
    if not paths[0].is_file():
        raise MedkitError(
            f"no notebooks in {ROOT / 'notebooks'}: medkit was installed without them; clone its repository and call "
            f"`make run` there, or install the clone with `pip install --editable .`"
        )
    return paths


def source_digest(notebook: Path) -> str:
    """Digest of a notebook's code cells and of every definition in medkit that they reach."""
    cells = nbformat.read(notebook, as_version=4).cells
    return digest_code("\n".join(cell.source for cell in cells if cell.cell_type == "code"))


def fingerprints(params: Params) -> dict[str, str]:
    """The wanted fingerprint of every stage.

    A section belongs to the notebook of the same name (`lora` to 03_lora), but for keys that an earlier notebook reads
    too (READS_ALSO); every other key is shared by all. What lies at a local path counts by its content: wheels are
    pinned by their sha256, a file is not.
    """
    values = _with_contents(params.model_dump())
    sections = {name: name.split("_", 1)[1] for name in STAGES}
    shared = {key: value for key, value in values.items() if key not in sections.values()}
    upstream = digest([shared, library_versions()])
    chain = {}
    for notebook in notebooks():
        also = [values[section][key] for section, key in READS_ALSO.get(notebook.stem, ())]
        upstream = digest([upstream, source_digest(notebook), values.get(sections[notebook.stem]), also])
        chain[notebook.stem] = upstream
    return chain


def _with_contents(value):
    """Settings in which every local path has the sha256 of its file, or of each file in its folder, beside it."""
    if isinstance(value, list):
        return [_with_contents(part) for part in value]
    if not isinstance(value, dict):
        return value
    value = {key: _with_contents(part) for key, part in value.items()}
    if value.get("kind") in ("local", *OWN) and isinstance(value["path"], str):
        path = Path(value["path"])
        files = [file for file in sorted(path.rglob("*")) if file.is_file()] or [path] * path.is_file()
        stats = {file: file.stat() for file in files}
        value["path"] = path.suffix  # the same files in another folder are the same data
        value["content"] = {
            str(file.relative_to(path)): _digest_of(file, stat.st_size, stat.st_mtime_ns)
            for file, stat in stats.items()
        }
    return value


@cache
def _digest_of(file: Path, size: int, mtime_ns: int) -> str:
    """sha256 of a file in this state: a sweep asks for every point and stage, and weights are gigabytes."""
    return sha256_of(file)


def status(params: Params, run: str) -> dict[str, str]:
    """Stage → what it is worth under these params: `done`, `stale`, `damaged` or `missing`."""
    return {name: _state(Stage(run, name), wanted) for name, wanted in fingerprints(params).items()}


def _state(stage: Stage, wanted: str) -> str:
    """`damaged`: a file is lost; `stale`: made from other code, params or inputs than the wanted fingerprint's."""
    manifest = stage.manifest()
    if not manifest:
        return "missing"
    if not stage.is_whole():
        return "damaged"
    return "done" if manifest["fingerprint"] == wanted else "stale"


def run_all(
    params_file: str | Path,
    run: str,
    overrides: dict | None = None,
    first: str | None = None,
    last: str | None = None,
    reuse: Sequence[str] = (),
) -> list[str]:
    """Execute every stage that is not done, in order; returns the names of those that ran.

    `first` reruns that stage and all after it; nothing after `last` runs. A stage that another run, named in `reuse`,
    made with the same fingerprint is taken from there. The same command after a crash or kill goes on where it stopped.
    The checked params are stored in the run's folder. With $MEDKIT_STORE, finished stages are fetched from there first,
    and sent there (`run_store`). Raises MedkitError for an unknown stage and for a notebook that fails (it names the
    cell and the last line of the error), and the errors of `lock_run` and `run_store`; a stage that cannot be sent
    stops the run only at its end.
    """
    params = load_params(params_file, overrides)
    for stage in (first, last):
        if stage is not None and stage not in STAGES:
            raise MedkitError(f"no stage {stage!r}; the stages are {STAGES}")
    # the run's own copy of the profile: the file that the user named may be edited while the run goes on
    parameters = {"params_file": str(run_dir(run) / RUN_PARAMS), "run": run, "overrides": {}}
    with lock_run(run):
        save_run_params(params, run)
        wanted, last = fingerprints(params), last or STAGES[-1]
        _fetch_stages(run, wanted, first, last)
        _send(run, wanted)  # a store that cannot be written is told before anything is computed
        ran = _run_stages(params, wanted, parameters, first, last, reuse)
        _send(run, wanted)
        return ran


def _fetch_stages(run: str, wanted: dict[str, str], first: str | None, last: str) -> None:
    for name in STAGES[: STAGES.index(last) + 1]:
        stage = Stage(run, name)
        if first is not None and name >= first:
            return
        if _state(stage, wanted[name]) != "done":
            if not run_store.fetch_stage(stage, wanted[name]):
                return  # it is made anew, and then those after it
            _remove_report(stage)
            _print(f"{name}: fetched from the store")


def _send(run: str, wanted: dict[str, str]) -> None:
    run_store.send(run, [name for name in wanted if _state(Stage(run, name), wanted[name]) == "done"])


def _remove_report(stage: Stage) -> None:
    """Remove the report of an earlier last stage: if we are stopped before a new one is made, none is there."""
    if stage.name == STAGES[-1]:
        (run_dir(stage.run) / "report.html").unlink(missing_ok=True)


def _remove_unwanted(stage: Stage, params: Params) -> None:
    """Remove the models of an earlier run of the stage that these params no longer make, such as an edge file."""
    made = list_variants(params)
    for name, variant in VARIANTS.items():
        if name in made or not (variant.folder or "").startswith(stage.name):
            continue
        path = run_dir(stage.run) / variant.folder
        if path.name == ADAPTER:
            path.unlink(missing_ok=True)
        else:  # a file stands in a folder of its own
            shutil.rmtree(path.parent if path.suffix else path, ignore_errors=True)


def _run_stages(
    params: Params, wanted: dict[str, str], parameters: dict, first: str | None, last: str, reuse: Sequence[str]
) -> list[str]:
    ran: list[str] = []
    for number, notebook in enumerate(notebooks()[: STAGES.index(last) + 1], start=1):
        stage, title = Stage(parameters["run"], notebook.stem), f"[{number}/{len(wanted)}] {notebook.stem}"
        if first is None or stage.name < first:
            if _state(stage, wanted[stage.name]) == "done":
                _print(f"{title}: up to date")
                continue
            if other := _take_stage(stage, wanted[stage.name], reuse):
                _print(f"{title}: taken from run {other!r}")
                continue
        _check_device(params)  # before the notebook downloads anything
        stage.reopen()
        _remove_report(stage)
        _remove_unwanted(stage, params)
        _print(f"{title} …")
        executed = run_dir(stage.run) / "notebooks" / notebook.name
        with write_errors(executed, executed.parent):
            _execute(notebook, executed, stage, wanted[stage.name], parameters)
        _print(f"{title}: done in {time.monotonic() - stage.started:.0f} s")
        ran.append(stage.name)
        try:
            _send(stage.run, wanted)
        except run_store.StoreError as error:  # tried again after the next stage, and at the end
            _print(f"medkit: {error}")
    return ran


def _check_device(params: Params) -> None:
    from medkit.modeling.loading import pick_device  # it brings torch, and `status` needs none

    pick_device(params.models.device)


def _take_stage(stage: Stage, wanted: str, runs: Sequence[str]) -> str | None:
    """Put a stage that one of these runs made with this fingerprint into this run; returns that run's name."""
    # the last stage's results belong to its run
    others = [Stage(run, stage.name) for run in runs if run != stage.run and stage.name != STAGES[-1]]
    other = next((other for other in others if _state(other, wanted) == "done"), None)
    if other is None:
        return None
    manifest, executed = other.manifest(), Path("notebooks") / f"{stage.name}.ipynb"
    with atomic_path(stage.dir) as scratch:
        for name in manifest["files"]:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(other.dir / name, scratch / name)
        (scratch / MANIFEST).write_text(json.dumps(manifest | {"run": stage.run, "taken_from": other.run}, indent=1))
    if (run_dir(other.run) / executed).is_file():
        with atomic_path(run_dir(stage.run) / executed) as scratch:
            shutil.copyfile(run_dir(other.run) / executed, scratch)
    return other.run


def _link_or_copy(old: Path, new: Path) -> None:
    if old.suffix in (".safetensors", ".gguf"):  # weights: no file of them is changed in place
        with suppress(OSError):
            return os.link(old, new)
    shutil.copyfile(old, new)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _execute(notebook: Path, executed: Path, stage: Stage, fingerprint: str, parameters: dict) -> None:
    declared = set(papermill.inspect_notebook(str(notebook)))
    if declared != PARAMETERS:  # papermill itself only warns
        raise MedkitError(
            f"{notebook.name}: the parameters cell must declare {sorted(PARAMETERS)}, it has {sorted(declared)}"
        )
    executed.parent.mkdir(parents=True, exist_ok=True)
    # a kernel starts in the folder of its notebook: relative paths would mean another folder there
    folders = {"MEDKIT_OUTPUTS": str(outputs_root()), "MEDKIT_CACHE": str(sources.cache_root())}
    variables = ENVIRONMENT | folders | {FINGERPRINT: fingerprint}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            cwd=str(notebook.parent),
            progress_bar=sys.stderr.isatty(),  # papermill's own: cells, and the time that is left
            extra_arguments=["--log-level=ERROR"],
            shutdown_kernel="immediate",  # asked to end, a kernel at work writes on for seconds, and then tracebacks
            parameters=parameters,
            coalesce_streams=True,  # a progress bar leaves its last state, not a line per step
        )
    except PapermillExecutionError as error:
        # an assertion has no message of its own: then the line that failed says most
        lines = (str(error.evalue).strip() or error.source.strip()).splitlines()
        raise MedkitError(
            f"{notebook.name}, cell {error.exec_count}: {error.ename}: {lines[-1]} (whole notebook: {executed})"
        ) from error
    except DeadKernelError as error:
        raise MedkitError(
            f"{notebook.name}: its kernel died, most often for want of memory; close other programs or choose a "
            f"smaller profile, then run the same command again (whole notebook: {executed})"
        ) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    if not stage.is_whole():
        raise MedkitError(f"{notebook.name} ended without committing its stage")

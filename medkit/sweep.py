"""Runs over a grid of settings. A stage that does not depend on what is varied is made once; the other runs take it.

Here one after the other, or as jobs: `submitit` sends them to Slurm. Either way all runs finish a stage before the next
one begins, so what they share is there when they ask for it. The same command goes on after a crash.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from medkit.params import load_params
from medkit.runner import fingerprints, run_all
from medkit.stage import STAGES, MedkitError, reading, run_dir


def name_points(name: str, grid: Mapping[str, Sequence]) -> dict[str, dict]:
    """Run → its overrides, for every combination of the grid's values; the first value of each key comes first.

    A run is named after the last parts of the keys: sweep_rank-4_seed-0. Raises MedkitError if two have one name, and
    for a key without values.
    """
    if empty := [key for key, values in grid.items() if not values]:
        raise MedkitError(f"--grid {empty[0]}=: no value; write --grid {empty[0]}=V1,V2")
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    names = [
        "_".join([name, *(re.sub(r"[^\w.-]+", "-", f"{key.split('.')[-1]}-{v}") for key, v in point.items())])
        for point in points
    ]
    if len(set(names)) < len(names):
        raise MedkitError(f"--grid: {[*grid]} give several runs the same name; vary one of these keys at a time")
    return dict(zip(names, points, strict=True))


def run_sweep(
    params_file: Path, name: str, points: Mapping[str, dict], reuse: Sequence[str] = (), jobs: Mapping | None = None
) -> None:
    """Run every point of a sweep (`name_points`), stage by stage.

    `reuse` names other runs that may hold a stage already. `jobs` None runs here, one after the other; else it holds
    settings of submitit, such as {"cluster": "slurm", "slurm_partition": "gpu", "gpus_per_node": 1}, and the jobs' logs
    lie in the sweep's folder. Raises the error of a run that failed here, and MedkitError for failed jobs, after all of
    their stage have ended.
    """
    wanted = {run: fingerprints(load_params(params_file, point)) for run, point in points.items()}
    sources = [*points, *reuse]
    submit = _run_here if jobs is None else _make_submit(run_dir(name) / "jobs", jobs)
    for stage in STAGES:
        owners = {}  # the first run with a fingerprint makes the stage
        for run, chain in wanted.items():
            owners.setdefault(chain[stage], run)
        waits = {run: submit(params_file, run, points[run], None, stage, sources) for run in owners.values()}
        failed = {run: error for run, wait in waits.items() if (error := wait())}
        if failed:
            first = next(iter(failed))
            raise MedkitError(f"{stage}: {len(failed)} of {len(waits)} runs failed, {first}: {failed[first]}")


def _run_here(*args) -> Callable[[], None]:
    run_all(*args)
    return lambda: None


def _make_submit(folder: Path, settings: Mapping) -> Callable[..., Callable[[], str | None]]:
    """A function that sends `run_all` away as a job; what it returns waits for the end and gives the error, or None."""
    try:
        import submitit
    except ImportError as error:
        raise MedkitError("--job needs submitit: pip install submitit") from error
    settings = dict(settings)
    with reading("--job", MedkitError, "correct it, or leave --job out to run here", "submitit refuses these settings"):
        executor = submitit.AutoExecutor(folder, cluster=settings.pop("cluster", "slurm"))
        executor.update_parameters(**({"timeout_min": 24 * 60} | settings))

    def submit(*args) -> Callable[[], str | None]:
        job = executor.submit(run_all, *args)

        def wait() -> str | None:
            if not (error := job.exception()):
                return None
            _, *parts = re.split(r"^-{9,}$", str(error), flags=re.MULTILINE)  # a traceback stands between two lines
            reason = (parts[0] if parts else str(error)).strip().splitlines()[-1 if parts else 0]
            return f"{reason} (log: {job.paths.stderr})"

        return wait

    return submit

"""Settings that must be in place before torch or a kernel starts, and the order of the tests."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

NEEDED_GB = 5  # by `make test`, for the smoke run and the toys

collect_ignore = ["notebooks/exercises"]  # the students' copy: its answers are missing


def pytest_configure(config):
    """Parallel workers share the cores; notebook tests never write to outputs/.

    Notebooks write to the folder of the smoke run if `make test` made one: what it trained from the same settings,
    inputs and code is read back there, and every cell runs all the same. Each parallel worker has its own copy of that
    folder, so no notebook reads what another one is writing. The copy is made of hard links: no file is changed in
    place.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    worker, workers = (os.environ.get(f"PYTEST_XDIST_WORKER{name}") for name in ("", "_COUNT"))
    if not worker and (smoke := os.environ.get("MEDKIT_SMOKE")):
        free_gb = shutil.disk_usage(smoke).free / 1e9
        if free_gb < NEEDED_GB:
            cure = "free space, or set TMPDIR to a folder on another disk"
            pytest.exit(f"{free_gb:.1f} GB of disk free at {smoke}, the tests need {NEEDED_GB}: {cure}", returncode=1)
    if worker:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
    if getattr(config.option, "nbval", False) or getattr(config.option, "nbval_lax", False):
        outputs = os.environ.get("MEDKIT_SMOKE")
        if not outputs:
            outputs = tempfile.mkdtemp(prefix="medkit-nbval-")
            config.add_cleanup(lambda: shutil.rmtree(outputs, ignore_errors=True))
        elif worker:
            smoke, outputs = Path(outputs) / "smoke", Path(outputs) / worker
            shutil.copytree(smoke, outputs / "smoke", copy_function=os.link)
        os.environ["MEDKIT_OUTPUTS"] = str(outputs)


def pytest_collection_modifyitems(items):
    """The smoke run comes first: it takes longest, and the other workers do the rest meanwhile."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/smoke/"))


def pytest_collection_finish():
    """What the imports made stays: a collection by a library (statsmodels' in Holm) takes a second without this."""
    gc.freeze()

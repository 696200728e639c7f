"""One json file per benchmark and device: what was measured, against which goal, and how.

Git keeps ratios, device and setup, and of the raw measurements only what a table reads. The whole record, by which an
interrupted benchmark goes on, is beside the runs in outputs/benchmarks.
"""

import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from medkit import stage
from medkit.stage import library_versions, provenance

RESULTS = Path(__file__).parent / "results"
RAW = Path(__file__).parents[1] / "outputs" / "benchmarks"


@dataclass(frozen=True)
class Ratio:
    """A dimensionless headline number, its goal (None: reported without one) and the repeats behind it."""

    value: float
    goal: float | None
    better: Literal["higher", "lower"]
    repeats: int


def device_name() -> str:
    """The accelerator's or the processor's name; how many cores it has is no part of a result's name."""
    return re.sub(r", \d+ cores$", "", stage.device_name())


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions(*packages: str) -> dict[str, str | None]:
    """Installed version of every package named; None if it is absent."""
    return {"python": platform.python_version()} | library_versions(packages)


def result_path(name: str, directory: Path = RESULTS) -> Path:
    return directory / f"{name}.{slug(device_name())}.json"


def raw_path(name: str, directory: Path = RESULTS) -> Path:
    """Where the whole record is; beside the result if that is not the one that git keeps."""
    folder = RAW if directory == RESULTS else directory / "raw"
    return folder / result_path(name, directory).name


def write(
    name: str, setup: dict[str, Any], ratios: dict[str, Ratio], raw: dict[str, Any],
    directory: Path = RESULTS, summary: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write `<directory>/<name>.<device>.json`, replacing an earlier run on the same device; `raw` goes to RAW.

    summary: what a table reads of the raw measurements; it is kept with the ratios.
    """
    record = {
        "name": name,
        "device": device_name(),
        "date": datetime.now(UTC).date().isoformat(),
        "git_commit": provenance()["git_commit"] or os.environ.get("GIT_COMMIT"),  # outside a checkout
        "setup": setup,
        "ratios": {what: asdict(ratio) for what, ratio in ratios.items()},
        "raw": raw,
    }
    for path in (raw_path(name, directory), result_path(name, directory)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
        record = {key: value for key, value in record.items() if key != "raw"}
        if summary:
            record["raw"] = summary
    print(json.dumps({"device": record["device"], "ratios": record["ratios"]}, indent=1), flush=True)
    return path

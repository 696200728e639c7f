"""Kill a run many times and compare it with one that nothing disturbed: `make faults`, an hour on two idle cores.

The undisturbed run comes first, unless --undisturbed names its outputs folder. Its executed notebooks tell how long
each cell took; the moments of the kills are drawn over that time, at least two in each stage. In another folder the
same command is killed with all its children (SIGKILL) when it comes to the next moment, and given again, until all
moments are over. The two runs must have the same results, except what measures the machine, and the same weights to
the bit.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from benchmarks.record import versions, write
from medkit.stage import MANIFEST, ROOT, STAGES

RUN = "smoke"
COMMAND = [sys.executable, "-m", "medkit", "run", "--params", str(ROOT / "params" / "smoke.yaml"), "--run", RUN]
# of the machine, not of the models
MEASURED = ("latency", "ttft", "throughput", "duration", "energy", "cost", "memory")


class Moment(NamedTuple):
    stage: str
    cell: int  # place in the notebook
    second: float  # of this cell


def start(outputs: Path, log: Path) -> subprocess.Popen:
    environment = os.environ | {"MEDKIT_OUTPUTS": str(outputs)}
    with log.open("w") as file:
        return subprocess.Popen(COMMAND, cwd=ROOT, env=environment, stderr=file, stdout=subprocess.DEVNULL)


def read_notebook(outputs: Path, stage: str, since: float = 0.0) -> list[dict]:
    """What papermill says of each cell; none before it has begun, after `since`, to execute the notebook."""
    try:
        notebook = json.loads((outputs / RUN / "notebooks" / f"{stage}.ipynb").read_text())
        begun = datetime.fromisoformat(notebook["metadata"]["papermill"]["start_time"]).timestamp() > since
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, or half-written
        return []
    return [cell["metadata"]["papermill"] for cell in notebook["cells"]] if begun else []


def seconds_of(cell: dict) -> float:
    """Seconds since a cell began; 0 before."""
    return time.time() - datetime.fromisoformat(cell["start_time"]).timestamp() if cell["start_time"] else 0.0


def draw_moments(outputs: Path, count: int, seed: int) -> list[Moment]:
    """`count` moments in order, each uniform over its stage's time; two or more in each stage, long ones have more."""
    rng = np.random.default_rng(seed)
    durations = [[cell["duration"] or 0.0 for cell in read_notebook(outputs, stage)] for stage in STAGES]
    totals = np.array([sum(times) for times in durations])
    each = min(2, count // len(STAGES))
    extra = rng.multinomial(count - each * len(STAGES), totals / totals.sum())
    moments = []
    for stage, times, number in zip(STAGES, durations, each + extra, strict=True):
        ends = np.cumsum(times)
        for second in sorted(rng.uniform(0, ends[-1], number)):
            cell = int(np.searchsorted(ends, second))
            moments.append(Moment(stage, cell, round(float(second - ends[cell] + times[cell]), 2)))
    return moments


def wait_for(moment: Moment, process: subprocess.Popen, outputs: Path, since: float) -> float | None:
    """Wait until the run comes to this moment, past its cell (a resumed one may be shorter), or has ended.

    Returns the second of the cell; None where the stage was done before.
    """
    while process.poll() is None and not (outputs / RUN / moment.stage / MANIFEST).is_file():
        cells = read_notebook(outputs, moment.stage, since)
        if cells and (second := seconds_of(cells[moment.cell])):
            if second >= moment.second or cells[moment.cell]["status"] != "running":
                return round(second, 1)
            time.sleep(min(0.1, moment.second - second))
        else:
            time.sleep(0.1)
    return None


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the run, its kernel, and what those started."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family[1:], timeout=30)
    process.wait()


def differences(undisturbed: Path, killed: Path) -> dict[str, list]:
    """Rows of the results, and files of weights, that are not the same in both runs; and what scratch is left."""
    rows, weights = [], []
    for outputs in (undisturbed, killed):
        results = json.loads((outputs / RUN / "results.json").read_text())["results"]
        rows.append({json.dumps(row, sort_keys=True) for row in results if not row["result"].startswith(MEASURED)})
        paths = [path for ending in ("safetensors", "gguf") for path in (outputs / RUN).rglob(f"*.{ending}")]
        weights.append(
            {(str(p.relative_to(outputs)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in sorted(paths)}
        )
    left = [str(path.relative_to(killed)) for path in killed.rglob("*.part")]
    differing = {"rows": sorted(rows[0] ^ rows[1]), "weights": sorted(weights[0] ^ weights[1])}
    return differing | {"scratch": left, "compared": [len(rows[0]), len(weights[0])]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--undisturbed", type=Path, help="outputs folder of a whole run of this code named smoke")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="medkit-faults-"))
    undisturbed, killed, log = arguments.undisturbed or scratch / "undisturbed", scratch / "killed", scratch / "log"
    if not arguments.undisturbed:
        assert start(undisturbed, log).wait() == 0, log.read_text()
    kills = []
    for moment in draw_moments(undisturbed, arguments.kills, arguments.seed):
        since, process = time.time(), start(killed, log)
        second = wait_for(moment, process, killed, since)
        assert process.poll() is None, log.read_text()
        kill(process)
        kills.append(moment._asdict() | {"second": second})
        print(json.dumps(kills[-1]), flush=True)
    assert start(killed, log).wait() == 0, log.read_text()
    found = differences(undisturbed, killed)
    verdict = "the same" if not (found["rows"] or found["weights"] or found["scratch"]) else "DIFFERENT"
    summary = {"verdict": verdict, **found, "kills": kills}
    setup = {"profile": RUN, "seed": arguments.seed, "versions": versions("torch", "transformers")}
    write("faults", setup, {}, {}, summary=summary)
    print(json.dumps({"verdict": verdict} | found, indent=1))
    raise SystemExit(verdict != "the same")


if __name__ == "__main__":
    main()

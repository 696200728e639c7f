"""Computed against measured memory of a real model: weights, key-value cache and activations of one pass.

Each measurement is a process of its own. On the CPU it is the resident set above what the libraries occupy: with blocks
of 1 MiB and more returned when freed, which is what a ledger can know, and with glibc as it comes, whose pool of freed
blocks is then counted too (as `reserved` is above `allocated` on CUDA, where the allocator counts). Weights are float32
on the CPU and bfloat16 on CUDA. Units: bytes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from record import RESULTS, Ratio, result_path, versions, write
from transformers import AutoConfig, AutoModelForCausalLM

from medkit import ledger, models, peak
from medkit.outputs import ROOT
from medkit.params import load_params

SHAPES = [(1, 512), (4, 512), (1, 2048), (4, 2048)]  # sequences, tokens each
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
ALLOCATORS = {"allocated": {}}  # what a measurement counts → variables of its process
if DEVICE.type == "cpu":
    ALLOCATORS = {"blocks_returned": {"MALLOC_MMAP_THRESHOLD_": str(2**20)}, "glibc_pool_included": {}}
GOAL = 0.05  # relative error of the total; none is set for a pool


def computed(folder: Path, batch: int, context: int) -> dict[str, int]:
    """The ledger's parts and the two totals that a measurement can see."""
    config, size = AutoConfig.from_pretrained(folder), DTYPE.itemsize
    shapes = ledger.model_shapes(config)
    weights = int(ledger.plan_bytes(shapes, {}, size).bytes.sum())
    cache = ledger.kv_cache_bytes(config, batch, context, size)
    activations = peak.activation_bytes(config, shapes, {}, batch, context, size, size)
    totals = {name: weights + cache + extra for name, extra in activations.items()}
    return {"weights": weights, "kv_cache": cache, "activations": activations, "total": totals}


def measured(folder: Path, batch: int, context: int) -> dict[str, int]:
    def load() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, attn_implementation="sdpa").to(DEVICE).eval()

    return peak.measure_peak(load, batch, context, DEVICE)


def in_a_process(folder: Path, batch: int, context: int, settings: dict[str, str]) -> dict[str, int]:
    command = [sys.executable, __file__, "--folder", str(folder), "--one", str(batch), str(context)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(command, capture_output=True, text=True, env=inherited | settings)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="a model on this machine; default the tiny profile's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--one", type=int, nargs=2, metavar=("BATCH", "CONTEXT"), help="measure once, print json")
    args = parser.parse_args()
    teacher = load_params(ROOT / "params" / "tiny.yaml").models.teacher
    folder = args.folder or models.local_folder(teacher)
    if args.one:
        print(json.dumps(measured(folder, *args.one)))
        return

    rows = []
    for batch, context in SHAPES:
        expected = computed(folder, batch, context)
        row = {"batch": batch, "context": context, "computed": expected, "measured": {}, "computed_over_measured": {}}
        for allocator, settings in ALLOCATORS.items():
            runs = [in_a_process(folder, batch, context, settings) for _ in range(args.repeats)]
            middle = {what: statistics.median(run[what] for run in runs) for what in runs[0]}
            over = {name: expected["total"][name] / middle[name] for name in ("prefill", "decode")}
            row["measured"][allocator] = {"median": middle, "runs": runs}
            row["computed_over_measured"][allocator] = over
            print(batch, context, allocator, {name: round(value, 4) for name, value in over.items()}, flush=True)
        rows.append(row)

    ratios = {}
    for allocator in ALLOCATORS:
        goal = None if allocator == "glibc_pool_included" else GOAL
        for step in ("prefill", "decode"):
            errors = [abs(row["computed_over_measured"][allocator][step] - 1) for row in rows]
            ratios[f"{step}_total_largest_error/{allocator}"] = Ratio(max(errors), goal, "lower", args.repeats)
    setup = {
        "model": folder.name, "dtype": str(DTYPE).removeprefix("torch."), "attention": "sdpa", "logits_to_keep": 1,
        "shapes": SHAPES, "repeats": args.repeats, "statistic": "median over processes, largest error over shapes",
        "measured": "peak above the libraries' own memory; resident set on the CPU, allocator on CUDA",
        "allocators": ALLOCATORS, "threads": torch.get_num_threads(),
        "versions": versions("torch", "transformers"),
    }  # fmt: skip
    write("ledger", setup, ratios, {"shapes": rows}, args.output)
    print(result_path("ledger", args.output).read_text().partition('"raw"')[0])


if __name__ == "__main__":
    main()

"""Computed against measured memory of real models: weights, key-value cache and activations of one pass.

Three models: one that is not quantised (`--folder`), and of a finished run the model of its plan as it was saved and
its student in the library's NF4.
Each measurement is a process of its own. On the CPU it is the resident set above what the libraries occupy: with blocks
of 1 MiB and more returned when freed, which is what a ledger can know, and with glibc as it comes, whose pool of freed
blocks is then counted too (as `reserved` is above `allocated` on CUDA, where the allocator counts). Weights are float32
on the CPU and bfloat16 on CUDA. A quantised model on the CPU holds more than a ledger knows: the file it was loaded
from stays mapped (`checkpoint_mapped`), and at the first pass bitsandbytes repacks NF4 layers beside it. Units: bytes.
"""

import gc
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, DynamicCache

from benchmarks.inputs import STUDENT, make_parser
from benchmarks.record import Ratio, versions, write
from medkit.modeling import loading
from medkit.params import Params, load_params
from medkit.quantization import memory_ledger, plans, quantize
from medkit.stage import ROOT

SHAPES = [(1, 512), (4, 512), (1, 2048), (4, 2048)]  # sequences, tokens each
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
ALLOCATORS = {"allocated": {}}  # what a measurement counts → variables of its process
if DEVICE.type == "cpu":
    ALLOCATORS = {"blocks_returned": {"MALLOC_MMAP_THRESHOLD_": str(2**20)}, "glibc_pool_included": {}}
GOAL = 0.05  # relative error of the total; none is set for a pool


def reset_peak(device: torch.device) -> None:
    """Start a new peak. On the CPU this raises OSError if /proc is missing or not writable."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def read_peak(device: torch.device) -> int:
    """Peak bytes since `reset_peak`: of CUDA's allocator, or of the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE).group(1))


UNQUANTISED, PLAN, NF4 = "unquantised", "plan", "nf4"


def schemes_of(form: str, folder: Path, shapes: list[memory_ledger.Weight]) -> dict[str, str]:
    """Module → scheme of a model in one of the three forms."""
    matrices = {weight.module: weight.shape for weight in shapes if len(weight.shape) == 2}
    if form == PLAN:
        return quantize.read_plan(folder).schemes
    return plans.nf4_plan(matrices).schemes if form == NF4 else {}


def computed(form: str, folder: Path, params: Params, batch: int, context: int) -> dict[str, int]:
    """The ledger's parts and the two totals that a measurement can see."""
    config, size = AutoConfig.from_pretrained(folder), DTYPE.itemsize
    shapes = memory_ledger.model_shapes(config)
    schemes = schemes_of(form, folder, shapes)
    weights = int(memory_ledger.plan_bytes(shapes, schemes, size, params.quantization.double_quant).bytes.sum())
    cache = memory_ledger.kv_cache_bytes(config, batch, context, size)
    activations = memory_ledger.activation_bytes(config, shapes, schemes, batch, context, size)
    totals = {name: weights + cache + extra for name, extra in activations.items()}
    return {"weights": weights, "kv_cache": cache, "activations": activations, "total": totals}


def measured(form: str, folder: Path, params: Params, batch: int, context: int) -> dict[str, int]:
    settings = {"device": DEVICE.type, "dtype": str(DTYPE).removeprefix("torch."), "attention": "sdpa"}
    asked = params.models.model_copy(update=settings)

    loaded = []  # held beyond the passes, so that what is mapped can be read after them

    def load() -> torch.nn.Module:
        if form == PLAN:
            loaded.append(quantize.load_quantized(folder, asked))
        elif form == NF4:
            model = loading.load_model(folder, asked)
            plan = plans.nf4_plan(quantize.weight_shapes(model))
            loaded.append(quantize.apply_plan(model, plan, params.quantization.double_quant))
        else:
            loaded.append(loading.load_model(folder, asked))
        return loaded[0]

    return measure_peak(load, batch, context, DEVICE) | {"checkpoint_mapped": mapped_bytes()}


@torch.inference_mode()
def measure_peak(load: Callable[[], torch.nn.Module], batch: int, context: int, device: torch.device) -> dict[str, int]:
    """Peak bytes of a prefill of (batch, context) and of the next decode step: weights, cache and activations.

    `libraries` is the memory after a toy model has run and before `load()` is called; it is subtracted from the other
    two. A short pass comes first, so that weights mapped from a file are in memory. On CUDA the allocator counts. On
    the CPU it is the resident set of the process, so call this in a fresh process.
    """
    toy = loading.make_toy_model().to(device)
    _peaks(toy, batch, 8, device)
    del toy
    gc.collect()
    reset_peak(device)
    libraries = read_peak(device)
    model = load()
    _peaks(model, batch, 8, device)
    prefill, decode = _peaks(model, batch, context, device)
    return {"libraries": libraries, "prefill": prefill - libraries, "decode": decode - libraries}


def _peaks(model: torch.nn.Module, batch: int, context: int, device: torch.device) -> list[int]:
    ids = torch.ones(batch, context, dtype=torch.long, device=device)
    cache, peaks = DynamicCache(config=model.config), []
    for tokens in (ids, ids[:, :1]):
        reset_peak(device)
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        peaks.append(read_peak(device))
    return peaks


def mapped_bytes() -> int:
    """Resident bytes of weight files that this process has mapped; the system may take them back, but they count."""
    smaps = Path("/proc/self/smaps")
    text = smaps.read_text() if smaps.exists() else ""
    return 1024 * sum(map(int, re.findall(r"\.safetensors\n(?:.*\n)*?Rss:\s+(\d+) kB", text)))


def in_a_process(form: str, folder: Path, batch: int, context: int, settings: dict[str, str]) -> dict[str, int]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.quantization.ledger",
        "--one",
        form,
        str(folder),
        str(batch),
        str(context),
    ]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=inherited | settings, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--folder", type=Path, help="a model on this machine; default the tiny profile's")
    parser.add_argument(
        "--one", nargs=4, metavar=("FORM", "FOLDER", "BATCH", "CONTEXT"), help="measure once, print json"
    )
    args = parser.parse_args()
    params = load_params(args.params)
    if args.one:
        form, folder, batch, context = args.one
        print(json.dumps(measured(form, Path(folder), params, int(batch), int(context))))
        return

    folders = {
        UNQUANTISED: args.folder or loading.local_folder(params.models.teacher),
        PLAN: args.run / "04_quantization" / "plan",
        NF4: args.run / STUDENT,
    }
    rows = []
    for form, (batch, context) in itertools.product(folders, SHAPES):
        expected = computed(form, folders[form], params, batch, context)
        row = {"form": form, "batch": batch, "context": context, "computed": expected}
        row |= {"measured": {}, "computed_over_measured": {}}
        for allocator, settings in ALLOCATORS.items():
            runs = [in_a_process(form, folders[form], batch, context, settings) for _ in range(args.repeats)]
            middle = {what: statistics.median(run[what] for run in runs) for what in runs[0]}
            over = {name: expected["total"][name] / middle[name] for name in ("prefill", "decode")}
            row["measured"][allocator] = {"median": middle, "runs": runs}
            row["computed_over_measured"][allocator] = over
            print(form, batch, context, allocator, {name: round(value, 4) for name, value in over.items()}, flush=True)
        rows.append(row)

    ratios = {}
    for form, allocator, step in itertools.product(folders, ALLOCATORS, ("prefill", "decode")):
        goal = None if allocator == "glibc_pool_included" else GOAL
        errors = [abs(row["computed_over_measured"][allocator][step] - 1) for row in rows if row["form"] == form]
        name = f"{step}_total_largest_error/{allocator}"
        name = name if form == UNQUANTISED else f"{form}/{name}"
        ratios[name] = Ratio(max(errors), goal, "lower", args.repeats)
    setup = {
        "model": folders[UNQUANTISED].name, "quantised": "plan and student of a tiny run",
        "dtype": str(DTYPE).removeprefix("torch."), "attention": "sdpa", "logits_to_keep": 1,
        "shapes": SHAPES, "repeats": args.repeats, "statistic": "median over processes, largest error over shapes",
        "measured": "peak above the libraries' own memory; resident set on the CPU, allocator on CUDA",
        "allocators": ALLOCATORS, "threads": torch.get_num_threads(),
        "versions": versions("torch", "transformers", "bitsandbytes"),
    }  # fmt: skip
    write("ledger", setup, ratios, {"shapes": rows}, args.output)


if __name__ == "__main__":
    main()

"""Run, inspect, train and serve medkit's models.

In this repository write `.venv/bin/python -m medkit …`: `make run` puts everything into .venv and nowhere else.
"""

import logging
import os
import re
import shutil
import signal
import sys
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Annotated

import psutil
import typer
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from medkit.params import RUN_PARAMS, Params, ParamsError, StrictLoader, load_params, load_run_params
from medkit.stage import (
    DISCLAIMER,
    ROOT,
    STAGES,
    MedkitError,
    Stage,
    StageError,
    device_name,
    outputs_root,
    reading,
    run_dir,
    write_errors,
)

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console(highlight=False, soft_wrap=True)

ParamsFile = Annotated[Path, typer.Option("--params", help="Profile to run, e.g. params/tiny.yaml")]
RunParamsFile = Annotated[Path | None, typer.Option("--params", help="Another profile than the run's own")]
RunName = Annotated[str, typer.Option("--run", help="Name of the folder below outputs/")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. lora.adapter.rank=4")
]
ReusedRuns = Annotated[
    list[str] | None, typer.Option("--reuse", metavar="RUN", help="Take the stages that this run made the same way")
]


def parse_overrides(pairs: list[str] | None, option: str = "--set") -> dict:
    """`["lora.adapter.rank=4"]` → `{"lora.adapter.rank": 4}`; values are read as yaml."""
    overrides = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ParamsError(f"{option} {pair!r}: write KEY=VALUE, e.g. {option} lora.adapter.rank=4")
        if key in overrides:
            raise ParamsError(f"{option} {pair!r}: {key} is there twice; give it once")
        with reading(f"{option} {pair!r}", ParamsError, "quote it", f"the value of {key!r} is not valid yaml"):
            overrides[key] = StrictLoader(value).get_single_data()
    return overrides


def _check_reused(runs: list[str] | None) -> None:
    for name in runs or ():
        if not run_dir(name).is_dir():
            raise StageError(f"--reuse {name!r}: no such run in {outputs_root()}; correct the name, or leave it out")


def _was_checked(profile: Params, run: str) -> bool:
    """Whether the run was started with this profile: what goes on was checked."""
    with suppress(ParamsError):  # no such run yet, or by a version with other keys
        return load_run_params(run) == profile
    return False


def params_of(run: str, params_file: Path | None, overrides: list[str] | None) -> Params:
    """The params that a run was started with, or those of the profile that the user names."""
    changes = parse_overrides(overrides)
    return load_params(params_file, changes) if params_file else load_run_params(run, changes)


@app.command()
def run(
    params: Annotated[
        Path | None, typer.Option("--params", help="Profile. Without it: the run's own; for a new run params/tiny.yaml")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Name of the folder below outputs/; without it the profile's name")
    ] = None,
    first: Annotated[str | None, typer.Option("--from", help="Rerun from this stage on, e.g. 03_lora")] = None,
    last: Annotated[str | None, typer.Option("--until", help="Stop after this stage, e.g. 02_distillation")] = None,
    reuse: ReusedRuns = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check profile, files and models; print what it takes on a GPU; run nothing"),
    ] = False,
) -> None:
    """Run every notebook that is not done; the same command after a crash or kill goes on.

    With MEDKIT_STORE=s3://bucket/prefix (any URL of fsspec) finished stages are fetched from there, and sent there.
    """
    run, changes = run or (params.stem if params else "tiny"), parse_overrides(overrides)
    own = run_dir(run) / RUN_PARAMS
    params = params or (own if own.is_file() else ROOT / "params" / "tiny.yaml")
    profile, notes = load_params(params, changes), []
    if dry_run or not _was_checked(profile, run):
        from medkit import preflight

        notes = preflight.check_profile(profile)
    if dry_run:
        for note in notes:
            typer.echo(note, err=True)
        typer.echo(yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
        if profile.models.device == "cuda":
            from medkit.reporting.forecast import forecast_table

            try:
                typer.echo(forecast_table(profile), err=True)  # standard output stays a profile
            except ParamsError as error:  # the profile may be good all the same
                typer.echo(str(error), err=True)
        return
    from medkit import reporting, run_store
    from medkit.runner import run_all

    _check_reused(reuse)
    ran = run_all(params, run, changes, first, last, reuse or ())
    console.print(f"{len(ran)} stages ran" if ran else "everything up to date")
    if last not in (None, STAGES[-1]):
        return
    if ran or not (run_dir(run) / "report.html").is_file():
        reporting.write_report(run_dir(run))
    run_store.send(run, [])  # no stage, but the report
    console.print(f"results: {run_dir(run) / 'results.json'}")
    console.print(f"report: {run_dir(run) / 'report.html'}")
    console.print(f"executed notebooks: {run_dir(run) / 'notebooks'}")
    console.print(DISCLAIMER)


@app.command()
def sweep(
    grid: Annotated[list[str], typer.Option("--grid", metavar="KEY=V1,V2", help="e.g. lora.adapter.rank=4,16,64")],
    params: ParamsFile = ROOT / "params" / "tiny.yaml",
    name: Annotated[
        str, typer.Option("--run", help="Name of the sweep, with which the names of its runs begin")
    ] = "sweep",
    reuse: ReusedRuns = None,
    jobs: Annotated[
        list[str] | None,
        typer.Option("--job", metavar="KEY=VALUE", help="Send jobs to Slurm: submitit's settings, e.g. cluster=slurm"),
    ] = None,
) -> None:
    """Run all combinations of some settings, share the stages that do not depend on them, and compare the results."""
    from medkit import preflight
    from medkit.reporting.sweeps import write_sweep
    from medkit.sweep import name_points, run_sweep

    listed = [re.sub("=(.*)", r"=[\1]", pair, count=1) for pair in grid]
    points = name_points(name, parse_overrides(listed, "--grid"))
    _check_reused(reuse)
    for run, point in points.items():
        if not _was_checked(profile := load_params(params, point), run):
            preflight.check_profile(profile)
    run_sweep(params, name, points, reuse or (), None if jobs is None else parse_overrides(jobs, "--job"))
    typer.echo(write_sweep(name, points))
    console.print(f"written: {run_dir(name)}")


@app.command()
def status(
    run: RunName = "tiny",
    params: RunParamsFile = None,
    overrides: Overrides = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file again, and compare its sha256")] = False,
) -> None:
    """Which stages of a run are done, stale, damaged or missing."""
    from medkit import runner

    table, changed = Table("stage", "state", "took"), []
    for name, state in runner.status(params_of(run, params, overrides), run).items():
        stage = Stage(run, name)
        table.add_row(name, state, f"{stage.manifest()['duration_s']:.0f} s" if stage.manifest() else "–")
        if verify:
            changed += [f"{name}/{file}" for file in stage.changed_files()]
    console.print(table)
    if changed:
        again = f"`run --run {run} --from {changed[0].partition('/')[0]}` makes them again"
        raise StageError(f"run {run!r}: not as they were written: {', '.join(changed)}; {again}")


@app.command()
def report(run: RunName = "tiny") -> None:
    """Print a run's results as markdown tables, and write its report page again."""
    from medkit import reporting

    results, facts = reporting.load_results(run_dir(run) / "results.json")
    tables = reporting.run_tables(results, facts) | {"Beside the paper": reporting.paper_table(results, facts)}
    typer.echo("\n\n".join(f"## {title}\n\n{table}" for title, table in tables.items()))
    typer.echo(f"\n{DISCLAIMER} {reporting.write_report(run_dir(run))}")


@app.command()
def compare(
    run_a: Annotated[str, typer.Argument(help="The run that the other is measured against")],
    run_b: Annotated[str, typer.Argument(help="The other run")],
) -> None:
    """Compare two runs: are accuracies the same to the digit, paired differences, costs, settings that differ."""
    from medkit import reporting

    folder = run_dir(run_a) / f"compare_{run_b}"
    typer.echo(reporting.write_comparison(reporting.compare(run_dir(run_a), run_dir(run_b)), folder))
    typer.echo(f"written: {folder}")


@app.command()
def plan(
    model: Annotated[str, typer.Option("--model", help="config.json, a folder with one, or a known name")],
    budget: Annotated[str, typer.Option("--budget", help="Memory of the device, e.g. 8GB or 8GiB")],
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens per sequence, prompt and answer")] = 4096,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at a time")] = 1,
) -> None:
    """Which quantization plan fits a memory budget, from the shapes of a model: no weights, no network."""
    from medkit.quantization import memory_budget

    number, unit = memory_budget.parse_size(budget)
    config, bytes_per_unit = memory_budget.read_config(model), memory_budget.UNITS[unit]
    estimates = memory_budget.estimate_presets(config, batch, context)
    best = next((e for e in estimates if e.total <= number * bytes_per_unit), None)
    columns = ["plan", "bits", "weights", "scales", "cache", "activations", "total", "left"]
    title = f"{model}, batch {batch}, context {context}: {unit} of {number:g}"
    table = Table(*columns, title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for e in estimates:
        sizes = (e.weights, e.scales, e.kv_cache, e.activations, e.total)
        cells = [f"{size / bytes_per_unit:.2f}" for size in sizes] + [f"{number - e.total / bytes_per_unit:+.2f}"]
        table.add_row(e.plan, f"{e.bits_per_weight:.2f}", *cells, style="bold" if e is best else None)
    console.print(table)
    if best is None:
        smallest = min(estimates, key=lambda e: e.total)
        raise ParamsError(
            f"no plan fits {number:g} {unit}: the smallest, {smallest.plan}, takes "
            f"{smallest.total / bytes_per_unit:.2f} {unit}; raise --budget, or lower --batch or --context"
        )
    console.print(
        f"best: {best.plan}, {best.bits_per_weight:.2f} bits per weight, {best.total / bytes_per_unit:.2f} {unit}"
    )
    console.print("Computed from shapes, without the memory of the libraries; the cost in accuracy is not known here.")


@app.command()
def train(
    stage: Annotated[str, typer.Option("--stage", help="teacher, a student such as student_kd, or lora")],
    run: RunName = "tiny",
    params: RunParamsFile = None,
    overrides: Overrides = None,
) -> None:
    """Train one stage of a run where its notebook would; with `accelerate launch -m medkit train …` on many devices."""
    profile = params_of(run, params, overrides)
    from medkit.distillation import stages
    from medkit.inference.variant_loading import make_engine
    from medkit.lora import adapters

    if stage == "lora":
        log = adapters.train_stage(run, profile)
    else:
        log = stages.train_stage(stage, run, profile, make_engine)
    if os.environ.get("RANK", "0") == "0":
        first, last = log.iloc[0], log.iloc[-1]
        console.print(f"{stage}: {last.step:.0f} steps, loss {first.loss:.3f} → {last.loss:.3f} nats per token")


@app.command()
def serve(
    run: RunName = "tiny",
    host: Annotated[str, typer.Option(help="Other addresses than 127.0.0.1 need an API key")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="MEDKIT_API_KEY", help="Better in the environment")] = None,
    upstream: Annotated[
        str | None, typer.Option(help="URL (…/v1) of an OpenAI-compatible server to use in place of the edge file")
    ] = None,
    upstream_key: Annotated[str | None, typer.Option(envvar="MEDKIT_UPSTREAM_KEY", help="Its API key")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Requests answered at once; more wait")] = 4,
    context: Annotated[int, typer.Option(min=64, help="Tokens of prompt and answer together, per slot")] = 4096,
) -> None:
    """Answer people and OpenAI's clients with the edge file of a run, until Ctrl-C."""
    from medkit.inference import serve as serving

    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    console.print(f"{url} for a person, {url}/v1 for OpenAI's clients · {DISCLAIMER}")
    options = {"upstream": upstream, "upstream_key": upstream_key, "slots": slots, "context_tokens": context}
    serving.serve(run, host, port, api_key, **options)


@app.command()
def chat(
    run: RunName = "tiny",
    upstream: Annotated[str | None, typer.Option(help="URL (…/v1) of another server, as for serve")] = None,
    upstream_key: Annotated[str | None, typer.Option(envvar="MEDKIT_UPSTREAM_KEY", help="Its API key")] = None,
) -> None:
    """Ask the edge file of a run in this terminal: an empty line sends what was written, Ctrl-D ends."""
    from medkit.inference import serve as serving

    console.print(f"{DISCLAIMER} An empty line sends, Ctrl-D ends.")
    with serving.open_chat(run, upstream, upstream_key) as answer:
        for blank, lines in groupby(iter(sys.stdin.readline, ""), lambda line: not line.strip()):
            if not blank:
                typer.echo(f"{answer(''.join(lines).strip())}\n")


@app.command()
def doctor() -> None:
    """What this machine can do; exits 1 if the tiny profile cannot run here."""
    import torch

    from medkit.modeling.loading import pick_attention, pick_device
    from medkit.sources import cache_root

    for folder in (cache_root(), outputs_root()):
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    device = pick_device("auto")
    memory_gb, disk_gb = psutil.virtual_memory().available / 1e9, shutil.disk_usage(cache_root()).free / 1e9
    filled = sorted(p.name for p in cache_root().glob("*/*") if p.suffix != ".lock")
    table = Table("what", "here")
    table.add_row("device", device_name())
    table.add_row("python, torch", f"{sys.version.split()[0]}, {torch.__version__}, {torch.get_num_threads()} threads")
    table.add_row("attention", "{}: {}".format(*pick_attention("auto", device, "bfloat16")))
    table.add_row("memory, disk free", f"{memory_gb:.1f} GB, {disk_gb:.1f} GB")
    table.add_row("cache", f"{cache_root()}: " + (", ".join(filled) or "empty, the first run needs a network"))
    console.print(table)
    problems = []
    if memory_gb < 6:
        problems.append(f"{memory_gb:.1f} GB of memory free, the tiny profile needs 6: close other programs")
    if disk_gb < 8:
        problems.append(f"{disk_gb:.1f} GB of disk free at {cache_root()}, a run needs 8: set MEDKIT_CACHE elsewhere")
    for problem in problems:
        console.print(f"missing: {problem}")
    raise typer.Exit(1 if problems else 0)


def main() -> None:
    """The command line; an error that a user can cause is one sentence and exit code 1.

    SIGINT and SIGTERM are one sentence and 128 + their number; what was half-written is removed on the way out.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    # on processors with AVX512-BF16 it asks for a package that would download code from the hub
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app()
    except MedkitError as error:
        _complain(str(error))
        raise SystemExit(1) from error


def _stop(number: int, frame) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # a second one must not interrupt the way out
    _complain(f"stopped by {signal.Signals(number).name}; what is finished is kept, the same command goes on")
    raise SystemExit(128 + number)


def _complain(sentence: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes one per machine prints it
        typer.echo(f"medkit: {sentence}", err=True)


if __name__ == "__main__":
    main()

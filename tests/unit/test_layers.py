"""Imports point down, layer 0 knows no torch, and a module is named after what it does."""

import ast
import json
import subprocess
import sys

import pytest

from medkit.outputs import ROOT

PACKAGE = ROOT / "medkit"
LAYERS = [
    ["profiles", "origins"],
    ["params"],
    ["outputs", "sources", "prompts", "duplicates", "figures", "plans", "statistics", "paper_numbers"],
    ["parsing", "records", "datacard", "contamination", "calibration", "energy", "clauses", "response_cache"],
    ["evaluation", "readers", "icd", "models", "prefixes", "ledger"],
    ["batching", "sampling", "sharding"],
    ["losses", "entities", "shards"],
    [
        *["claims", "safety", "report", "data", "problems", "embeddings"],
        *["training", "rowwise", "lora", "scoring", "edge_tokenizer", "peak"],
    ],
    ["k_quants"],
    ["edge", "budget", "rounding", "merging", "onpolicy", "studies", "engines", "options", "serving_text"],
    [
        *["quantization", "robustness", "signals", "rationales"],
        *["running_batch", "edge_engine", "remote_engine", "workloads", "serving_schema"],
    ],
    [
        *["sensitivity", "distillation", "alignment", "paper", "card", "compare"],
        *["torch_engine", "engine_choice", "serving_queue", "serving_cache"],
    ],
    ["inference", "lessons", "serving_http", "variants"],
    ["serving", "recipes"],
    ["runner", "page"],
    ["__main__"],
]
BESIDE = {("figures", "outputs"): "a saved figure is an artifact, written atomically"}
WITHOUT_TORCH = [
    *(name for layer in LAYERS[:4] for name in layer),
    *["evaluation", "readers", "icd", "claims", "safety", "report", "data", "problems", "paper", "card", "compare"],
    *["engines", "edge_engine", "remote_engine", "serving_schema", "serving_queue", "serving_http"],
    *LAYERS[-2],
    *LAYERS[-1],
]  # the command line answers at once too
HEAVY = ["torch", "transformers", "pandas", "numpy", "pydantic", "yaml", "matplotlib", "papermill", "datasets"]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imported_modules(name: str) -> set[str]:
    """Modules of this package that a module imports anywhere in its source, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write `from medkit import …`, the runner's fingerprint reads nothing else"
            if node.module == "medkit":
                found |= {alias.name for alias in node.names}
            elif (node.module or "").startswith("medkit."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "medkit" for alias in node.names), f"{name}: `import medkit…`"
    return found


def test_every_module_has_a_layer():
    assert sorted(name for layer in LAYERS for name in layer) == MODULES


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    level = {module: number for number, layer in enumerate(LAYERS) for module in layer}
    for target in imported_modules(name):
        assert level[target] < level[name] or (name, target) in BESIDE, (
            f"{name} imports {target}, which is not below it"
        )


def test_every_exception_is_needed():
    level = {module: number for number, layer in enumerate(LAYERS) for module in layer}
    for name, target in BESIDE:
        assert level[name] == level[target]
        assert target in imported_modules(name)


def loaded_by(statement: str, *names: str) -> set[str]:
    """Which of `names` a fresh interpreter has loaded after the statement."""
    script = f"import json, sys\n{statement}\nprint(json.dumps([n for n in {list(names)} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_package_alone_loads_nothing():
    others = [f"medkit.{name}" for name in MODULES]
    assert loaded_by("import medkit", *HEAVY, *others) == set()


def test_text_tables_and_commands_need_no_torch():
    statement = "\n".join(f"import medkit.{name}" for name in WITHOUT_TORCH)
    assert loaded_by(statement, "torch", "transformers", "peft", "bitsandbytes") == set()


@pytest.mark.parametrize("name", [*MODULES, "__init__"])
def test_a_module_reads_in_one_sitting(name):
    source = (PACKAGE / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(source))


def test_no_module_is_a_drawer():
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "base", "core"}
    names = {path.stem.strip("_") for path in PACKAGE.rglob("*.py")}
    assert not names & drawers

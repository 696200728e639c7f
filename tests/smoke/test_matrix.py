"""Small profiles of every kind: data × architectures × optional parts. What `--dry-run` accepts, all notebooks finish.

The settings are chosen so that every two of them meet in a profile; each architecture is in one or more. Models and
encoder are toys with random weights. `make matrix`; about a minute of one core for each profile.
"""

import copy
import itertools
import json
import random

import nbformat
import pandas as pd
import pytest
import toys
import yaml

from medkit import preflight, reporting, runner
from medkit.params import load_params
from medkit.stage import ROOT, STAGES, Stage, run_dir
from medkit.variants import list_variants

pytestmark = [pytest.mark.slow, pytest.mark.weights]
SMOKE = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
EXPORTED = ("llama", "llama3_rope", "qwen2", "qwen3", "gemma3")
FACTORS = {
    "architecture": ["llama", "qwen2", "qwen3", "gemma3", "mistral", "phi3", "llama3_rope"],
    "data": ["table", "made", "all"],  # all: instruction samples too
    "ending": ["jsonl", "csv", "parquet"],
    "template": ["chatml", "none", "no_system"],
    "edge": ["both", "null"],
    "second_form": [True, False],
    "open_and_dialogues": [True, False],
    "students": [[], ["student_hard", "student_self", "student_ceiling"]],
    "student": ["pruned_teacher", "own"],
}


def is_possible(case: dict) -> bool:
    exported = case["edge"] == "null" or case["architecture"] in EXPORTED
    return exported and (case["data"] != "table" or not case["second_form"])


def pairs_of(case: dict) -> set:
    """Every two settings of a case; an architecture counts alone, since seven of them would need many more cases."""
    settings = {(name, str(value)) for name, value in case.items()}
    single = {pair for pair in settings if pair[0] == "architecture"}
    return {frozenset(pair) for pair in itertools.combinations(sorted(settings - single), 2)} | single


def choose_cases() -> list[dict]:
    cases = [dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())]
    cases = [case for case in cases if is_possible(case)]
    random.Random(0).shuffle(cases)
    pairs, chosen = [pairs_of(case) for case in cases], []
    left = set().union(*pairs)
    while left:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & left))
        chosen.append(cases[best])
        left -= pairs[best]
    return chosen


CASES = choose_cases()
NO_SYSTEM = (
    "{{ strftime_now('%Y-%m-%d') }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
)
TEMPLATES = {"chatml": toys.CHATML, "none": None, "no_system": NO_SYSTEM + toys.CHATML}
TEXTS = (ROOT / "README.md").read_text() + (ROOT / "docs" / "glossary.md").read_text()
WORDS = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]


ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "gemma3": ("Gemma3", {"head_dim": 256, "sliding_window": 64}),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "phi3": ("Phi3", {}),
    "llama3_rope": ("Llama", {"rope_parameters": ROPE | {"original_max_position_embeddings": 512}}),
}


def save_toy(folder, architecture: str, template: str, layers: int):
    """A folder with a random model and its tokenizer, which splits texts as SmolLM2's or as Qwen2's."""
    from tokenizers import normalizers

    from medkit.quantization.gguf_tokenizer import QWEN2_SPLIT

    kind, changes = ARCHITECTURES[architecture]
    sizes = {"vocab_size": 640, "intermediate_size": 128, "max_position_embeddings": 4096}
    sizes |= {"tie_word_embeddings": layers % 2 == 1}
    toys.make_llama(layers, layers, kind, **sizes | changes).save_pretrained(folder)
    texts, chat_template = TEXTS.splitlines(), TEMPLATES[template]
    if architecture == "gemma3":
        tokenizer = toys.make_gemma_tokenizer(texts, 600, chat_template and toys.GEMMA)
    else:
        tokenizer = toys.make_tokenizer(texts=texts, size=600, chat_template=chat_template)
    if architecture.startswith("qwen"):
        toys.split_by_rule(tokenizer, QWEN2_SPLIT).backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(folder)
    return {"source": {"kind": "local", "path": str(folder)}, "keep_layers": []}


def save_table(path) -> dict:
    """Ninety questions with four options, in groups of two, with a split of their own; its `origin`."""
    draw, rows = random.Random(0), []
    for number in range(90):
        words = ["".join(draw.choices(WORDS, k=2)) for _ in range(12)]
        options = [f"{word} {number}" for word in words[8:]]
        row = {"q": f"Which one goes with {' '.join(words[:8])}?", "right": "ABCD"[number % 4], "drug": number // 2}
        row["fold"] = {0: "test", 1: "valid"}.get(number // 2 % 3, "train")
        rows.append(row | dict(zip(("one", "two", "three", "four"), options, strict=True)))
    table = pd.DataFrame(rows)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    columns = {"question": "q", "options": ["one", "two", "three", "four"], "answer": "right", "context": ""}
    columns |= {"subject": "", "group": "drug", "split": "fold"}
    return {"kind": "table", "path": str(path), "pool": None, "columns": columns, "answer_is": "letter"}


def save_chats(path) -> dict:
    """Ninety chats of one or two turns; its `origin`."""
    draw, rows = random.Random(1), []
    for number in range(90):
        words = ["".join(draw.choices(WORDS, k=2)) for _ in range(16)]
        chat = [("user", f"What is {' '.join(words[:8])}?"), ("assistant", f"It is:\n- {words[8]}\n- {words[9]}")]
        chat += [("user", " ".join(words[10:])), ("assistant", words[9])] * (number % 2)
        messages = [{"role": role, "content": content} for role, content in chat]
        rows.append({"chat": messages, "fold": {0: "test", 1: "valid"}.get(number % 3, "train")})
    table = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.assign(chat=table.chat.map(json.dumps)).to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True)
    return {"kind": "instructions", "path": str(path), "pool": None, "columns": {"messages": "chat", "split": "fold"}}


def make_profile(case: dict, folder) -> dict:
    """The smoke profile, changed as the case says."""
    raw = copy.deepcopy(SMOKE)
    architecture, template = case["architecture"], case["template"]
    raw["models"]["teacher"] = save_toy(folder / "teacher", architecture, template, 3)
    if case["student"] == "own":
        raw["models"]["student"] = save_toy(folder / "student", architecture, template, 2)
    raw["models"]["embedder"] = {"kind": "local", "path": str(toys.save_encoder(folder / "encoder"))}
    counts, known = {"private": 10, "labelled": 8, "transfer": 8, "valid": 4, "test": 10}, raw["data"]["datasets"]
    datasets = {}
    if case["data"] != "made":
        datasets["own"] = {"origin": save_table(folder / f"own.{case['ending']}"), **counts}
    if case["data"] != "table":
        datasets |= {"icd_chapter": known["icd_chapter"] | counts, "records": known["records"] | {"private": 6}}
        if case["second_form"]:
            datasets["records_b"] = known["records_b"]
    chats = {}
    if case["data"] == "all":
        chats["notes"] = {"origin": save_chats(folder / f"notes.{case['ending']}"), **counts}
    raw["data"] |= {"datasets": datasets | chats, "max_prompt_tokens": 1200}
    if not case["open_and_dialogues"]:
        raw["data"] |= {"open_questions": None, "dialogues": None}
    targets = ["q_proj", "v_proj"] if architecture != "phi3" else ["qkv_proj", "gate_up_proj"]
    for section in (raw["distillation"]["correction"], raw["lora"]["adapter"]):
        section |= {"target_modules": targets, "rank": 4}
    raw["distillation"] |= {"students": case["students"], "num_layers": 2, "top_k": 8}
    raw["quantization"]["plan"] = {"share": 0.6, "batch": 1, "context": 512}
    if case["edge"] == "null":
        raw["quantization"] |= {"edge": None, "edge_small": None}
    choices = [name for name in datasets if not name.startswith("records")]
    records = {name: 3 for name in datasets if name.startswith("records")}
    raw["inference"] |= {
        "questions": {"option_text": dict.fromkeys(choices, 8)} | ({"generated": records} if records else {})
        | ({"perplexity": {"notes": 8}} if chats else {}),
        "claims": ["student_ce", "student_kd", *(["edge"] if case["edge"] == "both" else [])],
        "exams": {}, "few": 3, "max_new_tokens": 8, "dialogues": 2, "batch_tokens": 2048,
        "shuffle": {"questions": dict.fromkeys(choices, 3), "orders": 2},
    }  # fmt: skip
    raw["evaluation"]["headline_source"] = choices[0]
    return raw


def run_notebook(path, parameters: dict) -> None:
    """The code cells of a notebook in this process: a kernel of its own for each would take most of the time."""
    from IPython.display import display

    namespace = {"display": display}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{path.stem}:{cell.id}", "exec"), namespace)
            namespace |= parameters if "parameters" in cell.metadata.get("tags", ()) else {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values())[:80])
@pytest.mark.filterwarnings("ignore")
def test_what_a_dry_run_accepts_all_notebooks_finish(case, tmp_path, monkeypatch):
    import matplotlib
    import torch

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.chdir(ROOT / "notebooks")
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump(make_profile(case, tmp_path), sort_keys=False))
    params = load_params(profile)
    assert preflight.check_profile(params) == []
    parameters = {"params_file": str(profile), "run": "matrix", "overrides": {}}
    for path in runner.notebooks():
        run_notebook(path, parameters)
    assert all(Stage("matrix", name).is_whole() for name in STAGES)
    results, facts = reporting.load_results(run_dir("matrix") / "results.json")
    scored = results[results.result == f"accuracy/{facts['headline_source']}"]
    assert set(scored.variant) >= set(list_variants(params))
    assert not len(results[results.result == "accuracy/notes"])
    predicted = results[results.result == "perplexity/notes"]
    assert set(predicted.variant) == (set(list_variants(params)) if case["data"] == "all" else set())
    assert reporting.write_report(run_dir("matrix")).is_file()


def test_every_two_settings_meet_and_every_architecture_is_there():
    assert len(CASES) <= 14
    assert {case["architecture"] for case in CASES} == set(FACTORS["architecture"])
    assert len(set().union(*map(pairs_of, CASES))) > 100

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
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "none": None,
    "no_system": "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system turn') }}{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}
TEXTS = (ROOT / "README.md").read_text() + (ROOT / "docs" / "glossary.md").read_text()
WORDS = ["".join(pair) for pair in itertools.product("bdfgklmnprst", "aeiou")]


def make_tokenizer(split: str, template: str):
    """Byte-level BPE, split as SmolLM2 (`digits`) or as Qwen2 (`qwen2`)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from medkit.quantization.gguf_tokenizer import QWEN2_SPLIT

    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
        steps = [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS.splitlines(), trainer)
    named = {"bos_token": special[1], "eos_token": special[2], "pad_token": special[0]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATES[template], **named)


def make_config(architecture: str, layers: int):
    from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

    sizes = {
        "vocab_size": 640, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.1,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": layers % 2 == 1,
    }  # fmt: skip
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    more = {
        "llama": (LlamaConfig, {}),
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 128}),
        "gemma3": (Gemma3TextConfig, {"head_dim": 256, "sliding_window": 64}),
        "mistral": (MistralConfig, {"sliding_window": 64}),
        "phi3": (Phi3Config, {}),
        "llama3_rope": (LlamaConfig, {"rope_parameters": rope | {"original_max_position_embeddings": 512}}),
    }
    kind, changes = more[architecture]
    return kind(**sizes | changes)


def save_toy(folder, architecture: str, template: str, layers: int):
    """A folder with a random model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(layers)
    AutoModelForCausalLM.from_config(make_config(architecture, layers)).save_pretrained(folder)
    if architecture == "gemma3":
        tokenizer = toys.make_gemma_tokenizer(TEXTS.splitlines(), 600, TEMPLATES[template] and toys.GEMMA)
    else:
        tokenizer = make_tokenizer("qwen2" if architecture.startswith("qwen") else "digits", template)
    tokenizer.save_pretrained(folder)
    return {"source": {"kind": "local", "path": str(folder)}, "keep_layers": []}


def save_encoder(folder) -> dict:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 640, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(folder)
    make_tokenizer("digits", "none").save_pretrained(folder)
    return {"kind": "local", "path": str(folder)}


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
    raw["models"]["embedder"] = save_encoder(folder / "encoder")
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

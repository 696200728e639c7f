"""Do engines give the edge file's answers? Greedy, on validation questions of a finished run, on the CPU.

Per weight format: the same student as transformers runs it in float32, transformers reading the GGUF file, OpenVINO
GenAI reading it, once with float32 arithmetic and once with its own settings (which round activations and the KV cache
to 8 bits), and llama.cpp where it is installed, which then makes K-quants as well. Engines are handed token ids, so
that tokenisation is judged apart. Units: seconds, nats, bytes.
"""

import argparse
import os
import statistics
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from record import RESULTS, Ratio, result_path, versions, write
from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

from medkit.inference import workloads
from medkit.inference.edge_engine import FLOAT32, LlamaCppEngine, OpenVinoEngine, import_openvino
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling import loading
from medkit.modeling.engine import Engine, EngineError, Request
from medkit.prompts import templates
from medkit.quantization import gguf_export
from medkit.stage import Stage, StageError

WEIGHT_TYPES = ("F16", "Q8_0", "Q4_0", "Q4_1")
TIMED_PROMPTS, TIMED_TOKENS = 3, 33  # 33 tokens: 32 steps after the first
BATCH_TOKENS = 4096


def load_transformers(folder: Path, **gguf):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf).eval()
    model.generation_config = GenerationConfig()
    return model


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


def compare_tokenizers(engine: OpenVinoEngine, tokenizer, questions: list[dict], asked: list[list[int]]) -> dict:
    """Shares of prompts whose text (chat template) and whose token ids are the same in the engine's own reading."""
    own, texts, same_ids = engine._pipeline.get_tokenizer(), 0, 0  # which the engine never uses: see `edge_engine`
    for question, ids in zip(questions, asked, strict=True):
        messages = templates.render(question, templates.pick_template(question["kind"], "option_text"))
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        texts += own.apply_chat_template(messages, add_generation_prompt=True) == text
        same_ids += own.encode(text, add_special_tokens=False).input_ids.data[0].tolist() == ids
    return {"chat_text_equal": texts / len(asked), "token_ids_equal": same_ids / len(asked)}


def measure(folder: Path, questions: list[dict], new_tokens: int, repeats: int, threads: int) -> dict:
    """Everything raw: answers compared per weight format, and interleaved timings."""
    torch.set_num_threads(threads)
    model, tokenizer = load_transformers(folder), loading.load_tokenizer(folder)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    asked = workloads.encode_prompts(tokenizer, pd.DataFrame(questions))
    requests = [Request(ids, new_tokens, (eos,)) for ids in asked]

    def in_torch(model) -> TorchEngine:
        return TorchEngine(model, pad, scheduler="sequential", batch_tokens=BATCH_TOKENS)

    def greedy(engine: Engine) -> list[list[int]]:
        return [found.token_ids for found in engine.generate(requests)]

    student = in_torch(model)
    reference = greedy(student)
    formats, timed = {}, {}
    raw = {
        "loadavg_before": os.getloadavg(),
        "prompt_tokens": [len(ids) for ids in asked],
        "answer_tokens": [len(ids) for ids in reference],
        "formats": formats,
    }
    readers = {
        "openvino": lambda path: OpenVinoEngine(path, threads, exact=True),
        "openvino_own_settings": lambda path: OpenVinoEngine(path, threads, exact=False),
    }
    if find_spec("llama_cpp"):
        readers["llama_cpp"] = lambda path: LlamaCppEngine(path, threads)
    with tempfile.TemporaryDirectory() as scratch:
        for kind in WEIGHT_TYPES:
            path = gguf_export.export_gguf(model, tokenizer, Path(scratch) / f"{kind}.gguf", kind)
            read = greedy(in_torch(load_transformers(path.parent, gguf_file=path.name,
                                                     quantization_config=GgufConfig(dequantize=True))))  # fmt: skip
            found = {
                "bytes": gguf_export.check_manifest(path)["bytes"],
                "transformers": compare(model, asked, reference, read),
            }
            for name, reader in readers.items():
                try:
                    engine = reader(path)
                except EngineError as error:  # OpenVINO GenAI reads no 5 bits
                    found[name] = {"error": str(error)}
                    continue
                ours = greedy(engine)
                found[name] = compare(model, asked, reference, ours)
                found[name]["as_transformers_reads_it"] = compare(model, asked, read, ours)["answers_equal"]
                if name == "openvino":
                    found["tokenizer"] = compare_tokenizers(engine, tokenizer, questions, asked)
                    engine.close()
                else:
                    timed[f"{kind}/{name}"] = engine
            formats[kind] = found
            print(kind, {n: f.get("answers_equal", f) for n, f in found.items() if n != "bytes"}, flush=True)
        workload = workloads.equal(asked[:TIMED_PROMPTS], TIMED_TOKENS)
        passes, _ = workloads.take_turns({"transformers_float32": student, **timed}, workload, repeats, alone=True)
        raw["step_s"] = passes.groupby("engine", sort=False).latency_s_per_token.agg(list).to_dict()
        for engine in timed.values():
            engine.close()
    raw["loadavg_after"] = os.getloadavg()
    return raw


def ratios(raw: dict, repeats: int) -> dict[str, Ratio]:
    found, n = {}, len(raw["prompt_tokens"])
    token_ids = min(f["tokenizer"]["token_ids_equal"] for f in raw["formats"].values() if "tokenizer" in f)
    found["prompts/token_ids_equal"] = Ratio(token_ids, 1.0, "higher", n)
    plain = statistics.median(raw["step_s"]["transformers_float32"])
    for kind, results in raw["formats"].items():
        for name, result in results.items():
            if name in ("bytes", "tokenizer") or "error" in result:
                continue
            goal = 1.0 if kind == "F16" and name in ("openvino", "llama_cpp") else None
            found[f"{kind}/{name}/answers_equal"] = Ratio(result["answers_equal"], goal, "higher", n)
            if "as_transformers_reads_it" in result:
                same = result["as_transformers_reads_it"]
                found[f"{kind}/{name}/as_transformers_reads_it"] = Ratio(same, None, "higher", n)
            if (steps := raw["step_s"].get(f"{kind}/{name}")) is not None:
                latency = statistics.median(steps) / plain
                found[f"{kind}/{name}/latency_over_transformers"] = Ratio(latency, None, "lower", repeats)
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
        import_openvino()
        table = pd.read_parquet(stage.require("01_data", "questions.parquet"))
        folder = stage.require("03_lora", "merged")
    except (StageError, EngineError) as error:
        sys.exit(f"edge_agreement: {error}")
    valid = table[table.split == "valid"]
    questions = valid.sample(min(args.prompts, len(valid)), random_state=0).to_dict("records")
    raw = measure(folder, questions, args.new_tokens, args.repeats, args.threads)
    setup = {
        "model": f"03_lora/merged of the run {args.run!r}", "prompts": len(questions), "split": "valid",
        "new_tokens": args.new_tokens, "decoding": "greedy, token ids in and out", "threads": args.threads,
        "reference": "transformers, float32, before the export",
        "openvino": FLOAT32, "openvino_own_settings": "the engine's defaults; timed like this",
        "timed": {"prompts": TIMED_PROMPTS, "new_tokens": TIMED_TOKENS, "repeats": args.repeats,
                  "statistic": "median; contenders take turns, the first round is dropped"},
        "versions": versions("torch", "transformers", "gguf", "openvino", "openvino-genai", "llama-cpp-python"),
    }  # fmt: skip
    write("edge_agreement", setup, ratios(raw, args.repeats), raw, args.output)
    print(result_path("edge_agreement", args.output).read_text().partition('"raw"')[0])


if __name__ == "__main__":
    main()

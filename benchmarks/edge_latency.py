"""The edge file one request at a time: llama.cpp's own server against transformers, for each weight format.

The student of a finished run is exported in every format. transformers computes in float32; llama.cpp reads the file.
Both write the same number of tokens for the same questions, in turns. Beside the speed stands how many answers are
equal to those of transformers from the same file. Units: seconds, bytes.
"""

import argparse
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from batching import read_run
from record import RESULTS, Ratio, result_path, versions, write
from transformers import AutoModelForCausalLM, GgufConfig

from medkit.inference import workloads
from medkit.inference.server_engine import ServerEngine, llama_server
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling import loading
from medkit.params import load_params
from medkit.quantization import gguf_export
from medkit.stage import ROOT

BATCH_TOKENS = 1024


def in_torch(model, pad: int) -> TorchEngine:
    return TorchEngine(model, pad, scheduler="sequential", batch_tokens=BATCH_TOKENS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "tiny", help="a finished run's folder")
    parser.add_argument("--params", type=Path, default=ROOT / "params" / "tiny.yaml")
    parser.add_argument("--formats", nargs="*", default=["F16", "Q8_0", "Q4_0"])
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="timed passes per engine, after a warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    params, folder = load_params(args.params), args.run / "03_lora" / "merged"
    tokenizer, model = loading.load_tokenizer(folder), loading.load_model(folder, params.models)
    questions, _ = read_run(args.run, args.prompts)
    requests = workloads.equal(workloads.encode_prompts(tokenizer, questions), args.new_tokens)
    sizes, equal_answers = {}, {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = {"transformers": in_torch(model, tokenizer.pad_token_id)}
        for kind in args.formats:
            path = gguf_export.export_gguf(model, tokenizer, scratch / kind / "student.gguf", kind)
            sizes[kind] = path.stat().st_size
            url, api_key = stack.enter_context(llama_server(path, threads=args.threads))
            engines[kind] = ServerEngine(url, api_key=api_key)
            same_file = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
            reference = in_torch(same_file, tokenizer.pad_token_id).generate(requests)
            equal_answers[kind] = workloads.agreement(reference, engines[kind].generate(requests))
        passes, _ = workloads.time_in_turns(engines, requests, args.repeats, alone=True, warm_up=1)
    median = passes.groupby("engine")[["latency_s_per_token", "ttft_s"]].median()
    ratios = {}
    for kind in args.formats:
        goal = 0.2 if kind == "Q4_0" else None
        for column, name in (("latency_s_per_token", "latency"), ("ttft_s", "ttft")):
            value = median[column][kind] / median[column]["transformers"]
            better = Ratio(value, goal if name == "latency" else None, "lower", args.repeats)
            ratios[f"{kind}/{name}_over_transformers"] = better
        ratios[f"{kind}/answers_equal"] = Ratio(equal_answers[kind], 1.0 if kind == "F16" else None, "higher", 1)
    setup = {
        "student": "03_lora/merged of a finished run, float32 in transformers",
        "threads": args.threads,
        "prompts": [len(request.prompt_ids) for request in requests],
        "new_tokens": args.new_tokens,
        "file_bytes": sizes,
        "statistic": "median over repeats, one request at a time",
        "versions": versions("torch", "transformers", "gguf", "xllamacpp"),
    }
    write("edge_latency", setup, ratios, {"medians": median.to_dict("index")}, args.output)
    print(result_path("edge_latency", args.output).read_text())


if __name__ == "__main__":
    main()

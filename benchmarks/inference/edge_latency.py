"""The edge file one request at a time: llama.cpp's own server against transformers, for each weight format.

The student of a finished run is exported in every format. transformers computes in float32; llama.cpp reads the file.
Both write the same number of tokens for the same questions, in turns. Beside it stand the floor of a token's latency,
which is the file's bytes over the bandwidth of memory in the same run, and how many answers are equal to those of
transformers from the same file. Units: seconds, bytes.
"""

import dataclasses
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig

from benchmarks.inputs import STUDENT, load_student, make_parser, read_rows
from benchmarks.record import Ratio, versions, write
from medkit.inference import workloads
from medkit.inference.server_engine import llama_engine
from medkit.inference.torch_engine import TorchEngine
from medkit.prompts.templates import end_ids
from medkit.quantization import gguf_export


def in_torch(model, pad: int) -> TorchEngine:
    return TorchEngine(model, pad, scheduler="sequential", batch_tokens=1024)


def read_bandwidth(repeats: int) -> float:
    """Bytes per second at which all threads read an array that no cache holds: the best of some passes."""
    array = torch.ones(2**28, dtype=torch.int32)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        array.max()
        seconds.append(time.perf_counter() - began)
    return array.nbytes / min(seconds)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--compared", type=int, default=200, help="prompts whose answers are compared")
    parser.add_argument("--formats", nargs="*", default=["F16", "Q8_0", "Q5_0", "Q4_0"])
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()

    tokenizer, model, params = load_student(args)
    questions = read_rows(args, params, "valid", "test", number=args.compared)
    requests = workloads.equal(workloads.encode_prompts(tokenizer, questions), args.new_tokens)
    # up to their end: if no end token is wanted, llama.cpp writes none, and transformers goes on after it
    compared = [dataclasses.replace(request, end_ids=end_ids(tokenizer)) for request in requests]
    requests = requests[: args.prompts]
    sizes, equal_answers = {}, {}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines = {"transformers": in_torch(model, tokenizer.pad_token_id)}
        for kind in args.formats:
            path = gguf_export.export_gguf(model, tokenizer, scratch / kind / "student.gguf", kind)
            sizes[kind] = path.stat().st_size
            engines[kind] = stack.enter_context(
                llama_engine(path, threads=args.threads, options={"cache_prompt": False})
            )
            same_file = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
            reference = TorchEngine(same_file, tokenizer.pad_token_id, scheduler="static", batch_tokens=1024)
            equal_answers[kind] = workloads.agreement(reference.generate(compared), engines[kind].generate(compared))
        bandwidth = read_bandwidth(args.repeats)
        passes, _ = workloads.time_in_turns(engines, requests, args.repeats, alone=True, warm_up=1)
    median = passes.groupby("engine")[["latency_s_per_token", "ttft_s"]].median()
    print(median.to_string(), flush=True)
    over = median / median.loc["transformers"]
    ratios = {}
    for kind in args.formats:
        goal = 0.1 if kind == "Q4_0" else None
        latency = Ratio(over.latency_s_per_token[kind], goal, "lower", args.repeats)
        ratios[f"{kind}/latency_over_transformers"] = latency
        ratios[f"{kind}/ttft_over_transformers"] = Ratio(over.ttft_s[kind], None, "lower", args.repeats)
        floor_s = sizes[kind] / bandwidth
        ratios[f"{kind}/latency_over_floor"] = Ratio(
            median.latency_s_per_token[kind] / floor_s, 1.1 if kind == "Q4_0" else None, "lower", args.repeats
        )
        ratios[f"{kind}/answers_equal"] = Ratio(equal_answers[kind], None if kind == "Q4_0" else 1.0, "higher", 1)
    setup = {
        "student": f"{STUDENT} of a finished run, float32 in transformers", "threads": args.threads,
        "prompt_tokens": [len(request.prompt_ids) for request in requests], "new_tokens": args.new_tokens,
        "compared": args.compared, "bytes_per_s": bandwidth,
        "file_bytes": sizes, "statistic": "median over repeats, one request at a time",
        "versions": versions("torch", "transformers", "gguf", "xllamacpp"),
    }  # fmt: skip
    write("edge_latency", setup, ratios, {"medians": median.to_dict("index")}, args.output)


if __name__ == "__main__":
    main()

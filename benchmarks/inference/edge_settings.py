"""What to set in llama.cpp's server on this machine: slots, threads, batches of prompt tokens, n-gram speculation.

The edge file of a finished run, or its student exported to nearest where notebook 04 has not run. `batch`: 32 requests
with answers of log-normal lengths, all there at once, for each number of slots, threads and prompt tokens of a batch.
`records`: records are written one at a time, greedy, each in its own length, with and without n-gram speculation:
llama.cpp looks for the last few tokens in what it has read and proposes what followed them there; the model checks all
proposed tokens in one pass, so the answers are the same. A record copies words of its consultation, so it should pay.
All contenders in turns. Units: seconds, tokens/s.
"""

import dataclasses
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pandas as pd

from benchmarks.inputs import STUDENT, add_workload, load_student, make_parser, read_rows
from benchmarks.record import Ratio, versions, write
from medkit.inference import workloads
from medkit.inference.server_engine import ServerEngine, llama_engine
from medkit.prompts.templates import end_ids
from medkit.quantization import gguf_export

NGRAM_SIMPLE = 6  # of xllamacpp.common_speculative_type
PLAIN = "1 slot, all threads"
BATCHES = {  # slots, threads (None: all), llama.cpp's own parameters
    PLAIN: (1, None, {}),
    "4 slots, all threads": (4, None, {}),
    "8 slots, all threads": (8, None, {}),
    "8 slots, 1 thread": (8, 1, {}),
    "16 slots, all threads": (16, None, {}),
    "8 slots, 64 prompt tokens a batch": (8, None, {"n_ubatch": 64}),
    "8 slots, one cache for all": (8, None, {"kv_unified": True}),
}


def speculate(looked_up: int, proposed: int) -> dict:
    """llama.cpp's parameters: the last `looked_up` tokens are searched, `proposed` tokens that followed are tried."""
    own = {"size_n": looked_up, "size_m": proposed}
    return {"speculative.types": [NGRAM_SIMPLE]} | {f"speculative.ngram_simple.{name}": n for name, n in own.items()}


SPECULATIONS = {"none": {}} | {f"{n} then {m}": speculate(n, m) for n, m in ((2, 3), (3, 4), (3, 8), (12, 48))}


def main() -> None:
    parser = make_parser(__doc__)
    add_workload(parser, requests=32, longest=128)
    parser.add_argument("--records", type=int, default=16, help="records that are written")
    args = parser.parse_args()

    tokenizer, model, params = load_student(args)
    prompts = workloads.encode_prompts(tokenizer, read_rows(args, params, "valid", "test", number=args.requests))
    requests = workloads.skewed(prompts, args.median, args.longest, seed=0)
    table = pd.read_parquet(args.run / "01_data" / "questions.parquet").query("source == 'records' and split == 'test'")
    consultations = workloads.encode_prompts(tokenizer, table.head(args.records).assign(scoring="generated"))
    longest = workloads.equal(consultations, params.inference.max_new_tokens)
    to_their_end = [dataclasses.replace(request, end_ids=end_ids(tokenizer)) for request in longest]
    with ExitStack() as stack:
        path = args.run / "04_quantization" / "edge" / "student.gguf"
        if not path.is_file():
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            edge = params.quantization.edge
            path = gguf_export.export_gguf(model, tokenizer, scratch / "student.gguf", edge.layers)
        del model

        def in_llama(slots: int, threads: int | None, options: dict) -> ServerEngine:
            settings = {"threads": threads or args.threads, "options": options}
            return stack.enter_context(llama_engine(path, slots, 1024, **settings))

        engines = {name: in_llama(*setting) for name, setting in BATCHES.items()}
        passes, _ = workloads.time_in_turns(engines, requests, args.repeats, warm_up=2)
        speed = passes.groupby("engine").throughput_tokens_per_s.median()
        print(speed.to_string(), flush=True)
        speculating = {name: in_llama(1, None, options) for name, options in SPECULATIONS.items()}
        answers = speculating["none"].generate(to_their_end)
        lengths = [len(answer.token_ids) - 1 for answer in answers]  # without the end token
        written = [dataclasses.replace(r, max_new_tokens=n) for r, n in zip(longest, lengths, strict=True)]
        passes, answers = workloads.time_in_turns(speculating, written, args.repeats, alone=True, warm_up=1)
        latency = passes.groupby("engine").latency_s_per_token.median()
        print(latency.to_string(), flush=True)
    ratios = {}
    for name in BATCHES.keys() - {PLAIN}:
        over = speed[name] / speed[PLAIN]
        ratios[f"batch/{name}/throughput_over_one_slot"] = Ratio(over, None, "higher", args.repeats)
    for name in SPECULATIONS.keys() - {"none"}:
        over = latency[name] / latency["none"]
        ratios[f"records/ngram {name}/latency_over_none"] = Ratio(over, None, "lower", args.repeats)
        equal = workloads.agreement(answers["none"], answers[name])
        ratios[f"records/ngram {name}/answers_equal"] = Ratio(equal, 1.0, "higher", 1)
    setup = {
        "student": f"{STUDENT} of a finished run, as a GGUF file", "threads": args.threads,
        "requests": len(requests), "answer_tokens": sum(r.max_new_tokens for r in requests),
        "prompt_tokens": sum(len(r.prompt_ids) for r in requests), "warm_up_requests": 2,
        "records": len(written), "record_prompt_tokens": sum(len(r.prompt_ids) for r in written),
        "record_tokens": sum(lengths), "file_bytes": path.stat().st_size,
        "statistic": "median over repeats", "versions": versions("torch", "gguf", "xllamacpp"),
    }  # fmt: skip
    raw = {"throughput_tokens_per_s": speed.to_dict(), "latency_s_per_token": latency.to_dict()}
    write("edge_settings", setup, dict(sorted(ratios.items())), raw, args.output)


if __name__ == "__main__":
    main()

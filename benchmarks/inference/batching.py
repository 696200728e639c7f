"""Which request waits for which: sequential, static and continuous batching, and llama.cpp's slots, on one student.

Prompts are questions of a finished run that no training saw, all there at once. `skewed`: log-normal lengths of
answers. `equal`: answers of one length. `shared_prefix`: solved training questions before every question, with and
without sharing the memory of the prefix. transformers runs float32; llama.cpp reads the same weights as F16 and the
run's edge file. All engines in turns after a warm-up of two requests. Units: seconds, tokens/s.
"""

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pandas as pd

from benchmarks.inputs import STUDENT, add_workload, load_student, make_parser, read_rows
from benchmarks.record import Ratio, versions, write
from medkit.inference import workloads
from medkit.inference.server_engine import llama_engine
from medkit.inference.torch_engine import SCHEDULERS, TorchEngine
from medkit.modeling.engine import Engine, Generation, Request
from medkit.quantization import gguf_export

OVER_STATIC, OVER_SEQUENTIAL = 2.0, 4.0  # goals: throughput of continuous batching at skewed requests
BATCH = 8  # rows of a static batch that is smaller than the workload, and llama.cpp's slots
BATCH_TOKENS = 4096  # four times as many in the cache at once: room for every request of the parts
SHOTS = 8  # solved questions in the shared prefix


class InBatches:
    """An engine that gets its requests `size` at a time, in the order they come in."""

    def __init__(self, engine: Engine, size: int):
        self.engine, self.size, self.name = engine, size, f"{engine.name} by {size}"

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        began, answers = time.perf_counter(), []
        for start in range(0, len(requests), self.size):
            waited = time.perf_counter() - began
            for answer in self.engine.generate(requests[start : start + self.size]):
                answers.append(Generation(answer.token_ids, [waited + t for t in answer.token_times_s]))
        return answers


def time_part(engines: dict[str, Engine], requests: Sequence[Request], repeats: int) -> tuple[pd.Series, dict]:
    """Median throughput of each engine, and its share of answers that are equal to the first engine's."""
    table, answers = workloads.time_in_turns(engines, requests, repeats, warm_up=2)
    first = answers[next(iter(engines))]
    median = table.groupby("engine", sort=False)[["ttft_s", "throughput_tokens_per_s"]].median()
    print(median.to_string(float_format="{:.3f}".format), flush=True)
    return median.throughput_tokens_per_s, {name: workloads.agreement(first, a) for name, a in answers.items()}


def main() -> None:
    parser = make_parser(__doc__)
    add_workload(parser, requests=32, longest=128)
    args = parser.parse_args()

    tokenizer, model, params = load_student(args)
    questions = read_rows(args, params, "valid", "test", number=args.requests)
    shots = read_rows(args, params, "labelled", number=SHOTS).to_dict("records")
    prompts = workloads.encode_prompts(tokenizer, questions)
    helped = workloads.encode_prompts(tokenizer, questions.head(args.requests // 2), shots)
    parts = {
        "skewed": workloads.skewed(prompts, args.median, args.longest, seed=0),
        "equal": workloads.equal(prompts, args.median),
        "shared_prefix": workloads.equal(helped, args.median),
    }
    with ExitStack() as stack:

        def in_torch(scheduler: str, **settings) -> TorchEngine:
            settings |= {"scheduler": scheduler, "batch_tokens": BATCH_TOKENS}
            return stack.enter_context(closing(TorchEngine(model, tokenizer.pad_token_id, **settings)))

        engines = {scheduler: in_torch(scheduler) for scheduler in SCHEDULERS}
        unshared = in_torch("continuous", prefix_sharing=False)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        files = {
            "llama.cpp F16": gguf_export.export_gguf(model, tokenizer, scratch / "student.gguf", "F16"),
            "llama.cpp edge file": args.run / "04_quantization" / "edge" / "student.gguf",
        }
        settings = {"slots": BATCH, "threads": args.threads}

        def in_llama(**options) -> dict:
            return {
                name: stack.enter_context(llama_engine(path, **settings, options=options))
                for name, path in files.items()
            }

        edge, keeping = in_llama(cache_prompt=False), in_llama(cache_prompt=True)
        by_batch = {f"static by {BATCH}": InBatches(engines["static"], BATCH)}
        contenders = {
            "skewed": engines | by_batch | edge,
            "equal": engines | by_batch | edge,
            "shared_prefix": {"continuous": engines["continuous"], "not shared": unshared} | keeping,
        }
        speeds, agreements = {}, {}
        for part, requests in parts.items():
            print(part, flush=True)
            speeds[part], agreements[part] = time_part(contenders[part], requests, args.repeats)

    ratios = {}
    for part in ("skewed", "equal"):
        speed = speeds[part]
        for name in speed.index.drop("sequential"):
            goal = OVER_SEQUENTIAL if (part, name) == ("skewed", "continuous") else None
            ratio = Ratio(speed[name] / speed["sequential"], goal, "higher", args.repeats)
            ratios[f"{part}/{name}/throughput_over_sequential"] = ratio
    best_static = speeds["skewed"][["static", f"static by {BATCH}"]].max()
    over_static = Ratio(speeds["skewed"]["continuous"] / best_static, OVER_STATIC, "higher", args.repeats)
    ratios["skewed/continuous/throughput_over_static"] = over_static
    shared = speeds["shared_prefix"]
    gain = Ratio(shared["continuous"] / shared["not shared"], None, "higher", args.repeats)
    ratios["shared_prefix/continuous/throughput_with_over_without"] = gain
    setup = {
        "student": f"{STUDENT} of a finished run, float32; llama.cpp: the same weights in F16, and the edge file",
        "threads": args.threads, "slots": BATCH,
        "decoding": "greedy, no end token: exactly as many tokens as asked",
        "requests": {name: len(requests) for name, requests in parts.items()},
        "answer_tokens": {name: sum(r.max_new_tokens for r in requests) for name, requests in parts.items()},
        "prompt_tokens": {name: sum(len(r.prompt_ids) for r in requests) for name, requests in parts.items()},
        "statistic": "median over repeats",
        "versions": versions("torch", "transformers", "xllamacpp"),
    }  # fmt: skip
    medians = {part: speed.to_dict() for part, speed in speeds.items()}
    write("batching", setup, ratios, {"tokens_per_s": medians, "answers_equal": agreements}, args.output)


if __name__ == "__main__":
    main()

"""The parts of the paper's inference engine (its Table 4), each taken away alone, on one student and one workload.

Requests have a shared few-shot prefix and skewed lengths of answers, all there at once. The full engine is transformers
with continuous batching, fused attention (SDPA) and shared prefixes. All engines in turns, in one process. The paper
does not say what its percentages were measured on. Units: tokens/s.
"""

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from batching import BATCH, BATCH_TOKENS, InBatches, read_run, time_part
from record import RESULTS, Ratio, result_path, versions, write

from medkit.inference import workloads
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling import loading
from medkit.modeling.engine import Generation, Request
from medkit.params import load_params
from medkit.stage import ROOT

FULL = "full"


class Unfused:
    """An engine whose model computes attention step by step while it writes; all engines share the weights."""

    def __init__(self, engine: TorchEngine):
        self.engine, self.name = engine, f"{engine.name} eager"

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        model = self.engine.model
        before = model.config._attn_implementation
        model.set_attn_implementation("paged|eager")
        try:
            return self.engine.generate(requests)
        finally:
            model.set_attn_implementation(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "tiny", help="a finished run's folder")
    parser.add_argument("--params", type=Path, default=ROOT / "params" / "tiny.yaml")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--median", type=int, default=16, help="tokens of the middle answer")
    parser.add_argument("--longest", type=int, default=96, help="tokens of the longest answer")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes per engine, after a warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    params, folder = load_params(args.params), args.run / "03_lora" / "merged"
    tokenizer, model = loading.load_tokenizer(folder), loading.load_model(folder, params.models)
    unseen, shots = read_run(args.run, args.requests)
    requests = workloads.skewed(workloads.encode_prompts(tokenizer, unseen, shots), args.median, args.longest, seed=0)
    with ExitStack() as stack:

        def make(scheduler: str, **settings) -> TorchEngine:
            engine = TorchEngine(
                model, tokenizer.pad_token_id, scheduler=scheduler, batch_tokens=BATCH_TOKENS, **settings
            )
            return stack.enter_context(closing(engine))

        static = make("static")
        engines = {
            FULL: make("continuous"),
            "fused attention": Unfused(make("continuous")),
            "continuous batching (one padded batch)": static,
            f"continuous batching (by {BATCH})": InBatches(static, BATCH),
            "continuous batching (one by one)": make("sequential"),
            "prefix sharing": make("continuous", prefix_sharing=False),
        }
        speed, agreement = time_part(engines, requests, args.repeats)
    ratios = {
        f"{name}/throughput_with_over_without": Ratio(speed[FULL] / speed[name], None, "higher", args.repeats)
        for name in speed.index.drop(FULL)
    }
    setup = {
        "student": "03_lora/merged of a finished run", "dtype": str(model.dtype), "device": model.device.type,
        "threads": args.threads, "attention": model.config._attn_implementation, "shots": len(shots),
        "prompts": [len(r.prompt_ids) for r in requests], "answers": [r.max_new_tokens for r in requests],
        "statistic": "median over repeats, after a warm-up of 2 requests",
        "versions": versions("torch", "transformers", "flash-attn"),
    }  # fmt: skip
    write("mieo", setup, ratios, {"tokens_per_s": speed.to_dict(), "answers_equal": agreement}, args.output)
    print(result_path("mieo", args.output).read_text())


if __name__ == "__main__":
    main()

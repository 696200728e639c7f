"""The parts of the paper's inference engine (its Table 4), each taken away alone, on one student and one workload.

`batch`: requests with a shared few-shot prefix and skewed lengths of answers, all there at once; the full engine is
transformers with continuous batching, SDPA, shared prefixes and, where continuous batching can record them (CUDA),
graphs. `repeated`: half of the requests, each asked twice, for the exact response cache, which ships off. `single`: one
request at a time, for compiled steps over a static cache. Contenders in turns, in one process. The paper does not say
what its percentages were measured on. Units: seconds, tokens/s.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import pandas as pd
import torch
from batching import BATCH, InBatches, read_run, time_part, torch_engine
from record import RESULTS, Ratio, result_path, versions, write

from medkit.inference import workloads
from medkit.inference.similar_answers import ResponseCache, cache_key
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling import loading
from medkit.modeling.engine import Engine, EngineError, Generation, Request
from medkit.params import load_params
from medkit.stage import ROOT

FULL = "full"


class Unfused:
    """An engine whose model computes attention step by step while it writes; all contenders share the weights."""

    def __init__(self, engine: TorchEngine):
        self.engine, self.name = engine, f"{engine.name} eager"

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        model = self.engine.model
        kept = model.config._attn_implementation
        model.set_attn_implementation("paged|eager")
        try:
            return self.engine.generate(requests)
        finally:
            model.set_attn_implementation(kept)


class Remembering:
    """An engine behind the exact response cache: of equal requests the first is written, the others wait for it.

    The cache is empty before each pass, so hits are those within one workload.
    """

    def __init__(self, engine: Engine):
        self.engine, self.name = engine, f"{engine.name} with cache"

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        cache, first = ResponseCache(), {}
        keys = [cache_key(r.prompt_ids, "student", {"max_new_tokens": r.max_new_tokens}) for r in requests]
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        written = dict(zip(first, self.engine.generate([requests[i] for i in first.values()]), strict=True))
        for key, said in written.items():
            cache.put(key, said.token_ids)
        found = []
        for i, key in enumerate(keys):
            said = written[key]
            if i != first[key]:
                said = Generation(cache.get(key), [said.token_times_s[-1]] * len(said.token_ids))
            found.append(said)
        return found


def attempt(make: Callable[..., TorchEngine], scheduler: str) -> tuple[TorchEngine | None, str]:
    """An engine with compiled steps or recorded graphs, or None and why there is none here."""
    try:
        return make(scheduler, graphs=True), ""
    except EngineError as error:
        return None, str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "tiny", help="a finished run's folder")
    parser.add_argument("--params", type=Path, default=ROOT / "params" / "tiny.yaml")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--median", type=int, default=16, help="tokens of the middle answer")
    parser.add_argument("--longest", type=int, default=96, help="tokens of the longest answer")
    parser.add_argument("--single", type=int, default=2, help="requests of the part that asks one at a time")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes per contender, after a warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    params, folder = load_params(args.params), args.run / "03_lora" / "merged"
    tokenizer, model = loading.load_tokenizer(folder), loading.load_model(folder, params.models)
    pad = tokenizer.pad_token_id
    unseen, shots = read_run(args.run, args.requests)
    batch = workloads.skewed(workloads.encode_prompts(tokenizer, unseen, shots), args.median, args.longest, seed=0)
    half = batch[: args.requests // 2]
    single = workloads.equal(workloads.encode_prompts(tokenizer, unseen.head(args.single)), args.longest)

    with ExitStack() as open_now:  # a running batch that outlives its script brings it down

        def make(scheduler: str, graphs: bool = False, **settings) -> TorchEngine:
            return open_now.enter_context(closing(torch_engine(model, pad, scheduler, graphs=graphs, **settings)))

        plain = make("continuous")
        recorded, no_graphs = attempt(make, "continuous")
        graphs = recorded is not None  # those without continuous batching then have compiled steps
        static, one_by_one = make("static", graphs), make("sequential", graphs)
        if graphs:
            for start in range(0, len(batch), BATCH):
                static.warm_up(batch[start : start + BATCH])
            static.warm_up(batch)
            one_by_one.warm_up(batch)
        full = recorded or plain
        contenders = {
            FULL: full,
            **({"graphs": plain} if graphs else {}),
            "fused attention": Unfused(make("continuous", graphs)),
            "continuous batching (one padded batch)": static,
            f"continuous batching (by {BATCH})": InBatches(static, BATCH),
            "continuous batching (one by one)": one_by_one,
            "prefix sharing": make("continuous", graphs, prefix_sharing=False),
        }
        found = {"batch": time_part(contenders, batch, args.repeats)}
        found["repeated"] = time_part({FULL: full, "response cache": Remembering(full)}, [*half, *half], args.repeats)
        compiled, no_compiler = attempt(make, "sequential")
        if compiled:
            compiled.warm_up(single)
            found["single"] = time_part({"plain": make("sequential"), "compiled": compiled}, single, args.repeats)

    def median(part: str, column: str) -> pd.Series:
        return found[part][0].groupby("engine", sort=False)[column].median()

    ratios = {}
    for part, best in (("batch", FULL), ("repeated", "response cache")):
        speed = median(part, "throughput_tokens_per_s")
        for name in speed.index.drop(best):
            what = f"{part}/{name if best == FULL else best}/throughput_with_over_without"
            ratios[what] = Ratio(speed[best] / speed[name], None, "higher", args.repeats)
    if compiled:
        step = median("single", "latency_s_per_token")
        ratio = Ratio(step["compiled"] / step["plain"], None, "lower", args.repeats)
        ratios["single/compiled steps/latency_with_over_without"] = ratio
    setup = {
        "student": "03_lora/merged of a tiny run", "dtype": str(model.dtype), "device": model.device.type,
        "threads": args.threads, "attention": model.config._attn_implementation,
        "batch": {"shots": len(shots), "prompts": [len(r.prompt_ids) for r in batch],
                  "answers": [r.max_new_tokens for r in batch]},
        "single": {"prompts": [len(r.prompt_ids) for r in single], "answers": args.longest},
        "graphs_in_continuous_batching": no_graphs or "recorded", "compiled_steps": no_compiler or "measured",
        "compile_s": compiled and compiled.warmup_s, "statistic": "median over repeats, after a warm-up of 2 requests",
        "versions": versions("torch", "transformers", "flash-attn"),
    }  # fmt: skip
    raw = {part: {"passes": t.to_dict("records"), "agreement": agreed} for part, (t, agreed) in found.items()}
    write("mieo", setup, ratios, raw, args.output)
    print(result_path("mieo", args.output).read_text().partition('"raw"')[0])


if __name__ == "__main__":
    main()

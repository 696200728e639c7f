"""Who waits for whom: requests one by one, in padded batches, and joining and leaving a running batch, on one student.

Prompts are validation and test questions of a finished run. `skewed`: log-normal lengths of answers, all requests there
at once. `equal`: 64 questions, answers of one length. `poisson`: the same kind of requests as skewed, arriving.
`shared_prefix`: solved training questions before every question, with and without sharing what is read of them.
transformers runs float32; OpenVINO reads the same weights as F16 (and computes in float32) and the run's 4-bit edge
file, in its running batch, and handed the requests one by one and by 8, so that it is compared with itself as well. All
contenders in turns, in one process, after a warm-up of two requests; the words of the questions stand in another order
in every pass. Units: seconds, tokens/s.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from record import RESULTS, Ratio, result_path, versions, write

from medkit.data import splits
from medkit.inference import workloads
from medkit.inference.edge_engine import OpenVinoEngine
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling import loading
from medkit.modeling.engine import Engine, EngineError, Generation, Request
from medkit.params import load_params
from medkit.quantization import gguf_export
from medkit.stage import ROOT

OVER_STATIC, OVER_SEQUENTIAL = 2.0, 4.0  # goals: throughput at skewed requests
BATCH = 8  # rows of a static batch that is smaller than the workload
BATCH_TOKENS = 4096  # four times as many in the cache at once: room for every request of the parts
SHOTS = 8  # solved questions in the shared prefix
STATIC = f"static by {BATCH}"
ALONE, IN_TURN = ", one by one", f", by {BATCH}"  # an engine that runs a batch, handed its requests otherwise


class InBatches:
    """An engine that is handed requests which are all there at once, `size` at a time.

    In the order they come in, as whoever does not know how long an answer will be must; or, with `known`, by length.
    """

    def __init__(self, engine: Engine, size: int, known: bool = False):
        self.engine, self.size, self.known, self.name = engine, size, known, f"{engine.name} by {size}"

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        began = time.perf_counter()
        found: dict[int, Generation] = {}
        order = sorted(range(len(requests)), key=lambda i: requests[i].max_new_tokens * self.known)
        for start in range(0, len(requests), self.size):
            batch = order[start : start + self.size]
            waited = time.perf_counter() - began
            for i, said in zip(batch, self.engine.generate([requests[i] for i in batch]), strict=True):
                found[i] = Generation(said.token_ids, [waited + t for t in said.token_times_s])
        return [found[i] for i in range(len(requests))]


def read_run(run: Path, number: int) -> tuple[pd.DataFrame, list[dict]]:
    """`number` questions that no training saw, and SHOTS solved training questions."""
    questions = pd.read_parquet(run / "01_data" / "questions.parquet")
    unseen = questions[questions.split.isin(["valid", "test"])].sample(number, random_state=0)
    shots = splits.training_rows(questions, "train").sample(SHOTS, random_state=0)
    return unseen, shots.to_dict("records")


def torch_engine(model, pad: int, scheduler: str, **settings) -> TorchEngine:
    return TorchEngine(model, pad, scheduler=scheduler, batch_tokens=BATCH_TOKENS, **settings)


def openvino_engines(files: dict[str, tuple[Path, bool]], threads: int, **settings) -> dict[str, Engine]:
    """Those of the files (path, computed exactly) that OpenVINO can open here; the others' reason is printed."""
    found = {}
    for name, (path, exact) in files.items():
        try:
            found[name] = OpenVinoEngine(path, threads, exact=exact, **settings)
        except EngineError as error:
            print(f"{name}: {error}", flush=True)
    return found


def time_part(
    engines: dict[str, Engine], requests: Sequence[Request], repeats: int, reference: str | None = None
) -> tuple[pd.DataFrame, dict]:
    """A row per engine and repeat, and each engine's agreement with the reference's answers (None: with the first)."""
    load = os.getloadavg()[0]
    table, answers = workloads.take_turns(engines, requests, repeats, warm_up=2)
    agreed = {
        name: workloads.agreement(answers[reference or next(iter(engines))], said) for name, said in answers.items()
    }
    columns = ["ttft_s", "ttft_p95_s", "latency_s_per_token", "latency_p95_s_per_token", "throughput_tokens_per_s"]
    shown = table.groupby("engine", sort=False)[columns].median().join(pd.DataFrame(agreed).T)
    print(shown.to_string(float_format="{:.3f}".format), f"\nload {load:.1f} → {os.getloadavg()[0]:.1f}", flush=True)
    return table.assign(load_before=load), agreed


def throughput_ratios(table: pd.DataFrame, longest: int, repeats: int) -> dict[str, Ratio]:
    """Each continuous engine's median throughput over that of everyone else; the goals are `continuous`'s: same model,
    arithmetic and code as what it is compared with, so that only the scheduling differs."""
    median = table.groupby("engine", sort=False).throughput_tokens_per_s.median()
    running = [name for name in median.index if name == "continuous" or name.startswith("openvino")]
    continuous = [name for name in running if not name.endswith((ALONE, IN_TURN))]
    batches = ["static all", STATIC]
    ratios = {}
    for name in continuous:
        goals = (OVER_STATIC, OVER_SEQUENTIAL) if name == "continuous" else (None, None)
        best = median[batches].max()  # of the ways that do not know lengths in advance
        ratios[f"skewed/{name}/throughput_over_static"] = Ratio(median[name] / best, goals[0], "higher", repeats)
        over = median[name] / median["sequential"]
        ratios[f"skewed/{name}/throughput_over_sequential"] = Ratio(over, goals[1], "higher", repeats)
        known = median[name] / median["static sorted"]
        ratios[f"skewed/{name}/throughput_over_static_sorted"] = Ratio(known, None, "higher", repeats)
        for how in (ALONE, IN_TURN):
            if name + how in median:
                itself = median[name] / median[name + how]
                ratios[f"skewed/{name}/throughput_over_itself{how}"] = Ratio(itself, None, "higher", repeats)
    ratios["skewed/limit/throughput_over_sequential"] = Ratio(bound_by_steps(table, longest), None, "higher", repeats)
    return ratios


def bound_by_steps(table: pd.DataFrame, longest: int) -> float:
    """What batching in these steps can reach over `sequential`, were all rows but one of each step free.

    The longest answer takes as many steps as it has tokens, and none is shorter than one row's alone; the prompts have
    to be read as well, which is taken to cost what it cost one by one.
    """
    alone = table[table.engine == "sequential"].median(numeric_only=True)
    prompts_s = alone.duration_s - (alone.output_tokens - alone.requests) * alone.latency_s_per_token
    return alone.duration_s / (prompts_s + (longest - 1) * alone.latency_s_per_token)


def ratios_of(raw: dict, longest: int, repeats: int) -> dict[str, Ratio]:
    """All that the passes of the parts say; measured now or earlier, it is the same arithmetic.

    Beside OpenVINO's stands how many of its answers are those of the part's first contender.
    """
    tables = {part: pd.DataFrame(told["passes"]) for part, told in raw.items()}
    ratios = throughput_ratios(tables["skewed"], longest, repeats) if "skewed" in tables else {}
    if "equal" in tables:
        speed = tables["equal"].groupby("engine", sort=False).throughput_tokens_per_s.median()
        for name in speed.index.drop("sequential"):
            ratio = Ratio(speed[name] / speed["sequential"], None, "higher", repeats)
            ratios[f"equal/{name}/throughput_over_sequential"] = ratio
    for part, told in raw.items():
        for name, found in told["agreement"].items():
            if name.startswith("openvino"):
                ratios[f"{part}/{name}/answers_equal"] = Ratio(found["answers_equal"], None, "higher", repeats)
    if "poisson" in tables:
        waits = tables["poisson"].groupby("engine").ttft_p95_s.median()
        for name in waits.index.drop("static"):
            ratio = Ratio(waits[name] / waits["static"], None, "lower", repeats)
            ratios[f"poisson/{name}/ttft_p95_over_static"] = ratio
    if "shared_prefix" in tables:
        taken = tables["shared_prefix"].groupby("engine").duration_s.median()
        for name in (n for n in taken.index if f"{n}, not shared" in taken.index):
            ratio = Ratio(taken[f"{name}, not shared"] / taken[name], None, "higher", repeats)
            ratios[f"shared_prefix/{name}/duration_without_over_with"] = ratio
    return ratios


def earlier(setup: dict, directory: Path) -> dict:
    """Passes of an earlier run, of the parts with the same requests, under the same settings and versions."""
    path = result_path("batching", directory)
    if not path.is_file():
        return {}
    record, now = json.loads(path.read_text()), json.loads(json.dumps(setup))
    then, lengths = record["setup"], ("answers", "prompts")
    if any(then.get(name) != value for name, value in now.items() if name not in lengths):
        return {}
    same = {part for part in now["answers"] if all(then[name].get(part) == now[name][part] for name in lengths)}
    return {part: told for part, told in record["raw"].items() if part in same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "outputs" / "tiny", help="a finished run's folder")
    parser.add_argument("--params", type=Path, default=ROOT / "params" / "tiny.yaml")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--equal", type=int, default=64, help="requests of the part with equal lengths")
    parser.add_argument("--median", type=int, default=16, help="tokens of the middle answer")
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest answer")
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second of the Poisson part")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes per contender, after a warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--parts",
        nargs="*",
        default=["skewed", "equal", "poisson", "shared_prefix"],
        help="others: what they gave earlier",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    params, folder = load_params(args.params), args.run / "03_lora" / "merged"
    tokenizer, model = loading.load_tokenizer(folder), loading.load_model(folder, params.models)
    pad, half = tokenizer.pad_token_id, args.requests // 2
    more, shots = read_run(args.run, max(args.requests, args.equal))
    unseen = more.head(args.requests)
    asked = workloads.encode_prompts(tokenizer, unseen)
    helped = workloads.encode_prompts(tokenizer, unseen.head(half), shots)
    skewed = workloads.skewed(asked, args.median, args.longest, seed=0)
    parts = {
        "skewed": skewed,
        "equal": workloads.equal(workloads.encode_prompts(tokenizer, more.head(args.equal)), args.median),
        "poisson": workloads.arriving(skewed[:half], args.rate, seed=0),
        "shared_prefix": workloads.equal(helped, args.median),
    }
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        f16 = gguf_export.export_gguf(model, tokenizer, Path(scratch) / "student.gguf", "F16")
        files = {
            "openvino F16": (f16, True),
            "openvino Q4_0": (args.run / "04_quantization" / "edge" / "student.gguf", False),
        }
        plain = {s: torch_engine(model, pad, s) for s in ("sequential", "static", "continuous")}
        edges = openvino_engines(files, args.threads)
        unshared = {
            "continuous, not shared": torch_engine(model, pad, "continuous", prefix_sharing=False),
            **openvino_engines({f"{n}, not shared": f for n, f in files.items()}, args.threads, prefix_caching=False),
        }
        batches = {
            "static all": InBatches(plain["static"], args.requests),
            STATIC: InBatches(plain["static"], BATCH),
            "static sorted": InBatches(plain["static"], BATCH, known=True),
        }
        itself = {
            name + how: InBatches(engine, size)
            for name, engine in edges.items()
            for how, size in ((ALONE, 1), (IN_TURN, BATCH))
        }
        contenders = {
            "skewed": {"sequential": plain["sequential"]}
            | batches
            | {"continuous": plain["continuous"]}
            | edges
            | itself,
            "equal": {
                **{"sequential": plain["sequential"], "static all": plain["static"], STATIC: batches[STATIC]},
                **{"continuous": plain["continuous"], **edges},
            },
            "poisson": {"static": plain["static"], "continuous": plain["continuous"], **edges},
            "shared_prefix": {"continuous": plain["continuous"], **edges, **unshared},
        }
        for part in args.parts:
            print(part, flush=True)
            found[part] = time_part(contenders[part], parts[part], args.repeats)
        for engine in (*plain.values(), *edges.values(), *unshared.values()):
            engine.close()
    setup = {
        "student": "03_lora/merged of a tiny run, float32; OpenVINO: the same weights in F16, and the run's edge file",
        "threads": args.threads,
        "decoding": "greedy, no end token: exactly as many tokens as asked",
        "answers": {name: [r.max_new_tokens for r in requests] for name, requests in parts.items()},
        "prompts": {name: [len(r.prompt_ids) for r in requests] for name, requests in parts.items()},
        "skew": f"log-normal quantiles, median {args.median}, longest {args.longest}",
        "poisson_rate_per_s": args.rate,
        "static": f"padded batches of {BATCH} or all at once, in the order of arrival",
        "static sorted": f"of {BATCH}, by lengths that nobody knows in advance",
        "statistic": "median over repeats",
        "versions": versions("torch", "transformers", "openvino", "openvino-genai"),
    }  # fmt: skip
    today = datetime.now(UTC).date().isoformat()
    raw = {
        part: {"passes": table.to_dict("records"), "agreement": agreed, "date": today}
        for part, (table, agreed) in found.items()
    }
    raw = earlier(setup, args.output) | raw
    write("batching", setup, ratios_of(raw, args.longest, args.repeats), raw, args.output)
    print(result_path("batching", args.output).read_text().partition('"raw"')[0])


if __name__ == "__main__":
    main()

"""One answer at a time on a CPU: the edge file's engines against transformers' float32 `generate`.

Real prompts of a finished run, equal lengths, greedy. Every contender lives in a process of its own, so that its memory
is its own, and they take turns; the first round is dropped. `make llama` makes an environment with `llama_cpp` and
`xllamacpp`, `--llama-python` names another interpreter that has one of them. Latencies are compared with what reading
the weights would take at the bandwidth of a plain copy.
Units: seconds, bytes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

COPY_BYTES = 2**29
LLAMA = Path(__file__).parents[1] / ".llama" / "bin" / "python"  # of `make llama`
# of a number in the KV cache
CACHE_BYTES = {"openvino": 1, "openvino_float32": 4, "transformers": 4, "llama_cpp": 2, "xllamacpp": 2}


# --- the contenders: in a process of its own each imports, yields, loads, and yields how a prompt is answered --------


def transformers(args):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

    yield
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    config = GenerationConfig(do_sample=False, max_new_tokens=args.new_tokens, eos_token_id=-1, pad_token_id=0)

    class Clock(StoppingCriteria):
        def __init__(self):
            self.began, self.times_s = time.perf_counter(), []

        def __call__(self, input_ids, scores, **kwargs):
            self.times_s.append(time.perf_counter() - self.began)
            return torch.zeros(1, dtype=torch.bool)

    def answer(prompt: list[int]) -> list[float]:
        clock = Clock()
        stopping = StoppingCriteriaList([clock])
        model.generate(torch.tensor([prompt]), generation_config=config, stopping_criteria=stopping)
        return clock.times_s

    yield answer


def openvino(args, exact: bool = False):
    from medkit.inference.edge_engine import OpenVinoEngine, import_openvino
    from medkit.modeling.engine import Request

    import_openvino()
    yield
    engine = OpenVinoEngine(args.file, args.threads, exact=exact, prefix_caching=False)
    yield lambda prompt: engine.generate([Request(prompt, args.new_tokens)])[0].token_times_s
    engine.close()


def openvino_float32(args):
    return openvino(args, exact=True)


def llama_cpp(args):
    """The package's engine; what a prompt begins with is kept from the prompt before, so its ttft_s is flattered."""
    import llama_cpp as library  # counted among the libraries

    from medkit.inference.edge_engine import LlamaCppEngine
    from medkit.modeling.engine import Request

    yield library
    engine = LlamaCppEngine(args.file, args.threads, args.context)
    yield lambda prompt: engine.generate([Request(prompt, args.new_tokens)])[0].token_times_s
    engine.close()


def xllamacpp(args):
    import xllamacpp as library

    yield
    params = library.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(args.file), args.context, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    server = library.Server(params)
    asked = {"n_predict": args.new_tokens, "temperature": 0, "samplers": ["top_k"], "top_k": 1}

    def answer(prompt: list[int]) -> list[float]:
        """By llama.cpp's own clock: its stream holds back tokens that are parts of letters."""
        said = server.handle_completions(asked | {"prompt": prompt, "cache_prompt": False, "ignore_eos": True})
        clock = said["timings"]
        step_s = clock["predicted_ms"] / 1000 / (clock["predicted_n"] - 1)  # the first token comes with the prompt
        return [clock["prompt_ms"] / 1000 + step * step_s for step in range(clock["predicted_n"])]

    yield answer


CONTENDERS = {f.__name__: f for f in (transformers, openvino, openvino_float32, llama_cpp, xllamacpp)}


def rss(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def serve(args) -> None:
    """A contender's process: loads, then for every prompt on a line of stdin writes the times of its tokens."""
    contender = CONTENDERS[args.contender](args)
    next(contender)
    libraries, began = rss("VmRSS"), time.perf_counter()
    answer = next(contender)
    say = json.JSONEncoder().encode
    print(say({"rss_libraries": libraries, "load_s": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        times_s = answer(json.loads(line))
        if len(times_s) != args.new_tokens:
            sys.exit(f"{args.contender}: asked for {args.new_tokens} tokens, got {len(times_s)}")
        print(say({"times_s": times_s, "rss": rss("VmRSS"), "rss_peak": rss("VmHWM")}), flush=True)


class Contender:
    """The parent's end of a contender's process."""

    def __init__(self, name: str, python: str, args):
        own = ["--contender", name, "--folder", args.folder, "--file", args.file]
        own += ["--threads", args.threads, "--new-tokens", args.new_tokens, "--context", args.context]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        self.name = name
        self.process = subprocess.Popen(
            [python, __file__, *map(str, own)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.loaded = self._read()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):  # a library that talks
            line = self.process.stdout.readline()
        if not line:
            sys.exit(f"edge_latency: {self.name} ended with status {self.process.wait()}; try it with --contender")
        return json.loads(line)

    def answer(self, prompt: list[int]) -> dict:
        self.process.stdin.write(json.dumps(prompt) + "\n")
        self.process.stdin.flush()
        return self._read()


# --- the comparison --------------------------------------------------------------------------------------------------


def copy_bandwidth(threads: int) -> float:
    """Bytes per second that a copy of COPY_BYTES reads and writes, together."""
    import torch

    torch.set_num_threads(threads)
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    target.copy_(source)  # pages exist
    began = time.perf_counter()
    target.copy_(source)
    return 2 * COPY_BYTES / (time.perf_counter() - began)


def bytes_per_token(name: str, args, context: float) -> dict[str, int]:
    """What one step must read: all weights once (a tied embedding is the head), and the keys and values so far."""
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.folder)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * CACHE_BYTES[name] * context
    tensors = gguf.GGUFReader(args.file).tensors
    weights = sum(int(4 * t.n_elements if name == "transformers" else t.n_bytes) for t in tensors)
    return {"weights": weights, "kv_cache": round(cached)}


def measure(args, asked: list[list[int]]) -> dict:
    pythons = {"transformers": sys.executable, "openvino": sys.executable, "openvino_float32": sys.executable}
    for python in args.llama_python or [str(LLAMA)] * LLAMA.is_file():
        for binding in ("llama_cpp", "xllamacpp"):
            if subprocess.run([python, "-c", f"import {binding}"], capture_output=True).returncode == 0:
                pythons[binding] = python
    raw = {"loadavg_before": os.getloadavg(), "prompt_tokens": [len(p) for p in asked], "copy_bytes_per_s": []}
    contenders = raw["contenders"] = {}
    with ExitStack() as stack:
        racing = [stack.enter_context(Contender(name, python, args)) for name, python in pythons.items()]
        for contender in racing:
            contenders[contender.name] = contender.loaded | {"ttft_s": [], "latency_s_per_token": []}
        for number in range(args.repeats + 1):
            raw["copy_bytes_per_s"].append(copy_bandwidth(args.threads))
            for contender in racing:
                found, said = contenders[contender.name], [contender.answer(prompt) for prompt in asked]
                times = [one["times_s"] for one in said]
                if number:  # the first round warms up
                    found["ttft_s"].append(statistics.median(t[0] for t in times))
                    steps = [(t[-1] - t[0]) / (len(t) - 1) for t in times]
                    found["latency_s_per_token"].append(statistics.median(steps))
                found |= {name: said[-1][name] for name in ("rss", "rss_peak")}
                contenders[contender.name] = found
            print({c.name: contenders[c.name]["latency_s_per_token"][-1:] for c in racing}, flush=True)
    raw["loadavg_after"] = os.getloadavg()
    context = statistics.mean(len(p) for p in asked) + args.new_tokens / 2
    for name, found in contenders.items():
        found["bytes_per_token"] = bytes_per_token(name, args, context)
        step_s = statistics.median(found["latency_s_per_token"])
        found["achieved_bytes_per_s"] = sum(found["bytes_per_token"].values()) / step_s
    return raw


def ratios(raw: dict, repeats: int):
    from record import Ratio

    contenders, copied, found = raw["contenders"], statistics.median(raw["copy_bytes_per_s"]), {}
    plain = contenders["transformers"]

    def ratio(ours: dict, theirs: dict, name: str) -> float:
        return statistics.median(ours[name]) / statistics.median(theirs[name])

    for name, ours in contenders.items():
        if name == "transformers":
            continue
        latency = ratio(ours, plain, "latency_s_per_token")
        found[f"{name}/latency_over_transformers"] = Ratio(latency, 0.2, "lower", repeats)
        found[f"{name}/ttft_over_transformers"] = Ratio(ratio(ours, plain, "ttft_s"), None, "lower", repeats)
        found[f"{name}/memory_over_transformers"] = Ratio(ours["rss_peak"] / plain["rss_peak"], 0.3, "lower", 1)
        loaded, theirs = (one["rss_peak"] - one["rss_libraries"] for one in (ours, plain))
        found[f"{name}/memory_without_libraries_over_transformers"] = Ratio(loaded / theirs, 0.3, "lower", 1)
        for other in contenders.keys() & {"llama_cpp", "xllamacpp"} if name.startswith("openvino") else ():
            latency = ratio(ours, contenders[other], "latency_s_per_token")
            found[f"{name}/latency_over_{other}"] = Ratio(latency, 1.0, "lower", repeats)
    for name, result in contenders.items():
        found[f"{name}/bytes_per_s_over_copy"] = Ratio(result["achieved_bytes_per_s"] / copied, None, "higher", repeats)
    return found


def read_prompts(table: Path, folder: Path, count: int) -> list[list[int]]:
    """Token ids of real questions that no model was trained on."""
    import pandas as pd

    from medkit.modeling import loading
    from medkit.prompts import templates as prompts

    questions, tokenizer = pd.read_parquet(table), loading.load_tokenizer(folder)
    chosen = questions[questions.split == "valid"].sample(count, random_state=0).to_dict("records")
    templates = [prompts.pick_template(question["kind"], "option_text") for question in chosen]
    asked = [prompts.render(question, template) for question, template in zip(chosen, templates, strict=True)]
    return [prompts.encode(tokenizer, messages)[0] for messages in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="tiny", help="a finished run: its student, edge file and validation questions")
    parser.add_argument("--llama-python", action="append", help="may be given once for each binding")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is dropped")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="folder of the json (default: results/ beside this file)")
    for name in ("contender", "folder", "file", "context"):  # of a contender's own process
        parser.add_argument(
            f"--{name}", type={"contender": str, "context": int}.get(name, Path), help=argparse.SUPPRESS
        )
    args = parser.parse_args()
    if args.contender:
        serve(args)
        return
    from record import RESULTS, result_path, versions, write

    from medkit.quantization import gguf_export
    from medkit.stage import Stage, StageError

    stage = Stage(args.run, "05_inference")
    try:
        args.folder = stage.require("03_lora", "merged")
        args.file = stage.require("04_quantization", "edge/student.gguf")
        asked = read_prompts(stage.require("01_data", "questions.parquet"), args.folder, args.prompts)
    except StageError as error:
        sys.exit(f"edge_latency: {error}")
    manifest = gguf_export.check_manifest(args.file)
    args.context = max(map(len, asked)) + args.new_tokens + 64
    raw = measure(args, asked)
    setup = {
        "model": f"03_lora/merged and 04_quantization/edge of the run {args.run!r}",
        "file": {"weight_type": manifest["weight_type"], "bytes": manifest["bytes"]},
        "prompts": len(asked), "new_tokens": args.new_tokens, "threads": args.threads, "batch": 1,
        "decoding": "greedy, exactly so many tokens", "repeats": args.repeats,
        "statistic": "median over the prompts, then over the rounds; contenders take turns, the first round is dropped",
        "openvino": "the engine's own settings", "openvino_float32": "float32 arithmetic and KV cache",
        "memory": "VmHWM of a process of its own; libraries: VmRSS after the imports",
        "copy": f"torch copy of {COPY_BYTES} bytes, read and written bytes counted",
        "versions": versions("torch", "transformers", "openvino", "openvino-genai"),
    }  # fmt: skip
    output = args.output or RESULTS
    write("edge_latency", setup, ratios(raw, args.repeats), raw, output)
    print(result_path("edge_latency", output).read_text().partition('"raw"')[0])


if __name__ == "__main__":
    main()

"""Memory and latency of weight formats at the exact shapes of DeepSeek-R1-Distill-Qwen-7B, on one CUDA device.

Weights are random, so speed and bytes are real and accuracy is not measured. Every format is first
checked on two full-width layers against an fp32 model made of its dequantised weights. Units: seconds, bytes.
"""

import argparse
import json
import logging
import statistics
import traceback
from pathlib import Path

import torch
from contenders import BF16, CONTENDERS, DEVICE, Contender, build, release, shape_7b
from decode_loops import GenerateLoop, GraphLoop, now
from record import RESULTS, Ratio, raw_path, versions, write
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, Qwen2Config
from transformers.utils import is_flash_attn_2_available
from weight_formats import dequantised

PROMPT, NEW = 512, 128  # tokens; the prompt's is the default
CHECK_LAYERS, CHECK_PROMPT, CHECK_STEPS = 2, 64, 4
CHECK_TOLERANCE = 0.05  # relative Frobenius error of the logits
ATTENTION_LAYERS, ATTENTION_LENGTHS = 4, (512, 1024, 2048, 4096, 8192)  # tokens
OURS, PAPER, PLAN, BASE, BEST_BASE = "int4_lean_graph", "paper_mix", "plan", "bf16_eager", "bf16_graph"
GOALS = {OURS: (0.70, 0.60), PAPER: (0.647, 0.124), PLAN: (0.70, 0.60)}  # below BASE: memory, latency


def random_prompt(config: Qwen2Config, length: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(1)
    return torch.randint(config.vocab_size, (1, length), generator=generator, device=DEVICE)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value.float() - reference.float()).norm() / reference.float().norm()).item()


def check(contender: Contender) -> dict:
    """Logits of prefill and of single-token steps against fp32 arithmetic on the dequantised weights."""
    config = shape_7b(CHECK_LAYERS)
    model, reference = build(config, contender), build(config, BF16)
    weight_error = {}
    for name, layer in list(reference.named_modules()):
        if isinstance(layer, nn.Linear | nn.Embedding):
            weight = dequantised(model.get_submodule(name), layer.weight.data)
            assert weight.shape == layer.weight.shape
            kind = contender.format_of(name)
            weight_error[kind] = max(weight_error.get(kind, 0.0), relative_error(weight, layer.weight))
            layer.weight = nn.Parameter(weight, requires_grad=False)
    ids = random_prompt(config, CHECK_PROMPT + CHECK_STEPS)
    expected = reference.float()(input_ids=ids).logits
    if contender.decode == "generate":
        out = model(input_ids=ids[:, :CHECK_PROMPT], use_cache=True)
        logits = [out.logits]
        for i in range(CHECK_PROMPT, ids.shape[1]):
            logits.append(model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values).logits)
    else:
        loop = GraphLoop(model, ids.shape[1])
        logits = [loop.prefill(ids[:, :CHECK_PROMPT], keep=0)]
        for i in range(CHECK_PROMPT, ids.shape[1]):
            logits.append(loop.decode(ids[:, i : i + 1]).clone())
    errors = {
        "prefill_logits": relative_error(logits[0], expected[:, :CHECK_PROMPT]),
        "step_logits": relative_error(torch.cat(logits[1:], 1), expected[:, CHECK_PROMPT:]),
    }
    ok = all(error < CHECK_TOLERANCE for error in errors.values())
    return {"ok": ok, "relative_error": errors, "weight_error_vs_bf16": weight_error}


def tensor_bytes(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def kv_bytes(config: Qwen2Config, length: int) -> int:
    """Keys and values of one sequence of `length` tokens, in bf16."""
    head = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * length * 2


def measure(config: Qwen2Config, contender: Contender, prompt_tokens: int, repeats: int, bandwidth: float) -> dict:
    """Medians over `repeats` generations after one discarded; memory as the allocator counts it."""
    empty = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = build(config, contender)
    release()
    load_peak, weights = torch.cuda.max_memory_allocated() - empty, torch.cuda.memory_allocated() - empty
    embedding = model.model.embed_tokens
    table = sum(t.nbytes for t in [*embedding.parameters(), *embedding.buffers()])
    graph = contender.decode == "graph"
    compiled = contender.decode == "generate_compiled"
    loop = GraphLoop(model, prompt_tokens + NEW) if graph else GenerateLoop(model, compiled)
    prompt = random_prompt(config, prompt_tokens)

    torch.cuda.reset_peak_memory_stats()
    start = now()
    loop(prompt, NEW)
    warmup, first_peak = now() - start, torch.cuda.max_memory_allocated() - empty
    release()
    torch.cuda.reset_peak_memory_stats()
    runs = [loop(prompt, NEW) for _ in range(repeats)]
    peak, reserved = torch.cuda.max_memory_allocated() - empty, torch.cuda.memory_reserved()

    decode = [(total - first) / (NEW - 1) for first, total in runs]
    latency = statistics.median(decode)
    floor = (weights - table + kv_bytes(config, prompt_tokens + NEW // 2)) / bandwidth
    before = torch.cuda.memory_allocated()
    cache = loop.cache(prompt, 8)
    cached, delta = cache.layers[0].keys.shape[-2], torch.cuda.memory_allocated() - before
    return {
        "time_to_first_token_s": statistics.median(first for first, _ in runs),
        "latency_s_per_token": latency,
        "throughput_tokens_per_s": statistics.median(NEW / total for _, total in runs),
        "latency_s_per_token_runs": decode,
        "warmup_s": warmup,
        "weight_bytes": weights,
        "embedding_table_bytes": table,
        "load_peak_bytes": load_peak,
        "first_generation_peak_bytes": first_peak,
        "generation_peak_bytes": peak,
        "reserved_bytes": reserved,
        "kv_cache": {
            "tokens": cached,
            "formula_bytes": kv_bytes(config, cached),
            "tensor_bytes": tensor_bytes(cache),
            "allocator_delta_bytes": delta if contender.decode == "generate" else None,
        },
        "floor_s_per_token": floor,
        "latency_over_floor": latency / floor,
    }


def copy_bandwidth(repeats: int = 20) -> float:
    """Device-to-device copy of 4 GiB, bytes read plus bytes written, per second."""
    source = torch.randint(256, (2**32,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats + 3):
        start = now()
        target.copy_(source)
        times.append(now() - start)
    return 2 * source.nbytes / statistics.median(times[3:])


def attention_times(layers: int, repeats: int) -> dict:
    """The decoder stack without its head: a prefill without a cache, and one step over a cache as long.

    Eager attention, SDPA held to its flash backend, and FlashAttention-2 where it is installed.
    """
    config, results = shape_7b(layers), {"layers": layers}
    for attention in ("eager", "sdpa", *["flash_attention_2"] * is_flash_attn_2_available()):
        model = build(config, Contender(attention, attention=attention)).model
        for length in ATTENTION_LENGTHS:
            ids, cache = random_prompt(config, length), DynamicCache(config=config)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                prefill = timed(repeats, model, input_ids=ids, use_cache=False)
                peak = torch.cuda.max_memory_allocated() - before
                model(input_ids=ids, past_key_values=cache)
                decode = timed(repeats, model, input_ids=ids[:, :1], past_key_values=cache)
            entry = {"prefill_s": prefill, "decode_s": decode, "activation_peak_bytes": peak}
            results.setdefault(str(length), {})[attention] = entry
        del model
        release()
    return results


def timed(repeats: int, model: nn.Module, **inputs) -> float:
    """Median seconds of a forward pass, two warm-ups discarded. A cache among the inputs grows with every pass."""
    times = []
    for _ in range(repeats + 2):
        start = now()
        model(**inputs)
        times.append(now() - start)
    return statistics.median(times[2:])


def ratios(results: dict, attention: dict, repeats: int) -> dict[str, Ratio]:
    """Headline ratios; a contender that did not run, or whose check failed, gives none."""
    good = {name: r for name, r in results.items() if "error" not in r and r["check"]["ok"]}
    found = {}
    for name, (memory_goal, latency_goal) in GOALS.items():
        if name in good and BASE in good:
            memory = 1 - good[name]["generation_peak_bytes"] / good[BASE]["generation_peak_bytes"]
            latency = 1 - good[name]["latency_s_per_token"] / good[BASE]["latency_s_per_token"]
            found[f"{name}/total_memory_below_{BASE}"] = Ratio(memory, memory_goal, "higher", repeats)
            found[f"{name}/latency_below_{BASE}"] = Ratio(latency, latency_goal, "higher", repeats)
    if OURS in good and BEST_BASE in good:
        latency = 1 - good[OURS]["latency_s_per_token"] / good[BEST_BASE]["latency_s_per_token"]
        found[f"{OURS}/latency_below_{BEST_BASE}"] = Ratio(latency, None, "higher", repeats)
    if OURS in good:
        found[f"{OURS}/latency_over_floor"] = Ratio(good[OURS]["latency_over_floor"], 2.0, "lower", repeats)
    longest = attention.get(str(ATTENTION_LENGTHS[-1]), {})
    for kernel in (name for name in longest if name != "eager"):
        for phase in ("prefill", "decode"):
            if f"{phase}_s" in longest[kernel]:  # earlier runs timed the prefill alone
                speedup = longest["eager"][f"{phase}_s"] / longest[kernel][f"{phase}_s"]
                found[f"{kernel}_{phase}_speedup_at_{ATTENTION_LENGTHS[-1]}"] = Ratio(speedup, None, "higher", repeats)
    return found


def resume(path: Path) -> tuple[dict, dict]:
    """What an interrupted run has measured, and the lines of the setup that tell of it."""
    record = json.loads(path.read_text())
    told = {key: record[key] for key in ("date", "git_commit")} | {"versions": record["setup"]["versions"]}
    note = {"note": record["setup"]["note"]} if "note" in record["setup"] else {}
    return record["raw"], {"resumed": told} | note


def attempt(step, *args) -> dict:
    """The step's result, or the reason it has none."""
    try:
        return step(*args)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    finally:
        torch.compiler.reset()
        release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28, help="fewer than 28: a smoke run, not the real shape")
    parser.add_argument("--prompt", type=int, default=PROMPT, help=f"tokens; {NEW} new ones follow")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contenders", nargs="*", help="names to run; default all")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true", help="keep the contenders an interrupted run has measured")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else LLM.int8() logs a cast on every call

    config, name = shape_7b(args.layers), "shape7b"
    name += f"-{args.layers}-layers" if args.layers != 28 else ""
    name += f"-prompt-{args.prompt}" if args.prompt != PROMPT else ""
    path = raw_path(name, args.output)
    if args.resume and path.exists():
        raw, resumed = resume(path)
    else:
        raw, resumed = {"copy_bandwidth_bytes_per_s": copy_bandwidth(), "contenders": {}}, {}
        raw["prefill_attention"] = attempt(attention_times, ATTENTION_LAYERS, args.repeats)
    bandwidth, results = raw["copy_bandwidth_bytes_per_s"], raw["contenders"]
    attention = raw["prefill_attention"]
    for contender in CONTENDERS:
        results.setdefault(contender.name, {"error": "not run"})
    setup = {
        "model": "random weights at the shapes of DeepSeek-R1-Distill-Qwen-7B; accuracy is not measured",
        "layers": args.layers, "prompt_tokens": args.prompt, "new_tokens": NEW, "batch": 1,
        "decoding": "greedy, no stop token",
        "repeats": args.repeats, "statistic": "median, one warm-up generation discarded",
        "memory": "generation_peak_bytes: torch.cuda.max_memory_allocated over the timed generations",
        "floor": "(weights without the embedding table + KV cache at the middle of the output) / copy bandwidth",
        "check_layers": CHECK_LAYERS, "check_tolerance": CHECK_TOLERANCE,
        "versions": versions("torch", "transformers", "bitsandbytes", "triton", "flash-attn")
        | {"cuda": torch.version.cuda},
    } | resumed  # fmt: skip
    for contender in CONTENDERS:
        if "error" not in results[contender.name] or (args.contenders and contender.name not in args.contenders):
            continue
        result = verdict = attempt(check, contender)
        if "error" not in verdict:
            result = attempt(measure, config, contender, args.prompt, args.repeats, bandwidth)
        results[contender.name] = result | {"check": verdict}
        write(name, setup, ratios(results, attention, args.repeats), raw, args.output, summary=raw)
        print(contender.name, {k: v for k, v in results[contender.name].items() if "runs" not in k}, flush=True)
    print(path.read_text().partition('"raw"')[0])


if __name__ == "__main__":
    main()

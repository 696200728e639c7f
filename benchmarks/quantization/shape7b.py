"""The paper's claim on memory and time, at the exact shapes of DeepSeek-R1-Distill-Qwen-7B, on one CUDA device.

Weights are random: bytes and times are real, accuracy is not measured. Contenders: bf16 with eager attention and with
SDPA, bf16 as transformers compiles it (static cache, CUDA graphs), and bitsandbytes' layers as the paper mixes them
(attention LLM.int8, the rest and the head NF4) and as transformers' default puts them (NF4, the head in bf16).
Units: seconds, bytes as CUDA's allocator counts them.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import CompileConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from benchmarks.record import RESULTS, Ratio, versions, write

PROMPT, NEW = 512, 128  # tokens
CONTENDERS = {  # attention, weight formats of attention / MLP / head, how it decodes
    "bf16_eager": ("eager", "", "", "", "as it is"),
    "bf16_sdpa": ("sdpa", "", "", "", "as it is"),
    "bf16_static_compiled": ("sdpa", "", "", "", "compiled"),
    "nf4_library": ("sdpa", "nf4", "nf4", "", "as it is"),
    "paper_mix": ("sdpa", "llm_int8", "nf4", "nf4", "as it is"),
}
BASE, PAPER = "bf16_eager", "paper_mix"
MEMORY_GOAL, LATENCY_GOAL = 0.647, 0.124  # what the paper states


def shape_7b(layers: int) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=3584, num_hidden_layers=layers, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False, max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def quantized(layer: nn.Linear, kind: str) -> nn.Module:
    """bitsandbytes' layer with these weights: NF4 with double quantization, or LLM.int8."""
    size, weight = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.data
    if kind == "nf4":
        options = {"compress_statistics": True, "quant_type": "nf4"}
        new = bnb.nn.Linear4bit(*size, compute_dtype=torch.bfloat16, device="meta", **options)
        new.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=new, **options).to(weight.device)
    else:
        new = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0, device="meta")
        new.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    new.bias = layer.bias
    return new


def build(name: str, config: Qwen2Config, device: torch.device) -> nn.Module:
    """A contender with weights from seed 0, quantized layer by layer."""
    attention, of_attention, of_mlp, of_head, _ = CONTENDERS[name]
    torch.manual_seed(0)
    with device:
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    for module, layer in list(model.named_modules()):
        kind = of_head if module == "lm_head" else of_attention if "self_attn" in module else of_mlp
        if isinstance(layer, nn.Linear) and kind:
            model.set_submodule(module, quantized(layer, kind))
    return model.eval().requires_grad_(False)


class FirstTokenClock(StoppingCriteria):
    """Notes when the first token is ready, and never stops generation."""

    def __init__(self):
        self.first = None

    def __call__(self, input_ids, scores, **kwargs):
        self.first = self.first or now()
        return torch.zeros(1, dtype=torch.bool, device=input_ids.device)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, config: Qwen2Config, device: torch.device, repeats: int) -> dict:
    """Medians over `repeats` generations after one that is discarded."""
    empty = torch.cuda.memory_allocated()
    model, options = build(name, config, device), {}
    weights = torch.cuda.memory_allocated() - empty
    if CONTENDERS[name][-1] == "compiled":
        compiled = CompileConfig(mode="reduce-overhead", fullgraph=True)
        options = {"cache_implementation": "static", "compile_config": compiled}
    prompt = torch.randint(config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1)).to(device)
    first, latency = [], []
    for repeat in range(-1, repeats):
        if repeat == 0:
            torch.cuda.reset_peak_memory_stats()
        clock, began = FirstTokenClock(), now()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW,
            stopping_criteria=StoppingCriteriaList([clock]), **options,
        )  # fmt: skip
        if repeat >= 0:
            first.append(clock.first - began)
            latency.append((now() - clock.first) / (NEW - 1))
    return {
        "time_to_first_token_s": statistics.median(first),
        "latency_s_per_token": statistics.median(latency),
        "latency_s_per_token_runs": latency,
        "weight_bytes": weights,
        "generation_peak_bytes": torch.cuda.max_memory_allocated() - empty,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="fewer than 28: a trial, not the real shape")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("shape7b: no CUDA device here")

    measured, device = {}, torch.device("cuda")
    for name in args.contenders:
        measured[name] = measure(name, shape_7b(args.layers), device, args.repeats)
        print(name, measured[name], flush=True)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    ratios = {}
    if {BASE, PAPER} <= set(measured):
        below = {
            what: 1 - measured[PAPER][what] / measured[BASE][what] for what in measured[BASE] if "runs" not in what
        }
        memory = Ratio(below["generation_peak_bytes"], MEMORY_GOAL, "higher", args.repeats)
        latency = Ratio(below["latency_s_per_token"], LATENCY_GOAL, "higher", args.repeats)
        ratios = {f"{PAPER}/total_memory_below_{BASE}": memory, f"{PAPER}/latency_below_{BASE}": latency}
    setup = {
        "model": "random weights at the shapes of DeepSeek-R1-Distill-Qwen-7B; accuracy is not measured",
        "layers": args.layers, "prompt_tokens": PROMPT, "new_tokens": NEW, "batch": 1,
        "decoding": "greedy, no stop token", "repeats": args.repeats,
        "statistic": "median, one warm-up generation discarded",
        "memory": "generation_peak_bytes: torch.cuda.max_memory_allocated over the timed generations",
        "versions": versions("torch", "transformers", "bitsandbytes") | {"cuda": torch.version.cuda},
    }  # fmt: skip
    name = "shape7b" + (f"-{args.layers}-layers" if args.layers != 28 else "")
    write(name, setup, ratios, {"contenders": measured}, args.output, summary={"contenders": measured})


if __name__ == "__main__":
    main()

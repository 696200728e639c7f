"""Memory at its peak: what a pass over a model holds beside weights and cache, computed and measured.

`activation_bytes` needs a config and no weights. It knows dense decoders of the Llama kind with gated MLPs, run by
transformers without padding; `measure_peak` runs whatever it is given. Bytes at rest are in `ledger`.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig

from medkit.modeling import loading
from medkit.quantization.memory_ledger import DECODED_BYTES, FP8_BYTES, Weight, head_dim, layer_values, windows


def activation_bytes(
    config: PreTrainedConfig,
    shapes: list[Weight],
    schemes: Mapping[str, str],
    batch: int,
    context: int,
    dtype_bytes: int = 2,
    kv_bytes_per_value: int = 2,
) -> dict[str, int]:
    """Peak of what lives beside weights and cache: in a `prefill` of (batch, context), and in the `decode` step after.

    The largest of the moments at which most is held, with SDPA and `logits_to_keep=1`: no S×S scores, and the logits
    of the last position alone. Models that cap their scores (Gemma 2) run without SDPA, so theirs are counted.
    """
    config = config.get_text_config()
    hidden, mlp = config.hidden_size, config.intermediate_size
    query, kv = config.num_attention_heads * head_dim(config), config.num_key_value_heads * head_dim(config)
    layers = windows(config)
    decoded = _decoded_bytes(shapes, schemes, dtype_bytes)
    head = decoded["embeddings" if config.tie_word_embeddings else "head"]
    # a norm of the queries is computed in float32: what went in and what comes out
    normed = 8 * query if any(weight.module.endswith("q_norm") for weight in shapes) else 0

    def peak(tokens: int, attention: int) -> int:
        """`attention` are the bytes that attention itself holds."""
        # to the end of the pass: the embedded input, and the input of the layer
        carried = min(2, len(layers)) * hidden
        moments = [
            (carried + hidden + 4 * query + 2 * kv, 0),  # q, k, v; q·cos, the turned q, their product with sin
            (carried + hidden + 4 * query, attention),  # q, k and v repeated to its width, their result
            (carried + hidden + query + 2 * kv, max(decoded["attention"], normed * tokens)),
            (carried + 2 * hidden + 3 * mlp, 0),  # residual and normed input; act(gate), up, their product
            (carried + 2 * hidden + 2 * mlp, decoded["mlp"]),
            (hidden, head + dtype_bytes * batch * config.vocab_size),
        ]
        return max(tokens * width * dtype_bytes + extra for width, extra in moments)

    kinds = len(set(layers))
    tables = kinds if "full_attention" in (config.rope_parameters or {}) else 1
    everywhere = context * (2 * tables * head_dim(config) * dtype_bytes + 8)  # cosines, sines and the positions
    square, scores = context * context, 0
    if getattr(config, "attn_logit_softcapping", None):
        everywhere += kinds * batch * square * dtype_bytes  # a mask of numbers for each kind of layer
        # the softmax is in float32: its result beside the scores, and beside 16-bit scores a wide copy as well
        scores = (8 if dtype_bytes == 4 else 10) * batch * config.num_attention_heads * square
        scores -= query * batch * context * dtype_bytes  # no result yet
    elif any(window and context > window for window in layers):
        everywhere += square  # a mask of booleans,
        scores = batch * square * dtype_bytes  # which SDPA turns into numbers
    # until the next step a layer with a window keeps the keys and values of the whole prefill
    late = sum(2 * layer_values(config, batch, max(0, context - window)) for window in layers if window) * dtype_bytes
    return {
        "prefill": peak(batch * context, scores) + everywhere + late,
        "decode": peak(batch, _growth_bytes(config, batch, context, dtype_bytes, kv_bytes_per_value)),
    }


def _decoded_bytes(shapes: list[Weight], schemes: Mapping[str, str], dtype_bytes: int) -> dict[str, int]:
    """Per component the most of a quantised matrix that is decoded at once: all of it in bitsandbytes' 4-bit layers."""
    most = dict.fromkeys(("embeddings", "attention", "mlp", "head"), 0)
    for weight in shapes:
        scheme = schemes.get(weight.module, "unquantized")
        if weight.component in most and scheme != "unquantized":
            whole = weight.count * dtype_bytes
            by_rows = scheme == "int8" or weight.component in ("embeddings", "head")
            most[weight.component] = max(most[weight.component], min(whole, DECODED_BYTES) if by_rows else whole)
    return most


def _growth_bytes(config: PreTrainedConfig, batch: int, context: int, dtype_bytes: int, kv_bytes_per_value: int) -> int:
    """What one more token needs in the layer with the longest cache, beside the cache itself."""
    values = max(layer_values(config, batch, min(context, window or context)) for window in windows(config))
    if kv_bytes_per_value == FP8_BYTES:
        # keys as used, values in float32 and once more times their scale, and both as they were before the token
        return values * (dtype_bytes + 4 + 4 + 2 * FP8_BYTES)
    return values * kv_bytes_per_value  # the keys without the token, beside those with it


@torch.inference_mode()
def measure_peak(load: Callable[[], nn.Module], batch: int, context: int, device: torch.device) -> dict[str, int]:
    """Bytes at the peak of a prefill of (batch, context) and of the decode step after: weights, cache and activations.

    `libraries` is what they occupy once a toy model has run, before `load()` is called; it is taken off the other two.
    A short pass comes first, so that weights mapped from a file are resident. On CUDA the allocator counts; on the CPU
    it is the resident set as Linux keeps it, so there call this in a fresh process.
    """
    toy = loading.make_toy_model().to(device)
    _peaks(toy, batch, 8, device)
    del toy
    gc.collect()
    reset_peak(device)
    libraries = read_peak(device)
    model = load()
    _peaks(model, batch, 8, device)
    prefill, decode = _peaks(model, batch, context, device)
    return {"libraries": libraries, "prefill": prefill - libraries, "decode": decode - libraries}


def _peaks(model: nn.Module, batch: int, context: int, device: torch.device) -> list[int]:
    ids = torch.ones(batch, context, dtype=torch.long, device=device)
    cache, peaks = DynamicCache(config=model.config), []
    for tokens in (ids, ids[:, :1]):
        reset_peak(device)
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        peaks.append(read_peak(device))
    return peaks


def reset_peak(device: torch.device) -> None:
    """Begin a new peak. On the CPU raises OSError where /proc is absent or not ours to write to."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def read_peak(device: torch.device) -> int:
    """Bytes at the peak since `reset_peak`: what CUDA's allocator gave out, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE).group(1))

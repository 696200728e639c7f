"""The ledger: where every byte of a model is."""

from __future__ import annotations

import bitsandbytes as bnb
import pandas as pd
import torch
from torch import nn

COMPONENTS = ["embeddings", "attention", "mlp", "norms", "head", "quantization state"]


def _component(name: str, tied: bool) -> str:
    for part, component in (
        ("embed", "embeddings"),
        ("lm_head", "embeddings" if tied else "head"),
        ("attn", "attention"),
        ("mlp", "mlp"),
    ):
        if f"{part}." in name or f"{part}_" in name:
            return component if "norm" not in name else "norms"
    return "norms"


def measure_bytes(model: nn.Module) -> pd.DataFrame:
    """One row per component: weights, bytes as loaded, and the bytes the same weights take in bf16.

    Counts storage once however often it is tied, and the quantisation state (block scales, their scales, code tables),
    which `get_memory_footprint()` leaves out. Buffers that are recomputed at load (rotary frequencies) are not weights.
    """
    rows, seen = [], set()
    tied = model.config.get_text_config().tie_word_embeddings
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() in seen:
            continue
        seen.add(parameter.data_ptr())
        component = _component(name, tied)
        if isinstance(parameter, bnb.nn.Params4bit):
            count = parameter.quant_state.shape.numel()
            state = sum(
                tensor.nbytes for tensor in _state_tensors(parameter.quant_state) if tensor.data_ptr() not in seen
            )
            seen.update(tensor.data_ptr() for tensor in _state_tensors(parameter.quant_state))
            rows.append(("quantization state", 0, state, 0))
        else:
            count = parameter.numel()
        rows.append((component, count, parameter.nbytes, 2 * count))
    table = pd.DataFrame(rows, columns=["component", "weights", "bytes", "bf16_bytes"])
    table = table.groupby("component", as_index=False).sum()
    return table.sort_values("component", key=lambda c: c.map(COMPONENTS.index), ignore_index=True)


def _state_tensors(state) -> list[torch.Tensor]:
    nested = [*_state_tensors(state.state2), state.offset] if state.nested else []
    return [state.absmax, state.code, *nested]


def kv_cache_bytes(config, batch: int, context: int, bytes_per_value: int) -> int:
    """Exact size of a full key-value cache: 2 · layers · kv_heads · head_dim · batch · context · bytes per value."""
    config = config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * batch * context * bytes_per_value

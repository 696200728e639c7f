"""The ledger: where every byte of a model is, counted on a real model and computed from shapes alone.

`measure_bytes` looks at what is loaded. `plan_bytes` and `kv_cache_bytes` need a config and no weights, so they answer
before anything is downloaded; tests hold the two sides together to the byte. What a pass over the model takes on top
is in `peak`, and which plan fits a device in `budget`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

COMPONENTS = ["embeddings", "attention", "mlp", "biases", "norms", "head", "quantization state"]
DECODED_BYTES = 4 << 20  # of a matrix stored by rows (int8, and the ends in nf4), the most that is decoded at once
NF4_BLOCK, NESTED_BLOCK = 64, 256  # weights per scale, and scales per scale of scales (arXiv 2305.14314)
NF4_LEVELS, NESTED_LEVELS = 16, 256  # entries of the float32 tables
SCALE_BYTES = 4  # float32: the scale of a block or, in int8, of a row
FP8_BYTES = 1


@dataclass(frozen=True)
class Weight:
    """One parameter of a model: the module that holds it, its component and its shape. Tied ones appear once."""

    module: str
    component: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def _component(name: str, tied: bool) -> str:
    if "norm" in name:
        return "norms"
    if name.endswith(".bias"):
        return "biases"
    for part, component in (
        ("embed", "embeddings"),
        ("lm_head", "embeddings" if tied else "head"),
        ("attn", "attention"),
        ("mlp", "mlp"),
    ):
        if f"{part}." in name or f"{part}_" in name:
            return component
    return "norms"


def _table(rows: list[tuple[str, int, int, int]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["component", "weights", "bytes", "bf16_bytes"])
    table = table.groupby("component", as_index=False).sum()
    return table.sort_values("component", key=lambda c: c.map(COMPONENTS.index), ignore_index=True)


def measure_bytes(model: nn.Module) -> pd.DataFrame:
    """One row per component: weights, bytes as loaded, and the bytes the same weights take in bf16.

    Counts storage once however often it is tied, and the quantisation state (block scales, their scales, code tables;
    the scales beside int8 codes), which `get_memory_footprint()` leaves out for NF4. Buffers that are recomputed at
    load (rotary frequencies) are not weights.
    """
    rows, seen = [], set()
    tied = model.config.get_text_config().tie_word_embeddings

    def unseen_bytes(tensors: list[torch.Tensor]) -> int:
        new = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.data_ptr() not in seen}
        seen.update(new)
        return sum(new.values())

    for module_name, module in model.named_modules():
        held = {**module._parameters, **module._buffers}
        held = {n: t for n, t in held.items() if t is not None and n not in module._non_persistent_buffers_set}
        has_codes = any(tensor.dtype == torch.int8 for tensor in held.values())
        for name, tensor in held.items():
            if tensor.data_ptr() in seen:
                continue
            component, count, size = _component(f"{module_name}.{name}", tied), tensor.numel(), unseen_bytes([tensor])
            packed = getattr(tensor, "quant_state", None)  # bitsandbytes' 4-bit parameters have one
            if packed is not None:
                count = packed.shape.numel()
                rows.append(("quantization state", 0, unseen_bytes(_state_tensors(packed)), 0))
            elif has_codes and tensor.is_floating_point() and name != "bias":
                component, count = "quantization state", 0
            rows.append((component, count, size, 2 * count))
    return _table(rows)


def _state_tensors(state) -> list[torch.Tensor]:
    nested = [*_state_tensors(state.state2), state.offset] if state.nested else []
    return [state.absmax, state.code, *nested]


def model_shapes(config: PreTrainedConfig) -> list[Weight]:
    """Every parameter of the causal language model the config describes, built without memory for its weights."""
    config = config.get_text_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [
        Weight(name.rpartition(".")[0], _component(name, config.tie_word_embeddings), tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    ]


def plan_bytes(
    shapes: list[Weight], schemes: Mapping[str, str], dtype_bytes: int = 2, double_quant: bool = True
) -> pd.DataFrame:
    """What `measure_bytes` would find if `schemes` (module name → "unquantized", "int8" or "nf4") were carried out.

    Modules that are not named keep their dtype of `dtype_bytes` per weight, as do norms and biases always. int8 is one
    code per weight and a scale per row; nf4 half a byte per weight, a scale per block of 64 and a table of levels, and
    with `double_quant` the scales in 8 bits, in blocks of 256, with a scale each, their own table and their mean.
    Raises ValueError for a name that is no matrix of the model, and for a scheme there is not.
    """
    matrices = {weight.module for weight in shapes if len(weight.shape) == 2}
    for module, scheme in schemes.items():
        if module not in matrices:
            raise ValueError(f"{module!r} is no matrix of this model; a tied head goes by the name of the embeddings")
        if scheme not in ("unquantized", "int8", "nf4"):
            raise ValueError(f"{module}: no scheme {scheme!r}; there are keep, int8 and nf4")
    rows = []
    for weight in shapes:
        scheme = schemes.get(weight.module, "unquantized") if len(weight.shape) == 2 else "unquantized"
        size, state = weight.count * dtype_bytes, 0
        if scheme == "int8":
            size, state = weight.count, SCALE_BYTES * weight.shape[0]
        elif scheme == "nf4":
            blocks = math.ceil(weight.count / NF4_BLOCK)
            size, state = math.ceil(weight.count / 2), 4 * NF4_LEVELS + SCALE_BYTES * blocks
            if double_quant:
                nested = SCALE_BYTES * math.ceil(blocks / NESTED_BLOCK) + 4 * NESTED_LEVELS + 4
                state = 4 * NF4_LEVELS + blocks + nested
        rows.append((weight.component, weight.count, size, 2 * weight.count))
        if state:
            rows.append(("quantization state", 0, state, 0))
    return _table(rows)


def windows(config: PreTrainedConfig) -> list[int | None]:
    """Per layer the tokens its attention looks back on, None for all of them."""
    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]


def layer_values(config: PreTrainedConfig, batch: int, tokens: int) -> int:
    """Numbers in the keys of one layer, and as many again in its values."""
    return config.num_key_value_heads * head_dim(config) * batch * tokens


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_cache_bytes(config: PreTrainedConfig, batch: int, context: int, bytes_per_value: int) -> int:
    """Size of a full key-value cache: 2 · layers · kv_heads · head_dim · batch · context · bytes per value.

    A layer with a sliding window holds that many tokens and no more, once the step after the prefill has let the
    prefill's tensors go. One byte per value is transformers' fp8 cache: a float32 scale for the keys of each layer and
    one for its values come on top, and it exists for models without windows only.
    """
    config = config.get_text_config()
    held = [min(context, window or context) for window in windows(config)]
    scales = 2 * SCALE_BYTES * len(held) if bytes_per_value == FP8_BYTES else 0
    return sum(2 * layer_values(config, batch, tokens) * bytes_per_value for tokens in held) + scales

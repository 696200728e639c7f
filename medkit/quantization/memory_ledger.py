"""The memory ledger: bytes of a model by component, measured on a loaded model or computed from shapes alone.

`measure_bytes` counts loaded tensors; the other functions need a config and no weights, so they answer before a
download. `memory_budget` compares plans with the memory of a device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

COMPONENTS = ["embeddings", "attention", "mlp", "biases", "norms", "head", "quantization state"]
DECODED_BYTES = 4 << 20  # the most that is decoded at once of a matrix that is stored by rows (see rowwise.py)
NF4_BLOCK, NESTED_BLOCK = 64, 256  # weights per scale, and scales per scale of scales (arXiv 2305.14314)
NF4_LEVELS, NESTED_LEVELS = 16, 256  # entries of the float32 code tables
SCALE_BYTES = 4  # a float32 scale, of a block or of an int8 row


@dataclass(frozen=True)
class Weight:
    """One parameter of a model: its module, its component and its shape. Tied parameters appear once."""

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
    parts = {"embed": "embeddings", "lm_head": "embeddings" if tied else "head", "attn": "attention", "mlp": "mlp"}
    return next((c for part, c in parts.items() if f"{part}." in name or f"{part}_" in name), "norms")


def make_table(rows: list[tuple[str, int, int, int]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["component", "weights", "bytes", "bf16_bytes"])
    table = table.groupby("component", as_index=False).sum()
    return table.sort_values("component", key=lambda c: c.map(COMPONENTS.index), ignore_index=True)


def measure_bytes(model: nn.Module) -> pd.DataFrame:
    """One row per component of a model, loaded or a skeleton: `weights`, `bytes`, and `bf16_bytes` of the same weights.

    Tied tensors count once. The quantization state (block scales, their scales, code tables, scales of int8 rows)
    counts as well; `get_memory_footprint()` leaves it out for NF4. Other buffers (rotary frequencies) are computed at
    load, are no weights, and do not count.
    """
    tied = model.config.get_text_config().tie_word_embeddings
    rows: dict[int, tuple] = {}  # by address; a skeleton has none

    def add(component: str, tensor: torch.Tensor, count: int = 0) -> None:
        rows.setdefault(tensor.data_ptr() or id(tensor), (component, count, tensor.nbytes, 2 * count))

    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            state = getattr(parameter, "quant_state", None)  # of bitsandbytes' 4-bit parameters
            count = parameter.numel() if state is None else state.shape.numel()
            add(_component(f"{module_name}.{name}", tied), parameter, count)
            for tensor in [] if state is None else _state_tensors(state):
                add("quantization state", tensor)
        if any(parameter.dtype == torch.int8 for parameter in module.parameters(recurse=False)):
            for scale in module.buffers(recurse=False):
                add("quantization state", scale)
    return make_table([*rows.values()])


def _state_tensors(state) -> list[torch.Tensor]:
    nested = [*_state_tensors(state.state2), state.offset] if state.nested else []
    return [state.absmax, state.code, *nested]


def model_shapes(config: PreTrainedConfig) -> list[Weight]:
    """Every parameter of the causal language model that a config describes, without memory for its weights."""
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
    """The table of `measure_bytes` for a model quantized by `schemes` (module → scheme), from shapes alone.

    Modules without a scheme, norms and biases take `dtype_bytes` per weight. int8 takes one byte per weight and one
    scale per row. NF4 takes half a byte per weight, one scale per block of 64 and a table of levels; `double_quant`
    stores the scales in 8 bits, in blocks of 256 with one scale each, a table and a mean.
    """
    rows = []
    for weight in shapes:
        scheme = schemes.get(weight.module) if len(weight.shape) == 2 else None
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
    return make_table(rows)


def head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_cache_bytes(config: PreTrainedConfig, batch: int, context: int, dtype_bytes: int) -> int:
    """Size of a full key-value cache: 2 · layers · kv_heads · head_dim · batch · context · dtype_bytes."""
    config = config.get_text_config()
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config)
    return per_token * batch * context * dtype_bytes


def activation_bytes(
    config: PreTrainedConfig,
    shapes: list[Weight],
    schemes: Mapping[str, str],
    batch: int,
    context: int,
    dtype_bytes: int = 2,
) -> dict[str, int]:
    """Peak bytes beside weights and cache: of the `prefill` of (batch, context), and of the next `decode` step.

    For dense decoders of the Llama kind with gated MLPs and full attention, without padding. The maximum over the
    moments of a pass that hold most, with SDPA and `logits_to_keep=1`: no S×S scores, and logits of the last position.
    """
    config = config.get_text_config()
    hidden, mlp = config.hidden_size, config.intermediate_size
    query, kv = config.num_attention_heads * head_dim(config), config.num_key_value_heads * head_dim(config)
    decoded = _decoded_bytes(shapes, schemes, dtype_bytes)
    head = decoded["embeddings" if config.tie_word_embeddings else "head"]
    # a norm of the queries runs in float32: its input and its output
    normed = 8 * query if any(weight.module.endswith("q_norm") for weight in shapes) else 0

    def peak(tokens: int, attention: int) -> int:
        """`attention` are the bytes that the attention kernel itself holds."""
        # alive until the end of the pass: the embedded input, and the input of the layer
        carried = min(2, config.num_hidden_layers) * hidden
        moments = [  # numbers per token, and other bytes
            (carried + hidden + 4 * query + 2 * kv, 0),  # q, k, v; q·cos, the rotated q, its product with sin
            (carried + hidden + 4 * query, attention),  # q, the repeated k and v, the result
            (carried + hidden + query + 2 * kv, max(decoded["attention"], normed * tokens)),
            (carried + 2 * hidden + 3 * mlp, 0),  # residual and normed input; act(gate), up, their product
            (carried + 2 * hidden + 2 * mlp, decoded["mlp"]),
            (hidden, head + dtype_bytes * batch * config.vocab_size),
        ]
        return max(tokens * width * dtype_bytes + extra for width, extra in moments)

    rotary = context * (2 * head_dim(config) * dtype_bytes + 8)  # cosines, sines and positions
    copied = batch * context * kv * dtype_bytes  # in a decode step a layer holds its old keys beside the new ones
    return {"prefill": peak(batch * context, 0) + rotary, "decode": peak(batch, copied)}


def _decoded_bytes(shapes: list[Weight], schemes: Mapping[str, str], dtype_bytes: int) -> dict[str, int]:
    """Component → the most of a quantized matrix that is decoded at once; bitsandbytes' 4-bit layers decode all."""
    most = dict.fromkeys(("embeddings", "attention", "mlp", "head"), 0)
    for weight in shapes:
        scheme = schemes.get(weight.module, "unquantized")
        if weight.component in most and scheme != "unquantized":
            whole = weight.count * dtype_bytes
            by_rows = scheme == "int8" or weight.component in ("embeddings", "head")
            most[weight.component] = max(most[weight.component], min(whole, DECODED_BYTES) if by_rows else whole)
    return most

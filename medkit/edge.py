"""The edge file: one GGUF with weights, tokenizer and chat template, for llama.cpp and OpenVINO GenAI.

Llama-family checkpoints only (Llama, SmolLM). Quantised by the `gguf` package's own reference code; norms stay F32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
from torch import nn

from medkit.outputs import DISCLAIMER, atomic_path

ARCHITECTURE = "llama"
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class ExportError(ValueError):
    """A model that this exporter cannot write."""


def export_gguf(model: nn.Module, tokenizer, path: Path, weight_type: str) -> Path:
    """Write `model` to one GGUF file; two-dimensional weights in `weight_type`, e.g. Q4_1. Whole or not at all.

    A row whose length is no multiple of the block (32) falls back to F16. Raises ExportError for another architecture.
    """
    config = model.config
    if config.model_type != ARCHITECTURE:
        raise ExportError(f"model_type {config.model_type!r}: only {ARCHITECTURE!r} checkpoints can be exported")
    if config.rope_parameters["rope_type"] != "default":
        raise ExportError(f"rope_type {config.rope_parameters['rope_type']!r}: only 'default' can be exported")
    odd = sorted(
        n
        for n, _ in model.named_parameters()
        if n not in ENDS and n.split(".", 3)[3].removesuffix(".weight") not in NAMES
    )
    if odd:
        raise ExportError(f"{odd[0]}: no place for this weight in a {ARCHITECTURE} file")
    kind = gguf.GGMLQuantizationType[weight_type]
    with atomic_path(path) as scratch:
        writer = gguf.GGUFWriter(scratch, ARCHITECTURE)
        _write_config(writer, config, kind)
        _write_tokenizer(writer, tokenizer, config.vocab_size)
        for name, values in _exported_weights(model):
            stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
            if values.ndim > 1 and values.shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
                stored = gguf.GGMLQuantizationType.F16
            writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _exported_weights(model: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF names and float32 values in GGUF's order of rows; a tied head is not stored twice."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.detach().float().cpu().numpy()
        for projection, num_heads in heads.items():
            if projection in name:
                values = permute_rotary(values, num_heads)
        yield _gguf_name(name), values


def permute_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (out, in) of a query or key projection from transformers' rotary order (halves) to GGUF's (pairs)."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _gguf_name(name: str) -> str:
    if name in ENDS:
        return ENDS[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _write_config(writer: gguf.GGUFWriter, config, kind: gguf.GGMLQuantizationType) -> None:
    writer.add_name("medkit student")
    writer.add_description(DISCLAIMER)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer, vocab_size: int) -> None:
    """Byte-pair vocabulary and merges, read from the fast tokenizer's own json."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ExportError(f"tokenizer of type {model['type']!r}: only byte-pair encodings can be exported")
    special = {t for t, added in tokenizer.get_added_vocab().items()} | set(tokenizer.all_special_tokens)
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    types = [
        gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL if i in names else gguf.TokenType.UNUSED
        for i, t in enumerate(tokens)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(backend))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(backend: dict) -> str:
    """llama.cpp's name for how this tokenizer splits text: bytes after GPT-2's rule, digits one by one.

    A vocabulary without tokens of two digits reads the same with and without the second half.
    """
    splits = [part["type"] for part in backend["pre_tokenizer"].get("pretokenizers", [backend["pre_tokenizer"]])]
    long_numbers = any(re.search(r"\d\d", token) for token in backend["model"]["vocab"])
    if splits == ["Digits", "ByteLevel"] or (splits == ["ByteLevel"] and not long_numbers):
        return "smollm"
    raise ExportError(f"pre-tokenizer {splits}: only SmolLM2's (digits, then bytes) can be exported")


def measure_bytes(path: Path) -> pd.DataFrame:
    """One row per component of a GGUF file: weights, bytes as stored, and the bytes the same weights take in bf16."""
    rows = []
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.name
        component = (
            "norms" if "norm" in name else "attention" if "attn" in name else "mlp" if "ffn" in name else "embeddings"
        )
        rows.append(
            (
                "head" if name == "output.weight" else component,
                int(tensor.n_elements),
                int(tensor.n_bytes),
                2 * int(tensor.n_elements),
            )
        )
    return (
        pd.DataFrame(rows, columns=["component", "weights", "bytes", "bf16_bytes"])
        .groupby("component", as_index=False)
        .sum()
    )


def measure_rounding(before: nn.Parameter, after: nn.Parameter, weight_type: str) -> tuple[float, float, float]:
    """Bits per weight of a GGUF type, relative error of rounding `after` to it, and the share of the update it keeps.

    The share is the rounded update's projection on the update: 1 keeps all, 0 puts `after` back where it came from.
    A model published on a grid and moved by less than a step is put back by rounding to that same grid.
    """
    kind = gguf.GGMLQuantizationType[weight_type]
    start, end = (w.detach().float().cpu().numpy() for w in (before, after))
    rounded = gguf.dequantize(gguf.quantize(end, kind), kind).reshape(end.shape)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    update = end - start
    kept = np.vdot(rounded - start, update) / np.vdot(update, update)
    return 8 * size / block, float(np.linalg.norm(rounded - end) / np.linalg.norm(end)), float(kept)


def largest_relative_error(model: nn.Module, path: Path) -> float:
    """Read a GGUF back and compare: the largest |difference| of a weight over the range of its block of 32.

    Raises ExportError if a weight of the model is missing from the file.
    """
    stored, worst = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}, 0.0
    for name, values in _exported_weights(model):
        if name not in stored:
            raise ExportError(f"{path}: {name} is missing; export again")
        read = gguf.dequantize(stored[name].data, stored[name].tensor_type).reshape(values.shape)
        error = np.abs(read - values).reshape(-1, 32 if values.size % 32 == 0 else values.size)
        blocks = values.reshape(error.shape)
        worst = max(worst, float((error / (blocks.max(axis=1) - blocks.min(axis=1) + 1e-12)[:, None]).max()))
    return worst

"""The edge file: one GGUF with weights, tokenizer and chat template, for llama.cpp and OpenVINO GenAI.

Llama (SmolLM) and Qwen2 checkpoints only. The `gguf` package quantizes the matrices; norms and biases stay F32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np

from medkit.quantization.gguf_tokenizer import ExportError, write_tokenizer
from medkit.sources import sha256_of
from medkit.stage import DISCLAIMER, atomic_path

if TYPE_CHECKING:  # an engine that only checks a file needs neither, and they are larger than a small model
    import pandas as pd
    from torch import nn

WEIGHT_TYPES = ("F16", "Q8_0", "Q4_1", "Q4_0")  # what the gguf package writes and every reader reads
BIASED = {"llama": (), "qwen2": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
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


def export_gguf(model: nn.Module, tokenizer, path: Path, weight_type: str) -> Path:
    """Write `model` to one GGUF file, whole or not at all, and then its manifest (`check_manifest`) beside it.

    Two-dimensional weights get `weight_type`, one of WEIGHT_TYPES; rows whose length is no multiple of the block (32)
    get F16. Raises ExportError for a model or tokenizer that the file cannot hold.
    """
    config = model.config
    if weight_type not in WEIGHT_TYPES:
        raise ExportError(f"weight type {weight_type!r} cannot be written; choose one of {', '.join(WEIGHT_TYPES)}")
    _refuse_what_the_file_cannot_say(config)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            raise ExportError(f"{name} is quantised already: export the model from before it was quantised")
        _gguf_name(name, config.model_type)  # refuses before anything is written
    with atomic_path(path) as scratch:
        _write_file(model, tokenizer, scratch, gguf.GGMLQuantizationType[weight_type])
    _write_manifest(path, weight_type, config)
    return path


def _write_file(model: nn.Module, tokenizer, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    _write_config(writer, config, kind)
    write_tokenizer(writer, tokenizer, config.vocab_size)
    for name, values in _exported_weights(model):
        stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        if values.ndim > 1 and values.shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
            stored = gguf.GGMLQuantizationType.F16
        writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _refuse_what_the_file_cannot_say(config) -> None:
    """The settings that every reader takes for granted, and that would silently change the answers."""
    if config.model_type not in BIASED:
        raise ExportError(f"model_type {config.model_type!r}: only {' and '.join(BIASED)} checkpoints can be exported")
    if config.rope_parameters["rope_type"] != "default":
        raise ExportError(f"rope_type {config.rope_parameters['rope_type']!r}: only 'default' can be exported")
    if config.hidden_act != "silu":
        raise ExportError(f"hidden_act {config.hidden_act!r}: only 'silu' can be exported")
    if getattr(config, "use_sliding_window", False):
        raise ExportError("use_sliding_window true: only full attention can be exported")
    if config.model_type == "qwen2" and _head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise ExportError(f"head_dim {_head_dim(config)}: a qwen2 file has {config.hidden_size} / heads and no other")


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _exported_weights(model: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF names and float32 values in GGUF's order of rows; a tied head is not stored twice."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if config.model_type != "llama":
        heads = {}  # readers of the other architectures rotate halves, as transformers does
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.detach().float().cpu().numpy()
        for projection, num_heads in heads.items():
            if projection in name:
                values = permute_rotary(values, num_heads)
        yield _gguf_name(name, config.model_type), values


def permute_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (out, in) of a Llama query or key projection from transformers' rotary order (halves) to GGUF's (pairs)."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _gguf_name(name: str, architecture: str) -> str:
    """GGUF's name of a weight. Raises ExportError if a file of this architecture has no place for it."""
    if name in ENDS:
        return ENDS[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    if part not in NAMES or (kind == "bias" and part not in BIASED[architecture]):
        raise ExportError(f"{name}: no place for this weight in a {architecture} file")
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def _write_config(writer: gguf.GGUFWriter, config, kind: gguf.GGMLQuantizationType) -> None:
    writer.add_name("medkit student")
    writer.add_description(DISCLAIMER)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))


# --- the manifest ----------------------------------------------------------------------------------------------------


def manifest_path(path: Path) -> Path:
    """Where the manifest of a GGUF file lies: student.gguf → student.manifest.json."""
    return path.with_suffix(".manifest.json")


def _write_manifest(path: Path, weight_type: str, config) -> None:
    manifest = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "architecture": config.model_type,
        "weight_type": weight_type,
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "source": Path(config.name_or_path).name or None,
        "disclaimer": DISCLAIMER,
    }
    with atomic_path(manifest_path(path)) as scratch:
        scratch.write_text(json.dumps(manifest, indent=1) + "\n")


def check_manifest(path: Path) -> dict:
    """The manifest of a GGUF file that is byte for byte the one exported.

    Raises ExportError if the file was cut short or changed, or if its manifest is missing or damaged.
    """
    try:
        manifest = json.loads(manifest_path(path).read_text())
        size, digest = manifest["bytes"], manifest["sha256"]
    except FileNotFoundError:
        raise ExportError(f"{manifest_path(path)} is missing: copy it together with {path.name}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{manifest_path(path)} is damaged ({error}): export {path.name} again") from error
    if not path.is_file():
        raise ExportError(f"{path} is missing, its manifest is there: copy or export the file again")
    if path.stat().st_size != size:
        raise ExportError(
            f"{path} has {path.stat().st_size:,} bytes, its manifest says {size:,}: copy or export it again"
        )
    if (found := sha256_of(path)) != digest:
        raise ExportError(
            f"{path} was changed: sha256 {found[:12]}…, its manifest says {digest[:12]}…; export it again"
        )
    return manifest


# --- reading the file back -------------------------------------------------------------------------------------------


def measure_file_bytes(path: Path) -> pd.DataFrame:
    """One row per component of a GGUF file: weights, bytes as stored, and the bytes the same weights take in bf16."""
    import pandas as pd

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

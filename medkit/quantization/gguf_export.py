"""The edge file: one GGUF file with weights, tokenizer and chat template, for llama.cpp and OpenVINO GenAI.

Llama (SmolLM) and Qwen2 checkpoints only. The `gguf` package quantizes the matrices; norms and biases stay F32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np

from medkit.quantization.gguf_tokenizer import ExportError, write_tokenizer
from medkit.sources import sha256_of
from medkit.stage import DISCLAIMER, atomic_path

if TYPE_CHECKING:  # large imports, which checking a file does not need
    import pandas as pd
    from torch import nn

WEIGHT_TYPES = ("F16", "Q8_0", "Q4_1", "Q4_0")  # what the gguf package writes and every reader reads
ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}


def export_gguf(model: nn.Module, tokenizer, path: Path, weight_type: str) -> Path:
    """Write `model` to one GGUF file, whole or not at all, and then its manifest (`check_manifest`) beside it.

    Two-dimensional weights get `weight_type`, one of WEIGHT_TYPES; rows whose length is no multiple of the block (32)
    get F16. Raises ExportError for a model or tokenizer that the file cannot hold.
    """
    if weight_type not in WEIGHT_TYPES:
        raise ExportError(f"weight type {weight_type!r} cannot be written; choose one of {', '.join(WEIGHT_TYPES)}")
    _check_config(model.config)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            raise ExportError(f"{name} is quantized already: export the model from before it was quantized")
        _gguf_name(name, model.config)  # raises before anything is written
    with atomic_path(path) as scratch:
        _write_file(model, tokenizer, scratch, gguf.GGMLQuantizationType[weight_type])
    _write_manifest(path, weight_type, model.config)
    return path


def _check_config(config) -> None:
    """Raise ExportError for settings that a GGUF reader does not know and would silently ignore."""
    if config.model_type not in ARCHITECTURES:
        raise ExportError(
            f"model_type {config.model_type!r}: only {' and '.join(ARCHITECTURES)} checkpoints can be exported"
        )
    if config.rope_parameters["rope_type"] != "default":
        raise ExportError(f"rope_type {config.rope_parameters['rope_type']!r}: only 'default' can be exported")
    if config.hidden_act != "silu":
        raise ExportError(f"hidden_act {config.hidden_act!r}: only 'silu' can be exported")
    if getattr(config, "use_sliding_window", False):
        raise ExportError("use_sliding_window true: only full attention can be exported")
    if config.model_type == "qwen2" and _head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise ExportError(f"head_dim {_head_dim(config)}: a qwen2 file can only hold {config.hidden_size} / heads")


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _write_file(model: nn.Module, tokenizer, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
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


def _exported_weights(model: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    """GGUF names and float32 values, rows in GGUF's order. A tied head is not stored twice."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if config.model_type != "llama":
        heads = {}  # readers of other architectures rotate halves, as transformers does
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.detach().float().cpu().numpy()
        for projection, num_heads in heads.items():
            if projection in name:
                values = permute_rotary(values, num_heads)
        yield _gguf_name(name, config), values


def permute_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (out, in) of a Llama query or key projection from transformers' rotary order (halves) to GGUF's (pairs)."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


_name_map = cache(lambda architecture, layers: gguf.get_tensor_name_map(ARCHITECTURES[architecture], layers))


def _gguf_name(name: str, config) -> str:
    """GGUF's name of a weight. Raises ExportError if a file of this architecture has no place for it."""
    names = _name_map(config.model_type, config.num_hidden_layers)
    gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if gguf_name is None or (name.endswith(".bias") and config.model_type == "llama"):
        raise ExportError(f"{name}: a {config.model_type} file has no place for this weight; export a plain checkpoint")
    return gguf_name


# --- the manifest ----------------------------------------------------------------------------------------------------


def manifest_path(path: Path) -> Path:
    """Path of the manifest of a GGUF file: student.gguf → student.manifest.json."""
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
    """The manifest of a GGUF file, if the file is byte for byte the exported one.

    Raises ExportError if the file was cut or changed, or if its manifest is missing or damaged.
    """
    try:
        manifest = json.loads(manifest_path(path).read_text())
        size, digest = manifest["bytes"], manifest["sha256"]
    except FileNotFoundError:
        raise ExportError(f"{manifest_path(path)} is missing: copy it together with {path.name}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{manifest_path(path)} is damaged ({error}): export {path.name} again") from error
    if not path.is_file():
        raise ExportError(f"{path} is missing, but its manifest is there: copy the file, or export it again")
    if path.stat().st_size != size or sha256_of(path) != digest:
        raise ExportError(f"{path} is not the file of its manifest, it was cut or changed: copy or export it again")
    return manifest


# --- reading the file back -------------------------------------------------------------------------------------------


def measure_file_bytes(path: Path) -> pd.DataFrame:
    """One row per component of a GGUF file: `weights`, `bytes` in the file, and `bf16_bytes` of the same weights."""
    import pandas as pd

    parts = {"norm": "norms", "attn": "attention", "ffn": "mlp", ".output.weight": "head"}
    rows = []
    for tensor in gguf.GGUFReader(path).tensors:
        component = next((c for part, c in parts.items() if part in f".{tensor.name}"), "embeddings")
        rows.append((component, int(tensor.n_elements), int(tensor.n_bytes), 2 * int(tensor.n_elements)))
    table = pd.DataFrame(rows, columns=["component", "weights", "bytes", "bf16_bytes"])
    return table.groupby("component", as_index=False).sum()


def measure_rounding(before: nn.Parameter, after: nn.Parameter, weight_type: str) -> tuple[float, float, float]:
    """Bits per weight of a GGUF type, relative error of rounding `after` to it, and surviving share of the update.

    The share is the projection of the rounded update on the update after − before: 1 is all of it, 0 is nothing. If
    `before` lies on the levels of the same type and the update is smaller than a step, rounding removes the update.
    """
    kind = gguf.GGMLQuantizationType[weight_type]
    start, end = (w.detach().float().cpu().numpy() for w in (before, after))
    rounded = gguf.dequantize(gguf.quantize(end, kind), kind).reshape(end.shape)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    update = end - start
    share = np.vdot(rounded - start, update) / np.vdot(update, update)
    return 8 * size / block, float(np.linalg.norm(rounded - end) / np.linalg.norm(end)), float(share)


def largest_relative_error(model: nn.Module, path: Path) -> float:
    """The largest |difference| between a weight in the GGUF file and in the model, over the range of its block of 32.

    Raises ExportError if a weight of the model is missing from the file.
    """
    stored, largest = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}, 0.0
    for name, values in _exported_weights(model):
        if name not in stored:
            raise ExportError(f"{path}: {name} is missing; export the file again")
        read = gguf.dequantize(stored[name].data, stored[name].tensor_type).reshape(values.shape)
        error = np.abs(read - values).reshape(-1, 32 if values.size % 32 == 0 else values.size)
        blocks = values.reshape(error.shape)
        largest = max(largest, float((error / (blocks.max(axis=1) - blocks.min(axis=1) + 1e-12)[:, None]).max()))
    return largest

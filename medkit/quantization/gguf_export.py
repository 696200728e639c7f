"""The edge file: one GGUF file with weights, tokenizer and chat template, for llama.cpp.

Llama (SmolLM), Qwen2 and Qwen3 checkpoints only, and the text models of Gemma 3. The `gguf` package quantizes the
matrices; norms and biases stay F32.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from medkit.quantization.gguf_blocks import Blocks
from medkit.quantization.gguf_readers import write_reader_files
from medkit.quantization.gguf_tokenizer import ExportError, write_tokenizer
from medkit.quantization.memory_ledger import head_dim, make_table
from medkit.stage import DISCLAIMER, atomic_path, reading, sha256_of, write_text
from medkit.variants import TASKS

MANIFEST = ".manifest.json"  # beside the file
IMATRIX = ".imatrix.gguf"  # beside the file: llama.cpp's importance matrix
LORA = "default"  # the name that PEFT gives an adapter
LARGEST_DIFFERENCE = 0.05  # float16 and bfloat16 round weights and sums
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}  # fmt: skip
GEMMA = "hidden_activation layer_types rope_parameters head_dim query_pre_attn_scalar attention_bias "
GEMMA += "attn_logit_softcapping final_logit_softcapping use_bidirectional_attention"
NOT_IN_FILE = {  # settings that llama.cpp or transformers does not read from a file
    "llama": ["hidden_act"], "qwen2": ["hidden_act", "use_sliding_window"],
    "qwen3": ["hidden_act", "use_sliding_window", "head_dim"], "gemma3_text": GEMMA.split(),
}  # fmt: skip


def export_gguf(
    model: nn.Module,
    tokenizer,
    path: Path,
    weight_type: str = "F16",
    blocks: Mapping[str, Blocks] | None = None,
    dataset: str = "calibration examples",
) -> Path:
    """Write `model` to one GGUF file, atomically, and then its manifest (`check_manifest`) beside it.

    Beside it stand the files for other programs too (`gguf_readers`); scores of an earlier file (TASKS) are removed.

    The weights of modules in `blocks` are written with their codes and scales as they are. Other matrices are rounded
    to the nearest of `weight_type` (F16, Q8_0, Q5_0, Q4_0); rows that are not whole blocks (of 32) get F16. For blocks
    that were fitted to inputs, of `dataset`, the importance matrix is written beside the file, which names it. Raises
    ExportError for a model or tokenizer that the file cannot hold.
    """
    check_export(model, tokenizer)
    blocks, imatrix = blocks or {}, path.with_suffix(IMATRIX)
    fitted = {name: module for name, module in blocks.items() if module.tokens}
    imatrix.unlink(missing_ok=True)
    if fitted:
        with atomic_path(imatrix) as scratch:
            _write_imatrix(model, scratch, fitted, dataset)
    facts = {"file": imatrix.name, "dataset": dataset, "entries_count": len(fitted), "chunks_count": 1}
    with atomic_path(path) as scratch:
        kind = gguf.GGMLQuantizationType[weight_type]
        _write_file(model, tokenizer, scratch, kind, blocks, facts if fitted else {})
    path.with_suffix(TASKS).unlink(missing_ok=True)
    write_reader_files(path, tokenizer)
    _write_manifest(path, model.config)
    return path


def check_export(model: nn.Module, tokenizer) -> None:
    """Raise ExportError for a model or tokenizer that the file cannot hold. The model's weights are not read."""
    _check_config(model.config)
    _gguf_names(model)
    write_tokenizer(_start(model.config), tokenizer, model.config.vocab_size)


def _check_config(config) -> None:
    """Raise ExportError for settings that a GGUF reader does not know and would silently ignore."""
    if config.model_type not in ARCHITECTURES:
        raise ExportError(
            f"model_type {config.model_type!r}: only {', '.join(ARCHITECTURES)} checkpoints can be exported"
        )
    _rope_factors(config)
    read = type(config)(num_hidden_layers=config.num_hidden_layers, rope_theta=_rope(config)["rope_theta"])
    for name in NOT_IN_FILE[config.model_type]:
        value, usual = getattr(config, name), getattr(read, name)
        if value != usual:
            raise ExportError(f"{name} {value!r}: a {config.model_type} file is read with {usual!r}")
    if config.model_type == "qwen2" and head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise ExportError(f"head_dim {head_dim(config)}: a qwen2 file can only hold {config.hidden_size} / heads")


def _rope(config) -> dict:
    """The rotary positions, of Gemma 3 those of its layers with full attention."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _rope_factors(config) -> np.ndarray | None:
    """By how much each rotary frequency is divided for long contexts; None where none is.

    Raises ExportError for another kind of scaling, if it depends on the length of the text, or if attention is scaled.
    """
    rope = _rope(config)
    if rope["rope_type"] == "default":
        return None
    if config.model_type != "llama" or rope["rope_type"] not in ("llama3", "longrope"):
        raise ExportError(f"rope_type {rope['rope_type']!r}: only 'default', and Llama's 'llama3', can be exported")
    frequencies, attention = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    if attention != 1 or rope.get("short_factor") != rope.get("long_factor"):
        raise ExportError("rope_type 'longrope' with factors that depend on the length: a GGUF file holds one list")
    places = torch.arange(0, head_dim(config), 2) / head_dim(config)
    return (rope["rope_theta"] ** -places / frequencies).float().numpy()


def _write_imatrix(model: nn.Module, path: Path, fitted: Mapping[str, Blocks], dataset: str) -> None:
    """Σ x² of the inputs of each matrix, by column, and the tokens that it sums, as one chunk: as `llama-imatrix` does.

    Inputs are GPTQ's, which come through the rounded layers before; those of `llama-imatrix` come through F16.
    """
    writer, names = _start(model.config), _gguf_names(model)
    writer.add_type(gguf.GGUFType.IMATRIX)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, [dataset])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, 1)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, next(iter(fitted.values())).tokens)
    for name, module in fitted.items():
        writer.add_tensor(f"{names[f'{name}.weight']}.in_sum2", module.squares.cpu().numpy())
        writer.add_tensor(f"{names[f'{name}.weight']}.counts", np.float32([module.tokens]))
    _write(writer, path)


def _write_file(
    model: nn.Module,
    tokenizer,
    path: Path,
    kind: gguf.GGMLQuantizationType,
    blocks: Mapping[str, Blocks],
    imatrix: Mapping[str, str | int],
) -> None:
    config, names = model.config, _gguf_names(model)
    writer = _start(config)
    for name, value in imatrix.items():  # as `llama-quantize` writes them
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(f"quantize.imatrix.{name}", value)
    writer.add_name("medkit student")
    writer.add_description(DISCLAIMER)
    kinds = [gguf.GGMLQuantizationType[b.kind] for b in blocks.values()] or [kind]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{max(kinds, key=kinds.count).name}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_rope_dimension_count(head_dim(config))
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    write_tokenizer(writer, tokenizer, config.vocab_size)
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, gguf_name in names.items():
        if name.removesuffix(".weight") in blocks:
            module = blocks[name.removesuffix(".weight")]
            values, stored = module.pack(), gguf.GGMLQuantizationType[module.kind]
        else:
            values, stored = model.get_parameter(name).detach().float().cpu().numpy(), gguf.GGMLQuantizationType.F32
            if values.ndim > 1:
                fits = values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
                stored = kind if fits else gguf.GGMLQuantizationType.F16
            values = gguf.quantize(values, stored)
        writer.add_tensor(gguf_name, _as_read(name, values, config), raw_dtype=stored)
    _write(writer, path)


def _as_read(name: str, rows: np.ndarray, config) -> np.ndarray:
    """A weight as llama.cpp wants it.

    Rows of Llama's queries and keys go from transformers' rotary order (halves) to GGUF's (pairs). Gemma 3 multiplies
    by one plus a norm's weight; the file holds the sum.
    """
    if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
        return rows + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or config.model_type != "llama":
        return rows
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _gguf_names(model: nn.Module) -> dict[str, str]:
    """GGUF's name of each weight; a tied head is none. Raises ExportError for a weight that the file cannot hold."""
    kind, names = model.config.model_type, {}
    known = gguf.get_tensor_name_map(ARCHITECTURES[kind], model.config.num_hidden_layers)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            raise ExportError(f"{name} is quantized already: export the model from before it was quantized")
        names[name] = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if names[name] is None or (name.endswith(".bias") and kind == "llama"):
            raise ExportError(f"{name}: a {kind} file has no place for this weight; export a plain checkpoint")
    return names


# --- an adapter beside the file --------------------------------------------------------------------------------------


def export_adapter(model: PeftModel, path: Path) -> Path:
    """Write the LoRA adapter of `model` to a GGUF file of its own, in float16, and then its manifest beside it.

    llama.cpp adds s·B·A to the base model's file for each request that asks for it. It computes s = alpha / rank, so
    the file's alpha is s·rank, also where rsLoRA made s. Raises ExportError for DoRA, whose norms the file cannot hold,
    and for a base model that cannot be exported.
    """
    base = model.get_base_model()
    _check_config(base.config)
    writer = _start(base.config)
    known = gguf.get_tensor_name_map(ARCHITECTURES[base.config.model_type], base.config.num_hidden_layers)
    for name, layer in ((n, m) for n, m in base.named_modules() if isinstance(m, LoraLayer)):
        if layer.use_dora[LORA]:
            raise ExportError("lora.adapter.variant 'dora' has norms, which a GGUF adapter cannot hold: choose 'lora'")
        place, scale = known.get_name(f"{name}.weight", try_suffixes=(".weight",)), layer.scaling[LORA] * layer.r[LORA]
        a, b = (factor[LORA].weight.detach().half().cpu().numpy() for factor in (layer.lora_A, layer.lora_B))
        writer.add_tensor(f"{place}.lora_a", a)
        writer.add_tensor(f"{place}.lora_b", _as_read(f"{name}.weight", b, base.config))
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scale)
    writer.add_description(DISCLAIMER)
    with atomic_path(path) as scratch:
        _write(writer, scratch)
    _write_manifest(path, base.config)
    return path


def _start(config) -> gguf.GGUFWriter:
    return gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])


def _write(writer: gguf.GGUFWriter, path: Path) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- the manifest ----------------------------------------------------------------------------------------------------


def _write_manifest(path: Path, config) -> None:
    manifest = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "architecture": config.model_type,
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "source": Path(config.name_or_path).name or None,
        "disclaimer": DISCLAIMER,
    }
    write_text(path.with_suffix(MANIFEST), json.dumps(manifest, indent=1) + "\n")


def check_manifest(path: Path) -> dict:
    """The manifest of a GGUF file, if the file is byte for byte the exported one.

    Raises ExportError if the file was cut or changed, or if its manifest is missing or damaged.
    """
    with reading(path.with_suffix(MANIFEST), ExportError, f"copy it together with {path.name}, or export that again"):
        manifest = json.loads(path.with_suffix(MANIFEST).read_text())
        digest = manifest["sha256"]
    if not path.is_file() or sha256_of(path) != digest:
        raise ExportError(f"{path} is missing, cut or changed: copy the file of its manifest, or export it again")
    return manifest


# --- reading the file back -------------------------------------------------------------------------------------------


def check_logits(model: nn.Module, read: nn.Module, input_ids: Sequence[int], blocks: Mapping[str, Blocks]) -> float:
    """How far the logits of a file that was read back are from those of its model with the weights of `blocks`.

    The largest difference at any position and token, divided by the standard deviation of the logits. Raises
    ExportError above LARGEST_DIFFERENCE: the file differs from the model.
    """
    ids = torch.tensor([list(input_ids)], device=model.device)
    weights = {f"{name}.weight": b.decode().to(model.device, model.dtype) for name, b in blocks.items()}
    with torch.inference_mode():
        expected = torch.func.functional_call(model, weights, (ids,)).logits.float()
        error = (read(ids.to(read.device)).logits.float().to(expected.device) - expected).abs().max() / expected.std()
    if not error <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"the exported file's logits differ by {error:.2g} standard deviations from its model's (at most "
            f"{LARGEST_DIFFERENCE}): the file differs from the model; open an issue and name the checkpoint"
        )
    return float(error)


def measure_file_bytes(path: Path) -> pd.DataFrame:
    """One row per component of a GGUF file: `weights`, `bytes` in the file, and `bf16_bytes` of the same weights."""
    parts = {"norm": "norms", "attn": "attention", "ffn": "mlp", ".output.weight": "head"}
    rows = []
    for tensor in gguf.GGUFReader(path).tensors:
        component = next((c for part, c in parts.items() if part in f".{tensor.name}"), "embeddings")
        rows.append((component, int(tensor.n_elements), int(tensor.n_bytes), 2 * int(tensor.n_elements)))
    return make_table(rows)

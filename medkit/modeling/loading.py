"""Tokenizer and model from a params section: hub, local folder, or a GGUF file converted once to safetensors.

safetensors only, remote code never. What is done to a model afterwards (adapters, plans) is for the modules above.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging as transformers_logging

from medkit import sources
from medkit.params import ModelParams, ModelsParams
from medkit.stage import MedkitError, atomic_path

transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
logging.getLogger("transformers").setLevel(logging.ERROR)


class ModelError(MedkitError):
    """A model that cannot be used as asked; the message names it and the cure."""


def pick_device(requested: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ModelError when CUDA is asked for and absent."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise ModelError("models.device is 'cuda', but torch sees no CUDA device; use 'auto' or 'cpu'")
    return torch.device("cuda" if requested != "cpu" and torch.cuda.is_available() else "cpu")


def pick_attention(requested: str, device: torch.device) -> tuple[str, str]:
    """The attention implementation to load with, and the reason in one sentence."""
    if requested != "auto":
        return requested, "asked for in the params"
    if device.type != "cuda":
        return "sdpa", "FlashAttention needs CUDA; SDPA is the fused kernel of this device"
    if importlib.util.find_spec("flash_attn") is None:
        return "sdpa", "CUDA without the flash-attn package; SDPA uses its own flash kernel where shapes allow"
    return "flash_attention_2", "CUDA and flash-attn are there"


def local_folder(section: ModelParams) -> Path:
    """A folder with safetensors and tokenizer for the section's source, converting a GGUF file on first use."""
    path = sources.fetch(section.source)
    if path.is_file() and path.suffix == ".gguf":
        return _converted(path)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json; a model is a folder in transformers' format or a .gguf file")
    return path


def _converted(gguf: Path) -> Path:
    """The GGUF model as float32 safetensors with its tokenizer, in the cache; takes up to a minute once."""
    target = sources.cache_root() / "converted" / f"{gguf.stem}-{sources.sha256_of(gguf)[:12]}"
    with sources.building(target) as scratch:
        if scratch is not None:
            where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
            model = AutoModelForCausalLM.from_pretrained(
                **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
            model.save_pretrained(scratch)
            AutoTokenizer.from_pretrained(**where).save_pretrained(scratch)
    return target


def load_tokenizer(folder: Path):
    """The folder's tokenizer; it must know how an answer ends."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder}: the tokenizer has no end token, so answers would never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(folder: Path, models: ModelsParams, keep: Sequence[int] = (), **quantization) -> nn.Module:
    """A causal language model in eval mode on the params' device, in their dtype and attention implementation.

    `folder` may be a GGUF file, which is dequantised. `keep` are the decoder layers to keep (empty: all). Further
    keywords go to `from_pretrained`.
    """
    device = pick_device(models.device)
    attention, _ = pick_attention(models.attention, device)
    if folder.suffix == ".gguf":
        quantization = {"gguf_file": folder.name, "quantization_config": GgufConfig(dequantize=True)}
        folder = folder.parent
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, models.dtype),
        attn_implementation=attention,
        device_map={"": device},
        **quantization,
    )
    model.generation_config = GenerationConfig()  # answers are greedy here, whatever the checkpoint recommends
    return keep_layers(model, keep).eval()


def make_toy_model(vocab_size: int = 64) -> nn.Module:
    """A two-layer Llama with random weights (from torch's seed): the real code path, and no knowledge."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def keep_layers(model: nn.Module, keep: Sequence[int]) -> nn.Module:
    """Cut the decoder down to the layers in `keep`, in place; `[]` keeps all. Returns the model.

    Layers are renumbered, since each looks up its own place in the key-value cache by number.
    """
    if len(keep):
        layers = model.get_decoder().layers
        if min(keep) < 0 or max(keep) >= len(layers) or list(keep) != sorted(set(keep)):
            raise ModelError(f"layers {list(keep)}: give each once, in order, within 0…{len(layers) - 1}")
        model.get_decoder().layers = nn.ModuleList(layers[i] for i in keep)
        for number, layer in enumerate(model.get_decoder().layers):
            layer.self_attn.layer_idx = number
        config = model.config.get_text_config()
        config.num_hidden_layers = len(keep)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in keep]
    return model


def save_model(model: nn.Module, tokenizer, folder: Path) -> Path:
    """Write safetensors, config and tokenizer whole or not at all."""
    with atomic_path(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    return folder

"""Load tokenizer and model from the hub, a folder or a GGUF file, and save them: safetensors only, no remote code."""

import importlib.util
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from gguf import GGUFReader
from torch import nn
from transformers import (
    AutoConfig,
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
from medkit.stage import MedkitError, atomic_path, reading, sha256_of

# prefixes of PEFT, torch.compile, FSDP and DDP
WRAPPER = re.compile(r"(?:^|\.)((?:base_model\.model|_orig_mod|_fsdp_wrapped_module|module)\.)")


NOT_READ = {  # settings of a GGUF file that transformers 5.23 drops, and the values for which that changes nothing
    "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0,
    "attention.sliding_window_pattern": 6, "rope.freq_base_swa": 10_000.0,  # of Gemma 3
}  # fmt: skip
AGAIN = "copy or download the whole checkpoint again"
MANY_LAYERS = 1000  # no model has more; transformers would build a damaged config's 2³¹, one by one


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside the block transformers shows errors only, and no progress bars; afterwards its settings are as before."""
    logger, bars = logging.getLogger("transformers"), transformers_logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT asks for it with every adapter
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


# --- device and attention ---


def pick_device(requested: str) -> torch.device:
    """The device to use: `auto` is CUDA if there is one. Raises MedkitError if CUDA is requested and absent."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise MedkitError("models.device is 'cuda', but torch finds no CUDA device; use 'auto' or 'cpu'")
    return torch.device("cuda" if requested != "cpu" and torch.cuda.is_available() else "cpu")


def pick_attention(requested: str, device: torch.device, dtype: str) -> tuple[str, str]:
    """The attention implementation for weights of this dtype, and the reason in one sentence."""
    if dtype == "float32" and device.type == "cuda" and requested not in ("eager", "sdpa"):
        return "sdpa", "FlashAttention takes no float32"
    if requested != "auto":
        return requested, "asked for in the params"
    if device.type != "cuda":
        return "sdpa", "FlashAttention needs CUDA; SDPA is the fused kernel of this device"
    if importlib.util.find_spec("flash_attn") is None:
        return "sdpa", "CUDA without the flash-attn package; SDPA uses its own flash kernel where shapes allow"
    return "flash_attention_2", "CUDA and flash-attn are there"


def pick_bf16(requested: bool | str, device: torch.device) -> bool:
    """Whether a training computes in bfloat16; `auto`: if the device has instructions for it. Emulated, it is slow."""
    if requested != "auto":
        return requested
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last one is of ARM


# --- load and save ---


def local_folder(section: ModelParams) -> Path:
    """The folder with safetensors and tokenizer of the section's source; a GGUF file is converted on first use."""
    path = sources.fetch(section.source)
    if path.is_file() and path.suffix == ".gguf":
        return _convert_gguf(path)
    if not (path / "config.json").is_file():
        raise MedkitError(f"{path}: no config.json; a model is a folder in transformers' format or a .gguf file")
    return path


def _convert_gguf(gguf: Path) -> Path:
    """The GGUF model as float32 safetensors with its tokenizer, in the cache; takes up to a minute once."""
    target = sources.cache_root() / "converted" / f"{gguf.stem}-{sha256_of(gguf)[:12]}"
    with sources.building(target) as scratch, quiet_transformers():
        if scratch is not None:
            read_weights(AutoModelForCausalLM, gguf, dtype=torch.float32).save_pretrained(scratch)
            with reading(gguf, MedkitError, AGAIN, "its tokenizer cannot be loaded"):
                AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(scratch)
    return target


def read_weights(auto_class, path: Path, other_heads: bool = False, **options) -> nn.Module:
    """`auto_class.from_pretrained` of a folder or GGUF file, where every weight of the model comes from the file.

    `other_heads`: the file may hold more than the model, as an encoder's with a head for another task. Raises
    MedkitError for weights that are missing, unexpected, of another shape, or untied where the config says tied.
    """
    place, factors = {"pretrained_model_name_or_path": path, "use_safetensors": True}, None
    if path.suffix == ".gguf":
        factors = _check_gguf(path)
        place = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        options |= {"quantization_config": GgufConfig(dequantize=True)}
    elif not any(path.glob("*.safetensors")):
        pickled = "only a pickle, which can run any code" if any(path.glob("*.bin")) else "no weights"
        raise MedkitError(f"{path}: {pickled}; give a folder with the model's weights as .safetensors")
    with reading(path, MedkitError, AGAIN, "cannot be loaded"), quiet_transformers():
        # it is given on, because a GGUF file of 152,000 tokens takes ten seconds to be read
        config = AutoConfig.from_pretrained(**place, trust_remote_code=False)
        if factors:  # which transformers does not read
            config.rope_parameters |= {
                "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
                "original_max_position_embeddings": config.max_position_embeddings,
            }  # fmt: skip
        if getattr(config.get_text_config(), "num_hidden_layers", 0) > MANY_LAYERS:
            raise ValueError(f"its config says {config.get_text_config().num_hidden_layers} layers")
        options |= {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, report = auto_class.from_pretrained(**place, **options, trust_remote_code=False)
    unexpected = () if other_heads else report["unexpected_keys"]
    mismatched = [f"{name} {tuple(stored)}" for name, stored, _ in report["mismatched_keys"]]
    faults = {"missing": report["missing_keys"], "unexpected": unexpected, "of another shape": mismatched}
    if any(faults.values()):
        listed = ", ".join(f"{fault} {_first(names)}" for fault, names in faults.items() if names)
        prefix = next(filter(None, map(WRAPPER.search, sorted(report["unexpected_keys"]))), None)
        cure = f"strip {prefix[1]!r} from the tensors' names" if prefix else "give the model's own, whole checkpoint"
        raise MedkitError(f"{path}: the weights are not those of its config: {listed}; {cure}")
    head = model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        raise MedkitError(
            f"{path}: tie_word_embeddings is true, but the head has weights of its own; write false in config.json"
        )
    return model


def _first(names: Collection[str]) -> str:
    listed = ", ".join(sorted(names)[:3])
    return listed if len(names) <= 3 else f"{listed}, … ({len(names)})"


def _check_gguf(path: Path) -> list[float] | None:
    """The file's factors of rotary frequencies.

    Raises MedkitError if it is damaged, a part of a model, or has settings that transformers would drop.
    """
    with reading(path, MedkitError, "copy or download it again", "not a whole GGUF file"):
        reader = _WholeReader(path)
        parts = reader.get_field("split.count")
        is_part = parts and parts.contents() > 1
        architecture = reader.get_field("general.architecture").contents()
        fields = {name: reader.get_field(f"{architecture}.{name}") for name in NOT_READ}
        settings = {name: field.contents() for name, field in fields.items() if field}
        dropped = [f"{name} {value!r}" for name, value in settings.items() if value != NOT_READ[name]]
    if re.search(r"-\d{5}-of-(?!00001)\d{5}\.gguf$", path.name) or is_part:
        raise MedkitError(
            f"{path}: one part of a split file; join its parts with llama.cpp's `llama-gguf-split --merge`"
        )
    if dropped:
        raise MedkitError(
            f"{path}: {', '.join(dropped)}: transformers drops this and loads another model; give its folder with "
            f"safetensors in place of the file"
        )
    return next((tensor.data.tolist() for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)


class _WholeReader(GGUFReader):
    """The end of the file is an error: its base would read a list of 2⁶⁴ numbers from no bytes at all, one by one."""

    def _get(self, offset, dtype, count=1, override_order=None):
        values = super()._get(offset, dtype, count, override_order)
        if len(values) < count:
            raise ValueError("it ends too early")
        return values


def load_tokenizer(folder: Path):
    """The folder's tokenizer, with `end_token_ids` of its generation config; MedkitError without an end token."""
    ends = None
    fault = "no tokenizer can be loaded"
    with reading(folder, MedkitError, "copy its files beside the weights", fault), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if (folder / "generation_config.json").is_file():
            ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if tokenizer.eos_token_id is None:
        raise MedkitError(f"{folder}: the tokenizer has no end token, so answers never end; add `eos_token` to it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.end_token_ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return tokenizer


def load_model(folder: Path, models: ModelsParams, keep: Sequence[int] = (), **quantization) -> nn.Module:
    """A causal language model in eval mode, on the params' device, in their dtype and attention implementation.

    A model that is larger than the free memory of one GPU is spread by layers over all of them, and over the CPU.

    folder: may be a GGUF file, which is dequantised. keep: the decoder layers to keep (empty: all). quantization: more
    keywords for `from_pretrained`.
    """
    device = pick_device(models.device)
    attention, _ = pick_attention(models.attention, device, models.dtype)
    options = {"dtype": getattr(torch, models.dtype), "attn_implementation": attention}
    options["device_map"] = {"": device} if _fits(folder, device) else "auto"
    model = read_weights(AutoModelForCausalLM, folder, **options, **quantization)
    # greedy, whatever the checkpoint recommends
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return keep_layers(model, keep).eval()


def _fits(folder: Path, device: torch.device) -> bool:
    """Whether the weights, as they are stored, fit the device's free memory; of the CPU this is not asked."""
    stored_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return device.type != "cuda" or stored_bytes < torch.cuda.mem_get_info(device)[0]


def load_skeleton(section: ModelParams, models: ModelsParams) -> nn.Module:
    """The model without its weights: their names and shapes are checked as `load_model` does, none is read.

    Raises MedkitError, too, for what is not a dense decoder with plain weights.
    """
    options = {"dtype": getattr(torch, models.dtype), "device_map": "meta"}
    if models.attention in ("eager", "sdpa"):
        options["attn_implementation"] = models.attention
    model = read_weights(AutoModelForCausalLM, folder := local_folder(section), **options)
    config, layers = model.config, getattr(model.get_decoder(), "layers", None)
    quantized = getattr(config, "quantization_config", None)
    if quantized or not layers or any(weight.dim() > 2 for weight in model.parameters()):
        what = "its weights are quantized" if quantized else f"{config.model_type!r} is no dense decoder"
        raise MedkitError(f"{folder}: {what}; choose a plain checkpoint of a model like Llama, Qwen3 or Gemma 3")
    return keep_layers(model, section.keep_layers)


def save_model(model: nn.Module, tokenizer, folder: Path) -> Path:
    """Write safetensors, config and tokenizer, atomically; returns the folder."""
    with atomic_path(folder) as scratch, quiet_transformers():
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    return folder


def make_toy_model(vocab_size: int = 64) -> nn.Module:
    """A two-layer Llama with random weights from torch's seed, to try code on."""
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def keep_layers(model: nn.Module, keep: Sequence[int]) -> nn.Module:
    """The model with only the decoder layers in `keep`, changed in place; `[]` keeps all."""
    if len(keep):
        layers = model.get_decoder().layers
        if min(keep) < 0 or max(keep) >= len(layers) or list(keep) != sorted(set(keep)):
            raise MedkitError(f"layers {list(keep)}: give each once, in order, within 0…{len(layers) - 1}")
        model.get_decoder().layers = nn.ModuleList(layers[i] for i in keep)
        for number, layer in enumerate(model.get_decoder().layers):
            layer.self_attn.layer_idx = number  # by which it finds its part of the key-value cache
        config = model.config.get_text_config()
        config.num_hidden_layers = len(keep)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in keep]
    return model

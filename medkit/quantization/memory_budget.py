"""Which plan fits a device: total memory of the usual recipes from a model's shapes alone, and the best under a budget.

Nothing is loaded and nothing measured, so what a recipe costs in accuracy is not known here: the best is the one that
keeps most bits per weight. Plans fitted to a model by its measured sensitivity are for `plans`; how many bytes they may
take is said here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from medkit.params import ParamsError
from medkit.quantization import plans
from medkit.quantization.activation_memory import activation_bytes
from medkit.quantization.memory_ledger import FP8_BYTES, Weight, kv_cache_bytes, model_shapes, plan_bytes, windows

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
BF16_BYTES = 2
KV_BYTES = {"bf16": BF16_BYTES, "fp8": FP8_BYTES}
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
EXTENDING = ("linear", "dynamic", "yarn")  # kinds of rotary embeddings whose factor lengthens the context
LLAMA_70B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN2_7B = {
    "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip
KNOWN = {
    "DeepSeek-R1-Distill-Qwen-7B": QWEN2_7B,
    "DeepSeek-R1-Distill-Llama-70B": LLAMA_70B,
    "Llama-3.3-70B": LLAMA_70B,
}
"""Shapes of the paper's student and teacher, for machines without their files."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of a recipe while it runs, by what takes them, and the bits each weight gets, its share of scales included.

    `activations` is the larger of prefill and decode step.
    """

    recipe: str
    kv_format: str
    bits_per_weight: float
    weights: int
    state: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.state + self.kv_cache + self.activations


def parse_size(text: str) -> tuple[float, str]:
    """`"8GB"` → (8.0, "GB"), which is 8 · 10⁹ bytes; GiB and its kin are powers of 1024. Keys of `UNITS`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): unit for unit in UNITS}
    if not found or found[2].lower() not in units or not float(found[1]):
        raise ParamsError(
            f"--budget {text!r}: write a size above zero with its unit, e.g. 8GB (10⁹ bytes) or 8GiB (2³⁰)"
        )
    return float(found[1]), units[found[2].lower()]


def read_config(model: str) -> PreTrainedConfig:
    """The text model's config from a config.json, its folder, or a name in `KNOWN` (an owner before it is ignored).

    Never asks a network. Raises ParamsError for anything else, and for models that are not dense decoders.
    """
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    name = model.rpartition("/")[2]
    if not path.is_file() and name not in KNOWN:
        raise ParamsError(
            f"--model {model!r}: neither a config.json, nor a folder with one, nor a name that is known without: "
            f"{', '.join(KNOWN)}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else KNOWN[name]
        config = AutoConfig.for_model(**values).get_text_config()
    except (KeyError, ValueError, TypeError, OSError, StrictDataclassError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error  # a KeyError puts quotes around its sentence
        raise ParamsError(f"--model {model!r}: {path} is no model's config: {' '.join(str(reason).split())}") from error
    if config.model_type not in DENSE:
        raise ParamsError(
            f"--model {model!r}: {config.model_type!r} is not one of the decoders known: {', '.join(DENSE)}"
        )
    return config


def preset_schemes(shapes: list[Weight]) -> dict[str, dict[str, str]]:
    """Recipe → scheme per module, those that are kept left out.

    `nf4` is what the library does by default: embeddings and head stay as they are.
    """
    matrices = {weight.module: weight.shape for weight in shapes if len(weight.shape) == 2}
    named = [plans.paper_plan(matrices), *(plans.nf4_plan(matrices, ends) for ends in ("unquantized", "int8", "nf4"))]
    whole = {"bf16": {}, "int8": dict.fromkeys(matrices, "int8")}
    return whole | {plan.name: {m: s for m, s in plan.schemes.items() if s != "unquantized"} for plan in named}


def last_position(config: PreTrainedConfig) -> int:
    """How many positions the model has, those included by which its rotary embeddings extend what it was trained on.

    Rotary embeddings that differ between layers (Gemma 3) are extended already in what the config says.
    """
    rope, trained = config.rope_parameters or {}, config.max_position_embeddings
    if rope.get("rope_type") not in EXTENDING:
        return trained
    return max(trained, int(rope["factor"] * rope.get("original_max_position_embeddings", trained)))


def estimate(config: PreTrainedConfig, batch: int, context: int) -> list[Estimate]:
    """Every recipe with the key-value cache in bf16 and, where transformers has it, in fp8; most bits first."""
    if context > last_position(config):
        raise ParamsError(f"--context {context}: the model's positions end at {last_position(config)}")
    shapes = model_shapes(config)
    formats = ["bf16"] if any(windows(config)) else ["bf16", "fp8"]
    found = [
        estimate_plan(config, recipe, schemes, batch, context, kv_format, shapes)
        for recipe, schemes in preset_schemes(shapes).items()
        for kv_format in formats
    ]
    return sorted(found, key=lambda e: (-e.bits_per_weight, e.kv_format))


def estimate_plan(
    config: PreTrainedConfig,
    name: str,
    schemes: Mapping[str, str],
    batch: int,
    context: int,
    kv_format: str = "bf16",
    shapes: list[Weight] | None = None,
) -> Estimate:
    """One plan's memory, by `schemes` (module → scheme); what is not quantised is in bf16."""
    shapes = model_shapes(config) if shapes is None else shapes
    size = KV_BYTES[kv_format]
    table = plan_bytes(shapes, schemes, BF16_BYTES).set_index("component")
    state = int(table.bytes.get("quantization state", 0))
    weights = int(table.bytes.sum()) - state
    bits = 8 * (weights + state) / int(table.weights.sum())
    cache = kv_cache_bytes(config, batch, context, size)
    passing = activation_bytes(config, shapes, schemes, batch, context, BF16_BYTES, size)
    return Estimate(name, kv_format, bits, weights, state, cache, max(passing.values()))


def weight_budget(config: PreTrainedConfig, total_bytes: float, batch: int, context: int) -> int:
    """Of a total, what is left for the matrices and their scales beside a full bf16 cache, activations, norms, biases.

    Activations are those of the plan that has most of them: all matrices in NF4, which are decoded whole before use.
    A plan that fits the room therefore fits the total. Raises ParamsError where not even that plan fits.
    """
    shapes = model_shapes(config)
    all_nf4 = {weight.module: "nf4" for weight in shapes if len(weight.shape) == 2}
    least = estimate_plan(config, "nf4_all", all_nf4, batch, context, shapes=shapes)
    if least.total > total_bytes:
        raise ParamsError(
            f"quantization.memory.total_mb is {total_bytes / 1e6:g}, with all in NF4 the model takes "
            f"{least.total / 1e6:.1f} MB at batch {batch} and context {context}; raise it, or lower the context"
        )
    kept = sum(BF16_BYTES * weight.count for weight in shapes if weight.module not in all_nf4)
    return int(total_bytes) - least.kv_cache - least.activations - kept


def choose(estimates: list[Estimate], budget_bytes: float) -> Estimate | None:
    """The first that fits, so the one with most bits per weight, and of these the one with the wider cache."""
    return next((e for e in estimates if e.total <= budget_bytes), None)

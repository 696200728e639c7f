"""Which plan fits the memory of a device: computed from the shapes of a model, without its weights.

Nothing is measured here, so the cost of a plan in accuracy is unknown: the best preset plan is the one with the most
bits per weight. `plans.budget_plan` chooses by measured sensitivity.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import AutoConfig, DynamicCache, PreTrainedConfig

from medkit.params import ParamsError
from medkit.quantization import plans
from medkit.quantization.memory_ledger import Weight, activation_bytes, kv_cache_bytes, model_shapes, plan_bytes
from medkit.quantization.plans import Plan
from medkit.stage import reading

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
BF16_BYTES = 2
DENSE_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
KNOWN_MODELS = yaml.safe_load(Path(__file__).with_name("known_models.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Estimate:
    """Bytes of a model under a plan while it runs, in bf16 where it is not quantized.

    `bits_per_weight` includes the scales. `activations` is the larger of prefill and decode step.
    """

    plan: str
    bits_per_weight: float
    weights: int
    scales: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.scales + self.kv_cache + self.activations


def parse_size(text: str) -> tuple[float, str]:
    """`"8GB"` → (8.0, "GB"): a number above zero and a key of `UNITS`. Raises ParamsError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): unit for unit in UNITS}
    if not match or match[2].lower() not in units or not float(match[1]):
        raise ParamsError(f"--budget {text!r}: write a size with its unit, e.g. 8GB (10⁹ bytes) or 8GiB (2³⁰ bytes)")
    return float(match[1]), units[match[2].lower()]


def read_config(model: str) -> PreTrainedConfig:
    """The text model's config from a config.json, from its folder, or for a name in `KNOWN_MODELS`.

    The owner before a name is ignored, and no network is used. Raises ParamsError for anything else, and for models
    that are not dense decoders.
    """
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    name = model.rpartition("/")[2]
    if not path.is_file() and name not in KNOWN_MODELS:
        raise ParamsError(
            f"--model {model!r}: give a config.json, a folder that has one, or one of {', '.join(KNOWN_MODELS)}"
        )
    with reading(f"--model {model!r}", ParamsError, "correct it", f"{path} is not the config of a model"):
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else KNOWN_MODELS[name]
        config = AutoConfig.for_model(**values).get_text_config()
    if config.model_type not in DENSE_DECODERS:
        raise ParamsError(
            f"--model {model!r}: {config.model_type!r} is not supported; choose one of {', '.join(DENSE_DECODERS)}"
        )
    if any(getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers):
        raise ParamsError(f"--model {model!r}: sliding windows are not supported; choose a model with full attention")
    return config


def preset_plans(shapes: list[Weight]) -> dict[str, Plan]:
    """By name the plans that follow from the names of the modules; a module without a scheme stays as it is."""
    matrices = {weight.module: weight.shape for weight in shapes if len(weight.shape) == 2}
    presets = [Plan(name="bf16", schemes={}), Plan(name="int8", schemes=dict.fromkeys(matrices, "int8"))]
    presets += [plans.paper_plan(matrices), *(plans.nf4_plan(matrices, scheme) for scheme in plans.SCHEMES)]
    return {plan.name: plan for plan in presets}


def estimate_presets(config: PreTrainedConfig, batch: int, context: int) -> list[Estimate]:
    """The memory of every preset plan, most bits first. Raises ParamsError if the context is too long."""
    rope, last = config.rope_parameters or {}, config.max_position_embeddings
    if rope.get("rope_type") in ("linear", "dynamic", "yarn"):  # their factor lengthens the context
        last = max(last, int(rope["factor"] * rope.get("original_max_position_embeddings", last)))
    if context > last:
        raise ParamsError(f"--context {context}: the positions of the model end at {last}; lower it")
    shapes = model_shapes(config)
    estimates = [estimate_plan(config, plan, batch, context, shapes) for plan in preset_plans(shapes).values()]
    return sorted(estimates, key=lambda e: -e.bits_per_weight)


def estimate_plan(
    config: PreTrainedConfig, plan: Plan, batch: int, context: int, shapes: list[Weight] | None = None,
    double_quant: bool = True,
) -> Estimate:  # fmt: skip
    """The memory of one plan. `shapes` saves time if they are known."""
    shapes = shapes or model_shapes(config)
    table = plan_bytes(shapes, plan.schemes, BF16_BYTES, double_quant).set_index("component")
    scales = int(table.bytes.get("quantization state", 0))
    weights = int(table.bytes.sum()) - scales
    bits = 8 * (weights + scales) / int(table.weights.sum())
    cache = kv_cache_bytes(config, batch, context, BF16_BYTES)
    activations = max(activation_bytes(config, shapes, plan.schemes, batch, context, BF16_BYTES).values())
    return Estimate(plan.name, bits, weights, scales, cache, activations)

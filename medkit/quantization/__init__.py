"""Quantization: plans that give each weight a number format, and functions that apply, measure and save them."""

from medkit.quantization.gguf_blocks import quantize_blocks, round_to_blocks
from medkit.quantization.gguf_export import (
    check_export,
    check_logits,
    check_manifest,
    export_adapter,
    export_gguf,
    measure_file_bytes,
)
from medkit.quantization.memory_budget import estimate_plan
from medkit.quantization.memory_ledger import measure_bytes
from medkit.quantization.merge_quantized import compare_predictions, dequantize, merge_into_quantized, surviving_share
from medkit.quantization.plans import SCHEMES, budget_plan, check_budget, nf4_plan, paper_plan, random_plan
from medkit.quantization.plots import plot_certificates, plot_ledger, plot_levels, plot_plans, plot_sensitivity
from medkit.quantization.quantize import apply_plan, check_plan, load_quantized, save_quantized, weight_shapes
from medkit.quantization.sensitivity import list_choices, measure_plans, measure_sensitivity

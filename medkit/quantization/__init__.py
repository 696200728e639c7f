"""quantization"""

from medkit.quantization.gguf_export import (
    check_manifest,
    export_gguf,
    largest_relative_error,
    measure_file_bytes,
    measure_rounding,
)
from medkit.quantization.memory_budget import estimate_plan, room_for_plan
from medkit.quantization.memory_ledger import COMPONENTS, measure_bytes
from medkit.quantization.merge_quantized import dequantise, measure, merge_into_quantized, read_answers, surviving_share
from medkit.quantization.plans import budget_plan, nf4_plan, paper_plan, random_plan
from medkit.quantization.quantize import apply_plan, load_nf4, load_quantized, save_quantized, weight_shapes
from medkit.quantization.sensitivity import measure_plans, measure_sensitivity

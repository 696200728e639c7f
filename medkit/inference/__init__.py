"""inference"""

from medkit.inference.choose_engine import choose
from medkit.inference.predictions import choose_questions, predict, write_answers
from medkit.inference.question_variants import ensemble, option_orders, pair_questions, shuffled, swapped, template_grid
from medkit.inference.similar_answers import (
    ALL_EDITS,
    ALPHAS,
    THRESHOLDS,
    best_thresholds,
    lookups,
    measured_pairs,
    rates,
    study_pairs,
)
from medkit.inference.torch_engine import SCHEDULERS, TorchEngine
from medkit.inference.variant_loading import edge_candidates, in_torch, load_variant, reach
from medkit.inference.workloads import agreement, encode_prompts, equal, skewed, take_turns, timeline

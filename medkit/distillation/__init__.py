"""distillation"""

from medkit.distillation.cross_tokenizer import span_kl, span_sizes
from medkit.distillation.entities import find_entities
from medkit.distillation.lessons import load_tokenizers, make_bridge
from medkit.distillation.losses import (
    DistillationLoss,
    entity_gaps,
    hidden_error,
    sparse_divergence,
    sparse_jsd,
    sparse_kl,
    sparse_reverse_kl,
)
from medkit.distillation.option_kl import capture_scores
from medkit.distillation.pruning import choose_layers, measure_layer_importance
from medkit.distillation.rationales import keep_verified
from medkit.distillation.stages import correct_teacher, list_students, signals_key, teach_student
from medkit.distillation.teacher_cache import Signals, capture_signals, top_k_logprobs

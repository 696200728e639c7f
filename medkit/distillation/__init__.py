"""Distillation: a fine-tuned teacher, the cache of its log-probabilities, and students that learn from it."""

from medkit.distillation.cross_tokenizer import TokenAligner, measure_spans, span_kl
from medkit.distillation.entities import find_entities
from medkit.distillation.losses import DistillationLoss, entity_gaps, hidden_error, sparse_divergence
from medkit.distillation.plots import (
    plot_blocks,
    plot_closing,
    plot_curves,
    plot_directions,
    plot_gains,
    plot_kept_mass,
    plot_spans,
    plot_thinking,
)
from medkit.distillation.pruning import measure_blocks, remove_block
from medkit.distillation.stages import (
    check_lead,
    correct_teacher,
    list_students,
    load_tokenizers,
    student_rows,
    teacher_key,
    teacher_rows,
    train_student,
)
from medkit.distillation.teacher_cache import capture_teacher, top_k_logprobs

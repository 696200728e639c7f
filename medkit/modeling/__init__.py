"""Models: loading and saving, batches, scores of options, and training."""

from medkit.modeling.batches import collect_logits, encode_questions, measure_drift, predict_examples
from medkit.modeling.embeddings import embed_texts
from medkit.modeling.loading import (
    keep_layers,
    load_model,
    load_skeleton,
    load_tokenizer,
    local_folder,
    make_toy_model,
    pick_attention,
    pick_bf16,
    pick_device,
    save_model,
)
from medkit.modeling.option_scoring import Item, score_options
from medkit.modeling.trainer import cross_entropy

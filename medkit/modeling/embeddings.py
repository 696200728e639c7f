"""Sentence embeddings: texts as unit vectors from a small BERT encoder with mean pooling (all-MiniLM-L6-v2, sbert.net).

There is no index: for up to 10⁵ texts a matrix product is quicker than building one.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from medkit.modeling.batches import bucket_by_length
from medkit.modeling.loading import pick_device, quiet_transformers, read_weights

MAX_TOKENS = 256  # the encoder was trained on texts up to this length; the rest of a text is cut off
BATCH_TOKENS = 4096  # of a forward pass


@torch.inference_mode()
def embed_texts(folder: Path, texts: Sequence[str], device: str = "auto") -> np.ndarray:
    """Unit vectors (len(texts), hidden) in float32: the mean of the last hidden states over a text's tokens.

    folder: encoder and tokenizer in transformers' format. Raises MedkitError for a folder without safetensors, since a
    pickle can run any code.
    """
    options = {"dtype": torch.float32, "attn_implementation": "sdpa", "add_pooling_layer": False}
    model = read_weights(AutoModel, folder, other_heads=True, **options).to(pick_device(device)).eval()
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
    ids = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"] if len(texts) else []
    batches = bucket_by_length([len(i) for i in ids], BATCH_TOKENS)
    for rows in tqdm(batches, desc="embedding", unit="batch", delay=2, mininterval=10):
        batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(model.device)
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        mean = (states * mask).sum(1) / mask.sum(1)
        vectors[rows] = nn.functional.normalize(mean, dim=1).cpu().numpy()
    return vectors

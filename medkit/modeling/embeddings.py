"""Texts → unit vectors by a small sentence encoder, and the nearest of them.

The encoder is a BERT read with mean pooling, as all-MiniLM-L6-v2 was trained (sbert.net); weights come from safetensors
alone and no remote code runs. Texts are embedded in batches of like length, and their vectors do not depend on their
company. There is no index: at 10⁵ texts a matrix product is quicker than building one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from medkit.modeling.batches import bucket_by_length
from medkit.modeling.loading import ModelError, pick_device

MAX_TOKENS = 256  # the encoder saw no longer text in training; the rest of a text is cut off
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Embedder:
    """An encoder in eval mode, and the tokenizer that belongs to it."""

    model: nn.Module
    tokenizer: object


def load_embedder(folder: Path, device: str = "auto") -> Embedder:
    """The encoder and tokenizer of a folder in transformers' format, in float32 on the device.

    Raises ModelError for a folder without safetensors: a pickle can run anything.
    """
    if not (folder / "model.safetensors").is_file():
        raise ModelError(f"{folder}: no model.safetensors; give a folder with weights in that format")
    model = AutoModel.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, attn_implementation="sdpa", add_pooling_layer=False
    )
    return Embedder(model.to(pick_device(device)).eval(), AutoTokenizer.from_pretrained(folder))


@torch.inference_mode()
def embed_texts(embedder: Embedder, texts: Sequence[str], batch_tokens: int = 4096) -> np.ndarray:
    """Vectors (len(texts), hidden) in float32, each of length 1, in the order of the texts.

    Mean of the last hidden states over the text's own tokens, ends included, divided by its norm. `batch_tokens`
    bounds memory and nothing else.
    """
    hidden = embedder.model.config.hidden_size
    if not len(texts):
        return np.empty((0, hidden), np.float32)
    ids = embedder.tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    vectors = np.empty((len(ids), hidden), np.float32)
    for rows in bucket_by_length([len(i) for i in ids], batch_tokens):
        batch = embedder.tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
        batch = batch.to(embedder.model.device)
        states = embedder.model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (states * mask).sum(1) / mask.sum(1)
        vectors[rows] = nn.functional.normalize(mean, dim=1).cpu().numpy()
    return vectors


def nearest(
    queries: np.ndarray, corpus: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the corpus nearest to each query, best first: indices (Q, k) and cosines (Q, k) of unit vectors.

    `allowed` is a mask over the corpus (N,), or per query (Q, N): a question must not be its own example. Equal
    cosines go to the smaller index. Raises ValueError where a query has fewer than `k` rows to choose from.
    """
    usable = np.broadcast_to(True if allowed is None else np.asarray(allowed, bool), (len(queries), len(corpus)))
    if len(queries) and not 1 <= k <= usable.sum(axis=1).min():
        raise ValueError(f"k = {k}: a query has {usable.sum(axis=1).min()} allowed rows to choose from")
    indices, cosines = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        scores = np.where(usable[part], queries[part] @ corpus.T, -np.inf)
        # a stable sort of everything that is at least as near as the k-th: a partition alone breaks ties at random
        kth = np.partition(scores, len(corpus) - k, axis=1)[:, len(corpus) - k]
        for row, (line, least) in enumerate(zip(scores, kth, strict=True), start):
            near = np.flatnonzero(line >= least)
            indices[row] = near[np.argsort(-line[near], kind="stable")[:k]]
            cosines[row] = line[indices[row]]
    return indices, cosines

"""Scoring: the log-probability of every option, with each question read once.

The options follow one another in one row as branches of the question: a mask lets each see the question and itself.
Which option that makes the answer is for `evaluation` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from medkit.batching import bucket_by_length


@dataclass(frozen=True)
class Item:
    """A prompt and the answers to be scored after it, as token ids."""

    prompt_ids: list[int]
    answer_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompt_ids) + sum(map(len, self.answer_ids))


@torch.inference_mode()
def score_options(model: nn.Module, items: Sequence[Item], batch_tokens: int, pad_token_id: int) -> list[list[float]]:
    """Summed log-probability (nats) of each item's answers given its prompt, in the order of the items.

    Each prompt is read once: its answers follow one another in the same row, every answer sees the prompt and itself
    alone and is numbered as if it stood right after the prompt. Items are bucketed by length into batches of at most
    `batch_tokens` tokens, and logits are computed from the last prompt token on. Equal to scoring each option alone.
    """
    scores: list[list[float]] = [[] for _ in items]
    with (
        _dense_attention(model),
        tqdm(total=len(items), desc="scoring", unit="question", delay=2, mininterval=10) as bar,
    ):
        for rows in bucket_by_length([len(item) for item in items], batch_tokens):
            batch = [items[i] for i in rows]
            for row, found in zip(rows, _score_batch(model, batch, pad_token_id), strict=True):
                scores[row] = found
            bar.update(len(rows))
    return scores


@contextmanager
def _dense_attention(model: nn.Module):
    """FlashAttention takes no mask of branches: score with SDPA, then give the model back as it was."""
    kept = model.config._attn_implementation
    if not kept.startswith("flash"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(kept)


def _score_batch(model: nn.Module, items: Sequence[Item], pad_token_id: int) -> list[list[float]]:
    length = max(map(len, items))
    num_logits = 1 + max(len(item) - len(item.prompt_ids) for item in items)
    input_ids = torch.full((len(items), length), pad_token_id)
    position_ids = torch.zeros(len(items), length, dtype=torch.long)
    sees = torch.eye(length, dtype=torch.bool).repeat(len(items), 1, 1)  # padding sees itself, so no softmax is empty
    before = []  # per item and answer, the positions that predict its tokens
    for row, item in enumerate(items):
        start, end = length - len(item), length - len(item) + len(item.prompt_ids)
        input_ids[row, start:end] = torch.tensor(item.prompt_ids)
        position_ids[row, start:end] = torch.arange(len(item.prompt_ids))
        sees[row, start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        prompt_end, places = end, []
        for answer in item.answer_ids:
            stop = end + len(answer)
            input_ids[row, end:stop] = torch.tensor(answer)
            position_ids[row, end:stop] = torch.arange(len(item.prompt_ids), len(item.prompt_ids) + len(answer))
            sees[row, end:stop, start:prompt_end] = True
            sees[row, end:stop, end:stop] = torch.ones(len(answer), len(answer), dtype=torch.bool).tril()
            places.append([prompt_end - 1, *range(end, stop - 1)])
            end = stop
        before.append(places)
    mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(~sees, torch.finfo(model.dtype).min)
    logits = model(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.unsqueeze(1).to(model.device),
        position_ids=position_ids.to(model.device),
        use_cache=False,
        logits_to_keep=num_logits,
    ).logits
    offset = length - num_logits
    scores = []
    for row, item in enumerate(items):
        places = torch.tensor([p - offset for answer in before[row] for p in answer], device=logits.device)
        targets = torch.tensor([t for answer in item.answer_ids for t in answer], device=logits.device)
        found = -nn.functional.cross_entropy(logits[row, places].float(), targets, reduction="none")
        scores.append([part.sum().item() for part in found.split([len(answer) for answer in item.answer_ids])])
    return scores

"""Scoring: the log-probability of every option, with nothing read twice.

What many prompts begin with is read once and kept as keys and values. After it, one row holds the rest of a question
and its options as the branches of a tree: a mask lets each token see what leads to it and nothing else. Which option
that makes the answer is for `evaluation` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from medkit.modeling.prefix_tree import Tree, additive_masks, group_by_prefix, grow

LEAST_SAVED = 256  # tokens: a prefix of its own costs one more pass and one more batch that is not full
PASSES = 32  # so many passes over next to nothing take as long as a full batch: beside it, padding is weighed


@dataclass(frozen=True)
class Item:
    """A prompt and the answers to be scored after it, as token ids."""

    prompt_ids: list[int]
    answer_ids: list[list[int]]


@torch.inference_mode()
def score_options(model: nn.Module, items: Sequence[Item], batch_tokens: int, pad_token_id: int) -> list[list[float]]:
    """Summed log-probability (nats) of each item's answers given its prompt, in the order of the items.

    Every answer sees the prompt and itself alone and is numbered as if it stood right after the prompt: equal to
    scoring each option alone. Items of like length share batches of at most `batch_tokens` tokens, a shared prefix not
    counted, and logits are computed from the last prompt token on.
    """
    scores: list[list[float]] = [[] for _ in items]
    trees = [_grow(item) for item in items]
    with (
        _dense_attention(model),
        tqdm(total=len(items), desc="scoring", unit="question", delay=2, mininterval=10) as bar,
    ):
        for shared, members in group_by_prefix([item.prompt_ids for item in items], LEAST_SAVED):
            prefix = _read_prefix(model, items[members[0]].prompt_ids[:shared])
            for batch in cut_batches([len(trees[i].token_ids) - shared for i in members], batch_tokens):
                rows = [members[i] for i in batch]
                found = _score_batch(model, [trees[i] for i in rows], prefix, shared, pad_token_id)
                for row, values in zip(rows, found, strict=True):
                    scores[row] = values
                bar.update(len(rows))
    return scores


def cut_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Batches of indices, longest first, of at most `batch_tokens` tokens with padding; a longer item goes alone.

    Of all ways to cut the sorted items it is the one of least padding, a batch more counted as batch_tokens / PASSES
    tokens: full batches of unlike lengths waste more than passes do.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    least = np.full(len(order) + 1, np.inf)  # tokens of the best batches for the first so many items
    least[0], begins = 0, [0] * len(least)
    for start, item in enumerate(order):
        most = min(max(1, batch_tokens // lengths[item]), len(order) - start)
        costs = least[start] + batch_tokens / PASSES + lengths[item] * np.arange(1, most + 1)
        for end in start + 1 + np.flatnonzero(costs <= least[start + 1 : start + 1 + most]):
            least[end], begins[end] = costs[end - start - 1], start
    batches, end = [], len(order)
    while end:
        batches.append(order[begins[end] : end])
        end = begins[end]
    return batches[::-1]


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


# --- the shared prefix ---------------------------------------------------------------------------------------------


class _PrefixLayer(DynamicLayer):
    """Keys and values of a prefix, lent to every row of every batch; what is read after it is not kept."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            return super().update(key_states, value_states)
        rows = key_states.shape[0]
        keys = torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2)
        return keys, torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2)


def _read_prefix(model: nn.Module, token_ids: list[int]) -> Cache | None:
    if not token_ids:
        return None
    cache = Cache(layer_class_to_replicate=_PrefixLayer)
    ids = torch.tensor([token_ids], device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


# --- a question and its options --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tree(Tree):
    """An item as it is fed: the prompt, then its answers without their last tokens, equal beginnings once."""

    answer_ids: list[list[int]]
    predicted_at: list[list[int]]
    """Per answer, the places whose logits predict its tokens."""

    @property
    def first_logits(self) -> int:
        """Place of the last prompt token: the first whose logits are needed."""
        return self.predicted_at[0][0]


def _grow(item: Item) -> _Tree:
    tree, last = grow([[*item.prompt_ids, *answer[:-1]] for answer in item.answer_ids]), len(item.prompt_ids) - 1
    return _Tree(**vars(tree), answer_ids=item.answer_ids, predicted_at=[path[last:] for path in tree.paths])


def _score_batch(
    model: nn.Module, trees: Sequence[_Tree], prefix: Cache | None, shared: int, pad_token_id: int
) -> list[list[float]]:
    """Scores of items whose first `shared` tokens are in `prefix`."""
    length = max(len(tree.token_ids) for tree in trees) - shared
    num_logits = max(len(tree.token_ids) - tree.first_logits for tree in trees)
    input_ids = torch.full((len(trees), length), pad_token_id)
    position_ids = torch.zeros(len(trees), length, dtype=torch.long)
    sees = torch.zeros(len(trees), length, shared + length, dtype=torch.bool)
    sees[:, :, shared:] = torch.eye(length, dtype=torch.bool)  # padding sees itself, so no softmax is empty
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    for row, tree in enumerate(trees):
        start = shared + length - len(tree.token_ids)  # trees stand at the right edge
        input_ids[row, start:] = torch.tensor(tree.token_ids[shared:])
        position_ids[row, start:] = torch.tensor(tree.depths[shared:])
        prompt = tree.first_logits + 1 - shared
        sees[row, start:, :shared] = True
        sees[row, start : start + prompt, shared + start : shared + start + prompt] = causal[:prompt, :prompt]
        for place in range(tree.first_logits + 1, len(tree.token_ids)):
            at = start + place - shared
            sees[row, at] |= sees[row, start + tree.parents[place] - shared]
    logits = model(
        input_ids=input_ids.to(model.device),
        attention_mask=additive_masks(model, sees, position_ids),
        position_ids=position_ids.to(model.device),
        past_key_values=prefix,
        use_cache=prefix is not None,
        logits_to_keep=num_logits,
    ).logits
    return [_score(tree, own) for tree, own in zip(trees, logits, strict=True)]


def _score(tree: _Tree, logits: torch.Tensor) -> list[float]:
    """Summed log-probability of each answer, from the logits (K, vocab_size) of the row's last K places."""
    first = len(tree.token_ids) - len(logits)
    logits = logits[tree.first_logits - first :]
    places = torch.tensor([p - tree.first_logits for path in tree.predicted_at for p in path], device=logits.device)
    targets = torch.tensor([token for answer in tree.answer_ids for token in answer], device=logits.device)
    logprobs = logits[places, targets].float() - logits.float().logsumexp(-1)[places]
    return [part.sum().item() for part in logprobs.split([len(answer) for answer in tree.answer_ids])]

"""Option scoring: the summed log-probability of each answer option after its prompt.

Nothing is read twice. A prefix of many prompts is read once and kept as keys and values. One row then holds the rest of
a question with its options as the branches of a tree, and a mask lets each token attend to its own branch only.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from medkit.modeling.batches import bucket_by_length
from medkit.modeling.prefix_tree import Tree, additive_masks, build_tree, group_by_prefix, takes_branches

LEAST_SAVED = 256  # tokens: a prefix of its own costs one more forward pass and one more batch that is not full


@dataclass(frozen=True)
class Item:
    """A prompt and the answers to be scored after it, as token ids."""

    prompt_ids: list[int]
    answer_ids: list[list[int]]


@torch.inference_mode()
def score_options(model: nn.Module, items: Sequence[Item], batch_tokens: int, pad_token_id: int) -> list[list[float]]:
    """Summed log-probability (nats) of each item's answers given its prompt, in the order of the items.

    The scores are those of scoring each option alone: an answer attends to its prompt and itself, and its positions
    follow the prompt. Items of similar length share batches of at most `batch_tokens` tokens, without the prefix.
    """
    scores: list[list[float]] = [[] for _ in items]
    # the last token of an answer is predicted, and not read
    trees = [build_tree([[*item.prompt_ids, *answer[:-1]] for answer in item.answer_ids]) for item in items]
    with ExitStack() as after, tqdm(total=len(items), desc="scoring", unit="question", delay=2, mininterval=10) as bar:
        if not takes_branches(model):  # FlashAttention takes no mask of a tree
            after.callback(model.set_attn_implementation, model.config._attn_implementation)
            model.set_attn_implementation("sdpa")
        for shared, members in group_by_prefix([item.prompt_ids for item in items], LEAST_SAVED):
            prefix = _read_prefix(model, items[members[0]].prompt_ids[:shared])
            for places in bucket_by_length([len(trees[i].token_ids) - shared for i in members], batch_tokens):
                rows = [members[place] for place in places]
                batch = [items[i] for i in rows], [trees[i] for i in rows]
                for row, values in zip(rows, _score_batch(model, *batch, prefix, shared, pad_token_id), strict=True):
                    scores[row] = values
                bar.update(len(rows))
    return scores


class _PrefixLayer(DynamicLayer):
    """Keys and values of a prefix, used by every row of every batch; those of later tokens are not kept."""

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


def _score_batch(
    model: nn.Module, items: Sequence[Item], trees: Sequence[Tree], prefix: Cache | None, shared: int, pad_token_id: int
) -> list[list[float]]:
    """Scores of items whose first `shared` tokens are in `prefix`."""
    length = max(len(tree.token_ids) for tree in trees) - shared
    num_logits = max(len(tree.token_ids) - len(item.prompt_ids) for item, tree in zip(items, trees, strict=True)) + 1
    input_ids = torch.full((len(trees), length), pad_token_id)
    position_ids = torch.zeros(len(trees), length, dtype=torch.long)
    mask = torch.zeros(len(trees), length, shared + length, dtype=torch.bool)
    mask[:, :, shared:] = torch.eye(length, dtype=torch.bool)  # padding attends to itself, so no softmax is empty
    for row, tree in enumerate(trees):
        start = shared + length - len(tree.token_ids)  # trees stand at the right edge
        input_ids[row, start:] = torch.tensor(tree.token_ids[shared:])
        position_ids[row, start:] = torch.tensor(tree.depths[shared:])
        mask[row, start:, :shared] = True
        mask[row, start:, shared + start :] = tree.mask()[shared:, shared:]
    logits = model(
        input_ids=input_ids.to(model.device),
        attention_mask=additive_masks(model, mask, position_ids),
        position_ids=position_ids.to(model.device),
        past_key_values=prefix,
        use_cache=prefix is not None,
        logits_to_keep=num_logits,
    ).logits
    return [_score_tree(item, tree, last) for item, tree, last in zip(items, trees, logits, strict=True)]


def _score_tree(item: Item, tree: Tree, logits: torch.Tensor) -> list[float]:
    """Summed log-probability of each answer, from the logits (K, vocab_size) of the row's last K places."""
    last = len(item.prompt_ids) - 1  # place of the last prompt token, which predicts the first token of every answer
    logits = logits[last - len(tree.token_ids) :]
    places = torch.tensor([place - last for path in tree.paths for place in path[last:]], device=logits.device)
    targets = torch.tensor([token for answer in item.answer_ids for token in answer], device=logits.device)
    logprobs = logits[places, targets].float() - logits.float().logsumexp(-1)[places]
    return [part.sum().item() for part in logprobs.split([len(answer) for answer in item.answer_ids])]

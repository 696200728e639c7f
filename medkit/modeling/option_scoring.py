"""Option scoring: the summed log-probability of each answer option after its prompt.

Nothing is read twice: prompts with their options are rows of trees (`batches.pack`), in which what several of them
begin with stands once, and a mask lets each token attend to its own branch only.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn
from tqdm import tqdm

from medkit.modeling.batches import Example, iterate_predicted
from medkit.modeling.prefix_tree import takes_branches


@dataclass(frozen=True)
class Item:
    """A prompt and the answers to be scored after it, as token ids."""

    prompt_ids: list[int]
    answer_ids: list[list[int]]


def score_options(model: nn.Module, items: Sequence[Item]) -> list[list[float]]:
    """Summed log-probability (nats) of each item's answers given its prompt, in the order of the items.

    The scores are those of scoring each option alone: an answer attends to its prompt and itself, and its positions
    follow the prompt.
    """
    examples = [Example([*item.prompt_ids, *ids], len(item.prompt_ids)) for item in items for ids in item.answer_ids]
    scores = [0.0] * len(examples)
    with ExitStack() as after, tqdm(total=len(examples), desc="scoring", unit="option", delay=2, mininterval=10) as bar:
        if not takes_branches(model):  # FlashAttention takes no mask of a tree
            after.callback(model.set_attn_implementation, model.config._attn_implementation)
            model.set_attn_implementation("sdpa")
        for rows, predicted in iterate_predicted(model, examples):
            losses = nn.functional.cross_entropy(predicted.logits, predicted.targets, reduction="none")
            for row, part in zip(rows, losses.split([examples[i].num_predicted for i in rows]), strict=True):
                scores[row] = -part.sum().item()
            bar.update(len(rows))
    of_items = iter(scores)
    return [[next(of_items) for _ in item.answer_ids] for item in items]

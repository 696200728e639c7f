"""Token sequences with shared prefixes as one row of tokens, which is a tree: a model reads what they share once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass(frozen=True)
class Tree:
    """Several sequences as one row of tokens, in which a shared prefix stands once."""

    token_ids: list[int]
    depths: list[int]  # Per token, the number of tokens before it in its sequence: its position id
    paths: list[list[int]]  # Per sequence, the places of its tokens

    def mask(self) -> torch.Tensor:
        """(T, T) bool: each token attends to itself and to the tokens before it in its sequence."""
        mask = np.eye(len(self.token_ids), dtype=bool)
        before = {place: parent for path in self.paths for parent, place in pairwise(path)}  # a shared prefix once
        for place, parent in before.items():
            mask[place] |= mask[parent]
        return torch.from_numpy(mask)


def build_tree(sequences: Sequence[Sequence[int]], share: bool = True) -> Tree:
    """The tree of these sequences; with `share` off they stand whole, one after another."""
    token_ids, depths, paths = [], [], []
    places: dict[tuple[int, int], int] = {}  # a place and the token after it → that token's place
    for number, sequence in enumerate(sequences):
        path, previous = [], -1 if share else -1 - number
        for depth, token in enumerate(sequence):
            place = places.setdefault((previous, token), len(token_ids))
            if place == len(token_ids):
                token_ids.append(token)
                depths.append(depth)
            path.append(place)
            previous = place
        paths.append(path)
    return Tree(token_ids, depths, paths)


def cut_by_prefix(sequences: Sequence[Sequence[int]], most_tokens: int, share: bool = True) -> list[list[int]]:
    """Groups of indices whose trees have at most `most_tokens` tokens; a longer sequence is a group alone.

    Sequences with a common prefix are neighbours. Attention grows with the square of a tree's tokens, so many small
    trees are not slower than a few large ones.
    """
    groups: list[list[int]] = []
    size = 0
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        length = len(sequences[i])
        added = length - (shared_length(sequences[groups[-1][-1]], sequences[i]) if groups and share else 0)
        if groups and size + added <= most_tokens:
            groups[-1].append(i)
            size += added
        else:
            groups.append([i])
            size = length
    return groups


def takes_branches(model: nn.Module) -> bool:
    """Whether the model's attention takes a mask; FlashAttention separates sequences of a row by their positions."""
    return not model.config._attn_implementation.startswith("flash")


def additive_masks(model: nn.Module, mask: torch.Tensor, position_ids: torch.Tensor):
    """A bool mask (B, L, L) in the form the model takes: 0 or the dtype's minimum, (B, 1, L, L).

    A dict with one mask for each kind of layer if some layers have a sliding window.
    """

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(allowed.shape, dtype=model.dtype, device=allowed.device)
        return zeros.masked_fill(~allowed, torch.finfo(model.dtype).min).unsqueeze(1).to(model.device)

    config = model.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or (kinds and "sliding_attention" not in kinds):
        return additive(mask)
    near = additive(mask & (position_ids[:, :, None] - position_ids[:, None, :] < window))
    return {"full_attention": additive(mask), "sliding_attention": near} if kinds else near

"""Sequences that begin alike, read once: groups with a shared start, and several sequences as one row that branches.

Token numbers and masks only: what a sequence is, and what is predicted at its tokens, is for who calls to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first elements two sequences have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def group_by_prefix(prompts: Sequence[Sequence[int]], least_saved: int) -> list[tuple[int, list[int]]]:
    """Groups of indices, each with the number of first tokens its prompts share and may be read once; each index once.

    A group of its own saves reading at least `least_saved` (≥ 1) tokens beyond what all prompts share. What is left
    comes last, with a length of 0 if sharing saves less. Of every prompt at least one token is left after the start.
    """
    if not prompts:
        return []
    groups: list[tuple[int, list[int]]] = []

    def shared_by(members: list[int]) -> int:
        ends = prompts[members[0]], prompts[members[-1]]  # members are sorted: no two share less than these
        return min(shared_length(*ends), min(len(prompts[i]) for i in members) - 1)

    def divide(members: list[int]) -> list[int]:
        """Make groups of what begins alike, the longest beginnings first; give back what is in none."""
        length, rest = shared_by(members), []
        for _, branch in groupby(members, key=lambda i: prompts[i][length]):
            alike = list(branch)
            rest += alike if len(alike) in (1, len(members)) else divide(alike)
        if (length - everywhere) * (len(rest) - 1) < least_saved:
            return rest
        groups.append((length, rest))
        return []

    order = sorted(range(len(prompts)), key=lambda i: prompts[i])
    everywhere = shared_by(order)
    if rest := divide(order):
        groups.append((everywhere if everywhere * (len(rest) - 1) >= least_saved else 0, rest))
    return groups


@dataclass(frozen=True)
class Tree:
    """Sequences as one row of tokens, in which equal beginnings stand once."""

    token_ids: list[int]
    parents: list[int]
    """Place of the token that comes before; −1 for a first one."""
    depths: list[int]
    """Number of tokens that come before in its sequence: the position."""
    paths: list[list[int]]
    """Per sequence, the places of its tokens."""

    def sees(self) -> torch.Tensor:
        """(T, T) bool: each token sees itself and what comes before it in its sequence."""
        mask = torch.eye(len(self.token_ids), dtype=torch.bool)
        for place, parent in enumerate(self.parents):
            if parent >= 0:
                mask[place] |= mask[parent]
        return mask


def grow(sequences: Sequence[Sequence[int]], share: bool = True) -> Tree:
    """The tree of these sequences; with `share` off they stand one after another, each whole."""
    token_ids, parents, depths, paths = [], [], [], []
    places: dict[tuple[int, int], int] = {}  # a place and the token after it → that token's place
    for number, sequence in enumerate(sequences):
        path, at = [], -1 if share else -1 - number
        for depth, token in enumerate(sequence):
            place = places.setdefault((at, token), len(token_ids))
            if place == len(token_ids):
                token_ids.append(token)
                parents.append(max(at, -1))
                depths.append(depth)
            path.append(place)
            at = place
        paths.append(path)
    return Tree(token_ids, parents, depths, paths)


def cut_by_prefix(sequences: Sequence[Sequence[int]], most_tokens: int, share: bool = True) -> list[list[int]]:
    """Groups of indices whose trees have at most `most_tokens` tokens; a longer sequence goes alone.

    Neighbours begin alike. A tree's attention grows with the square of its tokens, so many small ones are not slower.
    """
    groups: list[list[int]] = []
    size = 0
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        own = len(sequences[i])
        more = own - (shared_length(sequences[groups[-1][-1]], sequences[i]) if groups and share else 0)
        if groups and size + more <= most_tokens:
            groups[-1].append(i)
            size += more
        else:
            groups.append([i])
            size = own
    return groups


def takes_branches(model: nn.Module) -> bool:
    """Whether its attention takes a mask; FlashAttention tells sequences of a row apart by positions that restart."""
    return not model.config._attn_implementation.startswith("flash")


def additive_masks(model: nn.Module, sees: torch.Tensor, position_ids: torch.Tensor):
    """What may be seen (B, L, shared + L) as the model takes it: one per kind of layer if some see a window only."""

    def additive(allowed: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(~allowed, torch.finfo(model.dtype).min)
        return mask.unsqueeze(1).to(model.device)

    config = model.config.get_text_config()
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or (kinds and "sliding_attention" not in kinds):
        return additive(sees)
    before = torch.arange(sees.shape[2] - sees.shape[1]).expand(len(sees), -1)
    distances = position_ids[:, :, None] - torch.cat([before, position_ids], dim=1)[:, None, :]
    near = additive(sees & (distances < window))
    return {"full_attention": additive(sees), "sliding_attention": near} if kinds else near

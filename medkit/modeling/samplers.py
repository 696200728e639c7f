"""Which rows are learned from when, and by which process: batches of like length, the same ones for any number of them.

An order depends on seed and epoch alone, so a resumed epoch is the killed one and two processes agree without a word.
Row numbers only: what the rows hold is `batching`'s, what is done with them `training`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch.utils.data import BatchSampler, DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class EpochSampler(LengthGroupedSampler):
    """Batches of like length in an order that depends on seed and epoch alone: a resumed epoch is the killed one.

    transformers' own draws from the global generator, whose state at the start of an epoch a checkpoint does not hold.
    With `difficulty` the first epoch goes from easy to hard: in parts of a few batches, within which lengths are alike
    and the order of the batches is drawn, as in any other epoch.
    """

    def __init__(self, *args, seed: int, difficulty: Sequence[float] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed, self.epoch, self.difficulty = seed, 0, difficulty

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        if self.epoch or self.difficulty is None:
            return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
        easy_first = sorted(range(len(self.lengths)), key=lambda i: self.difficulty[i])
        return chain.from_iterable(self._batches(part, generator) for part in _cut(easy_first, 8 * self.batch_size))

    def _batches(self, part: list[int], generator: torch.Generator) -> list[int]:
        """Indices of one part, batch after batch; the one that is not full comes last, so that none is torn."""
        batches = _cut(sorted(part, key=lambda i: self.lengths[i], reverse=True), self.batch_size)
        drawn = torch.randperm(len(part) // self.batch_size, generator=generator).tolist()
        return list(chain.from_iterable(batches[n] for n in [*drawn, *range(len(drawn), len(batches))]))


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class _EpochBatches(BatchSampler):
    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


class EpochLoader(DataLoader):
    """A sampler's batches. The Trainer tells it the epoch, or its batch sampler where it skips to a checkpoint."""

    def __init__(self, sampler: EpochSampler, collate: Callable[[list[int]], dict]):
        batches = _EpochBatches(sampler, sampler.batch_size, drop_last=False)
        super().__init__(range(len(sampler)), batch_sampler=batches, collate_fn=collate)

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def share(numbers: Sequence[int], lengths: Sequence[int], processes: int) -> list[list[int]]:
    """A batch's rows for each process: dealt out by length, so that every process gets as much work."""
    longest_first = sorted(numbers, key=lambda n: lengths[n], reverse=True)
    return [longest_first[process::processes] for process in range(processes)]

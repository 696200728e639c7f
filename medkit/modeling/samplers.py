"""The order of training rows: batches of similar length, the same ones for any number of processes.

The order depends on seed and epoch only. So a resumed epoch equals the killed one, and processes agree without
communication.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch.utils.data import BatchSampler, DataLoader
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class EpochSampler(LengthGroupedSampler):
    """Batches of similar length in a random order that depends on seed and epoch.

    transformers' own sampler uses the global random generator, whose state a checkpoint does not hold. With
    `difficulty` the first epoch goes from easy to hard: in parts of eight batches, each part shuffled as other epochs
    are.
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
        """Indices of one part, batch after batch; the batch that is not full is last, so all others stay whole."""
        batches = _cut(sorted(part, key=lambda i: self.lengths[i], reverse=True), self.batch_size)
        order = torch.randperm(len(part) // self.batch_size, generator=generator).tolist()
        return list(chain.from_iterable(batches[n] for n in [*order, *range(len(order), len(batches))]))


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class _EpochBatches(BatchSampler):
    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


class EpochLoader(DataLoader):
    """A sampler's batches. The Trainer sets the epoch on the loader, or on its batch sampler when it resumes."""

    def __init__(self, sampler: EpochSampler, collate: Callable[[list[int]], dict]):
        batches = _EpochBatches(sampler, sampler.batch_size, drop_last=False)
        super().__init__(range(len(sampler)), batch_sampler=batches, collate_fn=collate)

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def share(numbers: Sequence[int], lengths: Sequence[int], processes: int) -> list[list[int]]:
    """The rows of a batch for each process, dealt by length, so that each process has about as much work."""
    longest_first = sorted(numbers, key=lambda n: lengths[n], reverse=True)
    return [longest_first[process::processes] for process in range(processes)]

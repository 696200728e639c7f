"""The order of training rows: batches of similar length, the same ones for any number of processes.

The order depends on seed and epoch only. So a resumed epoch equals the killed one, and processes agree without
communication.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochBatches:
    """Batches of row numbers, of similar length and in a random order that depends on seed and epoch.

    transformers' own sampler uses the global random generator, whose state a checkpoint does not hold. It also begins
    with the longest rows, again in every 50 batches: if the rows of one task are longer, they come in a block, and a
    training ends with a block of the other task. So its batches are shuffled. With `difficulty` the first epoch goes
    from easy to hard, in parts of eight batches.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, difficulty: Sequence[float] | None = None):
        self.lengths, self.batch_size, self.seed, self.difficulty = lengths, batch_size, seed, difficulty
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        if self.epoch or self.difficulty is None:
            parts = [get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)]
        else:
            easy_first = sorted(range(len(self.lengths)), key=lambda i: self.difficulty[i])
            parts = _cut(easy_first, 8 * self.batch_size)
            parts = [sorted(part, key=lambda i: self.lengths[i], reverse=True) for part in parts]
        for part in parts:
            batches = _cut(part, self.batch_size)
            order = torch.randperm(len(part) // self.batch_size, generator=generator).tolist()
            # the batch that is not full is last, so all others stay whole
            yield from (batches[n] for n in [*order, *range(len(order), len(batches))])


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class EpochLoader(DataLoader):
    """Collated batches. The Trainer sets the epoch on the loader, or on its batch sampler when it resumes."""

    def __init__(self, batches: EpochBatches, collate: Callable[[list[int]], dict]):
        super().__init__(range(len(batches.lengths)), batch_sampler=batches, collate_fn=collate)

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def share(numbers: Sequence[int], lengths: Sequence[int], processes: int) -> list[list[int]]:
    """The rows of a batch for each process, dealt by length, so that each process has about as much work."""
    longest_first = sorted(numbers, key=lambda n: lengths[n], reverse=True)
    return [longest_first[process::processes] for process in range(processes)]

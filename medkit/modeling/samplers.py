"""The order of training rows: random batches, the same ones for any number of processes.

The order depends on seed and epoch only. So a resumed epoch equals the killed one, and processes agree without
communication.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader


class EpochBatches:
    """Batches of row numbers in a random order that depends on seed and epoch.

    transformers' own samplers use the global random generator, whose state a checkpoint does not hold. Rows are not
    sorted by length: there is no padding to be saved, and where the rows of one task are longer, each batch would be of
    one task, and copies of a row would share a batch. With `difficulty` the first epoch goes from easy to hard, in
    parts of eight batches.
    """

    def __init__(self, count: int, batch_size: int, seed: int, difficulty: Sequence[float] | None = None):
        self.count, self.batch_size, self.seed, self.difficulty = count, batch_size, seed, difficulty
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        if self.epoch == 0 and self.difficulty is not None:
            parts = _cut(sorted(order, key=lambda row: self.difficulty[row]), 8 * self.batch_size)
            order = [part[i] for part in parts for i in torch.randperm(len(part), generator=generator).tolist()]
        yield from _cut(order, self.batch_size)


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class EpochLoader(DataLoader):
    """Collated batches. The Trainer sets the epoch on the loader, or on its batch sampler when it resumes."""

    def __init__(self, batches: EpochBatches, collate: Callable[[list[int]], dict]):
        super().__init__(range(batches.count), batch_sampler=batches, collate_fn=collate)

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


def share(numbers: Sequence[int], lengths: Sequence[int], processes: int) -> list[list[int]]:
    """The rows of a batch for each process, dealt by length, so that each process has about as much work."""
    longest_first = sorted(numbers, key=lambda n: lengths[n], reverse=True)
    return [longest_first[process::processes] for process in range(processes)]

"""Which train images an epoch shows, how often and how varied; each epoch depends on its number and the seed alone."""

import hashlib
from collections import Counter
from collections.abc import Iterator

import torch
from datasets import Dataset
from torch.utils.data import Sampler


class TrainRows(torch.utils.data.Dataset):
    """Train rows that the collator augments: each has `augmentation_seed`, another one in each epoch."""

    def __init__(self, rows: Dataset, seed: int):
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        return row | {"augmentation_seed": augmentation_seed(self.seed, self.epoch, row["id"])}


class TrainSampler(Sampler):
    """Indices of an epoch: each once in random order, or with their `labels` images of rare classes more often.

    Balanced, a class with n images is shown in proportion to the square root of n (Mahajan et al. 2018), each of its
    images so often as its share says, rounded up or down at random. To show all classes equally often scored worse
    (docs/LOG.md). A sampler of its own, because accelerate tells only the sampler which epoch begins.
    """

    def __init__(self, rows: TrainRows | Dataset, labels: list[int] | None, seed: int):
        self.rows = rows
        self.seed = seed
        self.epoch = 0
        counts = Counter(labels)
        self.weights = None if labels is None else torch.tensor([counts[label] ** -0.5 for label in labels])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if isinstance(self.rows, TrainRows):
            self.rows.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        if self.weights is None:
            return iter(order.tolist())
        # Systematic sampling: evenly spaced points on the cumulated weights, from a random start.
        sums = self.weights.double()[order].cumsum(0)
        points = (torch.arange(len(self)) + torch.rand((), generator=generator, dtype=torch.float64)) / len(self)
        chosen = order[torch.searchsorted(sums, points * sums[-1], right=True).clamp(max=len(self) - 1)]
        return iter(chosen[torch.randperm(len(self), generator=generator)].tolist())


def augmentation_seed(*parts: object) -> int:
    """The same number for the same parts in every process, unlike hash()."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")

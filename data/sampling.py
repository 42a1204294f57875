"""Which train images an epoch shows, how often and how varied; each epoch depends on its number and the seed alone."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from datasets import Dataset
from torch.utils.data import Sampler


class Sampling(NamedTuple):
    is_balanced: bool  # classes come equally often
    is_augmented: bool


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
    """Indices of an epoch: each once in random order, or with `is_balanced` drawn so that classes come equally often.

    A sampler of its own, because accelerate tells only the sampler which epoch begins, and TrainRows must know it.
    """

    def __init__(self, rows: TrainRows | Dataset, labels: list[int], seed: int, is_balanced: bool):
        self.rows = rows
        self.seed = seed
        self.epoch = 0
        counts = Counter(labels)
        self.weights = (
            torch.tensor([1 / counts[label] for label in labels], dtype=torch.float64) if is_balanced else None
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        if isinstance(self.rows, TrainRows):
            self.rows.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.weights is None:
            yield from torch.randperm(len(self), generator=generator).tolist()
        else:
            # torch.multinomial takes at most 2^24 weights; by the inverse of the cumulated weights there is no limit.
            sums = self.weights.cumsum(0)
            draws = torch.rand(len(self), generator=generator, dtype=torch.float64) * sums[-1]
            yield from torch.searchsorted(sums, draws, right=True).clamp(max=len(self) - 1).tolist()


def augmentation_seed(*parts: object) -> int:
    """The same number for the same parts in every process, unlike hash()."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")

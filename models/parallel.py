"""What several processes do together in a step: shares of its photos, one sum of its gradients.

Each takes every n-th photo of the same batches, so the order of photos, and a step's exact token mean, are those of
one process, whatever is left over at the end. Gradients are summed once, when all pieces are done, and not by DDP's
hooks in the backward pass of the last piece: a process that runs out of memory there could not do it again, for the
others would wait in the middle of the sum.
"""

from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import BatchSampler


class Share(BatchSampler):
    """Every n-th of each batch; of a batch of fewer photos than processes some get none."""

    def __init__(self, batches: BatchSampler, process: int, processes: int):
        self.batches = batches
        self.process = process
        self.processes = processes

    @property
    def sampler(self):
        return self.batches.sampler

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[self.process :: self.processes]

    def __len__(self) -> int:
        return len(self.batches)


def share_batches(loader, process: int, processes: int) -> None:
    """Make a loader that accelerate prepared give shares: its own way fills the last batch up with other photos."""
    sharded = loader.batch_sampler
    sharded.batch_sampler = Share(sharded.batch_sampler, process, processes)
    sharded.num_processes, sharded.process_index = 1, 0
    sharded.even_batches, sharded.batch_size = False, None


def sum_gradients(parameters: Iterable[torch.nn.Parameter], processes: int) -> None:
    """Each gradient becomes the mean over the processes, those without photos counted as zero, in one message."""
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in learning:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in learning])
    torch.distributed.all_reduce(flat)
    flat /= processes
    pieces = flat.split([parameter.numel() for parameter in learning])
    for parameter, piece in zip(learning, pieces):
        parameter.grad.copy_(piece.view_as(parameter))

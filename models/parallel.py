"""What several processes do together in a step: shares of its images, one sum of its gradients.

Each takes every n-th image of the same batches, so the order of images, and a step's exact token mean, are those of
one process, whatever is left over at the end. Gradients are summed once, when all pieces are done, and not by DDP's
hooks in the backward pass of the last piece: a process that runs out of memory there could not do it again, for the
others would wait in the middle of the sum.

Frozen weights may be spread over the processes with torch's FSDP. What learns stays whole in each: an adapter is small,
and so the sum, the optimizer and the checkpoints are the same with and without, and one goes on from the other's.
accelerate's FSDP would spread that too, and then all processes have to do all forwards and savings together.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import BatchSampler

from models.builder import unwrap


class ShardedBatchSampler(BatchSampler):
    """Every n-th of each batch; of a batch of fewer images than processes some get none."""

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


def shard_batches(loader, process: int, processes: int) -> None:
    """Make a loader that accelerate prepared give shares: its own way fills the last batch up with other images."""
    sharded = loader.batch_sampler
    sharded.batch_sampler = ShardedBatchSampler(sharded.batch_sampler, process, processes)
    sharded.num_processes, sharded.process_index = 1, 0
    sharded.even_batches, sharded.batch_size = False, None


def all_reduce_gradients(parameters: Iterable[torch.nn.Parameter], processes: int) -> None:
    """Each gradient becomes the mean over the processes, those without images counted as zero, in one message."""
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


def shard_frozen_parameters(model) -> list[FSDPModule]:
    """Spread the frozen weights over all processes: layer by layer, embeddings, head, and the rest.

    Returns the parts, each of which is unsharded for its forward and its backward; the first forward after this must be
    of the whole model.
    """
    base = unwrap(model)
    for module in _quantized_modules(base):
        module.quant_state = module.weight.quant_state  # weights that were unsharded are plain tensors
        # FSDP wants numbers that could learn. Those of 16 bit would not all come back as they were (docs/LOG.md).
        packed = module.weight.data.view(-1).view(torch.float32).view(-1, 1)
        module.register_parameter("weight", nn.Parameter(packed, requires_grad=False))
    tower = base.model.vision_tower
    # Their layers and not the towers: transformers knows by its class which module records hidden states.
    parts = [*base.model.language_model.layers, *getattr(tower, "vision_model", tower).encoder.layers]
    if base.get_input_embeddings().weight is not base.lm_head.weight:
        parts += [base.get_input_embeddings(), base.lm_head]
    learning = {parameter for parameter in model.parameters() if parameter.requires_grad}
    return [fully_shard(part, ignored_params=learning) for part in (*parts, base)]


def _quantized_modules(base) -> list[nn.Module]:
    return [module for module in base.modules() if isinstance(module, Linear4bit)]


def checksum_quantized(model) -> list[int]:
    """Of each 4-bit weight: whether they come back from the other processes as they were."""
    return [int(module.weight.data.view(-1).view(torch.int32).sum()) for module in _quantized_modules(unwrap(model))]


@contextlib.contextmanager
def unsharded(parts: Sequence[FSDPModule]) -> Iterator[None]:
    """All weights whole in each process, which may then compute what the others do not."""
    unshard(parts)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not parts[-1], recurse=False)  # the rest stays for the backward
            part.reshard()


def unshard(parts: Sequence[FSDPModule]) -> None:
    """Make all weights whole in each process, for good. All processes call it together."""
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()

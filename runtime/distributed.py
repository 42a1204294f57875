"""Several ranks that train or score one model: the process group, shards of batches and of weights, gradient sums.

A launcher (torchrun, accelerate launch, Slurm) starts a process for each GPU and says by environment variables which is
which. Each rank takes every n-th sample of the same batches, so the order of samples and a step's exact token mean are
those of a single rank. Gradients are all-reduced once, after the last micro-batch, and not by DDP's hooks in its
backward pass: a rank that runs out of memory there could not retry it while other ranks wait in the reduction.

Frozen weights may be sharded with torch's FSDP. Trainable parameters stay whole on each rank, so gradients, optimizer
and checkpoints are the same with and without sharding, and either resumes from the other's. accelerate's FSDP would
shard those too, and then all ranks have to take part in all forwards and saves.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.utils.data import BatchSampler

from config.training_config import TrainingConfig
from runtime.device import choose_device, synchronize
from runtime.launcher import VARIABLES, get_local_world_size, read_ranks
from runtime.watchdog import HEARTBEAT, INTERRUPTED, RESUME, Watchdog, exit_at_once
from utils.logging_utils import UserError, first_line, logger, setup_logging
from utils.tensor_utils import find_layers

RENDEZVOUS_S = 60  # seconds in which all ranks must have found each other
COLLECTIVE_S = 3600  # seconds that a rank may wait for others: one reads a data set, or writes a checkpoint
LOST_RANK = ("Connection reset by peer", "Connection closed by peer", "remote process exited")  # says gloo, or NCCL


class Distributed:
    """The ranks that work on one model, as one of them sees it. Rank 0, the main process, writes the run directory."""

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | None = None, store=None):
        self.rank, self.world_size, self.is_main_process = rank, world_size, rank == 0
        self.device = device or torch.device("cpu")
        self._store, self._broadcasts = store, 0

    def broadcast_object(self, value):
        """The main process's value, as JSON takes it, on every rank. All ranks call it.

        Through the store, looking again and again: a collective would end after its timeout, however long a data set
        takes to read, and a wait inside the store would keep the watchdog from it.
        """
        if self.world_size == 1:
            return value
        self._broadcasts += 1
        key = f"broadcast {self._broadcasts}"
        if self.is_main_process:
            self._store.set(key, json.dumps(value))
            return value
        while not self._store.check([key]):
            time.sleep(0.05)
        return json.loads(self._store.get(key))

    def gather_object(self, items: list) -> list:
        """The items of all ranks, in the order of ranks, on every rank. All ranks call it."""
        if self.world_size == 1:
            return items
        gathered: list[list] = [[]] * self.world_size
        torch.distributed.all_gather_object(gathered, items)
        return [item for items in gathered for item in items]

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Other ranks enter once the main process has left, and find what it cached."""
        if not self.is_main_process:
            self.broadcast_object(None)
        yield
        if self.is_main_process:
            self.broadcast_object(True)


@contextlib.contextmanager
def init_distributed(config: TrainingConfig) -> Iterator[Distributed]:
    """The device and the other ranks, which must have the same config; an error inside ends all. Raises UserError."""
    rank, world_size = read_ranks()
    if rank != 0:  # rank 0 logs for all
        setup_logging(prefix=f"rank {rank}: ")
        logger.setLevel("ERROR")
    device = choose_device(config.model, config.gpu_memory_fraction, several_ranks=True)
    if world_size == 1:
        for name in VARIABLES:  # of torchrun with one rank: transformers would make a process group of it
            os.environ.pop(name, None)
        if config.sharding == "fsdp":
            move = "Start them with torchrun, or use --sharding none."
            raise UserError(f"--sharding fsdp: needs several ranks to shard the weights across. {move}")
        yield Distributed(device=device)
        return
    with _process_group(rank, world_size, device) as dist:
        assert_same_across_ranks(dataclasses.asdict(config), dist)
        yield dist


@contextlib.contextmanager
def _process_group(rank: int, world_size: int, device: torch.device) -> Iterator[Distributed]:
    """The process group under its watchdog; what is raised inside ends all ranks."""
    store = _rendezvous(rank, world_size)
    watchdog = Watchdog(store, rank, world_size, shares_screen=get_local_world_size() == world_size)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=COLLECTIVE_S)
    problem = f"the first all-reduce across {world_size} ranks did not complete within {RENDEZVOUS_S} s"
    move = "Check the network between the machines (NCCL_SOCKET_IFNAME), or try NCCL_P2P_DISABLE=1."
    timer = threading.Timer(RENDEZVOUS_S, exit_at_once, [f"{problem}. {move}"])  # nothing else ends one that hangs
    timer.start()
    try:
        torch.distributed.init_process_group(backend, timeout=timeout, world_size=world_size, rank=rank, store=store)
        torch.distributed.all_reduce(torch.zeros(1, device=device))
        synchronize(device)
    finally:
        timer.cancel()
    try:
        with watchdog:
            yield Distributed(rank, world_size, device, store)
        torch.distributed.destroy_process_group()
        if rank != 0:
            # Sharded weights hold threads of gloo with which Python's own end aborts now and then: a launcher would
            # take that for a failure and end the main process too.
            sys.stdout.flush()
            os._exit(0)
    except KeyboardInterrupt as stop:
        if type(stop) is KeyboardInterrupt:  # all ranks know of an Interrupted, and none of this
            watchdog.fail(f"rank {rank}: {INTERRUPTED}")
        raise
    except Exception as error:
        failure = watchdog.read_failure()
        if failure is not None:  # a broken connection is only what followed from it
            watchdog.log_failure(failure)
            sys.exit(1)
        if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_RANK):
            cause = "killed, most often by the system for lack of memory, or its machine went down"
            raise UserError(f"lost the connection to another rank: {cause}. {RESUME}") from error
        trace = "" if isinstance(error, UserError) else f"\n{traceback.format_exc()}"
        watchdog.fail(f"rank {rank}: {type(error).__name__}: {error}{trace}")
        raise


def _rendezvous(rank: int, world_size: int):
    """The store through which all ranks talk, once all have joined. Raises UserError."""
    wait = datetime.timedelta(seconds=RENDEZVOUS_S)
    try:
        _await_name(os.environ["MASTER_ADDR"])
        store, _, _ = next(torch.distributed.rendezvous("env://", rank, world_size, timeout=wait))
        heartbeats = [HEARTBEAT.format(number) for number in range(world_size)]
        store.set(heartbeats[rank], "")
        store.wait(heartbeats, wait)
        return store
    except (RuntimeError, ValueError, OSError) as error:  # those of torch are kinds of RuntimeError
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        outcome = f"failed for rank {rank} of {world_size}: {first_line(error)}"
        if joined := re.search(r"(\d+)/\d+ clients joined", outcome):
            outcome = f"timed out after {RENDEZVOUS_S} s: {joined[1]} of {world_size} ranks joined."
        move = "Start the missing rank or check MASTER_ADDR and MASTER_PORT."
        raise UserError(f"rendezvous at {place} {outcome} {move}") from error


def _await_name(host: str) -> None:
    """Return once it can be looked up: a cluster may name rank 0's machine only when that has started.

    Raises OSError after RENDEZVOUS_S; torch would ask for minutes.
    """
    end = time.monotonic() + RENDEZVOUS_S
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.5)


def assert_same_across_ranks(mine: dict, dist: Distributed) -> None:
    """Raise UserError with the settings or weights that differ from rank 0's; of paths the last parts are compared."""
    expected = dist.broadcast_object(mine)
    for name in {"model", "dataset", "run", "class_names", "taxonomy"} & mine.keys():
        paths = Path(mine[name] or ""), Path(expected[name] or "")
        if any(path.is_absolute() for path in paths) and paths[0].name == paths[1].name:
            mine = mine | {name: expected[name]}
    differences = [f"{name}={value}, not {expected[name]}" for name, value in mine.items() if value != expected[name]]
    differing = dist.gather_object([differences])
    if differences:
        move = "Give all machines the same command, files and config/training_config.py."
        raise UserError(f"settings differ from rank 0: {'; '.join(differences)}. {move}")
    if any(differing):  # the watchdog ends this rank with the message of the other, before it writes anything
        time.sleep(RENDEZVOUS_S)


# ---- data and gradients


class ShardedBatchSampler(BatchSampler):
    """A rank's shard of each batch, which `shard` takes; of a batch with fewer samples than ranks some get none."""

    def __init__(self, sampler: Iterable[int], batch_size: int, shard: Callable[[list[int]], list[int]]):
        super().__init__(sampler, batch_size, drop_last=False)
        self.shard = shard

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.shard, super().__iter__())


def shard_by_length(batch: Sequence[int], lengths: Sequence, micro_batch: int, rank: int, world_size: int) -> list[int]:
    """A rank's part of a batch of samples of these lengths: micro-batches of similar length, the longest in turn.

    Ranks wait for the slowest, and a micro-batch is padded to its longest sample.
    """
    order = sorted(range(len(batch)), key=lengths.__getitem__)
    shard, block = [], micro_batch * world_size
    for number, start in enumerate(range(0, len(order), block)):
        samples, turn = order[start : start + block], rank if number % 2 else world_size - 1 - rank
        shard += samples[len(samples) * turn // world_size : len(samples) * (turn + 1) // world_size]
    return [batch[position] for position in shard]


def all_reduce_gradients(parameters: Iterable[nn.Parameter], world_size: int) -> None:
    """Each gradient becomes its mean over the ranks, zero for those without samples, in one all-reduce."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in trainable]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= world_size
    means = flat.split([gradient.numel() for gradient in gradients])
    for parameter, gradient, mean in zip(trainable, gradients, means):
        parameter.grad = gradient.copy_(mean.view_as(gradient))


# ---- frozen weights (FSDP)


def shard_frozen_parameters(base, device: torch.device) -> None:
    """Shard the frozen weights of a LLaVA-NeXT across all ranks: layer by layer, embeddings, head, and the rest.

    Each part moves to the device by itself, so that a model in the CPU's memory needs no room there as a whole. The
    first forward must be the whole model's. Raises UserError if weights in 4 bit do not come back as they were.
    """
    from torch.distributed.fsdp import fully_shard

    decoder_layers = base.model.language_model.layers
    checksums = [_checksum_quantized(layer) for layer in decoder_layers]
    for module in _quantized_modules(base):
        weight = module.weight
        module.quant_state = weight.quant_state  # a weight that was unsharded is a plain tensor without it
        # FSDP takes only floating-point numbers. Those of 16 bit would not all come back as they were (docs/LOG.md).
        packed = weight.data.view(-1).view(torch.float32).view(-1, 1)
        module.register_parameter("weight", nn.Parameter(packed, requires_grad=False))
    tower = base.model.vision_tower
    # Their layers and not the towers: transformers knows by its class which module records hidden states.
    modules = [*decoder_layers, *find_layers(tower, base.config.vision_config.num_hidden_layers)]
    if base.get_input_embeddings().weight is not base.lm_head.weight:
        modules += [base.get_input_embeddings(), base.lm_head]
    trainable = {parameter for parameter in base.parameters() if parameter.requires_grad}
    for module in (*modules, base):
        fully_shard(module, ignored_params=trainable)
    for parameter in trainable:
        parameter.data = parameter.data.to(device)
    for layer, expected in zip(decoder_layers, checksums):
        if expected:
            layer.unshard()
            found = _checksum_quantized(layer)
            layer.reshard()
            if found != expected:
                raise UserError("memory: sharding alters the 4-bit weights; use --sharding none, and report it")


def _quantized_modules(module: nn.Module) -> list[Any]:
    from bitsandbytes.nn import Linear4bit

    return [each for each in module.modules() if isinstance(each, Linear4bit)]


def _checksum_quantized(layer: nn.Module) -> list[int]:
    """One number for each 4-bit weight: whether it comes back from the other ranks as it was."""
    return [int(module.weight.data.view(-1).view(torch.int32).sum()) for module in _quantized_modules(layer)]


def is_sharded(base) -> bool:
    """Whether the frozen weights are sharded; then all ranks have to make the same forwards."""
    if not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(base, FSDPModule)


@contextlib.contextmanager
def scoring_weights(base) -> Iterator[None]:
    """Inside, what scoring reads of a sharded model outside of its layers is whole; these unshard themselves in turn.

    The head takes the hidden states in parts, whose number depends on a rank's images.
    """
    modules = [base.lm_head, base] if is_sharded(base) else []
    modules = [module for module in modules if hasattr(module, "unshard")]  # a tied head is a part of the rest
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not base, recurse=False)  # FSDP's own default
            module.reshard()

"""Ranks of train.py or evaluate.py on this machine, forked from a process that has imported all of it.

They are started as by Slurm: rank 0 hosts the store through which all talk. With `has_launcher` a process of its own
hosts it, as under torchrun. A fault is a function of the rank, called in its process before the program.
"""

import contextlib
import importlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from runtime.run_files import read_metrics
from tests.conftest import draw_nothing, freeze_modules

# 50 images in steps of 7: of the last batch of every epoch one image is left, and a rank has none.
SPLIT_SIZES = {"train": 50, "validation": 20, "test": 20}
RUN = [
    *("--preset", "tiny", "--max-steps", "20", "--eval-steps", "10", "--save-steps", "5", "--logging-steps", "5"),
    *("--per-device-train-batch-size", "7", "--num-workers", "0", "--output-dir", "run"),
]
TIMEOUT_S = 240  # after which a run hangs
PRELOAD = ["train", "evaluate", "evaluation.report", "evaluation.verify", "evaluation.model_card", "models.trainer"]
PRELOAD += ["torch.distributed.fsdp", "bitsandbytes", "peft", "pytest", "scipy.optimize"]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)
_started: list[multiprocessing.Process] = []


class Launch:
    """Started ranks; `argvs` are their command lines, in `machines` groups that see each other's screen."""

    def __init__(self, folder: Path, argvs: Sequence[Sequence[str]], program: str = "train", **options):
        machines, fault = options.get("machines", 1), options.get("fault")
        world_size, port = len(argvs), free_port()
        shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"LOCAL_WORLD_SIZE": world_size // machines}
        self.launcher = None
        if options.get("has_launcher"):
            self.launcher = self._start(_host_store, port, world_size)
            shared |= {"TORCHELASTIC_USE_AGENT_STORE": True}
        self.outputs = [folder / f"output-{port}-{rank}.txt" for rank in range(world_size)]
        self.ranks = []
        for rank, (argv, output) in enumerate(zip(argvs, self.outputs)):
            variables = shared | {"RANK": rank, "LOCAL_RANK": rank % shared["LOCAL_WORLD_SIZE"]}
            variables = variables if world_size > 1 else {}
            self.ranks.append(self._start(_run, folder, list(argv), program, fault, rank, variables, output))

    def _start(self, target: Callable, *args):
        process = context.Process(target=target, args=args)
        process.start()
        _started.append(process)
        return process

    def end(self) -> tuple[list[int], str]:
        """Exit statuses of the ranks once all have ended, and what they wrote."""
        for process in self.ranks:
            process.join(TIMEOUT_S)
        assert all(process.exitcode is not None for process in self.ranks), self.output
        if self.launcher is not None:
            self.launcher.kill()
        return [process.exitcode for process in self.ranks], self.output

    @property
    def output(self) -> str:
        return "".join(output.read_text() for output in self.outputs if output.exists())


def run(folder: Path, argv: Sequence[str] = RUN, program: str = "train", ranks: int = 2, **options):
    """(exit statuses, output) of a program on several ranks, to its end."""
    return Launch(folder, [argv] * ranks, program, **options).end()


@contextlib.contextmanager
def no_process_is_left() -> Iterator[None]:
    yield
    while _started:
        process = _started.pop()
        process.kill()
        process.join()


def _run(folder: Path, argv: list[str], program: str, fault, rank: int, variables: dict, output: Path) -> None:
    import datasets
    import torch

    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers, as if the program had been started
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # by accelerate launch: the run's own precision holds
    os.chdir(folder)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    from data import dataset

    dataset.SPLIT_SIZES.update(SPLIT_SIZES)
    draw_nothing(pytest.MonkeyPatch())  # for the life of this process
    freeze_modules()
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    if fault is not None:
        fault(rank)
    sys.exit(importlib.import_module(program).main(argv))


def _host_store(port: int, world_size: int) -> None:
    import torch.distributed

    store = torch.distributed.TCPStore("127.0.0.1", port, world_size, is_master=True, wait_for_workers=False)
    while store is not None:
        signal.pause()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def at_step(step: int, act: Callable) -> None:
    """In a rank's process: the loss of this step's forward and backward passes becomes `act(trainer, loss)`."""
    from models.trainer import PlantTrainer

    forward_backward = PlantTrainer.forward_backward

    def patched(self, *args):
        loss = forward_backward(self, *args)
        return act(self, loss) if self.state.global_step + 1 == step else loss

    PlantTrainer.forward_backward = patched


def signal_at(step: int, victim: int, number: signal.Signals, rank: int) -> None:
    """A fault: rank `victim` gets a signal in this step."""
    if rank == victim:
        at_step(step, lambda trainer, loss: (os.kill(os.getpid(), number), loss)[1])


def wait_for_step(folder: Path, step: int) -> None:
    since = time.monotonic()
    while not any(line["step"] >= step for line in read_metrics(folder)):
        assert time.monotonic() - since < TIMEOUT_S
        time.sleep(0.05)


def copy_run(run_folder: Path, folder: Path) -> None:
    shutil.copytree(run_folder, folder / "run")

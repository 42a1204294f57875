"""Several processes that train or score one model: how they find each other, and how the fault of one ends all.

A launcher (torchrun, accelerate launch, Slurm) starts them and says in environment variables which is which.
"""

import contextlib
import datetime
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed

from utils.logging_utils import UserError, logger

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OTHER_ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
START_S = 60  # seconds in which all must have found each other
COLLECTIVE_S = 3600  # seconds that one may wait for the others: for a image set to be read, a checkpoint to be written
POLL_S = 0.5  # seconds between two looks at whether another one failed
SILENT_S = 120  # seconds after which one that gives no sign is taken for gone, as with its machine
GONE = ("Connection reset by peer", "Connection closed by peer", "remote process exited")
NO_STORE = (
    "the store through which all talk is gone, with the launcher or the machine that held it; look there, and give the "
    "same command again"
)
INTERRUPTED = "interrupted; the same command goes on from what was saved"
FAILED = "failed"
DONE = "done"


def get_world_size() -> int:
    """As the launcher says; 1 without one."""
    return _number("WORLD_SIZE", 1)


def get_local_rank() -> int:
    """Which of this machine's processes, and so of its GPUs."""
    return _number("LOCAL_RANK", 0)


def get_local_world_size() -> int:
    """How many processes this machine has."""
    return _number("LOCAL_WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"{name}={text}: is not a number; start with torchrun, or unset it")
    return int(text)


class Distributed:
    """Those that work on one model; the main one, of rank 0, writes the run folder."""

    def __init__(self, rank: int = 0, count: int = 1, store=None):
        self.rank = rank
        self.count = count
        self.is_main = rank == 0
        self._store = store
        self._shared = 0
        self._rounds = 0  # of `watch`
        self._over = threading.Event()

    def broadcast_object(self, value):
        """What the main one gives here, as JSON takes it; the others' is not looked at."""
        if self.count == 1:
            return value
        self._shared += 1
        key = f"shared {self._shared}"
        if self.is_main:
            self._store.set(key, json.dumps(value))
            return value
        while not self._store.check([key]):  # a wait for it would keep `watch` from the store
            time.sleep(0.05)
        return json.loads(self._store.get(key))

    def gather(self, own: list) -> list:
        """What all give here, one process after the other. All call it together."""
        if self.count == 1:
            return own
        given = [None] * self.count
        torch.distributed.all_gather_object(given, own)
        return [one for some in given for one in some]

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The others come in once the main one is out again, and find in the cache what it made."""
        if not self.is_main:
            self.broadcast_object(None)
        yield
        if self.is_main:
            self.broadcast_object(True)

    def told_by_another(self) -> str | None:
        """What another one said when it failed, or NO_STORE."""
        with contextlib.suppress(RuntimeError):
            return self._store.get(FAILED).decode() if self._store.check([FAILED]) else None
        return NO_STORE

    def send_heartbeat(self, sign: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.set(f"sign {self.rank}", sign)

    def watch(self) -> None:
        """In a thread: a process that waits for one that is gone would wait for ever."""
        seen = {}  # of each other process its last sign, and how often that was seen
        while not self._over.wait(POLL_S):
            self._rounds += 1
            self.send_heartbeat(f"{self._rounds}")
            told = self.told_by_another()
            if told is None:
                told = self._find_stalled_rank(seen)
                if told is not None:
                    logger.error(told)
                    self._store.set(FAILED, told)
            if told is not None and not self._over.is_set():
                _pass_on(told)
                os._exit(1)

    def watch_watchdog(self) -> None:
        """In a thread of its own: with the machine that holds the store gone, `watch` waits for an answer for ever."""
        last, looks = -1, 0
        while not self._over.wait(POLL_S):
            last, looks = self._rounds, looks + 1 if self._rounds == last else 0
            if looks * POLL_S > SILENT_S:
                self.end_without_store()

    def end_without_store(self) -> None:
        logger.error(
            f"the store through which all talk gave no answer for {SILENT_S} s; look at the first machine and the "
            "network, and give the same command again"
        )
        os._exit(1)

    def _find_stalled_rank(self, seen: dict[int, tuple[str, int]]) -> str | None:
        """Who gave no sign for too long, in a sentence. NCCL itself would wait for COLLECTIVE_S.

        The main process looks at all, the others at the main one. Looks are counted, not seconds, which pass for a
        job that is suspended too.
        """
        for rank in range(1, self.count) if self.is_main else (0,):
            with contextlib.suppress(RuntimeError):
                sign = self._store.get(f"sign {rank}").decode()
                last, times = seen.get(rank, (sign, 0))
                seen[rank] = sign, times + 1 if sign == last else 0
                if sign != DONE and seen[rank][1] * POLL_S > SILENT_S:
                    return (
                        f"process {rank} gave no sign for {SILENT_S} s; look at its machine and the network, and give "
                        "the same command again"
                    )
        return None


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[Distributed]:
    """Find the others within a minute; whatever is raised inside ends them all. Raises UserError."""
    count = get_world_size()
    if "WORLD_SIZE" not in os.environ:
        tasks = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK") if name in os.environ}
        if _number("SLURM_STEP_NUM_TASKS", 1) > 1:
            tasks["SLURM_STEP_NUM_TASKS"] = os.environ["SLURM_STEP_NUM_TASKS"]
        if tasks:
            raise UserError(
                f"{' '.join(f'{name}={value}' for name, value in tasks.items())}: one of several processes, and "
                "WORLD_SIZE is missing; start with torchrun, or under Slurm as the README shows"
            )
    if count == 1:
        for name in VARIABLES:  # of torchrun with one process: transformers would make a group of it
            os.environ.pop(name, None)
        yield Distributed()
        return
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={count}: {' and '.join(missing)} missing from the environment; start with torchrun, or under "
            "Slurm as the README shows"
        )
    for name, asked in OTHER_ENGINES.items():
        if os.environ.get(name, "false").lower() == "true":
            raise UserError(
                f"{name}=true: the launcher asks for {asked}, which is not set up from outside here; use accelerate "
                "launch --multi_gpu, or torchrun, and --sharding fsdp to spread the weights"
            )
    rank = _number("RANK", 0)
    store = _rendezvous(rank, count)
    processes = Distributed(rank, count, torch.distributed.PrefixStore("plants", store))
    kind = "nccl" if device.type == "cuda" else "gloo"
    processes.send_heartbeat("")
    waits = datetime.timedelta(seconds=COLLECTIVE_S)
    with _starting(rank, count):
        torch.distributed.init_process_group(kind, store=store, rank=rank, world_size=count, timeout=waits)
        torch.distributed.all_reduce(torch.zeros(1, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    watcher = threading.Thread(target=processes.watch, daemon=True)
    watcher.start()
    threading.Thread(target=processes.watch_watchdog, daemon=True).start()
    try:
        try:
            with _losses_told():
                yield processes
        finally:
            processes._over.set()
            watcher.join(SILENT_S)  # a thread that still talks to the store when Python ends aborts the process
            if watcher.is_alive():
                processes.end_without_store()
        processes.send_heartbeat(DONE)  # not after a fault: then the others shall miss it
        torch.distributed.destroy_process_group()
        if not processes.is_main:
            # Nothing is left to do, and weights that are spread hold threads of gloo with which Python's own end aborts
            # now and then: the launcher would take that for a failure and end the main process too.
            sys.stdout.flush()
            os._exit(0)
    except KeyboardInterrupt as stop:
        if type(stop) is KeyboardInterrupt:  # an Interrupted is known to all, and this to none
            with contextlib.suppress(RuntimeError):
                processes._store.set(FAILED, f"process {rank}: {INTERRUPTED}")
        raise
    except Exception as error:
        told = processes.told_by_another()
        if told is not None:  # that the connection broke is what followed from it
            _pass_on(told)
            sys.exit(1)
        with contextlib.suppress(RuntimeError):
            trace = "" if isinstance(error, UserError) else f"\n{traceback.format_exc()}"
            processes._store.set(FAILED, f"process {rank}: {type(error).__name__}: {error}{trace}")
        raise


def assert_same_across_ranks(mine: dict, processes: Distributed) -> None:
    """Raise UserError where this process has other settings or weights, name by name, than the main one.

    Folders may lie elsewhere on another machine; they are told apart by their own names.
    """
    theirs = processes.broadcast_object(mine)
    for name in {"model", "dataset", "run"} & mine.keys():
        paths = Path(mine[name]), Path(theirs[name])
        if any(path.is_absolute() for path in paths) and paths[0].name == paths[1].name:
            mine = mine | {name: theirs[name]}
    other = [f"{name}={value} and not {theirs[name]}" for name, value in mine.items() if value != theirs[name]]
    if other:
        raise UserError(
            f"other settings than those of process 0: {', '.join(other)}; give all machines the same command, "
            "files and config/training_config.py"
        )


@contextlib.contextmanager
def _losses_told() -> Iterator[None]:
    """Another process that is gone, in gloo's words or NCCL's, becomes a UserError."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in GONE):
            raise
        raise UserError(
            "another process is gone: killed, most often by the system for want of memory, or with its machine; give "
            "the same command again"
        ) from error


def _rendezvous(rank: int, count: int):
    """The store through which all talk, once all are there."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    wait = datetime.timedelta(seconds=START_S)
    try:
        store, _, _ = next(torch.distributed.rendezvous("env://", rank, count, timeout=wait))
        here = [f"here {number}" for number in range(count)]
        store.set(here[rank], "")
        store.wait(here, wait)
    except (RuntimeError, ValueError, OSError) as error:  # torch's own are kinds of RuntimeError
        raise UserError(
            f"not all {count} processes met at {place} within {START_S} s "
            f"({str(error).splitlines()[0][:160]}); start the missing ones, or check MASTER_ADDR, MASTER_PORT and RANK"
        ) from error
    return store


@contextlib.contextmanager
def _starting(rank: int, count: int) -> Iterator[None]:
    """Ends the process unless it is done in a minute: nothing else stops a first message between GPUs that hangs."""

    def end() -> None:
        logger.error(
            f"the first message between {count} processes did not arrive within {START_S} s; check the network between "
            "the machines (NCCL_SOCKET_IFNAME), and try NCCL_P2P_DISABLE=1"
        )
        os._exit(1)

    timer = threading.Timer(START_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _pass_on(told: str) -> None:
    """Into the log file; on the screen too, unless the one that failed has said it on the same one."""
    if told == NO_STORE or told.endswith(INTERRUPTED) or get_local_world_size() < get_world_size():
        logger.error(told)
        return
    record = logger.makeRecord(logger.name, logging.ERROR, "", 0, told, (), None)
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)

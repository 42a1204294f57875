"""A training that is asked to stop by a signal, and the signals of its loaders' workers.

Before and after a training signals raise KeyboardInterrupt (utils/logging_utils.report_errors).
"""

import contextlib
import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Iterable, Iterator

from torch._utils import ExceptionWrapper

from utils.logging_utils import UserError, first_line
from utils.signal_utils import end_children, handling

LOADER_S = 600  # seconds that a loader may wait for a batch of its workers
STREAM_S = 3600  # the same of a stream, which reads what it skips on resume
STOP_S = 10  # seconds that one of several ranks may wait for a batch after a signal; torchrun kills after 30


class Interrupted(KeyboardInterrupt):
    """The training was asked to stop, by the signal of this number or by one to another rank, and did so safely."""


class StopRequest:
    """Whether a signal asked the training to stop; code that can stop safely calls `check`.

    With `stops_alone` false, one of several ranks: they stop together, so nothing is raised here.
    """

    def __init__(self, stops_alone: bool = True):
        self.stops_alone = stops_alone
        self.signal: int | None = None
        self._is_waiting = False

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Inside, signals are only noted, or end a wait. Call it in the main thread."""
        return handling(self._note)

    def _note(self, number: int, frame) -> None:
        if self.signal is None:
            self.signal = number
            # Not by the logger, which may be in the middle of a line. The reader may be gone.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this forward pass, then saving; a second signal ends at once\n")
        if self._is_waiting:
            self.check()
            signal.setitimer(signal.ITIMER_REAL, STOP_S)

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.signal is not None and self.stops_alone:
            raise Interrupted(self.signal)

    @contextlib.contextmanager
    def waiting(self, limit_s: float) -> Iterator[None]:
        """Inside, a signal raises Interrupted at once: what is waited for may never come.

        One of several ranks has STOP_S more, then KeyboardInterrupt: others wait for it in a collective, so none can
        save. RuntimeError, in torch's words, after `limit_s` seconds: torch's own limit does not hold once a batch is
        on its way from a worker that then stops. Outside the main thread nothing limits it.
        """

        def end(number: int, frame) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt(self.signal)
            raise RuntimeError(f"DataLoader timed out after {limit_s} seconds")

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, limit_s)  # 0: no limit
        try:
            try:
                self._is_waiting = True
                self.check()
                if self.signal is not None:  # of several ranks
                    signal.setitimer(signal.ITIMER_REAL, STOP_S)
                yield
            finally:
                self._is_waiting = False  # before the timer is that of others again
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
        except BaseException:
            end_children()
            raise

    def iterate(self, batches: Iterable) -> Iterator:
        """The batches; the wait for each ends with a signal."""
        iterator, end = iter(batches), object()
        while True:
            with self.waiting(LOADER_S + 2):  # a little after torch
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch


def worker_options(num_workers: int, limit_s: int = LOADER_S) -> dict:
    """Options of a torch DataLoader: its workers leave signals to the parent, and the wait for a batch has a limit."""
    return {"timeout": limit_s if num_workers else 0, "worker_init_fn": start_worker}


def start_worker(number: int) -> None:
    """worker_init_fn: leave signals to the parent; Ctrl-C and a scheduler's SIGTERM reach every process of a run.

    The worker still obeys its parent's own SIGTERM. A batch that cannot be sent raises UserError in the parent.
    """
    for each in (signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # threads that start later block it too
        threading.Thread(target=_obey_parent, daemon=True).start()
    # A hook of its own would print a traceback, and the parent wait for the batch for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = _send_fault  # type: ignore[attr-defined]


def _obey_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def _send_fault(queue: multiprocessing.queues.Queue, error: Exception, item: tuple) -> None:
    """In place of an item, (number, batch), that could not be sent; what raises it in the parent is text alone."""
    causes = "a TMPDIR too long for the path of a socket, or too few open files (ulimit -n)"
    problem = f"a loader worker cannot send its batch ({first_line(error)}): {causes}"
    fault = UserError(f"{problem}; change that and re-run the same command, or use --num-workers 0")
    queue.put((item[0], ExceptionWrapper((UserError, fault, None), "in DataLoader worker")))

"""SIGINT (Ctrl-C) and SIGTERM: the first asks a training to save and stop, the second ends it. Standard library only.

Before and after a training they raise KeyboardInterrupt (utils/logging_utils.report_errors).
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_S = 0.3  # seconds within which a second signal is the first by another way: to the process, and to its group


class Interrupted(KeyboardInterrupt):
    """The training was asked to stop, by the signal of this number or by one to another rank, and did so safely."""


class StopRequest:
    """Whether a signal asked the training to stop; code that can stop safely calls `check`."""

    def __init__(self):
        self.signal: int | None = None
        self.since = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are only noted. Call it in the main thread: Python allows handlers in no other."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
            # Not by the logger, which may be in the middle of a line. The reader may be gone.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this forward pass, then saving; a second signal ends at once\n")
        elif time.monotonic() - self.since > SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.signal is not None:
            raise Interrupted(self.signal)


def start_worker(then: Callable[[int], None] | None, number: int) -> None:
    """worker_init_fn: leave signals to the parent; Ctrl-C and a scheduler's SIGTERM reach every process of a run.

    `then` is the worker_init_fn that this one wraps. The worker still obeys its parent's own SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # threads that start later block it too
        threading.Thread(target=_obey_parent, daemon=True).start()
    if then is not None:
        then(number)


def _obey_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)

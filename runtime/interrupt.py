"""SIGINT (Ctrl-C) and SIGTERM: the first asks a run to save and stop, the second ends it. Standard library only."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 0.3  # seconds within which a second signal is the first one by another way: to the process, and to its group


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, at a place where that does no harm."""


class StopRequest:
    """Whether a signal asked for the end; whoever can stop safely calls `check`."""

    def __init__(self):
        self.signal: int | None = None
        self.since = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are only noted. In the main thread, as Python demands of who handles signals."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
            # Not by the logger: it may be in the middle of a line when the signal comes. Who reads may be gone.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this forward pass, and saving; a second signal ends at once\n")
        elif time.monotonic() - self.since > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.signal is not None:
            raise Interrupted


def start_worker(then: Callable[[int], None] | None, number: int) -> None:
    """A loader's worker lets its parent decide: Ctrl-C in a terminal and a scheduler's SIGTERM reach all processes.

    `then` is what else the worker starts with. It still obeys its parent's own SIGTERM.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # threads that begin now block it too
        threading.Thread(target=_obey_parent, daemon=True).start()
    if then is not None:
        then(number)


def _obey_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)

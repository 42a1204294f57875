"""SIGINT (Ctrl-C), SIGTERM and SIGHUP (a terminal that closes): a second one ends the process at once, wherever it is.

Python runs signal handlers in the main thread, between two steps of Python code. That thread may be in C code that
never returns, so another one reads each signal from a pipe as well. Standard library only.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_S = 0.3  # seconds within which a second signal is the first by another way: to the process, and to its group
GRACE_S = 10  # seconds between a first signal and an exit without cleanup, unless a training is to save
LOOK_S = 0.1


class _Watch:
    """Reads the signals of this process in a thread of its own."""

    def __init__(self):
        self.first: tuple[int, float] | None = None  # number and time of the first signal
        self.handlers: list[Callable] = []  # of `handling`, the innermost last
        self.last_words: Callable[[], None] | None = None  # said before an exit without cleanup; None: no limit
        self.is_running = False

    def start(self) -> None:
        if self.is_running:
            return
        self.is_running = True
        self.pipe, writer = os.pipe()
        for end in (self.pipe, writer):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._look, daemon=True).start()

    def read(self) -> int | None:
        with contextlib.suppress(BlockingIOError):
            return os.read(self.pipe, 1)[0]
        return None

    def _look(self) -> None:
        while True:
            select.select([self.pipe], [], [], LOOK_S)
            number = self.read()
            if self.first is None and self.handlers and number in SIGNALS:
                self.first = number, time.monotonic()
            if self.first is None or not self.handlers:
                continue
            first, since = self.first[0], time.monotonic() - self.first[1]
            if number in SIGNALS and since > SAME_S:
                os._exit(128 + number)
            if self.last_words is not None and since > GRACE_S:
                self.last_words()
                os._exit(128 + first)

    def _forget(self) -> None:
        """In a forked process, which a pool may end by SIGTERM: signals are as they were before."""
        if self.handlers:
            signal.set_wakeup_fd(-1)
            self.handlers.clear()
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, signal.SIG_DFL)


_watch = _Watch()


@contextlib.contextmanager
def handling(handler: Callable, last_words: Callable[[], None] | None = None) -> Iterator[None]:
    """Inside, signals call `handler(number, frame)`, which must bear a second call within SAME_S.

    With `last_words` the process ends GRACE_S after the first signal: some libraries swallow exceptions while they are
    imported. A signal that was ignored at the start stays so (nohup, a job in the background). Does nothing outside
    the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _watch.start()
    while not _watch.handlers and _watch.read() is not None:
        pass  # what came before
    numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before, words = {number: signal.signal(number, handler) for number in numbers}, _watch.last_words
    _watch.handlers.append(handler)
    _watch.last_words = last_words
    try:
        yield
    finally:
        _watch.last_words = words
        if _watch.handlers:  # not in a forked process
            _watch.handlers.pop()
        if not _watch.handlers:
            _watch.first = None
        for number, previous in before.items():
            signal.signal(number, previous)


def end_children() -> None:
    """End worker processes also where they were stopped (SIGSTOP): Python's exit waits for them without a limit."""
    for child in multiprocessing.active_children():
        child.terminate()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid or 0, signal.SIGCONT)

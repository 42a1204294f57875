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
        self.last_words: Callable[[], None] | None = None  # said before an exit without cleanup; None: no limit
        self.since = 0.0  # of the first signal, or of the end of a training that saved after it
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        threading.Thread(target=self.read, daemon=True).start()

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self.writer)  # which ends the thread
        self.last_words = None

    def read(self) -> None:
        first = 0  # number of the first signal
        while True:
            number = 0
            if select.select([self.reader], [], [], LOOK_S)[0]:
                if not (written := os.read(self.reader, 1)):
                    return os.close(self.reader)
                number = written[0] if written[0] in SIGNALS else 0
            if not first:
                first, self.since = number, time.monotonic()
            elif number and time.monotonic() - self.since > SAME_S:
                os._exit(128 + number)
            elif self.last_words is not None and time.monotonic() - self.since > GRACE_S:
                self.last_words()
                os._exit(128 + first)


_watch: _Watch | None = None  # inside `handling`


@contextlib.contextmanager
def handling(handler: Callable, last_words: Callable[[], None] | None = None) -> Iterator[None]:
    """Inside, signals call `handler(number, frame)`, which must bear a second call within SAME_S.

    With `last_words` the process ends GRACE_S after the first signal, or after the end of a `handling` inside: some
    libraries swallow exceptions while they are imported. A signal that was ignored at the start stays so (nohup, a job
    in the background). Does nothing outside the main thread, where Python allows no handlers.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_outermost = _watch is None
    watch = _watch = _watch or _Watch()
    words, watch.last_words = watch.last_words, last_words
    numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        watch.since, watch.last_words = time.monotonic(), words
        if is_outermost and _watch:  # not in a forked process
            _watch.close()
            _watch = None
        for number, previous in before.items():
            signal.signal(number, previous)


def _forget() -> None:
    """In a forked process, which a pool may end by SIGTERM: signals are as they were before."""
    global _watch
    if _watch:
        _watch.close()
        _watch = None
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)


def end_children() -> None:
    """End worker processes also where they were stopped (SIGSTOP): Python's exit waits for them without a limit."""
    for child in multiprocessing.active_children():
        child.terminate()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid or 0, signal.SIGCONT)

"""Waits for the lock of a file that another program holds. Standard library only.

`datasets` and huggingface_hub lock files of their caches by filelock, and wait for ever without a word.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

LOOK_S = 1.0
SAID_S = 10  # seconds of a wait after which it is said
LIMIT_S = 3600  # seconds of a wait after which a program ends: another one may rightly build a large data set


@contextlib.contextmanager
def watching_locks(report: Callable[[str, bool], None]) -> Iterator[None]:
    """Inside, `report(path, is_over)` is called, from another thread, for a wait at SAID_S, and over LIMIT_S."""
    stop = threading.Event()
    threading.Thread(target=_watch, args=(report, stop), daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def _watch(report: Callable[[str, bool], None], stop: threading.Event) -> None:
    since: dict[str, float] = {}
    said: set[str] = set()
    while not stop.wait(LOOK_S):
        now = time.monotonic()
        since = {path: since.get(path, now) for path in _waited_for()}
        said &= since.keys()
        for path, began in since.items():
            if (now - began > SAID_S and path not in said) or now - began > LIMIT_S:
                said.add(path)
                report(path, now - began > LIMIT_S)


def _waited_for() -> set[str]:
    """The files of the locks that threads of this process are about to take."""
    found = set()
    for innermost in sys._current_frames().values():
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_code.co_name == "acquire" and frame.f_globals.get("__name__", "").startswith("filelock"):
                found.add(str(frame.f_locals["self"].lock_file))
            frame = frame.f_back
    return found

"""Heartbeats and failures of the ranks, exchanged through their store: the failure or loss of one ends all.

NCCL and gloo have timeouts of their own, but a rank may rightly wait an hour in a collective, and neither
says which rank failed or why.
"""

import contextlib
import os
import threading
import time

from utils.logging_utils import logger

POLL_S = 0.5  # seconds between two heartbeats, and two looks at those of others
STALLED_S = 120  # seconds without a heartbeat after which a rank counts as lost, as with its machine
FAILED = "failed"  # key in the store: what the first rank that failed said
HEARTBEAT = "heartbeat {}"  # key in the store, of a rank
DONE = "done"  # heartbeat of a rank that ended well
RESUME = "Re-run the same command to resume."
INTERRUPTED = f"interrupted. {RESUME}"
STORE_GONE = f"the store that connects the ranks is gone, with the launcher or machine that hosted it. {RESUME}"


def exit_at_once(message: str) -> None:
    """Whatever other threads are waiting for."""
    logger.error(message)
    os._exit(1)


class Watchdog:
    """Inside, two threads watch: one the other ranks, the other the first thread, which may hang on a lost store."""

    def __init__(self, store, rank: int, world_size: int, shares_screen: bool):
        self.store, self.rank = store, rank
        self.others = range(1, world_size) if rank == 0 else (0,)  # whom this rank watches
        self.shares_screen = shares_screen  # with all other ranks, so that a failure is on it already
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        threading.Thread(target=self._watch_watchdog, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._stop.set()
        self._thread.join()  # a thread that still uses the store when Python ends aborts the process
        if error is None:  # no DONE heartbeat after an error, so that the other ranks abort
            self.heartbeat(DONE)
            until = time.monotonic() + STALLED_S
            while self.rank == 0 and self._is_needed() and time.monotonic() < until:
                time.sleep(0.05)

    def _is_needed(self) -> bool:
        """Rank 0 may host the store, and other ranks that lose it before they are done count as failed."""
        with contextlib.suppress(RuntimeError):
            are_done = all(self.store.get(HEARTBEAT.format(rank)) == DONE.encode() for rank in self.others)
            return not are_done and self.read_failure() is None
        return False

    def heartbeat(self, value: str) -> None:
        with contextlib.suppress(RuntimeError):
            self.store.set(HEARTBEAT.format(self.rank), value)

    def fail(self, message: str) -> None:
        """Tell all ranks, which then exit with this message."""
        with contextlib.suppress(RuntimeError):
            self.store.set(FAILED, message)

    def read_failure(self) -> str | None:
        """The message of the rank that failed, or STORE_GONE."""
        with contextlib.suppress(RuntimeError):
            return self.store.get(FAILED).decode() if self.store.check([FAILED]) else None
        return STORE_GONE

    def log_failure(self, message: str) -> None:
        """To the log file; to the screen too, unless the failed rank wrote it on the same one."""
        is_on_screen = self.shares_screen and message != STORE_GONE and not message.endswith(INTERRUPTED)
        logger.error(message, extra={"file_only": is_on_screen})

    def _watch(self) -> None:
        seen = dict.fromkeys(self.others, ("", 0))
        while not self._stop.wait(POLL_S):
            self._beats += 1
            self.heartbeat(f"{self._beats}")
            message = self.read_failure()
            if message is None and (message := self._find_stalled_rank(seen)) is not None:
                self.shares_screen = False  # this rank is the first to say so
                self.fail(message)
            if message is not None and not self._stop.is_set():
                self.log_failure(message)
                os._exit(1)  # the main thread may be waiting in a collective, which nothing interrupts

    def _find_stalled_rank(self, seen: dict[int, tuple[str, int]]) -> str | None:
        """A sentence about a rank without a heartbeat for STALLED_S. `seen`: last heartbeat of each, times seen.

        Looks are counted and not seconds, which also pass while a job is suspended.
        """
        for rank, (last, times) in seen.items():
            with contextlib.suppress(RuntimeError):
                beat = self.store.get(HEARTBEAT.format(rank)).decode()
                seen[rank] = beat, times + 1 if beat == last else 0
                if beat != DONE and seen[rank][1] * POLL_S > STALLED_S:
                    reason = f"rank {rank} sent no heartbeat for {STALLED_S} s. Check its machine and the network."
                    return f"{reason} {RESUME}"
        return None

    def _watch_watchdog(self) -> None:
        """If the machine that hosts the store is lost, `_watch` waits for its answer for ever."""
        last, looks = -1, 0
        while self._thread.is_alive():
            self._thread.join(POLL_S)
            last, looks = self._beats, looks + 1 if self._beats == last else 0
            if looks * POLL_S > STALLED_S:
                problem = f"the store that connects the ranks did not answer for {STALLED_S} s"
                exit_at_once(f"{problem}. Check the first machine and the network. {RESUME}")

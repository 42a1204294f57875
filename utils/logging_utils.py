"""Logging: what users read, train.log, and how an error or a signal reaches them. Nothing heavy is imported here.

A line is a tag and its parts, separated by " | ": run, data, model, plan and memory before a run starts, step and eval
while it trains, saved and result when something came out.
"""

import contextlib
import errno
import logging
import os
import re
import select
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

LOG_FILE = "train.log"
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
FREE_SPACE = "free space and re-run the same command, or write to another disk (--output-dir, HF_HOME)"
CHOOSE_PLACE = "choose a place that you may write to (--output-dir, HF_HOME), or change its permissions"
FULL_BYTES = 20e6  # a disk with less free space is why a save failed
GRACE_S = 10  # seconds between SIGTERM and an exit without cleanup
HOW_TO_RESUME = (
    "re-run the same command, without --resume never, to resume from what was saved (checkpoints, scored images)"
)
logger = logging.getLogger("llava_plants")


class UserError(Exception):
    """Something the user can fix, in one message: the value, the reason, the next move."""


def printable(name: str) -> str:
    """A file name that stays on one line of the log."""
    return name if name.isprintable() else repr(name)


def first_line(error: BaseException) -> str:
    """An error of a library inside a sentence of ours: its type and the first line of its message."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip().splitlines()  # torch's are in colors
    return ": ".join([type(error).__name__, *lines[:1]])[:300]


def set_environment() -> None:
    """The documented environment variables, unless set, and no progress bars of libraries into a file or pipe.

    The hub library reads HF_TOKEN and not the documented HUGGINGFACE_TOKEN: the token is passed on, never written.
    """
    if sys.getfilesystemencoding() != "utf-8":  # LC_ALL=C without Python's UTF-8 mode: names would be read wrong
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    sys.unraisablehook = _log_unraisable
    warnings.filterwarnings("ignore", "Corrupt EXIF data")  # the image opens all the same
    warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated")  # transformers has no other name for it
    # Of a fused layer under FSDP; nothing is added in place to what a layer returns.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.0")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if os.environ.get("HUGGINGFACE_TOKEN"):
        os.environ.setdefault("HF_TOKEN", os.environ["HUGGINGFACE_TOKEN"])


def _log_unraisable(error) -> None:
    """sys.unraisablehook, such as for a killed worker, which its loader raises again: a traceback in the log alone."""
    message = f"{error.exc_type.__name__}: {error.exc_value}; {error.err_msg or 'ignored in'} {error.object!r}"
    trace = (error.exc_type, error.exc_value, error.exc_traceback)
    logger.warning(message, exc_info=trace, extra={"message_only": True})


# ---- lines


def setup_logging(
    folder: str | Path | None = None, name: str = LOG_FILE, stream: TextIO | None = None, prefix: str = ""
) -> None:
    """Lines to `stream` (stdout by default) at INFO; with a folder also to its log, with times and full tracebacks."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # asks for an optional package on machines without CUDA
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    screen = _ScreenHandler(stream or sys.stdout)
    screen.setFormatter(_ScreenFormatter(f"{prefix}%(message)s"))
    screen.addFilter(lambda record: not getattr(record, "file_only", False))
    logger.addHandler(screen)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(Path(folder) / name, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)


def is_watched() -> bool:
    """Whether this process's progress is for someone at a terminal: of several ranks, rank 0's alone."""
    return sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)


class _ScreenFormatter(logging.Formatter):
    """Bare INFO lines, `warning: ...`, `error: ...`; a traceback only of what the user cannot fix."""

    def format(self, record: logging.LogRecord) -> str:
        if getattr(record, "message_only", False):
            record = logging.makeLogRecord(record.__dict__ | {"exc_info": None, "exc_text": None})
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return prefix + super().format(record)


class _ScreenHandler(logging.StreamHandler):
    """Lines above a progress bar; a reader that leaves (`train.py | head`) stops the program as SIGTERM does."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # not imported for it
        with tqdm.tqdm.external_write_mode(self.stream) if tqdm else contextlib.nullcontext():
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)
            return
        _mute(self.stream)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
            on_sigterm(signal.SIGPIPE, None)


def _mute(stream: TextIO) -> None:
    """What this process still writes to the pipe of `stream`, by stdout or stderr, is lost without an error."""
    pipe, null = os.fstat(stream.fileno()), os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if os.path.samestat(os.fstat(descriptor), pipe):
            os.dup2(null, descriptor)
    os.close(null)


@contextlib.contextmanager
def skip_failure(what: str | Path) -> Iterator[None]:
    """What is only there to be looked at, such as a picture, is skipped with a warning where it cannot be made.

    Hours of training must not end in an error for it, and then again in each retry. A full disk is the user's to mend.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        message = f"{what}: skipped, since it cannot be made ({first_line(error)}); everything else continues"
        logger.warning(message, exc_info=True, extra={"message_only": True})


# ---- errors and signals


@contextlib.contextmanager
def report_errors(*kinds: type[Exception], when_interrupted: str = HOW_TO_RESUME) -> Iterator[None]:
    """An error inside becomes a log line and exit status 1, a signal 128 + its number, as in a shell.

    A UserError, or an error of `kinds`, is its message alone on the screen; the log file has the full traceback.
    """
    try:
        with _sigterm_as_interrupt(f"interrupted; {when_interrupted}"):
            yield
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        logger.warning(f"interrupted; {when_interrupted}")
        sys.exit(exit_status(stop))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
            _mute(sys.stdout)
            sys.exit(128 + signal.SIGPIPE)
        message = _disk_message(error) or _worker_message(error)
        if message is None and isinstance(error, (UserError, *kinds)):
            message = str(error)
            if message.startswith("Caught "):  # in a loader's worker: its traceback, as torch passes it on
                message = message.strip().splitlines()[-1].partition(": ")[2]
        if message:
            logger.error(message, exc_info=True, extra={"message_only": True})
        else:
            logger.critical("%s: %s", type(error).__name__, error, exc_info=True)
        sys.exit(1)


def exit_status(stop: KeyboardInterrupt) -> int:
    """128 + the signal's number, which the exception may carry; without one it was Ctrl-C."""
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


@contextlib.contextmanager
def _sigterm_as_interrupt(message: str) -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does, unless another handler stands already.

    Where a library swallows the exception (some do while they are imported), the process exits after GRACE_S.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()  # Python allows handlers in no other
    if not is_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    process, is_over = os.getpid(), threading.Event()

    def exit_later(number: int) -> None:
        if not is_over.wait(GRACE_S):
            logger.warning(message)
            os._exit(128 + number)

    def interrupt(number: int, frame) -> None:
        if os.getpid() != process:  # forked: a pool ends its workers by this signal
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        threading.Thread(target=exit_later, args=(number,), daemon=True).start()
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        is_over.set()


def _has_no_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _worker_message(error: Exception) -> str | None:
    """A loader's worker that is gone, in torch's words "DataLoader worker (pid 7) is killed by signal: Killed. "."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader worker"):
        return None
    move = "re-run the same command with fewer --num-workers, or 0"
    if "shared memory" in text or "Bus error" in text:
        move = f"give it more shared memory (docker run --shm-size=1g), or {move}"
    return f"{text.split('. ')[0].strip(' .')}, most often by the system for lack of memory; {move}"


def _disk_message(error: BaseException) -> str | None:
    """What the disk refused, wherever in the chain of causes: libraries wrap it in errors of their own.

    The writers of torch and safetensors do not say it at all; then the run directory's disk is looked at. A UserError
    has its own message, unless the disk is full.
    """
    is_ours = isinstance(error, UserError)
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in (FULL if is_ours else (*FULL, *FORBIDDEN)):
            move = FREE_SPACE if link.errno in FULL else CHOOSE_PLACE
            return f"{link.filename or 'the disk'}: {link.strerror}; {move}"
        link = link.__cause__ or link.__context__
    for handler in () if is_ours else logger.handlers:
        if isinstance(handler, logging.FileHandler):
            folder = Path(handler.baseFilename).parent
            if shutil.disk_usage(folder).free < FULL_BYTES:
                return f"{folder}: its disk is full ({type(error).__name__}); {FREE_SPACE}"
    return None

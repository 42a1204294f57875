"""Logging: what users read, train.log, and how an error or a signal reaches them. Nothing heavy is imported here.

A line is a tag and its parts, separated by " | ": run, data, model, plan and memory before a run starts, step and eval
while it trains, saved and result when something came out.
"""

import contextlib
import errno
import io
import logging
import os
import re
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from utils.signal_utils import end_children, handling

LOG_FILE = "train.log"
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
LIMITS = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.EFBIG)
WRITER = ("PytorchStreamWriter", "unexpected pos", "iostream error")  # what torch says of a file
NO_MEMORY = ("could not create a primitive", "can't allocate memory", "bad_alloc", "failed to map segment")
PLACES = "--output-dir, OUT, HF_HOME, a copy of the run"
FREE_SPACE = f"free space and re-run the same command, or write to another disk ({PLACES})"
CHOOSE_PLACE = f"choose a place that you may read and write ({PLACES}), or change its permissions"
RAISE_LIMIT = "raise the limit of this process (ulimit -a shows it) or end other programs, then re-run the same command"
AFTER_MENDING = "once that is mended, re-run the same command to resume from what was saved"
MOVES = {FULL: FREE_SPACE, FORBIDDEN: CHOOSE_PLACE, LIMITS: RAISE_LIMIT}
FULL_BYTES = 20e6  # a disk with less free space is why a save failed
HOW_TO_RESUME = "re-run the same command to resume from what was saved (checkpoints, scored images)"
LOCK_SAID_S = 10  # seconds of a wait for a lock after which it is said
LOCK_LIMIT_S = 3600  # after which a program ends: another one may rightly build a large data set
logger = logging.getLogger("llava_plants")
left_aside: dict[str, str] = {}  # environment variables of another program's launcher, such as ACCELERATE_USE_FSDP


class UserError(Exception):
    """Something the user can fix, in one message: the value, the reason, the next move."""


def printable(name: str) -> str:
    """A file name that stays on one line of the log."""
    return name if name.isprintable() else repr(name)


def one_line(message: object) -> str:
    """A library's message, which may end in a line break."""
    return " ".join(str(message).split())


def some(names: Iterable[str], count: int = 3) -> str:
    """The first of many names, on one line of the log."""
    names = list(names)
    return ", ".join(map(printable, names[:count])) + (", ..." if len(names) > count else "")


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


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
    _open_streams()
    sys.unraisablehook = _log_unraisable
    warnings.filterwarnings("ignore", "Corrupt EXIF data")  # the image opens all the same
    warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated")  # transformers has no other name for it
    # Of a fused layer under FSDP; nothing is added in place to what a layer returns.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
    left_aside.clear()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        left_aside[name] = os.environ.pop(name)
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0.0")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # less of a GPU's memory lies idle
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if os.environ.get("HUGGINGFACE_TOKEN"):
        os.environ.setdefault("HF_TOKEN", os.environ["HUGGINGFACE_TOKEN"])


def _open_streams() -> None:
    """What was closed (`>&-`) is /dev/null, whose number no other file gets; what a console cannot show is escaped."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: its own
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # its number became that of another file
                stream.reconfigure(errors="backslashreplace")


def _log_unraisable(error) -> None:
    """sys.unraisablehook, such as for a killed worker, which its loader raises again: a traceback in the log alone."""
    message = f"{error.exc_type.__name__}: {error.exc_value}; {error.err_msg or 'ignored in'} {error.object!r}"
    trace = (error.exc_type, error.exc_value, error.exc_traceback)
    logger.warning(message, exc_info=trace)


# ---- lines


def setup_logging(
    folder: str | Path | None = None, name: str = LOG_FILE, stream: TextIO | None = None, prefix: str = ""
) -> None:
    """Lines to `stream` (stdout by default) at INFO; with a folder also to its log, with times and full tracebacks.

    Raises UserError for a log that is no file.
    """
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
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a pipe would wait for a reader
            raise UserError(f"{path}: is no file, and the log is to be written there; move it, then re-run the command")
        file = _FileHandler(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)


def is_watched() -> bool:
    """Whether this process's progress is for someone at a terminal: of several ranks, rank 0's alone."""
    return sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)


class _ScreenFormatter(logging.Formatter):
    """Bare INFO lines, `warning: ...`, `error: ...`; a traceback only of what the user cannot fix: of CRITICAL."""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno < logging.CRITICAL:
            record = logging.makeLogRecord(record.__dict__ | {"exc_info": None, "exc_text": None})
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return prefix + super().format(record)


class _Dispensable(logging.StreamHandler):
    """A program continues without its screen (`train.py | head`, a closed terminal), or without its log file."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logger.handlers = [other for other in logger.handlers if other is not self]  # the list itself is being read
        if isinstance(self, _ScreenHandler):
            mute(self.stream)
        name = getattr(self, "baseFilename", "the screen")
        logger.warning("%s: %s; no more lines are written there", name, error.strerror)


class _ScreenHandler(_Dispensable):
    """Lines above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # not imported for it
        with tqdm.tqdm.external_write_mode(self.stream) if tqdm else contextlib.nullcontext():
            super().emit(record)


class _FileHandler(_Dispensable, logging.FileHandler):
    pass


def mute(stream: TextIO) -> None:
    """What this process still writes to the pipe of `stream`, by stdout or stderr, is lost without an error."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file
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
        logger.warning(message, exc_info=True)


# ---- errors and signals


@contextlib.contextmanager
def report_errors(*kinds: type[Exception], when_interrupted: str = HOW_TO_RESUME) -> Iterator[None]:
    """An error inside becomes a log line and exit status 1, a signal 128 + its number, as in a shell.

    A UserError, or an error of `kinds`, is its message alone on the screen; the log file has the full traceback.
    Signals raise KeyboardInterrupt (utils/signal_utils.py).
    """
    asked: list[int] = []

    def interrupt(number: int, frame) -> None:
        asked.append(number)
        if len(asked) == 1:
            raise KeyboardInterrupt(number)

    def say() -> None:
        logger.warning(f"interrupted; {when_interrupted}")

    with handling(interrupt, say), _limiting_locks():
        try:
            yield
            sys.stdout.flush()
        except KeyboardInterrupt as stop:
            asked.append(0)
            say()
            end_children()
            sys.exit(exit_status(stop))
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):  # by a print, not by a log line
                mute(sys.stdout)
                sys.exit(128 + signal.SIGPIPE)
            if message := _find_message(error, kinds):
                logger.error(message, exc_info=True)
            else:
                logger.critical("%s: %s", type(error).__name__, error, exc_info=True)
            end_children()
            sys.exit(1)


@contextlib.contextmanager
def _limiting_locks() -> Iterator[None]:
    """`datasets` and huggingface_hub wait without end or a word for a file lock that another program holds.

    Inside, such a wait is said, then raises UserError: filelock logs each of its attempts, in the thread that waits.
    """
    waits: dict[str, tuple[float, float]] = {}  # of each lock: since when, and how long at the last look

    def look(record: logging.LogRecord) -> bool:
        if record.levelno > logging.DEBUG or not isinstance(record.args, tuple):
            return True
        path, now = str(record.args[1]), time.monotonic()
        if record.msg.startswith("Lock %s acquired"):
            waits.pop(path, None)
        elif record.msg.startswith("Lock %s not acquired"):
            since, before = waits.get(path, (now, 0.0))
            waits[path] = since, now - since
            if now - since > LOCK_LIMIT_S:
                move = f"end the program that holds it (fuser {path} shows it), and {HOW_TO_RESUME}"
                raise UserError(f"the lock {path} was not free within {LOCK_LIMIT_S:,} s; {move}")
            if before <= LOCK_SAID_S < now - since:
                what = f"waiting for the lock {path}, which another program holds"
                logger.warning(f"{what}, for at most {LOCK_LIMIT_S:,} s")
        return False

    locks = logging.getLogger("filelock")
    locks.setLevel(logging.DEBUG)
    locks.addFilter(look)
    try:
        yield
    finally:
        locks.removeFilter(look)
        locks.setLevel(logging.NOTSET)


def exit_status(stop: KeyboardInterrupt) -> int:
    """128 + the signal's number, which the exception may carry; without one it was Ctrl-C."""
    return 128 + (stop.args[0] if stop.args else signal.SIGINT)


def _has_no_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _find_message(error: Exception, kinds: tuple[type[Exception], ...]) -> str | None:
    """One sentence for the user, or None for an error of this program."""
    is_ours = isinstance(error, (UserError, *kinds))
    if message := _system_message(error, is_ours) or _worker_message(error) or _environment_message(error):
        return message
    return _without_traceback(error).partition(": ")[2] if is_ours else None


def _without_traceback(error: BaseException) -> str:
    """Type and message; of an error in a loader's worker torch's message is that of the worker with its traceback."""
    text = str(error)
    return text.strip().splitlines()[-1] if text.startswith("Caught ") else f"{type(error).__name__}: {text}"


def _worker_message(error: Exception) -> str | None:
    """A loader's worker that is gone, in torch's words "DataLoader worker (pid 7) is killed by signal: Killed. "."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not text.startswith("DataLoader"):
        return None
    move = "re-run the same command with fewer --num-workers, or 0"
    if "timed out" in text:
        return f"{text}, waiting for a batch of its workers: the disk with the images may have stalled; {move}"
    if "shared memory" in text or "Bus error" in text:
        move = f"give it more shared memory (docker run --shm-size=1g), or {move}"
    return f"{text.split('. ')[0].strip(' .')}, most often by the system for lack of memory; {move}"


def _environment_message(error: Exception) -> str | None:
    """A library that cannot be imported, since an environment variable for it has an odd value."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][1:]
    if not any(frame.f_code.co_name == "<module>" for frame in frames):  # of a module that is being imported
        return None
    odd = [f"{name}={value}" for name, value in os.environ.items() if value and repr(value) in str(error)]
    return f"{', '.join(odd)}: not a value that a library understands ({first_line(error)}); unset it" if odd else None


def _system_message(error: BaseException, is_ours: bool) -> str | None:
    """What the system refused, wherever in the chain of causes: libraries wrap it in errors of their own.

    Some give the system's words alone, and the writers of torch and safetensors at times not even these; then the run
    directory's disk is looked at. An error of ours has its own message, unless the disk is full.
    """
    is_cause = True
    for link in causes_of(error):
        number = _errno_of(link)
        if number in (FULL if is_ours else errno.errorcode if is_cause else (*FULL, *FORBIDDEN)):
            problem = _without_traceback(link).splitlines()[0][:300]
            if isinstance(link, OSError) and link.strerror:
                problem = f"{link.filename or 'the disk'}: {link.strerror}"
            elif number == errno.ENOMEM:
                problem = f"the system gave no more memory ({problem})"
            return f"{problem}; {next((move for numbers, move in MOVES.items() if number in numbers), AFTER_MENDING)}"
        is_cause = is_cause and link.__cause__ is not None
    if is_ours:
        return None
    for folder in [Path(each.baseFilename).parent for each in logger.handlers if isinstance(each, _FileHandler)]:
        with contextlib.suppress(OSError):  # it is gone
            if shutil.disk_usage(folder).free < FULL_BYTES:
                return f"{folder}: its disk is full ({type(error).__name__}); {FREE_SPACE}"
    if any(words in str(error) for words in WRITER):
        return f"a file cannot be written ({first_line(error)}); {RAISE_LIMIT}"
    return None


def _errno_of(error: BaseException) -> int | None:
    """Of an error of the system, or of a library's that quotes the system's words, such as "File too large"."""
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return errno.ENOMEM
    if isinstance(error, UserError) or getattr(error, "errno", None) is not None:
        return getattr(error, "errno", None)
    is_quoting = isinstance(error, (OSError, RuntimeError)) or "Error while serializing" in text
    return next((number for number in errno.errorcode if is_quoting and os.strerror(number) in text), None)

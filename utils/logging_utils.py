"""Logging: what users read, train.log, and how an error reaches them. Nothing heavy is imported here.

Three kinds of line: header (what the run is), step (one every logging_steps), result (what came out).
"""

import contextlib
import errno
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

LOG_FILE = "train.log"
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
FULL_BYTES = 20e6  # a disk with less is why a save failed
GOES_ON = "the same command goes on from what was saved (checkpoints, images scored), but leave out --resume never"
logger = logging.getLogger("llava_plants")


class UserError(Exception):
    """Something the user can mend, said in one sentence: the value, the reason, the next move."""


def set_environment() -> None:
    """The documented environment variables, unless set, and no progress bars of libraries into a file or pipe.

    The hub library reads HF_TOKEN and not the documented HUGGINGFACE_TOKEN: the token is passed on, never written.
    """
    sys.unraisablehook = _tell_unraisable
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


def _tell_unraisable(error) -> None:
    """What Python cannot let pass, a line on the screen: the traceback is for the log, as with all else.

    torch raises that a loader's worker was killed wherever the run is just then; the loader itself tells it again.
    """
    trace = (error.exc_type, error.exc_value, error.exc_traceback)
    words = f"{error.exc_type.__name__}: {error.exc_value}; {error.err_msg or 'ignored in'} {error.object!r}"
    logger.warning(words, exc_info=trace, extra={"one_sentence": True})


def setup_logging(folder: str | Path | None = None, name: str = LOG_FILE, stream: TextIO | None = None) -> None:
    """Lines to the screen at INFO; with a folder also to its log, which keeps times and full tracebacks.

    `stream` is the screen, none: stdout.
    """
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # asks for an optional package on machines without CUDA
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    screen = logging.StreamHandler(stream or sys.stdout)
    screen.setFormatter(_ScreenFormatter("%(message)s"))
    logger.addHandler(screen)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(Path(folder) / name, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)


def report_as_rank(rank: int) -> None:
    """Of several ranks, rank 0 logs for all; the others log their errors alone, with their rank, and write no file."""
    if rank == 0:
        return
    logger.setLevel(logging.ERROR)
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
            handler.close()
        else:
            handler.setFormatter(_ScreenFormatter(f"rank {rank}: %(message)s"))


def is_watched() -> bool:
    """Whether this process's progress is for someone at a terminal: of several ranks, rank 0's alone."""
    return sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)


class _ScreenFormatter(logging.Formatter):
    """Bare INFO lines, `warning: ...`, `error: ...`; a traceback only of what the user cannot mend."""

    def format(self, record: logging.LogRecord) -> str:
        if getattr(record, "one_sentence", False):
            record = logging.makeLogRecord(record.__dict__ | {"exc_info": None, "exc_text": None})
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return prefix + super().format(record)


@contextlib.contextmanager
def report_errors(*kinds: type[Exception], when_interrupted: str = GOES_ON) -> Iterator[None]:
    """What goes wrong inside becomes a log line and exit status 1; train.log has the full traceback.

    A UserError, or one of `kinds`, is its one sentence on the screen.
    """
    try:
        yield
    except KeyboardInterrupt:
        logger.warning(f"interrupted; {when_interrupted}")
        sys.exit(130)
    except Exception as error:
        sentence = _disk_sentence(error) or _worker_sentence(error)
        if sentence is None and isinstance(error, (UserError, *kinds)):
            sentence = _own_sentence(error)
        if sentence:
            logger.error(sentence, exc_info=True, extra={"one_sentence": True})
        else:
            logger.critical("%s: %s", type(error).__name__, error, exc_info=True)
        sys.exit(1)


def _own_sentence(error: Exception) -> str:
    """The error's own; from a DataLoader's worker it is the last line of a traceback that torch made its message."""
    told = str(error)
    return told.strip().splitlines()[-1].partition(": ")[2] if told.startswith("Caught ") else told


def _worker_sentence(error: Exception) -> str | None:
    """A loader's worker that is gone, in torch's words "DataLoader worker (pid 7) is killed by signal: Killed. "."""
    told = str(error)
    if not isinstance(error, RuntimeError) or not told.startswith("DataLoader worker"):
        return None
    move = "give the same command again with fewer --num-workers, or 0"
    if "shared memory" in told or "Bus error" in told:
        move = f"give it more shared memory (docker run --shm-size=1g), or {move}"
    return f"{told.split('. ')[0].strip(' .')}, most often by the system for want of memory; {move}"


def _disk_sentence(error: BaseException) -> str | None:
    """What the disk refused, wherever in the chain of causes: libraries wrap it in errors of their own.

    The writers of torch and safetensors do not say it at all; then the run folder's disk is looked at. A UserError has
    its own sentence, unless the disk is full.
    """
    mine = isinstance(error, UserError)
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in (FULL if mine else (*FULL, *FORBIDDEN)):
            return f"{link.filename or 'the disk'}: {link.strerror}; {_move(link.errno)}"
        link = link.__cause__ or link.__context__
    for handler in () if mine else logger.handlers:
        if isinstance(handler, logging.FileHandler):
            folder = Path(handler.baseFilename).parent
            if shutil.disk_usage(folder).free < FULL_BYTES:
                return f"{folder}: its disk is full ({type(error).__name__}); {_move(errno.ENOSPC)}"
    return None


def _move(number: int) -> str:
    if number in FULL:
        return "make room, and give the same command again; or write to another disk (--output-dir, HF_HOME)"
    return "name a place that you may use (--output-dir, HF_HOME), or change its permissions"


def first_line(error: BaseException) -> str:
    """Of the error's message, or its kind where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

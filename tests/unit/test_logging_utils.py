"""Tests of logging utils."""

import errno
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import filelock
import pytest

import train
from tests.conftest import ROOT, run_main
from utils import logging_utils, signal_utils
from utils.logging_utils import UserError, logger, report_errors, set_environment, setup_logging


def log_error(capsys, folder, error) -> tuple[int, str, str]:
    setup_logging(folder)
    with pytest.raises(SystemExit) as stop, report_errors(KeyError):
        raise error
    return stop.value.code, capsys.readouterr().out, (folder / "train.log").read_text()


def test_a_user_error_is_one_sentence_on_the_screen_and_a_traceback_in_the_log(tmp_path, capsys):
    status, screen, log = log_error(capsys, tmp_path, UserError("--dataset x: no such folder; name one"))
    assert (status, screen) == (1, "error: --dataset x: no such folder; name one\n")
    assert "Traceback" in log and "UserError" in log


def test_other_kinds_of_errors_can_count_as_user_errors(tmp_path, capsys):
    assert "Traceback" not in log_error(capsys, tmp_path, KeyError("x"))[1]


def test_a_critical_error_has_its_traceback_in_both(tmp_path, capsys):
    status, screen, log = log_error(capsys, tmp_path, ZeroDivisionError("boom"))
    assert status == 1 and screen.startswith("critical: ZeroDivisionError: boom") and "Traceback" in screen
    assert "CRITICAL ZeroDivisionError: boom" in log and "Traceback" in log


def test_an_error_that_python_must_ignore_is_a_line_on_the_screen_and_a_traceback_in_the_log(tmp_path, capsys):
    class Falling:
        def __del__(self):
            raise RuntimeError("DataLoader worker (pid 7) is killed")

    set_environment()
    setup_logging(tmp_path)
    del [Falling()][0]
    screen = capsys.readouterr()
    assert screen.out.startswith("warning: RuntimeError: DataLoader worker (pid 7) is killed; ")
    assert screen.out.count("\n") == 1 and not screen.err
    assert "Traceback" in (tmp_path / "train.log").read_text()


def test_names_of_files_are_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "épine").mkdir()
    code = "from utils.logging_utils import set_environment as s; s(); import os, sys; print(os.listdir(sys.argv[1]))"
    surroundings = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=surroundings, capture_output=True)
    assert done.stdout.decode() == "['épine']\n", done.stderr


def test_a_full_disk_is_a_sentence(tmp_path, capsys):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/checkpoint-5")
    status, screen, _ = log_error(capsys, tmp_path, error)
    assert status == 1 and screen.startswith("error: runs/x/checkpoint-5: No space left on device; free space")


def chained(*errors) -> Exception:
    for cause, error in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


def test_a_full_disk_is_found_in_the_chain_of_causes(tmp_path, capsys):
    full, closed = (
        OSError(errno.ENOSPC, "No space left on device", "hub/x"),
        PermissionError(errno.EACCES, "Denied", "y"),
    )
    status, screen, _ = log_error(capsys, tmp_path, chained(full, UserError("check the network")))
    assert status == 1 and screen.startswith("error: hub/x: No space left on device; free space")
    assert log_error(capsys, tmp_path, chained(closed, UserError("image y")))[1] == "error: image y\n"
    assert (
        "y: Denied; choose a place that you may read and write (--output-dir, OUT, HF_HOME, a copy of the run)"
        in log_error(capsys, tmp_path, chained(closed, RuntimeError("x")))[1]
    )


def test_a_writer_that_does_not_say_that_the_disk_is_full(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.logging_utils.shutil.disk_usage", lambda path: SimpleNamespace(free=1e6))
    status, screen, _ = log_error(capsys, tmp_path, RuntimeError("unexpected pos 64"))
    assert status == 1 and "its disk is full (RuntimeError); free space and re-run the same command" in screen


def test_an_interrupt_says_how_to_resume(tmp_path, capsys):
    status, screen, _ = log_error(capsys, tmp_path, KeyboardInterrupt())
    assert status == 130 and "to resume from what was saved" in screen


def test_documented_environment(monkeypatch, tmp_path, capsys):
    for name in ("TOKENIZERS_PARALLELISM", "PYTORCH_MPS_HIGH_WATERMARK_RATIO", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_secret")
    set_environment()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false" and os.environ["PYTORCH_MPS_HIGH_WATERMARK_RATIO"] == "0.0"
    from huggingface_hub import get_token

    assert get_token() == "hf_secret"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    set_environment()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true" and os.environ["HF_TOKEN"] == "hf_other"


def test_lines_carry_their_level_only_from_warning_on(tmp_path, capsys):
    setup_logging(tmp_path)
    logger.info("step 1")
    logger.warning("careful")
    assert capsys.readouterr().out == "step 1\nwarning: careful\n"


def test_a_lock_that_another_program_holds_is_named_and_ends_the_wait(tmp_path, capsys, monkeypatch):
    for name, seconds in (("LOCK_SAID_S", 0.1), ("LOCK_LIMIT_S", 0.4)):
        monkeypatch.setattr(logging_utils, name, seconds)
    setup_logging()
    path = tmp_path / "datasets_builder.lock"
    with pytest.raises(SystemExit) as stop, filelock.FileLock(path), report_errors():
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(path).acquire(timeout=0.3)  # as huggingface_hub tries again and again
        filelock.FileLock(path).acquire(timeout=0.8)
    warning, error = capsys.readouterr().out.splitlines()
    assert warning == f"warning: waiting for the lock {path}, which another program holds, for at most 0.4 s"
    assert stop.value.code == 1 and f"error: the lock {path} was not free within 0.4 s; end the program that" in error


def test_a_wait_for_a_lock_that_becomes_free_begins_anew(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging_utils, "LOCK_LIMIT_S", 0.3)
    path = tmp_path / "x.lock"
    with report_errors():
        for _ in range(2):
            with filelock.FileLock(path), pytest.raises(filelock.Timeout):
                filelock.FileLock(path).acquire(timeout=0.2)
            with filelock.FileLock(path):
                pass


# ---- signals, in a process of its own

PROGRAM = """
import signal, time
from utils import signal_utils
from utils.logging_utils import logger, report_errors, set_environment, setup_logging

signal_utils.GRACE_S = 0.2
set_environment()
setup_logging()
with report_errors():
"""


def start(body: str, grace_s: float = 0.2) -> subprocess.Popen:
    code = PROGRAM.replace("0.2", f"{grace_s}") + "".join(f"    {line}\n" for line in body.splitlines())
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


SWALLOWED = "try: signal.raise_signal(signal.SIGTERM)\nexcept BaseException: pass\ntime.sleep(60)"


@pytest.mark.parametrize(
    ("body", "status"),
    [("signal.raise_signal(signal.SIGTERM)", 143), ("signal.raise_signal(signal.SIGINT)", 130), (SWALLOWED, 143)],
    ids=["SIGTERM", "SIGINT", "swallowed"],
)
def test_a_signal_is_one_line_and_its_exit_status(body, status):
    process = start(body)
    screen, errors = process.communicate(timeout=30)
    assert process.returncode == status and not errors
    assert screen.startswith("warning: interrupted; re-run the same command") and screen.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "move"),
    [((), "re-run the same command to"), (("--resume", "never"), "leave --resume never out, and re-run the same")],
)
def test_a_signal_while_a_run_loads_is_one_line(flags, move, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.dataset.build_datasets", lambda *args: signal.raise_signal(signal.SIGTERM))
    argv = ["--preset", "tiny", "--output-dir", str(tmp_path / "run"), *flags]
    status, screen, errors = run_main(train.main, capsys, *argv)
    assert (status, errors) == (143, "")
    assert screen.startswith(f"warning: interrupted; {move}") and screen.count("\n") == 1


@pytest.mark.parametrize(
    "body",
    [
        "while True: print('line', flush=True); time.sleep(0.01)",
        "print('line', flush=True); time.sleep(0.5); print('line')",
    ],
    ids=["print", "unflushed"],
)
def test_a_reader_that_leaves_ends_a_program_whose_output_is_the_screen_quietly(body):
    process = start(body)
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    status, errors = process.wait(30), process.stderr.read()
    process.stderr.close()
    assert (status, errors) == (141, "")


def test_without_a_reader_of_its_lines_a_program_continues(tmp_path):
    """`train.py | head -1`: the log has all lines, the screen no more of them, nor an error."""
    process = start(
        f"setup_logging({str(tmp_path)!r})\nfor number in range(20): logger.info(f'line {{number}}'); time.sleep(0.02)"
    )
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    status, errors = process.wait(30), process.stderr.read()
    process.stderr.close()
    log = (tmp_path / "train.log").read_text()
    assert (status, errors) == (0, "") and log.count("INFO line") == 20
    assert log.count("the screen: Broken pipe; no more lines are written there") == 1


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"])
def test_a_screen_that_is_closed_or_full_changes_neither_status_nor_log(closed, tmp_path):
    code = (
        PROGRAM
        + f"    setup_logging({str(tmp_path)!r})\n    logger.info('line')\n    raise OSError(5, 'dying', 'disk')"
    )
    process = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], cwd=ROOT, capture_output=True, text=True
    )
    log = (tmp_path / "train.log").read_text()
    assert process.returncode == 1 and "INFO line" in log and "ERROR disk: dying; once that is mended" in log
    assert "Traceback" not in process.stdout + process.stderr and "Logging error" not in process.stderr


def test_a_log_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "train.log")  # to open it would wait for a reader
    with pytest.raises(UserError, match="train.log: is no file, and the log is to be written there; move it, then"):
        setup_logging(tmp_path)


def test_a_log_file_that_cannot_be_written_is_said_once(capsys):
    setup_logging()
    logger.addHandler(logging_utils._FileHandler("/dev/full"))
    for _ in range(3):
        logger.info("line")
    screen = capsys.readouterr()
    assert screen.out.splitlines() == [
        "line",
        "warning: /dev/full: No space left on device; no more lines are written there",
        "line",
        "line",
    ]
    assert not screen.err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(errno.EIO, os.strerror(errno.EIO), "runs/x/metrics.jsonl"),
            "runs/x/metrics.jsonl: Input/output error; ",
        ),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE), "runs/x"), "runs/x: Stale file handle; once that is mended"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "the disk: No such file or directory; once"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "the disk: Resource temporarily unavailable; raise"),
        (
            MemoryError(),
            "error: the system gave no more memory (MemoryError: ); raise the limit of this process (ulimit -a",
        ),
        (
            ImportError("libtorch_cpu.so: failed to map segment from shared object"),
            "error: the system gave no more memory (ImportError: libtorch_cpu.so: failed to map segment",
        ),
        (
            RuntimeError("could not create a primitive"),
            "gave no more memory (RuntimeError: could not create a primitive)",
        ),
        (
            RuntimeError("Error while serializing: I/O error: File too large (os error 27)"),
            "File too large (os error 27); raise",
        ),
        (
            RuntimeError("unable to open shared memory object: Too many open files (24)"),
            "open files (24); raise the limit",
        ),
        (
            RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"),
            "a file cannot be written (RuntimeError",
        ),
        (RuntimeError("DataLoader timed out after 600 seconds"), "waiting for a batch of its workers: the disk"),
        (
            OSError(
                "Caught OSError in DataLoader worker process 0.\nOriginal Traceback\n"
                "  x\nOSError: [Errno 5] Input/output error: 'a'\n"
            ),
            "error: OSError: [Errno 5] Input/output error: 'a'; once that is mended",
        ),
    ],
)
def test_what_the_system_refuses_is_one_sentence(error, sentence, tmp_path, capsys):
    status, screen, log = log_error(capsys, tmp_path, error)
    assert status == 1 and sentence in screen and screen.count("\n") == 1 and screen.startswith("error: ")
    assert "Traceback" in log


def test_an_error_is_reported_although_the_run_folder_is_gone(tmp_path, capsys):
    folder = tmp_path / "run"
    setup_logging(folder)
    with pytest.raises(SystemExit), report_errors():
        shutil.rmtree(folder)
        raise RuntimeError("unexpected pos 64")
    assert capsys.readouterr().out.startswith(
        "error: a file cannot be written (RuntimeError: unexpected pos 64); raise"
    )


def test_an_odd_value_for_a_library_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "odd_library.py").write_text("import os\nint(os.environ['ODD_TIMEOUT'])")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ODD_TIMEOUT", "soon")
    setup_logging()
    with pytest.raises(SystemExit), report_errors():
        import odd_library  # noqa: F401
    assert capsys.readouterr().out.startswith("error: ODD_TIMEOUT=soon: not a value that a library understands (ValueE")


def test_after_a_training_that_saved_for_long_the_rest_has_its_time_too():
    body = """
from utils.signal_utils import handling
with handling(lambda number, frame: None):
    signal.raise_signal(signal.SIGTERM)
    time.sleep(1.5)
time.sleep(0.5)
print('cleaned up')"""
    process = start(body, grace_s=1)
    assert (process.communicate(timeout=30)[0], process.returncode) == ("cleaned up\n", 0)


def test_a_signal_that_was_ignored_at_the_start_stays_ignored():
    """nohup: SIGHUP is ignored; otherwise it is as SIGTERM."""
    body = "signal.raise_signal(signal.SIGHUP); print('on')"
    code = PROGRAM + f"    {body}"
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    ignored = run(["sh", "-c", 'trap \'\' HUP; exec "$0" -c "$1"', sys.executable, code])
    assert (ignored.returncode, ignored.stdout) == (0, "on\n")
    assert run([sys.executable, "-c", code]).returncode == 128 + signal.SIGHUP


@pytest.mark.parametrize(
    "body",
    [
        # C code that does not return; reporting; a training that saves without end.
        "import hashlib; print('on', flush=True); hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)",
        "logger.addFilter(lambda record: print('on', flush=True) or time.sleep(60))\nraise KeyboardInterrupt",
        "import runtime.interrupt as it\nwith it.StopRequest().listening(): print('on', flush=True); time.sleep(60)",
    ],
    ids=["C", "reporting", "training"],
)
def test_a_second_signal_ends_at_once_from_anywhere(body):
    process = start(body, grace_s=30)
    assert process.stdout.readline() == "on\n"
    time.sleep(signal_utils.SAME_S)  # it is in C code by now
    process.send_signal(signal.SIGHUP)
    time.sleep(2 * signal_utils.SAME_S)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM and errors.strip() in ("", STOPPING)


STOPPING = "stopping after this forward pass, then saving; a second signal ends at once"

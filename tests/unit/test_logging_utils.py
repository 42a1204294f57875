"""Tests of logging utils."""

import errno
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
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
        "y: Denied; choose a place that you may write to (--output-dir"
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


# ---- signals, in a process of its own

PROGRAM = """
import signal, time
from runtime.interrupt import StopRequest
from utils import logging_utils
from utils.logging_utils import logger, report_errors, setup_logging

logging_utils.GRACE_S = 0.2
setup_logging()
with report_errors():
"""


def start(body: str) -> subprocess.Popen:
    code = PROGRAM + "".join(f"    {line}\n" for line in body.splitlines())
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


def test_a_signal_while_a_run_loads_is_one_line(tmp_path):
    process = start(
        "import train\n"
        "from data import dataset\n"
        "dataset.build_datasets = lambda *args: signal.raise_signal(signal.SIGTERM)\n"
        f"train.main(['--preset', 'tiny', '--output-dir', {str(tmp_path / 'run')!r}])"
    )
    screen, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (143, "")
    assert screen.startswith("warning: interrupted; re-run the same command") and screen.count("\n") == 1


@pytest.mark.parametrize(
    "body",
    [
        "while True: logger.info('line'); time.sleep(0.01)",
        "while True: print('line', flush=True); time.sleep(0.01)",
        "print('line', flush=True); time.sleep(0.5); print('line')",
        # A training is asked to stop: it saves first.
        (
            "request = StopRequest()\n"
            "with request.listening():\n"
            "    while request.signal is None: logger.info('line'); time.sleep(0.01)\n"
            "    logger.info('saved')\n"
            "    request.check()"
        ),
    ],
    ids=["log", "print", "unflushed", "training"],
)
def test_a_reader_that_leaves_ends_the_program_quietly(body):
    process = start(body)
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    status, errors = process.wait(30), process.stderr.read()
    process.stderr.close()
    assert status == 141 and errors.replace("\n", "") in ("", STOPPING)


STOPPING = "stopping after this forward pass, then saving; a second signal ends at once"

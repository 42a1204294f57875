import errno
import itertools
import os
from types import SimpleNamespace

import pytest

from utils.logging_utils import UserError, logger, report_errors, set_environment, setup_logging


def told(capsys, folder, error) -> tuple[int, str, str]:
    setup_logging(folder)
    with pytest.raises(SystemExit) as stop, report_errors(KeyError):
        raise error
    return stop.value.code, capsys.readouterr().out, (folder / "train.log").read_text()


def test_a_user_error_is_one_sentence_on_the_screen_and_a_traceback_in_the_log(tmp_path, capsys):
    status, screen, log = told(capsys, tmp_path, UserError("--dataset x: no such folder; name one"))
    assert (status, screen) == (1, "error: --dataset x: no such folder; name one\n")
    assert "Traceback" in log and "UserError" in log


def test_other_kinds_can_be_named_as_user_errors(tmp_path, capsys):
    assert "Traceback" not in told(capsys, tmp_path, KeyError("x"))[1]


def test_a_critical_error_has_its_traceback_in_both(tmp_path, capsys):
    status, screen, log = told(capsys, tmp_path, ZeroDivisionError("boom"))
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


def test_a_full_disk_is_a_sentence(tmp_path, capsys):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/checkpoint-5")
    status, screen, _ = told(capsys, tmp_path, error)
    assert status == 1 and screen.startswith("error: runs/x/checkpoint-5: No space left on device; make room")


def chained(*errors) -> Exception:
    for cause, error in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


def test_a_full_disk_is_found_in_the_chain_of_causes(tmp_path, capsys):
    full, closed = (
        OSError(errno.ENOSPC, "No space left on device", "hub/x"),
        PermissionError(errno.EACCES, "Denied", "y"),
    )
    status, screen, _ = told(capsys, tmp_path, chained(full, UserError("check the network")))
    assert status == 1 and screen.startswith("error: hub/x: No space left on device; make room")
    assert told(capsys, tmp_path, chained(closed, UserError("image y")))[1] == "error: image y\n"
    assert (
        "y: Denied; name a place that you may use (--output-dir"
        in told(capsys, tmp_path, chained(closed, RuntimeError("x")))[1]
    )


def test_a_writer_that_does_not_say_that_the_disk_is_full(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.logging_utils.shutil.disk_usage", lambda path: SimpleNamespace(free=1e6))
    status, screen, _ = told(capsys, tmp_path, RuntimeError("unexpected pos 64"))
    assert status == 1 and "its disk is full (RuntimeError); make room, and give the same command again" in screen


def test_an_interrupt_says_how_to_go_on(tmp_path, capsys):
    status, screen, _ = told(capsys, tmp_path, KeyboardInterrupt())
    assert status == 130 and "the same command goes on from what was saved" in screen


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

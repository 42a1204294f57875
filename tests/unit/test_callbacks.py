import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from models.callbacks import RunLog
from runtime.run_files import append_metrics, read_metrics
from tests.unit.test_trainer import make_trainer
from utils.logging_utils import setup_logging


def test_a_run_writes_every_step_a_line_every_few_and_a_picture(tiny, tmp_path, capsys):
    setup_logging()
    make_trainer(tiny, tmp_path, max_steps=6, logging_steps=3, eval_steps=4).train()
    lines = read_metrics(tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "learning_rate", "images", "image_tokens", "seconds", "memory_gib", "peak_gib"} <= set(
        steps[0]
    )
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 6]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ") and "/6" in line]
    assert [line.split()[1] for line in told] == ["1/6", "3/6", "6/6"]
    assert all(
        word in told[1] for word in ("loss", "lr", "grad norm", "images/s", "55 image tokens/image", "peak", "GiB")
    )
    assert Image.open(tmp_path / "loss.png").size == (800, 1200)


@pytest.fixture
def log(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), max_grad_norm=0.5, device=torch.device("cpu"))
    trainer = SimpleNamespace(args=args, backfilled_evals=[])
    return RunLog(trainer)


def test_a_loss_spike_is_told_and_a_noisy_loss_is_not(log, capsys):
    setup_logging()
    for step, loss in enumerate([2.0, 2.4, 1.7] * 5 + [3.9], 1):
        log.warn_of_spikes({"step": step, "loss": loss, "grad_norm": 0.1})
    assert capsys.readouterr().out == ""
    log.warn_of_spikes({"step": 17, "loss": 4.5, "grad_norm": 0.1})
    assert "step 17: loss 4.500 is a spike, the last 16 steps had a median of 2.000" in capsys.readouterr().out


def test_a_small_loss_that_doubles_is_no_spike(log, capsys):
    setup_logging()
    for step, loss in enumerate([0.01] * 12 + [0.4], 1):
        log.warn_of_spikes({"step": step, "loss": loss, "grad_norm": 0.1})
    assert capsys.readouterr().out == ""


def test_a_gradient_norm_is_compared_with_its_median_and_not_with_a_limit(log, capsys):
    setup_logging()
    for step, norm in enumerate([50.0, 40.0, 4.0] + [2.0] * 9 + [39.0, None], 1):
        log.warn_of_spikes({"step": step, "loss": 1.0, "grad_norm": norm})
    assert capsys.readouterr().out == ""
    log.warn_of_spikes({"step": 15, "loss": 1.0, "grad_norm": 41.0})
    expected = "step 15: gradient norm 41.000 is a spike, the last 13 steps had a median of 2.000; clipped to 0.5"
    assert expected in capsys.readouterr().out


def test_on_resume_what_came_after_the_checkpoint_is_dropped(log, tmp_path):
    wanted = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.0}]
    for entry in [*wanted, {"step": 3, "loss": 0.5}, {"step": 2, "completed": True}]:
        append_metrics(tmp_path, entry)
    state = SimpleNamespace(global_step=2, is_world_process_zero=True, log_history=[])
    log.on_train_begin(log.trainer.args, state, None)
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == wanted

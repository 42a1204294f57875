"""What a run logs, saves and warns of as it goes."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers.trainer_callback import TrainerState

from models import callbacks
from models.callbacks import RunLog
from runtime.run_dir import Run
from runtime.run_files import read_metrics
from tests.unit.test_trainer import make_trainer
from utils.logging_utils import setup_logging


def test_metrics_of_every_step_a_line_of_every_few_and_a_plot(tiny, tmp_path, capsys):
    setup_logging()
    make_trainer(tiny, tmp_path, max_steps=6, logging_steps=3, eval_steps=4).train()
    lines = read_metrics(tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    names = {"grad_norm", "learning_rate", "images", "image_tokens", "flops", "seconds", "memory_gib", "peak_gib"}
    assert names <= set(steps[0])
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 6]
    output = capsys.readouterr().out.splitlines()
    logged = [line.split(" | ") for line in output if line.startswith("step ")]
    assert [parts[0] for parts in logged] == ["step 1/6", "step 3/6", "step 6/6"]
    for part, words in zip(
        logged[1], ("step", "loss", "lr", "grad norm", "images/s", "55 image tokens/image", "peak", "min left")
    ):
        assert words in part
    assert [line.split(" | ")[1] for line in output if line.startswith("eval | ")] == ["step 4", "step 6"]
    assert Image.open(tmp_path / "loss.png").size == (800, 1200)


@pytest.fixture
def log(tmp_path):
    often = {"logging_steps": 1, "eval_steps": None, "save_steps": 50}
    args = SimpleNamespace(max_grad_norm=0.5, world_size=2, bf16=True, device=torch.device("cuda"), **often)
    run = Run(SimpleNamespace(output_dir=str(tmp_path)))
    return RunLog(SimpleNamespace(args=args, run=run, backfilled_evals=[]))


def test_on_a_gpu_a_line_has_the_share_of_the_matmul_peak(log, monkeypatch):
    monkeypatch.setattr(callbacks, "measure_matmul_rate", lambda device, dtype: 1e12 if dtype == torch.bfloat16 else 0)
    state = TrainerState(max_steps=9)
    log.on_train_begin(log.trainer.args, state, None)
    state.global_step = 1
    step = {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 0.1, "seconds": 2.0, "peak_gib": 1.0}
    log.window = [step | {"images": 8, "image_tokens": 40, "flops": 1.88e12}]
    assert "5 image tokens/image | 47% of matmul peak | peak 1.00 GiB" in log.format_line(state)


def warnings_of(log, capsys, name: str, values: list) -> list[str]:
    setup_logging()
    for step, value in enumerate(values, 1):
        log.warn_of_spikes({"step": step, "loss": 1.0, "grad_norm": 0.1} | {name: value})
    return capsys.readouterr().out.splitlines()


def test_a_loss_spike_is_logged_and_a_noisy_loss_is_not(log, capsys):
    lines = warnings_of(log, capsys, "loss", [2.0, 2.4, 1.7] * 5 + [3.9, None, 4.5])
    assert lines == ["warning: step 18: loss 4.500 is a spike, the last 16 steps had a median of 2.000"]


def test_a_small_loss_that_doubles_is_no_spike(log, capsys):
    assert not warnings_of(log, capsys, "loss", [0.01] * 12 + [0.4])


def test_a_gradient_norm_is_compared_with_its_median_and_not_with_a_limit(log, capsys):
    lines = warnings_of(log, capsys, "grad_norm", [50.0, 40.0, 4.0] + [2.0] * 9 + [39.0, None, 41.0])
    expected = "warning: step 15: gradient norm 41.000 is a spike, the last 13 steps had a median of 2.000"
    assert lines == [f"{expected}; clipped to 0.5"]

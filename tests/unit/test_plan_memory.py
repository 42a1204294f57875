import pytest
import torch

from models.fitting import plan_memory
from tests.unit.test_trainer import Cramped, make_fused, make_trainer, same, weights
from utils.logging_utils import UserError, setup_logging


def fit(trainer, tiny, **how):
    plan_memory(trainer, tiny.collator.largest_row(tiny.rows(4)), 0.9, **how)


def test_what_fits_is_chosen_and_said_and_changes_no_weight(tiny, tmp_path, capsys, on_a_gpu):
    setup_logging()
    trainer = make_fused(tiny, tmp_path / "a", per_device_train_batch_size=2, gradient_accumulation_steps=8)
    before, state = weights(trainer), torch.get_rng_state()
    fit(trainer, tiny)
    assert (trainer.micro_batch_size, [one.keep for one in trainer.fused]) == (16, [True] * 3)
    assert same(before, weights(trainer)) and torch.equal(state, torch.get_rng_state())
    assert not any(parameter.grad is not None for parameter in trainer.model.parameters())
    told = capsys.readouterr().out
    assert "plan   16 images at a time, 3 of 3 layers keep their activations; predicted peak" in told
    assert "plan   kernels are plain, their compilation would not be won back" in told
    trainer.train()
    other = make_fused(tiny, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=8)
    other.train()
    assert same(weights(trainer), weights(other), 1e-5)


@pytest.mark.parametrize("recompute, keeps, offloads", [("true", 0, False), ("offload", 0, True), ("false", 3, False)])
def test_recomputation_as_configured(recompute, keeps, offloads, tiny, tmp_path, on_a_gpu):
    trainer = make_fused(tiny, tmp_path)
    fit(trainer, tiny, recompute=recompute)
    assert sum(one.keep for one in trainer.fused) == keeps and any(one.offload for one in trainer.fused) == offloads


def test_a_plan_that_does_not_fit_is_made_smaller(tiny, tmp_path, capsys, on_a_gpu):
    setup_logging()
    trainer = make_fused(tiny, tmp_path)
    Cramped(trainer.model, room=4)
    fit(trainer, tiny)
    assert trainer.micro_batch_size == 4
    words = "plan: 16 images at a time with 3 layers that keep their activations do not fit; trying less"
    assert words in capsys.readouterr().out


def test_a_plan_that_takes_more_than_predicted_is_made_smaller(tiny, tmp_path, on_a_gpu):
    trainer = make_fused(tiny, tmp_path)
    tried = []

    def measure(trainer, row, images):
        tried.append(images)
        return 0.1, 1e12 if images > 4 else 1e6

    on_a_gpu.setattr("models.fitting._try_micro_batch", measure)
    fit(trainer, tiny, compile="false")
    assert tried[0] == 16 and trainer.micro_batch_size == tried[-1] <= 4


def test_a_card_too_small_for_one_photo_is_told_before_the_run(tiny, tmp_path, on_a_gpu):
    trainer = make_fused(tiny, tmp_path)
    Cramped(trainer.model, room=0)
    with pytest.raises(UserError, match="plan: out of memory with one image at a time; use --gradient-checkpointing"):
        fit(trainer, tiny)


def test_without_auto_batch_it_is_what_the_config_says(tiny, tmp_path, on_a_gpu):
    trainer = make_fused(tiny, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    fit(trainer, tiny, auto_batch=False)
    assert trainer.micro_batch_size == 2 and not any(one.keep for one in trainer.fused)


@pytest.mark.parametrize("images, compiles", [(1, False), (2, True)])
def test_with_one_photo_at_a_time_nothing_is_won_by_compiling(images, compiles, tiny, tmp_path, on_a_gpu):
    asked = []
    on_a_gpu.setattr("models.fitting.COMPILE_SECONDS", 0)
    on_a_gpu.setattr("models.fused_layers.Kernels.compile", lambda self: asked.append(self))
    trainer = make_fused(tiny, tmp_path, per_device_train_batch_size=images, gradient_accumulation_steps=16 // images)
    fit(trainer, tiny, auto_batch=False)
    assert bool(asked) == compiles


@pytest.mark.parametrize(
    "compile, seconds, steps_done, compiles",
    [("auto", 0, 0, True), ("auto", 1e6, 0, False), ("auto", 0, 4, False), ("false", 0, 0, False)],
)
def test_kernels_are_compiled_if_the_run_wins_the_time_back(
    compile, seconds, steps_done, compiles, tiny, tmp_path, on_a_gpu
):
    asked = []
    on_a_gpu.setattr("models.fitting.COMPILE_SECONDS", seconds)
    on_a_gpu.setattr("models.fused_layers.Kernels.compile", lambda self: asked.append(self))
    trainer = make_fused(tiny, tmp_path)
    fit(trainer, tiny, compile=compile, steps_done=steps_done)
    assert bool(asked) == compiles


def test_stock_layers_and_machines_without_a_card_are_left_alone(tiny, tmp_path, on_a_gpu):
    trainer = make_trainer(tiny, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    fit(trainer, tiny)
    assert trainer.micro_batch_size == 2
    on_a_gpu.setattr("models.fitting.available_gpu_memory", lambda device, fraction: None)
    trainer = make_fused(tiny, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    fit(trainer, tiny)
    assert trainer.micro_batch_size == 2

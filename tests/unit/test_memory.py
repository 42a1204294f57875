"""The memory model against measured peaks, the plans made from it, and the planner on small models."""

from types import SimpleNamespace

import pytest
import torch

from models.memory import (
    Cost,
    MemoryOptions,
    MicroBatcher,
    choose_plan,
    is_worth_compiling,
    optimizer_bytes,
    plan_memory,
    step_cost,
)
from runtime.device import is_out_of_memory
from tests.unit.test_trainer import equal, limit_memory, make_fused, make_trainer, weights
from utils.logging_utils import UserError, setup_logging

GIB = 2**30
MISTRAL = SimpleNamespace(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32
)  # of llava-v1.6-mistral-7b
TRAINABLE = 41_943_040  # parameters of LoRA at rank 16
IMAGES = 16  # of a step


def cost_of(tokens: int, compiled: bool = True) -> Cost:
    return step_cost(MISTRAL, 64, 2, compiled, tokens, 4.61 * GIB + 4 * TRAINABLE + 65e6)


# tokens, micro-batch size, layers without checkpointing, offload, compiled, GiB measured on an H100 (docs/LOG.md)
MEASURED = [
    (1199, 16, 32, False, True, 61.03),
    (2373, 8, 32, False, True, 60.39),
    (2372, 1, 0, False, True, 5.82),
    (1196, 1, 0, False, True, 5.38),
    (1197, 1, 0, True, True, 5.20),
    (1197, 1, 0, False, False, 5.87),
    (1197, 1, 0, True, False, 5.59),
    (2373, 1, 0, False, False, 6.84),
    (2373, 8, 32, False, False, 67.70),
]


@pytest.mark.parametrize("tokens, images, kept, offload, compiled, measured", MEASURED)
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(tokens, images, kept, offload, compiled, measured):
    assert cost_of(tokens, compiled).peak(images, kept, offload) / GIB == pytest.approx(measured, rel=0.1)


def test_the_plan_for_gpus_of_many_sizes():
    """More memory never makes a slower plan, and no plan is above its budget unless nothing fits."""
    last = 0.0
    for room in (5, 6, 7, 8, 11, 13, 20, 40, 68, 130):
        plan = choose_plan(cost_of(1199), IMAGES, room * GIB)
        speed = plan.micro_batch_size * 100 + plan.kept
        assert plan.peak <= room * GIB or (plan.micro_batch_size, plan.kept, plan.offload) == (1, 0, True)
        assert plan.kept > 0 or room < 8
        last = max(last, speed)
    assert (plan.micro_batch_size, plan.kept) == (16, 32)


@pytest.mark.parametrize(
    "checkpointing, expected", [("true", (16, 0, False)), ("offload", (16, 0, True)), ("false", (16, 32, False))]
)
def test_activation_checkpointing_can_be_fixed(checkpointing, expected):
    assert choose_plan(cost_of(1199), IMAGES, 75 * GIB, checkpointing)[:3] == expected


@pytest.mark.parametrize("checkpointing, offload, kept", [("auto", True, 0), ("true", False, 0), ("false", False, 32)])
def test_where_nothing_fits_the_smallest_is_tried(checkpointing, offload, kept):
    plan = choose_plan(cost_of(1199), IMAGES, 1 * GIB, checkpointing)
    assert (plan.micro_batch_size, plan.kept, plan.offload) == (1, kept, offload) and plan.peak > 1 * GIB


@pytest.mark.parametrize("images", [1, 7, 16, 64])
def test_micro_batches_are_as_equal_as_they_can_be(images):
    """Never 16 images as 15 and 1: the last micro-batch would cost as much as the first."""
    for room in range(6, 70):
        size = choose_plan(cost_of(1199), images, room * GIB).micro_batch_size
        assert size == -(-images // -(-images // size))


def test_optimizer_state_by_name():
    names = ("adamw_torch_fused", "paged_adamw_8bit", "adamw_8bit", "sgd", "adafactor", "unheard_of")
    assert [optimizer_bytes(name, 10) for name in names] == [80, 0, 20, 0, 0, 80]


def test_eager_kernels_need_more_transient_memory():
    compiled, eager = cost_of(1199, True), cost_of(1199, False)
    assert compiled.activation == eager.activation and eager.transient > 2 * compiled.transient


def test_offloaded_inputs_must_fit_the_host():
    cost = cost_of(1199)
    assert choose_plan(cost, IMAGES, 60 * GIB, "offload").micro_batch_size == 16
    assert choose_plan(cost, IMAGES, 60 * GIB, "offload", host=5 * cost.checkpoint).micro_batch_size == 4


@pytest.mark.parametrize("size, sizes", [(16, [8, 4, 2, 1]), (7, [3, 1])])
def test_a_micro_batch_is_halved_until_one_image_does_not_fit(size, sizes):
    micro_batcher, seen = MicroBatcher(size), []
    with pytest.raises(UserError, match="use a larger GPU"):
        while True:
            micro_batcher.halve(torch.OutOfMemoryError("CUDA out of memory."), "use a larger GPU")
            seen.append(micro_batcher.size)
    assert seen == sizes
    with pytest.raises(RuntimeError, match="shapes differ"):
        MicroBatcher(4).halve(RuntimeError("shapes differ"), "use a larger GPU")


def test_an_evaluation_compiles_from_two_thousand_images_on():
    assert is_worth_compiling("auto", 2010) and not is_worth_compiling("auto", 1990)
    assert is_worth_compiling("true", 1) and not is_worth_compiling("false", 1e9)


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), True),
        (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_every_wording_of_out_of_memory(error, is_it):
    assert is_out_of_memory(error) == is_it


# ---- the planner


def plan(trainer, tiny, steps_left=4, **options):
    trainer.memory_options = MemoryOptions(**options)
    plan_memory(trainer, tiny.collator.largest_row(tiny.rows(4)), steps_left)


def test_what_fits_is_chosen_and_logged_and_changes_no_weight(tiny, tmp_path, capsys, simulated_gpu):
    setup_logging()
    trainer = make_fused(tiny, tmp_path / "a", per_device_train_batch_size=2, gradient_accumulation_steps=8)
    before, state = weights(trainer), torch.get_rng_state()
    plan(trainer, tiny)
    assert (trainer.micro_batcher.size, [layer.keep for layer in trainer.fused]) == (16, [True] * 3)
    assert equal(before, weights(trainer)) and torch.equal(state, torch.get_rng_state())
    assert not any(parameter.grad is not None for parameter in trainer.model.parameters())
    printed = capsys.readouterr().out
    assert "memory | micro-batch 16 | activation checkpointing 0/3 layers | peak " in printed
    assert "memory | kernels not compiled: the run would not win back the time | tried in" in printed
    trainer.train()
    other = make_fused(tiny, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=8)
    other.train()
    assert equal(weights(trainer), weights(other), 1e-5)


@pytest.mark.parametrize(
    "checkpointing, keeps, offloads", [("true", 0, False), ("offload", 0, True), ("false", 3, False)]
)
def test_activation_checkpointing_as_configured(checkpointing, keeps, offloads, tiny, tmp_path, simulated_gpu):
    trainer = make_fused(tiny, tmp_path)
    plan(trainer, tiny, gradient_checkpointing=checkpointing)
    assert (
        sum(layer.keep for layer in trainer.fused) == keeps
        and any(layer.offload for layer in trainer.fused) == offloads
    )


def test_a_plan_that_does_not_fit_is_made_smaller(tiny, tmp_path, capsys, simulated_gpu):
    setup_logging()
    trainer = make_fused(tiny, tmp_path)
    limit_memory(trainer.model, 4)
    plan(trainer, tiny)
    assert trainer.micro_batcher.size == 4
    words = "memory: micro-batch 16 with activation checkpointing in 0 of 3 layers does not fit; trying less"
    assert words in capsys.readouterr().out


def test_a_plan_that_takes_more_than_predicted_is_made_smaller(tiny, tmp_path, simulated_gpu):
    trainer = make_fused(tiny, tmp_path)
    tried = []

    def measure(trainer, row, images):
        tried.append(images)
        return 0.1, 1e12 if images > 4 else 1e6

    simulated_gpu.setattr("models.memory.try_micro_batch", measure)
    plan(trainer, tiny, compile="false")
    assert tried[0] == 16 and trainer.micro_batcher.size == tried[-1] <= 4


def test_a_gpu_too_small_for_one_image_is_reported_before_the_run(tiny, tmp_path, simulated_gpu):
    trainer = make_fused(tiny, tmp_path)
    limit_memory(trainer.model, 0)
    with pytest.raises(UserError, match="memory: out of memory with micro-batch 1; use --gradient-checkpointing"):
        plan(trainer, tiny)


def test_without_auto_batch_it_is_what_the_config_says(tiny, tmp_path, simulated_gpu):
    trainer = make_fused(tiny, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    plan(trainer, tiny, auto_batch=False)
    assert trainer.micro_batcher.size == 2 and not any(layer.keep for layer in trainer.fused)


@pytest.mark.parametrize("images, compiles", [(1, False), (2, True)])
def test_micro_batches_of_one_image_are_not_compiled_for(images, compiles, tiny, tmp_path, simulated_gpu):
    asked = []
    simulated_gpu.setattr("models.memory.try_micro_batch", lambda *_: (1e6, 1e6))
    simulated_gpu.setattr("models.kernels.Kernels.compile", lambda self: asked.append(self))
    trainer = make_fused(tiny, tmp_path, per_device_train_batch_size=images, gradient_accumulation_steps=16 // images)
    plan(trainer, tiny, auto_batch=False)
    assert bool(asked) == compiles


@pytest.mark.parametrize(
    "compile, seconds, steps_left, compiles",
    [
        ("auto", 5.0, 4, True),
        ("auto", 4.0, 4, False),
        ("auto", 4.0, 5, True),
        ("auto", 9.0, 0, False),
        ("false", 9.0, 4, False),
    ],
)
def test_kernels_are_compiled_if_the_run_wins_the_time_back(
    compile, seconds, steps_left, compiles, tiny, tmp_path, simulated_gpu
):
    """16 images per step save a fifth of their seconds, and compiling takes 60; the seconds are given, not measured."""
    asked = []
    simulated_gpu.setattr("models.memory.try_micro_batch", lambda *_: (seconds, 1e6))
    simulated_gpu.setattr("models.kernels.Kernels.compile", lambda self: asked.append(self))
    trainer = make_fused(tiny, tmp_path)
    plan(trainer, tiny, compile=compile, steps_left=steps_left)
    assert bool(asked) == compiles


def test_stock_layers_and_machines_without_a_gpu_are_as_configured(tiny, tmp_path, simulated_gpu):
    trainer = make_trainer(tiny, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    plan(trainer, tiny)
    assert trainer.micro_batcher.size == 2
    simulated_gpu.setattr("models.memory.available_gpu_memory", lambda device: None)
    trainer = make_fused(tiny, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    plan(trainer, tiny)
    assert trainer.micro_batcher.size == 2

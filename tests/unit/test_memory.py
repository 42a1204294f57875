"""The memory model against measured peaks, the plans made from it, and the planner on small models."""

from types import SimpleNamespace

import pytest
import torch

from models.memory import (
    FRAGMENTATION,
    WORKSPACE,
    Cost,
    MemoryOptions,
    MicroBatcher,
    Plan,
    is_worth_compiling,
    optimizer_bytes,
    plan_memory,
    plans_file,
    propose_plans,
    recall_plan,
    remember_plan,
    scoring_bytes,
    scoring_micro_batch,
    step_cost,
    try_micro_batch,
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


# tokens, micro-batch size, layers kept, layers offloaded, compiled, GiB measured on an H100 (docs/LOG.md)
MEASURED = [
    (1199, 16, 32, 0, True, 61.03),
    (2373, 8, 32, 0, True, 60.39),
    (2372, 1, 0, 0, True, 5.82),
    (1196, 1, 0, 0, True, 5.38),
    (1197, 1, 0, 32, True, 5.11),
    (1197, 4, 0, 32, True, 5.62),
    (1197, 16, 0, 32, True, 7.66),
    (1197, 4, 16, 16, True, 12.05),
    (1197, 1, 0, 0, False, 5.87),
    (2373, 1, 0, 0, False, 6.84),
    (2373, 8, 32, 0, False, 67.70),
]


def test_an_image_scored_takes_what_was_measured():
    """378 nodes of the names' trie, micro-batches of 4 to 32 (docs/LOG.md, 2026-11-23)."""
    assert scoring_bytes(MISTRAL, 2, 2371 + 378) == pytest.approx((25.2 - 7.3) / 28 * GIB, rel=0.1)


@pytest.mark.parametrize("free, most, expected", [(0, 16, 1), (1, 16, 1), (2.99, 16, 2), (40, 16, 16), (40, 50, 40)])
def test_as_many_images_are_scored_at_a_time_as_fit(free, most, expected, tiny, simulated_gpu):
    model, tokens = tiny.model(), 100
    config, itemsize = model.config.text_config, model.get_input_embeddings().weight.element_size()
    weight = itemsize * config.hidden_size * config.intermediate_size
    needed = WORKSPACE + weight + free * scoring_bytes(config, itemsize, tokens)
    simulated_gpu.setattr("models.memory.memory_in_use", lambda device: 5e8)
    simulated_gpu.setattr("models.memory.available_gpu_memory", lambda device: (5e8 + needed) / (1 - FRAGMENTATION) + 1)
    assert scoring_micro_batch(model, torch.device("cuda"), tokens, most) == expected


@pytest.mark.parametrize("tokens, images, kept, offloaded, compiled, measured", MEASURED)
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(tokens, images, kept, offloaded, compiled, measured):
    assert cost_of(tokens, compiled).peak(images, kept, offloaded) / GIB == pytest.approx(measured, rel=0.1)


# GiB available, and micro-batch size, layers kept, layers offloaded of the fastest plan of a sweep on an H100 that fits
# (docs/LOG.md)
SWEPT = [(6.6, 4, 0, 32), (20.0, 4, 32, 0), (70.0, 16, 32, 0)]


@pytest.mark.parametrize("room, size, kept, offloaded", SWEPT)
def test_plans_like_the_fastest_of_a_sweep_are_proposed(room, size, kept, offloaded):
    near = [plan for plan in propose_plans(cost_of(1199), IMAGES, room * GIB)[:6] if plan.micro_batch_size == size]
    assert any(abs(plan.kept - kept) <= 2 and (plan.offloaded > 0) == (offloaded > 0) for plan in near)


@pytest.mark.parametrize("room", [5.4, 6, 7, 8, 11, 13, 20, 40, 68, 130])
def test_plans_for_gpus_of_many_sizes(room):
    """None is above its budget, the first recomputes as little as its micro-batch allows, none offloads in vain."""
    cost = cost_of(1199)
    for plan in propose_plans(cost, IMAGES, room * GIB):
        size, kept, offloaded, peak = plan
        assert peak == cost.peak(size, kept, offloaded) <= room * GIB and kept + offloaded <= cost.layers
        assert not offloaded or cost.peak(size, kept, 0) > room * GIB
        assert offloaded or kept == cost.layers or cost.peak(size, kept + 1, 0) > room * GIB


@pytest.mark.parametrize(
    "checkpointing, expected", [("true", (16, 0, 0)), ("offload", (16, 0, 32)), ("false", (16, 32, 0))]
)
def test_activation_checkpointing_can_be_fixed(checkpointing, expected):
    plans = propose_plans(cost_of(1199), IMAGES, 75 * GIB, checkpointing)
    assert expected in [plan[:3] for plan in plans] and {plan[1:3] for plan in plans} == {expected[1:]}


@pytest.mark.parametrize("checkpointing, offloaded, kept", [("auto", 32, 0), ("true", 0, 0), ("false", 0, 32)])
def test_where_nothing_fits_the_smallest_is_tried(checkpointing, offloaded, kept):
    (plan,) = propose_plans(cost_of(1199), IMAGES, 1 * GIB, checkpointing)
    assert plan[:3] == (1, kept, offloaded) and plan.peak > 1 * GIB


@pytest.mark.parametrize("images", [1, 7, 16, 64])
def test_micro_batches_are_as_equal_as_they_can_be(images):
    """Never 16 images as 15 and 1: the last micro-batch would cost as much as the first."""
    for room in range(6, 70):
        sizes = {plan.micro_batch_size for plan in propose_plans(cost_of(1199), images, room * GIB)}
        assert all(size == -(-images // -(-images // size)) for size in sizes)


def test_optimizer_state_by_name():
    names = ("adamw_torch_fused", "paged_adamw_8bit", "adamw_8bit", "sgd", "adafactor", "unheard_of")
    assert [optimizer_bytes(name, 10) for name in names] == [80, 0, 20, 0, 0, 80]


def test_eager_kernels_need_more_transient_memory():
    compiled, eager = cost_of(1199, True), cost_of(1199, False)
    assert compiled.activation == eager.activation and eager.transient > 2 * compiled.transient


def test_offloaded_inputs_must_fit_the_host():
    cost = cost_of(1199)

    def largest(**options):
        return max(plan.micro_batch_size for plan in propose_plans(cost, IMAGES, 60 * GIB, "offload", **options))

    assert (largest(), largest(host=5 * cost.checkpoint)) == (16, 4)


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


@pytest.fixture
def timed_gpu(simulated_gpu):
    """A trial computes, but its seconds are those of a GPU: recomputation, and 0.1 s a micro-batch."""
    tried = []

    def measure(trainer, row, size):
        _, peak = try_micro_batch(trainer, row, size)
        tried.append((size, sum(layer.keep for layer in trainer.fused), sum(layer.offload for layer in trainer.fused)))
        return 0.02 + 0.1 / size + 0.01 * sum(not layer.keep for layer in trainer.fused), peak

    simulated_gpu.setattr("models.memory.try_micro_batch", measure)
    simulated_gpu.tried = tried
    return simulated_gpu


def test_what_fits_is_chosen_and_logged_and_changes_no_weight(tiny, tmp_path, capsys, timed_gpu):
    setup_logging()
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    trainer = make_fused(tiny, tmp_path / "a", **settings)
    before, state = weights(trainer), torch.get_rng_state()
    plan(trainer, tiny)
    assert (trainer.micro_batcher.size, [layer.keep for layer in trainer.fused]) == (8, [True] * 3)
    assert equal(before, weights(trainer)) and torch.equal(state, torch.get_rng_state())
    assert not any(parameter.grad is not None for parameter in trainer.model.parameters())
    printed = capsys.readouterr().out
    assert "memory | micro-batch 8 | activation checkpointing 0/3 layers | peak " in printed
    assert "memory | kernels not compiled: the run would not win back the time | tried in" in printed
    trainer.train()
    other = make_fused(tiny, tmp_path / "b", **settings)
    other.train()
    assert equal(weights(trainer), weights(other), 1e-5)


def test_the_fastest_plan_that_was_tried_is_kept_whatever_arithmetic_says(tiny, tmp_path, simulated_gpu):
    def measure(trainer, row, size):
        return (0.1 if size == 4 else 1.0), 1e6

    simulated_gpu.setattr("models.memory.try_micro_batch", measure)
    trainer = make_fused(tiny, tmp_path)
    plan(trainer, tiny, compile="false")
    assert trainer.micro_batcher.size == 4


@pytest.mark.parametrize("slower, expected", [(0.014, 16), (0.02, 8), (0.04, 4)])
def test_of_plans_that_trials_cannot_tell_apart_the_larger_micro_batch_is_kept(
    slower, expected, tiny, tmp_path, simulated_gpu
):
    def measure(trainer, row, size):
        return {4: 1.0, 8: 1 + slower, 16: 1 + 2 * slower}.get(size, 2.0), 1e6

    simulated_gpu.setattr("models.memory.try_micro_batch", measure)
    trainer = make_fused(tiny, tmp_path)
    plan(trainer, tiny, compile="false")
    assert trainer.micro_batcher.size == expected


def test_a_plan_is_remembered_for_the_same_gpu_model_and_settings(tiny, tmp_path, timed_gpu):
    tried = timed_gpu.tried
    timed_gpu.setattr("models.memory.available_gpu_memory", lambda device: 16e9)
    plan(make_fused(tiny, tmp_path / "a", per_device_train_batch_size=4), tiny)
    assert len(tried) > 3 and tried[1][0] == 1
    del tried[:]
    again = make_fused(tiny, tmp_path / "b", per_device_train_batch_size=4)
    plan(again, tiny, compile="false")
    assert tried == [(4, 3, 0)] and again.micro_batcher.size == 4
    del tried[:]
    plan(
        make_fused(tiny, tmp_path / "c", per_device_train_batch_size=4),
        tiny,
        gradient_checkpointing="true",
        compile="false",
    )
    assert len(tried) > 1


def test_a_remembered_plan_that_does_not_fit_any_more_is_found_anew(tiny, tmp_path, timed_gpu):
    plan(make_fused(tiny, tmp_path / "a", per_device_train_batch_size=4), tiny)
    trainer = make_fused(tiny, tmp_path / "b", per_device_train_batch_size=4)
    limit_memory(trainer.model, 2)
    plan(trainer, tiny)
    assert trainer.micro_batcher.size == 2


def test_a_plan_is_remembered_for_as_much_as_the_host_can_hold(tiny, tmp_path, timed_gpu):
    """As in containers of two sizes on the same machine."""
    timed_gpu.setattr("models.memory.available_gpu_memory", lambda device: 16e9)
    timed_gpu.setattr("models.memory.GIB", 1)
    sizes = []
    for free in (1e12, 2e12, 0, 1e12):
        timed_gpu.setattr("models.memory.available_host_memory", lambda free=free: free)
        del timed_gpu.tried[:]
        trainer = make_fused(tiny, tmp_path)
        plan(trainer, tiny, gradient_checkpointing="offload", compile="false")
        sizes.append((trainer.micro_batcher.size, len(timed_gpu.tried) == 1))
    assert sizes == [(16, False), (16, True), (1, True), (16, True)]


@pytest.mark.parametrize("compile, fails", [("auto", True), ("true", True), ("false", False)])
def test_what_is_said_of_kernels_that_are_not_compiled_is_why(compile, fails, tiny, tmp_path, capsys, simulated_gpu):
    setup_logging()
    simulated_gpu.setattr("models.kernels.CompiledKernel.fails", fails)
    plan(make_fused(tiny, tmp_path), tiny, compile=compile, auto_batch=False)
    assert "memory | kernels not compiled | tried in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "[]", "null", '{"x": 3}', '{"x": [0, 1, 2]}', '{"x": ["a", 1, 2]}', '{"x": [1]}']
)
def test_a_file_of_plans_that_cannot_be_read_holds_none(content, simulated_gpu):
    plans_file().parent.mkdir(parents=True)
    plans_file().write_text(content)
    assert recall_plan("x") is None
    remember_plan("x", Plan(4, 1, 2, 1e9))
    assert recall_plan("x")[:3] == (4, 1, 2)


@pytest.mark.parametrize(
    "checkpointing, keeps, offloads", [("true", 0, False), ("offload", 0, True), ("false", 3, False)]
)
def test_activation_checkpointing_as_configured(checkpointing, keeps, offloads, tiny, tmp_path, simulated_gpu):
    trainer = make_fused(tiny, tmp_path, per_device_train_batch_size=4)
    plan(trainer, tiny, gradient_checkpointing=checkpointing)
    assert (
        sum(layer.keep for layer in trainer.fused) == keeps
        and any(layer.offload for layer in trainer.fused) == offloads
    )


def test_a_plan_that_does_not_fit_is_made_smaller(tiny, tmp_path, capsys, timed_gpu):
    setup_logging()
    trainer = make_fused(tiny, tmp_path)
    limit_memory(trainer.model, 4)
    plan(trainer, tiny)
    assert trainer.micro_batcher.size == 4
    words = "memory: micro-batch 16 | activation checkpointing 0/3 layers does not fit; trying less"
    assert words in capsys.readouterr().out


def test_a_plan_that_takes_more_than_predicted_is_made_smaller(tiny, tmp_path, simulated_gpu):
    trainer = make_fused(tiny, tmp_path)
    tried = []

    def measure(trainer, row, images):
        tried.append(images)
        return 0.1, 1e12 if images > 4 else 1e6

    simulated_gpu.setattr("models.memory.try_micro_batch", measure)
    plan(trainer, tiny, compile="false")
    assert 16 in tried and trainer.micro_batcher.size <= 4


def test_a_gpu_too_small_for_one_image_is_reported_before_the_run(tiny, tmp_path, timed_gpu):
    """At once: where the smallest plan does not fit, no other is tried."""
    trainer = make_fused(tiny, tmp_path)
    limit_memory(trainer.model, 0)
    with pytest.raises(UserError, match="memory: out of memory with micro-batch 1; use --gradient-checkpointing"):
        plan(trainer, tiny, compile="false")
    assert timed_gpu.tried == [(1, 0, 3)]


def test_without_auto_batch_it_is_what_the_config_says(tiny, tmp_path, simulated_gpu):
    trainer = make_fused(tiny, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=8)
    plan(trainer, tiny, auto_batch=False)
    assert trainer.micro_batcher.size == 2 and not any(layer.keep for layer in trainer.fused)


@pytest.mark.parametrize("images", [1, 2])
def test_kernels_are_compiled_for_small_micro_batches_too(images, tiny, tmp_path, simulated_gpu):
    asked = []
    simulated_gpu.setattr("models.memory.try_micro_batch", lambda *_: (1e6, 1e6))
    simulated_gpu.setattr("models.kernels.Kernels.compile", lambda self: asked.append(self))
    trainer = make_fused(tiny, tmp_path, per_device_train_batch_size=images, gradient_accumulation_steps=16 // images)
    plan(trainer, tiny, auto_batch=False)
    assert asked


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

from types import SimpleNamespace

import pytest
import torch

from models.memory import Cost, choose_plan, is_out_of_memory, layer_bytes, optimizer_bytes, step_cost

GIB = 2**30
MISTRAL = SimpleNamespace(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32
)  # of llava-v1.6-mistral-7b
LEARNING = 41_943_040  # weights of the adapter at rank 16


def cost_of(tokens: int, compiled: bool = True) -> Cost:
    return step_cost(MISTRAL, tokens, 4.61 * GIB, LEARNING, "paged_adamw_8bit", 65e6, 64, 2, compiled)


# tokens, images at a time, layers that keep their activations, offload, compiled, GiB measured on an H100 (docs/LOG.md)
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


def test_the_plan_of_cards_of_many_sizes():
    """More memory never makes a slower plan, and no plan is above its budget unless nothing fits."""
    last = 0.0
    for room in (5, 6, 7, 8, 11, 13, 20, 40, 68, 130):
        plan = choose_plan(cost_of(1199), room * GIB, 16, 32, 1199)
        speed = plan.images * 100 + plan.kept
        assert plan.peak <= room * GIB or (plan.images, plan.kept, plan.offload) == (1, 0, True)
        assert plan.kept > 0 or room < 8
        last = max(last, speed)
    assert (plan.images, plan.kept) == (16, 32)


@pytest.mark.parametrize(
    "recompute, expected", [("true", (16, 0, False)), ("offload", (16, 0, True)), ("false", (16, 32, False))]
)
def test_recomputation_can_be_fixed(recompute, expected):
    assert choose_plan(cost_of(1199), 75 * GIB, 16, 32, 1199, recompute)[:3] == expected


@pytest.mark.parametrize("recompute, offload, kept", [("auto", True, 0), ("true", False, 0), ("false", False, 32)])
def test_where_nothing_fits_the_smallest_is_tried(recompute, offload, kept):
    plan = choose_plan(cost_of(1199), 1 * GIB, 16, 32, 1199, recompute)
    assert (plan.images, plan.kept, plan.offload) == (1, kept, offload) and plan.peak > 1 * GIB


@pytest.mark.parametrize("images", [1, 7, 16, 64])
def test_pieces_are_as_equal_as_they_can_be(images):
    """Never 16 images as 15 and 1: the last piece would cost as much as the first."""
    for room in range(6, 70):
        size = choose_plan(cost_of(1199), room * GIB, images, 32, 1199).images
        assert size == -(-images // -(-images // size))


def test_optimizer_state_by_name():
    names = ("adamw_torch_fused", "paged_adamw_8bit", "adamw_8bit", "sgd", "adafactor", "unheard_of")
    assert [optimizer_bytes(name, 10) for name in names] == [80, 0, 20, 0, 0, 80]


def test_plain_kernels_pass_more_through_memory():
    (kept, passing), (same, more) = (layer_bytes(MISTRAL, 64, 2, compiled) for compiled in (True, False))
    assert kept == same and more > 2 * passing


def test_inputs_that_wait_in_the_hosts_memory_must_fit_there():
    cost, inputs = cost_of(1199), cost_of(1199).inputs
    assert choose_plan(cost, 60 * GIB, 16, 32, 1199, "offload").images == 16
    assert choose_plan(cost, 60 * GIB, 16, 32, 1199, "offload", host=5 * inputs).images == 4


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
def test_out_of_memory_in_all_its_words(error, is_it):
    assert is_out_of_memory(error) == is_it

"""FLOPs of a training step and the measured matmul rate."""

import pytest
import torch
from transformers import LlavaNextForConditionalGeneration

from models.throughput import FlopCounter, measure_matmul_rate
from models.tiny import SIZES, build_config, build_tiny_processor


def test_flops_of_an_image_are_those_of_the_full_size_shape():
    """By hand: 4 FLOP per token and weight of 6.98 billion, attention, and a frozen vision tower."""
    config = build_config(build_tiny_processor(["rose"], SIZES["full"]), SIZES["full"])
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config).requires_grad_(False)
    by_hand = 1197 * 4 * 32 * 218_103_808 + 3.5 * 2 * 1197**2 * 4096 * 32 + 2 * 303.5e6 * 3 * 577
    assert FlopCounter(model)(tokens=1197, tiles=3) == pytest.approx(by_hand, rel=1e-3)


def test_measuring_the_matmul_rate_leaves_the_random_state_as_it_was():
    before = torch.get_rng_state()
    assert measure_matmul_rate(torch.device("cpu"), torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), before)

"""Tests of tensor utils."""

import pytest
import torch

from utils.logging_utils import UserError
from utils.tensor_utils import check_tensor

PIXELS = torch.zeros(2, 3, 3, 14, 14)


def test_a_tensor_as_expected_passes():
    check_tensor("pixel_values", PIXELS, (2, None, 3, 14, 14), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (PIXELS[0], r"pixel_values: shape \(3, 3, 14, 14\), expected \(2, any, 3, 14, 14\)"),
        (PIXELS[:1], r"shape \(1, 3, 3, 14, 14\), expected"),
        (PIXELS.half(), "torch.float16, expected torch.float32"),
        (PIXELS.to("meta"), "on meta, expected cpu as the model"),
        ([1, 2], "list, expected a tensor"),
    ],
)
def test_what_differs_is_an_error(tensor, words):
    with pytest.raises(UserError, match=words):
        check_tensor("pixel_values", tensor, (2, None, 3, 14, 14), torch.float32, torch.device("cpu"))

"""Checks on tensors that need no look at their values, so that none of them makes the host wait for the device."""

import torch

from utils.logging_utils import UserError


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int | None, ...],
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> None:
    """Raise UserError unless `tensor` has this shape (None: any length), dtype and device."""
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{name}: a tensor is needed, not {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(want in (None, have) for want, have in zip(shape, tensor.shape))
    if not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise UserError(
            f"{name}: shape {tuple(tensor.shape)} where ({wanted}) is needed; was the batch built by data/collator.py?"
        )
    if tensor.dtype != dtype:
        raise UserError(f"{name}: {tensor.dtype} where {dtype} is needed")
    if device is not None and _place(tensor.device) != _place(device):
        raise UserError(f"{name}: on {tensor.device} where the model is on {device}")


def _place(device: torch.device) -> tuple[str, int]:
    """mps and mps:0 are one device, though torch says that they differ."""
    return device.type, device.index or 0

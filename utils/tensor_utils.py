"""Checks of tensors and modules that read no values, so that the host never waits for the device."""

import torch

from utils.logging_utils import UserError


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise UserError unless `tensor` has this shape (None: any size), dtype and device."""
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{name}: {type(tensor).__name__}, expected a tensor")
    if tensor.dim() != len(shape) or any(size not in (None, found) for size, found in zip(shape, tensor.shape)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise UserError(f"{name}: shape {tuple(tensor.shape)}, expected ({expected}); is it from data/collator.py?")
    if tensor.dtype != dtype:
        raise UserError(f"{name}: {tensor.dtype}, expected {dtype}")
    # mps and mps:0 are the same device, but unequal to torch.
    if (tensor.device.type, tensor.device.index or 0) != (device.type, device.index or 0):
        raise UserError(f"{name}: on {tensor.device}, expected {device} as the model")


def find_layers(module: torch.nn.Module, count: int) -> torch.nn.ModuleList:
    """The list of so many layers in an encoder, whatever its class calls it."""
    lists = (part for part in module.modules() if isinstance(part, torch.nn.ModuleList))
    return next(part for part in lists if len(part) == count)

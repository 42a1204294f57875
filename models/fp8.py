"""The backward pass's products with the frozen weights in FP8; all else stays in 16 bit.

Shapes as in models/fused_layers.py: M rows, D width of a linear's input, N of its output, S of all outputs of a group.

Gradients and weights are rounded to e4m3: a row of gradients by a scale of its own, a weight by one for each of its
inputs. 4-bit weights go there without a 16-bit copy. In the forward pass the errors of all layers would add up: the
adapters' gradients then differ from fp32's by ten times what bf16 does, and so by less than three times (docs/LOG.md).
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch.nn import functional as F

from models.fused_layers import FusedLayer, Projections
from models.kernels import FP8, FP8_MAX, FP8_MIN, plain_weight
from utils.logging_utils import UserError

CAPABILITY = (8, 9)  # Ada; older GPUs have no FP8 matmuls


def use_fp8(fused: Sequence[FusedLayer], device: torch.device, precision: str) -> None:
    """Let the backward pass of these layers multiply in FP8. Raises UserError where the GPU or the layers cannot."""
    name, move = "--matmul fp8", "use --matmul bf16"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(f"{name}: needs a CUDA GPU of compute capability 8.9 or newer (Ada, Hopper); {move}")
    if precision != "bf16" or not fused:
        raise UserError(f"{name}: needs --mixed-precision bf16 and layers that can be fused; {move}")
    for layer in fused:
        layer.groups = [Fp8Projections(modules, layer.kernels) for modules in layer.modules]


class Fp8Projections(Projections):
    @cached_property
    def scale(self) -> torch.Tensor:
        """fp32 (D, 1): largest magnitude of each input's weights / FP8_MAX."""
        norms = [torch.linalg.vector_norm(plain_weight(linear), torch.inf, 0) for linear in self.linears]
        return (torch.stack(norms).amax(0).float().clamp_min(FP8_MIN) / FP8_MAX)[:, None]

    def backward(self, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = [linear.out_features for linear in self.linears]
        weights = self.scale.new_empty(self.width, sum(sizes), dtype=FP8)  # (D, S)
        for linear, weight in zip(self.linears, weights.split(sizes, 1)):  # one product, so nothing is added up
            self.kernels.dequantize_fp8(linear, self.scale, weight)
        rows, scale = self.kernels.to_fp8(gradients)
        by_row, options = F.ScalingType.RowWise, {"output_dtype": gradients[0].dtype, "use_fast_accum": True}
        of_rows = F.scaled_mm(rows, weights.T, scale, by_row, self.scale.T, by_row, **options)
        return of_rows, self.backward_columns(gradients)

"""4-bit weights into the columns of a wider matrix, in one pass over memory. Needs Triton, which comes with CUDA torch.

bitsandbytes' own kernel writes a contiguous matrix; fused_layers.py needs the adapter behind each row, and a copy there
would cost as much again.
"""

import torch
import triton
from bitsandbytes.functional import QuantState
from triton import language as tl

BYTES = 512  # a program unpacks so many, two weights each; the columns must be a multiple of twice that
BLOCK = tl.constexpr(32)  # bytes that share a scale: bitsandbytes' blocks of 64 weights
SCALES = tl.constexpr(256)  # scales that share a scale of their own


@triton.jit
def _dequantize(
    packed, levels, absmax, absmax_levels, absmax_scale, offset, up, out, rank, start, stride,
    columns: tl.constexpr, beside: tl.constexpr, beside_power: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BYTES
    if 2 * first < columns:
        bytes_ = row * (columns // 2) + first + tl.arange(0, BYTES)
        block = bytes_ // BLOCK
        scale = tl.load(absmax_levels + tl.load(absmax + block).to(tl.int32)) * tl.load(absmax_scale + block // SCALES)
        scale += tl.load(offset)
        pairs = tl.load(packed + bytes_).to(tl.int32)
        values = tl.interleave(tl.load(levels + (pairs >> 4)) * scale, tl.load(levels + (pairs & 15)) * scale)
        tl.store(out + row * stride + 2 * first + tl.arange(0, 2 * BYTES), values.to(out.dtype.element_ty))
    else:
        column = tl.arange(0, beside_power)
        own = (column >= start) & (column < start + rank)
        adapter = tl.load(up + row * rank + column - start, mask=own, other=0.0)
        place = out + row * stride + columns + column
        tl.store(place, adapter.to(out.dtype.element_ty), mask=column < beside)


def can_dequantize(weight: torch.Tensor, state: QuantState | None) -> bool:
    """A bitsandbytes weight on a CUDA GPU: nested scales, blocks of 64, rows that programs share evenly."""
    return (
        state is not None
        and weight.is_cuda
        and state.nested
        and (state.blocksize, state.state2.blocksize) == (64, 256)
        and state.shape[1] % (2 * BYTES) == 0
    )


def dequantize(weight: torch.Tensor, state: QuantState, up: torch.Tensor | None, start: int, out: torch.Tensor) -> None:
    """[W, 0 B 0] into `out` (N, D + R): the (N, D) weight, and `up` (N, rank) in R columns from `start` on."""
    inner = state.state2
    rows, columns = state.shape
    beside = out.shape[1] - columns
    _dequantize[rows, columns // (2 * BYTES) + (beside > 0)](
        *(weight.data.view(torch.uint8), state.code, state.absmax, inner.code, inner.absmax, state.offset),
        *(up if up is not None else state.code, out, up.shape[1] if up is not None else 0, start, out.stride(0)),
        *(columns, beside, triton.next_power_of_2(max(beside, 1)), BYTES),
    )

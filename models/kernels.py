"""Kernels of the fused layers: what is elementwise between two matmuls, and 4-bit weights back to 16 bit.

Shapes: M rows, D width of a linear's input, N of its output, R LoRA columns of a group of linears.
"""

import math
from collections.abc import Callable, Sequence

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from runtime.device import is_out_of_memory
from utils.logging_utils import first_line, logger

try:
    import triton
    from triton import language as tl
except ImportError:  # as on a machine without a CUDA GPU
    triton = None

FP8 = torch.float8_e4m3fn
FP8_MAX, FP8_MIN = torch.finfo(FP8).max, 1e-30  # the smallest largest magnitude: a row of zeros stays one

# ---- elementwise: each becomes one kernel or two


def _rms_norm(h, weight, eps, out):
    out.copy_(_normalized(h, weight, eps))


def _normalized(h, weight, eps):
    wide = h.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)


def _add_rms_norm(h, update, weight, eps, out):
    total = h + update
    out.copy_(_normalized(total, weight, eps))
    return total


def _rms_norm_backward(gradient, h, weight, eps, residual, out):
    """Gradient of h from that of its norm, plus the residual's; the norm itself, recomputed, goes to `out`."""
    wide = h.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    hat = wide * scale
    out.copy_(weight * hat.to(h.dtype))
    wide_gradient = (gradient * weight).float()
    inner = (wide_gradient * hat).mean(-1, keepdim=True)
    return ((wide_gradient - hat * inner) * scale).to(h.dtype) + residual


def _rotate(query, key, cos, sin):
    """Rotary embedding of (M, heads x head_dim) rows; cos and sin are (M, head_dim). With -sin it is the backward."""
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _rotated(x, cos, sin):
    heads = x.unflatten(-1, (-1, cos.shape[-1]))
    first, second = heads.chunk(2, dim=-1)
    return (heads * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]).flatten(1)


def _swiglu(gate, up, out):
    out.copy_(F.silu(gate) * up)


def _swiglu_backward(gate, up, gradient):
    """In place: `gate` and `up` become their gradients, `gradient` becomes silu(gate) * up."""
    wide_gate, wide_up, wide = gate.float(), up.float(), gradient.float()
    sigmoid = torch.sigmoid(wide_gate)
    silu = wide_gate * sigmoid
    of_gate = wide * wide_up * sigmoid * (1 + wide_gate * (1 - sigmoid))
    of_up = wide * silu
    out = silu.to(gate.dtype) * up
    gate.copy_(of_gate)
    up.copy_(of_up)
    gradient.copy_(out)


class CompiledKernel:
    """A kernel made by torch.compile, once for any number of rows.

    Rows are marked as dynamic only in the first call with new widths: the mark costs more than the call. It is given
    detached tensors: views and tensors that require a gradient would each trigger a recompilation.
    """

    fails = False  # compiling, on this machine

    def __init__(self, eager: Callable):
        self.eager = eager
        self.compiled = eager if CompiledKernel.fails else torch.compile(eager)
        self.known_widths = set()

    def __call__(self, *arguments):
        if CompiledKernel.fails:
            return self.eager(*arguments)
        arguments = [value.data if isinstance(value, torch.Tensor) else value for value in arguments]
        matrices = [value for value in arguments if isinstance(value, torch.Tensor) and value.dim() == 2]
        widths = tuple([(matrix.shape[1], matrix.stride(0)) for matrix in matrices])
        if widths not in self.known_widths:
            self.known_widths.add(widths)
            for matrix in matrices:
                torch._dynamo.maybe_mark_dynamic(matrix, 0)
        try:
            return self.compiled(*arguments)
        except Exception as error:  # a missing compiler raises a dozen kinds; no output was written yet
            _warn_no_compiler("eager kernels are used, slower and in more memory", error)
            CompiledKernel.fails = True
            return self.eager(*arguments)


def _warn_no_compiler(outcome: str, error: Exception) -> None:
    """Say what is used in place of compiled kernels; out-of-memory is another error, and raised again."""
    if is_out_of_memory(error):
        raise error
    logger.warning(
        f"kernels cannot be compiled on this machine ({first_line(error)}); {outcome}; install a C compiler and "
        "Python's headers, such as apt install gcc python3-dev"
    )


# ---- dequantization


TILE = 64  # rows and columns that a program dequantizes to FP8
BYTES = 512  # that a program dequantizes, two weights each; the columns must be a multiple of twice that

if triton is not None:
    BLOCK = tl.constexpr(32)  # bytes that share a scale: bitsandbytes' blocks of 64 weights
    SCALES = tl.constexpr(256)  # scales that share a scale of their own

    @triton.jit
    def _dequantize(  # noqa: PLR0913  a kernel takes tensors and numbers only
        packed, levels, absmax, absmax_levels, absmax_scale, offset, lora_b, out, rank, start, stride,
        columns: tl.constexpr, lora_columns: tl.constexpr, lora_power: tl.constexpr, BYTES: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        first = tl.program_id(1) * BYTES
        if 2 * first < columns:
            bytes_ = row * (columns // 2) + first + tl.arange(0, BYTES)
            block = bytes_ // BLOCK
            level = tl.load(absmax + block).to(tl.int32)
            scale = tl.load(absmax_levels + level) * tl.load(absmax_scale + block // SCALES)
            scale += tl.load(offset)
            pairs = tl.load(packed + bytes_).to(tl.int32)
            values = tl.interleave(tl.load(levels + (pairs >> 4)) * scale, tl.load(levels + (pairs & 15)) * scale)
            tl.store(out + row * stride + 2 * first + tl.arange(0, 2 * BYTES), values.to(out.dtype.element_ty))
        else:
            column = tl.arange(0, lora_power)
            in_lora = (column >= start) & (column < start + rank)
            row_of_b = tl.load(lora_b + row * rank + column - start, mask=in_lora, other=0.0)
            place = out + row * stride + columns + column
            tl.store(place, row_of_b.to(out.dtype.element_ty), mask=column < lora_columns)

    @triton.jit
    def _dequantize_fp8(  # noqa: PLR0913
        packed, levels, absmax, absmax_levels, absmax_scale, offset, factors, out, columns, stride,
        ROWS: tl.constexpr, BYTES: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        first = tl.program_id(1) * BYTES
        bytes_ = row * (columns // 2) + first + tl.arange(0, BYTES)[None, :]
        block = bytes_ // BLOCK
        level = tl.load(absmax + block).to(tl.int32)
        scale = tl.load(absmax_levels + level) * tl.load(absmax_scale + block // SCALES) + tl.load(offset)
        pairs = tl.load(packed + bytes_).to(tl.int32)
        values = tl.interleave(tl.load(levels + (pairs >> 4)) * scale, tl.load(levels + (pairs & 15)) * scale)
        column = 2 * first + tl.arange(0, 2 * BYTES)[None, :]
        values = tl.trans((values / tl.load(factors + column)).to(out.dtype.element_ty))
        tl.store(out + tl.trans(column).to(tl.int64) * stride + tl.trans(row), values)

    @triton.jit
    def _largest(part, place, width: tl.constexpr, columns: tl.constexpr):
        found = tl.zeros([columns], tl.float32)
        for start in range(0, width, columns):
            found = tl.maximum(found, tl.abs(tl.load(part + place + start).to(tl.float32)))
        return tl.max(found)

    @triton.jit
    def _round_part(part, place, out, scale, width: tl.constexpr, columns: tl.constexpr):
        for start in range(0, width, columns):
            values = tl.load(part + place + start).to(tl.float32) / scale
            tl.store(out + start, values.to(out.dtype.element_ty))

    @triton.jit
    def _round_row(  # noqa: PLR0913
        a, b, c, a_stride, b_stride, c_stride, out, scales,
        a_width: tl.constexpr, b_width: tl.constexpr, c_width: tl.constexpr,
        MIN: tl.constexpr, MAX: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
        largest = _largest(a, row * a_stride + column, a_width, COLUMNS)
        largest = tl.maximum(largest, _largest(b, row * b_stride + column, b_width, COLUMNS))
        largest = tl.maximum(largest, _largest(c, row * c_stride + column, c_width, COLUMNS))
        scale = tl.maximum(largest, MIN) / MAX
        tl.store(scales + row, scale)
        place = out + row * (a_width + b_width + c_width) + column
        _round_part(a, row * a_stride + column, place, scale, a_width, COLUMNS)
        _round_part(b, row * b_stride + column, place + a_width, scale, b_width, COLUMNS)
        _round_part(c, row * c_stride + column, place + a_width + b_width, scale, c_width, COLUMNS)


def round_rows(out: torch.Tensor, scale: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    """Up to three (M, N) `parts` side by side, over one `scale` (M, 1) a row, as e4m3 in `out` (M, S)."""
    (a, b, c), widths = [*parts, *parts[:1] * 2][:3], [*(part.shape[1] for part in parts), 0, 0][:3]
    columns = math.gcd(4096, *widths)
    strides = a.stride(0), b.stride(0), c.stride(0)
    _round_row[(len(out),)](a, b, c, *strides, out, scale, *widths, FP8_MIN, FP8_MAX, columns)


def can_dequantize(weight: torch.Tensor, state: QuantState | None) -> bool:
    """Whether it is a bitsandbytes weight on a CUDA GPU: nested scales, blocks of 64, rows of whole programs."""
    return (
        state is not None
        and weight.is_cuda
        and state.nested
        and (state.blocksize, state.state2.blocksize) == (64, 256)
        and state.shape[1] % (2 * BYTES) == 0
    )


def dequantize(
    weight: torch.Tensor, state: QuantState, lora_b: torch.Tensor | None, start: int, out: torch.Tensor
) -> None:
    """[W, 0 B 0] into `out` (N, D + R): the (N, D) weight, and `lora_b` (N, rank) in R columns from `start` on."""
    inner = state.state2
    rows, columns = state.shape
    lora_columns = out.shape[1] - columns
    rank, b = (0, state.code) if lora_b is None else (lora_b.shape[1], lora_b)  # without LoRA it is not read
    _dequantize[rows, columns // (2 * BYTES) + (lora_columns > 0)](
        weight.data.view(torch.uint8), state.code, state.absmax, inner.code, inner.absmax, state.offset,
        b, out, rank, start, out.stride(0), columns, lora_columns, triton.next_power_of_2(max(lora_columns, 1)), BYTES,
    )  # fmt: skip


def dequantize_fp8(weight: torch.Tensor, state: QuantState, scale: torch.Tensor, out: torch.Tensor) -> None:
    """W' (D, N) of a weight, over its inputs' `scale` (D, 1), as e4m3 into `out`."""
    inner, (rows, columns) = state.state2, state.shape
    _dequantize_fp8[rows // TILE, columns // TILE](
        weight.data.view(torch.uint8), state.code, state.absmax, inner.code, inner.absmax, state.offset,
        scale, out, columns, out.stride(0), TILE, TILE // 2,
    )  # fmt: skip


# ---- all kernels of a model


ELEMENTWISE = {
    kernel.__name__.strip("_"): kernel
    for kernel in (_rms_norm, _add_rms_norm, _rms_norm_backward, _rotate, _swiglu, _swiglu_backward)
}


class Kernels:
    """The kernels above, eager until `compile`, and dequantization. One object for all layers of a model."""

    def __init__(self):
        self.by_name: dict[str, Callable] = ELEMENTWISE
        self.has_triton = triton is not None
        self.attention: SDPBackend | None = None  # without a mask; None: torch chooses (models/attention.py)
        self._positions = None, None

    def __getattr__(self, name: str) -> Callable:
        return self.__dict__["by_name"][name]

    @property
    def compiled(self) -> bool:
        return self.by_name is not ELEMENTWISE and not CompiledKernel.fails

    def compile(self) -> None:
        """From now on each kernel is compiled at its first call."""
        if self.by_name is ELEMENTWISE:
            self.by_name = {name: CompiledKernel(kernel) for name, kernel in ELEMENTWISE.items()}

    def eager(self) -> None:
        """As before `compile`."""
        self.by_name = ELEMENTWISE

    def positions(self, embeddings: tuple[torch.Tensor, torch.Tensor], images: int) -> tuple[torch.Tensor, ...]:
        """(M, head_dim) cosines and sines; all layers of a forward get the same embeddings, and share one copy."""
        known, rows = self._positions
        if known is not embeddings[0]:
            rows = tuple(part.expand(images, -1, -1).flatten(0, 1) for part in embeddings)
            self._positions = embeddings[0], rows
        return rows

    def to_fp8(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, S) e4m3 of rows side by side, and the scale (M, 1) of each row."""
        out = parts[0].new_empty(len(parts[0]), sum(part.shape[1] for part in parts), dtype=FP8)
        scale = parts[0].new_empty(len(out), 1, dtype=torch.float32)
        if not parts[0].is_cuda or not self._try_triton(lambda: round_rows(out, scale, parts)):
            rows = torch.cat(parts, 1).float()
            torch.div(rows.abs().amax(-1, keepdim=True).clamp_min(FP8_MIN), FP8_MAX, out=scale)
            out.copy_(rows / scale)
        return out, scale

    def dequantize(self, linear: nn.Module, lora_b: torch.Tensor | None, start: int, out: torch.Tensor) -> None:
        """[W, 0 B 0] into `out` (N, D + R): the weight of a linear, 4-bit or not, and its LoRA B at `start`."""
        weight, state = linear.weight, quant_state(linear)
        if can_dequantize(weight, state) and self._try_triton(lambda: dequantize(weight, state, lora_b, start, out)):
            return
        plain = plain_weight(linear)
        out[:, : plain.shape[1]] = plain
        out[:, plain.shape[1] :] = 0
        if lora_b is not None:
            out[:, plain.shape[1] + start :][:, : lora_b.shape[1]] = lora_b

    def dequantize_fp8(self, linear: nn.Module, scale: torch.Tensor, out: torch.Tensor) -> None:
        """W' (D, N) of a linear, over its inputs' `scale` (D, 1), as e4m3 into `out`."""
        weight, state = linear.weight, quant_state(linear)
        fits = can_dequantize(weight, state) and linear.out_features % TILE == 0
        if not fits or not self._try_triton(lambda: dequantize_fp8(weight, state, scale, out)):
            out.copy_(plain_weight(linear).float().T / scale)

    def _try_triton(self, kernel: Callable[[], None]) -> bool:
        """Whether `kernel` could be built and run."""
        if not self.has_triton:
            return False
        try:
            kernel()
            return True
        except Exception as error:  # Triton builds its launcher with the machine's C compiler
            _warn_no_compiler("bitsandbytes dequantizes the weights, slower", error)
            self.has_triton = False
            return False


def quant_state(linear: nn.Module) -> QuantState | None:
    """None of a weight in 16 or 32 bit."""
    # FSDP unshards a weight without its state; shard_frozen_parameters left that at the module.
    return getattr(linear.weight, "quant_state", None) or getattr(linear, "quant_state", None)


def plain_weight(linear: nn.Module) -> torch.Tensor:
    """(N, D): the weight of a linear, dequantized if it is in 4 bit."""
    state = quant_state(linear)
    return linear.weight if state is None else dequantize_4bit(linear.weight.data, state)

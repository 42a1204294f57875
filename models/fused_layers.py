"""The language model's layers as one autograd function each: fewer passes over memory, and only what must be kept.

Shapes: B images, T tokens, M = B x T rows, D width of a linear's input, N of its output, R ranks of a group's adapters.

A step of the stock layers with adapters spends nearly half its time outside of matrix products: casts, adapter
additions, scalings, norms. Here

- the adapter is part of the product: [x, s xA'] [W, B]' = xW' + s xA'B', summed in fp32 and rounded once. Backward,
  g [W, B] gives gW and gB at once;
- what is elementwise is one kernel between two products, made by torch.compile (or plain torch without it);
- kept for the backward are the layer's input, q, k, v, attention's output, the second residual and the two halves of
  the MLP; the rest is recomputed from them elementwise. A layer that keeps nothing keeps its input and is run again;
- the 4-bit weights are unpacked right before each product and never kept.

Same mathematics as the stock layer; tests/unit/test_fused_layers.py compares loss and gradients.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from runtime.device import is_out_of_memory
from utils.logging_utils import logger

try:
    from models.kernels import can_dequantize, dequantize
except ImportError:  # without Triton, as on a machine without a CUDA GPU
    can_dequantize = None

ALIGNED = 64  # columns that the adapters take in a product are a multiple of this, so that its rows stay aligned
SMALL = 512  # rows below which the stock layer is faster: its kernels multiply few rows by packed weights


# ---- elementwise pieces: each becomes one kernel or two


def _norm(h, weight, eps, out):
    out.copy_(_normalized(h, weight, eps))


def _normalized(h, weight, eps):
    wide = h.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype)


def _add_norm(h, update, weight, eps, out):
    total = h + update
    out.copy_(_normalized(total, weight, eps))
    return total


def _norm_backward(gradient, h, weight, eps, residual, out):
    """Gradient of h from that of its norm, plus the residual's; the norm itself, recomputed, goes to `out`."""
    wide = h.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    hat = wide * scale
    out.copy_(weight * hat.to(h.dtype))
    wide_gradient = (gradient * weight).float()
    inner = (wide_gradient * hat).mean(-1, keepdim=True)
    return ((wide_gradient - hat * inner) * scale).to(h.dtype) + residual


def _rotate(query, key, cos, sin):
    """Rotary embedding of (M, heads x head_dim) rows; cos and sin are (M, head_dim)."""
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


def _rotated(x, cos, sin):
    heads = x.unflatten(-1, (-1, cos.shape[-1]))
    first, second = heads.chunk(2, dim=-1)
    return (heads * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]).flatten(1)


def _rotate_backward(of_query, of_key, cos, sin):
    return _rotated_back(of_query, cos, sin), _rotated_back(of_key, cos, sin)


def _rotated_back(gradient, cos, sin):
    heads = gradient.unflatten(-1, (-1, cos.shape[-1]))
    first, second = (heads * sin[:, None]).chunk(2, dim=-1)
    return (heads * cos[:, None] + torch.cat((second, -first), dim=-1)).flatten(1)


def _swiglu(gate, up, out):
    out.copy_(F.silu(gate) * up)


def _swiglu_backward(gate, up, gradient):
    """In place: `gate` and `up` become their gradients, `gradient` becomes the product that it was the gradient of."""
    wide_gate, wide_up, wide = gate.float(), up.float(), gradient.float()
    share = torch.sigmoid(wide_gate)
    active = wide_gate * share
    of_gate = wide * wide_up * share * (1 + wide_gate * (1 - share))
    of_up = wide * active
    product = active.to(gate.dtype) * up
    gate.copy_(of_gate)
    up.copy_(of_up)
    gradient.copy_(product)


class _Compiled:
    """A piece as torch.compile makes it, once for any number of rows.

    Rows are marked as varying only in the first call with new widths: the mark costs more than the call. Pieces are
    given plain tensors: views and tensors that require a gradient would each be compiled for anew.
    """

    def __init__(self, piece: Callable):
        self.piece = self.made = piece
        if not _Compiled.fails:
            self.made = torch.compile(piece)
        self.known = set()

    fails = False  # compiling, on this machine

    def __call__(self, *arguments):
        if _Compiled.fails:
            return self.piece(*arguments)
        arguments = [one.data if isinstance(one, torch.Tensor) else one for one in arguments]
        matrices = [one for one in arguments if isinstance(one, torch.Tensor) and one.dim() == 2]
        widths = tuple([(one.shape[1], one.stride(0)) for one in matrices])
        if widths not in self.known:
            self.known.add(widths)
            for one in matrices:
                torch._dynamo.maybe_mark_dynamic(one, 0)
        try:
            return self.made(*arguments)
        except Exception as error:  # a missing compiler has a dozen kinds; nothing was written yet
            if is_out_of_memory(error):
                raise
            _Compiled.fails = True
            _tell_no_compiler("kernels stay plain, slower and larger", error)
            return self.piece(*arguments)


def _tell_no_compiler(outcome: str, error: Exception) -> None:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    logger.warning(
        "kernels cannot be compiled on this machine (%s); %s; a C compiler and Python's headers are needed, such as "
        "apt install gcc python3-dev",
        *(reason[:200], outcome),
    )


class Kernels:
    """The pieces above, plain until `compile`, and the unpacking of 4-bit weights. One for all layers of a model."""

    def __init__(self):
        self.pieces = {
            piece.__name__.strip("_"): piece
            for piece in (_norm, _add_norm, _norm_backward, _rotate, _rotate_backward, _swiglu, _swiglu_backward)
        }
        self._asked = False
        self.has_triton = can_dequantize is not None
        self._positions = None, 0, None

    def __getattr__(self, name: str) -> Callable:
        return self.__dict__["pieces"][name]

    @property
    def compiled(self) -> bool:
        return self._asked and not _Compiled.fails

    def compile(self) -> None:
        """From now on each piece is compiled at its first call."""
        if not self._asked:
            self._asked = True
            self.pieces = {name: _Compiled(piece) for name, piece in self.pieces.items()}

    def eager(self) -> None:
        """As before `compile`."""
        if self._asked:
            self._asked = False
            self.pieces = {name: compiled.piece for name, compiled in self.pieces.items()}

    def positions(self, embeddings: tuple[torch.Tensor, torch.Tensor], images: int) -> tuple[torch.Tensor, ...]:
        """(M, head_dim) cosines and sines; all layers of a forward are given the same ones, and keep one copy."""
        known, known_images, rows = self._positions
        if known is not embeddings[0] or known_images != images:
            rows = tuple(part.expand(images, -1, -1).flatten(0, 1) for part in embeddings)
            self._positions = embeddings[0], images, rows
        return rows

    def dequantize(self, linear: nn.Module, up: torch.Tensor | None, start: int, out: torch.Tensor) -> None:
        """[W, 0 B 0] into `out` (N, D + R): the weight of a linear, 4-bit or not, and its adapter's B at `start`."""
        weight = linear.weight
        # A weight that FSDP unshards comes back without it; runtime/distributed.py left it at the module.
        state = getattr(weight, "quant_state", None) or getattr(linear, "quant_state", None)
        if self.has_triton and can_dequantize(weight, state):
            try:
                dequantize(weight, state, up, start, out)
                return
            except Exception as error:  # Triton builds its launcher with the machine's C compiler
                if is_out_of_memory(error):
                    raise
                self.has_triton = False
                _tell_no_compiler("4-bit weights are unpacked by bitsandbytes, slower", error)
        plain = weight if state is None else dequantize_4bit(weight.data, state)
        out[:, : plain.shape[1]] = plain
        out[:, plain.shape[1] :] = 0
        if up is not None:
            out[:, plain.shape[1] + start :][:, : up.shape[1]] = up


# ---- projections


class Projections:
    """Frozen linears that read the same rows, each with its adapter or none, as products of [rows, their adapters]."""

    def __init__(self, modules: Sequence[nn.Module], kernels: Kernels):
        self.kernels = kernels
        self.bases = [module.get_base_layer() if isinstance(module, LoraLayer) else module for module in modules]
        adapters = [_adapter_of(module) for module in modules]
        self.parameters = [part for down, up, _ in adapters for part in (down, up) if part is not None]
        self.scales = [scale for *_, scale in adapters]
        ranks = [0 if down is None else down.shape[0] for down, *_ in adapters]
        ends = list(itertools.accumulate(ranks))
        self.own = [slice(end - rank, end) for end, rank in zip(ends, ranks)]  # columns of each linear's adapter
        self.width = self.bases[0].in_features
        self.columns = -(-ends[-1] // ALIGNED) * ALIGNED

    def empty_rows(self, like: torch.Tensor) -> torch.Tensor:
        """(M, D + R) whose first D columns are to be filled."""
        return like.new_empty(like.shape[0], self.width + self.columns)

    def down(self, parameters: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """(R, D): sA of each linear, zero rows behind them."""
        stacked = like.new_empty(self.columns, self.width)
        for own, part, scale in zip(self.own, parameters[::2], self.scales):
            torch.mul(part, scale, out=stacked[own])
        stacked[self.own[-1].stop :].zero_()
        return stacked

    def weight(self, index: int, parameters: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """[W, B] of one linear, zeros beside B: (N, D + R)."""
        base = self.bases[index]
        whole = like.new_empty(base.out_features, self.width + self.columns)
        up = parameters[2 * index + 1] if parameters else None
        self.kernels.dequantize(base, up, self.own[index].start, whole)
        return whole

    def forward(self, rows: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """(M, N) of each linear; fills the last R columns of `rows`."""
        if self.columns:
            torch.mm(rows[:, : self.width], self.down(parameters, rows).T, out=rows[:, self.width :])
        return [self._product(index, rows, parameters) for index in range(len(self.bases))]

    def _product(self, index: int, rows: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        weight, bias = self.weight(index, parameters, rows), self.bases[index].bias
        return rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)

    def backward(self, gradients: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """(M, D + R): gradient of the rows without what comes through the adapters, and of the adapters' columns."""
        whole = None
        for index, gradient in enumerate(gradients):
            weight = self.weight(index, parameters, gradient)
            whole = gradient @ weight if whole is None else whole.addmm_(gradient, weight)
            del weight  # before the next is made
        return whole

    def backward_inner(self, gradients: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """(M, R): gradient of the adapters' columns alone."""
        inner = gradients[0].new_zeros(gradients[0].shape[0], self.columns)
        for own, gradient, up in zip(self.own, gradients, parameters[1::2]):
            inner[:, own] = gradient @ up.to(gradient.dtype)
        return inner

    def add_lora_grad(self, whole: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """(M, D): the gradient of the rows, from that of `backward`, in place."""
        rows = whole[:, : self.width]
        return rows.addmm_(whole[:, self.width :], self.down(parameters, whole)) if self.columns else rows

    def backward_adapters(
        self, gradients: Sequence[torch.Tensor], inner: torch.Tensor, rows: torch.Tensor, products: torch.Tensor
    ) -> list[torch.Tensor]:
        """Gradients of A, B of each linear, fp32; `inner` (M, R) is gB, `rows` (M, D) x, `products` (M, R) sxA'."""
        ranks = self.own[-1].stop
        of_downs = _wide_product(inner[:, :ranks].T, rows)  # (ranks, D)
        if len(set(self.scales)) == 1:
            of_downs *= self.scales[0]
        else:
            for own, scale in zip(self.own, self.scales):
                of_downs[own] *= scale
        found = []
        for own, gradient in zip(self.own, gradients):
            found += [of_downs[own], _wide_product(gradient.T, products[:, own])]
        return found


def _wide_product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Their product in fp32, in which it is summed anyway."""
    if one.is_cuda and one.dtype != torch.float32:
        return torch.mm(one, other, out_dtype=torch.float32)
    return (one @ other).float()


def _adapter_of(module: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
    """(A, B, scale) of a linear's adapter, (None, None, 0) where it has none."""
    if not isinstance(module, LoraLayer):
        return None, None, 0.0
    (name,) = module.active_adapters
    return module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]


# ---- a layer


class FusedLayer:
    """The forward of one decoder layer (Llama, Mistral, Qwen2), put in place of the stock one.

    `keep` says whether what the backward needs is kept, or the layer is run again for it; `offload`, whether its input
    waits in the host's memory. Few rows, a mask in training and adapters that are switched off or merged go to the
    stock layer.
    """

    def __init__(self, layer: nn.Module, kernels: Kernels):
        attention, mlp = layer.self_attn, layer.mlp
        self.stock = layer.forward
        self.layer = layer
        self.kernels = kernels
        self.keep = False
        self.offload = False
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.groups = [
            Projections([attention.q_proj, attention.k_proj, attention.v_proj], kernels),
            Projections([attention.o_proj], kernels),
            Projections([mlp.gate_proj, mlp.up_proj], kernels),
            Projections([mlp.down_proj], kernels),
        ]
        self.parameters = [part for group in self.groups for part in group.parameters]

    def __call__(
        self, hidden_states, attention_mask=None, past_key_values=None, position_embeddings=None, **kwargs
    ) -> torch.Tensor:
        images, tokens, width = hidden_states.shape
        trains = torch.is_grad_enabled() and (hidden_states.requires_grad or self._learns)
        adapted = self.layer.self_attn.q_proj
        switched_off = getattr(adapted, "disable_adapters", False) or getattr(adapted, "merged", False)
        if (
            images * tokens < SMALL
            or switched_off
            or (trains and (attention_mask is not None or past_key_values is not None))
        ):
            return self.stock(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        cos, sin = self.kernels.positions(position_embeddings, images)
        rows = hidden_states.reshape(images * tokens, width)
        if trains:
            out = _Function.apply(self, images, rows, cos, sin, *self.parameters)
        else:
            out, _ = self.run(images, rows, cos, sin, self.parameters, attention_mask, past_key_values, keep=False)
        return out.view(images, tokens, width)

    @property
    def lora_columns(self) -> int:
        """Columns that the adapters of a group add to its rows."""
        return self.groups[0].columns

    @property
    def _learns(self) -> bool:
        return any(part.requires_grad for part in self.parameters)

    def split(self, parameters: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor]]:
        """The parameters of each group."""
        ends = itertools.accumulate(len(group.parameters) for group in self.groups)
        return [parameters[end - len(group.parameters) : end] for group, end in zip(self.groups, ends)]

    def run(self, images, h, cos, sin, parameters, mask=None, cache=None, keep=True, needs_output=True):
        """(output or None, what the backward needs or None)."""
        kernels, (heads, out_projection, mlp, down) = self.kernels, self.groups
        of_heads, of_out, of_mlp, of_down = self.split(parameters)
        first, second = self.norms
        x = heads.empty_rows(h)
        kernels.norm(h, first.weight, first.variance_epsilon, x[:, : heads.width])
        query, key, value = heads.forward(x, of_heads)
        products_heads = x[:, heads.width :].clone() if keep else None
        query, key = kernels.rotate(query, key, cos, sin)
        leaves, attended = self.attend(images, query, key, value, mask, cache, keep)
        del query, key, value
        x = out_projection.empty_rows(h)
        x[:, : out_projection.width] = attended.detach().flatten(0, 1).flatten(1)
        (update,) = out_projection.forward(x, of_out)
        products_out = x[:, out_projection.width :].clone() if keep else None
        x = mlp.empty_rows(h)
        after = kernels.add_norm(h, update, second.weight, second.variance_epsilon, x[:, : mlp.width])
        del update
        gate, up = mlp.forward(x, of_mlp)
        products_mlp = x[:, mlp.width :].clone() if keep else None
        kept = [leaves, attended, after, gate, up, products_heads, products_out, products_mlp] if keep else None
        if not needs_output:
            return None, kept
        x = down.empty_rows(gate)
        kernels.swiglu(gate, up, x[:, : down.width])
        del gate, up, leaves, attended
        (update,) = down.forward(x, of_down)
        return after + update, kept

    def attend(self, images, query, key, value, mask, cache, keep):
        """(q, k, v as leaves of a graph of their own, attention's output (B, T, heads, head_dim) at its end)."""
        attention = self.layer.self_attn
        leaves = [
            rows.view(images, -1, rows.shape[1] // attention.head_dim, attention.head_dim).transpose(1, 2)
            for rows in (query, key, value)
        ]
        if cache is not None:
            leaves[1:] = cache.update(*leaves[1:], attention.layer_idx)
        with torch.set_grad_enabled(keep):
            leaves = [leaf.detach().requires_grad_(keep) for leaf in leaves]
            attended, _ = sdpa_attention_forward(attention, *leaves, mask, scaling=attention.scaling)
        return leaves, attended

    def backward(self, h, cos, sin, parameters, kept, gradient, needs_rows: bool, learns: bool):
        """(gradient of h or None, gradients of the parameters). Empties `kept`."""
        kernels, (heads, out_projection, mlp, down) = self.kernels, self.groups
        of_heads, of_out, of_mlp, of_down = self.split(parameters)
        first, second = self.norms
        leaves, attended, after, gate, up, products_heads, products_out, products_mlp = kept
        kept.clear()
        whole = down.backward([gradient], of_down)
        rows = down.add_lora_grad(whole, of_down)
        kernels.swiglu_backward(gate, up, rows)  # gate and up are gradients now, rows the product they gave
        found_down = _found(learns, down, of_down, [gradient], whole, rows)
        del rows
        whole = mlp.backward([gate, up], of_mlp)
        x = torch.empty_like(h)
        rows = mlp.add_lora_grad(whole, of_mlp)
        gradient = kernels.norm_backward(rows, after, second.weight, second.variance_epsilon, gradient, x)
        found_mlp = _found(learns, mlp, of_mlp, [gate, up], whole, x, products_mlp)
        del gate, up, after
        whole = out_projection.backward([gradient], of_out)
        rows = out_projection.add_lora_grad(whole, of_out)
        values = attended.detach().flatten(0, 1).flatten(1)
        found_out = _found(learns, out_projection, of_out, [gradient], whole, values, products_out)
        of_leaves = torch.autograd.grad(attended, leaves, rows.view(attended.shape))
        of_query, of_key, of_value = (leaf.transpose(1, 2).reshape(h.shape[0], -1) for leaf in of_leaves)
        del attended, leaves, of_leaves, values
        gradients = [*kernels.rotate_backward(of_query, of_key, cos, sin), of_value]
        if needs_rows:
            whole = heads.backward(gradients, of_heads)
            rows = heads.add_lora_grad(whole, of_heads)
            gradient = kernels.norm_backward(rows, h, first.weight, first.variance_epsilon, gradient, x)
        else:
            gradient = None
            whole = heads.backward_inner(gradients, of_heads)
            kernels.norm(h, first.weight, first.variance_epsilon, x)
        found_heads = _found(learns, heads, of_heads, gradients, whole, x, products_heads)
        return gradient, [*found_heads, *found_out, *found_mlp, *found_down]


def _found(learns, group, parameters, gradients, whole, rows, products=None):
    """The gradients of a group's parameters; `whole` ends in the gradient of the adapters' columns."""
    if not learns or not parameters:
        return [None] * len(parameters)
    if products is None:
        products = rows @ group.down(parameters, rows).T
    return group.backward_adapters(gradients, whole[:, -group.columns :], rows, products)


class _Function(torch.autograd.Function):
    """One layer; see FusedLayer. Parameters are inputs so that autograd hands them their gradients."""

    @staticmethod
    def forward(ctx, layer: FusedLayer, images: int, h, cos, sin, *parameters):
        with torch.autocast(h.device.type, enabled=False):
            out, ctx.kept = layer.run(images, h, cos, sin, parameters, keep=layer.keep)
        ctx.save_for_backward(offload_to_pinned_memory(h) if layer.offload else h, cos, sin, *parameters)
        ctx.layer, ctx.images = layer, images
        return out

    @staticmethod
    def backward(ctx, gradient):
        h, cos, sin, *parameters = ctx.saved_tensors
        h = h.to(gradient.device, non_blocking=True)
        kept, ctx.kept = ctx.kept, None
        with torch.autocast(h.device.type, enabled=False):
            if kept is None:
                _, kept = ctx.layer.run(ctx.images, h, cos, sin, parameters, needs_output=False)
            of_h, found = ctx.layer.backward(
                *(h, cos, sin, parameters, kept, gradient.contiguous()),
                needs_rows=ctx.needs_input_grad[2],
                learns=any(ctx.needs_input_grad[5:]),
            )
        return None, None, of_h, None, None, *found


def offload_to_pinned_memory(h: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory; page-locked, so that the GPU does not wait for it."""
    return torch.empty(h.shape, dtype=h.dtype, pin_memory=h.is_cuda).copy_(h, non_blocking=True)


FUSABLE = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")


def can_fuse(layers: Iterable[nn.Module]) -> bool:
    """Frozen layers of a known kind with a gated SiLU MLP, without dropout, and adapters without it or variants."""
    for layer in layers:
        known = type(layer).__name__ in FUSABLE and isinstance(layer.mlp.act_fn, (nn.SiLU, SiLUActivation))
        adapted = [module for module in layer.modules() if isinstance(module, LoraLayer)]
        plain = len(adapted) in (0, 7) and all(
            len(module.active_adapters) == 1
            and not module.lora_variant
            and not module.lora_bias[module.active_adapters[0]]
            and isinstance(module.lora_dropout[module.active_adapters[0]], nn.Identity)
            for module in adapted
        )
        learning = any(part.requires_grad for name, part in layer.named_parameters() if "lora_" not in name)
        if not known or not plain or learning or layer.self_attn.attention_dropout:
            return False
    return True


def fuse_layers(layers: Iterable[nn.Module]) -> list[FusedLayer]:
    """Put a FusedLayer in place of each layer's forward; the modules, their names and their weights stay."""
    kernels = Kernels()
    fused = [FusedLayer(layer, kernels) for layer in layers]
    for one in fused:
        one.layer.forward = one
    return fused


def unwrap(model: nn.Module) -> nn.Module:
    """The LLaVA-NeXT below PEFT's wrapper, if there is one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def get_fused_layers(layers: Iterable[nn.Module]) -> list[FusedLayer]:
    """The FusedLayer of each layer; empty where the layers are the stock ones."""
    return [layer.forward for layer in layers if isinstance(layer.forward, FusedLayer)]


def set_activation_checkpointing(fused: Sequence[FusedLayer], count: int, offload: bool = False) -> None:
    """The last `count` layers keep what their backward needs: they are the first to give it back.

    `offload`: the inputs of the others wait in the host's memory.
    """
    for index, one in enumerate(fused):
        one.keep = index >= len(fused) - count
        one.offload = offload and not one.keep

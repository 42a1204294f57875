"""The language model's layers as one autograd function each: fewer passes over memory, fewer saved activations.

Shapes: B images, T tokens, M = B x T rows, U positions at which the last output is used, D width of a linear's input, N
of its output, R LoRA columns of a group.

A step of the stock layers with LoRA spends nearly half its time outside of matmuls: casts, LoRA additions, scalings,
norms. Here

- LoRA is part of the matmul: [x, s xA'] [W, B]' = xW' + s xA'B', summed in fp32 and rounded once. In the backward pass
  g [W, B] gives gW and gB at once;
- what is elementwise between two matmuls is one kernel of models/kernels.py;
- saved for the backward are the layer's input, q, k, v, attention's output, the second residual and the two halves of
  the MLP; the rest is recomputed elementwise. With activation checkpointing only the input is saved;
- 4-bit weights are dequantized right before each matmul and never saved;
- behind attention the last layer computes only the rows whose output is used. It is zero elsewhere.

Same mathematics as the stock layer; tests/unit/test_fused_layers.py compares loss and gradients.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from models.kernels import Kernels
from models.offloading import Offloader

ALIGNMENT = 64  # LoRA columns are a multiple of this: a matmul is fast where each row starts at an aligned address
MIN_ROWS = 512  # with fewer the stock layer is faster: bitsandbytes multiplies few rows by 4-bit weights directly


# ---- projections


class Lora(NamedTuple):
    """The low-rank update of a linear: scale * B A."""

    a: torch.Tensor  # (rank, D)
    b: torch.Tensor  # (N, rank)
    scale: float
    columns: slice  # among the LoRA columns of its group


class Projections:
    """A group of frozen linears that read the same rows, each with LoRA or none with it.

    Their rows are (M, D + R): the input x, and behind it the LoRA columns s xA' of all linears.
    """

    def __init__(self, modules: Sequence[nn.Module], kernels: Kernels):
        self.kernels = kernels
        self.linears = [module.get_base_layer() if isinstance(module, LoraLayer) else module for module in modules]
        self.loras: list[Lora] = []
        self.ranks = 0  # of all linears
        for module in modules:
            if isinstance(module, LoraLayer):
                (name,) = module.active_adapters
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                columns = slice(self.ranks, self.ranks + len(a))
                self.loras.append(Lora(a, b, module.scaling[name], columns))
                self.ranks = columns.stop
        self.parameters = [part for lora in self.loras for part in (lora.a, lora.b)]
        self.width = self.linears[0].in_features
        self.columns = -(-self.ranks // ALIGNMENT) * ALIGNMENT

    def empty_rows(self, like: torch.Tensor) -> torch.Tensor:
        """(M, D + R) whose first D columns are to be filled."""
        return like.new_empty(like.shape[0], self.width + self.columns)

    def scaled_a(self, like: torch.Tensor) -> torch.Tensor:
        """(R, D): sA of each linear, below them zeros."""
        stacked = like.new_empty(self.columns, self.width)
        for lora in self.loras:
            torch.mul(lora.a, lora.scale, out=stacked[lora.columns])
        stacked[self.ranks :].zero_()
        return stacked

    def weight(self, index: int, like: torch.Tensor) -> torch.Tensor:
        """(N, D + R): [W, B] of one linear, zeros in the columns of the other linears."""
        linear = self.linears[index]
        extended = like.new_empty(linear.out_features, self.width + self.columns)
        b, start = (self.loras[index].b, self.loras[index].columns.start) if self.loras else (None, 0)
        self.kernels.dequantize(linear, b, start, extended)
        return extended

    def forward(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """(M, N) of each linear; fills the LoRA columns of `rows`."""
        if self.loras:
            torch.mm(rows[:, : self.width], self.scaled_a(rows).T, out=rows[:, self.width :])
        return [F.linear(rows, self.weight(index, rows), linear.bias) for index, linear in enumerate(self.linears)]

    def backward(self, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the rows (M, D), in which `add_lora_grad` is still missing, and of the LoRA columns (M, R)."""
        extended = None
        for index, gradient in enumerate(gradients):
            weight = self.weight(index, gradient)
            extended = gradient @ weight if extended is None else extended.addmm_(gradient, weight)
            del weight  # before the next is made
        return extended[:, : self.width], extended[:, self.width :]

    def backward_columns(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """(M, R): gradient of the LoRA columns alone."""
        found = gradients[0].new_zeros(gradients[0].shape[0], self.columns)
        for lora, gradient in zip(self.loras, gradients):
            found[:, lora.columns] = gradient @ lora.b.to(gradient.dtype)
        return found

    def add_lora_grad(self, of_rows: torch.Tensor, of_columns: torch.Tensor) -> torch.Tensor:
        """(M, D): the gradient of the rows, from those of `backward`, in place."""
        return of_rows.addmm_(of_columns, self.scaled_a(of_rows)) if self.loras else of_rows

    def lora_grads(
        self, gradients: Sequence[torch.Tensor], of_columns, rows, columns=None
    ) -> list[torch.Tensor | None]:
        """fp32 gradients of A, B of each linear, None if frozen.

        `of_columns` (M, R) is the gradient gB of the LoRA columns; `rows` (M, D) is x, `columns` (M, R) sxA'.
        """
        if not any(part.requires_grad for part in self.parameters):
            return [None] * len(self.parameters)
        columns = rows @ self.scaled_a(rows).T if columns is None else columns
        of_a = _matmul_fp32(of_columns[:, : self.ranks].T, rows)  # (ranks, D)
        found = []
        for lora, gradient in zip(self.loras, gradients):
            found += [of_a[lora.columns] * lora.scale, _matmul_fp32(gradient.T, columns[:, lora.columns])]
        return found


def _matmul_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Their product in fp32, in which it is summed anyway."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


# ---- a layer


class Rows(NamedTuple):
    """The input of a layer: B images as M rows, with their rotary embeddings, and where its output is used."""

    images: int
    hidden: torch.Tensor  # (M, D)
    cos: torch.Tensor  # (M, head_dim)
    sin: torch.Tensor
    used: torch.Tensor | None  # (U,) positions; None: all

    def pick(self, whole: torch.Tensor) -> torch.Tensor:
        """(M, N) -> (B U, N)"""
        return whole if self.used is None else whole.unflatten(0, (self.images, -1))[:, self.used].flatten(0, 1)

    def scatter(self, picked: torch.Tensor) -> torch.Tensor:
        """(B U, N) -> (M, N), zero elsewhere."""
        if self.used is None:
            return picked
        whole = picked.new_zeros(self.images, len(self.hidden) // self.images, picked.shape[1])
        return whole.index_copy_(1, self.used, picked.unflatten(0, (self.images, -1))).flatten(0, 1)


class Saved(NamedTuple):
    """What a layer saves for its backward besides its input."""

    leaves: list[torch.Tensor]  # q, k, v as leaves of a graph of their own
    attended: torch.Tensor  # attention's output (B, T, heads, head_dim), at the end of that graph
    qkv_columns: torch.Tensor  # LoRA columns
    residual: torch.Tensor  # the second one; from here on of the rows that are used
    gate: torch.Tensor
    up: torch.Tensor
    o_columns: torch.Tensor
    mlp_columns: torch.Tensor


class FusedLayer:
    """The forward of one decoder layer (Llama, Mistral, Qwen2, Granite), put in place of the stock one.

    `keep`: save activations for the backward, instead of activation checkpointing; `offload`: keep the checkpointed
    input in the CPU's memory; `used`: positions (U,), distinct and from 0 up, at which the output of the next call is
    used, None for all. Few rows, a mask in training, and disabled or merged adapters go to the stock layer.
    """

    def __init__(self, layer: nn.Module, kernels: Kernels, offloader: Offloader):
        attention, mlp = layer.self_attn, layer.mlp
        self.stock, layer.forward = layer.forward, self
        self.layer = layer
        self.kernels = kernels
        self.offloader = offloader
        self.keep = False
        self.offload = False
        self.used: torch.Tensor | None = None
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.multiplier = getattr(layer, "residual_multiplier", 1.0)  # Granite's, of what is added to the residual
        self.modules = [
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ]
        self.groups = [Projections(group, kernels) for group in self.modules]
        self.parameters = [part for group in self.groups for part in group.parameters]

    def __call__(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        images, tokens, width = hidden_states.shape
        used, self.used = self.used, None
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        is_trainable = any(part.requires_grad for part in self.parameters)
        trains = torch.is_grad_enabled() and (hidden_states.requires_grad or is_trainable)
        q_proj = self.layer.self_attn.q_proj
        lora_is_off = getattr(q_proj, "disable_adapters", False) or getattr(q_proj, "merged", False)
        if images * tokens < MIN_ROWS or lora_is_off or (trains and (mask is not None or cache is not None)):
            return self.stock(hidden_states, **kwargs)
        cos, sin = self.kernels.positions(kwargs["position_embeddings"], images)
        rows = Rows(images, hidden_states.reshape(images * tokens, width), cos, sin, used)
        if trains:
            out = _Function.apply(self, *rows, *self.parameters)
        else:
            out, _ = self.forward(rows, mask, cache, keep=False)
        return out.view(images, tokens, width)

    def scale(self, update: torch.Tensor) -> torch.Tensor:
        """What is added to the residual; its gradient, too."""
        return update if self.multiplier == 1.0 else update * self.multiplier

    def forward(self, rows: Rows, mask=None, cache=None, keep=True, needs_output=True):
        """(output (M, D) or None, Saved or None)."""
        kernels, (qkv, o_proj, gate_up, down_proj) = self.kernels, self.groups
        images, h, cos, sin, _ = rows
        first, second = self.norms
        x = qkv.empty_rows(h)
        kernels.rms_norm(h, first.weight, first.variance_epsilon, x[:, : qkv.width])
        query, key, value = qkv.forward(x)
        qkv_columns = x[:, qkv.width :].clone() if keep else None
        query, key = kernels.rotate(query, key, cos, sin)
        leaves, attended = self.attend(images, query, key, value, mask, cache, keep)
        del query, key, value
        h = rows.pick(h)
        x = o_proj.empty_rows(h)
        x[:, : o_proj.width] = rows.pick(attended.detach().flatten(0, 1).flatten(1))
        (update,) = o_proj.forward(x)
        o_columns = x[:, o_proj.width :].clone() if keep else None
        x = gate_up.empty_rows(h)
        update = self.scale(update)
        residual = kernels.add_rms_norm(h, update, second.weight, second.variance_epsilon, x[:, : gate_up.width])
        del update
        gate, up = gate_up.forward(x)
        mlp_columns = x[:, gate_up.width :].clone() if keep else None
        saved = Saved(leaves, attended, qkv_columns, residual, gate, up, o_columns, mlp_columns) if keep else None
        if not needs_output:
            return None, saved
        x = down_proj.empty_rows(gate)
        kernels.swiglu(gate, up, x[:, : down_proj.width])
        del gate, up, leaves, attended
        (update,) = down_proj.forward(x)
        return rows.scatter(residual + self.scale(update)), saved

    def attend(self, images, query, key, value, mask, cache, keep):
        """(q, k, v as leaves of a graph of their own, attention's output at its end); see Saved."""
        attention = self.layer.self_attn
        leaves = [
            rows.view(images, -1, rows.shape[1] // attention.head_dim, attention.head_dim).transpose(1, 2)
            for rows in (query, key, value)
        ]
        if cache is not None:
            leaves[1:] = cache.update(*leaves[1:], attention.layer_idx)
        trained = self.kernels.attention if mask is None and cache is None else None
        chosen = sdpa_kernel(trained) if trained else contextlib.nullcontext()
        with torch.set_grad_enabled(keep), chosen:
            leaves = [leaf.detach().requires_grad_(keep) for leaf in leaves]
            attended, _ = sdpa_attention_forward(attention, *leaves, mask, scaling=attention.scaling)
        return leaves, attended

    def backward(self, rows: Rows, saved: list[Saved], gradient: torch.Tensor, needs_rows: bool):
        """(gradient of the rows or None, gradients of the parameters).

        Takes Saved out of the list, so that each tensor is freed after its last use.
        """
        kernels, (qkv, o_proj, gate_up, down_proj) = self.kernels, self.groups
        _, h, cos, sin, _ = rows
        first, second = self.norms
        leaves, attended, qkv_columns, residual, gate, up, o_columns, mlp_columns = saved.pop()
        gradient = rows.pick(gradient)
        of_update = self.scale(gradient)
        of_x, of_columns = down_proj.backward([of_update])
        x = down_proj.add_lora_grad(of_x, of_columns)
        kernels.swiglu_backward(gate, up, x)  # gate and up become their gradients, x the input of down_proj
        down_grads = down_proj.lora_grads([of_update], of_columns, x)
        del x, of_x
        of_x, of_columns = gate_up.backward([gate, up])
        x = torch.empty_like(residual)
        gate_up.add_lora_grad(of_x, of_columns)
        gradient = kernels.rms_norm_backward(of_x, residual, second.weight, second.variance_epsilon, gradient, x)
        gate_up_grads = gate_up.lora_grads([gate, up], of_columns, x, mlp_columns)
        del gate, up, residual, x
        of_update = self.scale(gradient)
        of_x, of_columns = o_proj.backward([of_update])
        o_proj.add_lora_grad(of_x, of_columns)
        values = rows.pick(attended.detach().flatten(0, 1).flatten(1))
        o_grads = o_proj.lora_grads([of_update], of_columns, values, o_columns)
        of_leaves = torch.autograd.grad(attended, leaves, rows.scatter(of_x).view(attended.shape))
        of_query, of_key, of_value = (leaf.transpose(1, 2).reshape(h.shape[0], -1) for leaf in of_leaves)
        del attended, leaves, of_leaves, values
        gradients, x = [*kernels.rotate(of_query, of_key, cos, -sin), of_value], torch.empty_like(h)
        if needs_rows:
            of_x, of_columns = qkv.backward(gradients)
            qkv.add_lora_grad(of_x, of_columns)
            gradient = rows.scatter(gradient)
            gradient = kernels.rms_norm_backward(of_x, h, first.weight, first.variance_epsilon, gradient, x)
        else:
            gradient = None
            of_columns = qkv.backward_columns(gradients)
            kernels.rms_norm(h, first.weight, first.variance_epsilon, x)
        qkv_grads = qkv.lora_grads(gradients, of_columns, x, qkv_columns)
        return gradient, [*qkv_grads, *o_grads, *gate_up_grads, *down_grads]


class _Function(torch.autograd.Function):
    """One layer; see FusedLayer. LoRA parameters are inputs, so that autograd accumulates their gradients."""

    @staticmethod
    def forward(ctx, layer: FusedLayer, images: int, h, cos, sin, used, *parameters):
        with torch.autocast(h.device.type, enabled=False):
            out, ctx.saved = layer.forward(Rows(images, h, cos, sin, used), keep=layer.keep)
        ctx.offloaded = layer.offloader(h) if layer.offload and h.is_cuda else None
        ctx.save_for_backward(cos, sin, used, *(() if ctx.offloaded else (h,)))
        ctx.layer, ctx.images = layer, images
        return out

    @staticmethod
    def backward(ctx, gradient):
        cos, sin, used, *h = ctx.saved_tensors
        rows = Rows(ctx.images, ctx.offloaded.fetch() if ctx.offloaded else h[0], cos, sin, used)
        saved, ctx.saved, ctx.offloaded = [ctx.saved], None, None
        with torch.autocast(gradient.device.type, enabled=False):
            if saved[0] is None:
                saved[0] = ctx.layer.forward(rows, needs_output=False)[1]
            of_h, of_lora = ctx.layer.backward(rows, saved, gradient.contiguous(), ctx.needs_input_grad[2])
        return None, None, of_h, None, None, None, *of_lora


FUSABLE = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "GraniteDecoderLayer")


def find_obstacle(layer: nn.Module) -> str:
    """Why a layer cannot be fused, empty where it can: a known class, frozen, no dropout, plain LoRA or none."""
    if type(layer).__name__ not in FUSABLE:
        return f"{type(layer).__name__} computes otherwise"
    if not isinstance(layer.mlp.act_fn, (nn.SiLU, SiLUActivation)):
        return f"its MLP has {type(layer.mlp.act_fn).__name__} in place of SiLU"
    adapted = [module for module in layer.modules() if isinstance(module, LoraLayer)]
    is_plain_lora = len(adapted) in (0, 7) and all(
        len(module.active_adapters) == 1
        and not module.lora_variant
        and not module.lora_bias[module.active_adapters[0]]
        and isinstance(module.lora_dropout[module.active_adapters[0]], nn.Identity)
        for module in adapted
    )
    if not is_plain_lora or layer.self_attn.attention_dropout:
        return "dropout, or LoRA of another kind"
    is_frozen = not any(part.requires_grad for name, part in layer.named_parameters() if "lora_" not in name)
    return "" if is_frozen else "all their weights are trained"


def fuse_layers(layers: Sequence[nn.Module]) -> list[FusedLayer]:
    """Put a FusedLayer in place of each layer's forward, if all can be fused; modules, names and weights stay."""
    if any(map(find_obstacle, layers)):
        return []
    kernels, offloader = Kernels(), Offloader()
    return [FusedLayer(layer, kernels, offloader) for layer in layers]


def expect_logits(base: nn.Module, given: tuple, inputs: dict) -> None:
    """A forward pre-hook: the last layer computes what the logits that are kept need."""
    kept = inputs.get("logits_to_keep")
    expect_positions(base, kept if isinstance(kept, torch.Tensor) else None)


def expect_positions(base: nn.Module, used: torch.Tensor | None) -> None:
    """The next forward's last hidden states are used at these positions (U,), distinct and from 0 up; None: at all."""
    if isinstance(last := base.model.language_model.layers[-1].forward, FusedLayer):
        last.used = used


def unwrap(model: nn.Module) -> nn.Module:
    """The LLaVA-NeXT below PEFT's wrapper, if there is one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def get_fused_layers(layers: Iterable[nn.Module]) -> list[FusedLayer]:
    """The FusedLayer of each layer; empty where the layers are the stock ones."""
    return [layer.forward for layer in layers if isinstance(layer.forward, FusedLayer)]


def set_activation_checkpointing(fused: Sequence[FusedLayer], kept: int, offloaded: int = 0) -> None:
    """Activation checkpointing in all but the last `kept` layers: those free their activations first in the backward.

    The inputs of the first `offloaded` layers, which wait longest, are kept in the CPU's memory.
    """
    for index, layer in enumerate(fused):
        layer.keep = index >= len(fused) - kept
        layer.offload = index < offloaded and not layer.keep

"""The back end of scaled_dot_product_attention that the fused layers train with: the fastest with right gradients.

Shapes: B images, T tokens, H query heads, K key and value heads, D head_dim.
"""

import warnings
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from utils.logging_utils import first_line, logger

BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
# Largest relative error, in the Frobenius norm, of output, dq, dk and dv against fp32; rounding to bf16 makes 0.003. In
# another layout cuDNN once made gradients 1,300 times too large (docs/LOG.md).
MAX_ERROR = 0.02


class Trial(NamedTuple):
    backend: SDPBackend
    seconds: float  # of a forward and a backward
    error: float  # the largest of output, dq, dk, dv

    def __str__(self) -> str:
        return f"{self.backend.name.lower()} {1000 * self.seconds:.2f} ms, error {self.error:.4f}"


def choose_attention(fused, images: int, tokens: int) -> SDPBackend | None:
    """The fastest back end that agrees with fp32 in these layers' layout and shapes; None: torch chooses."""
    layer = fused[0]
    found = [trial for backend in BACKENDS if (trial := _try_backend(layer, backend, images, tokens))]
    right = sorted((trial for trial in found if trial.error <= MAX_ERROR), key=lambda trial: trial.seconds)
    for trial in found:
        if trial.error > MAX_ERROR:
            logger.warning(f"attention: {trial}: not used, its gradients differ from those of fp32")
    if right:
        logger.info("attention | %s", " | ".join(map(str, right)))
    return right[0].backend if right else None


def _try_backend(layer, backend: SDPBackend, images: int, tokens: int) -> Trial | None:
    """None where the GPU, the precision or the shapes are not for this back end."""
    from torch.utils.benchmark import Timer  # it prints a line where there is no GPU

    try:
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says why another back end is not used
            error = max(attention_error(layer, 1, length) for length in (tokens, tokens - 1))
            leaves = _random_leaves(layer, images, tokens)
            timer = Timer("run(leaves)", globals={"run": lambda leaves: _gradients(layer, leaves), "leaves": leaves})
            return Trial(backend, timer.blocked_autorange(min_run_time=0.1).median, error)
    except RuntimeError as error:  # each back end has words of its own; out of memory too
        logger.debug("attention: %s cannot be used (%s)", backend.name.lower(), first_line(error))
        return None


def attention_error(layer, images: int, tokens: int) -> float:
    """The largest relative error of output, dq, dk and dv, for random queries, keys, values and gradient."""
    leaves = _random_leaves(layer, images, tokens)
    found = _gradients(layer, leaves)
    groups = leaves[0].shape[1] // leaves[1].shape[1]
    squares = [[0.0, 0.0] for _ in found]
    for head in range(leaves[1].shape[1]):  # one at a time: fp32 scores of all would not fit a small GPU
        queries = slice(head * groups, (head + 1) * groups)
        heads = [queries, slice(head, head + 1), slice(head, head + 1)]
        expected = _expected(layer, [leaf[:, part] for leaf, part in zip(leaves, heads)])
        for sums, whole, part, of_head in zip(squares, found, [queries, *heads], expected):
            sums[0] += float((whole[:, part].float() - of_head).pow(2).sum())
            sums[1] += float(of_head.pow(2).sum())
    return max((difference / norm) ** 0.5 for difference, norm in squares)


def _random_leaves(layer, images: int, tokens: int) -> list[torch.Tensor]:
    """(B, H, T, D), (B, K, T, D) twice: as FusedLayer.attend makes them, views of rows. Draws from no random state."""
    attention, weight = layer.layer.self_attn, layer.norms[0].weight
    heads = attention.config.num_attention_heads, *2 * (attention.config.num_key_value_heads,)
    like = {"device": weight.device, "dtype": weight.dtype, "generator": torch.Generator(weight.device).manual_seed(0)}
    rows = [torch.randn(images * tokens, number * attention.head_dim, **like) for number in heads]
    return [part.view(images, tokens, -1, attention.head_dim).transpose(1, 2).requires_grad_() for part in rows]


def _gradients(layer, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output (B, H, T, D), dq, dk, dv for a gradient that is the queries."""
    attention = layer.layer.self_attn
    with torch.enable_grad():
        out, _ = sdpa_attention_forward(attention, *leaves, None, scaling=attention.scaling)
        found = torch.autograd.grad(out, leaves, leaves[0].detach().transpose(1, 2))
    return [out.detach().transpose(1, 2), *found]


def _expected(layer, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same in fp32, by plain matmuls."""
    query, key, value = wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    tokens = query.shape[2]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    with torch.enable_grad():
        scores = (query @ key.transpose(2, 3) * layer.layer.self_attn.scaling).masked_fill(future, -torch.inf)
        out = scores.softmax(-1) @ value
        return [out.detach(), *torch.autograd.grad(out, wide, query.detach())]

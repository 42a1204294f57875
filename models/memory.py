"""What a micro-batch costs in memory, and which micro-batch and recomputation fit a GPU, by arithmetic.

Shapes: T tokens of the longest sample, D width of the language model, L its layers.

Holds for fused_layers.py. models/fitting.py tries a plan once before the run begins, and models/trainer.py
steps down if a step runs out of memory all the same.
"""

import math
from typing import NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size

FRAGMENTATION = 0.05  # share of a GPU's memory that the allocator holds but cannot hand out (docs/LOG.md: 3 to 4 %)
WORKSPACE = 200e6  # bytes: the libraries' buffers, logits of the supervised rows and the like (docs/LOG.md)
# Dequantization and kernel launches cost a micro-batch as much time as a forward of so many tokens (docs/LOG.md).
MICRO_BATCH_TOKENS = 800
RECOMPUTED = 0.8  # of a layer's forward: the recomputation leaves out its last product
BACKWARD = 1.1  # of a forward: the weights are frozen, so only the gradient of the rows and the adapters' are computed
# Bytes of optimizer state for each weight that learns, by a part of transformers' name; the first that fits counts.
OPTIMIZER_BYTES = {"paged": 0, "8bit": 2, "4bit": 1, "sgd": 0, "adafactor": 0, "adam": 8}


class Cost(NamedTuple):
    """Bytes that a step takes."""

    fixed: float  # whatever the micro-batch: weights, gradients, optimizer state, one unpacked weight
    passing: float  # each image of a micro-batch: what lives while one layer's backward is computed
    inputs: float  # each image: the inputs of all layers, unless they wait in the host's memory
    kept_layer: float  # each image in each layer that keeps its activations

    def peak(self, images: int, kept: int, offload: bool = False) -> float:
        return self.fixed + images * (self.passing + kept * self.kept_layer + (0 if offload else self.inputs))


class Plan(NamedTuple):
    """A micro-batch, and the layers that keep their activations; the others are run again in the backward pass."""

    images: int
    kept: int
    offload: bool  # inputs of layers that are run again wait in the host's memory
    peak: float  # bytes


def optimizer_bytes(optim: str, learning: int) -> int:
    """Bytes of state for so many learning weights; 8 each (two in fp32) for an optimizer not known here."""
    return learning * next((size for part, size in OPTIMIZER_BYTES.items() if part in optim), 8)


def layer_bytes(text_config, adapter_columns: int, itemsize: int, compiled: bool) -> tuple[int, int]:
    """(bytes a token that a layer keeps beside its input, bytes a token that pass while its backward is computed).

    What compiled kernels hold in registers, plain torch writes to memory: the MLP's gradient in fp32, six times.
    """
    width, inner = text_config.hidden_size, text_config.intermediate_size
    head = getattr(text_config, "head_dim", None) or width // text_config.num_attention_heads
    queries, keys = head * text_config.num_attention_heads, head * text_config.num_key_value_heads
    # q, k, v, attention's output and its log-sum, the second residual, gate and up, the adapters' products
    kept = itemsize * (2 * queries + 2 * keys + width + 2 * inner + 3 * adapter_columns)
    kept += 4 * text_config.num_attention_heads
    passing = itemsize * (inner + adapter_columns + 4 * width)  # the MLP's gradient; residual, norm and their gradients
    passing += 0 if compiled else 6 * 4 * inner
    return kept, kept + passing


def step_cost(
    text_config,
    tokens: int,
    held: int,
    learning: int,
    optim: str,
    pixels: int,
    adapter_columns: int,
    itemsize: int,
    compiled: bool,
) -> Cost:
    """`held`: bytes in use before the first step; `learning`: weights that learn; `pixels`: bytes of a step's images.

    `compiled`: whether the kernels between the products are.
    """
    kept, passing = layer_bytes(text_config, adapter_columns, itemsize, compiled)
    width, inner = text_config.hidden_size, text_config.intermediate_size
    unpacked = itemsize * inner * (width + adapter_columns)
    inputs = text_config.num_hidden_layers * width * itemsize  # each layer's, kept in any case
    fixed = held + 4 * learning + optimizer_bytes(optim, learning) + pixels + unpacked + WORKSPACE
    return Cost(fixed, tokens * passing, tokens * inputs, tokens * kept)


def is_out_of_memory(error: Exception) -> bool:
    """Whatever says so: torch, cuBLAS, Triton, or the driver where it is asked for page-locked memory of the host."""
    told = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or should_reduce_batch_size(error)
        or (isinstance(error, RuntimeError) and ("out of memory" in told.lower() or "ALLOC_FAILED" in told))
    )


def choose_plan(
    cost: Cost, budget: float, images: int, layers: int, tokens: int, recompute: str = "auto", host: float = math.inf
) -> Plan:
    """The fastest that fits `budget` bytes of the GPU and, where inputs wait there, `host` bytes, for `images` a step.

    `recompute`: of auto, any number of layers; of true and offload, all; of false, none. Where nothing fits the answer
    is the smallest: one image, and with auto the layers' inputs in the host's memory.
    """
    found = []
    offload = recompute == "offload"
    most, least = (0 if recompute in ("true", "offload") else layers), (layers if recompute == "false" else 0)
    for size in sorted({-(-images // pieces) for pieces in range(1, images + 1)}):
        room = budget - cost.peak(size, 0, offload)
        fits = room > 0 and (not offload or size * cost.inputs <= host)
        kept = min(most, int(room // (size * cost.kept_layer))) if fits else -1
        if kept >= least:
            forwards = 1 + BACKWARD + RECOMPUTED * (layers - kept) / layers
            time = images * tokens * forwards + -(-images // size) * MICRO_BATCH_TOKENS
            found.append((time, Plan(size, kept, offload, cost.peak(size, kept, offload))))
    if found:
        return min(found)[1]
    offload = recompute in ("auto", "offload")
    return Plan(1, least, offload, cost.peak(1, least, offload))

"""Memory of a micro-batch: a model of its bytes, and a planner that tries on the GPU what fits before the first step.

Holds for the layers of models/fused_layers.py. If a step runs out of memory all the same, models/trainer.py retries it
with half the micro-batch.
"""

import math
import time
from typing import NamedTuple

import psutil
import torch

from models.fused_layers import set_activation_checkpointing, unwrap
from runtime.device import (
    GIB,
    available_gpu_memory,
    collect_memory,
    is_out_of_memory,
    memory_in_use,
    peak_memory,
    reset_peak_memory,
    synchronize,
)
from runtime.distributed import checksum_quantized, get_local_world_size, unsharded
from utils.logging_utils import UserError, logger

FRAGMENTATION = 0.05  # share of a GPU's memory that the allocator holds but cannot hand out (docs/LOG.md: 3 to 4 %)
WORKSPACE = 200e6  # bytes: the libraries' buffers, logits of the supervised rows and the like (docs/LOG.md)
# Dequantization and kernel launches cost a micro-batch as much time as a forward of so many tokens (docs/LOG.md).
MICRO_BATCH_TOKENS = 800
RECOMPUTED = 0.8  # of a layer's forward: recomputation leaves out its last matmul
BACKWARD = 1.1  # of a forward: the weights are frozen, so only rows and LoRA need gradients
# Bytes of optimizer state per trainable parameter, by a part of transformers' name; the first match counts.
OPTIMIZER_BYTES = {"paged": 0, "8bit": 2, "4bit": 1, "sgd": 0, "adafactor": 0, "adam": 8}
COMPILE_SECONDS = 60  # that compiling may take; 25 with 16 cores (docs/LOG.md)
COMPILE_SAVES = 0.2  # share of the time that compiled kernels save; 0.38 of a training step on an H100 (docs/LOG.md)
# Scoring an image, where nothing was measured; puts the choice at the 2,000 images measured on an H100 (docs/LOG.md).
SCORING_SECONDS = 0.15


class MicroBatcher:
    """The number of images in a forward pass, halved for good when they do not fit."""

    def __init__(self, size: int):
        self.size, self.smallest = size, 1

    def halve(self, error: RuntimeError, message: str) -> None:
        """After an out-of-memory. Raises any other `error` again, and UserError(message) at the smallest size."""
        if not is_out_of_memory(error):
            raise error
        if self.size == self.smallest:
            raise UserError(message) from error
        self.size //= 2


# ---- the model of a micro-batch's bytes


class Cost(NamedTuple):
    """What a step takes: bytes, and what its time depends on."""

    static: float  # whatever the micro-batch: weights, gradients, optimizer state, one dequantized weight
    transient: float  # per image: what exists during one layer's backward
    checkpoint: float  # per image: the inputs of all layers, unless they are offloaded to the CPU
    activation: float  # per image and layer without activation checkpointing
    tokens: int  # of the longest sample
    layers: int  # of the language model

    def peak(self, micro_batch_size: int, kept: int, offload: bool = False) -> float:
        per_image = self.transient + kept * self.activation + (0 if offload else self.checkpoint)
        return self.static + micro_batch_size * per_image


class Plan(NamedTuple):
    micro_batch_size: int
    kept: int  # layers without activation checkpointing
    offload: bool  # inputs of checkpointed layers are offloaded to the CPU
    peak: float  # bytes


def optimizer_bytes(optim: str, trainable: int) -> int:
    """Bytes of state for so many parameters; 8 each (two in fp32) for an optimizer not known here."""
    return trainable * next((size for part, size in OPTIMIZER_BYTES.items() if part in optim), 8)


def step_cost(config, lora_columns: int, itemsize: int, compiled: bool, tokens: int, held: float) -> Cost:
    """`config` is the language model's, with `lora_columns` in a group of projections and activations of `itemsize`.

    `held`: bytes in use before the first step, gradients, optimizer state and pixels of a step included. What compiled
    kernels hold in registers, eager ones write to memory: the MLP's gradient in fp32, six times.
    """
    layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    # q, k, v, attention's output and its log-sum, the second residual, gate and up, the LoRA products
    activation = itemsize * (2 * queries + 2 * keys + width + 2 * inner + 3 * lora_columns)
    activation += 4 * config.num_attention_heads
    # the MLP's gradient; residual, norm and their gradients
    transient = itemsize * (inner + lora_columns + 4 * width) + (0 if compiled else 6 * 4 * inner)
    dequantized = itemsize * inner * (width + lora_columns)
    return Cost(
        static=held + dequantized + WORKSPACE,
        transient=tokens * (activation + transient),
        checkpoint=tokens * layers * width * itemsize,
        activation=tokens * activation,
        tokens=tokens,
        layers=layers,
    )


def choose_plan(cost: Cost, images: int, budget: float, checkpointing: str = "auto", host: float = math.inf) -> Plan:
    """The fastest plan for a step of so many images within `budget` bytes of the GPU and, with offloading, `host` bytes
    of the CPU's memory.

    `checkpointing`: of any number of layers (auto), all (true, offload) or none (false). Where nothing fits the answer
    is the smallest: one image, and with auto all layers' inputs offloaded.
    """
    offload = checkpointing == "offload"
    layers_kept = {"auto": range(cost.layers + 1), "false": [cost.layers]}.get(checkpointing, [0])
    found = []
    for size in {math.ceil(images / micro_batches) for micro_batches in range(1, images + 1)}:
        for kept in layers_kept if not offload or size * cost.checkpoint <= host else ():
            plan = Plan(size, kept, offload, cost.peak(size, kept, offload))
            forwards = 1 + BACKWARD + RECOMPUTED * (cost.layers - kept) / cost.layers
            tokens = images * cost.tokens * forwards + math.ceil(images / size) * MICRO_BATCH_TOKENS  # forward
            if plan.peak <= budget:
                found.append((tokens, plan))
    if found:
        return min(found)[1]
    offload = checkpointing in ("auto", "offload")
    return Plan(1, layers_kept[0], offload, cost.peak(1, layers_kept[0], offload))


def is_worth_compiling(compile: str, images: float, seconds_per_image: float = SCORING_SECONDS) -> bool:
    """Whether to compile kernels for so many images on a CUDA GPU; `seconds_per_image` is that of eager kernels.

    `compile` is auto, true or false; auto: if the compiled kernels win back the time of compiling them.
    """
    if compile != "auto":
        return compile == "true"
    return images > 0 and images * seconds_per_image * COMPILE_SAVES >= COMPILE_SECONDS


# ---- the planner


class MemoryOptions(NamedTuple):
    """What the config says of memory."""

    gradient_checkpointing: str = "auto"  # auto, true, false or offload
    compile: str = "auto"  # auto, true or false
    auto_batch: bool = True
    sharding: str = "none"  # none or fsdp


def plan_memory(trainer, row: dict, steps_left: float) -> None:
    """Choose micro-batch, activation checkpointing and compilation for `trainer`, a PlantTrainer, and log them.

    `row` is the largest sample to come. The plan is arithmetic; a micro-batch of such samples, which updates no weight,
    then measures it. `steps_left` decides whether compiling is worth its time. Without a CUDA GPU or fused layers
    (dropout, full fine-tuning) the config decides. With fsdp the frozen weights are sharded first, and the micro-batch
    is as configured: all ranks compute it or none. Raises UserError where one image, or that micro-batch, does not fit.
    """
    device, options = trainer.args.device, trainer.memory_options
    began, available, size = time.perf_counter(), available_gpu_memory(device), trainer.micro_batcher.size
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if options.sharding == "fsdp":
            _shard(trainer, row, steps_left)
        elif available is not None and trainer.fused:
            # With micro-batch 1 a step waits for the CPU, and compiling saves nothing (docs/LOG.md).
            if options.auto_batch or size > 1:
                _compile_if_worth(trainer, row, 1, steps_left)
            if options.auto_batch:
                _fit(trainer, row, available)
            elif trainer.fused[0].kernels.compiled:
                try_micro_batch(trainer, row, 1)
    if available is not None and trainer.fused:
        words = "not compiled" if options.compile == "false" else "not compiled: the run would not win back the time"
        words = "compiled" if trainer.fused[0].kernels.compiled else words
        logger.info("memory | kernels %s | tried in %.0f s", words, time.perf_counter() - began)
    elif available is not None and options.sharding != "fsdp":
        logger.info("memory | micro-batch %d, as configured: stock layers", size)


def try_micro_batch(trainer, row: dict, size: int) -> tuple[float, float]:
    """(seconds per image, peak bytes) of a micro-batch of `row`, infinite if it does not fit; no weight is updated."""
    device = trainer.args.device
    batch = trainer.data_collator([row] * size).to(device)
    trainer.model.train()
    try:
        for _ in range(2):  # the first one starts libraries and allocates the gradients
            reset_peak_memory(device)
            synchronize(device)
            began = time.perf_counter()
            (micro_batch,) = batch.split(size)
            with trainer.compute_loss_context_manager():
                loss = trainer.model(**micro_batch).loss
            loss.backward()
            synchronize(device)
        return (time.perf_counter() - began) / size, peak_memory(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return math.inf, math.inf
    finally:
        trainer.model.zero_grad()


def _compile_if_worth(trainer, row: dict, size: int, steps_left: float) -> None:
    """With --compile auto, by the time of a trial; the same choice on all ranks."""
    if trainer.memory_options.compile != "auto":
        return
    seconds_per_image, _ = try_micro_batch(trainer, row, size)
    images = steps_left * trainer.total_batch_size / trainer.args.world_size
    if any(trainer.dist.gather_object([is_worth_compiling("auto", images, seconds_per_image)])):
        trainer.fused[0].kernels.compile()


def _shard(trainer, row: dict, steps_left: float) -> None:
    """Shard the frozen weights across ranks and try the configured micro-batch."""
    device, base, size = trainer.args.device, unwrap(trainer.model), trainer.micro_batcher.size
    loading, checksums = peak_memory(device), checksum_quantized(base)
    trainer.shard_weights()
    collect_memory(device)
    held = memory_in_use(device)
    if trainer.fused and device.type == "cuda" and size > 1:
        _compile_if_worth(trainer, row, size, steps_left)
    _, peak = try_micro_batch(trainer, row, size)
    if peak == math.inf:
        raise UserError(f"memory: {out_of_memory_message(trainer)}")
    with unsharded(trainer.fsdp_modules):
        if checksum_quantized(base) != checksums:
            raise UserError("memory: sharding alters the 4-bit weights; use --sharding none, and report it")
    logger.info(
        f"memory | frozen weights sharded across {trainer.args.world_size} ranks: {held / GIB:.2f} GiB each, "
        f"{loading / GIB:.2f} while loading | micro-batch {size}, as configured | peak {peak / GIB:.2f} GiB measured"
    )


def _fit(trainer, row: dict, available: float) -> None:
    """Set the fastest plan that a trial shows to fit. Raises UserError where one image does not fit."""
    (sample,) = trainer.data_collator([row]).samples
    base, fused, device = unwrap(trainer.model), trainer.fused, trainer.args.device
    images = math.ceil(trainer.total_batch_size / trainer.args.world_size)
    trainable = trainer.model.num_parameters(only_trainable=True)
    state = optimizer_bytes(trainer.args.optim, trainable)  # allocated in the first step, so after the trial
    held = memory_in_use(device) + 4 * trainable + state + trainer.data_collator.batch_bytes(images)
    itemsize, config = base.get_input_embeddings().weight.element_size(), base.config.text_config
    lora_columns, compiled = fused[0].groups[0].columns, fused[0].kernels.compiled
    cost = step_cost(config, lora_columns, itemsize, compiled, sample.length, held)
    budget = allowed = available * (1 - FRAGMENTATION)
    # Half of what is free; the allocator of page-locked memory rounds up to powers of two.
    host = psutil.virtual_memory().available / (4 * get_local_world_size())
    checkpointing = trainer.memory_options.gradient_checkpointing
    smallest = choose_plan(cost, images, 0, checkpointing)
    while True:
        plan = choose_plan(cost, images, budget, checkpointing, host)
        trainer.micro_batcher.size = plan.micro_batch_size
        set_activation_checkpointing(fused, plan.kept, plan.offload)
        _, peak = try_micro_batch(trainer, row, plan.micro_batch_size)
        collect_memory(device)
        if plan == smallest and peak == math.inf:
            raise UserError(f"memory: {out_of_memory_message(trainer)}")
        if plan == smallest or peak + state <= budget:
            break
        logger.warning(
            f"memory: micro-batch {plan.micro_batch_size} with activation checkpointing in {cost.layers - plan.kept} "
            f"of {cost.layers} layers does not fit; trying less"
        )
        budget = cost.static + 0.8 * (plan.peak - cost.static)
    if peak + state > allowed:
        logger.warning("memory: the optimizer's state may not fit any more; try --optim paged_adamw_8bit")
    logger.info(
        f"memory | micro-batch {plan.micro_batch_size} | activation checkpointing {cost.layers - plan.kept}/"
        f"{cost.layers} layers{', offloaded to CPU' if plan.offload else ''} | peak {plan.peak / GIB:.2f} GiB "
        f"predicted, {(peak + state) / GIB:.2f} measured, {allowed / GIB:.2f} available"
    )


def out_of_memory_message(trainer) -> str:
    """What to do about a micro-batch that does not fit and cannot be made smaller."""
    size, is_sharded = trainer.micro_batcher.size, bool(trainer.fsdp_modules)
    reason = ", which is not planned with sharded weights" if is_sharded else ""
    smaller = "lower --per-device-train-batch-size and raise --gradient-accumulation-steps as much, or "
    return (
        f"out of memory with micro-batch {size}{reason}; {smaller if is_sharded and size > 1 else ''}use "
        f"--gradient-checkpointing {'offload' if trainer.fused else 'true'}, --load-in-4bit true, --image-size 336, "
        "--optim paged_adamw_8bit, or a GPU with more memory"
    )

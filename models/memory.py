"""Memory of a micro-batch: a model of its bytes, and a planner that tries on the GPU what fits before the first step.

Holds for the layers of models/fused_layers.py. If a step runs out of memory all the same, models/trainer.py retries it
with half the micro-batch.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from models.attention import choose_attention
from models.fp8 import Fp8Projections
from models.fused_layers import set_activation_checkpointing, unwrap
from models.kernels import CompiledKernel
from runtime.atomic import write_file
from runtime.device import (
    GIB,
    available_gpu_memory,
    available_host_memory,
    collect_memory,
    describe_gpu,
    is_out_of_memory,
    memory_in_use,
    peak_memory,
    reset_peak_memory,
    synchronize,
)
from runtime.distributed import is_sharded
from runtime.launcher import get_local_world_size
from utils.logging_utils import UserError, logger

FRAGMENTATION = 0.05  # share of a GPU's memory that the allocator holds but cannot hand out (docs/LOG.md: 3 to 4 %)
WORKSPACE = 200e6  # bytes: the libraries' buffers, logits of the supervised rows and the like (docs/LOG.md)
# A pass over the layers dequantizes the weights, and takes at least as long as launching its kernels, for which a fast
# GPU waits where tokens are few; both as a forward of so many tokens on an H100 (docs/LOG.md).
LAUNCH_TOKENS, DEQUANTIZATION_TOKENS = 2800, 540
RECOMPUTED = 0.7  # of a layer's forward: recomputation leaves out its last matmul
BACKWARD = 1.1  # of a forward: the weights are frozen, so only rows and LoRA need gradients
# Bytes of optimizer state per trainable parameter, by a part of transformers' name; the first match counts.
OPTIMIZER_BYTES = {"paged": 0, "8bit": 2, "4bit": 1, "sgd": 0, "adafactor": 0, "adam": 8}
COMPILE_SECONDS = 60  # that compiling may take; 25 with 16 cores (docs/LOG.md)
COMPILE_SAVES = 0.2  # share of the time that compiled kernels save; 0.38 of a training step on an H100 (docs/LOG.md)
# Scoring an image, where nothing was measured; puts the choice at the 2,000 images measured on an H100 (docs/LOG.md).
SCORING_SECONDS = 0.15
TRIED_PLANS = 6  # the fastest by arithmetic, each tried for two micro-batches
TRIAL_NOISE = 0.03  # share by which a trial misses the time of a step (docs/LOG.md)
TRIAL_SECONDS = 20  # that all trials may take, once a plan has been found that fits


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

    def peak(self, micro_batch_size: int, kept: int, offloaded: int = 0) -> float:
        waiting = self.layers - offloaded + (2 if offloaded else 0)  # one is in use and one fetched ahead
        per_image = self.transient + kept * self.activation + self.checkpoint * waiting / self.layers
        return self.static + micro_batch_size * per_image

    def seconds(self, plan: "Plan", images: int, launch_tokens: float = LAUNCH_TOKENS) -> float:
        """Of a step of so many images, in units of a token's forward."""
        recomputed = 1 - plan.kept / self.layers
        computed = plan.micro_batch_size * self.tokens * (1 + BACKWARD + RECOMPUTED * recomputed)
        passes = 2 + recomputed
        return plan.micro_batches(images) * max(launch_tokens * passes, DEQUANTIZATION_TOKENS * passes + computed)


class Plan(NamedTuple):
    micro_batch_size: int
    kept: int  # layers without activation checkpointing
    offloaded: int  # layers with it whose inputs are offloaded to the CPU
    peak: float  # bytes

    def micro_batches(self, images: int) -> int:
        return math.ceil(images / self.micro_batch_size)

    def describe(self, layers: int) -> str:
        offloaded = f", {self.offloaded} offloaded to CPU" if self.offloaded else ""
        checkpointed = f"activation checkpointing {layers - self.kept}/{layers} layers"
        return f"micro-batch {self.micro_batch_size} | {checkpointed}{offloaded}"


def optimizer_bytes(optim: str, trainable: int) -> int:
    """Bytes of state for so many parameters; 8 each (two in fp32) for an optimizer not known here."""
    return trainable * next((size for part, size in OPTIMIZER_BYTES.items() if part in optim), 8)


def scoring_bytes(config, itemsize: int, tokens: int) -> int:
    """Of an image while its names are scored: keys and values of all layers, and one MLP; prompt and names' tokens."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = head * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    held = 2 * keys * config.num_hidden_layers + 3 * config.intermediate_size + 4 * config.hidden_size
    return itemsize * tokens * held


def scoring_micro_batch(base, device: torch.device, tokens: int, most: int) -> int:
    """Images, from 1 to `most`, whose names can be scored at a time in the memory that is free."""
    config, itemsize = base.config.text_config, base.get_input_embeddings().weight.element_size()
    weight, gpu = itemsize * config.hidden_size * config.intermediate_size, available_gpu_memory(device)
    free = available_host_memory() if gpu is None else gpu * (1 - FRAGMENTATION) - memory_in_use(device)
    return max(1, min(most, int((free - weight - WORKSPACE) / scoring_bytes(config, itemsize, tokens))))


def step_cost(
    config, lora_columns: int, itemsize: int, compiled: bool, tokens: int, held: float, fp8: bool = False
) -> Cost:
    """`config` is the language model's, with `lora_columns` in a group of projections and activations of `itemsize`.

    `held`: bytes in use before the first step, gradients, optimizer state and pixels of a step included. What compiled
    kernels hold in registers, eager ones write to memory: the MLP's gradient in fp32, six times. The last layer counts
    in full, though it needs less.
    """
    layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    # q, k, v, attention's output and its log-sum, the second residual, gate and up, the LoRA products
    activation = itemsize * (2 * queries + 2 * keys + width + 2 * inner + 3 * lora_columns)
    activation += 4 * config.num_attention_heads
    # the MLP's gradient; residual, norm and their gradients
    transient = itemsize * (inner + lora_columns + 4 * width) + (0 if compiled else 6 * 4 * inner)
    transient += 2 * inner if fp8 else 0  # the gradients of gate and up, rounded
    dequantized = itemsize * inner * (width + lora_columns)
    return Cost(
        static=held + dequantized + WORKSPACE,
        transient=tokens * (activation + transient),
        checkpoint=tokens * layers * width * itemsize,
        activation=tokens * activation,
        tokens=tokens,
        layers=layers,
    )


def propose_plans(
    cost: Cost, images: int, budget: float, checkpointing: str = "auto", host: float = math.inf
) -> list[Plan]:
    """Plans for a step of so many images within `budget` bytes of the GPU and `host` bytes of the CPU's memory.

    `checkpointing`: of any number of layers (auto), all (true, offload) or none (false); with auto as many inputs are
    offloaded as are needed. The fastest first, if launching kernels takes the time it takes beside an H100, or none: a
    trial tells. Where nothing fits there is one, the smallest: one image, and with auto all inputs offloaded.
    """
    layers, found = cost.layers, []
    for size in {math.ceil(images / micro_batches) for micro_batches in range(1, images + 1)}:
        fastest = {}
        for kept in {"auto": range(layers + 1), "false": [layers]}.get(checkpointing, [0]):
            for offloaded in _offloads(cost, size, kept, budget, checkpointing):
                # Of the plans that offload and of those that do not, the one that recomputes least.
                plan = Plan(size, kept, offloaded, cost.peak(size, kept, offloaded))
                if plan.peak <= budget and size * offloaded * cost.checkpoint / layers <= host:
                    fastest[offloaded > 0] = plan
        found += fastest.values()
    if not found:
        kept = layers if checkpointing == "false" else 0
        offloaded = layers if checkpointing in ("auto", "offload") else 0
        return [Plan(1, kept, offloaded, cost.peak(1, kept, offloaded))]
    rankings = [sorted(found, key=lambda plan: cost.seconds(plan, images, launch)) for launch in (LAUNCH_TOKENS, 0)]
    return list(dict.fromkeys(plan for pair in zip(*rankings) for plan in pair))


def _offloads(cost: Cost, size: int, kept: int, budget: float, checkpointing: str) -> list[int]:
    """How many layers to offload: none, or as few as bring the peak within the budget; [] where not even all do."""
    checkpointed = cost.layers - kept
    if checkpointing == "offload":
        return [checkpointed]
    if checkpointing != "auto" or cost.peak(size, kept) <= budget:
        return [0]
    needed = 1 + math.ceil((cost.peak(size, kept, 1) - budget) / (size * cost.checkpoint / cost.layers))
    return [needed] if needed <= checkpointed else []


def is_worth_compiling(compile: str, images: float, seconds_per_image: float = SCORING_SECONDS) -> bool:
    """Whether to compile kernels for so many images on a CUDA GPU; `seconds_per_image` is that of eager kernels.

    `compile` is auto, true or false; auto: if the compiled kernels win back the time of compiling them.
    """
    if compile != "auto":
        return compile == "true"
    return images > 0 and images * seconds_per_image * COMPILE_SAVES >= COMPILE_SECONDS


# ---- the planner


class MemoryOptions(NamedTuple):
    """Options of the config, by their names there."""

    per_device_train_batch_size: int = 1  # micro-batch size where none is planned
    gradient_checkpointing: str = "auto"  # auto, true, false or offload
    compile: str = "auto"  # auto, true or false
    auto_batch: bool = True
    sharding: str = "none"  # none or fsdp


def plan_memory(trainer, row: dict, steps_left: float) -> None:
    """Choose micro-batch, activation checkpointing and compilation for a PlantTrainer, and log them.

    `row` is the largest sample to come. Arithmetic proposes plans, trials that update no weight measure them, and the
    fastest that fits is kept. Without a CUDA GPU or fused layers the config decides; with fsdp the micro-batch is as
    configured: all ranks compute it or none. Raises UserError where it, or one image, does not fit.
    """
    device, options = trainer.args.device, trainer.memory_options
    began, available, size = time.perf_counter(), available_gpu_memory(device), trainer.micro_batcher.size
    loading = peak_memory(device)
    if options.sharding == "fsdp":
        trainer.shard_weights()
    if trainer.fused and device.type == "cuda":
        (sample,) = trainer.data_collator([row]).samples
        trainer.fused[0].kernels.attention = choose_attention(trainer.fused, 4, sample.length)
        collect_memory(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if options.sharding == "fsdp":
            _try_sharded(trainer, row, steps_left, loading)
        elif available is not None and trainer.fused:
            _compile_if_worth(trainer, row, size if not options.auto_batch else 1, steps_left)
            if options.auto_batch:
                _fit(trainer, row, available)
            elif trainer.fused[0].kernels.compiled:
                try_micro_batch(trainer, row, 1)
    if available is not None and trainer.fused:
        is_choice = options.compile == "auto" and not CompiledKernel.fails
        words = "not compiled: the run would not win back the time" if is_choice else "not compiled"
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


def _try_sharded(trainer, row: dict, steps_left: float, loading: float) -> None:
    """Try the configured micro-batch with sharded weights; `loading` took so many bytes."""
    device, size = trainer.args.device, trainer.micro_batcher.size
    collect_memory(device)
    held = memory_in_use(device)
    if trainer.fused and device.type == "cuda" and size > 1:
        _compile_if_worth(trainer, row, size, steps_left)
    _, peak = try_micro_batch(trainer, row, size)
    if peak == math.inf:
        raise UserError(f"memory: {out_of_memory_message(trainer)}")
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
    group, compiled = fused[0].groups[0], fused[0].kernels.compiled
    fp8 = isinstance(group, Fp8Projections)
    cost = step_cost(config, group.columns, itemsize, compiled, sample.length, held, fp8)
    allowed = available * (1 - FRAGMENTATION)
    # Half of what is free; the allocator of page-locked memory rounds up to powers of two.
    host = available_host_memory() / (4 * get_local_world_size())
    checkpointing = trainer.memory_options.gradient_checkpointing

    def use(plan: Plan) -> None:
        trainer.micro_batcher.size = plan.micro_batch_size
        set_activation_checkpointing(fused, plan.kept, plan.offloaded)

    def try_plan(plan: Plan) -> tuple[float, Plan]:
        """(seconds of an optimizer step, the plan with its measured peak), both infinite if it does not fit."""
        use(plan)
        seconds, peak = try_micro_batch(trainer, row, plan.micro_batch_size)
        collect_memory(device)
        return seconds * plan.micro_batch_size * plan.micro_batches(images), plan._replace(peak=peak + state)

    setting = cost._replace(static=0), images, checkpointing, compiled, fp8
    offloadable = int(min(host, images * cost.checkpoint) / GIB).bit_length()
    key = repr((describe_gpu(device), round(2 * available / GIB), offloadable, *setting))
    known = recall_plan(key)
    fits_host = known and known.micro_batch_size * known.offloaded * cost.checkpoint / cost.layers <= host
    best = try_plan(known)[1] if fits_host else None
    if best is None or best.peak > allowed:
        best = _find_plan(
            cost, try_plan, allowed, lambda cost, budget: propose_plans(cost, images, budget, checkpointing, host)
        )
        if best.peak == math.inf:
            raise UserError(f"memory: {out_of_memory_message(trainer)}")
        if best.peak > allowed:
            logger.warning("memory: the optimizer's state may not fit any more; try --optim paged_adamw_8bit")
        elif trainer.dist.is_main_process:
            remember_plan(key, best)
    use(best)
    peak = f"peak {best.peak / GIB:.2f} GiB measured, {allowed / GIB:.2f} available"
    logger.info(f"memory | {best.describe(cost.layers)} | {peak}")


def _find_plan(cost: Cost, try_plan: Callable, allowed: float, propose: Callable) -> Plan:
    """The fastest of the plans that are tried and fit into `allowed` bytes, else the smallest one.

    The smallest is tried first: how far its peak is from arithmetic is known then for all.
    """
    began = time.perf_counter()
    (smallest,) = propose(cost, 0)
    seconds, first = try_plan(smallest)
    if first.peak == math.inf:  # then nothing does
        return first
    cost = cost._replace(static=cost.static + first.peak - smallest.peak)
    fitting, budget = [], allowed
    while not fitting and budget > cost.static * 1.001:
        plans = [plan for plan in propose(cost, budget) if plan[:3] != smallest[:3]][:TRIED_PLANS]
        for plan in plans:
            tried = try_plan(plan)
            if tried[1].peak <= allowed:
                fitting.append(tried)
            else:
                logger.warning(f"memory: {plan.describe(cost.layers)} does not fit; trying less")
            if fitting and time.perf_counter() - began > TRIAL_SECONDS:
                break
        budget = cost.static + 0.8 * (max((plan.peak for plan in plans), default=-math.inf) - cost.static)
    if first.peak <= allowed or not fitting:
        fitting.append((seconds, first))
    within = (1 + TRIAL_NOISE) * min(seconds for seconds, _ in fitting)
    close = [tried for tried in fitting if tried[0] <= within]
    # Of those that trials cannot tell from the fastest, the largest micro-batch waits least for the CPU.
    return max(close, key=lambda tried: (tried[1].micro_batch_size, -tried[0]))[1]


# ---- plans of earlier runs


def plans_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava_plants" / "plans.json"


def recall_plan(key: str) -> Plan | None:
    """What was the fastest for the same GPU, model and settings; None where nothing is known, or cannot be read."""
    with contextlib.suppress(OSError, RuntimeError, ValueError, TypeError, KeyError):  # RuntimeError: no home
        size, kept, offloaded = map(int, json.loads(plans_file().read_text())[key])
        return Plan(size, kept, offloaded, 0.0) if size > 0 else None
    return None


def remember_plan(key: str, plan: Plan) -> None:
    """For recall_plan; nothing where the cache cannot be written, since the next run finds it again in seconds."""
    with contextlib.suppress(OSError, RuntimeError):
        path, plans = plans_file(), {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            plans = dict(json.loads(path.read_text()))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(plans | {key: plan[:3]}, indent=1))


def out_of_memory_message(trainer) -> str:
    """What to do about a micro-batch that does not fit and cannot be made smaller."""
    size, sharded = trainer.micro_batcher.size, is_sharded(unwrap(trainer.model))
    reason = ", which is not planned with sharded weights" if sharded else ""
    smaller = "lower --per-device-train-batch-size and raise --gradient-accumulation-steps as much, or "
    return (
        f"out of memory with micro-batch {size}{reason}; {smaller if sharded and size > 1 else ''}use "
        f"--gradient-checkpointing {'offload' if trainer.fused else 'true'}, --load-in-4bit true, --image-size 336, "
        "--optim paged_adamw_8bit, or a GPU with more memory"
    )

"""Before the first step: what this GPU can hold, tried with the largest image; or weights spread over all GPUs."""

import contextlib
import math
import os
import time

import psutil
import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from transformers import Trainer

from models.fused_layers import set_activation_checkpointing, unwrap
from models.memory import FRAGMENTATION, choose_plan, is_out_of_memory, optimizer_bytes, step_cost
from runtime.device import GIB, available_gpu_memory, memory_in_use, peak_memory, reset_peak_memory, synchronize
from runtime.distributed import checksum_quantized, shard_frozen_parameters, unshard, unsharded
from utils.logging_utils import UserError, logger

COMPILE_SECONDS = 60  # that compiling may take; 25 with 16 cores (docs/LOG.md)
COMPILE_SAVES = 0.2  # share of a step's time that compiled kernels save; 0.38 on an H100 (docs/LOG.md)


def plan_memory(
    trainer: Trainer,
    row: dict,
    gpu_memory_fraction: float,
    recompute: str = "auto",
    compile: str = "auto",
    auto_batch: bool = True,
    steps_done: int = 0,
) -> None:
    """Choose micro-batch, layers that keep their activations, and whether kernels are compiled; say so.

    `row` is the largest image to come. The plan is arithmetic; one micro-batch of such images, from which nothing
    is learned, then shows what it takes. `gpu_memory_fraction` is a share of the GPU, `steps_done` counts optimizer
    steps of the run; `recompute` is auto, true, false or offload, `compile` auto, true or false. Does nothing without
    a CUDA GPU or fused layers (dropout, whole models): then it is what the config says. Raises UserError where one
    image does not fit.
    """
    device = trainer.args.device
    room = available_gpu_memory(device, gpu_memory_fraction)
    if room is None:
        return
    if not trainer.fused:
        logger.info("plan   %d images at a time, as configured: stock layers are not planned", trainer.micro_batch_size)
        return
    kernels = trainer.fused[0].kernels
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        began = time.perf_counter()
        # With one image at a time the processor is what a step waits for, and nothing is won (docs/LOG.md).
        may_win = compile == "auto" and (auto_batch or trainer.micro_batch_size > 1)
        if may_win and _is_worth_compiling(trainer, row, steps_done):
            kernels.compile()
        if auto_batch:
            _plan(trainer, row, room, recompute)
        elif kernels.compiled:
            with contextlib.suppress(torch.OutOfMemoryError):  # the step itself will tell
                _try_micro_batch(trainer, row, 1)
        _tell_kernels(kernels.compiled, compile, time.perf_counter() - began)


def _tell_kernels(compiled: bool, compile: str, seconds: float) -> None:
    words = "plain" if compile == "false" else "plain, their compilation would not be won back"
    logger.info("plan   kernels are %s; tried in %.0f s", "compiled" if compiled else words, seconds)


def shard_weights(trainer: Trainer, row: dict, compile: str = "auto", steps_done: int = 0) -> None:
    """Spread the frozen weights over all processes, and try a micro-batch of `row`, the largest image known.

    Then each micro-batch is computed by all or by none, so none is planned for or redone by one process alone.
    Whether kernels are compiled is chosen as by `plan_memory`. Raises UserError where the micro-batch does not fit, and
    where 4-bit weights do not come back as they were.
    """
    device = trainer.args.device
    whole = peak_memory(device)
    base = unwrap(trainer.model)
    bits = checksum_quantized(base)
    trainer.fsdp_modules = shard_frozen_parameters(base)
    trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)  # DDP takes no weights that are spread
    (trainer.dummy_micro_batch,) = trainer.data_collator([row]).to(device).split(1)
    for name in ("labels", "shift_labels"):
        trainer.dummy_micro_batch[name] = torch.full_like(trainer.dummy_micro_batch[name], -100)  # none is supervised
    clear_device_cache(garbage_collection=True)
    held = memory_in_use(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            began = time.perf_counter()
            seconds, peak = _try_micro_batch(trainer, row, trainer.micro_batch_size)
            if trainer.fused and device.type == "cuda":
                kernels = trainer.fused[0].kernels
                may_win = compile == "auto" and trainer.micro_batch_size > 1
                if may_win and _is_won_back(trainer, seconds, steps_done):
                    kernels.compile()
                    _, peak = _try_micro_batch(trainer, row, trainer.micro_batch_size)
                _tell_kernels(kernels.compiled, compile, time.perf_counter() - began)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"plan: {no_room(trainer)}") from error
    with unsharded(trainer.fsdp_modules):
        if checksum_quantized(base) != bits:
            raise UserError(
                "plan: 4-bit weights come back altered from the other processes; use --sharding none, and report it"
            )
    logger.info(
        "plan   frozen weights are spread over %d processes: %.2f GiB in each, %.2f at most while they were "
        "loaded; %d images at a time, as configured, in a trial %.2f",
        *(trainer.args.world_size, held / GIB, whole / GIB, trainer.micro_batch_size, peak / GIB),
    )


def unshard_weights(trainer: Trainer) -> None:
    """Whole again in each process, for what each computes alone: its part of the report."""
    unshard(trainer.fsdp_modules)
    if trainer.fsdp_modules:  # nobody may leave while another still fetches
        synchronize(trainer.args.device)
        trainer.accelerator.wait_for_everyone()


def _is_worth_compiling(trainer: Trainer, row: dict, steps_done: int) -> bool:
    try:
        seconds, _ = _try_micro_batch(trainer, row, 1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        seconds = math.inf  # compiled kernels take less memory
    return _is_won_back(trainer, seconds, steps_done)


def _is_won_back(trainer: Trainer, seconds: float, steps_done: int) -> bool:
    """Whether the rest of the run saves the time that compiling takes, at so many seconds a image; of all alike."""
    images = (trainer.planned_steps() - steps_done) * trainer.total_batch_size / trainer.args.world_size
    return any(gather_object([images > 0 and images * seconds * COMPILE_SAVES > COMPILE_SECONDS]))


def _plan(trainer: Trainer, row: dict, room: float, recompute: str) -> None:
    """Set the plan that fits. Raises UserError where one image does not fit."""
    (sample,) = trainer.data_collator([row]).samples
    images, layers = math.ceil(trainer.total_batch_size / trainer.args.world_size), len(trainer.fused)
    text_config = unwrap(trainer.model).config.text_config
    learning = trainer.model.num_parameters(only_trainable=True)
    cost = step_cost(
        text_config,
        sample.length,
        memory_in_use(trainer.args.device),
        learning,
        trainer.args.optim,
        trainer.data_collator.batch_bytes(images),
        trainer.fused[0].adapter_columns,
        unwrap(trainer.model).get_input_embeddings().weight.element_size(),
        trainer.fused[0].kernels.compiled,
    )
    budget = allowed = room * (1 - FRAGMENTATION)
    # Half of what is free; the allocator of page-locked memory rounds up to powers of two.
    host = psutil.virtual_memory().available / (4 * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    to_come = optimizer_bytes(trainer.args.optim, learning)  # is made in the first step, so after the trial
    smallest = choose_plan(cost, 0, images, layers, sample.length, recompute)
    while True:
        plan = choose_plan(cost, budget, images, layers, sample.length, recompute, host)
        trainer.micro_batch_size = plan.images
        set_activation_checkpointing(trainer.fused, plan.kept, plan.offload)
        try:
            _, peak = _try_micro_batch(trainer, row, plan.images)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if plan == smallest:
                raise UserError(f"plan: {no_room(trainer)}") from error
            peak = None
        clear_device_cache(garbage_collection=True)
        if peak is not None and (peak + to_come <= budget or plan == smallest):
            break
        logger.warning(
            "plan: %d images at a time with %d layers that keep their activations do not fit; trying less",
            *(plan.images, plan.kept),
        )
        budget = cost.fixed + 0.8 * (plan.peak - cost.fixed)
    if peak + to_come > allowed:
        logger.warning("plan: the optimizer's state may not fit any more; try --optim paged_adamw_8bit")
    logger.info(
        "plan   %d images at a time, %d of %d layers keep their activations%s; predicted peak %.2f GiB of %.2f, "
        "in a trial %.2f",
        *(plan.images, plan.kept, layers, ", the others' inputs wait in the host's memory" * plan.offload),
        *(plan.peak / GIB, allowed / GIB, (peak + to_come) / GIB),
    )


def _try_micro_batch(trainer: Trainer, row: dict, images: int) -> tuple[float, int]:
    """(seconds a image, peak bytes) of one micro-batch of `row`, the second of two; no weight moves."""
    device = trainer.args.device
    batch = trainer.data_collator([row] * images).to(device)
    trainer.model.train()
    try:
        for _ in range(2):  # the first starts libraries and makes the gradients
            reset_peak_memory(device)
            synchronize(device)
            began = time.perf_counter()
            (micro_batch,) = batch.split(images)
            with trainer.compute_loss_context_manager():
                loss = trainer.model(**micro_batch).loss
            loss.backward()
            synchronize(device)
        return (time.perf_counter() - began) / images, peak_memory(device)
    finally:
        trainer.model.zero_grad()


def no_room(trainer: Trainer) -> str:
    """What to do about a micro-batch that does not fit and will not be made smaller."""
    if trainer.fsdp_modules:
        fewer = "lower --per-device-train-batch-size and raise --gradient-accumulation-steps as much, or use "
        return (
            f"out of memory with {trainer.micro_batch_size} images at a time, and weights that are spread are not "
            f"planned for; {fewer if trainer.micro_batch_size > 1 else 'use '}--gradient-checkpointing "
            f"{'offload' if trainer.fused else 'true'}, --image-size 336, --optim paged_adamw_8bit"
        )
    return (
        "out of memory with one image at a time; use --gradient-checkpointing "
        f"{'offload' if trainer.fused else 'true'}, --load-in-4bit true, --image-size 336, --optim paged_adamw_8bit, "
        "or a GPU with more memory"
    )

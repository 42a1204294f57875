"""The config in transformers' terms, where a batch is a whole optimizer step; see models/trainer.py."""

import dataclasses
import os

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from config.training_config import TrainingConfig
from runtime.device import fit_workers
from runtime.distributed import get_world_size
from utils.logging_utils import UserError


def build_arguments(
    config: TrainingConfig, precision: str, device: torch.device, batch_bytes: int
) -> TrainingArguments:
    """`batch_bytes` are the pixels of the largest batch that a loader worker sends. Raises UserError."""
    ranks = get_world_size()
    if config.effective_batch_size < ranks:
        move = f"Start at most {config.effective_batch_size} ranks, or raise --gradient-accumulation-steps."
        raise UserError(f"global batch size {config.effective_batch_size}: fewer images than the {ranks} ranks. {move}")
    optimizers = [name.value for name in OptimizerNames]
    if config.optim not in optimizers:
        raise UserError(f"--optim {config.optim}: not known to transformers; use one of {', '.join(optimizers)}")
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision  # accelerate launch may have set another one
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name in known} | {
        "use_cpu": device.type == "cpu",
        "ddp_backend": "gloo" if device.type == "cpu" and ranks > 1 else None,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "per_device_train_batch_size": config.effective_batch_size,  # of all ranks; runtime/distributed.py shards it
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,  # models/builder.py sets it, on the language model alone
        "logging_nan_inf_filter": False,
        "report_to": config.report_to.split(","),
        "eval_strategy": "steps" if config.eval_steps else "no",
        "save_total_limit": None,  # PlantTrainer rotates: transformers would delete before the manifest is written
        "dataloader_num_workers": fit_workers(config.num_workers, batch_bytes),
        "dataloader_pin_memory": config.pin_memory and device.type == "cuda",
        "ignore_data_skip": config.streaming,  # a stream skips what it has trained on by itself
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**settings)
    # With several GPUs visible transformers would multiply batch and loss by their number, for DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if device.type == "cpu" and ranks > 1:
        arguments.__dict__["_setup_devices"] = device  # accelerate's cpu:0 is no torch.load map_location
    return arguments

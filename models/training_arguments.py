"""Config, trackers and saved state in transformers' terms; a batch is an optimizer step, see models/trainer.py."""

import dataclasses
import os
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import TrainerState
from transformers.training_args import OptimizerNames

from config.training_config import TrainingConfig
from runtime.device import fit_workers
from runtime.launcher import get_world_size
from runtime.run_files import step_of
from utils.logging_utils import UserError, first_line


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


def check_trackers(report_to: str) -> None:
    """Before anything is loaded: raise UserError for a tracker that transformers does not know or cannot use."""
    names = report_to if report_to in ("none", "all") else report_to.split(",")
    try:
        for callback in get_reporting_integration_callbacks(names):
            callback()
    except Exception as error:  # each tracker's own
        installed = ", ".join(get_available_reporting_integrations()) or "none here"
        move = f"install it, or use none or one of those installed: {installed}"
        raise UserError(f"--report-to {report_to}: {first_line(error)}; {move}") from error


def load_state(checkpoint: Path) -> TrainerState:
    """Raises UserError for a state that transformers cannot use, or that is of another step."""
    try:
        state = TrainerState.load_from_json(checkpoint / "trainer_state.json")
        reason = f"it is of step {state.global_step}"
    except (OSError, TypeError, ValueError) as error:
        state, reason = None, first_line(error)
    if state is None or state.global_step != step_of(checkpoint):
        move = "delete the folder, and re-run the same command to resume from an older one"
        raise UserError(f"{checkpoint}: its trainer_state.json cannot be used ({reason}); {move}")
    return state

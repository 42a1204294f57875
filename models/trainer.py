"""The training step: one batch is one optimizer step, done in micro-batches, checked before and after.

Shapes: B images, T text and image tokens, P tiles per image, H W tile side, K positions supervised in any sample.
"""

import functools
import json
import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.training_args import OptimizerNames

from config.training_config import TrainingConfig
from data.dataset import PlantData
from models.builder import PlantModel, load_weights, unwrap
from models.callbacks import EarlyStopping, MemoryCollector, ProgressBar, RunLog
from models.fused_layers import get_fused_layers, set_activation_checkpointing
from models.memory import MemoryOptions, MicroBatcher, out_of_memory_message, plan_memory
from models.scoring import build_tries, judge_scores, score_batch
from runtime.checkpoint import (
    CARD,
    METRICS_OF_BEST,
    CheckpointKeeper,
    atomic_replace_dir,
    create_checkpoint_dir,
    is_better,
    read_best,
    verify_checkpoint,
    write_manifest,
)
from runtime.device import fit_workers, is_out_of_memory
from runtime.distributed import all_reduce_gradients, get_world_size, shard_batches, unsharded
from runtime.interrupt import Interrupted, StopRequest, start_worker
from runtime.run_dir import Run
from runtime.run_files import BEST, PREFIX, cut_metrics, step_of
from utils.image_utils import check_unreadable_fraction
from utils.logging_utils import UserError, logger

SAMPLED = 500  # images of a streamed data set whose sizes are read


class PlantTrainer(Trainer):
    """The HF Trainer, except that

    - a batch of the loader is a whole optimizer step: `training_step` cuts it into micro-batches of at most
      `micro_batch_size` images. Each loss is divided by the tokens of the whole step, so the sum is the exact token
      mean whatever the cut, and the order of images does not depend on it;
    - out of memory, the same step is redone in halved micro-batches from its own random state; how many images fit is
      planned beforehand (models/memory.py);
    - once per optimizer step, after clipping and before the weights move, loss, gradient norm and image-token counts
      are read from the device: a value that is not finite, or a count that is not the proven one, stops the run;
    - `evaluate` scores every class name on every image: top-1, and the loss as the exact token mean; it draws from no
      random state of the training, and what names best so far is kept in best/;
    - the projector may have a learning rate of its own.
    """

    def __init__(
        self,
        *args,
        micro_batch_size: int,
        image_token_id: int,
        names: Sequence[Sequence[int]],
        projector_learning_rate: float | None = None,
        max_unreadable_fraction: float = 0.0,
        max_skipped_steps: int = 0,
        run_id: str = "",
        **kwargs,
    ):
        self.micro_batch_size = micro_batch_size
        self.image_token_id = image_token_id
        self.tries = build_tries(names)
        self.projector_learning_rate = projector_learning_rate
        self.max_unreadable_fraction = max_unreadable_fraction
        self.max_skipped_steps = max_skipped_steps
        self.run_id = run_id
        self.skipped: list[str] = []  # what was told of the steps in a row that were skipped just now
        self.stop = StopRequest()
        self.backfilled_evals: list[dict] = []  # of the log history: an evaluation that a stopped run had left out
        self.random_state: list[torch.Tensor] | None = None  # behind the last whole step of this process
        self.unreadable_images: dict[str, set[str]] = {"train": set(), "val": set()}
        self.last_step: dict = {}  # what the step just done came to, for RunLog
        self.fsdp_modules = []  # parts of the model whose frozen weights all processes hold together
        self.dummy_micro_batch: dict = {}  # all labels -100, for ranks without samples (FSDP)
        super().__init__(*args, **kwargs)
        self.streams = isinstance(self.train_dataset, IterableDataset)
        if self.streams:
            self.train_dataset.set_rank(self.args.process_index, self.args.world_size, self.total_batch_size)
            # On which images come after which depends: what fits into one machine's shared memory holds for all.
            fewest = min(gather_object([self.args.dataloader_num_workers]))
            if fewest < self.args.dataloader_num_workers:
                logger.warning("another machine has room for %d loader workers; all take as many", fewest)
            self.args.dataloader_num_workers = fewest
        base = unwrap(self.model)
        self.eval_micro_batch = MicroBatcher(self.args.per_device_eval_batch_size)
        self.tile = base.config.vision_config.image_size
        self.fused = get_fused_layers(base.model.language_model.layers)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.projector_learning_rate is not None:
            projector = {id(p) for name, p in self.model.named_parameters() if "multi_modal_projector" in name}
            for group in list(optimizer.param_groups):
                theirs = [p for p in group["params"] if id(p) in projector]
                if theirs:
                    group["params"] = [p for p in group["params"] if id(p) not in projector]
                    optimizer.add_param_group(group | {"params": theirs, "lr": self.projector_learning_rate})
            # The first group's rate is the one that is logged; an empty one would log a rate that nothing learns at.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # ---- one optimizer step

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward over a whole batch of data/collator.py; returns its loss, a 0-d tensor on the device."""
        if self.args.world_size == 1:
            self.note_unreadable(inputs.unreadable, "train", self.train_dataset)
            self.check_any_images(len(inputs.samples), inputs.unreadable)
        if inputs.samples:
            inputs.check_tensors(self.tile, self.args.device)
        self._step_batch = inputs
        random_state = _save_random_state(self.args.device)
        while True:
            try:
                self._step_loss = self._forward_backward(model, inputs, num_items_in_batch)
                break
            except RuntimeError as error:
                self.halve_micro_batch(error)
            # Outside the except block, so that the failed attempt's tensors are gone with its traceback.
            model.zero_grad()
            clear_device_cache(garbage_collection=True)
            _restore_random_state(random_state, self.args.device)
        if self.args.world_size > 1:
            all_reduce_gradients(self.model.parameters(), self.args.world_size)
        return self._step_loss

    def _forward_backward(self, model, inputs: dict, num_items_in_batch) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        micro_batches = inputs.split(self.micro_batch_size)
        if self.fsdp_modules:  # the weights of each forward come from all processes
            most = torch.tensor(len(micro_batches), device=self.args.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            micro_batches += [self.dummy_micro_batch] * (int(most) - len(micro_batches))
        for micro_batch in micro_batches:
            if self.args.world_size == 1:  # several stop together, at the end of a step
                self.stop.check()
            with self.accelerator.no_sync(model):  # DDP's own sum; runtime/distributed.py says why
                total = total + super().training_step(model, micro_batch, num_items_in_batch)
        return total

    def check_any_images(self, images: int, unreadable: list[str]) -> None:
        if not images:
            raise UserError(
                f"step {self.state.global_step + 1}: none of its images can be opened; mend or remove them "
                f"({'; '.join(unreadable[:5])})"
            )

    def halve_micro_batch(self, error: RuntimeError) -> None:
        if not is_out_of_memory(error):
            raise error
        step = self.state.global_step + 1
        if self.fsdp_modules:
            raise UserError(f"step {step}: {out_of_memory_message(self)}") from error
        if self.micro_batch_size == 1:
            if not any(one.keep or not one.offload for one in self.fused):
                raise UserError(f"step {step}: {out_of_memory_message(self)}") from error
            set_activation_checkpointing(self.fused, 0, offload=True)
        self.micro_batch_size = max(self.micro_batch_size // 2, 1)
        logger.warning(
            "step %d: out of memory; the step is redone with %d images at a time%s, and so are the next",
            *(step, self.micro_batch_size),
            ", activations recomputed and their inputs in the host's memory"
            if any(one.offload for one in self.fused)
            else "",
        )

    def _get_grad_norm(self, model, grad_norm=None):
        """Called between clipping and the optimizer's move: the one place of a step where the device is read."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        batch, processes = self._step_batch, self.args.world_size
        miscounted = self._count_miscounted(batch)
        counts = [len(batch.samples), sum(one.image_tokens for one in batch.samples), len(batch.unreadable)]
        counts = torch.tensor([*counts, self.stop.signal is not None], dtype=torch.float32).to(self.args.device)
        found = torch.cat([torch.stack([self._step_loss.float(), miscounted.float()]), counts])
        if processes > 1:
            torch.distributed.all_reduce(found)
            found[0] /= processes
        found = torch.cat([found, grad_norm.float().reshape(1)]).tolist()
        loss, miscounted, images, image_tokens, unreadable, stops, norm = found
        if processes > 1:
            if stops:
                raise Interrupted
            if unreadable:
                told = gather_object(batch.unreadable)
                self.note_unreadable(told, "train", self.train_dataset)
                self.check_any_images(int(images), told)
        self.last_step = {
            "step": self.state.global_step + 1,
            "loss": loss if math.isfinite(loss) else None,  # JSON has no infinity
            "grad_norm": norm if math.isfinite(norm) else None,
            "learning_rate": self._get_learning_rate(),
            "images": int(images),
            "image_tokens": int(image_tokens),
        }
        is_fine = math.isfinite(loss) and math.isfinite(norm) and not miscounted
        names = "" if is_fine else ", ".join(gather_object([sample.id for sample in batch.samples]))
        if miscounted:
            raise UserError(
                f"step {self.state.global_step + 1}: {miscounted:.0f} samples changed their image tokens between the "
                "collator and the "
                f"step; nothing was learned from it (samples: {names})"
            )
        if is_fine:
            self.skipped.clear()
        else:
            self.handle_non_finite_step(loss, norm, names)
        return grad_norm

    def _count_miscounted(self, batch: dict) -> torch.Tensor:
        if not batch.samples:
            return torch.zeros((), device=self.args.device)
        return ((batch["input_ids"] == self.image_token_id).sum(dim=1) != batch["image_tokens"]).sum()

    def handle_non_finite_step(self, loss: float, norm: float, names: str) -> None:
        """With fp16 the scaler meets infinite gradients by skipping the step and halving its scale: no fault yet.

        Else the step is left out without a trace in weights and optimizer, or UserError raised if too many were.
        """
        scaler = self.accelerator.scaler
        if scaler is not None and math.isfinite(loss) and scaler.get_scale() > 1:
            logger.warning(
                "step %d: gradient overflow at loss scale %g; the scaler skips the step",
                self.last_step["step"],
                scaler.get_scale(),
            )
            self.last_step["skipped"] = "overflow"
            return
        told = f"step {self.last_step['step']}: loss {loss}, gradient norm {norm}"
        self.skipped.append(f"{told} (samples: {names})")
        if len(self.skipped) > self.max_skipped_steps:
            raise UserError(
                f"{told}; nothing was learned from {'it' if len(self.skipped) == 1 else 'the last steps'}, the "
                "weights are those of the step before; look at these images, try a lower --learning-rate or "
                f"--mixed-precision bf16: {'; '.join(self.skipped)}"
            )
        if self.is_world_process_zero():
            logger.warning("%s; the step is skipped (samples: %s)", told, names)
        self.last_step["skipped"] = "not finite"
        self.model.zero_grad()  # the optimizer moves nothing that has no gradient
        self._tr_loss.copy_(self.loss_before)  # what transformers tells trackers would never be a number again

    def note_unreadable(self, unreadable: list[str], split: str, rows) -> None:
        known = self.unreadable_images[split]
        new = [entry for entry in unreadable if entry not in known]
        known.update(new)
        for entry in new if self.is_world_process_zero() else ():
            logger.warning("photo left out (%d of %s so far): %s", len(known), split, entry)
        if new:
            check_unreadable_fraction(
                known,
                rows.images if rows is self.train_dataset and self.streams else len(rows),
                self.max_unreadable_fraction,
            )

    # ---- the run

    def plan_memory(self, checkpoint: Path | None = None, steps_left: float | None = None) -> None:
        """Choose what fits the GPU; `steps_left` None: those after `checkpoint`. Raises UserError."""
        rows = self.train_dataset.head(SAMPLED) if self.streams else self.train_dataset
        left = self.planned_steps() - step_of(checkpoint) if steps_left is None else steps_left
        plan_memory(self, self.memory_options, self.data_collator.largest_row(rows), left)

    def planned_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * math.ceil(len(self.train_dataset) / self.total_batch_size))

    @property
    def total_batch_size(self) -> int:
        """Images per optimizer step over all processes."""
        return self.args.per_device_train_batch_size  # runtime/distributed.py shares a batch out

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the planned steps, from a checkpoint if there is one.

        A first SIGINT or SIGTERM saves what was learned and raises Interrupted; a second one ends the process.
        Raises UserError for a checkpoint that would run code when it is read.
        """
        with self.stop.listening():
            try:
                self._train_from(checkpoint)
                self._stop_together()
            except Interrupted:
                self.save_now()
                raise
            except pickle.UnpicklingError as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(
                    f"{checkpoint}: holds a file that is more than numbers ({reason}), which may run code when it is "
                    "read; if you do not know where it is from, delete the folder"
                ) from error

    def _train_from(self, checkpoint: Path | None) -> None:
        if checkpoint is None:
            self.train()
            return
        logger.info("plan   going on from %s", checkpoint)
        saved = TrainerState.load_from_json(checkpoint / "trainer_state.json")
        saved.is_world_process_zero = self.is_world_process_zero()  # the main process wrote it
        saved.is_local_process_zero = self.is_local_process_zero()
        folder, is_evaluated = self.args.output_dir, _is_evaluated(saved)
        if self.is_world_process_zero():
            cut_metrics(folder, folder, saved.global_step, is_evaluated)
        every = self.args.eval_steps if self.args.eval_strategy == "steps" and self.eval_dataset is not None else 0
        if every and saved.global_step % every == 0 and not is_evaluated:  # stopped between step and evaluation
            self._load_from_checkpoint(str(checkpoint))
            self.state, known = saved, len(saved.log_history)
            self.evaluate()
            self.backfilled_evals = saved.log_history[known:]
        early = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStopping)]
        if self.streams:
            self.train_dataset.skip_steps(saved.global_step)
        if saved.global_step < self.planned_steps() and not any(one.is_over(saved.log_history) for one in early):
            self.train(resume_from_checkpoint=str(checkpoint))
        else:  # all was done before the run was stopped; transformers would do one step more
            self._load_from_checkpoint(str(checkpoint))
            self.state = saved

    def _stop_together(self) -> None:
        """Raise Interrupted in all processes if a signal has come to any."""
        if self.args.world_size == 1:
            self.stop.check()
            return
        asked = torch.tensor(float(self.stop.signal is not None), device=self.args.device)
        torch.distributed.all_reduce(asked)
        if asked.item():
            raise Interrupted

    def save_now(self) -> None:
        """A checkpoint of the last whole step, unless there is one: the step that was begun leaves no trace in it."""
        folder = Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}"
        is_there = self.is_world_process_zero() and folder.exists() and verify_checkpoint(folder) is None
        if self.random_state is None or gather_object([is_there])[0]:
            return
        self.model.zero_grad()
        _restore_random_state(self.random_state, self.args.device)
        self._save_checkpoint(self.model, None)
        self.callback_handler.on_save(self.args, self.state, self.control)
        logger.info("saved  %s", folder)
        self.accelerator.wait_for_everyone()  # a launcher ends them all once one is gone

    def _load_scaler(self, checkpoint):
        if self.accelerator.scaler is not None:  # of a run that is in fp16 no more there is one to load
            super()._load_scaler(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        # bitsandbytes writes with a paged state that it is paged. Read onto a GPU it is not: the driver refuses to
        # fetch it, and bitsandbytes ends the process (its issue 782).
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    vars(value).pop("is_paged", None)

    def _save_checkpoint(self, model, trial):
        if self.is_world_process_zero():
            create_checkpoint_dir(Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}", self.run_id)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes its random state; then comes the manifest

    def get_train_dataloader(self):
        if not self.streams:
            return super().get_train_dataloader()
        rows = self.train_dataset
        workers = min(self.args.dataloader_num_workers, len(rows.own))  # one without a file would have nothing to read
        # As accelerate prepares one, but that it would have the main process read for all, or fill up and drop.
        return DataLoaderShard(
            rows,
            device=self.args.device,
            skip_batches=rows.batches_to_skip(workers),
            batch_size=rows.batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=functools.partial(start_worker, None),
            generator=torch.Generator(),  # else its start would draw from the random state that a checkpoint gave back
        )

    def _get_dataloader(self, *args, **kwargs):
        if not kwargs.get("is_training"):
            kwargs["batch_size"] *= self.args.world_size  # is said for one process, and shared out
        loader = super()._get_dataloader(*args, **kwargs)
        if self.args.world_size > 1:
            shard_batches(loader, self.args.process_index, self.args.world_size)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps what it was given
        inner.worker_init_fn = functools.partial(start_worker, inner.worker_init_fn)
        return loader

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_weights(self.model, resume_from_checkpoint)

    @property
    def best_folder(self) -> Path:
        return Path(self.args.output_dir) / BEST

    def save_best(self, metrics: dict[str, float]) -> None:
        """best/: what was learned, the processor, the step and its metrics, and a manifest; nothing pickled."""
        with atomic_replace_dir(self.best_folder) as folder:
            self.model.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
            (folder / CARD).unlink(missing_ok=True)  # PEFT's form, with nothing filled in
            facts = {"step": self.state.global_step} | metrics
            (folder / METRICS_OF_BEST).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            write_manifest(folder)

    def keep_if_best(self, metrics: dict[str, float]) -> None:
        if self.is_world_process_zero() and is_better(metrics, read_best(self.best_folder)):
            self.save_best(metrics)

    def load_best(self) -> int:
        """The weights of best/, of the step returned, into the model, unless it has them; without val the last ones."""
        best = read_best(self.best_folder)
        if best is None or self.eval_dataset is None:
            self.save_best({})
            best = read_best(self.best_folder)
        elif best["step"] != self.state.global_step:
            load_weights(self.model, self.best_folder)
        logger.info("result %s holds the weights of step %d", self.best_folder, best["step"])
        return best["step"]

    # ---- evaluation

    def evaluate_if_needed(self) -> None:
        """Evaluate, unless that was done after this very step."""
        if not _is_evaluated(self.state):
            self.evaluate()

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Every class name scored on every image: top-1, top-5, the loss as the exact mean over tokens."""
        self.model.eval()
        entries, unreadable = [], []
        # A DataLoader draws a seed from the global generator: without the fork, evaluating would change the training.
        with torch.random.fork_rng(), unsharded(self.fsdp_modules):
            for batch in self.get_eval_dataloader(eval_dataset):
                self._stop_together()
                if self.args.world_size == 1:  # at once, and not after all of val
                    self.note_unreadable(batch.unreadable, "val", self.eval_dataset)
                unreadable += batch.unreadable
                if not batch.samples:
                    continue
                with self.accelerator.autocast():
                    scores = score_batch(self.model, batch, self.tries, self.eval_micro_batch).cpu().double().numpy()
                labels = np.array([sample.label for sample in batch.samples])
                judged = zip(*(part.tolist() for part in judge_scores(scores, labels)))
                for sample, own in zip(batch.samples, judged):
                    entries.append((sample.id, sample.length - sample.prompt_length, *own))
        unreadable = gather_object(unreadable)
        self.note_unreadable(unreadable, "val", self.eval_dataset)
        # In the same order whatever the number of processes, for sums of floating-point numbers.
        entries = sorted(gather_object(entries), key=lambda entry: entry[0])
        _, tokens, correct, above, own = map(np.array, zip(*entries))
        metrics = {
            f"{metric_key_prefix}_loss": float(-own.sum() / tokens.sum()),
            f"{metric_key_prefix}_top1": float(correct.mean()),
            f"{metric_key_prefix}_top5": float((above < 5).mean()),
            f"{metric_key_prefix}_unreadable_images": len(unreadable),
        }
        self.log(dict(metrics))
        self.keep_if_best(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class StepState(TrainerCallback):
    """Remembers what a step that fails or is interrupted must leave as it was: random state and sum of losses.

    Also puts into the log history, which was read from the checkpoint, an evaluation that was made up for before.
    """

    def __init__(self, trainer: PlantTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        state.log_history.extend(self.trainer.backfilled_evals)

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.loss_before = self.trainer._tr_loss.clone()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.random_state = _save_random_state(args.device)


def _is_evaluated(state: TrainerState) -> bool:
    return any(entry["step"] == state.global_step and "eval_loss" in entry for entry in state.log_history)


def _save_random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _restore_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


# ---- config -> Trainer


def build_trainer(run: Run, plant: PlantModel, data: PlantData) -> PlantTrainer:
    """The trainer of a run, with its callbacks. The run's id marks the checkpoints that it may resume and delete."""
    config, collator = run.config, plant.collator
    batch_bytes = collator.batch_bytes(max(config.effective_batch_size, config.per_device_eval_batch_size))
    try:
        trainer = PlantTrainer(
            model=plant.model,
            args=build_arguments(config, plant.precision, plant.device, batch_bytes),
            data_collator=collator,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=plant.processor,
            micro_batch_size=config.per_device_train_batch_size,
            image_token_id=plant.processor.image_token_id,
            names=collator.name_ids,
            projector_learning_rate=config.projector_learning_rate,
            max_unreadable_fraction=config.max_unreadable_fraction,
            max_skipped_steps=config.max_skipped_steps,
            run_id=run.run_id,
        )
    except RuntimeError as error:
        if "Callback requires" not in str(error):
            raise
        raise UserError(f"--report-to {config.report_to}: {error}") from error
    trainer.memory_options = MemoryOptions(
        config.gradient_checkpointing, config.compile, config.auto_batch, config.sharding
    )
    for callback in (PrinterCallback, ProgressCallback):  # they print raw dictionaries
        trainer.remove_callback(callback)
    keeper = CheckpointKeeper(run.run_id, config.save_total_limit)
    for callback in (RunLog(trainer), MemoryCollector(), keeper, ProgressBar(), StepState(trainer)):
        trainer.add_callback(callback)
    if config.early_stopping_patience is not None:
        trainer.add_callback(
            EarlyStopping(config.early_stopping_patience, config.early_stopping_min_gain, len(data.validation))
        )
    return trainer


def build_arguments(
    config: TrainingConfig, precision: str, device: torch.device, batch_bytes: int
) -> TrainingArguments:
    """The config in transformers' terms. To its Trainer a batch is the whole optimizer step; see PlantTrainer."""
    ranks = get_world_size()
    if config.effective_batch_size < ranks:
        raise UserError(
            f"{config.effective_batch_size} images per optimizer step leave some of {ranks} processes without any; "
            f"start {config.effective_batch_size} at most, or raise --gradient-accumulation-steps"
        )
    optimizers = [name.value for name in OptimizerNames]
    if config.optim not in optimizers:
        raise UserError(f"--optim {config.optim}: not an optimizer of transformers; use one of {', '.join(optimizers)}")
    trackers = config.report_to.split(",")
    unknown = set(trackers) - {"none", "all"} - set(INTEGRATION_TO_CALLBACK)
    if unknown:
        raise UserError(
            f"--report-to {config.report_to}: unknown are {', '.join(unknown)}; use none, all, or some of "
            f"{', '.join(INTEGRATION_TO_CALLBACK)}"
        )
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision  # accelerate launch may have set another one
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        seed=config.seed,
        use_cpu=device.type == "cpu",
        ddp_backend="gloo" if device.type == "cpu" and ranks > 1 else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        per_device_train_batch_size=config.effective_batch_size,  # of all processes; each takes its share
        gradient_accumulation_steps=1,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        report_to=trackers,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=None,  # runtime/checkpoint.py rotates: the library would delete before the manifest stands
        dataloader_num_workers=fit_workers(config.num_workers, batch_bytes),
        dataloader_pin_memory=config.pin_memory and device.type == "cuda",
        dataloader_persistent_workers=False,
        ignore_data_skip=config.streaming,  # a stream leaves out by itself what was learned from
        remove_unused_columns=False,
        disable_tqdm=True,
        gradient_checkpointing=False,  # models/builder.py sets it, on the language model alone
    )
    # With several GPUs visible transformers would multiply batch and loss by their number, for DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if device.type == "cpu" and ranks > 1:
        arguments.__dict__["_setup_devices"] = device  # accelerate says cpu:0, from which torch.load restores nothing
    return arguments

"""The training step: one loader batch is one optimizer step, computed in micro-batches, checked before and after.

Shapes: B images, T text and image tokens, P tiles per image, H W tile side, K supervised positions of any sample.
"""

import functools
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils.memory import clear_device_cache
from torch.utils.data import IterableDataset
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, TrainerState

from data.collator import IGNORED, Batch, Sample
from data.dataset import PlantData, UnreadableImages, count_images, sample_rows
from data.sampling import TrainRows, TrainSampler
from models.best_checkpoint import BestCheckpoint
from models.builder import PlantModel, load_weights
from models.callbacks import EarlyStopping, MemoryCollector, ProgressBar, RunLog
from models.features import Examined
from models.fp8 import use_fp8
from models.fused_layers import set_activation_checkpointing
from models.memory import MemoryOptions, MicroBatcher, out_of_memory_message, plan_memory
from models.scoring import rank_true_classes
from models.step_checks import StepChecks
from models.tower_cache import build_cache, expect_images, keeping_features
from models.training_arguments import build_arguments, load_state
from runtime.checkpoint import create_checkpoint_dir, rotate, verify_checkpoint, write_manifest
from runtime.device import is_out_of_memory, synchronize
from runtime.distributed import (
    Distributed,
    ShardedBatchSampler,
    all_reduce_gradients,
    is_sharded,
    shard_by_length,
    shard_frozen_parameters,
)
from runtime.interrupt import LOADER_S, STREAM_S, Interrupted, StopRequest, worker_options
from runtime.run_dir import Run
from runtime.run_files import PREFIX, step_of, truncate_metrics
from utils.image_utils import crop_sizes, gray_image
from utils.logging_utils import UserError, first_line, logger


class PlantTrainer(Trainer):
    """The HF Trainer, except that

    - a loader batch is a whole optimizer step, which `training_step` splits into micro-batches. Each loss is divided by
      the tokens of the whole step: the sum is the exact token mean and the order of images is the same for any split;
    - after out-of-memory the same step is retried with half the micro-batch from its own random state;
    - once per step, after clipping and before the weights are updated, the device is read: a non-finite loss or norm
      skips the step or stops the run, a wrong count of image tokens stops it;
    - `train` resumes exactly, saves and raises Interrupted on a signal, and ends with an evaluation;
    - `evaluate` scores every class name on every image and leaves the random state of the training as it was;
    - the projector may have a learning rate of its own.
    """

    def __init__(
        self,
        run: Run,
        plant: PlantModel,
        memory_options: MemoryOptions,
        projector_learning_rate: float | None = None,
        max_bad_fraction: float = 0.0,
        max_skipped_steps: int = 0,
        save_total_limit: int = 1,
        **kwargs,
    ):
        self.run, self.plant = run, plant
        self.dist = run.dist or Distributed()
        self.memory_options = memory_options
        self.micro_batcher = MicroBatcher(memory_options.per_device_train_batch_size)
        self.planned_micro_batch = self.micro_batcher.size  # rank 0's; what a rank halved concerns no other
        self.projector_learning_rate = projector_learning_rate
        self.save_total_limit = save_total_limit
        self.stop = plant.stop = StopRequest(stops_alone=self.dist.world_size == 1)
        self.step_batch: Batch | None = None  # of the optimizer step in progress
        self.step_loss: torch.Tensor | None = None  # 0-d, on the device
        self.random_state: list[torch.Tensor] | None = None  # after the last complete step of this rank
        self.backfilled_evals: list[dict] = []  # recomputed on resume; RunLog appends them to the log history
        super().__init__(model=plant.model, data_collator=plant.collator, processing_class=plant.processor, **kwargs)
        self.fused = plant.fused
        self.best = BestCheckpoint(run.best_folder)
        self.examined: list[tuple[Sample, Examined]] = []  # val with the weights of best/, on rank 0 of this process
        self.add_callback(self.best)
        self.is_balanced = self.is_augmented = False  # other than each train image once an epoch, as it is
        self.streams = isinstance(self.train_dataset, IterableDataset)
        unreadable_train = UnreadableImages("train", count_images(self.train_dataset), max_bad_fraction)
        self.step_checks = StepChecks(self, max_skipped_steps, unreadable_train)
        self.unreadable_val = UnreadableImages("val", count_images(self.eval_dataset or ()), max_bad_fraction)
        if self.streams:
            self.train_dataset.set_rank(self.dist.rank, self.dist.world_size, self.total_batch_size)
            # The order of images depends on the number of workers, so every rank has what the smallest machine can.
            fewest = min(self.dist.gather_object([self.args.dataloader_num_workers]))
            if fewest < self.args.dataloader_num_workers:
                logger.warning("num_workers lowered to %d: another machine has too little shared memory", fewest)
            self.args.dataloader_num_workers = fewest

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.projector_learning_rate is not None:
            projector = {p for name, p in self.model.named_parameters() if "multi_modal_projector" in name}
            for group in list(optimizer.param_groups):
                if in_projector := [p for p in group["params"] if p in projector]:
                    group["params"] = [p for p in group["params"] if p not in projector]
                    optimizer.add_param_group(group | {"params": in_projector, "lr": self.projector_learning_rate})
            # The first group's learning rate is logged, so it must not be empty.
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # ---- one optimizer step

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward over a data.collator.Batch; returns its loss, a 0-d tensor on the device."""
        device = self.args.device
        if inputs.samples:
            inputs.check_tensors(self.plant.base.config.vision_config.image_size, device)
            self.plant.check_length(inputs.samples)
        self.step_batch = inputs
        random_state = _get_random_state(device)
        while True:
            try:
                with keeping_features(self.model, "train"):
                    self.step_loss = self.forward_backward(model, inputs, num_items_in_batch)
                break
            except RuntimeError as error:
                self.halve_micro_batch(error)
            # Outside the except block, so that the failed attempt's tensors are freed with its traceback.
            model.zero_grad()
            clear_device_cache(garbage_collection=True)
            _set_random_state(random_state, device)
        if self.dist.world_size > 1:
            all_reduce_gradients(self.model.parameters(), self.dist.world_size)
        return self.step_loss.nan_to_num(0.0, 0.0, 0.0)  # otherwise the mean loss that trackers get would stay NaN

    def forward_backward(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """The loss of this rank's samples, summed over micro-batches; gradients add up in the parameters."""
        total, size = torch.zeros((), device=self.args.device), self.micro_batcher.size
        micro_batches = inputs.split(size)
        if is_sharded(self.plant.base):  # the weights of each forward come from all ranks
            most = torch.tensor(len(micro_batches), device=self.args.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            micro_batches += [self.dummy_micro_batch] * (int(most) - len(micro_batches))
        for index, micro_batch in enumerate(micro_batches):
            self.stop.check()  # several ranks stop together, at the end of a step
            expect_images(self.model, inputs.samples[index * size : (index + 1) * size])
            with self.accelerator.no_sync(model):  # no all-reduce by DDP's hooks; runtime/distributed.py says why
                total = total + super().training_step(model, micro_batch, num_items_in_batch)
        return total

    @functools.cached_property
    def dummy_micro_batch(self) -> dict:
        """One image without a label, so that a rank with fewer micro-batches takes part in each FSDP all-gather."""
        (dummy,) = self.data_collator([self.plant.dummy_row]).to(self.args.device).split(1)
        return dummy | {name: torch.full_like(dummy[name], IGNORED) for name in ("labels", "shift_labels")}

    def halve_micro_batch(self, error: RuntimeError) -> None:
        """Retry with half the micro-batch, or offloaded. Raises another `error`, and UserError if nothing is left."""
        step, measure = self.state.global_step + 1, ""
        can_offload = not is_sharded(self.plant.base) and any(layer.keep or not layer.offload for layer in self.fused)
        if is_out_of_memory(error) and self.micro_batcher.size == 1 and can_offload:
            set_activation_checkpointing(self.fused, 0, offloaded=len(self.fused))
            measure = ", activation checkpointing in all layers, offloaded to the CPU"
        else:
            self.micro_batcher.halve(error, f"step {step}: {out_of_memory_message(self)}")
        size = self.micro_batcher.size
        logger.warning("step %d: out of memory; from here on retrying with micro-batch %d%s", step, size, measure)

    def _get_grad_norm(self, model, grad_norm=None):
        """Called between clipping and the optimizer's update: the one place in a step where the device is read."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        values = self.step_checks.read(self.step_batch, self.step_loss, grad_norm)
        if values["stops"] and self.dist.world_size > 1:
            raise Interrupted
        self.step_checks.check(self.step_batch, values)
        self.random_state = _get_random_state(self.args.device)  # the optimizer draws no random numbers
        return grad_norm

    # ---- the run

    def plan_memory(self, steps_left: float | None = None) -> None:
        """Choose what fits the GPU; `steps_left` None: those after the run's checkpoint. Raises UserError."""
        if steps_left is None:
            steps_left = self.planned_steps() - step_of(self.run.resume_from)
        row = self.data_collator.largest_row(sample_rows(self.train_dataset))
        if self.is_augmented:  # a crop may be of more tokens than its image
            size = max(crop_sizes(self.data_collator([row]).samples[0].size), key=self.data_collator.count_tokens)
            row = self.data_collator.largest_row([row, {"image": gray_image(size)}])
        self.plant.check_length(self.data_collator([row]).samples)
        plan_memory(self, row, steps_left)
        self.run.end_phase("plan")
        self.planned_micro_batch = self.dist.broadcast_object(self.micro_batcher.size)

    def _move_model_to_device(self, model, device):
        if self.memory_options.sharding == "none":  # otherwise part by part, in shard_weights
            super()._move_model_to_device(model, device)

    def shard_weights(self) -> None:
        """Shard the frozen weights across ranks."""
        shard_frozen_parameters(self.plant.base, self.args.device)
        self.micro_batcher.smallest = self.micro_batcher.size  # all ranks compute it or none
        self.accelerator.prepare_model(self.model, evaluation_mode=True)  # DDP takes no sharded weights

    def planned_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * math.ceil(len(self.train_dataset) / self.total_batch_size))

    @property
    def total_batch_size(self) -> int:
        """Images per optimizer step over all ranks."""
        return self.args.per_device_train_batch_size  # runtime/distributed.py shards each batch

    def train(self, resume_from_checkpoint: Path | None = None) -> None:
        """Train to the planned steps, from a checkpoint if there is one, then evaluate unless that was just done.

        A first SIGINT or SIGTERM saves the last complete step and raises Interrupted; a second one ends the process.
        Raises UserError for a checkpoint that would run code when it is read.
        """
        with self.stop.listening():
            try:
                if self._prepare_start(resume_from_checkpoint):
                    super().train(resume_from_checkpoint=resume_from_checkpoint and str(resume_from_checkpoint))
                if self.eval_dataset is not None and not _is_evaluated(self.state):
                    self.evaluate()
                self.check_stop()
            except Interrupted:
                self.save_now()
                raise
            except pickle.UnpicklingError as error:
                raise UserError(
                    f"{resume_from_checkpoint}: a file in it holds more than numbers ({first_line(error)}) and may "
                    "run code when it is read. If you do not know where it is from, delete the folder."
                ) from error

    def _prepare_start(self, checkpoint: Path | None) -> bool:
        """Bring metrics, stream and evaluations to the state of a checkpoint; whether a step is left to do."""
        saved = TrainerState() if checkpoint is None else load_state(checkpoint)
        is_evaluated = _is_evaluated(saved)
        if self.dist.is_main_process:
            truncate_metrics(self.run.folder, self.run.folder, saved.global_step, is_evaluated)
        if checkpoint is None:
            return True
        logger.info("run | resuming from %s", checkpoint)
        saved.is_world_process_zero = self.is_world_process_zero()  # rank 0 wrote the file
        if self.streams:
            self.train_dataset.skip_steps(saved.global_step)
        evaluates = self.args.eval_strategy == "steps" and self.eval_dataset is not None
        if evaluates and saved.global_step % self.args.eval_steps == 0 and not is_evaluated:  # it was interrupted
            self._load_from_checkpoint(str(checkpoint))
            self.state, known = saved, len(saved.log_history)
            self.evaluate()
            self.backfilled_evals = saved.log_history[known:]
        stops_early = [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStopping)]
        stopped_early = any(callback.is_over(saved.log_history) for callback in stops_early)
        if saved.global_step < self.planned_steps() and not stopped_early:
            return True
        self._load_from_checkpoint(str(checkpoint))  # no step is left, where transformers would do one more
        self.state = saved
        return False

    def check_stop(self) -> None:
        """Raise Interrupted on every rank if any rank has received a signal."""
        self.stop.check()
        if self.dist.world_size > 1 and any(self.dist.gather_object([self.stop.signal is not None])):
            raise Interrupted

    def save_now(self) -> None:
        """A checkpoint of the last complete step, unless there is one; a step in progress leaves no trace in it."""
        if self.random_state is None or self.args.save_strategy == "no":
            return
        folder = self.run.folder / f"{PREFIX}{self.state.global_step}"
        is_saved = self.dist.is_main_process and folder.exists() and verify_checkpoint(folder) is None
        if self.dist.gather_object([is_saved])[0]:
            return
        self.model.zero_grad()
        _set_random_state(self.random_state, self.args.device)
        self._save_checkpoint(self.model, None)
        self.callback_handler.on_save(self.args, self.state, self.control)
        logger.info("saved | %s", folder)
        self.accelerator.wait_for_everyone()  # a launcher ends all ranks once one has exited

    def load_best(self) -> None:
        """Load the weights of best/ on every rank. Without validation they are those of the last step."""
        step = self.best.find(self) if self.dist.is_main_process else None
        is_loaded = step == self.state.global_step == self.best.step  # not by a process that was killed since
        step, is_loaded = self.dist.broadcast_object([step, is_loaded])
        if not is_loaded:
            load_weights(self.model, self.best.folder)
        if step != self.best.step:  # best/ was lost, and made again of other weights
            self.examined = []
        synchronize(self.args.device)
        self.accelerator.wait_for_everyone()  # no rank may go ahead while another still fetches
        logger.info("result | %s holds the weights of step %d", self.best.folder, step)

    def _load_scaler(self, checkpoint):
        if self.accelerator.scaler is not None:  # a run that is no longer in fp16 has none to load
            super()._load_scaler(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        # bitsandbytes saves the mark of paged memory with the state. Loaded onto a GPU the state is not paged: the
        # driver refuses to prefetch it, and bitsandbytes ends the process (its issue 782).
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    vars(value).pop("is_paged", None)
        # What was saved is the learning rate of a run of that length: after its last step, 0.
        schedule = self.lr_scheduler
        for group, base, factor in zip(self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas):
            group["lr"] = base * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_weights(self.model, resume_from_checkpoint)

    def _save_checkpoint(self, model, trial):
        folder = self.run.folder / f"{PREFIX}{self.state.global_step}"
        if self.dist.is_main_process:
            create_checkpoint_dir(folder, self.run.run_id)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each rank writes its random state, then rank 0 the manifest
        if self.dist.is_main_process:
            write_manifest(folder)
            rotate(self.run.folder, self.run.run_id, self.save_total_limit)

    def get_train_dataloader(self):
        """This rank's part of each batch; accelerate would fill the last batch up with samples of others."""
        rows, workers = self.train_dataset, self.args.dataloader_num_workers
        options = {"collate_fn": self.data_collator, "pin_memory": self.args.dataloader_pin_memory}
        if self.streams:
            return rows.build_loader(workers, self.args.device, **options, **worker_options(workers, STREAM_S))
        labels = rows["label"][:] if self.is_balanced else None
        rows = TrainRows(rows, self.args.seed) if self.is_augmented else rows
        sampler = TrainSampler(rows, labels, self.args.seed)
        options |= {"batch_sampler": ShardedBatchSampler(sampler, self.total_batch_size, self._shard)}
        return DataLoaderShard(rows, self.args.device, num_workers=workers, **options, **worker_options(workers))

    def _shard(self, batch: list[int]) -> list[int]:
        rank, ranks = self.dist.rank, self.dist.world_size
        if ranks == 1 or self.data_collator.image_size is not None:  # all are of about the same length
            return batch[rank::ranks]
        lengths = [self.data_collator.measure(self.train_dataset[index]) for index in batch]
        return shard_by_length(batch, lengths, self.planned_micro_batch, rank, ranks)

    def get_batch_samples(self, *args, **kwargs):
        limit_s = (STREAM_S if self.streams else LOADER_S) + 2 if self.args.dataloader_num_workers else 0
        with self.stop.waiting(limit_s):  # a little after torch's
            return super().get_batch_samples(*args, **kwargs)

    # ---- evaluation

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics, examined = self.score_validation()
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.best.step == self.state.global_step:
            self.examined = examined
        return metrics

    def score_validation(self) -> tuple[dict[str, float], list[tuple[Sample, Examined]]]:
        """From closed-set log-likelihood scores of all ranks' images: loss per token in nats, top-1, top-5.

        The images with their scores too, on rank 0.
        """
        scored, examined, num_unreadable = [], [], 0
        predict = functools.partial(self.plant.score, with_features=True)
        # A DataLoader draws a seed from the global generator: without the fork, evaluating would change the training.
        with torch.random.fork_rng(), keeping_features(self.plant.base, "val"):
            for found, unreadable in self.plant.distribute(predict, self.eval_dataset, self.dist):
                self.check_stop()
                self.unreadable_val.add(unreadable, self.dist.is_main_process)
                num_unreadable += len(unreadable)
                examined += found if self.dist.is_main_process else []
                if found:
                    samples, scores = zip(*((sample, each.scores) for sample, each in found))
                    labels = np.array([sample.label for sample in samples])
                    correct, rank, log_likelihood = rank_true_classes(np.array(scores), labels)
                    tokens = [sample.length - sample.prompt_length for sample in samples]
                    ids = [sample.id for sample in samples]
                    scored += zip(ids, tokens, correct.tolist(), rank.tolist(), log_likelihood.tolist())
        if not scored:
            raise UserError(
                f"val: none of its {num_unreadable} images can be read; fix or remove them, as logged above"
            )
        # In the same order for any number of ranks: sums of floating-point numbers depend on it.
        tokens, correct, rank, log_likelihood = np.array([values for _, *values in sorted(scored)]).T
        metrics = {
            "loss": float(-log_likelihood.sum() / tokens.sum()),
            "top1": float(correct.mean()),
            "top5": float((rank < 5).mean()),
            "unreadable_images": num_unreadable,
        }
        return metrics, examined


def _is_evaluated(state: TrainerState) -> bool:
    return any(entry["step"] == state.global_step and "eval_loss" in entry for entry in state.log_history)


def _get_random_state(device: torch.device) -> list[torch.Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def build_trainer(run: Run, plant: PlantModel, data: PlantData) -> PlantTrainer:
    """The trainer of a run, with its callbacks. The run's id marks the checkpoints that it may resume and delete."""
    config = run.config
    if config.matmul == "fp8":
        use_fp8(plant.fused, plant.device, plant.precision)
    largest_batch = max(config.effective_batch_size, config.per_device_eval_batch_size)
    trainer = PlantTrainer(
        run,
        plant,
        MemoryOptions(**{name: getattr(config, name) for name in MemoryOptions._fields}),
        config.projector_learning_rate,
        config.max_bad_fraction,
        config.max_skipped_steps,
        config.save_total_limit,
        args=build_arguments(config, plant.precision, plant.device, plant.collator.batch_bytes(largest_batch)),
        train_dataset=data.train,
        eval_dataset=data.validation,
    )
    if problem := config.find_warmup_problem(trainer.planned_steps()):  # of epochs, by the number of images
        raise UserError(problem)
    trainer.is_augmented = config.augmentation != "none"
    if trainer.streams:
        data.train.is_augmented = trainer.is_augmented
    trainer.is_balanced = config.class_balance
    build_cache(trainer)
    trainer.remove_callback(PrinterCallback)  # of raw dictionaries
    trainer.add_callback(RunLog(trainer))
    trainer.add_callback(MemoryCollector())
    if sys.stderr.isatty():
        trainer.add_callback(ProgressBar())
    if config.early_stopping_patience is not None:
        patience, min_gain = config.early_stopping_patience, config.early_stopping_min_gain
        trainer.add_callback(EarlyStopping(patience, min_gain, len(data.validation)))
    return trainer

"""A run on disk and its lock: opened by train.py, loaded by the other scripts.

Nothing heavy is imported here, so that every script can read a run before it imports torch.
"""

import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from config.training_config import CONFIG_FILE, TrainingConfig
from runtime import checkpoint
from runtime.resume import check_same_facts, decide_run
from runtime.run_files import BEST, LOCK_FILE, append_metrics, is_completed, load_config, lock_folder, save_config
from utils.logging_utils import LOG_FILE, UserError, logger, setup_logging

if TYPE_CHECKING:
    from runtime.distributed import Distributed  # imports torch


@dataclass
class Run:
    """A run directory with its config and recorded facts; `open_run` makes one for training, `Run.load` for use."""

    config: TrainingConfig  # with output_dir filled in
    recorded: dict = field(default_factory=dict)
    dist: "Distributed | None" = None
    completed: bool = False
    is_new: bool = True
    resume_from: Path | None = None  # checkpoint; known once `record` was called

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """A run that a script made, its base model at the very commit it was trained on. Raises ConfigError."""
        config, recorded = load_config(folder)
        revision = (not recorded.get("base") and recorded.get("model_commit")) or config.model_revision
        config = dataclasses.replace(config, output_dir=str(folder), model_revision=revision)
        return cls(config, recorded, completed=is_completed(folder), is_new=False)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir or ".")

    @property
    def best_folder(self) -> Path:
        return self.folder / BEST

    @property
    def run_id(self) -> str:
        return self.recorded.get("run_id", "")

    @property
    def is_base_model(self) -> bool:
        """Whether it holds the scores of a base model, of which nothing was trained."""
        return bool(self.recorded.get("base"))

    @property
    def is_main_process(self) -> bool:
        return self.dist is None or self.dist.is_main_process

    def record(self, plant, data, trainer) -> None:
        """Check that disk, data and model allow the run to start or resume; write its config and facts.

        `plant` is a PlantModel, `data` a PlantData, `trainer` a PlantTrainer. Sets `resume_from`. Raises ConfigError
        for other data, base or precision than the run began with, UserError for a full disk.
        """
        found = self._record(plant, data, trainer) if self.is_main_process else None
        if self.dist is not None:
            found = self.dist.broadcast_object(found and str(found))
        self.resume_from = found and Path(found)

    def _record(self, plant, data, trainer) -> Path | None:
        config, origin = self.config, self.recorded.get("origin")  # another run's checkpoint, where this one begins
        checkpoint.check_disk(self.folder, plant.model.num_parameters(only_trainable=True), config.save_total_limit)
        facts = plant.facts() | {
            "class_names": data.class_names,
            "data_fingerprint": data.fingerprint(),
            "ranks": self.dist.world_size if self.dist else 1,
            "stream_workers": trainer.args.dataloader_num_workers if config.streaming else None,
        }
        if not self.is_new or origin:
            began = Path(config.resume).parent if self.is_new else self.folder
            for note in check_same_facts(facts, began, config.allow_changed):
                logger.warning(note)
        self.recorded = facts | {"run_id": self.run_id, "origin": origin}
        save_config(config, self.folder, self.recorded)
        checkpoint.recover_interrupted_replace(self.best_folder)
        found = checkpoint.last_checkpoint(self.folder, self.run_id)
        if found is None and origin:
            return checkpoint.fork_checkpoint(Path(origin), self.folder, self.run_id)
        if found is None and not self.is_new:
            logger.info("plan | no checkpoint to resume from: starting at step 1")
        return found

    def log_header(self, plant, data, trainer) -> None:
        """What the run is, before it starts; then ranks other than 0 log warnings only, such as an OOM on that rank."""
        if not self.is_main_process:
            logger.setLevel(logging.WARNING)
            return
        config, steps, count = self.config, trainer.planned_steps(), data.num_train
        size = f"{config.image_size} x {config.image_size} pixels" if config.image_size else "their own size"
        val = "no val (it is in train)" if data.validation is None else f"{len(data.validation):,} val"
        ranks = self.recorded["ranks"]
        where = str(plant.device) if ranks == 1 else f"{ranks} x {plant.device.type}"
        untested = ", untested on MPS" if plant.device.type == "mps" else ""
        epochs = steps * config.effective_batch_size / count
        logger.info("run | %s | preset %s | seed %d", self.folder, config.preset, config.seed)
        logger.info(
            f"data | {data.source} | {count:,} train, {val}, {len(data.test):,} test images of "
            f"{len(data.class_names)} classes | {size}"
        )
        described = plant.describe(config.trainable, config.load_in_4bit)
        logger.info(f"model | {config.model} | {described} | {where}{untested}")
        logger.info(f"plan | {steps:,} steps | global batch size {config.effective_batch_size} | {epochs:.1f} epochs")

    def complete(self, step: int) -> None:
        """The last line of metrics.jsonl: only a run that has it is complete."""
        if self.is_main_process:
            append_metrics(self.folder, {"step": step, "completed": True})

    def discard_if_never_started(self) -> None:
        """Remove the folder of a new run that failed before its first step, unless it holds anything else."""
        ours = {LOG_FILE, LOCK_FILE, CONFIG_FILE}
        if self.is_new and self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= ours:
            setup_logging()  # closes the log
            for name in ours:
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()


@contextlib.contextmanager
def open_run(config: TrainingConfig, dist: "Distributed") -> Iterator[Run]:
    """The run that a config asks for: new, interrupted (resumes) or completed (nothing to do).

    Rank 0 decides, locks the folder and writes the log. Raises ConfigError or UserError for a folder of no use.
    """
    with contextlib.ExitStack() as stack:
        decided = None
        if dist.is_main_process:
            folder, state, notes, fork_from = decide_run(config)
            if fork_from is not None:
                checkpoint.require_valid_checkpoint(fork_from)
            if state != "completed":
                stack.enter_context(lock_folder(folder))
                setup_logging(folder)
            recorded = {"run_id": uuid.uuid4().hex, "origin": fork_from and str(fork_from.resolve())}
            for note in notes:
                logger.info("run | %s", note)
            decided = [str(folder), state, load_config(folder)[1] if state == "interrupted" else recorded]
        output_dir, state, recorded = dist.broadcast_object(decided)
        config = dataclasses.replace(config, output_dir=output_dir)
        run = Run(config, recorded, dist, completed=state == "completed", is_new=state == "new")
        if not run.completed and not _appears(run.folder / LOCK_FILE):
            raise UserError(
                f"{run.folder}: rank {dist.rank} does not see it; machines need the folder on a shared disk"
            )
        try:
            yield run
        except BaseException:
            if run.is_main_process:
                run.discard_if_never_started()
            raise


def _appears(path: Path, seconds: float = 10) -> bool:
    """Whether a file is there; other machines may see it a little later."""
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.1)
    return path.exists()

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

from config.training_config import CONFIG_FILE, ConfigError, TrainingConfig
from runtime import checkpoint, run_files
from utils.logging_utils import LOG_FILE, UserError, logger, setup_logging

if TYPE_CHECKING:
    from runtime.distributed import Distributed  # imports torch

SHARED_DISK_S = 10  # seconds after which all machines see a file that one of them wrote
OF_THE_WEIGHTS = ["model", "trainable", "lora_r", "optim"]  # options that fix the shapes of a checkpoint's tensors
NOT_COMPARED = ("output_dir", "resume", "allow_changed")  # options that say where and how a run resumes
COMPARED = [option for option in dataclasses.fields(TrainingConfig) if option.name not in NOT_COMPARED]
RESUMABLE = [option.name for option in COMPARED if option.metadata["resumable"]]  # may differ on resume
LENGTH = ["max_steps", "num_train_epochs"]
FIXED = [option.name for option in COMPARED if not option.metadata["resumable"]]  # change what a run computes
# Recorded facts that must be the same on resume, in words, and whether their values are short enough to show.
SAME_ON_RESUME = {
    "class_names": ("the class names", False),
    "data_fingerprint": ("the images of train and val", False),
    "tokenizer_probe": ("the tokenizer", False),
    "model_commit": ("the model's commit", True),
    "model_files": ("the model's files", False),
    "precision": ("the precision", True),
    "ranks": ("the number of ranks", True),
    "stream_workers": ("the number of loader workers, which orders a streamed data set,", True),
}


def _process_start() -> float:
    import psutil  # not before --help is printed

    return psutil.Process().create_time()


@dataclass
class Run:
    """A run directory with its config and recorded facts; `open_run` makes one for training, `Run.load` for use."""

    config: TrainingConfig  # with output_dir filled in
    recorded: dict = field(default_factory=dict)
    dist: "Distributed | None" = None
    state: str = "new"  # or interrupted, or completed
    notes: list[str] = field(default_factory=list)  # what the user should hear of how it starts
    resume_from: Path | None = None  # checkpoint; known once `record` was called
    seconds: dict[str, float] = field(default_factory=dict)  # of each phase, from the start of the process
    phase_began: float = field(default_factory=_process_start)

    @classmethod
    def load(cls, folder: str | Path) -> "Run":
        """A run to use, its base model whole, at the very commit it was trained on. Raises ConfigError."""
        config, recorded = run_files.load_config(folder)
        revision = (not recorded.get("base") and recorded.get("model_commit")) or config.model_revision
        config = dataclasses.replace(config, output_dir=str(folder), model_revision=revision, sharding="none")
        return cls(config, recorded, state="completed" if run_files.is_completed(folder) else "interrupted")

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir or ".")

    @property
    def best_folder(self) -> Path:
        return self.folder / run_files.BEST

    @property
    def completed(self) -> bool:
        return self.state == "completed"

    @property
    def data_config(self) -> TrainingConfig:
        """The config to build the data sets with: a data set of the hub at the very commit the run began with."""
        *asked, commit = self.recorded.get("data_commit") or (None, None, None)
        if commit is None or asked != [self.config.dataset, self.config.dataset_revision]:
            return self.config
        return dataclasses.replace(self.config, dataset_revision=commit)

    @property
    def class_names(self) -> list[str]:
        if "class_names" not in self.recorded:
            raise ConfigError(f"{self.folder / CONFIG_FILE}: records no class names; restore it, or use another run")
        return self.recorded["class_names"]

    @property
    def run_id(self) -> str:
        return self.recorded.get("run_id", "")

    @property
    def is_base_model(self) -> bool:
        """Whether it holds the scores of a base model, of which nothing was trained."""
        return bool(self.recorded.get("base"))

    def describe_weights(self) -> str | None:
        """Which weights best/ holds; None for a base model. Raises UserError for corrupted ones."""
        return None if self.is_base_model else checkpoint.describe_best(self.best_folder)

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
            "taxonomy": data.taxonomy,
            "data_fingerprint": data.fingerprint(),
            "data_commit": [self.config.dataset, self.config.dataset_revision, data.revision],
            "ranks": self.dist.world_size if self.dist else 1,
            "stream_workers": trainer.args.dataloader_num_workers if config.streaming else None,
        }
        is_new = self.state == "new"
        if not is_new or origin:
            began = Path(config.resume).parent if is_new else self.folder
            for note in check_same_facts(facts, began, config.allow_changed):
                logger.warning(note)
        self.recorded = facts | {"run_id": self.run_id, "origin": origin}
        run_files.save_config(config, self.folder, self.recorded)
        checkpoint.recover_interrupted_replace(self.best_folder)
        found = checkpoint.last_checkpoint(self.folder, self.run_id)
        if found is None and origin:
            return checkpoint.fork_checkpoint(Path(origin), self.folder, self.run_id)
        if found is None and not is_new:
            logger.info("plan | no checkpoint to resume from: starting at step 1")
        return found

    def log_header(self, plant, data, trainer) -> None:
        """What the run is, before it starts; then ranks other than 0 log warnings only, such as an OOM on that rank."""
        if not self.is_main_process:
            logger.setLevel(logging.WARNING)
            return
        config, steps, ranks = self.config, trainer.planned_steps(), self.recorded["ranks"]
        size = f"{config.image_size} x {config.image_size} pixels" if config.image_size else "their own size"
        size += "" if config.views == "anyres" else ", base view alone"
        val = "no val (it is in train)" if data.validation is None else f"{len(data.validation):,} val"
        images = f"{data.num_train:,} train, {val}, {len(data.test):,} test images of {len(data.class_names)} classes"
        described = plant.describe(config.trainable, config.load_in_4bit)
        where = str(plant.device) if ranks == 1 else f"{ranks} x {plant.device.type}"
        where += ", untested on MPS" if plant.device.type == "mps" else ""
        epochs = steps * config.effective_batch_size / data.num_train
        logger.info("run | %s | preset %s | seed %d", self.folder, config.preset, config.seed)
        logger.info(f"data | {data.source} | {images} | {size}")
        logger.info(f"model | {config.model} | {described} | {where}")
        logger.info(f"plan | {steps:,} steps | global batch size {config.effective_batch_size} | {epochs:.1f} epochs")

    def end_phase(self, name: str) -> None:
        """The time since the last phase was that of this one."""
        now = time.time()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.phase_began
        self.phase_began = now

    def complete(self, step: int) -> None:
        """The last line of metrics.jsonl: only a run that has it is complete."""
        self.end_phase("reload")
        if self.is_main_process:
            run_files.append_metrics(self.folder, {"step": step, "completed": True})
            phases = " | ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
            logger.info(f"time | {phases} | {sum(self.seconds.values()):.0f} s in all")

    def discard_if_never_started(self) -> None:
        """Remove the folder of a new run that failed before its first step, unless it holds anything else."""
        ours = {LOG_FILE, run_files.LOCK_FILE, CONFIG_FILE}
        if self.state == "new" and self.folder.is_dir() and {path.name for path in self.folder.iterdir()} <= ours:
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
            run = decide_run(config)
            if run.state == "new":
                run.recorded["run_id"] = uuid.uuid4().hex
                if "origin" in run.recorded:
                    checkpoint.require_valid_checkpoint(Path(config.resume))
            if not run.completed:
                stack.enter_context(run_files.lock_folder(run.folder))
                setup_logging(run.folder)
            for note in run.notes:
                logger.info("run | %s", note)
            decided = [str(run.folder), run.recorded, run.state]
        output_dir, recorded, state = dist.broadcast_object(decided)
        run = Run(dataclasses.replace(config, output_dir=output_dir), recorded, dist, state)
        until = time.monotonic() + SHARED_DISK_S
        while not run.completed and not (run.folder / run_files.LOCK_FILE).exists():
            if time.monotonic() > until:
                where = f"{run.folder}: rank {dist.rank} does not see it"
                raise UserError(f"{where}; several machines need the run folder on a shared disk")
            time.sleep(0.1)
        try:
            yield run
        except BaseException:
            if run.is_main_process:
                with contextlib.suppress(OSError):  # the disk may be what failed
                    run.discard_if_never_started()
            raise


# ---- new, interrupted or completed


def decide_run(config: TrainingConfig) -> Run:
    """A new run, or the same one where it was interrupted or is complete. Raises ConfigError.

    Without output_dir: runs/<preset>, and if that is complete or another config's, runs/<preset>-2, -3, ... An explicit
    folder is never replaced by another one: ConfigError says what differs. Resumable options may differ.
    """
    folder, notes = Path(config.output_dir or f"runs/{config.preset}"), []
    if config.output_dir is not None and folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output-dir {folder}: is a file; give a folder")
    if config.resume not in ("auto", "never"):
        return _decide_named_start(config, Path(config.resume))
    if config.output_dir is not None:
        return _decide_explicit(config)
    while not is_fresh(folder) and (obstacle := _find_obstacle(config, folder)):
        notes.append(f"{folder} {obstacle}")
        folder = Path(f"runs/{config.preset}-{len(notes) + 1}")
    config = dataclasses.replace(config, output_dir=str(folder))
    if is_fresh(folder):
        return Run(config, notes=[*notes, f"using {folder}"] if notes else [])
    return _interrupted(config, notes)


def _find_obstacle(config: TrainingConfig, folder: Path) -> str | None:
    if config.resume == "never":
        return "is kept (--resume never)"
    try:
        saved, _ = run_files.load_config(folder)
    except ConfigError:
        return "holds something else"
    changed = changed_fields(config, saved)
    if run_files.is_completed(folder) and (changed or not checkpoint.needs_best(folder)):
        return "is complete"
    return f"has another config ({'; '.join(changed)})" if changed else None


def _decide_explicit(config: TrainingConfig) -> Run:
    run = Run(config)
    if is_fresh(run.folder):
        return run
    if not (run.folder / CONFIG_FILE).exists():
        problem = f"holds files but is not a run ({CONFIG_FILE} is missing)"
        raise ConfigError(f"--output-dir {run.folder}: {problem}; give a new folder")
    if config.resume == "never":
        problem = "holds a run, and --resume never starts a new one"
        raise ConfigError(f"--output-dir {run.folder}: {problem}; give a new folder")
    saved, _ = run_files.load_config(run.folder)
    notes = _check_options(config, saved, run.folder)
    is_completed = not _length_changes(config, saved) and run_files.is_completed(run.folder)
    if is_completed and not checkpoint.needs_best(run.folder):
        note = f"{run.folder} is complete; give a new folder, or a larger --max-steps to continue"
        return dataclasses.replace(run, state="completed", notes=[note])
    return _interrupted(config, notes)


def _interrupted(config: TrainingConfig, notes: list[str]) -> Run:
    folder = config.output_dir or ""
    saved, recorded = run_files.load_config(folder)
    longer = "; ".join(_length_changes(config, saved))
    is_lost = run_files.is_completed(folder) and not longer  # the weights of a run of this length
    if config.lr_scheduler_type == "constant_with_warmup" and config.warmup_steps >= 1:
        longer = ""  # no rate depends on the length
    changed = "; ".join(_changes(config, saved, [name for name in RESUMABLE if not longer or name not in LENGTH]))
    note = f"resuming {folder}" + (f"; changed options that keep the result: {changed}" if changed else "")
    notes = [*notes, note]
    if longer:
        reason = "the learning rate schedule is stretched: the result is not that of a run of this length from step 1"
        notes.append(f"longer than it began ({longer}): {reason}")
    if is_lost:
        notes.append(f"{folder}/{run_files.BEST} is missing or corrupted; it is made again from a checkpoint")
    return Run(config, recorded, state="interrupted", notes=notes)


def _decide_named_start(config: TrainingConfig, start: Path) -> Run:
    """--resume PATH.

    | PATH                                    | --output-dir                     | decision                  |
    |-----------------------------------------|----------------------------------|---------------------------|
    | anything                                | a run of this very --resume      | as if only it were given  |
    | no run and no checkpoint of one         |                                  | ConfigError               |
    | a run, or its newest checkpoint         | none, or that run                | resume there              |
    | an older checkpoint                     | none, or that run                | ConfigError               |
    | a run                                   | another folder                   | ConfigError               |
    | a checkpoint                            | a new folder                     | fork: new run from there  |
    | a checkpoint                            | a folder that holds anything     | ConfigError               |
    """
    is_run = (start / CONFIG_FILE).exists()
    run = start if is_run else start.parent
    folder = Path(config.output_dir or run)
    config = dataclasses.replace(config, output_dir=str(folder))
    if (folder / CONFIG_FILE).exists() and run_files.load_config(folder)[0].resume == config.resume:
        return _decide_explicit(config)
    checkpoints = run_files.checkpoints_in(run) if (run / CONFIG_FILE).exists() else []
    if not is_run and start not in checkpoints:
        known = f"{run} has {', '.join(path.name for path in checkpoints)}"
        move = known if checkpoints else "use auto, never, or a path like runs/default/checkpoint-50"
        raise ConfigError(f"--resume {start}: is no run and no checkpoint of one; {move}")
    if folder.resolve() == run.resolve():
        if not is_run and start != checkpoints[0]:
            problem = f"the run continued to step {run_files.step_of(checkpoints[0])} from there"
            move = "leave --resume out to resume it, or give a new --output-dir to start again from that checkpoint"
            raise ConfigError(f"--resume {start}: {problem}; {move}")
        return _decide_explicit(config)
    if is_run:
        move = "give one of its checkpoints, or leave --output-dir out"
        raise ConfigError(f"--resume {start}: a run resumes in its own folder; {move}")
    if not is_fresh(folder):
        raise ConfigError(f"--output-dir {folder}: holds what did not start from {start}; give a new folder")
    notes = _check_options(config, run_files.load_config(run)[0], run)
    return Run(config, {"origin": str(start.resolve())}, notes=[*notes, f"starting {folder} from {start}"])


def _check_options(config: TrainingConfig, saved: TrainingConfig, folder: Path) -> list[str]:
    """A note of changed options where --allow-changed allows them; else ConfigError."""
    changed = "; ".join(changed_fields(config, saved))
    if _changes(config, saved, OF_THE_WEIGHTS) or (changed and not config.allow_changed):
        preset = f"; it was started with --preset {saved.preset}" if saved.preset != config.preset else ""
        allowed = f"--allow-changed (not for {', '.join(OF_THE_WEIGHTS)}){preset}"
        move = f"give a new folder, the old options to resume it, or {allowed}"
        raise ConfigError(f"--output-dir {folder}: holds a run with another config ({changed}); {move}")
    return [f"changed, as --allow-changed says: {changed}"] if changed else []


def is_fresh(folder: Path) -> bool:
    """True if nothing is there but, maybe, the log, the lock and a draft of the config of a start that failed."""
    left = {LOG_FILE, run_files.LOCK_FILE, f"{CONFIG_FILE}.draft"}
    return not folder.exists() or (folder.is_dir() and all(path.name in left for path in folder.iterdir()))


def changed_fields(new: TrainingConfig, old: TrainingConfig) -> list[str]:
    """`name: old -> new` of every option that changes what a run computes."""
    changed = _changes(new, old, FIXED)
    # Fewer steps, or epochs where steps do not decide, would end over a longer run that is still to be done.
    same_kind = (new.max_steps > 0) == (old.max_steps > 0)
    name = "max_steps" if new.max_steps > 0 else "num_train_epochs"
    if not same_kind or getattr(new, name) < getattr(old, name):
        changed += _changes(new, old, LENGTH)
    if new.effective_batch_size != old.effective_batch_size:
        changed.append(f"global batch size: {old.effective_batch_size} -> {new.effective_batch_size}")
    return changed


def _length_changes(new: TrainingConfig, old: TrainingConfig) -> list[str]:
    """Of the options that decide how long a run is: with max_steps, that alone."""
    return _changes(new, old, ["max_steps"] if min(new.max_steps, old.max_steps) > 0 else LENGTH)


def _changes(new: TrainingConfig, old: TrainingConfig, names: list[str]) -> list[str]:
    values = [(name, getattr(old, name), getattr(new, name)) for name in names]
    return [f"{name}: {before} -> {after}" for name, before, after in values if before != after]


def check_same_facts(facts: dict, folder: Path, allow_changed: bool = False) -> list[str]:
    """A note of facts that the run in `folder` recorded differently, where that is allowed; else ConfigError."""
    _, recorded = run_files.load_config(folder)
    changed = " and ".join(
        f"{words} ({recorded.get(name)} -> {facts[name]})" if shows_values else words
        for name, (words, shows_values) in SAME_ON_RESUME.items()
        if facts[name] != recorded.get(name)
    )
    if changed and not allow_changed:
        move = "resume anyway with --allow-changed, or start a new run with another --output-dir"
        problem = f"cannot resume, {changed} changed since the run started"
        raise ConfigError(f"{folder}: {problem}; restore what it started with, {move}")
    return [f"changed since the run started, as --allow-changed says: {changed}"] if changed else []

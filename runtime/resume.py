"""Whether a run is new, resumes or is complete: what must be the same as when it started."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from config.training_config import CONFIG_FILE, ConfigError, TrainingConfig
from runtime.run_files import LOCK_FILE, checkpoints_in, is_completed, load_config, step_of
from utils.logging_utils import LOG_FILE

OF_THE_WEIGHTS = ("model", "trainable", "lora_r", "optim")  # options that fix the shapes of a checkpoint's tensors
NOT_COMPARED = ("output_dir", "resume", "allow_changed")  # options that say where and how a run resumes
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


class Decision(NamedTuple):
    """Where a run goes, and what the user should hear of it."""

    folder: Path
    state: str  # new, interrupted or completed
    notes: list[str]
    fork_from: Path | None = None  # another run's checkpoint, where this run begins


def decide_run(config: TrainingConfig) -> Decision:
    """A new folder, or the folder of the same run where it was interrupted. Raises ConfigError.

    Without output_dir: runs/<preset>, and if that is complete or another config's, runs/<preset>-2, -3, ... An explicit
    folder is never replaced by another one: ConfigError says what differs. Resumable options may differ.
    """
    folder, notes = Path(config.output_dir or f"runs/{config.preset}"), []
    if config.output_dir is not None and folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output-dir {folder}: is a file; give a folder")
    if config.resume not in ("auto", "never"):
        return _decide_named_start(config, Path(config.resume))
    if config.output_dir is not None:
        return _decide_explicit(config, folder)
    while not is_fresh(folder) and (obstacle := _find_obstacle(config, folder)):
        notes.append(f"{folder} {obstacle}")
        folder = Path(f"runs/{config.preset}-{len(notes) + 1}")
    if is_fresh(folder):
        return Decision(folder, "new", [*notes, f"using {folder}"] if notes else [])
    return Decision(folder, "interrupted", [*notes, _resume_note(config, folder)])


def _find_obstacle(config: TrainingConfig, folder: Path) -> str | None:
    if config.resume == "never":
        return "is kept (--resume never)"
    try:
        saved, _ = load_config(folder)
    except ConfigError:
        return "holds something else"
    if is_completed(folder):
        return "is complete"
    changed = changed_fields(config, saved)
    return f"has another config ({'; '.join(changed)})" if changed else None


def _decide_explicit(config: TrainingConfig, folder: Path) -> Decision:
    if is_fresh(folder):
        return Decision(folder, "new", [])
    if not (folder / CONFIG_FILE).exists():
        raise ConfigError(f"--output-dir {folder}: holds files but is not a run (no {CONFIG_FILE}); give a new folder")
    if config.resume == "never":
        raise ConfigError(f"--output-dir {folder}: holds a run, and --resume never starts a new one; give a new folder")
    saved, _ = load_config(folder)
    notes = _check_options(config, saved, folder)
    same_end = (config.max_steps, config.num_train_epochs) == (saved.max_steps, saved.num_train_epochs)
    if same_end and is_completed(folder):
        note = f"{folder} is complete; give a new folder, or a larger --max-steps to continue"
        return Decision(folder, "completed", [note])
    return Decision(folder, "interrupted", [*notes, _resume_note(config, folder)])


def _decide_named_start(config: TrainingConfig, start: Path) -> Decision:
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
    if (folder / CONFIG_FILE).exists() and load_config(folder)[0].resume == config.resume:
        return _decide_explicit(config, folder)
    checkpoints = checkpoints_in(run) if (run / CONFIG_FILE).exists() else []
    if not is_run and start not in checkpoints:
        known = f"{run} has {', '.join(path.name for path in checkpoints)}"
        move = known if checkpoints else "use auto, never, or a path like runs/default/checkpoint-50"
        raise ConfigError(f"--resume {start}: is no run and no checkpoint of one; {move}")
    if folder.resolve() == run.resolve():
        if not is_run and start != checkpoints[0]:
            raise ConfigError(
                f"--resume {start}: the run continued to step {step_of(checkpoints[0])} from there; leave --resume out "
                "to resume it, or give a new --output-dir to start again from that checkpoint"
            )
        return _decide_explicit(config, folder)
    if is_run:
        raise ConfigError(
            f"--resume {start}: a run resumes in its own folder; give one of its checkpoints, or no --output-dir"
        )
    if not is_fresh(folder):
        raise ConfigError(f"--output-dir {folder}: holds what did not start from {start}; give a new folder")
    notes = _check_options(config, load_config(run)[0], run)
    return Decision(folder, "new", [*notes, f"starting {folder} from {start}"], start)


def _check_options(config: TrainingConfig, saved: TrainingConfig, folder: Path) -> list[str]:
    """A note of changed options where --allow-changed allows them; else ConfigError."""
    changed = "; ".join(changed_fields(config, saved))
    if _changes(config, saved, OF_THE_WEIGHTS) or (changed and not config.allow_changed):
        preset = f"; it was started with --preset {saved.preset}" if saved.preset != config.preset else ""
        raise ConfigError(
            f"--output-dir {folder}: holds a run with another config ({changed}); give a new folder, the old options "
            f"to resume it, or --allow-changed (not for {', '.join(OF_THE_WEIGHTS)}){preset}"
        )
    return [f"changed, as --allow-changed says: {changed}"] if changed else []


def _resume_note(config: TrainingConfig, folder: Path) -> str:
    changed = "; ".join(_changes(config, load_config(folder)[0], _option_names(resumable=True)))
    return f"resuming {folder}" + (f"; changed options that keep the result: {changed}" if changed else "")


def is_fresh(folder: Path) -> bool:
    """True if nothing is there but, maybe, the log and lock of a start that failed."""
    left = {LOG_FILE, LOCK_FILE, f"{CONFIG_FILE}.draft"}
    return not folder.exists() or (folder.is_dir() and all(path.name in left for path in folder.iterdir()))


def changed_fields(new: TrainingConfig, old: TrainingConfig) -> list[str]:
    """`name: old -> new` of every option that changes what a run computes."""
    changed = _changes(new, old, _option_names(resumable=False))
    # Fewer steps, or epochs where steps do not decide, would end over a longer run that is still to be done.
    same_kind = (new.max_steps > 0) == (old.max_steps > 0)
    name = "max_steps" if new.max_steps > 0 else "num_train_epochs"
    if not same_kind or getattr(new, name) < getattr(old, name):
        changed += _changes(new, old, ("max_steps", "num_train_epochs"))
    if new.effective_batch_size != old.effective_batch_size:
        changed.append(f"global batch size: {old.effective_batch_size} -> {new.effective_batch_size}")
    return changed


def _option_names(resumable: bool) -> list[str]:
    options = [field for field in dataclasses.fields(TrainingConfig) if field.name not in NOT_COMPARED]
    return [field.name for field in options if field.metadata["resumable"] == resumable]


def _changes(new: TrainingConfig, old: TrainingConfig, names: Iterable[str]) -> list[str]:
    values = [(name, getattr(old, name), getattr(new, name)) for name in names]
    return [f"{name}: {before} -> {after}" for name, before, after in values if before != after]


def check_same_facts(facts: dict, folder: Path, allow_changed: bool = False) -> list[str]:
    """A note of facts that the run in `folder` recorded differently, where that is allowed; else ConfigError."""
    _, recorded = load_config(folder)
    changed = " and ".join(
        f"{words} ({recorded.get(name)} -> {facts[name]})" if shows_values else words
        for name, (words, shows_values) in SAME_ON_RESUME.items()
        if facts[name] != recorded.get(name)
    )
    if changed and not allow_changed:
        raise ConfigError(
            f"{folder}: cannot resume, {changed} changed since the run started; restore what it started with, resume "
            "anyway with --allow-changed, or start a new run with another --output-dir"
        )
    return [f"changed since the run started, as --allow-changed says: {changed}"] if changed else []

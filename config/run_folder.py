"""Which folder a run writes to, and whether it goes on there. Standard library only."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import NamedTuple

from config.training_config import CONFIG_FILE, ConfigError, TrainingConfig, load_config

METRICS_FILE = "metrics.jsonl"
LOCK_FILE = "run.lock"  # held by the training that writes to the folder


class RunFolder(NamedTuple):
    """What was decided about the run folder, and what the user should hear of it."""

    config: TrainingConfig  # with output_dir filled in
    state: str  # fresh, unfinished or finished
    notes: list[str]


def choose_run_folder(config: TrainingConfig) -> RunFolder:
    """A fresh folder, or the folder of the same run where it was left unfinished.

    With output_dir=None: runs/<preset>, and if that is finished or another config's, runs/<preset>-2, -3, ... With an
    explicit folder nothing is guessed: ConfigError names what differs. What leaves the mathematics alone may differ.
    """
    if config.output_dir is not None:
        return _explicit_folder(config, Path(config.output_dir))
    notes = []
    for number in itertools.count(1):
        folder = Path("runs") / (config.preset if number == 1 else f"{config.preset}-{number}")
        candidate = dataclasses.replace(config, output_dir=str(folder))
        if is_fresh(folder):
            return RunFolder(candidate, "fresh", [*notes, f"using {folder}"] if notes else [])
        reason = _why_not_resumable(candidate, folder)
        if reason is None:
            return RunFolder(candidate, "unfinished", notes + _going_on(config, folder))
        notes.append(f"{folder} {reason}")


def _explicit_folder(config: TrainingConfig, folder: Path) -> RunFolder:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output-dir {folder}: is a file; name a folder")
    if is_fresh(folder):
        return RunFolder(config, "fresh", [])
    if not (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"--output-dir {folder}: holds files but is not a run ({CONFIG_FILE} is missing); name a new folder"
        )
    saved, _ = load_config(folder)
    changed = changed_fields(config, saved)
    if changed:
        raise ConfigError(
            f"--output-dir {folder}: holds a run with another config ({'; '.join(changed)}); name a new folder, "
            "or run with the old settings to go on there"
        )
    if is_finished(folder) and (config.max_steps, config.num_train_epochs) == (saved.max_steps, saved.num_train_epochs):
        return RunFolder(
            config, "finished", [f"{folder} is finished; name a new folder, or a larger --max-steps to go on"]
        )
    return RunFolder(config, "unfinished", _going_on(config, folder))


def _going_on(config: TrainingConfig, folder: Path) -> list[str]:
    mentioned = free_changes(config, load_config(folder)[0])
    return [
        f"going on in {folder}"
        + (f"; changed, which leaves the mathematics alone: {'; '.join(mentioned)}" if mentioned else "")
    ]


def is_fresh(folder: Path) -> bool:
    """True if nothing is there but, maybe, the log and lock of a start that failed."""
    left = {"train.log", LOCK_FILE}
    return not folder.exists() or (folder.is_dir() and all(path.name in left for path in folder.iterdir()))


def is_finished(folder: str | Path) -> bool:
    """True once the result line, which is written last, stands in metrics.jsonl."""
    return any(line.get("finished") for line in read_metrics(folder))


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of metrics.jsonl; a last line torn by a kill is left out."""
    path = Path(folder) / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def append_metrics(folder: str | Path, entry: dict) -> None:
    """One more object a line."""
    with open(Path(folder) / METRICS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _why_not_resumable(config: TrainingConfig, folder: Path) -> str | None:
    try:
        saved, _ = load_config(folder)
    except ConfigError:
        return "holds something else"
    if is_finished(folder):
        return "is finished"
    changed = changed_fields(config, saved)
    return f"has another config ({'; '.join(changed)})" if changed else None


def changed_fields(new: TrainingConfig, old: TrainingConfig) -> list[str]:
    """`name: old -> new` of every setting that changes what a run computes."""
    changed = _differences(new, old, free=False)
    if _ends_earlier(new, old):  # its end would be written over a longer run that is still to be done
        changed += [
            f"{name}: {getattr(old, name)} -> {getattr(new, name)}"
            for name in ("max_steps", "num_train_epochs")
            if getattr(new, name) != getattr(old, name)
        ]
    if new.effective_batch_size != old.effective_batch_size:
        changed.append(f"photos per optimizer step: {old.effective_batch_size} -> {new.effective_batch_size}")
    return changed


def _ends_earlier(new: TrainingConfig, old: TrainingConfig) -> bool:
    """Fewer steps, or fewer epochs where steps do not decide; between the two kinds nothing is known."""
    if (new.max_steps > 0) != (old.max_steps > 0):
        return True
    return new.max_steps < old.max_steps if new.max_steps > 0 else new.num_train_epochs < old.num_train_epochs


def check_same_run(facts: dict, folder: str | Path) -> None:
    """Raise ConfigError if data or model are no longer what the run in `folder` recorded when it began."""
    _, recorded = load_config(folder)
    words = {
        "class_names": "the classes",
        "photos": "the photos of train and val",
        "probe_ids": "the tokenizer",
        "model_commit": "the model's commit",
        "precision": "the precision",
    }
    changed = [told for name, told in words.items() if facts[name] != recorded.get(name)]
    if changed:
        raise ConfigError(
            f"{folder}: cannot go on, {' and '.join(changed)} changed since the run began; put back what it began "
            "with, or start anew with another --output-dir"
        )


def free_changes(new: TrainingConfig, old: TrainingConfig) -> list[str]:
    """`name: old -> new` of every setting that leaves what a run computes alone."""
    return _differences(new, old, free=True)


def _differences(new: TrainingConfig, old: TrainingConfig, free: bool) -> list[str]:
    return [
        f"{field.name}: {getattr(old, field.name)} -> {getattr(new, field.name)}"
        for field in dataclasses.fields(TrainingConfig)
        if field.metadata["free"] == free
        and field.name != "output_dir"
        and getattr(new, field.name) != getattr(old, field.name)
    ]

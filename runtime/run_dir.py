"""Which folder a run writes to, and whether it goes on there. Standard library only."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import NamedTuple

from config.training_config import CONFIG_FILE, ConfigError, TrainingConfig, load_config, write_whole

METRICS_FILE = "metrics.jsonl"
PREFIX = "checkpoint-"
BEST = "best"  # the weights that name best on val, or the last ones
LOCK_FILE = "run.lock"  # held by the training that writes to the folder
OF_THE_WEIGHTS = ("model", "trainable", "lora_r", "optim")  # settings that a checkpoint's tensors are made for
NOT_COMPARED = ("output_dir", "resume", "allow_changed")  # settings that say where and how a run goes on


class RunFolder(NamedTuple):
    """What was decided about the run folder, and what the user should hear of it."""

    config: TrainingConfig  # with output_dir filled in
    state: str  # fresh, unfinished or finished
    notes: list[str]
    origin: Path | None = None  # another run's checkpoint, where this run begins


def choose_run_folder(config: TrainingConfig) -> RunFolder:
    """A fresh folder, or the folder of the same run where it was left unfinished.

    With output_dir=None: runs/<preset>, and if that is finished or another config's, runs/<preset>-2, -3, ... With an
    explicit folder nothing is guessed: ConfigError names what differs. What leaves the mathematics alone may differ.
    """
    if config.resume not in ("auto", "never"):
        return _named_start(config, Path(config.resume))
    if config.output_dir is not None:
        return _explicit_folder(config, Path(config.output_dir))
    notes = []
    for number in itertools.count(1):
        folder = Path("runs") / (config.preset if number == 1 else f"{config.preset}-{number}")
        candidate = dataclasses.replace(config, output_dir=str(folder))
        if is_fresh(folder):
            return RunFolder(candidate, "fresh", [*notes, f"using {folder}"] if notes else [])
        reason = "is left alone" if config.resume == "never" else _why_not_resumable(candidate, folder)
        if reason is None:
            return RunFolder(candidate, "unfinished", notes + _going_on(config, folder))
        notes.append(f"{folder} {reason}")


def open_run(folder: str | Path) -> tuple[TrainingConfig, dict]:
    """Config and recorded facts of a run, its base model at the very commit that was trained on. Raises ConfigError."""
    config, recorded = load_config(folder)
    if recorded.get("model_commit") and not recorded.get("base"):
        config = dataclasses.replace(config, model_revision=recorded["model_commit"])
    return config, recorded


def _explicit_folder(config: TrainingConfig, folder: Path) -> RunFolder:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output-dir {folder}: is a file; name a folder")
    if is_fresh(folder):
        return RunFolder(config, "fresh", [])
    if not (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"--output-dir {folder}: holds files but is not a run ({CONFIG_FILE} is missing); name a new folder"
        )
    if config.resume == "never":
        raise ConfigError(f"--output-dir {folder}: holds a run, and --resume never begins a new one; name a new folder")
    saved, _ = load_config(folder)
    notes = _check_settings(config, saved, folder)
    if is_finished(folder) and (config.max_steps, config.num_train_epochs) == (saved.max_steps, saved.num_train_epochs):
        return RunFolder(
            config, "finished", [f"{folder} is finished; name a new folder, or a larger --max-steps to go on"]
        )
    return RunFolder(config, "unfinished", notes + _going_on(config, folder))


def _check_settings(config: TrainingConfig, saved: TrainingConfig, folder: Path) -> list[str]:
    changed = "; ".join(changed_fields(config, saved))
    if any(getattr(config, name) != getattr(saved, name) for name in OF_THE_WEIGHTS) or (
        changed and not config.allow_changed
    ):
        raise ConfigError(
            f"--output-dir {folder}: holds a run with another config ({changed}); name a new folder, run with the old "
            f"settings to go on there, or with --allow-changed (not for {', '.join(OF_THE_WEIGHTS)})"
            + (f"; it was begun with --preset {saved.preset}" if saved.preset != config.preset else "")
        )
    return [f"changed, as --allow-changed says: {changed}"] if changed else []


def _named_start(config: TrainingConfig, start: Path) -> RunFolder:
    """--resume PATH: a run goes on in its folder; from a checkpoint it does too, or a new run begins elsewhere."""
    run = start if (start / CONFIG_FILE).exists() else start.parent
    folder = Path(config.output_dir or run)
    if (folder / CONFIG_FILE).exists() and load_config(folder)[0].resume == config.resume:
        return _explicit_folder(dataclasses.replace(config, output_dir=str(folder)), folder)  # the same command again
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output-dir {folder}: is a file; name a folder")
    known = checkpoints_in(run) if (run / CONFIG_FILE).exists() else []
    if (start != run or not (run / CONFIG_FILE).exists()) and start not in known:
        there = ", ".join(path.name for path in known)
        raise ConfigError(
            f"--resume {start}: is no run and no checkpoint of one; "
            + (f"{run} has {there}" if there else "use auto, never, or such as runs/default/checkpoint-50")
        )
    config = dataclasses.replace(config, output_dir=str(folder))
    if folder.resolve() == run.resolve():
        later = max((step_of(path) for path in checkpoints_in(run)), default=0)
        if start != run and later > step_of(start):
            raise ConfigError(
                f"--resume {start}: the run went on to step {later} from there; leave --resume out to go on, or name "
                "a new --output-dir to begin again from that checkpoint"
            )
        return _explicit_folder(config, folder)
    if start == run:
        raise ConfigError(
            f"--resume {start} with --output-dir {folder}: a run goes on in its own folder; name one of its "
            "checkpoints, or leave --output-dir out"
        )
    if not is_fresh(folder):
        raise ConfigError(f"--output-dir {folder}: holds what did not begin from {start}; name a new folder")
    notes = _check_settings(config, load_config(run)[0], run)
    return RunFolder(config, "fresh", [*notes, f"beginning {folder} from {start}"], start)


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Folders that are named as checkpoints, the newest first."""
    paths = Path(folder).glob(f"{PREFIX}*")
    found = [path for path in paths if path.name.removeprefix(PREFIX).isdecimal() and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps that were done at a checkpoint; none without one."""
    number = checkpoint.name.removeprefix(PREFIX) if checkpoint else ""
    return int(number) if number.isdecimal() else 0


def _going_on(config: TrainingConfig, folder: Path) -> list[str]:
    mentioned = resumable_changes(config, load_config(folder)[0])
    return [
        f"going on in {folder}"
        + (f"; changed, which leaves the mathematics alone: {'; '.join(mentioned)}" if mentioned else "")
    ]


def is_fresh(folder: Path) -> bool:
    """True if nothing is there but, maybe, the log and lock of a start that failed."""
    left = {"train.log", LOCK_FILE, f"{CONFIG_FILE}.draft"}
    return not folder.exists() or (folder.is_dir() and all(path.name in left for path in folder.iterdir()))


def is_finished(folder: str | Path) -> bool:
    """True once the result line, which is written last, stands in metrics.jsonl."""
    return any(line.get("finished") for line in read_metrics(folder))


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of metrics.jsonl; what a kill or a crash of the machine left of one is left out."""
    path = Path(folder) / METRICS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [entry for entry in map(_read_line, lines) if entry is not None]


def _read_line(line: str) -> dict | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def append_metrics(folder: str | Path, entry: dict) -> None:
    """One more object a line, on a line of its own even behind one that a kill cut off."""
    with open(Path(folder) / METRICS_FILE, "a+b") as file:
        end = file.seek(0, 2)
        file.seek(max(end - 1, 0))
        torn = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(torn + json.dumps(entry).encode() + b"\n")


def cut_metrics(source: str | Path, folder: str | Path, step: int, is_evaluated: bool = True) -> None:
    """metrics.jsonl of `folder` becomes what that of `source` holds up to a step, its evaluation included or not."""
    kept = [
        line
        for line in read_metrics(source)
        if line["step"] <= step
        and not line.get("finished")
        and (is_evaluated or line["step"] < step or "eval_loss" not in line)
    ]
    write_whole(Path(folder) / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept))


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
    changed = _differences(new, old, resumable=False)
    if _ends_earlier(new, old):  # its end would be written over a longer run that is still to be done
        changed += [
            f"{name}: {getattr(old, name)} -> {getattr(new, name)}"
            for name in ("max_steps", "num_train_epochs")
            if getattr(new, name) != getattr(old, name)
        ]
    if new.effective_batch_size != old.effective_batch_size:
        changed.append(f"images per optimizer step: {old.effective_batch_size} -> {new.effective_batch_size}")
    return changed


def _ends_earlier(new: TrainingConfig, old: TrainingConfig) -> bool:
    """Fewer steps, or fewer epochs where steps do not decide; between the two kinds nothing is known."""
    if (new.max_steps > 0) != (old.max_steps > 0):
        return True
    return new.max_steps < old.max_steps if new.max_steps > 0 else new.num_train_epochs < old.num_train_epochs


def check_same_run(facts: dict, folder: str | Path, allow_changed: bool = False) -> list[str]:
    """Notes of what is no longer as the run in `folder` recorded when it began: data, model, precision, processes.

    Raises ConfigError instead unless that is allowed.
    """
    _, recorded = load_config(folder)
    words = {
        "class_names": "the classes",
        "images": "the images of train and val",
        "tokenizer_probe": "the tokenizer",
        "model_commit": "the model's commit",
        "model_files": "the model's files",
        "precision": "the precision",
        "processes": "the number of processes",
        "stream_workers": "the number of loader workers, on which a stream depends,",
    }
    later = {"processes": 1, "model_files": facts["model_files"], "stream_workers": facts["stream_workers"]}
    recorded = later | recorded  # runs that began without them
    changed = [
        told
        if name in ("class_names", "images", "tokenizer_probe", "model_files")
        else f"{told} ({recorded.get(name)} -> {facts[name]})"
        for name, told in words.items()
        if facts[name] != recorded.get(name)
    ]
    if changed and allow_changed:
        return [f"changed since the run began, as --allow-changed says: {' and '.join(changed)}"]
    if changed:
        raise ConfigError(
            f"{folder}: cannot go on, {' and '.join(changed)} changed since the run began; put back what it began "
            "with, go on all the same with --allow-changed, or start anew with another --output-dir"
        )
    return []


def resumable_changes(new: TrainingConfig, old: TrainingConfig) -> list[str]:
    """`name: old -> new` of every setting that leaves what a run computes alone."""
    return _differences(new, old, resumable=True)


def _differences(new: TrainingConfig, old: TrainingConfig, resumable: bool) -> list[str]:
    return [
        f"{field.name}: {getattr(old, field.name)} -> {getattr(new, field.name)}"
        for field in dataclasses.fields(TrainingConfig)
        if field.metadata["resumable"] == resumable
        and field.name not in NOT_COMPARED
        and getattr(new, field.name) != getattr(old, field.name)
    ]

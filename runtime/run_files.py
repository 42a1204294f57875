"""The files of a run directory: their names, config and recorded facts, checkpoints, metrics.jsonl.

Nothing heavy is imported here, so that every script can read a run before it imports torch.
"""

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from config.training_config import CONFIG_FILE, ConfigError, TrainingConfig, config_from_dict
from runtime.atomic import write_file
from runtime.legacy import renamed
from utils.logging_utils import UserError

METRICS_FILE = "metrics.jsonl"
PREFIX = "checkpoint-"
BEST = "best"  # the weights with the best validation accuracy, or the last ones
LOCK_FILE = "run.lock"  # held by the training that writes to the folder


def save_config(config: TrainingConfig, folder: str | Path, recorded: dict) -> None:
    """Write the resolved config beside the weights, with the recorded facts: commits, versions, class names."""
    text = json.dumps({"config": dataclasses.asdict(config), "recorded": recorded}, indent=2)
    write_file(Path(folder) / CONFIG_FILE, text + "\n")


def load_config(folder: str | Path) -> tuple[TrainingConfig, dict]:
    """The config and recorded facts of a run; ConfigError where they are missing, torn, or of another version."""
    path = Path(folder) / CONFIG_FILE
    try:
        saved = read_json(path)
        config, recorded = config_from_dict(dict(saved["config"])), dict(saved["recorded"])
    except (FileNotFoundError, NotADirectoryError):
        move = "Start one with: python train.py --preset tiny"
        raise ConfigError(f"{folder}: not a run, {CONFIG_FILE} is missing. {move}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        move = "restore the file, or use another --output-dir"
        raise ConfigError(f"{path}: cannot be read as a run's config ({error}); {move}") from error
    if "images" in recorded:
        recorded["data_fingerprint"] = recorded.pop("images")
    return config, recorded


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Folders that are named as checkpoints, the newest first."""
    paths = Path(folder).glob(f"{PREFIX}*")
    found = [path for path in paths if path.name.removeprefix(PREFIX).isdecimal() and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps done at a checkpoint; 0 for None."""
    number = checkpoint.name.removeprefix(PREFIX) if checkpoint else ""
    return int(number) if number.isdecimal() else 0


def is_completed(folder: str | Path) -> bool:
    """True once the last line of a run stands in metrics.jsonl."""
    return any(line.get("completed") for line in read_metrics(folder))


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [line for line in read_lines(Path(folder) / METRICS_FILE) if isinstance(line.get("step"), int)]


def append_metrics(folder: str | Path, entry: dict) -> None:
    """One more object on a line of its own, even behind a line that a kill tore."""
    with open(Path(folder) / METRICS_FILE, "a+b") as file:
        end = file.seek(0, 2)
        file.seek(max(end - 1, 0))
        torn = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(torn + json.dumps(entry).encode() + b"\n")


def truncate_metrics(source: str | Path, folder: str | Path, step: int, keep_eval: bool = True) -> None:
    """metrics.jsonl of `folder` becomes that of `source` up to a step, with or without the evaluation at that step."""
    kept = [line for line in read_metrics(source) if line["step"] <= step and not line.get("completed")]
    kept = [line for line in kept if keep_eval or line["step"] < step or "eval_loss" not in line]
    write_file(Path(folder) / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept))


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """One training at a time writes to a run folder, until its process ends. Raises UserError with that process."""
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    try:
        with filelock.FileLock(path, timeout=0):
            path.write_text(f"{os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            yield
    except filelock.Timeout as error:
        holder = path.read_text(encoding="utf-8") or "that has just started"
        move = "wait for it to end, or use another --output-dir"
        raise UserError(f"{folder}: another training, process {holder}, writes to it; {move}") from error


# ---- readers


def read_json(path: Path) -> dict:
    """An object that a run wrote, under today's keys."""
    return json.loads(path.read_text(encoding="utf-8"), object_hook=renamed)


def read_lines(path: Path) -> list[dict]:
    """The objects of a file with one on each line, without lines that a kill or a crash tore; [] without the file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    objects = []
    for line in lines:
        with contextlib.suppress(ValueError):
            objects.append(json.loads(line, object_hook=renamed))
    return [entry for entry in objects if isinstance(entry, dict)]


def read_entries(path: Path) -> tuple[dict | None, list[dict]]:
    """(header, entries) of a cache; (None, []) where there is none."""
    lines = read_lines(path)
    return (lines[0] if lines else None), [entry for entry in lines[1:] if "image" in entry]

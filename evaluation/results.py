"""What an evaluation left in a run directory, read again: the calibration, and scores by image."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evaluation.calibration import Calibration
from runtime.checkpoint import is_best
from runtime.run_dir import Run
from runtime.run_files import SAVED_CALIBRATION, integer, list_of, number, read_entries, read_json
from utils.logging_utils import UserError

CALIBRATION_FILE = "calibration.json"


def read_calibration(folder: Path, adapter: str | None) -> Calibration | None:
    """What was fitted on val for these weights, or None. Raises UserError for a file that cannot be read."""
    path = folder / CALIBRATION_FILE
    try:
        saved = read_json(path, SAVED_CALIBRATION)
        scored = saved.pop("scored")
        return Calibration(**saved) if scored["adapter"] == adapter else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        move = f"delete it, and make it again: python evaluate.py {folder}"
        raise UserError(f"{path}: cannot be used ({error}); {move}") from error


@contextlib.contextmanager
def same_weights(run: Run) -> Iterator[str | None]:
    """Which weights a run has. Raises UserError for corrupted ones, and at the end if a training replaced them."""
    weights = run.describe_weights()
    yield weights
    if weights is not None and not is_best(run.best_folder, weights):
        reason = "a training that is running replaced these weights in the meantime"
        raise UserError(f"{run.best_folder}: {reason}; re-run the same command, or wait for its end")


def scores_schema(classes: int) -> dict:
    """Of the entry of an image in a cache of scores."""
    return {"label": integer(0, classes - 1), "scores": list_of(number(), classes)}


def read_correct(run: Run, split: str, dataset: str | None = None) -> tuple[dict, dict[str, bool]]:
    """(facts, {image: whether its likeliest name was the true one}) of best/, on a data set. Raises UserError."""
    path = run.folder / f"eval_{split}.scores.jsonl"
    facts, entries = read_entries(path, scores_schema(len(run.class_names)))
    again = f"python evaluate.py {run.folder} --split {split}"
    if facts is None or not entries:
        raise UserError(f"{path}: no scores yet; make them first: {again}")
    if facts.get("adapter") != run.describe_weights():
        raise UserError(f"{path}: the scores are of other weights than {run.best_folder}; score them again: {again}")
    if dataset and facts.get("dataset") not in (dataset, run.config.dataset):
        move = f"make them again: {again} --dataset {run.config.dataset}"
        raise UserError(f"{path}: the scores are of {facts.get('dataset')}, not of {dataset}; {move}")
    return facts, {entry["id"]: int(np.argmax(entry["scores"])) == entry["label"] for entry in entries}

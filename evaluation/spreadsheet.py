"""Results as tables for spreadsheets: eval_<split>_images.csv, a row for each image, and eval_<split>_classes.csv.

UTF-8 with a byte order mark, without which Excel takes letters with accents for others.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data.taxonomy import LEVELS
from evaluation.calibration import UNCALIBRATED, Calibration
from evaluation.metrics import SplitScores
from evaluation.predictor import decide
from runtime.atomic import write_file
from utils.logging_utils import logger

# Of a cell that a spreadsheet would compute; full width in Japanese ones.
FORMULA_STARTS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")


def write_tables(
    report: dict,
    split: SplitScores,
    calibration: Calibration | None,
    names: Sequence[str],
    folder: Path,
    strange: np.ndarray | None = None,
) -> None:
    """Both tables of a report into a run directory; `strange` (n,): which images get "none of these", if known."""
    stem = folder / f"eval_{report['split']}"
    classes = [[name, *(found[key] for key in CLASS_COLUMNS.values())] for name, found in report["per_class"].items()]
    images = list_images(split, calibration or UNCALIBRATED, names, strange)
    _write(Path(f"{stem}_images.csv"), images)
    _write(Path(f"{stem}_classes.csv"), [["class", *CLASS_COLUMNS], *classes])
    logger.info("saved | %s_images.csv | %s_classes.csv", stem, stem)


CLASS_COLUMNS = {"images": "n", "precision": "precision", "recall": "recall", "F1": "f1"}  # to keys of a report


def list_images(
    split: SplitScores, calibration: Calibration, names: Sequence[str], strange: np.ndarray | None
) -> Iterator[list]:
    """A header, then for each image its cells."""
    header = ["image", "true class", "answer", "likeliest class", "confidence", "sure", "right", "set"]
    levels = LEVELS if calibration.taxonomy else ()
    yield header + [column for level in levels for column in (level, f"{level} confidence", f"{level} sure")]
    is_right = split.correct
    for index, scores in enumerate(split.scores):
        found = decide(scores, calibration, names)
        name, share = found.likeliest[0]
        answer = name if found.is_confident else "not sure"
        if found.level and not found.is_confident:
            answer += f"; {found.level} {found.taxa[found.level].name}"
        if strange is not None and strange[index]:
            answer = "none of these"
        cells = [split.ids[index], names[split.labels[index]], answer, name, share, found.is_confident]
        cells += [bool(is_right[index]), "; ".join(found.prediction_set or ())]
        for level in levels:  # a class without a taxon stands for itself
            cells += found.taxa[level] if found.taxa[level].name else ("", "", "")
        yield cells


def _write(path: Path, rows: Iterable[Sequence]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(map(_cell, row) for row in rows)
    write_file(path, "\ufeff" + text.getvalue())


def _cell(value: object) -> str:
    """On one line; what a spreadsheet would compute begins with an apostrophe, so that it is text."""
    if isinstance(value, float):
        return f"{value:.4f}"
    text = ("yes" if value else "no") if isinstance(value, bool) else " ".join(str(value).split())
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text

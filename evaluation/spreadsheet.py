"""Results as tables for spreadsheets: eval_<split>_images.csv, a row for each image, and eval_<split>_classes.csv.

UTF-8 with a byte order mark, without which Excel takes letters with accents for others.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.special import softmax

from data.taxonomy import LEVELS
from evaluation.calibration import Calibration
from evaluation.conformal import find_sets
from evaluation.hierarchy import find_rejected, find_taxa
from evaluation.metrics import SplitScores
from runtime.atomic import write_file
from utils.logging_utils import logger

FORMULA_STARTS = (
    "=+-@\uff1d\uff0b\uff0d\uff20"  # of a cell that a spreadsheet would compute; full width in Japanese ones
)
UNCALIBRATED = Calibration(1.0, 0.0, 0.0, 0)


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
    probabilities = softmax(split.scores / calibration.temperature, axis=1)
    rejected, sets = find_rejected(probabilities, calibration), find_sets(probabilities, calibration.conformal)
    taxonomy = calibration.taxonomy or {}
    taxa = {level: find_taxa(probabilities, taxonomy, level) for level in LEVELS if taxonomy}
    header = ["image", "true class", "answer", "likeliest class", "confidence", "sure", "right", "set"]
    yield header + [column for level in taxa for column in (level, f"{level} confidence", f"{level} sure")]
    thresholds = calibration.levels or {}
    accepted = {level: found.accept(thresholds.get(level)) for level, found in taxa.items()}
    for index, shares in enumerate(probabilities):
        likeliest = names[shares.argmax()]
        level = next((level for level in taxa if accepted[level][index]), None)
        doubt = f"not sure; {level} {taxa[level].names[index]}" if level else "not sure"
        inside: Iterable[int] = () if sets is None else np.flatnonzero(sets[index])
        members = [names[label] for label in sorted(inside, key=lambda label: -shares[label])]
        yield [
            split.ids[index],
            names[split.labels[index]],
            "none of these" if strange is not None and strange[index] else doubt if rejected[index] else likeliest,
            likeliest,
            float(shares.max()),
            not rejected[index],
            bool(split.correct[index]),
            "; ".join(members),
            *(
                cell if found.names[index] else ""  # a class without a taxon stands for itself
                for level, found in taxa.items()
                for cell in (found.names[index], float(found.confidences[index]), bool(accepted[level][index]))
            ),
        ]


def _write(path: Path, rows: Iterable[Sequence]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(map(_cell, row) for row in rows)
    write_file(path, "\ufeff" + text.getvalue())


def _cell(value: object) -> str:
    """On one line; what a spreadsheet would compute begins with an apostrophe, so that it is text."""
    if isinstance(value, float):
        return f"{value:.4f}"
    text = ("yes" if value else "no") if isinstance(value, bool) else " ".join(str(value).split())
    return f"'{text}" if text.startswith(tuple(FORMULA_STARTS)) else text

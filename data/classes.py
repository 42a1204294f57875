"""A column of labels in Arrow as classes: a ClassLabel, texts, or numbers that something names."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset

from data.columns import (
    LABEL_NAMES,
    LABEL_ROWS,
    ONE_HOT,
    choose_label,
    describe,
    find_given_column,
    find_known,
    find_label_candidates,
    kind_of,
    values_of,
)
from data.labeling import Labeling, name_classes
from data.labels import CLASS_NAMES, official_counts, tidy_name
from data.rows import SPLITS
from utils.image_utils import printable
from utils.logging_utils import UserError

OFFICIAL_SIZES = {split: sum(official_counts(split)) for split in SPLITS}
MAX_NAME = 200  # characters; longer texts are captions


def find_label_column(rows: Dataset, image: str, label_column: str | None, where: str) -> str:
    """The column of labels: the one that is asked for, else the one that its name or its values tell.

    Raises UserError with what to ask for.
    """
    features = rows.features
    usable = [name for name, feature in features.items() if kind_of(feature) in ("class", "text", "number")]
    usable = [name for name in usable if name != image]
    if label_column is not None:
        found = find_given_column(list(features), label_column, where)
        if found not in usable:
            raise UserError(
                f"--label-column {label_column}: holds {describe(features[found])}; expected is one name or number for "
                "each image"
            )
        return found
    places = np.linspace(0, len(rows) - 1, min(len(rows), LABEL_ROWS)).astype(int)  # rows may be in order of classes
    cells = {name: _read_cells(rows, name, places) for name in usable}
    candidates = [name for name in find_label_candidates(cells) if name != ONE_HOT]
    lists = [name for name in find_known(features, LABEL_NAMES) if name not in (image, *usable)]
    if lists and not candidates:
        raise UserError(
            f"{where}: the column {printable(lists[0])} holds {describe(features[lists[0]])}; expected is one name or "
            "number for each image: name a column that has it with --label-column"
        )
    return choose_label({name: cells[name] for name in candidates}, features, where)[0]


def _read_cells(rows: Dataset, column: str, places: np.ndarray) -> list[str]:
    """The texts of a column in some rows; a ClassLabel's are its names."""
    values = values_of(rows.data.column(column).take(places))
    if kind_of(rows.features[column]) == "class":
        names = dict(enumerate(rows.features[column].names))
        return [names.get(value, "") for value in values]
    return ["" if value is None or value != value else str(value).strip() for value in values]


def read_classes(
    parts: Mapping[str, Dataset], label: str, class_names: str | None, beside: Sequence[Path], where: str
) -> tuple[Labeling, dict[str, np.ndarray]]:
    """The classes in the column `label`, and the class of each row by split, (rows,) int64, -1 for none.

    `class_names`: a file of names for them; `beside`: folders with such files. Raises UserError for labels that cannot
    be classes, and for numbers that nothing names.
    """
    features = {split: rows.features[label] for split, rows in parts.items()}
    kinds = {kind_of(feature) for feature in features.values()}
    if len(kinds) > 1:
        listed = ", ".join(f"{split}: {describe(feature)}" for split, feature in features.items())
        raise UserError(f"{where}: the column {label} differs between the splits ({listed}); write all alike")
    columns = {split: _read_texts(rows, label, split, where) for split, rows in parts.items()}
    counts = Counter(text for column in columns.values() for text in column)
    is_number = kinds == {"number"}
    as_number = is_number and not {"true", "false"} & {*counts}
    written = sorted(filter(tidy_name, counts), key=int if as_number else tidy_name)
    if kinds == {"class"} and len({tuple(feature.names) for feature in features.values()}) == 1:
        written = _names_of(next(iter(features.values())))  # in their order, those without an image as well
    if not written:
        raise UserError(f"{where}: the column {label} holds no labels; name another: --label-column")
    longest = max(map(len, written))
    if longest > MAX_NAME:
        raise UserError(
            f"{where}: the column {label} holds texts of up to {longest:,} characters, which are no class names; name "
            "another: --label-column"
        )
    if as_number and class_names is None and written[-1] == "101" and not written[0].startswith("-"):
        labeling = Labeling(list(CLASS_NAMES), {str(number): number for number in range(len(CLASS_NAMES))})
        labeling.warnings.append("the labels have no names; they are taken as the 102 of Oxford Flowers")
    else:
        labeling = name_classes(written, class_names, beside, counts)
        if is_number and labeling.table is None:
            raise UserError(
                f"{where}: the labels are numbers without names ({written[0]} to {written[-1]}); give a json or csv "
                "file of number and name: --class-names FILE, or write them as a ClassLabel"
            )
    get = labeling.labels.get
    return labeling, {
        split: np.array([get(text, -1) for text in column], np.int64) for split, column in columns.items()
    }


def _names_of(feature) -> list[str]:
    """The names of a ClassLabel, which its JSON may give with half a character."""
    return [name.encode(errors="replace").decode() for name in feature.names]


def _read_texts(rows: Dataset, label: str, split: str, where: str) -> list[str]:
    """Labels as texts, "" for none: the names of a ClassLabel, whole numbers, or texts as they are."""
    column, kind = rows.data.column(label), kind_of(rows.features[label])
    if kind == "class":
        names = _names_of(rows.features[label])
        check_range(column, len(names), split, where)
        return [names[number] for number in column.to_pylist()]
    if pyarrow.types.is_floating(column.type):
        try:
            column = column.cast(pyarrow.float64())
            column = pyarrow.compute.if_else(pyarrow.compute.is_finite(column), column, None).cast(pyarrow.int64())
        except pyarrow.ArrowInvalid as error:
            raise UserError(
                f"{where}: labels of {split} are no whole numbers ({error}); name another column: --label-column"
            ) from error
    if kind == "number":  # -1 is what the hub writes for an unknown label
        return ["" if text in (None, "-1") else text for text in column.cast(pyarrow.string()).to_pylist()]
    return [text or "" for text in values_of(column)]


def check_range(labels: pyarrow.ChunkedArray, count: int, split: str, where: str) -> None:
    """Raise UserError unless every label of a ClassLabel is one of 0 to count - 1; the hub writes -1 for unknown."""
    if labels.null_count:
        raise UserError(
            f"{where}: labels of {split} are {labels.type} with {labels.null_count:,} missing; expected is an integer "
            "for each image"
        )
    lowest, highest = pyarrow.compute.min_max(labels).as_py().values()
    if len(labels) and (lowest < 0 or highest >= count):
        raise UserError(
            f"{where}: labels of {split} go from {lowest} to {highest}, expected 0 to {count - 1}; write them as a "
            "ClassLabel with its names, and leave images without a label out"
        )


def check_official_counts(splits: Mapping[str, Dataset], description: str) -> None:
    """Raise UserError unless every split of full size has the official number of images of each class."""
    for split, rows in splits.items():
        counts = Counter(rows["label"]) if len(rows) == OFFICIAL_SIZES[split] else {}
        for label, expected in enumerate(official_counts(split) if counts else ()):
            if counts[label] != expected:
                raise UserError(
                    f"{description}: split {split} has {counts[label]} images of {CLASS_NAMES[label]!r}, the official "
                    f"one has {expected}; are its labels 0-based and in official order?"
                )

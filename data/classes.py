"""A column of labels in Arrow as classes: a ClassLabel, texts, or numbers that something names."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset
from datasets.features.features import FeatureType

from data.columns import (
    LABEL_NAMES,
    LABEL_ROWS,
    MISSING,
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
    """The column of labels: the one asked for, else the one that its name or values tell. Raises UserError."""
    features = rows.features
    usable = [name for name in features if name != image and kind_of(features[name]) in ("class", "text", "number")]
    expected = "expected is one name or number for each image"
    if label_column is not None:
        found = find_given_column(list(features), label_column, where)
        if found not in usable:
            raise UserError(f"--label-column {label_column}: holds {describe(features[found])}; {expected}")
        return found
    places = np.linspace(0, len(rows) - 1, min(len(rows), LABEL_ROWS)).astype(int)  # rows may be in order of classes
    cells = read_cells(rows, usable, places)
    candidates = {name: cells[name] for name in find_label_candidates(cells) if name != ONE_HOT}
    lists = [name for name in find_known(features, LABEL_NAMES) if name not in (image, *usable)]
    if lists and not candidates:
        raise UserError(
            f"{where}: the column {printable(lists[0])} holds {describe(features[lists[0]])}; {expected}: name a "
            "column that has it with --label-column"
        )
    return choose_label(candidates, features, where)[0]


def read_cells(rows: Dataset, names: Iterable[str], places: np.ndarray | None = None) -> dict[str, list[str]]:
    """Columns as texts, of all rows or of those at `places`: of a ClassLabel its names; "" for a missing value."""
    cells = {}
    for name in names:
        column = rows.data.column(name)
        values = values_of(column if places is None else column.take(places))
        if isinstance(rows.features[name], ClassLabel):
            values = list(map(dict(enumerate(_names_of(rows.features[name]))).get, values))
        cells[name] = ["" if value is None or value != value else str(value).strip() for value in values]
    return cells


def read_labels(rows: Dataset, label: str, split: str, where: str) -> list[str]:
    """Labels as texts, "" for none (-1 on the hub). Raises UserError for numbers that are no labels."""
    if label not in rows.features:
        return [""] * len(rows)
    kind, texts = kind_of(rows.features[label]), read_cells(rows, [label])[label]
    if kind == "class":
        count = len(rows.features[label].names)
        if odd := {*rows.data.column(label).unique().to_pylist()} - {None, *range(-1, count)}:
            raise UserError(
                f"{where}: has the label {max(odd)} in {split}, expected 0 to {count - 1}; write labels as a "
                "ClassLabel with its names"
            )
    elif kind == "number":
        texts = [re.sub(r"\.0$|-?inf$", "", text.lower()) for text in texts]
        if unusual := next((text for text in texts if not re.fullmatch(r"-?\d*|true|false", text)), None):
            raise UserError(
                f"{where}: labels of {split} are no whole numbers ({unusual}); name another column: --label-column"
            )
    return ["" if text in MISSING else text for text in texts]


def name_labels(
    texts: Mapping[str, list[str]],
    features: Mapping[str, FeatureType],
    class_names: str | None,
    beside: Sequence[Path],
    where: str,
) -> Labeling:
    """The classes of labels, `texts` by split from a column of `features`.

    `class_names`: a file of names for them; `beside`: folders with such files. Raises UserError for labels that cannot
    be classes, and for numbers that nothing names.
    """
    kinds = {kind_of(feature) for feature in features.values()}
    if len(kinds) > 1:
        listed = ", ".join(f"{split}: {describe(feature)}" for split, feature in features.items())
        raise UserError(f"{where}: the column of labels differs between the splits ({listed}); write all alike")
    counts = Counter(chain(*texts.values()))
    is_number = kinds == {"number"}
    as_number = is_number and not {"true", "false"} & {*counts}
    written = sorted(filter(tidy_name, counts), key=int if as_number else tidy_name)
    if kinds == {"class"} and len({tuple(feature.names) for feature in features.values()}) == 1:
        written = _names_of(next(iter(features.values())))  # in their order, those without an image as well
    longest = max(map(len, written), default=0)
    if not written or longest > MAX_NAME:
        what = f"texts of up to {longest:,} characters, which are no class names" if written else "no labels"
        raise UserError(f"{where}: the column of labels holds {what}; name another: --label-column")
    if as_number and class_names is None and written[-1] == "101" and not written[0].startswith("-"):
        warning = "the labels have no names; they are taken as the 102 of Oxford Flowers"
        return Labeling(list(CLASS_NAMES), {str(number): number for number in range(102)}, warnings=[warning])
    labeling = name_classes(written, class_names, beside, counts)
    if is_number and labeling.table is None:
        raise UserError(
            f"{where}: the labels are numbers without names ({written[0]} to {written[-1]}); give a json or csv file "
            "of number and name: --class-names FILE, or write them as a ClassLabel"
        )
    return labeling


def _names_of(feature) -> list[str]:
    """The names of a ClassLabel, which its JSON may give with half a character."""
    return [name.encode(errors="replace").decode() for name in feature.names]


def check_official_counts(splits: Mapping[str, Dataset], description: str) -> None:
    """Raise UserError unless every split of full size has the official number of images of each class."""
    for split, rows in splits.items():
        counts = Counter(rows["label"])
        for label, expected in enumerate(official_counts(split) if len(rows) == OFFICIAL_SIZES[split] else ()):
            if counts[label] != expected:
                raise UserError(
                    f"{description}: split {split} has {counts[label]} images of {CLASS_NAMES[label]!r}, the official "
                    f"one has {expected}; are its labels 0-based and in official order?"
                )

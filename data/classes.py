"""A column of labels as classes: a ClassLabel, texts, or numbers that something names."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset

from data.class_names import find_class_names, read_class_names
from data.columns import describe, kind_of, values_of
from data.labels import CLASS_NAMES, are_codes, name_key, official_counts, tidy_name, without_numbers
from data.rows import SPLITS
from utils.image_utils import printable
from utils.logging_utils import UserError

OFFICIAL_SIZES = {split: sum(official_counts(split)) for split in SPLITS}
MAX_NAME = 200  # characters; longer texts are captions
NO_LABEL = "-1"  # what the hub writes for an unknown label


@dataclass
class Classes:
    """Class names, and the label of each row by split, -1 for none; `notes` and `warnings` as of a Source."""

    names: list[str] = field(default_factory=list)
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_classes(
    parts: Mapping[str, Dataset], label: str, class_names: str | None, beside: Sequence[Path], where: str
) -> Classes:
    """The classes of the column `label`. `class_names`: a file of names for them; `beside`: folders with such files.

    Raises UserError for labels that cannot be classes, and for numbers that nothing names.
    """
    features = {split: rows.features[label] for split, rows in parts.items()}
    kinds = {kind_of(feature) for feature in features.values()}
    if len(kinds) > 1:
        listed = ", ".join(f"{split}: {describe(feature)}" for split, feature in features.items())
        raise UserError(f"{where}: the column {label} differs between the splits ({listed}); write all alike")
    kind = kinds.pop()
    columns = {
        split: _as_texts(rows.data.column(label), features[split], split, where) for split, rows in parts.items()
    }
    values = _distinct(columns, kind)
    if kind == "class" and len({tuple(feature.names) for feature in features.values()}) == 1:
        values = _as_array(next(iter(features.values())).names)  # in their order, those without an image as well
    codes = values_of(values)
    if not codes:
        raise UserError(f"{where}: the column {label} holds no labels; name another: --label-column")
    longest = max(map(len, codes))
    if longest > MAX_NAME:
        raise UserError(
            f"{where}: the column {label} holds texts of up to {longest:,} characters, which are no class names; name "
            "another: --label-column"
        )
    classes = Classes()
    if kind == "number" and class_names is None and codes[-1] == "101" and not codes[0].startswith("-"):
        classes.warnings.append("the labels have no names; they are taken as the 102 of Oxford Flowers")
        values = _as_array(list(map(str, range(102))))
        classes.names, found = list(CLASS_NAMES), list(range(102))
    else:
        names = _name_codes(codes, class_names, beside, classes)
        if kind == "number" and not names:
            raise UserError(
                f"{where}: the labels are numbers without names ({codes[0]} to {codes[-1]}); give a json or csv file "
                "of number and name: --class-names FILE, or write them as a ClassLabel"
            )
        found = _group([tidy_name(names.get(code, code)) for code in codes], _count(values, columns), classes)
    for split, column in columns.items():
        indices = pyarrow.compute.index_in(column, value_set=values).fill_null(len(found)).to_numpy()
        classes.labels[split] = np.array([*found, -1])[indices]
    return classes


def _as_texts(column: pyarrow.ChunkedArray, feature, split: str, where: str) -> pyarrow.ChunkedArray:
    """Labels as texts, null for none: the names of a ClassLabel, whole numbers, or texts as they are."""
    kind = kind_of(feature)
    if kind == "class":
        check_range(column, len(feature.names), split, where)
        return pyarrow.compute.take(_as_array(feature.names), column)
    if pyarrow.types.is_floating(column.type):
        try:
            column = column.cast(pyarrow.float64())
            column = pyarrow.compute.if_else(pyarrow.compute.is_finite(column), column, None).cast(pyarrow.int64())
        except pyarrow.ArrowInvalid as error:
            raise UserError(
                f"{where}: labels of {split} are no whole numbers ({error}); name another column: --label-column"
            ) from error
    texts = column.cast(pyarrow.large_string())
    return pyarrow.compute.if_else(pyarrow.compute.equal(texts, NO_LABEL), None, texts) if kind == "number" else texts


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


def _as_array(texts: Sequence[str]) -> pyarrow.Array:
    return pyarrow.array([text.encode(errors="replace").decode() for text in texts], pyarrow.large_string())


def _distinct(columns: Mapping[str, pyarrow.ChunkedArray], kind: str) -> pyarrow.Array:
    """The labels that there are, in the order of their names or numbers."""
    chunks = [chunk for column in columns.values() for chunk in column.chunks]
    values = pyarrow.compute.unique(pyarrow.chunked_array(chunks, pyarrow.large_string())).drop_null()
    texts = values_of(values)
    is_numbers = kind == "number" and "true" not in texts and "false" not in texts
    order = [index for index, text in enumerate(texts) if tidy_name(text)]
    order.sort(key=lambda index: int(texts[index]) if is_numbers else tidy_name(texts[index]))
    return values.take(pyarrow.array(order, pyarrow.int64()))


def _name_codes(
    codes: Sequence[str], class_names: str | None, beside: Sequence[Path], classes: Classes
) -> Mapping[str, str]:
    """What labels that are numbers or codes are called: in the file that was given, or in one beside the images."""
    if class_names is not None:
        classes.notes.append(f"names from {class_names}")
        return read_class_names(Path(class_names), codes)
    plain = without_numbers(codes)
    if plain is not None:
        classes.notes.append(f"names without the numbers of the labels: {codes[0]} is {tidy_name(plain[0])}")
        return dict(zip(codes, plain))
    if not are_codes(codes):
        return {}
    if found := find_class_names(codes, beside):
        names, table = found
        classes.notes.append(f"names from {table}: {codes[0]} is {names[codes[0]]}")
        return names
    classes.warnings.append(
        f"classes are called {', '.join(map(printable, codes[:3]))}{', ...' if len(codes) > 3 else ''}, and the model "
        "would answer with that; a json or csv file of code and name gives them names: --class-names FILE"
    )
    return {}


def _count(values: pyarrow.Array, columns: Mapping[str, pyarrow.ChunkedArray]) -> Counter[int]:
    """How often each of the values occurs, by its place among them."""
    counts: Counter[int] = Counter()
    for column in columns.values():
        places = pyarrow.compute.index_in(column, value_set=values).drop_null().to_numpy()
        counts.update(dict(enumerate(np.bincount(places, minlength=len(values)).tolist())))
    return counts


def _group(names: Sequence[str], counts: Counter[int], classes: Classes) -> list[int]:
    """The class of each name: names that differ in case or punctuation are one, called as most images call it."""
    by_key: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        by_key[name_key(name) or name].append(place)
    found = {}
    for label, places in enumerate(by_key.values()):
        best = max(places, key=lambda place: counts[place])
        classes.names.append(names[best])
        found.update(dict.fromkeys(places, label))
        spellings = sorted({names[place] for place in places})
        if len(spellings) > 1:
            listed = " and ".join(map(repr, spellings))
            classes.warnings.append(f"{listed} are read as one class, {names[best]!r}; rename one if they differ")
    return [found[place] for place in range(len(names))]


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

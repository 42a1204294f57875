"""Tables of images as Arrow, however they were written, as the rows of a source.

Images in the tables stay memory-mapped. Images that a table names by path are read only below the folders that are
given: a table from elsewhere may name any file of this machine.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.compute
from datasets import Dataset, Image, concatenate_datasets

from data.classes import CLASS_NAMES, check_official_counts, find_label_column, name_labels, read_cells, read_labels
from data.columns import (
    FIRST_ROWS,
    GROUP_NAMES,
    SPLIT_NAMES,
    are_groups,
    find_image_column,
    find_known,
    find_split_column,
    kind_of,
    list_columns,
    read_split,
    values_of,
)
from data.rows import SPLITS, ImageRow, Reading, Source, allow_incomplete, build_rows
from utils.image_utils import printable
from utils.logging_utils import UserError, some


def read_tables(
    parts: Mapping[str, Dataset],
    reading: Reading,
    where: str,
    roots: Mapping[str, Sequence[Path]],
    beside: Sequence[Path] = (),
    warnings: Sequence[str] = (),
) -> Source:
    """The source that tables are, one for each split; its columns are found in the first of them.

    `where` describes it; `roots`: folders of each split in which files named by path may lie; `beside`: those in which
    a file may give names to numbers; `warnings`: those of who found the tables. Raises UserError in one sentence.
    """
    image, label, by_path = _find_columns(parts, reading, where)
    notes = [] if (image, label) == ("image", "label") else [f"images from column {image}, labels from {label}"]
    texts = {split: read_labels(rows, label, split, where) for split, rows in parts.items()}
    unused = []
    for split in [split for split in list(parts)[1:] if not any(texts[split])]:
        count = len(texts.pop(split))
        unused.append(f"{split} has no labels, so it cannot be scored: its {count:,} images are not used")
    parts = {split: parts[split] for split in texts}
    features = {split: rows.features[label] for split, rows in parts.items()}
    labeling = name_labels(texts, features, reading.class_names, beside, where)
    # From here on, lists have an entry for each row of all splits.
    splits = np.repeat(list(parts), list(map(len, parts.values())))
    labels = np.array([labeling.labels.get(text, -1) for text in chain(*texts.values())], np.int64)
    for split, count in Counter(splits[labels < 0].tolist()).items():
        unused.append(f"{count:,} images of {split} have no label and are not used")
    groups, group_notes = _read_groups(parts, labels)
    written = list(chain(*(_read_paths(rows, image, by_path, where) for rows in parts.values())))
    ids = [printable(Path(path).stem) if path and len(path) < 4096 else "" for path in written]
    if not all(ids) or len({*ids}) < len(ids):
        ids = [f"{split}-{number:06d}" for split, rows in parts.items() for number in range(len(rows))]
    files: list[str] = []
    file_warnings: list[str] = []
    are_files = by_path or (any(written) and all(_has_no_bytes(rows, image).all() for rows in parts.values()))
    if are_files:
        files, file_warnings = _find_files(list(zip(splits, written)), roots, where, reading.allow_missing)
        labels[[not file for file in files]] = -1
    found: dict[str, Dataset] = {}
    for split, rows in parts.items():
        first_row = int(np.argmax(splits == split))
        at = slice(first_row, first_row + len(rows))
        columns = labels[at], ids[at], groups[at]
        table = build_rows(map(ImageRow, files[at], *columns)) if are_files else _stored_rows(rows, image, *columns)
        for name, is_in in (_read_splits(rows) if len(parts) == 1 else {split: True}).items():
            chosen = is_in & (labels[at] >= 0)
            found[name] = table if chosen.all() else table.select(np.flatnonzero(chosen))
    is_official = labeling.names == list(CLASS_NAMES)
    if is_official:
        check_official_counts(found, where)
    return Source(
        found,
        labeling.names,
        where,
        notes=[*notes, *group_notes, *labeling.notes],
        warnings=[*warnings, *labeling.warnings, *unused, *file_warnings],
        is_published=is_official,
    )


def _find_columns(parts: Mapping[str, Dataset], reading: Reading, where: str) -> tuple[str, str, bool]:
    """(column of the images, column of the labels, whether images are named by path), of the first table."""
    first = next(iter(parts.values()))
    image, by_path = find_image_column(first.features, first.data.slice(0, FIRST_ROWS).column, where)
    label = find_label_column(first, image, reading.label_column, where)
    if lacking := next((split for split, rows in parts.items() if image not in rows.features), None):
        raise UserError(
            f"{where}: {lacking} has the columns {list_columns(parts[lacking].features)} and no {image}; write all "
            "splits with the same columns"
        )
    return image, label, by_path


def _stored_rows(rows: Dataset, image: str, labels: np.ndarray, ids: list[str], groups: list[str]) -> Dataset:
    """The images that a table stores, which stay memory-mapped. Without bytes they are empty: no path is opened."""
    table = rows.select_columns([image]).cast_column(image, Image(decode=False))
    table = table if image == "image" else table.rename_column(image, "image")
    table = table.add_column("label", labels).add_column("id", ids)
    table = table.add_column("group", groups) if any(groups) else table
    missing = np.flatnonzero(_has_no_bytes(rows, image))
    if not len(missing):
        return table
    empty = [{**row, "image": {"bytes": b"", "path": None}} for row in table.select(missing)]
    places = np.arange(len(table))
    places[missing] = len(table) + np.arange(len(missing))
    return concatenate_datasets([table, Dataset.from_list(empty, features=table.features)]).select(places)


def _has_no_bytes(rows: Dataset, image: str) -> np.ndarray:
    column = rows.data.column(image)
    if pyarrow.types.is_struct(column.type):
        column = pyarrow.compute.struct_field(column, "bytes")
    return pyarrow.compute.is_null(column).to_numpy()


def _read_paths(rows: Dataset, image: str, by_path: bool, where: str) -> list[str | None]:
    """The path or file name of each image, as written."""
    column = rows.data.column(image)  # in its chunks: combined, images would be copied into memory
    if by_path:
        return values_of(column)
    index = column.type.get_field_index("path") if pyarrow.types.is_struct(column.type) else -1
    if index < 0 or "string" not in str(column.type.field(index).type):
        return [None] * len(rows)
    try:
        return pyarrow.compute.struct_field(column, "path").to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: file names in the column {image} are not UTF-8; write them again") from error


def _read_groups(parts: Mapping[str, Dataset], labels: np.ndarray) -> tuple[list[str], list[str]]:
    """(what tells images of one plant, "" for none; a note of the column that has it)."""
    cells = [(len(rows), _read_known(rows, GROUP_NAMES)) for rows in parts.values()]
    for name in cells[0][1]:
        groups = list(chain(*(known.get(name, [""] * count) for count, known in cells)))
        if are_groups(groups, labels.tolist()):
            return groups, [f"images of one plant have the same value in the column {name}"]
    return [""] * len(labels), []


def _read_splits(rows: Dataset) -> dict[str, np.ndarray]:
    """Which rows of a table that holds all splits are of each, (rows,) bool, by a column of split words; else train."""
    cells = _read_known(rows, SPLIT_NAMES)
    column = find_split_column(cells)
    found = np.array(
        [read_split(column, cell) or "train" for cell in cells[column]] if column else ["train"] * len(rows)
    )
    return {split: found == split for split in SPLITS if split in found} if "train" in found else {"train": found != ""}


def _read_known(rows: Dataset, names: Sequence[str]) -> dict[str, list[str]]:
    """The columns of texts or numbers with these names, the best first."""
    known = find_known(rows.features, names)
    return read_cells(rows, [name for name in known if kind_of(rows.features[name]) in ("text", "number")])


def _find_files(
    written: Sequence[tuple[str, str | None]], roots: Mapping[str, Sequence[Path]], where: str, allow_missing: bool
) -> tuple[list[str], list[str]]:
    """(the file of each path of a split, "" for none; warnings of paths that are not used).

    Raises UserError if files are missing and that is not allowed, or if there is none to use.
    """
    real = {split: [root.resolve() for root in roots[split]] for split in roots}
    found = {(split, path): _find_file(path or "", real[split]) for split, path in {*written}}
    missing = [(key[1] or "")[:200] for key in written if found[key] == ""]
    outside = [(key[1] or "")[:200] for key in written if found[key] is None]
    warnings, is_any = [], any(found.values())
    if outside:
        message = f"{len(outside):,} images are named by paths outside the data set, such as {printable(outside[0])}"
        if not is_any:
            raise UserError(f"{where}: {message}, which are never opened; write paths relative to its folder")
        warnings.append(f"{message}; they are not used")
    if missing:
        message = f"{where}: {len(missing):,} of {len(written) - len(outside):,} images are missing ({some(missing)})"
        warnings.append(allow_incomplete(message, allow_missing and is_any))
    return [found[key] or "" for key in written], warnings


def _find_file(path: str, roots: Sequence[Path]) -> str | None:
    """The file below one of the `roots`, which are resolved; "" if it is missing there, None if it lies elsewhere."""
    found = None
    for root in roots:
        file = root / (path if "/" in path else path.replace("\\", "/"))
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # a loop of links, a NUL in the name
            if not file.resolve().is_relative_to(root):
                continue
            if file.is_file():
                return str(file)
        found = ""
    return found

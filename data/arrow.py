"""Tables of images as Arrow, however they were written, as the rows of a source.

Images in the tables stay memory-mapped. Images that a table names by path are read only below the folders that are
given: a table from elsewhere may name any file of this machine.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute
from datasets import Dataset, Image

from data.classes import CLASS_NAMES, check_official_counts, read_classes
from data.columns import (
    SPLIT_NAMES,
    find_group_column,
    find_image_column,
    find_label_column,
    find_names_column,
    first_values,
    kind_of,
    plain_key,
    values_of,
)
from data.labels import split_of
from data.rows import SPLITS, ImageRow, Reading, Source, build_rows
from utils.image_utils import printable
from utils.logging_utils import UserError


def read_tables(
    parts: Mapping[str, Dataset],
    reading: Reading,
    where: str,
    roots: Mapping[str, Sequence[Path]],
    beside: Sequence[Path] = (),
) -> Source:
    """The source that tables are, one for each split; its columns are found in the first of them.

    `where` describes it; `roots`: folders of each split in which files named by path may lie; `beside`: those in which
    a file may give names to numbers. Raises UserError in one sentence.
    """
    first = next(iter(parts.values()))
    image, by_path = find_image_column(first.features, first_values(first), where)
    label = find_label_column(first, image, reading.label_column, where)
    if kind_of(first.features[label]) == "number" and reading.class_names is None:
        label = find_names_column(first, label, image)
    notes = [] if (image, label) == ("image", "label") else [f"images from column {image}, labels from {label}"]
    warnings: list[str] = []
    group = find_group_column(first)
    if group is not None:
        notes.append(f"images of one plant have the same value in the column {group}")
    parts = _drop_unlabeled(parts, image, label, where, warnings)
    classes = read_classes(parts, label, reading.class_names, beside, where)
    written = {split: _read_paths(rows, image, by_path, where) for split, rows in parts.items()}
    ids = _make_ids(written)
    files = _Files()
    splits = {}
    for split, rows in parts.items():
        labels = classes.labels[split]
        if (labels < 0).any():
            warnings.append(f"{(labels < 0).sum():,} images of {split} have no label and are not used")
        parted = _split_by_column(rows, split, is_alone=len(parts) == 1, labels=labels)
        groups = _read_groups(rows, group)
        if by_path or _are_files(rows, image, written[split]):
            paths = files.find_all(written[split], roots[split])
            for name, chosen in parted.items():
                found = zip(paths, labels.tolist(), ids[split], groups, chosen)
                splits[name] = build_rows(ImageRow(path, *row) for path, *row, use in found if use and path is not None)
            continue
        table = _only_stored(rows, image).add_column("label", labels).add_column("id", ids[split])
        table = table if group is None else table.add_column("group", groups)
        for name, chosen in parted.items():
            splits[name] = table if chosen.all() else table.select(np.flatnonzero(chosen))
    warnings += files.check(where, reading.allow_missing)
    if classes.names == list(CLASS_NAMES):
        check_official_counts(splits, where)
    source = Source(splits, classes.names, where, [*notes, *classes.notes], [*classes.warnings, *warnings])
    return source._replace(is_published=classes.names == list(CLASS_NAMES))


def _drop_unlabeled(
    parts: Mapping[str, Dataset], image: str, label: str, where: str, warnings: list[str]
) -> dict[str, Dataset]:
    """The parts without those, other than the first, that have no labels at all: they cannot be scored."""
    kept: dict[str, Dataset] = {}
    for split, rows in parts.items():
        if image not in rows.features:
            raise UserError(
                f"{where}: {split} has the columns {', '.join(map(printable, rows.features))} and no {image}; write "
                "all splits with the same columns"
            )
        column = rows.data.column(label) if label in rows.features else None
        if kept and (column is None or _is_unknown(column)):
            warnings.append(f"{split} has no labels, so it cannot be scored: its {len(rows):,} images are not used")
        else:
            kept[split] = rows
    return kept


def _is_unknown(labels: pyarrow.ChunkedArray) -> bool:
    """Whether all are missing, or -1 as the hub writes it."""
    if labels.null_count == len(labels):
        return len(labels) > 0
    return pyarrow.types.is_integer(labels.type) and pyarrow.compute.max(labels).as_py() == -1


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


def _make_ids(written: Mapping[str, Sequence[str | None]]) -> dict[str, list[str]]:
    """The image's file name if it is unique in the source for every image, else split and number."""
    stems = {split: [_stem(path) for path in paths] for split, paths in written.items()}
    everywhere = [stem for split in stems for stem in stems[split]]
    if not all(everywhere) or len(set(everywhere)) < len(everywhere):
        return {split: [f"{split}-{index:06d}" for index in range(len(paths))] for split, paths in written.items()}
    return stems


def _stem(path: str | None) -> str:
    return printable(Path(path).stem) if path and len(path) < 4096 else ""


def _read_groups(rows: Dataset, group: str | None) -> list[str]:
    if group not in rows.features:
        return [""] * len(rows)
    values = rows.data.column(group)
    return ["" if value is None else str(value) for value in values_of(values)]


def _are_files(rows: Dataset, image: str, written: Sequence[str | None]) -> bool:
    """Whether the images are files beside the table: a path each, and bytes for none."""
    return any(written) and bool(_has_no_bytes(rows, image).all())


def _has_no_bytes(rows: Dataset, image: str) -> np.ndarray:
    column = rows.data.column(image)
    if pyarrow.types.is_struct(column.type):
        column = pyarrow.compute.struct_field(column, "bytes")
    return pyarrow.compute.is_null(column).to_numpy()


def _only_stored(rows: Dataset, image: str) -> Dataset:
    """The column `image` as images that are not decoded; one without bytes is empty, and no path of it is opened."""
    table = rows.select_columns([image]).cast_column(image, Image(decode=False))
    table = table if image == "image" else table.rename_column(image, "image")
    if not _has_no_bytes(rows, image).any():
        return table
    return table.map(_empty_where_missing, batched=True, batch_size=100, features=table.features)


def _empty_where_missing(batch: dict) -> dict:
    images = [image or {"bytes": None, "path": None} for image in batch["image"]]
    return {"image": [{"bytes": image["bytes"] or b"", "path": image["path"]} for image in images]}


def _split_by_column(rows: Dataset, split: str, is_alone: bool, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Which rows with a label go to each split, by a column of split words if the table is the only one."""
    chosen = {split: labels >= 0}
    for column in rows.column_names if is_alone else ():
        if plain_key(column) in SPLIT_NAMES and kind_of(rows.features[column]) == "text":
            words = values_of(rows.data.column(column))
            splits = {word: split_of(word or "") for word in set(words)}
            if None not in splits.values() and "train" in splits.values():
                found = np.array([splits[word] for word in words])
                return {name: (found == name) & (labels >= 0) for name in SPLITS if name in splits.values()}
    return chosen


class _Files:
    """Files that tables name by path, below the roots alone; what is missing or lies elsewhere is counted."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.outside: list[str] = []
        self.found = 0

    def find_all(self, paths: Sequence[str | None], roots: Sequence[Path]) -> list[str | None]:
        real = [(root, root.resolve()) for root in roots]
        return [self._find(path or "", real) for path in paths]

    def _find(self, path: str, roots: Sequence[tuple[Path, Path]]) -> str | None:
        inside = False
        for root, real_root in roots:
            file = root / (path if "/" in path else path.replace("\\", "/"))
            try:
                is_below = file.resolve().is_relative_to(real_root)
            except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL in the name
                is_below = True
            if is_below and _is_file(file):
                self.found += 1
                return str(file)
            inside |= is_below
        (self.missing if inside else self.outside).append(path)
        return None

    def check(self, where: str, allow_missing: bool) -> list[str]:
        """Warnings of the files that are not used. Raises UserError if any is missing, or all lie elsewhere."""
        warnings = []
        if self.outside:
            count = len(self.outside)
            message = (
                f"{count:,} images are named by paths outside the data set, such as {printable(self.outside[0][:200])}"
            )
            if not self.found:
                raise UserError(f"{where}: {message}, which are never opened; write paths relative to its folder")
            warnings.append(f"{message}; they are not used")
        if self.missing:
            examples = ", ".join(printable(path[:200]) for path in self.missing[:3])
            more = ", ..." if len(self.missing) > 3 else ""
            total = self.found + len(self.missing)
            message = f"{len(self.missing):,} of {total:,} images are missing ({examples}{more})"
            if not allow_missing or not self.found:
                raise UserError(f"{where}: {message}; add them, or continue without them: --allow-missing true")
            warnings.append(f"{message}; continuing without them")
        return warnings


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False

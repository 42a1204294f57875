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

from data.arrow_columns import cells_of, describe, find_image_column, find_label_column, kind_of, names_of, read_labels
from data.class_names import Labeling, name_classes
from data.columns import GROUP_NAMES, SPLIT_NAMES, are_groups, find_known, find_split_column, list_columns, read_split
from data.labels import tidy_name
from data.oxford_flowers import CLASS_NAMES, check_official_counts
from data.rows import SPLITS, Reading, Source, allow_incomplete, build_rows
from utils.image_utils import printable
from utils.logging_utils import UserError, some

MAX_NAME = 200  # characters; longer texts are captions


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
    tables = _Tables(parts, reading, where, warnings)
    tables.read_classes(beside)
    tables.read_groups()
    tables.read_images(roots)
    return tables.build()


class _Tables:
    """The rows of the tables of all splits in one row, and what is found out about them."""

    def __init__(self, parts: Mapping[str, Dataset], reading: Reading, where: str, warnings: Sequence[str]):
        first = next(iter(parts.values()))
        image = find_image_column(first, where)
        label = find_label_column(first, image, reading.label_column, where)
        if lacking := next((split for split, rows in parts.items() if image not in rows.features), None):
            problem = f"{lacking} has the columns {list_columns(parts[lacking].features)} and no {image}"
            raise UserError(f"{where}: {problem}; write all splits with the same columns")
        self.parts, self.where, self.image, self.label = dict(parts), where, image, label
        self.features, self.reading = first.features, reading
        is_plain = (image, label) == ("image", "label")
        self.notes = [] if is_plain else [f"images from column {image}, labels from {label}"]
        self.warnings = list(warnings)

    def read_classes(self, beside: Sequence[Path]) -> None:
        """Set names, and splits and labels of all rows, -1 for none; a later split without labels is excluded."""
        texts = {split: read_labels(rows, self.label, split, self.where) for split, rows in self.parts.items()}
        unused = []
        for split in [split for split in list(texts)[1:] if not any(texts[split])]:
            count = len(texts.pop(split))
            del self.parts[split]
            unused.append(f"{split} has no labels, so it cannot be scored: its {count:,} images are not used")
        labeling = self._name_classes(texts, beside)
        self.names = labeling.names
        self.splits = np.repeat(list(texts), list(map(len, texts.values())))
        self.labels = np.array([labeling.labels.get(text, -1) for text in chain(*texts.values())], np.int64)
        for split, count in Counter(self.splits[self.labels < 0].tolist()).items():
            unused.append(f"{count:,} images of {split} have no label and are not used")
        self.notes += labeling.notes
        self.warnings += [*labeling.warnings, *unused]

    def _name_classes(self, texts: Mapping[str, list[str]], beside: Sequence[Path]) -> Labeling:
        """The classes of labels, `texts` by split. Raises UserError for what is no class, and for nameless numbers."""
        features = [rows.features[self.label] for rows in self.parts.values()]
        kinds = {kind_of(feature) for feature in features}
        if len(kinds) > 1:
            listed = ", ".join(f"{split}: {describe(feature)}" for split, feature in zip(texts, features))
            problem = f"the column of labels differs between the splits ({listed}); write all alike"
            raise UserError(f"{self.where}: {problem}")
        counts = Counter(chain(*texts.values()))
        is_number = kinds == {"number"}
        as_number = is_number and not {"true", "false"} & {*counts}
        written = sorted(filter(tidy_name, counts), key=int if as_number else tidy_name)
        if kinds == {"class"} and len({tuple(feature.names) for feature in features}) == 1:
            written = names_of(features[0])  # in their order, those without an image as well
        longest = max(map(len, written), default=0)
        if not written or longest > MAX_NAME:
            what = f"texts of up to {longest:,} characters, which are no class names" if written else "no labels"
            raise UserError(f"{self.where}: the column of labels holds {what}; name another: --label-column")
        if as_number and self.reading.class_names is None and written[-1] == "101" and not written[0].startswith("-"):
            warning = "the labels have no names; they are taken as the 102 of Oxford Flowers"
            return Labeling(list(CLASS_NAMES), {str(number): number for number in range(102)}, warnings=[warning])
        labeling = name_classes(written, self.reading.class_names, beside, counts)
        if is_number and labeling.table is None:
            problem = f"the labels are numbers without names ({written[0]} to {written[-1]})"
            move = "give a json or csv file of number and name: --class-names FILE, or write them as a ClassLabel"
            raise UserError(f"{self.where}: {problem}; {move}")
        return labeling

    def read_groups(self) -> None:
        """Set what tells images of one plant, "" for none, by the first column of such a name that does."""
        self.groups = [""] * len(self.labels)
        for name in find_known(self.features, GROUP_NAMES):
            groups = self._read(name)
            if are_groups(groups, self.labels.tolist()):
                self.groups = groups
                self.notes.append(f"images of one plant have the same value in the column {name}")
                return

    def _read(self, column: str) -> list[str]:
        return [*chain(*(cells_of(rows, column) for rows in self.parts.values()))]

    def read_images(self, roots: Mapping[str, Sequence[Path]]) -> None:
        """Set ids and rows; images named by path become files. Raises UserError if some are missing."""
        tables = [rows.select_columns(self.image).rename_columns({self.image: "image"}) for rows in self.parts.values()]
        images = concatenate_datasets([rows.cast_column("image", Image(decode=False)) for rows in tables])
        column = images.data.column("image")  # in its chunks: combined, images would be copied into memory
        is_empty = pyarrow.compute.is_null(pyarrow.compute.struct_field(column, "bytes")).to_numpy()
        try:
            paths = pyarrow.compute.struct_field(column, "path").to_pylist()
        except UnicodeDecodeError as error:
            problem = f"file names in the column {self.image} are not UTF-8; write them again"
            raise UserError(f"{self.where}: {problem}") from error
        ids = [printable(Path(path).stem) if path and len(path) < 4096 else "" for path in paths]
        if not all(ids) or len({*ids}) < len(ids):
            ids = [f"{split}-{number:06d}" for split, rows in self.parts.items() for number in range(len(rows))]
        if any(paths) and is_empty.all():
            files = self._find_files(paths, roots)
            self.labels[[not file for file in files]] = -1
            self.rows = build_rows(zip(files, self.labels, ids, self.groups))
            return
        rows = images.add_column("label", self.labels).add_column("id", ids)
        rows = rows.add_column("group", self.groups) if any(self.groups) else rows
        self.rows = _empty_images(rows, np.flatnonzero(is_empty))

    def _find_files(self, paths: Sequence[str | None], roots: Mapping[str, Sequence[Path]]) -> list[str]:
        """The file of each image, "" for none, also of an image without a label."""
        keys = [(split, path or "") for split, path in zip(self.splits.tolist(), paths)]
        used = [key for key, label in zip(keys, self.labels) if label >= 0]
        real = {split: [root.resolve() for root in roots[split]] for split in self.parts}
        found = {(split, path): _find_file(path, real[split]) for split, path in {*used}}
        missing = [path[:200] for split, path in used if found[split, path] == ""]
        outside = [path[:200] for split, path in used if found[split, path] is None]
        is_any = any(found.values())
        if outside:
            count = f"{len(outside):,} images"
            message = f"{count} are named by paths outside the data set, such as {printable(outside[0])}"
            if not is_any:
                move = "which are never opened; write paths relative to its folder"
                raise UserError(f"{self.where}: {message}, {move}")
            self.warnings.append(f"{message}; they are not used")
        if missing:
            count = f"{len(missing):,} of {len(used) - len(outside):,} images"
            message = f"{self.where}: {count} are missing ({some(missing)})"
            self.warnings.append(allow_incomplete(message, self.reading.allow_missing and is_any))
        return [found.get(key) or "" for key in keys]

    def build(self) -> Source:
        """The source of the images that have a label."""
        splits = self.splits
        cells = {name: self._read(name) for name in find_known(self.features, SPLIT_NAMES)}
        if len(self.parts) == 1 and (column := find_split_column(cells)):
            words = [read_split(column, cell) or "train" for cell in cells[column]]
            splits = np.array(words) if "train" in words else splits
        found = {
            split: self.rows.select(np.flatnonzero((splits == split) & (self.labels >= 0)))
            for split in SPLITS
            if split in splits
        }
        is_official = self.names == list(CLASS_NAMES)
        if is_official:
            check_official_counts(found, self.where)
        return Source(found, self.names, self.where, self.notes, self.warnings, is_published=is_official)


def _empty_images(rows: Dataset, numbers: np.ndarray) -> Dataset:
    """The rows with these images empty: no path of an image that the table does not store is opened."""
    if not len(numbers):
        return rows
    empty = [{**row, "image": {"bytes": b"", "path": None}} for row in rows.select(numbers)]
    places = np.arange(len(rows))
    places[numbers] = len(rows) + np.arange(len(numbers))
    return concatenate_datasets([rows, Dataset.from_list(empty, features=rows.features)]).select(places)


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

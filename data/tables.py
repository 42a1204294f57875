"""Tables that label images: which column is the file, the label, the split and the plant, and what its rows give.

csv, tsv, JSON and JSON lines; Hugging Face's metadata files, exports of iNaturalist and GBIF, Roboflow's and Kaggle's
columns of 0 and 1. Every image is one that the survey found: no path leads out of the folder.
"""

import contextlib
import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data import columns
from data.image_index import WAYS, ImageIndex, find_file_column, index_folder
from data.labels import name_key, split_of
from data.records import ADDRESS, Records, open_records
from data.survey import Excluded, Folder
from utils.image_utils import printable
from utils.logging_utils import UserError

MAX_TABLES = 50  # of a folder; others would be notes beside images
SEVERAL = "whose file name several images have"


class LabelRow(NamedTuple):
    path: str
    class_name: str  # as written
    id: str  # path below the folder
    split: str  # train, validation or test; "" if the table does not say it
    group: str  # what images of one plant share, or ""


@dataclass
class LabelTable:
    rows: list[LabelRow]
    notes: list[str]
    warnings: list[str] = field(default_factory=list)


# ---- tables of a folder


def find_label_tables(folder: Folder) -> list[Path]:
    """The tables in a folder, its split folders and folders without images that label at least half of its images, or
    give an image in at least half of their rows; and those of a split without labels beside them.
    """
    index = index_folder(folder)
    places = [folder, *(child for child in folder.folders if split_of(child.name) or not child.num_images)]
    with_labels, bare = list[Path](), list[Path]()
    for path in [path for place in places for path in _own_tables(place)][:MAX_TABLES] if index.paths else ():
        with contextlib.suppress(UserError):  # not given by the user: another file of his
            table = ImageTable(path, index, Excluded(folder.path))
            is_of_folder = max(table.file.share_of_rows, table.file.share_of_images) >= 0.5
            if is_of_folder and table.has_labels():
                with_labels.append(path)
            elif is_of_folder and table.split:
                bare.append(path)
    return with_labels + bare if with_labels else []


def _own_tables(folder: Folder) -> list[Path]:
    names = sorted(name for name in folder.files.get("table", ()) if "submission" not in name.lower())
    notes = {name for name in names if name.lower().endswith(".txt")}  # many: one beside each image
    return [folder.path / name for name in names if name not in notes or len(notes) <= 20]


def read_label_tables(
    tables: Sequence[Path], folder: Folder, label_column: str | None, part: tuple[str, str] | None = None
) -> LabelTable:
    """The images of a folder that tables label, such as train.csv and val.csv.

    `label_column`: None where the tables themselves tell it. A table without labels, or without images of the folder,
    is not used, with a warning, if others can be. `part`: the folder below, such as "test/", whose images alone are
    asked for, and its split. Raises UserError if none can be read, has an image of the folder and a label, or if
    several columns may be meant.
    """
    index = index_folder(folder)
    if not index.paths:
        raise UserError(f"{tables[0]}: there are no images in {folder.path} and below; put the table beside its images")
    read, problems, excluded = list[ImageTable](), list[UserError](), Excluded(folder.path)
    for path in tables:
        try:
            table = ImageTable(path, index, excluded)
            table.read_rows(label_column)
            read.append(table)
        except UserError as error:
            problems.append(error)
    if not read:
        raise problems[0]
    if part is not None:
        for table in read:
            table.keep_part(*part)
    rows = _merge(read, excluded)
    for number, image in enumerate(index.paths):
        if number not in index.seen and image.startswith(part[0] if part else ""):
            excluded.add("images without a row in a table", image)
    warnings = [*(f"not used: {error}" for error in problems), *excluded.lines()]
    return LabelTable(rows, _describe(read, rows), warnings)


class ImageTable:
    """A table, and the rows of it that label images of a folder."""

    def __init__(self, path: Path, index: ImageIndex, excluded: Excluded):
        """Raises UserError for a table that gives no images of the folder."""
        self.path, self.index, self.excluded = path, index, excluded
        self.name = printable(os.path.relpath(path, excluded.root))
        self.records = open_records(path)
        file = find_file_column(self.records, index)
        if file and index.find(file.name, (file.way,)):  # not picture, of files that are p1/picture.jpg, ...
            self.records = open_records(path, has_header=False)  # the first row has no suffix that tells it
            file = file._replace(name=self.records.columns[file.number])
        if not file or (file.way in WAYS[2:] and max(file.share_of_rows, file.share_of_images) < 0.1):
            raise UserError(f"{path}: no column gives images in {excluded.root} {_explain_columns(self.records)}")
        self.file = file
        self.sample = sample = self.records.sample(without=file.name)
        self.split, self.split_column = columns.split_of_file(path, excluded.root), columns.find_split_column(sample)
        if self.split in ("validation", "test") and columns.plain_name(self.split_column or "").startswith("is"):
            self.split_column = None  # is_valid of test.csv may tell good images; that of train.csv tells splits
        of_plants = [*columns.find_known(sample, columns.GROUP_NAMES), file.name if file.way == "observation" else None]
        self.group_column = of_plants[0]
        self.one_hot = columns.find_one_hot_columns(sample)
        genus, species = (columns.find_known(sample, [name]) for name in ("genus", "species"))
        are_epithets = bool(genus and species) and all(re.fullmatch(r"[a-z-]*", cell) for cell in sample[species[0]])
        self.binomial = [*genus, *species] if are_epithets else []  # the columns that are one name together
        self.labels: list[str] = []  # the label column, then others that may be meant
        self.rows: list[tuple[int, LabelRow]] = []  # (number of the image, its row)

    def has_labels(self) -> bool:
        """Whether it may label images; one with another name for each number tells what classes are called."""
        if "label" in self.sample and not any(self.sample["label"]):
            return False  # as of COCO's boxes
        candidates = [self.sample[name] for name in columns.find_label_candidates(self.sample)]
        if self.one_hot or self.file.way in WAYS[:2] or self.split:
            return bool(self.one_hot or candidates)
        return any(len({*cells}) < len(cells) for cells in candidates)

    def read_rows(self, label_column: str | None) -> None:
        """Set the label column and the rows. Raises UserError."""
        matches = self.match_rows()
        first = list(itertools.islice(matches, columns.LABEL_ROWS))
        if not first:
            example = printable(self.excluded.places[f"rows of {self.name} {SEVERAL}"][0])
            problem = f"several images have the file names in column {printable(self.file.name)}, such as {example}"
            move = "write the folder into the column, or move one of them elsewhere"
            raise UserError(f"{self.path}: {problem}; {move}")
        names = [name for name in first[0][1] if name != self.file.name or label_column is not None]
        cells = {name: [row[name] for _, row in first] for name in names}
        self.labels = columns.find_label(cells, self.records.columns, label_column, str(self.path))
        for images, row in itertools.chain(first, matches):
            label, split = sys.intern(row[self.labels[0]]), self._read_split(row)
            group = row[self.group_column] if self.group_column is not None else ""
            for image in images:
                path = self.index.paths[image]
                if label in columns.MISSING:
                    why = "without a 1, or with several" if self.labels[0] == columns.ONE_HOT else "without label"
                    self.excluded.add(f"rows of {self.name} {why}", path)
                    continue
                if self.split_column is None and not self.split:
                    split = next(filter(None, map(split_of, path.split("/")[:-1])), "")
                row_of_image = LabelRow(f"{self.excluded.root}/{path}", label, printable(path), split, group)
                self.rows.append((image, row_of_image))

    def _read_split(self, row: Mapping[str, str]) -> str:
        split = columns.read_split(self.split_column, row[self.split_column]) if self.split_column else ""
        return split or self.split

    def match_rows(self) -> Iterator[tuple[list[int], dict[str, str]]]:
        """(its images, its cells by column) for each row that has an image."""
        way, near = self.file.way, self.name.rpartition("/")[0]
        near = f"{near}/" if near and not near.startswith("..") else ""
        for cells in self.records.rows():
            cell = cells[self.file.number]
            images = self.index.find(cell, (way,)).get(way, [])
            if not images:
                self.excluded.add(f"rows of {self.name} whose file is not there", cell or "an empty cell")
                continue
            row = self._read_row(cells)
            if way != "observation" and len(images) > 1:
                images = self.index.narrow(images, cell, near, self._read_split(row))
                if len(images) > 1:
                    self.excluded.add(f"rows of {self.name} {SEVERAL}", cell)
                    continue
            self.index.seen.update(images)
            yield images, row

    def _read_row(self, cells: Sequence[str]) -> dict[str, str]:
        """Cells by column; columns of 0 and 1 are one more, and an epithet is with its genus."""
        row = dict(zip(self.records.columns, cells))
        if self.one_hot:
            ones = [name for name in self.one_hot if row[name] in columns.ONES]
            row[columns.ONE_HOT] = ones[0] if len(ones) == 1 else ""
        if self.binomial and row[self.binomial[1]] not in columns.MISSING:
            row[self.binomial[1]] = " ".join(row[name] for name in self.binomial)
        return row

    def keep_part(self, folder: str, split: str) -> None:
        """Keep the rows of the images in a folder such as "test/" that are of its split, or say none."""
        rows, self.rows = self.rows, []
        for image, row in rows:
            is_inside, is_of_split = self.index.paths[image].startswith(folder), row.split in ("", split)
            if is_inside and is_of_split:
                self.rows.append((image, row))
            elif is_inside:
                self.excluded.add(f"rows of {self.name} of another split than {split}", row.id)
            elif row.split == split:
                self.excluded.add(f"rows of {self.name} whose file is not in {printable(folder)}", row.id)


def _explain_columns(records: Records) -> str:
    move = "put the table of these images beside them"
    sample = records.sample(20)
    if address := next((name for name, cells in sample.items() if any(map(ADDRESS.match, cells))), None):
        move = f"column {printable(address)[:40]} holds addresses: download the images, with names that another has"
    holds = "such a column holds paths, file names, or file names without their suffix"
    return f"(columns: {columns.list_columns(records.columns)}); {holds}; {move}"


# ---- rows


def _merge(tables: Sequence[ImageTable], excluded: Excluded) -> list[LabelRow]:
    """A row for each image that has one label. Raises UserError if most have two."""
    rows: dict[int, LabelRow] = {}
    conflicts: dict[int, str] = {}
    for table in tables:
        for image, row in table.rows:
            known = rows.setdefault(image, row)
            if known.class_name != row.class_name and name_key(known.class_name) != name_key(row.class_name):
                conflicts[image] = f"{row.id}: {known.class_name}, {row.class_name}"
            elif known.split and row.split and known.split != row.split:
                conflicts[image] = f"{row.id}: {known.split}, {row.split}"
            elif known is not row:
                rows[image] = known._replace(split=known.split or row.split, group=known.group or row.group)
    if len(conflicts) * 2 > len(rows):
        listed = " and ".join(table.name for table in tables)
        example = printable(next(iter(conflicts.values())))[:200]
        if {"xmin", "bbox"} & {columns.plain_name(column) for table in tables for column in table.records.columns}:
            problem = f"lists boxes, several of an image ({example}), which has no class of its own"
            raise UserError(f"{listed}: {problem}; cut the boxes out into <class name>/photo.jpg")
        problem = f"{len(conflicts):,} of {len(rows):,} images have several labels or splits ({example})"
        move = "give one table (--dataset TABLE), or another column (--label-column NAME)"
        raise UserError(f"{listed}: {problem}; {move}")
    for conflict in conflicts.values():
        excluded.add("images with several labels or splits", conflict)
    kept = [rows[image] for image in sorted(rows) if image not in conflicts]
    # Splits only where there are several, and then for all rows; groups only where they tell plants.
    has_splits = len({row.split for row in kept} - {""}) > 1
    has_groups = columns.are_groups([row.group for row in kept], [row.class_name for row in kept])
    return [
        row._replace(split=(row.split or "train") if has_splits else "", group=row.group if has_groups else "")
        for row in kept
    ]


def _describe(tables: Sequence[ImageTable], rows: Sequence[LabelRow]) -> list[str]:
    first, listed = tables[0], ", ".join(table.name for table in tables)
    others = [printable(name) for name in first.labels[1:] if name != columns.ONE_HOT]
    source = f"column {printable(first.labels[0])}" if first.labels[0] != columns.ONE_HOT else "the columns of 0 and 1"
    more = f"; others: {', '.join(others)} (--label-column)" if others else ""
    notes = [f"labels from {source} of {listed}{more}"]
    kinds = {"stem": "file names without suffix", "observation": "observations, with several images each"}
    if kind := kinds.get(first.file.way):
        notes.append(f"images by column {printable(first.file.name)}, which holds {kind}")
    if any(row.split for row in rows):
        place = f"column {first.split_column}" if first.split_column else "the tables" if first.split else "the folders"
        notes.append(f"splits from {place}")
    if any(row.group for row in rows):
        notes.append(f"images of one plant by column {printable(first.group_column or '')}")
    return notes

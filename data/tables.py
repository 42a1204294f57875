"""Tables that label images: which column is the file, the label, the split and the plant, and what its rows give.

csv, tsv, JSON and JSON lines; Hugging Face's metadata files, exports of iNaturalist and GBIF, Roboflow's and Kaggle's
columns of 0 and 1. Every image is one that the survey found: no path leads out of the folder.
"""

import functools
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.image_index import SAMPLE_ROWS, WAYS, FileColumn, ImageIndex, find_file_column, index_folder
from data.label_columns import (
    GROUP_COLUMNS,
    ONE_HOT,
    ONES,
    choose_label,
    find_columns,
    find_given_column,
    find_label_candidates,
    find_one_hot_columns,
    find_split_column,
    list_columns,
    read_split,
)
from data.labels import name_key, split_of
from data.records import ADDRESS, Records, open_records
from data.survey import Folder
from utils.image_utils import printable
from utils.logging_utils import UserError

MAX_TABLES = 50  # of a folder; others would be notes beside images


@dataclass
class LabelTable:
    rows: list["LabelRow"]
    label_column: str
    file_column: str
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class LabelRow(NamedTuple):
    path: str
    class_name: str  # as written
    id: str  # path below the folder
    split: str  # train, validation or test; "" if the table does not say it
    group: str  # what images of one plant share, or ""


# ---- tables of a folder


def find_label_tables(folder: Folder) -> list[Path]:
    """The tables in a folder, its split folders and folders without images that label at least half of its images, or
    give an image in at least half of their rows; and those of a split without labels beside them.
    """
    index = index_folder(folder)
    below = [child for child in folder.folders if split_of(child.name) or not child.num_images]
    paths = [path for place in [folder, *below] for path in _own_tables(place)]
    labelled: list[Path] = []
    unlabelled: list[Path] = []
    for path in paths[:MAX_TABLES] if index.paths else ():
        try:
            records = open_records(path)
            file = find_file_column(records, index)
            if file and max(file.share_of_rows, file.share_of_images) >= 0.5:
                rows = itertools.islice(records.rows(), SAMPLE_ROWS)
                (labelled if find_label_candidates(records.columns, list(rows), file.number) else unlabelled).append(
                    path
                )
        except UserError:  # not given by the user: another file of his
            continue
    return labelled + [path for path in unlabelled if _split_of_table(path, folder.path)] if labelled else []


def _own_tables(folder: Folder) -> list[Path]:
    names = sorted(name for name in folder.files.get("table", ()) if "submission" not in name.lower())
    notes = {name for name in names if name.lower().endswith(".txt")}  # many: one beside each image
    return [folder.path / name for name in names if name not in notes or len(notes) <= 20]


def _split_of_table(table: Path, root: Path) -> str:
    """The split that the name of a table, or of a folder below `root` that it lies in, tells; or ""."""
    stem = re.sub(r"labels?|meta_?data|annotations?|list|info|ground_?truth", "", table.stem.lower())
    folders = table.parent.relative_to(root).parts if table.is_relative_to(root) else ()
    return next(filter(None, map(split_of, (stem, *reversed(folders)))), "")


def read_label_table(table: Path, folder: Folder, label_column: str | None) -> LabelTable:
    """The images of a folder that a table labels. `label_column`: None where the table itself tells it.

    Raises UserError if the table cannot be read, has no image of the folder, or no label, or several that may be meant.
    """
    return read_label_tables([table], folder, label_column)


def read_label_tables(tables: Sequence[Path], folder: Folder, label_column: str | None) -> LabelTable:
    """The same of several tables, such as train.csv and val.csv: a table's split is in its name or its folder's.

    A table without labels, or without images of the folder, is not used, with a warning, if others can be.
    """
    index = index_folder(folder)
    if not index.paths:
        raise UserError(f"{tables[0]}: there are no images in {folder.path} and below; put the table beside its images")
    contents, warnings, problems = [], [], []
    for table in tables:
        try:
            content = _read_content(table, folder.path, index, label_column)
            _choose_label(content)
        except UserError as error:
            problems.append(error)
            warnings.append(f"{_name(table, folder.path)} is not used: {error}")
        else:
            contents.append(content)
    if not contents:
        raise problems[0]
    rows = _merge(contents, index, folder.path, warnings)
    seen = {number for content in contents for number in content.images}
    if missing := [path for number, path in enumerate(index.paths) if number not in seen]:
        _warn(warnings, len(missing), "images have no row in the table, and are not used", missing)
    notes = _describe(contents, folder.path, rows)
    return LabelTable(rows, contents[0].label_column, contents[0].file_column, notes, warnings)


def _name(table: Path, root: Path) -> str:
    return printable(os.path.relpath(table, root))


def _warn(warnings: list[str], count: int, text: str, examples: Iterable[str]) -> None:
    listed = ", ".join(printable(example)[:100] for example in itertools.islice(examples, 3))
    warnings.append(f"{count:,} {text} ({listed}{', ...' if count > 3 else ''})")


# ---- a table


@dataclass
class _Content:
    """What is kept of a table: a cell of each column in `cells` for each image in `images`."""

    table: Path
    columns: list[str]
    file: FileColumn
    images: list[int] = field(default_factory=list)
    cells: dict[int, list[str]] = field(default_factory=dict)
    split: str = ""  # of all rows
    split_column: int | None = None
    group_column: int | None = None
    candidates: list[int] = field(default_factory=list)  # columns that may be the label
    label_number: int = 0
    others: list[str] = field(default_factory=list)  # columns that may be meant as well
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason -> first three cells
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def file_column(self) -> str:
        return self.columns[self.file.number]

    @property
    def label_column(self) -> str:
        return "(one for each class)" if self.label_number == ONE_HOT else self.columns[self.label_number]

    def read_split(self, row: Sequence[str] | Mapping[int, str]) -> str:
        return "" if self.split_column is None else read_split(self.columns[self.split_column], row[self.split_column])

    def skip(self, reason: str, cell: str) -> None:
        self.counts[reason] += 1
        if len(self.skipped[reason]) < 3:
            self.skipped[reason].append(cell)


def _read_content(table: Path, root: Path, index: ImageIndex, label_column: str | None) -> _Content:
    records = open_records(table)
    file = find_file_column(records, index)
    if file and next(index.find(records.columns[file.number]), None):  # the first row has no suffix that tells it
        records = open_records(table, has_header=False)
    if not file or (file.way in WAYS[2:] and max(file.share_of_rows, file.share_of_images) < 0.1):
        raise _no_file_column(records, root)
    sample = list(itertools.islice(records.rows(), SAMPLE_ROWS))
    content = _Content(table, records.columns, file, split=_split_of_table(table, root))
    content.split_column = find_split_column(records.columns, sample)
    content.group_column = next((n for n in find_columns(records.columns, GROUP_COLUMNS) if n != file.number), None)
    if label_column is not None:
        labels = [find_given_column(table, records.columns, label_column)]
    else:
        labels = find_label_candidates(records.columns, sample, file.number)
    content.candidates = labels
    genus = find_columns(records.columns, ["genus"])
    kept = [*labels, content.split_column, content.group_column, *genus]
    content.cells = {n: [] for n in kept if n is not None}
    one_hot = find_one_hot_columns(sample, file.number) if ONE_HOT in labels else []
    _fill(content, records, root, index, one_hot)
    return content


def _fill(content: _Content, records: Records, root: Path, index: ImageIndex, one_hot: Sequence[int]) -> None:
    """The images and cells of a content, row by row."""
    near = _plain_folder(content.table.parent, root)
    same: dict[str, str] = {}  # equal cells are one string
    column, way = content.file.number, content.file.way
    if way == "observation" and content.group_column is None:
        content.group_column = column
        content.cells[column] = []
    for row in records.rows():
        cell = row[column]
        split = content.split or content.read_split(row)
        images = dict(index.find(cell, (way,))).get(way, [])
        if way != "observation" and len(images) > 1:
            images = index.narrow(images, cell, near, split)
            if len(images) > 1:
                content.skip("give a file name that several images have, and are not used", cell)
                continue
        if not images:
            content.skip("give a file that is not there", cell or "an empty cell")
            continue
        if one_hot:
            ones = [n for n in one_hot if row[n] in ONES]
            row = [*row, content.columns[ones[0]] if len(ones) == 1 else ""]  # ONE_HOT is the last
        for image in images:
            content.images.append(image)
            for n, kept in content.cells.items():
                kept.append(same.setdefault(row[n], row[n]))


def _plain_folder(folder: Path, root: Path) -> str:
    return f"{folder.relative_to(root).as_posix()}/".removeprefix("./") if folder.is_relative_to(root) else ""


def _no_file_column(records: Records, root: Path) -> UserError:
    sample = list(itertools.islice(records.rows(), 20))
    address = next((records.columns[n] for row in sample for n, cell in enumerate(row) if ADDRESS.match(cell)), None)
    move = (
        f"column {printable(address)[:40]} holds addresses: download the images, with names that another column holds"
        if address
        else "give the table that names them, beside its images"
    )
    return UserError(
        f"{records.path}: no column gives images in {root} (columns: {list_columns(records.columns)}); such a column "
        f"holds paths, file names, or file names without their suffix; {move}"
    )


def _choose_label(content: _Content) -> None:
    """Set the label column of a content, and the others that may be meant. Raises UserError."""
    cells = content.cells
    best = choose_label(content.table, content.columns, {n: cells[n] for n in content.candidates})
    content.label_number, content.others = best.number, best.others
    genus = find_columns(content.columns, ["genus"])
    labels = cells[best.number]
    is_species = bool(genus) and best.number in find_columns(content.columns, ["species"])
    if is_species and all(re.fullmatch(r"[a-z-]+", epithet) for epithet in {*labels} - {""}):
        cells[best.number] = [f"{first} {second}" if second else "" for first, second in zip(cells[genus[0]], labels)]


# ---- rows


def _merge(contents: Sequence[_Content], index: ImageIndex, root: Path, warnings: list[str]) -> list[LabelRow]:
    """A row for each image that has one label; what is not used goes to `warnings`. UserError if most have two."""
    rows: dict[int, LabelRow] = {}
    conflicts: dict[int, str] = {}
    for content in contents:
        for position, image in enumerate(content.images):
            row = _read_row(content, position, index.paths[image], root)
            if not row.class_name:
                content.skip("have no 1, or several" if content.label_number == ONE_HOT else "have no label", row.id)
                continue
            known = rows.setdefault(image, row)
            if name_key(known.class_name) != name_key(row.class_name):
                conflicts[image] = f"{row.id}: {known.class_name}, {row.class_name}"
            elif known.split and row.split and known.split != row.split:
                conflicts[image] = f"{row.id}: {known.split}, {row.split}"
            else:
                rows[image] = known._replace(split=known.split or row.split, group=known.group or row.group)
        for reason, count in content.counts.items():
            _warn(warnings, count, f"rows of {_name(content.table, root)} {reason}", content.skipped[reason])
    if len(conflicts) * 2 > len(rows):
        listed = " and ".join(_name(content.table, root) for content in contents)
        example = printable(next(iter(conflicts.values())))[:200]
        raise UserError(
            f"{listed}: {len(conflicts):,} of {len(rows):,} images have several labels or splits ({example}); give one "
            "table (--dataset TABLE), or another column (--label-column NAME)"
        )
    if conflicts:
        _warn(warnings, len(conflicts), "images have several labels or splits, and are not used", conflicts.values())
    return _tidy([rows[image] for image in sorted(rows) if image not in conflicts])


def _read_row(content: _Content, position: int, path: str, root: Path) -> LabelRow:
    cells = {n: column[position] for n, column in content.cells.items()}
    split = content.split or content.read_split(cells)
    if content.split_column is None:
        split = split or _split_of_folders(path)
    group = "" if content.group_column is None else cells[content.group_column]
    return LabelRow(f"{root}/{path}", cells[content.label_number], printable(path), split, group)


@functools.lru_cache(maxsize=1000)
def _split_of_parts(folder: str) -> str:
    return next(filter(None, map(split_of, folder.split("/"))), "")


def _split_of_folders(path: str) -> str:
    return _split_of_parts(path.rpartition("/")[0])


def _tidy(rows: list[LabelRow]) -> list[LabelRow]:
    """Splits only where there are several, and then for all rows; groups only where one has several images."""
    splits = {row.split for row in rows} - {""}
    groups = Counter(row.group for row in rows)
    has_groups = len(groups) > 1 and any(count > 1 for group, count in groups.items() if group)
    return [
        row._replace(split=(row.split or "train") if len(splits) > 1 else "", group=row.group if has_groups else "")
        for row in rows
    ]


def _describe(contents: Sequence[_Content], root: Path, rows: Sequence[LabelRow]) -> list[str]:
    first = contents[0]
    tables = ", ".join(_name(content.table, root) for content in contents)
    if first.label_number == ONE_HOT:
        notes = [f"labels from the columns of 0 and 1 of {tables}"]
    else:
        others = f"; others: {', '.join(map(printable, first.others))} (--label-column)" if first.others else ""
        notes = [f"labels from column {printable(first.label_column)} of {tables}{others}"]
    kinds = {"stem": "file names without suffix", "observation": "observations, with several images each"}
    if first.file.way in kinds:
        notes.append(f"images by column {printable(first.file_column)}, which holds {kinds[first.file.way]}")
    if any(row.split for row in rows):
        column = first.split_column
        where = (
            f"column {first.columns[column]}" if column is not None else "the tables" if first.split else "the folders"
        )
        notes.append(f"splits from {where}")
    if any(row.group for row in rows) and first.group_column is not None:
        notes.append(f"images of one plant by column {printable(first.columns[first.group_column])}")
    return notes

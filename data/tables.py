"""Tables that label images: which column is the file, the label, the split and the plant, and what its rows give.

csv, tsv, JSON and JSON lines; Hugging Face's metadata files, exports of iNaturalist and GBIF, Roboflow's and Kaggle's
columns of 0 and 1. Every image is one that the survey found: no path leads out of the folder.
"""

import functools
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.image_index import SAMPLE_ROWS, WAYS, FileColumn, ImageIndex, find_file_column, index_folder, plain_column
from data.label_columns import ONE_HOT, find_label_candidates
from data.labels import name_key, split_of
from data.records import Records, open_records
from data.survey import Folder
from data.table_content import Content, choose_label_of, read_content, split_of_table
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
    with_labels: list[Path] = []
    bare: list[Path] = []
    for path in paths[:MAX_TABLES] if index.paths else ():
        try:
            records = open_records(path)
            file = find_file_column(records, index)
            if file and max(file.share_of_rows, file.share_of_images) >= 0.5:
                (with_labels if _has_labels(records, file, folder.path) else bare).append(path)
        except UserError:  # not given by the user: another file of his
            continue
    return with_labels + [path for path in bare if split_of_table(path, folder.path)] if with_labels else []


def _has_labels(records: Records, file: FileColumn, root: Path) -> bool:
    """Whether a table may label images; one with another name for each number tells what classes are called."""
    sample = list(itertools.islice(records.rows(), SAMPLE_ROWS))
    if "label" in records.columns and not any(row[records.columns.index("label")] for row in sample):
        return False  # as of COCO's boxes
    candidates = find_label_candidates(records.columns, sample, file.number)
    repeated = any(n == ONE_HOT or len({row[n] for row in sample}) < len(sample) for n in candidates)
    is_plain = file.way in WAYS[:2] or split_of_table(records.path, root)
    return bool(candidates) if is_plain else repeated


def _own_tables(folder: Folder) -> list[Path]:
    names = sorted(name for name in folder.files.get("table", ()) if "submission" not in name.lower())
    notes = {name for name in names if name.lower().endswith(".txt")}  # many: one beside each image
    return [folder.path / name for name in names if name not in notes or len(notes) <= 20]


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
    seen: set[int] = set()
    for table in tables:
        try:
            content = read_content(table, folder.path, index, label_column)
            seen.update(content.images)
            choose_label_of(content)
        except UserError as error:
            problems.append(error)
            warnings.append(f"not used: {_name(table, folder.path)} ({error})")
        else:
            contents.append(content)
    if not contents:
        raise problems[0]
    rows = _merge(contents, index, folder.path, warnings)
    if missing := [path for number, path in enumerate(index.paths) if number not in seen]:
        tables_or_table = "tables" if len(tables) > 1 else "table"
        text = f"image{'s' if len(missing) > 1 else ''} without a row in the {tables_or_table}"
        warnings.append(_not_used(len(missing), text, missing))
    notes = _describe(contents, folder.path, rows)
    return LabelTable(rows, contents[0].label_column, contents[0].file_column, notes, warnings)


def _name(table: Path, root: Path) -> str:
    return printable(os.path.relpath(table, root))


def _not_used(count: int, text: str, examples: Iterable[str]) -> str:
    listed = ", ".join(printable(example)[:100] for example in itertools.islice(examples, 3))
    return f"not used: {count:,} {text} ({listed}{', ...' if count > 3 else ''})"


# ---- rows


def _merge(contents: Sequence[Content], index: ImageIndex, root: Path, warnings: list[str]) -> list[LabelRow]:
    """A row for each image that has one label; what is not used goes to `warnings`. UserError if most have two."""
    rows: dict[int, LabelRow] = {}
    conflicts: dict[int, str] = {}
    for content in contents:
        for position, image in enumerate(content.images):
            row = _read_row(content, position, index.paths[image], root)
            if not row.class_name:
                content.skip(
                    "without label" if content.label_number != ONE_HOT else "without a 1, or with several", row.id
                )
                continue
            known = rows.setdefault(image, row)
            if known is row:
                continue
            if known.class_name != row.class_name and name_key(known.class_name) != name_key(row.class_name):
                conflicts[image] = f"{row.id}: {known.class_name}, {row.class_name}"
            elif known.split and row.split and known.split != row.split:
                conflicts[image] = f"{row.id}: {known.split}, {row.split}"
            else:
                rows[image] = known._replace(split=known.split or row.split, group=known.group or row.group)
        for reason, count in content.counts.items():
            text = f"row{'s' if count > 1 else ''} of {_name(content.table, root)} {reason}"
            warnings.append(_not_used(count, text, content.skipped[reason]))
    if len(conflicts) * 2 > len(rows):
        listed = " and ".join(_name(content.table, root) for content in contents)
        example = printable(next(iter(conflicts.values())))[:200]
        if {"xmin", "bbox"} & {plain_column(column) for content in contents for column in content.columns}:
            raise UserError(
                f"{listed}: lists boxes, several of an image ({example}), which has no class of its own; cut the boxes "
                "out into <class name>/photo.jpg"
            )
        raise UserError(
            f"{listed}: {len(conflicts):,} of {len(rows):,} images have several labels or splits ({example}); give one "
            "table (--dataset TABLE), or another column (--label-column NAME)"
        )
    if conflicts:
        text = f"image{'s' if len(conflicts) > 1 else ''} with several labels or splits"
        warnings.append(_not_used(len(conflicts), text, conflicts.values()))
    return _tidy([rows[image] for image in sorted(rows) if image not in conflicts])


def _read_row(content: Content, position: int, path: str, root: Path) -> LabelRow:
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


def _describe(contents: Sequence[Content], root: Path, rows: Sequence[LabelRow]) -> list[str]:
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

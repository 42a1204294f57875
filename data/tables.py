"""Tables that label images: which column is the file, the label, the split and the plant, and what its rows give.

csv, tsv, JSON and JSON lines; Hugging Face's metadata files, exports of iNaturalist and GBIF, Roboflow's and Kaggle's
columns of 0 and 1. Every image is one that the survey found: no path leads out of the folder.
"""

import contextlib
import itertools
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.columns import (
    GROUP_NAMES,
    LABEL_ROWS,
    MISSING,
    ONE_HOT,
    ONES,
    are_groups,
    choose_label,
    find_given_column,
    find_known,
    find_label_candidates,
    find_one_hot_columns,
    find_split_column,
    list_columns,
    plain_name,
    read_split,
    split_of_file,
)
from data.image_index import WAYS, FileColumn, ImageIndex, find_file_column, index_folder
from data.labels import name_key, split_of
from data.records import ADDRESS, Records, open_records
from data.survey import Excluded, Folder
from utils.image_utils import printable
from utils.logging_utils import UserError

MAX_TABLES = 50  # of a folder; others would be notes beside images
SEVERAL = "whose file name several images have"


@dataclass
class LabelTable:
    rows: list["LabelRow"]
    notes: list[str]
    warnings: list[str] = field(default_factory=list)
    label_column: str = ""
    file_column: str = ""


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
    places = [folder, *(child for child in folder.folders if split_of(child.name) or not child.num_images)]
    with_labels: list[Path] = []
    bare: list[Path] = []
    for path in [path for place in places for path in _own_tables(place)][:MAX_TABLES] if index.paths else ():
        with contextlib.suppress(UserError):  # not given by the user: another file of his
            records = open_records(path)
            file = find_file_column(records, index)
            if file and max(file.share_of_rows, file.share_of_images) >= 0.5:
                (with_labels if _has_labels(records, file, folder.path) else bare).append(path)
    return with_labels + [path for path in bare if split_of_file(path, folder.path)] if with_labels else []


def _own_tables(folder: Folder) -> list[Path]:
    names = sorted(name for name in folder.files.get("table", ()) if "submission" not in name.lower())
    notes = {name for name in names if name.lower().endswith(".txt")}  # many: one beside each image
    return [folder.path / name for name in names if name not in notes or len(notes) <= 20]


def _has_labels(records: Records, file: FileColumn, root: Path) -> bool:
    """Whether a table may label images; one with another name for each number tells what classes are called."""
    sample = records.sample(without=file.name)
    if "label" in sample and not any(sample["label"]):
        return False  # as of COCO's boxes
    candidates = find_label_candidates(sample)
    if find_one_hot_columns(sample) or file.way in WAYS[:2] or split_of_file(records.path, root):
        return bool(candidates or find_one_hot_columns(sample))
    return any(len({*sample[name]}) < len(sample[name]) for name in candidates)


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
    contents, problems, excluded = [], [], Excluded(folder.path)
    for table in tables:
        try:
            contents.append(_read_content(table, index, label_column, excluded))
        except UserError as error:
            problems.append(error)
    if not contents:
        raise problems[0]
    if part is not None:
        for content in contents:
            _keep_part(content, index, part, excluded)
    rows = _merge(contents, excluded)
    for number, path in enumerate(index.paths):
        if number not in index.seen and path.startswith(part[0] if part else ""):
            excluded.add("images without a row in a table", path)
    warnings = [*(f"not used: {error}" for error in problems), *excluded.lines()]
    return LabelTable(rows, _describe(contents, rows), warnings, contents[0].labels[0], contents[0].file.name)


# ---- content


@dataclass
class Content:
    """What a table says of the images of a folder."""

    table: Path
    name: str  # below the folder
    columns: Sequence[str]
    file: FileColumn
    split: str  # by the name of the table, or ""
    split_column: str | None
    group_column: str | None
    labels: list[str] = field(default_factory=list)  # the label column, then others that may be meant
    rows: list[tuple[int, LabelRow]] = field(default_factory=list)  # (number of the image, its row)

    def read_split(self, row: Mapping[str, str]) -> str:
        return (read_split(self.split_column, row[self.split_column]) if self.split_column else "") or self.split


def _read_content(table: Path, index: ImageIndex, label_column: str | None, excluded: Excluded) -> Content:
    """The rows of a table that label images. Raises UserError."""
    root, name = excluded.root, printable(os.path.relpath(table, excluded.root))
    records = open_records(table)
    file = find_file_column(records, index)
    if file and index.find(file.name):  # the first row has no suffix that tells it
        records = open_records(table, has_header=False)
        file = file._replace(name=records.columns[file.number])
    if not file or (file.way in WAYS[2:] and max(file.share_of_rows, file.share_of_images) < 0.1):
        raise _no_file_column(records, root)
    sample = records.sample(without=file.name)
    group = next(iter(find_known(sample, GROUP_NAMES)), file.name if file.way == "observation" else None)
    split, split_column = split_of_file(table, root), find_split_column(sample)
    if split in ("validation", "test") and plain_name(split_column or "").startswith("is"):
        split_column = None  # is_valid of test.csv may tell good images; that of train.csv tells splits
    content = Content(table, name, records.columns, file, split, split_column, group)
    matches = _match_rows(content, records, index, excluded)
    first = list(itertools.islice(matches, LABEL_ROWS))
    if not first:
        example = printable(excluded.places[f"rows of {name} {SEVERAL}"][0])
        raise UserError(
            f"{table}: several images have the file names in column {printable(file.name)}, such as {example}; write "
            "the folder into the column, or move one of them elsewhere"
        )
    read_label = _choose_label(content, records.columns, [row for _, row in first], label_column)
    for images, row in itertools.chain(first, matches):
        label, split = sys.intern(read_label(row)), content.read_split(row)
        group = row[content.group_column] if content.group_column is not None else ""
        for image in images:
            path = index.paths[image]
            if label not in MISSING:
                if content.split_column is None and not content.split:
                    split = next(filter(None, map(split_of, path.split("/")[:-1])), "")
                content.rows.append((image, LabelRow(f"{root}/{path}", label, printable(path), split, group)))
            else:
                why = "without a 1, or with several" if content.labels[0] == ONE_HOT else "without label"
                excluded.add(f"rows of {name} {why}", path)
    return content


def _match_rows(
    content: Content, records: Records, index: ImageIndex, excluded: Excluded
) -> Iterator[tuple[list[int], dict[str, str]]]:
    """(its images, its cells by column) for each row that has an image."""
    way, near = content.file.way, content.name.rpartition("/")[0]
    near = f"{near}/" if near and not near.startswith("..") else ""
    for cells in records.rows():
        cell = cells[content.file.number]
        images = index.find(cell, (way,)).get(way, [])
        if not images:
            excluded.add(f"rows of {content.name} whose file is not there", cell or "an empty cell")
            continue
        row = dict(zip(records.columns, cells))
        if way != "observation" and len(images) > 1:
            images = index.narrow(images, cell, near, content.read_split(row))
            if len(images) > 1:
                excluded.add(f"rows of {content.name} {SEVERAL}", cell)
                continue
        index.seen.update(images)
        yield images, row


def _choose_label(
    content: Content, columns: Sequence[str], rows: Sequence[Mapping[str, str]], wanted: str | None
) -> Callable[[Mapping[str, str]], str]:
    """Set the label column, `wanted` or by the first `rows`, and return what reads a label. Raises UserError."""
    cells = {name: [row[name] for row in rows] for name in columns}
    others = {name: cells[name] for name in columns if name != content.file.name}

    def read_one_hot(row: Mapping[str, str]) -> str:
        ones = [name for name in one_hot if row[name] in ONES]
        return ones[0] if len(ones) == 1 else ""

    if one_hot := find_one_hot_columns(others):
        cells[ONE_HOT] = others[ONE_HOT] = list(map(read_one_hot, rows))
    where = str(content.table)
    found = find_label_candidates(others) if wanted is None else [find_given_column(columns, wanted, where)]
    content.labels = choose_label({name: cells[name] for name in found}, columns, where)
    label, genus = content.labels[0], find_known(columns, ["genus"])
    if label == ONE_HOT:
        return read_one_hot
    if genus and find_known([label], ["species"]) and all(re.fullmatch(r"[a-z-]*", cell) for cell in {*cells[label]}):
        return lambda row: f"{row[genus[0]]} {row[label]}" if row[label] not in MISSING else ""  # of an epithet alone
    return operator.itemgetter(label)


def _keep_part(content: Content, index: ImageIndex, part: tuple[str, str], excluded: Excluded) -> None:
    """Keep the rows of a folder's images that are of its split, or say none."""
    (folder, split), rows, content.rows = part, content.rows, []
    for image, row in rows:
        is_inside, is_of_split = index.paths[image].startswith(folder), row.split in ("", split)
        if is_inside and is_of_split:
            content.rows.append((image, row))
        elif is_inside:
            excluded.add(f"rows of {content.name} of another split than {split}", row.id)
        elif row.split == split:
            excluded.add(f"rows of {content.name} whose file is not in {printable(folder)}", row.id)


def _no_file_column(records: Records, root: Path) -> UserError:
    sample = records.sample(20)
    move = "put the table of these images beside them"
    if address := next((name for name, cells in sample.items() if any(map(ADDRESS.match, cells))), None):
        move = f"column {printable(address)[:40]} holds addresses: download the images, with names that another has"
    return UserError(
        f"{records.path}: no column gives images in {root} (columns: {list_columns(records.columns)}); such a column "
        f"holds paths, file names, or file names without their suffix; {move}"
    )


# ---- rows


def _merge(contents: Sequence[Content], excluded: Excluded) -> list[LabelRow]:
    """A row for each image that has one label. Raises UserError if most have two."""
    rows: dict[int, LabelRow] = {}
    conflicts: dict[int, str] = {}
    for content in contents:
        for image, row in content.rows:
            known = rows.setdefault(image, row)
            if known.class_name != row.class_name and name_key(known.class_name) != name_key(row.class_name):
                conflicts[image] = f"{row.id}: {known.class_name}, {row.class_name}"
            elif known.split and row.split and known.split != row.split:
                conflicts[image] = f"{row.id}: {known.split}, {row.split}"
            elif known is not row:
                rows[image] = known._replace(split=known.split or row.split, group=known.group or row.group)
    if len(conflicts) * 2 > len(rows):
        listed = " and ".join(content.name for content in contents)
        example = printable(next(iter(conflicts.values())))[:200]
        if {"xmin", "bbox"} & {plain_name(column) for content in contents for column in content.columns}:
            raise UserError(
                f"{listed}: lists boxes, several of an image ({example}), which has no class of its own; cut the boxes "
                "out into <class name>/photo.jpg"
            )
        raise UserError(
            f"{listed}: {len(conflicts):,} of {len(rows):,} images have several labels or splits ({example}); give one "
            "table (--dataset TABLE), or another column (--label-column NAME)"
        )
    for conflict in conflicts.values():
        excluded.add("images with several labels or splits", conflict)
    kept = [rows[image] for image in sorted(rows) if image not in conflicts]
    # Splits only where there are several, and then for all rows; groups only where they tell plants.
    has_splits = len({row.split for row in kept} - {""}) > 1
    has_groups = are_groups([row.group for row in kept], [row.class_name for row in kept])
    return [
        row._replace(split=(row.split or "train") if has_splits else "", group=row.group if has_groups else "")
        for row in kept
    ]


def _describe(contents: Sequence[Content], rows: Sequence[LabelRow]) -> list[str]:
    first, tables = contents[0], ", ".join(content.name for content in contents)
    others = [printable(name) for name in first.labels[1:] if name != ONE_HOT]
    notes = [f"labels from column {printable(first.labels[0])} of {tables}"]
    if first.labels[0] == ONE_HOT:
        notes = [f"labels from the columns of 0 and 1 of {tables}"]
    elif others:
        notes = [f"{notes[0]}; others: {', '.join(others)} (--label-column)"]
    kinds = {"stem": "file names without suffix", "observation": "observations, with several images each"}
    if kind := kinds.get(first.file.way):
        notes.append(f"images by column {printable(first.file.name)}, which holds {kind}")
    if any(row.split for row in rows):
        place = f"column {first.split_column}" if first.split_column else "the tables" if first.split else "the folders"
        notes.append(f"splits from {place}")
    if any(row.group for row in rows):
        notes.append(f"images of one plant by column {printable(first.group_column or '')}")
    return notes

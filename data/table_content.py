"""What is kept of a table that labels images: for each of its images the cells of the columns that matter."""

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.image_index import SAMPLE_ROWS, WAYS, FileColumn, ImageIndex, find_file_column
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
from data.labels import split_of
from data.records import ADDRESS, Records, open_records
from utils.image_utils import printable
from utils.logging_utils import UserError

SEVERAL = "whose file name several images have"


@dataclass
class Content:
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


def read_content(table: Path, root: Path, index: ImageIndex, label_column: str | None) -> Content:
    records = open_records(table)
    file = find_file_column(records, index)
    if file and next(index.find(records.columns[file.number]), None):  # the first row has no suffix that tells it
        records = open_records(table, has_header=False)
    if not file or (file.way in WAYS[2:] and max(file.share_of_rows, file.share_of_images) < 0.1):
        raise _no_file_column(records, root)
    sample = list(itertools.islice(records.rows(), SAMPLE_ROWS))
    content = Content(table, records.columns, file, split=split_of_table(table, root))
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
    if not content.images:
        raise UserError(
            f"{table}: several images have the file names in column {printable(content.file_column)}, such as "
            f"{printable(content.skipped[SEVERAL][0])}; write the folder into the column, or move one of them elsewhere"
        )
    return content


def _fill(content: Content, records: Records, root: Path, index: ImageIndex, one_hot: Sequence[int]) -> None:
    """The images and cells of a content, row by row."""
    near = _plain_folder(content.table.parent, root)
    same: dict[str, str] = {}  # equal cells are one string
    column, way = content.file.number, content.file.way
    if way == "observation" and content.group_column is None:
        content.group_column = column
        content.cells[column] = []
    for row in records.rows():
        cell = row[column]
        images = dict(index.find(cell, (way,))).get(way, [])
        if way != "observation" and len(images) > 1:
            images = index.narrow(images, cell, near, content.split or content.read_split(row))
            if len(images) > 1:
                content.skip(SEVERAL, cell)
                continue
        if not images:
            content.skip("whose file is not there", cell or "an empty cell")
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
        else "put the table of these images beside them"
    )
    return UserError(
        f"{records.path}: no column gives images in {root} (columns: {list_columns(records.columns)}); such a column "
        f"holds paths, file names, or file names without their suffix; {move}"
    )


def choose_label_of(content: Content) -> None:
    """Set the label column of a content, and what else may be meant. Raises UserError."""
    cells = content.cells
    best = choose_label(content.table, content.columns, {n: cells[n] for n in content.candidates})
    content.label_number, content.others = best.number, best.others
    genus = find_columns(content.columns, ["genus"])
    labels = cells[best.number]
    is_species = bool(genus) and best.number in find_columns(content.columns, ["species"])
    if is_species and all(re.fullmatch(r"[a-z-]+", epithet) for epithet in {*labels} - {""}):
        cells[best.number] = [f"{first} {second}" if second else "" for first, second in zip(cells[genus[0]], labels)]


def split_of_table(table: Path, root: Path) -> str:
    """The split that the name of a table, or of a folder below `root` that it lies in, tells; or ""."""
    stem = re.sub(r"labels?|meta_?data|annotations?|list|info|ground_?truth", "", table.stem.lower())
    folders = table.parent.relative_to(root).parts if table.is_relative_to(root) else ()
    return next(filter(None, map(split_of, (stem, *reversed(folders)))), "")

"""Columns of a table by what they hold: the label, the split, the plant; by their names, else by their cells."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data.image_index import plain_column
from data.labels import split_of
from data.records import ADDRESS
from utils.image_utils import printable
from utils.logging_utils import UserError

# Best first; compared without case and punctuation.
LABEL_COLUMNS = (
    *("label", "labels", "class", "classname", "classlabel", "category", "categoryname", "target", "species"),
    *("speciesname", "scientificname", "latinname", "taxonname", "acceptedscientificname", "binomial", "canonicalname"),
    *("taxon", "commonname", "vernacularname", "englishname", "plant", "plantname", "flower", "flowername", "crop"),
    *("speciesguess", "disease", "variety", "cultivar", "name", "tag", "genus", "labelid", "classid", "categoryid"),
    *("speciesid", "taxonid", "y"),
)
LABEL_WORDS = re.compile(r"(label|species|class|category|disease)(name|text)?$")  # end of others, such as true_label
SPLIT_COLUMNS = (
    *("split", "splits", "set", "subset", "dataset", "partition", "fold", "usage", "learntag", "phase", "datasplit"),
    *("isvalid", "isval", "isvalidation", "istest", "istrain"),
)
GROUP_COLUMNS = (
    *("obsid", "observationid", "observationuuid", "occurrenceid", "plantid", "individualid", "individual"),
    *("specimenid", "treeid", "organismid", "groupid", "group"),
)
RANKS = {"kingdom", "phylum", "order", "family"}  # beside these, "class" is a rank: Magnoliopsida
ONES, ZEROS = ("1", "1.0", "true", "True", "TRUE", "yes"), ("0", "0.0", "false", "False", "FALSE", "no")
ONE_HOT = -1  # stands for the column that columns of 0 and 1 are together
# Addresses, dates, decimals, file names and texts are no labels where a column's name does not say so.
NO_LABEL = re.compile(
    rf"{ADDRESS.pattern}|\d{{2,4}}[-/.]\d\d?[-/.]|[-+]?\d*\.\d+$|.*\.(jpe?g|png)$|.{{100}}", re.IGNORECASE
)


def list_columns(columns: Sequence[str]) -> str:
    """Columns in an error, as many as fit."""
    return ", ".join(printable(column)[:40] for column in columns[:30]) + (", ..." if len(columns) > 30 else "")


def find_columns(columns: Sequence[str], names: Sequence[str]) -> list[int]:
    """Numbers of the columns with these names (see plain_column), in the order of the names."""
    keys = [plain_column(column) for column in columns]
    return [keys.index(name) for name in names if name in keys]


def find_given_column(table: Path, columns: Sequence[str], wanted: str) -> int:
    """The number of --label-column. Raises UserError if there is none."""
    found = [columns.index(wanted)] if wanted in columns else find_columns(columns, [plain_column(wanted)])
    if not found:
        raise UserError(f"--label-column {wanted}: {table} has no such column; it has {list_columns(columns)}")
    return found[0]


# ---- splits


def find_split_column(columns: Sequence[str], sample: Sequence[Sequence[str]]) -> int | None:
    """The column whose cells are words for splits, or say whether a row is one of a split's: is_valid."""
    for number in find_columns(columns, SPLIT_COLUMNS):
        cells = {row[number] for row in sample} - {""}
        if plain_column(columns[number]).startswith("is"):
            if len(cells) == 2 and cells <= {*ONES, *ZEROS}:
                return number
        elif cells and all(map(split_of, cells)):
            return number
    return None


@functools.lru_cache(maxsize=1000)
def read_split(column: str, cell: str) -> str:
    """The split that a cell of such a column says, or ""."""
    key = plain_column(column)
    if not key.startswith("is"):
        return split_of(cell) or ""
    other = "test" if key == "istrain" else split_of(key[2:]) or ""
    return other if (cell in ONES) != (key == "istrain") else "train"


# ---- labels


def find_label_candidates(columns: Sequence[str], sample: Sequence[Sequence[str]], file: int) -> list[int]:
    """Columns that may be the label, by name, else by what they hold; ONE_HOT among them for columns of 0 and 1."""
    cells = {n: {row[n] for row in sample} - {""} for n in range(len(columns)) if n != file}
    ranks = len(RANKS & {plain_column(column) for column in columns}) > 1
    known = [n for n in cells if _preference(columns[n], ranks) < NOT_KNOWN]
    if any(_preference(columns[n]) < 2 for n in known) and not any(cells[n] for n in known):
        return known  # a column "label" that is empty says that there is none
    known = [n for n in known if cells[n]]
    few = max(2, len(sample) // 2)  # a label repeats
    repeated = [n for n in known if len(cells[n]) <= few]
    if any(not _are_numbers(cells[n]) for n in repeated):
        return known
    if find_one_hot_columns(sample, file):
        return [*known, ONE_HOT]
    aside = find_columns(columns, (*SPLIT_COLUMNS, *GROUP_COLUMNS))
    unknown = [
        n for n in cells if n not in aside and 1 < len(cells[n]) <= few and not any(map(NO_LABEL.match, cells[n]))
    ]
    return known if repeated else unknown or known


NOT_KNOWN = 2 * len(LABEL_COLUMNS)


def _preference(column: str, ranks: bool = False) -> int:
    """Place among known label columns, lowest first; NOT_KNOWN for others. `ranks`: class is one of a taxonomy."""
    key = plain_column(column)
    if key in LABEL_COLUMNS and not (ranks and key == "class"):
        return LABEL_COLUMNS.index(key)
    return len(LABEL_COLUMNS) if LABEL_WORDS.search(key) and key != "class" else NOT_KNOWN


def find_one_hot_columns(sample: Sequence[Sequence[str]], file: int) -> list[int]:
    """Two or more columns of 0 and 1, of which at least half of the rows have exactly one 1; else none."""
    columns = [n for n, cells in enumerate(zip(*sample)) if n != file and {*cells} <= {*ONES, *ZEROS, ""}]
    single = sum(sum(row[n] in ONES for n in columns) == 1 for row in sample)
    return columns if len(columns) > 1 and single * 2 >= len(sample) else []


def _are_numbers(cells: set[str]) -> bool:
    return all(re.fullmatch(r"[-+]?\d+(\.\d*)?", cell) for cell in cells)


class LabelColumn(NamedTuple):
    number: int  # of a column, or ONE_HOT
    others: list[str]  # columns that may be meant as well


def choose_label(table: Path, columns: Sequence[str], cells: Mapping[int, Sequence[str]]) -> LabelColumn:
    """Of candidates and the cells of all their rows the label: text before numbers, then by name.

    Raises UserError if all cells are empty, or where names do not tell several columns apart.
    """
    distinct = {n: {*column} - {""} for n, column in cells.items()}
    candidates = [n for n in cells if distinct[n]]
    if not candidates:
        raise UserError(
            f"{table}: has no labels for the images (columns: {list_columns(columns)}); say which column has: "
            "--label-column NAME"
        )

    def quality(n: int) -> tuple[bool, bool, bool]:
        repeats = len(distinct[n]) <= max(2, len(cells[n]) // 2)
        return len(distinct[n]) > 1, repeats, n == ONE_HOT or not _are_numbers(distinct[n])

    best = max(map(quality, candidates))
    alike = [n for n in candidates if quality(n) == best]
    alike.sort(key=lambda n: NOT_KNOWN if n == ONE_HOT else _preference(columns[n]))
    if len(alike) > 1 and _preference(columns[alike[0]]) == NOT_KNOWN:
        listed = list_columns([columns[n] for n in alike])
        raise UserError(f"{table}: the labels may be in any of the columns {listed}; say which: --label-column NAME")
    return LabelColumn(alike[0], [columns[n] for n in alike[1:] if n != ONE_HOT])

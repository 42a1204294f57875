"""Columns of tables by their names, else by what their cells hold: labels, splits and plants.

`cells` are columns by name, each with its cells in the order of the rows; "" is an empty cell.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from config.training_config import nearest_name
from data.labels import split_of
from data.records import ADDRESS
from utils.logging_utils import UserError, some

# Names of columns as plain_name gives them, the best first.
IMAGE_NAMES = (
    *("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "pixelvalues", "images", "imagebytes"),
    *("imagedata", "imgbytes"),
)
FILE_NAMES = (
    *("filename", "imagefilename", "filepath", "imagepath", "imgpath", "imagefile", "imagename", "imgname"),
    *("photopath", "path", "file", "image", "imageid", "id", "gbifid"),
)
LABEL_NAMES = (
    *("label", "labels", "class", "classname", "classlabel", "labelname", "labeltext", "category", "categoryname"),
    *("target", "species", "speciesname", "scientificname", "latinname", "taxonname", "acceptedscientificname"),
    *("binomial", "canonicalname", "taxon", "name", "commonname", "vernacularname", "englishname", "plant"),
    *("plantname", "flower", "flowername", "crop", "speciesguess", "disease", "variety", "cultivar", "finelabel"),
    *("cls", "tag", "genus", "labelid", "classid", "categoryid", "speciesid", "taxonid", "y"),
)
LABEL_WORDS = re.compile(r"(label|species|class|category|disease)(name|text)?$")  # end of others, such as true_label
SPLIT_NAMES = (
    *("split", "splits", "set", "subset", "dataset", "partition", "fold", "usage", "learntag", "phase", "datasplit"),
    *("isvalid", "isval", "isvalidation", "istest", "istrain"),
)
GROUP_NAMES = (
    *("obsid", "observationid", "observationuuid", "occurrenceid", "plantid", "individualid", "individual"),
    *("specimenid", "treeid", "organismid", "groupid", "group"),
)
RANKS = ("kingdom", "phylum", "order", "family")  # beside these, "class" is a rank: Magnoliopsida
NOT_KNOWN = 2 * len(LABEL_NAMES)
ONES, ZEROS = ("1", "1.0", "true", "True", "TRUE", "yes"), ("0", "0.0", "false", "False", "FALSE", "no")
MISSING = ("", "-1", "-1.0", "nan", "NaN", "null", "NULL", "NA", "N/A", "n/a", "#N/A", "<NA>")  # no label, as written
ONE_HOT = "(columns of 0 and 1)"  # the name of the column that these are together
# Addresses, dates, decimals, file names and texts are no labels where a column's name does not say so.
NO_LABEL = re.compile(
    rf"{ADDRESS.pattern}|\d{{2,4}}[-/.]\d\d?[-/.]|[-+]?\d*\.\d+$|.*\.(jpe?g|png)$|.{{100}}", re.IGNORECASE
)
LABEL_ROWS = 20_000  # tell which column is the label


def plain_name(column: str) -> str:
    """A column's name without case and punctuation: scientificName and "scientific_name" are the same."""
    return re.sub(r"[\W_]", "", column).lower()


def list_columns(columns: Iterable[str]) -> str:
    """Columns in an error, as many as fit."""
    return some((column[:40] for column in columns), 30)


def find_known(columns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The columns with these names, in the order of the names."""
    by_name = {plain_name(column): column for column in reversed(list(columns))}
    return [by_name[name] for name in names if name in by_name]


# ---- labels


def label_preference(column: str, columns: Iterable[str] = ()) -> int:
    """Place among the names of label columns, lowest first; NOT_KNOWN for others. `columns`: those beside it."""
    key = plain_name(column)
    if key == "class" and len(find_known(columns, RANKS)) > 1:
        return NOT_KNOWN
    if key in LABEL_NAMES:
        return LABEL_NAMES.index(key)
    return len(LABEL_NAMES) if LABEL_WORDS.search(key) else NOT_KNOWN


def find_given_column(columns: Sequence[str], wanted: str, where: str) -> str:
    """The column that --label-column names. Raises UserError if there is none."""
    if found := [wanted] if wanted in columns else find_known(columns, [plain_name(wanted)]):
        return found[0]
    problem = f"{where} has no such column{nearest_name(wanted, columns)}"
    raise UserError(f"--label-column {wanted}: {problem}; it has {list_columns(columns)}")


def find_label_candidates(cells: Mapping[str, Sequence[str]]) -> list[str]:
    """Columns that may be the label, by name, else by what a sample holds."""
    distinct = {name: {*column} - {""} for name, column in cells.items()}
    known = [name for name in cells if label_preference(name, cells) < NOT_KNOWN]
    if any(label_preference(name) < 2 for name in known) and not any(distinct[name] for name in known):
        return known  # a column "label" that is empty says that there is none
    known = [name for name in known if distinct[name]]
    repeated = [name for name in known if _repeats(distinct[name], len(cells[name]))]
    if any(not _are_numbers(distinct[name]) for name in repeated):
        return known
    if ONE_HOT in cells:
        return [*known, ONE_HOT]
    aside = find_known(cells, SPLIT_NAMES + GROUP_NAMES)
    unknown = [
        name
        for name in cells
        if name not in (*aside, *known) and len(distinct[name]) > 1 and _repeats(distinct[name], len(cells[name]))
        if not any(map(NO_LABEL.match, distinct[name]))
    ]
    return known if repeated else unknown or known


def find_label(cells: Mapping[str, Sequence[str]], columns: Sequence[str], wanted: str | None, where: str) -> list[str]:
    """The label column, `wanted` or text before numbers, then by name; behind it others alike. Raises UserError."""
    found = find_label_candidates(cells) if wanted is None else [find_given_column(columns, wanted, where)]
    distinct = {name: {*cells[name]} - {""} for name in found if any(cells[name])}
    if not distinct:
        problem = f"has no labels for the images (columns: {list_columns(columns)})"
        raise UserError(f"{where}: {problem}; say which column has: --label-column NAME")

    def quality(name: str) -> tuple[bool, bool, bool]:
        is_text = name == ONE_HOT or not _are_numbers(distinct[name])
        return len(distinct[name]) > 1, _repeats(distinct[name], len(cells[name])), is_text

    best = max(map(quality, distinct))
    alike = sorted((name for name in distinct if quality(name) == best), key=label_preference)
    if len(alike) > 1 and label_preference(alike[0]) == NOT_KNOWN:
        raise UserError(
            f"{where}: the labels may be in any of the columns {list_columns(alike)}; say which: --label-column NAME"
        )
    return alike


def find_one_hot_columns(cells: Mapping[str, Sequence[str]]) -> list[str]:
    """Two or more columns of 0 and 1, of which at least half of the rows have exactly one 1; else none."""
    columns = [name for name, column in cells.items() if {*column} <= {*ONES, *ZEROS, ""}]
    rows = list(zip(*(cells[name] for name in columns)))
    single = sum(sum(cell in ONES for cell in row) == 1 for row in rows)
    return columns if len(columns) > 1 and single * 2 >= len(rows) else []


def _repeats(distinct: set[str], num_rows: int) -> bool:
    return len(distinct) <= max(2, num_rows // 2)


def _are_numbers(cells: set[str]) -> bool:
    return all(re.fullmatch(r"[-+]?\d+(\.\d*)?", cell) for cell in cells)


# ---- splits and plants


def find_split_column(cells: Mapping[str, Sequence[str]]) -> str | None:
    """The column whose cells are words for splits, or say whether a row is one of a split's: is_valid."""
    for name in find_known(cells, SPLIT_NAMES):
        distinct = {*cells[name]} - {""}
        if plain_name(name).startswith("is"):
            if len(distinct) == 2 and distinct <= {*ONES, *ZEROS}:
                return name
        elif distinct and all(map(split_of, distinct)):
            return name
    return None


@functools.lru_cache(maxsize=1000)
def read_split(column: str, cell: str) -> str:
    """The split that a cell of such a column says, or ""."""
    key = plain_name(column)
    if not key.startswith("is"):
        return split_of(cell) or ""
    yes, no = ("train", "test") if key == "istrain" else (split_of(key[2:]) or "", "train")
    return yes if cell in ONES else no


def split_of_file(file: Path, root: Path) -> str:
    """The split that a table's name tells, as a whole or by a word of it, or else a folder's below `root`; or ""."""
    folders = file.parent.relative_to(root).parts if file.is_relative_to(root) else ()
    for name in (file.stem, *reversed(folders)):
        name = re.sub(r"labels?|meta_?data", " ", name.lower())
        words = {split for word in re.findall(r"[a-z]+", name) if (split := split_of(word))}
        if split := split_of(name) or (words.pop() if len(words) == 1 else None):
            return split
    return ""


def are_groups(groups: Sequence[str], labels: Sequence[object]) -> bool:
    """Whether the values tell plants apart: some have several images, and they are not the classes once more."""
    counts = Counter(group for group in groups if group)
    of_labels = {label for group, label in zip(groups, labels) if group}
    return len(counts) > len(of_labels) and any(count > 1 for count in counts.values())

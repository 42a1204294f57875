"""Columns of Arrow tables: which hold images and labels, and what is in them, as texts."""

import re
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import ClassLabel, Dataset, Features, Image, Value

from data import columns
from data.columns import FILE_NAMES, IMAGE_NAMES, find_known, list_columns, plain_name
from data.records import ADDRESS
from utils.image_utils import SUFFIXES, is_image_start, printable
from utils.logging_utils import UserError

FIRST_ROWS = 8  # which tell whether texts are paths, and bytes are images


def kind_of(feature) -> str:
    """What a column may be used as: image, class (a ClassLabel), text, number, or else "other"."""
    if isinstance(feature, Image):
        return "image"
    if isinstance(feature, ClassLabel):
        return "class"
    if isinstance(feature, Mapping) and "bytes" in feature:
        stores = getattr(feature["bytes"], "dtype", "")
        return "image" if stores.endswith("binary") or (stores == "null" and "path" in feature) else "other"
    kinds = {"binary": "image", "large_binary": "image", "string": "text", "large_string": "text", "bool": "number"}
    dtype = feature.dtype if isinstance(feature, Value) else ""
    return kinds.get(dtype, "number" if re.match(r"u?int\d|float\d", dtype) else "other")


def describe(feature) -> str:
    """What a column holds, in an error."""
    if kind_of(feature) == "image":
        return "images"
    return f"{feature.dtype} values" if isinstance(feature, Value) else "lists or records"


def values_of(column: pyarrow.ChunkedArray) -> list:
    """The values of a column; what is not UTF-8 in texts becomes a question mark."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values = pyarrow.compute.cast(column, pyarrow.large_binary()).to_pylist()
        return [None if value is None else value.decode(errors="replace") for value in values]


# ---- images


def find_images(features: Features, head: Callable[[str], pyarrow.ChunkedArray]) -> list[str]:
    """Columns of images, else of paths of image files, the best name first; `head`: a column's FIRST_ROWS."""
    kinds = {name: kind_of(feature) for name, feature in features.items()}
    # Bytes of no telling name may also be a hash or an embedding.
    telling = [name for name in kinds if not isinstance(features[name], Value) or plain_name(name) in IMAGE_NAMES]
    found = [
        name
        for name, kind in kinds.items()
        if kind == "image" and (name in telling or any(is_image_start(cell[:16]) for cell in _values(head(name))))
    ]
    if not found:
        texts = {name: _values(head(name)) for name, kind in kinds.items() if kind == "text"}
        found = [name for name, cells in texts.items() if sum(map(_is_path, cells)) * 2 > len(cells)]
    known = find_known(found, IMAGE_NAMES + FILE_NAMES)
    return list(dict.fromkeys([*known, *found]))


def find_image_column(rows: Dataset, where: str) -> str:
    """The column of images or of paths of files. Raises UserError for none, or for several."""
    features, head = rows.features, rows.data.slice(0, FIRST_ROWS).column
    found = find_images(features, head)
    if len(found) > 1 and not find_known(found[:1], IMAGE_NAMES + FILE_NAMES):
        raise UserError(f"{where}: several columns hold images ({list_columns(found)}); rename the one to use to image")
    if found:
        return found[0]
    for name, feature in features.items():
        if kind_of(feature) == "text" and any(map(ADDRESS.match, _values(head(name)))):
            problem = f"has no images, but web addresses in the column {printable(name)}"
            raise UserError(f"{where}: {problem}; download the images into <class name>/photo.jpg")
    expected = "expected is one of image files (the Image of `datasets`, or their bytes) or of their paths"
    raise UserError(f"{where}: no column of images among {list_columns(features)}; {expected}")


def _values(column: pyarrow.ChunkedArray) -> list:
    return [value for value in values_of(column) if value is not None]


def _is_path(cell: str) -> bool:
    return cell.lower().endswith(SUFFIXES) and "://" not in cell


# ---- labels


def find_label_column(rows: Dataset, image: str, label_column: str | None, where: str) -> str:
    """The column of labels: the one asked for, else the one that its name or values tell. Raises UserError."""
    features = rows.features
    usable = [name for name in features if name != image and kind_of(features[name]) in ("class", "text", "number")]
    expected = "expected is one name or number for each image"
    if label_column is not None:
        found = columns.find_given_column(list(features), label_column, where)
        if found not in usable:
            raise UserError(f"--label-column {label_column}: holds {describe(features[found])}; {expected}")
    # Evenly spaced, since rows may be in order of classes.
    places = np.linspace(0, len(rows) - 1, min(len(rows), columns.LABEL_ROWS)).astype(int)
    cells = {name: cells_of(rows, name, places) for name in usable}
    lists = [name for name in find_known(features, columns.LABEL_NAMES) if name not in (image, *usable)]
    if lists and label_column is None and not columns.find_label_candidates(cells):
        problem = f"the column {printable(lists[0])} holds {describe(features[lists[0]])}"
        raise UserError(f"{where}: {problem}; {expected}: name a column that has it with --label-column")
    return columns.find_label(cells, list(features), label_column, where)[0]


def read_labels(rows: Dataset, label: str, split: str, where: str) -> list[str]:
    """Labels as texts, "" for none (-1 on the hub). Raises UserError for numbers that are no labels."""
    kind, texts = kind_of(rows.features.get(label)), cells_of(rows, label)
    if kind == "class":
        count = len(rows.features[label].names)
        if odd := {*rows.data.column(label).unique().to_pylist()} - {None, *range(-1, count)}:
            problem = f"has the label {max(odd)} in {split}, expected 0 to {count - 1}"
            raise UserError(f"{where}: {problem}; write labels as a ClassLabel with its names")
    elif kind == "number":
        texts = [re.sub(r"\.0$|-?inf$", "", text.lower()) for text in texts]
        if unusual := next((text for text in texts if not re.fullmatch(r"-?\d*|true|false", text)), None):
            raise UserError(
                f"{where}: labels of {split} are no whole numbers ({unusual}); name another column: --label-column"
            )
    return ["" if text in columns.MISSING else text for text in texts]


# ---- cells


def cells_of(rows: Dataset, name: str, places: np.ndarray | None = None) -> list[str]:
    """A column as texts, of all rows or of those at `places`: of a ClassLabel its names; "" for what is missing."""
    if name not in rows.features:
        return [""] * len(rows)
    column = rows.data.column(name)
    values = values_of(column if places is None else column.take(places))
    if isinstance(rows.features[name], ClassLabel):
        values = list(map(dict(enumerate(names_of(rows.features[name]))).get, values))
    return ["" if value is None or value != value else str(value).strip() for value in values]


def names_of(feature) -> list[str]:
    """The names of a ClassLabel as cells, which its JSON may give with half a character."""
    return [name.encode(errors="replace").decode().strip() for name in feature.names]

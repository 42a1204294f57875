"""Rows: the form in which all sources give their images, as Arrow, not decoded."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import pyarrow
from datasets import Dataset, Features, Image, Value
from datasets.table import InMemoryTable

from data.streaming import Stream
from data.survey import is_utf8
from utils.logging_utils import UserError

SPLITS = ("train", "validation", "test")
Key = TypeVar("Key")
Member = TypeVar("Member")
ROW = Features({"image": Image(decode=False), "label": Value("int64"), "id": Value("string")})


@dataclass(frozen=True)
class Reading:
    """How a source is read: the options of a run that decide it."""

    dataset_revision: str  # of a hub data set
    streaming: bool
    seed: int
    allow_missing: bool
    label_column: str | None
    class_names: str | None  # file that gives class folders or labels their names


class Source(NamedTuple):
    """The splits that a source has (an image folder may have train alone), and what its labels are called."""

    splits: dict[str, Dataset | Stream]  # rows of ROW, and "group": what images of one plant share
    class_names: list[str]
    description: str
    notes: Sequence[str] = ()  # what was taken for a class, a split, a name
    warnings: Sequence[str] = ()  # what was excluded, and why
    revision: str | None = None  # commit of a hub data set
    is_published: bool = False  # its splits are those that others report on: used as they are, copies and all


def allow_incomplete(what: str, is_allowed: bool) -> str:
    """A warning of a data set that is not complete. Raises UserError unless that is allowed."""
    if not is_allowed:
        raise UserError(f"{what}; add what is missing, or continue without it: --allow-missing true")
    return f"{what}; continuing without the rest"


def count_images(rows: Dataset | Stream) -> int:
    """Images of a split; of a stream, those of one pass."""
    return rows.num_images if isinstance(rows, Stream) else len(rows)


def by_key(pairs: Iterable[tuple[Key, Member]]) -> dict[Key, list[Member]]:
    """The members of each key, in the order of the pairs (key, member)."""
    found: dict[Key, list[Member]] = defaultdict(list)
    for key, member in pairs:
        found[key].append(member)
    return dict(found)


def build_rows(images: Iterable[tuple[str, int, str, str]]) -> Dataset:
    """Rows of image files as Arrow in memory: paths and no images, so that a million take 0.2 GB. Raises UserError.

    `images`: path, label, id, and what tells images of one plant, which one split gets, or "".
    """
    paths, labels, ids, groups = list(zip(*images)) or [(), (), (), ()]
    if odd := next((path for path in paths if not is_utf8(path)), None):
        raise UserError(f"{odd!r}: the path is not UTF-8, which Arrow needs; rename its folders")
    text = pyarrow.string()
    schema = pyarrow.schema({"image": text, "label": pyarrow.int64(), "id": text, "group": text})
    table = pyarrow.table([paths, labels, ids, groups], schema=schema)
    rows = Dataset(InMemoryTable(table)).cast_column("image", ROW["image"])
    return rows if any(groups) else rows.remove_columns("group")

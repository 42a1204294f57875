"""Images by what a table calls them: a path, a file name, a stem, or the observation that several of them show."""

import functools
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from data.columns import FILE_NAMES, plain_name
from data.labels import split_of
from data.records import ADDRESS, SAMPLE_ROWS, Records
from data.rows import by_key
from data.survey import Folder
from utils.image_utils import SUFFIXES

WAYS = ("path", "name", "stem", "observation")  # how a cell may give an image; strictest first


class ImageIndex:
    """Images by path, file name or stem, without case, and by the observation that 148000017_2.jpg belongs to."""

    def __init__(self, paths: Iterable[str]):
        """`paths` are relative, with slashes."""
        self.paths = list(paths)
        self.seen: set[int] = set()  # numbers of those that tables list
        self._by_stem = by_key((_stem(path.rpartition("/")[2]), number) for number, path in enumerate(self.paths))

    @functools.cached_property
    def _by_observation(self) -> dict[str, list[int]]:
        matches = ((re.fullmatch(r"(.+?)(?:[_-]| ?\()\d{1,3}\)?", stem), stem) for stem in self._by_stem)
        return by_key((match[1], number) for match, stem in matches if match for number in self._by_stem[stem])

    def find(self, cell: str, ways: Sequence[str] = WAYS) -> dict[str, list[int]]:
        """Numbers of the images that a cell may mean, by the way."""
        parts = [_plain(part) for part in cell.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        if not parts or len(cell) > 1000:
            return {}
        stem = _stem(parts[-1])
        found = {"observation": self._by_observation.get(stem, [])} if "observation" in ways else {}
        same = found["stem"] = [] if ADDRESS.match(cell) else self._by_stem.get(stem, [])
        if parts[-1].endswith(SUFFIXES):
            for way, wanted in (("name", parts[-1:]), ("path", parts)):
                found[way] = [n for n in same if f"/{_plain(self.paths[n])}".endswith("/" + "/".join(wanted))]
        return {way: numbers for way, numbers in found.items() if numbers and way in ways}

    def narrow(self, numbers: list[int], cell: str, near: str, split: str) -> list[int]:
        """Of images with one name those that a table in the folder `near` ("train/") means, or those of its split."""
        exact = _plain(near + cell.replace("\\", "/").removeprefix("./"))
        for is_meant in (
            lambda path: _plain(path) == exact or _plain(path.rpartition(".")[0]) == exact,
            lambda path: split and any(split_of(part) == split for part in path.split("/")[:-1]),
            lambda path: path.startswith(near),
        ):
            numbers = [number for number in numbers if is_meant(self.paths[number])] or numbers
        return numbers


def _plain(name: str) -> str:
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def _stem(name: str) -> str:
    """Without the suffix of an image, and without the .0 that a number gets beside empty cells."""
    stem, dot, suffix = _plain(name).rpartition(".")
    return stem if dot and (f".{suffix}" in SUFFIXES or (suffix == "0" and stem.isdigit())) else _plain(name)


def index_folder(folder: Folder) -> ImageIndex:
    """The images of a folder and below, by their paths below it."""
    return ImageIndex(path.removeprefix(f"{folder.path}/") for path in folder.list_images())


class FileColumn(NamedTuple):
    name: str
    number: int  # among the columns
    way: str  # one of WAYS
    share_of_rows: float  # that have an image
    share_of_images: float  # that have a row


def find_file_column(records: Records, index: ImageIndex) -> FileColumn | None:
    """The column whose cells give most images; by a sample, or by all rows where that gives few."""
    columns = range(len(records.columns))
    for ways in (WAYS[:3], WAYS):
        found = _match_columns(records, index, columns, ways, SAMPLE_ROWS)
        if found and found.share_of_rows >= 0.5:
            return found
    sample = list(records.sample().values())
    many = [n for n, cells in enumerate(sample) if len({*cells}) * 5 > len(cells) and not ADDRESS.match(cells[0])]
    return _match_columns(records, index, many, WAYS, None)


def _match_columns(
    records: Records, index: ImageIndex, columns: Sequence[int], ways: Sequence[str], limit: int | None
) -> FileColumn | None:
    images: dict[tuple[int, str], set[int]] = defaultdict(set)  # images, not rows: a label 1 is no 1.jpg in each row
    matched: Counter[tuple[int, str]] = Counter()
    num_rows = 0
    for row in itertools.islice(records.rows(), limit):
        num_rows += 1
        for column in columns:
            for way, numbers in index.find(row[column], ways).items():
                images[column, way].update(numbers)
                matched[column, way] += 1
    if not images:
        return None

    def quality(key: tuple[int, str]) -> tuple[float, bool, int]:
        looseness = 1 + 0.1 * WAYS.index(key[1])
        return len(images[key]) / looseness, plain_name(records.columns[key[0]]) in FILE_NAMES, -key[0]

    best = number, way = max(images, key=quality)
    shares = matched[best] / num_rows, len(images[best]) / len(index.paths)
    return FileColumn(records.columns[number], number, way, *shares)

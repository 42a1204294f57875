"""Records of a table file: csv and its relatives, JSON lines and JSON, streamed, whatever is in them.

Cells are text without spaces around it; each row has a cell for each column, also where the file's rows are ragged.
"""

import codecs
import contextlib
import csv
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.image_utils import is_image_name
from utils.logging_utils import UserError

DELIMITERS = ",;\t|"
LINE_CHARS = 1 << 24  # a longer line is read in parts: memory stays bounded
SAMPLE_LINES = 20  # tell the delimiter
SAMPLE_ROWS = 1000  # tell what a column holds
MAX_JSON_BYTES = 400_000_000  # JSON is parsed as a whole, in about five times its size
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]{1,9}://|www\.", re.IGNORECASE)

# Bytes of a file that is not all UTF-8 are Latin-1, one by one: nobody knows before the end of a long table.
codecs.register_error("as_latin_1", lambda error: (error.object[error.start : error.end].decode("latin-1"), error.end))  # type: ignore[attr-defined]


@dataclass
class Records:
    path: Path
    columns: list[str]  # no two alike; "column 3" where there is no name
    rows: Callable[[], Iterator[list[str]]]  # from the first on, at each call

    def sample(self, num_rows: int = SAMPLE_ROWS, without: str | None = None) -> dict[str, list[str]]:
        """The cells of the first rows by column."""
        rows = list(itertools.islice(self.rows(), num_rows))
        return {name: [row[n] for row in rows] for n, name in enumerate(self.columns) if name != without}


def open_records(path: Path, has_header: bool | None = None) -> Records:
    """The table in a file. `has_header`: of csv and txt; None: unless its first row has the file name of an image.

    Raises UserError, at once or while rows are read, if the file cannot be read or is no table.
    """
    suffix = path.suffix.lower()
    if suffix in (".xlsx", ".xls", ".ods", ".numbers"):
        raise UserError(f"{path}: spreadsheets are not read; save it as .csv and give that")
    if suffix in (".jsonl", ".ndjson"):
        return _as_records(path, lambda: _read_json_lines(path))
    if suffix == ".json":
        return _open_json(path)
    try:
        return _open_csv(path, has_header)
    except csv.Error as error:
        raise UserError(f"{path}: is no table ({error}); expected a header and a row for each image") from error


def read_lines(path: Path) -> Iterator[str]:
    """Lines as they end in the file, without NUL; UTF-16 by its mark, else UTF-8, else Latin-1. Raises UserError."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise UserError(f"{path}: is no file; give the path of one")
        with open(path, "rb") as file:
            is_utf_16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding, errors = ("utf-16", "replace") if is_utf_16 else ("utf-8-sig", "as_latin_1")
        with open(path, encoding=encoding, errors=errors, newline="") as file:
            while line := file.readline(LINE_CHARS):
                yield line.replace("\0", "")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error


# ---- csv


def _open_csv(path: Path, has_header: bool | None) -> Records:
    lines = list(itertools.islice(_content(path), SAMPLE_LINES))
    if not lines:
        raise UserError(f"{path}: is empty; expected a header and a row for each image")
    parse = _choose_parser(lines)
    first = [cell.strip() for cell in next(parse(lines), [])]
    if has_header is None:
        has_header = not any(is_image_name(Path(cell)) and not ADDRESS.match(cell) for cell in first)
    columns = _unique(first if has_header else [""] * max(map(len, parse(lines))))

    def rows() -> Iterator[list[str]]:
        number = int(has_header)
        try:
            for row in itertools.islice(parse(_content(path)), number, None):
                number += 1
                if any(row):
                    yield [cell.strip() for cell in row[: len(columns)]] + [""] * (len(columns) - len(row))
        except csv.Error as error:
            move = "is a quote opened there and not closed?"
            raise UserError(f"{path}: row {number + 1:,} cannot be read ({error}); {move}") from error

    return Records(path, columns, rows)


def _content(path: Path) -> Iterator[str]:
    """The lines from the header on, such as #id,label: before it may stand empty lines, remarks, Excel's sep=; line."""
    return itertools.dropwhile(re.compile(r'\s*$|#(?![^\s,;|]+[,;\t|])|"?sep=."?\s*$').match, read_lines(path))


def _choose_parser(lines: Sequence[str]) -> Callable[[Iterable[str]], Iterator[list[str]]]:
    """Rows of lines, by the delimiter that gives the header most cells, and most lines as many; else by white space."""

    def quality(delimiter: str) -> tuple[bool, int]:
        sizes = [len(row) for row in _split(lines, delimiter)]
        return sizes[0] > 1 and sizes.count(sizes[0]) * 2 >= len(sizes), sizes[0]

    delimiter = max(DELIMITERS, key=quality)
    if quality(delimiter)[1] > 1:
        return lambda text: _split(text, delimiter)
    words = [line.split() for line in lines]
    if sum(len(row) > 1 for row in words) * 2 < len(words) or all(len(row) != len(words[0]) for row in words[1:]):
        most = 0
    else:
        most = 1 if is_image_name(Path(words[0][0])) else -1  # what follows an image is a name, which may have spaces
    return lambda text: (line.split(None, most) for line in text)


def _split(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """Quotes are text in tables with tabs, as GBIF writes them, unless they enclose a cell."""
    if delimiter != "\t":
        return csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    return ([_unquote(cell) for cell in line.rstrip("\r\n").split("\t")] for line in lines)


def _unquote(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def _unique(names: Sequence[str]) -> list[str]:
    columns: list[str] = []
    for number, name in enumerate(names, 1):
        name = name or f"column {number}"
        columns.append(name if name not in columns else f"{name} ({number})")
    return columns


# ---- JSON


def read_json(path: Path) -> Any:
    """What a JSON file holds, with numbers as text. Raises UserError if it is none, or above MAX_JSON_BYTES."""
    size = path.stat().st_size if path.is_file() else 0
    if size > MAX_JSON_BYTES:
        raise UserError(
            f"{path}: has {size / 1e6:,.0f} MB, and JSON is read up to {MAX_JSON_BYTES / 1e6:,.0f}; write csv"
        )
    try:
        return _parse("".join(read_lines(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); correct it, or write csv") from error


def _parse(text: str) -> Any:
    """Numbers stay what they are: 001, and those of 4,000 digits."""
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=str)


def _open_json(path: Path) -> Records:
    try:
        records = records_of(read_json(path))
    except UserError:
        with contextlib.suppress(UserError):  # JSON lines under the other suffix
            return _as_records(path, lambda: _read_json_lines(path))
        raise
    if not records:
        raise UserError(f"{path}: has no list of records; expected [{{'file_name': ..., 'label': ...}}, ...]")
    return _as_records(path, lambda: iter(records))


def _read_json_lines(path: Path) -> Iterator[dict]:
    for number, line in enumerate(read_lines(path), 1):
        try:
            record = _parse(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number:,} is not JSON ({error}); correct or remove it") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number:,} is no JSON object; write one for each image, or remove it")
        if record:
            yield record


def _as_records(path: Path, records: Callable[[], Iterator[dict]]) -> Records:
    keys = list(dict.fromkeys(key for record in itertools.islice(records(), SAMPLE_ROWS) for key in record))
    if not keys:
        raise UserError(f"{path}: is empty; expected a record for each image")
    columns = _unique([key.strip() for key in keys])
    return Records(path, columns, lambda: ([cell_of(record.get(key)) for key in keys] for record in records()))


def cell_of(value: Any) -> str:
    """A value of JSON as a cell; "" for what is no single value."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    text = "" if value is None or isinstance(value, (dict, list)) else str(value).strip()
    return text if text.isascii() else text.encode(errors="replace").decode()  # JSON may escape half a character


def records_of(data: Any) -> list[dict]:
    """The records in a JSON value: a list of them, by key, by column, or COCO's images with their category."""
    if isinstance(data, list):
        return [
            record if isinstance(record, dict) else {f"column {n}": cell for n, cell in enumerate(record, 1)}
            for record in data
            if isinstance(record, (dict, list))
        ]
    if not isinstance(data, dict) or not data:
        return []
    if all(isinstance(data.get(key), list) for key in ("images", "annotations", "categories")):
        return _join_coco(data)
    values = list(data.values())
    if all(isinstance(value, dict) for value in values):
        if "0" in values[0]:  # as pandas writes columns
            return [{name: data[name].get(key) for name in data} for key in values[0]]
        return [{"key": key, **record} for key, record in data.items()]
    if all(isinstance(value, list) for value in values):
        if all(value and is_image_name(Path(cell_of(value[:1]))) for value in values):  # the files of each class
            return [{"file": file, "label": key} for key, files in data.items() for file in files]
        are_records = any(isinstance(entry, dict) for value in values for entry in value[:1])  # {"data": [{...}, ...]}
        if len({len(value) for value in values}) == 1 and not are_records:
            return [dict(zip(data, row)) for row in zip(*values)]
    if not any(isinstance(value, (dict, list)) for value in values):
        return [{"file": key, "label": value} for key, value in data.items()]
    return max((records_of(value) for value in values if isinstance(value, list)), key=len, default=[])


def _join_coco(data: dict) -> list[dict]:
    """Images of COCO's form with the name of their category; of boxes, without one; once for each category."""

    def read(key: str) -> list[dict]:
        return [record for record in data[key] if isinstance(record, dict)]

    names = {
        cell_of(each.get("id", each.get("category_id"))): cell_of(each.get("name") or each.get("scientificName"))
        for each in read("categories")
    }
    labels: dict[str, dict[str, None]] = defaultdict(dict)  # of each image, each once
    for record in read("annotations"):
        if "bbox" not in record:  # a part of an image
            category = cell_of(record.get("category_id"))
            labels[cell_of(record.get("image_id"))][names.get(category) or category] = None
    return [
        {**record, "label": label}
        for record in read("images")
        for label in labels[cell_of(record.get("id", record.get("image_id")))] or [""]
    ]

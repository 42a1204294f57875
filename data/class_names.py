"""Names of classes whose folders are numbers or codes, and of the plants that images show, from files beside them.

A file names classes as a table, as JSON or as lines: cat_to_name.json, PlantNet's and PlantCLEF's tables of species,
COCO's categories, ImageNet's synsets, classes.txt.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.image_index import ImageIndex, find_file_column, plain_column
from data.label_columns import GROUP_COLUMNS
from data.labels import name_key
from data.records import ADDRESS, cell_of, open_records, read_json, read_lines
from data.survey import TABLES
from utils.image_utils import is_image_name
from utils.logging_utils import UserError

NAME_COLUMNS = (  # best first; compared without case and punctuation
    *("species", "speciesname", "name", "scientificname", "latinname", "taxonname", "acceptedname", "commonname"),
    *("vernacularname", "englishname", "classname", "categoryname", "label", "labelname", "class", "category"),
    *("plant", "plantname", "flower", "flowername", "disease", "title", "imagedirname"),
)
HINTS = re.compile(r"class|label|name|species|categor|synset|taxon|plant|flower", re.IGNORECASE)
NO_NAMES = re.compile(r"readme|licen[cs]e|requirements|changelog|submission", re.IGNORECASE)
LINE = re.compile(r"\s*[\"']?(\w+)[\"']?(?:\s*[:,;=|\t)-]\s*|[\s_.]+)(.+)")  # 1 daisy, 1: daisy, 001.daisy
MAX_FILES = 40  # of a folder
MAX_JSON_BYTES = 64_000_000  # of a file that nobody gave
MAX_LINES = 100_000  # of a txt file
MAX_VALUES = 50_000  # of a column of codes; one with more is the number of a row
SCOUT_ROWS = 5000  # a column without a code in these holds none

Names = dict[str, str]  # class name by code


def find_class_names(codes: Sequence[str], folders: Sequence[Path]) -> tuple[Names, Path] | None:
    """Names of all `codes`, as a file writes them, and that file, of the first of `folders` that has one; else None.

    JSON before text before csv; JSON with these codes alone first. No name stands for two codes, or is a number.
    """
    aliases = _alias(codes)
    for folder in folders:
        found: list[tuple[bool, Names, Path]] = []
        for path in _files(folder, MAX_JSON_BYTES):
            if found and path.suffix.lower() != ".json":
                break
            try:
                for size, names in _read_names(path, aliases):
                    if len(names) == len(codes) and _are_names(names):
                        found.append((size > len(codes), names, path))
                        break
            except (UserError, OSError):  # another file of the user's
                continue
        if found:
            _, names, path = min(found, key=lambda entry: entry[0])
            return names, path
    return None


def read_class_names(file: Path, codes: Sequence[str]) -> Names:
    """Names of all `codes` by a file that the user gives. Raises UserError if it cannot be read, or lacks some."""
    best: Names = {}
    try:
        for _, names in _read_names(file, _alias(codes), is_given=True):
            if len(names) > len(best) or (len(names) == len(best) and _are_names(names) and not _are_names(best)):
                best = names
    except OSError as error:
        raise UserError(f"--class-names {file}: cannot be read ({error.strerror}); check the path") from error
    except UserError as error:
        raise UserError(f"--class-names {error}") from error
    lacking = [code for code in codes if code not in best]
    if lacking:
        listed = ", ".join(repr(code) for code in lacking[:5])
        raise UserError(
            f"--class-names {file}: has no name for {len(lacking):,} of {len(codes):,} class folders ({listed}"
            f"{', ...' if len(lacking) > 5 else ''}); give JSON such as {{{lacking[0]!r}: 'dog rose'}}, or a csv "
            "file with a column of folder names and a column of names"
        )
    return {code: best[code] for code in codes}


def _files(folder: Path, max_json: int) -> list[Path]:
    """The tables in a folder: JSON, text, others; small before large."""
    try:
        paths = [path for path in folder.iterdir() if path.suffix.lower() in TABLES and path.is_file()]
        sizes = {path: path.stat().st_size for path in paths}
    except OSError:
        return []

    def order(path: Path) -> tuple[int, int, str]:
        kind = {".json": 0, ".txt": 2}.get(path.suffix.lower(), 4)
        return kind + (not HINTS.search(path.stem)), sizes[path], path.name

    shown = [path for path in paths if not path.name.startswith(".") and not NO_NAMES.search(path.stem)]
    fitting = [path for path in shown if path.suffix.lower() != ".json" or sizes[path] <= max_json]
    return sorted(fitting, key=order)[:MAX_FILES]


def _alias(codes: Sequence[str]) -> Names:
    """Codes by the ways in which a file may write them: 1, 01, 001 and 1.0 are one; class_7 is also 7."""
    aliases: Names = {}
    numbers = {code: re.fullmatch(r"(\D*?)[ _-]?(\d+)", code.strip()) for code in codes}
    prefixes = {found[1] if found else code for code, found in numbers.items()}
    for code, found in numbers.items():
        if found and len(prefixes) == 1 and len(found[2]) < 15:
            number = found[2].lstrip("0") or "0"
            aliases |= {number.zfill(width): code for width in range(len(number), 12)} | {f"{number}.0": code}
    return aliases | {code.strip().casefold(): code for code in codes} | {code.strip(): code for code in codes}


def _are_names(names: Names) -> bool:
    """Whether these are different names, and neither codes again, nor addresses or files."""
    return len({name_key(name) for name in names.values()}) == len(names) and all(
        re.search(r"[^\W\d_]", name)
        and len(name) <= 200
        and name != code
        and not ADDRESS.match(name)
        and not is_image_name(Path(name))
        for code, name in names.items()
    )


# ---- what a file may name; each with the number of all its names


def _read_names(path: Path, aliases: Names, is_given: bool = False) -> Iterator[tuple[int, Names]]:
    """All names that a file may give to the codes; best first. Raises UserError, OSError."""
    suffix, is_hint = path.suffix.lower(), is_given or bool(HINTS.search(path.stem))
    if suffix == ".json":
        yield from _names_in_json(read_json(path), aliases, is_hint)
        return
    if suffix == ".txt":
        lines = [line.strip() for line in itertools.islice(read_lines(path), MAX_LINES) if line.strip()]
        pairs = [found for found in map(LINE.fullmatch, lines) if found]
        if len(pairs) * 10 >= len(lines) * 9:
            yield from _translate({found[1]: found[2] for found in pairs}, aliases)
        if is_hint:
            yield from _by_position(lines, aliases)
    records = open_records(path)
    yield from _names_in_rows(records.columns, records.rows(), aliases)


def _translate(names: Mapping[str, Any], aliases: Names) -> Iterator[tuple[int, Names]]:
    found: Names = {}
    for key, value in names.items():
        code, name = aliases.get(key.strip()) or aliases.get(key.strip().casefold()), cell_of(value)
        if code is not None and name and (code == key or code not in found):
            found[code] = name
    if found:
        yield len(names), _without_numbers(found)


def _without_numbers(names: Names) -> Names:
    """ "001.Black_footed" without its number, if all names begin with one."""
    plain = {code: re.sub(r"^\d+\s*[._) -]\s*", "", name) for code, name in names.items()}
    return plain if all(plain[code] not in ("", name) for code, name in names.items()) else names


def _by_position(lines: Sequence[str], aliases: Names) -> Iterator[tuple[int, Names]]:
    """Names of classes 0, 1, ... in their order, or of classes 1 to as many as there are."""
    codes = {*aliases.values()}
    for first in (0, 1):
        names = {str(number): cell_of(line) for number, line in enumerate(lines, first)}
        found = {aliases[number]: name for number, name in names.items() if number in aliases}
        if len(found) == len(codes) and (len(names) == len(found) or (first == 0 and "0" in aliases)):
            yield len(names), _without_numbers(found)


def _names_in_json(data: Any, aliases: Names, is_hint: bool, depth: int = 0) -> Iterator[tuple[int, Names]]:
    if depth > 3:
        return
    if isinstance(data, list):
        yield from _names_in_list(data, aliases, is_hint)
    elif isinstance(data, dict):
        values = list(data.values())
        if all(isinstance(value, dict) for value in values):
            keys = list(dict.fromkeys(key for value in values[:100] for key in value))
            for column in sorted(keys, key=_preference):
                if _preference(column) < len(NAME_COLUMNS):
                    yield from _translate({code: value.get(column) for code, value in data.items()}, aliases)
            yield from _names_in_list(values, aliases, is_hint)
        elif all(isinstance(value, list) for value in values):  # ImageNet's {"0": ["n01440764", "tench"]}
            rows = [[code, *map(cell_of, value)] for code, value in data.items()]
            yield from _names_in_rows(("code", "code", "name"), (row for row in rows if len(row) == 3), aliases)
        yield from _translate({key: value for key, value in data.items() if cell_of(value)}, aliases)
        yield from _invert(data, aliases)
        for key, value in data.items() if len(data) <= 50 else ():
            if isinstance(value, (dict, list)):
                yield from _names_in_json(value, aliases, is_hint or bool(HINTS.search(key)), depth + 1)


def _names_in_list(data: list, aliases: Names, is_hint: bool) -> Iterator[tuple[int, Names]]:
    if all(isinstance(entry, str) for entry in data):
        yield from _by_position(data, aliases) if is_hint else ()
    elif all(isinstance(entry, dict) for entry in data):
        keys = list(dict.fromkeys(key for entry in data[:100] for key in entry))
        yield from _names_in_rows(keys, ([cell_of(entry.get(key)) for key in keys] for entry in data), aliases)
    elif all(isinstance(entry, list) and len(entry) == 2 for entry in data):
        yield from _names_in_rows(("code", "name"), ([cell_of(cell) for cell in entry] for entry in data), aliases)


def _invert(data: Mapping[str, Any], aliases: Names) -> Iterator[tuple[int, Names]]:
    """{name: number}, if each number has one name."""
    pairs = [(cell_of(value), name) for name, value in data.items()]
    pairs = [(aliases[code], cell_of(name)) for code, name in pairs if code in aliases]
    if pairs and len(dict(pairs)) == len(pairs):
        yield len(data), dict(pairs)


def _preference(column: str) -> int:
    """Place among NAME_COLUMNS; their number for others."""
    key = plain_column(column)
    return NAME_COLUMNS.index(key) if key in NAME_COLUMNS else len(NAME_COLUMNS)


def _names_in_rows(
    columns: Sequence[str], rows: Iterable[Sequence[str]], aliases: Names
) -> Iterator[tuple[int, Names]]:
    """Names in a table: of a column of codes and one of names, where each code has one name and each name one code."""
    texts = [n for n in range(len(columns)) if len(columns) <= 3 or _preference(columns[n]) < len(NAME_COLUMNS)]
    texts.sort(key=lambda n: _preference(columns[n]))
    rows = itertools.chain([columns] if any(column in aliases for column in columns) else [], rows)  # no header
    scouted = list(itertools.islice(rows, SCOUT_ROWS))
    tables: dict[int, dict[str, Sequence[str]]] = {  # column of codes -> the first row of each of its cells
        n: {} for n in range(len(columns)) if any(row[n] in aliases for row in scouted)
    }
    changing: set[tuple[int, int]] = set()  # a code has two names
    for row in itertools.chain(scouted, rows):
        for n, seen in list(tables.items()):
            first = seen.setdefault(row[n], row)
            if first is not row and row[n] in aliases:
                changing.update((n, text) for text in texts if first[text] != row[text])
            if len(seen) > MAX_VALUES:
                del tables[n]
        if not tables:
            return
    for text in texts:
        for n, seen in tables.items():
            if n == text or (n, text) in changing or len({row[text] for row in seen.values()}) * 20 < len(seen) * 19:
                continue
            yield from _translate({cell: row[text] for cell, row in seen.items()}, aliases)


# ---- plants


def find_groups(files: Iterable[str], folders: Sequence[Path]) -> tuple[dict[str, str], Path] | None:
    """What images show the same plant, by a table with a column such as obs_id: group by file; and that table.

    `files` are names or relative paths. None if no table in `folders` gives a group to half of them, or one to all. A
    name that two files have gets none.
    """
    index = ImageIndex(files)
    for path in itertools.chain.from_iterable(_files(folder, 4 * MAX_JSON_BYTES) for folder in folders):
        try:
            groups = _read_groups(path, index)
        except UserError:  # another file of the user's
            continue
        if len(groups) * 2 >= len(index.paths) and len({*groups.values()}) > 1:
            return groups, path
    return None


def _read_groups(path: Path, index: ImageIndex) -> dict[str, str]:
    start = plain_column("".join(itertools.islice(read_lines(path), 50))[:100_000])
    if not any(name in start for name in GROUP_COLUMNS):
        return {}
    records = open_records(path)
    keys = [plain_column(column) for column in records.columns]
    column = next((keys.index(name) for name in GROUP_COLUMNS if name in keys), None)
    file = None if column is None else find_file_column(records, index)
    if column is None or file is None or file.number == column:
        return {}
    groups: dict[str, str] = {}
    for row in records.rows():
        images = dict(index.find(row[file.number], (file.way,))).get(file.way, [])
        if row[column] and (len(images) == 1 or file.way == "observation"):
            groups |= {index.paths[image]: row[column] for image in images}
    return groups

"""What labels are called: as they are written, without numbers, or as a file says what numbers and codes mean.

A file names classes as a table, as JSON or as lines: cat_to_name.json, PlantNet's and PlantCLEF's tables of species,
COCO's categories, ImageNet's synsets, classes.txt. Tables tell also which images show one plant.
"""

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.columns import GROUP_NAMES, NOT_KNOWN, label_preference, plain_name
from data.groups import original_of
from data.image_index import ImageIndex
from data.labels import are_codes, name_key, tidy_name, without_numbers
from data.records import ADDRESS, cell_of, open_records, read_json, read_lines, records_of
from data.rows import by_key
from data.survey import TABLES, Excluded
from data.tables import ImageTable
from utils.image_utils import is_image_name
from utils.logging_utils import UserError, some

HINTS = re.compile(r"class|label|name|species|categor|synset|taxon|plant|flower", re.IGNORECASE)
NO_NAMES = re.compile(r"readme|licen[cs]e|requirements|changelog|submission", re.IGNORECASE)
LINE = re.compile(r"[\"']?(\w+)[\"']?(?:\s*[:,;=|\t)-]\s*|[\s_.]+)([\"']?)(.+)\2")  # 1 daisy, 1: 'daisy', 001.daisy
MAX_FILES = 40  # of a folder
MAX_JSON_BYTES = 64_000_000  # of a file that nobody gave
MAX_LINES = 100_000  # of a txt file
MAX_VALUES = 50_000  # of a column of codes; one with more is the number of a row
SCOUT_ROWS = 5000  # a column without a code in these holds none

Names = dict[str, str]  # class name by code


@dataclass
class Labeling:
    """Class names, the class of each label as written, and where the names come from."""

    names: list[str] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    table: Path | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def name_classes(
    written: Sequence[str], names_file: str | None, beside: Sequence[Path], counts: Mapping[str, int] | None = None
) -> Labeling:
    """Classes in the order of `written`; of several spellings of one, the name is the one of most images (`counts`).

    `names_file`: a file of names for them; `beside`: folders in which such a file is looked for, if the labels are
    numbers or codes. Raises UserError for a file that lacks some, and for empty names.
    """
    labeling = Labeling()
    called = {label: tidy_name(name) for label, name in _call(written, names_file, beside, labeling).items()}
    classes = by_key((name_key(called[label]) or called[label], label) for label in written)
    if empty := classes.get(""):
        raise UserError(
            f"labels without a name: {', '.join(map(repr, empty[:5]))}; rename them, or use --class-names FILE"
        )
    for number, labels in enumerate(classes.values()):
        best = max(labels, key=lambda label: counts[label]) if counts else labels[0]
        labeling.names.append(called[best])
        labeling.labels.update(dict.fromkeys(labels, number))
        if len(labels) > 1:
            listed = " and ".join(map(repr, labels[:5]))
            labeling.warnings.append(f"{listed} are read as one class, {called[best]!r}; rename one if they differ")
    for name in labeling.names:
        if (original := original_of(name)) and name_key(original) in classes:
            labeling.warnings.append(f"{name!r} looks like a copy of {original!r}; if it is one, merge the two")
    return labeling


def _call(
    written: Sequence[str], names_file: str | None, beside: Sequence[Path], labeling: Labeling
) -> Mapping[str, str]:
    """What each label is called by the given file or one beside, else by itself without numbers."""
    called: Mapping[str, str] = dict(zip(written, written))
    if names_file is not None:
        called, labeling.table = read_class_names(Path(names_file), written), Path(names_file)
    elif (plain := without_numbers(written)) is not None:
        labeling.notes.append(f"names without their numbers: {written[0]} is {tidy_name(plain[0])}")
        return dict(zip(written, plain))
    elif are_codes(written):
        called, labeling.table = find_class_names(written, beside) or (called, None)
        if labeling.table is None:
            move = "a json or csv file of code and name gives them names: --class-names FILE"
            labeling.warnings.append(
                f"classes are called {some(written)}, and the model would answer with that; {move}"
            )
    if labeling.table is not None:
        labeling.notes.append(f"names from {labeling.table}: {written[0]} is {tidy_name(called[written[0]])}")
    return called


# ---- files of names


def folders_above(root: Path) -> list[Path]:
    """Folders with tables about the images: the data set's own, and three above, as in ILSVRC/Data/CLS-LOC."""
    return [root, *root.absolute().parents[:3]]


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
            with contextlib.suppress(UserError):  # another file of the user's
                complete = ((s, names) for s, names in _read_names(path, aliases) if len(names) == len(codes))
                found += [(s > len(codes), names, path) for s, names in complete if _are_names(names)][:1]
        if found:
            return min(found, key=lambda entry: entry[0])[1:]
    return None


def read_class_names(file: Path, codes: Sequence[str]) -> Names:
    """Names of all `codes` by a file that the user gives. Raises UserError if it cannot be read, or lacks some."""
    try:
        found = [names for _, names in _read_names(file, _alias(codes), is_given=True)]
    except UserError as error:
        raise UserError(f"--class-names {error}") from error
    best = max(found, key=lambda names: (len(names), _are_names(names)), default={})
    lacking = [code for code in codes if code not in best]
    if lacking:
        count = f"{len(lacking):,} of {len(codes):,} class folders ({some(map(repr, lacking), 5)})"
        move = f"give JSON such as {{{lacking[0]!r}: 'dog rose'}}, or a csv file"
        columns = "a column of folder names and a column of names"
        raise UserError(f"--class-names {file}: has no name for {count}; {move} with {columns}")
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


# ---- what a file may name


def _read_names(path: Path, aliases: Names, is_given: bool = False) -> Iterator[tuple[int, Names]]:
    """(number of entries, names of the codes) for each way to read a file; best first. Raises UserError."""
    is_hint = is_given or bool(HINTS.search(path.stem))
    if path.suffix.lower() == ".json":
        yield from _names_in_json(read_json(path), aliases, is_hint)
        return
    if path.suffix.lower() == ".txt":
        # Python's dictionaries are written {0: 'daisy', ... with an entry on each line.
        lines = [line for text in itertools.islice(read_lines(path), MAX_LINES) if (line := text.strip(" \t\r\n{},"))]
        pairs = [found for found in map(LINE.fullmatch, lines) if found]
        if len(pairs) * 10 >= len(lines) * 9:
            yield from _translate({found[1]: found[3] for found in pairs}, aliases)
        if is_hint:
            yield from _by_position(lines, aliases)
    records = open_records(path)
    yield from _names_in_rows(records.columns, records.rows(), aliases)


def _names_in_json(data: Any, aliases: Names, is_hint: bool, depth: int = 0) -> Iterator[tuple[int, Names]]:
    """Names in a JSON value and in the values that it holds."""
    if isinstance(data, list) and all(isinstance(entry, str) for entry in data):
        yield from _by_position(data, aliases) if is_hint else ()
        return
    inner = data if isinstance(data, dict) else {}
    records = records_of(data)
    if inner and all(isinstance(value, list) and len(value) == 2 for value in inner.values()):
        records = [{"key": key, "code": code, "name": name} for key, (code, name) in inner.items()]  # ImageNet's
    keys = list(dict.fromkeys(key for record in records[:100] for key in record))
    yield from _names_in_rows(keys, ([cell_of(record.get(key)) for key in keys] for record in records), aliases)
    for key, value in inner.items() if len(inner) <= 50 and depth < 3 else ():
        if isinstance(value, (dict, list)):
            yield from _names_in_json(value, aliases, is_hint or bool(HINTS.search(key)), depth + 1)


def _names_in_rows(
    columns: Sequence[str], rows: Iterable[Sequence[str]], aliases: Names
) -> Iterator[tuple[int, Names]]:
    """Names in a table: of a column of codes and one of names, where each code has one name and each name one code."""
    preference = [label_preference(column, columns) for column in columns]
    texts = [n for n in range(len(columns)) if len(columns) <= 3 or preference[n] < NOT_KNOWN]
    texts.sort(key=lambda n: preference[n])
    rows = itertools.chain([columns] if any(column in aliases for column in columns) else [], rows)  # no header
    scouted = list(itertools.islice(rows, SCOUT_ROWS))
    tables: dict[int, dict[str, Sequence[str]]] = {  # column of codes -> the first row of each of its cells
        n: {} for n in range(len(columns)) if any(row[n] in aliases for row in scouted)
    }
    changing: set[tuple[int, int]] = set()  # a code has two names
    for row in itertools.chain(scouted, rows) if tables else ():
        for n, seen in list(tables.items()):
            first = seen.setdefault(row[n], row)
            if first is not row and row[n] in aliases:
                changing.update((n, text) for text in texts if first[text] != row[text])
            if len(seen) > MAX_VALUES:
                del tables[n]
    for text in texts:
        for n, seen in tables.items():
            num_names = len({row[text] for row in seen.values()})
            if n != text and (n, text) not in changing and (num_names * 20 >= len(seen) * 19 or len(seen) < 20):
                yield from _translate({cell: row[text] for cell, row in seen.items()}, aliases)


def _translate(names: Names, aliases: Names) -> Iterator[tuple[int, Names]]:
    """The names of the codes among these, without numbers if all begin or end with one."""
    found: Names = {}
    for key, name in names.items():
        code = aliases.get(key) or aliases.get(key.casefold())
        if code is not None and name and (code == key or code not in found):
            found[code] = name
    if found:
        yield len(names), dict(zip(found, without_numbers([*found.values()]) or found.values()))


def _by_position(lines: Sequence[str], aliases: Names) -> Iterator[tuple[int, Names]]:
    """Names of classes 0, 1, ... in their order, or of classes 1 to as many as there are."""
    codes = {*aliases.values()}
    for first in (0, 1):
        names = {str(number): cell_of(line) for number, line in enumerate(lines, first)}
        is_whole = len(names) == len(codes) or (first == 0 and "0" in aliases)
        if is_whole and codes == {aliases[number] for number in names if number in aliases}:
            yield from _translate(names, aliases)


# ---- plants


def find_groups(files: Iterable[str], folders: Sequence[Path]) -> tuple[dict[str, str], Path] | None:
    """What images show the same plant, by a table with a column such as obs_id: group by file; and that table.

    `files` are names or relative paths. None if no table in `folders` gives a group to half of them, or one to all. A
    name that two files have gets none.
    """
    index = ImageIndex(files)
    for path in itertools.chain.from_iterable(_files(folder, 4 * MAX_JSON_BYTES) for folder in folders):
        with contextlib.suppress(UserError):  # another file of the user's
            groups = _read_groups(path, index)
            if len(groups) * 2 >= len(index.paths) and len({*groups.values()}) > 1:
                return groups, path
    return None


def _read_groups(path: Path, index: ImageIndex) -> dict[str, str]:
    start = plain_name("".join(itertools.islice(read_lines(path), 50))[:100_000])
    if not any(name in start for name in GROUP_NAMES):
        return {}
    table = ImageTable(path, index, Excluded(path.parent))
    if table.group_column in (None, table.file.name):
        return {}
    found = ((images, row[table.group_column]) for images, row in table.match_rows())
    return {index.paths[image]: group for images, group in found if group for image in images}

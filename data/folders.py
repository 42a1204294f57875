"""Image files as a source: those of class folders, and those that tables label."""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from data.class_names import find_groups, folders_above, name_classes
from data.columns import split_of_file
from data.labels import name_key
from data.layout import ClassFolder, Layout
from data.rows import SPLITS, Reading, Source, build_rows
from data.survey import TABLES, Excluded, Folder, add_unused
from data.tables import LabelRow, LabelTable, find_label_tables, read_label_tables
from utils.image_utils import printable
from utils.logging_utils import UserError, some


def load_class_folders(layout: Layout, excluded: Excluded, reading: Reading) -> Source:
    """The images of a layout's class folders. Raises UserError with all folders that cannot be used."""
    root = layout.root.path
    _check_unread_classes(layout)
    rows = [row for entry in layout.classes for row in _list_images(entry, root)]
    notes, used, warnings = list(layout.notes), list[Path](), list[str]()
    for split, folder in layout.flat.items():
        given, tables = _find_labels(folder, split, layout)
        rows += [row._replace(id=printable(os.path.relpath(row.path, root)), split=split) for row in given.rows]
        notes, used, warnings = [*notes, *given.notes], [*used, *tables], [*warnings, *given.warnings]
        if not given.rows:
            reason = f"images of {printable(folder.name)} without class folders, so they cannot be scored"
            excluded.add_folder(reason, folder)
    if not any(row.group for row in rows) and (found := find_groups([row.id for row in rows], folders_above(root))):
        groups, table = found
        rows = [row._replace(group=groups.get(row.id, "")) for row in rows]
        notes.append(f"images of one plant by {table}")
        used.append(table)
    return _build_source(LabelTable(rows, notes, warnings), layout, excluded, reading, used)


def with_parent_tables(folder: Folder) -> Folder:
    """The folder beside the tables of the folder above it: images/ is often given alone, with labels.csv beside it."""
    above = Folder(folder.path.parent, folders=[folder], num_images=folder.num_images)
    with contextlib.suppress(OSError):  # a folder above that may not be listed has no tables for us
        above.files["table"] = sorted(path.name for path in above.path.iterdir() if path.suffix.lower() in TABLES)
    return above


def _find_labels(folder: Folder, split: str, layout: Layout) -> tuple[LabelTable, list[Path]]:
    """(what tables in or beside a split folder say of its images, these tables); no rows if they give other classes.

    A table beside it may be of other images: of another split, or of the class folders, where file names are the same.
    One class for all is what the example of an answer gives, as competitions have it.
    """
    known, causes = {name_key(name) for name in layout.names}, list[str]()
    above = with_parent_tables(folder)
    beside = [table for table in find_label_tables(above) if table.parent == above.path]
    others = [table for table in beside if split_of_file(table, above.path) in ("", split)]
    if above.path == layout.root.path:
        above = layout.root
    for place, tables, part in ((folder, find_label_tables(folder), None), (above, others, (f"{folder.name}/", split))):
        if not tables:
            continue
        try:
            found = read_label_tables(tables, place, None, part)
        except UserError as error:  # another table of the user's
            causes.append(f"not used: {error}")
            continue
        names = {name_key(row.class_name): row.class_name for row in found.rows}
        if len(names) > 1 and names.keys() <= known:
            return replace(found, warnings=[*causes, *found.warnings]), tables
        listed, unknown = some([table.name for table in tables]), [names[key] for key in sorted(names.keys() - known)]
        if unknown:
            causes.append(f"not used: {listed}: labels that no class folder has: {some(unknown)}")
        elif names:
            causes.append(f"not used: {listed}: one label for all images, {some(names.values())}")
        else:
            causes += found.warnings
    return LabelTable([], [], causes), []


def load_tables(tables: list[Path], folder: Folder, excluded: Excluded, reading: Reading) -> Source:
    """The images of a folder that tables of file names and labels list."""
    found = read_label_tables(tables, folder, reading.label_column)
    return _build_source(found, Layout(folder, folder), excluded, reading, tables)


def _build_source(
    found: LabelTable, layout: Layout, excluded: Excluded, reading: Reading, used: Iterable[Path]
) -> Source:
    root = layout.root.path
    counts = Counter(row.class_name for row in found.rows)
    labeling = name_classes(sorted(counts), reading.class_names, folders_above(root), counts)
    add_unused(layout.given, excluded, {labeling.table, *used})
    by_split: dict[str, list[tuple[str, int, str, str]]] = defaultdict(list)
    for row in found.rows:
        by_split[row.split or "train"].append((row.path, labeling.labels[row.class_name], row.id, row.group))
    splits = {split: build_rows(by_split[split]) for split in SPLITS if split in by_split}
    warnings = [*labeling.warnings, *excluded.lines(), *found.warnings]
    return Source(splits, labeling.names, f"image folder {root}", [*found.notes, *labeling.notes], warnings)


def _list_images(entry: ClassFolder, root: Path) -> Iterator[LabelRow]:
    """The row of each image of a class folder; an id is the path below the data set's root."""
    for folder in entry.folder.walk() if entry.deep else [entry.folder]:
        below = "" if folder.path == root else f"{folder.path.relative_to(root).as_posix()}/"
        group = below if entry.specimens and folder is not entry.folder else ""
        for name in folder.images:
            yield LabelRow(f"{folder.path}/{name}", entry.name, printable(below + name), entry.split, group)


def _check_unread_classes(layout: Layout) -> None:
    """Raise UserError for class folders that hold images, but none that can be read: a class would be missing."""
    parents = {entry.folder.path.parent for entry in layout.classes}
    empty = [folder for folder in layout.root.walk() if folder.path.parent in parents and not folder.num_images]
    moves = {
        "heif": "HEIC/HEIF images: pip install pillow-heif",
        "raw": "raw files of a camera: export them as JPEG",
        "archive": "archives: unpack them there",
    }
    problems = [
        f"{some(names, 5)} with nothing but {move}"
        for kind, move in moves.items()
        if (names := [folder.name for folder in empty if folder.files.get(kind)])
    ]
    if problems:
        raise UserError(f"{layout.root.path}: class folders without an image that can be read: {'; '.join(problems)}")

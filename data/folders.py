"""Class folders as a source: what the classes are called, and the rows of their images."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.class_names import find_class_names, find_groups, read_class_names
from data.labels import are_codes, name_key, tidy_name, without_numbers
from data.layout import ClassFolder, Layout
from data.rows import ImageRow, Source, build_rows
from data.survey import Folder, LeftOut, is_utf8
from utils.image_utils import printable
from utils.logging_utils import UserError


def load_class_folders(layout: Layout, left_out: LeftOut, class_names: str | None) -> Source:
    """The images of a layout's class folders. `class_names`: the file that names the folders, if there is one.

    Raises UserError for folders that cannot be used, all of a kind at once.
    """
    root, written = layout.root.path, layout.names
    if odd := [name for name in written if not is_utf8(name)]:
        raise UserError(f"{root}: names of class folders are not UTF-8: {', '.join(map(repr, odd[:5]))}; rename them")
    if not is_utf8(str(root)):
        raise UserError(f"--dataset {str(root)!r}: the path is not UTF-8, which Arrow needs; rename its folders")
    _check_unread_classes(layout)
    notes, warnings = list(layout.notes), []
    names, table = _name_classes(written, class_names, root, notes, warnings)
    _add_unused(layout, table, left_out)
    by_key: dict[str, list[str]] = defaultdict(list)
    for folder_name, name in names.items():  # sorted by folder, so the labels are in that order
        by_key[name_key(name) or name].append(folder_name)
    for folder_names in by_key.values():
        if len(folder_names) > 1:
            listed = " and ".join(repr(name) for name in folder_names)
            warnings.append(f"{listed} are read as one class, {names[folder_names[0]]!r}; rename one if they differ")
    labels = {name: label for label, folder_names in enumerate(by_key.values()) for name in folder_names}
    splits = {}
    for split, entries in layout.splits.items():
        splits[split] = build_rows(
            ImageRow(path, labels[entry.name], image_id, group)
            for entry in entries
            for path, image_id, group in _list_images(entry, root)
        )
    called = [names[folder_names[0]] for folder_names in by_key.values()]
    return Source(splits, called, f"image folder {root}", notes, [*warnings, *left_out.lines()])


def _list_images(entry: ClassFolder, root: Path) -> Iterator[tuple[str, str, str]]:
    """(path, id, group) of each image of a class folder; an id is the path below the data set's root."""
    for folder in entry.folder.walk() if entry.deep else [entry.folder]:
        below = "" if folder.path == root else f"{folder.path.relative_to(root).as_posix()}/"
        group = below if entry.specimens and folder is not entry.folder else ""
        for file in folder.images:
            yield f"{folder.path}/{file.name}", printable(below + file.name), group


def _check_unread_classes(layout: Layout) -> None:
    """Raise UserError for class folders that hold images, but none that can be read: a class would be missing."""
    known = {entry.folder.path for entries in layout.splits.values() for entry in entries}
    parents = {path.parent for path in known}
    found = {
        kind: [folder for folder in layout.root.walk() if folder.path.parent in parents and _only_holds(folder, kind)]
        for kind in ("heif", "raw", "archive")
    }
    move = {
        "heif": "are HEIC/HEIF: pip install pillow-heif",
        "raw": "are raw files of a camera: export them as JPEG",
        "archive": "are archives: unpack them there",
    }
    problems = [
        f"what {', '.join(printable(folder.name) for folder in folders[:5])} hold{'s' if len(folders) == 1 else ''} "
        f"{move[kind]}"
        for kind, folders in found.items()
        if folders
    ]
    if problems:
        raise UserError(f"{layout.root.path}: class folders without an image that can be read; {'; '.join(problems)}")


def _only_holds(folder: Folder, kind: str) -> bool:
    return not folder.num_images and bool(folder.files.get(kind))


def _name_classes(
    written: Sequence[str], class_names: str | None, root: Path, notes: list[str], warnings: list[str]
) -> tuple[dict[str, str], Path | None]:
    """What the class of each folder name is called, and the table that says so: given, or found beside or above."""
    if class_names is not None:
        notes.append(f"names from {class_names}")
        names = read_class_names(Path(class_names), written)
        return {name: tidy_name(text) for name, text in names.items()}, Path(class_names)
    plain = without_numbers(written)
    if plain is not None:
        notes.append(f"names without the numbers of the folders: {written[0]} is {tidy_name(plain[0])}")
        return {name: tidy_name(text) for name, text in zip(written, plain)}, None
    if are_codes(written):
        found = find_class_names(written, (root, *list(root.parents)[:2]))
        if found is not None:
            names, table = found
            notes.append(f"names from {table}: {written[0]} is {names[written[0]]}")
            return {name: tidy_name(text) for name, text in names.items()}, table
        warnings.append(
            f"classes are called {', '.join(map(printable, written[:3]))}{', ...' if len(written) > 3 else ''}, and the "
            "model would answer with that; a json or csv file of code and name gives them names: --class-names FILE"
        )
    return {name: tidy_name(name) for name in written}, None


def _add_unused(layout: Layout, used: Path | None, left_out: LeftOut) -> None:
    """Tell of the files that other layouts would have used."""
    for folder in layout.root.walk():
        for kind in ("arrow", "archive", "mat", "parquet", "raw", "table"):
            for name in folder.files.get(kind, ()):
                if folder.path / name != used:
                    left_out.add(f"{Path(name).suffix.lower()} files", folder.path / name)

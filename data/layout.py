"""From what lies below a path (data/survey.py) to classes and splits, as people lay out images in folders.

<class>/photo.jpg and <split>/<class>/photo.jpg, a level off, nested, with splits inside the classes. A folder that can
be read in two ways is refused with the paths to give instead.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data.labels import name_key, split_of
from data.rows import SPLITS, by_key
from data.survey import Excluded, Folder
from utils.image_utils import printable
from utils.logging_utils import UserError, some

# Subfolders of a class that are no classes: of one plant (plant_01, 2024-05-01), and of several, which are parts of a
# plant, where and when it was seen (2024, may 2024, 100APPLE), a level of no meaning.
_YEAR = r"(?:[a-z]+[ _-]?)?(?:19|20)\d\d"
PLANT = re.compile(
    r"(?:plant|specimen|tree|individual|obs|observation|sample|visit|day|session|batch)[ _-]?[a-z]?\d+"
    rf"|{_YEAR}(?:[ _.-]?\d\d){{2}}",
    re.IGNORECASE,
)
PART = re.compile(
    r"bark|branch|buds?|flowers?|fruits?|habit|leaf|leaves|plant|roots?|scan|seeds?|stem|whole|other|dcim|photos|pictures"
    r"|images?|imgs?|jpe?g|png|indoor|outdoor|spring|summer|autumn|winter"
    rf"|{_YEAR}(?:[ _.-]?\d\d)?|\d{{3}}[a-z]{{3,5}}|cam(?:era)?[ _-]?[a-z]?\d+",
    re.IGNORECASE,
)
ASIDE = re.compile(  # holds no class where others do
    r"annotations|assets|docs?|examples?|figs|figure|labels|masks?|media|outputs?|paper|plots|src|static|previews?"
    r"|results|samples?|screenshots|thumbnails|thumbs|unlabell?ed|unsorted",
    re.IGNORECASE,
)
STATE = re.compile(  # of a plant: with it they make a class, so several plants have them
    r"dead|diseased?|dry|fresh|(?:un)?healthy|infected|mature|normal|(?:un)?ripe|rotten|sick|wilted|young"
)
GENUS = re.compile(r"[A-Z][a-z]+")
EPITHET = re.compile(r"[a-z-]+(?:us|a|um|is|i|ae|ens|ans|oides|[aei]le|[ae]re|stre|nse|x|or|ur|eas)")  # mostly


class ClassFolder(NamedTuple):
    name: str  # as written
    folder: Folder
    split: str = "train"
    deep: bool = False  # the images of its subfolders are its own
    specimens: bool = False  # each subfolder is one plant


@dataclass
class Layout:
    """What the folders below a path were taken for."""

    root: Folder  # that holds the classes or splits: the folder that was given, or one below
    given: Folder
    classes: list[ClassFolder] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    flat: dict[str, Folder] = field(default_factory=dict)  # splits without class folders

    @property
    def names(self) -> list[str]:
        """Names of class folders as written, sorted."""
        return sorted({entry.name for entry in self.classes})


def read_layout(top: Folder, excluded: Excluded) -> Layout:
    """Classes and splits of the folders below `top`; no class if its images lie flat. Raises UserError."""
    root = _find_root(top, excluded)
    layout = Layout(root, top)
    if root is not top:
        below = root.path.relative_to(top.path).as_posix()
        layout.notes.append(f"{printable(str(top.path))} holds one data set, {printable(below)}: it is used")
    if _has_splits_inside(root.filled):
        layout.notes.append(f"class folders: {len(root.filled)}, with the splits inside each")
        for entry in root.filled:
            layout.classes += [ClassFolder(entry.name, folder, split) for split, folder in find_splits(entry).items()]
        return layout
    splits = find_splits(root)
    others = [folder for folder in root.filled if folder not in splits.values()]
    if not splits:
        splits["train"] = root
    elif "train" in splits:
        for folder in others:
            excluded.add_folder("images beside the split folders", folder)
    elif len(others) < 2:
        listed = " and ".join(printable(folder.name) for folder in splits.values())
        raise UserError(
            f"{root.path}: has {listed}, and no train folder to learn from; add one, or give a folder of classes"
        )
    else:
        layout.notes.append("class folders beside the split folders are train")
        splits["train"] = Folder(root.path, folders=others, num_images=sum(folder.num_images for folder in others))
    counts = [_read_split(layout, split, splits, excluded) for split in SPLITS if split in splits]
    if layout.names:
        layout.notes.append(f"class folders: {'; '.join(filter(None, counts))}")
    return layout


def _read_split(layout: Layout, split: str, splits: dict[str, Folder], excluded: Excluded) -> str:
    """Add a split's class folders to the layout, those of train first; returns their number and place for the log."""
    folder, train = splits[split], [entry for entry in layout.classes if entry.split == "train"]
    while not folder.images and len(folder.filled) == 1 and folder.filled[0].filled:  # train/train/<class>
        folder = folder.filled[0]
    # What names of several levels are made of depends on all classes of a split, which may lack some of train's.
    names = {entry.folder.path.relative_to(splits["train"].path): entry.name for entry in train}
    entries = [
        entry._replace(name=names.get(entry.folder.path.relative_to(splits[split].path), entry.name), split=split)
        for entry in find_classes(folder, excluded)
    ]
    known = {name_key(entry.name) for entry in train}
    is_flat = len(entries) == 1 < len(known) and name_key(entries[0].name) not in known  # test/unknown/0001.jpg
    if split != "train" and (not entries or is_flat):
        layout.flat[split] = folder
        return ""
    if entries and folder.images:
        excluded.add("images in no class folder", folder.path / folder.images[0], len(folder.images))
    layout.classes += entries
    place = folder.path.relative_to(layout.root.path).as_posix()
    inner = [entry.folder.path for entry in entries if entry.folder.path.parent != folder.path]
    nested = f", nested such as {printable(inner[0].relative_to(folder.path).as_posix())}/" if inner else ""
    where = "" if place == "." else f" in {printable(place)}/" + ("" if place == split else f" ({split})")
    return f"{len(entries)}{nested}{where}"


def find_splits(folder: Folder) -> dict[str, Folder]:
    """Its subfolders that are splits, by split. Raises UserError for two of one split."""
    found = _folders_by_split(folder)
    for split, (first, *others) in found.items():
        if others and "train" in found:
            both = f"{first.name!r} and {others[0].name!r} are both taken for {split}"
            raise UserError(f"{folder.path}: {both}; rename one, or move it elsewhere")
    return {split: folders[0] for split, folders in found.items()}


def _folders_by_split(folder: Folder) -> dict[str, list[Folder]]:
    """Its subfolders that are splits; words that all names have in common do not count: roses_train."""
    splits = {below.name: split_of(below.name) for below in folder.filled}
    if len(splits) > 1 and not any(splits.values()):
        words = {name: re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()) for name in splits}
        common = set.intersection(*map(set, words.values()))
        splits = {name: split_of(" ".join(word for word in words[name] if word not in common)) for name in splits}
        if not all(splits.values()) or "train" not in splits.values():
            return {}
    return by_key((split, below) for below in folder.filled if (split := splits[below.name]))


def _find_root(folder: Folder, excluded: Excluded) -> Folder:
    """The folder that must be meant, it or one below, as no other holds classes. Raises UserError for several."""
    children = [child for child in folder.filled if not ASIDE.fullmatch(child.name)]
    splits = _folders_by_split(folder)
    leaves = [child for child in children if not child.filled and child not in chain(*splits.values())]
    if folder.images or "train" in splits or _has_splits_inside(children) or len(leaves) > 1:
        return folder
    inner = [child for child in children if child.filled] if len(children) == 1 else _topmost_with_train(folder)
    if not inner:
        return folder
    if len(inner) > 1:
        raise UserError(f"{folder.path}: holds {len(inner)} data sets; {give_one(below.path for below in inner)}")
    for child in folder.filled:
        if child.path != inner[0].path and child.path not in inner[0].path.parents:
            excluded.add_folder("images beside the data set", child)
    return _find_root(inner[0], excluded)


def _topmost_with_train(folder: Folder) -> list[Folder]:
    found = [[child] if "train" in _folders_by_split(child) else _topmost_with_train(child) for child in folder.filled]
    return list(chain(*found))


def _has_splits_inside(children: Sequence[Folder]) -> bool:
    """Whether these are classes with their images in train and test below, not data sets side by side."""
    inner = [below for child in children for below in child.filled]
    splits = {split_of(below.name) for below in inner}
    are_classes = all(child.filled and not child.images for child in children) and len(children) > 1
    return are_classes and "train" in splits and None not in splits and not any(below.filled for below in inner)


def give_one(paths: Iterable[Path]) -> str:
    return "give one of them: " + ", ".join(f"--dataset {printable(str(path))!r}" for path in paths)


def find_classes(top: Folder, excluded: Excluded) -> list[ClassFolder]:
    """The class folders below; a nested one whose name is a species' is "Genus species". Raises UserError."""
    aside = [child for child in top.filled if ASIDE.fullmatch(child.name)]
    children = [child for child in top.filled if child not in aside] or aside
    for child in aside if children is not aside else ():
        excluded.add_folder("images in folders that name no class", child)
    groups = [child for child in children if not child.images and not _is_one_class(child)]
    if len(children) > 1 and all(map(_has_one_inside, groups)):
        groups = []  # rose/balcony/ among class folders: rose
    plain = sorted({*children} - {*groups}, key=lambda child: child.name)
    if len(plain) == len(children) == 1 and PART.fullmatch(plain[0].name):
        return []
    if len(groups) > 1 and not plain:
        _refuse_candidates(top, groups)
    entries: list[ClassFolder] = []
    nested: list[tuple[str, ClassFolder]] = []
    for child in plain:
        deep = bool(child.filled) and (_is_one_class(child) or (not child.images and _has_one_inside(child)))
        specimens = deep and all(PLANT.fullmatch(below.name) for below in child.filled)
        entries.append(ClassFolder(child.name, child, deep=deep, specimens=specimens))
        for below in child.filled if not deep else ():
            excluded.add_folder("images in a folder inside a class folder", below)
    keys = {name_key(child.name) for child in plain}
    for group in groups:
        if plain and any("train" in _folders_by_split(below) for below in group.walk()):
            excluded.add_folder("images of a data set among the class folders", group)
            continue
        inner = find_classes(group, excluded)
        if not inner:  # rose/2024/ beside rose/masks/: rose
            part = next(child for child in group.filled if not ASIDE.fullmatch(child.name))
            entries.append(ClassFolder(group.name, part, deep=True))
            continue
        if plain and sum(name_key(entry.name) in keys for entry in inner) * 2 > len(inner):
            excluded.add_folder("images in a folder with the same classes again", group)
            continue
        nested += [(group.name, entry) for entry in inner]
    return entries + _name_nested(nested, entries)


def _name_nested(nested: Sequence[tuple[str, ClassFolder]], others: Sequence[ClassFolder]) -> list[ClassFolder]:
    """Nested class folders, given with their parents' names: of species "Genus species", of others both if need be."""
    keys = [name_key(entry.name) for entry in (*others, *(entry for _, entry in nested))]
    if len(set(keys)) < len(keys) or (nested and all(_is_genus_of(parent, entry.name) for parent, entry in nested)):
        return [entry._replace(name=f"{parent} {entry.name}") for parent, entry in nested]
    return [entry for _, entry in nested]


def _has_one_inside(folder: Folder) -> bool:
    """Whether its images lie in one subfolder, whose name is no epithet."""
    inner = folder.filled
    return len(inner) == 1 and not inner[0].filled and not _is_genus_of(folder.name, inner[0].name)


def _is_genus_of(parent: str, name: str) -> bool:
    return bool(GENUS.fullmatch(parent) and EPITHET.fullmatch(name))


def _is_one_class(folder: Folder) -> bool:
    """Whether what lies below is of one class: parts of a plant, plants, years, or a level of no meaning."""
    are_parts = all(PART.fullmatch(below.name) or PLANT.fullmatch(below.name) for below in folder.filled)
    return are_parts and not any(below.filled for below in folder.filled)


def _refuse_candidates(top: Folder, groups: Sequence[Folder]) -> None:
    """Raise UserError if most classes appear in several of the groups, such as color/ and grayscale/."""
    seen = Counter(key for group in groups for key in {name_key(below.name) for below in group.filled})
    shared = {name for name, count in seen.items() if count > 1}
    # Two genera may have an epithet in common: the species' names tell them apart.
    are_species = len(shared) == 1 and all(_is_genus_of(group.name, *shared) for group in groups)
    if len(shared) * 2 > len(seen) and not are_species and not all(map(STATE.fullmatch, seen)):
        same = f"its {len(groups)} folders hold folders of the same names ({', '.join(sorted(seen)[:3])})"
        move = (
            f"{give_one(group.path for group in groups)}; if they are the classes, put the images of each right into it"
        )
        raise UserError(f"{top.path}: {same}; {move}; if splits, call them train, validation and test")


def find_boxes(folder: Folder) -> list[Path]:
    """Files that describe boxes in images: of YOLO, COCO and Pascal VOC."""
    starts, ends = ("_annotations", "instances_"), (".xml", "data.yaml")
    files = [*folder.find("table"), *folder.find("other")]
    return [
        file for file in files if "labels" in file.parts or file.name.startswith(starts) or file.name.endswith(ends)
    ]


def describe_flat(folder: Folder) -> str:
    """Why a folder without class folders cannot be used, and the next move."""
    archives, tables = folder.find("archive"), folder.find("table")
    if folder.num_images and (boxes := find_boxes(folder)):
        found = f"looks like a detection data set (boxes in {printable(str(boxes[0]))})"
        move = "cut the boxes out into <class name>/photo.jpg"
        return f"{folder.path}: {found}, whose images have no class of their own; {move}"
    if folder.num_images:
        flat = max(folder.walk(), key=lambda below: len(below.images))
        more = "" if folder.filled else f"; if they are one class of several, --dataset {str(folder.path.parent)!r}"
        if tables:
            more = f" ({some(path.name for path in tables)}: no such table)"
        found = f"{len(flat.images):,} images lie here, none in a class folder"
        move = "move them to <class name>/photo.jpg, or give a table of file names and labels: --dataset labels.csv"
        return f"{flat.path}: {found}; {move}{more}"
    if archives:
        found = f"no images but {len(archives)} archives such as {printable(archives[0].name)}"
        return f"{folder.path}: holds {found}; unpack them first: {unpack_command(archives[0])}"
    others = some(path.name for kind in ("raw", "other") for path in folder.find(kind))
    expected = "expected <class name>/photo.jpg, <split>/<class name>/photo.jpg, a table, parquet files"
    return f"{folder.path}: no images found{others and f', but {others}'}; {expected}, or jpg/ with the two .mat files"


def unpack_command(archive: Path) -> str:
    name, stem = (shlex.quote(printable(name)) for name in (archive.name, archive.name.split(".")[0]))
    if archive.suffix.lower() == ".zip":
        return f"unzip {name} -d {stem}"
    if archive.suffix.lower() in (".7z", ".rar"):
        return f"7z x {name} -o{stem}"
    return f"mkdir {stem} && tar -xf {name} -C {stem}"

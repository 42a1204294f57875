"""What lies below a path, looked at once: images, tables, archives and other files by folder, and what is excluded.

Nothing is decided here; data/layout.py takes a survey and decides what is a class, a split or a table.
"""

import os
import stat
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils.image_utils import HEIF_SUFFIXES, SUFFIXES, looks_like_image, reads_heif
from utils.logging_utils import UserError, some

TAXONOMY_FILE = "taxonomy.csv"  # genus and family of the classes (data/taxonomy.py)
MAX_DEPTH = 32  # folders below the path
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".txt")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst")
CAMERA_RAW = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")
# No images whatever they begin with: backups, parts of downloads, and what lies beside each image.
NO_IMAGES = (".bak", ".crdownload", ".download", ".old", ".part", ".partial", ".tmp", ".aae", ".xml", ".xmp", ".npy")
JUNK = {
    *("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information", "__pycache__"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "node_modules", "site-packages"),
}
# A folder with one of these files holds no plants to learn from.
NOT_DATA = {"training_config.json": "a training run", "pyvenv.cfg": "a Python environment"}

KINDS = {".parquet": "parquet", ".arrow": "arrow", ".mat": "mat"}
for _kind, _suffixes in (("table", TABLES), ("archive", ARCHIVES), ("raw", CAMERA_RAW), ("other", NO_IMAGES)):
    KINDS |= dict.fromkeys(_suffixes, _kind)


@dataclass(eq=False)  # compared by what they hold, 20,000 classes would take an hour
class Folder:
    """A folder with what it holds; hidden files and what systems leave behind are not in it."""

    path: Path
    images: list[str] = field(default_factory=list)
    files: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # kind, e.g. "parquet" -> names
    folders: list["Folder"] = field(default_factory=list)
    num_images: int = 0  # in it and below

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def filled(self) -> list["Folder"]:
        """The subfolders with images in them or below."""
        return [folder for folder in self.folders if folder.num_images]

    def walk(self) -> Iterator["Folder"]:
        yield self
        for folder in self.folders:
            yield from folder.walk()

    def list_images(self) -> Iterator[str]:
        """Paths of the images in it and below."""
        for folder in self.walk():
            prefix = f"{folder.path}/".removeprefix("./")
            yield from (prefix + name for name in folder.images)

    def find(self, kind: str) -> list[Path]:
        """Paths of the files of a kind in it and below, sorted."""
        return sorted(folder.path / name for folder in self.walk() for name in folder.files.get(kind, ()))


@dataclass
class Excluded:
    """What is not used: for each reason how many files, and the first three places."""

    root: Path
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    places: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: str, place: Path | str, count: int = 1) -> None:
        """`place`: a path, which is reported as it lies below the root, or a text such as a cell of a table."""
        self.counts[reason] += count
        if len(self.places[reason]) <= 3:
            self.places[reason].append(place if isinstance(place, str) else os.path.relpath(place, self.root))

    def add_folder(self, reason: str, folder: Folder) -> None:
        self.add(reason, folder.path, folder.num_images)

    def lines(self) -> list[str]:
        """A line for each reason, e.g. "not used: .mov files: 4 (oak/a.mov, oak/b.mov, oak/c.mov, ...)"."""
        return [
            f"not used: {reason}: {self.counts[reason]:,} ({some(place[:100] for place in places)})"
            for reason, places in sorted(self.places.items())
        ]


def survey(path: Path) -> tuple[Folder, Excluded]:
    """What lies in a folder and below, and what of it is excluded. Raises UserError if it cannot be listed."""
    excluded = Excluded(path)
    try:
        seen = {_identity(os.stat(folder)) for folder in (path, *path.resolve().parents)}
        return _look(path, excluded, seen, 0), excluded
    except OSError as error:
        raise UserError(f"{path}: cannot be listed ({error.strerror}); check the path and its permissions") from error


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _look(path: Path, excluded: Excluded, seen: set[tuple[int, int]], depth: int) -> Folder:
    """`seen`: each folder met, so that links neither loop nor show a folder twice. Raises OSError."""
    folder = Folder(path)
    with os.scandir(path) as listing:
        entries = sorted(listing, key=lambda entry: (entry.is_symlink(), entry.name))
    for entry in entries:
        if entry.name.startswith(".") or entry.name.endswith(("~", ".lrdata")) or entry.name.lower() in JUNK:
            continue
        try:
            status, reason = entry.stat(), None
            if stat.S_ISREG(status.st_mode):
                reason = _add_file(folder, entry.name, status.st_size)
            elif not stat.S_ISDIR(status.st_mode):
                reason = "devices or pipes"
            elif _identity(status) in seen:
                reason = "links to a folder that is read already, or above"
            elif depth == MAX_DEPTH:
                reason = f"folders more than {MAX_DEPTH} levels down"
            elif found := [why for name, why in NOT_DATA.items() if (path / entry.name / name).exists()]:
                reason = f"folders that are {found[0]}"
            else:
                seen.add(_identity(status))
                folder.folders.append(_look(path / entry.name, excluded, seen, depth + 1))
        except OSError as error:
            is_gone = entry.is_symlink() and isinstance(error, FileNotFoundError)
            reason = "links to nowhere" if is_gone else f"files or folders that cannot be opened: {error.strerror}"
        if reason:
            excluded.add(reason, path / entry.name)
    folder.folders.sort(key=lambda below: below.name)
    folder.images.sort()
    folder.num_images = len(folder.images) + sum(below.num_images for below in folder.folders)
    if depth and not (folder.images or folder.files or folder.folders):
        excluded.add("folders without images", path)
    return folder


def _add_file(folder: Folder, name: str, size: int) -> str | None:
    """Why it is not used, if so. Of a million files, most are images: a Path is made for others only."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in SUFFIXES and (suffix in KINDS or not size or not looks_like_image(folder.path / name)):
        kind = KINDS.get(suffix, "other")
        folder.files[kind].append(name)
        return f"{suffix or 'nameless'} files" if kind == "other" else None
    if not size:
        return "empty image files (0 bytes)"
    if not is_utf8(name):
        return "images whose name is not UTF-8"
    if suffix in HEIF_SUFFIXES and not reads_heif():
        folder.files["heif"].append(name)
        return "HEIC/HEIF images, which pillow-heif reads (pip install pillow-heif)"
    folder.images.append(name)
    return None


def add_unused(root: Folder, excluded: Excluded, used: Collection[Path | None] = ()) -> None:
    """Tell of the files, but those `used`, that some layout would have used: tables, archives, a camera's raw files."""
    absolute = {path.absolute() for path in used if path}
    for folder in root.walk():
        for kind in ("arrow", "archive", "mat", "parquet", "raw", "table"):
            for name in folder.files.get(kind, ()):
                if (folder.path / name).absolute() not in absolute and name != TAXONOMY_FILE:
                    excluded.add(f"{Path(name).suffix.lower()} files", folder.path / name)


def is_utf8(name: str) -> bool:
    """Arrow takes no other names; Python keeps the bytes of others as lone surrogates."""
    return name.encode(errors="ignore").decode() == name

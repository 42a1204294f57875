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
# Files that are no images: their content is not looked at.
OTHER_SUFFIXES = (
    *(".aae", ".avi", ".bib", ".cfg", ".db", ".doc", ".docx", ".gitkeep", ".h5", ".htm", ".html", ".ini", ".ipynb"),
    *(".lock", ".log", ".m4v", ".md", ".mov", ".mp4", ".npy", ".npz", ".pdf", ".pkl", ".psd", ".py", ".pt"),
    *(".bak", ".crdownload", ".download", ".old", ".part", ".partial", ".tmp"),  # of an image at times, but no other
    *(".safetensors", ".sh", ".svg", ".toml", ".xls", ".xlsx", ".xml", ".xmp", ".yaml", ".yml"),
)
JUNK = {
    *("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information", "__pycache__"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "node_modules", "site-packages"),
}
# A folder with one of these files holds no plants to learn from.
NOT_DATA = {"training_config.json": "a training run", "pyvenv.cfg": "a Python environment"}


KINDS = {".parquet": "parquet", ".arrow": "arrow", ".mat": "mat"} | {
    suffix: kind
    for kind, suffixes in [("table", TABLES), ("archive", ARCHIVES), ("raw", CAMERA_RAW), ("other", OTHER_SUFFIXES)]
    for suffix in suffixes
}


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
        status = os.stat(path)
        os.scandir(path).close()
    except OSError as error:
        raise UserError(f"{path}: cannot be listed ({error.strerror}); check the path and its permissions") from error
    above = [os.stat(folder) for folder in path.resolve().parents]
    seen = {(status.st_dev, status.st_ino) for status in [status, *above]}
    return _look(path, excluded, seen, 0), excluded


def _look(path: Path, excluded: Excluded, seen: set[tuple[int, int]], depth: int) -> Folder:
    """`seen`: device and inode of each folder met, so that links neither loop nor show a folder twice."""
    folder = Folder(path)
    try:
        with os.scandir(path) as listing:
            entries = sorted(listing, key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError as error:
        excluded.add(f"folders that cannot be opened: {error.strerror}", path)
        return folder
    for entry in entries:
        if entry.name.startswith(".") or entry.name.endswith(("~", ".lrdata")) or entry.name.lower() in JUNK:
            continue
        try:
            status = entry.stat()
        except OSError as error:
            reason = "links to nowhere" if entry.is_symlink() else f"files that cannot be read: {error.strerror}"
            excluded.add(reason, path / entry.name)
            continue
        if stat.S_ISDIR(status.st_mode):
            entry_path = path / entry.name
            if (status.st_dev, status.st_ino) in seen:
                excluded.add("links to a folder that is read already, or above", entry_path)
            elif depth == MAX_DEPTH:
                excluded.add(f"folders more than {MAX_DEPTH} levels down", entry_path)
            elif not_data := next((why for name, why in NOT_DATA.items() if (entry_path / name).exists()), None):
                excluded.add(f"folders that are {not_data}", entry_path)
            else:
                seen.add((status.st_dev, status.st_ino))
                folder.folders.append(_look(entry_path, excluded, seen, depth + 1))
        elif not stat.S_ISREG(status.st_mode):
            excluded.add("devices or pipes", path / entry.name)
        else:
            _add_file(folder, entry.name, status.st_size, excluded)
    folder.folders.sort(key=lambda below: below.name)
    folder.images.sort()
    folder.num_images = len(folder.images) + sum(below.num_images for below in folder.folders)
    if depth and not (folder.images or folder.files or folder.folders):
        excluded.add("folders without images", path)
    return folder


def _add_file(folder: Folder, name: str, size: int, excluded: Excluded) -> None:
    """Of a million files, most are images: a Path is made for others only."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in SUFFIXES and (suffix in KINDS or not size or not looks_like_image(folder.path / name)):
        kind = KINDS.get(suffix, "other")
        folder.files[kind].append(name)
        if kind == "other":
            excluded.add(f"{suffix or 'nameless'} files", folder.path / name)
    elif not size:
        excluded.add("empty image files (0 bytes)", folder.path / name)
    elif not is_utf8(name):
        excluded.add("images whose name is not UTF-8", folder.path / name)
    elif suffix in HEIF_SUFFIXES and not reads_heif():
        folder.files["heif"].append(name)
        excluded.add("HEIC/HEIF images, which pillow-heif reads (pip install pillow-heif)", folder.path / name)
    else:
        folder.images.append(name)


def add_unused(root: Folder, excluded: Excluded, used: Collection[Path | None] = ()) -> None:
    """Tell of the files, but those `used`, that some layout would have used: tables, archives, a camera's raw files."""
    for folder in root.walk():
        for kind in ("arrow", "archive", "mat", "parquet", "raw", "table"):
            for name in folder.files.get(kind, ()):
                if folder.path / name not in used and name != TAXONOMY_FILE:
                    excluded.add(f"{Path(name).suffix.lower()} files", folder.path / name)


def is_utf8(name: str) -> bool:
    """Arrow takes no other names; Python keeps the bytes of others as lone surrogates."""
    return name.encode(errors="ignore").decode() == name

"""Where images come from: each source as rows in Arrow, not decoded.

A row is {"image": {"bytes", "path"}, "label": int, "id": str}; images are decoded one at a time, in the collator. The
sources: the hub data set, the official VGG release, a folder of parquet files, a folder of images, synthetic images.
What a source does not read is an error or one warning, with the reason.
"""

import glob
import hashlib
import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset

from data.labels import CLASS_NAMES, official_counts
from data.streaming import Stream
from data.synthetic import SPECIES, SPLIT_SIZES, draw_split
from utils.image_utils import SUFFIXES, images_below, is_image_name, printable
from utils.logging_utils import UserError, first_line, logger

HUB_REPOSITORY = "Donghyun99/Oxford-Flower-102"
OFFICIAL_SIZES = {"train": 1020, "validation": 1020, "test": 6149}
SPLITS = tuple(OFFICIAL_SIZES)
ROW = Features({"image": Image(decode=False), "label": Value("int64"), "id": Value("string")})
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
VGG_MD5 = {"imagelabels.mat": "e0620be6f572b9609742df49c70aed4d", "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c"}
VGG_SPLIT_KEYS = {"train": "trnid", "validation": "valid", "test": "tstid"}


class Source(NamedTuple):
    """The splits that a source has (an image folder may have train alone), and what its labels are called."""

    splits: dict[str, Dataset | Stream]  # rows may have a column "group": images of one plant, which one split gets
    class_names: list[str]
    description: str
    notes: Sequence[str] = ()  # what was taken for a class, a split, a name
    warnings: Sequence[str] = ()  # what was left out, and why


def count_images(rows: Dataset | Stream) -> int:
    """Images of a split; of a stream, those of one pass."""
    return rows.num_images if isinstance(rows, Stream) else len(rows)


def load_source(dataset: str, revision: str, streaming: bool, seed: int, allow_missing: bool) -> Source:
    """The source that `dataset` refers to: a name, or a folder whose contents tell its kind. Raises UserError."""
    folder = Path(dataset)
    if dataset == "synthetic":
        return load_synthetic()
    if dataset == "oxford_flowers102":
        return load_hub(HUB_REPOSITORY, revision)
    if not folder.is_dir():
        raise UserError(f"--dataset {dataset}: no such folder; give a folder, oxford_flowers102 or synthetic")
    if streaming:
        return stream_parquet_folder(folder, seed, allow_missing)
    if (folder / "jpg").is_dir() or (folder / "setid.mat").exists():
        return load_official_release(folder, allow_missing)
    if any(folder.rglob("*.parquet")):
        return load_parquet_folder(folder, allow_missing)
    return load_image_folder(folder)


def load_synthetic() -> Source:
    splits = {split: Dataset.from_list(draw_split(split), features=ROW) for split in SPLIT_SIZES}
    return Source(splits, list(SPECIES), "synthetic flowers of ten invented species")


# ---- parquet


def load_hub(repository: str, revision: str) -> Source:
    """Oxford Flowers 102 from the hub: parquet, read as memory-mapped Arrow from the library's cache."""
    try:
        splits = load_dataset(repository, revision=revision)
    except Exception as error:  # the library and the hub raise a dozen kinds
        raise UserError(
            f"data set {repository} at revision {revision} cannot be loaded ({first_line(error)}); check the network "
            "and HF_TOKEN, or give --dataset FOLDER with the images"
        ) from error
    description = f"hub data set {repository} at {revision[:12]}"
    _check_columns(splits, SPLITS, description)
    source = _as_official(splits, description)
    for split, expected in OFFICIAL_SIZES.items():
        found = count_images(source.splits[split])
        if found != expected:
            raise UserError(
                f"{description}: split {split} has {found} images, expected {expected}; give the official revision "
                "with --dataset-revision"
            )
    return source


def load_parquet_folder(folder: Path, allow_missing: bool) -> Source:
    """A folder of parquet files, columns `image` and `label` (0-based), split by file name: train*, val*, test*."""
    description = f"parquet folder {folder}"
    splits = _read_parquet(folder, _find_parquet_files(folder, allow_missing))
    _check_columns(splits, SPLITS, description)
    names = _label_names(splits["train"])
    if names and tuple(names) != CLASS_NAMES:
        _check_labels(splits, len(names), description)
        return Source(_with_ids(splits), [tidy_name(name) for name in names], description)
    source = _as_official(splits, description)
    if not names:
        highest = pyarrow.compute.max(splits["train"].data.column("label")).as_py()
        if highest < len(CLASS_NAMES) - 1:
            raise UserError(
                f"{folder}: labels of train go up to {highest} and have no names, and those of Oxford Flowers go up to "
                f"{len(CLASS_NAMES) - 1}; write them as a ClassLabel"
            )
        logger.warning("%s: the labels have no names; they are taken as the 102 of Oxford Flowers", folder)
    return source


def stream_parquet_folder(folder: Path, seed: int, allow_missing: bool) -> Source:
    """The same with its train images streamed; the labels must have names."""
    if not any(folder.rglob("*.parquet")):
        raise UserError(f"--streaming true: {folder} has no parquet files, and nothing else is streamed; use false")
    files = _find_parquet_files(folder, allow_missing)
    train_files = files.pop("train")
    splits = _read_parquet(folder, files)
    _check_columns(splits, files, f"parquet folder {folder}")
    try:
        train = Stream(train_files, seed)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder}: the parquet files cannot be read ({first_line(error)})") from error
    names = _label_names(train)
    if not names:
        raise UserError(
            f"--streaming true: the labels in {folder} have no names; write them as a ClassLabel, or use false"
        )
    for split, rows in splits.items():
        if _label_names(rows) != names:
            raise UserError(
                f"--streaming true: the label names of {split} in {folder} differ from those of train, or are in "
                "another order; write all with the same ClassLabel"
            )
    description = f"stream of {len(train_files):,} parquet files in {folder}"
    _check_labels(splits, len(names), description)
    return Source({"train": train} | _with_ids(splits), [tidy_name(name) for name in names], description)


def _find_parquet_files(folder: Path, allow_missing: bool) -> dict[str, list[Path]]:
    """The files of each split: their name, or their folder's name, begins with the split's name."""
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for file in sorted(folder.rglob("*.parquet")):
        for split in SPLITS:
            if any(part.startswith(SPLIT_FOLDERS[split]) for part in file.relative_to(folder).parts):
                files[split].append(file)
    missing = [split for split in SPLITS if not files[split]]
    if missing:
        raise UserError(
            f"{folder}: no parquet file for {' and '.join(missing)}; give files or folders names that begin with "
            "train, validation and test"
        )
    series: Counter[tuple[Path, int]] = (
        Counter()
    )  # files are written as train-00000-of-00004.parquet, so a missing one can be noticed
    for file in itertools.chain(*files.values()):
        if found := re.fullmatch(r"(.+)-\d+-of-(\d+)(-\w+)?", file.stem):
            series[file.parent / found[1], int(found[2])] += 1
    for (name, expected), count in series.items():
        if count < expected:
            message = f"{name}-*-of-{expected:05d}: {count} of {expected} files are there"
            if not allow_missing:
                raise UserError(f"{message}; add the missing files, or continue without them: --allow-missing true")
            logger.warning("%s; continuing without the missing files", message)
    for file in itertools.chain(*files.values()):
        try:
            pyarrow.parquet.read_metadata(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: is not a parquet file ({first_line(error)}); write it again") from error
    return files


def _read_parquet(folder: Path, files: dict[str, list[Path]]) -> DatasetDict:
    patterns = {split: [glob.escape(str(file)) for file in paths] for split, paths in files.items()}
    try:
        return load_dataset("parquet", data_files=patterns)
    except Exception as error:
        raise UserError(f"{folder}: the parquet files cannot be read ({first_line(error)})") from error


def _label_names(rows: Dataset | Stream) -> list[str] | None:
    return getattr(rows.features["label"], "names", None)


def _check_columns(splits: DatasetDict, expected: Iterable[str], description: str) -> None:
    for split in expected:
        if split not in splits:
            raise UserError(
                f"{description}: split {split} is missing, it has {', '.join(splits)}; expected are train, validation "
                "and test"
            )
        if not {"image", "label"} <= set(splits[split].column_names):
            raise UserError(
                f"{description}: has the columns {', '.join(splits[split].column_names)}; expected are image and "
                "label, rename them"
            )


def _check_labels(splits: DatasetDict, count: int, description: str) -> None:
    """Raise UserError unless every label is one of 0 to count - 1; the hub writes -1 for an unknown one."""
    for split, rows in splits.items():
        labels = rows.data.column("label")
        if not pyarrow.types.is_integer(labels.type) or labels.null_count:
            raise UserError(
                f"{description}: labels of {split} are {labels.type} with {labels.null_count:,} missing; expected is "
                "an integer for each image"
            )
        lowest, highest = pyarrow.compute.min_max(labels).as_py().values()
        if len(labels) and (lowest < 0 or highest >= count):
            raise UserError(
                f"{description}: labels of {split} go from {lowest} to {highest}, expected 0 to {count - 1}; write "
                "them as a ClassLabel with its names, and leave images without a label out"
            )


def _as_official(splits: DatasetDict, description: str) -> Source:
    """Rows whose labels are the 102 official classes, whatever the source calls them."""
    _check_labels(splits, len(CLASS_NAMES), description)
    check_official_counts(splits, description)
    return Source(_with_ids(splits), list(CLASS_NAMES), description)


def check_official_counts(splits: dict[str, Dataset], description: str) -> None:
    """Raise UserError unless every split of full size has the official number of images of each class."""
    for split, rows in splits.items():
        counts = Counter(rows["label"]) if len(rows) == OFFICIAL_SIZES[split] else {}
        for label, expected in enumerate(official_counts(split) if counts else ()):
            if counts[label] != expected:
                raise UserError(
                    f"{description}: split {split} has {counts[label]} images of {CLASS_NAMES[label]!r}, the official "
                    f"one has {expected}; are its labels 0-based and in official order?"
                )


def _with_ids(splits: DatasetDict) -> dict[str, Dataset]:
    """Add the id column: the image's file name if it is unique in the source for every image, else split and number."""
    rows = {
        split: split_rows.select_columns(["image", "label"]).cast_column("image", Image(decode=False))
        for split, split_rows in splits.items()
    }
    stems = {}
    for split in rows:  # by the chunks of the column: combining them would copy every image into memory
        paths = pyarrow.compute.struct_field(rows[split].data.column("image"), "path").to_pylist()
        stems[split] = [Path(path).stem if path else "" for path in paths]
    everywhere = list(itertools.chain(*stems.values()))
    if not all(everywhere) or len(set(everywhere)) < len(everywhere):
        stems = {split: [f"{split}-{index:06d}" for index in range(len(rows[split]))] for split in rows}
    return {split: rows[split].add_column("id", stems[split]) for split in rows}


# ---- files


def load_official_release(folder: Path, allow_missing: bool) -> Source:
    """The VGG release of Oxford Flowers 102: jpg/image_00001.jpg ..., imagelabels.mat, setid.mat."""
    from scipy.io import loadmat

    for name, md5 in VGG_MD5.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: is missing; the official release has it beside the folder jpg")
        if hashlib.md5(file.read_bytes()).hexdigest() != md5:
            raise UserError(f"{file}: is not the official file (its md5 is not {md5}); download it again")
    labels = loadmat(folder / "imagelabels.mat")["labels"][0]  # 1-based classes of images 1 to 8189
    split_numbers = loadmat(folder / "setid.mat")
    present = {path.name for path in (folder / "jpg").glob("*.jpg")}
    splits, missing = {}, []
    for split, key in VGG_SPLIT_KEYS.items():
        images = []
        for number in sorted(int(number) for number in split_numbers[key][0]):
            file = folder / "jpg" / f"image_{number:05d}.jpg"
            if file.name in present:
                images.append((file, int(labels[number - 1]) - 1, file.stem))
            else:
                missing.append(file.name)
        splits[split] = _build_rows(images)
    if missing:
        message = (
            f"{folder / 'jpg'}: {len(missing)} of {sum(OFFICIAL_SIZES.values())} images are missing "
            f"({', '.join(missing[:5])}, ...)"
        )
        if not allow_missing:
            raise UserError(f"{message}; unpack 102flowers.tgz again, or continue without them: --allow-missing true")
        logger.warning("%s; continuing without them", message)
    return Source(splits, list(CLASS_NAMES), f"VGG release in {folder}")


def load_image_folder(folder: Path) -> Source:
    """Your own plants: <split>/<class name>/photo.jpg, or <class name>/photo.jpg, which is all returned as train."""
    found = {
        split: [folder / name for name in names if (folder / name).is_dir()] for split, names in SPLIT_FOLDERS.items()
    }
    roots = {split: paths[0] for split, paths in found.items() if paths} if found["train"] else {"train": folder}
    children = {path for parent in {folder, *roots.values()} for path in _list_shown(parent)}
    class_folders = {path for path in children - {*roots.values()} if path.is_dir() and path.parent in roots.values()}
    classes = sorted({path.name for path in class_folders})
    for name in classes:
        if not _is_utf8(name):
            raise UserError(f"{folder}: the name of class folder {name!r} is not UTF-8; rename it")
    if not classes:
        raise UserError(
            f"{folder}: no images found; expected <class name>/photo.jpg, <split>/<class name>/photo.jpg, parquet "
            "files, or jpg/ with the two .mat files"
        )
    skipped = defaultdict(list, {"not in a class folder": sorted(children - {*roots.values()} - class_folders)})
    splits = {}
    for split, root in roots.items():
        images = []
        for label, name in enumerate(classes):
            for path in _list_shown(root / name) if root / name in class_folders else ():
                if reason := _why_skipped(path):
                    skipped[reason].append(path)
                else:
                    images.append((path, label, printable(str(path.relative_to(folder)))))
        splits[split] = _build_rows(images)
    _log_skipped(folder, skipped)
    trained = set(splits["train"]["label"])
    for label, name in enumerate(classes):
        if label not in trained:
            raise UserError(
                f"{folder}: class {name!r} has no image to train on; add some to its folder, or remove the folder"
            )
    return Source(splits, [tidy_name(name) for name in classes], f"image folder {folder}")


def load_ood_images(folder: Path) -> Dataset:
    """The images in a folder, whatever they show; the label 0 means nothing."""
    files = images_below(folder)
    if not files:
        raise UserError(f"--ood {folder}: no images found there; give a folder of images without the classes")
    return _build_rows([(file, 0, str(file.relative_to(folder))) for file in files])


def _list_shown(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _why_skipped(path: Path) -> str | None:
    """Why what lies in a class folder is not read."""
    if path.is_dir():
        return "a folder in a class folder"
    if not is_image_name(path):
        return f"not {' '.join(SUFFIXES)}"
    return None if _is_utf8(str(path)) else "name not in UTF-8"


def _log_skipped(folder: Path, skipped: dict[str, list[Path]]) -> None:
    """An image in another format, or in the wrong place, is missed by nobody but its owner."""
    parts = []
    for reason, paths in skipped.items():
        if paths:
            names = ", ".join(printable(str(path.relative_to(folder))) for path in paths[:3])
            more = f" and {len(paths) - 3:,} more" if len(paths) > 3 else ""
            parts.append(f"{names}{more} ({reason})")
    if parts:
        count = sum(map(len, skipped.values()))
        logger.warning("%s: %s files or folders are not read: %s", folder, f"{count:,}", "; ".join(parts))


def _is_utf8(name: str) -> bool:
    """Arrow takes no other names; Python keeps the bytes of others as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _build_rows(images: list[tuple[Path, int, str]]) -> Dataset:
    """Rows of (file, label, id), as Arrow in the library's cache, whose key is a hash of the list."""
    if not images:
        return Dataset.from_dict({name: [] for name in ROW}, features=ROW)
    return Dataset.from_generator(_generate_rows, features=ROW, gen_kwargs={"images": images})


def _generate_rows(images: list[tuple[Path, int, str]]) -> Iterator[dict]:
    for file, label, image_id in images:
        yield {"image": {"bytes": None, "path": str(file)}, "label": label, "id": image_id}


def tidy_name(name: str) -> str:
    """A folder or label name as a person would write it: spaces for underscores, single and none at the ends.

    Accents are composed, as tokenizers know them: macOS writes them decomposed in folder names.
    """
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())

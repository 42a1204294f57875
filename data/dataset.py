"""From a source of images to rows {"image": {"bytes", "path"}, "label": int, "id": str} in Arrow, not decoded.

Sources: the hub data set, a folder in the official VGG release layout, a folder of parquet files, an image folder
(your own plants), drawn flowers. Decoding happens in the collator, one image at a time.
"""

import glob
import hashlib
import itertools
import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.compute
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets, load_dataset

from config.training_config import TrainingConfig
from data.labels import CLASS_NAMES, official_counts
from data.streaming import Stream
from data.synthetic import SPECIES, SPLIT_SIZES, draw_split
from utils.image_utils import SUFFIXES, images_below, is_image_name, printable
from utils.logging_utils import UserError, logger

HUB_REPOSITORY = "Donghyun99/Oxford-Flower-102"
OFFICIAL_SIZES = {"train": 1020, "validation": 1020, "test": 6149}
SPLITS = tuple(OFFICIAL_SIZES)
ROW = Features({"image": Image(decode=False), "label": Value("int64"), "id": Value("string")})
SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
# Byte-identical pictures in two splits of the official release, kept as published.
KNOWN_DUPLICATES = {
    "image_07309": "image_07307 (train)",
    "image_08067": "image_08077 (val)",
    "image_08077": "image_08067 (test)",
}
VGG_MD5 = {"imagelabels.mat": "e0620be6f572b9609742df49c70aed4d", "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c"}
VGG_SPLIT_KEYS = {"train": "trnid", "validation": "valid", "test": "tstid"}


class PlantData(NamedTuple):
    """The splits of a source, and what its labels are called."""

    train: Dataset | Stream
    validation: Dataset | None  # None once it is learned from: then it measures nothing
    test: Dataset
    class_names: list[str]
    source: str  # for the header

    @property
    def num_train(self) -> int:
        return self.train.images if isinstance(self.train, Stream) else len(self.train)

    def fingerprint(self) -> str:
        return data_fingerprint(self)


def build_datasets(config: TrainingConfig) -> PlantData:
    """The splits that a config asks for. Raises UserError in one sentence for a source that cannot be used."""
    data = _load_source(config)
    check_classes(data)
    if config.sample_fraction < 1:
        data = data._replace(
            train=sample(data.train, config.sample_fraction, config.seed),
            validation=sample(data.validation, config.sample_fraction, config.seed),
        )
    if config.train_on_val:
        data = data._replace(train=concatenate_datasets([data.train, data.validation]), validation=None)
    return data


def _load_source(config: TrainingConfig) -> PlantData:
    folder = Path(config.dataset)
    if config.dataset == "synthetic":
        return load_synthetic()
    if config.dataset == "oxford_flowers102":
        return load_hub(HUB_REPOSITORY, config.dataset_revision)
    if not folder.is_dir():
        raise UserError(f"--dataset {config.dataset}: no such folder; name one, or use oxford_flowers102 or synthetic")
    if config.streaming:
        return stream_parquet_folder(folder, config.seed, config.allow_missing)
    if (folder / "jpg").is_dir() or (folder / "setid.mat").exists():
        return load_vgg_folder(folder, config.allow_missing)
    if any(folder.rglob("*.parquet")):
        return load_parquet_folder(folder, config.allow_missing)
    return load_image_folder(folder, config.val_fraction, config.test_fraction, config.seed)


# ---- the sources


def load_synthetic() -> PlantData:
    """Drawn flowers; see data/synthetic.py."""
    splits = {split: Dataset.from_list(draw_split(split), features=ROW) for split in SPLIT_SIZES}
    return PlantData(**splits, class_names=list(SPECIES), source="drawn flowers of ten invented species")


def load_hub(repository: str, revision: str) -> PlantData:
    """Oxford Flowers 102 from the hub: parquet, read as memory-mapped Arrow from the library's cache."""
    try:
        splits = load_dataset(repository, revision=revision)
    except Exception as error:  # the library and the hub raise a dozen kinds
        raise UserError(
            f"data set {repository} at revision {revision} cannot be loaded ({_first_line(error)}); check the "
            "network and HF_TOKEN, or give --dataset FOLDER with the images"
        ) from error
    source = f"hub data set {repository} at {revision[:12]}"
    _check_columns(splits, source)
    data = _official(splits, source)
    for split, expected in OFFICIAL_SIZES.items():
        have = getattr(data, split)
        if len(have) != expected:
            raise UserError(
                f"{data.source}: split {split} has {len(have)} images where {expected} are expected; give the "
                "official revision with --dataset-revision"
            )
    return data


def load_parquet_folder(folder: Path, allow_missing: bool) -> PlantData:
    """A folder of parquet files, columns `image` and `label` (0-based), split by file name: train*, val*, test*."""
    splits = _read_parquet(folder, _parquet_files(folder, allow_missing))
    _check_columns(splits, f"parquet folder {folder}")
    names = getattr(splits["train"].features["label"], "names", None)
    if names and tuple(names) != CLASS_NAMES:
        source = f"parquet folder {folder}"
        return PlantData(**_with_ids(splits), class_names=[tidy_name(name) for name in names], source=source)
    data = _official(splits, f"parquet folder {folder}")
    if not names:
        highest = pyarrow.compute.max(splits["train"].data.column("label")).as_py()
        if highest < len(CLASS_NAMES) - 1:
            raise UserError(
                f"{folder}: labels of train run to {highest} and carry no names, and Oxford Flowers' run to "
                f"{len(CLASS_NAMES) - 1}; write them as a ClassLabel"
            )
        logger.warning("%s: the labels carry no names; they are taken as the 102 of Oxford Flowers", folder)
    return data


def stream_parquet_folder(folder: Path, seed: int, allow_missing: bool) -> PlantData:
    """The same with its train images streamed, and the others as ever. The labels must carry their names."""
    if not any(folder.rglob("*.parquet")):
        raise UserError(f"--streaming true: {folder} holds no parquet files, and nothing else is streamed; use false")
    files = _parquet_files(folder, allow_missing)
    train_files = files.pop("train")
    splits = _read_parquet(folder, files)
    _check_columns(splits, f"parquet folder {folder}", files)
    try:
        train = Stream(train_files, seed)
    except Exception as error:
        raise UserError(f"{folder}: the parquet files cannot be read ({_first_line(error)})") from error
    names = getattr(train.features["label"], "names", None)
    if not names:
        raise UserError(
            f"--streaming true: the labels in {folder} carry no names; write them as a ClassLabel, or use false"
        )
    for split, rows in splits.items():
        if getattr(rows.features["label"], "names", None) != names:
            raise UserError(
                f"--streaming true: the labels of {split} in {folder} have other names, or another order of them, than "
                "those of train; write all with the same ClassLabel"
            )
    source = f"stream of {len(train_files):,} parquet files in {folder}"
    return PlantData(train, **_with_ids(splits), class_names=[tidy_name(name) for name in names], source=source)


def _parquet_files(folder: Path, allow_missing: bool) -> dict[str, list[Path]]:
    files = {split: _files_of_split(folder, split, "*.parquet") for split in SPLITS}
    missing = [split for split in SPLITS if not files[split]]
    if missing:
        raise UserError(
            f"{folder}: no parquet file for {' and '.join(missing)}; name files or folders train*, validation* and "
            "test*"
        )
    series = Counter()  # files are written as train-00000-of-00004.parquet, so one that is gone can be told
    for file in itertools.chain(*files.values()):
        if found := re.fullmatch(r"(.+)-\d+-of-(\d+)(-\w+)?", file.stem):
            series[file.parent / found[1], int(found[2])] += 1
    for (name, expected), count in series.items():
        if count < expected:
            told = f"{name}-*-of-{expected:05d}: {count} of {expected} files are there"
            if not allow_missing:
                raise UserError(f"{told}; add the others, or go on without them: --allow-missing true")
            logger.warning("%s; going on without the others", told)
    for file in itertools.chain(*files.values()):
        try:
            pyarrow.parquet.read_metadata(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: is no parquet file ({_first_line(error)}); write it again") from error
    return files


def _read_parquet(folder: Path, files: dict[str, list[Path]]) -> DatasetDict:
    patterns = {split: [glob.escape(str(file)) for file in own] for split, own in files.items()}
    try:
        return load_dataset("parquet", data_files=patterns)
    except Exception as error:
        raise UserError(f"{folder}: the parquet files cannot be read ({_first_line(error)})") from error


def load_vgg_folder(folder: Path, allow_missing: bool) -> PlantData:
    """The official release: jpg/image_00001.jpg ..., imagelabels.mat, setid.mat."""
    from scipy.io import loadmat

    for name, md5 in VGG_MD5.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: is missing; the official release has it beside the folder jpg")
        if hashlib.md5(file.read_bytes()).hexdigest() != md5:
            raise UserError(f"{file}: is not the official file (md5 differs from {md5}); download it again")
    labels = loadmat(folder / "imagelabels.mat")["labels"][0]  # 1-based classes of images 1 to 8189
    split_ids = loadmat(folder / "setid.mat")
    present = {path.name for path in (folder / "jpg").glob("*.jpg")} if (folder / "jpg").is_dir() else set()
    splits, missing = {}, []
    for split, key in VGG_SPLIT_KEYS.items():
        ids = sorted(int(image) for image in split_ids[key][0])
        missing += [_vgg_name(image) for image in ids if _vgg_name(image) not in present]
        ids = [image for image in ids if _vgg_name(image) in present]
        splits[split] = _listed(
            [(folder / "jpg" / _vgg_name(image), int(labels[image - 1]) - 1, f"image_{image:05d}") for image in ids]
        )
    if missing:
        told = (
            f"{folder / 'jpg'}: {len(missing)} of {sum(OFFICIAL_SIZES.values())} images are missing "
            f"({', '.join(missing[:5])}, ...)"
        )
        if not allow_missing:
            raise UserError(f"{told}; unpack 102flowers.tgz again, or go on without them: --allow-missing true")
        logger.warning("%s; going on without them", told)
    data = PlantData(**splits, class_names=list(CLASS_NAMES), source=f"VGG release in {folder}")
    check_official_counts(data)
    return data


def load_image_folder(folder: Path, val_fraction: float, test_fraction: float, seed: int) -> PlantData:
    """Your own plants: <split>/<class name>/photo.jpg, or <class name>/photo.jpg and a seeded split of each class."""
    roots = {split: [folder / name for name in SPLIT_FOLDERS[split] if (folder / name).is_dir()] for split in SPLITS}
    if not roots["train"]:
        roots = {"train": [folder]}
    classes = sorted(
        {path.name for root in itertools.chain(*roots.values()) for path in root.iterdir() if _is_shown_folder(path)}
    )
    strange = [name for name in classes if not _is_utf8(Path(name))]
    if strange:
        raise UserError(f"{folder}: the name of class folder {strange[0]!r} is not UTF-8; rename it")
    if not classes:
        raise UserError(
            f"{folder}: no images found; expected <class name>/photo.jpg, <split>/<class name>/photo.jpg, parquet "
            "files, "
            "or jpg/ with the two .mat files"
        )
    splits = {split: _load_images(root[0], classes, folder) for split, root in roots.items() if root}
    _tell_ignored(itertools.chain(*roots.values()), classes)
    empty = [name for index, name in enumerate(classes) if index not in set(splits["train"]["label"])]
    if empty:
        raise UserError(
            f"{folder}: class {empty[0]!r} has no image to train on; add some to its folder, or remove the folder"
        )
    total = len(splits["train"])
    for split, fraction in (("validation", val_fraction), ("test", test_fraction)):
        if split not in splits:
            splits["train"], splits[split] = split_off(splits["train"], round(fraction * total), seed, classes)
    return PlantData(**splits, class_names=[tidy_name(name) for name in classes], source=f"image folder {folder}")


# ---- what sources share


def check_classes(data: PlantData) -> None:
    """Raise UserError for an empty split, fewer than two classes, two classes of one name, or a name without text."""
    held = {split: rows for split, rows in zip(SPLITS, data) if not isinstance(rows, Stream)}
    sizes = {split: len(rows) for split, rows in held.items()}
    for split, size in (sizes if "train" in held else {"train": data.train.images} | sizes).items():
        if size == 0:
            raise UserError(f"{data.source}: split {split} has no images; add some, or name another --dataset")
    # The labels of a stream are not known before it was read.
    if len(data.class_names) < 2 or ("train" in held and len(set(data.train["label"])) < 2):
        raise UserError(
            f"{data.source}: only one class ({data.class_names[0]!r}); there is nothing to tell apart, add a second"
        )
    twice = [name for name, count in Counter(data.class_names).items() if count > 1 or not name]
    if twice:
        raise UserError(f"{data.source}: class name {twice[0]!r} is empty or stands for two classes; rename one")
    for image, count in Counter(itertools.chain(*(rows["id"] for rows in held.values()))).items():
        if count > 1:
            raise UserError(f"{data.source}: image {image} stands in two splits, or twice in one; remove all but one")


def check_official_counts(data: PlantData) -> None:
    """Raise UserError unless every split of full size has the official number of images of each class."""
    for split in SPLITS:
        rows = getattr(data, split)
        if len(rows) != OFFICIAL_SIZES[split]:
            continue
        have = Counter(rows["label"])
        for label, expected in enumerate(official_counts(split)):
            if have[label] != expected:
                raise UserError(
                    f"{data.source}: split {split} has {have[label]} images of {CLASS_NAMES[label]!r} where the "
                    "official "
                    f"one has {expected}; are its labels 0-based and in official order?"
                )


def sample(rows: Dataset, fraction: float, seed: int) -> Dataset:
    """A seeded share of each class, at least one image of each, in the order of the rows."""
    by_class = defaultdict(list)
    for index, label in enumerate(rows["label"]):
        by_class[label].append(index)
    draw = random.Random(seed)
    kept = [draw.sample(own, max(round(fraction * len(own)), 1)) for _, own in sorted(by_class.items())]
    return rows.select(sorted(itertools.chain(*kept)))


def data_fingerprint(data: PlantData) -> str:
    """Of which images are in train and val, with which labels: images that change sides would be learned and scored."""
    digest = hashlib.sha256()
    for rows in (data.train, data.validation or ()):
        if isinstance(rows, Stream):
            pairs = [(file.name, file.stat().st_size) for file in rows.files]
        else:
            pairs = zip(rows["id"], rows["label"]) if len(rows) else ()
        digest.update(json.dumps(sorted(pairs)).encode())
    return digest.hexdigest()


def take(rows: Dataset, count: int | None) -> Dataset:
    """All rows, or that many of them, drawn with a fixed seed, in the order of the rows."""
    if count is None or count >= len(rows):
        return rows
    return rows.select(sorted(random.Random(0).sample(range(len(rows)), count)))


def known_duplicates(ids: Sequence[str]) -> list[str]:
    """Which of the known pictures that stand in two official splits are among these."""
    return [f"{image} = {twin}" for image, twin in KNOWN_DUPLICATES.items() if image in set(ids)]


def load_ood_images(folder: Path) -> Dataset:
    """The images in a folder, whatever they show; the label 0 means nothing."""
    files = images_below(folder)
    if not files:
        raise UserError(f"--ood {folder}: no images found there; name a folder of images without the classes")
    return _listed([(file, 0, str(file.relative_to(folder))) for file in files])


def split_off(rows: Dataset, count: int, seed: int, classes: Sequence[str]) -> tuple[Dataset, Dataset]:
    """(the rest, `count` seeded rows or one of each class), with the balance of classes kept in both."""
    counts = Counter(rows["label"])
    rarest = min(counts, key=counts.get)
    if counts[rarest] < 2:
        raise UserError(
            f"class {classes[rarest]!r} has too few images to split into train, val and test; it needs 3 or more"
        )
    # Row numbers are split, so that no image is copied.
    labels = list(rows["label"])
    features = Features({"row": Value("int64"), "label": ClassLabel(num_classes=max(labels) + 1)})
    numbers = Dataset.from_dict({"row": list(range(len(rows))), "label": labels}, features=features)
    parts = numbers.train_test_split(stratify_by_column="label", seed=seed, test_size=max(count, len(counts)))
    return rows.select(parts["train"]["row"]), rows.select(parts["test"]["row"])


def tidy_name(name: str) -> str:
    """A folder or label name as a person would write it: spaces for underscores, single and none at the ends.

    Accents are composed, as tokenizers know them: a Mac writes folders' names with accents as letters of their own.
    """
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


def _official(splits: DatasetDict, source: str) -> PlantData:
    """Rows whose labels are the 102 official classes, whatever the source calls them."""
    for split in SPLITS:
        labels = splits[split].data.column("label")
        lowest, highest = (pyarrow.compute.min_max(labels)[side].as_py() for side in ("min", "max"))
        if lowest < 0 or highest >= len(CLASS_NAMES):
            raise UserError(
                f"{source}: labels run from {lowest} to {highest}; expected are 0 to {len(CLASS_NAMES) - 1}, or "
                "label names in the files (ClassLabel)"
            )
    data = PlantData(**_with_ids(splits), class_names=list(CLASS_NAMES), source=source)
    check_official_counts(data)
    return data


def _check_columns(splits: DatasetDict, source: str, expected: Iterable[str] = SPLITS) -> None:
    for split in expected:
        if split not in splits:
            raise UserError(
                f"{source}: split {split} is missing, it has {', '.join(splits)}; expected are train, validation and "
                "test"
            )
        if not {"image", "label"} <= set(splits[split].column_names):
            raise UserError(
                f"{source}: has the columns {', '.join(splits[split].column_names)}; expected are image and label, "
                "rename them"
            )


def _with_ids(splits: DatasetDict) -> dict[str, Dataset]:
    """Add the id column: the image's file name where every image of the source has its own, else split and number."""
    rows = {
        split: own.select_columns(["image", "label"]).cast_column("image", Image(decode=False))
        for split, own in splits.items()
    }
    # Of the chunks as they lie: combining them would copy every image into memory.
    paths = {
        split: pyarrow.compute.struct_field(own.data.column("image"), "path").to_pylist() for split, own in rows.items()
    }
    stems = [Path(path).stem if path else "" for path in itertools.chain(*paths.values())]
    if all(stems) and len(set(stems)) == len(stems):
        ids = {split: [Path(path).stem for path in paths[split]] for split in rows}
    else:
        ids = {split: [f"{split}-{index:06d}" for index in range(len(own))] for split, own in rows.items()}
    return {split: own.add_column("id", ids[split]) for split, own in rows.items()}


def _load_images(root: Path, classes: list[str], source: Path) -> Dataset:
    """Rows of the images in <root>/<class>/, labels as in `classes`, ids relative to `source` and on one line."""
    return _listed(
        [
            (file, label, printable(str(file.relative_to(source))))
            for label, name in enumerate(classes)
            if (root / name).is_dir()
            for file in sorted((root / name).iterdir())
            if _is_listed(file)
        ]
    )


def _tell_ignored(roots: Iterable[Path], classes: list[str]) -> None:
    """A image in a format that is not read, or one folder too deep, is missed by nobody but its owner."""
    inside = [path for root in roots for name in classes for path in (root / name).glob("*") if path.name[0] != "."]
    ignored = [path for path in inside if not _is_listed(path)]
    if ignored:
        logger.warning(
            "%d files or folders inside the class folders are not read (%s, ...); read are %s, right in them, with "
            "names in UTF-8",
            *(len(ignored), ", ".join(printable(str(path)) for path in ignored[:3]), " ".join(SUFFIXES)),
        )


def _listed(images: list[tuple[Path, int, str]]) -> Dataset:
    """Rows of (file, label, id), as Arrow in the library's cache, which knows the list by its hash."""
    if not images:
        return Dataset.from_dict({name: [] for name in ROW}, features=ROW)
    return Dataset.from_generator(_rows, features=ROW, gen_kwargs={"images": images})


def _rows(images: list[tuple[Path, int, str]]) -> Iterator[dict]:
    for file, label, image in images:
        yield {"image": {"bytes": None, "path": str(file)}, "label": label, "id": image}


def _files_of_split(folder: Path, split: str, pattern: str) -> list[Path]:
    """Files whose name, or whose folder's name, begins with the split's name."""
    return sorted(
        file
        for file in folder.rglob(pattern)
        if any(part.startswith(SPLIT_FOLDERS[split]) for part in file.relative_to(folder).parts)
    )


def _is_listed(path: Path) -> bool:
    return is_image_name(path) and not path.is_dir() and _is_utf8(path)


def _is_utf8(path: Path) -> bool:
    """Arrow takes no other names; Python keeps the bytes of others as lone surrogates."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_shown_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _vgg_name(image: int) -> str:
    return f"image_{image:05d}.jpg"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".strip(": ")[:300]

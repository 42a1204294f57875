"""Oxford Flowers 102, the documented data set: its class names, its numbers of images, and the release of VGG.

Names and counts: Nilsback and Zisserman, "Automated flower classification over a large number of classes" (2008), in
the order of the official labels (label 1 of imagelabels.mat is index 0 here); they stand in data/taxonomy.csv.
"""

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from datasets import Dataset

from data.rows import SPLITS, Source, allow_incomplete, build_rows
from data.survey import TAXONOMY_FILE, Folder
from utils.logging_utils import UserError, some

with Path(__file__).with_name(TAXONOMY_FILE).open(encoding="utf-8", newline="") as _file:
    _CLASSES = list(csv.DictReader(_file))
CLASS_NAMES = tuple(row["name"] for row in _CLASSES)
IMAGES_PER_CLASS = tuple(int(row["images"]) for row in _CLASSES)
OFFICIAL_PER_CLASS = 10  # images of each class in the official train split, and in val; the rest is test
# Byte-identical images in two splits of the official release, kept as published.
KNOWN_DUPLICATES = {
    "image_07309": "image_07307 (train)",
    "image_08067": "image_08077 (val)",
    "image_08077": "image_08067 (test)",
}
VGG_MD5 = {"imagelabels.mat": "e0620be6f572b9609742df49c70aed4d", "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c"}
VGG_SPLIT_KEYS = {"train": "trnid", "validation": "valid", "test": "tstid"}
VGG_IMAGE = re.compile(r"image_\d{5}\.jpg")


def known_duplicates(ids: Iterable[str]) -> list[str]:
    """Which of these images have a known copy in another split of the official release."""
    return [f"{image} = {KNOWN_DUPLICATES[image]}" for image in sorted({*ids} & {*KNOWN_DUPLICATES})]


def official_counts(split: str) -> list[int]:
    """Images per class of an official split: train, validation or test."""
    return [total - 2 * OFFICIAL_PER_CLASS if split == "test" else OFFICIAL_PER_CLASS for total in IMAGES_PER_CLASS]


OFFICIAL_SIZES = {split: sum(official_counts(split)) for split in SPLITS}


def check_official_counts(splits: Mapping[str, Dataset], description: str) -> None:
    """Raise UserError unless every split of full size has the official number of images of each class."""
    for split, rows in splits.items():
        counts = Counter(rows["label"])
        for label, expected in enumerate(official_counts(split) if len(rows) == OFFICIAL_SIZES[split] else ()):
            if counts[label] != expected:
                given = f"{counts[label]} images of {CLASS_NAMES[label]!r}, the official one has {expected}"
                raise UserError(
                    f"{description}: split {split} has {given}; are its labels 0-based and in official order?"
                )


# ---- the release of VGG


def find_release(folder: Folder) -> Folder | None:
    """The folder of the official release of Oxford Flowers 102: it, or one below."""
    for inner in folder.walk():
        jpg = next((below for below in inner.folders if below.name == "jpg"), None)
        is_official = jpg is not None and jpg.images and all(map(VGG_IMAGE.fullmatch, jpg.images))
        if is_official or set(VGG_MD5) & set(inner.files.get("mat", ())):
            return inner
    return None


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
    present = {path.stem for path in (folder / "jpg").glob("*.jpg")}
    splits, missing, warnings = {}, [], []
    for split, key in VGG_SPLIT_KEYS.items():
        numbers = {f"image_{number:05d}": number for number in sorted(split_numbers[key][0].tolist())}
        missing += [f"{name}.jpg" for name in numbers if name not in present]
        splits[split] = build_rows(
            (f"{folder}/jpg/{name}.jpg", int(labels[number - 1]) - 1, name, "")
            for name, number in numbers.items()
            if name in present
        )
    if missing:
        count = f"{len(missing)} of {sum(OFFICIAL_SIZES.values())} images are missing ({some(missing, 5)})"
        warnings.append(allow_incomplete(f"{folder / 'jpg'}: {count}", allow_missing))
    return Source(splits, list(CLASS_NAMES), f"VGG release in {folder}", warnings=warnings, is_published=True)

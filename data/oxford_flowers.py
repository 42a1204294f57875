"""Oxford Flowers 102, the documented data set: its class names, its numbers of images, and the release of VGG.

Names and counts: Nilsback and Zisserman, "Automated flower classification over a large number of classes" (2008), in
the order of the official labels (label 1 of imagelabels.mat is index 0 here).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset

from data.rows import SPLITS, Source, allow_incomplete, build_rows
from data.survey import Folder
from utils.logging_utils import UserError, some

_OFFICIAL = """
40 pink primrose, 60 hard-leaved pocket orchid, 40 canterbury bells, 56 sweet pea, 65 english marigold, 45 tiger lily,
40 moon orchid, 85 bird of paradise, 46 monkshood, 45 globe thistle, 87 snapdragon, 87 colt's foot, 49 king protea,
48 spear thistle, 49 yellow iris, 41 globe-flower, 85 purple coneflower, 82 peruvian lily, 49 balloon flower,
56 giant white arum lily, 40 fire lily, 59 pincushion flower, 91 fritillary, 42 red ginger, 41 grape hyacinth,
41 corn poppy, 40 prince of wales feathers, 66 stemless gentian, 78 artichoke, 85 sweet william, 52 carnation,
45 garden phlox, 46 love in the mist, 40 mexican aster, 43 alpine sea holly, 75 ruby-lipped cattleya, 108 cape flower,
56 great masterwort, 41 siam tulip, 67 lenten rose, 127 barbeton daisy, 59 daffodil, 130 sword lily, 93 poinsettia,
40 bolero deep blue, 196 wallflower, 67 marigold, 71 buttercup, 49 oxeye daisy, 92 common dandelion, 258 petunia,
85 wild pansy, 93 primula, 61 sunflower, 71 pelargonium, 109 bishop of llandaff, 67 gaura, 114 geranium,
67 orange dahlia, 109 pink-yellow dahlia?, 50 cautleya spicata, 55 japanese anemone, 54 black-eyed susan,
52 silverbush, 102 californian poppy, 61 osteospermum, 42 spring crocus, 54 bearded iris, 54 windflower,
62 tree poppy, 78 gazania, 96 azalea, 194 water lily, 171 rose, 120 thorn apple, 107 morning glory,
251 passion flower, 137 lotus, 41 toad lily, 105 anthurium, 166 frangipani, 112 clematis, 131 hibiscus, 86 columbine,
63 desert-rose, 58 tree mallow, 63 magnolia, 154 cyclamen, 184 watercress, 82 canna lily, 76 hippeastrum, 66 bee balm,
46 ball moss, 162 foxglove, 128 bougainvillea, 91 camellia, 66 mallow, 82 mexican petunia, 63 bromelia,
49 blanket flower, 58 trumpet creeper, 48 blackberry lily
"""
_COUNTED = [entry.strip().split(" ", 1) for entry in _OFFICIAL.split(",")]
IMAGES_PER_CLASS = tuple(int(count) for count, _ in _COUNTED)
CLASS_NAMES = tuple(name for _, name in _COUNTED)
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
                raise UserError(
                    f"{description}: split {split} has {counts[label]} images of {CLASS_NAMES[label]!r}, the official "
                    f"one has {expected}; are its labels 0-based and in official order?"
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
    present = {path.name for path in (folder / "jpg").glob("*.jpg")}
    splits, missing, warnings = {}, [], []
    for split, key in VGG_SPLIT_KEYS.items():
        numbers = {f"image_{number:05d}": int(number) for number in sorted(split_numbers[key][0])}
        missing += [f"{name}.jpg" for name in numbers if f"{name}.jpg" not in present]
        splits[split] = build_rows(
            (f"{folder}/jpg/{name}.jpg", int(labels[number - 1]) - 1, name, "")
            for name, number in numbers.items()
            if f"{name}.jpg" in present
        )
    if missing:
        count = f"{len(missing)} of {sum(OFFICIAL_SIZES.values())} images are missing ({some(missing, 5)})"
        warnings.append(allow_incomplete(f"{folder / 'jpg'}: {count}", allow_missing))
    return Source(splits, list(CLASS_NAMES), f"VGG release in {folder}", warnings=warnings, is_published=True)

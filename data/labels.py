"""Class names: the 102 of Oxford Flowers, and from a reply's text to a class.

Names and counts: Nilsback and Zisserman, "Automated flower classification over a large number of classes" (2008), in
the order of the official labels (label 1 of imagelabels.mat is index 0 here).
"""

import re
import unicodedata
from collections.abc import Sequence

# fmt: off
CLASS_NAMES = (
    "pink primrose", "hard-leaved pocket orchid", "canterbury bells", "sweet pea", "english marigold", "tiger lily",
    "moon orchid", "bird of paradise", "monkshood", "globe thistle", "snapdragon", "colt's foot", "king protea",
    "spear thistle", "yellow iris", "globe-flower", "purple coneflower", "peruvian lily", "balloon flower",
    "giant white arum lily", "fire lily", "pincushion flower", "fritillary", "red ginger", "grape hyacinth",
    "corn poppy", "prince of wales feathers", "stemless gentian", "artichoke", "sweet william", "carnation",
    "garden phlox", "love in the mist", "mexican aster", "alpine sea holly", "ruby-lipped cattleya", "cape flower",
    "great masterwort", "siam tulip", "lenten rose", "barbeton daisy", "daffodil", "sword lily", "poinsettia",
    "bolero deep blue", "wallflower", "marigold", "buttercup", "oxeye daisy", "common dandelion", "petunia",
    "wild pansy", "primula", "sunflower", "pelargonium", "bishop of llandaff", "gaura", "geranium", "orange dahlia",
    "pink-yellow dahlia?", "cautleya spicata", "japanese anemone", "black-eyed susan", "silverbush",
    "californian poppy", "osteospermum", "spring crocus", "bearded iris", "windflower", "tree poppy", "gazania",
    "azalea", "water lily", "rose", "thorn apple", "morning glory", "passion flower", "lotus", "toad lily",
    "anthurium", "frangipani", "clematis", "hibiscus", "columbine", "desert-rose", "tree mallow", "magnolia",
    "cyclamen", "watercress", "canna lily", "hippeastrum", "bee balm", "ball moss", "foxglove", "bougainvillea",
    "camellia", "mallow", "mexican petunia", "bromelia", "blanket flower", "trumpet creeper", "blackberry lily",
)

IMAGES_PER_CLASS = (
    40, 60, 40, 56, 65, 45, 40, 85, 46, 45, 87, 87, 49, 48, 49, 41, 85, 82, 49, 56, 40, 59, 91, 42, 41, 41, 40, 66,
    78, 85, 52, 45, 46, 40, 43, 75, 108, 56, 41, 67, 127, 59, 130, 93, 40, 196, 67, 71, 49, 92, 258, 85, 93, 61, 71,
    109, 67, 114, 67, 109, 50, 55, 54, 52, 102, 61, 42, 54, 54, 62, 78, 96, 194, 171, 120, 107, 251, 137, 41, 105,
    166, 112, 131, 86, 63, 58, 63, 154, 184, 82, 76, 66, 46, 162, 128, 91, 66, 82, 63, 49, 58, 48,
)
# fmt: on
OFFICIAL_PER_CLASS = 10  # images of each class in the official train split, and in val; the rest is test
# Byte-identical images in two splits of the official release, kept as published.
KNOWN_DUPLICATES = {
    "image_07309": "image_07307 (train)",
    "image_08067": "image_08077 (val)",
    "image_08077": "image_08067 (test)",
}


def official_counts(split: str) -> list[int]:
    """Images per class of an official split: train, validation or test."""
    return [total - 2 * OFFICIAL_PER_CLASS if split == "test" else OFFICIAL_PER_CLASS for total in IMAGES_PER_CLASS]


# Words of folder, file and column values that name a split, in any case; fillers may stand beside them: seg_train.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation", "holdout", "heldout"), "test"),
}
FILLERS = (
    *("set", "sets", "data", "dataset", "image", "images", "img", "imgs", "photos", "pictures", "pics", "jpg", "files"),
    *(
        "folder",
        "split",
        "seg",
        "mini",
        "small",
        "full",
        "final",
        "raw",
        "only",
        "augmented",
        "aug",
        "class",
        "classes",
    ),
)


def split_of(name: str) -> str | None:
    """train, validation or test if a name is a word for it: Training, train_images, seg_test, valset; else None."""
    found = set()
    for word in re.findall(r"[a-z]+", name.lower()):
        if word not in FILLERS:
            stems = (word, *(word.removeprefix(filler).removesuffix(filler) for filler in FILLERS))
            found.add(next((SPLIT_WORDS[stem] for stem in stems if stem in SPLIT_WORDS), None))
    return found.pop() if len(found) == 1 else None


def name_key(name: str) -> str:
    """What two names of one class have in common: case, punctuation, spacing, the encoding of accents and invisible
    characters do not count. Symbols do, such as the sign of a hybrid.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    visible = [char for char in text if unicodedata.category(char) != "Cf"]
    return " ".join("".join(" " if unicodedata.category(char)[0] in "PZC" else char for char in visible).split())


def tidy_name(name: str) -> str:
    """A folder or label name as a person would write it: "Apple___Black_rot" is "Apple: Black rot".

    Accents are composed, as tokenizers know them: macOS writes them decomposed in folder names.
    """
    text = unicodedata.normalize("NFC", name)
    text = "".join(" " if unicodedata.category(char) == "Cc" else char for char in text)  # would act on a terminal
    text = "".join(char for char in text if unicodedata.category(char) != "Cf" or char in JOINERS)
    parts = [" ".join(part.replace("_", " ").split()) for part in re.split(r"_{3,}", text)]
    return ": ".join(part for part in parts if part)


JOINERS = "\u200c\u200d"  # invisible, but some scripts are not written without them
TAXONOMY = re.compile(r"\d+_(?:Plantae|Animalia|Fungi|Chromista|Protozoa|Bacteria)_(?:[^_]+_){4}(.+)")  # iNaturalist
NUMBERED = re.compile(
    r"(?:\(?\d+\s*[._)-]\s*|\d+ +|0\d+(?=[^\W\d_])|n\d{8}[-_ ])(?=.*[^\W\d_])(.+)"
)  # 001.Daisy, 12_rose, n02085620-rose
ENDING = re.compile(r"(.*[^\W\d_].*?)[ _-]+\d{5,}")  # Bellis_perennis_L._3117424: the id of GBIF
CODE = re.compile(r"(\D{0,12}?)[ _-]?\d+")  # 52, class_7, n01440764
# a1f3, ab-12c, 5d41402abc4b: no word, but a digit
HEX = re.compile(r"(?=.*\d)(?:[0-9a-f]{6,}|(?:[^\W\d_]{1,3}(?![^\W\d_])|[\d_-])+)", re.IGNORECASE)


def without_numbers(names: Sequence[str]) -> list[str] | None:
    """The names without the number, or number and taxonomy, at the beginning or end of each; None if one has none."""
    for pattern in (TAXONOMY, NUMBERED, ENDING):
        found = [pattern.fullmatch(name) for name in names]
        if names and all(found):
            plain = [match[1] for match in found if match]
            if len({name_key(name) for name in plain}) == len({name_key(name) for name in names}):
                return plain
    return None


def are_codes(names: Sequence[str]) -> bool:
    """Whether half of the names are numbers, all one word with a number, or none a word: the model would answer 52."""
    codes = [match[1].lower() for name in names if (match := CODE.fullmatch(name.strip()))]
    is_one_word = len(codes) == len(names) and len({*codes}) == 1
    return len(names) > 0 and (codes.count("") * 2 >= len(names) or is_one_word or all(map(HEX.fullmatch, names)))


def parse_reply(reply: str, class_names: Sequence[str]) -> int | None:
    """The class whose name the reply is, by `name_key`; None if it is none."""
    wanted, keys = name_key(reply), [name_key(name) for name in class_names]
    return keys.index(wanted) if wanted and wanted in keys else None

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


def normalize(text: str) -> str:
    """Lower case, one space between words, no punctuation at the ends: what exact match compares.

    Accents are composed: folders named on a Mac have them as letters of their own.
    """
    text = unicodedata.normalize("NFC", text)
    return re.sub(r"\s+", " ", text).strip(" .,;:!?\"'").lower()


def parse_reply(reply: str, class_names: Sequence[str]) -> int | None:
    """The class whose name the reply is, apart from case, spacing and punctuation at the ends; None if it is none."""
    wanted, names = normalize(reply), [normalize(name) for name in class_names]
    return names.index(wanted) if wanted and wanted in names else None

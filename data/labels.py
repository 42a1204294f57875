"""Class names: the 102 of Oxford Flowers, and from a reply's text to a class.

Names and counts: Nilsback and Zisserman, "Automated flower classification over a large number of classes" (2008), in
the order of the official labels (label 1 of imagelabels.mat is index 0 here).
"""

import re
import unicodedata
from collections.abc import Sequence

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


def official_counts(split: str) -> list[int]:
    """Images per class of an official split: train, validation or test."""
    return [total - 2 * OFFICIAL_PER_CLASS if split == "test" else OFFICIAL_PER_CLASS for total in IMAGES_PER_CLASS]


# Words of folder, file and column values that name a split, in any case; fillers may stand beside them: seg_train.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainval", "trainings", "entrainement", "apprentissage"), "train"),
    **dict.fromkeys(("entrenamiento", "treino", "treinamento", "addestramento", "обучение", "训练", "訓練"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "validierung", "validierungs"), "validation"),
    **dict.fromkeys(("validacion", "validacao", "validazione", "validatie", "валидация", "验证", "検証"), "validation"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation", "holdout", "heldout"), "test"),
    **dict.fromkeys(("prueba", "pruebas", "teste", "testes", "тест", "测试", "テスト"), "test"),
}
FILLERS = (
    *("set", "sets", "data", "dataset", "image", "images", "img", "imgs", "photos", "pictures", "pics", "jpg", "files"),
    *("folder", "split", "seg", "mini", "small", "full", "final", "raw", "only", "augmented", "aug"),
    *("class", "classes", "daten", "bilder", "datos", "dados", "de", "imagenes", "imagens", "集", "数据"),
)


def split_of(name: str) -> str | None:
    """train, validation or test if a name is a word for it: Training, train_images, trainA, valset; else None."""
    plain = "".join(char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char))
    for text in (plain, re.sub(r"(?<=[a-z])(?=[A-Z])", " ", plain)):
        found = set()
        for word in re.findall(r"[^\W\d_]{2,}", text.lower()):
            if word not in FILLERS:
                stems = (word, *(word.removeprefix(filler).removesuffix(filler) for filler in FILLERS))
                found.add(next((SPLIT_WORDS[stem] for stem in stems if stem in SPLIT_WORDS), None))
        if len(found) == 1 and None not in found:
            return found.pop()
    return None


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

"""Names of classes and splits as people write them: which mean the same, how they read, and from a reply to a class."""

import functools
import re
import unicodedata
from collections.abc import Sequence

from data.oxford_flowers import CLASS_NAMES  # noqa: F401  programs made before it moved look for it here

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


@functools.lru_cache(maxsize=100_000)  # of 20,000 folders each is asked for six times
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

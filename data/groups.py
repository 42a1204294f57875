"""Which images show one plant, as far as their names tell: a rule of the user's, or file names that plainly say so.

A group is a text, equal for all images of a plant within a class; "" for an image on its own.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from datasets import Dataset

from data.rows import by_key
from utils.image_utils import SUFFIXES

NUMBERED = re.compile(r"(.+?)[_\-. ]+(\d{1,2})")  # 148000000_1, 148000000_2
LETTERED = re.compile(r"(.*\d)[_\-]?([a-j])")  # plant12a, plant12b
LONG_NUMBER = re.compile(r"(?<!\d)(?!(?:19|20)\d\d[01]\d[0-3]\d(?!\d))\d{5,}")  # of an observation; a date is none
MAX_NAME = 1000  # characters; longer ones, of a table, would keep the expressions below busy and tell nothing
MAX_IN_SERIES = 10  # images of one plant in names that hold no long number
ROBOFLOW = re.compile(r"(.+)[_.](?:jpe?g|png|bmp|webp|tiff?|heic)\.rf\.\w+", re.IGNORECASE)
COPY = re.compile(  # as file managers call it, beside the original
    r"(?:copy of|kopie von|copie de|copia de) (?P<after>.+)"
    r"|(?P<before>.+?)(?:(?: -)?[ _](?:copy|kopie|copie|copia)(?: ?\(?\d+\)?)?| ?\([1-3]\))",
    re.IGNORECASE,
)
_CHANGE = (
    r"(?:aug(?:mented)?\d*|[hv]?flip(?:ped)?(?:lr|tb|_?[hv])?\d*|mirror(?:ed)?\d*|rot(?:ated?|ation)?_?\d*"
    r"|(?:new)?\d{1,3}deg(?:flip(?:lr|tb))?|blur(?:red)?\d*|noise\d*|bright\d*|zoom\d*|crop(?:ped)?\d*)"
)
AUGMENTED = re.compile(rf"(?:{_CHANGE}[_\- ]+(?P<after>.+)|(?P<before>.+?)(?:[_\- ]+{_CHANGE}(?:[_\- ]\d+)?)+)", re.I)


def find_plants(rows: Dataset, pattern: str | None) -> tuple[list[str], str]:
    """(the group of each row, what tells it): the rule of the user, what the data says, or file names.

    `pattern`: a group is what its first group, or all of it, finds in file names or else paths.
    """
    ids = rows["id"][:]
    if pattern is not None:
        compiled = re.compile(pattern)
        found = [compiled.search(image_id.rpartition("/")[2]) or compiled.search(image_id) for image_id in ids]
        return [(match[1 if compiled.groups else 0] or "") if match else "" for match in found], "--group-by"
    if "group" in rows.column_names:
        return [group or "" for group in rows["group"][:]], "plant, as the data has it"
    return group_by_name(ids, rows["label"][:]), "file name"


def group_by_name(ids: Sequence[str], labels: Iterable[int]) -> list[str]:
    """Groups where file names plainly tell them: numbers after an observation's, augmented versions, copies by name.

    A class is never one group of several images by such a guess, unless a long number says so.
    """
    numbers_of = by_key((label, number) for number, label in enumerate(labels))
    origins = {label: _origins([ids[number] for number in numbers]) for label, numbers in numbers_of.items()}
    series = {label: _series(names) for label, names in origins.items()}
    plain = {label for label, names in origins.items() if _is_plain(series[label], len(set(names)))}
    is_rule = 2 * sum(len(origins[label]) for label in plain) >= len(ids)  # of the data set, and so for rare classes
    groups = [""] * len(ids)
    for label, numbers in numbers_of.items():
        names = origins[label]
        if is_rule or label in plain:
            plants = {
                name: base
                for base, members in series[label].items()
                for name in members.values()
                if _has_long_number(base) or _is_complete(members)
            }
            names = [plants.get(name, name) for name in names]
        sizes = Counter(names)
        if len(sizes) > 1 or len(numbers) < 3 or _has_long_number(names[0]):
            for number, name in zip(numbers, names):
                groups[number] = name if sizes[name] > 1 else ""
    return groups


def _origins(ids: list[str]) -> list[str]:
    """For each image of a class the name of the image that it was made from, as a rule its own."""
    parts = map(os.path.splitext, ids)
    paths = [path if suffix.lower() in SUFFIXES else path + suffix for path, suffix in parts]
    paths = [path if len(path) <= MAX_NAME else f"{number}" for number, path in enumerate(paths)]
    stems = [path.rpartition("/")[2] for path in paths]
    # Names that begin anew in each folder tell nothing across folders.
    names = stems if len(set(stems)) == len(stems) else paths
    known = set(names)
    return [_origin(name, known) for name in names]


def _origin(name: str, known: set[str]) -> str:
    if found := ROBOFLOW.fullmatch(name):
        name = found[1]
    folder, slash, stem = name.rpartition("/")
    if (original := original_of(stem)) and folder + slash + original in known:
        return folder + slash + original
    if found := AUGMENTED.fullmatch(stem):
        original = found["after"] or found["before"]
        if folder + slash + original in known or re.search(r"\d{3}", original):
            return folder + slash + original
    return name


def original_of(name: str) -> str | None:
    """ "rose" of "rose - Copy"; None for what is not named as a copy."""
    return (found["after"] or found["before"]) if (found := COPY.fullmatch(name)) else None


def _series(names: Iterable[str]) -> dict[str, dict[int, str]]:
    """Names that differ in a small number or a letter at their end: what they begin with -> {number: name}."""
    series: dict[str, dict[int, str]] = defaultdict(dict)
    for name in names:
        if found := NUMBERED.fullmatch(name):
            series[found[1]][int(found[2])] = name
        elif found := LETTERED.fullmatch(name):
            series[found[1]][ord(found[2]) - ord("a")] = name
    return series


def _is_plain(series: dict[str, dict[int, str]], count: int) -> bool:
    """Whether most of `count` names of a class are in several series, each of which could be one plant."""
    whole = {base: numbers for base, numbers in series.items() if _is_complete(numbers)}
    several = {base: numbers for base, numbers in whole.items() if len(numbers) > 1}
    if 2 * sum(map(len, several.values())) < count:
        return False
    if all(map(_has_long_number, several)):
        return len(whole) >= 2
    return len(whole) >= max(3, *map(len, several.values()))


def _is_complete(numbers: Iterable[int]) -> bool:
    """0, 1, 2 ... or 1, 2, 3 ..., few of them: of a camera's numbers, most are in between."""
    numbers = sorted(numbers)
    return len(numbers) <= MAX_IN_SERIES and numbers in (list(range(len(numbers))), list(range(1, len(numbers) + 1)))


def _has_long_number(base: str) -> bool:
    return LONG_NUMBER.search(base.rpartition("/")[2]) is not None

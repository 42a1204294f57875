"""Genus and family of each class: from taxonomy.csv, from names that are "Genus species", of Oxford Flowers built in.

data/taxonomy.csv has those of Oxford Flowers 102: genera in their wide sense (Anemone with Eriocapitella, Oenothera
with Gaura), families of APG IV (2016). Empty is what name and images do not determine together (docs/own_images.md).
"""

import contextlib
import os
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from data.columns import LABEL_NAMES, MISSING, find_known, list_columns
from data.labels import name_key, tidy_name
from data.oxford_flowers import CLASS_NAMES
from data.records import Records, open_records
from data.survey import TAXONOMY_FILE
from utils.image_utils import printable
from utils.logging_utils import UserError, some

LEVELS = ("genus", "family")  # the deepest first
UNKNOWN = (*MISSING, "?", "-", "unknown")
NAMES = [name for name in ("name", *LABEL_NAMES, "key") if name not in LEVELS]  # columns of the classes, the best first
# Most genera and epithets have these Latin endings, most English words have not.
_GENUS = r"[a-z-]{2,}(?:a|us|um|is|es|as|ys|on|[aeioy]x|er)"
_EPITHET = r"[a-z-]{2,}(?:a|us|um|is|(?:ar|al|an|il|in|en[ns]|estr|orm)e|i|ae|[ou]r|ens|ans|[aiou]x|oides)"
_HYBRID = "(?:[\u00d7x] ?)?"
LATIN = re.compile(rf"{_HYBRID}{_GENUS}(?: {_HYBRID}{_EPITHET}(?: .*)?| spp?\.?)?", re.IGNORECASE)
BINOMIAL = re.compile(rf"{_HYBRID}([a-z-]{{2,}})(?: (?:{_HYBRID}[a-z-]{{2,}}(?: .*)?|spp?\.?))?", re.IGNORECASE)
LATIN_SHARE = 0.7  # of the class names: then all have a genus that look like it, such as Silene, and before none has
MAX_COMPARED = 100_000  # pairs of names, in the search for misspelled ones: 2 s
AUTHOR = re.compile(r"(?<=[a-z-]) [A-Z(].*")  # Rosa L., Asteraceae Bercht. & J. Presl
Taxonomy = dict[str, list[str]]  # by level the taxon of each class, "" where it is not known


def find_taxonomy(
    class_names: Sequence[str], dataset: str, file: str | None
) -> tuple[Taxonomy | None, list[str], list[str]]:
    """(taxa of the classes, or None; notes; warnings): by `file`, or taxonomy.csv in or beside the data set's folder.

    Without one by the names themselves. Raises UserError for a file that cannot be used.
    """
    found, warnings, source = _of_names(class_names), list[str](), "the class names"
    path = Path(file) if file else _find_file(dataset, class_names)
    if path is None and {*map(name_key, class_names)} <= {*map(name_key, CLASS_NAMES)}:
        path = Path(__file__).with_name(TAXONOMY_FILE)
    if path is not None:
        source = path.name
        try:
            warnings = _read(path, class_names, found)
        except UserError as error:
            given = "--taxonomy " if file else ""
            raise UserError(f"{given}{error}".replace("each image", "each class")) from error
    if dataset == "synthetic" and path is None:
        found, source = {"genus": [name.split()[-1].capitalize() for name in class_names]}, "the invented names"
        found["family"] = [""] * len(class_names)
    counts = [f"{level} of {sum(map(bool, found[level])):,}" for level in LEVELS]
    if not any(map(any, found.values())):
        return None, [], warnings
    return found, [f"{' and '.join(counts)} of {len(class_names):,} classes by {printable(source)}"], warnings


def _find_file(dataset: str, class_names: Sequence[str]) -> Path | None:
    """A file beside the folder may be of another data set: it counts if it has any of the classes."""
    folder = Path(os.path.expanduser(dataset))
    folder = folder.parent if folder.is_file() else folder
    inside, beside = folder / TAXONOMY_FILE, folder.absolute().parent / TAXONOMY_FILE
    if os.path.lexists(inside):
        return inside
    keys = {*map(name_key, class_names)}
    with contextlib.suppress(UserError):  # another file of the user's
        if folder.is_dir() and beside.is_file():
            cells = (cell for row in open_records(beside, has_header=True).rows() for cell in row)
            return beside if any(name_key(cell) in keys for cell in cells) else None
    return None


def _of_names(class_names: Sequence[str]) -> Taxonomy:
    """Genera if most names are Latin, and half of them two words or more: "Rosa canina L.", beside it "Carex"."""
    latin = [name for name in class_names if LATIN.fullmatch(name)]
    are_species = sum(" " in name for name in latin) * 2 >= len(class_names)
    genera = [""] * len(class_names)
    if are_species and len(latin) >= LATIN_SHARE * len(class_names):
        words = [name if " " in name or (name in latin and not name.endswith("er")) else "" for name in class_names]
        genera = [found[1].capitalize() if (found := BINOMIAL.fullmatch(name)) else "" for name in words]  # Sunflower
    return {"genus": genera, "family": [""] * len(genera)}


def _read(path: Path, class_names: Sequence[str], found: Taxonomy) -> list[str]:
    """Fill in what a file says of the classes; returns warnings. Raises UserError."""
    if os.path.lexists(path) and not path.is_file():  # reading a pipe would wait for ever
        raise UserError(f"{path}: is no file; give a table with the columns name, genus and family")
    places = {name_key(name): place for place, name in enumerate(class_names)}
    rows: dict[str, list[str]] = {}  # by key of the name
    for row in _read_rows(open_records(path, has_header=True)):
        if (key := name_key(row[0])) in rows and key in places:
            raise UserError(f"{path}: lists {printable(row[0])!r} twice; keep one of the rows")
        rows[key] = row
    unknown = {key: row[0] for key, row in rows.items() if key not in places}
    if len(unknown) == len(rows):
        given = some(map(repr, unknown.values())) or "only a header"
        examples = f"{given}; the classes are {some(map(repr, class_names))}"
        raise UserError(f"{path}: has none of the classes ({examples}); write them as the class folders or labels are")
    for key, place in places.items():
        for level, taxon in zip(LEVELS, rows.get(key, [])[1:]):
            found[level][place] = taxon or found[level][place]
    _unite(path, found)
    missing = {key: class_names[place] for key, place in places.items() if key not in rows}
    asked = list(missing.items())[: 1 + MAX_COMPARED // (len(unknown) or 1)]
    near = [f"{unknown[keys[0]]!r}: {name!r}?" for key, name in asked if (keys := get_close_matches(key, unknown, 1))]
    if not near:
        return []
    count = f"{len(unknown):,} of its names are no classes" if len(unknown) > 1 else "one of its names is no class"
    return [f"{path}: {count} ({some(near)}); write them as the classes are, or they have no genus and family"]


def _read_rows(records: Records) -> list[list[str]]:
    """[name, genus, family] of each row; "" for an unknown taxon. Raises UserError for a missing column."""
    columns = [next(iter(find_known(records.columns, names)), None) for names in (NAMES, LEVELS[:1], LEVELS[1:])]
    if None in columns:
        lacking = ("name", *LEVELS)[columns.index(None)]
        given = f"has no column {lacking} (columns: {list_columns(records.columns)})"
        raise UserError(f"{records.path}: {given}; it needs name, genus and family, whose cells may be empty")
    places = [records.columns.index(column) for column in columns if column is not None]
    cells = ([" ".join(row[place].split()) for place in places] for row in records.rows())
    tidy = dict.fromkeys(UNKNOWN, "")
    return [
        [name, *(tidy.get(taxon, AUTHOR.sub("", tidy_name(taxon))) for taxon in taxa)] for name, *taxa in cells if name
    ]


def _unite(path: Path, found: Taxonomy) -> None:
    """One spelling for each taxon, one family for each genus. Raises UserError for a genus in two families."""
    for level in LEVELS:
        spelling: dict[str, str] = {}
        found[level] = [taxon and spelling.setdefault(name_key(taxon), taxon) for taxon in found[level]]
    if wrong := next((genus for genus in found["genus"] if genus.endswith("aceae") or len(genus) > 100), None):
        raise UserError(f"{path}: {printable(wrong[:40])!r} is no genus; are the columns genus and family mixed up?")
    families: dict[str, str] = {}
    for genus, family in zip(found["genus"], found["family"]):
        if genus and family and families.setdefault(genus, family) != family:
            both = f"{printable(families[genus])} and {printable(family)}"
            raise UserError(f"{path}: genus {printable(genus)} is in two families, {both}; correct one")
    found["family"] = [family or families.get(genus, "") for genus, family in zip(found["genus"], found["family"])]

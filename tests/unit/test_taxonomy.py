"""Genus and family of classes: taxonomy.csv, names that are "Genus species", Oxford Flowers, and files of no use."""

import os
import re

import pytest

from data import taxonomy
from data.oxford_flowers import CLASS_NAMES
from data.survey import add_unused, survey
from data.synthetic import SPECIES
from data.taxonomy import find_taxonomy
from utils.logging_utils import UserError

CLASSES = ["dog rose", "tea rose", "daisy"]
TABLE = "name,genus,family\ndog rose,Rosa,Rosaceae\ntea rose,Rosa,Rosaceae\ndaisy,Bellis,Asteraceae\n"
GENERA, FAMILIES = ["Rosa", "Rosa", "Bellis"], ["Rosaceae", "Rosaceae", "Asteraceae"]


@pytest.fixture
def read(tmp_path):
    def make(table, classes=CLASSES, name="taxonomy.csv", encoding="utf-8"):
        path = tmp_path / "plants" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(table if isinstance(table, bytes) else table.encode(encoding))
        return find_taxonomy(classes, str(path.parent), None if name == "taxonomy.csv" else str(path))

    return make


def test_those_of_oxford_flowers_are_built_in():
    taxonomy, notes, warnings = find_taxonomy(CLASS_NAMES, "oxford_flowers102", None)
    assert notes == ["genus of 96 and family of 101 of 102 classes by taxonomy.csv"] and not warnings
    of = {name: pair for name, *pair in zip(CLASS_NAMES, taxonomy["genus"], taxonomy["family"])}
    assert of["rose"] == ["Rosa", "Rosaceae"] and of["bishop of llandaff"] == ["Dahlia", "Asteraceae"]
    assert of["watercress"] == ["", ""] and of["bromelia"] == ["", "Bromeliaceae"]
    assert all(re.fullmatch("[A-Z][a-z]+aceae|", family) for family in taxonomy["family"])
    assert all(re.fullmatch("[A-Z][a-z]+|", genus) for genus in taxonomy["genus"])
    some = [CLASS_NAMES[3].title(), CLASS_NAMES[57].upper()]
    assert find_taxonomy(some, "mine", None)[0] == {"genus": ["Lathyrus", ""], "family": ["Fabaceae", "Geraniaceae"]}
    assert find_taxonomy(["rose", "nettle"], "mine", None) == (None, [], [])
    assert find_taxonomy(list(SPECIES), "synthetic", None)[0]["genus"][:4] == [
        "Starwort", "Moonwort", "Wheelbloom", "Trillet",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "genera"),
    [
        (["Bellis perennis", "Rosa canina", "Rosa rubiginosa L.", "Quercus"], ["Bellis", "Rosa", "Rosa", "Quercus"]),
        (
            ["Rosa \u00d7 damascena", "Acer campestre", "Silene dioica", "Carex sp."],
            ["Rosa", "Acer", "Silene", "Carex"],
        ),
        (["bellis perennis", "Quercus robur subsp. robur"], ["Bellis", "Quercus"]),
        (["Canna indica", "Viola tricolor", "Sunflower"], ["Canna", "Viola", ""]),
        (["Sessile oak", "Pedunculate oak"], None),
        (["White rose", "Japanese anemone", "Purple iris"], None),
        (["tomato mature", "banana overripe", "mango immature"], None),
        (["Ficus", "Monstera", "Yucca"], None),
        (["Apple: Apple scab", "Tomato: Leaf Mold"], None),
    ],
)
def test_genera_of_latin_names(names, genera):
    taxonomy, _, _ = find_taxonomy(names, "mine", None)
    assert (taxonomy and taxonomy["genus"]) == genera


@pytest.mark.parametrize(
    ("table", "encoding"),
    [
        (TABLE, "utf-8"),
        (TABLE.replace(",", ";"), "utf-8-sig"),
        (TABLE.replace(",", "\t"), "utf-16"),
        (TABLE.replace("\n", "\r\n").replace("Bellis", "b\u00e9llis"), "latin-1"),
        ("sep=;\n" + TABLE.replace(",", ";"), "utf-8"),
        ("family,Species,genus,note\nRosaceae,Dog_Rose,Rosa,x\n,tea rose,rosa,\nAsteraceae,DAISY,Bellis,\n", "utf-8"),
        (TABLE + "oak,Quercus,Fagaceae\n,,\n", "utf-8"),
        (
            TABLE.replace("dog rose,Rosa,", "dog rose,Rosa L.,").replace("Asteraceae", "Asteraceae Bercht. & J.Presl"),
            "utf-8",
        ),
    ],
)
def test_tables_in_the_ways_that_people_write_them(read, table, encoding):
    taxonomy, notes, warnings = read(table, encoding=encoding)
    assert [genus.replace("b\u00e9llis", "Bellis") for genus in taxonomy["genus"]] == GENERA
    assert taxonomy["family"] == FAMILIES and not warnings
    assert notes == ["genus of 3 and family of 3 of 3 classes by taxonomy.csv"]


def test_json_and_classes_that_a_table_leaves_out(read):
    taxonomy, _, _ = read('[{"name": "daisy", "genus": "Bellis", "family": null}]', name="t.json")
    assert taxonomy == {"genus": ["", "", "Bellis"], "family": ["", "", ""]}
    assert read('{"daisy": {"genus": "Bellis", "family": null}, "oak": {}}', name="t.json")[0] == taxonomy
    names = ["Rosa canina", "Rosa rugosa", "Bellis perennis"]
    taxonomy, _, _ = read("name,genus,family\nRosa canina,,Rosaceae\n", names)
    assert taxonomy == {"genus": GENERA, "family": ["Rosaceae", "Rosaceae", ""]}


def test_a_misspelled_name_is_reported(read):
    taxonomy, _, (warning,) = read(TABLE.replace("tea rose", "tea roses"))
    assert taxonomy["genus"] == ["Rosa", "", "Bellis"]
    assert "one of its names is no class ('tea roses': 'tea rose'?); write them as the classes are" in warning


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("name,genus\ndaisy,Bellis\n", "has no column family (columns: name, genus); it needs name, genus and family"),
        ("plant no,genus,family\n1,Bellis,Asteraceae\n", "has no column name (columns: plant no, genus, family)"),
        (TABLE + "Daisy,Bellis,Asteraceae\n", "lists 'Daisy' twice; keep one of the rows"),
        (
            TABLE.replace("tea rose,Rosa,Rosaceae", "tea rose,Rosa,Rosacae"),
            "genus Rosa is in two families, Rosaceae and",
        ),
        ("name,genus,family\noak,Quercus,Fagaceae\n", "has none of the classes ('oak'; the classes are 'dog rose'"),
        ("", "is empty; expected a header and a row for each class"),
        ("name,genus,family\n", "has none of the classes (only a header; the classes are"),
        (
            'name,genus,family\n"dog rose,Rosa,Rosaceae\n' + "x" * 200_000,
            "is no table (field larger than field limit (131072)); expected a header and a row for each class",
        ),
        ("<html>\n<body>\n", "has no column name"),
        (
            "name,genus,family\ndaisy,Asteraceae,Bellis\n",
            "'Asteraceae' is no genus; are the columns genus and family mixed",
        ),
        ("name,genus,family\ndaisy," + "B" * 500 + ",Asteraceae\n", "is no genus"),
    ],
)
def test_tables_of_no_use_are_one_sentence(read, table, words):
    with pytest.raises(UserError) as caught:
        read(table)
    assert words in str(caught.value) and str(caught.value).startswith("/") and "\n" not in str(caught.value)


def test_a_table_of_many_other_plants_is_not_compared_name_by_name(read, monkeypatch):
    compared = []
    monkeypatch.setattr(taxonomy, "get_close_matches", lambda name, names, n: compared.append(len(names)) or [])
    rows = "".join(f"plant {number},Rosa,Rosaceae\n" for number in range(30_000))
    read(f"name,genus,family\ndaisy,Bellis,Asteraceae\n{rows}", ["daisy", *map(str, range(3_000))])
    assert 0 < sum(compared) < 200_000


def test_files_that_are_none(read, tmp_path):
    with pytest.raises(UserError, match=r"--taxonomy .*t\.xlsx: spreadsheets are not read; save it as \.csv"):
        read(TABLE, name="t.xlsx")
    with pytest.raises(UserError, match="--taxonomy gone.csv: cannot be read"):
        find_taxonomy(CLASSES, str(tmp_path), "gone.csv")
    with pytest.raises(UserError, match="--taxonomy .*: is no file; give a table with the columns"):
        find_taxonomy(CLASSES, str(tmp_path), str(tmp_path))
    os.mkfifo(tmp_path / "taxonomy.csv")
    with pytest.raises(UserError, match="^/.*: is no file"):
        find_taxonomy(CLASSES, str(tmp_path), None)


def test_a_file_beside_the_folder_counts_if_it_is_of_these_classes(tmp_path):
    (tmp_path / "plants").mkdir()
    (tmp_path / "taxonomy.csv").write_text(TABLE)
    assert find_taxonomy(CLASSES, str(tmp_path / "plants"), None)[0]["genus"] == GENERA
    assert find_taxonomy(["oak", "ash"], str(tmp_path / "plants"), None)[0] is None
    (tmp_path / "taxonomy.csv").write_text("")
    assert find_taxonomy(CLASSES, str(tmp_path / "plants"), None)[0] is None  # of another data set, whatever it is
    (tmp_path / "taxonomy.csv").write_text(TABLE)
    (tmp_path / "labels.csv").write_text("")
    assert find_taxonomy(CLASSES, str(tmp_path / "labels.csv"), None)[0]["genus"] == GENERA
    (tmp_path / "plants").rmdir()
    folder, excluded = survey(tmp_path)
    add_unused(folder, excluded)
    assert excluded.lines() == ["not used: .csv files: 1 (labels.csv)"]

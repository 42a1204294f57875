"""Names of class folders that are numbers or codes, from files beside them; and which images show one plant."""

import json
import os

import pytest

from data.class_names import find_class_names, find_groups, read_class_names
from tests.unit.test_tables import lines, put
from utils.logging_utils import UserError

NAMES = {"1": "dog rose", "2": "field maple", "17": "oxeye daisy"}
PLANTNET = {"1355868": "Lactuca virosa L.", "1355920": "Pelargonium capitatum (L.) L'Hér."}
TABLE = ["daisy", "dog rose", "field maple"]


def find(folder, codes, *others):
    found = find_class_names(codes, (folder, *others))
    return found and found[0]


@pytest.mark.parametrize(
    "data",
    [
        NAMES,
        {f"{int(code):03d}": name for code, name in NAMES.items()},
        {name: int(code) for code, name in NAMES.items()},
        {"id2label": NAMES},
        {"info": {"names": {name: int(code) for code, name in NAMES.items()}}},
        {code: {"count": 3, "name": name} for code, name in NAMES.items()},
        {code: {"common_name": name} for code, name in NAMES.items()},
        {code: [f"n000{code}", name] for code, name in NAMES.items()},
        {
            "images": [{"id": 1, "file_name": "a.jpg"}],
            "categories": [{"id": int(c), "name": n} for c, n in NAMES.items()],
        },
        [{"id": int(code), "supercategory": "Plantae", "name": name} for code, name in NAMES.items()],
        [[int(code), name] for code, name in NAMES.items()],
        NAMES | {"3": "another"},
    ],
)
def test_json_of_any_form_names_the_codes(tmp_path, data):
    put(tmp_path / "some.json", json.dumps(data))
    assert find(tmp_path, list(NAMES)) == NAMES
    assert read_class_names(tmp_path / "some.json", list(NAMES)) == NAMES


@pytest.mark.parametrize(
    "text",
    [
        "code,name\n1,dog rose\n2,field maple\n17,oxeye daisy\n",
        "index;label_id;species\n0;01;dog rose\n1;02;field maple\n2;17;oxeye daisy\n",
        "class\tcount\tcommon_name\n1\t9\tdog rose\n2\t9\tfield maple\n17\t9\toxeye daisy\n",
        "1,dog rose\n2,field maple\n17,oxeye daisy\n",
        "file,species_id,species\na.jpg,1,dog rose\nb.jpg,1,dog rose\nc.jpg,2,field maple\nd.jpg,17,oxeye daisy\n",
        "id,family,species\n1,Rosaceae,dog rose\n2,Sapindaceae,field maple\n17,Asteraceae,oxeye daisy\n",
    ],
)
def test_tables_name_the_codes(tmp_path, text):
    put(tmp_path / "some.csv", text)
    assert find(tmp_path, list(NAMES)) == NAMES == read_class_names(tmp_path / "some.csv", list(NAMES))


@pytest.mark.parametrize(
    "line", ["{} {}", "{}: {}", "{},{}", "{}\t{}", "{:0>3}.{}", "{} - {}", '"{}": {}', "{}: '{}',"]
)
def test_lines_of_code_and_name(tmp_path, line):
    lines = "\n".join(line.format(code, name) for code, name in NAMES.items())
    for text in (lines, f"{{{lines}}}"):  # Python's dictionaries too
        put(tmp_path / "any.txt", text)
        assert find(tmp_path, list(NAMES)) == NAMES


@pytest.mark.parametrize(
    ("name", "codes", "expected"),
    [
        ("classes.txt", ("0", "1", "2"), dict(zip("012", TABLE))),
        ("labels.txt", ("1", "2", "3"), dict(zip("123", TABLE))),
        ("labels.txt", ("01", "02", "03"), dict(zip(("01", "02", "03"), TABLE))),
        ("classes.txt", ("class_0", "class_1", "class_2"), dict(zip(("class_0", "class_1", "class_2"), TABLE))),
        ("classes.txt", ("0", "2"), {"0": "daisy", "2": "field maple"}),
        ("classes.txt", ("1", "2"), None),  # from 0 or from 1?
        ("README.txt", ("0", "1", "2"), None),
        ("notes.txt", ("0", "1", "2"), None),
    ],
)
def test_names_by_position_where_it_is_plain_which(tmp_path, name, codes, expected):
    put(tmp_path / name, "\n".join(TABLE))
    assert find(tmp_path, codes) == expected
    put(tmp_path / name, ""), put(tmp_path / "class_names.json", json.dumps(TABLE))
    assert find(tmp_path, codes) == (expected or (dict(zip("012", TABLE)) if len(codes) == 3 else None))


def test_synsets_of_imagenet(tmp_path):
    put(tmp_path / "LOC_synset_mapping.txt", "n11939491 daisy\nn12620196 rose hip, rosehip\nn01440764 tench\n")
    codes = ("n11939491", "n12620196")
    assert find(tmp_path, codes) == {"n11939491": "daisy", "n12620196": "rose hip, rosehip"}
    put(tmp_path / "class_index.json", json.dumps({"985": ["n11939491", "daisy"], "989": ["n12620196", "hip"]}))
    assert find(tmp_path, codes) == {"n11939491": "daisy", "n12620196": "hip"}


def test_plantnet_reads_its_names_and_not_its_metadata(tmp_path):
    metadata = {f"{n:04x}": {"species_id": code, "obs_id": str(n // 2)} for n, code in enumerate([*PLANTNET] * 4)}
    put(tmp_path / "plantnet300K_metadata.json", json.dumps(metadata))
    put(tmp_path / "plantnet300K_species_id_2_name.json", json.dumps(PLANTNET))
    assert find_class_names(list(PLANTNET), (tmp_path / "images", tmp_path)) == (
        PLANTNET, tmp_path / "plantnet300K_species_id_2_name.json"
    )  # fmt: skip
    groups, table = find_groups((f"{n:04x}.jpg" for n in range(8)), (tmp_path,))
    assert groups["0000.jpg"] == groups["0001.jpg"] == "0" and len(groups) == 8
    assert table.name == "plantnet300K_metadata.json"


def test_plantclef_reads_its_long_table(tmp_path):
    rows = ["image_name;organ;species_id;obs_id;author;gbif_species_id;species;genus;family;learn_tag"]
    for number in range(60):
        species = ("Bellis perennis", "Papaver rhoeas", "Sedum acre")[number % 3]
        rows.append(
            f"{number:x}a.jpg;flower;{1355868 + number % 3};{number // 2};a;;{species} L.;{species.split()[0]};X;train"
        )
    put(tmp_path / "PlantCLEF2024singleplanttrainingdata.csv", "\n".join(rows))
    assert find(tmp_path, ("1355868", "1355870")) == {"1355868": "Bellis perennis L.", "1355870": "Sedum acre L."}
    groups, _ = find_groups([f"train/1355868/{number:x}a.jpg" for number in range(60)], (tmp_path,))
    assert groups["train/1355868/3aa.jpg"] == "29" and len(groups) == 60


def test_categories_of_inaturalist_by_folder_or_number(tmp_path):
    folders = ("05729_Plantae_Ophrys_apifera", "06000_Plantae_Bellis_perennis")
    names = ("Ophrys apifera", "Bellis perennis")
    categories = [
        {"id": int(folder[:5]), "name": name, "common_name": name.upper(), "image_dir_name": folder}
        for folder, name in zip(folders, names)
    ]
    put(tmp_path / "val.json", json.dumps({"annotations": [], "categories": categories}))
    assert find(tmp_path, folders) == dict(zip(folders, names))
    assert find(tmp_path, ("5729", "6000")) == dict(zip(("5729", "6000"), names))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"1": "dog rose", "2": "field maple"}'),  # not all
        ("a.json", '{"1": "dog rose", "2": "field maple", "17": "Dog Rose"}'),  # two of one name
        ("a.json", '{"1": "4", "2": "5", "17": "6"}'),
        ("a.json", '{"a.jpg": 1, "b.jpg": 1, "c.jpg": 2, "d.jpg": 17}'),  # labels of images
        ("a.json", '{"1": "a.jpg", "2": "b.jpg", "17": "c.jpg"}'),
        ("a.json", "{"),
        ("a.json", "[" * 100_000),
        ("a.csv", "\0\0\0"),
        ("a.csv", lines("id,species", [(n, ("rose", "daisy", "tulip", "maple")[n // 20]) for n in range(80)])),  # rows
        ("a.csv", lines("id,url", [(n, f"https://x.org/{n}") for n in range(18)])),
        ("a.txt", "1. Introduction\nwhere it comes from\n2. Images\nthere are many\n17. License\nnone"),
    ],
)
def test_what_names_no_class_is_not_used(tmp_path, name, text):
    put(tmp_path / name, text)
    assert find(tmp_path, list(NAMES)) is None


def test_the_nearer_file_counts_and_in_a_folder_the_json_of_these_codes_alone(tmp_path):
    inner = tmp_path / "flowers"
    put(tmp_path / "cat_to_name.json", json.dumps(dict.fromkeys(NAMES, "x") | {"1": "far", "2": "away"}))
    put(inner / "all_names.json", json.dumps(NAMES | {"1": "other", "5": "more"}))
    put(inner / "names.json", json.dumps(NAMES)), put(inner / "names.csv", "id,name\n1,a\n2,b\n17,c\n")
    assert find(inner, list(NAMES), tmp_path, tmp_path / "missing") == NAMES


def test_the_names_of_a_file_that_is_given_may_be_any(tmp_path):
    put(tmp_path / "names.json", json.dumps({"1": "rose", "2": "rose", "daisy": "Bellis perennis"}))
    assert read_class_names(tmp_path / "names.json", ("1", "2", "daisy")) == {
        "1": "rose", "2": "rose", "daisy": "Bellis perennis"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("n.json", '{"1": "rose"}', r"no name for 6 of 7 class folders \('2', '3', '4', '5', '6', \.\.\.\)"),
        ("n.csv", "a,b\nx,y\n", r"no name for 7 of 7 class folders .*give JSON such as \{'1': 'dog rose'\}"),
        ("n.json", "{", "--class-names .*is not JSON"),
        ("n.csv", "", "--class-names .*is empty"),
        ("n.xlsx", "PK", "--class-names .*save it as .csv"),
        ("n.csv", None, "--class-names .*cannot be read"),
        ("n.txt", None, "--class-names .*cannot be read"),
    ],
)
def test_a_file_that_lacks_names_or_cannot_be_read_is_an_error(tmp_path, name, text, reason):
    if text is not None:
        put(tmp_path / name, text)
    with pytest.raises(UserError, match=reason):
        read_class_names(tmp_path / name, [str(number) for number in range(1, 8)])


@pytest.mark.parametrize("name", ["names.csv", "names.txt", "names.json"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"--class-names .*{name}: is no file; give the path of one"):
        read_class_names(tmp_path / name, ["1", "2"])


def test_a_file_that_is_given_may_list_names_alone_whatever_it_is_called(tmp_path):
    for name, text in (("n.txt", "dog rose\nfield maple"), ("n.json", '["dog rose", "field maple"]')):
        assert read_class_names(put(tmp_path / name, text), ["0", "1"]) == {"0": "dog rose", "1": "field maple"}
    assert find_class_names(["0", "1"], [tmp_path]) is None


@pytest.mark.parametrize("header", ["file,obs_id", "image,observationID", "path,plant_id"])
def test_groups_by_a_column_of_observations(tmp_path, header):
    files = [f"rose/IMG_{number}.jpg" for number in range(10)]
    put(tmp_path / "a.csv", lines(header, [(file, number // 3) for number, file in enumerate(files)]))
    groups, table = find_groups(files, (tmp_path / "missing", tmp_path))
    assert table == tmp_path / "a.csv" and groups == {file: str(number // 3) for number, file in enumerate(files)}


def test_no_groups_for_a_name_of_two_files_or_from_a_table_of_few(tmp_path):
    put(tmp_path / "a.csv", lines("file,obs_id", [(f"{number}.jpg", 7) for number in range(4)]))
    assert (
        find_groups([f"{name}/{number}.jpg" for name in ("rose", "daisy") for number in range(4)], (tmp_path,)) is None
    )
    assert find_groups([f"rose/{number}.jpg" for number in range(10)], (tmp_path,)) is None
    assert find_groups([f"rose/{number}.jpg" for number in range(4)], (tmp_path,)) is None  # one plant is no group
    assert find_groups([], (tmp_path,)) is None

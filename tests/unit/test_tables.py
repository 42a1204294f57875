"""Tables that label images: what is read, which column is what, and what is said of rows that cannot be used."""

import csv
import json

import pytest

from data.records import open_records
from data.survey import survey
from data.tables import find_label_tables, read_label_tables
from utils.logging_utils import UserError

FLOWERS = ("daisy", "rose", "tulip")

COCO = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
    "annotations": [{"image_id": 7, "category_id": 1}, {"image_id": 8, "category_id": 2}],
    "categories": [{"id": 2, "name": "x"}],
}


def put(path, content=b"\xff\xd8\xff image"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def images(folder, count=9, name="{:04d}.jpg"):
    return [put(folder / name.format(number)).name for number in range(count)]


def lines(header, rows):
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


def labels(names):
    return lines("file_name,label", [(name, FLOWERS[number % 3]) for number, name in enumerate(names)])


def read(table, folder, label_column=None):
    return read_label_tables([table], survey(folder)[0], label_column)


def classes(table):
    return {row.id: row.class_name for row in table.rows}


# ---- files


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_text_tables_of_any_delimiter_and_encoding(tmp_path, delimiter, encoding):
    text = f"file{delimiter}label\r\na.jpg{delimiter}Königskerze\r\nb.jpg{delimiter} \r\n"
    records = open_records(put(tmp_path / "labels.csv", text.encode(encoding)))
    assert records.columns == ["file", "label"]
    assert list(records.rows()) == [["a.jpg", "Königskerze"], ["b.jpg", ""]] == list(records.rows())


def test_ragged_rows_nul_bytes_empty_lines_and_remarks_are_no_obstacle(tmp_path):
    text = "\n# exported\nsep=,\na,b,a,\n1\n\n1,2,3,4,5\n\x001,2\x00\n"
    records = open_records(put(tmp_path / "labels.csv", text))
    assert records.columns == ["a", "b", "a (3)", "column 4"]
    assert list(records.rows()) == [["1", "", "", ""], ["1", "2", "3", "4"], ["1", "2", "", ""]]


@pytest.mark.parametrize("remark", ["", "# a,b,c\n", "#exported\n", "#Downloaded 2024-05-01, 13:22\n"])
def test_a_header_may_begin_with_a_sign_of_remarks(tmp_path, remark):
    records = open_records(put(tmp_path / "labels.csv", f"{remark}#id,species\n100,rose\n"))
    assert records.columns == ["#id", "species"] and list(records.rows()) == [["100", "rose"]]


def test_quotes_in_a_table_with_tabs_are_text(tmp_path):
    records = open_records(put(tmp_path / "occurrence.txt", 'id\tnote\n1\t"tall\n2\t"a ""b"" c"\n'))
    assert list(records.rows()) == [["1", '"tall'], ["2", 'a "b" c']]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"file": "a.jpg", "label": 1}\n\n{"file": "b.jpg", "label": ["x"], "more": {"x": []}}\n'),
        ("a.json", '{"file": "a.jpg", "label": 1}\n{"file": "b.jpg", "label": "x"}\n'),
        ("a.json", '[{"file": "a.jpg", "label": 1}, 7, {"file": "b.jpg", "label": ["x"]}]'),
        ("a.json", '{"version": "2", "data": [{"file": "a.jpg", "label": 1}, {"file": "b.jpg", "label": "x"}]}'),
        ("a.json", '{"a.jpg": 1, "b.jpg": "x"}'),
        ("a.json", '{"file": ["a.jpg", "b.jpg"], "label": [1, "x"]}'),
        ("a.json", '{"data": [{"file": "a.jpg", "label": 1}, {"file": "b.jpg", "label": "x"}]}'),
        ("a.json", '{"file": {"0": "a.jpg", "1": "b.jpg"}, "label": {"0": 1, "1": "x"}}'),
        ("a.json", '{"1": ["a.jpg"], "x": ["b.jpg"]}'),
        ("a.json", json.dumps(COCO)),
    ],
)
def test_json_in_the_forms_that_people_write(tmp_path, name, text):
    put(tmp_path / "a.jpg"), put(tmp_path / "b.jpg")
    table = read(put(tmp_path / name, text), tmp_path)
    assert classes(table) == {"a.jpg": "1", "b.jpg": "x"}


def test_several_categories_of_an_image_are_no_label(tmp_path):
    images(tmp_path, 5, "{}.jpg")
    pairs = [(0, 1), (0, 2), (1, 1), (1, 1), (2, 1), (3, 2)]
    box = {"image_id": 1, "category_id": 2, "bbox": [0, 0, 9, 9]}
    data = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(5)],
        "annotations": [box, *({"image_id": image, "category_id": category} for image, category in pairs)],
        "categories": [{"id": 1, "name": "daisy"}, {"id": 2, "name": ["rose"]}],
    }
    table = read(put(tmp_path / "coco.json", json.dumps(data)), tmp_path)
    assert classes(table) == {"1.jpg": "daisy", "2.jpg": "daisy", "3.jpg": "rose"}
    assert table.warnings == [
        "not used: images with several labels or splits: 1 (0.jpg: daisy, rose)",
        "not used: rows of coco.json without label: 1 (4.jpg)",
    ]


def test_boxes_are_no_labels(tmp_path):
    put(tmp_path / "a.jpg"), put(tmp_path / "b.jpg")
    boxes = [annotation | {"bbox": [0, 0, 9, 9]} for annotation in COCO["annotations"]]
    with pytest.raises(UserError, match="has no labels"):
        read(put(tmp_path / "a.json", json.dumps(COCO | {"annotations": boxes})), tmp_path)


def test_boxes_in_a_table_are_refused(tmp_path):
    put(tmp_path / "a.jpg"), put(tmp_path / "b.jpg")
    table = "filename,class,xmin,ymin\na.jpg,weed,1,2\na.jpg,crop,1,2\nb.jpg,weed,3,4\nb.jpg,crop,3,4\n"
    with pytest.raises(UserError, match=r"a.csv: lists boxes, several of an image \(a.jpg: weed, crop\)"):
        read(put(tmp_path / "a.csv", table), tmp_path)


def test_half_a_character_in_json_becomes_a_question_mark(tmp_path):
    put(tmp_path / "a.jpg"), put(tmp_path / "b.jpg")
    table = read(put(tmp_path / "a.json", r'{"a.jpg": "daisy \ud83c", "b.jpg": "\ud83c\udf3c"}'), tmp_path)
    assert classes(table) == {"a.jpg": "daisy ?", "b.jpg": "\N{BLOSSOM}"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b'file,label\na.jpg,"' + b"x" * 200_000, "is no table"),
        ("a.csv", b"file,label\n" + b"a.jpg,x\n" * 30 + b'b.jpg,"' + b"x" * 200_000, "row 32 .*quote"),
        ("a.csv", b"x" * 300_000, "is no table"),
        ("a.csv", bytes(range(256)) * 40, "no column gives images"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.json", b"7", "no list of records"),
        ("a.json", b'{"images": true, "annotations": [], "categories": 3}', "no list of records"),
        ("a.json", b'[{"file": ' + b"9" * 10_000 + b"}]", "no column gives images"),
        ("a.jsonl", b'{"file": "a.jpg"}\n{"file": \n', "line 2"),
        ("a.jsonl", b'{"file": "a.jpg"}\n[1]\n', "line 2 is no JSON object; write one for each image, or remove it"),
        ("a.jsonl", b"{}\n", "is empty; expected a record for each image"),
        ("a.xlsx", b"PK\3\4", "save it as .csv"),
        ("missing.csv", None, "cannot be read"),
    ],
)
def test_content_of_any_kind_is_a_message_and_no_traceback(tmp_path, name, content, reason):
    put(tmp_path / "z.jpg")
    if content is not None:
        put(tmp_path / name, content)
    with pytest.raises(UserError, match=reason):
        read(tmp_path / name, tmp_path)


# ---- files that a table gives


@pytest.mark.parametrize(
    "cell",
    [
        "images/{stem}.jpg",
        "{stem}.jpg",
        "{stem}",
        "{stem}.png",
        "./images/{stem}.JPG",
        "../images/{stem}.jpg",
        "/kaggle/input/flowers/images/{stem}.jpg",
        r"C:\flowers\images\{stem}.jpg",
    ],
)
def test_images_are_found_by_path_name_or_stem(tmp_path, cell):
    names = images(tmp_path / "images", 9, "IMG_{:04d}.jpg")
    rows = [(cell.format(stem=name[:-4]), FLOWERS[number % 3]) for number, name in enumerate(names)]
    table = read(put(tmp_path / "labels.csv", lines("whatever,label", rows)), tmp_path)
    assert [row.class_name for row in table.rows] == [*FLOWERS] * 3
    assert table.rows[0].path == str(tmp_path / "images" / "IMG_0000.jpg") and table.rows[0].id == "images/IMG_0000.jpg"


def export(folder, name="{}.jpg", each=1):
    """An iNaturalist export and its images."""
    rows = []
    for number in range(12):
        observation = 148000017 + 17 * number
        for image in range(each):
            put(folder / "images" / name.format(observation, image + 1))
        latin, common = (("Bellis perennis", "Common Daisy"), ("Sedum acre", "Stonecrop"))[number % 2]
        rows.append(
            (
                observation,
                "2024-05-01",
                "research",
                f"https://x.org/{observation}.jpg",
                common,
                latin,
                common,
                number % 2,
            )
        )
    header = "id,observed_on,quality_grade,image_url,species_guess,scientific_name,common_name,taxon_id"
    return put(folder / "observations-401234.csv", lines(header, rows))


def test_an_export_of_inaturalist_labels_its_images_by_id(tmp_path):
    table = read(export(tmp_path), tmp_path)
    assert {row.class_name for row in table.rows} == {"Bellis perennis", "Sedum acre"} and len(table.rows) == 12
    assert table.notes == [
        (
            "labels from column scientific_name of observations-401234.csv; others: common_name, species_guess "
            "(--label-column)"
        ),
        "images by column id, which holds file names without suffix",
    ]
    table = read(tmp_path / "observations-401234.csv", tmp_path, "Common Name")
    assert table.notes[0].startswith("labels from column common_name of ") and {
        row.class_name for row in table.rows
    } == {"Common Daisy", "Stonecrop"}


def test_several_images_of_an_observation_are_one_group(tmp_path):
    table = read(export(tmp_path, "{}_{}.jpg", each=3), tmp_path)
    assert len(table.rows) == 36
    assert "images by column id, which holds observations, with several images each" in table.notes
    assert {row.group for row in table.rows if "148000017_" in row.id} == {"148000017"}
    assert "images of one plant by column id" in table.notes


def test_gbif_occurrences_are_labeled_by_species_and_not_by_their_taxonomic_class(tmp_path):
    rows = ["gbifID\tkingdom\tphylum\tclass\torder\tfamily\tgenus\tspecies\tscientificName"]
    for number in range(8):
        put(tmp_path / "images" / f"{4000000 + number}.jpg")
        species = ("Bellis perennis", "Sedum acre")[number % 2]
        taxonomy = ("Magnoliopsida", "Liliopsida")[number % 2]
        rows.append(f"{4000000 + number}\tPlantae\tT\t{taxonomy}\tX\tY\tBellis\t{species}\t{species} L.")
    table = read(put(tmp_path / "occurrence.txt", "\n".join(rows)), tmp_path)
    assert table.notes[0].startswith("labels from column species of ") and len(table.rows) == 8


def test_a_species_that_is_only_the_epithet_gets_its_genus(tmp_path):
    names = images(tmp_path, 6)
    rows = [(name, "Quercus", ("robur", "petraea")[number % 2]) for number, name in enumerate(names)]
    table = read(put(tmp_path / "a.csv", lines("file,genus,species", rows)), tmp_path)
    assert {row.class_name for row in table.rows} == {"Quercus robur", "Quercus petraea"}


def test_ids_that_pandas_wrote_as_decimals_are_found(tmp_path):
    images(tmp_path, 6, "10{}.jpg")
    rows = [(f"10{number}.0", FLOWERS[number % 2]) for number in range(6)]
    assert len(read(put(tmp_path / "a.csv", lines("id,label", rows)), tmp_path).rows) == 6


def test_a_label_that_is_a_number_is_not_taken_for_the_file(tmp_path):
    names = images(tmp_path, 8, "{}.jpg")
    rows = [(number % 2, name) for number, name in enumerate(names)]
    table = read(put(tmp_path / "a.csv", lines("label,id", rows)), tmp_path)
    assert classes(table) == {name: str(number % 2) for number, name in enumerate(names)}


def test_a_table_without_header_is_read_from_its_first_row(tmp_path):
    names = images(tmp_path, 6)
    put(tmp_path / "a.csv", "\n".join(f"{name},{FLOWERS[number % 2]}" for number, name in enumerate(names)))
    put(tmp_path / "b.txt", "\n".join(f"{name} oxeye {FLOWERS[number % 2]}" for number, name in enumerate(names)))
    put(tmp_path / "c.csv", "\n".join(f"{name[:-4]},{FLOWERS[number % 2]}" for number, name in enumerate(names)))
    assert len(read(tmp_path / "a.csv", tmp_path).rows) == len(read(tmp_path / "c.csv", tmp_path).rows) == 6
    assert classes(read(tmp_path / "b.txt", tmp_path))["0001.jpg"] == "oxeye rose"


def test_a_header_that_is_the_name_of_images_as_well_is_no_row(tmp_path):
    names = [put(tmp_path / f"p{number}" / "picture.jpg").relative_to(tmp_path) for number in range(9)]
    text = lines("picture,species,note", [(name, FLOWERS[number % 3], number % 4) for number, name in enumerate(names)])
    table = read(put(tmp_path / "t.csv", text), tmp_path, "species")
    assert len(table.rows) == 9 and not table.warnings
    rows = [("image.jpg", "daisy"), *((put(tmp_path / f"image ({n}).jpg").name, "rose") for n in range(5))]
    put(tmp_path / "image.jpg")
    text = "\n".join(f"{name.removesuffix('.jpg')},{label}" for name, label in rows)
    assert len(read(put(tmp_path / "t.csv", text), tmp_path).rows) == 6  # without a header, the first is no column


def test_no_path_leads_out_of_the_folder(tmp_path):
    put(tmp_path / "secret.jpg")
    images(tmp_path / "mine", 4)
    rows = [("../secret.jpg", "daisy"), (tmp_path / "secret.jpg", "rose"), ("0001.jpg", "daisy"), ("0002.jpg", "rose")]
    table = read(put(tmp_path / "mine" / "labels.csv", lines("path,label", rows)), tmp_path / "mine")
    assert {row.id for row in table.rows} == {"0001.jpg", "0002.jpg"}
    assert any("rows of labels.csv whose file is not there: 2 (" in warning for warning in table.warnings)


def test_nothing_matches_says_the_columns_and_what_a_file_column_holds(tmp_path):
    images(tmp_path, 3, "other{}.jpg")
    table = put(tmp_path / "a.csv", lines("title,image_url,label", [("x", "https://x.org/other0.jpg", "rose")] * 4))
    with pytest.raises(
        UserError, match="columns: title, image_url, label.*file names.*image_url holds addresses: down"
    ):
        read(table, tmp_path)


def test_a_table_beside_no_images_says_so(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        read(put(tmp_path / "a.csv", labels(["a.jpg"])), tmp_path)


def test_a_file_name_that_several_images_have_is_not_guessed(tmp_path):
    names = images(tmp_path / "images", 4)
    images(tmp_path / "thumbs", 4)
    with pytest.raises(UserError, match="several images have the file names in column file_name, such as 0000.jpg"):
        read(put(tmp_path / "a.csv", labels(names)), tmp_path)
    assert len(read(put(tmp_path / "a.csv", labels(f"thumbs/{name}" for name in names)), tmp_path).rows) == 4
    images(tmp_path / "images", 1, "more.jpg")
    table = read(put(tmp_path / "a.csv", labels([*names, "more.jpg"])), tmp_path)
    assert classes(table) == {"images/more.jpg": "rose"}
    assert table.warnings[1].startswith("not used: rows of a.csv whose file name several images have: 4 (0000.jpg, ")


# ---- labels


def test_columns_of_0_and_1_are_classes(tmp_path):
    """Roboflow's _classes.csv, with spaces after commas."""
    names = images(tmp_path, 8)
    rows = [f"{name}, {int(n % 3 == 0)}, {int(n % 3 == 1)}, {int(n % 3 == 2)}" for n, name in enumerate(names[:6])]
    rows += [f"{names[6]}, 0, 0, 0", f"{names[7]}, 1, 1, 0"]
    table = read(put(tmp_path / "_classes.csv", "\n".join(["filename, daisy, rose, tulip", *rows])), tmp_path)
    assert [row.class_name for row in table.rows] == [*FLOWERS] * 2
    assert table.warnings == ["not used: rows of _classes.csv without a 1, or with several: 2 (0006.jpg, 0007.jpg)"]
    assert table.notes == ["labels from the columns of 0 and 1 of _classes.csv"]


def test_the_one_column_of_few_texts_is_the_label(tmp_path):
    names = images(tmp_path, 12)
    rows = [(name, "2024-05-01", number * 0.37, FLOWERS[number % 3]) for number, name in enumerate(names)]
    table = read(put(tmp_path / "a.csv", lines("bild,datum,breite,pflanze", rows)), tmp_path)
    assert table.notes == ["labels from column pflanze of a.csv"]
    assert classes(table) == {name: FLOWERS[number % 3] for number, name in enumerate(names)}


def test_several_such_columns_are_listed_with_the_flag(tmp_path):
    names = images(tmp_path, 12)
    rows = [(name, ("Ann", "Bob")[number % 2], FLOWERS[number % 3]) for number, name in enumerate(names)]
    table = put(tmp_path / "a.csv", lines("bild,wer,pflanze", rows))
    with pytest.raises(UserError, match="columns wer, pflanze; say which: --label-column"):
        read(table, tmp_path)
    assert classes(read(table, tmp_path, "pflanze")) == {name: FLOWERS[number % 3] for number, name in enumerate(names)}
    with pytest.raises(UserError, match="--label-column farbe: .*has no such column; it has bild, wer, pflanze"):
        read(table, tmp_path, "farbe")


def test_a_name_is_preferred_to_its_number_and_to_a_title(tmp_path):
    names = images(tmp_path, 12)
    rows = [(name, number % 3, f"image {number}", FLOWERS[number % 3]) for number, name in enumerate(names)]
    table = read(put(tmp_path / "a.csv", lines("file,label,name,true_species", rows)), tmp_path)
    assert table.notes[0].startswith("labels from column true_species of ")


def test_rows_that_cannot_be_used_are_counted_with_examples(tmp_path):
    names = images(tmp_path, 12)
    rows = [(name, FLOWERS[number % 3]) for number, name in enumerate(names[:8])]
    rows += [(name, FLOWERS[number % 3]) for number, name in enumerate(names[:2])]  # the same again
    rows += [(names[2], "rose"), (names[8], ""), *((f"gone{number}.jpg", "rose") for number in range(5))]
    table = read(put(tmp_path / "a.csv", lines("file,label", rows)), tmp_path)
    assert [row.id for row in table.rows] == [names[number] for number in (0, 1, 3, 4, 5, 6, 7)]
    assert table.warnings == [
        "not used: images with several labels or splits: 1 (0002.jpg: tulip, rose)",
        "not used: images without a row in a table: 3 (0009.jpg, 0010.jpg, 0011.jpg)",
        "not used: rows of a.csv whose file is not there: 5 (gone0.jpg, gone1.jpg, gone2.jpg, ...)",
        "not used: rows of a.csv without label: 1 (0008.jpg)",
    ]


@pytest.mark.parametrize("missing", ["", "NaN", "null", "-1", "N/A"])
def test_a_missing_label_is_no_class(missing, tmp_path):
    names = images(tmp_path, 7)
    rows = [*((name, FLOWERS[number % 3]) for number, name in enumerate(names[:6])), (names[6], missing)]
    table = read(put(tmp_path / "a.csv", lines("file,label", rows)), tmp_path)
    assert {row.class_name for row in table.rows} == {*FLOWERS}
    assert table.warnings == ["not used: rows of a.csv without label: 1 (0006.jpg)"]


def test_a_table_whose_images_have_several_labels_is_refused(tmp_path):
    names = images(tmp_path, 4)
    rows = [(name, flower) for name in names for flower in FLOWERS]
    with pytest.raises(UserError, match="4 of 4 images have several labels"):
        read(put(tmp_path / "a.csv", lines("file,label", rows)), tmp_path)


def test_a_table_without_labels_lists_its_columns(tmp_path):
    names = images(tmp_path, 4)
    with pytest.raises(UserError, match=r"no labels.*columns: file, label.*--label-column NAME"):
        read(put(tmp_path / "a.csv", lines("file,label", [(name, "") for name in names])), tmp_path)


# ---- splits and groups


def test_columns_of_0_and_1_in_each_split_folder(tmp_path):
    for split in ("train", "valid", "test"):
        names = images(tmp_path / split, 6)
        rows = [f"{name}, {n % 2}, {1 - n % 2}" for n, name in enumerate(names)]
        put(tmp_path / split / "_classes.csv", "\n".join(["filename, daisy, rose", *rows]))
    folder = survey(tmp_path)[0]
    table = read_label_tables(find_label_tables(folder), folder, None)
    assert {(row.id, row.class_name, row.split) for row in table.rows if "0001" in row.id} == {
        (f"{folder}/0001.jpg", "daisy", split)
        for folder, split in (("train", "train"), ("valid", "validation"), ("test", "test"))
    }


@pytest.mark.parametrize(
    ("column", "cells", "splits"),
    [
        ("split", ("Train", "val", "TEST"), ("train", "validation", "test")),
        ("learn_tag", ("training", "training", "valid"), ("train", "train", "validation")),
        ("is_valid", ("True", "False", "False"), ("validation", "train", "train")),
        ("is_train", ("1", "0", "1"), ("train", "test", "train")),
        ("fold", ("1", "2", "3"), ("", "", "")),
        ("split", ("train", "train", "train"), ("", "", "")),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "train.csv"])
def test_a_column_of_split_words_gives_the_splits(name, tmp_path, column, cells, splits):
    names = images(tmp_path, 12)
    rows = [(name, FLOWERS[number // 3 % 2], cells[number % 3]) for number, name in enumerate(names)]
    table = read(put(tmp_path / name, lines(f"file,label,{column}", rows)), tmp_path)
    assert tuple(row.split for row in table.rows[:3]) == splits
    assert (f"splits from column {column}" in table.notes) == any(splits)


def test_a_table_named_after_a_split_keeps_it_whatever_is_valid_says(tmp_path):
    names, rows = images(tmp_path, 24), []
    for number, name in enumerate(names):
        rows.append((name, FLOWERS[number // 4 % 2], number % 3 > 0))
    put(tmp_path / "train.csv", lines("file,label", [row[:2] for row in rows[:16]]))
    put(tmp_path / "test.csv", lines("file,label,is_valid", rows[16:]))
    folder = survey(tmp_path)[0]
    table = read_label_tables(find_label_tables(folder), folder, None)
    assert [row.split for row in table.rows] == ["train"] * 16 + ["test"] * 8


def test_images_in_split_folders_have_their_split(tmp_path):
    names = [f"{split}/{name}" for split in ("train", "test") for name in images(tmp_path / split, 6)]
    table = read(put(tmp_path / "a.csv", labels(names)), tmp_path)
    assert [row.split for row in table.rows] == ["test"] * 6 + ["train"] * 6


def test_tables_of_splits_are_merged_and_one_without_labels_is_not_used(tmp_path):
    """As in a contest: ids are the same in train/ and test/."""
    for split, count in (("train", 6), ("val", 3), ("test", 4)):
        images(tmp_path / split, count, "{}.jpg")
    for name, count in (("train_labels", 6), ("val", 3)):
        put(tmp_path / f"{name}.csv", lines("id,species", [(number, FLOWERS[number % 3]) for number in range(count)]))
    put(tmp_path / "test.csv", lines("id", [(number,) for number in range(4)]))
    put(tmp_path / "sample_submission.csv", lines("id,species", [(number, "rose") for number in range(4)]))
    folder = survey(tmp_path)[0]
    tables = find_label_tables(folder)
    assert [table.name for table in tables] == ["train_labels.csv", "val.csv", "test.csv"]
    table = read_label_tables(tables, folder, None)
    assert [(row.id, row.split) for row in table.rows[:4]] == [
        ("train/0.jpg", "train"), ("train/1.jpg", "train"), ("train/2.jpg", "train"), ("train/3.jpg", "train")
    ]  # fmt: skip
    assert sum(row.split == "validation" for row in table.rows) == 3 and len(table.rows) == 9
    assert "splits from the tables" in table.notes
    (warning,) = table.warnings  # the images of the contest's test are not missing
    assert warning.startswith("not used: ") and "test.csv: has no labels" in warning


def test_metadata_of_hugging_face_inside_the_split_folders(tmp_path):
    for split in ("train", "validation"):
        names = images(tmp_path / split, 6)
        rows = [json.dumps({"file_name": name, "label": FLOWERS[number % 3]}) for number, name in enumerate(names)]
        put(tmp_path / split / "metadata.jsonl", "\n".join(rows))
    folder = survey(tmp_path)[0]
    table = read_label_tables(find_label_tables(folder), folder, None)
    assert sorted(row.split for row in table.rows) == ["train"] * 6 + ["validation"] * 6
    assert {row.id for row in table.rows if row.split == "train"} == {f"train/{number:04d}.jpg" for number in range(6)}


def test_tables_that_contradict_each_other_are_listed(tmp_path):
    names = images(tmp_path, 6)
    put(tmp_path / "a.csv", labels(names)), put(tmp_path / "b.csv", labels(names[1:] + names[:1]))
    folder = survey(tmp_path)[0]
    with pytest.raises(UserError, match=r"a\.csv and b\.csv: 6 of 6 images .*--dataset TABLE"):
        read_label_tables(find_label_tables(folder), folder, None)


def test_observations_are_groups(tmp_path):
    names = images(tmp_path, 12)
    rows = [(name, FLOWERS[number // 4], 500 + number // 2) for number, name in enumerate(names)]
    table = read(put(tmp_path / "a.csv", lines("file,label,observationID", rows)), tmp_path)
    assert [row.group for row in table.rows[:3]] == ["500", "500", "501"]


def test_a_group_column_that_is_the_class_once_more_makes_no_groups(tmp_path):
    names = images(tmp_path, 12)
    rows = [(name, FLOWERS[number % 3], number % 3) for number, name in enumerate(names)]
    table = read(put(tmp_path / "a.csv", lines("file,label,plant_id", rows)), tmp_path)
    assert {row.group for row in table.rows} == {""}


# ---- tables of a folder


def test_tables_beside_images_and_in_folders_of_tables_are_found(tmp_path):
    names = images(tmp_path / "images", 6)
    put(tmp_path / "annotations" / "labels.csv", labels(names))
    put(tmp_path / "notes.txt", "a short text\nabout images\n")
    images(tmp_path / "images", 3, "{}.jpg")
    put(tmp_path / "classes.csv", lines("id,name", enumerate(FLOWERS)))
    put(tmp_path / "broken.json", "{")
    assert find_label_tables(survey(tmp_path)[0]) == [tmp_path / "annotations" / "labels.csv"]


def test_texts_beside_each_image_are_no_tables(tmp_path):
    for name in images(tmp_path, 30):
        put(tmp_path / name.replace(".jpg", ".txt"), f"{name} 0\n")
    assert find_label_tables(survey(tmp_path)[0]) == []


def test_a_long_table_of_few_images_is_found_by_their_share(tmp_path):
    names = images(tmp_path / "images", 5, "late{}.jpg")
    with open(tmp_path / "labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label"])
        rows.writerows((f"{number}.jpg", FLOWERS[number % 3]) for number in range(3000))
        rows.writerows((name, "rose") for name in names)
    folder = survey(tmp_path)[0]
    assert find_label_tables(folder) == [tmp_path / "labels.csv"]
    assert len(read_label_tables([tmp_path / "labels.csv"], folder, None).rows) == 5


def test_lists_of_path_and_number_for_each_split(tmp_path):
    names = [f"images/{name}" for name in images(tmp_path / "images", 12)]
    for split, part in (("train", names[:8]), ("val", names[8:])):
        put(tmp_path / f"{split}.txt", "\n".join(f"{name} {number % 2}" for number, name in enumerate(part)))
        put(tmp_path / f"{split}_files.txt", "\n".join(part))  # without labels
    folder = survey(tmp_path)[0]
    tables = find_label_tables(folder)
    table = read_label_tables(tables, folder, None)
    assert [(row.class_name, row.split) for row in table.rows] == [
        *[("0", "train"), ("1", "train")] * 4, *[("0", "validation"), ("1", "validation")] * 2
    ]  # fmt: skip
    assert [path.name for path in tables[:2]] == ["train.txt", "val.txt"]


def test_a_contest_of_ids_and_numbers_with_images_in_deep_folders(tmp_path):
    for number in range(12):
        put(tmp_path / "train_images" / f"{number % 3:03d}" / f"10000{number:02d}.jpg")
    rows = [(f"10000{number:02d}.jpg", number % 3) for number in range(12)]
    put(tmp_path / "train.csv", lines("image_id,label", rows))
    put(tmp_path / "label_num_to_disease_map.json", '{"0": "Blight (CBB)", "1": "Streak", "2": "Healthy"}')
    folder = survey(tmp_path)[0]
    table = read_label_tables(find_label_tables(folder), folder, None)
    assert len(table.rows) == 12 and {row.class_name for row in table.rows} == {"0", "1", "2"}
    assert table.rows[1].id == "train_images/000/1000003.jpg" and not table.warnings

"""Tables of images as Arrow: parquet files, saved data sets and data sets of the hub."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from config.cli import parse_config
from data import class_names
from data.dataset import build_datasets
from data.oxford_flowers import CLASS_NAMES
from data.parquet import has_images, load_parquet_files, load_saved_dataset
from data.rows import SPLITS, Reading
from data.survey import survey
from utils.image_utils import ImageError, open_image, png_image
from utils.logging_utils import UserError, logger

NAMES = ["ash", "elm", "oak"]
OPTIONS = Reading("main", streaming=False, seed=0, allow_missing=False, label_column=None, class_names=None)


def build(*argv):
    return build_datasets(parse_config(list(argv)))


def load(path, **options):
    """The source of the parquet files in a folder, or of one file."""
    reading = Reading(**(vars(OPTIONS) | options))
    if path.is_file():
        return load_parquet_files(path.parent, [path], reading)
    return load_parquet_files(path, survey(path)[0].find("parquet"), reading)


def png(number: int) -> bytes:
    import PIL.Image

    return png_image(PIL.Image.new("RGB", (30 + number, 20), (number * 9 % 256, 90, 30)))["bytes"]


def pictures(count: int, start: int = 0) -> list[dict]:
    return [{"bytes": png(number), "path": f"{number}.png"} for number in range(start, start + count)]


def write(file, columns: dict, features=None):
    """A parquet file of these columns; Image and ClassLabel by `features`, else as Arrow infers them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if features:
        Dataset.from_dict(columns, features=Features(features)).to_parquet(file)
    else:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


# ---- as on the hub


@pytest.fixture
def parquet_folder(tmp_path):
    """Files with the schema of the hub data set: image, 0-based label; `names` adds label names."""

    def make(labels=range(102), names=None, columns=("image", "label"), splits=("train", "validation", "test")):
        kind = "string" if isinstance(labels[0], str) else "int64"
        pixel = {"bytes": b"not decoded here", "path": None}
        features = Features({
            columns[0]: Image(decode=False), columns[1]: ClassLabel(names=names) if names else Value(kind)
        })  # fmt: skip
        for split in splits:
            rows = [
                {columns[0]: pixel | {"path": f"{split}_{index}.jpg"}, columns[1]: label}
                for index, label in enumerate(labels)
            ]
            Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
        return str(tmp_path)

    return make


def test_parquet_folder_without_names_is_the_official_classes(parquet_folder):
    data = build("--dataset", parquet_folder())
    assert data.class_names == list(CLASS_NAMES)
    assert (len(data.train), len(data.validation), len(data.test)) == (102, 102, 102)
    assert data.train[5]["id"] == "train_5" and data.train[5]["label"] == 5
    assert data.train.cache_files  # memory-mapped


def test_parquet_folder_with_its_own_names(parquet_folder):
    data = build("--dataset", parquet_folder(labels=[0, 1, 1], names=["oak_tree ", "ash"]))
    assert data.class_names == ["oak tree", "ash"] and data.train["label"][:] == [0, 1, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"splits": ("validation", "test")}, "no parquet file for train, only for test and validation; give files or"),
        ({"labels": range(1, 103)}, r"the labels are numbers without names \(1 to 102\).*: --class-names FILE"),
        ({"labels": [0, 1, 3]}, r"the labels are numbers without names \(0 to 3\)"),
        ({"labels": [1, 1], "names": ["a", "b"]}, "only one class"),
    ],
)
def test_parquet_folder_that_differs_is_an_error_with_what_was_expected(change, words, parquet_folder):
    with pytest.raises(UserError, match=words):
        build("--dataset", parquet_folder(**change))


@pytest.mark.parametrize("stream", [(), ("--streaming", "true", "--max-steps", "5")])
def test_a_missing_parquet_file_is_noticed_by_the_numbers_in_the_file_names(stream, parquet_folder, tmp_path):
    folder = parquet_folder(labels=[0, 1], names=["a", "b"])
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "train-00002-of-00004.parquet")
    with pytest.raises(UserError, match=r"train-\*-of-00004: 1 of 4 files are there; add what is missing, or"):
        build("--dataset", folder, *stream)
    data = build("--dataset", folder, "--allow-missing", "true", *stream)
    assert data.class_names == ["a", "b"]
    assert "train-*-of-00004: 1 of 4 files are there; continuing without the rest" in data.warnings[0]


def test_parquet_images_with_the_same_name_in_two_splits_get_different_ids(parquet_folder, tmp_path):
    folder = parquet_folder(labels=[0, 1], names=["a", "b"])
    for split in ("validation", "test"):
        shutil.copy(tmp_path / "train-00000-of-00001.parquet", tmp_path / f"{split}-00000-of-00001.parquet")
    data = build("--dataset", folder)
    assert data.train["id"] == ["train-000000", "train-000001"] and data.test["id"] == ["test-000000", "test-000001"]


def test_parquet_images_are_not_copied_into_memory(parquet_folder, tmp_path):
    image = {"bytes": bytes(2**20), "path": "x.jpg"}
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a", "b"])})
    for split in ("train", "validation", "test"):
        rows = [{"image": image, "label": index % 2} for index in range(40)]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    build("--dataset", str(tmp_path))  # the first reading fills the cache
    before = pyarrow.total_allocated_bytes()
    data = build("--dataset", str(tmp_path))
    assert len(data.train) == 40 and pyarrow.total_allocated_bytes() - before < 10 * 2**20


def test_a_file_that_is_not_parquet(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"test.parquet: cannot be read \(.*\); write it again"):
        build("--dataset", str(tmp_path))


def test_parquet_files_of_a_split_with_different_columns(tmp_path):
    for name, column in (("train-0", "label"), ("train-1", "name")):
        write(tmp_path / f"{name}.parquet", {"image": pictures(2), column: ["ash", "elm"]})
    with pytest.raises(UserError, match=r"cannot be read \(CastError: .*; write the files again"):
        load(tmp_path)


# ---- columns


IMAGE = {"image": Image(decode=False)}


IMAGE_COLUMNS = ("image", "img", "Picture", "jpg", "pixel_values", "whatever")
LABEL_COLUMNS = ("labels", "class", "species", "scientificName", "category", "Blume")


@pytest.mark.parametrize(
    ("image", "label"), [*((name, "label") for name in IMAGE_COLUMNS), *(("image", name) for name in LABEL_COLUMNS)]
)
def test_columns_are_found_by_name_and_content(image, label, tmp_path):
    columns = {"key": list(range(6)), image: pictures(6), "text": [f"row {n}" for n in range(6)], label: NAMES * 2}
    source = load(write(tmp_path / "x.parquet", columns))
    assert source.class_names == NAMES and source.splits["train"]["label"] == [0, 1, 2] * 2
    assert open_image(source.splits["train"][3]["image"]).size == (33, 20)
    assert (f"images from column {image}, labels from {label}" in source.notes) == (
        (image, label) != ("image", "label")
    )


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
def test_bytes_without_a_path_are_images(kind, tmp_path):
    contents = pyarrow.array([png(n) for n in range(6)], kind)
    file = write(tmp_path / "x.parquet", {"content": contents, "sha": [b"0123"] * 6, "species": NAMES * 2})
    source = load(file)
    assert open_image(source.splits["train"][1]["image"]).size == (31, 20)
    assert source.splits["train"]["id"][1] == "train-000001"
    assert has_images(file) and not has_images(write(tmp_path / "y.parquet", {"vector": [b"0123"], "label": ["ash"]}))


def same(size: int, count: int) -> list[dict]:
    return [{"bytes": bytes(size), "path": None}] * count


@pytest.mark.parametrize(
    "columns",
    [
        {"image": same(20_000_000, 6), "label": NAMES * 2},  # stored once
        {"image": [{"bytes": bytes([n]) * 20_000_000} for n in range(6)], "label": NAMES * 2},
        {"image": pictures(6), "label": NAMES * 2, "caption": ["x" * 20_000_000] * 6},
        {
            "image": pictures(6),
            "label": NAMES * 2,
            "key": pyarrow.array([bytes(20_000_000)] * 6, pyarrow.binary(20_000_000)),
        },
        {"image": pyarrow.nulls(13_000_000, pyarrow.binary()), "label": pyarrow.nulls(13_000_000, pyarrow.int32())},
    ],
    ids=["equal images", "images", "texts", "fixed widths", "rows"],
)
def test_a_small_file_that_unpacks_to_much_is_refused(columns, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet", compression="zstd")
    before = [*Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")]
    with pytest.raises(UserError, match="train.parquet: 0.. MB unpack to 1.. MB or more, .* remove it, or use"):
        load(tmp_path)
    assert [*Path(datasets.config.HF_DATASETS_CACHE).rglob("*.arrow")] == before


def test_files_that_only_together_unpack_to_much_are_refused(tmp_path):
    for number in range(3):  # each of 48 MB
        columns = pyarrow.table({"image": same(16_000, 3000), "label": NAMES * 1000})
        pyarrow.parquet.write_table(columns, tmp_path / f"train-{number}.parquet", compression="zstd")
    with pytest.raises(UserError, match="train-2.parquet, file 3 of 3: 0.. MB unpack to 1.. MB or more"):
        load(tmp_path)


def test_a_small_file_that_unpacks_to_much_is_refused_beside_a_large_one(tmp_path):
    large = {"image": [{"bytes": os.urandom(1_000_000), "path": None} for _ in NAMES], "label": NAMES}
    pyarrow.parquet.write_table(pyarrow.table(large), tmp_path / "train-0.parquet")
    small = pyarrow.table({"image": same(20_000_000, 6), "label": NAMES * 2})
    pyarrow.parquet.write_table(small, tmp_path / "train-1.parquet", compression="zstd")
    with pytest.raises(UserError, match="train-1.parquet, file 2 of 2: 0.. MB unpack to 1.. MB or more"):
        load(tmp_path)


def test_many_copies_of_a_small_image_are_no_such_file(tmp_path):
    write(tmp_path / "train.parquet", {"image": pictures(1) * 3000, "label": NAMES * 1000})
    assert len(load(tmp_path).splits["train"]) == 3000


@pytest.mark.parametrize("change", ["table", "between two batches", "empty table", "description"])
def test_a_corrupted_cache_is_built_again(change, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "t" / "train.parquet", {"image": pictures(30), "label": NAMES * 10})
    ids = load(tmp_path / "t").splits["train"]["id"][:]
    (table,), (info,) = (tmp_path / "cache").rglob("*.arrow"), (tmp_path / "cache").rglob("dataset_info.json")
    if change == "description":
        info.write_text("{")
    elif change == "between two batches":
        with pyarrow.memory_map(str(table)) as source, pyarrow.ipc.open_stream(source) as reader:
            batch, schema = reader.read_next_batch(), reader.schema
            with pyarrow.ipc.new_stream(str(tmp_path / "short"), schema) as writer:
                writer.write_batch(batch.slice(0, 10))
        shutil.copyfile(tmp_path / "short", table)
    else:
        os.truncate(table, 100 if change == "table" else 0)
    with caplog.at_level("WARNING", "llava_plants"):
        monkeypatch.setattr(logger, "propagate", True)
        assert load(tmp_path / "t").splits["train"]["id"][:] == ids
    assert "a corrupted table in the cache" in caplog.text and "is built again" in caplog.text
    caplog.clear()
    assert load(tmp_path / "t").splits["train"]["id"][:] == ids and not caplog.text


def test_of_several_images_the_one_of_a_usual_name_is_used(tmp_path):
    columns = {"mask": pictures(6, 9), "image": pictures(6), "label": NAMES * 2}
    assert load(write(tmp_path / "x.parquet", columns)).splits["train"]["id"] == [f"{n}" for n in range(6)]
    columns["scan"] = columns.pop("image")
    with pytest.raises(UserError, match=r"several columns hold images \(mask, scan\); rename the one to use to image"):
        load(write(tmp_path / "y.parquet", columns))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"a": NAMES * 2, "b": NAMES * 2}, "the labels may be in any of the columns a, b; say which: --label-"),
        ({}, r"has no labels for the images \(columns: image\); say which column has: --label-column"),
        ({"label": [["ash"]] * 6}, "the column label holds lists or records; expected is one name or number for each"),
        ({"label": [{"name": "ash"}] * 6}, "the column label holds lists or records"),
        (
            {"label": [None] * 6},
            "the column label holds null values; expected is one name or number for each image: name a",
        ),
        ({"label": ["", " "] * 3}, "has no labels for the images .*; say which column has: --label-column NAME"),
        ({"label": [0.5, 1, 2] * 2}, "labels of train are no whole numbers .*; name another column: --label-column"),
        ({"label": ["x" * 201, "y"] * 3}, "holds texts of up to 201 characters, which are no class names"),
        ({"label": [0, 1, 2] * 2}, r"numbers without names \(0 to 2\); give a json or csv file of number and name"),
        ({"label": [True, False] * 3}, r"numbers without names \(false to true\)"),
        ({"label": [2**62, -(2**62)] * 3}, "numbers without names"),
    ],
)
def test_labels_that_are_not_clear_or_usable_are_an_error(labels, words, tmp_path):
    file = write(tmp_path / "x.parquet", {"image": pictures(6)} | labels)
    with pytest.raises(UserError, match=words):
        load(file)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("specis", r"parquet file .*x.parquet has no such column; did you mean species\?; it has image, species, note"),
        ("image", "--label-column image: holds images; expected is one name or number for each image"),
        ("tags", "--label-column tags: holds lists or records"),
    ],
)
def test_a_label_column_that_cannot_be_used(column, words, tmp_path):
    columns = {"image": pictures(6), "species": NAMES * 2, "note": list("abcabc"), "tags": [["a"]] * 6}
    file = write(tmp_path / "x.parquet", columns)
    assert load(file, label_column="note").class_names == ["a", "b", "c"]
    with pytest.raises(UserError, match=words):
        load(file, label_column=column)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["a"], "label": ["b"]}, "no column of images among text, label; expected is one of image files"),
        ({"image": ["https://x.org/a.jpg"], "label": ["b"]}, "no images, but web addresses in the column image; "),
        ({"image": [[1, 2]], "label": ["b"]}, "no column of images among image, label"),
    ],
)
def test_files_without_images_are_an_error_with_their_columns(columns, words, tmp_path):
    write(tmp_path / "x.parquet", columns)
    assert not has_images(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=words):
        build("--dataset", str(tmp_path))
    with pytest.raises(UserError, match=words):
        build("--dataset", str(tmp_path / "x.parquet"))


def test_files_without_images_beside_others_are_not_used_with_a_warning(tmp_path):
    write(tmp_path / "train.parquet", {"image": pictures(6), "label": NAMES * 2})
    write(tmp_path / "train_embeddings.parquet", {"embedding": [1.0], "label": ["ash"]})
    source = load(tmp_path)
    assert len(source.splits["train"]) == 6
    assert source.warnings == ["1 parquet files have no images and are not used: train_embeddings.parquet"]


def test_a_file_without_rows(tmp_path):
    table = pyarrow.table({"image": pictures(3), "label": NAMES}).slice(0, 0)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="x.parquet has no rows; write it again with images"):
        build("--dataset", str(tmp_path / "x.parquet"))


def test_two_columns_of_one_name_and_a_schema_that_lies(tmp_path):
    table = pyarrow.table([pyarrow.array([b"x"])] * 2, names=["image", "image"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="x.parquet: two columns are called image; rename one"):
        build("--dataset", str(tmp_path / "x.parquet"))
    lie = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Nothing"}}}})}
    table = pyarrow.table({"image": pictures(3), "label": NAMES}).replace_schema_metadata(lie)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet: cannot be read \(.*\); write it again"):
        build("--dataset", str(tmp_path / "x.parquet"))


# ---- labels


def test_splits_without_the_column_of_images_or_any_label(tmp_path):
    write(tmp_path / "a" / "train.parquet", {"image": pictures(6), "label": NAMES * 2})
    write(tmp_path / "a" / "test.parquet", {"picture": pictures(6), "label": NAMES * 2})
    with pytest.raises(
        UserError, match="test has the columns picture, label and no image; write all splits with the same"
    ):
        load(tmp_path / "a")
    write(tmp_path / "b" / "train.parquet", {"image": pictures(6), "label": [-1] * 6})
    with pytest.raises(UserError, match="the column of labels holds no labels; name another: --label-column"):
        load(tmp_path / "b")


def test_a_label_that_has_no_name(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["ash", "elm"])})
    columns = {"image": pictures(6), "label": [0, 1, 2] * 2}
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=features.arrow_schema), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="has the label 2 in train, expected 0 to 1; write labels as a ClassLabel with"):
        load(tmp_path / "x.parquet")


@pytest.mark.parametrize("missing", [-1, None])
def test_a_missing_label_is_never_a_class(missing, tmp_path):
    features = {"image": Image(), "label": ClassLabel(names=NAMES)}
    labels = [0, 1, 2] * 3 + [missing]
    source = load(write(tmp_path / "x.parquet", {"image": pictures(10), "label": labels}, features))
    assert source.splits["train"]["label"][:] == [0, 1, 2] * 3
    assert source.warnings == ["1 images of train have no label and are not used"]


def test_texts_are_the_classes_and_spellings_of_one_name_are_merged(tmp_path):
    labels = ["Rosa canina", "rosa_canina", "Rosa canina", "Acer", None, " "]
    source = load(write(tmp_path / "x.parquet", {"image": pictures(6), "label": labels}))
    assert source.class_names == ["Acer", "Rosa canina"] and source.splits["train"]["label"] == [1, 1, 1, 0]
    assert source.splits["train"]["id"] == ["0", "1", "2", "3"]
    assert source.warnings == [
        "'Rosa canina' and 'rosa_canina' are read as one class, 'Rosa canina'; rename one if they differ",
        "2 images of train have no label and are not used",
    ]


def test_numbers_take_their_names_from_the_column_that_has_one_for_each(tmp_path):
    columns = {"image": pictures(12), "label": [0, 1, 2] * 4, "file": [f"{n}" for n in range(12)]}
    columns |= {"source": ["a", "a", "b"] * 4, "species": ["elm", "oak", "ash"] * 4}
    source = load(write(tmp_path / "x.parquet", columns))
    assert source.class_names == NAMES and source.splits["train"]["label"][:3] == [1, 2, 0]


@pytest.mark.parametrize("labels", [[0, 1, 2, -1], [0.0, 1.0, 2.0, float("nan")], [0, 1, 2, None]])
def test_numbers_are_named_by_a_file(labels, tmp_path, monkeypatch):
    asked = []

    def read(file, codes):
        asked.append((file.name, list(codes)))
        return {"0": "sessile_oak", "1": "ash", "2": "elm"}

    monkeypatch.setattr(class_names, "read_class_names", read)
    file = write(tmp_path / "x.parquet", {"image": pictures(4), "label": labels})
    source = load(file, class_names=str(tmp_path / "names.json"))
    assert source.class_names == ["sessile oak", "ash", "elm"] and source.splits["train"]["label"] == [0, 1, 2]
    assert asked == [("names.json", ["0", "1", "2"])] and "1 images of train have no label" in source.warnings[0]


def test_codes_are_named_by_a_table_beside_or_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(class_names, "find_class_names", lambda codes, folders: None)
    features = IMAGE | {"label": ClassLabel(names=["1", "2", "17"])}
    file = write(tmp_path / "x.parquet", {"image": pictures(6), "label": [0, 1, 2] * 2}, features)
    source = load(file)
    assert source.class_names == ["1", "2", "17"]
    assert "classes are called 1, 2, 17, and the model would answer with that; a json or csv file" in source.warnings[0]
    found = ({"1": "ash", "2": "elm", "17": "oak"}, tmp_path / "cat_to_name.json")
    monkeypatch.setattr(class_names, "find_class_names", lambda codes, folders: found)
    source = load(file)
    assert source.class_names == NAMES and source.notes[-1].endswith("cat_to_name.json: 1 is ash")


def test_class_labels_in_another_order_mean_the_same_classes(tmp_path):
    for split, names in (("train", NAMES), ("test", NAMES[::-1])):
        features = IMAGE | {"label": ClassLabel(names=names)}
        write(tmp_path / f"{split}.parquet", {"image": pictures(3), "label": [0, 1, 2]}, features)
    source = load(tmp_path)
    assert source.class_names == NAMES
    assert (source.splits["train"]["label"], source.splits["test"]["label"]) == ([0, 1, 2], [2, 1, 0])


def test_splits_whose_labels_differ_in_kind_are_an_error(tmp_path):
    write(tmp_path / "train.parquet", {"image": pictures(6), "label": NAMES * 2})
    write(tmp_path / "test.parquet", {"image": pictures(6), "label": [0, 1, 2] * 2})
    with pytest.raises(
        UserError, match=r"column of labels differs between the splits \(train: string values, test: int64"
    ):
        load(tmp_path)


@pytest.mark.parametrize("labels", [None, [-1, -1], [None, None]])
def test_a_test_split_without_labels_is_not_used_with_a_warning(labels, tmp_path):
    features = IMAGE | {"label": ClassLabel(names=NAMES)}
    write(tmp_path / "train.parquet", {"image": pictures(3), "label": [0, 1, 2]}, features)
    columns = {"image": pictures(2)} | ({"label": labels} if labels else {})
    write(tmp_path / "test.parquet", columns, features if labels else IMAGE)
    source = load(tmp_path)
    assert [*source.splits] == ["train"]
    assert source.warnings == ["test has no labels, so it cannot be scored: its 2 images are not used"]


def test_text_that_is_not_utf8(tmp_path):
    labels = pyarrow.array([b"ash", b"elm\xff", b"ash", b"elm\xff"]).view(pyarrow.string())
    source = load(write(tmp_path / "x.parquet", {"image": pictures(4), "label": labels}))
    assert source.class_names == ["ash", "elm\N{REPLACEMENT CHARACTER}"]
    paths = pyarrow.array([b"a\xff", b"b"]).view(pyarrow.string())
    images = pyarrow.StructArray.from_arrays([pyarrow.array([png(0), png(1)]), paths], ["bytes", "path"])
    with pytest.raises(UserError, match="file names in the column image are not UTF-8; write them again"):
        load(write(tmp_path / "y.parquet", {"image": images, "label": ["ash", "elm"]}))


@pytest.mark.parametrize("by_path", [False, True])
def test_images_of_one_plant_have_its_group(by_path, tmp_path):
    images = files_in(tmp_path) if by_path else pictures(6)
    columns = {"image": images, "label": NAMES * 2, "obs_id": [7, 7, 8, 9, None, 10]}
    source = load(write(tmp_path / "x.parquet", columns))
    assert source.splits["train"]["group"] == ["7", "7", "8", "9", "", "10"]
    assert source.notes == ["images of one plant have the same value in the column obs_id"]
    columns["obs_id"] = [1, 2, 3, 4, 5, 6]
    assert "group" not in load(write(tmp_path / "x.parquet", columns)).splits["train"].column_names


def test_a_plant_id_that_is_the_class_once_more_makes_no_groups(tmp_path):
    columns = {"image": pictures(6), "label": NAMES * 2, "plant_id": [4, 5, 6] * 2}
    assert "group" not in load(write(tmp_path / "x.parquet", columns)).splits["train"].column_names


# ---- splits


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["data/train-00000-of-00001"], {"train": 1}),
        (["part-0", "part-1"], {"train": 2}),
        (["TRAIN", "Testing"], {"train": 1, "test": 1}),
        (["training_set", "dev"], {"train": 1, "validation": 1}),
        (["flowers-train-0", "flowers-train-1", "flowers_valid", "flowers.test"], dict(zip(SPLITS, (2, 1, 1)))),
        (["train/0000", "train/0001", "validation/0000", "test/0000"], dict(zip(SPLITS, (2, 1, 1)))),
        (["plants", "test"], {"train": 1, "test": 1}),
        (["train-00000-of-00002-0a1b2c", "train-00001-of-00002-3d4e5f"], {"train": 2}),
    ],
)
def test_names_of_files_and_folders_tell_splits(files, expected, tmp_path):
    for number, name in enumerate(files):
        write(tmp_path / f"{name}.parquet", {"image": pictures(3, 3 * number), "label": NAMES})
    source = load(tmp_path)
    assert {split: len(rows) // 3 for split, rows in source.splits.items()} == expected and not source.warnings


def test_files_beside_train_that_name_no_split_are_warned_of(tmp_path):
    for name in ("train", "more"):
        write(tmp_path / f"{name}.parquet", {"image": pictures(3), "label": NAMES})
    assert load(tmp_path).warnings == ["1 parquet files have no split in their names and are not used: more.parquet"]


@pytest.mark.parametrize("by_path", [False, True])
def test_one_file_is_train_whatever_its_name_and_a_column_may_split_it(by_path, tmp_path):
    columns = {"image": files_in(tmp_path, 9) if by_path else pictures(9), "label": NAMES * 3}
    assert [*load(write(tmp_path / "test.parquet", columns)).splits] == ["train"]
    columns["split"] = ["train"] * 4 + ["val", "test", "val", "train", "test"]
    splits = load(write(tmp_path / "all.parquet", columns)).splits
    assert {split: rows["id"] for split, rows in splits.items()} == dict(
        zip(SPLITS, (["0", "1", "2", "3", "7"], ["4", "6"], ["5", "8"]))
    )


def test_without_a_class_images_stay_where_they_lie(tmp_path):
    """The split column selects rows; a new column of labels would write all of their images into the cache."""
    labels, splits = ["rare", *"abcd" * 4], ["train", *["train", "train", "test"] * 5, "train"]
    write(tmp_path / "all.parquet", {"image": pictures(17), "label": labels, "split": splits}, {
        "image": Image(), "label": Value("string"), "split": Value("string")
    })  # fmt: skip
    data = build("--dataset", str(tmp_path), "--min-images", "2", "--val-fraction", "0.3")
    assert data.class_names == [*"abcd"] and data.train.cache_files
    assert not any(Path(file["filename"]).name.startswith("cache-") for file in data.train.cache_files)
    for rows in (data.train, data.validation, data.test):
        assert [data.class_names[row["label"]] for row in rows] == [labels[int(row["id"])] for row in rows]
        assert [row["image"]["bytes"] for row in rows] == [png(int(row["id"])) for row in rows]
    assert len(data.test) == 5


def test_a_column_of_true_and_false_says_which_rows_are_validation(tmp_path):
    columns = {"image": pictures(6), "label": NAMES * 2, "is_valid": [False] * 3 + [True] * 3}
    splits = load(write(tmp_path / "x.parquet", columns)).splits
    assert {split: rows["id"] for split, rows in splits.items()} == {"train": list("012"), "validation": list("345")}


def test_train_alone_is_split_by_the_usual_fractions(tmp_path):
    write(tmp_path / "train.parquet", {"image": pictures(30), "label": NAMES * 10})
    data = build("--dataset", str(tmp_path))
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 3, 3)
    assert Counter(data.test["label"]) == {0: 1, 1: 1, 2: 1}


def test_configurations_side_by_side_are_refused_with_what_to_give(tmp_path):
    for name in ("full", "small"):
        write(tmp_path / name / "train-00000-of-00001.parquet", {"image": pictures(3), "label": NAMES})
    with pytest.raises(UserError, match="holds 2 data sets; give one of them: --dataset '.*/full', --dataset '.*/sm"):
        load(tmp_path)


# ---- files that a table names


@pytest.fixture
def secret(tmp_path):
    """An image outside the data set."""
    file = tmp_path / "secret" / "secret.png"
    file.parent.mkdir()
    file.write_bytes(png(7))
    return file


def files_in(folder, count: int = 6) -> list[str]:
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        (folder / "images" / f"{number}.png").write_bytes(png(number))
    return [f"images/{number}.png" for number in range(count)]


@pytest.mark.parametrize("as_struct", [True, False])
def test_paths_are_read_below_the_folder_and_nowhere_else(as_struct, secret, tmp_path):
    folder = tmp_path / "set"
    good = files_in(folder)
    (folder / "images" / "link.png").symlink_to(secret)
    bad = [str(secret), "../secret/secret.png", "images/../../secret/secret.png", "images/link.png", "/etc/passwd.png"]
    paths = [*good, *bad]
    images = [{"bytes": None, "path": path} for path in paths] if as_struct else paths
    file = write(folder / "data.parquet", {"image": images, "label": [*NAMES * 2, *["ash"] * len(bad)]})
    assert has_images(file)
    source = load(folder)
    rows = source.splits["train"]
    assert [row["image"]["path"] for row in rows] == [f"{folder}/{path}" for path in good]
    assert rows["label"] == [0, 1, 2] * 2 and open_image(rows[1]["image"]).size == (31, 20)
    assert source.warnings == [f"5 images are named by paths outside the data set, such as {secret}; they are not used"]
    write(folder / "data.parquet", {"image": bad, "label": ["ash"] * len(bad)})
    with pytest.raises(UserError, match="5 images are named by paths outside the data set, .*which are never opened"):
        load(folder)


def test_a_path_of_another_row_without_bytes_is_never_opened(secret, tmp_path):
    images = [*pictures(4), {"bytes": None, "path": str(secret)}, None]
    source = load(write(tmp_path / "x.parquet", {"image": images, "label": NAMES * 2}))
    rows = source.splits["train"]
    assert len(rows) == 6 and open_image(rows[3]["image"]).size == (33, 20)
    for index in (4, 5):
        with pytest.raises(ImageError, match=r"is empty \(0 bytes\)"):
            open_image(rows[index]["image"])


def test_missing_files_are_counted_and_listed(tmp_path):
    paths = [*files_in(tmp_path), "images/99.png", "a\0b.png", "x" * 5000 + ".png"]
    file = write(tmp_path / "train.parquet", {"file_name": paths, "species": NAMES * 3})
    with pytest.raises(
        UserError, match=r"3 of 9 images are missing \(images/99.png, .*; add what is missing, or .*: --allow"
    ):
        load(file)
    source = load(file, allow_missing=True)
    assert len(source.splits["train"]) == 6 and "3 of 9 images are missing" in source.warnings[0]


def test_a_file_of_an_image_without_a_label_is_not_missed(tmp_path):
    paths = [*files_in(tmp_path), "gone.png"]
    write(tmp_path / "train.parquet", {"path": paths, "label": [*"aabbab", ""]})
    source = load(tmp_path)
    assert len(source.splits["train"]) == 6 and source.warnings == ["1 images of train have no label and are not used"]


def test_each_split_has_its_files_beside_it(tmp_path):
    for split in ("train", "test"):
        paths = files_in(tmp_path / split)
        write(tmp_path / split / "metadata.parquet", {"file_name": paths, "label": NAMES * 2})
    source = load(tmp_path)
    assert source.splits["test"][0]["image"]["path"] == str(tmp_path / "test/images/0.png")
    assert source.splits["train"]["id"][0] == "train-000000"


def test_a_table_of_files_without_labels_is_no_data_set(tmp_path):
    assert not has_images(write(tmp_path / "x.parquet", {"file": ["a.png"], "embedding": [[1.0]]}))


def test_rows_with_neither_bytes_nor_path_are_unreadable_images(tmp_path):
    file = write(tmp_path / "x.parquet", {"image": [{"bytes": None, "path": None}] * 3, "label": NAMES})
    (tmp_path / "y").mkdir()
    features = IMAGE | {"label": Value("string")}
    for source in (load(file), load(write(tmp_path / "y.parquet", {"image": [None] * 3, "label": NAMES}, features))):
        with pytest.raises(ImageError, match="is empty"):
            open_image(source.splits["train"][2]["image"])


def test_class_folders_count_beside_a_table_of_their_files_and_not_beside_images(image_folder):
    root = image_folder({"ash": 12, "elm": 12})
    table = {"file_name": [f"ash/{n}.png" for n in range(6)], "score": [0.5] * 6, "text": list("abcdef")}
    write(root / "metadata.parquet", table)
    assert build("--dataset", str(root)).class_names == ["ash", "elm"]
    write(root / "train.parquet", {"image": pictures(6), "label": NAMES * 2})
    with pytest.raises(UserError, match=r"has 2 class folders and parquet files with images \(train.parquet\)"):
        build("--dataset", str(root))


# ---- save_to_disk


def save(folder, splits=("train", "test"), decode=True):
    features = Features({"image": Image(decode=decode), "label": Value("string")})
    tables = {
        split: Dataset.from_dict({"image": pictures(6, 6 * n), "label": NAMES * 2}, features=features)
        for n, split in enumerate(splits)
    }
    (DatasetDict(tables) if len(splits) > 1 else tables[splits[0]]).save_to_disk(folder)


@pytest.mark.parametrize("splits", [("train", "test"), ("anything",), ("train", "validation", "test")])
def test_a_saved_data_set(splits, tmp_path):
    save(tmp_path / "saved", splits)
    for path in (tmp_path / "saved", tmp_path):
        source = load_saved_dataset(survey(path)[0], OPTIONS)
        assert source.class_names == NAMES and len(source.splits) == len(splits)
        assert source.description == f"saved data set {tmp_path / 'saved'}" and source.splits["train"].cache_files
        assert open_image(source.splits["train"][2]["image"]).size == (32, 20)
    if len(splits) == 3:
        assert build("--dataset", str(tmp_path / "saved")).class_names == NAMES


def test_saved_data_sets_that_cannot_be_used(tmp_path):
    save(tmp_path / "saved", ("a", "b"))
    with pytest.raises(UserError, match="no split is called train, it has a, b; rename the one to learn from"):
        load_saved_dataset(survey(tmp_path)[0], OPTIONS)
    (tmp_path / "saved" / "a" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"saved data set .*saved: cannot be read \(.*\); save it again, or"):
        load_saved_dataset(survey(tmp_path)[0], OPTIONS)
    for file in (tmp_path / "saved").rglob("*.json"):
        file.unlink()
    with pytest.raises(UserError, match="data-00000-of-00001.arrow is an Arrow file without its description; exp"):
        load_saved_dataset(survey(tmp_path)[0], OPTIONS)


def test_a_saved_data_set_of_compressed_buffers_that_unpack_to_much_is_refused(tmp_path):
    Dataset.from_dict({"image": pictures(6), "label": NAMES * 2}).save_to_disk(tmp_path)
    (file,) = tmp_path.glob("*.arrow")
    batch = pyarrow.record_batch({"image": same(20_000_000, 6), "label": NAMES * 2})
    options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
    with pyarrow.ipc.new_stream(str(file), batch.schema, options=options) as writer:
        writer.write_batch(batch)
    with pytest.raises(UserError, match="0.. MB unpack to 1.. MB or more, as images do not"):
        load_saved_dataset(survey(tmp_path)[0], OPTIONS)


def test_splits_of_a_data_set_may_have_other_names(tmp_path):
    save(tmp_path / "one", ("training", "dev", "extra"))
    source = load_saved_dataset(survey(tmp_path / "one")[0], OPTIONS)
    assert {*source.splits} == {"train", "validation"} and source.warnings == ["splits that are not used: extra"]
    save(tmp_path / "two", ("train", "val", "validation"))
    with pytest.raises(UserError, match="val and validation are both taken for validation; rename one"):
        load_saved_dataset(survey(tmp_path / "two")[0], OPTIONS)

import hashlib
import shutil
from collections import Counter

import numpy as np
import pyarrow
import pytest
import scipy.io
from datasets import ClassLabel, Dataset, Features, Image, Value

from config.cli import parse_config
from data import dataset
from data.dataset import build_datasets, check_official_counts, load_vgg_folder
from data.labels import CLASS_NAMES, official_counts
from tests.conftest import FLOWERS
from utils.image_utils import open_image
from utils.logging_utils import UserError, setup_logging


def build(*argv):
    return build_datasets(parse_config(list(argv)))


def is_memory_mapped(rows) -> bool:
    return bool(rows.cache_files)


# ---- synthetic


def test_synthetic_rows(few_drawings):
    data = build("--preset", "tiny")
    assert set(data.train.column_names) == {"image", "label", "id"}
    assert isinstance(data.train[0]["image"]["bytes"], bytes)
    assert Counter(data.validation["label"]) == dict.fromkeys(range(10), 2)


# ---- parquet, as on the hub


@pytest.fixture
def parquet_folder(tmp_path):
    """Files with the schema of the hub data set: image, 0-based label; `names` adds label names."""

    def make(labels=range(102), names=None, columns=("image", "label"), splits=("train", "validation", "test")):
        pixel = {"bytes": b"not decoded here", "path": None}
        features = Features({
            columns[0]: Image(decode=False), columns[1]: ClassLabel(names=names) if names else Value("int64")
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
    assert is_memory_mapped(data.train)


def test_parquet_folder_with_its_own_names(parquet_folder):
    data = build("--dataset", parquet_folder(labels=[0, 1, 1], names=["oak_tree", "ash"]))
    assert data.class_names == ["oak tree", "ash"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"columns": ("photo", "label")}, "has the columns photo, label; expected are image and label, rename them"),
        ({"columns": ("img", "label"), "names": ["a", "b"], "labels": [0, 1]}, "has the columns img, label; expected"),
        ({"splits": ("train", "test")}, "no parquet file for validation"),
        ({"labels": range(1, 103)}, "labels run from 1 to 102; expected are 0 to 101"),
        ({"labels": [1, 1], "names": ["a", "b"]}, "only one class"),
        ({"labels": [0, 1, 3]}, "labels of train run to 3 and carry no names.*write them as a ClassLabel"),
    ],
)
def test_parquet_folder_that_differs_is_told_with_what_was_expected(change, words, parquet_folder):
    with pytest.raises(UserError, match=words):
        build("--dataset", parquet_folder(**change))


@pytest.mark.parametrize("stream", [(), ("--streaming", "true", "--max-steps", "5")])
def test_a_parquet_file_that_is_gone_is_told_by_the_names_of_the_others(stream, parquet_folder, tmp_path, capsys):
    setup_logging()
    folder = parquet_folder(labels=[0, 1], names=["a", "b"])
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "train-00002-of-00004.parquet")
    with pytest.raises(UserError, match=r"train-\*-of-00004: 1 of 4 files are there; add the others, or go on without"):
        build("--dataset", folder, *stream)
    assert build("--dataset", folder, "--allow-missing", "true", *stream).class_names == ["a", "b"]
    assert "train-*-of-00004: 1 of 4 files are there; going on without the others" in capsys.readouterr().out


def test_parquet_photos_of_one_name_in_two_splits_are_told_apart(parquet_folder, tmp_path):
    folder = parquet_folder(labels=[0, 1], names=["a", "b"])
    for split in ("validation", "test"):
        shutil.copy(tmp_path / "train-00000-of-00001.parquet", tmp_path / f"{split}-00000-of-00001.parquet")
    data = build("--dataset", folder)
    assert data.train["id"] == ["train-000000", "train-000001"] and data.test["id"] == ["test-000000", "test-000001"]


def test_parquet_photos_are_not_copied_into_memory(parquet_folder, tmp_path):
    image = {"bytes": bytes(2**20), "path": "x.jpg"}
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a", "b"])})
    for split in ("train", "validation", "test"):
        rows = [{"image": image, "label": index % 2} for index in range(40)]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    build("--dataset", str(tmp_path))  # the first reading fills the cache
    before = pyarrow.total_allocated_bytes()
    data = build("--dataset", str(tmp_path))
    assert len(data.train) == 40 and pyarrow.total_allocated_bytes() - before < 10 * 2**20


def test_parquet_file_that_is_none(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"train.parquet: is no parquet file \(.*\); write it again"):
        build("--dataset", str(tmp_path))


def test_parquet_files_that_do_not_go_together(tmp_path):
    for name, column in (("train-0", "label"), ("train-1", "name"), ("val-0", "label"), ("test-0", "label")):
        Dataset.from_dict({"image": ["a"], column: [1]}).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match="the parquet files cannot be read"):
        build("--dataset", str(tmp_path))


def test_hub_out_of_reach_names_repository_and_next_move():
    with pytest.raises(
        UserError, match=r"Donghyun99/Oxford-Flower-102 at revision abc .*check the network and HF_TOKEN, or"
    ):
        build("--dataset-revision", "abc")


def test_hub_splits_of_another_size_are_told(parquet_folder, monkeypatch):
    folder = parquet_folder()
    real = dataset.load_dataset
    monkeypatch.setattr(
        dataset, "load_dataset",
        lambda name, revision: real("parquet", data_files={s: f"{folder}/{s}-*.parquet" for s in dataset.SPLITS}),
    )  # fmt: skip
    with pytest.raises(UserError, match="split train has 102 images where 1020 are expected"):
        build()


# ---- the official release


@pytest.fixture
def vgg_folder(tmp_path, monkeypatch):
    """The layout of the release with 6 images in 2 classes, its own md5 sums taken as the official ones."""
    (tmp_path / "jpg").mkdir()
    for image in range(1, 7):
        from PIL import Image as Picture

        Picture.new("RGB", (50, 40), (image * 30, 0, 0)).save(tmp_path / "jpg" / f"image_{image:05d}.jpg")
    scipy.io.savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[1, 2, 1, 2, 1, 2]], dtype=np.uint8)})
    ids = {"trnid": [[2, 1]], "valid": [[4, 3]], "tstid": [[5, 6]]}
    scipy.io.savemat(tmp_path / "setid.mat", {key: np.array(value, dtype=np.uint16) for key, value in ids.items()})
    sums = {name: hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in dataset.VGG_MD5}
    monkeypatch.setattr(dataset, "VGG_MD5", sums)
    return tmp_path


def test_vgg_layout(vgg_folder):
    data = build("--dataset", str(vgg_folder))
    assert [row["id"] for row in data.train] == ["image_00001", "image_00002"]
    assert data.train["label"] == [0, 1] and data.class_names == list(CLASS_NAMES)
    assert is_memory_mapped(data.train) and data.train[0]["image"]["bytes"] is None
    assert open_image(data.train[0]["image"]).size == (50, 40)


def test_vgg_photos_missing_are_counted_and_named(vgg_folder):
    (vgg_folder / "jpg" / "image_00004.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 8189 images are missing \(image_00004.jpg.*--allow-missing true"):
        build("--dataset", str(vgg_folder))
    assert len(build("--dataset", str(vgg_folder), "--allow-missing", "true").validation) == 1


def test_vgg_file_that_is_not_the_official_one(vgg_folder):
    with open(vgg_folder / "setid.mat", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="setid.mat: is not the official file"):
        build("--dataset", str(vgg_folder))
    (vgg_folder / "imagelabels.mat").unlink()
    with pytest.raises(UserError, match="imagelabels.mat: is missing"):
        build("--dataset", str(vgg_folder))


@pytest.mark.skipif(not (FLOWERS / "setid.mat").exists(), reason=f"the official release is not in {FLOWERS}")
def test_the_real_release():
    data = load_vgg_folder(FLOWERS, allow_missing=True)
    assert len(data.train) == 1020 and Counter(data.train["label"]) == dict.fromkeys(range(102), 10)
    assert not set(data.train["id"]) & (set(data.validation["id"]) | set(data.test["id"]))
    assert min(open_image(data.train[0]["image"]).size) >= 500


def test_official_counts_add_up_and_a_full_split_is_held_to_them(few_drawings):
    assert [sum(official_counts(split)) for split in ("train", "validation", "test")] == [1020, 1020, 6149]
    rows = Dataset.from_dict({"label": [label % 102 for label in range(1020)]})
    data = dataset.PlantData(rows, rows, rows, list(CLASS_NAMES), "some copy")
    check_official_counts(data)
    shifted = Dataset.from_dict({"label": [0, *[label % 102 for label in range(1019)]]})
    with pytest.raises(UserError, match="split train has 11 images of 'pink primrose' where the official one has 10"):
        check_official_counts(data._replace(train=shifted))


# ---- your own plants


def test_image_folder_is_split_with_the_balance_kept(image_folder):
    root = image_folder({"oak_tree": 20, "ash [x]*": 40})
    data = build("--dataset", str(root))
    assert data.class_names == ["ash [x]*", "oak tree"]
    assert (len(data.train), len(data.validation), len(data.test)) == (48, 6, 6)
    for rows in (data.train, data.validation, data.test):
        assert abs(Counter(rows["label"])[0] - 2 / 3 * len(rows)) <= 1
    ids = [set(rows["id"]) for rows in (data.train, data.validation, data.test)]
    assert len(set.union(*ids)) == 60 and is_memory_mapped(data.train)
    assert data.train["id"] == build("--dataset", str(root)).train["id"]
    assert data.train["id"] != build("--dataset", str(root), "--seed", "1").train["id"]


def test_image_folder_with_splits_of_its_own(image_folder):
    image_folder({"oak": 4, "ash": 4}, "train")
    image_folder({"oak": 2, "ash": 1}, "val")
    data = build("--dataset", str(image_folder({"ash": 2}, "test")))
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 3, 2)
    assert data.test["label"] == [0, 0] and data.test[0]["id"] == "test/ash/0.png"


def test_new_photos_in_a_folder_are_seen(image_folder):
    root = image_folder({"oak": 4, "ash": 4})
    before = build("--dataset", str(root))
    image_folder({"oak": 6, "ash": 4})
    after = build("--dataset", str(root))
    assert len(after.train) == len(before.train) + 2


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, "no such folder; name one, or use oxford_flowers102 or synthetic"),
        ({"oak": 0}, "class 'oak' has no image to train on"),
        ({"oak": 5, "ash": 0}, "class 'ash' has no image to train on; add some to its folder, or remove the folder"),
        ({"oak": 5}, "only one class"),
        ({"oak": 5, "ash": 1}, "class 'ash' has too few images to split into train, val and test; it needs 3 or more"),
        ({"oak": 5, "ash": 2}, "class 'ash' has too few images to split"),
        ({"oak tree": 5, "oak_tree": 5}, "class name 'oak tree' is empty or stands for two classes"),
    ],
)
def test_image_folder_that_cannot_be_used(counts, words, image_folder):
    with pytest.raises(UserError, match=words):
        build("--dataset", str(image_folder(counts)))


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="no images found; expected <class name>/photo.jpg"):
        build("--dataset", str(tmp_path))


def test_a_photo_in_train_and_test_is_told(few_drawings, monkeypatch):
    rows = dataset.draw_split("train")
    monkeypatch.setattr(dataset, "draw_split", lambda split: rows)
    with pytest.raises(UserError, match="image train-00000 stands in two splits"):
        build("--preset", "tiny")


# ---- shares


def test_sample_fraction_keeps_a_class_of_one_image(image_folder):
    image_folder({"oak": 4, "ash": 1}, "train")
    image_folder({"oak": 2, "ash": 1}, "val")
    data = build("--dataset", str(image_folder({"oak": 1}, "test")), "--sample-fraction", "0.5")
    assert (Counter(data.train["label"]), Counter(data.validation["label"])) == ({0: 1, 1: 2}, {0: 1, 1: 1})


def test_sample_fraction_keeps_balance_and_is_seeded(image_folder):
    root = str(image_folder({"oak": 50, "ash": 50}))
    half = build("--dataset", root, "--sample-fraction", "0.5")
    assert Counter(half.train["label"]) == {0: 20, 1: 20} and len(half.test) == 10
    assert half.train["id"] == build("--dataset", root, "--sample-fraction", "0.5").train["id"]
    tiny = build("--dataset", root, "--sample-fraction", "0.001")
    assert Counter(tiny.train["label"]) == {0: 1, 1: 1}


def test_train_on_val_learns_from_both(few_drawings):
    data = build("--preset", "tiny", "--train-on-val", "true")
    assert len(data.train) == 68 and data.validation is None


def test_strangers_are_read_whatever_they_show(image_folder, tmp_path):
    rows = dataset.load_ood_images(image_folder({"cat": 2, "dog": 3}))
    assert len(rows) == 5 and set(rows["label"]) == {0}
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="--ood .*: no images found there"):
        dataset.load_ood_images(tmp_path / "none")


def test_twins_are_named_where_they_are():
    assert dataset.known_duplicates(["image_07309", "image_00001"]) == ["image_07309 = image_07307 (train)"]


def test_a_limited_split_is_the_same_every_time(image_folder):
    rows = build("--dataset", str(image_folder({"oak": 20, "ash": 20}))).train
    assert dataset.take(rows, 7)["id"] == dataset.take(rows, 7)["id"] and len(dataset.take(rows, 7)) == 7
    assert dataset.take(rows, None) is rows and dataset.take(rows, 99) is rows


def test_what_is_not_read_in_a_class_folder_is_told(image_folder, capsys):
    setup_logging()
    root = image_folder({"oak": 6, "ash": 6})
    (root / "oak" / "IMG_1.HEIC").write_bytes(b"x")
    (root / "ash" / "deeper").mkdir()
    build("--dataset", str(root))
    told = capsys.readouterr().out
    assert "2 files or folders inside the class folders are not read" in told and "IMG_1.HEIC" in told


def test_photos_change_the_hash_only_when_they_change_sides(image_folder):
    root = str(image_folder({"oak": 20, "ash": 20}))
    one = dataset.data_fingerprint(build("--dataset", root))
    assert one == dataset.data_fingerprint(build("--dataset", root, "--seed", "42"))
    assert one != dataset.data_fingerprint(build("--dataset", root, "--seed", "1"))

"""Tests of dataset."""

import hashlib
from collections import Counter

import numpy as np
import pytest
import scipy.io
from datasets import Dataset

from config.cli import parse_config
from data import dataset, oxford_flowers, sources
from data.dataset import build_datasets, sample_rows
from data.oxford_flowers import CLASS_NAMES, check_official_counts, known_duplicates, official_counts
from data.sources import load_ood_images
from tests.conftest import FLOWERS
from utils.image_utils import open_image
from utils.logging_utils import UserError, setup_logging


def build(*argv):
    return build_datasets(parse_config(list(argv)))


# ---- synthetic


def test_synthetic_rows(small_splits):
    data = build("--preset", "tiny")
    assert set(data.train.column_names) == {"image", "label", "id"}
    assert isinstance(data.train[0]["image"]["bytes"], bytes)
    assert Counter(data.validation["label"]) == dict.fromkeys(range(10), 2)


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
    sums = {name: hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in oxford_flowers.VGG_MD5}
    monkeypatch.setattr(oxford_flowers, "VGG_MD5", sums)
    return tmp_path


def test_vgg_layout(vgg_folder):
    data = build("--dataset", str(vgg_folder))
    assert [row["id"] for row in data.train] == ["image_00001", "image_00002"]
    assert data.train["label"] == [0, 1] and data.class_names == list(CLASS_NAMES)
    assert data.train[0]["image"]["bytes"] is None
    assert open_image(data.train[0]["image"]).size == (50, 40)


def test_missing_vgg_images_are_counted_and_listed(vgg_folder):
    (vgg_folder / "jpg" / "image_00004.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 8189 images are missing \(image_00004.jpg.*--allow-missing true"):
        build("--dataset", str(vgg_folder))
    assert len(build("--dataset", str(vgg_folder), "--allow-missing", "true").validation) == 1


def test_a_vgg_file_that_is_not_the_official_one(vgg_folder):
    with open(vgg_folder / "setid.mat", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="setid.mat: is not the official file"):
        build("--dataset", str(vgg_folder))
    (vgg_folder / "imagelabels.mat").unlink()
    with pytest.raises(UserError, match="imagelabels.mat: is missing"):
        build("--dataset", str(vgg_folder))


@pytest.mark.skipif(not (FLOWERS / "setid.mat").exists(), reason=f"the official release is not in {FLOWERS}")
def test_the_real_release():
    data = build("--dataset", str(FLOWERS), "--allow-missing", "true")
    assert len(data.train) == 1020 and Counter(data.train["label"]) == dict.fromkeys(range(102), 10)
    assert not set(data.train["id"]) & (set(data.validation["id"]) | set(data.test["id"]))
    assert min(open_image(data.train[0]["image"]).size) >= 500


def test_official_counts_add_up_and_a_full_split_must_have_them():
    assert [sum(official_counts(split)) for split in ("train", "validation", "test")] == [1020, 1020, 6149]
    rows = Dataset.from_dict({"label": [label % 102 for label in range(1020)]})
    check_official_counts({"train": rows, "validation": rows}, "some copy")
    shifted = Dataset.from_dict({"label": [0, *[label % 102 for label in range(1019)]]})
    with pytest.raises(UserError, match="split train has 11 images of 'pink primrose', the official one has 10"):
        check_official_counts({"train": shifted, "validation": rows}, "some copy")


# ---- your own plants


def test_image_folder_is_split_by_class(image_folder):
    root = image_folder({"oak_tree": 20, "ash [x]*": 40})
    data = build("--dataset", str(root))
    assert data.class_names == ["ash [x]*", "oak tree"]
    for rows in (data.train, data.validation, data.test):
        assert set(rows["label"]) == {0, 1}
    ids = [set(rows["id"]) for rows in (data.train, data.validation, data.test)]
    assert len(set.union(*ids)) == 60
    assert data.train["id"] == build("--dataset", str(root)).train["id"]
    assert data.train["id"] != build("--dataset", str(root), "--seed", "1").train["id"]


def test_image_folder_with_given_splits(image_folder):
    image_folder({"oak": 4, "ash": 4}, "train")
    image_folder({"oak": 2, "ash": 1}, "val")
    data = build("--dataset", str(image_folder({"ash": 2}, "test")))
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 3, 2)
    assert data.test["label"] == [0, 0] and data.test[0]["id"] == "test/ash/0.png"


def test_new_images_in_a_folder_are_seen(image_folder):
    root = image_folder({"oak": 4, "ash": 4})
    before = build("--dataset", str(root))
    image_folder({"oak": 6, "ash": 4})
    after = build("--dataset", str(root))
    assert len(after.train) == len(before.train) + 2


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, "no such folder or file; give a folder, a table, owner/name of the hub, oxford_flowers102 or synthetic"),
        ({"oak": 0}, "no images found; expected <class name>/photo.jpg"),
        ({"oak": 5, "ash": 0}, "only one class .'oak'.*; not used: folders without images: 1 .ash"),
        ({"oak": 5}, "only one class"),
        (
            {"oak": 2, "ash": 1},
            "no class has 3 images, one each for train and validation and test; add images, or give",
        ),
        (
            {"oak tree": 5, "oak_tree": 5},
            "only one class .'oak tree'.*; 'oak tree' and 'oak_tree' are read as one class",
        ),
    ],
)
def test_image_folder_that_cannot_be_used(counts, words, image_folder):
    with pytest.raises(UserError, match=words):
        build("--dataset", str(image_folder(counts)))


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="no images found; expected <class name>/photo.jpg"):
        build("--dataset", str(tmp_path))


def test_an_image_in_train_and_test_is_an_error(small_splits, monkeypatch):
    rows = sources.draw_split("train")
    monkeypatch.setattr(sources, "draw_split", lambda split: rows)
    with pytest.raises(UserError, match="image train-00000 is in two splits"):
        build("--preset", "tiny")


# ---- sampling


def test_sample_fraction_keeps_a_class_of_one_image(image_folder):
    image_folder({"oak": 4, "ash": 1}, "train")
    image_folder({"oak": 2, "ash": 1}, "val")
    data = build("--dataset", str(image_folder({"oak": 1}, "test")), "--sample-fraction", "0.5")
    assert (Counter(data.train["label"]), Counter(data.validation["label"])) == ({0: 1, 1: 2}, {0: 1, 1: 1})


def test_sample_fraction_keeps_balance_and_is_seeded(image_folder):
    root = str(image_folder({"oak": 50, "ash": 50}))
    half = build("--dataset", root, "--sample-fraction", "0.5")
    whole = build("--dataset", root)
    halves = {label: round(count / 2) for label, count in Counter(whole.train["label"]).items()}
    assert Counter(half.train["label"]) == halves and len(half.test) == len(whole.test)
    assert half.train["id"] == build("--dataset", root, "--sample-fraction", "0.5").train["id"]
    tiny = build("--dataset", root, "--sample-fraction", "0.001")
    assert Counter(tiny.train["label"]) == {0: 1, 1: 1}


def test_train_on_val_trains_on_both(small_splits):
    data = build("--preset", "tiny", "--train-on-val", "true")
    assert data.num_train == len(data.train) == 68 and data.validation is None


def test_ood_images_are_read_whatever_they_show(image_folder, tmp_path):
    rows = load_ood_images(image_folder({"cat": 2, "dog": 3}))
    assert len(rows) == 5 and set(rows["label"]) == {0}
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="--ood .*: no images found there"):
        load_ood_images(tmp_path / "none")
    with pytest.raises(UserError, match="--ood .*/gone: is no folder; give a folder of images without the classes"):
        load_ood_images(tmp_path / "gone")


def test_ood_images_in_folders_named_as_classes_are_warned_of(image_folder, caplog):
    root = image_folder({"cat": 2, "dog": 3})
    load_ood_images(root, ["oak", "ash"])
    assert not caplog.text
    load_ood_images(root, ["Cat", "oak"])
    assert "has folders named as classes are: cat; the model knows these plants" in caplog.text
    load_ood_images(root / "dog", ["dog", "oak"])
    assert "/dog: has folders named as classes are: dog;" in caplog.text


def test_known_duplicates_are_listed_with_their_split():
    assert known_duplicates(["image_07309", "image_00001"]) == ["image_07309 = image_07307 (train)"]


def test_a_limited_split_is_the_same_every_time(image_folder):
    rows = build("--dataset", str(image_folder({"oak": 20, "ash": 20}))).train
    assert dataset.take(rows, 7)["id"] == dataset.take(rows, 7)["id"] and len(dataset.take(rows, 7)) == 7
    assert dataset.take(rows, None) is rows and dataset.take(rows, 99) is rows


def test_sampled_rows_are_evenly_spaced(small_splits):
    data = build("--preset", "tiny")
    assert sample_rows(data.train, 5)["id"] == [f"train-{index:05d}" for index in (0, 10, 20, 30, 40)]
    assert sample_rows(data.train, 48)["id"] == sample_rows(data.train)["id"] == data.train["id"]


def test_other_classes_or_another_split_than_a_run_learned_are_an_error(image_folder):
    root = str(image_folder({"oak": 20, "ash": 20}))
    data, resplit = build("--dataset", root), build("--dataset", root, "--seed", "1")
    data.assert_matches(["ash", "oak"], data.fingerprint(), "runs/x")
    resplit.assert_matches(["ash", "oak"], None, "runs/x")  # not the run's own data
    with pytest.raises(UserError, match="images: its images changed since runs/x was trained.*; put them back"):
        resplit.assert_matches(["ash", "oak"], data.fingerprint(), "runs/x")
    with pytest.raises(UserError, match=r"its 2 classes are not the 2 that runs/x learned \(ash\)"):
        data.assert_matches(["oak", "elm"], None, "runs/x")
    with pytest.raises(UserError, match=r"not the 3 that runs/x learned \(some are missing\); give images of the same"):
        data.assert_matches(["ash", "elm", "oak"], None, "runs/x")


def test_what_is_not_used_is_logged_with_its_reason(image_folder, capsys):
    setup_logging()
    root = image_folder({"oak": 8, "ash": 8}, "train")
    for name in ("train/oak/IMG_1.MOV", "train/1.png", ".DS_Store", "train/oak/._0.png"):
        (root / name).write_bytes(b"x")
    (root / "more oaks").mkdir()
    data = build("--dataset", str(root))
    assert data.class_names == ["ash", "oak"] and len(data.train) + len(data.validation) + len(data.test) == 16
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")] == [
        "warning: not used: .mov files: 1 (train/oak/IMG_1.MOV)",
        "warning: not used: folders without images: 1 (more oaks)",
        "warning: not used: images in no class folder: 1 (train/1.png)",
    ]


def test_the_fingerprint_changes_only_when_images_change_sides(image_folder):
    root = str(image_folder({"oak": 20, "ash": 20}))
    fingerprint = build("--dataset", root).fingerprint()
    assert fingerprint == build("--dataset", root, "--seed", "42").fingerprint()
    assert fingerprint != build("--dataset", root, "--seed", "1").fingerprint()

"""Tests of splits, copies and groups."""

import difflib
import os
import sqlite3
from collections import Counter
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset, Features, Value

from config.cli import parse_config
from data import copies
from data.copies import CACHE_FILE, find_copies
from data.dataset import build_datasets, check_unreadable_fraction
from data.groups import group_by_name
from data.rows import ROW, SPLITS, Source
from data.splits import hold_out_classes, split_source
from test_trainer import PreFlight
from utils.image_utils import ImageError
from utils.logging_utils import UserError, setup_logging

TENTHS = {"validation": 0.1, "test": 0.1}
JPEG = b"\xff\xd8\xff\xe0"  # how such a file begins


def make_rows(images) -> Dataset:
    """Rows of (id, label), or of (id, label, content) or (id, label, content, group)."""
    rows = []
    for image_id, label, *more in images:
        content = JPEG + (more[0] if more else image_id).encode()
        row = {"image": {"bytes": content, "path": None}, "label": label, "id": image_id}
        rows.append(row | ({"group": more[1]} if len(more) > 1 else {}))
    return Dataset.from_list(rows, features=Features(ROW | {"group": Value("string")} if "group" in rows[0] else ROW))


def make_source(train, names=("daisy", "rose"), **others) -> Source:
    splits = {split: make_rows(images) for split, images in ({"train": train} | others).items()}
    return Source(splits, list(names), "a set")


def images_of(name: str, label: int, count: int) -> list[tuple[str, int]]:
    return [(f"{name}/{index:05d}.jpg", label) for index in range(count)]


TWO = [*images_of("daisy", 0, 30), *images_of("rose", 1, 30)]


def side_of(source: Source) -> dict[str, str]:
    return {image_id: split for split in source.splits for image_id in source.splits[split]["id"]}


# ---- what is missing is cut from train


def test_each_class_is_in_each_split_and_shares_are_near_the_fractions():
    source = make_source([*images_of("daisy", 0, 2000), *images_of("rose", 1, 3)])
    done = split_source(source, {"validation": 0.1, "test": 0.2}, 42)
    counts = {split: Counter(done.splits[split]["label"]) for split in SPLITS}
    assert 150 < counts["validation"][0] < 250 and 330 < counts["test"][0] < 470
    assert [counts[split][1] for split in SPLITS] == [1, 1, 1]
    assert sum(map(len, done.splits.values())) == 2003 and done.warnings == []
    assert done.notes == [
        "validation (10% of each class) and test (20% of each class) not given: cut from train, with --seed 42"
    ]
    assert side_of(done) != side_of(split_source(source, {"validation": 0.1, "test": 0.2}, 1))


def test_groups_have_the_shares_of_the_fractions_too():
    images = [(f"{name}/{plant:05d}_{number}.jpg", label) for label, name in enumerate(("daisy", "rose"))
              for plant in range(10000, 10600) for number in range(3)]  # fmt: skip
    splits = split_source(make_source(images), TENTHS, 42).splits
    assert 280 < len(splits["validation"]) < 440 and 280 < len(splits["test"]) < 440


def test_images_that_are_added_move_no_other():
    before = side_of(split_source(make_source(TWO), TENTHS, 42))
    more = [*images_of("daisy", 0, 60), *images_of("rose", 1, 45)]
    after = side_of(split_source(make_source(more), TENTHS, 42))
    moved = [image_id for image_id, side in before.items() if after[image_id] != side]
    assert all(before[image_id] != "train" for image_id in moved) and len(moved) <= 2  # stand-ins of a small class


@pytest.mark.parametrize("given", ["validation", "test"])
def test_only_the_missing_split_is_taken_from_train(given):
    others = {given: [("other/1.jpg", 0), ("other/2.jpg", 1)]}
    done = split_source(make_source(TWO, **others), TENTHS, 42)
    assert done.splits[given]["id"] == ["other/1.jpg", "other/2.jpg"] and list(done.splits) == list(SPLITS)
    assert sum(map(len, done.splits.values())) == 62 and len(done.splits["train"]) < 60


def test_splits_without_train_are_refused():
    source = Source({"validation": make_rows(TWO), "test": make_rows(TWO)}, ["daisy", "rose"], "a set")
    with pytest.raises(UserError, match="a set: has validation and test, and no train split to learn from; add one"):
        split_source(source, TENTHS, 42)


def test_splits_that_are_published_are_not_touched(small_splits):
    data = build_datasets(parse_config(["--preset", "tiny"]))
    assert data.notes == ["genus of 10 and family of 0 of 10 classes by the invented names"] and data.warnings == []


# ---- few images


def test_classes_with_few_images_are_learned_and_listed_together():
    rare = [image for number in range(6) for image in images_of(f"rare {number}", number + 2, 1 + number % 2)]
    names = ["daisy", "rose", *(f"rare {number}" for number in range(6))]
    done = split_source(make_source([*TWO, *rare], names), TENTHS, 42)
    assert done.class_names == names and {side_of(done)[image_id] for image_id, _ in rare} == {"train"}
    assert done.warnings == [
        (
            "6 classes have fewer than 3 images (rare 0, rare 1, rare 2, rare 3, rare 4, rare 5): they are learned, "
            "not scored; --min-images 3 leaves them out"
        )
    ]


def test_classes_below_min_images_are_not_used_and_labels_are_renumbered():
    names = ["daisy", "rare", "rose"]
    source = make_source([*images_of("rare", 1, 2), *images_of("daisy", 0, 9), *images_of("rose", 2, 9)], names)
    done = split_source(source, TENTHS, 42, min_images=3)
    assert done.class_names == ["daisy", "rose"] and set(done.splits["train"]["label"]) == {0, 1}
    assert {row["id"][:4] for row in done.splits["train"] if row["label"] == 1} == {"rose"}
    assert done.warnings == ["1 class has fewer than 3 images and is not used (--min-images 3): rare (2)"]
    with pytest.raises(
        UserError, match="--min-images 10: 3 of 3 classes have fewer images.*use --min-images 9 or less"
    ):
        split_source(source, TENTHS, 42, min_images=10)


def test_min_images_counts_the_images_of_all_splits():
    others = {"validation": [("v/1", 0), ("v/2", 1)], "test": [("t/1", 0), ("t/2", 1)]}
    done = split_source(make_source([("a/1", 0), ("b/1", 1)], **others), TENTHS, 42, min_images=3)
    assert done.class_names == ["daisy", "rose"] and done.warnings == []


def test_a_close_name_is_looked_for_only_where_it_is_listed(monkeypatch):
    asked = []
    monkeypatch.setattr(difflib, "get_close_matches", lambda name, *_, **__: asked.append(name) or [])
    names = ["daisy", "rose", *(f"fern {number}" for number in range(30))]
    done = split_source(make_source(TWO, names), TENTHS, 42)
    assert len(asked) < 12 and "30 classes have no images in train and are not used: fern 0, " in done.warnings[0]


def test_one_class_is_refused_for_that_and_not_for_its_few_images(image_folder):
    with pytest.raises(UserError, match="only one class .'daisy'.; there is nothing to classify, add a second"):
        build_datasets(parse_config(["--dataset", str(image_folder({"daisy": 3})), "--min-images", "5"]))


def test_no_class_with_enough_images():
    with pytest.raises(
        UserError, match="a set: no class has 3 images, one each for train and validation and test; add"
    ):
        split_source(make_source([("a/1", 0), ("a/2", 0), ("b/1", 1)]), TENTHS, 42)


def test_classes_without_an_image_in_train_are_not_scored():
    scored = {"validation": [("v/1", 0), ("v/2", 1), ("v/3", 2)], "test": [("t/1", 0), ("t/2", 1), ("t/3", 3)]}
    done = split_source(make_source(TWO, ["daisy", "rose", "Roses", "fern"], **scored), TENTHS, 42)
    assert done.class_names == ["daisy", "rose"]
    assert done.splits["validation"]["id"] == ["v/1", "v/2"] and done.splits["test"]["id"] == ["t/1", "t/2"]
    assert done.warnings == ["2 classes have no images in train and are not used: Roses (train has rose), fern"]
    with pytest.raises(
        UserError, match=r"no class of validation is one of train \(fern; train has daisy, rose\); call"
    ):
        split_source(make_source(TWO, ["daisy", "rose", "fern"], validation=[("v/1", 2)]), TENTHS, 42)


# ---- copies


def test_copies_of_a_class_stay_in_one_split():
    copied = [(f"daisy/a copy{number}.jpg", 0, f"daisy/{number:05d}.jpg") for number in range(30)]
    done = split_source(make_source([*TWO, *copied]), TENTHS, 42)
    sides = side_of(done)
    assert all(sides[copy] == sides[original] for copy, _, original in copied) and len(sides) == 90
    assert done.notes[0] == (
        "30 copies of images (daisy/a copy0.jpg of daisy/00000.jpg, daisy/a copy1.jpg of daisy/00001.jpg, "
        "daisy/a copy2.jpg of daisy/00002.jpg, ...): all copies of an image stay in one split"
    )


def test_copies_in_two_classes_are_not_used():
    copied = ("rose/IMG_0099.jpg", 1, "daisy/00001.jpg")
    done = split_source(make_source([*TWO, copied]), TENTHS, 42)
    assert not {"rose/IMG_0099.jpg", "daisy/00001.jpg"} & set(side_of(done)) and len(side_of(done)) == 59
    assert done.warnings == [
        "daisy/00001.jpg and rose/IMG_0099.jpg are the same file in two classes; all 2 images are not used"
    ]
    many = [(f"rose/again{number}.jpg", 1, f"daisy/{number:05d}.jpg") for number in range(5)]
    (warning,) = split_source(make_source([*TWO, *many]), TENTHS, 42).warnings
    assert warning.endswith("again2.jpg, ... are the same file in two classes; all 10 images are not used")


def test_a_class_that_another_holds_again_is_refused():
    again = [(f"rose copy/{number}.jpg", 2, f"rose/{number:05d}.jpg") for number in range(30)]
    with pytest.raises(UserError, match="all images of rose, rose copy are in two classes, such as rose/00000.jpg and"):
        split_source(make_source([*TWO, *again], ("daisy", "rose", "rose copy")), TENTHS, 42)


def test_copies_of_images_that_are_scored_are_not_trained_on():
    copied = {
        "validation": [("v/1.jpg", 0, "daisy/00003.jpg"), ("v/2.jpg", 1), ("v/3.jpg", 1, "rose/00007.jpg")],
        "test": [("t/1.jpg", 0), ("t/2.jpg", 1, "v/2.jpg"), ("t/3.jpg", 1, "rose/00007.jpg")],
    }
    done = split_source(make_source(TWO, **copied), TENTHS, 42)
    assert [len(rows) for rows in done.splits.values()] == [58, 1, 3]
    assert done.warnings == [
        (
            "4 copies of images of a split that is scored (daisy/00003.jpg of v/1.jpg, rose/00007.jpg of t/3.jpg, "
            "v/2.jpg of t/2.jpg): not used for training or selection"
        )
    ]
    with pytest.raises(
        UserError, match="all 60 images of train are copies of images of validation or test.*move these"
    ):
        split_source(
            make_source(TWO, validation=[("v/" + image_id, *of, image_id) for image_id, *of in TWO]), TENTHS, 42
        )


def test_equal_files_that_are_no_images_are_no_copies():
    """They are unreadable images, and reported as such."""
    broken = [
        {"image": {"bytes": b"<html>", "path": None}, "label": number % 2, "id": f"{number}"} for number in range(9)
    ]
    assert find_copies(Dataset.from_list(broken, features=ROW)) == []


@pytest.fixture
def files(tmp_path, monkeypatch):
    """files({name: content}) is rows of such files; the cache is in an empty folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def make(contents: dict[str, bytes]) -> Dataset:
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        rows = [
            {"image": {"bytes": None, "path": str(tmp_path / name)}, "label": 0, "id": name}
            for name in sorted(path.name for path in tmp_path.glob("*.jpg"))
        ]
        return Dataset.from_list(rows, features=ROW)

    return make


def test_only_files_of_equal_size_are_read_and_only_once(files, monkeypatch):
    read = []
    real = copies._hash_file
    monkeypatch.setattr(copies, "_hash_file", lambda path: read.append(os.path.basename(path)) or real(path))
    rows = files({"a.jpg": JPEG + b"1", "b.jpg": JPEG + b"2", "c.jpg": JPEG + b"1", "longer.jpg": JPEG + b"123"})
    assert find_copies(rows) == [[0, 2]] and sorted(read) == ["a.jpg", "b.jpg", "c.jpg"]
    assert find_copies(rows) == [[0, 2]] and len(read) == 3
    rows = files({"b.jpg": JPEG + b"1"})
    os.utime(rows[1]["image"]["path"], ns=(5, 5))  # a clock too coarse for this test would hide the change
    assert find_copies(rows) == [[0, 1, 2]] and read[3:] == ["b.jpg"]


def test_a_cache_that_cannot_be_used_is_none(files, tmp_path, monkeypatch):
    rows = files({"a.jpg": JPEG, "b.jpg": JPEG})
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / CACHE_FILE).write_bytes(b"not a database" * 100)
    assert find_copies(rows) == [[0, 1]]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", rows[0]["image"]["path"])
    assert find_copies(rows) == [[0, 1]]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    with sqlite3.connect(tmp_path / "other" / CACHE_FILE) as other:
        other.execute("CREATE TABLE hashes (another INTEGER)")
    assert find_copies(rows) == [[0, 1]]


def test_files_that_are_gone_or_empty_are_no_copies(files, tmp_path):
    rows = files({"a.jpg": JPEG, "b.jpg": JPEG, "c.jpg": b"", "d.jpg": b""})
    (tmp_path / "b.jpg").unlink()
    assert find_copies(rows) == []


# ---- images of one plant

OBSERVATIONS = [
    (f"{name}/{148000000 + 1000 * label + 13 * plant}_{view}.jpg", label)
    for label, name in enumerate(("daisy", "rose"))
    for plant in range(20)
    for view in (1, 2, 3)
]


def is_apart(source: Source, key) -> bool:
    sides: dict = {}
    for image_id, side in side_of(source).items():
        sides.setdefault(key(image_id), set()).add(side)
    return all(len(found) == 1 for found in sides.values())


def test_observations_that_file_names_tell_stay_in_one_split():
    done = split_source(make_source(OBSERVATIONS), TENTHS, 42)
    assert is_apart(done, lambda image_id: image_id.split("_")[0]) and len(side_of(done)) == 120
    assert done.notes[0] == (
        "120 images in 40 groups by file name (daisy/148000000_1.jpg, daisy/148000000_2.jpg, ...): a group stays in "
        "one split; --group-by sets another rule"
    )


@pytest.mark.parametrize("pattern", [r"^(\d+)_", r"^\w+/(\d+)_", r"\d{5,}"])
def test_group_by_looks_in_file_name_and_path(pattern):
    done = split_source(make_source(OBSERVATIONS), TENTHS, 42, group_by=pattern)
    assert is_apart(done, lambda image_id: image_id.split("_")[0])
    assert "120 images in 40 groups by --group-by (" in done.notes[0] and "sets another rule" not in done.notes[0]


def test_group_by_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match=r"--group-by plant\(\\d\): matches none of 60 images, such as daisy/00000.jpg"):
        split_source(make_source(TWO), TENTHS, 42, group_by=r"plant(\d)")


@pytest.mark.parametrize("pattern", ["(", "[", "", "(?P<x", "a{99999999999}"])
def test_group_by_that_is_no_regular_expression_is_an_error(pattern, capsys):
    with pytest.raises(SystemExit):
        parse_config(["--group-by", pattern])
    assert "not a regular expression" in capsys.readouterr().err


def test_groups_of_the_data_stay_in_one_split_and_the_column_goes():
    grouped = [(f"{number}.jpg", number % 2, f"{number}", f"plant {number % 20}") for number in range(80)]
    single = [(f"{number}.jpg", number % 2, f"{number}", "") for number in range(80, 90)]
    done = split_source(make_source([*grouped, *single]), TENTHS, 42)
    assert is_apart(done, lambda image_id: int(image_id[:-4]) % 20 if int(image_id[:-4]) < 80 else image_id)
    assert "80 images in 20 groups by plant, as the data has it (0.jpg, 20.jpg, ...): a group stays" in done.notes[0]
    assert done.splits["train"].column_names == ["image", "label", "id"]


def test_a_class_of_one_plant_is_learned_with_a_word():
    plant = [(f"elm/{view}.jpg", 2, f"elm{view}", "one") for view in range(9)]
    others = [(image_id, label, image_id, "") for image_id, label in TWO]
    done = split_source(make_source([*others, *plant], ["daisy", "rose", "elm"]), TENTHS, 42)
    assert {side_of(done)[image_id] for image_id, *_ in plant} == {"train"}
    assert done.warnings == ["1 class has fewer than 3 groups of images (elm): they are learned, not scored"]
    with pytest.raises(
        UserError, match="no class has 3 groups of images.*group them otherwise with --group-by, or give"
    ):
        split_source(make_source([(*image[:3], "one") for image in others]), TENTHS, 42)


def test_groups_in_two_given_splits_are_reported():
    train = [image for image in OBSERVATIONS if "_1" in image[0] or "_2" in image[0]]
    scored = [image for image in OBSERVATIONS if "_3" in image[0]]
    done = split_source(make_source(train, validation=scored, test=[("t/1", 0), ("t/2", 1)]), TENTHS, 42)
    assert [len(rows) for rows in done.splits.values()] == [80, 40, 2]
    assert done.warnings == [
        (
            "40 groups of images of one plant by file name (daisy/148000000_1.jpg, daisy/148000000_3.jpg): in two "
            "splits as they are given, so scores come out too high; put a plant's images into one split"
        )
    ]


def groups_of(*stems: str) -> list[set[str]]:
    found: dict[str, set[str]] = {}
    for stem, group in zip(stems, group_by_name([f"rose/{stem}.jpg" for stem in stems], [0] * len(stems))):
        if group:
            found.setdefault(group, set()).add(stem)
    return list(found.values())


@pytest.mark.parametrize(
    "stems",
    [
        [f"IMG_{number:04d}" for number in range(1, 41)],
        [f"DSC_{number}" for number in range(1, 10)],
        [f"{camera}_{number}" for camera in ("IMG", "DSC") for number in range(1, 10)],
        [f"rose_{number}" for number in range(1, 9)],
        [f"image_{number:05d}" for number in range(40)],
        [f"1000{number}_f52e8ee070_n" for number in range(40)],
        [f"IMG_{number}_jpg.rf.{number}abc" for number in range(40)],
        [f"img ({number})" for number in range(1, 41)],
        [f"2024-{month:02d}-{day:02d}" for month in (5, 6) for day in range(1, 10)],
        [f"202405{day}_{number}" for day in (11, 12) for number in range(1, 9)],
        [f"IMG-20240601-WA{number:04d}" for number in range(20)],
        [f"{who}_{number}" for who in ("anna", "ben", "carl") for number in range(1, 9)],
        [f"f52e8ee0{number:02d}a" for number in range(20)],
        [f"rose_aug{number}" for number in range(20)],
        [f"rose copy {number}" for number in range(20)],
    ],
    ids=lambda stems: stems[0],
)
def test_names_that_tell_no_plants(stems):
    assert groups_of(*stems) == []


@pytest.mark.parametrize(
    ("plant", "other"),
    [
        (["plant1a", "plant1b"], ["plant2a", "plant2b", "plant2c"]),
        (["100-01", "100-02"], ["101-01", "101-02"]),
        (["IMG_1_jpg.rf.0a", "IMG_1_jpg.rf.0b"], ["IMG_2_jpg.rf.0c", "IMG_2_jpg.rf.0d"]),
        (["x", "x copy"], ["y", "Copy of y", "y (1)"]),
        (["x", "x - Copy", "x - Copy (2)"], ["y", "y - Kopie"]),
        (["x", "flip_x"], ["y", "y_aug1", "y_aug_2"]),
        (["7669", "7669_90deg", "7669_new30degFlipLR"], ["7670_270deg", "7670_flipTB"]),
    ],
    ids=lambda stems: stems[-1],
)
def test_names_that_tell_plants(plant, other):
    more = ["plant3a", "plant3b", "102-01", "102-02"] if plant[0] in ("plant1a", "100-01") else ["single"]
    found = groups_of(*plant, *other, *more)
    assert set(plant) in found and set(other) in found


def test_a_class_is_one_group_by_name_only_if_a_long_number_says_so():
    ids = [image_id for image_id, _ in OBSERVATIONS[:60]] + [f"elm/999999999_{view}.jpg" for view in (1, 2, 3)]
    assert set(group_by_name(ids, [0] * 60 + [1] * 3)[60:]) == {"999999999"}
    ids[60:] = [f"elm/elm_{view}.jpg" for view in (1, 2, 3)]
    assert set(group_by_name(ids, [0] * 60 + [1] * 3)[60:]) == {""}


def test_names_that_begin_anew_in_each_split_tell_nothing_across_splits():
    ids = [f"{split}/rose/IMG_{number}.jpg" for split in ("train", "test") for number in range(9)]
    assert set(group_by_name(ids, [0] * 18)) == {""}


# ---- reported


def test_notes_and_warnings_are_logged_once(image_folder, capsys):
    setup_logging()
    root = image_folder({"oak": 9, "ash": 9, "elm": 1})
    data = build_datasets(parse_config(["--dataset", str(root)]))
    lines = capsys.readouterr().out.splitlines()
    notes = [f"data | {text}" for text in (*data.notes, "classes: ash, elm, oak")]
    assert notes + [f"warning: {text}" for text in data.warnings] == lines
    assert any("1 class has fewer than 3 images (elm)" in line for line in lines)


def test_the_pre_flight_lists_notes_and_warnings_below_its_line(image_folder):
    root = image_folder({"oak": 9, "ash": 9, "elm": 1})
    first, *rest = PreFlight(parse_config(["--dataset", str(root)])).check_data().splitlines()
    assert first.startswith(f"image folder {root}: ") and all(line.startswith("      ") for line in rest)
    assert "cut from train" in rest[-2] and rest[-1].startswith("      warning: 1 class has fewer than 3 images (elm)")


def test_the_pre_flight_finds_unreadable_images_of_each_split(image_folder):
    root = image_folder({"train/oak": 9, "train/ash": 9, "val/oak": 9, "val/ash": 9})
    (root / "val/oak/x.jpg").write_bytes(b"<html>")
    found = PreFlight(parse_config(["--dataset", str(root)]))
    found.check_data()
    found.collator = SimpleNamespace(describe=lambda row, size: SimpleNamespace(length=7))
    text = found.check_lengths()
    assert text.startswith("7 to 7 tokens")
    assert f" | 1 unreadable: {root}/val/oak/x.jpg: is not an image in any of the formats" in text


@pytest.mark.parametrize(
    ("unreadable", "images", "fraction", "stops"),
    [(2, 60, 0.01, False), (3, 60, 0.01, True), (2, 2, 0.01, True), (1, 1, 0.01, True), (1, 60, 0.0, True)]
    + [(7, 60, 0.2, False), (2, 2, 1.0, False)],
)
def test_one_or_two_unreadable_images_stop_nothing(unreadable, images, fraction, stops):
    names = [f"{number}.jpg: reason" for number in range(unreadable)]
    if stops:
        with pytest.raises(ImageError, match=f"{unreadable} of {images} images cannot be opened"):
            check_unreadable_fraction(names, images, fraction)
    else:
        check_unreadable_fraction(names, images, fraction)


# ---- classes that are held out


def test_unknown_classes_are_in_no_split_and_all_their_images_are_kept():
    names = [f"plant {number}" for number in range(6)]
    others = {"validation": [(f"v{label}", label) for label in range(6)], "test": [("t3", 3)]}
    source = make_source([(f"{label}/{number}", label) for label in range(6) for number in range(4)], names, **others)
    class_of = {
        image: names[label] for rows in source.splits.values() for image, label in zip(rows["id"], rows["label"])
    }
    draws = []
    for seed in range(4):
        done, unknown = hold_out_classes(source, 2, seed)
        gone = set(names) - set(done.class_names)
        for rows in done.splits.values():
            assert all(done.class_names[label] == class_of[image] for image, label in zip(rows["id"], rows["label"]))
        assert len(gone) == 2 and {class_of[image] for image in unknown["id"]} == gone
        assert sorted([*unknown["id"], *side_of(done)]) == sorted(class_of) and set(unknown["label"]) == {0}
        assert all(name in done.notes[-1] for name in gone)
        draws.append(gone)
    assert len(set(map(frozenset, draws))) > 1 and hold_out_classes(source, 2, 0)[0].class_names == [
        name for name in names if name not in draws[0]
    ]
    assert hold_out_classes(source, 0, 0) == (source, None)


def test_two_classes_have_to_be_learned(image_folder):
    root = image_folder({"oak": 9, "ash": 9, "elm": 9})
    config = parse_config(["--dataset", str(root), "--holdout-classes", "2"])
    with pytest.raises(UserError, match="--holdout-classes 2: .* has 3 classes, and two or more .* use 1 or less"):
        build_datasets(config)
    data = build_datasets(parse_config(["--dataset", str(root), "--holdout-classes", "1"]))
    assert len(data.class_names) == 2 and len(data.unknown) == 9 and "oak" not in data.class_names
